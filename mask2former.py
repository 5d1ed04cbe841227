"""Mask2Former: one network for semantic, panoptic and instance segmentation, in plain PyTorch.

A backbone computes features, a pixel decoder refines them, and Q learned queries read them layer by layer.
Each query ends as a class (or "no object") and a mask. In every layer a query attends only to the inside of
the mask that it predicted one layer before: this is masked attention (`Decoder.attention_mask`). Training
matches queries to true segments one to one (`hungarian`) and compares masks at a few points instead of at
every pixel (`SetLoss`). `load` reads the official weights.

Paper:   Cheng et al., Masked-attention Mask Transformer for Universal Image Segmentation, arXiv 2112.01527
         (CVPR 2022); deformable attention: arXiv 2010.04159; point sampling: PointRend, arXiv 1912.08193.
         Defaults are those of the original's YAML files.
Differs: all layers share one set of matching points per image (the original samples a set per layer); `tiny`
         is a small preset of our own, whose masks have stride 2, not 4; "valid" in a target keeps void pixels
         out of the mask losses (without it they count as background, as in the original).
Reads:   images; weights/shapes/mask2former/model.safetensors or --weights PATH (ours or transformers')
Writes:  out/overlays/NAME.png
Needs:   no sibling file.

    python mask2former.py photo.jpg --weights mask2former-swin-tiny-coco-panoptic/ --task panoptic

Dimension key: B batch, H W pixels, h w pixels of a map, C channels, D width, N tokens or targets, Q queries,
K classes, M heads, d width of a head, P points, L outputs (one before the decoder's layers, and one after
each). In `hungarian`: P problems of n rows and m columns.
"""
import contextlib
import json
import math
import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from einops import rearrange
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.swin_transformer import ShiftedWindowAttention, SwinTransformer, SwinTransformerBlock
from torchvision.ops import MLP, FrozenBatchNorm2d

TASKS = ("semantic", "panoptic", "instance")
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # ImageNet's

CROWD = 255  # in a map of instances: many things that nobody separated

# Arguments of torchvision's SwinTransformer. B and L are the models for 384 px, with windows of 12
SWINS = {
    "swin_t": dict(embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24], window_size=[7, 7]),
    "swin_s": dict(embed_dim=96, depths=[2, 2, 18, 2], num_heads=[3, 6, 12, 24], window_size=[7, 7]),
    "swin_b": dict(embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32], window_size=[12, 12]),
    "swin_l": dict(embed_dim=192, depths=[2, 2, 18, 2], num_heads=[6, 12, 24, 48], window_size=[12, 12]),
}

# Mask2Former(num_classes, **PRESETS[NAME])
PRESETS = {
    "tiny": dict(backbone="tiny", queries=40, width=64, heads=4, encoder_layers=2, decoder_layers=3,
                 encoder_ffn=128, decoder_ffn=256, points=256),
    "resnet50": dict(backbone="resnet50"),
    "resnet101": dict(backbone="resnet101"),
    "swin_t": dict(backbone="swin_t"),
    "swin_s": dict(backbone="swin_s"),
    "swin_b": dict(backbone="swin_b"),
    "swin_l": dict(backbone="swin_l", queries=200),  # the original: 100 for ADE20K semantic
}


# ---- backbones: images (B, 3, H, W) -> four maps, the finest first, each half as fine as the one before ----

class FrozenNorm(FrozenBatchNorm2d):
    """Batch norm with frozen statistics, in the dtype of its input: its fp32 buffers would end autocast."""

    def forward(self, x):
        return super().forward(x).to(x.dtype)


class ResNet(nn.Module):
    """torchvision's ResNet-50 or -101 with the pretrained statistics of batch norm, as in the original: the
    batches of fine-tuning are too small for their own."""
    stride = 32
    channels = (256, 512, 1024, 2048)

    def __init__(self, name):
        super().__init__()
        self.name = name
        net = torchvision.models.get_model(name, weights=None, norm_layer=FrozenNorm)
        self.stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
        self.stages = nn.ModuleList([net.layer1, net.layer2, net.layer3, net.layer4])

    def forward(self, x):
        x = self.stem(x)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def load_imagenet(self):
        """Load torchvision's ImageNet weights. Raises ValueError where they cannot be had."""
        parts = {"conv1": "stem.0", "bn1": "stem.1"}
        parts |= {f"layer{i + 1}": f"stages.{i}" for i in range(4)}
        state = {}
        for key, value in imagenet_weights(self.name).items():
            part, rest = key.split(".", 1)
            if part in parts:  # all but the classifier, fc
                state[f"{parts[part]}.{rest}"] = value
        self.load_state_dict(state)


def imagenet_weights(name):
    """torchvision's state dict of a backbone, which it downloads once."""
    try:
        weights = torchvision.models.get_model_weights(name).IMAGENET1K_V1
        return weights.get_state_dict(progress=True, check_hash=True)
    except Exception as error:  # no network, a file cut short: each has another type
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        reason = str(error).splitlines()[0]
        raise ValueError(f"{name}: its ImageNet weights cannot be had ({reason}). Connect to the "
                         f"internet and run this again; delete a broken file in {folder}") from error


class Tiny(nn.Module):
    """Residual blocks with group norm, at strides 2, 4, 8 and 16: learns from scratch on small images."""
    stride = 16
    channels = (32, 64, 96, 128)

    def __init__(self):
        super().__init__()
        norm = partial(nn.GroupNorm, 8)
        conv = nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False)
        self.stem = nn.Sequential(conv, norm(32), nn.ReLU(inplace=True))
        self.stages = nn.ModuleList([BasicBlock(32, 32, norm_layer=norm)])
        for a, b in zip(self.channels, self.channels[1:]):
            shortcut = nn.Sequential(nn.Conv2d(a, b, 1, stride=2, bias=False), norm(b))
            self.stages.append(BasicBlock(a, b, stride=2, downsample=shortcut, norm_layer=norm))

    forward = ResNet.forward


class WindowAttention(ShiftedWindowAttention):
    """Swin's attention within windows, which every second block shifts by half a window.

    torchvision drops the shift where a map is a single window; Mask2Former, whose weights are read here, does
    not."""

    def define_relative_position_index(self):
        super().define_relative_position_index()
        index = self._buffers.pop("relative_position_index")
        self.register_buffer("relative_position_index", index, persistent=False)  # a constant

    def shift_mask(self, H, W, device):
        """Which of a window's n pixels may see each other after the shift, (windows, n, n) bool.

        The shift is cyclic: a window at the border also holds pixels of the opposite border."""
        window, shift = self.window_size[0], self.shift_size[0]
        y = torch.arange(H, device=device)
        x = torch.arange(W, device=device)
        row = (y >= H - window).int() + (y >= H - shift)
        column = (x >= W - window).int() + (x >= W - shift)
        part = row[:, None] * 3 + column  # (H, W): pixels of one part are true neighbours
        part = rearrange(part, "(h a) (w b) -> (h w) (a b)", a=window, b=window)
        return part[:, None] == part[:, :, None]

    def forward(self, x):
        B, H, W, _ = x.shape
        window, shift = self.window_size[0], self.shift_size[0]
        x = F.pad(x, (0, 0, 0, -W % window, 0, -H % window))
        h, w = x.shape[1] // window, x.shape[2] // window  # windows down and across
        if shift:
            x = x.roll((-shift, -shift), (1, 2))
        x = rearrange(x, "b (h a) (w c) d -> (b h w) (a c) d", a=window, c=window)  # (B windows, n, C)
        q, k, v = rearrange(self.qkv(x), "b n (t m d) -> t b m n d", t=3, m=self.num_heads)
        bias = self.get_relative_position_bias()               # (1, M, n, n)
        if shift:
            hidden = ~self.shift_mask(h * window, w * window, x.device)[:, None]
            bias = (bias - 100.0 * hidden).repeat(B, 1, 1, 1)  # (B windows, M, n, n)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        x = self.proj(rearrange(x, "b m n d -> b n (m d)"))    # (B windows, n, C)
        x = rearrange(x, "(b h w) (a c) d -> b (h a) (w c) d", a=window, c=window, h=h, w=w)
        if shift:
            x = x.roll((shift, shift), (1, 2))
        return x[:, :H, :W]                                    # (B, H, W, C)


class Swin(nn.Module):
    """torchvision's SwinTransformer, with a layer norm on each of its four maps."""
    stride = 32

    def __init__(self, name):
        super().__init__()
        self.name = name
        block = partial(SwinTransformerBlock, attn_layer=WindowAttention)
        net = SwinTransformer(patch_size=[4, 4], **SWINS[name], stochastic_depth_prob=0.3, num_classes=1,
                              block=block)
        self.features = net.features  # the stem, then stages at 1, 3, 5, 7 with patch merging between them
        self.channels = tuple(SWINS[name]["embed_dim"] * 2 ** i for i in range(4))
        self.norms = nn.ModuleList(nn.LayerNorm(c) for c in self.channels)

    def load_imagenet(self):
        """Load torchvision's ImageNet weights. Raises ValueError where they cannot be had."""
        if SWINS[self.name]["window_size"] != [7, 7]:
            raise ValueError(f"torchvision has no {self.name} with windows of 12. Load a folder of "
                             "transformers, or choose swin_t or swin_s")
        public = imagenet_weights(self.name)
        own = self.features.state_dict()
        self.features.load_state_dict({key: public[f"features.{key}"] for key in own})

    def load_folder(self, folder):
        """Load the weights of a Swin or a classifier on it, as transformers stores them. The norms of the
        maps stay new. Raises ValueError where another tensor is missing, unknown or of another shape."""
        file, tensors, _ = read_weights(folder)
        within = "model.pixel_level_module.encoder."  # where an official Mask2Former has them
        tensors = rename({within + key.removeprefix("swin."): value for key, value in tensors.items()})
        tensors = {key.removeprefix("backbone.features."): value for key, value in tensors.items()}
        load_strict(self.features, tensors, file)

    def forward(self, x):
        x = F.pad(x, (0, -x.shape[3] % 4, 0, -x.shape[2] % 4))
        maps = []
        for i, layer in enumerate(self.features):
            x = layer(x)  # (B, h, w, C)
            if i % 2:
                maps.append(self.norms[i // 2](x).permute(0, 3, 1, 2))
        return maps


# ---- pixel decoder: deformable attention over three maps, then one finer map for the masks -----------------

def upcast(x):
    """At least fp32, for what autocast must not round."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def init_xavier(layer):
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)


def position_encoding(m):
    """Position encodings of the pixels of a map (B, D, h, w), (1, h w, D): the row in the first half of the
    channels, the column in the second, each as sines and cosines of D / 4 frequencies."""
    _, D, h, w = m.shape
    rate = 10000 ** (2 * torch.arange(D // 4, device=m.device) / (D // 2))

    def axis(n):
        place = torch.arange(1, n + 1, device=m.device)[:, None] / (n + 1e-6)
        angle = place * 2 * math.pi / rate                            # (n, D / 4)
        return torch.stack([angle.sin(), angle.cos()], 2).flatten(1)  # (n, D / 2)

    rows = axis(h)[:, None].expand(h, w, -1)
    columns = axis(w)[None].expand(h, w, -1)
    return torch.cat([rows, columns], 2).flatten(0, 1)[None]


def pixel_centres(m):
    """Where the pixels of a map (B, D, h, w) are: (h w, 2), x y in 0..1."""
    h, w = m.shape[2:]
    x = (torch.arange(w, device=m.device) + 0.5) / w
    y = (torch.arange(h, device=m.device) + 0.5) / h
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), 2).flatten(0, 1)


class DeformableAttention(nn.Module):
    """Every pixel of three maps attends to a few points instead of to all pixels (arXiv 2010.04159, eq. 3).

    From its own feature each pixel (token) computes where to look, for each head 4 points in each map
    (`offsets`, in pixels from itself), and how much each point counts (`weights`). A point lies between
    pixels, and its value is interpolated: so the offsets have gradients."""

    def __init__(self, width, heads, levels=3, points=4):
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.offsets = nn.Linear(width, heads * levels * points * 2)
        self.weights = nn.Linear(width, heads * levels * points)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        nn.init.zeros_(self.offsets.weight)
        nn.init.zeros_(self.weights.weight)
        nn.init.zeros_(self.weights.bias)
        init_xavier(self.value)
        init_xavier(self.out)
        # Head m starts with its points in direction m, at distances of 1, 2, ... pixels
        angle = torch.arange(heads) * 2 * math.pi / heads
        direction = torch.stack([angle.cos(), angle.sin()], 1)         # (M, 2), on a circle
        direction = direction / direction.abs().amax(1, keepdim=True)  # on a square
        distance = torch.arange(1, points + 1)[:, None]
        start = direction[:, None, None] * distance                    # (M, 1, P, 2)
        with torch.no_grad():
            self.offsets.bias.copy_(start.expand(-1, levels, -1, -1).flatten())

    def forward(self, x, position, centres, sizes):
        """x (B, N, D): the tokens of all maps in a row; position (1, N, D): their encodings; centres (N, 2):
        their x y in 0..1; sizes: (h, w) of each map -> (B, N, D)."""
        query = x + position
        offsets = rearrange(self.offsets(query), "b n (m s p c) -> s (b m) p n c",
                            m=self.heads, s=self.levels, c=2)          # a map: (B M, P, N, 2)
        weights = rearrange(self.weights(query), "b n (m j) -> b n m j", m=self.heads)
        weights = weights.softmax(-1)                                  # over the points of all maps
        weights = rearrange(weights, "b n m (s p) -> s (b m) 1 p n", s=self.levels)
        values = self.value(x).split([h * w for h, w in sizes], 1)
        total = 0
        for value, offset, weight, (h, w) in zip(values, offsets, weights, sizes):
            value = rearrange(value, "b (h w) (m d) -> (b m) d h w", h=h, m=self.heads)
            # A pixel's sides, where the map spans -1..1. (With torch.tensor, the CPU would wait for the GPU)
            pixel = torch.stack([offset.new_full((), 2 / w), offset.new_full((), 2 / h)])
            points = 2 * centres - 1 + offset * pixel                  # (B M, P, N, 2)
            total = total + self.read(value, points, weight)           # (B M, d, N)
        return self.out(rearrange(total, "(b m) d n -> b n (m d)", b=len(x)))

    def read(self, value, points, weight):
        """`read_points`. What it reads is P times as large as the map: for a big map, autograd does not keep
        it until the backward pass but reads it again there. A little more work, far less memory."""
        big = value.shape[1] * weight.numel() > 2 ** 22
        if big and torch.is_grad_enabled():
            return checkpoint(read_points, value, points, weight, use_reentrant=False,
                              preserve_rng_state=False)
        return read_points(value, points, weight)


def read_points(value, points, weight):
    """A map's values (B M, d, h, w) at points (B M, P, N, 2), x y in -1..1, summed over P with weight
    (B M, 1, P, N) -> (B M, d, N)."""
    values = F.grid_sample(value, points, align_corners=False)         # (B M, d, P, N)
    # Point by point, the sum stays in the processor's cache; all products at once would not
    return sum(v * w for v, w in zip(values.unbind(2), weight.unbind(2)))


class EncoderLayer(nn.Module):
    """A transformer layer whose self attention is deformable."""

    def __init__(self, width, heads, ffn):
        super().__init__()
        self.attention = DeformableAttention(width, heads)
        self.norm1 = nn.LayerNorm(width)
        self.ff1 = nn.Linear(width, ffn)
        self.ff2 = nn.Linear(ffn, width)
        self.norm2 = nn.LayerNorm(width)
        nn.init.xavier_uniform_(self.ff1.weight)
        nn.init.xavier_uniform_(self.ff2.weight)

    def forward(self, x, position, centres, sizes):
        x = self.norm1(x + self.attention(x, position, centres, sizes))
        return self.norm2(x + self.ff2(F.relu(self.ff1(x))))


def conv_norm(a, b, size, bias=False):
    return nn.Sequential(nn.Conv2d(a, b, size, padding=size // 2, bias=bias), nn.GroupNorm(32, b))


class PixelDecoder(nn.Module):
    """The backbone's four maps -> mask features (B, D, h, w), as fine as the finest map, and the three other
    maps refined, (B, D, h, w) each, the coarsest first."""

    def __init__(self, channels, width=256, heads=8, layers=6, ffn=1024):
        super().__init__()
        finest, *others = channels
        self.inputs = nn.ModuleList(conv_norm(c, width, 1, bias=True) for c in others[::-1])
        self.level = nn.Parameter(torch.randn(3, width))
        self.layers = nn.ModuleList(EncoderLayer(width, heads, ffn) for _ in range(layers))
        self.lateral = conv_norm(finest, width, 1)
        self.smooth = conv_norm(width, width, 3)
        self.masks = nn.Conv2d(width, width, 1)
        for conv, _ in self.inputs:
            init_xavier(conv)
        for conv in (self.lateral[0], self.smooth[0], self.masks):  # the original's c2_xavier_fill
            nn.init.kaiming_uniform_(conv.weight, a=1)
        nn.init.zeros_(self.masks.bias)

    def forward(self, maps):
        finest, *others = maps
        maps = [conv(m) for conv, m in zip(self.inputs, others[::-1])]   # (B, D, h, w) each
        sizes = [m.shape[2:] for m in maps]
        positions = [position_encoding(m) + level for m, level in zip(maps, self.level)]
        position = torch.cat(positions, 1)                     # (1, N, D)
        centres = torch.cat([pixel_centres(m) for m in maps])            # (N, 2)
        x = torch.cat([m.flatten(2).mT for m in maps], 1)                # (B, N, D)
        for layer in self.layers:
            x = layer(x, position, centres, sizes)
        parts = x.split([h * w for h, w in sizes], 1)
        maps = [part.mT.unflatten(2, size) for part, size in zip(parts, sizes)]
        up = F.interpolate(maps[-1], finest.shape[2:], mode="bilinear")
        features = F.relu(self.smooth(self.lateral(finest) + up))        # (B, D, h, w)
        return self.masks(features), maps


# ---- decoder: queries read the maps through masked attention -----------------------------------------------

class Attention(nn.Module):
    """Multi-head attention, whose three input projections share one tensor.

    mask (B, Q, N) bool: True where a query may look."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        init_xavier(self.qkv)
        init_xavier(self.out)

    def forward(self, q, k, v, mask=None):
        projections = zip((q, k, v), self.qkv.weight.chunk(3), self.qkv.bias.chunk(3))
        q, k, v = (rearrange(F.linear(x, weight, bias), "b n (m d) -> b m n d", m=self.heads)
                   for x, weight, bias in projections)         # (B, M, N, d)
        mask = None if mask is None else mask[:, None]
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(rearrange(x, "b m n d -> b n (m d)"))  # (B, Q, D)


class DecoderLayer(nn.Module):
    """Queries look at the image, then at each other. In this order, since the first layer's queries know
    nothing of the image yet: they have nothing to exchange (paper, 3.2.2)."""

    def __init__(self, width, heads, ffn):
        super().__init__()
        self.cross = Attention(width, heads)
        self.norm1 = nn.LayerNorm(width)
        self.self = Attention(width, heads)  # among the queries; the name stands in saved weights
        self.norm2 = nn.LayerNorm(width)
        self.ff1 = nn.Linear(width, ffn)
        self.ff2 = nn.Linear(ffn, width)
        self.norm3 = nn.LayerNorm(width)
        nn.init.xavier_uniform_(self.ff1.weight)
        nn.init.xavier_uniform_(self.ff2.weight)

    def forward(self, x, place, keys, values, mask):
        """x (B, Q, D): queries; place (Q, D): their learned encodings; keys, values (B, N, D): a map
        with and without position encodings; mask (B, Q, N) bool: where each query may look -> (B, Q, D)."""
        x = self.norm1(x + self.cross(x + place, keys, values, mask))
        q = x + place
        x = self.norm2(x + self.self(q, q, x))
        return self.norm3(x + self.ff2(F.relu(self.ff1(x))))


class Decoder(nn.Module):
    """Mask features and three maps -> L outputs: one of the learned queries, and one after each layer. The
    layers read the coarse, the middle and the fine map in turn."""

    def __init__(self, num_classes, queries=100, width=256, heads=8, layers=9, ffn=2048):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(queries, width))
        self.places = nn.Parameter(torch.randn(queries, width))
        self.level = nn.Parameter(torch.randn(3, width))
        self.layers = nn.ModuleList(DecoderLayer(width, heads, ffn) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.classes = nn.Linear(width, num_classes + 1)
        self.masks = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
                                   nn.Linear(width, width))

    def output(self, x, features):
        """What the queries x (B, Q, D) predict: one output of the model."""
        x = self.norm(x)
        return {"class_logits": self.classes(x),  # (B, Q, K + 1), the last one: no object
                "mask_embed": self.masks(x),      # (B, Q, D)
                "features": features}             # (B, D, h, w)

    @staticmethod
    def attention_mask(embed, features):
        """Masked attention: where each query may look, (B, Q, N) bool.

        embed (B, Q, D): mask embeddings of the output before; features (B, D, h, w): mask features, resized
        to the map that is read next, h w = N. A query may look where its own mask has a probability of at
        least 0.5, or everywhere if that is nowhere: attention to nothing would be NaN. (The paper resizes the
        mask; it is linear in the features, so resizing those is the same, and cheaper.)"""
        logits = torch.einsum("bqd,bdhw->bqhw", embed, features).flatten(2)
        inside = logits >= 0
        empty = ~inside.any(2, keepdim=True)
        return inside | empty

    def forward(self, features, maps):
        values = [m.flatten(2).mT + level for m, level in zip(maps, self.level)]  # (B, N, D) each
        keys = [value + position_encoding(m) for value, m in zip(values, maps)]
        # Where to look is a yes or no: it has no gradient
        small = [F.interpolate(features.detach(), m.shape[2:], mode="bilinear") for m in maps]
        x = self.queries.expand(len(features), -1, -1)                            # (B, Q, D)
        outputs = [self.output(x, features)]
        for i, layer in enumerate(self.layers):
            j = i % 3  # which map it reads
            mask = self.attention_mask(outputs[-1]["mask_embed"].detach(), small[j])
            x = layer(x, self.places, keys[j], values[j], mask)
            outputs.append(self.output(x, features))
        return outputs


def mask_logits(output):
    """An output's mask logits (B, Q, h, w): the dot product of each query's embedding with each feature.

    `Decoder.output` leaves them out, because those of all queries in all L outputs would be most of a
    training step's memory: the loss computes only the matched ones, inference only those of the last."""
    return torch.einsum("bqd,bdhw->bqhw", output["mask_embed"], output["features"])


# What the networks repeat, for torch.compile. Swin's blocks all differ, by their stochastic depth
BLOCKS = BasicBlock, Bottleneck, WindowAttention, MLP, EncoderLayer, DecoderLayer


class Mask2Former(nn.Module):
    """images (B, 3, H, W) in 0..1, normalised inside -> a list of L = decoder_layers + 1 outputs, see
    `Decoder.output`. The last is the prediction; `mask_logits` computes its masks, at stride 4 (tiny: 2).

    `loss(outputs, targets)` is the training loss, see `SetLoss`. isthing (K bools), class_names and task
    describe the data; mean and std are those of its colours, for the normalisation. All arguments are
    kept in `config`, which rebuilds the model. All weights are new; for ImageNet's, call
    `model.backbone.load_imagenet()`, or `load_folder` of a Swin. Raises ValueError for an unknown
    backbone."""

    def __init__(self, num_classes, backbone="resnet50", queries=100, width=256, heads=8, encoder_layers=6,
                 decoder_layers=9, encoder_ffn=1024, decoder_ffn=2048, class_weight=2.0, mask_weight=5.0,
                 dice_weight=5.0, no_object=0.1, points=12544, oversample=3.0, importance=0.75,
                 isthing=None, class_names=None, task="panoptic", mean=MEAN, std=STD):
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        if backbone not in PRESETS:  # each preset is named after its backbone
            raise ValueError(f"{backbone}: no such backbone. Choose one of {', '.join(PRESETS)}")
        if backbone == "tiny":
            self.backbone = Tiny()
        else:
            self.backbone = (Swin if backbone in SWINS else ResNet)(backbone)
        self.pixel_decoder = PixelDecoder(self.backbone.channels, width=width, heads=heads,
                                          layers=encoder_layers, ffn=encoder_ffn)
        self.decoder = Decoder(num_classes, queries=queries, width=width, heads=heads,
                               layers=decoder_layers, ffn=decoder_ffn)
        self.loss = SetLoss(num_classes, class_weight=class_weight, mask_weight=mask_weight,
                            dice_weight=dice_weight, no_object=no_object, points=points,
                            oversample=oversample, importance=importance)
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    def forward(self, images):
        x = (images - self.mean) / self.std        # (B, 3, H, W)
        maps = self.backbone(x)                    # (B, C, h, w) each, strides 4, 8, 16, 32
        # In fp32 as in the original: bf16 has too few digits for where a point lies in a map
        with torch.autocast(x.device.type, enabled=False):
            features, maps = self.pixel_decoder([upcast(m) for m in maps])  # stride 4; strides 32, 16, 8
        return self.decoder(features, maps)        # L outputs


# ---- targets and matching ----------------------------------------------------------------------------------

def targets(mask_ids, instances=None, isthing=None, task="semantic"):
    """The true segments of one image, as `SetLoss` takes them.

    mask_ids   (H, W) integers: class id 1..K, 0 = void
    instances  (H, W) integers: 0 = none, 255 = crowd, else the number of a thing; None = no instances
    isthing    K bools; semantic does not need them
    task       semantic: one segment for each class; panoptic: one for each class of stuff and each instance
               of a thing, without crowds; instance: the things of panoptic

    Returns {"labels": (N,) long in 0..K-1, "masks": (N, H, W) bool}.
    Raises ValueError for a class id over K (not for semantic)."""
    ids = torch.as_tensor(np.asarray(mask_ids)).long()
    number = torch.zeros_like(ids)
    if task != "semantic":
        if ids.max() > len(isthing):
            raise ValueError(f"class id {int(ids.max())} in a mask, but there are {len(isthing)} classes")
        thing = torch.tensor([False, *map(bool, isthing)])[ids]  # (H, W)
        if instances is not None:
            number = torch.as_tensor(np.asarray(instances)).long() * thing
        ids = ids * (number != CROWD)
        if task == "instance":
            ids = ids * thing
    segment = ids * 256 + number
    segments = segment[ids > 0].unique()  # (N,)
    return {"labels": segments // 256 - 1, "masks": segment == segments[:, None, None]}


def hungarian(cost, rows=None):
    """Solve P assignment problems side by side: give each row a column of its own, at the least total cost.

    cost  (P, n, m) array, n <= m: what it costs in problem p to give row i column j
    rows  (P,) integers: how many rows of each problem count, the first ones; None = all n

    Returns (P, n) integers: the column of each row, -1 for rows that do not count. The result is exact.
    Raises ValueError if a cost is NaN or infinite, or if there are more rows than columns.

    Method: shortest augmenting paths (Jonker and Volgenant 1987), each step for all problems at once. An
    example, with rows 0, 1, 2 and columns a, b, c:

        cost     a  b  c          reduced cost     a  b  c
          0      1  2  6            0              0  1  5
          1      1  4  9            1              0  3  8
          2      3  2  5            2              1  0  3

    Step 1, start. Each row wants its cheapest column: 0 wants a, 1 wants a, 2 wants b. The first row to want
    a column gets it: 0 has a, 2 has b, and 1 must wait. Each row also has a dual u, at first its cheapest
    cost: (1, 1, 2); each column has a dual v, at first 0. Two facts hold from now on: the reduced cost,
    cost - u - v, is never negative, and it is 0 where a row has a column.

    Step 2, shortest augmenting path. Row 1 takes a column, whose owner takes another, and so on until one is
    free. Dijkstra's algorithm on the reduced costs finds the shortest such path. From row 1, a is at distance
    0, b at 3, c at 8. The nearest is a: settled, at 0. Its owner 0 could go on to b, 0 + 1 < 3, and to c,
    0 + 5 < 8. Now b is the nearest: settled, at 1. Its owner 2 could go on to c, 1 + 3 < 5. Now c is the
    nearest, at 4, and it is free. The path is: 1 takes a, 0 takes b, 2 takes c. Its length is 4.

    Step 3, new duals. They make the reduced costs along the path 0, and none negative. The dual u of row 1
    grows by the path's length, 4. For each settled column, at distance d, the u of its owner grows by 4 - d
    and its own v shrinks by 4 - d. Here d is 0 for a, 1 for b, so u = (5, 5, 5) and v = (-4, -3, 0).

    Step 4, reassign. From the end of the path to its start: c goes to 2, b to 0, a to 1.

    The total cost is now 2 + 1 + 5 = 8, the sum of all duals, 15 - 7. No assignment costs less, since each of
    its pairs costs at least u + v: so this one is the best."""
    cost = np.asarray(cost, dtype=np.float64)
    if not np.isfinite(cost).all():
        raise ValueError("matching costs are not finite: the network's outputs hold NaN or infinity")
    P, n, m = cost.shape
    if n > m:
        raise ValueError(f"{n} rows for {m} columns. Transpose, or add columns that cost more than any other")
    rows = np.full(P, n) if rows is None else np.asarray(rows)
    if not rows.any():
        return np.full((P, n), -1)

    # Step 1, in all problems at once; p numbers problems
    u, v = cost.min(2), np.zeros((P, m))
    wanted = cost.argmin(2)      # (P, n): each row's cheapest column
    owner = np.full((P, m), -1)  # the row that has each column, -1: free
    waiting = []                 # for each row, the problems in which it must wait
    for row in range(n):
        p = np.flatnonzero(row < rows)
        free = owner[p, wanted[p, row]] < 0
        owner[p[free], wanted[p[free], row]] = row
        waiting.append(p[~free])

    for row in range(n):
        augment(cost, u, v, owner, row, waiting[row])

    columns = np.full((P, n), -1)
    p, column = np.nonzero(owner >= 0)
    columns[p, owner[p, column]] = column
    return columns


def augment(cost, u, v, owner, row, problems):
    """Give `row` a column in each of the problems: steps 2 to 4 of `hungarian`.

    cost (P, n, m); u (P, n), v (P, m) and owner (P, m) change in place; problems: integers below P."""
    # Step 2: p are the problems in which the path has not ended, `end` is its last column
    distance = cost[:, row] - u[:, row, None] - v  # (P, m)
    previous = np.full(distance.shape, -1)         # the column before on the path, -1: none
    settled = np.zeros(distance.shape, bool)
    end = np.zeros(len(cost), int)
    p = problems
    while len(p):
        end[p] = np.where(settled[p], np.inf, distance[p]).argmin(1)
        p = p[owner[p, end[p]] >= 0]               # at a free column the path ends
        column = end[p]
        settled[p, column] = True
        other = owner[p, column]                   # this row would have to go on to another column
        further = (distance[p, column] - u[p, other])[:, None] + cost[p, other] - v[p]
        i, to = np.nonzero((further < distance[p]) & ~settled[p])
        distance[p[i], to] = further[i, to]
        previous[p[i], to] = column[i]

    # Step 3
    length = distance[np.arange(len(cost)), end]
    u[problems, row] += length[problems]
    p, column = np.nonzero(settled)
    slack = length[p] - distance[p, column]
    u[p, owner[p, column]] += slack
    v[p, column] -= slack

    # Step 4: the row of the column before moves here; `row` itself takes the first column
    p, column = problems, end[problems]
    while len(p):
        before = previous[p, column]
        owner[p, column] = np.where(before < 0, row, owner[p, before])
        p, column = p[before >= 0], before[before >= 0]


# ---- loss --------------------------------------------------------------------------------------------------

def random_points(n, points, device):
    """Random places in n images: (n, P, 2), x y in -1..1 as grid_sample counts."""
    return torch.rand(n, points, 2, device=device).mul_(2).sub_(1)


def point_sample(maps, points):
    """maps (B, C, h, w), read bilinearly at points (B, P, 2), x y in -1..1 -> (B, C, P)."""
    return F.grid_sample(maps, points[:, :, None], align_corners=False)[..., 0]


class SetLoss(nn.Module):
    """Mask2Former's training loss: match queries to true segments one to one, then compare classes and masks.

    outputs    the model's L outputs
    targets    a list of B dicts, one for each image (see `targets`), on any device:
                 "labels" (N,) long in 0..K-1. N may be 0. If it is more than there are queries, the targets
                          that are the costliest to match are left out
                 "masks"  (N, H, W) bool, or float in 0..1; H and W are the same in all images
                 "valid"  (H, W) bool, optional: False where pixels are void and must not count
    num_masks  what the mask losses are divided by; None = the number of targets, averaged over ranks. Under
               gradient accumulation, pass the average over the micro-batches

    Returns the total, weighted and summed over the outputs, and its parts {"class", "mask", "dice"},
    detached. All is computed in fp32. Raises ValueError if an output is not finite."""

    def __init__(self, num_classes, class_weight=2.0, mask_weight=5.0, dice_weight=5.0, no_object=0.1,
                 points=12544, oversample=3.0, importance=0.75):
        super().__init__()
        self.num_classes = num_classes
        self.weights = {"class": class_weight, "mask": mask_weight, "dice": dice_weight}
        self.no_object = no_object
        self.points, self.oversample, self.importance = points, oversample, importance

    def forward(self, outputs, targets, num_masks=None):
        device = outputs[0]["class_logits"].device
        with torch.autocast(device.type, enabled=False):
            logits = upcast(torch.stack([out["class_logits"] for out in outputs]))  # (L, B, Q, K + 1)
            embed = upcast(torch.stack([out["mask_embed"] for out in outputs]))     # (L, B, Q, D)
            features = upcast(outputs[-1]["features"])                              # (B, D, h, w)
            labels = [t["labels"].to(device, torch.long) for t in targets]          # (N,) each
            masks = [t["masks"].to(device, non_blocking=True).to(features.dtype) for t in targets]
            valid = self.stack_valid(targets, features)                             # (B, 1, H, W) or None
            image = [torch.full_like(label, b) for b, label in enumerate(labels)]
            image = torch.cat(image)                                                # (all N,)
            query = self.match(logits, embed, features, labels, masks, valid)       # (L, all N)
            if num_masks is None:
                num_masks = average_count(len(image), device)
            mask, dice = self.mask_losses(embed, features, masks, valid, image, query)
            losses = {"class": self.class_loss(logits, labels, image, query),
                      "mask": mask / num_masks,
                      "dice": dice / num_masks}
            losses = {name: self.weights[name] * loss for name, loss in losses.items()}
        return sum(losses.values()), {name: loss.detach() for name, loss in losses.items()}

    @staticmethod
    def stack_valid(targets, features):
        """"valid" of all images, (B, 1, H, W), in the features' dtype; None if no image has it."""
        if not any("valid" in t for t in targets):
            return None
        everywhere = features.new_ones(targets[0]["masks"].shape[1:])
        return torch.stack([t.get("valid", everywhere).to(features) for t in targets])[:, None]

    @torch.no_grad()
    def match(self, logits, embed, features, labels, masks, valid):
        """The query of every target in every output, (L, all N) long; -1 for targets that are left out."""
        L, _, Q, _ = logits.shape
        images = [b for b, label in enumerate(labels) if len(label)]
        if not images:
            return torch.full((L, 0), -1, device=logits.device)
        counts = [len(labels[b]) for b in images]
        most = max(counts)
        # Pad all problems to one size: as many targets as the largest has, and at least as many queries.
        padded = []
        for b, n in zip(images, counts):
            cost = self.costs(b, logits, embed, features, labels, masks, valid)  # (L, Q, n)
            padded.append(F.pad(cost, (0, most - n, 0, max(most - Q, 0))))
        costs = torch.stack(padded).flatten(0, 1).mT.cpu().numpy()  # (images L, most, Q or more)
        # Padded queries cost more than any true one; a target that is matched with one is left out.
        costs[:, :, Q:] = 2 * np.abs(costs).max() + 1
        query = hungarian(costs, np.repeat(counts, L)).reshape(len(images), L, most)
        query[query >= Q] = -1
        without_padding = [q[:, :n] for q, n in zip(query, counts)]  # (L, n) each
        return torch.from_numpy(np.concatenate(without_padding, 1)).to(logits.device)

    def costs(self, b, logits, embed, features, labels, masks, valid):
        """What it costs in image b to match query q with target n, in every output: (L, Q, N)."""
        points = random_points(1, self.points, features.device)
        at_points = point_sample(features[b, None], points)[0]  # (D, P)
        t = point_sample(masks[b][None], points)[0].T           # (P, N)
        weight = torch.ones_like(t[:, 0])                 # (P,)
        if valid is not None:
            weight = point_sample(valid[b, None], points)[0, 0]
        t = t * weight[:, None]
        # A few outputs at a time: their logits at the points then stay in the CPU's cache.
        rows = max(1, 2 ** 21 // (embed.shape[2] * self.points))
        parts = [self.mask_costs(e @ at_points, t, weight) for e in embed[:, b].split(rows)]
        score = logits[:, b].softmax(-1)[..., labels[b]]  # (L, Q, N)
        return torch.cat(parts) - self.weights["class"] * score

    def mask_costs(self, x, t, weight):
        """Cross entropy and dice of mask logits x (L, Q, P) with targets t (P, N), for all pairs: (L, Q, N).

        A point's cross entropy is softplus(x) - x t, so its sum over points is a matrix product."""
        entropy = (F.softplus(x) @ weight)[..., None] - x @ t
        p = x.sigmoid_().mul_(weight)
        dice = 1 - (2 * (p @ t) + 1) / (p.sum(-1)[..., None] + t.sum(0) + 1)
        return self.weights["mask"] * (entropy / self.points) + self.weights["dice"] * dice

    def class_loss(self, logits, labels, image, query):
        """Cross entropy with the class of each query's target, or with "no object", which counts little since
        most queries are that: a weighted mean for each output, summed."""
        L, B, Q, _ = logits.shape
        # Targets that are left out, -1, go to an additional last query. (nonzero would wait for the GPU)
        wanted = torch.full((L, B, Q + 1), self.num_classes, device=logits.device)
        output = torch.arange(L, device=logits.device)[:, None]
        wanted[output, image, query] = torch.cat(labels)
        wanted = wanted[..., :Q]
        weight = logits.new_ones(self.num_classes + 1)
        weight[-1] = self.no_object
        error = F.cross_entropy(logits.flatten(0, 2), wanted.flatten(), weight, reduction="none")
        return (error.view(L, -1).sum(1) / weight[wanted].view(L, -1).sum(1)).sum()

    def mask_losses(self, embed, features, masks, valid, image, query):
        """Cross entropy and dice of the matched masks at uncertain points, summed over all outputs."""
        L, N = query.shape
        if N == 0:
            return embed.sum() * 0, features.sum() * 0  # not plain 0: DDP waits for gradients
        x = self.matched_logits(embed, features, masks, image, query)     # (N L, 1, h, w)
        with torch.no_grad():
            # A few masks at a time, as in `costs`.
            rows = max(1, 2 ** 21 // int(self.points * self.oversample))
            points = torch.cat([self.uncertain_points(part) for part in x.split(rows)])  # (N L, P, 2)
            t = self.read_targets(torch.cat(masks)[:, None], points, L)   # (N L, P)
            # 0 for targets that are left out.
            weight = (query.T >= 0).to(t).reshape(-1, 1).expand_as(t)
            if valid is not None:
                weight = weight * self.read_targets(valid[image], points, L)
        x = point_sample(x, points)[:, 0]  # (N L, P)
        entropy = F.binary_cross_entropy_with_logits(x, t, reduction="none") * weight
        p, t = x.sigmoid() * weight, t * weight
        dice = 1 - (2 * (p * t).sum(1) + 1) / (p.sum(1) + t.sum(1) + 1)
        return entropy.mean(1).sum(), dice.sum()

    @staticmethod
    def matched_logits(embed, features, masks, image, query):
        """Mask logits of the matched queries only, (N L, 1, h, w): those of all could fill the memory."""
        output = torch.arange(len(query), device=query.device)[:, None]
        embed = embed[output, image, query.clamp(0)]     # (L, all N, D)
        embed = embed.split([len(m) for m in masks], 1)  # (L, N, D) for each image
        x = [torch.einsum("lnd,dhw->nlhw", e, f) for e, f in zip(embed, features)]
        return torch.cat(x).flatten(0, 1)[:, None]

    @staticmethod
    def read_targets(maps, points, L):
        """maps (N, 1, H, W), one for each target, at points (N L, P, 2) -> (N L, P)."""
        points = rearrange(points, "(n l) p c -> n (l p) c", l=L)
        return rearrange(point_sample(maps, points), "n 1 (l p) -> (n l) p", l=L)

    def uncertain_points(self, x):
        """Where masks are compared (PointRend, 3.1): mask logits x (R, 1, h, w) -> (R, P, 2).

        Most are those of many random points whose logits are nearest to 0, at the mask's boundary: by the
        defaults 0.75 P of 3 P. The rest are anywhere."""
        uncertain = int(self.points * self.importance)
        points = random_points(len(x), int(self.points * self.oversample), x.device)
        certainty = point_sample(x, points)[:, 0].abs()
        index = certainty.topk(uncertain, 1, largest=False, sorted=False).indices
        points = points.gather(1, index[..., None].expand(-1, -1, 2))
        return torch.cat([points, random_points(len(x), self.points - uncertain, x.device)], 1)


def average_count(count, device):
    """The number of target masks, averaged over ranks and at least 1, as a tensor."""
    count = torch.full((), float(count), device=device)  # torch.tensor would wait for the GPU
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(count)
        count = count / dist.get_world_size()
    return count.clamp(min=1)


# ---- inference: images -> raw predictions -> (ids, instances, segments) ------------------------------------

@torch.no_grad()
def predict(model, image, task=None, short=None, scales=(1.0,), flip=False, **thresholds):
    """Segment one image, at its own size, for any task. Leaves the model in eval mode.

    image       PIL, or (3, H, W) tensor: uint8, or float in 0..1
    task        one of TASKS; None = the model's own
    short       length of the image's shorter side inside the network (the original: 800 for COCO, 640 for
                ADE20K); None = as it is
    scales      semantic only: average the class scores over copies, so many times as large
    flip        semantic only: and over the copies' mirror images (not for classes named left or right)
    thresholds  see `panoptic` and `instance`

    Returns (ids, instances, segments):
    ids         (H, W) long: class id 1..K, 0 = nothing
    instances   (H, W) long: things, numbered from 1; 0 = none
    segments    a list of {"class": 1..K, "score": float in 0..1, None for semantic, "mask": (H, W) bool},
                best first (semantic: largest first)

    Raises ValueError for an unknown task, and for scales or flip with a task other than semantic."""
    task = task or model.config["task"]
    copies = [(scale, mirror) for scale in scales for mirror in (False, True)[:1 + flip]]
    if task != "semantic" and copies != [(1.0, False)]:
        raise ValueError(f"scales and flip average class scores: {task} segmentation has none")
    if not torch.is_tensor(image):
        image = torch.from_numpy(np.array(rgb(image))).permute(2, 0, 1)
    image = image.to(model.mean) / 255 if image.dtype == torch.uint8 else image.to(model.mean)
    model.eval()
    if task == "semantic":
        return semantic(sum_scores(model, image, short, copies))
    (prediction,) = final_predictions(model, resize(image, short)[None])
    isthing = model.config["isthing"] or [True] * model.config["num_classes"]
    return postprocess(prediction, image.shape[1:], task, isthing, **thresholds)


@torch.no_grad()
def final_predictions(model, images):
    """images (B, 3, H, W) in 0..1 -> a list of B raw predictions, which `postprocess` takes:

    class_logits  (Q, K + 1)
    mask_logits   (Q, h, w)
    padded        (H', W'): the network sees the image with its sides padded to multiples of the stride
    size          (H, W)"""
    H, W = images.shape[2:]
    down, across = -H % model.backbone.stride, -W % model.backbone.stride
    mean = model.mean.to(images)
    x = F.pad(images - mean, (0, across, 0, down)) + mean  # the mean colour is 0 for the network
    output = model(x)[-1]
    shapes = {"padded": (H + down, W + across), "size": (H, W)}
    return [{"class_logits": classes, "mask_logits": masks, **shapes}
            for classes, masks in zip(upcast(output["class_logits"]), upcast(mask_logits(output)))]


@torch.no_grad()
def postprocess(prediction, size, task, isthing, **thresholds):
    """A raw prediction -> (ids, instances, segments) at `size` (H, W), as `predict` returns them.

    isthing: K bools. Raises ValueError for an unknown task."""
    if task == "semantic":
        return semantic(class_scores(prediction, size))
    if task == "panoptic":
        return panoptic(prediction, size, isthing, **thresholds)
    if task == "instance":
        return instance(prediction, size, isthing, **thresholds)
    raise ValueError(f"{task}: no such task. Choose one of {', '.join(TASKS)}")


def upsample(masks, prediction, size):
    """Some of a prediction's mask logits, (q, h, w), without the padding, at `size` (H, W) -> (q, H, W)."""
    H, W = prediction["size"]
    masks = F.interpolate(masks[None], prediction["padded"], mode="bilinear")[..., :H, :W]
    if (H, W) != tuple(size):
        masks = F.interpolate(masks, size, mode="bilinear")
    return masks[0]


def class_scores(prediction, size):
    """(K, H, W): the sum over all queries of class probability times mask probability."""
    classes = prediction["class_logits"].softmax(-1)[:, :-1]       # (Q, K)
    masks = upsample(prediction["mask_logits"], prediction, size)  # (Q, H, W)
    return torch.einsum("qk,qhw->khw", classes, masks.sigmoid_())


def sum_scores(model, image, short, copies):
    """Class scores (K, H, W) of image (3, H, W), summed over copies of it: pairs (scale, mirror). The best
    class of the sum is that of the average."""
    total = 0
    for scale, mirror in copies:
        copy = resize(image, short, scale)
        (prediction,) = final_predictions(model, (copy.flip(2) if mirror else copy)[None])
        scores = class_scores(prediction, image.shape[1:])
        total = total + (scores.flip(2) if mirror else scores)
    return total


def semantic(scores):
    """Class scores (K, H, W) -> (ids, instances, segments), a segment for each class."""
    ids = scores.argmax(0) + 1
    segments = [{"class": k, "score": None, "mask": ids == k} for k in ids.unique().tolist()]
    segments.sort(key=lambda s: -s["mask"].sum())
    return ids, torch.zeros_like(ids), segments


def panoptic(prediction, size, isthing, object_threshold=0.8, overlap_threshold=0.8):
    """-> (ids, instances, segments) without overlap; stuff of one class is one segment.

    Queries surer of their class than object_threshold compete for each pixel, by score x mask probability.
    A segment that wins less than overlap_threshold of its own mask is left out."""
    scores, classes = prediction["class_logits"].softmax(-1).max(-1)         # (Q,)
    scores, order = scores.sort(descending=True, stable=True)
    sure = (scores > object_threshold) & (classes[order] < len(isthing))     # the last class: no object
    scores, order = scores[sure], order[sure]
    ids, instances = torch.zeros(2, *size, dtype=torch.long, device=scores.device)
    if not len(order):
        return ids, instances, []
    masks = upsample(prediction["mask_logits"][order], prediction, size).sigmoid_()
    winner = (masks * scores[:, None, None]).argmax(0)                       # (H, W)
    segments, stuff = [], {}
    for q, (score, k) in enumerate(zip(scores.tolist(), classes[order].tolist())):
        won, own = winner == q, masks[q] >= 0.5
        mask = won & own
        if not mask.any() or won.sum() < overlap_threshold * own.sum():
            continue
        ids[mask] = k + 1
        if k in stuff:
            stuff[k] |= mask  # in place: part of the segment that this class has already
            continue
        if isthing[k]:
            instances[mask] = instances.max() + 1
        else:
            stuff[k] = mask
        segments.append({"class": k + 1, "score": score, "mask": mask})
    return ids, instances, segments


def instance(prediction, size, isthing, top=100, shown=0.5):
    """-> (ids, instances, segments): the `top` pairs of a query and a class, less those of stuff.

    Segments may overlap. ids and instances show those with a score over `shown`, the surest on top. The score
    is the class probability times the mean mask probability inside the mask."""
    classes = prediction["class_logits"].softmax(-1)[:, :-1]  # (Q, K)
    scores, index = classes.flatten().topk(min(top, classes.numel()))
    query, k = index // classes.shape[1], index % classes.shape[1]
    thing = torch.tensor(isthing, device=k.device).bool()[k]
    scores, query, k = scores[thing], query[thing], k[thing]
    ids, instances = torch.zeros(2, *size, dtype=torch.long, device=k.device)
    if not len(query):
        return ids, instances, []
    # One mask for each query, even with several classes.
    query, row = query.unique(return_inverse=True)
    masks = upsample(prediction["mask_logits"][query], prediction, size)     # (q, H, W)
    inside = masks > 0
    area = inside.sum((1, 2), dtype=masks.dtype)
    certainty = (masks.sigmoid_() * inside).sum((1, 2)) / (area + 1e-6)
    scores, order = (scores * certainty[row]).sort(descending=True)
    best = zip(k[order].tolist(), scores.tolist(), row[order].tolist())
    segments = [{"class": k + 1, "score": score, "mask": inside[i]} for k, score, i in best if score > 0]
    for number, segment in reversed(list(enumerate(segments, 1))):
        if segment["score"] > shown:
            ids[segment["mask"]] = segment["class"]
            instances[segment["mask"]] = number
    return ids, instances, segments


def resize(image, short, scale=1.0):
    """image (3, H, W) with its shorter side at short x scale (None: its own x scale), the longer at most at 4
    times that: a thin image does not grow without end."""
    shorter, longer = min(image.shape[1:]), max(image.shape[1:])
    ratio = scale * min(short / shorter, 4 * short / longer) if short else scale
    size = [max(1, round(n * ratio)) for n in image.shape[1:]]
    if size == list(image.shape[1:]):
        return image
    return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0].clamp(0, 1)


def rgb(image):
    """A PIL image as 8-bit RGB. PIL's own conversion would clip 16-bit grey to white."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    return image.convert("RGB")


# ---- files -------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def atomic_write(path):
    """Yield a temporary path that replaces `path` at the end: the file is complete or not there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp{os.urandom(8).hex()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save(model, path):
    """Write a model's weights and, as metadata, the arguments that rebuild it: one safetensors file."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    header = {"format": "seggen-1", "class": "Mask2Former", "config": model.config}
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, {"seggen": json.dumps(header)})  # one key: their order is random
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)                            # the library makes the file private


def load(path, task=None):
    """A Mask2Former in eval mode, in fp32.

    path  a model.safetensors or the folder that holds it: written by `save`, or an official
          Mask2FormerForUniversalSegmentation as transformers stores it, with its config.json, in
          one file or several. Pickles are refused unread, since they can run code
    task  one of TASKS, instead of the one that the weights were trained for

    Raises ValueError, with the path, for anything else."""
    file, tensors, metadata = read_weights(path)
    if "seggen" in metadata:
        header = json.loads(metadata["seggen"])
        if header["class"] != "Mask2Former":
            raise ValueError(f"{file}: weights of a {header['class']}. Give those of a Mask2Former")
        config = header["config"]
    else:
        config = public_config(file.with_name("config.json"), tensors)
        tensors = rename(tensors)
    model = Mask2Former(**{**config, "task": task or config["task"]})
    load_strict(model, tensors, file)
    return model.eval()


def load_strict(net, tensors, file):
    """Load a state dict that was read from `file`. Raises ValueError where a key or a shape differs."""
    try:
        net.load_state_dict(tensors)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        raise ValueError(f"{file}: not the weights of this network. {first:.200}") from error


def read_weights(path):
    """The first file of a checkpoint and the tensors of all its files; the first one's metadata."""
    file, *others = weight_files(path)
    tensors, metadata = read_safetensors(file)
    for other in others:
        tensors |= read_safetensors(other)[0]
    return file, tensors, metadata


def weight_files(path):
    """The files of a checkpoint, which may be a file or a folder: several where transformers divided it."""
    folder = Path(path)
    file = folder / "model.safetensors" if folder.is_dir() else folder
    index = folder / "model.safetensors.index.json"
    if file.exists() or not index.exists():
        return [file]
    return [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]


def read_safetensors(file):
    """A safetensors file's tensors and metadata."""
    if not file.exists():
        raise ValueError(f"{file}: no such file. Give a model.safetensors or the folder that holds it")
    if file.suffix != ".safetensors":
        raise ValueError(f"{file}: not a safetensors file, and a pickle could run code. Convert it first")
    try:
        with safe_open(file, "pt") as f:
            return {key: f.get_tensor(key) for key in f.keys()}, f.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{file}: not a complete safetensors file ({error}). Download it again") from error


# ---- official weights, as transformers stores them ---------------------------------------------------------

# What config.json must say of a Mask2Former and of a Swin. Most sizes need no entry: weights of other sizes
# would fail to load
REQUIRED = {
    "architectures": ["Mask2FormerForUniversalSegmentation"],
    "activation_function": "relu",
    "pre_norm": False,
    "num_attention_heads": 8,
}
REQUIRED_OF_SWIN = {"model_type": "swin", "hidden_act": "gelu", "layer_norm_eps": 1e-5}

# config.json says neither which classes are things nor always the task. Known data sets are recognised by
# their number of classes, the first and the last of them
ADE_STUFF = {*range(7), 9, 11, 13, 16, 17, 21, 25, 26, 28, 29, 34, 40, 46, 48, 51, 52, 54, 59, 60, 61, 63, 68,
             77, 79, 84, 91, 94, 96, 99, 100, 101, 105, 106, 109, 113, 114, 117, 122, 128, 131, 140, 141, 145}
DATASETS = {  # -> which classes are things, the task
    (150, "wall", "flag"): ([k not in ADE_STUFF for k in range(150)], "semantic"),
    (133, "person", "rug-merged"): ([k < 80 for k in range(133)], "panoptic"),
    (19, "road", "bicycle"): ([k >= 11 for k in range(19)], "semantic"),
    (100, "bed", "flag"): ([True] * 100, "instance"),
    (80, "person", "toothbrush"): ([True] * 80, "instance"),
    (8, "person", "bicycle"): ([True] * 8, "instance"),
}

# transformers' key names -> ours, a table for each part of the network. Its entries are replaced in this
# order, anywhere in a key: longer names come first
RENAMES = {
    ("model.pixel_level_module.encoder.", "backbone."): {
        "embeddings.patch_embeddings.projection": "features.0.0",
        "embeddings.norm": "features.0.2",
        **{f"encoder.layers.{i}.blocks": f"features.{2 * i + 1}" for i in range(4)},
        **{f"encoder.layers.{i}.downsample": f"features.{2 * i + 2}" for i in range(3)},
        **{f"hidden_states_norms.stage{i + 1}": f"norms.{i}" for i in range(4)},
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "attention.self.query": "attn.qkv.q",
        "attention.self.key": "attn.qkv.k",
        "attention.self.value": "attn.qkv.v",
        "attention.self": "attn",
        "attention.output.dense": "attn.proj",
        "intermediate.dense": "mlp.0",
        "output.dense": "mlp.3",
    },
    ("model.pixel_level_module.decoder.", "pixel_decoder."): {
        "encoder.layers": "layers",
        "level_embed": "level",
        "input_projections": "inputs",
        "self_attn_layer_norm": "norm1",
        "self_attn.sampling_offsets": "attention.offsets",
        "self_attn.attention_weights": "attention.weights",
        "self_attn.value_proj": "attention.value",
        "self_attn.output_proj": "attention.out",
        ".fc": ".ff",
        "final_layer_norm": "norm2",
        "adapter_1": "lateral",
        "layer_1": "smooth",
        "mask_projection": "masks",
    },
    ("model.transformer_module.", "decoder."): {
        "decoder.": "",
        "queries_features.weight": "queries",
        "queries_embedder.weight": "places",
        "level_embed.weight": "level",
        "cross_attn_layer_norm": "norm1",
        "cross_attn.in_proj_": "cross.qkv.",
        "cross_attn": "cross",
        "self_attn_layer_norm": "norm2",
        **{f"self_attn.{part}_proj": f"self.qkv.{part}" for part in "qkv"},
        "self_attn": "self",
        ".out_proj": ".out",
        ".fc": ".ff",
        "final_layer_norm": "norm3",
        "layernorm": "norm",
        **{f"mask_predictor.mask_embedder.{i}.0": f"masks.{2 * i}" for i in range(3)},
    },
    ("class_predictor", "decoder.classes"): {},
}
# Constants that our model computes, norms that theirs never applies, the classifier of a Swin
UNUSED = ("relative_position_index", "criterion.empty_weight", "encoder.layernorm", "swin.layernorm",
          "encoder.classifier")


def check_config(file, config, required):
    """Raises ValueError where a config.json has other values than those required; missing ones are right."""
    for key, value in required.items():
        found = config.get(key, value)
        if found != value:
            raise ValueError(f"{file}: {key} is {found}, but this network has {value}. Give other weights")


def swin_name(file):
    """Which one of SWINS a config.json of transformers describes: of a Swin or of a Mask2Former on one."""
    public = read_json(file)
    config = public.get("backbone_config") or public
    check_config(file, config, REQUIRED_OF_SWIN)
    shape = dict(embed_dim=config.get("embed_dim", 96),
                 depths=config.get("depths", [2, 2, 6, 2]),
                 num_heads=config.get("num_heads", [3, 6, 12, 24]),
                 window_size=2 * [config.get("window_size", 7)])
    for name, ours in SWINS.items():
        if ours == shape:
            return name
    raise ValueError(f"{file}: a Swin of {shape}. Known are {', '.join(SWINS)}")


def public_config(file, tensors):
    """The constructor arguments that a transformers config.json stands for."""
    public = read_json(file)
    check_config(file, public, REQUIRED)
    backbone = swin_name(file)
    K = len(tensors["class_predictor.bias"]) - 1
    names = public.get("id2label", {})
    names = [names.get(str(k), f"class {k + 1}").strip() for k in range(K)]
    isthing, task = DATASETS.get((K, names[0], names[-1]), ([True] * K, "semantic"))
    # A task in the name of the weights, mask2former-swin-tiny-coco-instance, goes before that table. Only
    # the last folder's name is read.
    title = f"{file.absolute().parent.name} {Path(public.get('_name_or_path') or '').name}"
    named = max(TASKS, key=title.rfind)  # the one that it mentions last; -1 where it does not
    return dict(num_classes=K,
                backbone=backbone,
                queries=public.get("num_queries", 100),
                isthing=isthing,
                class_names=names,
                task=named if named in title else task,
                **read_normalisation(file.with_name("preprocessor_config.json")))


def read_normalisation(file):
    """The mean and deviation of colours that weights were trained with: ImageNet's, unless the file says."""
    public = read_json(file) if file.exists() else {}
    mean, std = public.get("image_mean", MEAN), public.get("image_std", STD)
    if not public.get("do_normalize", True):
        mean, std = [0.0] * 3, [1.0] * 3
    largest = 255 * public.get("rescale_factor", 1 / 255) if public.get("do_rescale", True) else 255
    return dict(mean=[m / largest for m in mean], std=[s / largest for s in std])  # our pixels are in 0..1


def read_json(file):
    if not file.exists():
        raise ValueError(f"{file}: no such file. Give a folder as transformers stores a model")
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error}). Download it again") from error


def rename(tensors):
    """transformers' state dict -> ours, where q, k and v are one."""
    renamed = {rename_key(key): tensor for key, tensor in tensors.items()
               if not any(part in key for part in UNUSED)}
    for key in [key for key in renamed if ".qkv.q." in key]:
        parts = [key.replace(".q.", f".{part}.") for part in "qkv"]
        renamed[key.replace(".q.", ".")] = torch.cat([renamed.pop(part) for part in parts if part in renamed])
    return renamed


def rename_key(key):
    for (theirs, ours), table in RENAMES.items():
        if key.startswith(theirs):
            key = key.removeprefix(theirs)
            for old, new in table.items():
                key = key.replace(old, new)
            return ours + key
    return key


# ---- overlays: the command ---------------------------------------------------------------------------------

LONGEST = 1333  # side of the largest picture, as in COCO's evaluation: a camera's would take over 10 GB


def overlay(image, segments, names, side=640):
    """A PIL image with its segments tinted (a colour for each class), outlined in white and named. Small
    images are enlarged, so that the names can be read."""
    from PIL import ImageChops, ImageDraw, ImageFilter, ImageFont
    scale = max(1, round(side / max(image.size)))
    picture = image.resize((image.width * scale, image.height * scale), Image.BICUBIC)
    for segment in segments:
        mask = Image.fromarray(segment["mask"].cpu().numpy()).convert("L")
        mask = mask.resize(picture.size, Image.NEAREST)
        inner = mask.filter(ImageFilter.MinFilter(3))
        k = segment["class"]
        # Hues by the golden ratio and three lightnesses: classes next to each other look different
        tint = f"hsl({k * 222.5 % 360}, 85%, {(50, 66, 40)[k % 3]}%)"
        picture.paste(tint, mask.point(lambda value: 0.55 * value))
        picture.paste("white", ImageChops.subtract(mask, inner))
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(max(12, min(picture.size) // 36))
    for segment in segments:
        x, y = middle(segment["mask"].cpu().numpy())
        name = names[segment["class"] - 1]
        text = name if segment["score"] is None else f"{name} {segment['score']:.2f}"
        half = draw.textlength(text, font) / 2
        place = min(max(x * scale, half), picture.width - half), y * scale
        draw.text(place, text, "white", font, anchor="mm", stroke_width=2, stroke_fill="black")
    return picture


def middle(mask):
    """x, y of the pixel of a mask (H, W) that is nearest to its centre."""
    y, x = mask.nonzero()
    nearest = np.hypot(y - y.mean(), x - x.mean()).argmin()
    return x[nearest], y[nearest]


def read_image(file):
    """A picture in RGB, upright (cameras note how they were held), with sides of at most LONGEST."""
    try:
        with Image.open(file) as image:
            image = rgb(ImageOps.exif_transpose(image))
    except Exception as error:
        raise ValueError(f"{file}: not a readable image ({error}). Give PNG or JPEG files") from error
    if max(image.size) > LONGEST:
        print(f"{file}: {image.width} x {image.height}, reduced to {LONGEST} for its longer side")
        image.thumbnail((LONGEST, LONGEST))
    return image


def size_of(file):
    """The (width, height) of a picture; None where it cannot be read."""
    with contextlib.suppress(OSError), Image.open(file) as image:
        return image.size


def draw_overlays(model, files, folder, short=None):
    """Write an overlay of every image file to `folder`, and print its segments."""
    names = model.config["class_names"] or [f"class {k + 1}" for k in range(model.config["num_classes"])]
    outs = [Path(folder) / f"{Path(file).stem}.png" for file in files]
    inputs = [Path(file).resolve() for file in files]
    for file, out in zip(files, outs):
        if out.resolve() in inputs or outs.count(out) > 1:
            raise ValueError(f"{file}: its overlay {out} would replace an input or another overlay. Choose "
                             "another folder")
    for file, out in zip(files, outs):
        image = read_image(file)
        _, _, segments = predict(model, image, short=short)
        segments = [s for s in segments if s["score"] is None or s["score"] > 0.5]
        segments.sort(key=lambda s: -s["mask"].sum())  # small ones on top
        with atomic_write(out) as temporary:
            overlay(image, segments, names).save(temporary)
        print(f"{out}  {len(segments)} segments: {', '.join(names[s['class'] - 1] for s in segments)}")


def main(argv=None):
    import argparse
    here = Path(__file__).resolve().parent
    demo = here / "weights/shapes/mask2former/model.safetensors"
    gpus = [f"cuda:{n}" for n in range(torch.cuda.device_count())]
    devices = ["cpu", "cuda", *gpus] if gpus else ["cpu"]
    parser = argparse.ArgumentParser(description="Segment images and draw the segments on them.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("images", nargs="*", help="image files (default: 8 of data/shapes/val/images)")
    add("--weights", default=demo, help="a model.safetensors of ours, or a transformers folder")
    add("--out", default="out/overlays", help="folder for the pictures")
    add("--task", choices=TASKS, help="default: what the weights were trained for")
    add("--size", type=int, help="shorter side inside the network; default: the image's own")
    add("--device", default="cuda" if gpus else "cpu", help="cpu, cuda or cuda:N")
    args = parser.parse_args(argv)
    files = args.images or sorted((here / "data/shapes/val/images").glob("*"))[:8]
    if not files:
        raise ValueError("data/shapes/val: no images. Create them with: python data/shapes/prepare.py")
    if args.size is not None and args.size < 1:
        raise ValueError(f"--size {args.size}: 1 pixel or more is needed")
    if Path(args.out).is_file():
        raise ValueError(f"--out {args.out}: is a file. Choose a folder")
    if args.device not in devices:
        raise ValueError(f"--device {args.device}: no such device. There is {', '.join(devices)}")
    shipped = weight_files(args.weights)[0].resolve() == demo
    if shipped and any(size_of(file) != (64, 64) for file in files):
        print("The built-in weights know only drawn shapes of 64 x 64: what they find in other pictures "
              "means nothing. Give others by --weights, such as a Mask2Former folder of transformers")
    model = load(args.weights, args.task).to(args.device)
    draw_overlays(model, files, args.out, args.size)


def run(main):
    """Run a script's main(): a user's mistake ends in one line on stderr, not in a traceback.

    `run`, `atomic_write` and `rgb` repeat data/pairs.py, so that this file needs no other.
    """
    try:
        main()
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        if "SEGGEN_DEBUG" in os.environ:
            raise
        text = str(error).strip() or repr(error)
        sys.exit(text.splitlines()[-1].removeprefix("ValueError: "))


if __name__ == "__main__":
    run(main)
