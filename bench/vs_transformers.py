"""mask2former.py beside transformers' Mask2Former: the same weights, images and targets, in turns.

A Swin-T network at full size with random weights. Measured are the forward pass and a training step
(matching, loss, backward, AdamW): seconds and peak memory.

Reads:  nothing; the weights are random.
Writes: nothing, unless --json FILE.
Needs:  mask2former.py, bench/turns.py, data/pairs.py; packages: transformers, scipy.

    python bench/vs_transformers.py --sizes 256 512

Dimension key: B batch, H W pixels, N segments of an image.
"""
import functools
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import mask2former
from data.pairs import run
from turns import SIDES, number_of_child, parser_of, peak_memory, report, take_turns

CLASSES = 133                  # COCO panoptic
SEGMENTS = 12                  # of an image
WHAT = "forward", "step"


def write_model(folder):
    """Write a random Swin-T Mask2Former of transformers (100 queries) to a folder."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig
    torch.manual_seed(0)
    swin = mask2former.SWINS["swin_t"]
    backbone = SwinConfig(
        embed_dim=swin["embed_dim"], depths=swin["depths"], num_heads=swin["num_heads"],
        window_size=swin["window_size"][0], drop_path_rate=0.3,
        out_features=["stage1", "stage2", "stage3", "stage4"])
    config = Mask2FormerConfig(backbone_config=backbone, num_labels=CLASSES)
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)


def random_batch(size, n, device):
    """n images (B, 3, H, W) in 0..1, and their targets: rectangles."""
    rng = np.random.default_rng(0)
    targets = []
    for _ in range(n):
        masks = torch.zeros(SEGMENTS, size, size, dtype=torch.bool)      # (N, H, W)
        for mask in masks:
            y, x = rng.integers(0, size * 3 // 4, 2)
            mask[y:y + size // 4, x:x + size // 3] = True
        labels = torch.from_numpy(rng.integers(0, CLASSES, SEGMENTS))    # (N,)
        targets.append({"labels": labels.to(device), "masks": masks.to(device)})
    images = torch.from_numpy(rng.random((n, 3, size, size), np.float32))
    return images.to(device), targets


class Ours:
    def __init__(self, folder, device):
        self.model = mask2former.load(folder).to(device)
        self.net = self.model

    def forward(self, images):
        output = self.net(images)[-1]
        return mask2former.mask_logits(output)

    def loss(self, images, targets):
        return self.model.loss(self.net(images), targets)[0]


class Theirs:
    def __init__(self, folder, device):
        from transformers import Mask2FormerForUniversalSegmentation
        self.model = Mask2FormerForUniversalSegmentation.from_pretrained(folder).to(device).eval()
        self.net = self.model
        self.mean = torch.tensor(mask2former.MEAN, device=device).view(3, 1, 1)
        self.std = torch.tensor(mask2former.STD, device=device).view(3, 1, 1)

    def normalise(self, images):
        return (images - self.mean) / self.std

    def forward(self, images):
        return self.net(self.normalise(images)).masks_queries_logits

    def loss(self, images, targets):
        masks = [target["masks"].float() for target in targets]
        labels = [target["labels"] for target in targets]
        return self.net(self.normalise(images), mask_labels=masks, class_labels=labels).loss


def build(side, what, folder, size, args):
    """The call that does `what`, one of WHAT, by one side."""
    library = {"ours": Ours, "theirs": Theirs}[side](folder, args.device)
    if side in args.compile:
        library.net = torch.compile(library.model)
    images, targets = random_batch(size, args.batch, args.device)
    if what == "forward":
        return torch.no_grad()(functools.partial(library.forward, images))
    optimiser = torch.optim.AdamW(library.model.parameters(), 1e-6, fused=True)

    def step():
        loss = library.loss(images, targets)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return loss.detach()
    return step


def measure(args, folder, argv):
    """Yield the rows of the table: times first, then memory in MB."""
    cases = [(size, what) for size in args.sizes for what in args.what]
    for size, what in cases if args.rounds else ():
        calls = {side: build(side, what, folder, size, args) for side in SIDES}
        seconds, outputs = take_turns(calls, args.rounds, args.device)
        ours, theirs = (outputs[side] for side in SIDES)
        # The losses compare masks at other random points, so they differ by some percent.
        difference = ((ours - theirs).abs().max() / theirs.abs().max()).item()
        yield dict(what=f"{size} px, {what}, s", **seconds, difference=difference)
    for size, what in cases if args.memory else ():
        peaks = {side: number_of_child(*argv, "--peak", side, what, folder, size) for side in SIDES}
        yield dict(what=f"{size} px, {what}, MB", **peaks)


def print_peak(args):
    """What a process that measures memory does. Both sides start from the same imports."""
    from transformers import Mask2FormerForUniversalSegmentation  # noqa: F401
    side, what, folder, size = args.peak
    args.compile = []
    repeat = 2 if what == "step" else 1
    print(peak_memory(lambda: build(side, what, folder, int(size), args), args.device, repeat))


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = parser_of(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--sizes", type=int, nargs="+", default=[256, 512], help="sides of the square images")
    add("--batch", type=int, default=1, help="images at a time")
    add("--what", nargs="+", choices=WHAT, default=list(WHAT), help="what is measured")
    add("--compile", nargs="*", choices=SIDES, default=[], help="torch.compile these sides (times only)")
    args = parser.parse_args(argv)
    if args.peak:
        return print_peak(args)
    with tempfile.TemporaryDirectory(prefix="mask2former-swin-tiny-coco-panoptic-") as folder:
        write_model(folder)
        report(measure(args, folder, argv), args)


if __name__ == "__main__":
    run(main)
