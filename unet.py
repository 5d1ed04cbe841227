"""Every network of the generators in plain PyTorch: SDXL's UNet, ControlNet, VAE, CLIP text encoders and tokenizer.

A denoising UNet sees a noisy picture, the time and a caption; a ControlNet is a copy of its encoder that also sees a
colour map and adds what it finds to the UNet's skip connections. Attribute names are the key names of the public
checkpoints, so official weights load with a strict `load_state_dict` and ours open in the public libraries. The small
models of the built-in data are the same classes with other arguments: see PRESETS.

Paper: SDXL (arXiv 2307.01952), ControlNet (2302.05543), CLIP (2103.00020); SegGen (2311.03355) fine-tunes SDXL.
Differs: small models work on pixels in patches, with a full-resolution head, and read bytes instead of CLIP's tokens.
Reads: vocab.json, merges.txt and tokenizer_config.json of a tokenizer folder. Writes: nothing.
Needs: no sibling file.

    python unet.py                  # the sizes and shapes of every preset

B batch, C channels, H W pixels or latents, N = H * W, L caption tokens, D width, T width of the time embedding
"""
import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint

PRESETS = {
    "tiny": {   # 64 x 64 pixels: a grid of 16 x 16 patches at width 48, then 8 x 8 at width 96 with the caption
        "unet": dict(in_channels=3, out_channels=3, block_out_channels=(48, 96), layers_per_block=1,
                     down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), transformer_layers_per_block=(0, 1),
                     attention_head_dim=(2, 4), cross_attention_dim=96, addition_time_embed_dim=16,
                     projection_class_embeddings_input_dim=96 + 6 * 16, norm_num_groups=16, patch_size=4,
                     head_channels=16),
        "controlnet": dict(conditioning_channels=3, conditioning_embedding_out_channels=(16, 32, 64)),
        "text": dict(width=96, layers=2, heads=4, length=96),
    },
}


# ---- parts --------------------------------------------------------------------------------------------------------

def checkpointed(forward):
    """A forward that keeps only its inputs and is computed again in backward, once `module.checkpointing` is set."""
    def wrapped(self, *args):
        if getattr(self, "checkpointing", False) and torch.is_grad_enabled():
            return checkpoint(forward, self, *args, use_reentrant=False)
        return forward(self, *args)
    return wrapped


def zero(module):
    """The module with all its parameters set to zero: it adds nothing until it is trained."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def fourier(x, dim):
    """(N,) numbers -> (N, dim): cosines then sines at dim / 2 frequencies from 1 down to nearly 1 / 10000, fp32."""
    frequency = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=x.device) / (dim // 2))
    angle = x.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class TimestepEmbedding(nn.Module):
    """Two linear layers: (B, dim) Fourier features -> (B, T)."""

    def __init__(self, dim, width):
        super().__init__()
        self.linear_1 = nn.Linear(dim, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x):
        return self.linear_2(F.silu(self.linear_1(x.to(self.linear_1.weight.dtype))))


class ResnetBlock(nn.Module):
    """(B, in_channels, H, W) -> (B, out_channels, H, W); the time embedding is added between the two convolutions."""

    def __init__(self, in_channels, out_channels, time_dim, groups, eps=1e-5):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_dim, out_channels) if time_dim else None    # the VAE knows no time
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.conv2 = zero(nn.Conv2d(out_channels, out_channels, 3, padding=1))          # starts as the identity
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    @checkpointed
    def forward(self, x, time=None):
        h = self.conv1(F.silu(self.norm1(x)))                                           # (B, C, H, W)
        if time is not None:
            h = h + self.time_emb_proj(F.silu(time))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.conv_shortcut(x) if self.conv_shortcut else x)


class Attention(nn.Module):
    """Attention of (B, N, D) to itself, to a context (B, L, context_dim), or to the (keys, values) of `project`."""

    def __init__(self, dim, heads, context_dim=None, bias=False):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=bias)
        self.to_k = nn.Linear(context_dim or dim, dim, bias=bias)
        self.to_v = nn.Linear(context_dim or dim, dim, bias=bias)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))

    def project(self, context):
        """(B, L, context_dim) -> keys and values, each (B, heads, L, d)."""
        return tuple(rearrange(to(context), "b l (h d) -> b h l d", h=self.heads) for to in (self.to_k, self.to_v))

    def forward(self, x, context=None):
        q = rearrange(self.to_q(x), "b n (h d) -> b h n d", h=self.heads)
        k, v = context if isinstance(context, tuple) else self.project(x if context is None else context)
        x = F.scaled_dot_product_attention(q, k, v)                                     # (B, heads, N, d)
        return self.to_out(rearrange(x, "b h n d -> b n (h d)"))                        # (B, N, D)


class GEGLU(nn.Module):
    """(B, N, D) -> (B, N, width): half of a linear layer gates the other half."""

    def __init__(self, dim, width):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * width)

    def forward(self, x):
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))   # 1: public dropout

    def forward(self, x):
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, attention to the caption, feed-forward."""

    def __init__(self, dim, heads, context_dim):
        super().__init__()
        self.norm1, self.attn1 = nn.LayerNorm(dim), Attention(dim, heads)
        self.norm2, self.attn2 = nn.LayerNorm(dim), Attention(dim, heads, context_dim)
        self.norm3, self.ff = nn.LayerNorm(dim), FeedForward(dim)

    @checkpointed
    def forward(self, x, context):
        """x (B, N, D); context (B, L, context_dim) or a list of (keys, values), one for each cross-attention."""
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context[self.attn2.index] if isinstance(context, list) else context)
        return x + self.ff(self.norm3(x))


class Transformer(nn.Module):
    """`depth` transformer blocks over the pixels of (B, C, H, W)."""

    def __init__(self, channels, heads, depth, context_dim, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList(TransformerBlock(channels, heads, context_dim) for _ in range(depth))
        self.proj_out = zero(nn.Linear(channels, channels))                             # starts as the identity

    def forward(self, x, context):
        h = self.proj_in(rearrange(self.norm(x), "b c h w -> b (h w) c"))               # (B, N, C)
        for block in self.transformer_blocks:
            h = block(h, context)
        return x + rearrange(self.proj_out(h), "b (h w) c -> b c h w", h=x.shape[2])


class Downsample(nn.Module):
    """Halves H and W. The VAE pads right and below only (padding=0), the UNet on all sides."""

    def __init__(self, channels, padding=1):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x):
        return self.conv(x if self.conv.padding[0] else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest neighbour to `size` (an odd grid has no exact half), then a convolution."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, size):
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


# ---- UNet and ControlNet ------------------------------------------------------------------------------------------

class Stage(nn.Module):
    """What stands at one resolution: residual blocks, each followed by a transformer where depth > 0."""

    def __init__(self, widths, time_dim, depth, heads, context_dim, groups, transformers):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(i, o, time_dim, groups) for i, o in widths)
        self.attentions = nn.ModuleList(Transformer(widths[-1][1], heads, depth, context_dim, groups)
                                        for _ in range(transformers if depth else 0))


class DownBlock(Stage):
    def __init__(self, widths, *args, downsample):
        super().__init__(widths, *args, transformers=len(widths))
        self.downsamplers = nn.ModuleList([Downsample(widths[-1][1])] if downsample else [])

    def forward(self, x, time, context):
        """-> the output and the list of skips."""
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, time)
            x = self.attentions[i](x, context) if self.attentions else x
            skips.append(x)
        for downsampler in self.downsamplers:
            x = downsampler(x)                                                          # (B, C, H / 2, W / 2)
            skips.append(x)
        return x, skips


class MidBlock(Stage):
    def __init__(self, channels, *args):
        super().__init__([(channels, channels)] * 2, *args, transformers=1)

    def forward(self, x, time, context):
        x = self.resnets[0](x, time)
        for attention in self.attentions:
            x = attention(x, context)
        return self.resnets[1](x, time)


class UpBlock(Stage):
    def __init__(self, widths, *args, upsample):
        super().__init__(widths, *args, transformers=len(widths))
        self.upsamplers = nn.ModuleList([Upsample(widths[-1][1])] if upsample else [])

    def forward(self, x, skips, time, context):
        """Takes its skips from the end of the list `skips`."""
        for i, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, skips.pop()], dim=1), time)
            x = self.attentions[i](x, context) if self.attentions else x
        for upsampler in self.upsamplers:
            x = upsampler(x, skips[-1].shape[-2:])                                      # (B, C, 2 H, 2 W)
        return x


class Encoder(nn.Module):
    """The half that UNet and ControlNet share: time and caption embedding, down blocks, middle block.

    attention_head_dim is the NUMBER of heads of each block: the public name is a known mistake, kept for the
    config files. transformer_layers_per_block counts only where the block's type has cross-attention."""

    def __init__(self, in_channels=4, block_out_channels=(320, 640, 1280), layers_per_block=2,
                 down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                 transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20), cross_attention_dim=2048,
                 addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816, norm_num_groups=32,
                 patch_size=1):
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        widths, time_dim = block_out_channels, 4 * block_out_channels[0]
        self.conv_in = nn.Conv2d(in_channels * patch_size ** 2, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], time_dim)
        self.add_embedding = TimestepEmbedding(projection_class_embeddings_input_dim, time_dim)
        self.down_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            pairs = [(widths[max(i - 1, 0)], width)] + [(width, width)] * (layers_per_block - 1)
            self.down_blocks.append(DownBlock(pairs, *self.attention(i), downsample=i < len(widths) - 1))
        middle = time_dim, transformer_layers_per_block[-1], *self.attention(-1)[2:]
        self.mid_block = MidBlock(widths[-1], *middle)

    def attention(self, i):
        """What the blocks of level i have in common: time width, depth, heads, caption width, groups."""
        c = self.config
        depth = c["transformer_layers_per_block"][i] if "CrossAttn" in c["down_block_types"][i] else 0
        return (4 * c["block_out_channels"][0], depth, c["attention_head_dim"][i], c["cross_attention_dim"],
                c["norm_num_groups"])

    def number_text_layers(self):
        """Gives each cross-attention its place in the list of `project_text`."""
        for i, layer in enumerate(self.text_layers()):
            layer.index = i

    def text_layers(self):
        return [m.attn2 for m in self.modules() if isinstance(m, TransformerBlock)]

    def project_text(self, context):
        """(B, L, D) caption -> keys and values of every cross-attention: computed once for all steps of a sampler."""
        return [layer.project(context) for layer in self.text_layers()]

    def recompute(self, on=True):
        """Gradient checkpointing: blocks keep only their inputs and run again in backward. Returns the module."""
        for module in self.modules():
            module.checkpointing = on
        return self

    def embed(self, t, pooled, time_ids):
        """t (B,), pooled (B, P), time_ids (B, 6) -> (B, T)."""
        dim = self.config["addition_time_embed_dim"]
        sizes = fourier(time_ids.flatten(), dim).reshape(len(pooled), -1)               # (B, 6 dim)
        time = self.time_embedding(fourier(t, self.config["block_out_channels"][0]))
        return time + self.add_embedding(torch.cat([pooled, sizes.to(pooled.dtype)], dim=1))

    def encode(self, x, time, context):
        """x (B, C, H, W) after conv_in -> the middle block's output and the list of skips."""
        skips = [x]
        for block in self.down_blocks:
            x, more = block(x, time, context)
            skips += more
        return self.mid_block(x, time, context), skips


class UNet(Encoder):
    """The denoiser. Arguments: Encoder's, out_channels, and head_channels > 0 for a full-resolution head."""

    def __init__(self, out_channels=4, head_channels=0, **encoder):
        super().__init__(**encoder)
        self.config |= dict(out_channels=out_channels, head_channels=head_channels)
        c = self.config
        widths, layers, last = c["block_out_channels"], c["layers_per_block"], len(c["block_out_channels"]) - 1
        self.up_blocks = nn.ModuleList()
        for i in reversed(range(len(widths))):
            below, above, width = widths[min(i + 1, last)], widths[max(i - 1, 0)], widths[i]
            pairs = [((width if j else below) + (width if j < layers else above), width) for j in range(layers + 1)]
            self.up_blocks.append(UpBlock(pairs, *self.attention(i), upsample=i > 0))
        self.conv_norm_out = nn.GroupNorm(c["norm_num_groups"], widths[0], 1e-5)
        self.conv_out = nn.Conv2d(widths[0], (head_channels or out_channels) * c["patch_size"] ** 2, 3, padding=1)
        heads = [(head_channels + c["in_channels"], head_channels), (head_channels, head_channels),
                 (head_channels, out_channels)]
        self.head = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1) for i, o in heads if head_channels)
        self.number_text_layers()

    def forward(self, x, t, context, pooled, time_ids, residuals=None):
        """x (B, in_channels, H, W), t (B,), context (B, L, D) or `project_text(context)`, pooled (B, P), time_ids
        (B, 6): original H W, crop top left, target H W; residuals of a ControlNet -> (B, out_channels, H, W)."""
        patch = self.config["patch_size"]
        down, middle, fine = residuals or ((), 0, None)
        time = self.embed(t, pooled, time_ids)                                          # (B, T)
        h = self.conv_in(F.pixel_unshuffle(x, patch))                                   # (B, C, H / patch, W / patch)
        h, skips = self.encode(h, time, context)
        skips = [skip + r for skip, r in zip(skips, down, strict=True)] if down else skips
        h = h + middle
        for block in self.up_blocks:
            h = block(h, skips, time, context)
        h = self.conv_out(F.silu(self.conv_norm_out(h)))
        h = F.pixel_shuffle(h, patch)                                                   # (B, C, H, W)
        return self.sharpen(h, x, fine) if self.head else h

    def sharpen(self, h, x, fine):
        """The head: features, the noisy input and the ControlNet's `fine` residual at full resolution."""
        h = self.head[0](torch.cat([h, x], dim=1))                                      # (B, head_channels, H, W)
        h = h if fine is None else h + fine
        for layer in self.head[1:]:
            h = layer(F.silu(h))
        return h


class ConditioningEmbedding(nn.Module):
    """A colour map (B, 3, H, W) in [0, 1] -> (B, C, h, w) for the UNet's grid: a stride of 2 for each further width."""

    def __init__(self, in_channels, widths, out_channels):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for i, o in zip(widths, widths[1:]):
            self.blocks += [nn.Conv2d(i, i, 3, padding=1), nn.Conv2d(i, o, 3, padding=1, stride=2)]
        self.conv_out = zero(nn.Conv2d(widths[-1], out_channels, 3, padding=1))

    def forward(self, x):
        x = F.silu(self.conv_in(x))
        for block in self.blocks:
            x = F.silu(block(x))
        return self.conv_out(x)


class ControlNet(Encoder):
    """A copy of a UNet's encoder that sees a colour map; its zero convolutions add nothing before training."""

    def __init__(self, conditioning_channels=3, conditioning_embedding_out_channels=(16, 32, 96, 256),
                 head_channels=0, **encoder):
        super().__init__(**encoder)
        self.config |= dict(conditioning_channels=conditioning_channels, head_channels=head_channels,
                            conditioning_embedding_out_channels=conditioning_embedding_out_channels)
        widths, layers = self.config["block_out_channels"], self.config["layers_per_block"]
        self.controlnet_cond_embedding = ConditioningEmbedding(
            conditioning_channels, conditioning_embedding_out_channels, widths[0])
        skips = [widths[0]] + [w for w in widths for _ in range(layers + 1)][:-1]        # the last has no downsampler
        self.controlnet_down_blocks = nn.ModuleList(zero(nn.Conv2d(c, c, 1)) for c in skips)
        self.controlnet_mid_block = zero(nn.Conv2d(widths[-1], widths[-1], 1))
        if head_channels:
            self.controlnet_head = nn.Sequential(
                nn.Conv2d(conditioning_channels, head_channels, 3, padding=1), nn.SiLU(),
                nn.Conv2d(head_channels, head_channels, 3, padding=1), nn.SiLU(),
                zero(nn.Conv2d(head_channels, head_channels, 1)))
        self.number_text_layers()

    @classmethod
    def from_unet(cls, unet, **arguments):
        """A ControlNet for `unet` that starts as a copy of its encoder; arguments: the ControlNet's own."""
        config = {k: v for k, v in unet.config.items() if k != "out_channels"}
        net = cls(**config | arguments)
        own = net.state_dict()
        net.load_state_dict(own | {k: v for k, v in unet.state_dict().items() if k in own})
        return net

    def forward(self, x, t, context, pooled, time_ids, cond, scale=1.0):
        """As UNet's; cond (B, 3, H, W) colour map in [0, 1] at the picture's full size -> residuals for the UNet:
        (one for each skip, one for the middle, one for the head or None), all times `scale`."""
        time = self.embed(t, pooled, time_ids)                                          # (B, T)
        h = self.conv_in(F.pixel_unshuffle(x, self.config["patch_size"]))               # (B, C, h, w)
        h, skips = self.encode(h + self.controlnet_cond_embedding(cond), time, context)
        down = [zero_conv(skip) * scale for zero_conv, skip in zip(self.controlnet_down_blocks, skips)]
        fine = self.controlnet_head(cond) * scale if self.config["head_channels"] else None
        return down, self.controlnet_mid_block(h) * scale, fine


# ---- text ---------------------------------------------------------------------------------------------------------

class TextEncoder(nn.Module):
    """A small transformer over the bytes of a caption: no vocabulary, any language.

    tokens: 0 padding, 1 to 256 a byte + 1, 257 the start, which keeps an empty caption from being empty."""

    def __init__(self, width=96, layers=2, heads=4, length=96):
        super().__init__()
        self.config = dict(width=width, layers=layers, heads=heads, length=length)
        self.token = nn.Embedding(258, width)
        self.position = nn.Parameter(0.02 * torch.randn(length, width))
        self.layers = nn.ModuleList(nn.ModuleDict({
            "norm1": nn.LayerNorm(width), "qkv": nn.Linear(width, 3 * width), "out": nn.Linear(width, width),
            "norm2": nn.LayerNorm(width), "up": nn.Linear(width, 4 * width), "down": nn.Linear(4 * width, width),
        }) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.pool = nn.Linear(width, width)

    def tokenize(self, captions):
        """B captions -> (B, length) long on the encoder's device; what does not fit is cut off."""
        tokens = torch.zeros(len(captions), self.config["length"], dtype=torch.long)
        for row, caption in zip(tokens, captions):
            ids = [257] + [byte + 1 for byte in caption.encode()][:len(row) - 1]
            row[:len(ids)] = torch.tensor(ids)
        return tokens.to(self.position.device)

    def forward(self, tokens):
        """(B, L) -> context (B, L, D), zero at padding so that cross-attention needs no mask, and pooled (B, D)."""
        real = tokens > 0                                                               # (B, L)
        x = self.token(tokens) + self.position
        for layer in self.layers:
            qkv = rearrange(layer["qkv"](layer["norm1"](x)), "b l (n h d) -> n b h l d", n=3, h=self.config["heads"])
            h = F.scaled_dot_product_attention(*qkv, attn_mask=real[:, None, None])     # (B, heads, L, d)
            x = x + layer["out"](rearrange(h, "b h l d -> b l (h d)"))
            x = x + layer["down"](F.gelu(layer["up"](layer["norm2"](x))))
        x = self.norm(x) * real[..., None]
        return x, self.pool(x.sum(1) / real.sum(1, keepdim=True))
