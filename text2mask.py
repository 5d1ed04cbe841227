"""Text2Mask: a caption -> a segmentation mask, by a diffusion model that paints colour-coded masks.

A mask becomes an image by giving each class a colour, so a text-to-image model can be fine-tuned to draw
masks. In pixel space the network says, for every pixel, how likely each colour of the palette is; x0 is the
expected colour and the loss is cross-entropy, so a finished mask needs no decoding of blended borders. With
SDXL the colour map is an image like any other: its latents are noised; a sample is decoded by the VAE and
read by nearest colour.

Paper: SegGen (2311.03355) section 3, Text2Mask: SDXL-base fine-tuned on (caption, colour map), lr 1e-5, 30k
       steps. The palette is measured in the authors' published pictures, where it explains every pixel.
Differs: on small data the base is a small pixel-space UNet of our own with a logit per colour; masks are
       cleaned of specks (the paper's are not); edges between instances are one pixel wide (the paper does not
       say).
Reads: data/NAME/{train,val} pair folders; --init a base of mask2img.py or SDXL's public folder.
Writes: out/NAME/text2mask.
Needs: unet.py, diffusion.py.
    python text2mask.py sample --prompt "two red houses by the water at sunset"
    python text2mask.py train --data shapes --init out/shapes/base
    torchrun --nproc_per_node 8 text2mask.py train --data ade20k --init stable-diffusion-xl-base-1.0 --shard
Dimension key: B batch, C channels, H W pixels, L caption tokens, D width, K classes; codes 0 void, 1..K,
K + 1 edge.
"""
import argparse
import contextlib
import functools
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, UnidentifiedImageError
from torch import nn
from tqdm import tqdm

import diffusion
import unet as networks
from diffusion import SAMPLERS, Schedule, positive, replacing, seed_of, within
from unet import PRESETS, VAE, SDXLText, TextEncoder, UNet

ROOT = Path(__file__).resolve().parent
PAPER = dict(steps=30000, lr=1e-5, size=(768, 768), batch=4, checkpointing=True, workers=4,  # batch: [?]
             save_every=2500)
MAX_CLASSES = 214                          # b = 6 has 216 colours: void and edge are two


# --------------------------------------------------------------------------------------------- the mask codec

def palette(K):
    """K classes -> (K + 2, 3) uint8 colours of the codes 0 void, 1..K classes, K + 1 edge. Paper [D]: design
    of the authors' pictures (ADE20K wall (0, 0, 51), building (0, 0, 102); edge colour of COCO: code 134)."""
    assert 1 <= K <= MAX_CLASSES, f"{K} classes; 1 to {MAX_CLASSES} have a colour"
    b = next(b for b in range(2, 7) if b ** 3 >= K + 2)
    s, v = round(255 / (b - 1)), np.arange(K + 2)
    return np.minimum(np.stack([s * (v // b % b), s * (v // b ** 2), s * (v % b)], 1), 255).astype(np.uint8)


def outlined(ids, instances, K):
    """(H, W) class ids and instances -> codes with every segment's border (its last pixels right and down) as
    edge."""
    segment = ids.astype(np.int64) * 256 + instances
    edge = np.zeros(ids.shape, bool)
    edge[:, :-1] |= segment[:, :-1] != segment[:, 1:]
    edge[:-1] |= segment[:-1] != segment[1:]
    return np.where(edge, K + 1, ids).astype(np.uint8)


def encode(ids, K, instances=None):
    """(H, W) class ids -> (H, W, 3) uint8 colour map; with instances every segment is outlined in the edge
    colour."""
    return palette(K)[ids if instances is None else outlined(ids, instances, K)]


def decode(colours, K, ambiguity=0.8):
    """(H, W, 3) uint8 -> (H, W) uint8 codes by the nearest palette colour; a pixel whose nearest distance is
    over `ambiguity` times its second nearest is void: it lies between two classes."""
    flat = torch.from_numpy(np.array(colours, np.float32)).reshape(-1, 3)
    code = torch.from_numpy(palette(K).astype(np.float32))
    out = []
    for part in flat.split(1 << 18):                                     # 2 MP x 152 codes at once: 1.2 GB
        near, index = torch.cdist(part, code).topk(2, largest=False)     # (N, 2)
        out.append(torch.where(near[:, 0] > ambiguity * near[:, 1], 0, index[:, 0]))
    return torch.cat(out).reshape(colours.shape[:2]).to(torch.uint8).numpy()


def components(values):
    """(H, W) integers -> (H, W) labels: a 4-connected region of equal value has its smallest flat index."""
    index = np.arange(values.size).reshape(values.shape)
    right, down = values[:, 1:] == values[:, :-1], values[1:] == values[:-1]
    a = np.concatenate([index[:, :-1][right], index[:-1][down]])
    b = np.concatenate([index[:, 1:][right], index[1:][down]])
    label = index.ravel().copy()
    while len(a):                                                        # hook roots, then shorten all paths
        low = np.minimum(label[a], label[b])
        np.minimum.at(label, label[a], low)
        np.minimum.at(label, label[b], low)
        while (shorter := label[label]).tobytes() != label.tobytes():
            label = shorter
        open_ = label[a] != label[b]
        a, b = a[open_], b[open_]
    return label.reshape(values.shape)


def grow(known, *maps):
    """Pixels outside `known` (H, W) bool take the values of the nearest known ones, ring by ring, in each of
    maps."""
    known, maps = known.copy(), [m.copy() for m in maps]
    while known.any() and not known.all():
        before = known.copy()
        for axis, shift in ((0, 1), (0, -1), (1, 1), (1, -1)):
            border = (slice(None),) * axis + (0 if shift == 1 else -1,)
            take = np.roll(before, shift, axis)
            take[border] = False                                         # nothing is beyond the border
            take &= ~known
            for m in maps:
                m[take] = np.roll(m, shift, axis)[take]
            known |= take
    return maps


def clean(ids, min_region=8):
    """(H, W) codes -> the same with every 4-connected region under min_region pixels given to what surrounds
    it."""
    label = components(ids)
    size = np.bincount(label.ravel(), minlength=ids.size)
    return grow(size[label] >= min_region, ids)[0]


def segments(codes, isthing, min_region=8):
    """(H, W) codes, edges included -> class ids and instances (H, W) uint8: a thing's instances are its
    connected regions between edges, grown back over the edges, and numbered 1..254 in reading order."""
    K = len(isthing)
    codes = clean(codes, min_region) if (codes <= K).all() else codes
    label = components(codes)
    size = np.bincount(label.ravel(), minlength=codes.size)
    solid = (codes <= K) & (size[label] >= min_region)
    ids, label = grow(solid, codes, label) if solid.any() else (np.where(codes > K, 0, codes), label)
    things = np.concatenate([[False], isthing])[ids]
    instances = np.zeros(ids.shape, np.uint8)
    for n, root in enumerate(np.unique(label[things])[:254], 1):
        instances[things & (label == root)] = n
    return ids.astype(np.uint8), instances


# --------------------------------------------------------------------------------------------------- the data

def dataset_folder(data, split):
    """--data NAME or PATH -> its pair folder of that split; the built-in shapes are drawn on the spot. Under
    torchrun every rank must ask, after diffusion.start."""
    folder = (Path(data) if Path(data).is_dir() else ROOT / "data" / data) / split
    if folder.parent.resolve() == (ROOT / "data" / "shapes").resolve():
        drawn(folder)
    if not folder.is_dir():
        script, there = ROOT / "data" / str(data) / "prepare.py", sorted(folder.parent.glob("*/images"))
        todo = "give --data a pair folder's parent"
        if there:
            todo = f"there are {', '.join(path.parent.name for path in there)}"
        elif script.exists():
            todo = f"run `python data/{data}/prepare.py --root RAW`"
        sys.exit(f"{folder}: looked for a pair folder, found none; {todo}")
    return folder


def drawn(folder):
    """Draws a split of the built-in shapes where it is missing or a killed run left it half-made: the first
    rank does, the others wait."""
    mark = folder.parent / f".{folder.name}.unfinished"                  # the script's own: see its `missing`
    if os.environ.get("RANK", "0") == "0" and (mark.exists() or not folder.is_dir()):
        script = ROOT / "data" / "shapes" / "prepare.py"
        size = ["--unlabelled", "8000"] if folder.name == "unlabelled" else []
        if subprocess.run([sys.executable, str(script), *size]).returncode:
            sys.exit(f"{folder}: looked for a drawn split, but {script} failed: see the line above")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def check_classes(wanted, found, where):
    """Two lists of classes, of data or checkpoints, must name the same; where: what the second is of."""
    first, second = ([c["name"] for c in classes] for classes in (wanted, found))
    if first != second:
        k = next((k for k, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))
        a, b = (names[k] if k < len(names) else "none" for names in (first, second))
        sys.exit(f"{where}: its {len(second)} classes are not the {len(first)} expected: id {k + 1} is {b}, "
                 f"not {a}; take what was made of the same data")


def read_classes(folder):
    """FOLDER/classes.json -> [{"name", "isthing", ...}], one to 214 of them."""
    path = Path(folder) / "classes.json"
    if not path.is_file():
        sys.exit(f"{path}: looked for the classes of a pair folder, found no such file; write it, or run the "
                 "data's prepare.py to its end")
    try:
        classes = [(c["name"], c.get("isthing", False)) for c in json.loads(path.read_text("utf-8"))]
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        sys.exit(f"{path}: looked for a list of {{name, isthing}}, found {type(error).__name__}; write one "
                 "entry a class")
    wrong = [pair for pair in classes if not (isinstance(pair[0], str) and isinstance(pair[1], bool))]
    if wrong:
        sys.exit(f"{path}: looked for a name, and true or false for isthing, found {wrong[0]}; mend it")
    if not 1 <= len(classes) <= MAX_CLASSES:
        sys.exit(f"{path}: {len(classes)} classes; the palette has colours for 1 to {MAX_CLASSES}: merge or "
                 "drop some")
    return [dict(name=name, isthing=isthing) for name, isthing in classes]


def names_of(folder, masks=True):
    """Sorted [(image path, name)] of a pair folder; every image must have its mask, every mask its image."""
    folder = Path(folder)
    if (folder.parent / f".{folder.name}.unfinished").exists():
        sys.exit(f"{folder}: looked for a whole set, found a half-made one; run again what makes it")
    paths = [p for p in sorted((folder / "images").glob("[!.]*"))
             if p.suffix.lower() in (".png", ".jpg", ".jpeg")]
    images = {p.stem: p for p in paths}
    if twice := [p for p in paths if images[p.stem] != p]:
        sys.exit(f"{folder}: looked for one image of a name, found {twice[0].name} and "
                 f"{images[twice[0].stem].name}; remove one")
    if not images:
        sys.exit(f"{folder / 'images'}: looked for .png or .jpg images, found none; prepare the data set "
                 "first")
    if masks:
        have = {p.stem for p in (folder / "masks").glob("[!.]*.png")}
        alone = sorted(set(images) ^ have)
        if alone:
            lone = alone[0] in images
            what = "an image without a mask" if lone else "a mask without an image (.png or .jpg)"
            sys.exit(f"{folder}: {len(alone)} of {len(images)} images and {len(have)} masks have no partner; "
                     f"{alone[0]} is {what}; add it or remove its partner")
    return [(images[name], name) for name in sorted(images)]


def open_image(path, kind="image"):
    try:
        image = Image.open(path)
        image.load()
        return image
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError) as error:
        sys.exit(f"{path}: looked for a readable {kind}, found {type(error).__name__} ({error}); replace or "
                 "remove it")


def rgb(image):
    """A picture in RGB of 8 bits. PIL's own conversion would clip 16-bit grey to white."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    return image.convert("RGB")


def read_ids(path, K, size=None):
    """A mask PNG -> (H, W) uint8 ids; refuses RGB, another (W, H) than size, and ids over K: the number of
    classes, or 255 for instances."""
    mask, kind = open_image(path, "mask"), "class" if K <= MAX_CLASSES else "instance"
    if mask.mode not in ("P", "L", "1", "I", "I;16"):
        sys.exit(f"{path}: looked for {kind} ids (palette or grey PNG), found mode {mask.mode}; save {kind} "
                 "ids, not colours")
    if size is not None and mask.size != size:
        sys.exit(f"{path}: the mask is {mask.size[0]} x {mask.size[1]}, its image {size[0]} x {size[1]}; "
                 "they must agree")
    ids = np.array(mask).astype(np.int64)
    if ids.max(initial=0) > K or ids.min(initial=0) < 0:
        found = ids.max() if ids.max() > K else ids.min()
        todo = "add the class to classes.json or mend the mask" if kind == "class" else "mend the mask"
        sys.exit(f"{path}: looked for ids of 0 to {K}, found {kind} id {found}; {todo}")
    return ids.astype(np.uint8)


def read_captions(folder, name, classes, ids=None):
    """Lines of captions/NAME.txt; where there are none, one composed from the classes of ids, which are read
    from masks/ if not given. With classes empty, there are no masks: it is "" then."""
    path = Path(folder) / "captions" / f"{name}.txt"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines and classes:
        ids = read_ids(Path(folder) / "masks" / f"{name}.png", len(classes)) if ids is None else ids
        announce(f"{folder}: no captions for some images; composed from their class names")
        present = [classes[i - 1]["name"] for i in np.unique(ids) if i]
        lines = ["a picture of " + (", ".join(present) or "nothing")]
    return lines or [""]


def plain(text):
    """The words of a caption in lower case, a space between them."""
    return " ".join(re.findall("[a-z]+", text.lower()))


@functools.cache
def announce(text):
    print(text)


def digest(files):
    """Paths -> a hash of their names and sizes: 12 hex digits."""
    text = repr([(path.name, path.stat().st_size) for path in files])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class Pairs(torch.utils.data.Dataset):
    """A pair folder for the generators. Item (index, seed) -> dict of tensors:

    tokens (L,) long; time_ids (6,) SDXL's original size, crop corner and target size, (h, w) each, in pixels;
    image (3, H, W) in [-1, 1] if images; codes (H, W) long if masks (outlined if edges and the data has
    instances). size is (H, W): pictures are scaled to cover it (masks by nearest) and cropped at random. A
    mirror image is drawn half of the time, unless the caption speaks of left or right.
    """

    def __init__(self, folder, size, tokenize, images=True, masks=True, edges=False, limit=None,
                 augment=True):
        self.folder, self.size, self.tokenize = Path(folder), size, tokenize
        self.images, self.masks, self.edges, self.augment = images, masks, edges, augment
        self.classes = read_classes(folder) if masks else []
        self.names = names_of(folder, masks)[:limit]

    def __len__(self):
        return len(self.names)

    def fingerprint(self):
        """A short text that changes when pairs are added, removed or made again."""
        files = [path for path, _ in self.names]
        files += [self.folder / "masks" / f"{name}.png" for _, name in self.names if self.masks]
        return f"{len(self)} pairs {digest(files)}"

    def __getitem__(self, key):
        index, seed = key
        path, name = self.names[index]
        rng, K, out = np.random.default_rng(seed), len(self.classes), {}
        image = open_image(path)
        ids = read_ids(self.folder / "masks" / f"{name}.png", K, image.size) if self.masks else None
        lines = read_captions(self.folder, name, self.classes, ids)
        caption = lines[rng.integers(len(lines))] if self.augment else lines[0]
        mirror = self.augment and rng.random() < 0.5 and not {"left", "right"} & set(plain(caption).split())
        fit, h, w, room = placed(image.size, self.size, rng if self.augment else None)
        w = room - w if mirror else w                                    # the mirror image's crop

        def seen(picture):
            pixels = np.asarray(fit(picture))
            return (pixels[:, ::-1] if mirror else pixels).copy()
        if self.images:
            pixels = torch.from_numpy(seen(rgb(image))).permute(2, 0, 1)  # (3, H, W)
            out["image"] = pixels.float() / 127.5 - 1
        if self.masks:
            path, codes = self.folder / "instances" / f"{name}.png", seen(Image.fromarray(ids))
            if self.edges and path.exists():                             # lines come last: one pixel wide
                instances = Image.fromarray(read_ids(path, 255, image.size))
                codes = outlined(codes, seen(instances), K)
            out["codes"] = torch.from_numpy(codes.astype(np.int64))
        out["tokens"] = self.tokenize([caption])[0]
        out["time_ids"] = torch.tensor([image.size[1], image.size[0], h, w, *self.size], dtype=torch.float32)
        return out


def evenly(n, count):
    """`count` positions of n (all, where fewer), evenly apart: neighbours in a film look alike."""
    return [i * n // min(n, count) for i in range(min(n, count))]


def placed(source, size, rng):
    """Scales a picture of (W, H) `source` to cover (H, W) `size` and crops (random with rng, else the middle)
    -> (the function picture -> picture, crop top, crop left, the largest crop left). Maps (one channel) go by
    nearest; photos by the mean of the pixels where they shrink, by cubic interpolation where they grow."""
    scale = max(size[1] / source[0], size[0] / source[1])
    w, h = max(round(source[0] * scale), size[1]), max(round(source[1] * scale), size[0])
    at = [int(rng.integers(room + 1)) if rng else room // 2 for room in (h - size[0], w - size[1])]
    box = (at[1], at[0], at[1] + size[1], at[0] + size[0])

    def fit(picture):
        photo = Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC
        resampling = Image.Resampling.NEAREST if picture.mode == "L" else photo
        picture = picture if picture.size == (w, h) else picture.resize((w, h), resampling)
        return picture.crop(box)
    return fit, *at, w - size[1]


# ----------------------------------------------------------------------------------------------- the networks

@contextlib.contextmanager
def told():
    """What a public folder lacks ends the program in one line."""
    try:
        yield
    except ValueError as error:
        sys.exit(str(error))


@functools.cache
def frozen(base, device):
    """SDXL's text encoders and VAE: nothing trains them, so the models on a device share them. fp16 would
    overflow in the VAE, and bf16 blur the colours of masks: it is fp32."""
    text = SDXLText.read(base, device, diffusion.precision(device))
    return text, networks.read_part(VAE, Path(base) / "vae", device).requires_grad_(False)


class TextToImage(nn.Module):
    """A UNet, its text encoder and its schedule: caption -> picture. The base of both generators.

    unet, text, schedule: constructor arguments of UNet, TextEncoder, Schedule;  size: (H, W) of training.
    base: in place of these a folder of SDXL in the public layout. Then latents of its frozen VAE are painted;
    text encoders and VAE have their weights, and the UNet has none (the meta device) until it is given them.
    """

    def __init__(self, unet=None, text=None, schedule=None, size=None, base=None):
        super().__init__()
        if base is None:
            self.config = dict(unet=unet, text=text, schedule=schedule, size=list(size))
            self.unet, self.text, self.schedule = UNet(**unet), TextEncoder(**text), Schedule(**schedule)
            self.vae = None
            return
        self.config = dict(base=str(base), size=list(size))
        with told():
            networks.check_sdxl(base)
            self.unet = networks.empty_part(UNet, Path(base) / "unet")
            self.schedule = Schedule.from_public(Path(base) / "scheduler" / "scheduler_config.json")
            self.text, self.vae = frozen(str(base), str(torch.get_default_device()))
            networks.check_fit(self.unet, self.text, self.vae, base)
        if wrong := [side for side in size if side % self.vae.factor]:
            sys.exit(f"--size: looked for multiples of the VAE's factor {self.vae.factor}, found {wrong[0]}; "
                     "give a size that is one")

    def forward(self, x, t, text, time_ids):
        """x (B, C, H, W) noised, t (B,), text (B, L) tokens or the (context, pooled) of prepare -> what the
        schedule's prediction says, as x."""
        context, pooled = self.text(text) if torch.is_tensor(text) else text
        return self.unet(x, t, context, pooled, time_ids)

    @torch.no_grad()
    def latents(self, x):
        """Pictures (B, 3, H, W) in [-1, 1] -> what the UNet paints: these or a sample of their latents."""
        if self.vae is None:
            return x
        with torch.autocast(x.device.type, enabled=False):               # SDXL's VAE in fp32
            return self.vae.encode(x.float())

    @torch.no_grad()
    def pictures(self, z):
        """What the UNet paints -> (B, 3, H, W) in about [-1, 1]."""
        if self.vae is None:
            return z
        with torch.autocast(z.device.type, enabled=False):
            return self.vae.decode(z.float())

    def autocast(self):
        """bf16 on CUDA at paper scale; small models sample in fp32, and loaded ones are bf16 already."""
        p = next((getattr(self, "stored", None) or self.unet).parameters())
        ready = self.vae is None or p.dtype == torch.bfloat16
        return contextlib.nullcontext() if ready else diffusion.autocast(p.device)

    def encoded(self, captions, device):
        """B captions -> context (B, L, D), pooled (B, P). SDXL's encoders read each caption alone and once,
        so that it gives the same bits in any batch, and to both models."""
        if self.vae is None:
            return self.text(self.text.tokenize(captions).to(device))
        memory = self.text.__dict__.setdefault("memory", {})
        if len(memory) > 256:                                            # 315 kB a caption in bf16
            memory.clear()
        for caption in set(captions) - set(memory):
            memory[caption] = self.text(self.text.tokenize([caption]).to(device))
        return tuple(torch.cat(part) for part in zip(*(memory[caption] for caption in captions)))

    def prepare(self, captions, size, device):
        """What stays the same over a sampling run: ((keys and values, pooled), time_ids)."""
        context, pooled = self.encoded(captions, device)
        time_ids = torch.tensor([[*size, 0, 0, *size]] * len(captions), dtype=torch.float32, device=device)
        return (self.project(context), pooled), time_ids

    def project(self, context):
        """(B, L, D) -> the keys and values of every cross-attention, computed once for all sampling steps."""
        return self.unet.project_text(context)

    @torch.no_grad()
    def draw(self, captions, seeds, steps, guidance, sampler, size=None, cond=(), null=(), decode=None,
             above=0.0):
        """B captions and seeds -> x0 (B, 3, H, W). A sample depends on its own caption and seed alone. cond,
        null, decode, above: as diffusion.denoiser has them."""
        device, size = next(self.parameters()).device, tuple(size or self.config["size"])
        factor = self.vae.factor if self.vae else 1
        shape = self.unet.config["in_channels"], size[0] // factor, size[1] // factor
        streams = [torch.Generator().manual_seed(seed) for seed in seeds]

        def randn(x=None):
            return torch.stack([torch.randn(shape, generator=g) for g in streams]).to(device)
        with self.autocast():
            yes, no = (self.prepare(words, size, device) for words in (captions, [""] * len(captions)))
            x0 = diffusion.denoiser(self, self.schedule, (*yes, *cond), (*no, *null), guidance, decode, above)
            del yes, no                                                  # stacked by now: half the memory
            return self.pictures(diffusion.sample(x0, self.schedule, randn(), steps, sampler, randn))


def dropped(tokens, keep):
    """Tokens (B, ...), zero where keep (B,) or (B, 1) is False: the null condition."""
    return tokens * keep.view(-1, *[1] * (tokens.ndim - 1))


def to_pixels(x0):
    """(B, 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8."""
    return ((x0.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


class Text2Mask(TextToImage):
    """The same UNet with a logit per palette code and pixel; on SDXL its own UNet, all of it fine-tuned.

    classes: [{"name", "isthing"}]; edges: codes have edges."""

    def __init__(self, unet=None, text=None, schedule=None, size=None, classes=(), edges=False, base=None):
        super().__init__(unet, text, schedule, size, base)
        self.config.update(classes=classes, edges=edges)
        colours = torch.from_numpy(palette(len(classes))).float() / 127.5 - 1
        self.register_buffer("colours", colours, persistent=False)       # (K + 2, 3) in [-1, 1]
        self.register_buffer("rarity", torch.ones(len(colours)), persistent=False)       # see `rarities`

    @property
    def stored(self):
        """What a checkpoint holds where the rest is in the base's folder."""
        return self.unet if self.vae else None

    def paint(self, logits):
        """(B, K + 2, H, W) logits -> the expected colour map (B, 3, H, W) in [-1, 1]."""
        return torch.einsum("bkhw,kc->bchw", logits.softmax(1), self.colours)

    def loss(self, net, batch, drop, min_snr=None, noise_offset=0.0):
        """A share `drop` of the captions is dropped. Pixels: cross-entropy of the codes at a random noise
        level. SDXL: the diffusion loss of the colour map's latents."""
        codes = batch["codes"]                                           # (B, H, W)
        x0 = self.colours[codes].permute(0, 3, 1, 2)                     # (B, 3, H, W)
        if self.vae:
            tokens = dropped(batch["tokens"], torch.rand(len(codes), device=codes.device) >= drop)
            return diffusion.loss(net, self.schedule, self.latents(x0), tokens, batch["time_ids"],
                                  min_snr=min_snr, noise_offset=noise_offset)
        u = torch.rand(len(codes), device=codes.device)         # flat colours show through much noise: 7 of
        t = ((1 - u ** 2) * self.schedule.T).long().clamp(max=self.schedule.T - 1)        # 10 with sigma > 1
        x = self.schedule.noised(x0, torch.randn_like(x0), t)
        tokens = dropped(batch["tokens"], torch.rand(len(codes), 1, device=codes.device) >= drop)
        logits = net(x, t, tokens, batch["time_ids"]).float()
        logits = logits + self.rarity.log().view(-1, 1, 1)               # weighted, yet calibrated: the best
        return F.cross_entropy(logits, codes, self.rarity)               # logits are those without weights

    def sample(self, captions, seeds, steps=12, guidance=2.0, sampler="edm", size=None, maps=False):
        """B captions and seeds -> (B, H, W) uint8 codes: the likeliest colour of the last step, or of SDXL's
        picture the nearest; with maps also the colour maps (B, H, W, 3) in [0, 255] they are read from."""
        last = []

        def decode_logits(logits):
            last[:] = [logits]
            return self.paint(logits)
        read = None if self.vae else decode_logits
        above = 0.0 if self.vae else 5.0                # further down, guided flat shapes swell and merge
        x0 = self.draw(captions, seeds, steps, guidance, sampler, size, decode=read, above=above)
        if self.vae:
            codes = np.stack([decode(colours, len(self.config["classes"])) for colours in to_pixels(x0)])
        else:
            codes = last[0].argmax(1).to(torch.uint8).cpu().numpy()
        return (codes, (x0.permute(0, 2, 3, 1).cpu().numpy() + 1) * 127.5) if maps else codes


def rarities(data, codes, first=500):
    """The loss's weight of every code (codes,): 1 / its share of the pixels, counted on the first pictures,
    with mean 1 over pixels; a sun fills one pixel of 100 and would hardly be learned. An absent code weighs
    1."""
    counts = sum(torch.bincount(data[(i, 0)]["codes"].ravel(), minlength=codes)
                 for i in range(min(len(data), first)))
    share = counts / counts.sum()
    weight = 1 / share.clamp(min=1e-3)
    return torch.where(counts > 0, weight / (weight * share).sum(), 1.0)


def check_tensors(own, given, where, anew=()):
    """The tensors of a base must be those of its part of a model in this version; those whose names start
    with one of `anew` may be of other shapes."""
    for name in sorted(own.keys() | given.keys()):
        if name not in own or name not in given:
            found = "is in one only"
        elif own[name].shape != given[name].shape and not name.startswith(anew):
            found = "has another shape"
        else:
            continue
        sys.exit(f"{where}: looked for the tensors of this version's base, {name} {found}; train it anew")


def start_from(model, state, init):
    """Copies a base's weights into a Text2Mask; only the last convolution, of another width, starts anew."""
    own = model.state_dict()
    check_tensors(own, state, init, ("unet.head.2.", "unet.conv_out."))
    fits = {name: t for name, t in state.items() if own[name].shape == t.shape}
    model.load_state_dict({**own, **fits})
    print(f"from {init}: {len(fits)} of {len(own)} tensors, {', '.join(sorted(set(own) - set(fits)))} anew")


# --------------------------------------------------------------------------------------------------- pictures

def legend(image, ids, classes):
    """A PIL picture with a strip beneath that names the colours of the classes in ids."""
    present = [int(i) for i in np.unique(ids) if 0 < i <= len(classes)]
    colours, width = palette(len(classes)), 110
    columns = max(image.width // width, 1)
    height = image.height + 6 + 18 * -(-len(present) // columns)
    sheet = Image.new("RGB", (max(image.width, width), height), "white")
    sheet.paste(image)
    draw = ImageDraw.Draw(sheet)
    for n, i in enumerate(present):
        x, y = n % columns * width, image.height + 6 + n // columns * 18
        draw.rectangle((x + 4, y + 1, x + 16, y + 13), fill=tuple(colours[i].tolist()), outline="black")
        draw.text((x + 21, y + 2), classes[i - 1]["name"][:14], fill="black")
    return sheet


def grid(rows, scale=2):
    """Rows of equal (H, W, 3) uint8 arrays -> one PIL picture, enlarged by nearest."""
    sheet = Image.fromarray(np.concatenate([np.concatenate(row, 1) for row in rows]))
    return sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.NEAREST)


def write_mask(path, ids, K):
    """(H, W) uint8 ids -> an 8-bit palette PNG that opens as the colour map."""
    image = Image.fromarray(ids)
    image.putpalette(palette(K).ravel().tolist())
    with replacing(path) as part:
        image.save(part)


# -------------------------------------------------------------------------------------------------------- CLI

def parse_size(text):
    """"64" or "96x72" (width x height) -> (H, W), multiples of 8."""
    try:
        w, h = (int(n) for n in (text.split("x") if "x" in text else (text, text)))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: 64 or 96x72 (width x height) is needed")
    if not 8 <= min(w, h) <= max(w, h) <= 8192 or w % 8 or h % 8:
        raise argparse.ArgumentTypeError(f"{text}: both sides must be multiples of 8, up to 8192")
    return h, w


def common_flags(parser, steps, batch, lr):
    """The flags of every training command of the generators."""
    parser.add_argument("--data", default="shapes", help="NAME (data/NAME) or a folder with train/ and val/")
    parser.add_argument("--out", type=Path, help="folder of the results (default: out/NAME/STAGE)")
    parser.add_argument("--init", type=Path, help="base to start from: a folder of `mask2img.py base`, or "
                        "of SDXL in the public layout; with SDXL the defaults are "
                        + ", ".join(f"{name} {value}" for name, value in PAPER.items()))
    parser.add_argument("--size", type=parse_size, default=(64, 64), help="64 or 96x72 (width x height)")
    parser.add_argument("--limit", type=positive(int), help="use the first N training pairs only")
    parser.add_argument("--steps", type=positive(int), default=steps, help="training steps")
    parser.add_argument("--batch", type=positive(int), default=batch, help="samples a micro-batch and rank")
    parser.add_argument("--accumulate", type=positive(int), default=1, help="batches a step")
    parser.add_argument("--lr", type=positive(float), default=lr, help="peak learning rate")
    parser.add_argument("--drop", type=within(float, 0, 1), default=0.1,
                        help="share of conditions dropped for guidance")
    parser.add_argument("--seed", type=int, default=0, help="of the first weights, batches and noise")
    parser.add_argument("--workers", type=within(int, 0), default=0, help="processes that load data")
    parser.add_argument("--save-every", type=positive(int), default=500,
                        help="steps between states to resume from")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ...")
    parser.add_argument("--compile", action="store_true", help="torch.compile (for CUDA)")
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=False,
                        help="recompute in backward what forward made: less memory, a third slower")
    parser.add_argument("--shard", action="store_true", help="SDXL under torchrun: weights, gradients and "
                        "optimiser state spread over the ranks (FSDP2) instead of copied (DDP)")
    parser.add_argument("--min-snr", type=positive(float), help="SDXL: caps clean inputs' weight; 5 is usual")
    parser.add_argument("--noise-offset", type=within(float, 0), default=0.0,
                        help="SDXL: a random constant a channel")


def parsed(parser, *training):
    """The arguments; where --init is a folder of SDXL, the training commands' defaults are the paper's."""
    args = parser.parse_args()
    public = bool(getattr(args, "init", None)) and networks.is_public(args.init)
    if public:
        for command in training:
            command.set_defaults(**PAPER)
        args = parser.parse_args()
        args.init = args.init.resolve()                                  # a checkpoint names its base
    lone = [flag for flag in ("shard", "min_snr", "noise_offset") if getattr(args, flag, None)]
    if lone and not public:
        sys.exit(f"--{lone[0].replace('_', '-')}: looked for a folder of SDXL as --init, found {args.init}; "
                 "leave it out")
    args.public = public
    return args


def sampling_flags(parser, stage, steps, guidance, sampler):
    """The flags of sampling from a trained Text2Mask or Mask2Img: its folder in weights/, the defaults."""
    parser.add_argument("--init", type=Path, default=ROOT / "weights" / "shapes" / stage,
                        help="trained model")
    parser.add_argument("--steps", type=positive(int), default=steps, help="sampling steps")
    parser.add_argument("--guidance", type=within(float, 0), default=guidance,
                        help="classifier-free guidance; 1 = none")
    parser.add_argument("--sampler", choices=tuple(SAMPLERS), default=sampler,
                        help="edm evaluates twice a step and adds fresh noise")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other samples")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ...")


def name_of(data):
    """--data NAME or PATH -> the NAME in out/NAME."""
    return Path(os.path.abspath(data)).name


def fit(model, loss, data, args, stage, picture, measure=None):
    """diffusion.fit with the flags of common_flags; results go to --out or out/NAME/STAGE."""
    if args.checkpointing:
        for part in model.children():
            getattr(part, "recompute", lambda: None)()
    slow = dict(warmup=500, decay="constant", ema=0.9999) if args.public else {}
    about = ("data", "split", "init", "limit", "drop", "unfreeze", "controlnet", "min_snr", "noise_offset")
    about = {key: str(getattr(args, key)) for key in about if hasattr(args, key)}
    about["pairs"] = data.fingerprint()
    if args.init and not args.public:                                    # nobody trains SDXL in its place
        about["init"] += f" {diffusion.identity(args.init)}"
    out = args.out or Path("out") / name_of(args.data) / stage
    diffusion.fit(model, loss, data, out, steps=args.steps, batch=args.batch, lr=args.lr, seed=args.seed,
                  device=args.device, accumulate=args.accumulate, compile=args.compile, shard=args.shard,
                  workers=args.workers, save_every=args.save_every, picture=picture, measure=measure,
                  about=about, **slow)


def assembled(args, classes):
    """A new Text2Mask: SDXL to be fine-tuned, or the small one, from the base of --init or from scratch."""
    if args.public:
        with torch.device(diffusion.start(args.device)[0]), told():
            model = Text2Mask(base=args.init, size=args.size, classes=classes, edges=args.edges)
            files = networks.weight_files(args.init / "unet")
            state = networks.read_tensors(files, torch.get_default_device())
            networks.fill(model.unet, state, args.init / "unet")
        return model
    config = dict(PRESETS["tiny"], schedule=dict(kind="cosine", prediction="sample", spacing="trailing"))
    if args.init:
        config, state = diffusion.read(args.init, "TextToImage")
    network = dict(config["unet"], out_channels=len(classes) + 2)
    with diffusion.of_this_version(args.init):
        model = Text2Mask(network, config["text"], config["schedule"], args.size, classes, args.edges)
    if args.init:
        start_from(model, state, args.init)
    return model


def train(args):
    diffusion.start(args.device)
    folder = dataset_folder(args.data, "train")
    classes = read_classes(folder)
    torch.manual_seed(seed_of(args.seed, "weights"))
    model = assembled(args, classes)
    data = Pairs(folder, args.size, model.text.tokenize, images=False, edges=args.edges, limit=args.limit)
    K = len(classes)
    if not model.vae:
        model.rarity = rarities(data, K + 2)

    def picture(model, path):
        chosen = evenly(len(data), 8 if model.vae else 24)
        captions = [read_captions(data.folder, data.names[i][1], classes)[0] for i in chosen]
        codes = model.sample(captions, range(len(captions)))
        truth = [palette(K)[data[(i, 0)]["codes"].numpy()] for i in chosen]
        made = [palette(K)[c] for c in codes]
        rows = [row[i:i + 8] for i in range(0, len(made) // 8 * 8, 8) for row in (truth, made)]
        legend(grid(rows or [truth, made], 1 if model.vae else 2), codes, classes).save(path)
    options = args.drop, args.min_snr, args.noise_offset
    fit(model, lambda net, batch: model.loss(net, batch, *options), data, args, "text2mask", picture)


def sample(args):
    device, _, _ = diffusion.start(args.device)
    model = diffusion.load(Text2Mask, args.init, device)
    classes = model.config["classes"]
    codes = model.sample([args.prompt], [seed_of(args.seed)], args.steps, args.guidance, args.sampler,
                         args.size)
    ids, instances = segments(codes[0], [c["isthing"] for c in classes], args.min_region)
    with diffusion.writable(args.out):
        args.out.mkdir(parents=True, exist_ok=True)
    write_mask(args.out / "mask.png", ids, len(classes))
    scale = max(1, 256 // ids.shape[0])
    colours = encode(ids, len(classes))
    named_colours = legend(grid([[colours]], scale), ids, classes)
    for name, image in (("colours", Image.fromarray(colours)), ("legend", named_colours)):
        with replacing(args.out / f"{name}.png") as path:
            image.save(path)
    names = [classes[i - 1]["name"] for i in np.unique(ids) if i]
    print(f"{args.out}: mask.png (ids), colours.png, legend.png; {', '.join(names)}; {instances.max()} "
          "instances")


def named(caption, forms):
    """A caption and {class: [words or phrases]} -> the set of classes that it names."""
    spaced = f" {plain(caption)} "
    return {name for name, words in forms.items() if any(f" {plain(word)} " in spaced for word in words)}


def read_words(path):
    """words.json -> {class: [words or phrases that name it]}."""
    try:
        words = json.loads(path.read_text("utf-8"))
        assert all(isinstance(word, str) for forms in words.values() for word in forms)
        return words
    except (OSError, ValueError, AttributeError, TypeError, AssertionError) as error:
        sys.exit(f"{path}: looked for {{class: [words]}}, found {type(error).__name__}; mend or delete it")


def specks(ids, under=8):
    """Share of the pixels of (H, W) ids in 4-connected regions under that many pixels."""
    size = np.bincount(components(ids).ravel())
    return size[(size > 0) & (size < under)].sum() / ids.size


def measure(args):
    """Samples the masks of a split's first captions and prints how clean they are and how well they obey."""
    device, _, _ = diffusion.start(args.device)
    model, folder = diffusion.load(Text2Mask, args.init, device), dataset_folder(args.data, args.split)
    classes, names = read_classes(folder), [name for _, name in names_of(folder)][:args.limit]
    check_classes(model.config["classes"], classes, folder / "classes.json")
    path = folder / "words.json"
    complete = path.exists()                                             # captions tell all that is there
    words = read_words(path) if complete else {c["name"]: [c["name"], c["name"] + "s"] for c in classes}
    isthing, colours = [c["isthing"] for c in classes], palette(len(classes)).astype(np.float32)
    off, raw, cleaned, real, hits, said, seen, seconds = [], [], [], [], 0, 0, 0, 0
    for i in tqdm(range(0, len(names), args.batch), "measure"):
        part = names[i:i + args.batch]
        captions = [read_captions(folder, name, classes)[0] for name in part]
        clock = time.time()
        codes, maps = model.sample(captions, [seed_of(args.seed, name) for name in part], args.steps,
                                   args.guidance, args.sampler, maps=True)
        seconds += time.time() - clock
        near = functools.reduce(np.minimum, (np.linalg.norm(maps - colour, axis=-1) for colour in colours))
        off.append((near > 20).mean())
        for name, caption, code in zip(part, captions, codes):
            truth = Image.fromarray(read_ids(folder / "masks" / f"{name}.png", len(classes)))
            truth = np.asarray(placed(truth.size, code.shape, None)[0](truth))
            ids, _ = segments(code, isthing)
            raw.append(specks(code)), cleaned.append(specks(ids)), real.append(specks(truth))
            asked, shown = named(caption, words), {classes[k - 1]["name"] for k in np.unique(ids) if k}
            shown = {name for name in shown if name in asked or words.get(name) and name != "sky"}
            hits, said, seen = hits + len(asked & shown), said + len(asked), seen + len(shown)
    precision = f"{100 * hits / max(seen, 1):.1f} (an unnamed sky is no error)" if complete else (
        f"unknown without {path}")
    print(f"{len(names)} captions of {folder.name}: {100 * np.mean(off):.2f} % of the pixels over 20 grey "
          f"levels from every colour; in specks under 8 px {100 * np.mean(raw):.3f} % as sampled, "
          f"{100 * np.mean(cleaned):.3f} % cleaned, {100 * np.mean(real):.3f} % in real masks; "
          f"named classes: recall {100 * hits / max(said, 1):.1f}, precision {precision}; "
          f"{60 * len(names) / seconds:.0f} masks a minute")


def main():
    parser = argparse.ArgumentParser(description="Text2Mask: captions -> segmentation masks.")
    commands = parser.add_subparsers(dest="command", required=True)
    defaults = dict(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p = commands.add_parser("train", help="train on the masks and captions of a pair folder", **defaults)
    training = p
    common_flags(p, steps=5000, batch=16, lr=2e-3)
    p.add_argument("--edges", action="store_true",
                   help="outline every segment, so that touching instances come apart")
    p = commands.add_parser("sample", help="paint the mask of one caption", **defaults)
    p.add_argument("--prompt", required=True, help="the caption")
    p.add_argument("--out", type=Path, default=Path("out/sample"), help="folder of the pictures")
    p.add_argument("--size", type=parse_size, help="64 or 96x72 (default: the size it was trained at)")
    p.add_argument("--min-region", type=positive(int), default=8,
                   help="smaller regions go to their surroundings")
    sampling_flags(p, "text2mask", 12, 2.0, "edm")
    p = commands.add_parser("measure", help="how clean sampled masks are and how well they obey", **defaults)
    p.add_argument("--data", default="shapes", help="NAME (data/NAME) or a folder with train/ and val/")
    p.add_argument("--split", default="val", help="the split whose captions are used")
    p.add_argument("--limit", type=positive(int), default=300, help="captions")
    p.add_argument("--batch", type=positive(int), default=25, help="masks at a time")
    sampling_flags(p, "text2mask", 12, 2.0, "edm")
    args = parsed(parser, training)
    {"train": train, "sample": sample, "measure": measure}[args.command](args)


if __name__ == "__main__":
    main()
