"""`tiny` beside a plain U-Net on CamVid at 240 x 180, from scratch: the same pairs, augmentation and minutes.

Both see the batches of train.py's `tiny` recipe under AdamW and a cosine schedule. How many steps fit into
the time is measured first, on this machine, so nothing else should run on it; or each of two processes trains
one of them (`--only`) with half of the cores. `--steps` sets the number instead, on any device: that repeats
a run of known pace for other seeds. mIoU of val and test in percent.

Reads:  data/camvid/{train,val,test} (python data/camvid/prepare.py --root RAW)
Writes: OUT/{tiny,unet}/ and OUT/{tiny,unet}.json, the metrics
Needs:  train.py, diffusion.py, data/pairs.py

    python bench/camvid.py --minutes 60

Dimension key: B batch, K classes, H W pixels.
"""
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.pairs import atomic_write, number, run, write_json  # noqa: E402
from train import (MeanIoU, evaluate_splits, format_score, open_data, parse, rate, settings,  # noqa: E402
                   to_tensor, train_segmenter, training_batches, training_flags)


class UNet(nn.Module):
    """Ronneberger's U-Net with group norm: (B, 3, H, W) in 0..1 -> (B, K, H, W) logits, any size."""

    def __init__(self, K, widths=(32, 64, 128, 256)):
        super().__init__()
        self.down = nn.ModuleList(self.block(a, b) for a, b in zip((3,) + widths, widths))
        self.up = nn.ModuleList(self.block(a + b, b) for a, b in zip(widths[:0:-1], widths[-2::-1]))
        self.head = nn.Conv2d(widths[0], K, 1)

    @staticmethod
    def block(a, b):
        return nn.Sequential(
            nn.Conv2d(a, b, 3, padding=1, bias=False), nn.GroupNorm(8, b), nn.ReLU(True),
            nn.Conv2d(b, b, 3, padding=1, bias=False), nn.GroupNorm(8, b), nn.ReLU(True))

    def forward(self, x):
        H, W = x.shape[2:]
        x = F.pad(x - 0.5, (0, -W % 8, 0, -H % 8))
        skips = []
        for i, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if i else x)                      # (B, C, H / 2^i, W / 2^i)
            skips.append(x)
        for block, skip in zip(self.up, skips[-2::-1]):
            x = F.interpolate(x, scale_factor=2, mode="bilinear")
            x = block(torch.cat([x, skip], 1))
        return self.head(x)[:, :, :H, :W]                                  # (B, K, H, W)


def train_unet(net, batches, cfg, device):
    optimiser = torch.optim.AdamW(net.parameters(), cfg["lr"], weight_decay=0.05, fused=True)
    for step in tqdm(range(cfg["steps"]), "U-Net", mininterval=5):
        images, truth = batches[step]
        ids = [(t["masks"] * (t["labels"] + 1)[:, None, None]).sum(0) for t in truth]
        ids = torch.stack(ids).to(device)                                  # (B, H, W), 0 void
        logits = net(images.to(device) / 255)                              # (B, K, H, W)
        F.cross_entropy(logits, ids - 1, ignore_index=-1).backward()
        nn.utils.clip_grad_norm_(net.parameters(), cfg["clip"])
        share = rate(cfg["schedule"], step, cfg["steps"], cfg["warmup"])
        optimiser.param_groups[0]["lr"] = cfg["lr"] * share
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    return net.eval()


@torch.no_grad()
def evaluate_unet(net, pairs, device):
    meter = MeanIoU(pairs.classes)
    for i in range(len(pairs)):
        pair = pairs.read(i)
        logits = net(to_tensor(pair["image"])[None].to(device) / 255)
        ids = logits[0].argmax(0).cpu().numpy() + 1
        meter.add((ids, None, None), (pair["ids"], None))
    return meter.result()


def train_and_evaluate(name, args, cfg, real, splits, out):
    """Train one of the two in the folder `out` -> {split: metrics}."""
    if name == "tiny":
        model = train_segmenter(args, cfg, real, [], out)
        return evaluate_splits(args, model, splits)
    torch.manual_seed(args.seed)
    net = UNet(len(real.classes)).to(args.device)
    train_unet(net, training_batches(cfg, real), cfg, args.device)
    with atomic_write(out / "unet.pt") as temporary:
        torch.save(net.state_dict(), temporary)
    return {split: evaluate_unet(net, pairs, args.device) for split, pairs in splits.items()}


def seconds_per_step(name, args, cfg, real, steps=10):
    seconds = []
    for n in (2, 2 + steps):                                               # the difference leaves set-up out
        with tempfile.TemporaryDirectory() as out:
            start = time.perf_counter()
            train_and_evaluate(name, args, dict(cfg, steps=n), real, {}, Path(out))
            seconds.append(time.perf_counter() - start)
    return (seconds[1] - seconds[0]) / steps


def main(argv=None):
    parser = training_flags(__doc__.split("\n")[0])
    parser.set_defaults(data="camvid", out=Path("out/camvid/bench"), device="cpu")
    add = parser.add_argument
    add("--seed", type=number(int, 0), default=0, help="another seed, another run")
    add("--minutes", type=number(float, 0, above=True), default=60, help="training time of each, instead of "
        "--steps (%(default)s)")
    add("--only", choices=["tiny", "unet"], help="train one of the two")
    args = parse(parser, argv)
    real, splits = open_data(args)
    for pairs in (real, *splits.values()):
        pairs.keep()
    cfg = settings(args, real, [])
    for name in [args.only] if args.only else ["tiny", "unet"]:
        pace = None if args.steps else seconds_per_step(name, args, cfg, real)
        steps = args.steps or max(1, round(args.minutes * 60 / pace))
        scores = train_and_evaluate(name, args, dict(cfg, steps=steps), real, splits, args.out / name)
        write_json(args.out / f"{name}.json", dict(scores, steps=steps, seconds_per_step=pace))
        shown = {split: format_score(one["mIoU"]) for split, one in scores.items()}
        print(name, steps, "steps", shown)


if __name__ == "__main__":
    run(main)
