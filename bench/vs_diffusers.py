"""unet.py and diffusion.py beside diffusers' SDXL: the same random weights and inputs, in turns.

Measured are the UNet's forward pass, its training step (forward, backward, AdamW), and guided sampling of a
batch from caption to picture: seconds, the share of a matrix product's FLOP a second, and peak memory. Both
sides decode with the VAE in fp32.

Reads:  nothing; the weights are random.
Writes: nothing, unless --json FILE.
Needs:  unet.py, diffusion.py, text2mask.py, bench/turns.py; packages: diffusers, transformers.

    python bench/vs_diffusers.py --width toy --size 64
    python bench/vs_diffusers.py --width sdxl --size 768 --batch 4     # 14 GB in a temporary folder

Dimension key: B batch, C channels, H W pixels of the latents, L caption tokens, D P widths of the text.
"""
import functools
import json
import sys
import tempfile
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import diffusion
import text2mask
import unet as networks
from data.pairs import run
from turns import SIDES, number_of_child, parser_of, peak_memory, report, take_turns

CAPTION = "a room with artwork on the walls"
GUIDANCE = 5.0
WHAT = "forward", "step", "sample"
WIDTHS = {
    "toy": dict(unet=(32, 64, 96), depths=(1, 1, 2), heads=(2, 4, 6), vae=(8, 16, 16, 16),
                text=(32, 48), text_layers=(2, 2), text_head=8),
    "medium": dict(unet=(128, 256, 512), depths=(1, 2, 4), heads=(2, 4, 8), vae=(32, 64, 128, 128),
                   text=(256, 512), text_layers=(2, 2), text_head=8),
    "sdxl": dict(unet=(320, 640, 1280), depths=(1, 2, 10), heads=(5, 10, 20), vae=(128, 256, 512, 512),
                 text=(768, 1280), text_layers=(12, 32), text_head=64),
}


# ---- random weights ----------------------------------------------------------------------------------------

def write_tokenizer(folder):
    """The smallest tokenizer of CLIP's kind: single bytes, no merges."""
    folder.mkdir(parents=True)
    single = list(networks.byte_characters().values())
    last = [c + "</w>" for c in single]                      # of a word
    words = [*single, *last, networks.START, networks.END]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")


def random_text_encoders(width, vocabulary):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
    models = (CLIPTextModel, "quick_gelu"), (CLIPTextModelWithProjection, "gelu")
    encoders = []
    for (Model, activation), size, layers in zip(models, width["text"], width["text_layers"]):
        encoders.append(Model(CLIPTextConfig(
            vocab_size=vocabulary, hidden_size=size, intermediate_size=4 * size, num_hidden_layers=layers,
            num_attention_heads=size // width["text_head"], projection_dim=size, hidden_act=activation,
            eos_token_id=2)))
    return encoders


def random_unet(width):
    from diffusers import UNet2DConditionModel
    return UNet2DConditionModel(
        in_channels=4, out_channels=4, block_out_channels=width["unet"], layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=width["heads"], norm_num_groups=32, use_linear_projection=True,
        cross_attention_dim=sum(width["text"]), transformer_layers_per_block=width["depths"],
        addition_embed_type="text_time", addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=width["text"][1] + 6 * 256)


def random_vae(width):
    from diffusers import AutoencoderKL
    return AutoencoderKL(
        block_out_channels=width["vae"], layers_per_block=2, norm_num_groups=min(width["vae"][0], 32),
        scaling_factor=0.13025, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4)


def write_sdxl(folder, width, device="cpu"):
    """Write a random SDXL of some width to a folder by the public pipeline; from CUDA in fp16."""
    import diffusers
    from transformers import CLIPTokenizer
    torch.manual_seed(0)
    width = WIDTHS[width]
    with tempfile.TemporaryDirectory() as words:
        write_tokenizer(Path(words) / "tokenizer")
        tokenizer = CLIPTokenizer.from_pretrained(f"{words}/tokenizer", model_max_length=77)
    with torch.device(device):
        text_encoders = random_text_encoders(width, len(tokenizer))
        unet = random_unet(width)
        vae = random_vae(width)
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading",
        steps_offset=1)
    pipe = diffusers.StableDiffusionXLPipeline(
        vae, *text_encoders, tokenizer, tokenizer, unet, scheduler, add_watermarker=False)
    if torch.device(device).type == "cuda":
        pipe = pipe.to(torch.float16)
    pipe.save_pretrained(folder)


# ---- the two sides -----------------------------------------------------------------------------------------

class Ours:
    def __init__(self, folder, args, dtype):
        size = (args.size, args.size)
        self.model = text2mask.TextToImage.from_sdxl(folder, args.device, size=size)
        self.unet = self.model.unet.to(dtype)

    def forward(self, x, t, context, pooled, time_ids):
        return self.unet(x, t, context, pooled, time_ids)

    def sample(self, batch, steps):
        return self.model.generate([CAPTION] * batch, range(batch), steps, GUIDANCE, "euler")


class Theirs:
    def __init__(self, folder, args, dtype):
        from diffusers import StableDiffusionXLPipeline
        pipe = StableDiffusionXLPipeline.from_pretrained(folder, dtype=dtype, add_watermarker=False)
        self.pipe = pipe.to(args.device)
        self.pipe.vae.float()
        self.pipe.set_progress_bar_config(disable=True)
        self.unet, self.size = self.pipe.unet, args.size

    def forward(self, x, t, context, pooled, time_ids):
        added = dict(text_embeds=pooled, time_ids=time_ids)
        return self.unet(x, t, context, added_cond_kwargs=added, return_dict=False)[0]

    @torch.no_grad()
    def sample(self, batch, steps):
        generators = [torch.Generator().manual_seed(seed) for seed in range(batch)]
        z = self.pipe([CAPTION] * batch, height=self.size, width=self.size, num_inference_steps=steps,
                      guidance_scale=GUIDANCE, output_type="latent", generator=generators).images
        vae = self.pipe.vae
        return vae.decode(z.float() / vae.config.scaling_factor).sample


def random_inputs(config, args, dtype):
    """The UNet's arguments, for a UNet with this config."""
    B, latent, D = args.batch, args.size // 8, config["cross_attention_dim"]
    P = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, 4, latent, latent, generator=generator)           # (B, C, H, W)
    context = torch.randn(B, 77, D, generator=generator)                 # (B, L, D)
    pooled = torch.randn(B, P, generator=generator)                      # (B, P)
    t = torch.full((B,), 500, device=args.device)                        # (B,)
    time_ids = torch.full((B, 6), args.size, device=args.device)         # (B, 6)
    x, context, pooled = (each.to(args.device, dtype) for each in (x, context, pooled))
    return x, t, context, pooled, time_ids


def build(side, what, folder, args):
    """The call that does `what`, one of WHAT, by one side."""
    training = what == "step"
    dtype = torch.float32 if training else diffusion.precision(args.device)
    library = {"ours": Ours, "theirs": Theirs}[side](folder, args, dtype)
    unet = library.unet.requires_grad_(training)
    if what == "sample":
        return functools.partial(library.sample, args.batch, args.steps)
    forward = functools.partial(library.forward, *random_inputs(unet.config, args, dtype))
    if not training:
        return torch.no_grad()(forward)
    optimiser = torch.optim.AdamW(unet.parameters(), 1e-6, fused=True)

    def step():
        with diffusion.autocast(torch.device(args.device)):
            output = forward()
        output.float().square().mean().backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return output.detach()
    return step


# ---- measuring ---------------------------------------------------------------------------------------------

def matrix_product(device):
    """A call that multiplies two square matrices in the precision that networks compute in, and its FLOP."""
    n = 8192 if str(device).startswith("cuda") else 2048
    a = torch.randn(n, n, device=device, dtype=diffusion.precision(device))
    return lambda: a @ a, 2 * n ** 3


def compare_times(what, folder, args):
    """Both sides in turns -> a row: seconds, difference of the outputs, share of a matrix product's pace."""
    calls = {side: build(side, what, folder, args) for side in SIDES}
    calls["product"], product_flop = matrix_product(args.device)
    seconds, outputs = take_turns(calls, args.rounds, args.device)
    with FlopCounterMode(display=False) as counter:
        calls["ours"]()
    pace = product_flop / seconds.pop("product")
    ours, theirs = (outputs[side].float() for side in SIDES)
    row = dict(what=f"{what}, s", **seconds)
    row["difference"] = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    for side in SIDES:
        row[f"{side} of product"] = counter.get_total_flops() / seconds[side] / pace
    return row


def measure(args, folder, argv):
    """Yield the rows of the table: times first, then memory in MB."""
    for what in args.what if args.rounds else ():
        yield compare_times(what, folder, args)
    for what in args.what if args.memory else ():
        peaks = {side: number_of_child(*argv, "--peak", side, what, folder) for side in SIDES}
        yield dict(what=f"{what}, MB", **peaks)


def print_peak(args):
    """What a process that measures memory does. Both sides start from the same imports."""
    from diffusers import StableDiffusionXLPipeline  # noqa: F401
    side, what, folder = args.peak
    repeat = 2 if what == "step" else 1
    print(peak_memory(lambda: build(side, what, folder, args), args.device, repeat))


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = parser_of(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--width", choices=WIDTHS, default="toy", help="of the networks")
    add("--size", type=int, default=64, help="side of the square pictures")
    add("--batch", type=int, default=2, help="pictures at a time")
    add("--steps", type=int, default=25, help="of the sampler")
    add("--what", nargs="+", choices=WHAT, default=list(WHAT), help="what is measured")
    args = parser.parse_args(argv)
    if args.peak:
        return print_peak(args)
    with tempfile.TemporaryDirectory() as folder:
        write_sdxl(folder, args.width, args.device)
        report(measure(args, folder, argv), args)


if __name__ == "__main__":
    run(main)
