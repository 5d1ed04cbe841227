"""Every network of the generators in plain PyTorch: SDXL's UNet, ControlNet, VAE, CLIP and its tokenizer.

A UNet reads a noisy picture and predicts the clean one, or the noise. The TIME (how noisy it is) enters every
residual block; the CAPTION enters every transformer block, by cross-attention, and, as one pooled vector, the
time embedding. A ControlNet is a trainable copy of the UNet's left half that also sees a colour map. What it
finds passes zero convolutions, which give zeros until they are trained, and is added to the UNet's skip
connections and middle:

    UNet        x --> conv_in --> down blocks --> mid block --(+)--> up blocks --> conv_out --> prediction
                         |             |                       ^         ^
                         +--- skips ---+--------------(+)------|---------+
                                                       ^       |
                                                  zero convs   zero conv
                                                       ^       ^
                         +--- skips ---+---------------+       |
                         |             |                       |
    ControlNet  x --> conv_in + map --> down blocks --> mid block

Small models work on patches of pixels and end in a head at full resolution, to which the ControlNet adds too
(`UNet.refine`).

Attribute names are the key names of the public checkpoints: official weights load with a strict
`load_state_dict`, and ours open in the public libraries. The small models of the built-in data are the same
classes with other arguments: see PRESETS. A context need not be text. A model of ten classes is three lines:

    unet = UNet(**PRESETS["tiny"]["unet"] | dict(projection_class_embeddings_input_dim=None))
    label = nn.Embedding(10, 128)
    prediction = unet(x, t, label(y)[:, None])          # x (B, 3, H, W), t (B,), y (B,) -> (B, 3, H, W)

Paper: SDXL (2307.01952), ControlNet (2302.05543), CLIP (2103.00020), LoRA (2106.09685); SegGen (2311.03355)
       fine-tunes SDXL.
Differs: small models have patches and a head, and read hashed words, not tokens of a vocabulary. Public
       ControlNets of other depths than SDXL's are refused.
Reads: folders in the public layout (config.json, safetensors, a tokenizer's files).  Writes: nothing.
Needs: no sibling file.

    python unet.py                  # the sizes and shapes of every preset

Dimension key: B batch, C channels, H W pixels or latents, N pixels of a grid, L caption tokens, D width, d
width of a head, T width of the time embedding, P width of the pooled caption (one vector a caption)
"""
import functools
import inspect
import json
import math
import pathlib
import re
import unicodedata
import zlib

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils.checkpoint import checkpoint

PRESETS = {
    "tiny": {       # 64 x 64 pixels: 16 x 16 patches at width 96, then 8 x 8 at width 128 with the caption
        "unet": dict(in_channels=3, out_channels=3, block_out_channels=(96, 128), layers_per_block=1,
                     down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                     transformer_layers_per_block=(0, 2), attention_head_dim=(3, 4),
                     cross_attention_dim=128, addition_time_embed_dim=16,
                     projection_class_embeddings_input_dim=128 + 6 * 16, norm_num_groups=16,
                     patch_size=4, head_channels=32),
        # Mask2Img gives the ControlNet a channel per code instead of 3 colours.
        "controlnet": dict(conditioning_channels=3, conditioning_embedding_out_channels=(16, 32, 96)),
        "text": dict(width=128, layers=2, heads=4, length=48, rows=512),
    },
    "sdxl": {       # the arguments' defaults are SDXL's
        "unet": {}, "controlnet": {}, "vae": {}, "text_encoder": {},
        "text_encoder_2": dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32,
                               num_attention_heads=20, hidden_act="gelu", projection_dim=1280,
                               projection=True),
    },
}


# ---- parts -------------------------------------------------------------------------------------------------

def arguments(scope):
    """The arguments of a constructor, from its locals()."""
    return {name: value for name, value in scope.items() if name not in ("self", "__class__")}


def zero(module):
    """The module with all its parameters set to zero: it adds nothing until it is trained."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def conv3x3(in_channels, out_channels):
    return nn.Conv2d(in_channels, out_channels, 3, padding=1)


def fourier(x, dim):
    """(N,) numbers -> (N, dim): cosines, then sines, at dim / 2 frequencies from 1 to about 1e-4, fp32.

    A linear layer cannot tell 801 from 802 in one large number; in waves of many lengths it can."""
    frequency = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=x.device) / (dim // 2))
    angle = x.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def attend(q, k, v, heads, **mask):
    """Queries (B, N, D), keys and values (B, L, D) -> (B, N, D): each query's mean of the values, by head."""
    q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=heads) for t in (q, k, v))
    x = F.scaled_dot_product_attention(q, k, v, **mask)  # (B, heads, N, d)
    return rearrange(x, "b h n d -> b n (h d)")


class TimestepEmbedding(nn.Module):
    """Two linear layers: (B, dim) Fourier features -> (B, T)."""

    def __init__(self, dim, width):
        super().__init__()
        self.linear_1 = nn.Linear(dim, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x):
        x = x.to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(x)))


class ResnetBlock(nn.Module):
    """(B, in_channels, H, W) -> (B, out_channels, H, W); the time is added between the two convolutions.

    The VAE has no time (time_dim None), and its norms have another eps."""

    def __init__(self, in_channels, out_channels, groups, time_dim=None):
        super().__init__()
        eps = 1e-5 if time_dim else 1e-6
        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = conv3x3(in_channels, out_channels)
        self.time_emb_proj = nn.Linear(time_dim, out_channels) if time_dim else None
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.conv2 = zero(conv3x3(out_channels, out_channels))  # the residual branch starts at zero
        self.conv_shortcut = nn.Identity()
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x, time=None):
        h = self.conv1(F.silu(self.norm1(x)))  # (B, C, H, W)
        if time is not None:
            # Here the time enters.
            h = h + self.time_emb_proj(F.silu(time))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + self.conv_shortcut(x)


class Attention(nn.Module):
    """Attention of (B, N, D) to a context (B, L, context_dim); self-attention where both are the same."""

    def __init__(self, dim, heads, context_dim, bias=False):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=bias)
        self.to_k = nn.Linear(context_dim, dim, bias=bias)
        self.to_v = nn.Linear(context_dim, dim, bias=bias)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))  # its key is to_out.0

    def forward(self, x, context):
        h = attend(self.to_q(x), self.to_k(context), self.to_v(context), self.heads)
        return self.to_out(h)  # (B, N, D)


class GEGLU(nn.Module):
    """(B, N, D) -> (B, N, width): half of a linear layer gates the other half."""

    def __init__(self, dim, width):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * width)

    def forward(self, x):
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class TransformerBlock(nn.Module):
    """Self-attention, attention to the caption (unless context_dim is None), feed-forward."""

    def __init__(self, dim, heads, context_dim):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, heads, dim)
        self.attn2 = None
        if context_dim is not None:
            self.norm2 = nn.LayerNorm(dim)
            self.attn2 = Attention(dim, heads, context_dim)
        self.norm3 = nn.LayerNorm(dim)
        dropout = nn.Identity()  # the public net has one here, of rate 0: the next key is net.2
        self.ff = nn.ModuleDict({"net": nn.Sequential(GEGLU(dim, 4 * dim), dropout, nn.Linear(4 * dim, dim))})

    def forward(self, x, context):
        """x (B, N, D), context (B, L, context_dim) -> (B, N, D)."""
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        if self.attn2 is not None:
            # Here the caption enters.
            x = x + self.attn2(self.norm2(x), context)
        return x + self.ff["net"](self.norm3(x))


BLOCKS = ResnetBlock, TransformerBlock  # what the networks repeat, for checkpointing and torch.compile


class Transformer(nn.Module):
    """`depth` transformer blocks over the pixels of (B, C, H, W)."""

    def __init__(self, channels, groups, depth, heads, context_dim):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, heads, context_dim) for _ in range(depth))
        self.proj_out = zero(nn.Linear(channels, channels))  # the residual branch starts at zero

    def forward(self, x, context):
        h = rearrange(self.norm(x), "b c h w -> b (h w) c")  # (B, N, C)
        h = self.proj_in(h)
        for block in self.transformer_blocks:
            h = block(h, context)
        return x + rearrange(self.proj_out(h), "b (h w) c -> b c h w", h=x.shape[2])


class Downsample(nn.Module):
    """Halves H and W. The UNet pads on all sides (padding=1), the VAE right and below only (padding=0)."""

    def __init__(self, channels, padding):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x):
        return self.conv(x if self.conv.padding[0] else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest neighbour to `size` (an odd grid has no exact half), then a convolution."""

    def __init__(self, channels):
        super().__init__()
        self.conv = conv3x3(channels, channels)

    def forward(self, x, size):
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


# ---- blocks: what runs at one resolution -------------------------------------------------------------------

class Block(nn.Module):
    """Residual blocks and, where depth > 0, transformers.

    in_channels    of each residual block: a list
    out_channels   of every part
    attentions     how many transformers
    groups         of the group norms
    time_dim       T; None: no time
    depth, heads, context_dim   of each transformer; depth 0: no transformers"""

    def __init__(self, in_channels, out_channels, attentions, groups, time_dim=None, depth=0, heads=1,
                 context_dim=None):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(c, out_channels, groups, time_dim) for c in in_channels)
        count = attentions if depth else 0
        self.attentions = nn.ModuleList(
            Transformer(out_channels, groups, depth, heads, context_dim) for _ in range(count))


class DownBlock(Block):
    """`layers` residual blocks, each with a transformer, then half the resolution. options: Block's."""

    def __init__(self, in_channels, out_channels, layers, downsample, padding=1, **options):
        inputs = [in_channels] + [out_channels] * (layers - 1)
        super().__init__(inputs, out_channels, attentions=layers, **options)
        self.downsamplers = nn.ModuleList([Downsample(out_channels, padding)] if downsample else [])

    def forward(self, x, time=None, context=None):
        """-> the output, and the skips: one for each layer, one for the downsampler."""
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, time)
            if self.attentions:
                x = self.attentions[i](x, context)
            skips.append(x)
        for downsampler in self.downsamplers:
            x = downsampler(x)  # (B, C, H / 2, W / 2)
            skips.append(x)
        return x, skips


class MidBlock(Block):
    """Residual block, transformer, residual block, all of the same width. options: Block's."""

    def __init__(self, channels, **options):
        super().__init__([channels, channels], channels, attentions=1, **options)

    def forward(self, x, time=None, context=None):
        x = self.resnets[0](x, time)
        for attention in self.attentions:
            x = attention(x, context)
        return self.resnets[1](x, time)


class UpBlock(Block):
    """A residual block for each skip, which it reads beside its input; then twice the resolution.

    skip_channels: the width of each skip; 0 where there is none, in the VAE. options: Block's."""

    def __init__(self, in_channels, out_channels, skip_channels, upsample, **options):
        inputs = [in_channels] + [out_channels] * (len(skip_channels) - 1)
        inputs = [channels + skip for channels, skip in zip(inputs, skip_channels)]
        super().__init__(inputs, out_channels, attentions=len(inputs), **options)
        self.upsamplers = nn.ModuleList([Upsample(out_channels)] if upsample else [])

    def forward(self, x, time=None, context=None, skips=None):
        """Removes its skips from the end of the list `skips`: the last one written is the first one read."""
        for i, resnet in enumerate(self.resnets):
            if skips:
                x = torch.cat([x, skips.pop()], dim=1)  # (B, C + C of the skip, H, W)
            x = resnet(x, time)                         # (B, C, H, W)
            if self.attentions:
                x = self.attentions[i](x, context)
        for upsampler in self.upsamplers:
            size = skips[-1].shape[-2:] if skips else (2 * x.shape[2], 2 * x.shape[3])
            x = upsampler(x, size)                      # (B, C, 2 H, 2 W)
        return x


# ---- UNet and ControlNet -----------------------------------------------------------------------------------

class Encoder(nn.Module):
    """The half that UNet and ControlNet share: time embedding, down blocks, middle block.

    in_channels                   of x: 4 latents, or 3 colours
    block_out_channels            width of each level; each level halves H and W, the last does not
    layers_per_block              residual blocks of a level on the way down (one more on the way up)
    down_block_types              of each level: "CrossAttnDownBlock2D" has transformers, "DownBlock2D" none
    transformer_layers_per_block  depth of each level's transformers; the last is the middle block's too
    attention_head_dim            the NUMBER of heads of each level, not their width: the public name is a
                                  known mistake, kept because it stands in the config files
    cross_attention_dim           width D of the context; None: transformers have self-attention only
    addition_time_embed_dim       width of the Fourier features of each of the six time_ids
    projection_class_embeddings_input_dim   P + 6 * addition_time_embed_dim; None: no pooled, no time_ids
    norm_num_groups               groups of the group norms: a divisor of every width
    patch_size                    p of "patchify": each p x p square of pixels becomes one position with p * p
                                  times the channels. It loses nothing and saves p * p times the positions
    head_channels                 width of the full-resolution head (see UNet.refine); 0: no head

    Raises ValueError for other down blocks."""

    def __init__(self, in_channels=4, block_out_channels=(320, 640, 1280), layers_per_block=2,
                 down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                 transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20),
                 cross_attention_dim=2048, addition_time_embed_dim=256,
                 projection_class_embeddings_input_dim=2816, norm_num_groups=32, patch_size=1,
                 head_channels=0):
        super().__init__()
        self.config = arguments(locals())
        if not set(down_block_types) <= {"DownBlock2D", "CrossAttnDownBlock2D"}:
            raise ValueError(f"down_block_types {down_block_types}: use DownBlock2D or CrossAttnDownBlock2D.")
        widths, time_dim = block_out_channels, 4 * block_out_channels[0]
        self.conv_in = conv3x3(in_channels * patch_size ** 2, widths[0])
        self.time_embedding = TimestepEmbedding(widths[0], time_dim)
        added = projection_class_embeddings_input_dim
        self.add_embedding = TimestepEmbedding(added, time_dim) if added else None
        self.down_blocks = nn.ModuleList()
        self.skip_channels = [widths[0]]  # of every skip, in the order of `encode`
        for i, width in enumerate(widths):
            downsample = i < len(widths) - 1
            self.down_blocks.append(DownBlock(
                widths[max(i - 1, 0)], width, layers_per_block, downsample, **self.block_options(i)))
            self.skip_channels += [width] * (layers_per_block + downsample)
        middle = self.block_options(-1) | dict(depth=transformer_layers_per_block[-1])
        self.mid_block = MidBlock(widths[-1], **middle)

    def public_config(self):
        """The dict to write as config.json: with it the public library opens our state dict.

        Only for networks without patches and head: the public library has neither."""
        config = required_values(type(self), self.config) | self.config
        return {key: value for key, value in config.items() if key not in OWN_ARGUMENTS}

    def block_options(self, i):
        """The keywords of Block for level i."""
        c = self.config
        has_attention = c["down_block_types"][i] == "CrossAttnDownBlock2D"
        depth = c["transformer_layers_per_block"][i] if has_attention else 0
        return dict(groups=c["norm_num_groups"], time_dim=4 * c["block_out_channels"][0], depth=depth,
                    heads=c["attention_head_dim"][i], context_dim=c["cross_attention_dim"])

    def enable_checkpointing(self):
        """Gradient checkpointing, less memory for a third more time: residual and transformer blocks keep
        only their inputs, and run again in backward. Returns self."""
        for module in self.modules():
            if isinstance(module, BLOCKS):
                module.forward = functools.partial(
                    checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False)
        return self

    def embed(self, t, pooled=None, time_ids=None):
        """t (B,), pooled (B, P), time_ids (B, 6) -> (B, T): what every residual block adds to its channels.

        time_ids are SDXL's micro-conditioning, six numbers in pixels: original H and W, top and left of the
        crop, target H and W. SDXL trains on small and cropped pictures too. With these numbers as an input
        it learns what blur and cuts come from, and (H, W, 0, 0, H, W) asks for a sharp, uncropped one."""
        time = fourier(t, self.config["block_out_channels"][0])  # (B, C)
        time = self.time_embedding(time)                         # (B, T)
        if self.add_embedding is None:
            return time
        sizes = fourier(time_ids.flatten(), self.config["addition_time_embed_dim"])
        sizes = sizes.reshape(len(pooled), -1).to(pooled.dtype)  # (B, 6 dim)
        # Here the caption enters a second time, as one vector.
        return time + self.add_embedding(torch.cat([pooled, sizes], dim=1))

    def encode(self, x, time, context):
        """x (B, C, H, W) after conv_in -> the middle block's output and the list of skips."""
        skips = [x]
        for block in self.down_blocks:
            x, more = block(x, time, context)
            skips += more
        return self.mid_block(x, time, context), skips


class UNet(Encoder):
    """The denoiser. Arguments: out_channels, and Encoder's."""

    def __init__(self, out_channels=4, **encoder):
        super().__init__(**encoder)
        self.config["out_channels"] = out_channels
        c = self.config
        widths, patch, head_channels = c["block_out_channels"], c["patch_size"], c["head_channels"]
        self.up_blocks = nn.ModuleList()
        skips, below = list(self.skip_channels), widths[-1]
        for i in reversed(range(len(widths))):
            own = [skips.pop() for _ in range(c["layers_per_block"] + 1)]
            self.up_blocks.append(UpBlock(below, widths[i], own, upsample=i > 0, **self.block_options(i)))
            below = widths[i]
        self.conv_norm_out = nn.GroupNorm(c["norm_num_groups"], widths[0], 1e-5)
        self.conv_out = conv3x3(widths[0], (head_channels or out_channels) * patch ** 2)
        if head_channels:
            self.head = nn.ModuleList([
                conv3x3(head_channels + c["in_channels"], head_channels),
                conv3x3(head_channels, head_channels),
                conv3x3(head_channels, out_channels)])
            self.head_time = zero(nn.Linear(4 * widths[0], 2 * head_channels))

    def forward(self, x, t, context=None, pooled=None, time_ids=None, residuals=None):
        """-> (B, out_channels, H, W): the noise or the clean picture, as the schedule has it.

        x          (B, in_channels, H, W), the noisy picture or latents
        t          (B,), the time, from 0 to 999, also between two steps
        context    (B, L, D), a vector for each token of the caption, if cross_attention_dim is given
        pooled     (B, P), one vector for the caption, and
        time_ids   (B, 6), see `embed`: both if projection_class_embeddings_input_dim is given
        residuals  what a ControlNet returns"""
        patch = self.config["patch_size"]
        x = x.to(self.conv_in.weight.dtype)                     # bf16 weights need no autocast
        time = self.embed(t, pooled, time_ids)                  # (B, T)
        h = F.pixel_unshuffle(x, patch)                         # (B, C p p, H / p, W / p)
        h, skips = self.encode(self.conv_in(h), time, context)  # (B, C, h, w)
        fine = None
        if residuals is not None:
            # Here a ControlNet adds to the UNet.
            down, middle, fine = residuals
            skips = [skip + residual for skip, residual in zip(skips, down, strict=True)]
            h = h + middle
        for block in self.up_blocks:
            h = block(h, time, context, skips)
        h = self.conv_out(F.silu(self.conv_norm_out(h)))        # (B, C p p, H / p, W / p)
        h = F.pixel_shuffle(h, patch)                           # (B, C, H, W)
        if self.config["head_channels"]:
            h = self.refine(h, x, time, fine)                   # (B, out_channels, H, W)
        return h

    def refine(self, h, x, time, fine=None):
        """The full-resolution head. All p x p pixels of a patch come from one vector, which blurs edges; so
        the last three convolutions see the features h (B, head_channels, H, W), the noisy input x and a
        ControlNet's `fine` residual at full resolution. The time scales and shifts their channels: a nearly
        clean input is passed on, a noisy one is not."""
        h = self.head[0](torch.cat([h, x], dim=1))  # (B, head_channels, H, W)
        scale, shift = self.head_time(F.silu(time))[:, :, None, None].chunk(2, dim=1)
        h = h * (1 + scale) + shift
        if fine is not None:
            h = h + fine
        h = self.head[1](F.silu(h))
        return self.head[2](F.silu(h))              # (B, out_channels, H, W)


def zero_conv(channels):
    """ControlNet's zero convolution. Its output is zero at first, so training starts from an undisturbed
    UNet. Its gradient is not (it is the input times the output's gradient), so it learns from step one."""
    return zero(nn.Conv2d(channels, channels, 1))


class ConditioningEmbedding(nn.Module):
    """A mask (B, in_channels, H, W) in [0, 1] -> (B, C, h, w), the UNet's grid.

    Each width but the first halves it: a UNet of patches or latents 2^n pixels wide needs n + 1 widths."""

    def __init__(self, in_channels, widths, out_channels):
        super().__init__()
        self.conv_in = conv3x3(in_channels, widths[0])
        self.blocks = nn.ModuleList()
        for i, o in zip(widths, widths[1:]):
            self.blocks += [conv3x3(i, i), nn.Conv2d(i, o, 3, padding=1, stride=2)]
        self.conv_out = zero(conv3x3(widths[-1], out_channels))

    def forward(self, x):
        x = F.silu(self.conv_in(x))
        for block in self.blocks:
            x = F.silu(block(x))
        return self.conv_out(x)


class ControlNet(Encoder):
    """A copy of a UNet's encoder that sees a mask; its zero convolutions add nothing until trained.

    conditioning_channels                 of the mask: 3 for a colour map
    conditioning_embedding_out_channels   widths of ConditioningEmbedding
    and Encoder's arguments"""

    def __init__(self, conditioning_channels=3, conditioning_embedding_out_channels=(16, 32, 96, 256),
                 **encoder):
        super().__init__(**encoder)
        self.config["conditioning_channels"] = conditioning_channels
        self.config["conditioning_embedding_out_channels"] = conditioning_embedding_out_channels
        widths, head_channels = self.config["block_out_channels"], self.config["head_channels"]
        self.controlnet_cond_embedding = ConditioningEmbedding(
            conditioning_channels, conditioning_embedding_out_channels, widths[0])
        self.controlnet_down_blocks = nn.ModuleList(zero_conv(width) for width in self.skip_channels)
        self.controlnet_mid_block = zero_conv(widths[-1])
        if head_channels:
            self.controlnet_head = nn.Sequential(
                conv3x3(conditioning_channels, head_channels), nn.SiLU(),
                conv3x3(head_channels, head_channels), nn.SiLU(),
                zero_conv(head_channels))

    @classmethod
    def from_unet(cls, unet, **own):
        """A ControlNet for `unet` that starts as a copy of its encoder. own: ControlNet's own arguments."""
        config = {key: value for key, value in unet.config.items() if key != "out_channels"}
        net = cls(**config | own)
        net.load_state_dict(unet.state_dict(), strict=False)  # not strict: each has parts of its own
        return net

    def forward(self, x, t, context=None, pooled=None, time_ids=None, cond=None, scale=1.0):
        """As UNet's; cond: the mask (B, conditioning_channels, H, W) in [0, 1] at the picture's full size ->
        residuals for the UNet: (one for each skip, one for the middle, one for the head or None), all times
        `scale`."""
        dtype = self.conv_in.weight.dtype
        x, cond = x.to(dtype), cond.to(dtype)
        time = self.embed(t, pooled, time_ids)        # (B, T)
        h = self.conv_in(F.pixel_unshuffle(x, self.config["patch_size"]))
        h = h + self.controlnet_cond_embedding(cond)  # (B, C, h, w)
        h, skips = self.encode(h, time, context)
        down = [conv(skip) * scale for conv, skip in zip(self.controlnet_down_blocks, skips)]
        middle = self.controlnet_mid_block(h) * scale
        fine = self.controlnet_head(cond) * scale if self.config["head_channels"] else None
        return down, middle, fine


# ---- LoRA --------------------------------------------------------------------------------------------------

LORA_LAYERS = ".to_q", ".to_k", ".to_v", ".to_out.0"  # those of diffusers' training scripts


class LoRALinear(nn.Linear):
    """A linear layer W with a low-rank addition: x -> W x + B A x, A (rank, in), B (out, rank).

    B starts at zero: nothing is added until it is trained. A starts as every nn.Linear does, and as peft's:
    kaiming uniform, a = sqrt(5). There is no scale, as with peft's lora_alpha equal to the rank. Beside a
    bf16 W, A and B may be fp32, under autocast."""

    def __init__(self, linear, rank):
        bias = linear.bias is not None
        super().__init__(linear.in_features, linear.out_features, bias, device="meta")  # no second copy
        self.weight, self.bias = linear.weight, linear.bias
        device = linear.weight.device
        self.lora_A = nn.Linear(linear.in_features, rank, bias=False).to(device)
        self.lora_B = zero(nn.Linear(rank, linear.out_features, bias=False)).to(device)

    def forward(self, x):
        return super().forward(x) + self.lora_B(self.lora_A(x))


def add_lora(net, rank):
    """LoRA (2106.09685): freeze a UNet and add trainable fp32 matrices of that rank beside the linear layers
    of its attentions -> the UNet.

    Its own weights keep their keys. Its output stays the same until the matrices are trained."""
    net.requires_grad_(False)
    for name, layer in list(net.named_modules()):
        if name.endswith(LORA_LAYERS):
            net.set_submodule(name, LoRALinear(layer, rank))
    return net


def lora_matrices(net):
    """The matrices of a UNet after `add_lora`, as a module of their own that shares them.

    Its state dict is the content of a public file: unet.LAYER.lora_A.weight (rank, in) and
    unet.LAYER.lora_B.weight (out, rank)."""
    matrices = nn.Module()
    for name, layer in net.named_modules():
        if isinstance(layer, LoRALinear):
            node = matrices
            for key in f"unet.{name}".split("."):
                if not hasattr(node, key):
                    node.add_module(key, nn.Module())
                node = getattr(node, key)
            node.lora_A, node.lora_B = layer.lora_A, layer.lora_B
    return matrices


# ---- text of the small models ------------------------------------------------------------------------------

class TextLayer(nn.Module):
    """Self-attention and feed-forward over the words of a caption."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x, mask):
        """x (B, L, D), mask (B, 1, 1, L): the words to attend to -> (B, L, D)."""
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)  # (B, L, D) each
        x = x + self.out(attend(q, k, v, self.heads, attn_mask=mask))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class TextEncoder(nn.Module):
    """A small transformer over the words of a caption: no vocabulary, any language (see `caption_words`).

    Hashed words: a token is a hash of a word (0: padding) and picks two rows of one table, whose sum stands
    for the word. Two words may share one row and still differ; they share both about once in rows**2 / 2.

    An empty caption is all padding and gives zeros. That is the null condition: training replaces some
    captions by it, so that one network also learns to predict without a caption, as guidance needs."""

    def __init__(self, width=128, layers=2, heads=4, length=48, rows=512):
        super().__init__()
        self.config = dict(width=width, layers=layers, heads=heads, length=length, rows=rows)
        self.token = nn.Embedding(rows, width)
        self.position = nn.Parameter(0.02 * torch.randn(length, width))
        self.layers = nn.ModuleList(TextLayer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.pool = nn.Linear(width, width, bias=False)

    def tokenize(self, captions):
        """B captions -> (B, length) long on the CPU; words that do not fit are left out."""
        tokens = torch.zeros(len(captions), self.config["length"], dtype=torch.long)
        for row, caption in zip(tokens, captions):
            words = caption_words(caption)[:len(row)]
            hashes = [zlib.crc32(word.encode()) + 1 for word in words]  # Python's own hash is salted
            row[:len(words)] = torch.tensor(hashes)
        return tokens

    def forward(self, tokens):
        """(B, L) -> context (B, L, D), zero at padding: cross-attention needs no mask; and pooled (B, D)."""
        rows = self.config["rows"]
        real = tokens > 0                      # (B, L)
        # An empty caption attends to all its padding: attention to nothing would be NaN.
        mask = real | ~real.any(1, keepdim=True)
        x = self.token(tokens % rows) + self.token(tokens // rows % rows) + self.position
        for layer in self.layers:
            x = layer(x, mask[:, None, None])  # (B, L, D)
        x = self.norm(x) * real[..., None]
        mean = x.sum(1) / real.sum(1, keepdim=True).clamp(min=1)
        return x, self.pool(mean)


def caption_words(caption):
    """A caption's words in lower case: runs of letters and digits with their accents, single signs, and
    single Chinese, Japanese or Korean characters, between which there are no blanks."""
    return cut(unicodedata.normalize("NFC", caption.lower()), character_kind, re.compile("a+|!"))


def cut(text, kind, pattern):
    """The pieces of a text whose kinds of characters, kind(c) of each, match a regular expression."""
    kinds = "".join(kind(c) for c in text)  # as long as the text
    return [text[match.start():match.end()] for match in pattern.finditer(kinds)]


def character_kind(c):
    """A character -> `a` where it makes words with its neighbours, `!` where it stands alone, or a blank."""
    if c.isspace():
        return " "
    if unicodedata.east_asian_width(c) in "WF":
        return "!"
    return "a" if c == "_" or unicodedata.category(c)[0] in "LMN" else "!"  # letters, marks, numbers


# ---- VAE ---------------------------------------------------------------------------------------------------

class PixelAttention(Attention):
    """One head of self-attention over the pixels of (B, C, H, W)."""

    def __init__(self, channels, groups):
        super().__init__(channels, heads=1, context_dim=channels, bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)

    def forward(self, x, context=None):  # context: MidBlock gives one, unused
        h = rearrange(self.group_norm(x), "b c h w -> b (h w) c")  # (B, N, C)
        h = super().forward(h, h)
        return x + rearrange(h, "b (h w) c -> b c h w", h=x.shape[2])


class VAEMidBlock(MidBlock):
    """A MidBlock whose attention is the VAE's; MidBlock's own, of depth 0, is none."""

    def __init__(self, channels, groups):
        super().__init__(channels, groups=groups)
        self.attentions.append(PixelAttention(channels, groups))


class VAEEncoder(nn.Module):
    """(B, in_channels, H, W) -> (B, 2 * latent_channels, h, w): mean and log variance."""

    def __init__(self, in_channels, latent_channels, widths, layers, groups):
        super().__init__()
        self.conv_in = conv3x3(in_channels, widths[0])
        self.down_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            downsample = i < len(widths) - 1
            self.down_blocks.append(DownBlock(
                widths[max(i - 1, 0)], width, layers, downsample, padding=0, groups=groups))
        self.mid_block = VAEMidBlock(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = conv3x3(widths[-1], 2 * latent_channels)

    def forward(self, x):
        x = self.conv_in(x)
        for block in self.down_blocks:
            x, _ = block(x)  # the skips are not kept
        x = self.mid_block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VAEDecoder(nn.Module):
    """(B, latent_channels, h, w) -> (B, out_channels, H, W)."""

    def __init__(self, out_channels, latent_channels, widths, layers, groups):
        super().__init__()
        self.conv_in = conv3x3(latent_channels, widths[-1])
        self.mid_block = VAEMidBlock(widths[-1], groups)
        self.up_blocks = nn.ModuleList()
        below = widths[-1]
        for i in reversed(range(len(widths))):
            no_skips = [0] * (layers + 1)
            self.up_blocks.append(UpBlock(below, widths[i], no_skips, upsample=i > 0, groups=groups))
            below = widths[i]
        self.conv_norm_out = nn.GroupNorm(groups, widths[0], eps=1e-6)
        self.conv_out = conv3x3(widths[0], out_channels)

    def forward(self, z):
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VAE(nn.Module):
    """SDXL's autoencoder: pictures (B, 3, H, W) in [-1, 1] <-> latents (B, 4, H / 8, W / 8).

    scaling_factor brings the latents to a standard deviation of about 1, as diffusion expects. Pictures go
    through it `slices` at a time, whatever the batch, to save memory. It overflows in fp16."""

    def __init__(self, in_channels=3, out_channels=3, latent_channels=4,
                 block_out_channels=(128, 256, 512, 512), layers_per_block=2, norm_num_groups=32,
                 scaling_factor=0.13025):
        super().__init__()
        self.config = arguments(locals())
        self.factor = 2 ** (len(block_out_channels) - 1)  # pixels a latent, each way
        shape = latent_channels, block_out_channels, layers_per_block, norm_num_groups
        self.encoder = VAEEncoder(in_channels, *shape)
        self.decoder = VAEDecoder(out_channels, *shape)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)

    def encode(self, x, slices=4):
        """(B, 3, H, W) in [-1, 1] -> a sample of the latents (B, 4, h, w), times the scaling factor."""
        h = torch.cat([self.quant_conv(self.encoder(part)) for part in x.split(slices)])
        mean, logvar = h.chunk(2, dim=1)  # (B, 4, h, w) each
        std = (logvar.clamp(-30, 20) / 2).exp()
        return (mean + std * torch.randn_like(mean)) * self.config["scaling_factor"]

    def decode(self, z, slices=4):
        """Scaled latents -> (B, 3, H, W), about [-1, 1]."""
        z = z / self.config["scaling_factor"]
        return torch.cat([self.decoder(self.post_quant_conv(part)) for part in z.split(slices)])


# ---- CLIP --------------------------------------------------------------------------------------------------

def quick_gelu(x):
    """The approximation of GELU that OpenAI's CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"gelu": F.gelu, "quick_gelu": quick_gelu}


class CLIPLayer(nn.Module):
    """Causal self-attention (a token sees itself and those before it) and feed-forward over (B, L, D)."""

    def __init__(self, width, inner, heads, activation, eps):
        super().__init__()
        self.heads = heads
        self.activation = ACTIVATIONS[activation]
        self.layer_norm1 = nn.LayerNorm(width, eps)
        names = "q_proj", "k_proj", "v_proj", "out_proj"
        self.self_attn = nn.ModuleDict({name: nn.Linear(width, width) for name in names})
        self.layer_norm2 = nn.LayerNorm(width, eps)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, inner), "fc2": nn.Linear(inner, width)})

    def forward(self, x):
        h = self.layer_norm1(x)
        q, k, v = (self.self_attn[name](h) for name in ("q_proj", "k_proj", "v_proj"))
        h = attend(q, k, v, self.heads, is_causal=True)
        x = x + self.self_attn["out_proj"](h)
        h = self.mlp["fc1"](self.layer_norm2(x))
        return x + self.mlp["fc2"](self.activation(h))


class CLIPText(nn.Module):
    """One of SDXL's text encoders. SDXL reads the layer before the last, and the second's pooled vector.

    Arguments: the keys of the public config.json; projection: whether the pooled vector is projected to
    projection_dim (the second encoder)."""

    def __init__(self, vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                 num_attention_heads=12, max_position_embeddings=77, hidden_act="quick_gelu",
                 layer_norm_eps=1e-5, eos_token_id=2, projection_dim=768, projection=False):
        super().__init__()
        self.config = arguments(locals())
        if hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act {hidden_act!r}: use one of {', '.join(ACTIVATIONS)}.")
        layers = [CLIPLayer(hidden_size, intermediate_size, num_attention_heads, hidden_act, layer_norm_eps)
                  for _ in range(num_hidden_layers)]
        self.text_model = nn.ModuleDict({
            "embeddings": nn.ModuleDict({
                "token_embedding": nn.Embedding(vocab_size, hidden_size),
                "position_embedding": nn.Embedding(max_position_embeddings, hidden_size)}),
            "encoder": nn.ModuleDict({"layers": nn.ModuleList(layers)}),
            "final_layer_norm": nn.LayerNorm(hidden_size, layer_norm_eps)})
        self.text_projection = nn.Identity()
        if projection:
            self.text_projection = nn.Linear(hidden_size, projection_dim, bias=False)
        self.register_load_state_dict_pre_hook(rename_clip_keys)

    def forward(self, tokens):
        """(B, L) long -> context (B, L, D) of the layer before the last, pooled (B, projection_dim or D).

        Pooled is the vector of the first end token: attention is causal, so it is the first that has seen
        every word. Official config files name token 2 as the end, a known mistake: the end token is the
        vocabulary's largest id. Of several largest values, argmax gives the first."""
        part = self.text_model
        x = part["embeddings"]["token_embedding"](tokens)  # (B, L, D)
        x = x + part["embeddings"]["position_embedding"].weight[:tokens.shape[1]]
        for layer in part["encoder"]["layers"]:
            context, x = x, layer(x)                       # (B, L, D) each: before and after a layer
        eos = self.config["eos_token_id"]
        is_end = tokens if eos == 2 else (tokens == eos).int()
        end = is_end.argmax(1)                             # (B,)
        pooled = x[torch.arange(len(x), device=x.device), end]
        return context, self.text_projection(part["final_layer_norm"](pooled))


def rename_clip_keys(model, state, *_):
    """Before loading: recent public files leave out `text_model.`, old ones hold a table of positions."""
    state.pop("text_model.embeddings.position_ids", None)
    for key in list(state):
        if key.startswith(("embeddings.", "encoder.", "final_layer_norm.")):
            state[f"text_model.{key}"] = state.pop(key)


# ---- CLIP's tokenizer --------------------------------------------------------------------------------------

START, END = "<|startoftext|>", "<|endoftext|>"
# Unicode's White_Space: Python's \s has a few more.
SPACES = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
# CLIP's regular expression, over the classes of a text's characters: Python's `re` knows no \p{L} and \p{N}.
WORDS = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^ a-z0-9]+")


def character_class(c):
    """A lower-case character -> itself if ASCII, else `a` for any letter, `0` any number, `!` the rest."""
    return c if c < "\x80" else {"L": "a", "N": "0"}.get(unicodedata.category(c)[0], "!")


def split_words(text):
    """A text -> its words: lower case, every white space a blank, cut where CLIP's expression cuts."""
    text = unicodedata.normalize("NFC", text)
    text = re.sub(f"[{SPACES}]+", " ", text)
    text = "".join(c.lower() for c in text)  # one by one: Python lowers a final sigma in another way
    return cut(text, character_class, WORDS)


def byte_characters():
    """Byte -> the character that stands for it in a vocabulary: itself if printable, else one from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable}
    return characters | {byte: chr(256 + i) for i, byte in enumerate(others)}


def read_vocabulary(folder):
    """A tokenizer's folder -> (token -> id, the merges in order): from vocab.json and merges.txt, or from
    tokenizer.json, which recent versions write."""
    if (folder / "vocab.json").exists():
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        merges = [line.split() for line in lines if line and not line.startswith("#version")]
        return read_json(folder / "vocab.json"), merges
    model = read_json(folder / "tokenizer.json")["model"]
    return model["vocab"], [m.split() if isinstance(m, str) else m for m in model["merges"]]


def added_tokens(folder, config):
    """The tokens that a tokenizer's files add to its vocabulary, each version of the library in its way."""
    tokens = {entry["content"] for entry in config.get("added_tokens_decoder", {}).values()}
    if (folder / "added_tokens.json").exists():
        tokens |= read_json(folder / "added_tokens.json").keys()
    if (folder / "tokenizer.json").exists():
        tokens |= {entry["content"] for entry in read_json(folder / "tokenizer.json")["added_tokens"]}
    return tokens


class CLIPTokenizer:
    """CLIP's byte-pair encoding: a word starts as its bytes; then the pair of neighbours that comes first in
    the list of merges is joined, again and again, until no pair is in the list.

    Start, end and padding tokens that stand in a caption count as such, as in the public tokenizer (SDXL's
    second one pads with `!`). Raises ValueError if one of them is not in the vocabulary."""

    def __init__(self, folder, length=77):
        folder = pathlib.Path(folder)
        self.ids, merges = read_vocabulary(folder)
        config = read_json(folder / "tokenizer_config.json")
        pad = config.get("pad_token", END)
        special = {START, END, pad}
        if not special <= self.ids.keys():
            raise ValueError(f"{folder}: no {START}, {END} or {pad} in its vocabulary. Download it again.")
        if more := added_tokens(folder, config) - special:
            raise ValueError(f"{folder}: has the added tokens {', '.join(sorted(more))}. Give SDXL's own.")
        self.pad = self.ids[pad]
        self.special = re.compile("(" + "|".join(map(re.escape, special)) + ")")
        self.ranks = {tuple(pair): rank for rank, pair in enumerate(merges)}
        self.length = length
        self.bytes = byte_characters()

    def __call__(self, captions):
        """B captions -> (B, length) long: start, at most length - 2 tokens, end, padding."""
        rows = []
        for caption in captions:
            ids = self.encode(caption)[:self.length - 2]
            ids = [self.ids[START], *ids, self.ids[END]]
            rows.append(ids + [self.pad] * (self.length - len(ids)))
        return torch.tensor(rows)

    def encode(self, text):
        """A caption -> the list of its ids, without start and end."""
        ids = []
        for i, part in enumerate(self.special.split(text)):
            if i % 2:  # a special token; the text between them is at 0, 2, ...
                ids.append(self.ids[part])
            else:
                ids += [token for word in split_words(part) for token in self.merge(word)]
        return ids

    def merge(self, word):
        """The ids of a word."""
        parts = [self.bytes[byte] for byte in word.encode()]
        parts[-1] += "</w>"  # the end of a word
        while len(parts) > 1:
            ranks = [self.ranks.get(pair, math.inf) for pair in zip(parts, parts[1:])]
            if min(ranks) == math.inf:
                break
            i = ranks.index(min(ranks))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        return [self.ids[part] for part in parts]


class SDXLText(nn.Module):
    """SDXL's two frozen CLIP encoders and their tokenizers, with the interface of TextEncoder.

    An empty caption is all zeros, as tokens and as what they give: the null condition, the same in training
    and in sampling. The public pipeline does so for a negative prompt that is not given, but encodes ""."""

    def __init__(self, text_encoder, text_encoder_2, tokenizer, tokenizer_2):
        super().__init__()
        self.text_encoder = text_encoder
        self.text_encoder_2 = text_encoder_2
        self.tokenizers = tokenizer, tokenizer_2
        self.requires_grad_(False)

    @classmethod
    def from_folder(cls, folder, device="cpu", dtype=torch.float32):
        """From a folder of SDXL. Raises ValueError or OSError."""
        folder = pathlib.Path(folder)
        return cls(
            read_part(CLIPText, folder / "text_encoder", device, dtype),
            read_part(CLIPText, folder / "text_encoder_2", device, dtype),
            CLIPTokenizer(folder / "tokenizer"),
            CLIPTokenizer(folder / "tokenizer_2"))

    def tokenize(self, captions):
        """B captions -> (B, 2, 77) long on the CPU; an empty caption is all zeros."""
        tokens = torch.stack([tokenizer(captions) for tokenizer in self.tokenizers], dim=1)
        real = torch.tensor([bool(caption.strip()) for caption in captions])
        return tokens * real[:, None, None]

    @torch.no_grad()
    def forward(self, tokens):
        """(B, 2, 77) -> context (B, 77, D + D_2): the layers before the last; the second's pooled (B, P)."""
        first, _ = self.text_encoder(tokens[:, 0])          # (B, 77, D)
        second, pooled = self.text_encoder_2(tokens[:, 1])  # (B, 77, D_2), (B, P)
        real = tokens.flatten(1).any(1)                     # (B,): a caption has start and end
        context = torch.cat([first, second], dim=2)         # (B, 77, D + D_2)
        return context * real[:, None, None], pooled * real[:, None]


# ---- public folders ----------------------------------------------------------------------------------------

# What a public config.json must say: options that change what is computed, but no tensor's name or shape.
# All others show when the weights are loaded, strictly.
SHARED = {"act_fn": "silu", "addition_embed_type": "text_time", "flip_sin_to_cos": True, "freq_shift": 0,
          "norm_eps": 1e-5, "resnet_time_scale_shift": "default", "use_linear_projection": True}
REQUIRED = {
    "UNet": SHARED | {"_class_name": "UNet2DConditionModel", "time_embedding_type": "positional"},
    "ControlNet": SHARED | {"_class_name": "ControlNetModel"},
    "VAE": {"_class_name": "AutoencoderKL", "act_fn": "silu"},
    "CLIPText": {"model_type": "clip_text_model"},
}
OWN_ARGUMENTS = {"patch_size", "head_channels", "projection"}  # those with no public name


def required_values(cls, config):
    """REQUIRED, and for a UNet the up blocks that mirror its down blocks."""
    if cls is not UNet:
        return REQUIRED[cls.__name__]
    up = [kind.replace("Down", "Up") for kind in reversed(config.get("down_block_types", ()))]
    return REQUIRED["UNet"] | {"up_block_types": up}


def public_arguments(cls, config, where):
    """The constructor arguments in the dict of a public config.json. Raises ValueError, naming the key."""
    required = required_values(cls, config)
    # A UNet's arguments are its own and, through **encoder, Encoder's.
    signatures = [inspect.signature(c).parameters.values() for c in cls.__mro__]
    names = {p.name for s in signatures for p in s if p.default is not p.empty} - OWN_ARGUMENTS
    for key in sorted(names | required.keys()):
        value = config.get(key, "missing")
        if key not in config or value != required.get(key, value):
            raise ValueError(f"{where}: {key} is {value}. Give a {cls.__name__} of SDXL's kind.")
    found = {name: config[name] for name in names}
    if "CLIPTextModelWithProjection" in config.get("architectures", ()):
        found["projection"] = True
    return found


def read_json(path):
    """A JSON file -> what it holds. Raises ValueError, naming the path, or OSError."""
    try:
        return json.loads(pathlib.Path(path).read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file ({error}). Download it again.")


def weight_files(folder):
    """A part of a public folder -> its safetensors files: one or several shards, fp32 before fp16."""
    folder = pathlib.Path(folder)
    for variant in ("", ".fp16"):
        for name in ("diffusion_pytorch_model", "model"):
            path = folder / f"{name}{variant}.safetensors"
            index = folder / f"{name}.safetensors.index{variant}.json"
            if path.exists():
                return [path]
            if index.exists():
                shards = read_json(index)["weight_map"].values()
                return [folder / shard for shard in sorted(set(shards))]
    raise ValueError(f"{folder}: no weights as .safetensors. Download them (pickles are not read).")


def read_tensors(files, device="cpu", dtype=torch.float32):
    """safetensors files -> one dict of tensors, as `dtype`. Raises ValueError, naming the file."""
    state = {}
    for path in files:
        try:
            with safe_open(path, "pt", device=str(device)) as file:
                state |= {name: file.get_tensor(name).to(dtype) for name in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"{path}: {error}. Download it again.")
    return state


def load_weights(net, folder, device=None, dtype=None):
    """Gives a network the weights of a public folder, on the network's device and as its dtype unless others
    are given. Raises ValueError, naming the folder, if a key is missing or extra or has another shape."""
    first = next(net.parameters())
    state = read_tensors(weight_files(folder), device or first.device, dtype or first.dtype)
    try:
        net.load_state_dict(state, assign=True)      # the tensors as read: no second copy
    except RuntimeError as error:
        problem = str(error).split("\n")[1].strip()  # the first of torch's list
        raise ValueError(f"{folder}: not the weights of this {type(net).__name__}. {problem[:200]} "
                         "Give one of the same shape, or download it again.")


def read_part(cls, folder, device="cpu", dtype=torch.float32):
    """One part of a public folder -> the network with its weights, in eval mode.

    Raises ValueError if config.json or the weights are of another network or damaged, OSError if a file is
    missing."""
    path = pathlib.Path(folder) / "config.json"
    with torch.device("meta"):  # shapes without memory, until it is read
        net = cls(**public_arguments(cls, read_json(path), path))
    load_weights(net, folder, device, dtype)
    return net.eval()


def is_pipeline(folder):
    """Whether a folder is in the layout of the public pipelines: several networks, one folder each. Whether
    it is SDXL's is for `check_sdxl` to say."""
    folder = pathlib.Path(folder)
    return (folder / "model_index.json").exists() or (folder / "unet" / "config.json").exists()


def check_sdxl(folder):
    """Raises ValueError unless a folder holds every part of a StableDiffusionXLPipeline."""
    folder = pathlib.Path(folder)
    kind = read_json(folder / "model_index.json").get("_class_name")
    if kind != "StableDiffusionXLPipeline":
        raise ValueError(f"{folder}: it is a {kind}. Give a StableDiffusionXLPipeline, such as SDXL 1.0.")
    for part in ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"):
        if not (folder / part).is_dir():
            raise ValueError(f"{folder / part}: no such folder. Download this part of SDXL.")
    channels = read_json(folder / "unet" / "config.json").get("in_channels")
    latents = read_json(folder / "vae" / "config.json").get("latent_channels")
    if channels != latents:
        raise ValueError(f"{folder}: the UNet's in_channels is {channels}, the VAE's latent_channels is "
                         f"{latents}. Give a UNet for this VAE.")


# ---- the sizes and shapes of every preset ------------------------------------------------------------------

def build(preset):
    """The networks of a preset -> a dict by name."""
    own = PRESETS[preset]
    nets = {"unet": UNet(**own["unet"])}
    nets["controlnet"] = ControlNet.from_unet(nets["unet"], **own["controlnet"])
    if preset == "tiny":
        return nets | {"text": TextEncoder(**own["text"])}
    encoders = CLIPText(**own["text_encoder"]), CLIPText(**own["text_encoder_2"])
    return nets | {"text": SDXLText(*encoders, None, None), "vae": VAE(**own["vae"])}


def main():
    """Prints how many parameters every network of every preset has and where, and the shapes of one pass."""
    for preset, side, tokens in (("tiny", 64, (1, 48)), ("sdxl", 768, (1, 2, 77))):
        with torch.device("meta"), torch.no_grad():  # shapes without memory
            nets = build(preset)
            picture = torch.zeros(1, 3, side, side)
            x = nets["vae"].encode(picture) if "vae" in nets else picture
            context, pooled = nets["text"](torch.zeros(tokens, dtype=torch.long))
            inputs = x, torch.zeros(1), context, pooled, torch.zeros(1, 6)
            down, middle, _ = nets["controlnet"](*inputs, picture)
            prediction = nets["unet"](*inputs)
        shapes = dict(picture=picture, x=x, context=context, pooled=pooled, prediction=prediction)
        print(f"{preset}:", ", ".join(f"{name} {tuple(t.shape)}" for name, t in shapes.items()))
        print(f"    a ControlNet's residuals: {[tuple(t.shape) for t in (*down, middle)]}")
        for name, net in nets.items():
            for part, module in [("", net), *net.named_children()]:
                count = sum(p.numel() for p in module.parameters())
                print(f"    {name:12}{part:28}{count / 1e6:9.2f}M parameters")


if __name__ == "__main__":
    main()
