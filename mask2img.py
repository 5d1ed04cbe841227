"""Mask2Img: a mask and a caption -> an image that shows what the mask says, by a ControlNet on a base.

The base has learned pictures from captions alone, without any mask. The ControlNet is a copy of the base's
encoder that sees the colour map and feeds the frozen base through convolutions that start at zero: the prior
of the base stays, and the mask steers it. `base` trains the small base itself. With SDXL only the ControlNet
is saved.

Paper:   SegGen (2311.03355) section 3, Mask2Img: SDXL-base frozen + ControlNet (2302.05543), lr 1e-5, 30k
         steps [N, R].
Differs: on small data the base is a pixel-space UNet of our own whose ControlNet sees a channel per code
         instead of three colours; --unfreeze trains the base along with the ControlNet; without --init both
         start from scratch together. Guidance contrasts caption and no caption: both passes see the mask, as
         in the public pipeline.
Reads:   data/NAME/{train,val,unlabelled} pair folders; --init: a base, or SDXL's public folder.
Writes:  out/NAME/base, out/NAME/mask2img; `sample`: out/sample.
Needs:   unet.py, diffusion.py, text2mask.py, data/pairs.py.

    python mask2img.py base --data shapes
    python mask2img.py train --data shapes --init out/shapes/base
    torchrun --nproc_per_node 8 mask2img.py train --data ade20k --init stable-diffusion-xl-base-1.0
    python mask2img.py sample --mask data/shapes/val/masks/00000.png --prompt "a house under a grey sky"

Dimension key: B batch, C channels, H W pixels, h w what the UNet paints, L caption tokens, K classes.
Codes: 0 void, 1..K the classes, K + 1 edge.
"""
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import diffusion
import unet as networks
from data.pairs import (FlagParser, PairFolder, check_classes, contact_sheet, count_classes,
                        describe_classes, find_split, number, outline, palette, read_ids, run, spread,
                        write_picture)
from diffusion import Schedule, seed_of
from text2mask import (DROP, SCHEDULE, SMALL, CaptionedPairs, TextToImage, apply_recipe, choose_sampling,
                       choose_size, chosen_sampling, copy_codes, drop_captions, find_weights, fit_generator,
                       init_flag, painted_sizes, sampling_flags, to_pixels, training_flags)
from unet import PRESETS, ControlNet, TextEncoder, UNet

MIN_SNR = 5.0  # cap of Schedule.weight; an unweighted loss leaves textures soft
BASE = dict(SMALL, lr=3e-3)
CONTROL = dict(SMALL, steps=2600)


class Mask2Img(TextToImage):
    """A base and a ControlNet that sees the mask. On SDXL the base is frozen.

    controlnet: made by ControlNet.from_unet(unet); classes: [{"name"}]; edges: whether codes have edges; the
    rest as TextToImage.
    """

    def __init__(self, unet, text, schedule, controlnet, size, classes, edges=False, vae=None,
                 base=None):
        super().__init__(unet, text, schedule, size, vae, base)
        self.controlnet = controlnet
        keys = "conditioning_channels", "conditioning_embedding_out_channels"
        own = {key: controlnet.config[key] for key in keys}
        self.config.update(controlnet=own, classes=classes, edges=edges)
        colours = torch.from_numpy(palette(len(classes))).float() / 255
        self.register_buffer("colours", colours, persistent=False)  # (K + 2, 3) in [0, 1]

    @classmethod
    def from_config(cls, config, device="cpu"):
        """The model of a config dict, with new weights; one on SDXL reads its base's folder."""
        config = dict(config)
        if "base" in config:
            del config["controlnet"]  # SDXL's takes its shape from the UNet
            return cls.from_sdxl(config.pop("base"), device, **config)
        unet, text = UNet(**config.pop("unet")), TextEncoder(**config.pop("text"))
        schedule = Schedule(**config.pop("schedule"))
        controlnet = ControlNet.from_unet(unet, **config.pop("controlnet"))
        return cls(unet, text, schedule, controlnet, **config)

    @classmethod
    def from_sdxl(cls, folder, device="cpu", **arguments):
        """On SDXL's public folder: its UNet, frozen, and a ControlNet that copies its encoder."""
        base = TextToImage.from_sdxl(folder, device, size=arguments["size"])
        controlnet = ControlNet.from_unet(base.unet)  # in fp32, before the base is cast
        base.unet.requires_grad_(False).to(diffusion.precision(device))
        return cls(base.unet, base.text, base.schedule, controlnet, vae=base.vae, base=folder,
                   **arguments)

    @property
    def checkpoint_part(self):
        """What a checkpoint holds; the rest is in the base's folder. None: everything."""
        return self.controlnet if self.vae else None

    def enable_checkpointing(self):
        self.unet.enable_checkpointing()
        self.controlnet.enable_checkpointing()

    def condition(self, codes):
        """(B, H, W) long codes -> what the ControlNet sees: on SDXL the colour map (B, 3, H, W) in [0, 1], in
        a small model a channel per code (B, K + 2, H, W), so that it need not learn to tell colours apart."""
        if self.vae is None:
            return F.one_hot(codes, len(self.colours)).permute(0, 3, 1, 2).float()
        return self.colours[codes].permute(0, 3, 1, 2)

    def forward(self, x, t, caption, time_ids, cond):
        """x (B, C, h, w) noised, t (B,), caption and time_ids as TextToImage, cond from `condition` -> the
        schedule's prediction, as x."""
        if torch.is_tensor(caption):
            caption = self.text(caption)
        context, pooled = caption  # (B, L, D), (B, P)
        # What is added to each skip of the UNet, to its middle and to its head, which only a small one has
        residuals = self.controlnet(x, t, context, pooled, time_ids, cond)
        return self.unet(x, t, context, pooled, time_ids, residuals)        # (B, C, h, w)

    def loss(self, net, batch, drop=DROP, shuffle=False):
        """The diffusion loss. A share `drop` of the samples loses its caption.

        net: this model, perhaps wrapped for DDP. shuffle gives each sample another one's mask, to measure
        whether the network heeds masks.
        """
        codes = batch["codes"].roll(1, 0) if shuffle else batch["codes"]  # (B, H, W)
        keep = torch.rand(len(codes), device=codes.device) >= drop
        tokens = drop_captions(batch["tokens"], keep)
        x0 = self.to_latents(batch["image"])
        return diffusion.loss(net, self.schedule, x0, tokens, batch["time_ids"], self.condition(codes),
                              min_snr=None if self.vae else MIN_SNR)

    def sample(self, codes, captions, seeds, time_ids=None, **sampling):
        """(B, H, W) uint8 codes, B captions and seeds -> (B, H, W, 3) uint8 images. time_ids: as in
        TextToImage.generate; sampling: what differs from `default_sampling`."""
        codes = torch.from_numpy(np.asarray(codes)).long().to(self.colours.device)
        x0 = self.generate(captions, seeds, size=codes.shape[1:], extra=(self.condition(codes),),
                           time_ids=time_ids, **self.default_sampling | sampling)
        return to_pixels(x0)


# ---- CLI ---------------------------------------------------------------------------------------------------

def small_base(size):
    """An untrained base of the built-in size."""
    unet, text = UNet(**PRESETS["tiny"]["unet"]), TextEncoder(**PRESETS["tiny"]["text"])
    return TextToImage(unet, text, Schedule(**SCHEDULE), size)


def train_base(args):
    """Train the text-to-image base on images and captions alone."""
    apply_recipe(args)
    diffusion.setup(args.device)
    pairs = PairFolder(find_split(args.data, args.split), ("image",), limit=args.limit)
    args.size = choose_size(args, pairs)
    torch.manual_seed(seed_of(args.seed, "weights"))
    model = small_base(args.size)
    pairs.keep()
    data = CaptionedPairs(pairs, args.size, model.text.tokenize)

    def loss(net, batch):
        keep = torch.rand(len(batch["tokens"]), device=batch["tokens"].device) >= DROP
        tokens = drop_captions(batch["tokens"], keep)
        return diffusion.loss(net, model.schedule, batch["image"], tokens, batch["time_ids"],
                              min_snr=MIN_SNR)

    def picture(model, path):
        captions = [pairs.captions(i)[0] for i in spread(len(data), 32)]
        x0 = model.generate(captions, range(len(captions)), **model.default_sampling)
        contact_sheet({"sample": list(to_pixels(x0))}, captions).save(path)
    fit_generator(model, loss, data, args, "base", picture,
                  following="python text2mask.py train --data {data} --init {out}")


def layers_of_codes(controlnet):
    """The convolutions of a small ControlNet that read the mask, a channel per code."""
    return controlnet.controlnet_cond_embedding.conv_in, controlnet.controlnet_head[0]


def new_model(args, classes, device):
    """A new Mask2Img: on SDXL, a small base or another Mask2Img (--init), or all from scratch. The base is
    frozen unless --unfreeze."""
    options = dict(size=args.size, classes=classes, edges=args.edges)
    if args.sdxl:
        return new_model_on_sdxl(args, device, options)
    base, earlier = small_base(args.size), None
    if args.init:
        if diffusion.read_header(args.init).get("class") == "Mask2Img":
            earlier = diffusion.load(Mask2Img, args.init)
            base = earlier  # of which the new model takes the UNet and the text encoder
        else:
            base = diffusion.load(TextToImage, args.init)
        base.requires_grad_(args.unfreeze)
    config = earlier.config["controlnet"] if earlier else PRESETS["tiny"]["controlnet"]
    controlnet = ControlNet.from_unet(base.unet, **dict(config, conditioning_channels=len(classes) + 2))
    if earlier:
        diffusion.load_matching(controlnet, earlier.controlnet.state_dict())
        for old, new in zip(layers_of_codes(earlier.controlnet), layers_of_codes(controlnet)):
            copy_codes(old, new, dim=1, old_classes=earlier.config["classes"], new_classes=classes)
    return Mask2Img(base.unet, base.text, base.schedule, controlnet, **options)


def new_model_on_sdxl(args, device, options):
    """Its ControlNet is a copy of SDXL's encoder, a public one (--controlnet) or an earlier one (--init)."""
    model = Mask2Img.from_sdxl(args.sdxl, device, **options)
    if args.controlnet:
        networks.load_weights(model.controlnet, args.controlnet)
    elif args.init != args.sdxl:
        _, state = diffusion.read_checkpoint(args.init, "Mask2Img")
        diffusion.load_strict(model.controlnet, state, args.init)
    return model


def train(args):
    """Train a Mask2Img: the ControlNet; with --unfreeze the base too; without --init both from scratch."""
    apply_recipe(args)  # fills in what was not given; args.sdxl: SDXL's folder, or None
    if args.sdxl and args.unfreeze:
        raise ValueError("--unfreeze goes with a small base: SDXL stays frozen. Leave it out")
    if args.controlnet and not args.sdxl:
        raise ValueError("--controlnet goes with SDXL. Leave it out, or give SDXL's folder by --init")
    device, rank, _ = diffusion.setup(args.device)
    parts = ("image", "ids", "instances") if args.edges else ("image", "ids")
    pairs = PairFolder(find_split(args.data, "train"), parts, limit=args.limit)
    args.size = choose_size(args, pairs)
    torch.manual_seed(seed_of(args.seed, "weights"))
    model = new_model(args, pairs.classes, device)
    pairs.keep()
    data = CaptionedPairs(pairs, args.size, model.text.tokenize, edge_width=model.edge_width,
                          sizes=painted_sizes(model, pairs, pairs.names))
    if rank == 0:
        print(describe_classes(count_classes(pairs), pairs.classes))

    # Samples and the condition gap are those of val, where there is one.
    folder = pairs.folder.parent / "val"
    if not folder.is_dir():
        folder = pairs.folder
    val = CaptionedPairs(PairFolder(folder, parts), args.size, model.text.tokenize, augment=False,
                         edge_width=model.edge_width)
    check_classes(val.pairs.classes, pairs.classes, val.pairs.folder)
    shown, measured = spread(len(val), 8 if model.vae else 24), spread(len(val), 64)
    for i in {*shown, *measured}:
        val[i, 0]  # finds a broken file now, not at the first save

    def picture(model, path):
        draw_samples(model, val, shown).save(path)

    def measure(model):
        return dict(condition_gap=condition_gap(model, val, measured))
    fit_generator(model, model.loss, data, args, "mask2img", picture, measure,
                  following="python masksyn.py --data {data}")


def draw_samples(model, data, indices):
    """A contact sheet of masks, the images painted on them, and the real ones."""
    items = [data[i, 0] for i in indices]
    codes = np.stack([item["codes"].numpy().astype(np.uint8) for item in items])
    captions = [data.pairs.captions(i)[0] for i in indices]
    classes = data.pairs.classes
    rows = {"mask": list(palette(len(classes))[codes]),
            "sample": list(model.sample(codes, captions, range(len(items)))),
            "real": list(to_pixels(torch.stack([item["image"] for item in items])))}
    return contact_sheet(rows, captions, classes)


def condition_gap(model, data, indices):
    """The loss with other images' masks minus that with the right ones. Near 0, the network ignores masks."""
    device, gap = next(model.parameters()).device, 0.0
    parts = math.ceil(len(indices) / 16)
    for part in range(parts):
        items = [data[i, 0] for i in indices[part::parts]]
        batch = diffusion.to_device(torch.utils.data.default_collate(items), device)
        for shuffle, sign in ((True, 1), (False, -1)):
            torch.manual_seed(part)  # the same noise for both
            with torch.no_grad(), model.autocast():
                loss = model.loss(model, batch, drop=0.0, shuffle=shuffle)
            gap += sign * len(items) * loss.item()
    return gap / len(indices)


def sample_images(args):
    """Paint --count images of --mask -> OUT/images.png: the mask, then the images."""
    device, _, _ = diffusion.setup(args.device)
    model = diffusion.load(Mask2Img, find_weights("shapes", "mask2img", args.init), device, args.base)
    choose_sampling(args, model)
    classes = model.config["classes"]
    codes = read_ids(args.mask, len(classes))
    if model.config["edges"]:  # as it was trained; what separates instances is not known here
        codes = outline(codes, np.zeros_like(codes), len(classes), model.edge_width)
    seeds = [seed_of(args.seed, k) for k in range(args.count)]
    captions = [args.prompt] * args.count
    masks = np.repeat(codes[None], args.count, 0)
    images = model.sample(masks, captions, seeds, **chosen_sampling(args))
    pictures = [palette(len(classes))[codes], *images]
    sheet = contact_sheet({"": pictures}, ["the mask", *captions], classes)
    write_picture(args.out / "images.png", sheet)
    names = ", ".join(f"{k} {classes[k - 1]['name']}" for k in np.unique(codes) if 0 < k <= len(classes))
    print(f"{args.out}: images.png, the mask and {args.count} images; its ids are read as {names}")


def main(argv=None):
    parser = FlagParser(description="Mask2Img: mask + caption -> image.")
    commands = parser.add_subparsers(required=True, metavar="{base,train,sample}")
    p = commands.add_parser("base", help="train the text-to-image base, without masks")
    training_flags(p, BASE)
    p.add_argument("--split", default="unlabelled",
                   help="the folder of images and captions under --data (default: unlabelled)")
    p.set_defaults(command=train_base)
    p = commands.add_parser("train", help="train the ControlNet on the frozen base of --init")
    training_flags(p, CONTROL)
    init_flag(p, "Mask2Img")
    p.add_argument("--controlnet", type=Path, help="SDXL: a public ControlNet to start from")
    p.add_argument("--edges", action="store_true", help="masks have every segment outlined")
    p.add_argument("--unfreeze", action="store_true", help="train the base as well")
    p.set_defaults(command=train)
    p = commands.add_parser("sample", help="paint images of one mask")
    p.add_argument("--mask", type=Path, required=True, help="a PNG of class ids")
    p.add_argument("--prompt", default="", help="the caption")
    p.add_argument("--out", type=Path, default=Path("out/sample"), help="folder of the picture")
    p.add_argument("--count", type=number(int, 1), default=4, help="images of the mask")
    sampling_flags(p, "mask2img")
    p.set_defaults(command=sample_images)
    args = parser.parse_args(argv)
    args.command(args)


if __name__ == "__main__":
    run(main)
