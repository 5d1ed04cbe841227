"""Diffusion without a network: the noising process, its loss, guidance, samplers, and one training loop.

Data x0 is noised to x_t = a_t x0 + s_t noise with a_t^2 + s_t^2 = 1; a network sees (x_t, t) and tells x0
(or the noise, or v). A sampler walks sigma = s_t / a_t down to 0 and asks only for a function (x, sigma) ->
x0, so any network, any conditioning and any guidance fit every sampler.

Paper: SegGen samples masks with EDM's stochastic sampler in 200 steps and images in 40 (secondary note).
       DDPM (2006.11239), DDIM (2010.02502), EDM (2206.00364), DPM-Solver++ (2211.01095), classifier-free
       guidance (2207.12598), min-SNR weighting (2303.09556), v-prediction (2202.00512).
Differs: the process keeps SDXL's 1000 discrete steps; samplers that need a sigma between two interpolate.
Reads: any torch Dataset.
Writes: OUT/{model.safetensors, state.pt, log.jsonl, samples.png} (fit), out/toy (the demo); of a model on a
       public base, in place of model.safetensors, the trained network in the public layout.
Needs: nothing beside it.
    python diffusion.py            # learns a 2-D spiral in seconds, writes out/toy/samples.png
Dimension key: B batch, C channels, H W pixels.
"""
import argparse
import contextlib
import datetime
import hashlib
import json
import math
import os
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm

FORMAT = "seggen-1"            # changes when the key layout of our checkpoints changes
OWN_FILE, PUBLIC_FILE = "model.safetensors", "diffusion_pytorch_model.safetensors"


# ------------------------------------------------------------------------------------------------ the process

class Schedule:
    """The noise levels of T discrete steps and what the network's output means.

    kind        "scaled_linear": Stable Diffusion's and SDXL's betas. "cosine": uniform in the angle
                atan(sigma) between EDM's sigmas 0.002 and 80: more time on the middle levels, which is where
                pixels need it.
    prediction  "epsilon" (noise), "v_prediction" (a noise - s x0) or "sample" (x0).
    spacing     "leading" (+ offset), "trailing" or "linspace": which of the T steps a sampler of n visits.
    """

    def __init__(self, kind="scaled_linear", prediction="epsilon", spacing="leading", offset=1, T=1000):
        assert prediction in ("epsilon", "v_prediction", "sample"), prediction
        assert spacing in ("leading", "trailing", "linspace"), spacing
        self.config = dict(kind=kind, prediction=prediction, spacing=spacing, offset=offset, T=T)
        self.prediction, self.spacing, self.offset, self.T = prediction, spacing, offset, T
        if kind == "scaled_linear":                                      # cpu: `load` builds models on a GPU
            betas = torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, T, dtype=torch.float32, device="cpu") ** 2
            alpha_bar = torch.cumprod(1 - betas, 0)
        elif kind == "cosine":
            angle = torch.linspace(math.atan(0.002), math.atan(80.0), T, dtype=torch.float64, device="cpu")
            alpha_bar = (torch.cos(angle) ** 2).float()
        else:
            raise ValueError(f"schedule kind {kind!r}: scaled_linear or cosine")
        self.a, self.s = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()        # (T,), (T,)
        self.sigmas = ((1 - alpha_bar) / alpha_bar).sqrt()               # (T,) rising
        self.log_sigmas = np.array([math.log(sigma) for sigma in self.sigmas.tolist()])

    @classmethod
    def from_public(cls, path):
        """A public scheduler_config.json -> Schedule. Raises ValueError where it is not SDXL's."""
        try:
            config = dict(json.loads(Path(path).read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"{path}: looked for JSON, found {type(error).__name__}; download it again")
        off = ("trained_betas", "rescale_betas_zero_snr", "use_karras_sigmas", "use_exponential_sigmas",
               "use_beta_sigmas")
        allowed = dict.fromkeys(off, (None, False)) | dict(              # None: a file may be without it
            beta_start=(0.00085,), beta_end=(0.012,), beta_schedule=("scaled_linear",),
            num_train_timesteps=(1000,), prediction_type=("epsilon", "v_prediction", "sample"),
            timestep_spacing=("leading", "trailing", "linspace"), steps_offset=(None, 0, 1))
        wrong = [f"{key} = {config.get(key)!r}" for key in allowed if config.get(key) not in allowed[key]]
        if wrong:
            raise ValueError(f"{path}: looked for SDXL's noise levels, found {', '.join(wrong)}; "
                             "download its own")
        return cls(prediction=config["prediction_type"], spacing=config["timestep_spacing"],
                   offset=config.get("steps_offset") or 0)

    def scales(self, t, like):
        """t (B,) long -> a_t, s_t, shaped to broadcast over like (B, ...)."""
        shape = (-1,) + (1,) * (like.ndim - 1)
        self.a, self.s = self.a.to(like.device), self.s.to(like.device)  # once: a copy waits for the GPU
        return (table[t].view(shape) for table in (self.a, self.s))

    def noised(self, x0, noise, t):
        a, s = self.scales(t, x0)
        return a * x0 + s * noise

    def target(self, x0, noise, t):
        """What the network should say at x_t."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "sample":
            return x0
        a, s = self.scales(t, x0)
        return a * noise - s * x0

    def to_x0(self, out, x, sigma):
        """The network's output at x (unit variance) and noise level sigma (a float) -> x0."""
        if self.prediction == "sample":
            return out
        a = 1 / math.sqrt(1 + sigma ** 2)
        s = sigma * a
        return (x - s * out) / a if self.prediction == "epsilon" else a * x - s * out

    def weight(self, t, min_snr):
        """Loss weight of each t (B,): every prediction's loss brought to that of x0 times min(SNR, min_snr).

        min_snr caps the weight of nearly clean inputs, where there is little to learn. A network that says x0
        has SNR + 1 instead, the plain v loss, so that nearly pure noise still counts.
        """
        a, s = self.scales(t, t)
        snr = (a / s) ** 2
        if self.prediction == "sample":
            return (snr + 1).clamp(max=min_snr)
        return snr.clamp(max=min_snr) / (snr + 1 if self.prediction == "v_prediction" else snr)

    def t_of(self, sigma):
        """A noise level -> its (fractional) step in [0, T - 1], linear in log sigma."""
        return float(np.interp(math.log(max(sigma, 1e-10)), self.log_sigmas, np.arange(self.T)))

    def grid(self, n, sampler):
        """n steps of a sampler -> n + 1 falling sigmas (the last is where it ends) and the n time steps."""
        if n > self.T:
            sys.exit(f"--steps {n}: looked for that many noise levels, found {self.T}; take fewer")
        if sampler == "edm":                                             # EDM eq. 5, rho = 7
            top, low, rho = self.sigmas[-1].item() ** (1 / 7), self.sigmas[0].item() ** (1 / 7), 7
            sigmas = [(top + i / max(n - 1, 1) * (low - top)) ** rho for i in range(n)]
            return sigmas + [0.0], [self.t_of(sigma) for sigma in sigmas]
        T, multistep = self.T, sampler == "dpm++"                        # the public one spaces by n + 1
        if self.spacing == "leading":
            t = np.arange(n + multistep) * (T // (n + multistep))
            t = t[::-1][:n] + self.offset
        elif self.spacing == "trailing":
            t = np.round(T - np.arange(n) * T / n) - 1
        else:
            t = np.linspace(0, T - 1, n + multistep).round()[::-1][:n]
        t = np.clip(t, 0, T - 1).astype(int)
        if (found := len(set(t.tolist()))) < n:                          # two equal levels: 0 / 0 in dpm++
            sys.exit(f"--steps {n}: looked for that many noise levels, found {found}; take fewer")
        sigmas = self.sigmas[torch.as_tensor(t.copy())].tolist()
        end = self.sigmas[0].item() if sampler == "ddim" and self.prediction == "epsilon" else 0.0
        return sigmas + [end], [float(i) for i in t]                     # SDXL's DDIM ends at the first level


def loss(model, schedule, x0, *cond, min_snr=None, noise_offset=0.0):
    """x0 (B, C, H, W) in about [-1, 1] -> mean squared error of what the network says at a random step.

    noise_offset adds a random constant an image and channel: SDXL learns very dark and very bright pictures.
    """
    t = torch.randint(schedule.T, (len(x0),), device=x0.device)
    noise = torch.randn_like(x0)
    if noise_offset:
        noise = noise + noise_offset * torch.randn(*x0.shape[:2], *(1,) * (x0.ndim - 2), device=x0.device)
    out = model(schedule.noised(x0, noise, t), t, *cond)
    error = F.mse_loss(out.float(), schedule.target(x0, noise, t), reduction="none")
    error = error.flatten(1).mean(1)                                     # (B,)
    return (error if min_snr is None else error * schedule.weight(t, min_snr)).mean()


# --------------------------------------------------------------------------------------------------- sampling

def denoiser(model, schedule, cond, null=None, guidance=1.0, decode=None, above=0.0):
    """A conditioned network -> the function (x, sigma) -> x0 that every sampler asks for.

    cond and null are tuples of arguments of the model for the B samples; with null and guidance != 1 both
    halves run as one batch of 2 B (classifier-free guidance), while sigma > above (2404.07724: what a picture
    shows is settled by then). decode turns raw outputs into x0 where they are neither x0, v nor noise
    (Text2Mask's logits); guidance acts on raw outputs.
    """
    guided = null is not None and guidance != 1
    pair = tuple(stacked(c, n) for c, n in zip(cond, null)) if guided else None
    alone = None if guided and above == 0 else cond                      # not kept where nothing needs it

    def x0(x, sigma):
        x, both = x / math.sqrt(1 + sigma ** 2), guided and sigma > above        # it sees unit variance
        t = torch.full((len(x) * (1 + both),), schedule.t_of(sigma), device=x.device)
        out = model(torch.cat([x, x]) if both else x, t, *(pair if both else alone)).float()
        if both:
            yes, no = out.chunk(2)
            out = no + guidance * (yes - no)
        return decode(out) if decode else schedule.to_x0(out, x, sigma)
    return x0


def stacked(a, b):
    """Two equal nests of tensors -> one, joined along the batch."""
    if torch.is_tensor(a):
        return torch.cat([a, b])
    if isinstance(a, dict):
        return {key: stacked(a[key], b[key]) for key in a}
    return a if a is None else type(a)(stacked(i, j) for i, j in zip(a, b))


@torch.no_grad()
def sample(x0, schedule, noise, steps, sampler="dpm++", randn=torch.randn_like, churn=40.0, progress=False):
    """noise (B, C, H, W), unit normal -> samples x0 of that shape.

    x0(x, sigma): the denoiser. sampler: "euler", "ddim" (Euler in sigma, with SDXL's own last level), "dpm++"
    (DPM-Solver++(2M)) or "edm" (EDM algorithm 2: Heun with `churn` fresh noise; two evaluations a step).
    """
    sigmas, _ = schedule.grid(steps, sampler)
    walk = SAMPLERS[sampler]
    # Noise alone, or noise and data of unit variance: as the public samplers start. Over 20 it is the same.
    unit = sampler in ("ddim", "dpm++") or sampler == "euler" and schedule.spacing == "leading"
    start = math.sqrt(1 + sigmas[0] ** 2) if unit and sigmas[0] < 20 else sigmas[0]
    pairs = list(zip(sigmas, sigmas[1:]))
    extra = dict(randn=randn, churn=churn) if sampler == "edm" else {}
    x = walk(x0, noise * start, tqdm(pairs, "sample", leave=False, disable=not progress), **extra)
    return x / math.sqrt(1 + sigmas[-1] ** 2)                            # DDIM's last level is not 0


def euler(x0, x, pairs):
    for sigma, below in pairs:
        x = x + (below - sigma) * (x - x0(x, sigma)) / sigma
    return x


def dpm_multistep(x0, x, pairs):
    """DPM-Solver++(2M), its algorithm 2, in sigma: the last two x0 extrapolate half a step ahead."""
    last, h_last = None, None
    for sigma, below in pairs:
        now = x0(x, sigma)
        if below == 0:
            return now
        h = math.log(sigma / below)
        ahead = now if last is None else now + (now - last) * h / (2 * h_last)
        x = below / sigma * x - math.expm1(-h) * ahead
        last, h_last = now, h
    return x


def edm_heun(x0, x, pairs, randn, churn, low=0.05, high=50.0, noise=1.003):
    """EDM's stochastic sampler (algorithm 2 and table 5's ImageNet values; churn 0 is plain Heun)."""
    gamma, peak = min(churn / len(pairs), math.sqrt(2) - 1), 0.0
    for sigma, below in pairs:
        peak = max(peak, sigma)                                          # above it the network knows nothing
        top = min(sigma * (1 + gamma), peak) if low <= sigma <= high else sigma
        if top > sigma:
            x = x + math.sqrt(top ** 2 - sigma ** 2) * noise * randn(x)
        slope = (x - x0(x, top)) / top
        ahead = x + (below - top) * slope
        if below > 0:
            ahead = x + (below - top) * 0.5 * (slope + (ahead - x0(ahead, below)) / below)
        x = ahead
    return x


SAMPLERS = {"dpm++": dpm_multistep, "ddim": euler, "euler": euler, "edm": edm_heun}


# --------------------------------------------------------------------------------------------------- training

class EMA:
    """Exponential moving average of the trained parameters; its weights are what sampling reads."""

    def __init__(self, model, decay=0.999):
        self.decay, self.step = decay, 0
        self.params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.shadow = {name: p.detach().clone() for name, p in self.params.items()}  # of sharded ones, shards

    @torch.no_grad()
    def update(self):
        self.step += 1
        decay = min(self.decay, (1 + self.step) / (10 + self.step))      # follows closely at first
        own = [local(p.detach()) for p in self.params.values()]
        torch._foreach_lerp_([local(t) for t in self.shadow.values()], own, 1 - decay)

    @contextlib.contextmanager
    def applied(self):
        """The model carries the average inside the block and its own weights again after it."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self):
        """Exchanges weights and average, one tensor at a time: no second copy of the model."""
        for name, p in self.params.items():
            own = p.clone()
            p.copy_(self.shadow[name])
            self.shadow[name].copy_(own)

    @torch.no_grad()
    def copy(self, source):
        for name, p in self.params.items():
            p.copy_(source[name])


# A sharded parameter (fully_shard) is a DTensor: each rank holds some of its rows. Files hold whole tensors.

def spread(part):
    """Spreads a network's weights, gradients and optimiser state over all ranks (FSDP2): each entry of a
    ModuleList is gathered when it is its turn. Inputs are not cast: sizes and crops (time_ids) would not
    survive bf16, and autocast chooses the precision of each operation."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    device = next(part.parameters()).device
    policy = MixedPrecisionPolicy(precision(device), torch.float32, cast_forward_inputs=False)
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    lists = [module for module in part.modules() if isinstance(module, nn.ModuleList)]
    for inner_first in reversed(lists):
        for entry in inner_first:
            fully_shard(entry, mesh=mesh, mp_policy=policy)
    fully_shard(part, mesh=mesh, mp_policy=policy)


def local(t):
    return t.to_local() if isinstance(t, DTensor) else t


def whole(t):
    """A tensor -> all of it. Of a sharded one every rank must ask, and all but the first get None."""
    if not isinstance(t, DTensor):
        return t.detach()
    full = t.detach().full_tensor()
    return full.cpu() if dist.get_rank() == 0 else None


def like(t, p):
    """A whole tensor -> sharded as the parameter p is."""
    if not isinstance(p, DTensor) or t.shape != p.shape:                 # an optimiser's step count
        return t
    return distribute_tensor(t.to(p.device), p.device_mesh, p.placements, src_data_rank=None)


def seed_of(*parts):
    """Any values -> a seed; the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


class Batches(torch.utils.data.Sampler):
    """Step after step, batches of (index, seed): what is drawn depends on (seed, step, rank) alone."""

    def __init__(self, length, batch, start, steps, seed, rank):
        self.length, self.batch, self.start, self.steps = length, batch, start, steps
        self.seed, self.rank = seed, rank

    def __iter__(self):
        for step in range(self.start, self.steps):
            rng = np.random.default_rng(seed_of(self.seed, step, self.rank, "batch"))
            index, seeds = rng.integers(self.length, size=self.batch), rng.integers(2 ** 62, size=self.batch)
            yield list(zip(index.tolist(), seeds.tolist()))

    def __len__(self):
        return self.steps - self.start


@contextlib.contextmanager
def loading():
    """Data is loaded inside. A worker that ended with a line of its own ends the program too; it is a signal
    handler that tells, so the error comes up anywhere in the loop."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        sys.exit("a process that loads data ended: see the line above, or run with --workers 0")


def precision(device):
    """What networks compute in: bf16 on CUDA, fp32 elsewhere; at paper scale frozen weights are in it too."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


def autocast(device):
    return torch.autocast(device.type, torch.bfloat16, enabled=precision(device) == torch.bfloat16)


def start(device="auto"):
    """Picks the device and joins the process group under torchrun -> (device, rank, world)."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        sys.exit(f"--device {device}: looked for cpu, cuda or cuda:N; leave it out to take what is there")
    if device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit(f"--device {device}: looked for a CUDA GPU, found none; leave it out to run on the CPU")
    if ":" in device and int(device[5:]) >= (count := torch.cuda.device_count()):
        sys.exit(f"--device {device}: looked for that GPU, found {count} that count from 0; name one of them")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "cuda" and world > 1:
        local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= count:
            sys.exit(f"torchrun: looked for a GPU for rank {local} of this machine, found {count}; give as "
                     "many by --nproc_per_node, or --device cpu")
        device = f"cuda:{local}"
    if world > 1 and not dist.is_initialized():
        if device.startswith("cuda"):
            torch.cuda.set_device(device)                                # else NCCL takes GPU 0 for all
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo",
                                timeout=datetime.timedelta(days=2))      # ranks may end hours apart
    torch.set_float32_matmul_precision("high")                           # TF32 on CUDA; no change on the CPU
    return torch.device(device), rank, world


@loading()
def fit(model, loss, dataset, out, *, steps, batch, lr, seed=0, device="auto", warmup=100, decay="cosine",
        clip=1.0, accumulate=1, ema=0.999, compile=False, shard=False, workers=0, report_every=50,
        save_every=500, picture=None, measure=None, about=None):
    """Trains model for `steps` optimiser steps -> OUT/{model.safetensors, state.pt, log.jsonl, samples.png}.

    model     a module with `.config`; parameters that require no gradient stay as they are.
    loss      loss(net, batch) -> scalar; net is the model, compiled and wrapped for DDP where asked.
    shard     under torchrun: spread what is trained over the ranks instead of keeping a copy on each (DDP).
    dataset   dataset[(index, seed)] -> a dict of tensors; the seed makes every random choice repeatable.
    lr        peak rate: `warmup` steps up to it, then "cosine" to zero or "constant".
    picture   picture(model, path) draws samples.png;  measure(model) -> dict of numbers for the log. Both see
              EMA weights.
    about     more settings (JSON values) that make it another run: a state of others is not resumed.
    Run again with as many ranks, it goes on from state.pt and ends with the same weights as an undisturbed
    run: bit for bit on the CPU of one machine; some CUDA kernels add in no fixed order.
    """
    device, rank, world = start(device)
    out = Path(out)
    model = model.to(device).train()
    if shard and world == 1:
        sys.exit("--shard: looked for several ranks, found one; start it with torchrun --nproc_per_node N")
    if shard:
        spread(getattr(model, "stored", None) or model)
    average = EMA(model, ema)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr,
                                  betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    recipe = dict(steps=steps, batch=batch, world=world, lr=lr, seed=seed, accumulate=accumulate,
                  config=model.config, **(about or {}))
    first = resume(out, average, optimiser, recipe, rank)
    if first == steps and rank == 0:
        print(f"{out}: all {steps} steps are trained")
    net = torch.compile(model) if compile else model                     # train net, save model: clean keys
    copies = world > 1 and not shard
    if copies:
        net = nn.parallel.DistributedDataParallel(net, [device.index] if device.type == "cuda" else None,
                                                  gradient_as_bucket_view=True)
    loader = torch.utils.data.DataLoader(
        dataset, batch_sampler=Batches(len(dataset), batch * accumulate, first, steps, seed, rank),
        num_workers=workers, pin_memory=device.type == "cuda", persistent_workers=workers > 0)
    losses, clock = [], time.time()
    bar = tqdm(enumerate(loader, first), out.name, initial=first, total=steps, disable=rank > 0,
               mininterval=1)
    for step, data in bar:
        for group in optimiser.param_groups:
            group["lr"] = lr * rate(step, steps, warmup, decay)
        torch.manual_seed(seed_of(seed, step, rank, "noise"))
        losses.append(step_loss(net, loss, data, accumulate, device, copies))
        norm = nn.utils.clip_grad_norm_(average.params.values(), clip)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        losses[-1] = losses[-1] + 0 * norm                               # NaN where a gradient is not finite
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        average.update()
        done = step + 1
        if done % report_every == 0 or done % save_every == 0 or done == steps:
            check_finite(torch.stack(losses), done, out)
            line = dict(step=done, loss=round(torch.stack(losses).mean().item(), 5),
                        seconds_per_step=round((time.time() - clock) / len(losses), 4))
            saved = done % save_every == 0 or done == steps
            if saved and (rank == 0 or shard):
                with average.applied():
                    save(model, out, rank)
                    if rank == 0:
                        line.update(show(load(type(model), out, device) if shard else model.eval(), out,
                                         picture, measure))              # what is loaded is kept nowhere
                model.train()
            if rank == 0:
                report(out, line, bar)
            if saved and (rank == 0 or shard):
                save_state(out, average, optimiser, done, recipe, rank)
            losses, clock = [], time.time()
    if world > 1:
        dist.barrier()
    return model.eval()


def step_loss(net, loss, data, accumulate, device, copies):
    """A step's micro-batches -> their mean loss; gradients are left in the parameters. Copies of the model
    (DDP) exchange them once."""
    total = 0
    for part in range(accumulate):
        micro = {key: value[part::accumulate].to(device, non_blocking=True) for key, value in data.items()}
        wait = copies and part < accumulate - 1
        with net.no_sync() if wait else contextlib.nullcontext():
            with autocast(device):
                error = loss(net, micro) / accumulate
            error.backward()
        total = total + error.detach()
    return total


def rate(step, steps, warmup, decay):
    up = min(1.0, (step + 1) / max(warmup, 1))
    return up if decay == "constant" else up * 0.5 * (1 + math.cos(math.pi * step / steps))


def check_finite(losses, done, out):
    bad = (~torch.isfinite(losses)).nonzero()
    if len(bad):
        whole = (out / "state.pt").exists()
        kept = "the last good state is kept in state.pt" if whole else "nothing was saved yet"
        sys.exit(f"{out}: the loss or its gradient was not finite at step "
                 f"{done - len(losses) + bad[0].item() + 1}; {kept}; run with a smaller --lr, in "
                 "another --out")


def report(out, line, bar):
    with writable(out / "log.jsonl"), open(out / "log.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
    bar.write("  ".join(f"{key} {value}" for key, value in line.items()))


def show(model, out, picture, measure):
    """Draws OUT/samples.png -> what there is to say in the log."""
    said = measure(model) if measure else {}
    if picture:
        with replacing(out / "samples.png") as path:
            picture(model, path)
    return said


def save_state(out, average, optimiser, step, recipe, rank):
    """Writes OUT/state.pt, the last of a save: what is in it is finished. Frozen weights are not in it."""
    state = optimiser.state_dict()
    state["state"] = {i: {key: whole(t) for key, t in values.items()} for i, values in state["state"].items()}
    content = dict(model={n: whole(p) for n, p in average.params.items()}, optimiser=state, step=step,
                   ema={n: whole(t) for n, t in average.shadow.items()},
                   recipe=json.dumps(recipe, sort_keys=True))
    if rank == 0:
        with replacing(out / "state.pt") as path:
            try:
                torch.save(content, path)
            except RuntimeError as error:                                # how the library words a full disk
                raise OSError(str(error).splitlines()[0])


def resume(out, average, optimiser, recipe, rank):
    """Loads OUT/state.pt where there is one -> the step to go on from; else 0 and no log."""
    path, log = out / "state.pt", out / "log.jsonl"
    with writable(out):
        out.mkdir(parents=True, exist_ok=True)
        for left in out.glob(".*.tmp*") if rank == 0 else ():            # of a run that was killed in a write
            left.unlink(missing_ok=True)
        if not path.exists() and rank == 0:
            log.write_text("")                                           # can it be written? bad data, met
            log.unlink()                                                 # later, leaves none
    if not path.exists():
        return 0
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)     # ranks share it
        old = json.loads(state["recipe"])
    except Exception as error:
        sys.exit(f"{path}: looked for a state to resume, found {type(error).__name__}; delete {out} to start "
                 "afresh")
    new = json.loads(json.dumps(recipe))
    differs = [f"{key} {old[key]} then, {new[key]} now" if key != "config" else "the model" for key in new
               if old.get(key, new[key]) != new[key]]
    if differs:
        sys.exit(f"{path}: a run with other settings is there ({'; '.join(differs)}); give another --out or "
                 "delete it")
    try:
        take(state, average, optimiser)
        lines = [line for line in log.read_text().splitlines() if line.endswith("}")] if log.exists() else []
        lines = [line for line in lines if json.loads(line)["step"] <= state["step"]]
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        sys.exit(f"{path}: looked for a state of this version and its log, found {error!r:.300}; delete "
                 f"{out} to start afresh")
    if rank == 0:
        with replacing(log) as part:
            part.write_text("".join(line + "\n" for line in lines))
    return state["step"]


def take(state, average, optimiser):
    """Loads what save_state wrote."""
    average.copy({n: like(state["model"][n], p) for n, p in average.params.items()})
    for name, p in average.shadow.items():
        p.copy_(like(state["ema"][name], p))
    average.step = state["step"]
    for i, p in enumerate(average.params.values()):
        state["optimiser"]["state"][i] = {k: like(t, p) for k, t in state["optimiser"]["state"][i].items()}
    optimiser.load_state_dict(state["optimiser"])


# ------------------------------------------------------------------------------------------------ checkpoints

@contextlib.contextmanager
def writable(where):
    """An OSError (no permission, full disk) inside ends the program in one line."""
    try:
        yield
    except OSError as error:
        sys.exit(f"{where}: cannot write here ({error.strerror or error}); give another --out or free some "
                 "space")


@contextlib.contextmanager
def replacing(path):
    """Yields a temporary name beside path that takes its place at the end: the file is whole or not there."""
    path = Path(path)
    part = path.with_name(f".{path.stem}.tmp{os.getpid()}{path.suffix}")
    with writable(path):
        try:
            yield part
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def save(model, folder, rank=0):
    """Writes FOLDER/model.safetensors: the weights, and the constructor arguments as JSON in its metadata.

    A model that stands on a public base names in `stored` the one network that was trained: then only its
    weights are written, with its config.json, under public names: `from_pretrained(FOLDER)` opens them."""
    part = getattr(model, "stored", None)
    state = {name: whole(t) for name, t in (part or model).state_dict().items()}
    if rank:
        return
    state = {name: t.cpu().contiguous() for name, t in state.items()}
    about = {"format": FORMAT, "class": type(model).__name__, "config": model.config}
    if part:
        with writable(folder):
            Path(folder).mkdir(parents=True, exist_ok=True)
        with replacing(Path(folder) / "config.json") as path:
            path.write_text(json.dumps(part.public_config(), indent=1) + "\n")
    name = PUBLIC_FILE if part else OWN_FILE
    write_tensors(state, dict(seggen=json.dumps(about)), folder, name)   # two keys come in a random order


def halve(source, folder):
    """Writes a checkpoint of ours again with 16-bit floats, half as large: FOLDER/model.safetensors."""
    path = Path(source) / OWN_FILE
    try:
        with safe_open(path, "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}
            metadata = file.metadata()
    except (SafetensorError, OSError) as error:
        sys.exit(f"{path}: looked for a checkpoint to halve, found {type(error).__name__}; name its folder")
    state = {name: t.half() if t.is_floating_point() else t for name, t in state.items()}
    write_tensors(state, metadata, folder)


def write_tensors(state, metadata, folder, name=OWN_FILE):
    with writable(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
    with replacing(Path(folder) / name) as path:
        try:
            save_file(state, path, metadata=metadata)
            os.umask(umask := os.umask(0))
            path.chmod(0o666 & ~umask)                                   # the library's is its owner's alone
        except SafetensorError as error:                                 # how the library words a full disk
            raise OSError(str(error))


def checkpoint(folder):
    """A folder of ours -> its weights: a whole model's, or of the one public network that was trained."""
    own, public = Path(folder) / OWN_FILE, Path(folder) / PUBLIC_FILE
    return public if public.exists() and not own.exists() else own


def identity(path):
    """Which weights a checkpoint (a folder or a file) holds, by a hash of all of it: a part may be frozen. ""
    where there is none: who reads it tells."""
    path = checkpoint(path) if Path(path).is_dir() else Path(path)
    if not path.is_file():
        return ""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def read(path, kind, device="cpu"):
    """FOLDER or FILE of a checkpoint of ours of class `kind` -> (config, state dict); else one line.

    Floats are fp32; those of a public network (paper scale) are as `precision` of the device says."""
    path = checkpoint(path) if Path(path).is_dir() else Path(path)
    dtype = precision(device) if path.name == PUBLIC_FILE else torch.float32
    if not path.is_file():
        sys.exit(f"{path}: looked for a {kind} checkpoint, found no such file; train one or name another")
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("seggen", "{}"))
            found = about.get("format", "none"), about.get("class", "none")
            state = {name: placed(file.get_tensor(name), device, dtype) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        sys.exit(f"{path}: looked for a safetensors file, found something else or a truncated one ({error}); "
                 f"only .safetensors is read, never a pickle")
    except (ValueError, AttributeError) as error:
        sys.exit(f"{path}: looked for settings in its metadata, found {error!r}; train it anew")
    if found != (FORMAT, kind):
        todo = "train it with this version" if found[1] == kind else f"give a {kind}"
        sys.exit(f"{path}: looked for a checkpoint of format {FORMAT} that holds a {kind}, found format "
                 f"{found[0]} with {found[1]}; {todo}")
    if not all(t.isfinite().all() for t in state.values()):
        sys.exit(f"{path}: looked for weights, found some that are not finite; train anew, at a smaller --lr")
    return about.get("config", {}), state


@contextlib.contextmanager
def of_this_version(path):
    """What is made inside takes a checkpoint's constructor arguments: unknown ones end in one line."""
    try:
        yield
    except (AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        sys.exit(f"{path}: looked for this version's constructor arguments, found others ({error}); train it "
                 "anew")


def placed(t, device, dtype):
    return t.to(device, dtype) if t.is_floating_point() else t.to(device)


def load(cls, path, device="cpu"):
    """A checkpoint of ours -> the module in eval mode, strict. Frozen weights come from their own folder."""
    config, state = read(path, cls.__name__, device)
    with torch.device(device), of_this_version(path):                    # frozen weights go there at once
        model = cls(**config)
    part = getattr(model, "stored", None)
    try:
        (part or model).load_state_dict(state, assign=part is not None)
    except RuntimeError as error:
        sys.exit(f"{path}: its keys are not those of {cls.__name__}: {' '.join(str(error).split())[:300]}")
    return model.to(device).eval()


def positive(kind):
    """An argparse type: a finite number over zero."""
    def number(text):
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text}: a number over zero is needed")
        return value
    number.__name__ = f"positive {kind.__name__}"
    return number


def within(kind, low, high=float("inf")):
    """An argparse type: a finite number from low to high."""
    def number(text):
        value = kind(text)
        if not (low <= value <= high and value < float("inf")):
            wanted = f"from {low} to {high}" if high < float("inf") else f"of {low} or more"
            raise argparse.ArgumentTypeError(f"{text}: a number {wanted} is needed")
        return value
    number.__name__ = kind.__name__
    return number


# ------------------------------------------------------------------------------------------------------- demo

class Spiral(torch.utils.data.Dataset):
    """Points of a two-armed spiral, (2,) in about [-1, 1], and which arm (1,) they are of."""

    def __len__(self):
        return 1 << 20

    def __getitem__(self, key):
        rng = np.random.default_rng(key[1])
        arm, u = rng.integers(2), rng.random() ** 0.5
        angle = 3.5 * u * math.pi + arm * math.pi
        point = u * np.array([math.cos(angle), math.sin(angle)]) + rng.normal(size=2) * 0.02
        return dict(x=torch.tensor(point, dtype=torch.float32), arm=torch.tensor([arm]))


class Points(nn.Module):
    """A denoiser of points: (B, 2), t (B,), arm (B, 1) long (0, 1, or 2 = no condition) -> (B, 2)."""

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


def main():
    from PIL import Image, ImageDraw
    parser = argparse.ArgumentParser(description="Learns a 2-D spiral, draws what each sampler makes of it.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/toy"), help="folder of the results")
    parser.add_argument("--steps", type=positive(int), default=800, help="training steps")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another run")
    parser.add_argument("--halve", nargs=2, metavar=("FROM", "TO"),
                        help="only write the checkpoint of folder FROM to TO in fp16")
    args = parser.parse_args()
    if args.halve:
        return halve(*args.halve)
    schedule = Schedule("cosine", "v_prediction", "trailing")
    torch.manual_seed(seed_of(args.seed, "weights"))

    def drop_loss(net, data):
        arm = torch.where(torch.rand(len(data["arm"]), 1) < 0.1, 2, data["arm"])     # 2: the null condition
        return loss(net, schedule, data["x"], arm)
    model = fit(Points(), drop_loss, Spiral(), args.out, steps=args.steps, batch=256, lr=3e-3, seed=args.seed,
                device="cpu", report_every=400)
    picture = Image.new("RGB", (4 * 200, 200), "white")
    for column, sampler in enumerate(("euler", "ddim", "dpm++", "edm")):
        arm = torch.arange(1000)[:, None] % 2
        x0 = denoiser(model, schedule, (arm,), (torch.full_like(arm, 2),), guidance=1.5)
        points = sample(x0, schedule, torch.randn(1000, 2), 25, sampler)
        draw = ImageDraw.Draw(picture)
        draw.text((column * 200 + 6, 4), f"{sampler}, 25 steps", fill="black")
        for (x, y), a in zip(points.tolist(), arm[:, 0].tolist()):
            px, py = column * 200 + 100 + 85 * x, 105 + 85 * y
            draw.ellipse((px - 1, py - 1, px + 1, py + 1), fill=("#c8372d", "#2850aa")[a])
    with replacing(args.out / "samples.png") as path:
        picture.save(path)
    print(f"wrote {args.out / 'samples.png'}")


if __name__ == "__main__":
    main()
