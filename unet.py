"""Every network of the generators in plain PyTorch: SDXL's UNet, ControlNet, VAE, CLIP and its tokenizer.

A denoising UNet sees a noisy picture, the time and a caption; a ControlNet is a copy of its encoder that
also sees a colour map, and adds what it finds to the UNet's skip connections. Attribute names are the key
names of the public checkpoints: official weights load with a strict `load_state_dict`, ours open in the
public libraries. The small models of the built-in data are the same classes with other arguments: see
PRESETS.

Paper: SDXL (2307.01952), ControlNet (2302.05543), CLIP (2103.00020); SegGen (2311.03355) fine-tunes SDXL.
Differs: small models work on patches of pixels, with a full-resolution head, and read hashed words, not
       tokens of a vocabulary (after 300 steps a caption moved the loss 30 times as much as with bytes).
Reads: folders in the public layout (config.json, safetensors, a tokenizer's files).  Writes: nothing.
Needs: no sibling file.

    python unet.py                  # the sizes and shapes of every preset

B batch, C channels, H W pixels or latents, N pixels of a grid, L caption tokens, D width,
T width of the time embedding, P width of the pooled caption
"""
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
    "tiny": {       # 64 x 64 pixels: 16 x 16 patches at width 64, then 8 x 8 at width 80 with the caption
        "unet": dict(in_channels=3, out_channels=3, block_out_channels=(64, 80), layers_per_block=1,
                     down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                     transformer_layers_per_block=(0, 1), attention_head_dim=(2, 4), cross_attention_dim=96,
                     addition_time_embed_dim=16, projection_class_embeddings_input_dim=96 + 6 * 16,
                     norm_num_groups=16, patch_size=4, head_channels=24),
        "controlnet": dict(conditioning_channels=3, conditioning_embedding_out_channels=(16, 32, 64)),
        "text": dict(width=96, layers=2, heads=4, length=48, rows=512),
    },
    "sdxl": {       # the arguments' defaults are SDXL's
        "unet": {}, "controlnet": {}, "vae": {}, "text_encoder": {},
        "text_encoder_2": dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32,
                               num_attention_heads=20, hidden_act="gelu", projection_dim=1280,
                               projection=True),
    },
}


# ---- public config.json files ------------------------------------------------------------------------------

# Not the public defaults, so a file that lacks them is not SDXL's.
NEEDED = {"addition_embed_type": "text_time", "use_linear_projection": True}
# Options that our networks do not have: the one value that they implement. What is in no list must be off.
SUPPORTED = NEEDED | {
    "act_fn": "silu", "attention_type": "default", "controlnet_conditioning_channel_order": "rgb",
    "conv_in_kernel": 3, "conv_out_kernel": 3, "downsample_padding": 1, "flip_sin_to_cos": True,
    "mid_block_add_attention": True, "mid_block_scale_factor": 1, "mid_block_type": "UNetMidBlock2DCrossAttn",
    "model_type": "clip_text_model", "norm_eps": 1e-5, "resnet_out_scale_factor": 1,
    "resnet_time_scale_shift": "default", "time_embedding_type": "positional", "use_post_quant_conv": True,
    "use_quant_conv": True}
# Options that do not change what is computed.
IGNORED = {
    "_class_name", "_diffusers_version", "_name_or_path", "_use_default_values", "architectures",
    "addition_embed_type_num_heads", "bos_token_id", "dtype", "force_upcast", "initializer_factor",
    "initializer_range", "pad_token_id", "sample_size", "torch_dtype", "transformers_version"}


def public_arguments(cls):
    """The names of a class's constructor arguments that stand in a public config.json."""
    own = [name for c in cls.__mro__ if c.__module__ == __name__ for name in inspect.signature(c).parameters]
    return [name for name in own if name not in ("encoder", "patch_size", "head_channels", "projection")]


def from_config(cls, config):
    """A network from the dict of a public config.json. Raises ValueError, naming the key."""
    own = public_arguments(cls)
    for key in own + list(NEEDED if "cross_attention_dim" in own else ()):
        if key not in config:
            raise ValueError(f"the configuration has no {key}: it is not SDXL's")
    down = config.get("down_block_types", ())
    mirror = [kind.replace("Down", "Up").replace("Encoder", "Decoder") for kind in reversed(down)]
    for key in config.keys() - own - IGNORED:
        value, only = config[key], mirror if key == "up_block_types" else SUPPORTED.get(key)
        if key == "down_block_types":                               # a VAE's: their number is known
            value, only = set(value), {"DownEncoderBlock2D"}
        if value != only and (value or only):
            raise ValueError(f"{key} = {value!r} is not supported, only {only!r}")
    arguments = {key: config[key] for key in own}
    for key in ("attention_head_dim", "transformer_layers_per_block"):      # one number stands for all levels
        if isinstance(arguments.get(key), int):
            arguments[key] = [arguments[key]] * len(config["block_out_channels"])
    if "CLIPTextModelWithProjection" in (config.get("architectures") or ()):
        arguments["projection"] = True
    return cls(**arguments)


# ---- public folders ----------------------------------------------------------------------------------------

def read_json(path):
    """A JSON file -> its dict. Raises ValueError that names the path."""
    try:
        content = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: looked for a JSON file, found {type(error).__name__}; download it again")
    if not isinstance(content, dict):
        raise ValueError(f"{path}: looked for a JSON object, found another value; download it again")
    return content


def weight_files(folder):
    """A part of a public folder -> its safetensors files: whole or in shards, fp32 before fp16."""
    folder = pathlib.Path(folder)
    for stem in ("diffusion_pytorch_model", "model"):
        for whole, index in ((f"{stem}.safetensors", f"{stem}.safetensors.index.json"),
                             (f"{stem}.fp16.safetensors", f"{stem}.safetensors.index.fp16.json")):
            if (folder / whole).is_file():
                return [folder / whole]
            if (folder / index).is_file():
                shards = read_json(folder / index).get("weight_map") or {}
                return [folder / name for name in sorted(set(shards.values()))]
    found = ", ".join(sorted(p.name for p in folder.glob("*"))) if folder.is_dir() else "no such folder"
    raise ValueError(f"{folder}: looked for diffusion_pytorch_model.safetensors or model.safetensors, found "
                     f"{found or 'nothing'}; download this part (only .safetensors is read, never a pickle)")


def read_tensors(files, device="cpu", dtype=torch.float32):
    """safetensors files -> one dict of tensors, floats as `dtype`. Raises ValueError, naming the file."""
    state = {}
    for path in files:
        try:
            with safe_open(path, "pt", device=str(device)) as file:
                for name in file.keys():
                    tensor = file.get_tensor(name)
                    state[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        except (SafetensorError, OSError) as error:
            found = f"a truncated one ({error})" if pathlib.Path(path).is_file() else "no such file"
            raise ValueError(f"{path}: looked for a safetensors file, found {found}; download it again")
    return state


def fill(net, state, where):
    """Gives a network without memory (on the meta device) its tensors; every key and shape must be right."""
    try:
        missing, unexpected = net.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{where}: a tensor has another shape than config.json says: "
                         f"{' '.join(str(error).split())[:200]}")
    for keys, what in ((missing, "is missing"), (unexpected, "is not one of SDXL's")):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise ValueError(f"{where}: looked for the tensors of a {type(net).__name__}; {keys[0]}{more} "
                             f"{what}; download this part again")
    return net


PUBLIC_CLASS = {"UNet": ("UNet2DConditionModel",), "ControlNet": ("ControlNetModel",),
                "VAE": ("AutoencoderKL",), "CLIPText": ("CLIPTextModel", "CLIPTextModelWithProjection")}


def empty_part(cls, folder):
    """FOLDER/config.json -> that network on the meta device: shapes without memory. Raises ValueError."""
    path = pathlib.Path(folder) / "config.json"
    config = read_json(path)
    kind, wanted = (config.get("architectures") or [config.get("_class_name")])[0], PUBLIC_CLASS[cls.__name__]
    if kind not in wanted:
        raise ValueError(f"{path}: looked for {' or '.join(wanted)}, found {kind}; it is another part")
    try:
        with torch.device("meta"):
            return cls.from_config(config)
    except (ValueError, TypeError, IndexError) as error:
        raise ValueError(f"{path}: {error}; give this part of stabilityai/stable-diffusion-xl-base-1.0 "
                         "or one trained for it")


def read_part(cls, folder, device="cpu", dtype=torch.float32):
    """One part of a public folder -> the network with its weights, in eval mode.

    Raises ValueError in one line: config.json or weights missing or of another part; a key missing, extra or
    of another shape; a truncated file."""
    net = empty_part(cls, folder)
    return fill(net, read_tensors(weight_files(folder), device, dtype), folder).eval()


def is_public(folder):
    """Whether a folder is in the layout of the public pipelines (several networks, one folder each)."""
    folder = pathlib.Path(folder)
    return (folder / "model_index.json").exists() or (folder / "unet" / "config.json").exists()


def check_sdxl(folder):
    """Raises ValueError unless a folder's model_index.json is that of SDXL and every part is there."""
    folder = pathlib.Path(folder)
    kind = read_json(folder / "model_index.json").get("_class_name")
    if not str(kind).startswith("StableDiffusionXL"):
        raise ValueError(f"{folder}: looked for a StableDiffusionXLPipeline, found {kind}; "
                         "give the folder of stabilityai/stable-diffusion-xl-base-1.0")
    parts = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
    if lost := [part for part in parts if not (folder / part).is_dir()]:
        raise ValueError(f"{folder}: looked for the parts of SDXL, found no {', '.join(lost)}; "
                         "download the whole folder")


def check_fit(unet, text, vae, folder):
    """Raises ValueError unless UNet, text encoders, tokenizers and VAE of a public folder fit each other."""
    u, v, first, second = unet.config, vae.config, text.text_encoder.config, text.text_encoder_2.config
    pooled = second["projection_dim"] if second["projection"] else second["hidden_size"]
    wrong = [f"{what} is {found}, not {right}" for what, found, right in (
        ("the UNet's in_channels", u["in_channels"], v["latent_channels"]),
        ("the UNet's out_channels", u["out_channels"], v["latent_channels"]),
        ("the VAE's in_channels", v["in_channels"], 3),
        ("the VAE's out_channels", v["out_channels"], 3),
        ("the UNet's cross_attention_dim", u["cross_attention_dim"],
         first["hidden_size"] + second["hidden_size"]),
        ("the UNet's projection_class_embeddings_input_dim", u["projection_class_embeddings_input_dim"],
         pooled + 6 * u["addition_time_embed_dim"]),
        ("text_encoder_2's max_position_embeddings", second["max_position_embeddings"],
         first["max_position_embeddings"])) if found != right]
    for end, tokenizer, encoder in zip(("", "_2"), text.tokenizers, (first, second)):
        if (largest := max(tokenizer.ids.values())) >= encoder["vocab_size"]:
            wrong.append(f"tokenizer{end} goes up to {largest}, text_encoder{end}'s vocab_size is "
                         f"{encoder['vocab_size']}")
    if wrong:
        raise ValueError(f"{folder}: its parts do not fit each other: {wrong[0]}; "
                         "give the folder of stabilityai/stable-diffusion-xl-base-1.0")


def check_control(control, unet, folder):
    """Raises ValueError unless a ControlNet by others fits the UNet's inputs and skips; depths may differ."""
    for key in ("in_channels", "block_out_channels", "layers_per_block", "cross_attention_dim",
                "addition_time_embed_dim", "projection_class_embeddings_input_dim"):
        if control.config[key] != unet.config[key]:
            raise ValueError(f"{folder}: its {key} is {control.config[key]}, the UNet's {unet.config[key]}; "
                             "give a ControlNet for this UNet")
    colours = control.config["conditioning_channels"]
    widths = control.config["conditioning_embedding_out_channels"]  # each but the first halves the map
    if (colours, len(widths)) != (3, 4):
        raise ValueError(f"{folder}: looked for a ControlNet that sees 3 colours through 4 widths, found "
                         f"{colours} and {len(widths)}; give a ControlNet for this UNet")


# ---- parts -------------------------------------------------------------------------------------------------

def checkpointed(forward):
    """A forward that keeps only its inputs and runs again in backward, once `module.checkpointing` is set."""
    def wrapped(self, *args):
        if getattr(self, "checkpointing", False) and torch.is_grad_enabled():
            return checkpoint(forward, self, *args, use_reentrant=False, preserve_rng_state=False)
        return forward(self, *args)
    return wrapped


def zero(module):
    """The module with all its parameters set to zero: it adds nothing until it is trained."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def fourier(x, dim):
    """(N,) numbers -> (N, dim): cosines, then sines, at dim / 2 frequencies from 1 to about 1e-4, fp32."""
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
    """(B, in_channels, H, W) -> (B, out_channels, H, W); the time is added between the two convolutions.

    The VAE's knows no time: time_dim None. Its norms have another eps."""

    def __init__(self, in_channels, out_channels, time_dim, groups):
        super().__init__()
        eps = 1e-5 if time_dim else 1e-6
        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_dim, out_channels) if time_dim else None
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.conv2 = zero(nn.Conv2d(out_channels, out_channels, 3, padding=1))  # starts as the identity
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    @checkpointed
    def forward(self, x, time=None):
        h = self.conv1(F.silu(self.norm1(x)))                       # (B, C, H, W)
        if time is not None:
            h = h + self.time_emb_proj(F.silu(time))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.conv_shortcut(x) if self.conv_shortcut else x)


class Attention(nn.Module):
    """Attention of (B, N, D) to itself, to a context (B, L, context_dim), or to what `project` returned."""

    def __init__(self, dim, heads, context_dim=None, bias=False):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=bias)
        self.to_k = nn.Linear(context_dim or dim, dim, bias=bias)
        self.to_v = nn.Linear(context_dim or dim, dim, bias=bias)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))

    def project(self, context):
        """(B, L, context_dim) -> keys and values, each (B, heads, L, d)."""
        return tuple(rearrange(to(context), "b l (h d) -> b h l d", h=self.heads)
                     for to in (self.to_k, self.to_v))

    def forward(self, x, context=None):
        q = rearrange(self.to_q(x), "b n (h d) -> b h n d", h=self.heads)
        k, v = context if isinstance(context, tuple) else self.project(x if context is None else context)
        x = F.scaled_dot_product_attention(q, k, v)                 # (B, heads, N, d)
        return self.to_out(rearrange(x, "b h n d -> b n (h d)"))    # (B, N, D)


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
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))  # 1: a dropout

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
        """x (B, N, D); context (B, L, context_dim) or the list of `project_text` -> (B, N, D)."""
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context[self.attn2.index] if isinstance(context, list) else context)
        return x + self.ff(self.norm3(x))


class Transformer(nn.Module):
    """`depth` transformer blocks over the pixels of (B, C, H, W)."""

    def __init__(self, channels, heads, depth, context_dim, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, heads, context_dim) for _ in range(depth))
        self.proj_out = zero(nn.Linear(channels, channels))         # starts as the identity

    def forward(self, x, context):
        h = self.proj_in(rearrange(self.norm(x), "b c h w -> b (h w) c"))  # (B, N, C)
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
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, size):
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


# ---- UNet and ControlNet -----------------------------------------------------------------------------------

class Stage(nn.Module):
    """What stands at one resolution: residual blocks, each followed by a transformer where depth > 0."""

    def __init__(self, widths, time_dim, depth, heads, context_dim, groups, transformers):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(i, o, time_dim, groups) for i, o in widths)
        self.attentions = nn.ModuleList(Transformer(widths[-1][1], heads, depth, context_dim, groups)
                                        for _ in range(transformers if depth else 0))


class DownBlock(Stage):
    def __init__(self, widths, time_dim, *args, downsample):
        super().__init__(widths, time_dim, *args, transformers=len(widths))
        padding = 1 if time_dim else 0
        self.downsamplers = nn.ModuleList([Downsample(widths[-1][1], padding)] if downsample else [])

    def forward(self, x, time, context):
        """-> the output and the list of skips."""
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, time)
            x = self.attentions[i](x, context) if self.attentions else x
            skips.append(x)
        for downsampler in self.downsamplers:
            x = downsampler(x)                                      # (B, C, H / 2, W / 2)
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
            x = upsampler(x, skips[-1].shape[-2:])                  # (B, C, 2 H, 2 W)
        return x


class Encoder(nn.Module):
    """The half that UNet and ControlNet share: time and caption embedding, down blocks, middle block.

    attention_head_dim is the NUMBER of heads of each block: the public name is a known mistake, kept for the
    config files. transformer_layers_per_block counts only where the block's type has cross-attention."""

    def __init__(self, in_channels=4, block_out_channels=(320, 640, 1280), layers_per_block=2,
                 down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                 transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20),
                 cross_attention_dim=2048, addition_time_embed_dim=256,
                 projection_class_embeddings_input_dim=2816, norm_num_groups=32, patch_size=1):
        if unknown := set(down_block_types) - {"DownBlock2D", "CrossAttnDownBlock2D"}:
            raise ValueError(f"down_block_types: {', '.join(sorted(unknown))} is not supported")
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "unknown", "__class__")}
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

    from_config = classmethod(from_config)

    def public_config(self):
        """The dict to write as config.json: with it the public library opens our state dict."""
        patch, head = self.config["patch_size"], self.config["head_channels"]
        assert patch == 1 and head == 0, f"patch_size {patch} and head_channels {head} have no public name"
        config = {k: v for k, v in self.config.items() if k not in ("patch_size", "head_channels")}
        if isinstance(self, UNet):
            up = [kind.replace("Down", "Up") for kind in reversed(config["down_block_types"])]
            return NEEDED | config | {"_class_name": "UNet2DConditionModel", "up_block_types": up}
        return NEEDED | config | {"_class_name": "ControlNetModel"}

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
        """(B, L, D) caption -> keys and values of each cross-attention: once for all steps of a sampler."""
        return [layer.project(context) for layer in self.text_layers()]

    def recompute(self, on=True):
        """Gradient checkpointing: blocks keep only their inputs and run again in backward. Returns self."""
        for module in self.modules():
            module.checkpointing = on
        return self

    def embed(self, t, pooled, time_ids):
        """t (B,), pooled (B, P), time_ids (B, 6) -> (B, T)."""
        dim = self.config["addition_time_embed_dim"]
        sizes = fourier(time_ids.flatten(), dim).reshape(len(pooled), -1)  # (B, 6 dim)
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
        c, widths, layers = self.config, self.config["block_out_channels"], self.config["layers_per_block"]
        last, patch = len(widths) - 1, self.config["patch_size"]
        self.up_blocks = nn.ModuleList()
        for i in reversed(range(len(widths))):
            below, above, width = widths[min(i + 1, last)], widths[max(i - 1, 0)], widths[i]
            pairs = [((width if j else below) + (width if j < layers else above), width)    # second: the skip
                     for j in range(layers + 1)]
            self.up_blocks.append(UpBlock(pairs, *self.attention(i), upsample=i > 0))
        self.conv_norm_out = nn.GroupNorm(c["norm_num_groups"], widths[0], 1e-5)
        self.conv_out = nn.Conv2d(widths[0], (head_channels or out_channels) * patch ** 2, 3, padding=1)
        heads = [(head_channels + c["in_channels"], head_channels), (head_channels, head_channels),
                 (head_channels, out_channels)]
        self.head = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1) for i, o in heads if head_channels)
        if head_channels:
            self.head_time = zero(nn.Linear(4 * widths[0], 2 * head_channels))
        self.number_text_layers()

    def forward(self, x, t, context, pooled, time_ids, residuals=None):
        """x (B, in_channels, H, W), t (B,), context (B, L, D) or what project_text made of it, pooled (B, P),
        time_ids (B, 6): original H W, crop top left, target H W; a ControlNet's residuals
        -> (B, out_channels, H, W)."""
        patch = self.config["patch_size"]
        down, middle, fine = residuals or ((), 0, None)
        x = x.to(self.conv_in.weight.dtype)                         # bf16 weights need no autocast
        time = self.embed(t, pooled, time_ids)                      # (B, T)
        h = self.conv_in(F.pixel_unshuffle(x, patch))               # (B, C, H / patch, W / patch)
        h, skips = self.encode(h, time, context)
        skips = [skip + r for skip, r in zip(skips, down, strict=True)] if down else skips
        h = h + middle
        for block in self.up_blocks:
            h = block(h, skips, time, context)
        h = self.conv_out(F.silu(self.conv_norm_out(h)))
        h = F.pixel_shuffle(h, patch)                               # (B, C, H, W)
        return self.sharpen(h, x, time, fine) if self.head else h

    def sharpen(self, h, x, time, fine):
        """The head: features, the noisy input and the ControlNet's `fine` residual at full resolution. The
        time scales and shifts its channels: a nearly clean input is passed on, a noisy one is not."""
        h = self.head[0](torch.cat([h, x], dim=1))                  # (B, head_channels, H, W)
        scale, shift = self.head_time(F.silu(time))[:, :, None, None].chunk(2, dim=1)
        h = h * (1 + scale) + shift
        h = h if fine is None else h + fine
        for layer in self.head[1:]:
            h = layer(F.silu(h))
        return h


class ConditioningEmbedding(nn.Module):
    """A colour map (B, 3, H, W) in [0, 1] -> (B, C, h, w), the UNet's grid: each further width halves it."""

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
    """A copy of a UNet's encoder that sees a colour map; its zero convolutions add nothing until trained."""

    def __init__(self, conditioning_channels=3, conditioning_embedding_out_channels=(16, 32, 96, 256),
                 head_channels=0, **encoder):
        super().__init__(**encoder)
        self.config |= dict(conditioning_channels=conditioning_channels, head_channels=head_channels,
                            conditioning_embedding_out_channels=conditioning_embedding_out_channels)
        widths, layers = self.config["block_out_channels"], self.config["layers_per_block"]
        self.controlnet_cond_embedding = ConditioningEmbedding(
            conditioning_channels, conditioning_embedding_out_channels, widths[0])
        skips = [widths[0]] + [w for w in widths for _ in range(layers + 1)][:-1]  # one for each skip
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
        """A ControlNet for `unet` that starts as a copy of its encoder; arguments: its own, other depths."""
        config = {k: v for k, v in unet.config.items() if k != "out_channels"}
        net = cls(**config | arguments)
        own = net.state_dict()
        net.load_state_dict(own | {k: v for k, v in unet.state_dict().items() if k in own})
        return net

    def forward(self, x, t, context, pooled, time_ids, cond, scale=1.0):
        """As UNet's; cond: colour map (B, 3, H, W) in [0, 1] at the picture's full size -> residuals for the
        UNet: (one for each skip, one for the middle, one for the head or None), all times `scale`."""
        x, cond = (a.to(self.conv_in.weight.dtype) for a in (x, cond))
        time = self.embed(t, pooled, time_ids)                      # (B, T)
        h = self.conv_in(F.pixel_unshuffle(x, self.config["patch_size"]))  # (B, C, h, w)
        h, skips = self.encode(h + self.controlnet_cond_embedding(cond), time, context)
        down = [zero_conv(skip) * scale for zero_conv, skip in zip(self.controlnet_down_blocks, skips)]
        fine = self.controlnet_head(cond) * scale if self.config["head_channels"] else None
        return down, self.controlnet_mid_block(h) * scale, fine


# ---- text --------------------------------------------------------------------------------------------------

class TextEncoder(nn.Module):
    """A small transformer over the words of a caption: no vocabulary, any language.

    A token is a hash of a word (0: padding) and picks two rows of one table, whose sum stands for the word:
    two words share both rows about once in rows**2 / 2. An empty caption is all padding and gives zeros: the
    null condition."""

    def __init__(self, width=96, layers=2, heads=4, length=48, rows=1024):
        super().__init__()
        self.config = dict(width=width, layers=layers, heads=heads, length=length, rows=rows)
        self.token = nn.Embedding(rows, width)
        self.position = nn.Parameter(0.02 * torch.randn(length, width))
        self.layers = nn.ModuleList(nn.ModuleDict({
            "norm1": nn.LayerNorm(width), "qkv": nn.Linear(width, 3 * width), "out": nn.Linear(width, width),
            "norm2": nn.LayerNorm(width), "up": nn.Linear(width, 4 * width),
            "down": nn.Linear(4 * width, width),
        }) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.pool = nn.Linear(width, width, bias=False)

    def tokenize(self, captions):
        """B captions -> (B, length) long on the CPU; words that do not fit are left out."""
        tokens = torch.zeros(len(captions), self.config["length"], dtype=torch.long)
        for row, caption in zip(tokens, captions):
            words = re.findall(r"\w+|[^\w\s]", caption.lower())[:len(row)]
            row[:len(words)] = torch.tensor([zlib.crc32(word.encode()) + 1 for word in words])
        return tokens

    def forward(self, tokens):
        """(B, L) -> context (B, L, D), zero at padding: cross-attention needs no mask; and pooled (B, D)."""
        rows = self.config["rows"]
        real = tokens > 0                                           # (B, L)
        seen = real | ~real.any(1, keepdim=True)                    # attention to nothing at all would be NaN
        x = self.token(tokens % rows) + self.token(tokens // rows % rows) + self.position
        for layer in self.layers:
            qkv = layer["qkv"](layer["norm1"](x))
            qkv = rearrange(qkv, "b l (n h d) -> n b h l d", n=3, h=self.config["heads"])
            h = F.scaled_dot_product_attention(*qkv, attn_mask=seen[:, None, None])  # (B, heads, L, d)
            x = x + layer["out"](rearrange(h, "b h l d -> b l (h d)"))
            x = x + layer["down"](F.gelu(layer["up"](layer["norm2"](x))))
        x = self.norm(x) * real[..., None]
        return x, self.pool(x.sum(1) / real.sum(1, keepdim=True).clamp(min=1))


# ---- VAE ---------------------------------------------------------------------------------------------------

class PixelAttention(Attention):
    """One head of self-attention over the pixels of (B, C, H, W)."""

    def __init__(self, channels, groups):
        super().__init__(channels, heads=1, bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)

    def forward(self, x, context=None):
        h = super().forward(rearrange(self.group_norm(x), "b c h w -> b (h w) c"))  # (B, N, C)
        return x + rearrange(h, "b (h w) c -> b c h w", h=x.shape[2])


class VAEHalf(nn.Module):
    """What the VAE's encoder and decoder have in common: first convolution, middle, last convolution."""

    def __init__(self, in_channels, first, middle, last, out_channels, groups):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, first, 3, padding=1)
        self.mid_block = MidBlock(middle, None, 0, 0, 0, groups)
        self.mid_block.attentions.append(PixelAttention(middle, groups))
        self.conv_norm_out = nn.GroupNorm(groups, last, eps=1e-6)
        self.conv_out = nn.Conv2d(last, out_channels, 3, padding=1)

    def out(self, x):
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VAEEncoder(VAEHalf):
    def __init__(self, in_channels, latent_channels, widths, layers, groups):
        super().__init__(in_channels, widths[0], widths[-1], widths[-1], 2 * latent_channels, groups)
        self.down_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            pairs = [(widths[max(i - 1, 0)], width)] + [(width, width)] * (layers - 1)
            self.down_blocks.append(DownBlock(pairs, None, 0, 0, 0, groups, downsample=i < len(widths) - 1))

    def forward(self, x):
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x, None, None)[0]                             # the skips are not kept
        return self.out(self.mid_block(x, None, None))


class VAEDecoder(VAEHalf):
    def __init__(self, out_channels, latent_channels, widths, layers, groups):
        super().__init__(latent_channels, widths[-1], widths[-1], widths[0], out_channels, groups)
        self.up_blocks = nn.ModuleList()
        for i in reversed(range(len(widths))):
            pairs = [(widths[min(i + 1, len(widths) - 1)], widths[i])] + [(widths[i], widths[i])] * layers
            self.up_blocks.append(UpBlock(pairs, None, 0, 0, 0, groups, upsample=i > 0))

    def forward(self, z):
        x = self.mid_block(self.conv_in(z), None, None)
        for block in self.up_blocks:
            for resnet in block.resnets:
                x = resnet(x)
            for upsampler in block.upsamplers:
                x = upsampler(x, (2 * x.shape[2], 2 * x.shape[3]))
        return self.out(x)


class VAE(nn.Module):
    """SDXL's autoencoder: pictures (B, 3, H, W) in [-1, 1] <-> latents (B, 4, H / 8, W / 8).

    Pictures go through it `slices` at a time, whatever the batch. It overflows in fp16."""

    def __init__(self, in_channels=3, out_channels=3, latent_channels=4,
                 block_out_channels=(128, 256, 512, 512), layers_per_block=2, norm_num_groups=32,
                 scaling_factor=0.13025):
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        self.factor = 2 ** (len(block_out_channels) - 1)            # pixels a latent, each way
        shape = latent_channels, block_out_channels, layers_per_block, norm_num_groups
        self.encoder = VAEEncoder(in_channels, *shape)
        self.decoder = VAEDecoder(out_channels, *shape)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)

    from_config = classmethod(from_config)

    def moments(self, x, slices=4):
        """(B, 3, H, W) in [-1, 1] -> mean and standard deviation of the latents, not yet scaled."""
        h = torch.cat([self.quant_conv(self.encoder(part)) for part in x.split(slices)])
        mean, logvar = h.chunk(2, dim=1)                            # (B, 4, h, w) each
        return mean, (logvar.clamp(-30, 20) / 2).exp()

    def encode(self, x, slices=4):
        """(B, 3, H, W) in [-1, 1] -> a sample of the latents, times the scaling factor."""
        mean, std = self.moments(x, slices)
        return (mean + std * torch.randn_like(mean)) * self.config["scaling_factor"]

    def decode(self, z, slices=4):
        """Scaled latents -> (B, 3, H, W), about [-1, 1]."""
        z = z / self.config["scaling_factor"]
        return torch.cat([self.decoder(self.post_quant_conv(part)) for part in z.split(slices)])


# ---- CLIP --------------------------------------------------------------------------------------------------

class CLIPAttention(nn.Module):
    """Causal self-attention of (B, L, D)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        q, k, v = (rearrange(to(x), "b l (h d) -> b h l d", h=self.heads)
                   for to in (self.q_proj, self.k_proj, self.v_proj))
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, heads, L, d)
        return self.out_proj(rearrange(x, "b h l d -> b l (h d)"))


class CLIPLayer(nn.Module):
    def __init__(self, width, inner, heads, act, eps):
        super().__init__()
        if act not in ("quick_gelu", "gelu"):
            raise ValueError(f"hidden_act = {act!r} is not supported, only 'quick_gelu' and 'gelu'")
        self.quick = act == "quick_gelu"
        self.layer_norm1, self.self_attn = nn.LayerNorm(width, eps), CLIPAttention(width, heads)
        self.layer_norm2 = nn.LayerNorm(width, eps)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, inner), "fc2": nn.Linear(inner, width)})

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        h = self.mlp["fc1"](self.layer_norm2(x))
        return x + self.mlp["fc2"](h * torch.sigmoid(1.702 * h) if self.quick else F.gelu(h))


class CLIPText(nn.Module):
    """One of SDXL's text encoders; it reads the layer before the last, and the second's pooled vector."""

    def __init__(self, vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                 num_attention_heads=12, max_position_embeddings=77, hidden_act="quick_gelu",
                 layer_norm_eps=1e-5, eos_token_id=2, projection_dim=768, projection=False):
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        layer = hidden_size, intermediate_size, num_attention_heads, hidden_act, layer_norm_eps
        layers = [CLIPLayer(*layer) for _ in range(num_hidden_layers)]
        self.text_model = nn.ModuleDict({
            "embeddings": nn.ModuleDict({
                "token_embedding": nn.Embedding(vocab_size, hidden_size),
                "position_embedding": nn.Embedding(max_position_embeddings, hidden_size)}),
            "encoder": nn.ModuleDict({"layers": nn.ModuleList(layers)}),
            "final_layer_norm": nn.LayerNorm(hidden_size, layer_norm_eps)})
        self.text_projection = nn.Linear(hidden_size, projection_dim, bias=False) if projection else None
        self.register_load_state_dict_pre_hook(public_clip_keys)

    from_config = classmethod(from_config)

    def forward(self, tokens):
        """(B, L) long -> context (B, L, D) of the layer before the last, pooled (B, projection_dim or D)."""
        part = self.text_model
        x = part["embeddings"]["token_embedding"](tokens)           # (B, L, D)
        x = x + part["embeddings"]["position_embedding"].weight[:tokens.shape[1]]
        for layer in part["encoder"]["layers"]:
            context, x = x, layer(x)
        # Official files say 2, which is not the end token: the largest id is. Both: the first of them.
        eos = self.config["eos_token_id"]
        end = tokens.argmax(1) if eos == 2 else (tokens == eos).int().argmax(1)   # (B,)
        pooled = part["final_layer_norm"](x[torch.arange(len(x), device=x.device), end])
        return context, self.text_projection(pooled) if self.text_projection else pooled


def public_clip_keys(model, state, *_):
    """Before loading: recent public files leave out `text_model.`, old ones hold a table of positions."""
    state.pop("text_model.embeddings.position_ids", None)
    for key in [k for k in state if k.startswith(("embeddings.", "encoder.", "final_layer_norm."))]:
        state[f"text_model.{key}"] = state.pop(key)


# CLIP's regular expression over a text's character classes, as Python's `re` knows no \p{L} and \p{N}. By
# then every white space is a blank.
WORDS = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^ a-z0-9]+")
SPACES = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # Unicode's White_Space
START, END = "<|startoftext|>", "<|endoftext|>"


def character_class(c):
    """A lower-case character -> itself if ASCII, else `a` for any letter, `0` any number, `!` the rest."""
    return c if c < "\x80" else {"L": "a", "N": "0"}.get(unicodedata.category(c)[0], "!")


def byte_characters():
    """Byte -> the character that stands for it in vocab.json: itself if printable, else one from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


class CLIPTokenizer:
    """CLIP's byte-pair encoding, from a folder's vocab.json and merges.txt, or its tokenizer.json.

    Raises ValueError where there is neither, or a token is lost. A padding token other than the end (`!` in
    SDXL's second) is special wherever it stands in a caption, as in the public tokenizer."""

    def __init__(self, folder, length=77):
        folder = pathlib.Path(folder)
        if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
            self.ids = read_json(folder / "vocab.json")
            lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
            merges = [line.split() for line in lines if line.strip() and not line.startswith("#version")]
        elif (folder / "tokenizer.json").exists():
            model = read_json(folder / "tokenizer.json").get("model") or {}
            self.ids = model.get("vocab") or {}
            merges = [m.split() if isinstance(m, str) else m for m in model.get("merges") or ()]
        else:
            raise ValueError(f"{folder}: looked for a CLIP tokenizer's vocab.json and merges.txt (or "
                             "tokenizer.json), found none; download them")
        self.ranks = {tuple(pair): rank for rank, pair in enumerate(merges)}
        config = folder / "tokenizer_config.json"
        pad = read_json(config).get("pad_token", END) if config.exists() else END
        pad = pad.get("content") if isinstance(pad, dict) else pad
        self.length, self.bytes, self.cache = length, byte_characters(), {}
        ends = [c + end for c in self.bytes.values() for end in ("", "</w>")]
        if lost := [s for s in (START, END, pad, *ends, *map("".join, merges)) if s not in self.ids]:
            raise ValueError(f"{folder}: looked for a CLIP tokenizer (start, end, pad_token, bytes, merges), "
                             f"found no {lost[0]!r} in its vocabulary; download it again")
        self.pad = self.ids[pad]
        self.specials = re.compile("(" + "|".join(re.escape(s) for s in {START, END, pad}) + ")")

    def __call__(self, captions):
        """B captions -> (B, length) long: start, at most length - 2 tokens, end, padding."""
        rows = []
        for caption in captions:
            ids = [self.ids[START], *self.encode(caption)[:self.length - 2], self.ids[END]]
            rows.append(ids + [self.pad] * (self.length - len(ids)))
        return torch.tensor(rows)

    def encode(self, text):
        """A caption -> the list of its ids, without start and end."""
        ids = []
        for i, part in enumerate(self.specials.split(text)):
            ids += [self.ids[part]] if i % 2 else [n for word in self.words(part) for n in self.merge(word)]
        return ids

    def words(self, text):
        """Normalised text, cut where CLIP's expression cuts it."""
        text = re.sub(f"[{SPACES}]+", " ", unicodedata.normalize("NFC", text))
        text = "".join(c.lower() for c in text)        # each alone: Python treats a last sigma otherwise
        classes = "".join(map(character_class, text))   # as long as the text
        return [text[m.start():m.end()] for m in WORDS.finditer(classes)]

    def merge(self, word):
        """The ids of a word: its bytes, the pair of lowest rank merged until none is left."""
        if word not in self.cache:
            parts = [self.bytes[b] for b in word.encode()]
            parts[-1] += "</w>"
            while (best := min(zip(parts, parts[1:]), default=None,
                               key=lambda pair: self.ranks.get(pair, math.inf))) in self.ranks:
                parts = merged(parts, best)
            self.cache[word] = [self.ids[p] for p in parts]
        return self.cache[word]


def merged(parts, pair):
    """The list with every occurrence of the two neighbours `pair` joined, from the left."""
    out = []
    for part in parts:
        if out and (out[-1], part) == pair:
            out[-1] += part             # longer than pair[0] now: never the left of `pair` again
        else:
            out.append(part)
    return out


class SDXLText(nn.Module):
    """SDXL's two frozen CLIP encoders and their tokenizers, with the interface of TextEncoder.

    An empty caption is all zeros, as tokens and as what they give: the null condition, the same in training
    and in sampling. The public pipeline does so for a negative prompt that is not given, but encodes ""."""

    def __init__(self, text_encoder, text_encoder_2, tokenizer, tokenizer_2):
        super().__init__()
        self.text_encoder, self.text_encoder_2 = text_encoder, text_encoder_2
        self.tokenizers = tokenizer, tokenizer_2
        self.requires_grad_(False)

    @classmethod
    def read(cls, folder, device="cpu", dtype=torch.float32):
        """From a public folder. Raises ValueError in one line."""
        folder = pathlib.Path(folder)
        encoders = [read_part(CLIPText, folder / f"text_encoder{end}", device, dtype) for end in ("", "_2")]
        lengths = [encoder.config["max_position_embeddings"] for encoder in encoders]
        return cls(*encoders, *(CLIPTokenizer(folder / f"tokenizer{end}", length)
                                for end, length in zip(("", "_2"), lengths)))

    def tokenize(self, captions):
        """B captions -> (B, 2, 77) long on the CPU; an empty caption is all zeros."""
        tokens = torch.stack([tokenizer(captions) for tokenizer in self.tokenizers], dim=1)
        return tokens * torch.tensor([bool(caption.strip()) for caption in captions])[:, None, None]

    @torch.no_grad()
    def forward(self, tokens):
        """(B, 2, 77) -> context (B, 77, D + D_2): the layers before the last; the second's pooled (B, P)."""
        first, _ = self.text_encoder(tokens[:, 0])                  # (B, 77, D)
        second, pooled = self.text_encoder_2(tokens[:, 1])          # (B, 77, D_2), (B, P)
        real = tokens.flatten(1).any(1)                             # (B,): a caption has start and end
        return torch.cat([first, second], dim=2) * real[:, None, None], pooled * real[:, None]


def shapes(net):
    """A network on the meta device -> what shapes go in and come out, as text: 64 px small, 768 px SDXL's."""
    c, zeros = net.config, torch.zeros
    if isinstance(net, VAE):
        x = zeros(1, 3, 768, 768)
        z = net.encode(x)
        return f"picture {tuple(x.shape)} -> latents {tuple(z.shape)} -> picture {tuple(net.decode(z).shape)}"
    if isinstance(net, (TextEncoder, CLIPText)):
        tokens = zeros(1, c.get("length") or c["max_position_embeddings"], dtype=torch.long)
        context, pooled = net(tokens)
        return f"tokens {tuple(tokens.shape)} -> context {tuple(context.shape)}, pooled {tuple(pooled.shape)}"
    side, pixels, length = (64, 64, 48) if c["patch_size"] > 1 else (96, 768, 77)
    pooled = zeros(1, c["projection_class_embeddings_input_dim"] - 6 * c["addition_time_embed_dim"])
    x, context = zeros(1, c["in_channels"], side, side), zeros(1, length, c["cross_attention_dim"])
    if isinstance(net, UNet):
        out = net(x, zeros(1), context, pooled, zeros(1, 6))
        return f"x {tuple(x.shape)}, context {tuple(context.shape)} -> {tuple(out.shape)}"
    cond = zeros(1, c["conditioning_channels"], pixels, pixels)
    down, middle, _ = net(x, zeros(1), context, pooled, zeros(1, 6), cond)
    return f"x {tuple(x.shape)}, map {tuple(cond.shape)} -> {len(down)} skips, middle {tuple(middle.shape)}"


def main():
    """Prints how many parameters every network of every preset has and where, and its shapes."""
    for preset, networks in PRESETS.items():
        for name, arguments in networks.items():
            cls = dict(unet=UNet, controlnet=ControlNet, vae=VAE, text=TextEncoder).get(name, CLIPText)
            if preset == "tiny" and name == "controlnet":
                arguments = {k: v for k, v in networks["unet"].items() if k != "out_channels"} | arguments
            with torch.device("meta"), torch.no_grad():             # shapes without memory
                net = cls(**arguments)
                said = shapes(net)
            count = sum(p.numel() for p in net.parameters())
            tensors = len(net.state_dict())
            print(f"{preset}/{name}: {cls.__name__}, {count / 1e6:.2f}M parameters in {tensors} tensors")
            print(f"    {said}")
            for part, module in net.named_children():
                print(f"    {part:28}{sum(p.numel() for p in module.parameters()) / 1e6:9.2f}M")


if __name__ == "__main__":
    main()
