"""Mask2Former: one network for semantic, panoptic and instance segmentation, in plain PyTorch.

A backbone makes features, a pixel decoder (multi-scale deformable attention) refines them, and Q learned
queries read them through attention that each query restricts to the mask it predicted one layer before. Every
query ends as a class (or "no object") and a mask; training matches queries to true segments one to one.
`load` reads the official weights.

Paper:   Cheng et al., Masked-attention Mask Transformer for Universal Image Segmentation, arXiv 2112.01527
         (CVPR 2022); deformable attention: arXiv 2010.04159; point sampling: PointRend, arXiv 1912.08193.
         Defaults are the YAML values.
Differs: one set of matching points an image serves all layers (the original draws new ones for each); `tiny`,
         a small preset of our own whose masks have stride 2, not 4; `valid` in a target leaves void points
         out of the mask losses (without it void counts as background, as in the original); masks reach any
         output size in one resize.
Reads:   images; weights/shapes/mask2former/model.safetensors or --weights PATH (ours or transformers)
Writes:  out/overlays/NAME.png
Needs:   nothing beside it.

    python mask2former.py photo.jpg --weights mask2former-swin-tiny-coco-panoptic/ --task panoptic

B batch, H W pixels, h w mask pixels, Q queries, K classes, D width, N tokens or true segments, M heads, L
outputs, P points
"""
import itertools
import json
import math
import os
import re
import sys
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from einops import rearrange
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock
from torchvision.models.swin_transformer import ShiftedWindowAttention, SwinTransformer, SwinTransformerBlock
from torchvision.ops import FrozenBatchNorm2d

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)         # ImageNet
TASKS = ("semantic", "panoptic", "instance")
LONGEST = 2048                                                   # side of the largest picture drawn

# embed_dim, depths, heads, window: B and L are the 384 px models, windows of 12
SWINS = {"swin_t": (96, (2, 2, 6, 2), (3, 6, 12, 24), 7), "swin_s": (96, (2, 2, 18, 2), (3, 6, 12, 24), 7),
         "swin_b": (128, (2, 2, 18, 2), (4, 8, 16, 32), 12),
         "swin_l": (192, (2, 2, 18, 2), (6, 12, 24, 48), 12)}

PRESETS = {                                                      # Mask2Former(num_classes, **PRESETS[NAME])
    "tiny": dict(backbone="tiny", queries=40, width=64, heads=4, encoder_layers=2, decoder_layers=3,
                 encoder_ffn=128, decoder_ffn=256, points=256),
    "resnet50": dict(backbone="resnet50"), "resnet101": dict(backbone="resnet101"),
    "swin_t": dict(backbone="swin_t"), "swin_s": dict(backbone="swin_s"), "swin_b": dict(backbone="swin_b"),
    "swin_l": dict(backbone="swin_l", queries=200),  # the original: 100 on ADE20K semantic
}


# ---- backbones: (B, 3, H, W) -> four maps, each half the size of the one before ----------------------------

class FrozenNorm(FrozenBatchNorm2d):
    """Its fp32 buffers would make all that follows fp32 under autocast: out comes what went in."""

    def forward(self, x):
        return super().forward(x).to(x.dtype)


class ResNet(nn.Module):
    """torchvision's ResNet-50 or -101 with frozen batch norm, as the original: wants pretrained `weights`."""
    stride = 32

    def __init__(self, name, weights=None):
        super().__init__()
        net = getattr(torchvision.models, name)(weights=weights, norm_layer=FrozenNorm)
        self.stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
        self.stages = nn.ModuleList([net.layer1, net.layer2, net.layer3, net.layer4])
        self.channels = (256, 512, 1024, 2048)

    def forward(self, x):
        x, maps = self.stem(x), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


class Tiny(nn.Module):
    """Basic residual blocks with group norm at strides 2, 4, 8, 16: learns from scratch on small images."""
    stride = 16

    def __init__(self, channels=(32, 64, 96, 128)):
        super().__init__()
        norm = partial(nn.GroupNorm, 8)
        conv = nn.Conv2d(3, channels[0], 3, 2, 1, bias=False)
        self.stem = nn.Sequential(conv, norm(channels[0]), nn.ReLU(True))
        self.stages, self.channels = nn.ModuleList(), channels
        for i, (a, b) in enumerate(zip(channels[:1] + channels, channels)):
            skip = nn.Sequential(nn.Conv2d(a, b, 1, 2, bias=False), norm(b)) if i else None
            self.stages.append(BasicBlock(a, b, 2 if i else 1, skip, norm_layer=norm))

    forward = ResNet.forward


class WindowAttention(ShiftedWindowAttention):
    """Swin's attention, always shifted in odd blocks. torchvision drops the shift on maps of a single window,
    where the original (and so every public weight) keeps it."""

    def define_relative_position_index(self):
        super().define_relative_position_index()
        index = self._buffers.pop("relative_position_index")
        self.register_buffer("relative_position_index", index, persistent=False)  # a constant

    def shift_mask(self, H, W, device):
        """(windows, n, n) bool: which positions of a window touched in the image before the shift."""
        (w, _), (s, _) = self.window_size, self.shift_size
        y, x = (torch.arange(n, device=device) for n in (H, W))
        region = ((y >= H - w).int() + (y >= H - s))[:, None] * 3 + ((x >= W - w).int() + (x >= W - s))
        region = rearrange(region, "(h a) (w b) -> (h w) (a b)", a=w, b=w)
        return region[:, None] == region[:, :, None]

    def forward(self, x):
        B, H, W, C = x.shape
        (w, _), (s, _) = self.window_size, self.shift_size
        x = F.pad(x, (0, 0, 0, -W % w, 0, -H % w))                   # (B, H', W', C), multiples of the window
        _, tall, wide, _ = x.shape
        if s:
            x = x.roll((-s, -s), (1, 2))
        x = rearrange(x, "b (h a) (w c) d -> (b h w) (a c) d", a=w, c=w)     # (B windows, n, C)
        q, k, v = rearrange(self.qkv(x), "b n (t m d) -> t b m n d", t=3, m=self.num_heads)
        bias = self.get_relative_position_bias()                             # (1, M, n, n)
        if s:
            keep = self.shift_mask(tall, wide, x.device)[:, None]
            bias = (bias - 100.0 * ~keep).repeat(B, 1, 1, 1)                 # (B windows, M, n, n)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        x = self.proj(rearrange(x, "b m n d -> b n (m d)"))
        x = rearrange(x, "(b h w) (a c) d -> b (h a) (w c) d", a=w, c=w, h=tall // w, w=wide // w)
        if s:
            x = x.roll((s, s), (1, 2))
        return x[:, :H, :W]


class Swin(nn.Module):
    """torchvision's SwinTransformer with a layer norm on each of its four maps."""
    stride = 32

    def __init__(self, name, weights=None):
        super().__init__()
        width, depths, heads, window = SWINS[name]
        block = partial(SwinTransformerBlock, attn_layer=WindowAttention)
        net = SwinTransformer([4, 4], width, list(depths), list(heads), [window] * 2,
                              stochastic_depth_prob=0.3, num_classes=1, block=block)
        self.features = net.features             # stem, then stages at 1, 3, 5, 7 with patch merging between
        self.channels = tuple(width * 2 ** i for i in range(4))
        self.norms = nn.ModuleList(nn.LayerNorm(c) for c in self.channels)
        if weights:
            if window != 7:
                raise ValueError(f"torchvision has no {name} with windows of {window}")
            saved = torchvision.models.get_model_weights(name)[weights].get_state_dict(progress=True)
            self.features.load_state_dict({k[9:]: v for k, v in saved.items() if k.startswith("features.")
                                           and not k.endswith("relative_position_index")})

    def forward(self, x):
        x, maps = F.pad(x, (0, -x.shape[3] % 4, 0, -x.shape[2] % 4)), []
        for i, layer in enumerate(self.features):
            x = layer(x)                                                     # (B, h, w, C)
            if i % 2:
                maps.append(self.norms[i // 2](x).permute(0, 3, 1, 2))
        return maps


def full(x):
    """At least fp32: what must not be rounded under autocast."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---- pixel decoder: deformable attention over three scales, then one finer map for the masks ---------------

def positions(h, w, width, device):
    """Sine code of every pixel: (1, h w, width), rows in the first half of the channels, columns in the
    second."""
    rate = 10000 ** (2 * torch.arange(width // 4, device=device) / (width // 2))

    def axis(n):
        angle = torch.arange(1, n + 1, device=device)[:, None] / (n + 1e-6) * 2 * math.pi / rate
        return torch.stack([angle.sin(), angle.cos()], 2).flatten(1)         # (n, width / 2)
    y, x = axis(h)[:, None].expand(h, w, -1), axis(w)[None].expand(h, w, -1)
    return torch.cat([y, x], 2).flatten(0, 1)[None]


class DeformableAttention(nn.Module):
    """Every token reads a few learned places around itself in each scale (arXiv 2010.04159, eq. 3)."""

    def __init__(self, width, heads, levels=3, points=4):
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.offsets = nn.Linear(width, heads * levels * points * 2)
        self.weights = nn.Linear(width, heads * levels * points)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        for layer in (self.offsets, self.weights):
            nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.weights.bias)
        angle = torch.arange(heads) * 2 * math.pi / heads           # head m starts by looking in direction m,
        ring = torch.stack([angle.cos(), angle.sin()], 1)
        ring = ring / ring.abs().amax(1, keepdim=True)
        steps = torch.arange(1, points + 1)                                  # point p at distance p
        with torch.no_grad():
            ring = (ring[:, None, None] * steps[:, None]).expand(-1, levels, -1, -1)
            self.offsets.bias.copy_(ring.flatten())
        for layer in (self.value, self.out):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x, code, places, sizes):
        """x, code (B, N, D); places (N, 2) x y of each token in 0..1; sizes: (h, w) of each scale -> (B, N,
        D)."""
        B, N, _ = x.shape
        q = x + code
        offsets = rearrange(full(self.offsets(q)), "b n (m s p c) -> s (b m) p n c", m=self.heads,
                            s=self.levels, c=2)
        weights = full(self.weights(q)).view(B, N, self.heads, -1).softmax(-1)
        weights = rearrange(weights, "b n m (s p) -> s (b m) 1 p n", s=self.levels)
        values, out = full(self.value(x)).split([h * w for h, w in sizes], 1), 0
        for value, offset, weight, (h, w) in zip(values, offsets, weights, sizes):
            value = rearrange(value, "b (h w) (m d) -> (b m) d h w", h=h, m=self.heads)
            pixel = torch.cat([offset.new_full((1,), 2 / side) for side in (w, h)])     # filled on the GPU: a
            grid = 2 * places - 1 + offset * pixel                   # copy would wait for it; (B M, P, N, 2)
            read = self.read
            if torch.is_grad_enabled() and value.shape[1] * weight.numel() > 2 ** 22:    # big: not kept, read
                read = partial(checkpoint, read, use_reentrant=False, preserve_rng_state=False)  # twice
            out = out + read(value, grid, weight)
        return self.out(rearrange(out, "(b m) d n -> b n (m d)", b=B).to(x.dtype))

    @staticmethod
    def read(value, grid, weight):
        """One scale (B M, d, h, w) at places (B M, P, N, 2), summed over P by weight (B M, 1, P, N): (B M, d,
        N)."""
        seen = F.grid_sample(value, grid, align_corners=False)                               # (B M, d, P, N)
        return sum(one * share for one, share in zip(seen.unbind(2), weight.unbind(2)))      # in the cache


class EncoderLayer(nn.Module):
    def __init__(self, width, heads, ffn):
        super().__init__()
        self.attention, self.norm1 = DeformableAttention(width, heads), nn.LayerNorm(width)
        self.ff1, self.ff2, self.norm2 = nn.Linear(width, ffn), nn.Linear(ffn, width), nn.LayerNorm(width)
        for layer in (self.ff1, self.ff2):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, x, code, places, sizes):
        x = self.norm1(x + self.attention(x, code, places, sizes))
        return self.norm2(x + self.ff2(F.relu(self.ff1(x))))


def conv_norm(a, b, size, bias=False):
    return nn.Sequential(nn.Conv2d(a, b, size, padding=size // 2, bias=bias), nn.GroupNorm(32, b))


class PixelDecoder(nn.Module):
    """Four backbone maps -> (B, D, h, w) mask features at the finest stride, and the three refined maps,
    coarse first."""

    def __init__(self, channels, width=256, heads=8, layers=6, ffn=1024):
        super().__init__()
        self.inputs = nn.ModuleList(conv_norm(c, width, 1, bias=True) for c in channels[:0:-1])
        self.level = nn.Parameter(torch.randn(3, width))
        self.layers = nn.ModuleList(EncoderLayer(width, heads, ffn) for _ in range(layers))
        self.lateral, self.smooth = conv_norm(channels[0], width, 1), conv_norm(width, width, 3)
        self.masks = nn.Conv2d(width, width, 1)
        for conv, _ in self.inputs:
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)
        for conv in (self.lateral[0], self.smooth[0], self.masks):           # the original's c2_xavier_fill
            nn.init.kaiming_uniform_(conv.weight, a=1)
        nn.init.zeros_(self.masks.bias)

    def forward(self, maps):
        maps, fine = maps[:0:-1], maps[0]                                    # coarse first
        sizes = [m.shape[-2:] for m in maps]
        x = torch.cat([conv(m).flatten(2).mT for conv, m in zip(self.inputs, maps)], 1)      # (B, N, D)
        code = torch.cat([positions(h, w, x.shape[2], x.device) + self.level[i]
                          for i, (h, w) in enumerate(sizes)], 1)                             # (1, N, D)
        places = torch.cat([torch.stack(torch.meshgrid((torch.arange(w, device=x.device) + 0.5) / w,
                                                       (torch.arange(h, device=x.device) + 0.5) / h,
                                                       indexing="xy"), 2).flatten(0, 1) for h, w in sizes])
        for layer in self.layers:
            x = layer(x, code, places, sizes)                                # (B, N, D)
        parts = x.split([h * w for h, w in sizes], 1)
        maps = [part.mT.unflatten(2, size) for part, size in zip(parts, sizes)]
        up = F.interpolate(maps[-1], fine.shape[-2:], mode="bilinear", align_corners=False)
        fine = F.relu(self.smooth(self.lateral(fine) + up))                  # (B, D, h, w)
        return self.masks(fine), maps


# ---- masked-attention decoder ------------------------------------------------------------------------------

class Attention(nn.Module):
    """Multi-head attention with one fused projection; `keep` (B, Q, N) bool says what a query may look at."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)
        nn.init.xavier_uniform_(self.qkv.weight)
        nn.init.xavier_uniform_(self.out.weight)
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.out.bias)

    def forward(self, q, k, v, keep=None):
        weights, biases = self.qkv.weight.chunk(3), self.qkv.bias.chunk(3)
        q, k, v = (rearrange(F.linear(x, a, b), "b n (m d) -> b m n d", m=self.heads)
                   for x, a, b in zip((q, k, v), weights, biases))           # (B, M, N, d)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=None if keep is None else keep[:, None])
        return self.out(rearrange(x, "b m n d -> b n (m d)"))


class DecoderLayer(nn.Module):
    def __init__(self, width, heads, ffn):
        super().__init__()
        self.cross, self.norm1 = Attention(width, heads), nn.LayerNorm(width)
        self.self, self.norm2 = Attention(width, heads), nn.LayerNorm(width)
        self.ff1, self.ff2, self.norm3 = nn.Linear(width, ffn), nn.Linear(ffn, width), nn.LayerNorm(width)
        for layer in (self.ff1, self.ff2):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, x, place, keys, values, keep):
        """x queries (B, Q, D), place their learned positions, keys and values (B, N, D), keep (B, Q, N)
        bool."""
        x = self.norm1(x + self.cross(x + place, keys, values, keep))     # paper: cross before self attention
        q = x + place
        x = self.norm2(x + self.self(q, q, x))
        return self.norm3(x + self.ff2(F.relu(self.ff1(x))))


class Prediction(dict):
    """One output: "class_logits" (B, Q, K + 1), the last class "no object"; "mask_embed" (B, Q, D) and
    "features" (B, D, h, w), whose product "mask_logits" (B, Q, h, w) is made when first asked for: most
    outputs never need it."""

    def __missing__(self, key):
        if key != "mask_logits":
            raise KeyError(key)
        self[key] = torch.einsum("bqd,bdhw->bqhw", self["mask_embed"], self["features"])
        return self[key]


class Decoder(nn.Module):
    """Mask features and three maps -> predictions of the untouched queries and after each layer (maps in
    turn)."""

    def __init__(self, num_classes, queries=100, width=256, heads=8, layers=9, ffn=2048):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(queries, width))
        self.places = nn.Parameter(torch.randn(queries, width))
        self.level = nn.Parameter(torch.randn(3, width))
        self.layers = nn.ModuleList(DecoderLayer(width, heads, ffn) for _ in range(layers))
        self.norm, self.classes = nn.LayerNorm(width), nn.Linear(width, num_classes + 1)
        self.masks = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
                                   nn.Linear(width, width))

    def predict(self, x, features):
        x = self.norm(x)                                                     # (B, Q, D)
        return Prediction(class_logits=self.classes(x), mask_embed=self.masks(x), features=features)

    def forward(self, features, maps):
        codes = [positions(*m.shape[-2:], m.shape[1], m.device) for m in maps]
        values = [m.flatten(2).mT + self.level[i] for i, m in enumerate(maps)]               # (B, N, D)
        keys = [value + code for value, code in zip(values, codes)]
        small = [F.interpolate(features.detach(), m.shape[-2:], mode="bilinear") for m in maps]
        x = self.queries.expand(len(features), -1, -1)                       # (B, Q, D)
        outputs = [self.predict(x, features)]
        for i, layer in enumerate(self.layers):
            j = i % 3
            keep = self.inside(outputs[-1]["mask_embed"].detach(), small[j])
            x = layer(x, self.places, keys[j], values[j], keep)
            outputs.append(self.predict(x, features))
        return outputs

    @staticmethod
    def inside(embed, features):
        """(B, Q, N) bool: where a query's mask is foreground; everywhere for a query whose mask is empty. The
        paper resizes the masks; to resize the features they are a product of is the same and cheaper."""
        keep = torch.einsum("bqd,bdhw->bqhw", embed, features).flatten(2) >= 0
        return keep | ~keep.any(2, keepdim=True)


class Mask2Former(nn.Module):
    """images (B, 3, H, W) in 0..1 (normalised inside) -> list of decoder_layers + 1 `Prediction`s, the last
    one final: "class_logits" (B, Q, K + 1), the last class "no object", and "mask_logits" (B, Q, h, w),
    stride 4 (tiny: 2).

    `loss(outputs, targets)` is the training loss (see SetLoss). isthing (K bools), class_names and task
    describe the data and are kept, with all other arguments but `weights` (torchvision's, for the backbone),
    in `.config`."""

    def __init__(self, num_classes, backbone="resnet50", queries=100, width=256, heads=8, encoder_layers=6,
                 decoder_layers=9, encoder_ffn=1024, decoder_ffn=2048, class_weight=2.0, mask_weight=5.0,
                 dice_weight=5.0, no_object=0.1, points=12544, oversample=3.0, importance=0.75,
                 isthing=None, class_names=None, task="panoptic", weights=None):
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "weights", "__class__")}
        assert min(width, heads, queries, num_classes, encoder_layers, decoder_layers) >= 1, "a size under 1"
        assert width % heads == 0 and width % 32 == 0, f"width {width}: no multiple of 32 and {heads} heads"
        assert backbone in ("tiny", "resnet50", "resnet101", *SWINS), f"backbone {backbone}: not a known one"
        if backbone == "tiny":
            self.backbone = Tiny()
        else:
            self.backbone = (Swin if backbone in SWINS else ResNet)(backbone, weights)
        self.pixel_decoder = PixelDecoder(self.backbone.channels, width, heads, encoder_layers, encoder_ffn)
        self.decoder = Decoder(num_classes, queries, width, heads, decoder_layers, decoder_ffn)
        self.loss = SetLoss(num_classes, class_weight, mask_weight, dice_weight, no_object, points,
                            oversample, importance)
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(STD)[:, None, None], persistent=False)

    def forward(self, images):
        x = (images - self.mean) / self.std
        maps = self.backbone(x)                    # strides 4, 8, 16, 32
        features, maps = self.pixel_decoder(maps)  # (B, D, h, w), three maps, coarse first
        return self.decoder(features, maps)


# ---- targets, matching and loss ----------------------------------------------------------------------------

def targets(mask_ids, instances=None, isthing=None, task="semantic"):
    """Pair-folder maps -> {"labels": (N,) long 0..K-1, "masks": (N, H, W) bool}, one row a segment.

    mask_ids (H, W): class id = position + 1, 0 void. instances (H, W) or None: 0 none, 255 crowd (left out
    where things count one by one). semantic: a segment a class; panoptic: stuff as semantic, things one an
    instance; instance: things."""
    ids = torch.as_tensor(np.asarray(mask_ids)).long()                       # (H, W)
    part = torch.zeros_like(ids)
    if task != "semantic":
        things = torch.tensor([False] + [bool(thing) for thing in isthing])
        if ids.max() >= len(things):
            raise ValueError(f"a mask holds class id {int(ids.max())} of {len(isthing)} classes")
        thing = things[ids]
        if instances is not None:
            part = torch.as_tensor(np.asarray(instances)).long() * thing
        ids = ids * (part != 255) if task == "panoptic" else ids * (thing & (part != 255))
    code = ids * 256 + part
    segments = code[ids > 0].unique()                                        # (N,)
    return {"labels": segments // 256 - 1, "masks": code == segments[:, None, None]}


def hungarian(cost, rows=None):
    """P assignment problems side by side: costs (P, n, m), n <= m -> (P, n) the column of each row, at the
    least total cost, exact. rows (P,): how many rows of each problem count; -1 for the others.

    Shortest augmenting paths (Jonker and Volgenant 1987), one row at a time in all problems at once. Rows
    whose cheapest column no earlier row wants are settled first. Raises ValueError on NaN or infinity."""
    cost = np.asarray(cost, dtype=np.float64)
    if not np.isfinite(cost).all():
        raise ValueError("matching costs are not finite: the network's outputs hold NaN or infinity")
    P, n, m = cost.shape
    if n > m:
        raise ValueError(f"{n} rows for {m} columns: transpose, or add columns that cost more than any")
    counts = np.arange(n) < (np.full((P, 1), n) if rows is None else np.asarray(rows)[:, None])      # (P, n)
    if not counts.any():
        return np.full((P, n), -1)
    first, u, v = cost.argmin(2), cost.min(2), np.zeros((P, m))     # duals: cost - u - v >= 0, 0 when matched
    owner = np.full((P, m), -1)                                              # owner[p, col] = row
    for row in reversed(range(n)):
        here = counts[:, row]
        owner[here, first[here, row]] = row
    free = counts & (np.take_along_axis(owner, first, 1) != np.arange(n))
    for row in range(n):
        here = np.flatnonzero(free[:, row])
        u[here], v[here], owner[here] = augmented(cost[here], u[here], v[here], owner[here], row)
    found, (p, col) = np.full((P, n), -1), np.nonzero(owner >= 0)
    found[p, owner[p, col]] = col
    return found


def augmented(cost, u, v, owner, row):
    """Gives `row` a column along the cheapest path of reassignments (Dijkstra on reduced costs), in every
    problem; cost (P, n, m), u (P, n), v and owner (P, m) -> u, v, owner, changed in place.

    dist is the length of the best path known to each column; open_ the same, but inf where a column is
    settled, that is, passed through: the free column a path ends in never is."""
    dist = cost[:, row] - u[:, row, None] - v                       # (P, m), of a path that ends in a column
    open_, back = dist.copy(), np.full(dist.shape, -1)                       # back: the column before, or -1
    end, going = np.zeros(len(cost), int), np.arange(len(cost))
    while len(going):
        end[going] = open_[going].argmin(1)
        going = going[owner[going, end[going]] >= 0]                         # others reached a free column
        col, other = end[going], owner[going, end[going]]
        new = (dist[going, col] - u[going, other])[:, None] + cost[going, other] - v[going]
        open_[going, col] = np.inf
        i, to = np.nonzero((new < dist[going]) & (open_[going] < np.inf))
        dist[going[i], to] = open_[going[i], to] = new[i, to]
        back[going[i], to] = col[i]
    length = dist[np.arange(len(cost)), end]
    u[:, row] += length
    p, col = np.nonzero(np.isinf(open_))
    shorter = length[p] - dist[p, col]
    u[p, owner[p, col]] += shorter
    v[p, col] -= shorter
    going, col = np.arange(len(cost)), end
    while len(going):                                                        # walks the path back
        before = back[going, col]
        owner[going, col] = np.where(before < 0, row, owner[going, before])
        going, col = going[before >= 0], before[before >= 0]
    return u, v, owner


def draw(n, points, device):
    """n x points random places in an image: (n, P, 2), x y in -1..1 as grid_sample counts."""
    return torch.rand(n, points, 2, device=device).mul_(2).sub_(1)


def sample(maps, points):
    """maps (B, C, h, w) read bilinearly at points (B, P, 2), x y in -1..1 -> (B, C, P)."""
    return F.grid_sample(maps, points[:, :, None], align_corners=False)[..., 0]


class SetLoss(nn.Module):
    """Mask2Former's training loss: match queries to true segments, then classify and segment the matched
    ones.

    outputs: list of L predictions as the model gives them. targets: list of B dicts, "labels" (N,) long
    0..K-1, "masks" (N, H, W) bool or float, optionally "valid" (H, W) bool, one (H, W) for all; N may be 0,
    or more than there are queries (the costliest are then left out). num_masks: what mask losses are divided
    by; by default the targets of this batch, averaged over ranks; under gradient accumulation pass the
    average over the micro-batches. Returns the total (weighted, summed over all L) and its parts {"class",
    "mask", "dice"}, detached. All in fp32."""

    def __init__(self, num_classes, class_weight=2.0, mask_weight=5.0, dice_weight=5.0, no_object=0.1,
                 points=12544, oversample=3.0, importance=0.75):
        super().__init__()
        assert points >= 1 and int(points) == points and oversample >= 1 >= importance >= 0, "points"
        assert min(class_weight, mask_weight, dice_weight, no_object) >= 0, "a weight under 0"
        self.num_classes, self.no_object, self.points = num_classes, no_object, points
        self.weights = {"class": class_weight, "mask": mask_weight, "dice": dice_weight}
        self.oversample, self.importance = oversample, importance

    def forward(self, outputs, targets, num_masks=None):
        with torch.autocast(outputs[0]["class_logits"].device.type, enabled=False):
            logits = full(torch.stack([out["class_logits"] for out in outputs]))            # (L, B, Q, K + 1)
            embed = full(torch.stack([out["mask_embed"] for out in outputs]))                # (L, B, Q, D)
            features = full(outputs[-1]["features"])                                         # (B, D, h, w)
            truth = [t["masks"].to(features.device, non_blocking=True).to(features.dtype) for t in targets]
            labels = [t["labels"].to(features.device, torch.long) for t in targets]
            valid = [t["valid"].to(features)[None] if "valid" in t else None for t in targets]
            query = self.match(logits, embed, features, labels, truth, valid)            # (L, all N), -1 none
            num_masks = num_masks or count(sum(map(len, labels)), features.device)
            losses = {"class": self.class_loss(logits, labels, query)}
            losses["mask"], losses["dice"] = self.mask_losses(embed, features, truth, valid, query, num_masks)
            losses = {name: self.weights[name] * loss for name, loss in losses.items()}
        return sum(losses.values()), {name: loss.detach() for name, loss in losses.items()}

    @torch.no_grad()
    def match(self, logits, embed, features, labels, truth, valid):
        """The query of every target in every output: (L, all N) long on the device, -1 for one left out."""
        L, _, Q, _ = logits.shape
        counts = [len(label) for label in labels]
        widest = max(counts, default=0)
        if not widest:
            return torch.full((L, 0), -1, device=logits.device)
        cost = [self.costs(logits[:, b], embed[:, b], features[b], labels[b], truth[b], valid[b])
                for b, n in enumerate(counts) if n]                          # (L, Q, n) each
        counts = [n for n in counts if n]
        more = max(widest - Q, 0)                            # queries that do not exist, for targets left out
        cost = torch.stack([F.pad(c, (0, widest - n, 0, more)) for c, n in zip(cost, counts)])
        cost = cost.flatten(0, 1).mT.cpu().numpy()                           # all costs in one transfer
        cost[:, :, Q:] = 2 * np.abs(cost).max() + 1                          # dearer than any that does
        query = hungarian(cost, np.repeat(counts, L)).reshape(len(counts), L, widest)
        query[query >= Q] = -1
        query = np.concatenate([found[:, :n] for found, n in zip(query, counts)], 1)
        return torch.from_numpy(query).to(logits.device)

    def costs(self, logits, embed, features, labels, truth, valid):
        """One image: (L, Q, N) costs of taking query q for target n, masks compared at P random points."""
        points = draw(1, self.points, features.device)
        at = sample(features[None], points)[0]                                               # (D, P)
        t = sample(truth[None], points)[0].T                                                 # (P, N)
        weight = torch.ones_like(t[:, 0]) if valid is None else sample(valid[None], points)[0, 0]
        t, mask, dice = t * weight[:, None], [], []
        for part in embed.split(max(1, 2 ** 21 // (embed.shape[1] * self.points))):  # fits the cache
            x = part @ at                                                                    # (., Q, P)
            mask.append(((F.softplus(x) @ weight)[..., None] - x @ t) / self.points)  # CE = softplus(x) - x t
            p = x.sigmoid_().mul_(weight)
            dice.append(1 - (2 * (p @ t) + 1) / (p.sum(-1)[..., None] + t.sum(0) + 1))
        mask, dice = torch.cat(mask), torch.cat(dice)                                        # (L, Q, N)
        score = logits.softmax(-1)[..., labels]
        return self.weights["mask"] * mask + self.weights["dice"] * dice - self.weights["class"] * score

    def class_loss(self, logits, labels, query):
        L, B, Q, _ = logits.shape
        wanted = torch.full((L, B, Q), self.num_classes, device=logits.device)
        layer, column = (query >= 0).nonzero(as_tuple=True)
        image = torch.cat([torch.full_like(label, b) for b, label in enumerate(labels)])
        wanted[layer, image[column], query[layer, column]] = torch.cat(labels)[column]
        weight = logits.new_ones(self.num_classes + 1)
        weight[-1] = self.no_object
        error = F.cross_entropy(logits.flatten(0, 2), wanted.flatten(), weight, reduction="none")
        return (error.view(L, -1).sum(1) / weight[wanted].view(L, -1).sum(1)).sum()          # a mean a layer

    def mask_losses(self, embed, features, truth, valid, query, num_masks):
        """Cross entropy and dice of the matched masks, at points where they are least certain (PointRend,
        3.1)."""
        L, N = query.shape
        if N == 0:
            return embed.sum() * 0, features.sum() * 0
        image = torch.cat([torch.full((len(t),), b, device=query.device) for b, t in enumerate(truth)])
        embed = embed[torch.arange(L, device=query.device)[:, None], image, query.clamp(0)]  # (L, N, D)
        embeds = embed.split([len(t) for t in truth], 1)                # only the matched masks
        x = torch.cat([torch.einsum("lnd,dhw->nlhw", e, f) for e, f in zip(embeds, features)])
        x = x.flatten(0, 1)[:, None]                                                         # (N L, 1, h, w)
        with torch.no_grad():
            rows = max(1, 2 ** 21 // int(self.points * self.oversample))
            points = torch.cat([self.uncertain_points(part) for part in x.split(rows)])      # (N L, P, 2)
            places = rearrange(points, "(n l) p c -> n (l p) c", l=L)  # all layers read a target at once
            read = partial(rearrange, pattern="n 1 (l p) -> (n l) p", l=L)
            t = read(sample(torch.cat(truth)[:, None], places))                              # (N L, P)
            weight = (query.T >= 0).to(t).reshape(-1, 1).expand_as(t)
            if any(v is not None for v in valid):
                everywhere = truth[0].new_ones(1, *truth[0].shape[1:])
                valid = torch.stack([everywhere if v is None else v for v in valid])
                weight = weight * read(sample(valid[image], places))
        x = sample(x, points)[:, 0]                                                          # (N L, P)
        mask = (F.binary_cross_entropy_with_logits(x, t, reduction="none") * weight).mean(1).sum()
        p, t = x.sigmoid() * weight, t * weight
        dice = (1 - (2 * (p * t).sum(1) + 1) / (p.sum(1) + t.sum(1) + 1)).sum()           # 0 for one left out
        return mask / num_masks, dice / num_masks

    def uncertain_points(self, x):
        """x (R, 1, h, w) mask logits -> (R, P, 2): most of them nearest to the decision boundary, the rest
        anywhere."""
        R, drawn, kept = len(x), int(self.points * self.oversample), int(self.points * self.importance)
        points = draw(R, drawn, x.device)
        best = sample(x, points)[:, 0].abs().topk(kept, 1, largest=False, sorted=False).indices
        points = points.gather(1, best[..., None].expand(-1, -1, 2))
        return torch.cat([points, draw(R, self.points - kept, x.device)], 1)


def count(masks, device):
    """The number of target masks, averaged over ranks, at least 1."""
    masks = torch.tensor(float(masks), device=device)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(masks)
        masks = masks / dist.get_world_size()
    return masks.clamp(min=1)


# ---- inference: one image's prediction {"class_logits": (Q, K + 1), "mask_logits": (Q, h, w)} -> segments --

def strips(masks, size, extent=(1.0, 1.0)):
    """Mask logits (Q, h, w) at `size` (H, W), bilinear: yields (top, (Q, rows, W)) with few enough rows to
    fit in memory.

    extent: the part of the masks (down, across) the image fills; the rest is padding."""
    def taps(out, n, part):
        at = ((torch.arange(out, device=masks.device) + 0.5) * (part * n / out) - 0.5).clamp(0, n - 1)
        low = at.long()
        return low, (low + 1).clamp(max=n - 1), at - low             # two source pixels, weight of the second
    masks, (H, W) = full(masks), size
    (y0, y1, dy), (x0, x1, dx) = (taps(*args) for args in zip(size, masks.shape[1:], extent))
    rows = max(1, 2 ** 24 // (W * max(1, len(masks))))
    for top in range(0, H, rows):
        part = slice(top, top + rows)
        band = torch.lerp(masks[:, y0[part]], masks[:, y1[part]], dy[part, None])            # (Q, rows, w)
        yield top, torch.lerp(band[:, :, x0], band[:, :, x1], dx)                            # (Q, rows, W)


def class_scores(pred, size, extent=(1.0, 1.0)):
    """Yields (top, (K, rows, W)): class scores at `size` (H, W), 0 to Q, not normalised, in bands as `strips`
    does."""
    classes = full(pred["class_logits"]).softmax(-1)[:, :-1]                 # (Q, K)
    for top, masks in strips(pred["mask_logits"], size, extent):
        yield top, torch.einsum("qk,qhw->khw", classes, masks.sigmoid_())


@torch.no_grad()
def semantic(pred, size, extent=(1.0, 1.0)):
    """-> (H, W) long class index 0..K-1."""
    return torch.cat([score.argmax(0) for _, score in class_scores(pred, size, extent)])


@torch.no_grad()
def panoptic(pred, size, isthing, extent=(1.0, 1.0), object_threshold=0.8, overlap_threshold=0.8):
    """-> (H, W) long segment ids, 0 none, and a list of {"id", "class" 0..K-1, "score", "isthing"}.

    Queries surer than object_threshold compete for each pixel with score x mask; a segment that keeps less
    than overlap_threshold of its own mask is dropped; stuff of one class is one segment."""
    scores, classes = full(pred["class_logits"]).softmax(-1).max(-1)         # (Q,)
    keep = (classes < pred["class_logits"].shape[-1] - 1) & (scores > object_threshold)
    scores, classes, masks = scores[keep], classes[keep], pred["mask_logits"][keep]
    winner = torch.zeros(size, dtype=torch.long, device=masks.device)        # the query a pixel goes to, + 1
    if not len(masks):
        return winner, []
    won, area = torch.zeros_like(scores), torch.zeros_like(scores)
    for top, band in strips(masks, size, extent):
        probs = band.sigmoid_()                                              # (Q', rows, W)
        best = (probs * scores[:, None, None]).argmax(0)
        won += best.flatten().bincount(minlength=len(masks))
        area += (probs >= 0.5).sum((1, 2))
        best = (best + 1) * (probs.gather(0, best[None])[0] >= 0.5)         # only where its own mask says yes
        winner[top:top + len(best)] = best
    inside = winner.flatten().bincount(minlength=len(masks) + 1)[1:]
    table, segments, stuff = torch.zeros(len(masks) + 1, dtype=torch.long, device=masks.device), [], {}
    for i, (score, k, good) in enumerate(zip(scores.tolist(), classes.tolist(),
                                             ((inside > 0) & (won >= overlap_threshold * area)).tolist())):
        if not good:
            continue
        if k not in stuff:
            segments.append({"id": len(segments) + 1, "class": k, "score": score,
                             "isthing": bool(isthing[k])})
        table[i + 1] = stuff.get(k, len(segments))
        if not isthing[k]:
            stuff.setdefault(k, len(segments))
    return table[winner], segments


@torch.no_grad()
def instance(pred, size, isthing=None, extent=(1.0, 1.0), top=100, score_threshold=0.0):
    """-> list of {"mask": (H, W) bool, "class" 0..K-1, "score"}, best first: the `top` (query, class) pairs,
    of which those of stuff are then dropped where isthing is given, as in the original; score = class
    probability x mean mask probability inside the mask."""
    classes = full(pred["class_logits"]).softmax(-1)[:, :-1]                 # (Q, K)
    scores, index = classes.flatten().topk(min(top, classes.numel()))
    query, k = index // classes.shape[1], index % classes.shape[1]
    if isthing is not None:
        keep = torch.tensor([bool(t) for t in isthing], device=k.device)[k]
        scores, query, k = scores[keep], query[keep], k[keep]
    which, row = query.unique(return_inverse=True)                    # one upsampled mask a query, not a pair
    found = torch.empty(len(which), *size, dtype=torch.bool, device=k.device)
    total, area = torch.zeros(2, len(which), device=k.device)
    for start, band in strips(pred["mask_logits"][which], size, extent):
        part = found[:, start:start + band.shape[1]].copy_(band > 0)
        area += part.sum((1, 2))                      # by band: the sum of a bool tensor is made of its longs
        total += band.sigmoid_().mul_(part).sum((1, 2))
    scores = scores * (total / (area + 1e-6))[row]
    order = scores.argsort(descending=True)
    best = zip(*(part[order].tolist() for part in (row, k, scores)))
    return [{"mask": found[i], "class": c, "score": s} for i, c, s in best if s >= score_threshold and s > 0]


def final_predictions(model, images):
    """images (B, 3, H, W) in 0..1 -> a final prediction each, and the extent of its masks that the image
    fills: sides are padded up to the largest stride."""
    H, W = images.shape[2:]
    down, across = -H % model.backbone.stride, -W % model.backbone.stride
    mean = model.mean.to(images)
    out = model(F.pad(images - mean, (0, across, 0, down)) + mean)[-1]   # the mean colour: 0 for the network
    preds = [{name: out[name][i] for name in ("class_logits", "mask_logits")} for i in range(len(images))]
    return preds, (H / (H + down), W / (W + across))


def scores_of(model, image, window, size):
    """Yields (top, (K, rows, W)): class scores at `size` of one image (3, h, w), looked at as a whole, or in
    windows of `window` pixels that overlap by a third and are averaged."""
    if not window:
        (pred,), extent = final_predictions(model, image[None])
        yield from class_scores(pred, size, extent)
        return
    sides = [min(window, n) for n in image.shape[1:]]
    tops, lefts = (sorted({*range(0, n - side, max(1, side * 2 // 3)), n - side})
                   for n, side in zip(image.shape[1:], sides))
    total = image.new_zeros(model.config["num_classes"], *image.shape[1:])
    times = torch.zeros_like(total[0])
    for top, left in itertools.product(tops, lefts):
        here = slice(top, top + sides[0]), slice(left, left + sides[1])
        (pred,), extent = final_predictions(model, image[None, :, here[0], here[1]])
        for start, score in class_scores(pred, sides, extent):
            total[:, top + start:top + start + score.shape[1], here[1]] += score
        times[here] += 1
    total /= times
    yield 0, total if total.shape[1:] == size else F.interpolate(total[None], size, mode="bilinear")[0]


def averaged(model, image, short, window, scales, flip):
    """(H, W) long: the class with the highest score over resized and mirrored copies (the paper's m.s.)."""
    size, total = image.shape[1:], image.new_zeros(model.config["num_classes"], *image.shape[1:])
    for scale, mirror in itertools.product(scales, (False, True)[:1 + flip]):
        copy = resized(image, short, scale)
        for top, score in scores_of(model, copy.flip(2) if mirror else copy, window, size):
            total[:, top:top + score.shape[1]] += score.flip(2) if mirror else score
    return total.argmax(0)


def resized(image, short, scale=1.0):
    """image (3, H, W) with its shorter side at short x scale (None: as it is), the longer at most 4 times
    that."""
    least, most = min(image.shape[1:]), max(image.shape[1:])
    ratio = scale * (min(short / least, 4 * short / most) if short else 1.0)
    size = [max(1, round(n * ratio)) for n in image.shape[1:]]
    if size == list(image.shape[1:]):
        return image
    return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0].clamp(0, 1)


@torch.no_grad()
def predict(model, image, task=None, short=None, window=None, scales=(1.0,), flip=False, **thresholds):
    """One image -> what `semantic`, `panoptic` or `instance` returns, at the image's own size.

    image: PIL, or (3, H, W) tensor, in 0..1 or uint8. short: its shorter side inside the network (the
    original: 800 COCO, 640 ADE20K; the longer one stays under 4 times that), None = as it is. Semantic only:
    window slides a square of that many pixels; scales and flip average the class scores of resized and
    mirrored copies (the paper's m.s.). The model is left in eval mode."""
    model.eval()
    task = task or model.config["task"]
    if task not in TASKS:
        raise ValueError(f"task {task}: one of {', '.join(TASKS)} is needed")
    if not torch.is_tensor(image):
        image = torch.from_numpy(np.array(rgb(image))).permute(2, 0, 1)
    image = image.to(model.mean) / 255 if image.dtype == torch.uint8 else image.to(model.mean)
    if window or flip or tuple(scales) != (1.0,):
        if task != "semantic":
            raise ValueError(f"window, scales and flip average class scores: for semantic, not for {task}")
        return averaged(model, image, short, window, scales, flip)
    (pred,), extent = final_predictions(model, resized(image, short)[None])
    size, isthing = image.shape[1:], model.config["isthing"] or [True] * model.config["num_classes"]
    if task == "semantic":
        return semantic(pred, size, extent)
    return {"panoptic": panoptic, "instance": instance}[task](pred, size, isthing, extent, **thresholds)


def rgb(image):
    """A picture in RGB of 8 bits. PIL's own conversion would clip 16-bit grey to white."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    return image.convert("RGB")


# ---- weights -----------------------------------------------------------------------------------------------

def save(model, path):
    """model -> one safetensors file whose metadata rebuilds it; written beside and renamed, so never half
    there."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    path = os.path.abspath(path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    about = {"format": "seggen-1", "class": "Mask2Former", "config": model.config}
    save_file(tensors, path + ".part", {"seggen": json.dumps(about)})  # one key: order is fixed
    os.umask(umask := os.umask(0))
    os.chmod(path + ".part", 0o666 & ~umask)                           # the library's is its owner's alone
    os.replace(path + ".part", path)


def load(path, task=None):
    """A Mask2Former in eval mode from `path`: a file that `save` wrote, or a transformers folder of
    Mask2FormerForUniversalSegmentation (or its model.safetensors). Tensors become fp32; no key is skipped or
    left over. Exits with one line on anything else; pickles are refused unopened. task overrides the one
    found in the file."""
    path = os.fspath(path)
    file = os.path.join(path, "model.safetensors") if os.path.isdir(path) else path
    tensors, metadata = read(file)
    try:
        if "seggen" in metadata:
            config = own_config(file, json.loads(metadata["seggen"]))
        else:
            config, tensors = public_config(file, tensors), renamed(tensors)
        model = Mask2Former(**{**config, "task": task or config.get("task", "panoptic"), "weights": None})
    except (ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, RuntimeError,
            TypeError, ValueError) as error:
        sys.exit(f"{file}: looked for the settings of a Mask2Former, found some that make none ({error!r}); "
                 f"download or train it again")
    check_keys(file, model.state_dict(), tensors)
    if bad := [name for name, t in tensors.items() if not torch.isfinite(t).all()]:
        sys.exit(f"{file}: looked for finite weights, found NaN or infinity in {bad[0]}; download or train "
                 f"it again")
    model.load_state_dict({k: v.float() for k, v in tensors.items()})
    return model.eval()


def read(file):
    """Tensors and metadata of a safetensors file, or one clear line."""
    if not os.path.isfile(file):
        sys.exit(f"{file}: no such weights; give a model.safetensors or a folder that holds one")
    with open(file, "rb") as f:
        head = f.read(8)
    pickles = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
    if head[:2] in (b"PK", b"\x80\x02", b"\x80\x04") or file.endswith(pickles):
        sys.exit(f"{file}: a pickle, which could run code; only safetensors are read: convert it first")
    try:
        with safe_open(file, "pt") as f:
            return {k: f.get_tensor(k) for k in f.keys()}, f.metadata() or {}
    except Exception as error:
        sys.exit(f"{file}: not a whole safetensors file ({error}); download or train it again")


def own_config(file, about):
    """The constructor arguments in the metadata that `save` wrote."""
    if about["format"] != "seggen-1":
        sys.exit(f"{file}: looked for a file of format seggen-1, found {about['format']}; read it with the "
                 f"version that wrote it, or train it again")
    if about["class"] != "Mask2Former":
        sys.exit(f"{file}: looked for a Mask2Former, found a {about['class']}; give a segmenter's weights")
    config = about["config"]
    for key, kind in (("class_names", str), ("isthing", bool)):
        value = config[key]
        fits = isinstance(value, list) and [type(v) for v in value] == [kind] * config["num_classes"]
        if value is not None and not fits:
            raise ValueError(f"{key} {str(value)[:80]} of {config['num_classes']} classes")
    if config["task"] not in TASKS:
        raise ValueError(f"task {config['task']}")
    return config


def check_keys(file, wanted, found):
    missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing or extra:
        sys.exit(f"{file}: not the weights of this model: {len(missing)} keys missing (first: "
                 f"{missing[:1]}), {len(extra)} unknown (first: {extra[:1]})")
    wrong = [k for k in wanted if wanted[k].shape != found[k].shape]
    if wrong:
        sys.exit(f"{file}: {wrong[0]} has shape {tuple(found[wrong[0]].shape)}, "
                 f"its config asks for {tuple(wanted[wrong[0]].shape)} ({len(wrong)} such keys)")


# ADE20K's 50 stuff classes and Cityscapes' first 11 of 19, 0-based; COCO panoptic has its 80 things first
ADE_STUFF = {*range(7), 9, 11, 13, 16, 17, 21, 25, 26, 28, 29, 34, 40, 46, 48, 51, 52, 54, 59, 60, 61, 63, 68,
             77, 79, 84, 91, 94, 96, 99, 100, 101, 105, 106, 109, 113, 114, 117, 122, 128, 131, 140, 141, 145}
PUBLIC = {"queries": "num_queries", "width": "hidden_dim", "heads": "num_attention_heads",
          "encoder_layers": "encoder_layers", "encoder_ffn": "encoder_feedforward_dim",
          "decoder_ffn": "dim_feedforward", "class_weight": "class_weight", "mask_weight": "mask_weight",
          "dice_weight": "dice_weight", "no_object": "no_object_weight", "points": "train_num_points",
          "oversample": "oversample_ratio", "importance": "importance_sample_ratio"}


def public_config(file, tensors):
    """The constructor arguments a transformers config.json amounts to; size and class count are checked by
    the keys."""
    place = os.path.join(os.path.dirname(os.path.abspath(file)), "config.json")
    if not os.path.isfile(place):
        sys.exit(f"{file}: no seggen metadata, no config.json beside it; give the whole transformers folder")
    try:
        with open(place, encoding="utf-8") as f:
            public = json.load(f)
        kind, swin = public.get("model_type"), public.get("backbone_config")
    except (OSError, ValueError, AttributeError) as error:
        sys.exit(f"{place}: looked for the JSON of a transformers config, found something else ({error}); "
                 f"download it again")
    if kind != "mask2former":
        sys.exit(f"{place}: model_type is {kind!r}, not 'mask2former'")
    if not isinstance(swin, dict):
        sys.exit(f"{place}: looked for backbone_config, found {swin!r}; download it again")
    for part, key, wanted in ((public, "pre_norm", False), (public, "activation_function", "relu"),
                              (swin, "hidden_act", "gelu"), (swin, "layer_norm_eps", 1e-5)):
        if (found := part.get(key, wanted)) != wanted:
            sys.exit(f"{place}: looked for {key} {wanted}, that of all official weights, found {found}; give "
                     f"weights of this network")
    sizes = {value[:2]: name for name, value in SWINS.items()}
    backbone = sizes.get((swin.get("embed_dim", 96), tuple(swin.get("depths", (2, 2, 6, 2)))))
    if backbone is None:
        sys.exit(f"{place}: backbone {swin.get('model_type')} of width {swin.get('embed_dim')} and depths "
                 f"{swin.get('depths')}; known: {', '.join(SWINS)}")
    if "class_predictor.bias" not in tensors:
        sys.exit(f"{file}: no class_predictor.bias: not a Mask2FormerForUniversalSegmentation")
    K = len(tensors["class_predictor.bias"]) - 1
    names = public.get("id2label") or {}
    names = [names.get(str(k), f"class {k + 1}").strip() for k in range(K)]
    isthing = {150: [k not in ADE_STUFF for k in range(150)], 133: [k < 80 for k in range(133)],
               19: [k >= 11 for k in range(19)]}.get(K, [True] * K)
    title = f"{os.path.dirname(place)}/{public.get('_name_or_path')}"    # the task named last in it counts
    by_size = {133: "panoptic", 80: "instance", 8: "instance", 100: "instance"}
    task = max(TASKS, key=title.rfind)
    task = task if task in title else by_size.get(K, "semantic")
    about = {ours: public[theirs] for ours, theirs in PUBLIC.items() if theirs in public}
    return dict(num_classes=K, backbone=backbone, decoder_layers=public.get("decoder_layers", 10) - 1,
                isthing=isthing, class_names=names, task=task, **about)


RENAMES = [(re.compile(pattern), new) for pattern, new in [     # transformers' names -> ours, applied in turn
    (r"^model\.pixel_level_module\.encoder\.(swin\.)?", "backbone."),
    (r"^backbone\.embeddings\.patch_embeddings\.projection", "backbone.features.0.0"),
    (r"^backbone\.embeddings\.norm", "backbone.features.0.2"),
    (r"^backbone\.hidden_states_norms\.stage(\d)", lambda m: f"backbone.norms.{int(m[1]) - 1}"),
    (r"^backbone\.encoder\.layers\.(\d)\.blocks", lambda m: f"backbone.features.{2 * int(m[1]) + 1}"),
    (r"^backbone\.encoder\.layers\.(\d)\.downsample", lambda m: f"backbone.features.{2 * int(m[1]) + 2}"),
    (r"layernorm_before", "norm1"), (r"layernorm_after", "norm2"),
    (r"attention\.(output\.dense|o_proj)", "attn.proj"), (r"intermediate\.dense|mlp\.fc1", "mlp.0"),
    (r"output\.dense|mlp\.fc2", "mlp.3"),
    (r"attention\.(self|relative_position_bias)\.relative", "attn.relative"),
    (r"attention\.(?:self\.(query|key|value)|([qkv])_proj)", lambda m: f"attn.qkv.{(m[1] or m[2])[0]}"),
    (r"^model\.pixel_level_module\.decoder\.", "pixel_decoder."), (r"level_embed(\.weight)?$", "level"),
    (r"input_projections", "inputs"), (r"decoder\.encoder\.layers", "decoder.layers"),
    (r"self_attn\.sampling_offsets", "attention.offsets"),
    (r"self_attn\.attention_weights", "attention.weights"),
    (r"self_attn\.value_proj", "attention.value"), (r"self_attn\.output_proj", "attention.out"),
    (r"^(pixel_decoder.*)self_attn_layer_norm", r"\1norm1"),
    (r"^(pixel_decoder.*)final_layer_norm", r"\1norm2"),
    (r"adapter_1", "lateral"), (r"layer_1", "smooth"), (r"mask_projection", "masks"),
    (r"^model\.transformer_module\.(decoder\.)?", "decoder."), (r"mask_predictor\.mask_embedder\.(\d)\.0",
                                                               lambda m: f"masks.{2 * int(m[1])}"),
    (r"queries_embedder\.weight", "places"), (r"queries_features\.weight", "queries"),
    (r"cross_attn_layer_norm", "norm1"), (r"self_attn_layer_norm", "norm2"), (r"final_layer_norm", "norm3"),
    (r"cross_attn\.in_proj_", "cross.qkv."), (r"cross_attn\.out_proj", "cross.out"),
    (r"self_attn\.out_proj", "self.out"),
    (r"self_attn\.([qkv])_proj", r"self.qkv.\1"), (r"decoder\.layernorm", "decoder.norm"),
    (r"\.fc([12])\.", r".ff\1."),
    (r"^class_predictor", "decoder.classes"),
]]
# constants that the model computes itself, and a norm that transformers stores but never applies
UNUSED = re.compile(r"relative_position_index$|^criterion\.empty_weight$|"
                    r"encoder\.(swin\.)?layernorm\.(weight|bias)$")


def renamed(tensors):
    """transformers' state dict -> ours, separate q, k, v fused into one."""
    out, parts = {}, {}
    for key, tensor in tensors.items():
        if UNUSED.search(key):
            continue
        for pattern, new in RENAMES:
            key = pattern.sub(new, key)
        fused = re.fullmatch(r"(.*\.qkv)\.([qkv])\.(weight|bias)", key)
        if fused:
            parts.setdefault(f"{fused[1]}.{fused[3]}", {})[fused[2]] = tensor
        else:
            out[key] = tensor
    for key, part in parts.items():
        out[key] = torch.cat([part[name] for name in "qkv" if name in part])
    return out


# ---- pictures ----------------------------------------------------------------------------------------------

def colours(n):
    """n well separated colours, (n, 3) uint8: hues by the golden angle, three lightnesses in turn."""
    import colorsys
    rgb = [colorsys.hls_to_rgb(k * 0.618034 % 1, (0.5, 0.66, 0.4)[k % 3], 0.85) for k in range(n)]
    return np.round(np.array(rgb) * 255).astype(np.uint8)


def regions(model, result, task):
    """What `predict` returned -> list of ((H, W) bool array, class index, score or None), big ones first."""
    if task == "semantic":
        ids = result.cpu().numpy()
        found = [(ids == k, int(k), None) for k in np.unique(ids)]
    elif task == "panoptic":
        ids = result[0].cpu().numpy()
        found = [(ids == s["id"], s["class"], s["score"]) for s in result[1]]
    else:
        found = [(s["mask"].cpu().numpy(), s["class"], s["score"]) for s in result]
    return sorted((r for r in found if r[0].any()), key=lambda r: -r[0].sum())


def overlay(image, found, names, things=False, side=640):
    """PIL image with every region tinted, outlined and named; small images are enlarged so that the names can
    be read. things: a colour a region instead of a colour a class."""
    from PIL import ImageDraw, ImageFont
    scale = max(1, round(side / max(image.size)))
    size = (image.width * scale, image.height * scale)
    picture = np.array(image.convert("RGB").resize(size, Image.BICUBIC)).astype(np.float32)
    tint, spots = colours(max(len(names), len(found), 1)), []
    for i, (mask, k, score) in enumerate(found):
        mask = np.array(Image.fromarray(mask).resize(size, Image.NEAREST))
        colour = tint[i if things else k]
        picture[mask] = 0.45 * picture[mask] + 0.55 * colour
        core = np.pad(mask, 1)
        inner = core[1:-1, :-2] & core[1:-1, 2:] & core[:-2, 1:-1] & core[2:, 1:-1]
        picture[mask & ~inner] = 255
        spots.append((middle(mask), f"{names[k]}" + (f" {score:.2f}" if score is not None else "")))
    picture = Image.fromarray(picture.astype(np.uint8))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(max(12, min(size) // 36))
    for (x, y), text in spots:
        left, top, right, bottom = draw.textbbox((0, 0), text, font, anchor="mm", stroke_width=2)
        x = min(max(x, -left), size[0] - right) if right - left < size[0] else size[0] / 2
        y = min(max(y, -top), size[1] - bottom)
        draw.text((x, y), text, "white", font, anchor="mm", stroke_width=2, stroke_fill="black")
    return picture


def middle(mask):
    """x, y of the pixel of a mask (H, W bool) farthest from its border (on a grid of at most 160)."""
    step = max(1, max(mask.shape) // 160)
    core = torch.from_numpy(np.pad(mask[::step, ::step], 1)).float()[None, None]
    depth = core.clone()
    while core.any():
        core = -F.max_pool2d(-core, 3, 1, 1)                                 # erode by one pixel
        depth += core
    y, x = divmod(int(depth.argmax()), depth.shape[3])
    return (x - 1) * step, (y - 1) * step


def main():
    import argparse
    import glob
    here = os.path.dirname(os.path.abspath(__file__))
    parser = argparse.ArgumentParser(description="Segment images and draw what was found.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("images", nargs="*", help="image files (default: data/shapes/val/images)")
    demo = os.path.join(here, "weights/shapes/mask2former/model.safetensors")
    parser.add_argument("--weights", default=demo,
                        help="a model.safetensors of ours, or a transformers folder")
    parser.add_argument("--out", default=os.path.join(here, "out/overlays"), help="folder for the pictures")
    parser.add_argument("--task", choices=TASKS, help="default: what the weights were trained for")
    parser.add_argument("--size", type=int, help="shorter side inside the network; default: the image's own")
    gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if gpu else "cpu", help="cpu, cuda or cuda:N")
    args = parser.parse_args()
    files = args.images or sorted(glob.glob(os.path.join(here, "data/shapes/val/images/*")))[:8]
    if not files:
        sys.exit("no images: give image files (or run `python data/shapes/prepare.py` for the built-in ones)")
    if args.size is not None and not 1 <= args.size <= 8192:
        sys.exit(f"--size {args.size}: looked for a number from 1 to 8192; give one")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", args.device):
        sys.exit(f"--device {args.device}: looked for cpu, cuda or cuda:N")
    if args.device != "cpu" and int(args.device[5:] or 0) >= torch.cuda.device_count():
        sys.exit(f"--device {args.device}: looked for that GPU, found {torch.cuda.device_count()} with CUDA; "
                 f"use another or --device cpu")
    draw_all(load(args.weights, args.task).to(args.device), files, args.out, args.size)


def draw_all(model, files, folder, short=None):
    """An overlay of every image file in `folder`, and a line that tells what was found."""
    task, K = model.config["task"], model.config["num_classes"]
    names = model.config["class_names"] or [f"class {k + 1}" for k in range(K)]
    limits = {"instance": {"score_threshold": 0.5}}.get(task, {})
    outs = [os.path.join(folder, os.path.splitext(os.path.basename(file))[0] + ".png") for file in files]
    for file, out in zip(files, outs):
        if os.path.realpath(out) in map(os.path.realpath, files) or outs.count(out) > 1:
            sys.exit(f"{file}: its overlay would be {out}, which is an image given or another's overlay; "
                     f"choose another --out or name")
    for file, out in zip(files, outs):
        try:
            with Image.open(file) as image:
                image = rgb(ImageOps.exif_transpose(image))                  # a phone's photo stands upright
        except Exception as error:
            sys.exit(f"{file}: looked for an image, found none ({error}); give PNG or JPEG files")
        if max(image.size) > LONGEST:                    # a camera's 24 megapixels would take over 10 GB
            print(f"{file}: {image.width} x {image.height}, looked at with its longer side at {LONGEST}")
            image.thumbnail((LONGEST, LONGEST))
        found = regions(model, predict(model, image, task, short, **limits), task)
        put(overlay(image, found, names, things=task == "instance"), out)
        print(f"{out}  {len(found)} segments: {', '.join(names[k] for _, k, _ in found)}")


def put(picture, path):
    """Writes a picture whole or not at all: beside its place, then renamed."""
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        picture.save(path + ".part", "PNG")
        os.replace(path + ".part", path)
    except OSError as error:
        if os.path.isfile(path + ".part"):
            os.remove(path + ".part")
        sys.exit(f"{path}: could not be written ({error}); free some space or choose another --out")


if __name__ == "__main__":
    main()
