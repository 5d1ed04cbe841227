"""Mask2Img: a mask and a caption -> an image that shows what the mask says, by a ControlNet on a base.

The base has learned pictures from captions alone, without any mask. The ControlNet is a copy of the base's
encoder that reads the colour map and speaks to the frozen base through convolutions that start at zero: the
prior of the base stays, the mask steers it. `base` trains the small base itself. With SDXL only the
ControlNet is stored.

Paper: SegGen (2311.03355) section 3, Mask2Img: SDXL-base frozen + ControlNet (2302.05543), lr 1e-5, 30k
       steps.
Differs: on small data the base is a pixel-space UNet of our own whose ControlNet sees a channel per code
       instead of three colours; --unfreeze trains the base along with the ControlNet; without --init both
       start from scratch together. Caption and mask are dropped together for guidance; on SDXL the caption
       alone, as in the public pipeline, which shows the mask to both halves.
Reads: data/NAME/{train,val,unlabelled} pair folders; --init a base, or a folder of SDXL in the public layout.
Writes: out/NAME/base, out/NAME/mask2img.
Needs: unet.py, diffusion.py, text2mask.py (the mask codec and the data set).
    python mask2img.py base --data shapes
    python mask2img.py train --data shapes --init out/shapes/base
    torchrun --nproc_per_node 8 mask2img.py train --data ade20k --init stable-diffusion-xl-base-1.0
    python mask2img.py sample --mask data/shapes/val/masks/00000.png --prompt "a house under a grey sky"
Dimension key: B batch, C channels, H W pixels, L caption tokens, K classes.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import diffusion
import unet as networks
from diffusion import positive, replacing, seed_of
from text2mask import (Pairs, TextToImage, check_classes, check_tensors, common_flags, dataset_folder,
                       dropped, encode, evenly, fit, grid, palette, parsed, read_captions, read_classes,
                       read_ids, sampling_flags, to_pixels, told)
from unet import PRESETS, ControlNet, UNet

SCHEDULE = dict(kind="cosine", prediction="sample", spacing="trailing")
MIN_SNR = 5.0                  # weight of nearly clean inputs: plain x0 loss (1) leaves textures soft


class Mask2Img(TextToImage):
    """A base and a ControlNet. controlnet: its arguments where not the UNet's; classes: [{"name"}].

    On SDXL (base) the UNet is frozen and has its weights; the ControlNet has none until it is given them."""

    def __init__(self, unet=None, text=None, schedule=None, size=None, controlnet=None, classes=(),
                 edges=False, base=None):
        super().__init__(unet, text, schedule, size, base)
        self.config.update(controlnet=controlnet, classes=classes, edges=edges)
        device = torch.get_default_device()
        with torch.device("meta" if base else device):
            self.controlnet = ControlNet.from_unet(self.unet, **controlnet)
        if base is not None:
            with told():
                self.unet = networks.read_part(UNet, Path(base) / "unet", device, diffusion.precision(device))
            self.unet.requires_grad_(False)
        colours = torch.from_numpy(palette(len(classes))).float() / 255
        self.register_buffer("colours", colours, persistent=False)       # (K + 2, 3) in [0, 1]

    @property
    def stored(self):
        """What a checkpoint holds where the rest is in the base's folder."""
        return self.controlnet if self.vae else None

    def condition(self, codes):
        """(B, H, W) long codes -> what the ControlNet sees: the colour map (B, 3, H, W) in [0, 1]; of the
        small model one channel a code (B, K + 2, H, W), which spares it learning to tell colours apart."""
        if self.vae is None:
            return F.one_hot(codes, len(self.colours)).permute(0, 3, 1, 2).float()
        return self.colours[codes].permute(0, 3, 1, 2)

    def forward(self, x, t, text, time_ids, cond):
        """x (B, C, h, w) noised, t (B,), text as TextToImage, cond of `condition` -> as x."""
        context, pooled = self.text(text) if torch.is_tensor(text) else text
        if isinstance(context, tuple):                                   # keys and values of both networks
            base, control = context
        else:
            base = control = context
        residuals = self.controlnet(x, t, control, pooled, time_ids, cond)
        return self.unet(x, t, base, pooled, time_ids, residuals=residuals)

    def project(self, context):
        return self.unet.project_text(context), self.controlnet.project_text(context)

    def loss(self, net, batch, drop, min_snr=MIN_SNR, noise_offset=0.0, shuffle=False):
        """The diffusion loss; a share `drop` of samples has neither mask nor caption, on SDXL no caption."""
        keep = torch.rand(len(batch["codes"]), 1, device=batch["codes"].device) >= drop
        cond = self.condition(batch["codes"].roll(1, 0) if shuffle else batch["codes"])
        cond = cond if self.vae else cond * keep[:, :, None, None]
        x0, tokens = self.latents(batch["image"]), dropped(batch["tokens"], keep)
        return diffusion.loss(net, self.schedule, x0, tokens, batch["time_ids"], cond, min_snr=min_snr,
                              noise_offset=noise_offset)

    def sample(self, codes, captions, seeds, steps=15, guidance=1.5, sampler="dpm++"):
        """(B, H, W) uint8 codes, B captions and seeds -> (B, H, W, 3) uint8 images."""
        cond = self.condition(torch.from_numpy(np.asarray(codes)).long().to(self.colours.device))
        null = cond if self.vae else torch.zeros_like(cond)
        x0 = self.draw(captions, seeds, steps, guidance, sampler, codes.shape[1:], (cond,), (null,))
        return to_pixels(x0)


# -------------------------------------------------------------------------------------------------------- CLI

def base(args):
    """Trains the text-to-image base on images and captions alone."""
    if args.init:
        sys.exit(f"--init {args.init}: `base` starts from scratch; leave it out, or give it to `train`")
    diffusion.start(args.device)
    folder = dataset_folder(args.data, args.split)
    torch.manual_seed(seed_of(args.seed, "weights"))
    model = TextToImage(PRESETS["tiny"]["unet"], PRESETS["tiny"]["text"], SCHEDULE, args.size)
    data = Pairs(folder, args.size, model.text.tokenize, masks=False, limit=args.limit)

    def loss(net, batch):
        keep = torch.rand(len(batch["tokens"]), 1, device=batch["tokens"].device) >= args.drop
        return diffusion.loss(net, model.schedule, batch["image"], batch["tokens"] * keep, batch["time_ids"],
                              min_snr=MIN_SNR)

    def picture(model, path):
        names = [data.names[i][1] for i in evenly(len(data), 32)]
        captions = [read_captions(data.folder, name, [])[0] for name in names]
        images = to_pixels(model.draw(captions, range(len(captions)), 15, 1.5, "dpm++"))
        grid([images[i:i + 8] for i in range(0, len(images) // 8 * 8, 8)] or [images]).save(path)
    fit(model, loss, data, args, "base", picture)


def assembled(args, classes):
    """A new Mask2Img: on the frozen base of --init (trainable with --unfreeze), or all from scratch."""
    if args.public:
        return on_sdxl(args, classes)
    config = dict(unet=PRESETS["tiny"]["unet"], text=PRESETS["tiny"]["text"], schedule=SCHEDULE)
    control = dict(PRESETS["tiny"]["controlnet"], conditioning_channels=len(classes) + 2)
    if args.init:
        config, state = diffusion.read(args.init, "TextToImage")
    with diffusion.of_this_version(args.init):
        model = Mask2Img(**config | dict(size=args.size), controlnet=control, classes=classes,
                         edges=args.edges)
    if args.init:
        own = {name: t for name, t in model.state_dict().items() if not name.startswith("controlnet.")}
        check_tensors(own, state, args.init)
        model.load_state_dict(state, strict=False)
        model.controlnet = ControlNet.from_unet(model.unet, **control)
        for part in (model.unet, model.text):
            part.requires_grad_(args.unfreeze)
    return model


def on_sdxl(args, classes):
    """A new Mask2Img on frozen SDXL; the ControlNet copies the UNet's encoder, or is that of --controlnet."""
    with torch.device(diffusion.start(args.device)[0]), told():
        device, own = torch.get_default_device(), {}
        if args.controlnet:                                              # by others: of its own depth
            given = networks.read_part(ControlNet, args.controlnet, device)
            networks.check_control(given, networks.empty_part(UNet, args.init / "unet"), args.controlnet)
            own = given.config
        model = Mask2Img(base=args.init, size=args.size, controlnet=own, classes=classes, edges=args.edges)
        if not args.controlnet:                                          # from fp32: the frozen may be bf16
            given = ControlNet.from_unet(networks.read_part(UNet, args.init / "unet", device))
        networks.fill(model.controlnet, given.state_dict(), args.controlnet or args.init / "unet")
    return model


def train(args):
    diffusion.start(args.device)
    folder = dataset_folder(args.data, "train")
    classes = read_classes(folder)
    torch.manual_seed(seed_of(args.seed, "weights"))
    model = assembled(args, classes)
    data = Pairs(folder, args.size, model.text.tokenize, edges=args.edges, limit=args.limit)
    val = held_out(args, model)
    shown, judged = evenly(len(val), 8 if model.vae else 24), evenly(len(val), 64)
    for i in {*shown, *judged}:
        val[i, 0]                                                        # a bad file is told now, not later

    def picture(model, path):
        items, count = [val[i, 0] for i in shown], len(shown)
        codes = np.stack([item["codes"].numpy().astype(np.uint8) for item in items])
        captions = [read_captions(val.folder, val.names[i][1], classes)[0] for i in shown]
        images = model.sample(codes, captions, range(count))
        real = to_pixels(torch.stack([item["image"] for item in items]))
        rows = [[palette(len(classes))[c] for c in codes], images, real]
        rows = [row[i:i + 8] for i in range(0, count, 8) for row in rows if i + 8 <= count] or rows
        grid(rows, 1 if model.vae else 2).save(path)

    def measure(model):
        """Condition gap: loss with the masks of other images minus loss with the right ones. Near 0: masks
        are ignored."""
        device, gap, parts = next(model.parameters()).device, [], -(-len(judged) // 16)
        with torch.no_grad(), model.autocast():
            for start in range(parts):
                items = [val[i, 0] for i in judged[start::parts]]
                batch = {key: torch.stack([item[key] for item in items]).to(device) for key in items[0]}
                for shuffle, sign in ((True, 1), (False, -1)):
                    torch.manual_seed(start)
                    gap.append(sign * len(items) * model.loss(model, batch, 0.0, shuffle=shuffle).item())
        return dict(condition_gap=round(sum(gap) / len(judged), 5))

    min_snr = args.min_snr if args.public else MIN_SNR
    fit(model, lambda net, batch: model.loss(net, batch, args.drop, min_snr, args.noise_offset), data, args,
        "mask2img", picture, measure)


def held_out(args, model):
    """The val split where there is one, else the training pairs."""
    folder = dataset_folder(args.data, "train")
    folder = folder.parent / "val" if (folder.parent / "val").is_dir() else folder
    val = Pairs(folder, args.size, model.text.tokenize, edges=args.edges, augment=False)
    check_classes(model.config["classes"], val.classes, folder / "classes.json")
    return val


def sample(args):
    """Paints --count images of --mask -> OUT/images.png: the mask, then the images."""
    device, _, _ = diffusion.start(args.device)
    model = diffusion.load(Mask2Img, args.init, device)
    K = len(model.config["classes"])
    codes = read_ids(args.mask, K)
    if any(side % 8 for side in codes.shape):
        sys.exit(f"{args.mask}: the mask is {codes.shape[1]} x {codes.shape[0]}; both sides must be "
                 "multiples of 8")
    codes, seeds = np.repeat(codes[None], args.count, 0), [seed_of(args.seed, k) for k in range(args.count)]
    images = model.sample(codes, [args.prompt] * args.count, seeds, args.steps, args.guidance, args.sampler)
    with diffusion.writable(args.out):
        args.out.mkdir(parents=True, exist_ok=True)
    with replacing(args.out / "images.png") as path:
        grid([[encode(codes[0], K), *images]], max(1, 256 // codes.shape[1])).save(path)
    print(f"{args.out}: images.png, the mask and {args.count} images")


def main():
    parser = argparse.ArgumentParser(description="Mask2Img: mask + caption -> image.")
    commands = parser.add_subparsers(dest="command", required=True)
    defaults = dict(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p = commands.add_parser("base", help="train the text-to-image base, without masks", **defaults)
    common_flags(p, steps=5000, batch=16, lr=3e-3)
    p.add_argument("--split", default="unlabelled", help="the folder of images and captions under --data")
    p = commands.add_parser("train", help="train the ControlNet on the frozen base of --init", **defaults)
    training = p
    common_flags(p, steps=2600, batch=16, lr=2e-3)
    p.add_argument("--controlnet", type=Path, help="SDXL: a ControlNet in the public layout to start from")
    p.add_argument("--edges", action="store_true", help="masks have every segment outlined")
    p.add_argument("--unfreeze", action="store_true", help="train the base as well")
    p = commands.add_parser("sample", help="paint images of one mask", **defaults)
    p.add_argument("--mask", type=Path, required=True, help="a PNG of class ids")
    p.add_argument("--prompt", default="", help="the caption")
    p.add_argument("--out", type=Path, default=Path("out/sample"), help="folder of the picture")
    p.add_argument("--count", type=positive(int), default=4, help="images of the mask")
    sampling_flags(p, "mask2img", 15, 1.5, "dpm++")
    args = parsed(parser, training)
    wrong = "unfreeze" if args.public else "controlnet"
    if getattr(args, wrong, None):
        fits = "the built-in base" if args.public else "a folder of SDXL"
        sys.exit(f"--{wrong}: looked for {fits} as --init, found {args.init}; leave it out")
    {"base": base, "train": train, "sample": sample}[args.command](args)


if __name__ == "__main__":
    main()
