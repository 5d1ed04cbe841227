"""`tiny` beside a plain U-Net on CamVid at 240 x 180, from scratch: the same pairs, augmentation and minutes.

Both see the batches of train.py's `tiny` recipe under AdamW and a cosine schedule. How many steps fit in the
time is measured first, on this machine, so nothing else should run on it; or each of two processes trains one
of them (`--only`) with half of the cores. With `--steps` as many as that are trained, on any device, which
repeats a run of known pace for other seeds. mIoU of val and test in percent.

Reads:  data/camvid/{train,val,test} (python data/camvid/prepare.py --root RAW)
Writes: OUT/{tiny,unet}/ and OUT/{tiny,unet}.json, the metrics
Needs:  train.py, mask2former.py

    python bench/camvid.py --minutes 60
"""
import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train as T  # noqa: E402


class UNet(nn.Module):
    """Ronneberger's U-Net with group norm: (B, 3, H, W) in 0..1 -> (B, K, H, W) logits, any size."""

    def __init__(self, classes, widths=(32, 64, 128, 256)):
        super().__init__()
        self.down = nn.ModuleList(self.block(a, b) for a, b in zip((3,) + widths, widths))
        self.up = nn.ModuleList(self.block(a + b, b) for a, b in zip(widths[:0:-1], widths[-2::-1]))
        self.head = nn.Conv2d(widths[0], classes, 1)

    @staticmethod
    def block(a, b):
        return nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.GroupNorm(8, b), nn.ReLU(True),
                             nn.Conv2d(b, b, 3, padding=1, bias=False), nn.GroupNorm(8, b), nn.ReLU(True))

    def forward(self, x):
        H, W = x.shape[2:]
        x, skips = F.pad(x - 0.5, (0, -W % 8, 0, -H % 8)), []
        for i, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if i else x)
            skips.append(x)
        for block, skip in zip(self.up, skips[-2::-1]):
            x = block(torch.cat([F.interpolate(x, scale_factor=2, mode="bilinear"), skip], 1))
        return self.head(x)[:, :, :H, :W]


def train_unet(net, batches, cfg, device):
    optimiser = torch.optim.AdamW(net.parameters(), cfg["lr"], weight_decay=0.05, fused=True)
    for step in tqdm(range(cfg["steps"]), "U-Net", mininterval=5):
        optimiser.param_groups[0]["lr"] = cfg["lr"] * T.rate("cosine", step, cfg["steps"], 30)
        images, truth = batches[step]
        ids = torch.stack([(t["masks"] * (t["labels"] + 1)[:, None, None]).sum(0) for t in truth])
        logits = net(images.to(device) / 255)
        F.cross_entropy(logits, ids.to(device) - 1, ignore_index=-1).backward()         # (B, H, W), -1: void
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    return net.eval()


@torch.no_grad()
def score_unet(net, pairs, device):
    meter = T.Confusion(pairs.classes)
    for image, labels in (pairs[i] for i in range(len(pairs))):
        meter.add(net(image[None].to(device) / 255)[0].argmax(0).cpu().numpy() + 1, labels[0].numpy())
    return meter.result()


def contender(name, cfg, real, out, device, workers=0):
    """Trains one of the two for cfg["steps"] -> a function Pairs -> metrics."""
    torch.manual_seed(cfg["seed"])
    batches = T.Batches(real, [], cfg)
    if name == "tiny":
        model = T.train(T.build(cfg, real.classes, None).to(device), batches, out, cfg, device,
                        workers=workers)
        return lambda pairs: T.evaluate(model, pairs, cfg, device)
    net = train_unet(UNet(len(real.classes)).to(device), batches, cfg, device)
    T.write(out / "unet.pt", lambda part: torch.save(net.state_dict(), part))
    return lambda pairs: score_unet(net, pairs, device)


def seconds_a_step(name, cfg, real, device, workers, steps=10):
    took = []
    for n in (2, 2 + steps):                                            # the difference leaves set-up out
        with tempfile.TemporaryDirectory() as out:
            start = time.perf_counter()
            contender(name, dict(cfg, steps=n), real, Path(out), device, workers)
            took.append(time.perf_counter() - start)
    return (took[1] - took[0]) / steps


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", default=str(ROOT / "data/camvid"), help="folder with train, val and test")
    parser.add_argument("--out", type=Path, default=Path("out/camvid/bench"), help="folder of the results")
    parser.add_argument("--minutes", type=float, default=60, help="training time of each")
    parser.add_argument("--steps", type=int, help="train as many steps instead")
    parser.add_argument("--only", choices=["tiny", "unet"], help="train one of the two")
    parser.add_argument("--workers", type=int, default=0, help="processes that load data for tiny")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ...")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        real = T.Pairs(Path(args.data) / "train")
        tests = {split: T.Pairs(Path(args.data) / split, real) for split in ("val", "test")
                 if (Path(args.data) / split).is_dir()}
        cfg = T.settings(T.flags().parse_args(["--seed", str(args.seed)]), real, [], 1)
        device = T.start(args.device)[0]
        for name in [args.only] if args.only else ["tiny", "unet"]:
            pace = None if args.steps else seconds_a_step(name, cfg, real, device, args.workers)
            own = dict(cfg, steps=args.steps or max(1, round(args.minutes * 60 / pace)))
            score = contender(name, own, real, args.out / name, device, args.workers)
            found = {split: score(pairs) for split, pairs in tests.items()}
            result = dict(found, steps=own["steps"], s_per_step=pace)
            T.write(args.out / f"{name}.json", lambda part: part.write_text(json.dumps(result, indent=1)))
            print(name, own["steps"], "steps", {k: round(v["mIoU"], 1) for k, v in found.items()}, flush=True)
    except T.BadInput as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
