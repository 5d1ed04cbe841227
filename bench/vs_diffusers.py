"""unet.py and diffusion.py beside diffusers' SDXL: the same random weights and inputs, turn by turn.

Measured: the UNet's forward pass, its training step (forward, backward, AdamW), and guided sampling of a
batch from caption to picture. The two take turns within one process, so that other load of the machine falls
on both; the table gives medians, and the share of a matrix product's peak, measured between turns. Memory
is measured in processes of their own: on the CPU the highest resident size above that of a process with
everything imported and nothing built, on CUDA the allocator's peak. Both sides decode with the VAE in fp32.

Needs:  unet.py, diffusion.py, text2mask.py; packages: diffusers, transformers
Writes: nothing, unless --json FILE

    python bench/vs_diffusers.py --width toy --size 64
    python bench/vs_diffusers.py --width sdxl --size 768 --batch 4   # 14 GB in a temporary folder
"""
import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import diffusion  # noqa: E402
import text2mask  # noqa: E402
import unet as networks  # noqa: E402

WIDTHS = {          # UNet widths, transformer depths, heads, VAE widths, text widths
    "toy": ((32, 64, 96), (1, 1, 2), (2, 4, 6), (8, 16, 16, 16), (32, 48)),
    "medium": ((128, 256, 512), (1, 2, 4), (2, 4, 8), (32, 64, 128, 128), (256, 512)),
    "sdxl": ((320, 640, 1280), (1, 2, 10), (5, 10, 20), (128, 256, 512, 512), (768, 1280)),
}
WHAT = ("forward", "step", "sample")
CAPTION = "a room with artwork on the walls"


def write_words(folder):
    """The smallest tokenizer of CLIP's kind: single bytes, no merges."""
    folder.mkdir(parents=True)
    single = list(networks.byte_characters().values())
    vocab = [*single, *(c + "</w>" for c in single), networks.START, networks.END]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(vocab)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")


def make_weights(folder, width, device="cpu"):
    """A random SDXL of some width, made on a device and written by the public pipeline; from CUDA in fp16."""
    import diffusers
    import transformers
    torch.manual_seed(0)
    unet, depths, heads, vae, text = WIDTHS[width]
    write_words(folder / "words")
    words = transformers.CLIPTokenizer.from_pretrained(str(folder / "words"), model_max_length=77)
    with torch.device(device):
        layers = (12, 32) if width == "sdxl" else (2, 2)
        clip = [cls(transformers.CLIPTextConfig(
            vocab_size=len(words), hidden_size=size, intermediate_size=4 * size, num_hidden_layers=n,
            num_attention_heads=size // (64 if width == "sdxl" else 8), projection_dim=size, hidden_act=act,
            eos_token_id=2))
            for cls, size, n, act in ((transformers.CLIPTextModel, text[0], layers[0], "quick_gelu"),
                                      (transformers.CLIPTextModelWithProjection, text[1], layers[1], "gelu"))]
        net = diffusers.UNet2DConditionModel(
            in_channels=4, out_channels=4, block_out_channels=unet, layers_per_block=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=heads, norm_num_groups=32, use_linear_projection=True,
            cross_attention_dim=sum(text), transformer_layers_per_block=depths,
            addition_embed_type="text_time", addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=text[1] + 6 * 256)
        vae = diffusers.AutoencoderKL(
            block_out_channels=vae, layers_per_block=2, norm_num_groups=min(vae[0], 32),
            scaling_factor=0.13025,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    noise = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading",
        steps_offset=1)
    pipe = diffusers.StableDiffusionXLPipeline(vae, *clip, words, words, net, noise, add_watermarker=False)
    (pipe.to(torch.float16) if torch.device(device).type == "cuda" else pipe).save_pretrained(folder / "base")


class Ours:
    def __init__(self, base, device, size, steps, what):
        kind = torch.float32 if what == "step" else diffusion.precision(device)     # what is trained is fp32
        with torch.device(device):
            self.model = text2mask.TextToImage(base=base / "base", size=(size, size))
            networks.fill(self.model.unet, networks.read_tensors(
                networks.weight_files(base / "base" / "unet"), device, kind), base)
        self.unet, self.size, self.steps = self.model.unet, size, steps

    def forward(self, x, t, context, pooled, time_ids):
        return self.unet(x, t, context, pooled, time_ids)

    def sample(self, batch):
        self.model.text.__dict__.pop("memory", None)         # each call encodes its text
        return self.model.draw([CAPTION] * batch, range(batch), self.steps, 5.0, "euler")


class Theirs:
    def __init__(self, base, device, size, steps, what):
        import diffusers
        kind = torch.float32 if what == "step" else diffusion.precision(device)
        self.pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(
            base / "base", dtype=kind, add_watermarker=False).to(device)
        self.pipe.vae.float()
        self.pipe.set_progress_bar_config(disable=True)
        self.unet, self.size, self.steps = self.pipe.unet, size, steps

    def forward(self, x, t, context, pooled, time_ids):
        return self.unet(x, t, context, added_cond_kwargs=dict(text_embeds=pooled, time_ids=time_ids),
                         return_dict=False)[0]

    @torch.no_grad()
    def sample(self, batch):
        vae = self.pipe.vae
        z = self.pipe([CAPTION] * batch, height=self.size, width=self.size, num_inference_steps=self.steps,
                      guidance_scale=5.0, output_type="latent",
                      generator=[torch.Generator().manual_seed(i) for i in range(batch)]).images
        return vae.decode(z.float() / vae.config.scaling_factor).sample


class Runner:
    """One of the two libraries: run(batch) -> seconds that one call took, and what it gave."""

    def __init__(self, side, base, what, args):
        base, self.what, self.device = Path(base), what, torch.device(args.device)
        self.side = {"ours": Ours, "theirs": Theirs}[side](base, args.device, args.size, args.steps, what)
        self.side.unet.requires_grad_(what == "step")
        if what == "step":
            self.optimiser = torch.optim.AdamW(self.side.unet.parameters(), 1e-6, fused=True)
        c, g, b, latent = self.side.unet.config, torch.Generator().manual_seed(0), args.batch, args.size // 8
        width = c["projection_class_embeddings_input_dim"] - 6 * c["addition_time_embed_dim"]
        kind = torch.float32 if what == "step" else diffusion.precision(args.device)
        shapes = (b, 4, latent, latent), (b, 77, c["cross_attention_dim"]), (b, width)
        x, context, pooled = (torch.randn(shape, generator=g).to(self.device, kind) for shape in shapes)
        t, ids = torch.full((b,), 500, device=self.device), torch.full((b, 6), args.size, device=self.device)
        self.data, self.batch = (x, t, context, pooled, ids), b

    def call(self):
        if self.what == "sample":
            return self.side.sample(self.batch)
        if self.what == "forward":
            with torch.no_grad():
                return self.side.forward(*self.data)
        with diffusion.autocast(self.device):
            out = self.side.forward(*self.data)
        out.float().square().mean().backward()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return out

    def run(self):
        start = self.now()
        out = self.call()
        return self.now() - start, out

    def now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def gemm_peak(device):
    """FLOP a second of a square matrix product in the precision that networks compute in."""
    n = 8192 if device.startswith("cuda") else 1024
    a, times = torch.randn(n, n, device=device, dtype=diffusion.precision(device)), []
    for _ in range(5):
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        times.append(time.perf_counter() - start)
    return 2 * n ** 3 / min(times)


def resident(name):
    """VmRSS or VmHWM of this process in MB."""
    return int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0]) / 1024


def peak(side, base, what, args):
    """MB at the peak of a call, the weights included (a step: gradients and optimiser state as well)."""
    import diffusers  # noqa: F401, both sides start from the same imports
    from diffusers import StableDiffusionXLPipeline  # noqa: F401
    before = resident("VmRSS")
    runner = Runner(side, base, what, args)
    if args.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")        # the peak of loading is not that of running
    for _ in range(2 if what == "step" else 1):              # from the second on the optimiser has its state
        runner.run()
    cuda = args.device.startswith("cuda")
    return torch.cuda.max_memory_allocated() / 2 ** 20 if cuda else resident("VmHWM") - before


def duel(base, what, args):
    """Both sides in turns -> a row: median seconds, how far apart the outputs are, share of the GEMM peak."""
    runners = {side: Runner(side, base, what, args) for side in ("ours", "theirs")}
    times, peaks, outs = {side: [] for side in runners}, [], {}
    for turn in range(args.rounds + 1):                      # the first turn warms up
        peaks.append(gemm_peak(args.device))
        for side in sorted(runners, reverse=turn % 2):
            seconds, out = runners[side].run()
            times[side].append(seconds)
            outs.setdefault(side, out.detach().float())      # of the first turn: no side has trained yet
    with FlopCounterMode(display=False) as count:
        runners["ours"].call()
    middle = {side: statistics.median(t[1:]) for side, t in times.items()}
    flops, best = count.get_total_flops(), statistics.median(peaks)
    apart = ((outs["ours"] - outs["theirs"]).abs().max() / outs["theirs"].abs().max()).item()
    return dict(what=f"{what}, s", **middle, apart=apart,
                **{f"{side} of GEMM peak": flops / seconds / best for side, seconds in middle.items()})


def measure(args, base):
    for what in args.what if args.rounds else ():
        yield duel(base, what, args)
    for what in args.what if args.memory else ():
        own = [str(part) for key in ("width", "size", "batch", "steps", "device")
               for part in (f"--{key}", getattr(args, key))]
        found = {}
        for side in ("ours", "theirs"):
            child = [sys.executable, __file__, *own, "--peak", side, str(base), what]
            said = subprocess.run(child, check=True, stdout=subprocess.PIPE, text=True).stdout
            found[side] = float(said.split()[-1])
        yield dict(what=f"{what}, MB", **found)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--width", choices=WIDTHS, default="toy", help="of the networks")
    parser.add_argument("--size", type=int, default=64, help="side of the square pictures")
    parser.add_argument("--batch", type=int, default=2, help="pictures at a time")
    parser.add_argument("--steps", type=int, default=25, help="of the sampler")
    parser.add_argument("--what", nargs="+", choices=WHAT, default=list(WHAT))
    parser.add_argument("--rounds", type=int, default=5, help="turns of each, 0: memory only")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peaks")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        return print(peak(*args.peak, args))
    with tempfile.TemporaryDirectory() as folder:
        make_weights(Path(folder), args.width, args.device)
        rows = []
        for row in measure(args, folder):
            rows.append(row)
            rest = "  ".join(f"{key} {value:.3g}" for key, value in list(row.items())[3:])
            print(f"{row['what']:12} ours {row['ours']:9.3f}  diffusers {row['theirs']:9.3f}  "
                  f"ratio {row['theirs'] / row['ours']:.2f}  {rest}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(dict(threads=torch.get_num_threads(), **vars(args) | {"json": None},
                                             rows=rows), indent=1) + "\n")


if __name__ == "__main__":
    main()
