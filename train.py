"""Trains a segmenter on real + synthetic pair folders, measures it, tells what each synthetic folder adds.

SegGen's third step: each real sample of a batch is replaced by a synthetic one with probability 0.6 (its
ADE20K recipe), or training goes over synthetic samples first and real ones after (--pretrain, its COCO
recipe). All arms of a comparison take equally many steps, so that a gain is not more training.

Paper: SegGen (2311.03355); Mask2Former (2112.01527) for the recipes; Kirillov et al. (1801.00868) for PQ.
Differs: the paper does not say how MaskSyn and ImgSyn samples are mixed within p: here a synthetic folder is
       drawn evenly, then a pair of it evenly. The `tiny` recipe (from scratch, minutes of a CPU) is ours, and
       so is the oracle: fresh true scenes in the place of synthetic ones, the ceiling of any generator.
       ADE20K's brightness is scaled by up to an eighth (the original adds up to 32 of 255).
Reads: pair folders data/NAME/{train,val,...}, out/NAME/{masksyn,imgsyn}.
Writes: out/NAME/mask2former/{model.safetensors, state.pt, log.jsonl, metrics.json, samples.png};
       out/NAME/compare/{PROTOCOL.md, PROTOCOL.json, PROTOCOL.png, runs/}.
Needs: mask2former.py, diffusion.py (devices, types of flags)
    python train.py                                             # makes what is missing, trains, evaluates
    python train.py --eval-only --eval-pairs out/shapes/imgsyn  # how well synthetic images show their masks
    python train.py --compare --limit-real 100 --steps 600      # arms x seeds -> one table, one picture
    python train.py --compare --limit-real 100 --arms real oracle --steps 300   # 600, ...: saturation check
Dimension key: B batch, H W pixels, K classes, Q queries, N segments of an image.
"""
import argparse
import contextlib
import copy
import hashlib
import io
import itertools
import json
import math
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from safetensors import SafetensorError
from torch.nn.parallel import DistributedDataParallel
from torchvision import tv_tensors
from torchvision.transforms import v2
from tqdm import tqdm

from diffusion import identity, positive, start, within
from mask2former import (PRESETS, Mask2Former, count, final_predictions, instance, load, panoptic, predict,
                         rgb, save, semantic, targets)

HERE = Path(__file__).resolve().parent
CROWD = 255                                         # the instance number of a crowd region
PAIRS = 500                                         # of each kind are made for the built-in data
# size: side of training crops (0: as the first real image); short, longest: of evaluated images (0: as is)
RECIPES = {
    "tiny": dict(preset="tiny", steps=1000, batch=8, lr=2e-3, clip=1.0, schedule="cosine", warmup=30,
                 size=0, short=0, longest=0, save_every=100),
    "ade20k": dict(preset="resnet50", steps=160_000, batch=16, lr=1e-4, clip=0.01, schedule="poly", warmup=0,
                   size=512, short=512, longest=2048, save_every=2000),
    "coco": dict(preset="resnet50", steps=368_750, batch=16, lr=1e-4, clip=0.01, schedule="steps", warmup=0,
                 size=1024, short=800, longest=1333, save_every=2000),
}
NAMED = {"masksyn": "MaskSyn", "imgsyn": "ImgSyn"}       # folders whose arm of a comparison has a proper name
SCORE = {"semantic": "mIoU", "panoptic": "PQ", "instance": "AP"}     # the first number of each task


class BadInput(Exception):
    """A user's mistake, told in one line; main() ends with it (also when a loader's worker process raised
    it).
    """


# ------------------------------------------------------------------------------------------------------ pairs

def read_classes(root):
    """ROOT/classes.json -> [{"name", "isthing", ...}, ...]; class id = position + 1."""
    path = Path(root) / "classes.json"
    if not path.is_file():
        raise BadInput(f"{path}: looked for the classes of a pair folder, found no such file; write it, or "
                       f"run the data's prepare.py to its end")
    try:
        classes = [{"isthing": False} | c for c in json.loads(path.read_text(encoding="utf-8"))]
        assert classes and all(isinstance(c["name"], str) and isinstance(c["isthing"], bool) for c in classes)
    except (ValueError, TypeError, KeyError, AssertionError) as error:
        raise BadInput(f'{path}: looked for a list of {{"name": ..., "isthing": true or false}}, found '
                       f'{type(error).__name__}; write one entry a class')
    if len(classes) > 214:                          # 6 ** 3 colours less void and edge
        raise BadInput(f"{path}: {len(classes)} classes; a mask tells 214 at most: merge some")
    return classes


def stems(folder):
    """{stem: path} of a folder's pictures, in the order of names; hidden and unfinished files left out."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    files = [f for f in files if f.suffix.lower() in (".png", ".jpg", ".jpeg") and f.name[0] != "."]
    found = {f.stem: f for f in files}
    if twice := [f for f in files if found[f.stem] != f]:
        raise BadInput(f"{folder}: looked for one picture of a name, found {twice[0].name} and "
                       f"{found[twice[0].stem].name}; remove one")
    return found


class Pairs:
    """A pair folder: pairs[i] -> image (3, H, W) uint8, labels (2, H, W) uint8: class ids (0 void) and
    instances.

    Every image must have a mask and every mask an image; classes must be those of `like`, another Pairs.
    first and limit choose pairs by position. Sets under 0.5 GB are decoded at once and stay in memory. Raises
    BadInput.
    """

    def __init__(self, root, like=None, first=0, limit=None):
        self.root, self.cache = Path(root), {}
        if not self.root.is_dir():
            raise BadInput(f"{self.root}: looked for a pair folder, found no such folder; prepare or sample "
                           f"it first")
        if (self.root.parent / f".{self.root.name}.unfinished").exists():
            raise BadInput(f"{self.root}: looked for a whole set, found a half-made one; run again what "
                           f"makes it")
        self.classes = read_classes(self.root)
        if like is not None:
            same_classes(self.classes, like.classes, self.root, like.root)
        images, masks = stems(self.root / "images"), stems(self.root / "masks")
        for one, other, a, b in ((images, masks, "images", "masks"), (masks, images, "masks", "images")):
            alone = sorted(set(one) - set(other))
            if alone:
                raise BadInput(f"{self.root}: {len(alone)} of {len(one)} files of {a}/ have none of that "
                               f"name in {b}/ ({one[alone[0]].name} is the first); add or remove them")
        self.files = [(images[s], masks[s]) for s in list(images)[first:][:limit]]
        if not self.files:
            raise BadInput(f"{self.root}: looked for pairs in images/ and masks/, found {len(images)}, of "
                           f"which 0 are left after the first {first}; prepare or sample it first")
        self.has_instances = (self.root / "instances").is_dir()
        if self.read(0)[0].numel() * 2 * len(self) < 5e8:
            with ThreadPoolExecutor(4) as pool:
                self.cache = dict(enumerate(pool.map(self.read, range(len(self)))))

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        return self.cache[i] if i in self.cache else self.read(i)

    def read(self, i):
        image_path, mask_path = self.files[i]
        image = np.array(rgb(opened(image_path)))                                # (H, W, 3)
        ids = ids_of(mask_path, image, image_path)                               # (H, W)
        if ids.max() > len(self.classes):
            raise BadInput(f"{mask_path}: holds class id {ids.max()}, but {self.root / 'classes.json'} has "
                           f"{len(self.classes)} classes (ids 1 to {len(self.classes)}, 0 void)")
        instances = np.zeros_like(ids)
        if self.has_instances:
            instances = ids_of(self.root / "instances" / mask_path.name, image, image_path)
        labels = torch.from_numpy(np.stack([ids, instances]))                    # (2, H, W)
        return torch.from_numpy(image).permute(2, 0, 1).contiguous(), labels

    def fingerprint(self):
        """A short text that changes when pairs are added, removed or made again."""
        text = [(p.name, p.stat().st_size, m.stat().st_size) for p, m in self.files]
        return f"{len(self)} pairs {hashlib.sha256(repr(text).encode()).hexdigest()[:12]}"


def opened(path):
    try:
        image = Image.open(path)
        image.load()
        return image
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadInput(f"{path}: looked for a readable picture, found {str(error) or type(error).__name__}; "
                       f"replace it or remove the pair")


def ids_of(path, image, image_path):
    """A mask as ids (H, W) uint8; image (H, W, 3) only for its size."""
    if not path.is_file():
        raise BadInput(f"{path}: no such file; every pair needs one, or remove the whole folder "
                       f"{path.parent}")
    mask = opened(path)
    if mask.mode not in ("P", "L", "1", "I", "I;16"):
        raise BadInput(f"{path}: looked for ids (a palette or grey PNG), found mode {mask.mode}; write class "
                       f"ids, not colours")
    if mask.size != image.shape[1::-1]:
        raise BadInput(f"{path}: {mask.width} x {mask.height}, but {image_path} is {image.shape[1]} x "
                       f"{image.shape[0]}; both must have the same size")
    ids = np.array(mask).astype(np.int64)
    if ids.min(initial=0) < 0 or ids.max(initial=0) > 255:
        raise BadInput(f"{path}: looked for ids of 0 to 255, found {ids.min()} to {ids.max()}; mend the mask")
    return ids.astype(np.uint8)


def first_difference(a, b):
    """Two lists of class names -> (class id, name in a, name in b) of the first that differs, or None."""
    pairs = enumerate(itertools.zip_longest(a, b, fillvalue="none"), 1)
    return next(((k, *pair) for k, pair in pairs if pair[0] != pair[1]), None)


def same_classes(found, wanted, root, origin):
    different = first_difference([c["name"] for c in found], [c["name"] for c in wanted])
    if different:
        where, a, b = different
        raise BadInput(f"{root}: its classes are not those of {origin}: {len(found)} against {len(wanted)}, "
                       f"first difference at id {where} ({a} against {b})")


# -------------------------------------------------------------------------------------- augmentation, batches

class NeverEmpty:
    """Of torchvision's random resizes: no side rounds to 0, as that of a 1 x N image would."""

    def make_params(self, inputs):
        return {"size": [max(1, n) for n in super().make_params(inputs)["size"]]}


class ScaleJitter(NeverEmpty, v2.ScaleJitter):
    pass


class RandomShortestSize(NeverEmpty, v2.RandomShortestSize):
    pass


def augmentation(recipe, height, width):
    """A recipe's joint transform of (Image, Mask) to height x width; masks by nearest, new borders grey and
    void.
    """
    fill = {tv_tensors.Image: 128, tv_tensors.Mask: 0}
    crop = v2.RandomCrop((height, width), pad_if_needed=True, fill=fill)
    flip = v2.RandomHorizontalFlip()
    if recipe == "coco":                                                         # large-scale jitter
        return v2.Compose([flip, ScaleJitter((width, height), (0.1, 2.0)), crop])
    if recipe == "ade20k":
        scale = RandomShortestSize([int(height * 0.1 * n) for n in range(5, 21)], 4 * height)
        # the original's contrast, saturation and hue; its brightness is a sum, here a product
        colour = {"brightness": (0.875, 1.125), "contrast": (0.5, 1.5), "saturation": (0.5, 1.5), "hue": 0.1}
        jitter = [v2.RandomApply([v2.ColorJitter(**{kind: span})]) for kind, span in colour.items()]
        return v2.Compose([flip, scale, crop, *jitter])
    ratio = width / height
    zoom = v2.RandomResizedCrop((height, width), (0.5, 1.0), (0.8 * ratio, 1.25 * ratio))
    return v2.Compose([flip, zoom, v2.ColorJitter(0.3, 0.3, 0.3)])


def seed_of(*numbers):
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class Batches(torch.utils.data.Dataset):
    """batches[n] -> images (B, 3, H, W) uint8 and B dicts of targets: micro-batch n, a function of (seed, n,
    rank).

    Real samples come in a new random order each pass. Each is replaced by a synthetic one with probability
    p_synth; with pretrain, all are in the first half of the steps and none after.
    """

    def __init__(self, real, synth, cfg, rank=0, world=1):
        self.real, self.synth, self.cfg, self.rank, self.world = real, synth, cfg, rank, world
        self.augment, self.order = augmentation(cfg["recipe"], *cfg["size"]), (-1, None)
        self.isthing = [c["isthing"] for c in real.classes]

    def __len__(self):
        return self.cfg["steps"] * self.cfg["accumulate"]

    def __getitem__(self, n):
        torch.manual_seed(seed_of(self.cfg["seed"], n, self.rank, 1))
        images, truth = [], []
        for i in range(self.cfg["batch"]):
            source, k = self.draw(n, i)
            image, labels = source[k]
            image, labels = self.augment(tv_tensors.Image(image), tv_tensors.Mask(labels))
            ids, instances = labels.as_subclass(torch.Tensor)
            images.append(image.as_subclass(torch.Tensor))
            truth.append(targets(ids, instances, self.isthing, self.cfg["task"]))
            if self.cfg["recipe"] == "tiny":                 # the others: void is background, as the original
                truth[-1]["valid"] = ids > 0
        return torch.stack(images), truth

    def draw(self, n, i):
        """Sample i of micro-batch n -> (Pairs, index)."""
        p = 2 * n < len(self) if self.cfg["pretrain"] else self.cfg["p_synth"]
        if self.synth and torch.rand(()) < p:
            source = self.synth[torch.randint(len(self.synth), ())]
            return source, int(torch.randint(len(source), ()))
        epoch, k = divmod((n * self.world + self.rank) * self.cfg["batch"] + i, len(self.real))
        if self.order[0] != epoch:
            rng = torch.Generator().manual_seed(seed_of(self.cfg["seed"], epoch, 2))
            self.order = epoch, torch.randperm(len(self.real), generator=rng)
        return self.real, int(self.order[1][k])


# --------------------------------------------------------------------------------------------------- training

def optimiser_of(model, lr):
    """AdamW of the original: no decay on norms and embeddings (biases and the pixel decoder's level, no
    embedding there, do decay); a pre-trained backbone at lr x 0.1.
    """
    norms = torch.nn.LayerNorm, torch.nn.GroupNorm
    embeddings = "decoder.queries", "decoder.places", "decoder.level"
    pretrained, groups = model.config["backbone"] != "tiny", {}
    for path, module in model.named_modules():
        for name, p in module.named_parameters(recurse=False):
            still = name == "relative_position_bias_table" or f"{path}.{name}" in embeddings
            decay = 0.0 if still or isinstance(module, norms) else 0.05
            scale = 0.1 if pretrained and path.startswith("backbone.") else 1.0
            if p.requires_grad:
                groups.setdefault((decay, scale), []).append(p)
    return torch.optim.AdamW([dict(params=params, weight_decay=decay, scale=scale)
                              for (decay, scale), params in groups.items()], lr=lr, fused=True)


def rate(kind, step, steps, warmup):
    """The share of the peak learning rate at a step."""
    up = min(1.0, (step + 1) / (warmup + 1))
    if kind == "poly":
        return up * (1 - step / steps) ** 0.9
    if kind == "steps":                                                      # where the original drops it
        return up * 0.1 ** sum(step * 368_750 >= drop * steps for drop in (327_778, 355_092))
    return up * 0.5 * (1 + math.cos(math.pi * step / steps))


def train(model, batches, out, cfg, device, compiled=False, workers=0):
    """Trains for cfg["steps"] and leaves OUT/{model.safetensors, state.pt, log.jsonl}; goes on from state.pt,
    on the CPU bit for bit (some CUDA kernels add in no fixed order).

    cfg: the run's settings, kept in state.pt: a state of other settings is refused. A gradient that is not
    finite ends the program; the last good state stays.
    """
    rank, world = batches.rank, batches.world
    recipe, steps, micro = RECIPES[cfg["recipe"]], cfg["steps"], cfg["accumulate"]
    optimiser = optimiser_of(model.train(), cfg["lr"])
    first = resume(out, model, optimiser, cfg, rank)
    net = torch.compile(model) if compiled else model                 # train net, save model: clean key names
    if world > 1:
        net = DistributedDataParallel(net, [device.index] if device.type == "cuda" else None)
    order = range(first * micro, steps * micro)
    stream = iter(torch.utils.data.DataLoader(batches, batch_size=None, sampler=order, num_workers=workers,
                                              pin_memory=device.type == "cuda"))
    clock, since, total = time.time(), first, 0.0
    bar = tqdm(range(first, steps), "train", initial=first, total=steps, disable=rank > 0, mininterval=1)
    for step in bar:
        for group in optimiser.param_groups:
            group["lr"] = cfg["lr"] * group["scale"] * rate(recipe["schedule"], step, steps, recipe["warmup"])
        loss = step_loss(net, model, [next(stream) for _ in range(micro)], cfg, device, rank, step)
        total += loss
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe["clip"])    # the same on every rank
        if not torch.isfinite(norm):
            there = (out / "state.pt").exists()
            kept = "the last good state is kept in state.pt" if there else "nothing was saved yet"
            raise BadInput(f"{out}: the loss was {loss:.4g} and its gradient {norm.item():.4g} at step "
                           f"{step + 1}; {kept}; run with a smaller --lr into another --out")
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        done = step + 1
        saving = done % recipe["save_every"] == 0 or done == steps
        if rank == 0 and (saving or done % 50 == 0):
            n = done - since
            report(out, bar, step=done, loss=total / n, s_per_step=(time.time() - clock) / n)
            clock, since, total = time.time(), done, 0.0
        if rank == 0 and saving:
            save_state(out, model, optimiser, done, cfg)
    return model.eval()


def step_loss(net, model, batches, cfg, device, rank, step):
    """The micro-batches of a step -> their mean loss; its gradients are left in the model. nan where the loss
    says so.
    """
    masks = count(sum(len(t["labels"]) for _, truth in batches for t in truth), device).item() / len(batches)
    total = 0.0
    for part, (images, truth) in enumerate(batches):
        torch.manual_seed(seed_of(cfg["seed"], step, part, rank, 3))            # the loss draws random points
        last = part == len(batches) - 1 or not isinstance(net, DistributedDataParallel)
        with contextlib.nullcontext() if last else net.no_sync():         # ranks exchange gradients once
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                outputs = net(images.to(device, non_blocking=True).float() / 255)
            try:
                loss = model.loss(outputs, truth, num_masks=masks)[0] / len(batches)
            except ValueError:                                                   # the matcher met NaN
                loss = sum(part.sum() for out in outputs for part in out.values()) * math.nan
            loss.backward()
        total += loss.item()
    return total


def report(out, bar, **line):
    line = {key: round(value, 5) for key, value in line.items()}
    with open(out / "log.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
    bar.write("step {step}  loss {loss:.4f}  {s_per_step:.3f} s/step".format(**line), file=sys.stdout)


def write(path, save):
    """save(temporary path), then a rename: PATH is whole or not there."""
    part = path.with_name(f".part-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save(part)
        os.replace(part, path)
    except (OSError, RuntimeError, SafetensorError) as error:   # torch.save tells a full disk by RuntimeError
        with contextlib.suppress(OSError):
            for left in path.parent.glob(f"{part.name}*"):
                left.unlink()
        raise BadInput(f"{path}: could not be written ({error}); free some space or choose another --out")


def save_state(out, model, optimiser, step, cfg):
    state = dict(model=model.state_dict(), optimiser=optimiser.state_dict()["state"], step=step,
                 cfg=json.dumps(cfg))
    write(out / "model.safetensors", lambda path: save(model, str(path)))
    write(out / "state.pt", lambda path: torch.save(state, path))


def resume(out, model, optimiser, cfg, rank=0):
    """Loads OUT/state.pt where there is one -> the step to go on from; cuts the log back to it."""
    path, log = out / "state.pt", out / "log.jsonl"
    if not path.exists():
        if rank == 0:
            write(log, lambda part: part.touch())
        return 0
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        old, new = json.loads(state["cfg"]), json.loads(json.dumps(cfg))
    except Exception as error:                                   # truncated, a foreign pickle: never executed
        raise BadInput(f"{path}: looked for a state to resume, found {type(error).__name__}; delete it to "
                       f"start afresh")
    if old != new:
        changed = [f"{k} {old.get(k)} then, {new.get(k)} now" for k in new if old.get(k) != new.get(k)]
        raise BadInput(f"{path}: is of a run with other settings ({'; '.join(changed)}); give another --out "
                       f"or delete it")
    try:
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(dict(optimiser.state_dict(), state=state["optimiser"]))
        lines = [line for line in log.read_text().splitlines() if line.endswith("}")] if log.exists() else []
        kept = [line for line in lines if json.loads(line)["step"] <= state["step"]]
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise BadInput(f"{path}: looked for a state of this version and its log, found {error!r:.300}; "
                       f"delete {out} to start afresh")
    if rank == 0:
        write(log, lambda part: part.write_text("".join(line + "\n" for line in kept)))
    return state["step"]


# ---------------------------------------------------------------------------------------------------- metrics

class Confusion:
    """mIoU and friends from one global confusion matrix; void truth ignored, classes without truth left out
    and counted.
    """

    def __init__(self, classes):
        self.matrix = np.zeros((len(classes) + 1,) * 2, np.int64)     # [truth, prediction], 0 void

    def add(self, predicted, ids):
        """predicted, ids (H, W) uint8 class ids."""
        size = len(self.matrix)
        joint = ids.astype(np.int64) * size + predicted
        self.matrix += np.bincount(joint.ravel(), minlength=size ** 2).reshape(size, size)

    def merge(self, other):
        self.matrix += other.matrix

    def result(self):
        hit = self.matrix.diagonal()[1:]
        truth, predicted = self.matrix[1:].sum(1), self.matrix[1:, 1:].sum(0)
        there = truth > 0
        iou, accuracy = (hit / np.maximum(d, 1) for d in (truth + predicted - hit, truth))
        share = truth / max(truth.sum(), 1)
        return {"mIoU": 100 * mean(iou[there]), "fwIoU": float(100 * (share * iou).sum()),
                "mACC": 100 * mean(accuracy[there]), "pACC": float(100 * (share * accuracy).sum()),
                "absent": int((~there).sum())}


def mean(values):
    return float(np.mean(values)) if len(values) else float("nan")


class PanopticQuality:
    """PQ = SQ x RQ (Kirillov et al. 2019). A segment is a (class, instance) pair; instance 255 marks a crowd.

    Predicted pixels on void leave the union; a prediction that lies for more than half on void and on crowds
    of its class is not counted as false; a crowd is never missed.
    """

    def __init__(self, classes):
        self.isthing = np.array([False] + [c["isthing"] for c in classes])             # by class id
        self.counts = np.zeros((4, len(classes) + 1))         # sum of IoU, true +, false +, false -; by class

    def add(self, predicted, truth):
        """predicted, truth: ((H, W) class ids, (H, W) instance numbers)."""
        guess, truth = (np.int64(c) << 16 | np.where(self.isthing[c], n, 0) for c, n in (predicted, truth))
        joint, area = np.unique(truth << 32 | guess, return_counts=True)       # one entry an overlapping pair
        t_ids, t = np.unique(joint >> 32, return_inverse=True)
        g_ids, g = np.unique(joint & 0xFFFFFFFF, return_inverse=True)
        t_class, g_class, t_crowd = t_ids >> 16, g_ids >> 16, t_ids & 0xFFFF == CROWD
        t_area, g_area = np.bincount(t, area), np.bincount(g, area)
        void, same = t_class[t] == 0, t_class[t] == g_class[g]
        g_void, g_ignored = np.bincount(g, area * void), np.bincount(g, area * (void | t_crowd[t] & same))
        iou = area / np.maximum(t_area[t] + g_area[g] - area - g_void[g], 1)
        hit = same & ~void & ~t_crowd[t] & (iou > 0.5)                # over a half: each segment once at most
        wrong = (g_class > 0) & ~np.isin(np.arange(len(g_ids)), g[hit]) & (g_ignored <= 0.5 * g_area)
        missed = (t_class > 0) & ~np.isin(np.arange(len(t_ids)), t[hit]) & ~t_crowd
        for row, classes, weight in ((0, t_class[t[hit]], iou[hit]), (1, t_class[t[hit]], None),
                                     (2, g_class[wrong], None), (3, t_class[missed], None)):
            self.counts[row] += np.bincount(classes, weight, self.counts.shape[1])

    def merge(self, other):
        self.counts += other.counts

    def result(self):
        iou, hit, wrong, missed = self.counts[:, 1:]
        there = hit + wrong + missed > 0
        sq, rq = iou / np.maximum(hit, 1), hit / np.maximum(hit + 0.5 * wrong + 0.5 * missed, 0.5)
        out = {}
        things = self.isthing[1:]
        for kind, chosen in (("", there), ("_things", there & things), ("_stuff", there & ~things)):
            for name, value in (("PQ", sq * rq), ("SQ", sq), ("RQ", rq)):
                out[name + kind] = 100 * mean(value[chosen])
        return out


class AveragePrecision:
    """COCO's AP of masks and of the boxes around them, by pycocotools, image by image: only matches are kept,
    some 100 bytes a detection.
    """

    def __init__(self, classes):
        self.things = [i + 1 for i, c in enumerate(classes) if c["isthing"]]
        self.matches = {"segm": [], "bbox": []}                       # per image, what packed() keeps

    def add(self, masks, ids, scores, truth):
        """N masks (H, W) bool, their class ids and scores; truth ((H, W) class ids, (H, W) instance numbers).
        """
        pairs = np.unique(truth[0].astype(np.int64) * 256 + truth[1])
        pairs = [divmod(int(pair), 256) for pair in pairs if pair // 256 in self.things]
        real = [self.entry((truth[0] == c) & (truth[1] == n), c, iscrowd=int(n == CROWD)) for c, n in pairs]
        found = [self.entry(m, c, score=s) for m, c, s in zip(masks, ids, scores) if c in self.things]
        with contextlib.redirect_stdout(io.StringIO()):
            sets = [self.index(annotations, truth[0].shape) for annotations in (real, found)]
            for kind, kept in self.matches.items():
                judge = COCOeval(*sets, kind)
                judge.params.imgIds, judge.params.catIds = [1], self.things
                judge.evaluate()
                kept.append(self.packed(judge.evalImgs))

    @staticmethod
    def packed(cells):
        """One image's evalImgs (class x area) -> cell and score of every detection, (3, detections) bytes of
        its 20 bits (matched, then ignored, at 10 IoUs each); true segments a cell.
        """
        none = dict(dtScores=[], dtMatches=np.zeros((10, 0)), dtIgnore=np.zeros((10, 0)), gtIgnore=np.ones(0))
        cells = [e or none for e in cells]
        cell = np.repeat(np.arange(len(cells), dtype=np.int16), [len(e["dtScores"]) for e in cells])
        bits = [np.concatenate([e[key] for e in cells], 1) > 0 for key in ("dtMatches", "dtIgnore")]
        true = np.array([np.count_nonzero(e["gtIgnore"] == 0) for e in cells], np.int16)
        scores = np.concatenate([e["dtScores"] for e in cells])
        return cell, scores, np.packbits(np.concatenate(bits), 0), true

    def entry(self, mask, c, **extra):
        code = coco_mask.encode(np.asfortranarray(mask, np.uint8))
        return dict(segmentation=code, category_id=c, image_id=1, area=float(coco_mask.area(code)),
                    bbox=coco_mask.toBbox(code).tolist(), **{"iscrowd": 0, **extra})

    def index(self, annotations, shape):
        coco = COCO()
        coco.dataset = dict(images=[dict(id=1, height=shape[0], width=shape[1])], info={},
                            categories=[dict(id=c, name=str(c)) for c in self.things],
                            annotations=[dict(a, id=i + 1) for i, a in enumerate(annotations)])
        coco.createIndex()
        return coco

    def merge(self, other):
        for kind, kept in self.matches.items():
            kept += other.matches[kind]

    def result(self):
        out = {}
        for kind, end in (("segm", ""), ("bbox", "_box")):
            p = self.precision(kind)                                  # (IoU, recall, class, area)
            for name, part in (("AP", p[..., 0]), ("AP50", p[0, ..., 0]), ("AP75", p[5, ..., 0]),
                               ("AP_small", p[..., 1]), ("AP_medium", p[..., 2]), ("AP_large", p[..., 3])):
                out[name + end] = 100 * mean(part[part > -1])                            # -1: nothing to find
        return out

    def precision(self, kind):
        """Precision by (IoU, recall, class, area), -1 where there is nothing to find: pycocotools sees the
        images as one whose detections are matched already.
        """
        cell, score, bits, true = zip(*self.matches[kind])
        cell, score, true = np.concatenate(cell), np.concatenate(score), np.sum(true, 0, np.int64)
        bits = np.unpackbits(np.concatenate(bits, 1), 0, 20).astype(bool)                # (20, detections)
        judge = COCOeval(iouType=kind)
        judge.evalImgs = [dict(dtScores=score[cell == i], dtMatches=bits[:10, cell == i],
                               dtIgnore=bits[10:, cell == i], gtIgnore=np.zeros(n))
                          for i, n in enumerate(true)]                                   # class by area
        judge.params.imgIds, judge.params.catIds = [1], self.things
        judge.params.maxDets = [len(score)]                # an image's best 100 were taken by evaluate()
        judge._paramsEval = copy.deepcopy(judge.params)
        with contextlib.redirect_stdout(io.StringIO()):
            judge.accumulate()
        return judge.eval["precision"][..., 0]


# ------------------------------------------------------------------------------------------------- evaluation

def chunks(pairs, indices, batch):
    """Runs of neighbours of equal size -> (images (b, 3, H, W), labels (b, 2, H, W)), b <= batch."""
    held = []
    for i in indices:
        item = pairs[i]
        if held and (len(held) == batch or item[0].shape != held[0][0].shape):
            yield tuple(map(torch.stack, zip(*held)))
            held = []
        held.append(item)
    if held:
        yield tuple(map(torch.stack, zip(*held)))


def predictions(model, images, cfg, device):
    """images (B, 3, H, W) uint8 -> a prediction each, and the extent of the (padded) masks an image fills."""
    H, W = images.shape[2:]
    x = images.to(device).float() / 255
    if cfg["short"]:
        scale = min(cfg["short"] / min(H, W), cfg["longest"] / max(H, W) if cfg["longest"] else math.inf)
        x = v2.functional.resize(x, [max(1, round(H * scale)), max(1, round(W * scale))], antialias=True)
    return final_predictions(model, x)


def as_maps(found, size):
    """What `panoptic` or `instance` found -> (class ids (H, W), instance numbers (H, W)), numpy, 0 none."""
    if isinstance(found, tuple):                                      # panoptic: (segment ids, segments)
        table = np.zeros(len(found[1]) + 1, np.int64)
        for s in found[1]:
            table[s["id"]] = s["class"] + 1
        numbers = found[0].cpu().numpy()
        return table[numbers], numbers
    ids, numbers = np.zeros((2, *size), np.int64)
    for n, s in enumerate(reversed([s for s in found if s["score"] > 0.5]), 1):      # the surest on top
        mask = s["mask"].cpu().numpy()
        ids[mask], numbers[mask] = s["class"] + 1, n
    return ids, numbers


def predicted(pred, size, extent, cfg, isthing):
    """A prediction -> (class ids (H, W), instance numbers (H, W)) of the task."""
    if cfg["task"] == "semantic":
        return semantic(pred, size, extent).cpu().numpy() + 1, np.zeros(size, np.int64)
    if cfg["task"] == "panoptic":
        return as_maps(panoptic(pred, size, isthing, extent), size)
    return as_maps(instance(pred, size, isthing, extent), size)


def measure(meters, pred, extent, ids, instances, isthing):
    """Adds one image's prediction to every meter; ids, instances (H, W) uint8 numpy: the truth."""
    size, (confusion, quality, precision) = ids.shape, (meters.get(name) for name in ("mIoU", "PQ", "AP"))
    if confusion:
        confusion.add(semantic(pred, size, extent).cpu().numpy() + 1, ids)
    if quality:
        quality.add(as_maps(panoptic(pred, size, isthing, extent), size), (ids, instances))
    if precision:
        found = instance(pred, size, isthing, extent)
        precision.add([s["mask"].cpu().numpy() for s in found], [s["class"] + 1 for s in found],
                      [s["score"] for s in found], (ids, instances))


def at_scales(model, image, cfg):
    """image (3, H, W) uint8 -> class ids (H, W) numpy, averaged over 6 sizes and their mirrors (the paper's
    m.s.).
    """
    scales = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
    found = predict(model, image / 255, "semantic", cfg["short"] or None, flip=True, scales=scales)
    return found.cpu().numpy() + 1


def keep(folder, name, pred, size, extent, cfg, classes):
    """Writes one image's prediction to the pair folder `folder`, for data/coco/export.py: masks/NAME.png,
    instances/NAME.png and, where there are scored instances, results/NAME.json in COCO's results format."""
    isthing = [c["isthing"] for c in classes]
    for kind, ids in zip(("masks", "instances"), predicted(pred, size, extent, cfg, isthing)):
        image = Image.fromarray(ids.astype(np.uint8))
        image.putpalette(palette(len(classes)).tobytes())
        if kind == "masks" or cfg["task"] != "semantic":
            write(folder / kind / f"{name}.png", lambda part: image.save(part, "PNG"))
    if cfg["task"] != "semantic":
        sources = [c.get("source_id", k) for k, c in enumerate(classes, 1)]
        results = [dict(image_id=int(name) if name.isdigit() else name, category_id=sources[s["class"]],
                        score=s["score"], segmentation=coded(s))
                   for s in instance(pred, size, isthing, extent)]
        write(folder / "results" / f"{name}.json", lambda part: part.write_text(json.dumps(results)))


def coded(segment):
    code = coco_mask.encode(np.asfortranarray(segment["mask"].cpu().numpy(), np.uint8))
    return {"size": code["size"], "counts": code["counts"].decode()}


@torch.no_grad()
def evaluate(model, pairs, cfg, device, rank=0, world=1, batch=16, folder=None, multi_scale=False):
    """A pair folder's metrics in percent. semantic: mIoU; panoptic: PQ, AP, mIoU; instance: AP.

    Streams: memory does not grow with the set (but for AP's some 100 bytes a detection). Ranks share the
    images. folder: a pair folder to write the predictions to. multi_scale: semantic only, see at_scales.
    """
    isthing = [c["isthing"] for c in pairs.classes]
    meters = {"PQ": PanopticQuality, "AP": AveragePrecision, "mIoU": Confusion}
    wanted = {"semantic": ("mIoU",), "panoptic": ("PQ", "AP", "mIoU"), "instance": ("AP",)}[cfg["task"]]
    meters = {name: meters[name](pairs.classes) for name in wanted if name != "AP" or any(isthing)}
    indices, batch = range(rank, len(pairs), world), 1 if cfg["short"] else batch
    bar = tqdm(total=len(indices), desc=f"evaluate {pairs.root.name}", disable=rank > 0, leave=False)
    names = (pairs.files[i][1].stem for i in indices)
    if folder and rank == 0:
        write(folder / "classes.json", lambda part: part.write_text(json.dumps(pairs.classes)))
    for images, labels in chunks(pairs, indices, batch):
        if multi_scale:
            for image, (ids, _) in zip(images, labels.numpy()):
                meters["mIoU"].add(at_scales(model, image, cfg), ids)
            bar.update(len(images))
            continue
        preds, extent = predictions(model.eval(), images, cfg, device)
        for pred, (ids, instances), name in zip(preds, labels.numpy(), names):
            measure(meters, pred, extent, ids, instances, isthing)
            if folder:
                keep(folder, name, pred, ids.shape, extent, cfg, pairs.classes)
        bar.update(len(images))
    if world > 1:
        parts = [None] * world
        dist.all_gather_object(parts, meters)
        meters = parts[0]
        for other in parts[1:]:
            for name in meters:
                meters[name].merge(other[name])
    return {"images": len(pairs), **{k: v for meter in meters.values() for k, v in meter.result().items()}}


def told(name, result):
    """A printed line of a split's metrics."""
    numbers = "  ".join(f"{k} {v:.1f}" if isinstance(v, float) else f"{k} {v}" for k, v in result.items())
    return f"{name:10s} {numbers}"


# --------------------------------------------------------------------------------------------------- pictures

def palette(K):
    """The mask codec's colours: (K + 2, 3) uint8 of the codes 0 void, 1..K, K + 1 edge."""
    b = next(b for b in range(2, 7) if b ** 3 >= K + 2)
    s, v = round(255 / (b - 1)), np.arange(K + 2)
    return np.minimum(np.stack([s * (v // b % b), s * (v // b ** 2), s * (v % b)], 1), 255).astype(np.uint8)


def painted(ids, numbers, K):
    """Class ids, instance numbers (H, W) -> colours (H, W, 3), instances outlined in the edge colour."""
    edge = np.zeros(ids.shape, bool)
    edge[:, :-1] |= (numbers[:, 1:] != numbers[:, :-1])
    edge[:-1] |= (numbers[1:] != numbers[:-1])
    return palette(K)[np.where(edge, K + 1, ids)]


def picture(path, rows, titles):
    """rows: lists of (H, W, 3) uint8 -> one PNG, a column a title, small pictures enlarged."""
    h, w = rows[0][0].shape[:2]
    scale = max(1, round(128 / min(h, w)))
    h, w, gap, head = h * scale, w * scale, 4, 18
    sheet = Image.new("RGB", (len(titles) * (w + gap) - gap, head + len(rows) * (h + gap) - gap), "white")
    for x, title in enumerate(titles):
        ImageDraw.Draw(sheet).text((x * (w + gap) + 2, 3), title, "black")
        for y, row in enumerate(rows):
            tile = Image.fromarray(row[x]).resize((w, h), Image.NEAREST)
            sheet.paste(tile, (x * (w + gap), head + y * (h + gap)))
    write(path, lambda part: sheet.save(part, "PNG"))


def chosen(pairs, n):
    """Up to n indices, evenly spread."""
    return sorted({round(i) for i in np.linspace(0, len(pairs) - 1, n)})


@torch.no_grad()
def previews(model, pairs, cfg, device, n=4):
    """Colour maps (H, W, 3) the model paints for the chosen images."""
    isthing, maps = [c["isthing"] for c in pairs.classes], []
    for i in chosen(pairs, n):
        image = pairs[i][0]
        (pred,), extent = predictions(model, image[None], cfg, device)
        maps.append(painted(*predicted(pred, image.shape[1:], extent, cfg, isthing), len(pairs.classes)))
    return maps


def truths(pairs, cfg, n=4):
    """[image, true colour map] of the chosen images."""
    rows = []
    for i in chosen(pairs, n):
        image, (ids, instances) = pairs[i]
        instances = instances * (cfg["task"] != "semantic")
        colours = painted(ids.numpy(), instances.numpy(), len(pairs.classes))
        rows.append([image.permute(1, 2, 0).numpy(), colours])
    return rows


# ----------------------------------------------------------------------------------------- one run, many runs

def plain(name):
    """A class name without what releases of one data set differ in: "Traffic-Light, stoplight" -> "traffic
    light"."""
    return " ".join(name.split(",")[0].split(";")[0].casefold().replace("-", " ").replace("_", " ").split())


def with_stuff(state, things, K):
    """A state dict whose classifier knows the things alone -> one of all K classes; things: their indices.
    The rows of stuff never win.
    """
    wide = {}
    for key in ("decoder.classes.weight", "decoder.classes.bias"):
        never = -1e4 if key.endswith("bias") else 0.0
        wide[key] = state[key].new_full((K + 1, *state[key].shape[1:]), never)
        wide[key][[*things, K]] = state[key]                                 # the last row: no object
    return {**state, **wide}


def build(cfg, classes, init, new_head=False):
    """A new segmenter for these classes, or that of `init`, whose classes must be these unless new_head; for
    instance segmentation that of `init` may know the things alone.
    """
    names, isthing = [c["name"] for c in classes], [c["isthing"] for c in classes]
    about = dict(isthing=isthing, class_names=names, task=cfg["task"])
    torch.manual_seed(seed_of(cfg["seed"], 4))
    if not init:
        weights = None if cfg["preset"] == "tiny" else "IMAGENET1K_V1"       # those of the original
        try:
            return Mask2Former(len(names), **PRESETS[cfg["preset"]], **about, weights=weights)
        except (OSError, KeyError, ValueError) as error:
            raise BadInput(f"--preset {cfg['preset']}: torchvision's ImageNet weights could not be had "
                           f"({error}); give a segmenter's weights by --init, or --preset tiny")
    old = load(init, cfg["task"])
    had = old.config["class_names"] or (names if old.config["num_classes"] == len(names) else [])
    state, things = old.state_dict(), [k for k, thing in enumerate(isthing) if thing]
    had, wanted = ([plain(name) for name in part] for part in (had, names))
    if cfg["task"] == "instance" and had != wanted and had == [wanted[k] for k in things]:
        state, had = with_stuff(state, things, len(names)), wanted
    different = first_difference(had, wanted)
    if different and not new_head:
        k, a, b = different
        raise BadInput(f"{init}: was trained for {old.config['num_classes']} classes, the data has "
                       f"{len(names)}; the first that differs is id {k}, {a} there and {b} here; --new-head "
                       f"starts a new classifier on it")
    model = Mask2Former(**{**old.config, **about, "num_classes": len(names)})
    state = {k: v for k, v in state.items() if not different or not k.startswith("decoder.classes.")}
    model.load_state_dict(state, strict=not different)
    return model


def run(cfg, real, synth, evals, out, args):
    """Trains (or resumes) one segmenter in OUT -> (model, {split: metrics})."""
    device, rank, world = args.place
    model = build(cfg, real.classes, args.init, args.new_head).to(device)
    train(model, Batches(real, synth, cfg, rank, world), out, cfg, device, args.compile, args.workers)
    return model, {name: evaluate(model, pairs, cfg, device, rank, world) for name, pairs in evals.items()}


def compare(cfg, real, arms, evals, args, folder):
    """Trains every arm ({name: [Pairs]}) with every seed in equal steps; writes the table after each run.

    A run lies in FOLDER/runs/ under a name that holds its settings and data, so a killed comparison goes on
    and another protocol finds `real only` and `oracle` done.
    """
    results, maps, judges = {name: {} for name in arms}, {}, [(k, p.fingerprint()) for k, p in evals.items()]
    for seed in args.seeds:
        for arm, synth in arms.items():
            own = dict(cfg, seed=seed, synth=[p.fingerprint() for p in synth])
            key = hashlib.sha256(json.dumps([own, judges], sort_keys=True).encode()).hexdigest()[:10]
            place = folder / "runs" / f"{arm.strip('+ ').replace(' ', '_').lower()}_seed{seed}_{key}"
            if not (place / "result.json").exists():
                print(f"{arm}, seed {seed}: {place}")
                model, scores = run(own, real, synth, evals, place, args)
                if args.place[1] == 0:
                    shown = {f"{name}_{i}": m for name, pairs in evals.items()
                             for i, m in enumerate(previews(model, pairs, own, args.place[0]))}
                    write(place / "previews.npz", lambda part: np.savez_compressed(part, **shown))
                    write(place / "result.json", lambda part: part.write_text(json.dumps(scores)))
                    (place / "state.pt").unlink(missing_ok=True)
                if args.place[2] > 1:
                    dist.barrier()
            results[arm][seed] = json.loads((place / "result.json").read_text())
            maps.setdefault(arm, np.load(place / "previews.npz"))
            if args.place[1] == 0:
                tabulate(cfg, results, list(evals), args, folder)
    if args.place[1] == 0:
        rows = [[*row, *(maps[arm][f"{name}_{i}"] for arm in arms)]
                for name, pairs in evals.items() for i, row in enumerate(truths(pairs, cfg))]
        picture(folder / f"{args.protocol}.png", rows, ["image", "truth", *arms])
        print((folder / f"{args.protocol}.md").read_text("utf-8"))


def tabulate(cfg, results, splits, args, folder):
    """results {arm: {seed: {split: metrics}}} -> FOLDER/PROTOCOL.md and .json."""
    score = SCORE[cfg["task"]]
    mix = "synthetic first, then real" if cfg["pretrain"] else f"p {cfg['p_synth']}"
    lines = [f"**{args.protocol}**: {args.data}, {cfg['real']}, {cfg['steps']} steps of "
             f"{cfg['batch'] * cfg['accumulate'] * cfg['world']}, {mix}, {score}, seeds "
             f"{' '.join(map(str, args.seeds))}", "",
             "| arm | " + " | ".join(f"{s} | gain by seed | share of oracle's gain" for s in splits) + " |",
             "|---" * (1 + 3 * len(splits)) + "|"]
    arms = {arm: {split: summary(results, arm, split, score) for split in splits}
            for arm in results if results[arm]}
    for arm, by_split in arms.items():
        cells = [f"{r['mean']:.1f} ± {r['std']:.1f} | {' '.join(f'{g:+.1f}' for g in r['gain'].values())} | "
                 + ("" if r["share"] is None else f"{100 * r['share']:.0f} %") for r in by_split.values()]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    document = dict(protocol=args.protocol, settings=cfg, score=score, arms=arms, runs=results)
    name = folder / args.protocol
    write(name.with_name(f"{name.name}.md"), lambda part: part.write_text("\n".join(lines) + "\n", "utf-8"))
    write(name.with_name(f"{name.name}.json"), lambda part: part.write_text(json.dumps(document, indent=1)))


def summary(results, arm, split, score):
    """An arm on a split over its seeds: mean, std, values, gain by seed, share of the oracle's mean gain."""
    values = {seed: scores[split][score] for seed, scores in results[arm].items()}
    gain, top = gains(results, arm, split, score), gains(results, "oracle", split, score)
    best = mean(list(top.values())) if top else 0.0
    share = mean(list(gain.values())) / best if gain and best else None      # no share of nothing
    std = float(np.std(list(values.values()), ddof=1)) if len(values) > 1 else 0.0
    return dict(mean=mean(list(values.values())), std=std, values=values, gain=gain, share=share)


def gains(results, arm, split, score):
    """{seed: arm's score minus that of real only}, of the seeds both have."""
    base, own = results.get("real only", {}), results.get(arm, {})
    return {s: own[s][split][score] - base[s][split][score] for s in own if s in base and arm != "real only"}


# ------------------------------------------------------------------------------------------------------- main

def made(folder, *command, pairs=0):
    """Runs a sibling script where its folder is missing, has fewer pairs or was left unfinished by a killed
    run."""
    mark, there = folder.parent / f".{folder.name}.unfinished", len(list(folder.glob("images/[!.]*")))
    if folder.is_dir() and there >= pairs and not mark.exists():
        return
    print(f"{folder}: {f'{there} pairs are there' if there else 'missing'}, so: python {' '.join(command)}",
          flush=True)
    write(mark, lambda part: part.touch())
    alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    if subprocess.run([sys.executable, str(HERE / command[0]), *command[1:]], env=alone).returncode:
        raise BadInput(f"{command[0]} failed (see above); {folder} is still missing")
    mark.unlink(missing_ok=True)


def side(text):
    """"512" or "240x192" (width x height) -> [H, W]."""
    parts = [positive(int)(n) for n in text.split("x")]
    if len(parts) > 2 or max(parts) > 8192:
        raise argparse.ArgumentTypeError(f"{text}: 512 or 240x192 (width x height) is needed, up to 8192")
    return [parts[-1], parts[0]]


def settings(args, real, synth, world):
    """The run's settings as JSON values: what state.pt keeps, and all that decides the result."""
    recipe, given = RECIPES[args.recipe], vars(args)
    cfg = {k: recipe[k] if given[k] is None else given[k] for k in ("preset", "steps", "batch", "lr")}
    stride = 16 if cfg["preset"] == "tiny" else 32
    natural = [-(-n // stride) * stride for n in real[0][0].shape[1:]]   # up to the network's stride
    size = args.size or ([recipe["size"]] * 2 if recipe["size"] else natural)
    short, longest = recipe["short"], recipe["longest"]
    if args.size and args.recipe != "coco":          # ADE20K: 512 / 2048 semantic, 640 / 2560 panoptic
        short, longest = min(size), 4 * min(size)
    if args.batch is None:                           # the recipe's batch is that of a whole step
        cfg["batch"] = max(1, recipe["batch"] // (world * args.accumulate))
    cfg.update({k: given[k] for k in ("recipe", "task", "seed", "accumulate", "p_synth", "pretrain")})
    return dict(cfg, size=size, short=short, longest=longest, world=world, real=real.fingerprint(),
                synth=[p.fingerprint() for p in synth],
                init=args.init and f"{args.init} {identity(args.init)}")


def folders(args):
    """--data, --synth -> (root of the data, its name, synthetic folders); makes what is missing of the built-
    in data.
    """
    root = Path(args.data) if Path(args.data).is_dir() else HERE / "data" / args.data
    name, synth, first = root.name, args.synth, int(os.environ.get("RANK", 0)) == 0
    if args.data == "shapes" and first:
        made(root / "train", "data/shapes/prepare.py")
    if args.data == "shapes" and synth is None and not args.eval_only:
        synth = [Path("out/shapes/masksyn"), Path("out/shapes/imgsyn")]
        for folder in synth if first else []:
            made(folder, f"{folder.name}.py", "--out", str(folder), "--limit", str(PAIRS), pairs=PAIRS)
    if not root.is_dir():
        script = HERE / "data" / args.data / "prepare.py"
        todo = f"run `python data/{name}/prepare.py --root RAW`" if script.is_file() else "check --data"
        raise BadInput(f"{root}: looked for a data set's folder with train/ and val/, found none; {todo}")
    return root, name, synth or []


def check_task(args, sets):
    """Panoptic and instance training need instances in every folder, and things."""
    if args.task == "semantic":
        return
    for pairs in sets:
        if not pairs.has_instances:
            raise BadInput(f"{pairs.root / 'instances'}: looked for instance maps for --task {args.task}, "
                           f"found no such folder; use --task semantic")
    if args.task == "instance" and not any(c["isthing"] for c in sets[0].classes):
        raise BadInput(f"{sets[0].root / 'classes.json'}: --task instance needs a class with isthing true, "
                       f"found none")


def flags():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data", default="shapes", help="NAME (data/NAME) or a folder that holds train/ and val/")
    add("--synth", nargs="*", metavar="DIR", help="synthetic pair folders (default: none; for shapes: made "
                                                  "where missing)")
    add("--out", type=Path, help="folder of the results (default: out/NAME/mask2former or out/NAME/compare)")
    add("--init", type=Path, help="segmenter to start from or to evaluate: ours, or a transformers folder")
    add("--new-head", action="store_true", help="the classes of --init differ: start a new classifier")
    add("--task", choices=tuple(SCORE), default="semantic")
    add("--recipe", choices=tuple(RECIPES), default="tiny", help="augmentation, schedule and the defaults "
                                                                 "below")
    add("--preset", choices=tuple(PRESETS), help="network (default: the recipe's)")
    add("--size", type=side, help="training crop, 512 or 240x192 (width x height; default: the recipe's); "
        "but for coco, images are evaluated with its shorter side")
    add("--steps", type=positive(int), help="optimiser steps (default: the recipe's)")
    add("--batch", type=positive(int), help="images a micro-batch and rank (default: the recipe's, shared by "
                                            "ranks and micro-batches)")
    add("--accumulate", type=positive(int), default=1, help="micro-batches a step")
    add("--lr", type=positive(float), help="peak learning rate (default: the recipe's)")
    add("--p-synth", type=within(float, 0, 1), default=0.6, help="chance that a real sample is replaced by a "
                                                                "synthetic one")
    add("--pretrain", action="store_true", help="synthetic samples for half the steps, then real ones")
    add("--limit-real", type=positive(int), help="use the first N real pairs only")
    add("--seed", type=within(int, 0), default=0)
    add("--device", default="auto", help="cpu, cuda, cuda:1 ...")
    add("--compile", action="store_true", help="torch.compile (for CUDA)")
    add("--workers", type=within(int, 0), default=0, help="processes that load data")
    add("--splits", nargs="+", help="splits to evaluate on (default: val, and unseen and test where there)")
    add("--eval-only", action="store_true", help="evaluate --init, or what --out holds, or the demo weights")
    add("--predictions", type=Path, metavar="DIR", help="of --eval-only: predictions, as pair folders")
    add("--multi-scale", action="store_true", help="of --eval-only, semantic: 6 sizes, mirrored too (m.s.)")
    add("--eval-pairs", nargs="+", default=[], metavar="DIR", help="also evaluate on these pair folders, as "
                                                                   "a share of val")
    add("--compare", action="store_true", help="real only / each of --synth / all / oracle, over --seeds")
    add("--seeds", type=within(int, 0), nargs="+", default=[0, 1, 2], help="of --compare")
    add("--arms", nargs="+", default=[], help="of --compare, by name: real MaskSyn ImgSyn both oracle "
                                              "(default: all)")
    add("--oracle", type=Path, help="fresh true pairs (default: those of train/ beyond --limit-real)")
    add("--protocol", default="compare", help="name of --compare's table: which images the generators saw")
    return parser


def arms_of(args, real, root, synth):
    """The arms of --compare -> {name: [Pairs]}."""
    folders = {f"+ {NAMED.get(path.name, path.name)}": Pairs(path, real) for path in map(Path, synth)}
    if len(folders) < len(synth):
        raise BadInput(f"--synth {' '.join(map(str, synth))}: looked for folders of different names, the "
                       f"arms' names, found one twice; rename one, or compare them under two --protocol")
    arms = {"real only": [], **{name: [pairs] for name, pairs in folders.items()}}
    if len(folders) > 1:
        arms["+ both" if len(folders) == 2 else "+ all"] = list(folders.values())
    wanted = [name.lower() for name in args.arms]
    if args.oracle or args.limit_real and len(stems(root / "train" / "images")) > args.limit_real:
        arms["oracle"] = [Pairs(args.oracle or root / "train", real, 0 if args.oracle else args.limit_real)]
    known = {name.replace("+", "").replace("only", "").strip().lower(): name for name in arms}
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise BadInput(f"--arms {unknown[0]}: the arms are {', '.join(known)}; give folders by --synth, and "
                       f"for the oracle --limit-real or --oracle")
    return {name: arms[name] for short, name in known.items() if not wanted or short in wanted}


def splits_of(args, root, real):
    """{split: Pairs} to evaluate on, the folders of --eval-pairs last."""
    names = args.splits or [name for name in ("val", "unseen", "test") if (root / name).is_dir()]
    if not names:
        raise BadInput(f"{root}: looked for val/, unseen/ or test/ to evaluate on, found none; name them by "
                       f"--splits")
    return {str(name): Pairs(path, real) for name, path in
            [(name, root / name) for name in names] + [(path, path) for path in args.eval_pairs]}


def weights_of(args, out):
    """The weights --eval-only reads."""
    for path in (args.init, out / "model.safetensors", HERE / "weights" / args.data / "mask2former"):
        if path and path.exists():
            return path
    raise BadInput(f"{args.init or out / 'model.safetensors'}: looked for a trained segmenter, found none; "
                   f"train one first, or give --init")


def tell(scores, args, cfg, out):
    """Prints the metrics of every split; those of --eval-pairs also as a share of the first split's."""
    first, score = next(iter(scores)), SCORE[cfg["task"]]
    for name, result in scores.items():
        print(told(name, result))
        if name in args.eval_pairs:
            print(f"{'':10s} {score} is {result[score] / max(scores[first][score], 1e-9):.3f} of {first}'s")
    if not args.eval_only:
        write(out / "metrics.json", lambda part: part.write_text(json.dumps(scores, indent=1)))


def check_flags(args):
    """A flag that only another mode reads is told, not passed over."""
    default = flags().get_default
    given = {flag for flag in vars(args) if getattr(args, flag) != default(flag)}
    beside = [(flag, "compare") for flag in ("seeds", "arms", "oracle", "protocol")]
    beside += [(flag, "eval_only") for flag in ("predictions", "multi_scale")] + [("new_head", "init")]
    for flag, other in beside:
        if flag in given and other not in given:
            raise BadInput(f"--{dashed(flag)}: looked for --{dashed(other)} beside it, found none; give both")
    apart = [("seed", "compare"), ("p_synth", "pretrain"), ("multi_scale", "predictions"), ("preset", "init")]
    training = "new_head", "steps", "lr", "accumulate", "pretrain", "workers", "compile", "preset"
    for flag, other in [(flag, "eval_only") for flag in training] + apart:
        if flag in given and other in given:
            raise BadInput(f"--{dashed(flag)}: says nothing beside --{dashed(other)}, found both; give one")
    if Path(args.protocol).name != args.protocol:
        raise BadInput(f"--protocol {args.protocol}: looked for a name, found a path; the folder is --out's")
    if args.multi_scale and args.task != "semantic":
        raise BadInput(f"--multi-scale: looked for --task semantic, found {args.task}; leave it out")


def dashed(flag):
    return flag.replace("_", "-")


def go(args):
    """Runs what the flags ask for."""
    check_flags(args)
    args.place = device, rank, world = start(args.device)
    root, name, synth = folders(args)
    out = args.out or Path("out") / name / ("compare" if args.compare else "mask2former")
    if world > 1:
        dist.barrier()                                                # rank 0 may have made folders
    real = Pairs(root / "train", limit=args.limit_real)
    evals = splits_of(args, root, real)
    if args.compare:
        arms = arms_of(args, real, root, synth)
        check_task(args, [real, *evals.values(), *(p for part in arms.values() for p in part)])
        return compare(settings(args, real, [], world), real, arms, evals, args, out)
    pairs = [Pairs(path, real) for path in synth]
    if args.pretrain and not pairs:
        raise BadInput("--pretrain: looked for synthetic pairs to begin with, found none; give --synth")
    check_task(args, [real, *evals.values(), *pairs])
    cfg = settings(args, real, pairs, world)
    if args.eval_only:
        kept = {key: args.predictions and args.predictions / part.root.name for key, part in evals.items()}
        if args.predictions and len(set(kept.values())) < len(kept):
            raise BadInput(f"--predictions: looked for sets of different names, found {', '.join(kept)}; "
                           f"give fewer of them")
        if there := [folder for folder in kept.values() if folder and folder.exists()]:
            raise BadInput(f"{there[0]}: is there already; give another --predictions or delete it")
        if world > 1:
            dist.barrier()                                            # all have looked before one writes
        model = build(cfg, real.classes, weights_of(args, out)).to(device)
        scores = {key: evaluate(model, part, cfg, device, rank, world, multi_scale=args.multi_scale,
                                folder=kept[key])
                  for key, part in evals.items()}
    else:
        if rank == 0:
            parts = [f"{len(p)} pairs of {p.root}" for p in (real, *pairs)]
            print(f"{out}: {', '.join(parts)}{f'; p {args.p_synth}' if pairs else ''}", flush=True)
        model, scores = run(cfg, real, pairs, evals, out, args)
    if rank == 0:
        tell(scores, args, cfg, out)
        if not args.eval_only:
            rows = [[*row, m] for part in evals.values()
                    for row, m in zip(truths(part, cfg), previews(model, part, cfg, device))]
            picture(out / "samples.png", rows, ["image", "truth", "prediction"])
            print(f"pictures: {out / 'samples.png'}")


def main():
    try:
        go(flags().parse_args())
    except BadInput as error:                                  # from a worker process its text is a traceback
        sys.exit(str(error).split("BadInput: ")[-1].strip())
    except OSError as error:
        sys.exit(f"{error.filename or '--out'}: {error.strerror or error}; check the path, its permissions "
                 f"and the free space")


if __name__ == "__main__":
    main()
