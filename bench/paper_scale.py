"""Every stage at the paper's size on one GPU: seconds of a step or an image, and memory at the peak.

The weights are random, of SDXL's shape; the pairs are random too and lie in memory. The generators train by
diffusion.fit itself: mixed precision, recomputed activations, AdamW, EMA, clipping. Then they sample in bf16,
as masksyn.py does. The segmenter trains by train.train with the ADE20K recipe. Nothing is saved, and the
first steps are not timed; how long the first one took, which compiles, is said beside them.

Reads:  nothing.
Writes: a line of --json FILE for each result, as it comes.
Needs:  diffusion.py, unet.py, text2mask.py, mask2img.py, mask2former.py, train.py, bench/vs_diffusers.py,
        data/pairs.py; packages: diffusers, transformers.

    python bench/paper_scale.py --compile                   # one GPU of 80 GB; 7 GB in a temporary folder
    python bench/paper_scale.py --width toy --size 64       # a minute on a CPU: does it run?

Dimension key: B batch, H W pixels, N segments of an image.
"""
import contextlib
import gc
import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import diffusion
import mask2former
import mask2img
import text2mask
import train
import unet as networks
from data.pairs import FlagParser, number, picture_size, run
from mask2img import Mask2Img
from text2mask import Text2Mask
from turns import clock
from vs_diffusers import CAPTION, WIDTHS, write_sdxl

CLASSES = [dict(name=f"class {i}", isthing=False) for i in range(150)]
STEPS, TIMED = 8, 4            # training steps, and how many of them, the last ones, are timed
SEGMENTS = 10                  # of an image of the segmenter
WHAT = "24gb", "train", "sample", "small", "segmenter"


@contextlib.contextmanager
def without_saves():
    """Inside the block no training saves anything: saving at this size would take longer than the steps."""
    with mock.patch.object(diffusion, "save"), mock.patch.object(train, "save"), \
            mock.patch.object(diffusion.RunFolder, "save"):
        yield


def free_memory():
    """Give back what the last stage held, and forget its peak."""
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def report(args, what, seconds, unit, first):
    """Print a result and add it to --json FILE. first: seconds of the first step or batch."""
    peak = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else float("nan")
    print(f"{what:60} {seconds:8.3f} {unit:10} {peak:6.1f} GB   first {first:6.1f} s", flush=True)
    if args.json:
        line = dict(what=what, seconds=seconds, unit=unit.strip(), gb=round(peak, 1), first=round(first, 1))
        with open(args.json, "a") as file:
            file.write(json.dumps(line) + "\n")


# ---- the generators ----------------------------------------------------------------------------------------

def striped_codes(size):
    """(H, W) uint8 codes: stripes of all classes and void."""
    stripes = torch.arange(size[1]) // 16 % (len(CLASSES) + 1)           # (W,)
    return stripes.to(torch.uint8).expand(size).contiguous()


class RandomPairs(torch.utils.data.Dataset):
    """Pairs as text2mask.CaptionedPairs gives them. `times`: when each was asked for."""

    def __init__(self, size, tokenize, device):
        self.size, self.device, self.times = size, device, []
        self.tokens = tokenize([CAPTION])[0]

    def __len__(self):
        return 64

    def __getitem__(self, index):
        self.times.append(clock(self.device))
        return {
            "image": torch.rand(3, *self.size) * 2 - 1,
            "codes": striped_codes(self.size).long(),
            "tokens": self.tokens,
            "time_ids": torch.tensor([*self.size, 0, 0, *self.size], dtype=torch.float32),
        }


def time_training(args, what, model, batch, accumulate=1, compile=False):
    """Train a generator by diffusion.fit."""
    name = f"{what}, {batch} x {accumulate} x {model.config['size'][0]} px"
    if compile:
        diffusion.compile_blocks(model, networks.BLOCKS)
    if model.vae:
        model.enable_checkpointing()
    pairs = RandomPairs(model.config["size"], model.text.tokenize, args.device)
    with tempfile.TemporaryDirectory() as out:
        diffusion.fit(model, model.loss, pairs, out, steps=STEPS, batch=batch, accumulate=accumulate, lr=1e-5,
                      device=args.device, report_every=TIMED)
    times = pairs.times[::batch * accumulate]  # of the steps
    report(args, name + " compiled" * compile, (times[-1] - times[-1 - TIMED]) / TIMED, "s a step",
           times[1] - times[0])


def time_sampling(args, what, model, batch, **options):
    """Sample a batch twice."""
    captions = [f"{CAPTION}, {i}" for i in range(batch)]
    codes = striped_codes(args.size).expand(batch, -1, -1).numpy()  # (B, H, W)
    inputs = (codes, captions) if isinstance(model, Mask2Img) else (captions,)
    seconds = []
    for _ in range(2):
        start = clock(args.device)
        model.sample(*inputs, range(batch), **options)
        seconds.append((clock(args.device) - start) / batch)
    report(args, f"{what}, {batch} at a time", seconds[1], "s an image", seconds[0] * batch)


def on_sdxl(Model, folder, args, **options):
    """A new generator on a folder of SDXL."""
    free_memory()
    return Model.from_sdxl(folder, args.device, size=args.size, classes=CLASSES, **options)


def to_sample(model, args):
    """The model as masksyn.py loads it."""
    model.checkpoint_part.to(diffusion.precision(args.device))
    return model.eval().requires_grad_(False)


def generators(args, folder):
    if "24gb" in args.what:
        time_training(args, "Text2Mask, rank 8", on_sdxl(Text2Mask, folder, args, rank=8), 1, 4)
        time_training(args, "Mask2Img", on_sdxl(Mask2Img, folder, args), 1, 4)
    for Model in Text2Mask, Mask2Img:
        name = Model.__name__
        for compile in args.compiled if "train" in args.what else ():
            time_training(args, name, on_sdxl(Model, folder, args), args.batch, 1, compile)
        if "sample" not in args.what:
            continue
        model = to_sample(on_sdxl(Model, folder, args), args)
        plain = model.default_sampling
        steps = f"{plain['steps']} steps"
        time_sampling(args, f"{name}, {steps}", model, args.batch, **plain)
        middle = plain | dict(interval=(0.3, 5))
        time_sampling(args, f"{name}, {steps}, guided for sigma 0.3 to 5", model, args.batch, **middle)
        fast = dict(steps=4, guidance=1.0, sampler="euler")
        time_sampling(args, f"{name}, 4 steps of a distilled base", model, args.batch, **fast)
        model.to(memory_format=torch.channels_last)
        time_sampling(args, f"{name}, {steps}, channels_last", model, args.batch, **plain)
        if args.compile:
            diffusion.compile_blocks(model, networks.BLOCKS)
            time_sampling(args, f"{name}, {steps}, channels_last, compiled", model, args.batch, **plain)
            time_sampling(args, f"{name}, 4 steps, channels_last, compiled", model, args.batch, **fast)
        del model


def small_generators(args):
    """The networks of the built-in data, as they train there."""
    for module in text2mask, mask2img:
        for compile in args.compiled:
            free_memory()
            flags = SimpleNamespace(size=(64, 64), edges=False, rank=None, init=None, sdxl=None,
                                    unfreeze=True)
            model = module.new_model(flags, CLASSES[:13], args.device)
            time_training(args, f"small {type(model).__name__}", model, 16, 1, compile)


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


def segmenter(args, preset, size, batch, compile):
    """Train a preset of mask2former.py by train.train."""
    free_memory()
    torch.manual_seed(0)
    model = mask2former.Mask2Former(len(CLASSES), **mask2former.PRESETS[preset]).to(args.device)
    settings = train.RECIPES["ade20k"] | dict(steps=STEPS, accumulate=1, seed=0)
    batches = RandomBatches(size, batch, args.device)
    with tempfile.TemporaryDirectory() as out:
        train.train(model, batches, out, settings, torch.device(args.device), compile)
    times = batches.times
    report(args, f"Mask2Former {preset}, {batch} x {size} px" + " compiled" * compile,
           (times[-1] - times[-1 - TIMED]) / TIMED, "s a step", times[1] - times[0])


def main(argv=None):
    parser = FlagParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--width", choices=WIDTHS, default="sdxl", help="of the generators' networks")
    add("--size", type=picture_size, default=(768, 768), help="of the generators' pictures")
    add("--batch", type=number(int, 1), default=4, help="pictures of the generators at a time")
    add("--what", nargs="+", choices=WHAT, default=list(WHAT), help="what is measured, in this order")
    add("--compile", action="store_true", help="measure the compiled networks too")
    add("--json", type=Path, help="a file to add the results to")
    add("--device", default="auto", help="cpu, cuda, cuda:1 ...")
    args = parser.parse_args(argv)
    args.device = str(diffusion.setup(args.device)[0])
    args.compiled = (False, True) if args.compile else (False,)
    cases = [("resnet50", 512, 16), ("swin_l", 640, 2)] if args.width == "sdxl" else [("tiny", 64, 2)]
    with without_saves():
        if {"24gb", "train", "sample"} & set(args.what):
            with tempfile.TemporaryDirectory() as folder:
                write_sdxl(folder, args.width, args.device)
                generators(args, folder)
        if "small" in args.what:
            small_generators(args)
        for preset, size, batch in cases if "segmenter" in args.what else ():
            for compile in args.compiled:
                segmenter(args, preset, size, batch, compile)


if __name__ == "__main__":
    run(main)
