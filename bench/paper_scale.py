"""Every stage at the paper's size on one GPU: seconds of a step or an image, and memory at the peak.

The weights are random, of SDXL's shape; the pairs are random too and lie in memory. Text2Mask (all of the
UNet) and Mask2Img (a ControlNet) train by diffusion.fit itself, at 768 px and 4 pictures at a time: mixed
precision, recomputed activations, AdamW, EMA, clipping. Then they sample in bf16, as masksyn.py does. The
segmenter trains by train.train with the ADE20K recipe. Nothing is saved, and the first steps are not timed.

Reads:  nothing.
Writes: nothing.
Needs:  diffusion.py, text2mask.py, mask2img.py, mask2former.py, train.py, bench/vs_diffusers.py,
        data/pairs.py; packages: diffusers, transformers.

    python bench/paper_scale.py                             # one GPU of 80 GB; 7 GB in a temporary folder
    python bench/paper_scale.py --width toy --size 64       # a minute on a CPU: does it run?

Dimension key: B batch, H W pixels, N segments of an image.
"""
import contextlib
import gc
import json
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import diffusion
import mask2former
import train
from data.pairs import FlagParser, number, picture_size, run
from mask2img import Mask2Img
from text2mask import Text2Mask
from turns import clock
from vs_diffusers import CAPTION, WIDTHS, write_sdxl

CLASSES = [dict(name=f"class {i}", isthing=False) for i in range(150)]
STEPS, TIMED = 8, 4            # training steps, and how many of them, the last ones, are timed
MASK_STEPS, IMAGE_STEPS = 25, 40
SEGMENTS = 10                  # of an image of the segmenter
WHAT = "train", "sample", "segmenter"


@contextlib.contextmanager
def without_saves():
    """Inside the block no training saves anything: saving at this size would take longer than the steps."""
    with mock.patch.object(diffusion, "save"), mock.patch.object(train, "save"), \
            mock.patch.object(diffusion.RunFolder, "save"):
        yield


def free_memory():
    """Give back what the last stage held, and forget its peak."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def report(what, seconds, unit="s a step"):
    peak = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else float("nan")
    print(f"{what:44} {seconds:8.3f} {unit:10} {peak:6.1f} GB", flush=True)


# ---- the generators ----------------------------------------------------------------------------------------

def striped_codes(size):
    """(H, W) uint8 codes: stripes of all classes and void."""
    stripes = torch.arange(size[1]) // 16 % (len(CLASSES) + 1)           # (W,)
    return stripes.to(torch.uint8).expand(size).contiguous()


class RandomPairs(torch.utils.data.Dataset):
    """Pairs as text2mask.CaptionedPairs gives them."""

    def __init__(self, size, tokenize):
        self.size = size
        self.tokens = tokenize([CAPTION])[0]

    def __len__(self):
        return 64

    def __getitem__(self, index):
        return {
            "image": torch.rand(3, *self.size) * 2 - 1,
            "codes": striped_codes(self.size).long(),
            "tokens": self.tokens,
            "time_ids": torch.tensor([*self.size, 0, 0, *self.size], dtype=torch.float32),
        }


def time_training(model, args):
    """Train a generator by diffusion.fit -> seconds a step."""
    model.enable_checkpointing()
    pairs = RandomPairs(args.size, model.text.tokenize)
    with tempfile.TemporaryDirectory() as out:
        diffusion.fit(model, model.loss, pairs, out, steps=STEPS, batch=args.batch, lr=1e-5,
                      device=args.device, report_every=TIMED, compile=args.compile)
        lines = Path(out, "log.jsonl").read_text().splitlines()
    return json.loads(lines[-1])["seconds_per_step"]


def time_sampling(model, args, steps):
    """Sample a batch with guidance, twice -> seconds an image of the second time."""
    network = model.checkpoint_part.to(diffusion.precision(args.device))
    network.eval().requires_grad_(False)
    captions = [f"{CAPTION}, {i}" for i in range(args.batch)]
    codes = striped_codes(args.size).expand(args.batch, -1, -1).numpy()  # (B, H, W)
    inputs = (codes, captions) if isinstance(model, Mask2Img) else (captions,)
    for _ in range(2):
        start = clock(args.device)
        model.sample(*inputs, range(args.batch), steps, 2.0, "dpm++")
        seconds = clock(args.device) - start
    return seconds / args.batch


def generators(args):
    with tempfile.TemporaryDirectory() as folder:
        write_sdxl(folder, args.width, args.device)
        for Model, steps in ((Text2Mask, MASK_STEPS), (Mask2Img, IMAGE_STEPS)):
            free_memory()
            model = Model.from_sdxl(folder, args.device, size=args.size, classes=CLASSES)
            name = Model.__name__
            if "train" in args.what:
                seconds = time_training(model, args)
                report(f"{name}, {args.batch} x {args.size[0]} px", seconds)
                free_memory()
            if "sample" in args.what:
                seconds = time_sampling(model, args, steps)
                report(f"{name}, sampling, {steps} steps of dpm++", seconds, "s an image")
            del model


# ---- the segmenter -----------------------------------------------------------------------------------------

class RandomBatches(torch.utils.data.Dataset):
    """Micro-batches as train.Batches gives them. `times`: when each was asked for."""
    rank, world = 0, 1

    def __init__(self, size, batch, device):
        self.size, self.batch, self.device = size, batch, device
        self.times = []

    def __len__(self):
        return STEPS

    def __getitem__(self, n):
        self.times.append(clock(self.device))
        images = torch.randint(256, (self.batch, 3, self.size, self.size), dtype=torch.uint8)
        bands = torch.arange(self.size) * SEGMENTS // self.size          # (H,)
        masks = bands == torch.arange(SEGMENTS)[:, None]                 # (N, H)
        masks = masks[:, :, None].expand(-1, -1, self.size)              # (N, H, W)
        target = {"labels": torch.arange(SEGMENTS), "masks": masks.contiguous()}
        return images, [target] * self.batch


def segmenter(preset, size, batch, args):
    """Train a preset of mask2former.py by train.train."""
    free_memory()
    torch.manual_seed(0)
    model = mask2former.Mask2Former(len(CLASSES), **mask2former.PRESETS[preset]).to(args.device)
    settings = train.RECIPES["ade20k"] | dict(steps=STEPS, accumulate=1, seed=0)
    batches = RandomBatches(size, batch, args.device)
    with tempfile.TemporaryDirectory() as out:
        train.train(model, batches, out, settings, torch.device(args.device), args.compile)
    seconds = (batches.times[-1] - batches.times[-1 - TIMED]) / TIMED
    report(f"Mask2Former {preset}, {batch} x {size} px", seconds)


def main(argv=None):
    parser = FlagParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--width", choices=WIDTHS, default="sdxl", help="of the generators' networks")
    add("--size", type=picture_size, default=(768, 768), help="of the generators' pictures")
    add("--batch", type=number(int, 1), default=4, help="pictures of the generators at a time")
    add("--what", nargs="+", choices=WHAT, default=list(WHAT), help="what is measured")
    add("--compile", action="store_true", help="torch.compile what is trained")
    add("--device", default="auto", help="cpu, cuda, cuda:1 ...")
    args = parser.parse_args(argv)
    args.device = str(diffusion.setup(args.device)[0])
    cases = [("resnet50", 512, 16), ("swin_l", 640, 2)] if args.width == "sdxl" else [("tiny", 64, 2)]
    with without_saves():
        if {"train", "sample"} & set(args.what):
            generators(args)
        for preset, size, batch in cases if "segmenter" in args.what else ():
            segmenter(preset, size, batch, args)


if __name__ == "__main__":
    run(main)
