"""mask2former.py beside transformers' Mask2Former: the same weights, images and targets, turn by turn.

Swin-T at full size with random weights. Measured: the forward pass, a training step (matching, loss,
backward, AdamW), and the peak memory of each. The two take turns within one process, so that other load of
the machine falls on both; the table gives medians. Memory is measured in processes of their own: on the CPU
the highest resident size above that of a process with everything imported and nothing built, on CUDA the
allocator's peak.

Needs:  mask2former.py; packages: transformers, scipy
Writes: nothing, unless --json FILE

    python bench/vs_transformers.py --sizes 256 512
"""
import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import mask2former as m2f  # noqa: E402

CLASSES = 133


def make_weights(folder):
    """A random Swin-T Mask2Former of transformers (COCO panoptic: 133 classes, 100 queries) in `folder`."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig
    torch.manual_seed(0)
    width, depths, heads, window = m2f.SWINS["swin_t"]
    swin = SwinConfig(embed_dim=width, depths=list(depths), num_heads=list(heads), window_size=window,
                      drop_path_rate=0.3, out_features=[f"stage{i}" for i in (1, 2, 3, 4)])
    config = Mask2FormerConfig(backbone_config=swin, num_labels=CLASSES)
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)


def batch(size, n, device):
    """n images (n, 3, size, size) in 0..1 and targets: 12 rectangles each."""
    rng = np.random.default_rng(0)
    truth = []
    for _ in range(n):
        masks = torch.zeros(12, size, size, dtype=torch.bool)
        for mask in masks:
            y, x = rng.integers(0, size * 3 // 4, 2)
            mask[y:y + size // 4, x:x + size // 3] = True
        truth.append({"labels": torch.from_numpy(rng.integers(0, CLASSES, 12)).to(device),
                      "masks": masks.to(device)})
    return torch.from_numpy(rng.random((n, 3, size, size), np.float32)).to(device), truth


def ours(folder, device, compiled):
    model = m2f.load(folder).to(device)
    net = torch.compile(model) if compiled else model
    return model, lambda x, truth: model.loss(net(x), truth)[0], net


def theirs(folder, device, compiled):
    from transformers import Mask2FormerForUniversalSegmentation
    model = Mask2FormerForUniversalSegmentation.from_pretrained(folder).to(device).eval()
    net = torch.compile(model) if compiled else model
    mean, std = (torch.tensor(n, device=device)[:, None, None] for n in (m2f.MEAN, m2f.STD))

    def loss(x, truth):
        return net((x - mean) / std, mask_labels=[t["masks"].float() for t in truth],
                     class_labels=[t["labels"] for t in truth]).loss
    return model, loss, lambda x: net((x - mean) / std)


class Runner:
    """One of the two libraries: run("forward" or "step", images, targets) -> seconds it took."""

    def __init__(self, side, folder, device, compiled=False):
        self.model, self.loss, self.call = {"ours": ours, "theirs": theirs}[side](folder, device, compiled)
        self.optimiser = torch.optim.AdamW(self.model.parameters(), 1e-6, fused=True)
        self.device = device

    def run(self, what, x, truth):
        start = self.now()
        if what == "forward":
            with torch.no_grad():
                out = self.call(x)
                if isinstance(out, list):
                    out[-1]["mask_logits"]
        else:
            self.loss(x, truth).backward()
            self.optimiser.step()
            self.optimiser.zero_grad(set_to_none=True)
        return self.now() - start

    def now(self):
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter()


def resident(name):
    """VmRSS or VmHWM of this process in MB."""
    return int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0]) / 1024


def peak(side, what, size, n, folder, device):
    """MB at the peak of one call, the weights included (a step: gradients and optimiser state as well)."""
    import transformers  # noqa: F401, both sides start from the same imports
    base = resident("VmRSS")
    runner, data = Runner(side, folder, device), batch(size, n, device)
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")        # the peak of loading is not that of running
    for _ in range(2 if what == "step" else 1):              # from the second on the optimiser has its state
        runner.run(what, *data)
    cuda = device.startswith("cuda")
    return torch.cuda.max_memory_allocated() / 2 ** 20 if cuda else resident("VmHWM") - base


def measure(args, folder):
    """Yields rows {"size", "what", "ours", "theirs"} of times in seconds and peaks in MB."""
    runners = {side: Runner(side, folder, args.device, side in args.compile)
               for side in ("ours", "theirs") if args.rounds}
    for size in args.sizes if args.rounds else ():
        data = batch(size, args.batch, args.device)
        for what in args.what:
            times = {side: [] for side in runners}
            for turn in range(args.rounds + 1):                                  # the first turn warms up
                for side in sorted(runners, reverse=turn % 2):
                    times[side].append(runners[side].run(what, *data))
            medians = {side: statistics.median(t[1:]) for side, t in times.items()}
            yield dict(size=size, what=f"{what}, s", **medians)
    for size in args.sizes if args.memory else ():
        for what in args.what:
            asked = [[side, what, str(size), str(args.batch), folder, args.device]
                     for side in ("ours", "theirs")]
            found = [subprocess.run([sys.executable, __file__, "--peak", *a], check=True, capture_output=True,
                                    text=True).stdout.split()[-1] for a in asked]
            yield dict(size=size, what=f"{what}, MB", ours=float(found[0]), theirs=float(found[1]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512], help="side of the square images")
    parser.add_argument("--batch", type=int, default=1, help="images at a time")
    parser.add_argument("--what", nargs="+", choices=("forward", "step"), default=["forward", "step"])
    parser.add_argument("--rounds", type=int, default=5, help="turns of each, 0: memory only")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peaks")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", nargs="*", choices=("ours", "theirs"), default=[],
                        help="torch.compile one or both (times only)")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--peak", nargs=6, help=argparse.SUPPRESS)               # a child process of --memory
    args = parser.parse_args()
    if args.peak:
        side, what, size, n, folder, device = args.peak
        return print(peak(side, what, int(size), int(n), folder, device))
    with tempfile.TemporaryDirectory(prefix="mask2former-swin-tiny-coco-panoptic-") as folder:
        make_weights(folder)
        print("| px | what | ours | transformers | transformers / ours |\n|---|---|---|---|---|")
        rows = []
        for row in measure(args, folder):
            rows.append(row)
            print("| {size} | {what} | {ours:.3f} | {theirs:.3f} |".format(**row),
                  f"{row['theirs'] / row['ours']:.2f} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
