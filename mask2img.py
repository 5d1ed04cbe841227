"""Mask2Img: a mask and a caption -> an image that shows what the mask says, by a ControlNet on a text-to-image base.

The base has learned pictures from captions alone, without any mask. The ControlNet is a copy of the base's encoder
that reads the colour map and speaks to the frozen base through convolutions that start at zero: the prior of the base
stays, the mask steers it. `base` trains the small base itself.

Paper: SegGen (2311.03355) section 3, Mask2Img: SDXL-base frozen + ControlNet (2302.05543), lr 1e-5, 30k steps.
Differs: on small data the base is a pixel-space UNet of our own; --unfreeze trains the base along with the ControlNet;
       without --init both start from scratch together. Caption and mask are dropped together for guidance.
Reads: data/NAME/{train,val,unlabelled} pair folders; --init a base.    Writes: out/NAME/base, out/NAME/mask2img.
Needs: unet.py, diffusion.py, text2mask.py (the mask codec and the data set).
    python mask2img.py base --data shapes
    python mask2img.py train --data shapes --init out/shapes/base
    python mask2img.py sample --mask data/shapes/val/masks/00000.png --prompt "a house under a grey sky"
Dimension key: B batch, C channels, H W pixels, L caption tokens, K classes.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

import diffusion
from diffusion import positive, replacing, seed_of
from text2mask import (ROOT, Pairs, TextToImage, common_flags, dataset_folder, encode, fit, grid, palette, read_captions,
                       read_classes, read_ids)
from unet import PRESETS, ControlNet

SCHEDULE = dict(kind="cosine", prediction="sample", spacing="trailing")
MIN_SNR = 5.0                  # weight of nearly clean inputs: plain x0 loss (1) leaves textures soft


class Mask2Img(TextToImage):
    """A base and a ControlNet. controlnet: the constructor arguments it has beside the UNet's; classes: [{"name"}]."""

    def __init__(self, unet, text, schedule, size, controlnet, classes, edges=False):
        super().__init__(unet, text, schedule, size)
        self.config.update(controlnet=controlnet, classes=classes, edges=edges)
        self.controlnet = ControlNet.from_unet(self.unet, **controlnet)
        self.register_buffer("colours", torch.from_numpy(palette(len(classes))).float() / 255, persistent=False)

    def colour_map(self, codes):
        """(B, H, W) long codes -> (B, 3, H, W) in [0, 1]."""
        return self.colours[codes].permute(0, 3, 1, 2)

    def forward(self, x, t, text, time_ids, cond):
        """x (B, 3, H, W) noised, t (B,), text as TextToImage, cond (B, 3, H, W) colour map in [0, 1] -> x0."""
        context, pooled = self.text(text) if torch.is_tensor(text) else text
        if isinstance(context, tuple):                                   # keys and values of both networks
            base, control = context
        else:
            base = control = context
        residuals = self.controlnet(x, t, control, pooled, time_ids, cond)
        return self.unet(x, t, base, pooled, time_ids, residuals=residuals)

    def project(self, context):
        return self.unet.project_text(context), self.controlnet.project_text(context)

    def loss(self, net, batch, drop, shuffle=False):
        """The diffusion loss; a share `drop` of the samples has neither mask nor caption."""
        keep = torch.rand(len(batch["codes"]), 1, device=batch["codes"].device) >= drop
        codes = batch["codes"].roll(1, 0) if shuffle else batch["codes"]
        return diffusion.loss(net, self.schedule, batch["image"], batch["tokens"] * keep, batch["time_ids"],
                              self.colour_map(codes) * keep[:, :, None, None], min_snr=MIN_SNR)

    def sample(self, codes, captions, seeds, steps=15, guidance=1.5, sampler="dpm++"):
        """(B, H, W) uint8 codes, B captions and seeds -> (B, H, W, 3) uint8 images."""
        cond = self.colour_map(torch.from_numpy(np.asarray(codes)).long().to(self.colours.device))
        x0 = self.draw(captions, seeds, steps, guidance, sampler, codes.shape[1:], (cond,), (torch.zeros_like(cond),))
        return to_pixels(x0)


def to_pixels(x0):
    """(B, 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8."""
    return ((x0.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


# ------------------------------------------------------------------------------------------------------ CLI

def base(args):
    """Trains the text-to-image base on images and captions alone."""
    torch.manual_seed(seed_of(args.seed, "weights"))
    model = TextToImage(PRESETS["tiny"]["unet"], PRESETS["tiny"]["text"], SCHEDULE, args.size)
    data = Pairs(dataset_folder(args.data, args.split), args.size, model.text.tokenize, masks=False, limit=args.limit)

    def loss(net, batch):
        keep = torch.rand(len(batch["tokens"]), 1, device=batch["tokens"].device) >= args.drop
        return diffusion.loss(net, model.schedule, batch["image"], batch["tokens"] * keep, batch["time_ids"],
                              min_snr=MIN_SNR)

    def picture(model, path):
        captions = [read_captions(data.folder, name, [])[0] for _, name in data.names[:32]]
        images = to_pixels(model.draw(captions, range(len(captions)), 15, 1.5, "dpm++"))
        grid([images[i:i + 8] for i in range(0, len(images) // 8 * 8, 8)] or [images]).save(path)
    fit(model, loss, data, args, "base", picture)


def assembled(args, classes):
    """A new Mask2Img: on the frozen base of --init (trainable with --unfreeze), or all from scratch."""
    config = dict(unet=PRESETS["tiny"]["unet"], text=PRESETS["tiny"]["text"], schedule=SCHEDULE)
    if args.init:
        config, state = diffusion.read(args.init, "TextToImage")
    model = Mask2Img(**{**config, "size": args.size}, controlnet=PRESETS["tiny"]["controlnet"], classes=classes,
                     edges=args.edges)
    if args.init:
        nn.Module.load_state_dict(model, {**model.state_dict(), **state})
        model.controlnet = ControlNet.from_unet(model.unet, **PRESETS["tiny"]["controlnet"])
        for part in (model.unet, model.text):
            part.requires_grad_(args.unfreeze)
    return model


def train(args):
    folder = dataset_folder(args.data, "train")
    classes = read_classes(folder)
    torch.manual_seed(seed_of(args.seed, "weights"))
    model = assembled(args, classes)
    data = Pairs(folder, args.size, model.text.tokenize, edges=args.edges, limit=args.limit)
    val = held_out(args, model)

    def picture(model, path):
        count = min(24, len(val))
        items = [val[i, 0] for i in range(count)]
        codes = np.stack([item["codes"].numpy().astype(np.uint8) for item in items])
        captions = [read_captions(val.folder, name, classes)[0] for _, name in val.names[:count]]
        images = model.sample(codes, captions, range(count))
        real = to_pixels(torch.stack([item["image"] for item in items]))
        rows = [[palette(len(classes))[c] for c in codes], images, real]
        grid([row[i:i + 8] for i in range(0, count, 8) for row in rows if i + 8 <= count] or rows).save(path)

    def measure(model):
        """Condition gap: loss with the masks of other images minus loss with the right ones. Near 0: masks ignored."""
        device, gap = next(model.parameters()).device, []
        with torch.no_grad():
            for start in range(0, min(len(val), 64), 16):
                items = [val[i, 0] for i in range(start, min(start + 16, len(val)))]
                batch = {key: torch.stack([item[key] for item in items]).to(device) for key in items[0]}
                for shuffle, sign in ((True, 1), (False, -1)):
                    torch.manual_seed(start)
                    gap.append(sign * len(items) * model.loss(model, batch, 0.0, shuffle).item())
        return dict(condition_gap=round(sum(gap) / min(len(val), 64), 5))
    fit(model, lambda net, batch: model.loss(net, batch, args.drop), data, args, "mask2img", picture, measure)


def held_out(args, model):
    """The val split where there is one, else the training pairs."""
    folder = dataset_folder(args.data, "train")
    folder = folder.parent / "val" if (folder.parent / "val").is_dir() else folder
    return Pairs(folder, args.size, model.text.tokenize, edges=args.edges, augment=False)


def sample(args):
    device, _, _ = diffusion.start(args.device)
    model = diffusion.load(Mask2Img, args.init, device)
    K = len(model.config["classes"])
    codes = read_ids(args.mask, K)
    if any(side % 8 for side in codes.shape):
        sys.exit(f"{args.mask}: the mask is {codes.shape[1]} x {codes.shape[0]}; both sides must be multiples of 8")
    codes = np.repeat(codes[None], args.count, 0)
    images = model.sample(codes, [args.prompt] * args.count, [seed_of(args.seed, k) for k in range(args.count)],
                          args.steps, args.guidance, args.sampler)
    with diffusion.writable(args.out.parent):
        args.out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(args.out) as path:
        grid([[encode(codes[0], K), *images]], max(1, 256 // codes.shape[1])).save(path)
    print(f"wrote {args.out}: the mask and {args.count} images")


def main():
    parser = argparse.ArgumentParser(description="Mask2Img: mask + caption -> image.")
    commands = parser.add_subparsers(dest="command", required=True)
    defaults = dict(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p = commands.add_parser("base", help="train the text-to-image base, without masks", **defaults)
    common_flags(p, steps=8000, batch=16, lr=1e-3)
    p.add_argument("--split", default="unlabelled", help="the folder of images and captions under --data")
    p = commands.add_parser("train", help="train the ControlNet (on the frozen base of --init)", **defaults)
    common_flags(p, steps=6000, batch=16, lr=1e-3)
    p.add_argument("--edges", action="store_true", help="masks have every segment outlined")
    p.add_argument("--unfreeze", action="store_true", help="train the base as well")
    p = commands.add_parser("sample", help="paint images of one mask", **defaults)
    p.add_argument("--mask", type=Path, required=True, help="a PNG of class ids")
    p.add_argument("--prompt", default="", help="the caption")
    p.add_argument("--init", type=Path, default=ROOT / "weights" / "shapes" / "mask2img", help="trained Mask2Img")
    p.add_argument("--out", type=Path, default=Path("out/sample/images.png"), help="the picture to write")
    p.add_argument("--count", type=positive(int), default=4, help="images of the mask")
    p.add_argument("--steps", type=positive(int), default=15, help="sampling steps")
    p.add_argument("--guidance", type=float, default=1.5, help="classifier-free guidance; 1 = none")
    p.add_argument("--sampler", choices=("dpm++", "ddim", "euler", "edm"), default="dpm++")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="auto")
    args = parser.parse_args()
    {"base": base, "train": train, "sample": sample}[args.command](args)


if __name__ == "__main__":
    main()
