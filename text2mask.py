"""Text2Mask: a caption -> a segmentation mask, by a diffusion model that paints colour-coded masks.

A mask becomes an image by giving each class a colour, so a text-to-image model can be fine-tuned to paint
masks. In pixel space the network predicts, for every pixel, how likely each colour of the palette is: x0 is
the expected colour and the loss is cross-entropy, so a finished mask has no blended borders to decode. With
SDXL the colour map is an image like any other: its latents are noised, a sample is decoded by the VAE and
read by the nearest levels of the palette.

Paper:   SegGen (2311.03355) section 3, Text2Mask: SDXL-base fine-tuned on (caption, colour map), lr 1e-5, 30k
         steps [N]. The palette explains every pixel of the authors' published pictures [D].
Differs: on small data the base is a small pixel-space UNet of our own with a logit per colour; masks are
         cleaned of specks (the paper's are not); edges between instances are 1 or 3 pixels wide [?]. --rank
         fine-tunes by LoRA (2106.09685): low-rank matrices beside the frozen attentions of the base are
         trained, and on a small base the input convolution and the head, which have not seen masks.
Reads:   the pair folder data/NAME/train; --init: a base of mask2img.py, or SDXL's public folder.
Writes:  out/NAME/text2mask; `sample`: out/sample.
Needs:   unet.py, diffusion.py, data/pairs.py.

    python text2mask.py sample --prompt "two red houses by the water at sunset"
    python text2mask.py train --data shapes --init out/shapes/base
    torchrun --nproc_per_node 8 text2mask.py train --data ade20k --init stable-diffusion-xl-base-1.0

Dimension key: B batch, C channels, H W pixels, L caption tokens, D width, P width of the pooled caption, K
classes. Codes: 0 void, 1..K the classes, K + 1 edge.
"""
import contextlib
import functools
import math
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import diffusion
import unet as networks
from data.pairs import (CROWD, ROOT, FlagParser, PairFolder, contact_sheet, dataset_name, describe_classes,
                        find_split, has_left_or_right, header_size, number, outline, palette, palette_levels,
                        picture_size, run, some_sizes, spread, write_mask, write_picture)
from diffusion import ALWAYS, SAMPLERS, Schedule, seed_of
from unet import PRESETS, VAE, SDXLText, TextEncoder, UNet

DROP = 0.1  # share of captions left out in training, for classifier-free guidance
# Defaults of the training commands: those of SDXL where --init is its folder; its batch is ours [?].
SMALL = dict(steps=5000, batch=16, lr=2e-3, workers=0, save_every=500)
SDXL = dict(steps=30_000, batch=4, lr=1e-5, workers=4, save_every=2500)
# How each stage is sampled: by a small model, on SDXL. The paper takes 200 steps of EDM's sampler for masks
# and 40 for images [N]; the rest is ours [?].
SAMPLING = {
    "text2mask": (dict(steps=10, guidance=1.5, interval=(2.0, 80.0), sampler="edm"),
                  dict(steps=25, guidance=2.0, interval=ALWAYS, sampler="dpm++")),
    "mask2img": (dict(steps=15, guidance=1.5, interval=ALWAYS, sampler="dpm++"),
                 dict(steps=40, guidance=5.0, interval=ALWAYS, sampler="dpm++")),
}
EDGE_WIDTH = (1, 3)   # pixels between segments, of the small models and on SDXL, whose VAE blurs 1 away
MIN_REGION = (8, 50)  # pixels. The VAE's blur leaves thin false regions between classes: 50 removes most
# The mean of a picture shows through even SDXL's strongest noise, so SDXL never learns to choose it and
# paints pictures of medium brightness. Colour maps have any mean: a random shift of this deviation, added to
# the noise of each channel, hides it in training ("noise offset"; SDXL's own training used 0.05) [?].
NOISE_OFFSET = 0.1
SCHEDULE = dict(kind="cosine", prediction="sample", spacing="trailing")  # of the small models
SDXL_LOOP = dict(warmup=500, decay="constant", ema=0.9999)


# ---- the mask codec ----------------------------------------------------------------------------------------

def encode(codes, K):
    """(H, W) class ids or codes -> (H, W, 3) uint8 colour map."""
    return palette(K)[codes]


def decode(colours, K):
    """(H, W, 3) uint8 -> (H, W) uint8 codes: every channel is rounded to the nearest level of the palette.

    Where two regions blur into each other, the nearest colour is often that of a third class. So a channel
    that is over a third of a step from every level makes the pixel edge, and so do levels that are no code:
    `segments` grows the regions around over it. A larger limit lets more third classes through, a smaller one
    loses thin regions of noisy maps.
    """
    base, step = palette_levels(K)
    value = np.arange(256)
    digit = np.rint(value / step).astype(np.int16)
    digit[abs(value - digit * step) > step / 3] = base ** 3  # more than any code
    red, green, blue = (digit[colours[..., channel]] for channel in range(3))  # (H, W)
    return np.minimum(green * base ** 2 + red * base + blue, K + 1).astype(np.uint8)


def components(values):
    """(H, W) integers -> (H, W) labels: a 4-connected region of equal values gets its smallest flat index.

    Union-find on runs: rows are cut into runs of equal values, far fewer than pixels. Runs of one value that
    touch take the smaller label, then labels follow labels until nothing changes.
    """
    begins = np.ones(values.shape, bool)
    begins[:, 1:] = values[:, 1:] != values[:, :-1]
    run_of = begins.ravel().cumsum().reshape(values.shape) - 1  # (H, W) each pixel's run, numbered from 0
    # Two runs that touch: once, at the first column that they share.
    touch = (values[1:] == values[:-1]) & (begins[1:] | begins[:-1])
    a, b = run_of[:-1][touch], run_of[1:][touch]
    label = np.arange(run_of[-1, -1] + 1)
    while len(a):
        low = np.minimum(label[a], label[b])
        np.minimum.at(label, label[a], low)
        np.minimum.at(label, label[b], low)
        # A label is a run of the region: take its label's label until every one is its own.
        while not np.array_equal(shorter := label[label], label):
            label = shorter
        apart = label[a] != label[b]
        a, b = a[apart], b[apart]
    return np.flatnonzero(begins)[label][run_of]


def grow(known, *maps):
    """Pixels outside `known` (H, W) bool take the nearest known pixel's value, ring by ring, in each map."""
    width = known.shape[1] + 2
    todo = np.flatnonzero(np.pad(~known, 1))
    known, maps = np.pad(known, 1).ravel(), [np.pad(m, 1).ravel() for m in maps]  # the border is not known
    while len(todo) and known.any():
        source = np.zeros_like(todo)  # 0, a pixel of the border, stands for: no known neighbour
        for step in (1, -1, width, -width):  # right, left, below, above: the last one counts
            source = np.where(known[todo + step], todo + step, source)
        ring = source > 0
        for m in maps:
            m[todo[ring]] = m[source[ring]]
        known[todo[ring]] = True
        todo = todo[~ring]
    return [m.reshape(-1, width)[1:-1, 1:-1] for m in maps]


def clean(codes, min_region=8):
    """(H, W) codes -> the same; 4-connected regions under min_region pixels take what surrounds them."""
    label = components(codes)
    size = np.bincount(label.ravel(), minlength=codes.size)
    return grow(size[label] >= min_region, codes)[0]


def segments(codes, isthing, min_region=8):
    """(H, W) codes, edges included -> class ids and instances, both (H, W) uint8.

    An instance is a connected region of a thing between edges, grown back over the edges. Instances are
    numbered 1..254 in reading order; what comes after is a crowd, 255. isthing: K bools.
    """
    K = len(isthing)
    # Without any edge pixel, specks are filled first, so that none cuts a region in two. Else they are filled
    # below, together with the edges.
    codes = clean(codes, min_region) if (codes <= K).all() else codes
    label = components(codes)
    size = np.bincount(label.ravel(), minlength=codes.size)
    solid = (codes <= K) & (size[label] >= min_region)
    if solid.any():
        ids, label = grow(solid, codes, label)
    else:
        ids = np.where(codes > K, 0, codes)
    things = np.concatenate([[False], isthing])[ids]
    # A region is numbered where it begins: its label is the index of its first pixel.
    roots = np.flatnonzero(things & (label == np.arange(label.size).reshape(label.shape)))
    numbers = np.zeros(label.size, np.uint8)
    numbers[roots] = np.arange(1, len(roots) + 1).clip(max=CROWD)
    return ids.astype(np.uint8), numbers[label]


# ---- the data ----------------------------------------------------------------------------------------------

def fit_size(aspect, side, multiple):
    """The (H, W) with about side * side pixels and W / H = aspect whose lengths are multiples."""
    lengths = side / aspect ** 0.5, side * aspect ** 0.5
    return tuple(max(1, round(length / multiple)) * multiple for length in lengths)


def painted_size(model, shape):
    """The (H, W) in which a model paints a picture that stands for one of `shape` (H, W).

    SDXL paints in that shape, up to 1 to 4, with about as many pixels as in its training, in multiples of 64
    as its own training did; a small model paints in the size of its training.
    """
    height, width = model.config["size"]
    if model.vae is None:
        return height, width
    aspect = min(max(shape[1] / shape[0], 1 / 4), 4)
    return fit_size(aspect, (height * width) ** 0.5, math.gcd(64, height, width))


def list_shapes(pairs, names):
    """The (H, W) of the pictures of these names, by their headers."""
    return [header_size(pairs.paths[pairs.positions[name]])[::-1] for name in names]


def painted_sizes(model, pairs, names):
    """{name: the (H, W) in which its picture is painted}; None for a small model, which has one size."""
    if model.vae is None:
        return None
    return {name: painted_size(model, shape) for name, shape in zip(names, list_shapes(pairs, names))}


class ResizeCrop:
    """Scale pictures of one (H, W) to cover another and crop: at random with rng, else in the middle.

    Maps of ids are scaled by nearest pixel; photos by the mean of the pixels where they shrink, by cubic
    interpolation where they grow. .top, .left: where the crop begins; .room: the largest `left` possible.
    """

    def __init__(self, source, size, rng=None):
        scale = max(size[0] / source[0], size[1] / source[1])
        self.height = max(round(source[0] * scale), size[0])
        self.width = max(round(source[1] * scale), size[1])
        self.photo = Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC
        self.size, self.room = size, self.width - size[1]

        def start(room):
            return int(rng.integers(room + 1)) if rng else room // 2
        self.top, self.left = start(self.height - size[0]), start(self.room)

    def __call__(self, array):
        """(H, W) ids or (H, W, 3) pixels, uint8 -> the same at the new size."""
        picture = Image.fromarray(array)
        resampling = Image.Resampling.NEAREST if array.ndim == 2 else self.photo
        if picture.size != (self.width, self.height):
            picture = picture.resize((self.width, self.height), resampling)
        box = self.left, self.top, self.left + self.size[1], self.top + self.size[0]
        return np.asarray(picture.crop(box))


class CaptionedPairs(torch.utils.data.Dataset):
    """A PairFolder for the generators. Item (index, seed) -> dict of tensors, of the parts the folder reads:

    image     (3, H, W) in [-1, 1]
    codes     (H, W) long; outlined where the folder reads instances and the data has them
    tokens    (L,) long, of one of the captions
    time_ids  (6,) SDXL's size conditioning: original size, crop corner and target size, each (h, w) in pixels

    size is (H, W); edge_width: of the outlines, in pixels. With augment, the crop is random and half of the
    samples are mirrored, unless the caption or a class speaks of left or right. sizes {name: (H, W)}, if
    given, replace `size`; .groups then gives equal numbers to pairs of equal size, which may be in one batch.
    """
    seeded = True

    def __init__(self, pairs, size, tokenize, augment=True, edge_width=1, sizes=None):
        self.pairs, self.sizes = pairs, [sizes[name] if sizes else tuple(size) for name in pairs.names]
        self.groups = np.unique(self.sizes, axis=0, return_inverse=True)[1].ravel() if sizes else None
        self.tokenize, self.augment, self.edge_width = tokenize, augment, edge_width
        self.mirrors = not has_left_or_right(pairs.classes)

    def __len__(self):
        return len(self.pairs)

    def cropped_share(self):
        """The share of an average picture's pixels that the crop leaves out, from up to 500 headers."""
        kept = []
        for i in spread(len(self), 500):
            width, height = header_size(self.pairs.paths[i])
            aspect = width / height * self.sizes[i][0] / self.sizes[i][1]
            kept.append(min(aspect, 1 / aspect))
        return 1 - float(np.mean(kept))

    def __getitem__(self, key):
        index, seed = key
        rng = np.random.default_rng(seed)
        pair, captions = self.pairs.read(index), self.pairs.captions(index)
        source = next(iter(pair.values())).shape[:2]
        caption, mirror = captions[0], False
        if self.augment:
            caption = captions[rng.integers(len(captions))]
            mirror = rng.random() < 0.5 and self.mirrors and not {"left", "right"} & set(words_of(caption))
        crop = ResizeCrop(source, self.sizes[index], rng if self.augment else None)
        views = {part: crop(array) for part, array in pair.items()}
        left = crop.left
        if mirror:
            views = {part: view[:, ::-1] for part, view in views.items()}
            left = crop.room - crop.left  # the crop's corner in the mirrored picture

        time_ids = [*source, crop.top, left, *self.sizes[index]]
        item = dict(tokens=self.tokenize([caption])[0],
                    time_ids=torch.tensor(time_ids, dtype=torch.float32))
        if "image" in views:
            pixels = torch.from_numpy(views["image"].copy()).permute(2, 0, 1)  # (3, H, W)
            item["image"] = pixels.float() / 127.5 - 1
        if "ids" in views:
            codes = views["ids"]
            if "instances" in views and self.pairs.has_instances:
                # Outlined after resizing, so that all edges are equally wide.
                codes = outline(codes, views["instances"], len(self.pairs.classes), self.edge_width)
            item["codes"] = torch.from_numpy(codes.astype(np.int64))
        return item


def words_of(caption):
    """The words of a caption in lower case: runs of letters and digits, to look for words in captions. What
    the network reads are unet.caption_words."""
    return re.findall(r"[^\W_]+", caption.lower())


# ---- the networks ------------------------------------------------------------------------------------------

@functools.cache
def read_frozen(folder, device):
    """SDXL's text encoders and VAE. Nothing trains them, so all models on a device share them.

    The VAE is fp32: fp16 would overflow in it, and bf16 blur the colours of masks.
    """
    text = SDXLText.from_folder(folder, device, diffusion.precision(device))
    vae = networks.read_part(VAE, Path(folder) / "vae", device)
    return text, vae.requires_grad_(False)


class TextToImage(nn.Module):
    """A UNet, its text encoder and its schedule: caption -> picture. The base of both generators.

    unet, text, schedule  a UNet, a TextEncoder or SDXLText, a Schedule
    size                  (H, W) of training, in pixels
    vae, base             of a model on SDXL: its frozen VAE, whose latents are painted, and its folder
    """
    stage = "mask2img"  # whose way of sampling it has

    def __init__(self, unet, text, schedule, size, vae=None, base=None):
        super().__init__()
        self.unet, self.text, self.schedule, self.vae = unet, text, schedule, vae
        self.config = dict(size=list(size))
        if vae is None:
            self.config.update(unet=unet.config, text=text.config, schedule=schedule.config)
        else:
            self.config.update(base=str(base))
        self.check_size(size)

    @property
    def edge_width(self):
        """Of the edges in the masks that it paints or is given, in pixels."""
        return EDGE_WIDTH[self.vae is not None]

    @property
    def default_sampling(self):
        """SAMPLING of this model: arguments of `generate`."""
        return SAMPLING[self.stage][self.vae is not None]

    def check_size(self, size):
        """Raises ValueError where the network cannot paint pictures of (H, W) pixels."""
        halvings = len(self.unet.config["block_out_channels"]) - 1
        multiple = self.vae.factor if self.vae else self.unet.config["patch_size"] * 2 ** halvings
        if size[0] % multiple or size[1] % multiple:
            raise ValueError(f"size {size[1]} x {size[0]}: not a multiple of {multiple}. Choose one "
                             "whose sides are")

    @classmethod
    def from_config(cls, config, device="cpu"):
        """The model of a config dict, with new weights; one on SDXL reads its base's folder."""
        config = dict(config)
        if "base" in config:
            return cls.from_sdxl(config.pop("base"), device, **config)
        unet, text = UNet(**config.pop("unet")), TextEncoder(**config.pop("text"))
        return cls(unet, text, Schedule(**config.pop("schedule")), **config)

    @classmethod
    def from_sdxl(cls, folder, device="cpu", **arguments):
        """The model on SDXL's public folder; arguments: the constructor's others."""
        networks.check_sdxl(folder)
        schedule = Schedule.from_public(Path(folder) / "scheduler" / "scheduler_config.json")
        text, vae = read_frozen(str(folder), str(device))
        unet = networks.read_part(UNet, Path(folder) / "unet", device)
        return cls(unet, text, schedule, vae=vae, base=folder, **arguments)

    def forward(self, x, t, caption, time_ids):
        """x (B, C, H, W) noised, t (B,), caption (B, L) tokens or what `encode_text` made of them, time_ids
        (B, 6) -> the schedule's prediction, as x."""
        if torch.is_tensor(caption):
            caption = self.text(caption)
        context, pooled = caption                          # (B, L, D), (B, P)
        return self.unet(x, t, context, pooled, time_ids)  # (B, C, H, W)

    @torch.no_grad()
    def to_latents(self, x):
        """Pictures (B, 3, H, W) in [-1, 1] -> what the UNet paints: these, or a sample of their latents."""
        if self.vae is None:
            return x
        with torch.autocast(x.device.type, enabled=False):  # SDXL's VAE needs fp32
            return self.vae.encode(x.float())

    @torch.no_grad()
    def from_latents(self, z):
        """What the UNet paints -> pictures (B, 3, H, W) in about [-1, 1]."""
        if self.vae is None:
            return z
        with torch.autocast(z.device.type, enabled=False):
            return self.vae.decode(z.float())

    def encode_text(self, captions, device):
        """B captions -> context (B, L, D), pooled (B, P). SDXL's encoders read each caption by itself, so
        that it gives the same bits in any batch."""
        if self.vae is None:
            return self.text(self.text.tokenize(captions).to(device))
        tokens = {caption: self.text.tokenize([caption]).to(device) for caption in captions}
        encoded = {caption: self.text(tokens[caption]) for caption in tokens}
        context, pooled = zip(*(encoded[caption] for caption in captions))
        return torch.cat(context), torch.cat(pooled)

    def enable_checkpointing(self):
        """Recompute in the backward pass what the forward made: less memory, a third slower."""
        self.unet.enable_checkpointing()

    def autocast(self):
        """For sampling while SDXL is trained, when what is trained is fp32: bf16 on CUDA. Small models sample
        in fp32, and a model on SDXL that was loaded is bf16 already."""
        weight = next((getattr(self, "checkpoint_part", None) or self.unet).parameters())
        if self.vae is None or weight.dtype == torch.bfloat16:
            return contextlib.nullcontext()
        return diffusion.autocast(weight.device)

    @torch.no_grad()
    def generate(self, captions, seeds, steps, guidance, sampler, size=None, extra=(), interval=ALWAYS,
                 to_x0=None, time_ids=None):
        """B captions and seeds -> x0 (B, 3, H, W). A sample depends on its own caption and seed alone.

        extra: further arguments of forward; interval, to_x0: as in diffusion.denoiser; time_ids: six numbers
        a sample, as in CaptionedPairs, by default those of an uncropped picture.
        """
        device = next(self.parameters()).device
        size = tuple(size or self.config["size"])
        self.check_size(size)
        factor = self.vae.factor if self.vae else 1
        shape = self.unet.config["in_channels"], size[0] // factor, size[1] // factor
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]

        def randn(_=None):  # the samplers pass x, whose shape is known here
            return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)
        with self.autocast():
            time_ids = time_ids or [(*size, 0, 0, *size)] * len(captions)
            time_ids = torch.tensor(time_ids, dtype=torch.float32, device=device)  # (B, 6)
            cond = self.encode_text(captions, device), time_ids, *extra
            uncond = self.encode_text([""] * len(captions), device), time_ids, *extra
            denoise = diffusion.denoiser(self, self.schedule, cond, uncond, guidance, interval, to_x0)
            z = diffusion.sample(denoise, self.schedule, randn(), steps, sampler, randn)
            return self.from_latents(z)


def drop_captions(tokens, keep):
    """Tokens (B, ...), zero where keep (B,) is False: the null condition of guidance."""
    return tokens * keep.view(-1, *[1] * (tokens.ndim - 1))


def to_pixels(x0):
    """(B, 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8."""
    pixels = ((x0.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


class Text2Mask(TextToImage):
    """A TextToImage whose UNet gives a logit per palette code and pixel. On SDXL: SDXL's UNet, fine-tuned.

    classes: [{"name", "isthing"}]; edges: whether codes have edges; rank: of LoRA's matrices, which are then
    what is trained, or None; the rest as TextToImage.
    """
    stage = "text2mask"

    def __init__(self, unet, text, schedule, size, classes, edges=False, rank=None, vae=None, base=None):
        super().__init__(unet, text, schedule, size, vae, base)
        self.config.update(classes=classes, edges=edges, rank=rank)
        self.palette = torch.from_numpy(palette(len(classes))).float() / 127.5 - 1  # (K + 2, 3) in [-1, 1]
        # The colours that it paints with. A small model keeps them with its weights: the classes of the
        # shipped ones have changed their order since most of their training, and so their colours.
        self.register_buffer("colours", self.palette.clone())
        self.register_buffer("class_weights", torch.ones(len(self.palette)), persistent=False)
        if rank:
            self.add_lora(rank)

    def add_lora(self, rank):
        """Freeze the text encoder and the UNet, and add what is trained instead."""
        self.requires_grad_(False)
        if self.vae:
            self.unet.to(diffusion.precision(self.unet.conv_in.weight.device))
        networks.add_lora(self.unet, rank)
        if not self.vae:
            # The base has read and written photos. conv_in and the head read the noisy colour map, and the
            # head's last convolution, which gives a logit per code, is new: these are trained in full.
            # conv_out passes on features alone. On SDXL the VAE reads and writes colours as it is.
            for part in (self.unet.conv_in, self.unet.head, self.unet.head_time):
                part.requires_grad_(True)

    @classmethod
    def from_base(cls, base, size, classes, edges=False, rank=None):
        """On a small base, or a Text2Mask of other classes: its weights, except those of the last
        convolution, which gives a logit per code. From a Text2Mask, the channels of void, of the edge and of
        classes with the same name are copied; where there are as many classes, the others too, by position.
        """
        unet = UNet(**dict(base.unet.config, out_channels=len(classes) + 2))
        diffusion.load_matching(unet, base.unet.state_dict())
        model = cls(unet, base.text, base.schedule, size, classes, edges, rank)
        if isinstance(base, Text2Mask):
            copy_codes(base.unet.head[-1], unet.head[-1], 0, base.config["classes"], classes)
            if [c["name"] for c in classes] == [c["name"] for c in base.config["classes"]]:
                model.colours.copy_(base.colours)
        return model

    @property
    def checkpoint_part(self):
        """What a checkpoint holds; the rest is in the base's folder. None: everything."""
        if self.vae and self.config["rank"]:
            return networks.lora_matrices(self.unet)
        return self.unet if self.vae else None

    def loss(self, net, batch, drop=DROP):
        """Of a batch of CaptionedPairs. A share `drop` of the captions is left out. net: this model, perhaps
        wrapped for DDP."""
        codes = batch["codes"]                        # (B, H, W)
        x0 = self.colours[codes].permute(0, 3, 1, 2)  # (B, 3, H, W): here masks become colours
        # Flat colours show through much noise, so train mostly there: 1 - u^2 is over a half for 7 of 10
        # samples. The cosine schedule has sigma = 1 in its middle, SDXL's has 1.6.
        u = torch.rand(len(codes), device=codes.device)
        t = ((1 - u ** 2) * self.schedule.T).long().clamp(max=self.schedule.T - 1)
        keep = torch.rand(len(codes), device=codes.device) >= drop
        cond = drop_captions(batch["tokens"], keep), batch["time_ids"]
        if self.vae:
            return self.latent_loss(net, x0, t, cond)
        return self.pixel_loss(net, x0, codes, t, cond)

    def latent_loss(self, net, x0, t, cond):
        """SDXL's: the diffusion loss of the colour map's latents."""
        z0 = self.to_latents(x0)  # (B, 4, h, w)
        offset = torch.randn_like(z0[:, :, :1, :1])
        noise = torch.randn_like(z0) + NOISE_OFFSET * offset
        return diffusion.loss(net, self.schedule, z0, *cond, t=t, noise=noise)

    def pixel_loss(self, net, x0, codes, t, cond):
        """Of the small models: the cross-entropy of the codes."""
        x_t = self.schedule.add_noise(x0, torch.randn_like(x0), t)
        logits = net(x_t, t, *cond).float()  # (B, K + 2, H, W)
        # Weight rare classes up in the loss, and add log(weight) to the logits so that the optimum is still
        # the true class probability (logit adjustment, 2007.07314).
        logits = logits + self.class_weights.log().view(-1, 1, 1)
        return F.cross_entropy(logits, codes, self.class_weights)

    def sample(self, captions, seeds, size=None, maps=False, time_ids=None, **sampling):
        """B captions and seeds -> (B, H, W) uint8 codes; with maps also their colour maps (B, H, W, 3) in
        [0, 255], in the palette's colours. time_ids: as in `generate`; sampling: what differs from
        `default_sampling`.

        A code is the likeliest colour of the last step; with SDXL, what `decode` reads in the picture.
        """
        last = None  # the logits of the sampler's last call: they give the codes

        def to_x0(logits):
            nonlocal last
            last = logits  # (B, K + 2, H, W)
            return expected_colours(logits, self.colours)
        x0 = self.generate(captions, seeds, size=size, to_x0=None if self.vae else to_x0, time_ids=time_ids,
                           **self.default_sampling | sampling)
        if self.vae:
            K = len(self.config["classes"])
            codes = np.stack([decode(colours, K) for colours in to_pixels(x0)])
        else:
            codes = last.argmax(1).to(torch.uint8).cpu().numpy()
        if not maps:
            return codes
        if not self.vae:
            x0 = expected_colours(last.cpu(), self.palette)
        return codes, (x0.permute(0, 2, 3, 1).cpu().numpy() + 1) * 127.5


def expected_colours(logits, colours):
    """(B, K + 2, H, W) logits of codes with colours (K + 2, 3) -> the expected colour map (B, 3, H, W)."""
    return torch.einsum("bkhw,kc->bchw", logits.softmax(1), colours)


@torch.no_grad()
def copy_codes(old, new, dim, old_classes, new_classes):
    """Copy a convolution's channels of void, of the edge and of the classes that have the same name in both.

    dim: that of the codes in the weights; 0: the convolution gives them, 1: it reads them.
    """
    # The label of each code: its class's name; 0 and 1, which are no names, for void and the edge.
    old_labels, new_labels = ([0, *(c["name"] for c in classes), 1] for classes in (old_classes, new_classes))
    for k, label in enumerate(new_labels):
        if label in old_labels:
            source = old_labels.index(label)
            new.weight.select(dim, k).copy_(old.weight.select(dim, source))
            if dim == 0:
                new.bias[k] = old.bias[source]


def count_codes(data, K, most=500):
    """How many pixels each code has in up to `most` masks of a CaptionedPairs, evenly apart -> (K + 2,)."""
    items = (data[i, 0]["codes"] for i in spread(len(data), most))
    return sum(torch.bincount(item.ravel(), minlength=K + 2) for item in items)


def class_weights(counts):
    """Pixels of every code -> its weight in the loss: 1 / its share, with mean 1 over pixels.

    A sun fills one pixel of 100 and would hardly be learned otherwise. A code that is not there weighs 1.
    """
    share = counts / counts.sum()
    weight = 1 / share.clamp(min=1e-3)
    return torch.where(counts > 0, weight / (weight * share).sum(), 1.0)


# ---- CLI ---------------------------------------------------------------------------------------------------

def training_flags(parser, small):
    """The flags of every training command of the generators; small: its defaults without SDXL."""
    def default(key):
        return f"(default: {small[key]}; on SDXL {SDXL[key]})"
    add = parser.add_argument
    add("--data", default="shapes",
        help="NAME (data/NAME) or a folder with train/ and val/ (default: shapes)")
    add("--out", type=Path, help="folder of the results (default: out/NAME/STAGE)")
    add("--size", type=picture_size, help="64 or 96x72, width x height (default: the shape of the data's "
        "pictures, with as many pixels as 64x64; on SDXL as 768x768)")
    positive = number(int, 1)
    add("--limit", type=positive, help="use the first N training pairs only")
    add("--steps", type=positive,
        help=f"training steps {default('steps')}; with more than before, a finished run goes on")
    add("--batch", type=positive, help=f"samples a micro-batch and rank {default('batch')}")
    add("--accumulate", type=positive, default=1, help="micro-batches a step (default: 1)")
    add("--lr", type=number(float, 0, above=True), help=f"peak learning rate {default('lr')}")
    add("--seed", type=int, default=0, help="of the first weights, batches and noise (default: 0)")
    add("--workers", type=number(int, 0), help=f"processes that load data {default('workers')}")
    add("--save-every", type=positive, help=f"steps between saves {default('save_every')}")
    add("--device", default="auto", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")
    add("--compile", action="store_true", help="torch.compile, for CUDA")
    parser.set_defaults(recipe=small, init=None)


def init_flag(parser, kind):
    parser.add_argument("--init", type=Path, help="base to start from: a folder of `mask2img.py base`, or "
                        f"SDXL's public folder; or a {kind} to train on, of other data too")


def apply_recipe(args):
    """Fill in the flags that were not given: from the command's small recipe, or SDXL's.

    Sets args.sdxl: SDXL's folder if the model is built on SDXL (--init, or what its checkpoint names), else
    None.
    """
    args.sdxl = None
    if args.init and networks.is_pipeline(args.init):
        args.sdxl = args.init = args.init.resolve()  # absolute: the checkpoint stores this path
    elif args.init and not args.init.exists():
        raise ValueError(f"{args.init}: no such folder. Give one of mask2img.py base, or SDXL's, which "
                         "docs/paper_scale.md says how to download")
    elif args.init:
        args.sdxl = diffusion.read_header(args.init).get("config", {}).get("base")
    for key, value in (SDXL if args.sdxl else args.recipe).items():
        if getattr(args, key) is None:
            setattr(args, key, value)


def choose_size(args, pairs):
    """--size, or the shape of a typical picture with the recipe's number of pixels -> (H, W).

    The shape is the median of the whole folder, even with --limit, so that both generators agree.
    """
    if args.size:
        return args.size
    paths = PairFolder(pairs.folder, ("image",)).paths
    aspect = float(np.median([width / height for width, height in some_sizes(paths)]))
    return fit_size(aspect, *((768, 64) if args.sdxl else (64, 8)))


def find_weights(data, stage, given=None):
    """The folder given, else what was trained in out/NAME/STAGE, else the shipped weights of this data, else
    out/NAME/STAGE again, for the error to name."""
    trained = Path("out") / dataset_name(data) / stage
    shipped = ROOT / "weights" / dataset_name(data) / stage
    if given:
        return given
    return shipped if shipped.is_dir() and not diffusion.checkpoint_file(trained).exists() else trained


def sampler_flags(parser, stage, prefix=""):
    """How a Text2Mask or Mask2Img (stage) is sampled. `choose_sampling` sets what is not given."""
    what = {"text2mask": "a mask", "mask2img": "an image"}[stage]
    flag = "--" + prefix.replace("_", "-")
    add = parser.add_argument

    def default(key):
        return "(default: {}; on SDXL {})".format(*(sampling[key] for sampling in SAMPLING[stage]))
    add(f"{flag}steps", type=number(int, 1), help=f"sampling steps of {what} {default('steps')}")
    add(f"{flag}guidance", type=number(float, 0),
        help=f"classifier-free guidance of {what}; 1 = none {default('guidance')}")
    add(f"{flag}guidance-interval", dest=f"{prefix}interval", type=number(float, 0), nargs=2,
        metavar=("LOW", "HIGH"), help=f"guide {what} only at noise levels (sigma) between these, of 0 to 80, "
        f"on SDXL 0 to 14.6 {default('interval')}")
    add(f"{flag}sampler", choices=tuple(SAMPLERS),
        help=f"of {what}; edm evaluates the network twice a step and adds fresh noise {default('sampler')}")
    add(f"{flag}base", type=Path, help=f"folder of SDXL, or of a distilled SDXL, to paint {what} with "
        "(default: the one of the training)")


def choose_sampling(args, model, prefix=""):
    """Set the flags of `sampler_flags` and `region_flag` that were not given to the model's defaults."""
    defaults = {prefix + key: value for key, value in model.default_sampling.items()}
    if model.stage == "text2mask":
        defaults["min_region"] = MIN_REGION[model.vae is not None]
    for key, value in defaults.items():
        if getattr(args, key, None) is None:
            setattr(args, key, value)


def chosen_sampling(args, prefix=""):
    """The flags of `sampler_flags`, but for the base, as arguments of a model's `sample`."""
    return {key: getattr(args, prefix + key) for key in ("steps", "guidance", "interval", "sampler")}


def region_flag(parser):
    parser.add_argument("--min-region", type=number(int, 1),
                        help="smaller regions of a mask, in pixels, go to their surroundings "
                             "(default: {}; on SDXL {})".format(*MIN_REGION))


def sampling_flags(parser, stage, data="shapes"):
    """The flags of sampling from one trained Text2Mask or Mask2Img; data: whose weights are the default."""
    add = parser.add_argument
    add("--init", type=Path, help=f"trained model (default: out/{data}/{stage}, else the shipped one)")
    sampler_flags(parser, stage)
    add("--seed", type=int, default=0, help="another seed, other samples")
    add("--device", default="auto", help="cpu, cuda, cuda:1 ...")


def fit_generator(model, loss, data, args, stage, picture, measure=None, following="", base=None):
    """diffusion.fit with the flags of training_flags; results go to --out or out/NAME/STAGE.

    following: the command that comes next, for the last line; {data}, {out} and {base} are filled in.
    """
    # Settings that a resumed run must share, in addition to diffusion.fit's own.
    keys = ("data", "split", "init", "limit", "unfreeze", "controlnet")
    settings = {key: str(getattr(args, key)) for key in keys if hasattr(args, key)}
    settings["pairs"] = data.pairs.fingerprint()
    if args.init and args.init != args.sdxl:  # SDXL's folder does not change: its name is enough
        settings["init"] += f" {diffusion.weights_hash(args.init)}"

    model.trained_on = len(data)
    keys = ("steps", "batch", "accumulate", "lr", "seed", "device", "workers", "save_every")
    loop = {key: getattr(args, key) for key in keys}
    if args.compile:
        diffusion.compile_blocks(model, networks.BLOCKS)
    if args.sdxl:
        loop.update(SDXL_LOOP)
        model.enable_checkpointing()
    out = args.out or Path("out") / dataset_name(args.data) / stage
    device, rank, world = diffusion.setup(args.device)
    if rank == 0:
        print(f"{out}: {describe_run(model, data, args, device, world)}", flush=True)
    diffusion.fit(model, loss, data, out, picture=picture, measure=measure, settings=settings, **loop)
    if rank == 0:
        print(f"{out}: look at samples.png and log.png. Next: "
              f"{following.format(data=args.data, out=out, base=base)}")


def describe_run(model, data, args, device, world):
    """A line for people on what is trained, on what, and how."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    precision = str(diffusion.precision(device)).removeprefix("torch.")
    everything = sum(p.numel() for p in model.parameters()) / 1e6
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    height, width = model.config["size"]
    return (f"{args.steps} steps of {args.batch * args.accumulate * world} pictures on {world} x {name}, "
            f"{precision}; {len(data)} pairs of {data.pairs.folder} at {width} x {height}, "
            f"{data.cropped_share():.0%} of a picture cropped away; {trained:.1f} M of {everything:.1f} M "
            f"parameters are trained, from {args.init or 'scratch'}")


def check_rank(args):
    """Raises ValueError where --init is no base for --rank, or comes from --rank itself."""
    if args.rank and not args.init:
        raise ValueError("--rank keeps the weights of a base. Give one by --init")
    if not args.init or args.init == args.sdxl:
        return
    if diffusion.read_header(args.init).get("config", {}).get("rank"):
        raise ValueError(f"{args.init}: was trained with --rank. Give the base that it was trained on")
    if args.rank and args.sdxl:
        raise ValueError(f"{args.init}: is a fine-tuned SDXL, but --rank needs SDXL's own folder. Give that "
                         "one or leave --rank out")


def new_model(args, classes, device):
    """A new Text2Mask: on SDXL, a small base or another Text2Mask (--init), or from scratch."""
    options = dict(size=args.size, classes=classes, edges=args.edges, rank=args.rank)
    if args.sdxl:
        model = Text2Mask.from_sdxl(args.sdxl, device, **options)
        if args.init != args.sdxl:
            _, state = diffusion.read_checkpoint(args.init, "Text2Mask")
            diffusion.load_strict(model.unet, state, args.init)
        return model
    if args.init:
        kind = diffusion.read_header(args.init).get("class")
        base = diffusion.load(Text2Mask if kind == "Text2Mask" else TextToImage, args.init)
        return Text2Mask.from_base(base, **options)
    config = PRESETS["tiny"]
    unet = UNet(**dict(config["unet"], out_channels=len(classes) + 2))
    return Text2Mask(unet, TextEncoder(**config["text"]), Schedule(**SCHEDULE), **options)


def train(args):
    """Train on the masks and captions of a pair folder."""
    apply_recipe(args)
    check_rank(args)
    device, rank, _ = diffusion.setup(args.device)
    parts = ("ids", "instances") if args.edges else ("ids",)
    pairs = PairFolder(find_split(args.data, "train"), parts, limit=args.limit)
    args.size = choose_size(args, pairs)
    torch.manual_seed(seed_of(args.seed, "weights"))
    model = new_model(args, pairs.classes, device)
    pairs.keep()
    data = CaptionedPairs(pairs, args.size, model.text.tokenize, edge_width=model.edge_width,
                          sizes=painted_sizes(model, pairs, pairs.names))
    counts = count_codes(data, len(pairs.classes))
    if not model.vae:
        model.class_weights = class_weights(counts)
    if rank == 0:
        print(describe_classes(counts[:-1].numpy(), pairs.classes))

    def picture(model, path):
        chosen = spread(len(data), 8 if model.vae else 24)
        captions = [pairs.captions(i)[0] for i in chosen]
        colours = palette(len(pairs.classes))
        real = [colours[data[i, 0]["codes"].numpy()] for i in chosen]
        codes = model.sample(captions, range(len(captions)))
        sampled = list(colours[codes])
        contact_sheet({"real": real, "sample": sampled}, captions, pairs.classes).save(path)
    base = args.sdxl or "BASE"
    if args.init and not args.sdxl and diffusion.read_header(args.init)["class"] == "TextToImage":
        base = args.init
    fit_generator(model, model.loss, data, args, "text2mask", picture,
                  following="python mask2img.py train --data {data} --init {base}", base=base)


def sample_mask(args):
    """Paint the mask of one caption -> OUT/{mask,colours,legend}.png."""
    device, _, _ = diffusion.setup(args.device)
    model = diffusion.load(Text2Mask, find_weights("shapes", "text2mask", args.init), device, args.base)
    choose_sampling(args, model)
    classes = model.config["classes"]
    codes = model.sample([args.prompt], [seed_of(args.seed)], args.size, **chosen_sampling(args))
    isthing = [c["isthing"] for c in classes]
    ids, instances = segments(codes[0], isthing, args.min_region)
    colours = encode(ids, len(classes))
    write_mask(args.out / "mask.png", ids, len(classes))
    write_picture(args.out / "colours.png", colours)
    sheet = contact_sheet({"mask": [colours]}, [args.prompt], classes)
    write_picture(args.out / "legend.png", sheet)
    names = ", ".join(classes[k - 1]["name"] for k in np.unique(ids) if k)
    print(f"{args.out}: mask.png (ids), colours.png, legend.png; {names}; {instances.max()} instances")


def main(argv=None):
    parser = FlagParser(description="Text2Mask: captions -> segmentation masks.")
    commands = parser.add_subparsers(required=True, metavar="{train,sample}")
    p = commands.add_parser("train", help="train on the masks and captions of a pair folder")
    training_flags(p, SMALL)
    init_flag(p, "Text2Mask")
    p.add_argument("--edges", action="store_true",
                   help="outline every segment, so that touching instances come apart")
    p.add_argument("--rank", type=number(int, 1),
                   help="freeze the base and train matrices of this rank, 8 for instance, beside its "
                        "attentions (LoRA); on SDXL give --lr 1e-4 (default: train all weights)")
    p.set_defaults(command=train)
    p = commands.add_parser("sample", help="paint the mask of one caption")
    p.add_argument("--prompt", required=True, help="the caption")
    p.add_argument("--out", type=Path, default=Path("out/sample"), help="folder of the pictures")
    p.add_argument("--size", type=picture_size, help="64 or 96x72 (default: the size of training)")
    region_flag(p)
    sampling_flags(p, "text2mask")
    p.set_defaults(command=sample_mask)
    args = parser.parse_args(argv)
    args.command(args)


if __name__ == "__main__":
    run(main)
