"""Diffusion for any network: noising, its loss, guidance, samplers, and a training loop that can be resumed.

Data x0 is noised to x_t = a_t x0 + s_t noise with a_t^2 + s_t^2 = 1. A network sees (x_t, t) and predicts x0,
the noise, or a mix of both (v). Samplers walk x = x_t / a_t = x0 + sigma noise while sigma = s_t / a_t falls
to 0, and need nothing but a function (x, sigma) -> x0 (`denoiser` makes it, and scales x back to x_t). So any
network, any conditioning and any guidance fit every sampler.

Paper:   SegGen samples masks with EDM's stochastic sampler in 200 steps and images in 40 [N]. DDPM
         (2006.11239), DDIM (2010.02502), EDM (2206.00364), DPM-Solver++ (2211.01095), classifier-free
         guidance (2207.12598), min-SNR weighting (2303.09556), v-prediction (2202.00512).
Differs: the process keeps SDXL's 1000 discrete steps, and samplers that need a sigma between two of them
         interpolate; DDIM is deterministic Euler in sigma that ends at 0 (diffusers' set_alpha_to_one).
Reads:   any map-style torch Dataset.
Writes:  OUT/{model.safetensors, state.pt, log.jsonl, log.png, samples.png} (fit), out/toy (the demo). Of a
         model on a public base only the trained network is saved, in the public layout.
Needs:   no sibling file.

    python diffusion.py            # learns a 2-D spiral in seconds, writes out/toy/samples.png

Dimension key: B batch, C channels, H W pixels, T noise levels.
"""
import argparse
import contextlib
import datetime
import hashlib
import json
import math
import os
import pickle
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

FORMAT = "seggen-1"  # changes when the key layout of our checkpoints changes
OWN_FILE, PUBLIC_FILE = "model.safetensors", "diffusion_pytorch_model.safetensors"
LORA_FILE = "pytorch_lora_weights.safetensors"  # the public name of a LoRA's weights
ALWAYS = 0.0, math.inf  # the interval of noise levels in which guidance is on
# What trainings leave in their folders
RUN_FILES = {OWN_FILE, PUBLIC_FILE, LORA_FILE, "config.json", "best.safetensors", "state.pt", "settings.json",
             "log.jsonl", "log.png", "metrics.json", "samples.png"}


# ---- the process -------------------------------------------------------------------------------------------

class Schedule:
    """The noise levels of T discrete steps and what the network's output means.

    kind        "scaled_linear": Stable Diffusion's and SDXL's betas. "cosine": uniform in the angle
                atan(sigma) between EDM's sigmas 0.002 and 80: more time on the middle levels, which is where
                pixels need it.
    prediction  "epsilon" (the noise), "v_prediction" (a noise - s x0) or "sample" (diffusers' word for x0).
    spacing     "leading" (+ offset), "trailing" or "linspace": which of the T steps a sampler of n visits.
    """

    def __init__(self, kind="scaled_linear", prediction="epsilon", spacing="leading", offset=1, T=1000):
        if prediction not in ("epsilon", "v_prediction", "sample"):
            raise ValueError(f"prediction {prediction!r}: epsilon, v_prediction or sample is needed")
        if spacing not in ("leading", "trailing", "linspace"):
            raise ValueError(f"spacing {spacing!r}: leading, trailing or linspace is needed")
        self.config = dict(kind=kind, prediction=prediction, spacing=spacing, offset=offset, T=T)
        self.prediction, self.spacing, self.offset, self.T = prediction, spacing, offset, T
        if kind == "scaled_linear":
            betas = torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, T, dtype=torch.float32) ** 2
            alpha_bar = torch.cumprod(1 - betas, 0)
        elif kind == "cosine":
            angle = torch.linspace(math.atan(0.002), math.atan(80.0), T, dtype=torch.float64)
            alpha_bar = (torch.cos(angle) ** 2).float()
        else:
            raise ValueError(f"schedule kind {kind!r}: scaled_linear or cosine is needed")
        self.a = alpha_bar.sqrt()                           # (T,) share of the data
        self.s = (1 - alpha_bar).sqrt()                     # (T,) share of the noise
        self.sigmas = ((1 - alpha_bar) / alpha_bar).sqrt()  # (T,) rising
        self.log_sigmas = np.array([math.log(sigma) for sigma in self.sigmas.tolist()])

    @classmethod
    def from_public(cls, path):
        """SDXL's scheduler_config.json -> Schedule. Raises ValueError if its noise levels differ.

        What the file says of its own sampler (Karras sigmas, solver order, ...) is not read.
        """
        config = read_json(path, "Download it again")
        required = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
                        num_train_timesteps=1000)
        for key, value in required.items():
            if config.get(key) != value:
                raise ValueError(f"{path}: {key} is {config.get(key)!r}, SDXL's is {value!r}. Use its file")
        if config.get("rescale_betas_zero_snr"):
            raise ValueError(f"{path}: noise levels of zero SNR are not SDXL's. Use its own file")
        return cls(prediction=config["prediction_type"], spacing=config["timestep_spacing"],
                   offset=config.get("steps_offset", 0))

    def scales(self, t, ndim):
        """t (B,) long -> a_t and s_t, shaped to broadcast over tensors of that many dimensions."""
        self.a, self.s = self.a.to(t.device), self.s.to(t.device)  # moved once: a copy makes the CPU wait
        shape = (-1,) + (1,) * (ndim - 1)
        return self.a[t].view(shape), self.s[t].view(shape)

    def add_noise(self, x0, noise, t):
        """x_t of x0 (B, ...), unit normal noise of that shape and t (B,)."""
        a, s = self.scales(t, x0.ndim)
        return a * x0 + s * noise

    def target(self, x0, noise, t):
        """What the network should predict at x_t."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "sample":
            return x0
        a, s = self.scales(t, x0.ndim)
        return a * noise - s * x0

    def to_x0(self, out, x_t, sigma):
        """The network's output at x_t and noise level sigma (a float) -> x0."""
        if self.prediction == "sample":
            return out
        a = 1 / math.sqrt(1 + sigma ** 2)
        s = sigma * a
        return (x_t - s * out) / a if self.prediction == "epsilon" else a * x_t - s * out

    def weight(self, t, min_snr):
        """The min-SNR weight of each t (B,), with SNR = a^2 / s^2.

        Every loss becomes the error of x0 times min(SNR, min_snr). Without the cap, nearly clean inputs would
        weigh most, and they teach little. "sample" takes min(SNR + 1, min_snr): SNR is 0 at pure noise.
        """
        a, s = self.scales(t, t.ndim)
        snr = (a / s) ** 2
        if self.prediction == "sample":
            return (snr + 1).clamp(max=min_snr)
        return snr.clamp(max=min_snr) / (snr + 1 if self.prediction == "v_prediction" else snr)

    def time_step(self, sigma):
        """A noise level -> its (fractional) step in [0, T - 1], linear in log sigma."""
        return float(np.interp(math.log(max(sigma, 1e-10)), self.log_sigmas, np.arange(self.T)))

    def visited_steps(self, n, sampler):
        """Which of the T steps a sampler of n visits: n falling integers, by the public schedulers' rules."""
        # For dpm++ diffusers spaces n + 1 steps and leaves out the least noisy, but not with "trailing".
        T, count = self.T, n + (sampler == "dpm++")
        if self.spacing == "leading":
            t = np.arange(count)[::-1][:n] * (T // count) + self.offset
        elif self.spacing == "trailing":
            t = np.round(T - np.arange(n) * T / n) - 1
        else:
            t = np.linspace(0, T - 1, count).round()[::-1][:n]
        t = np.clip(t, 0, T - 1).astype(int)
        if (levels := len(set(t.tolist()))) < n:  # equal levels give h = 0, and a division by it
            raise ValueError(f"{n} sampling steps: there are only {levels} noise levels. Use fewer steps")
        return t

    def noise_levels(self, n, sampler):
        """n steps of a sampler -> n + 1 falling sigmas, the last one 0."""
        if n > self.T:
            raise ValueError(f"{n} sampling steps: there are only {self.T} noise levels. Use fewer steps")
        if sampler != "edm":
            return self.sigmas[torch.as_tensor(self.visited_steps(n, sampler))].tolist() + [0.0]
        rho = 7  # EDM eq. 5
        top, low = self.sigmas[-1].item() ** (1 / rho), self.sigmas[0].item() ** (1 / rho)
        return [(top + i / max(n - 1, 1) * (low - top)) ** rho for i in range(n)] + [0.0]


def read_json(path, remedy):
    """The content of a JSON file. Raises ValueError with the path and the remedy where it is none."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file ({error}). {remedy}")


def loss(model, schedule, x0, *cond, min_snr=None, t=None, noise=None):
    """Mean squared error of the network's prediction at a noise level of each sample.

    x0 (B, ...) in about [-1, 1]; model is called as model(x_t, t, *cond); min_snr: as in Schedule.weight;
    t (B,) long, by default uniform; noise as x0, by default unit normal.
    """
    if t is None:
        t = torch.randint(schedule.T, (len(x0),), device=x0.device)  # (B,)
    if noise is None:
        noise = torch.randn_like(x0)
    out = model(schedule.add_noise(x0, noise, t), t, *cond)
    error = F.mse_loss(out.float(), schedule.target(x0, noise, t), reduction="none")
    error = error.flatten(1).mean(1)  # (B,)
    return (error if min_snr is None else error * schedule.weight(t, min_snr)).mean()


# ---- sampling ----------------------------------------------------------------------------------------------

def denoiser(model, schedule, cond, uncond=None, guidance=1.0, interval=ALWAYS, to_x0=None):
    """A conditioned network -> the function denoise(x, sigma) -> x0 that every sampler needs.

    cond, uncond  tuples of further arguments of the model, for B samples with and without their condition
    guidance      classifier-free guidance: out = uncond + guidance (cond - uncond); 1 = none
    interval      guide only while interval[0] < sigma <= interval[1]: in strong noise guidance makes all
                  samples alike, and at the end, when what a picture shows is settled, it exaggerates
                  (2404.07724)
    to_x0         turns outputs into x0 where they are neither x0, v nor noise (Text2Mask's logits)
    """
    guided = uncond is not None and guidance != 1
    both = join(uncond, cond) if guided else None  # one batch of 2 B

    def denoise(x, sigma):
        guide = guided and interval[0] < sigma <= interval[1]
        x_t = x / math.sqrt(1 + sigma ** 2)  # of unit variance, as in training
        inputs = torch.cat([x_t, x_t]) if guide else x_t
        t = torch.full((len(inputs),), schedule.time_step(sigma), device=x.device)
        out = model(inputs, t, *(both if guide else cond)).float()
        if guide:
            out_uncond, out_cond = out.chunk(2)
            out = out_uncond + guidance * (out_cond - out_uncond)
        return to_x0(out) if to_x0 else schedule.to_x0(out, x_t, sigma)
    return denoise


def join(a, b):
    """Two equally nested tuples of tensors -> one, concatenated along the batch."""
    return torch.cat([a, b]) if torch.is_tensor(a) else tuple(join(i, j) for i, j in zip(a, b))


@torch.no_grad()
def sample(denoise, schedule, noise, steps, sampler="dpm++", randn=torch.randn_like, churn=40.0):
    """noise (B, C, ...), unit normal -> samples x0 of that shape.

    denoise   (x, sigma) -> x0, as `denoiser` makes it
    sampler   "euler"; "ddim", the same walk with DDIM's start; "dpm++", DPM-Solver++(2M); "edm", EDM's
              stochastic algorithm 2, which evaluates the network twice a step and adds `churn` fresh noise
    randn     randn(x) -> fresh noise for EDM
    """
    sigmas = schedule.noise_levels(steps, sampler)
    # diffusers starts ddim, dpm++ and leading euler at the deviation of x, sqrt(1 + sigma^2), the others at
    # sigma. Above 20 the two are nearly equal, and it is sigma.
    adds_data = sampler in ("ddim", "dpm++") or (sampler == "euler" and schedule.spacing == "leading")
    first = sigmas[0]
    if adds_data and first < 20:
        first = math.sqrt(1 + first ** 2)
    walk = list(zip(sigmas, sigmas[1:]))
    if sampler == "edm":
        return edm(denoise, noise * first, walk, randn, churn)
    return SAMPLERS[sampler](denoise, noise * first, walk)


def euler(denoise, x, walk):
    """walk: pairs (sigma, next sigma). The slope dx/dsigma is (x - x0) / sigma."""
    for sigma, below in walk:
        x = x + (below - sigma) * (x - denoise(x, sigma)) / sigma
    return x


def dpm_solver(denoise, x, walk):
    """DPM-Solver++(2M), its algorithm 2, in sigma: the last two x0 extrapolate half a step ahead."""
    previous, h_previous = None, None
    for sigma, below in walk:
        now = denoise(x, sigma)
        if below == 0:
            return now
        h = math.log(sigma / below)
        ahead = now if previous is None else now + (now - previous) * h / (2 * h_previous)
        x = below / sigma * x - math.expm1(-h) * ahead
        previous, h_previous = now, h


def edm(denoise, x, walk, randn, churn, low=0.05, high=50.0, noise_scale=1.003):
    """EDM's stochastic sampler (algorithm 2 with table 5's ImageNet values; churn 0 is plain Heun)."""
    gamma = min(churn / len(walk), math.sqrt(2) - 1)
    top = walk[0][0]
    for sigma, below in walk:
        # Raise the noise level a little by fresh noise, never above where the network was trained.
        raised = min(sigma * (1 + gamma), top) if low <= sigma <= high else sigma
        if raised > sigma:
            x = x + math.sqrt(raised ** 2 - sigma ** 2) * noise_scale * randn(x)
        # An Euler step, then Heun's correction by the slope where it ends.
        slope = (x - denoise(x, raised)) / raised
        ahead = x + (below - raised) * slope
        if below > 0:
            slope_ahead = (ahead - denoise(ahead, below)) / below
            ahead = x + (below - raised) * 0.5 * (slope + slope_ahead)
        x = ahead
    return x


# ddim and euler differ in where they start only, see `sample`
SAMPLERS = {"dpm++": dpm_solver, "ddim": euler, "euler": euler, "edm": edm}


# ---- training ----------------------------------------------------------------------------------------------

class EMA:
    """Exponential moving average of the trained parameters.

    The last steps jump about the optimum by the learning rate; their average lies closer to it and gives
    better samples, so it is what is saved and sampled. Its state holds the trained weights too: a RunFolder
    needs no entry for the model.
    """

    def __init__(self, model, decay=0.999):
        self.decay, self.step = decay, 0
        self.params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.shadow = {name: p.detach().clone() for name, p in self.params.items()}

    @torch.no_grad()
    def update(self):
        self.step += 1
        decay = min(self.decay, (1 + self.step) / (10 + self.step))  # follows closely at first
        torch._foreach_lerp_(list(self.shadow.values()), list(self.params.values()), 1 - decay)

    @contextlib.contextmanager
    def applied_to_model(self):
        """The model carries the average inside the block and its own weights again after it."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self):
        """Exchange weights and average, one tensor at a time: no second copy of the model."""
        for name, p in self.params.items():
            own = p.clone()
            p.copy_(self.shadow[name])
            self.shadow[name].copy_(own)

    def state_dict(self):
        params = {name: p.detach() for name, p in self.params.items()}
        return dict(params=params, shadow=self.shadow, step=self.step)

    @torch.no_grad()
    def load_state_dict(self, state):
        self.step = state["step"]
        for name, p in self.params.items():
            p.copy_(state["params"][name])
            self.shadow[name].copy_(state["shadow"][name])


class RunFolder:
    """The folder of a training: its log, and the state that an exact resume needs.

    out       gets state.pt (states of all parts, step, log, settings; frozen weights are not in it),
              settings.json, log.jsonl, a line for each report, and log.png, its curves
    settings  JSON values that make it this run and no other; "steps" and "world" may change between saves
    rank      only rank 0 writes
    parts     what has a state: objects with state_dict() and load_state_dict()
    """

    def __init__(self, out, settings, rank=0, **parts):
        self.out, self.rank, self.parts, self.log = Path(out), rank, parts, []
        self.settings = json.loads(json.dumps(settings))  # as they come back from a file

    def resume(self):
        """Load state.pt where there is one -> the step to go on from; 0 for a new run.

        Raises ValueError where the state is of a run with other settings, or unreadable.
        """
        path = self.out / "state.pt"
        self.check_folder()
        self.out.mkdir(parents=True, exist_ok=True)
        for temporary in self.out.glob(".tmp*") if self.rank == 0 else ():  # of a run that was killed
            temporary.unlink()
        if not path.exists():
            if (self.out / "settings.json").exists():  # somebody removed state.pt of a run
                self.check_settings(json.loads((self.out / "settings.json").read_text()))
            return 0
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{path}: not a state to resume ({reason}). Delete {self.out} to start again")
        self.check_settings(json.loads(state.get("settings", "{}")))
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.log = json.loads(state["log"])
        step = state["step"]
        finished = step >= self.settings.get("steps", math.inf)
        if self.rank == 0:
            words = f"{step} steps are done already" if finished else f"goes on after step {step}"
            print(f"{self.out}: {words}", flush=True)
        return step

    def check_folder(self):
        """Raises ValueError where `out` is a file, or a folder of other things than a training's."""
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"{self.out}: is a file. Choose a folder")
        foreign = [path.name for path in self.out.glob("[!.]*") if path.name not in RUN_FILES]
        if foreign and not (self.out / "state.pt").exists():
            raise ValueError(f"{self.out}: holds other files ({min(foreign)}). Choose another folder")

    def check_settings(self, old):
        """Raises ValueError unless the settings of a state are those of this run, but for steps and ranks."""
        if self.settings.keys() - old.keys():  # settings that another script does not have
            raise ValueError(f"{self.out}: holds another kind of run. Choose another folder or delete it")
        changed = differences(old, self.settings)
        if "world" in changed and self.rank == 0:
            print(f"{self.out}: {old['world']} ranks then, {self.settings['world']} now. From here on its "
                  "weights differ from an undisturbed run's")
        values = "; ".join(text for key, text in changed.items() if key not in ("steps", "world"))
        if values:
            raise ValueError(f"{self.out}: holds a run with other settings ({values:.400}). Choose another "
                             "folder or delete it")

    def save(self, step):
        """Write state.pt, the last file of a save: where it exists, the others are there too."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state.update(step=step, log=json.dumps(self.log), settings=json.dumps(self.settings))
        if self.rank == 0:
            with atomic_write(self.out / "settings.json") as temporary:
                temporary.write_text(json.dumps(self.settings, indent=1) + "\n")
            with atomic_write(self.out / "state.pt") as temporary, open(temporary, "wb") as file:
                torch.save(state, file)

    def report(self, bar, **line):
        """Add a line to the log and print it above the progress bar, which shows the loss from then on."""
        line = {key: float(f"{value:.5g}") if isinstance(value, float) else value
                for key, value in line.items()}
        self.log.append(line)
        if self.rank == 0:
            with atomic_write(self.out / "log.jsonl") as temporary:
                temporary.write_text("".join(json.dumps(entry) + "\n" for entry in self.log))
            with atomic_write(self.out / "log.png") as temporary:
                draw_log(self.log).save(temporary)
            bar.write("  ".join(f"{key} {value}" for key, value in line.items()))
            bar.set_postfix(loss=line["loss"], refresh=False)

    def check_finite(self, losses, step):
        """Raises ValueError where one of the losses (a list of scalars) up to `step` is NaN or infinite."""
        bad = (~torch.isfinite(torch.stack(losses))).nonzero()
        if len(bad):
            first = step - len(losses) + bad[0].item() + 1
            saved = (self.out / "state.pt").exists()
            kept = "The last good state is kept" if saved else "Nothing was saved yet"
            raise ValueError(f"{self.out}: the loss or its gradient was not finite at step {first}. {kept}; "
                             "train with a lower learning rate in another folder")


def flatten(value, name=""):
    """Nested dicts and lists -> {"outer.inner": value}."""
    if not isinstance(value, (dict, list)):
        return {name: value}
    flat = {}
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value, 1):
        flat |= flatten(inner, f"{name}.{key}" if name else str(key))
    return flat


def differences(old, new):
    """Two nested dicts -> {name: "name a then, b now"} of all that differs."""
    old, new = flatten(old), flatten(new)
    return {key: f"{key} {old.get(key)} then, {new.get(key)} now" for key in new | old
            if old.get(key) != new.get(key)}


def check_output(out, meta):
    """Raises ValueError where `out` holds pairs of other settings, data or weights, or anything else.

    meta: the content of OUT/meta.json that these pairs would have
    """
    if not out.exists():
        return
    path = out / "meta.json"
    # In this order: meta.json comes first where another process begins to write there now.
    if not out.is_dir() or any(out.glob("[!.]*")) and not path.is_file():
        raise ValueError(f"{out}: exists, and is no folder of a synthesis (it has no meta.json). Choose "
                         "another folder")
    old = read_json(path, "Choose another folder or delete it") if path.is_file() else meta
    changed = "; ".join(differences(old, meta).values())
    if changed:
        raise ValueError(f"{out}: holds pairs of other settings, data or weights ({changed}). Choose another "
                         "folder or delete it")


def draw_log(log, width=360, height=150):
    """The lines of a log -> a PIL picture: a curve for every number in them, over the steps."""
    curves = {}
    for line in log:
        for key, value in line.items():
            if key != "step" and isinstance(value, (int, float)):
                curves.setdefault(key, []).append((line["step"], value))
    sheet = Image.new("RGB", (2 * width, height * math.ceil(len(curves) / 2)), "white")
    draw = ImageDraw.Draw(sheet)
    for n, (key, points) in enumerate(curves.items()):
        left, top = n % 2 * width, n // 2 * height
        low, high = min(y for _, y in points), max(y for _, y in points)
        scale_x, scale_y = (width - 20) / log[-1]["step"], (height - 45) / max(high - low, 1e-12)
        corners = [(left + 10 + x * scale_x, top + height - 15 - (y - low) * scale_y) for x, y in points]
        draw.line(corners, fill="#2850aa", width=2)
        x, y = corners[-1]
        draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill="#2850aa")
        draw.text((left + 10, top + 5), f"{key}: {points[-1][1]:.5g}   ({low:.5g} to {high:.5g})", "black")
    return sheet


def peak_memory(device):
    """The most memory used so far, in MB: of the GPU, else of the process."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2 ** 20)
    import resource  # Windows has none
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def seed_of(*parts):
    """Any values -> a seed; the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


class SeededBatches(torch.utils.data.Sampler):
    """Step by step, micro-batches of (index, seed). What is in them depends on (seed, step, rank) alone.

    Indices are chosen with replacement: there are no epochs. groups (length,) integers, if given: a step is
    of one group.
    """

    def __init__(self, length, batch, accumulate, first, steps, seed, rank, groups=None):
        self.length, self.batch, self.accumulate, self.groups = length, batch, accumulate, groups
        self.steps, self.seed, self.rank = range(first, steps), seed, rank

    def __iter__(self):
        size = self.batch * self.accumulate
        for step in self.steps:
            rng = np.random.default_rng(seed_of(self.seed, step, self.rank, "batch"))
            index, seeds = rng.integers(self.length, size=size), rng.integers(2 ** 62, size=size)
            if self.groups is not None:  # of the first index, so that a group is as likely as it is large
                members = np.flatnonzero(self.groups == self.groups[index[0]])
                index = rng.choice(members, size)
            keys = list(zip(index.tolist(), seeds.tolist()))
            yield from (keys[part::self.accumulate] for part in range(self.accumulate))

    def __len__(self):
        return len(self.steps) * self.accumulate


class SeededItems(torch.utils.data.Dataset):
    """Any map-style data set, asked for (index, seed): torch is seeded before the item is made."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, key):
        index, seed = key
        torch.default_generator.manual_seed(seed)  # torch.manual_seed takes 0.7 ms
        return self.dataset[index]


def precision(device):
    """What networks compute in: bf16 on CUDA, fp32 elsewhere. At paper scale frozen weights are in it too."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


def autocast(device):
    return torch.autocast(device.type, torch.bfloat16, enabled=precision(device) == torch.bfloat16)


def setup(device="auto"):
    """Choose the device and, under torchrun, join the process group -> (device, rank, world size). Turns on
    TF32. It may be called again.

    device: "auto", "cpu", "cuda" or "cuda:1". Raises ValueError where there is no such device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = device.partition(":")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(f"device {device}: not a device. Use cpu, cuda, cuda:1 ... or auto")
    if kind == "cuda":
        index = int(index or (os.environ["LOCAL_RANK"] if world > 1 else 0))
        if index >= torch.cuda.device_count():
            raise ValueError(f"device cuda:{index}: CUDA sees {torch.cuda.device_count()} GPUs here. Start "
                             "no more ranks than that, or use the device cpu")
        device = f"cuda:{index}"
        torch.cuda.set_device(device)  # else NCCL takes GPU 0 for all ranks
    if world > 1 and not dist.is_initialized():
        patience = datetime.timedelta(days=2)  # ranks may end hours apart
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=patience)
    torch.set_float32_matmul_precision("high")  # TF32 on CUDA; no change on the CPU
    return torch.device(device), rank, world


def fit(model, loss, dataset, out, *, steps, batch, lr, seed=0, device="auto", warmup=100, decay="cosine",
        clip=1.0, accumulate=1, ema=0.999, workers=0, report_every=50, save_every=500,
        picture=None, measure=None, settings=None):
    """Train a model for `steps` optimiser steps -> the model, in eval mode; results go to the folder `out`.

    model     a module; `.config`, if it has one, is saved with it; frozen parameters stay as they are
    loss      loss(net, batch) -> a scalar; net is the model, under torchrun wrapped for DDP
    dataset   any map-style Dataset. With an attribute `seeded = True` it is asked for (index, seed) and makes
              every random choice from that seed; any other is asked for the index, with torch seeded. With an
              attribute `groups`, an integer for each index, a step is of one group
    batch     samples of a micro-batch and rank; `accumulate` micro-batches make a step
    lr        peak rate: `warmup` steps up to it, then "cosine" to zero or "constant"
    clip, ema  largest norm of a step's gradient; decay of the average of the weights, which is what is saved
    picture   picture(model, path) writes samples.png;  measure(model) -> a dict for the log. Both are called
              at each save, with EMA weights.
    settings  more JSON values that make it another run

    Called again it goes on from state.pt and ends with the same weights as an undisturbed run: bit for bit on
    the CPU of one machine; some CUDA kernels add in no fixed order. With more `steps` than before it goes on
    by the schedule of the new total; with other ranks it goes on with other batches. Raises ValueError where
    `out` holds another run or the loss is not finite.
    """
    device, rank, world = setup(device)
    model = model.to(device).train()
    average = EMA(model, ema)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    settings = dict(steps=steps, batch=batch, world=world, lr=lr, seed=seed, accumulate=accumulate,
                    config=getattr(model, "config", None), **(settings or {}))
    folder = RunFolder(out, settings, rank, average=average, optimiser=optimiser)  # average: the weights too
    first = folder.resume()  # `steps` or more where the run is finished: then the loop has no turns

    net = wrap(model, device, world)

    # What makes a resume exact: a batch and its noise depend on (seed, step, rank) alone.
    loader = torch.utils.data.DataLoader(
        dataset if getattr(dataset, "seeded", False) else SeededItems(dataset), num_workers=workers,
        batch_sampler=SeededBatches(len(dataset), batch, accumulate, first, steps, seed, rank,
                                    getattr(dataset, "groups", None)),
        pin_memory=device.type == "cuda", persistent_workers=workers > 0)
    stream = iter(loader)
    losses, clock = [], time.time()
    bar = tqdm(range(first, steps), folder.out.name, initial=first, total=steps, disable=rank > 0,
               mininterval=1)
    for step in bar:
        micro_batches = [next(stream) for _ in range(accumulate)]
        torch.manual_seed(seed_of(seed, step, rank, "noise"))
        for group in optimiser.param_groups:
            group["lr"] = lr * rate(step, steps, warmup, decay)
        error = accumulate_gradients(net, loss, micro_batches, device)
        norm = nn.utils.clip_grad_norm_(trained, clip)
        losses.append(error + 0 * norm)  # NaN where a gradient is not finite
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        average.update()

        done = step + 1
        saving = done % save_every == 0 or done == steps
        if saving or done % report_every == 0:
            folder.check_finite(losses, done)
            line = dict(step=done, loss=torch.stack(losses).mean().item(),
                        rate=optimiser.param_groups[0]["lr"], gradient_norm=norm.item(),
                        seconds_per_step=(time.time() - clock) / len(losses), memory_mb=peak_memory(device))
            if saving and rank == 0:
                with average.applied_to_model():
                    line.update(save_model_and_samples(model, folder.out, picture, measure))
                model.train()
            folder.report(bar, **line)
            if saving:
                folder.save(done)
            losses, clock = [], time.time()
    complete = checkpoint_file(folder.out).exists() and (not picture or (folder.out / "samples.png").exists())
    if rank == 0 and not complete:  # somebody removed a file of a finished run
        with average.applied_to_model():
            save_model_and_samples(model, folder.out, picture, measure)
    if world > 1:
        dist.barrier()
    return model.eval()


def wrap(model, device, world):
    """The net to train: the model, distributed where there are several ranks. The model itself is saved."""
    if world == 1:
        return model
    return DistributedDataParallel(model, [device.index] if device.type == "cuda" else None,
                                   gradient_as_bucket_view=True)


def compile_blocks(net, blocks, dynamic=None):
    """torch.compile the modules of a network that are of the classes `blocks`, in place.

    What a network repeats shares a few compilations, where the whole network would take minutes. Call it
    before gradient checkpointing is enabled: what is outside the checkpoint is not compiled. dynamic: as in
    torch.compile, False where no shape changes.
    """
    torch._dynamo.config.recompile_limit = 64  # SDXL's residual blocks have 12 shapes, the default is 8
    for module in net.modules():
        if isinstance(module, blocks):
            module.forward = torch.compile(module.forward, dynamic=dynamic)


def save_model_and_samples(model, out, picture, measure):
    """Write OUT/model.safetensors and OUT/samples.png -> what `measure` says of the model."""
    save(model.eval(), out)
    measured = measure(model) if measure else {}
    if picture:
        with atomic_write(out / "samples.png") as temporary:
            picture(model, temporary)
    return measured


def accumulate_gradients(net, loss, micro_batches, device):
    """Leave the mean gradient of the micro-batches in the parameters -> their mean loss, detached."""
    total = 0
    for i, batch in enumerate(micro_batches):
        early = isinstance(net, DistributedDataParallel) and i < len(micro_batches) - 1
        with net.no_sync() if early else contextlib.nullcontext():  # ranks exchange gradients once
            with autocast(device):
                error = loss(net, to_device(batch, device)) / len(micro_batches)
            error.backward()
        total = total + error.detach()
    return total


def to_device(batch, device):
    """A tensor, or a dict, list or tuple of them, moved to the device; anything else as it is."""
    if torch.is_tensor(batch):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return [to_device(value, device) for value in batch]
    return batch


def rate(step, steps, warmup, decay):
    """The share of the peak learning rate at a step."""
    rising = min(1.0, (step + 1) / max(warmup, 1))
    return rising if decay == "constant" else rising * 0.5 * (1 + math.cos(math.pi * step / steps))


# ---- checkpoints -------------------------------------------------------------------------------------------

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


def save(model, folder):
    """Write FOLDER/model.safetensors: the weights, and the model's config as JSON in the file's metadata.

    A model on a public base names in `checkpoint_part` the one network that was trained: then only that is
    written, with its config.json, under public names, so that `from_pretrained(FOLDER)` opens it. A part
    without a `public_config` is a LoRA: `load_lora_weights(FOLDER)` opens its one file. An attribute
    `trained_on`, the number of samples, is saved too.
    """
    folder, part = Path(folder), getattr(model, "checkpoint_part", None)
    state = {name: t.detach().cpu().contiguous() for name, t in (part or model).state_dict().items()}
    header = {"format": FORMAT, "class": type(model).__name__, "config": getattr(model, "config", {}),
              "trained_on": getattr(model, "trained_on", None)}
    name = LORA_FILE if part else OWN_FILE
    if hasattr(part, "public_config"):
        name = PUBLIC_FILE
        with atomic_write(folder / "config.json") as temporary:
            temporary.write_text(json.dumps(part.public_config(), indent=1) + "\n")
    with atomic_write(folder / name) as temporary:
        try:
            save_file(state, temporary, metadata={"seggen": json.dumps(header)})
        except SafetensorError as error:  # a full disk, for one
            raise OSError(f"{folder}: {error}")
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # the library makes it private


def checkpoint_file(path):
    """A checkpoint's folder -> the file of its weights: of all the model, of one public network or a LoRA."""
    path = Path(path)
    if not path.is_dir():
        return path
    files = [path / name for name in (OWN_FILE, PUBLIC_FILE, LORA_FILE)]
    return next((file for file in files if file.exists()), files[0])


def weights_hash(path):
    """Which weights a checkpoint holds: 12 hex digits, or "" where there is none."""
    path = checkpoint_file(path)
    if not path.is_file():
        return ""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


@contextlib.contextmanager
def open_checkpoint(path):
    """Yield a checkpoint's file and its header, the dict that `save` wrote. Raises ValueError."""
    path = checkpoint_file(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file. Train this model first or give another one")
    try:
        with safe_open(path, "pt") as file:
            yield file, json.loads((file.metadata() or {}).get("seggen", "{}"))
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file, or cut short ({error}). Copy or train it again")


def read_header(path):
    """The header of a checkpoint, without its weights."""
    with open_checkpoint(path) as (_, header):
        return header


def read_checkpoint(path, kind):
    """A checkpoint of the class named `kind` -> (config, state dict in fp32). Raises ValueError."""
    with open_checkpoint(path) as (file, header):
        state = {name: file.get_tensor(name) for name in file.keys()}
    if header.get("format") != FORMAT:
        raise ValueError(f"{path}: its format is {header.get('format')}, not {FORMAT}. Give a {kind} of ours")
    if header["class"] != kind:
        raise ValueError(f"{path}: holds a {header['class']}, not a {kind}. Give another checkpoint")
    if not all(t.isfinite().all() for t in state.values()):
        raise ValueError(f"{path}: some weights are not finite. Train it again with a lower learning rate")
    return header["config"], {k: t.float() if t.is_floating_point() else t for k, t in state.items()}


def load_strict(net, state, path):
    """Load a state dict that was read from `path`. Raises ValueError where a key or a shape differs."""
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path}: not the weights of this {type(net).__name__} ({reason}). Train it again")


def load_matching(net, state):
    """Load the tensors of a state dict that fit the network's shapes; the others keep their new values.

    If only the classes differ, all layers fit but those that have a channel for each class.
    """
    own = net.state_dict()
    net.load_state_dict({key: state[key] if state[key].shape == value.shape else value
                         for key, value in own.items()})


def load(cls, path, device="cpu", base=None):
    """A checkpoint -> the model in eval mode, built by cls.from_config(config, device) or cls(**config).

    base: the folder of another public base than the one that the checkpoint names; of the same shape.
    """
    config, state = read_checkpoint(path, cls.__name__)
    if base is not None:
        if "base" not in config:
            raise ValueError(f"{path}: holds all of its weights and needs no base. Leave {base} out")
        config["base"] = str(base)
    model = cls.from_config(config, device) if hasattr(cls, "from_config") else cls(**config)
    part = getattr(model, "checkpoint_part", None)
    load_strict(part or model, state, path)
    if part:
        part.to(precision(device))
    return model.to(device).eval()


# ---- demo --------------------------------------------------------------------------------------------------

class Spiral(torch.utils.data.Dataset):
    """Points of a two-armed spiral, (2,) in about [-1, 1], and which arm, (1,) long, they are of."""
    seeded = True

    def __len__(self):
        return 1 << 20

    def __getitem__(self, key):
        rng = np.random.default_rng(key[1])
        arm, u = rng.integers(2), rng.random() ** 0.5
        angle = 3.5 * u * math.pi + arm * math.pi
        point = u * np.array([math.cos(angle), math.sin(angle)]) + rng.normal(size=2) * 0.02
        return torch.tensor(point, dtype=torch.float32), torch.tensor([arm])


class PointDenoiser(nn.Module):
    """Points (B, 2), t (B,), arm (B, 1) long (0, 1, or 2 = no condition) -> (B, 2)."""

    def __init__(self, width=128):
        super().__init__()
        self.config = dict(width=width)
        self.arm = nn.Embedding(3, width)
        self.inner = nn.Sequential(nn.Linear(2 + 32, width), nn.SiLU())
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.outer = nn.Linear(width, 2)

    def forward(self, x, t, arm):
        angle = t[:, None].float() / 1000 * math.pi * 2 ** torch.linspace(-1, 5, 16)
        h = self.inner(torch.cat([x, angle.sin(), angle.cos()], 1)) + self.arm(arm[:, 0])
        for layer in self.layers:
            h = h + F.silu(layer(h))
        return self.outer(h)


def plot_samplers(model, schedule, path):
    """A picture of what each sampler makes of the model."""
    sheet = Image.new("RGB", (4 * 200, 200), "white")
    draw = ImageDraw.Draw(sheet)
    arm = torch.arange(1000)[:, None] % 2
    for column, sampler in enumerate(SAMPLERS):
        denoise = denoiser(model, schedule, (arm,), (torch.full_like(arm, 2),), guidance=1.5)
        points = sample(denoise, schedule, torch.randn(1000, 2), 25, sampler)
        draw.text((column * 200 + 6, 4), f"{sampler}, 25 steps", fill="black")
        for (x, y), colour in zip(points.tolist(), arm[:, 0].tolist()):
            px, py = column * 200 + 100 + 85 * x, 105 + 85 * y
            draw.ellipse((px - 1, py - 1, px + 1, py + 1), fill=("#c8372d", "#2850aa")[colour])
    with atomic_write(path) as temporary:
        sheet.save(temporary)


def run(main):
    """Run a script's main(): a user's mistake ends in one line on stderr, not in a traceback.

    `run` and `atomic_write` are those of data/pairs.py, copied so that this file needs no other.
    """
    try:
        main()
    except KeyboardInterrupt:
        print("Stopped. The same command goes on from the last save.", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        if "SEGGEN_DEBUG" in os.environ:
            raise
        text = str(error).strip() or repr(error)
        sys.exit(text.splitlines()[-1].removeprefix("ValueError: "))


def main(argv=None):
    parser = argparse.ArgumentParser(description="Learn a 2-D spiral and draw what each sampler makes of it.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/toy"), help="folder of the results")
    parser.add_argument("--steps", type=int, default=800, help="training steps")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another run")
    args = parser.parse_args(argv)
    schedule = Schedule("cosine", "v_prediction", "trailing")
    torch.manual_seed(seed_of(args.seed, "weights"))

    def spiral_loss(net, batch):
        points, arm = batch
        arm = torch.where(torch.rand(len(arm), 1) < 0.1, 2, arm)  # 2: the null condition of guidance
        return loss(net, schedule, points, arm)
    model = fit(PointDenoiser(), spiral_loss, Spiral(), args.out, steps=args.steps, batch=256, lr=3e-3,
                seed=args.seed, device="cpu", report_every=400)
    plot_samplers(model, schedule, args.out / "samples.png")
    print(f"{args.out / 'samples.png'}: what four samplers make of the spiral")


if __name__ == "__main__":
    run(main)
