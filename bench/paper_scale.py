"""Every stage at the paper's size on one GPU, random weights: seconds a step or an image, memory at the peak.

SDXL's shape at 768 px, 4 pictures at a time: Text2Mask (all of the UNet) and Mask2Img (a ControlNet) train by
diffusion.fit itself (mixed precision, recomputed activations, AdamW, EMA, clipping), without its saves, and
then sample as masksyn.py does, in bf16. The segmenter trains by train.train with the ADE20K recipe. Pairs are
made up and lie in memory. Seconds are of the last steps, peaks the CUDA allocator's.

Needs:  diffusion.py, text2mask.py, mask2img.py, train.py, bench/vs_diffusers.py; diffusers, transformers
Writes: nothing

    python bench/paper_scale.py                             # one GPU of 80 GB; 7 GB in a temporary folder
    python bench/paper_scale.py --width toy --size 64       # a minute of a CPU: does it run?
"""
import argparse
import gc
import json
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import vs_diffusers                                         # puts the project on the path
import diffusion
import mask2former
import mask2img
import text2mask
import train

CLASSES = [dict(name=f"class {i}", isthing=False) for i in range(150)]
STEPS, LAST = 8, 4


def told(what, device, seconds, each="step"):
    gb = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else float("nan")
    print(f"{what:44} {seconds:8.3f} s a {each:6} {gb:6.1f} GB", flush=True)


def fresh():
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def timed(call):
    """Seconds of the second call."""
    for _ in range(2):
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return time.perf_counter() - start


class Made(torch.utils.data.Dataset):
    """Pairs as text2mask.Pairs has them, made up."""

    def __init__(self, size, tokenize):
        self.size, self.tokens = size, tokenize([vs_diffusers.CAPTION])[0]

    def __len__(self):
        return 64

    def __getitem__(self, key):
        codes = (torch.arange(self.size[1]) // 16 % 151).expand(self.size)
        return dict(image=torch.rand(3, *self.size) * 2 - 1, codes=codes.contiguous(), tokens=self.tokens,
                    time_ids=torch.tensor([*self.size, 0, 0, *self.size], dtype=torch.float32))


def trained(model, options, args, device):
    """A few steps of diffusion.fit -> seconds of each of the last."""
    for part in model.children():
        getattr(part, "recompute", lambda: None)()
    with tempfile.TemporaryDirectory() as out:
        diffusion.fit(model, lambda net, batch: model.loss(net, batch, 0.1, *options),
                      Made(args.size, model.text.tokenize), out, steps=STEPS, batch=args.batch, lr=1e-5,
                      device=str(device), report_every=LAST, compile=args.compile)
        return json.loads(Path(out, "log.jsonl").read_text().splitlines()[-1])["seconds_per_step"]


def generators(base, args, device):
    flags = SimpleNamespace(public=True, init=base, device=str(device), size=args.size, edges=False,
                            controlnet=None)
    captions, seeds = [f"{vs_diffusers.CAPTION}, {i}" for i in range(args.batch)], range(args.batch)
    codes = torch.stack([Made(args.size, lambda words: [None])[0]["codes"]] * args.batch).numpy()
    for name, module in (("Text2Mask", text2mask), ("Mask2Img", mask2img)):
        fresh()
        model = module.assembled(flags, CLASSES)
        if "train" in args.what:
            seconds = trained(model, (None, 0.0), args, device)
            told(f"{name}, {args.batch} x {args.size[0]} px", device, seconds)
        if "sample" in args.what:
            for part in model.unet, getattr(model, "controlnet", model.unet):
                part.to(diffusion.precision(device)).eval().requires_grad_(False)
            fresh()
            more = (codes,) if name == "Mask2Img" else ()
            steps = 40 if more else 25
            seconds = timed(lambda: model.sample(*more, captions, seeds, steps, 2.0, "dpm++"))
            told(f"{name}, sampling, {steps} steps of dpm++", device, seconds / args.batch, "image")
        del model


class Crops:
    """train.Batches, made up: 10 segments an image; when each batch was asked for is kept in `asked`."""
    rank, world = 0, 1

    def __init__(self, size, batch):
        self.size, self.batch, self.asked = size, batch, []

    def __len__(self):
        return STEPS

    def __getitem__(self, n):
        self.asked.append(time.perf_counter())
        masks = torch.zeros(10, self.size, self.size, dtype=torch.bool)
        for i, mask in enumerate(masks):
            mask[self.size * i // 10:self.size * (i + 1) // 10] = True
        truth = {"labels": torch.arange(10), "masks": masks}
        images = torch.randint(256, (self.batch, 3, self.size, self.size), dtype=torch.uint8)
        return images, [truth] * self.batch


def segmenter(preset, size, batch, compiled, device):
    fresh()
    torch.manual_seed(0)
    model = mask2former.Mask2Former(len(CLASSES), **mask2former.PRESETS[preset]).to(device)
    cfg, batches = dict(recipe="ade20k", steps=STEPS, accumulate=1, lr=1e-4, seed=0), Crops(size, batch)
    with tempfile.TemporaryDirectory() as out:
        train.train(model, batches, Path(out), cfg, device, compiled)
    seconds = (batches.asked[-1] - batches.asked[-1 - LAST]) / LAST
    told(f"Mask2Former {preset}, {batch} x {size} px{', compiled' if compiled else ''}", device, seconds)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--width", choices=vs_diffusers.WIDTHS, default="sdxl", help="of the networks")
    parser.add_argument("--size", type=text2mask.parse_size, default=(768, 768), help="of the pictures")
    parser.add_argument("--batch", type=int, default=4, help="pictures at a time")
    parser.add_argument("--what", nargs="+", choices=("train", "sample", "segmenter"),
                        default=["train", "sample", "segmenter"])
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    device, _, _ = diffusion.start(args.device)
    diffusion.save = diffusion.save_state = train.save_state = lambda *a: None
    if {"train", "sample"} & set(args.what):
        with tempfile.TemporaryDirectory() as folder:
            vs_diffusers.make_weights(Path(folder), args.width, device)
            generators(Path(folder) / "base", args, device)
    if "segmenter" in args.what:
        sizes = [("resnet50", 512, 16), ("swin_l", 640, 2)] if args.width == "sdxl" else [("tiny", 64, 2)]
        for preset, size, batch in sizes:
            segmenter(preset, size, batch, args.compile, device)


if __name__ == "__main__":
    main()
