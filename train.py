"""Trains a segmenter on real and synthetic pairs together, and measures it: SegGen's third step.

Each real sample of a batch is replaced by a synthetic one with probability 0.6: the paper's ADE20K recipe. Or
training sees synthetic samples in its first half and real ones in its second: its COCO recipe, --pretrain.
The number of steps is the same with and without synthetic data, so a gain is not more training.

Paper:   SegGen (2311.03355); Mask2Former (2112.01527) for the recipes; Kirillov et al. (1801.00868) for PQ;
         FreeMask (2310.15160) for --filter.
Differs: the paper does not say how MaskSyn and ImgSyn samples share the probability: here a synthetic folder
         is chosen uniformly, then a pair in it. The `tiny` recipe (from scratch, minutes on a CPU) is
         ours. ADE20K's brightness is scaled by up to an eighth (the original adds up to 32 of 255).
         The hardness of a mask is its own pixels' loss (FreeMask: the mean losses of their classes).
Reads:   pair folders data/NAME/{train,val,...} and out/NAME/{masksyn,imgsyn}. AP is read against COCO's own
         annotations where an evaluated folder holds them as instances.json.
Writes:  out/NAME/mask2former/{model.safetensors, best.safetensors, state.pt, log.jsonl, log.png,
         metrics.json, samples.png}. The last weights, not the best, are what is measured and compared.
         --filter: DIR_filtered, pair folders.
Needs:   mask2former.py, diffusion.py (device, seeds, the run folder), data/pairs.py.

    python train.py                                             # makes what is missing, trains, evaluates
    python train.py --synth --out out/judge                     # real pairs only
    python train.py --judge out/judge --filter out/shapes/imgsyn        # FreeMask's filter, then:
    python train.py --synth out/shapes/imgsyn_filtered --out out/filtered
    python train.py --eval-only --eval-pairs out/shapes/imgsyn  # how well synthetic images show their masks

Dimension key: B batch, H W pixels, K classes, N targets.
"""
import argparse
import contextlib
import copy
import functools
import io
import itertools
import math
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from tqdm import tqdm

from data.pairs import (CROWD, ROOT, FlagParser, PairFolder, category, check_classes, contact_sheet,
                        count_classes, dataset_name, describe_classes, find_split, has_left_or_right,
                        image_id, is_shapes, link, number, outline, palette, picture_size, read_json,
                        remove_temporary, run, some_sizes, spread, unfinished, write_json, write_mask,
                        write_picture, write_text)
from diffusion import (RunFolder, accumulate_gradients, check_output, compile_blocks, load_strict,
                       peak_memory, precision, seed_of, setup, weights_hash, wrap)
from mask2former import (BLOCKS, PRESETS, TASKS, Mask2Former, average_count, class_scores, final_predictions,
                         load, postprocess, predict, save, swin_name, targets, weight_files)

# What a recipe decides. Flags override preset, steps, lr, size, eval_every and workers.
#   step_images  of all ranks and micro-batches together
#   size   (H, W) of the training crops; None: the median of the real images
#   sides  of evaluated images in the network: the shorter one's length, the longer one's limit; None: as is
#   eval_every  steps between evaluations on val; 0: none before the end
#   workers  processes that load data; 0: the training waits for each batch, for hours at paper scale
RECIPES = {
    "tiny": dict(
        preset="tiny", steps=1000, step_images=8, lr=2e-3, clip=1.0, schedule="cosine", warmup=30,
        size=None, sides=None, save_every=100, eval_every=250, workers=0),
    "ade20k": dict(
        preset="resnet50", steps=160_000, step_images=16, lr=1e-4, clip=0.01, schedule="poly", warmup=0,
        size=(512, 512), sides=(512, 2048), save_every=2000, eval_every=5000, workers=4),
    "coco": dict(
        preset="resnet50", steps=368_750, step_images=16, lr=1e-4, clip=0.01, schedule="steps", warmup=0,
        size=(1024, 1024), sides=(800, 1333), save_every=2000, eval_every=25_000, workers=4),
}
# What a training crop shows, in words
CROPS = {
    "tiny": "half to all of a picture",
    "ade20k": "of pictures whose shorter side is 0.5 to 2 crops long",
    "coco": "of pictures at 0.1 to 2 times the size that fits the crop",
}
SCORE = {"semantic": "mIoU", "panoptic": "PQ", "instance": "AP"}      # the number that a task is judged by
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)                            # of the paper's multi-scale numbers
PAIRS = 500                                                           # of each kind are made for the shapes


# ---- batches -----------------------------------------------------------------------------------------------

def augmentation(recipe, height, width, mirrors=True):
    """A recipe's random transform of an image and its maps to height x width.

    Maps are resized by nearest. What lies beyond the picture is grey and void. mirrors: False where a class
    is named for its side.
    """
    fill = {tv_tensors.Image: 128, tv_tensors.Mask: 0}
    crop = v2.RandomCrop((height, width), pad_if_needed=True, fill=fill)
    flip = v2.RandomHorizontalFlip(0.5 if mirrors else 0.0)
    if recipe == "coco":
        jitter = v2.ScaleJitter((width, height), (0.1, 2.0))          # torchvision takes it as (W, H)
        return v2.Compose([flip, jitter, crop])
    if recipe == "ade20k":
        sides = [int(height * 0.1 * n) for n in range(5, 21)]         # 0.5, 0.6, ... 2 crops
        scale = v2.RandomShortestSize(sides, 4 * height)
        spans = dict(brightness=(0.875, 1.125), contrast=(0.5, 1.5), saturation=(0.5, 1.5), hue=0.1)
        jitters = [v2.ColorJitter(**{kind: span}) for kind, span in spans.items()]
        return v2.Compose([flip, scale, crop, *(v2.RandomApply([jitter]) for jitter in jitters)])
    ratio = width / height
    zoom = v2.RandomResizedCrop((height, width), (0.5, 1.0), (0.8 * ratio, 1.25 * ratio))
    return v2.Compose([flip, zoom, v2.ColorJitter(0.3, 0.3, 0.3)])


def median_size(pairs):
    """(H, W) of a typical picture: the median of at most 500 of them, by their headers."""
    width, height = np.median(some_sizes(pairs.paths), axis=0).round().astype(int).tolist()
    return height, width


@functools.lru_cache(2)                                              # a batch may be in two passes
def real_order(length, seed, epoch):
    """The order of the real samples in pass number `epoch`."""
    generator = torch.Generator().manual_seed(seed_of(seed, epoch, "order"))
    return torch.randperm(length, generator=generator).tolist()


def to_tensor(image):
    """(H, W, 3) array -> (3, H, W) tensor."""
    return torch.tensor(image).permute(2, 0, 1).contiguous()


class Batches(Dataset):
    """batches[n] is micro-batch n of this rank: images (B, 3, H, W) uint8 and a list of B targets.

    real, synth   a PairFolder, and a list of them
    recipe, size  which augmentation, and (H, W) of its results
    batch         samples of a micro-batch; there are steps x accumulate micro-batches
    class_ids     the classes that are labels 0, 1, ...; without it all
    p_synth       the probability that a synthetic sample replaces a real one
    pretrain      instead: only synthetic samples in the first half of the steps, only real ones after it
    rank, world   which of how many processes this is: together they pass over the real samples

    A micro-batch is a function of (seed, n, rank).
    """

    def __init__(self, real, synth=(), *, recipe="tiny", size=(64, 64), task="semantic", batch=8, steps=1000,
                 accumulate=1, class_ids=None, p_synth=0.6, pretrain=False, seed=0, rank=0, world=1):
        self.real, self.synth = real, synth
        self.augment = augmentation(recipe, *size, mirrors=not has_left_or_right(real.classes))
        self.void_is_background = recipe != "tiny"                    # it is in the original
        self.task, self.isthing = task, [c["isthing"] for c in real.classes]
        known = class_ids or range(1, len(real.classes) + 1)
        self.labels = torch.full((len(real.classes),), -1)
        self.labels[torch.tensor(known) - 1] = torch.arange(len(known))
        self.batch, self.length = batch, steps * accumulate
        self.p_synth, self.pretrain = p_synth, pretrain
        self.seed, self.rank, self.world = seed, rank, world

    def __len__(self):
        return self.length

    def __getitem__(self, n):
        torch.manual_seed(seed_of(self.seed, n, self.rank, "batch"))
        images, truth = zip(*(self.sample(n, i) for i in range(self.batch)))
        return torch.stack(images), list(truth)

    def sample(self, n, i):
        """Sample i of micro-batch n, augmented -> image (3, H, W), target."""
        folder, k = self.choose(n, i)
        pair = folder.read(k)
        maps = torch.tensor(np.stack([pair["ids"], pair["instances"]]))         # (2, H, W)
        image, maps = self.augment(tv_tensors.Image(to_tensor(pair["image"])), tv_tensors.Mask(maps))
        ids, instances = maps.as_subclass(torch.Tensor)
        target = targets(ids, instances, self.isthing, self.task)
        target["labels"] = self.labels[target["labels"]]              # (N,)
        # Void in a filtered mask is unknown, not background: the loss ignores it.
        if folder.filtered or not self.void_is_background:
            target["valid"] = ids > 0
        return image.as_subclass(torch.Tensor), target

    def choose(self, n, i):
        """Where sample i of micro-batch n comes from -> PairFolder, index. Draws from torch's generator,
        which `__getitem__` has seeded."""
        p = self.p_synth
        if self.pretrain:
            p = 1.0 if 2 * n < len(self) else 0.0

        # SegGen's mixture: with probability p a synthetic sample replaces the real one.
        if self.synth and torch.rand(()) < p:
            folder = self.synth[torch.randint(len(self.synth), ())]
            return folder, int(torch.randint(len(folder), ()))

        # The real sample of this position in a shuffled order, new in each pass. A position that a synthetic
        # sample takes skips its real one.
        position = (n * self.world + self.rank) * self.batch + i
        epoch, k = divmod(position, len(self.real))
        return self.real, real_order(len(self.real), self.seed, epoch)[k]


# ---- training ----------------------------------------------------------------------------------------------

def make_optimiser(model, lr):
    """AdamW as in the original: no weight decay on norms and embeddings; a pretrained backbone learns at a
    tenth of the rate. Biases do decay, and the pixel decoder's level too: it is no embedding there."""
    norms = nn.LayerNorm, nn.GroupNorm
    embeddings = "decoder.queries", "decoder.places", "decoder.level"
    pretrained = model.config["backbone"] != "tiny"
    groups = {}
    for path, module in model.named_modules():
        for name, p in module.named_parameters(recurse=False):
            table = name == "relative_position_bias_table"
            fixed = table or isinstance(module, norms) or f"{path}.{name}" in embeddings
            decay = 0.0 if fixed else 0.05
            scale = 0.1 if pretrained and path.startswith("backbone.") else 1.0
            groups.setdefault((decay, scale), []).append(p)
    return torch.optim.AdamW([dict(params=params, weight_decay=decay, scale=scale)
                              for (decay, scale), params in groups.items()], lr=lr, fused=True)


def rate(schedule, step, steps, warmup):
    """The share of the peak learning rate at a step."""
    rising = min(1.0, (step + 1) / (warmup + 1))
    if schedule == "poly":
        return rising * (1 - step / steps) ** 0.9
    if schedule == "steps":
        # The original drops its rate at these of 368,750 steps; here it drops at the same shares.
        drops = [n for n in (327_778, 355_092) if step * 368_750 >= n * steps]
        return rising * 0.1 ** len(drops)
    return rising * 0.5 * (1 + math.cos(math.pi * step / steps))


def step_gradients(net, criterion, micro_batches, device):
    """Leave the gradients of a step in the parameters -> {"loss", and its parts "class", "mask", "dice"}.

    net        the model, or what torch.compile and DistributedDataParallel made of it
    criterion  the plain model's `loss`

    A mask loss is a mean over the masks of the step, so all micro-batches are divided by the same number.
    """
    # The masks of an average micro-batch: accumulate_gradients divides by the number of micro-batches.
    masks = sum(len(target["labels"]) for _, truth in micro_batches for target in truth)
    num_masks = average_count(masks, device) / len(micro_batches)
    parts = Counter()

    def loss(net, batch):
        images, truth = batch
        total, parts_of_batch = criterion(net(images.float() / 255), truth, num_masks=num_masks)
        for name, part in parts_of_batch.items():
            parts[name] += part / len(micro_batches)
        return total
    return {"loss": accumulate_gradients(net, loss, micro_batches, device), **parts}


def train(model, batches, out, cfg, device, compile=False, workers=0, measure=None, eval_every=0):
    """Train a Mask2Former -> the model in eval mode; `out` gets what a RunFolder writes and the weights.

    batches     a Batches, or anything with its indexing, `rank` and `world`
    cfg         the run's settings, JSON values. Read here: steps, accumulate, lr, schedule, warmup, clip,
                seed, save_every. A state of other settings is refused; steps and world may change
    measure     measure(model) -> {name: score or None}, one score; best.safetensors keeps the weights of the
                highest. All ranks call it every `eval_every` steps and at the last one; 0: never

    Called again it goes on from state.pt and ends with the same weights as an undisturbed run: bit for bit on
    the CPU of one machine; some CUDA kernels add in no fixed order. Raises ValueError where `out` holds
    another run or the loss is not finite; the last good state stays.
    """
    rank, steps, accumulate = batches.rank, cfg["steps"], cfg["accumulate"]
    model.train()
    optimiser = make_optimiser(model, cfg["lr"])
    folder = RunFolder(out, cfg, rank, model=model, optimiser=optimiser)
    first = folder.resume()
    if first >= steps:
        if rank == 0 and not (folder.out / "model.safetensors").exists():  # somebody removed it
            save(model, folder.out / "model.safetensors")
        return model.eval()

    # Train the compiled and distributed net; evaluate and save the plain model.
    net = wrap(compiled_copy(model) if compile else model, device, batches.world)
    stream = load_steps(batches, first, steps, accumulate, device, workers)
    history, clock = [], time.time()
    bar = tqdm(range(first, steps), "train", initial=first, total=steps, disable=rank > 0, mininterval=1)
    for step, micro_batches in zip(bar, stream):
        # The loss compares masks at random points, which depend on (seed, step, rank) alone.
        torch.manual_seed(seed_of(cfg["seed"], step, rank, "points"))
        losses = step_gradients(net, model.loss, micro_batches, device)

        # Take the step; all ranks have the same gradients, hence the same norm.
        norm = nn.utils.clip_grad_norm_(model.parameters(), cfg["clip"])
        losses["loss"] += 0 * norm                                    # NaN where a gradient is not finite
        history.append(losses)
        lr = cfg["lr"] * rate(cfg["schedule"], step, steps, cfg["warmup"])
        for group in optimiser.param_groups:
            group["lr"] = lr * group["scale"]
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

        # Report, and save after the check: what state.pt holds is finite.
        done = step + 1
        measuring = eval_every > 0 and (done % eval_every == 0 or done == steps)
        saving = measuring or done % cfg["save_every"] == 0 or done == steps
        if saving or done % 50 == 0:
            folder.check_finite([losses["loss"] for losses in history], done)
            line = dict(step=done, **mean_losses(history), rate=lr, gradient_norm=norm.item(),
                        seconds_per_step=(time.time() - clock) / len(history), memory_mb=peak_memory(device))
            scores = measure(model) if measuring else {}
            model.train()
            if saving and rank == 0:
                save_weights(model, folder, scores)
            folder.report(bar, **line, **scores)
            if saving:
                folder.save(done)
            history, clock = [], time.time()
    return model.eval()


def compiled_copy(model):
    """A copy of a model, on the same parameters, whose repeated blocks are compiled. Equal blocks share the
    code, so this takes less than half as long as compiling the whole network."""
    # deepcopy takes {id: its copy} of what is copied already: each tensor counts as its own copy.
    shared = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    net = copy.deepcopy(model, shared)
    compile_blocks(net, BLOCKS, dynamic=False)                        # all crops have one size
    return net


def load_steps(batches, first, steps, accumulate, device, workers):
    """Yield the micro-batches of each step from `first` on, a list each.

    What makes a resume exact: micro-batch n is a function of (seed, n, rank), and the loader starts with the
    first one that the saved steps have not used.
    """
    remaining = range(first * accumulate, steps * accumulate)
    stream = iter(DataLoader(batches, batch_size=None, sampler=remaining, num_workers=workers,
                             pin_memory=device.type == "cuda"))
    for _ in range(first, steps):
        yield [next(stream) for _ in range(accumulate)]


def mean_losses(history):
    """[{name: scalar tensor}, ...] -> {name: mean}."""
    return {name: torch.stack([losses[name] for losses in history]).mean().item() for name in history[0]}


def save_weights(model, folder, scores):
    """Write model.safetensors, and best.safetensors where a new score is over all those in the log.

    scores: {name: score or None} of an evaluation, {} where there was none
    """
    save(model, folder.out / "model.safetensors")
    for name, score in scores.items():
        earlier = [line[name] for line in folder.log if line.get(name) is not None]
        if score is not None and score > max(earlier, default=-1):
            save(model, folder.out / "best.safetensors")


# ---- metrics -----------------------------------------------------------------------------------------------
# Each has add(prediction, truth) for an image, merge() with the same metric of another rank, result() in
# percent, None where there is nothing to measure, and after it per_class(): {class name: percent or None}.
# prediction = (ids, instances, segments), what `postprocess` returns for the metric's task, the maps as
# arrays; truth = (ids, instances), and for AP perhaps the image's annotations. ids (H, W): class 1..K, 0
# void. instances (H, W): 0 none.

def percent(values):
    """The mean of an array in percent; None where it is empty."""
    return 100 * float(np.mean(values)) if len(values) else None


def name_scores(classes, values, seen):
    """Shares of the classes -> {class name: percent}, None where `seen` is false."""
    return {c["name"]: 100 * float(value) if there else None
            for c, value, there in zip(classes, values, seen, strict=True)}


class MeanIoU:
    """mIoU: the mean over classes of IoU, the pixels that truth and prediction share / those that either has.

    One confusion matrix counts the pixels of all images. Pixels of void truth are ignored. Classes that the
    truth never shows are left out of the mean and counted as "absent".
    """
    task = "semantic"

    def __init__(self, classes):
        self.classes = classes
        size = len(classes) + 1
        self.matrix = np.zeros((size, size), np.int64)                # [truth, prediction], 0 void

    def add(self, prediction, truth):
        size = len(self.matrix)
        cell = truth[0].astype(np.int64) * size + prediction[0]       # (H, W)
        counts = np.bincount(cell.ravel(), minlength=size ** 2)
        self.matrix += counts.reshape(size, size)

    def merge(self, other):
        self.matrix += other.matrix

    def count(self):
        """The pixels of each class (K,): in truth and prediction, in truth, in either."""
        hits = self.matrix.diagonal()[1:]
        truth = self.matrix[1:].sum(1)
        predicted = self.matrix[1:, 1:].sum(0)
        return hits, truth, truth + predicted - hits

    def result(self):
        hits, truth, union = self.count()
        seen = truth > 0
        iou, accuracy = hits[seen] / union[seen], hits[seen] / truth[seen]
        weight = truth[seen] * seen.sum() / max(truth.sum(), 1)       # by pixels, 1 on average
        return {"mIoU": percent(iou), "fwIoU": percent(weight * iou),
                "mACC": percent(accuracy), "pACC": percent(weight * accuracy), "absent": int((~seen).sum())}

    def per_class(self):
        hits, truth, union = self.count()
        return name_scores(self.classes, hits / np.maximum(union, 1), truth > 0)


class PanopticQuality:
    """PQ: the mean over classes of the IoUs of matched segments, summed / (hits + false / 2 + missed / 2).

    A true and a found segment of one class match if their IoU is over 0.5, so each has one partner at most.
    PQ = SQ x RQ: SQ is the mean IoU of the matched, RQ the F1 score of the matching. Pixels of void truth
    leave the IoU. A found segment is not false if over half of it lies on void or on a crowd of its class. A
    crowd (instance 255) is neither matched nor missed.
    """
    task = "panoptic"

    def __init__(self, classes):
        self.classes = classes
        self.isthing = np.array([False] + [c["isthing"] for c in classes])      # by class id
        self.counts = np.zeros((4, len(classes) + 1))       # by class: summed IoU, hits, false, missed

    def overlaps(self, prediction, truth):
        """{(true segment, found segment): pixels that both have}; a segment is (class, instance)."""
        maps = []
        for ids, instances in (truth[:2], prediction[:2]):
            maps += [ids, instances * self.isthing[ids]]    # stuff has no instances
        maps = np.stack(maps, -1).astype(np.uint16)         # (H, W, 4), seen as one 64-bit number a pixel:
        numbers, counts = np.unique(maps.view(np.uint64), return_counts=True)
        rows = numbers.view(np.uint16).reshape(-1, 4).tolist()
        return {((a, b), (c, d)): pixels for (a, b, c, d), pixels in zip(rows, counts.tolist())}

    def add(self, prediction, truth):
        void, overlaps = (0, 0), self.overlaps(prediction, truth)
        true_area, found_area, ignored = Counter(), Counter(), Counter()
        for (true, found), pixels in overlaps.items():
            true_area[true] += pixels
            found_area[found] += pixels
            if true in (void, (found[0], CROWD)):
                ignored[found] += pixels

        iou, hits, false, missed = self.counts
        matched_true, matched_found = {void}, {void}
        for (true, found), pixels in overlaps.items():
            union = true_area[true] + found_area[found] - pixels - overlaps.get((void, found), 0)
            k, number = true
            same_class = k > 0 and k == found[0]
            if same_class and number != CROWD and pixels / union > 0.5:
                iou[k] += pixels / union
                hits[k] += 1
                matched_true.add(true)
                matched_found.add(found)
        for k, number in true_area:
            missed[k] += (k, number) not in matched_true and number != CROWD
        for found, area in found_area.items():
            false[found[0]] += found not in matched_found and ignored[found] <= 0.5 * area

    def merge(self, other):
        self.counts += other.counts

    def qualities(self):
        """SQ, RQ and whether there is anything to measure, by class id (K + 1,)."""
        iou, hits, false, missed = self.counts
        sq = iou / np.maximum(hits, 1)
        rq = hits / np.maximum(hits + 0.5 * false + 0.5 * missed, 0.5)
        return sq, rq, hits + false + missed > 0

    def result(self):
        sq, rq, seen = self.qualities()
        result = {}
        for kind, chosen in (("", seen), ("_things", seen & self.isthing), ("_stuff", seen & ~self.isthing)):
            result["PQ" + kind] = percent((sq * rq)[chosen])
            result["SQ" + kind] = percent(sq[chosen])
            result["RQ" + kind] = percent(rq[chosen])
        return result

    def per_class(self):
        sq, rq, seen = self.qualities()
        return name_scores(self.classes, (sq * rq)[1:], seen[1:])


class AveragePrecision:
    """AP: the area under the precision-recall curve of scored instances, by pycocotools' COCOeval.

    It is the mean over classes and over ten thresholds: an instance is found if its IoU is over 0.50, 0.55,
    ... 0.95. Once for masks, once ("_box") for the boxes around them. What is true are the annotations of an
    image where `add` gets them, else the things in its maps.
    """
    task = "instance"

    def __init__(self, classes):
        self.things = {k: c for k, c in enumerate(classes, 1) if c["isthing"]}
        self.images = []                         # {"size", "true" and "found" annotations} of each

    def add(self, prediction, truth):
        ids, instances, *annotations = truth
        true = annotations[0] if annotations else self.list_things(ids, instances)
        found = [annotation(s["mask"], s["class"], score=s["score"]) for s in prediction[2]]
        self.images.append({"size": ids.shape, "true": true, "found": found})

    def list_things(self, ids, instances):
        """The annotations of the things in two maps."""
        segment = ids.astype(np.int64) * 256 + instances
        things = []
        for number in np.unique(segment).tolist():
            k, n = divmod(number, 256)
            if k in self.things:
                things.append(annotation(segment == number, k, iscrowd=int(n == CROWD)))
        return things

    def merge(self, other):
        self.images += other.images

    def coco(self, kind):
        """The "true" or the "found" annotations of all images as a COCO data set."""
        images, annotations = [], []
        for n, image in enumerate(self.images):
            height, width = image["size"]
            images.append(dict(id=n, height=height, width=width))
            for one in image[kind]:
                annotations.append(one | dict(id=len(annotations) + 1, image_id=n))
        categories = [dict(id=k) for k in self.things]
        coco = COCO()
        coco.dataset = dict(images=images, annotations=annotations, categories=categories)
        coco.createIndex()
        return coco

    def result(self):
        names = "AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"
        result = {}
        with contextlib.redirect_stdout(io.StringIO()):
            true, found = self.coco("true"), self.coco("found")
            for kind, ending in (("segm", ""), ("bbox", "_box")):
                evaluation = COCOeval(true, found, kind)
                evaluation.evaluate()
                evaluation.accumulate()
                evaluation.summarize()
                for name, value in zip(names, evaluation.stats.tolist()):
                    result[name + ending] = 100 * value if value >= 0 else None   # -1: nothing to find
                if kind == "segm":
                    self.precision = evaluation.eval["precision"][:, :, :, 0, -1]  # (10, recalls, things)
        return result

    def per_class(self):
        ap = self.precision.mean((0, 1))                              # (things,), -1: nothing to find
        return name_scores(self.things.values(), ap, ap >= 0)


def run_lengths(mask):
    """(H, W) bool, array or tensor -> COCO's run-length code."""
    return coco_mask.encode(np.asfortranarray(torch.as_tensor(mask).cpu(), np.uint8))


def annotation(mask, k, **values):
    """An instance of class k as COCO describes it, with its box (x, y, width, height) and its area."""
    code = run_lengths(mask)
    box, area = coco_mask.toBbox(code).tolist(), float(coco_mask.area(code))
    return dict(segmentation=code, category_id=k, bbox=box, area=area, **values)


class OfficialInstances:
    """The annotations of a split's instances.json, COCO's own: outlines that are finer than a mask's pixels.

    pairs: a PairFolder; an image is found by its file's name, else by the number that its name is. Raises
    ValueError where an image or a category is missing or the size differs.
    """

    def __init__(self, pairs):
        self.path = pairs.folder / "instances.json"
        self.coco = COCO()
        self.coco.dataset = read_json(self.path)
        with contextlib.redirect_stdout(io.StringIO()):
            self.coco.createIndex()
        self.ids = {Path(image["file_name"]).stem: i for i, image in self.coco.imgs.items()}
        things = [k for k, c in enumerate(pairs.classes, 1) if c["isthing"]]
        self.classes = {category(pairs.classes, k): k for k in things}
        unknown = {one["category_id"] for one in self.coco.anns.values()} - self.classes.keys()
        if unknown:
            raise ValueError(f"{self.path}: category {min(unknown)} is no source_id of a thing in "
                             "classes.json. Add it there, or remove the file")

    def annotations(self, name, size):
        """The annotations of an image of `size` (H, W), as `annotation` returns them."""
        i = self.ids.get(name, image_id(name))
        image = self.coco.imgs.get(i)
        found = image and (image["height"], image["width"])
        if found != size:
            raise ValueError(f"{self.path}: image {name} is {found or 'missing'} there, (H, W) {size} here. "
                             "Take the file of these very images, or remove it")
        return [one | dict(category_id=self.classes[one["category_id"]], segmentation=self.coco.annToRLE(one))
                for one in self.coco.imgToAnns[i]]


METERS = {
    "semantic": [MeanIoU],
    "panoptic": [PanopticQuality, AveragePrecision, MeanIoU],
    "instance": [AveragePrecision],
}


# ---- evaluation --------------------------------------------------------------------------------------------

def read_batches(pairs, indices, most):
    """Yield lists of up to `most` (index, pair): neighbours whose images have one size."""
    items = ((i, pairs.read(i)) for i in indices)
    for _, same_size in itertools.groupby(items, lambda item: item[1]["ids"].shape):
        while batch := list(itertools.islice(same_size, most)):
            yield batch


def fit_sides(images, short, longest):
    """images (B, 3, H, W), the shorter side at `short`, or less where the longer one would pass `longest`."""
    H, W = images.shape[2:]
    scale = min(short / min(H, W), longest / max(H, W))
    size = [max(1, round(side * scale)) for side in (H, W)]
    return v2.functional.resize(images, size, antialias=True)


def list_class_ids(model, classes):
    """Which of the classes of data the outputs of a segmenter stand for, as ids: all, or the things alone."""
    ids = range(1, len(classes) + 1)
    if model.config["num_classes"] == len(classes):
        return list(ids)
    return [k for k in ids if classes[k - 1]["isthing"]]


@torch.no_grad()
def segment(model, images, classes, tasks, sides=None, multi_scale=False):
    """Yield {task: (ids, instances, segments)} of each of images (B, 3, H, W) uint8, at their own size.

    classes      of the data, whose class ids are those of the results
    sides        (short, longest) inside the network, see `fit_sides`; None: as they are
    multi_scale  average six sizes around `short` and their mirror images; for semantic segmentation only
    """
    size, ids = images.shape[2:], list_class_ids(model, classes)
    x = images.to(next(model.parameters()).device) / 255
    if multi_scale:
        short, flip = sides[0] if sides else None, not has_left_or_right(classes)
        for image in x:
            yield {task: to_arrays(*predict(model, image, task, short, SCALES, flip), ids) for task in tasks}
        return
    isthing = [classes[k - 1]["isthing"] for k in ids]
    for prediction in final_predictions(model, fit_sides(x, *sides) if sides else x):
        yield {task: to_arrays(*postprocess(prediction, size, task, isthing), ids) for task in tasks}


def to_arrays(ids, instances, segments, class_ids):
    """A prediction's maps as arrays; class_ids: those of the data, of the network's classes 1, 2, ..."""
    table = np.array([0, *class_ids])
    segments = [found | {"class": class_ids[found["class"] - 1]} for found in segments]
    return table[ids.cpu().numpy()], instances.cpu().numpy(), segments


def evaluate(model, pairs, task="semantic", sides=None, rank=0, world=1, multi_scale=False, folder=None):
    """The metrics of a segmenter on a PairFolder -> {name: percent or None}, "images": their number, and
    "per_class": {class name: percent or None} of the first metric.

    task                semantic: mIoU; panoptic: PQ, AP and mIoU; instance: AP
    sides, multi_scale  as in `segment`
    rank, world         ranks share the images, and each returns the metrics of all
    folder              where the predictions are written as a pair folder, if anywhere
    """
    meters = [Meter(pairs.classes) for Meter in METERS[task]]
    tasks = [meter.task for meter in meters]
    official = None
    if "instance" in tasks and (pairs.folder / "instances.json").exists():
        official = OfficialInstances(pairs)
    indices = range(rank, len(pairs), world)
    bar = tqdm(total=len(indices), desc=f"evaluate {pairs.folder.name}", disable=rank > 0, leave=False)
    if folder and rank == 0:
        write_json(folder / "classes.json", pairs.classes)
    model.eval()
    for batch in read_batches(pairs, indices, 1 if sides else 16):
        images = torch.stack([to_tensor(pair["image"]) for _, pair in batch])
        results = segment(model, images, pairs.classes, tasks, sides, multi_scale)
        for (i, pair), result in zip(batch, results):
            truth = [pair["ids"], pair["instances"]]
            if official:
                truth.append(official.annotations(pairs.names[i], pair["ids"].shape))
            for meter in meters:
                meter.add(result[meter.task], truth)
            if folder:
                write_prediction(folder, pairs.names[i], result, task, pairs.classes)
            bar.update()
    if world > 1:
        meters = merge_ranks(meters, world)
    scores = {name: value for meter in meters for name, value in meter.result().items()}
    return {"images": len(pairs), **scores, "per_class": meters[0].per_class()}


def merge_ranks(meters, world):
    """The meters of this rank -> those of all ranks together."""
    by_rank = [None] * world
    dist.all_gather_object(by_rank, meters)
    for others in by_rank[1:]:
        for meter, other in zip(by_rank[0], others):
            meter.merge(other)
    return by_rank[0]


def write_prediction(folder, name, result, task, classes):
    """Write one image's prediction, for data/coco/export.py: masks/NAME.png; for tasks with instances also
    instances/NAME.png and results/NAME.json, the scored instances in COCO's format of results."""
    ids, instances, _ = result[task]
    write_mask(folder / "masks" / f"{name}.png", ids.astype(np.uint8), len(classes))
    if task == "semantic":
        return
    instances = np.minimum(instances, CROWD)               # what cannot be numbered in 8 bits is a crowd
    write_picture(folder / "instances" / f"{name}.png", instances.astype(np.uint8))
    entries = []
    for found in result["instance"][2]:
        code = run_lengths(found["mask"])
        code["counts"] = code["counts"].decode()
        entries.append(dict(image_id=image_id(name), category_id=category(classes, found["class"]),
                            score=found["score"], segmentation=code))
    write_json(folder / "results" / f"{name}.json", entries)


def format_metrics(split, result):
    """What `evaluate` returned as one line of text, without the classes."""
    values = [f"{name} {format_score(value)}" for name, value in result.items() if name != "per_class"]
    return f"{split:10} {'  '.join(values)}"


def format_score(value):
    return f"{value:.1f}" if isinstance(value, float) else "-" if value is None else str(value)


def format_classes(per_class):
    """{class name: percent or None} as columns of text."""
    width = max(map(len, per_class), default=0)
    columns = max(1, 110 // (width + 9))
    cells = [f"{name:{width}} {format_score(value):>5}" for name, value in per_class.items()]
    return "\n".join("   ".join(cells[i:i + columns]) for i in range(0, len(cells), columns))


# ---- pictures ----------------------------------------------------------------------------------------------

def examples(model, splits, task, sides=None):
    """What a segmenter finds in a few pairs of each split -> rows of a contact sheet, and its captions."""
    rows, captions = {"image": [], "truth": [], "prediction": []}, []
    for split, pairs in splits.items():
        K = len(pairs.classes)
        for i in spread(len(pairs), 4):
            pair = pairs.read(i)
            (result,) = segment(model, to_tensor(pair["image"])[None], pairs.classes, [task], sides)
            rows["image"].append(pair["image"])
            for row, (ids, instances) in (("truth", (pair["ids"], pair["instances"])),
                                          ("prediction", result[task][:2])):
                codes = ids if task == "semantic" else outline(ids, instances, K)
                rows[row].append(palette(K)[codes])
            captions.append(f"{Path(split).name} {pairs.names[i]}")
    return rows, captions


# ---- the model ---------------------------------------------------------------------------------------------

def build(classes, task="semantic", preset="tiny", seed=0, init=None, new_head=False, backbone=None,
          queries=None):
    """A segmenter for these classes, new or from a checkpoint. One for instances knows the things alone.

    preset    of a new one: a name in mask2former.PRESETS. All but "tiny" get ImageNet weights
    backbone  of a new one: the folder of a Swin as transformers stores it, instead of those weights
    queries   of a new one; None: the preset's number
    init      a checkpoint of ours or a folder in transformers' format. Its classes must be these; spelling
              may differ, and for instance segmentation it may know all classes, as one for panoptic does
    new_head  they may be others: the classifier of `init` is replaced by a new one

    Raises ValueError where the classes differ.
    """
    torch.manual_seed(seed_of(seed, "weights"))
    wanted = [c for c in classes if c["isthing"] or task != "instance"]
    if not init:
        sizes = PRESETS[preset] | ({"queries": queries} if queries else {})
        model = Mask2Former(**sizes, **describe_outputs(wanted, task))
        if backbone:
            model.backbone.load_folder(backbone)
        elif preset != "tiny":
            model.backbone.load_imagenet()
        return model

    old = load(init, task)
    names = old.config["class_names"]
    if names and not new_head:
        wanted = classes if len(names) == len(classes) else wanted
        check_classes([dict(name=spelling(name)) for name in names],
                      [dict(name=spelling(c["name"])) for c in wanted], init,
                      "Use weights of these classes, or begin a new classifier by --new-head")
    model = Mask2Former(**old.config | describe_outputs(wanted, task))
    state = old.state_dict()
    if new_head:
        state |= {k: v for k, v in model.state_dict().items() if k.startswith("decoder.classes.")}
    load_strict(model, state, init)
    return model


def describe_outputs(classes, task):
    """The arguments of a Mask2Former that name its classes."""
    names, isthing = [c["name"] for c in classes], [c["isthing"] for c in classes]
    return dict(num_classes=len(names), class_names=names, isthing=isthing, task=task)


def spelling(name):
    """A class name without that in which releases differ: "Traffic-Light, stoplight" -> "traffic light"."""
    first = name.split(",")[0].split(";")[0].casefold()
    return " ".join(first.replace("-", " ").replace("_", " ").split())


# ---- filtering ---------------------------------------------------------------------------------------------
# As in FreeMask (2310.15160). A synthetic image does not show everywhere what its mask says. A segmenter
# trained on real pairs, the judge, finds such pixels: its loss there is over TOLERANCE times the mean loss of
# their class.

TOLERANCE = 1.25       # FreeMask's


@torch.no_grad()
def pixel_losses(model, pairs, sides=None):
    """Yield (i, ids, loss) of each pair of a PairFolder; ids (H, W), loss (H, W): 0 where the pixel is void.

    The loss of a pixel is -log of the probability of its true class: that class's score in semantic inference
    (see `class_scores`) divided by the sum over all classes. sides: as in `segment`.
    """
    device = next(model.parameters()).device
    indices = tqdm(range(len(pairs)), f"judge {pairs.folder.name}", leave=False)
    for batch in read_batches(pairs, indices, 1 if sides else 16):
        x = torch.stack([to_tensor(pair["image"]) for _, pair in batch]).to(device) / 255
        predictions = final_predictions(model, fit_sides(x, *sides) if sides else x)
        for (i, pair), prediction in zip(batch, predictions):
            label = torch.tensor(pair["ids"], device=device).long() - 1      # (H, W), void -1
            scores = class_scores(prediction, label.shape).clamp(min=1e-30)  # (K, H, W); not 0
            # Its softmax divides by the sum: softmax(log s) = s / sum(s).
            loss = F.cross_entropy(scores.log()[None], label[None], ignore_index=-1, reduction="none")
            yield i, pair["ids"], loss[0].cpu().numpy()


def class_losses(model, pairs, sides=None):
    """The mean loss of the pixels of each class of a PairFolder -> (K + 1,), void first; infinite for a class
    without pixels, which the judge cannot know."""
    sums, counts = np.zeros((2, len(pairs.classes) + 1))
    for _, ids, loss in pixel_losses(model, pairs, sides):
        sums += np.bincount(ids.ravel(), loss.ravel(), len(sums))
        counts += np.bincount(ids.ravel(), minlength=len(counts))
    return np.divide(sums, counts, out=np.full_like(sums, np.inf), where=counts > 0)


def filter_pairs(model, pairs, limits, out, meta, sides=None):
    """Write a copy of a synthetic PairFolder in which pixels of a high loss are void -> (2, K + 1): of each
    class id the filtered pixels, and all of them.

    model      the judge
    limits     (K + 1,): a pixel is filtered if its loss is over the limit of its class id
    out, meta  the folder to write, and the content of its meta.json

    Everything but masks is a link to a file of `pairs`. OUT/hardness.json holds {source: mean loss over the
    labelled pixels of a mask, averaged over its images}. A marker beside the folder says that it is not
    complete; a killed run leaves it there, and the next run writes the folder again.
    """
    write_text(unfinished(out), "")
    remove_temporary(out)
    write_json(out / "meta.json", meta)
    counts, losses = np.zeros((2, len(limits)), np.int64), {}
    for i, ids, loss in pixel_losses(model, pairs, sides):
        high = loss > limits[ids]
        write_mask(out / "masks" / f"{pairs.names[i]}.png", ids * ~high, len(pairs.classes))
        counts += [np.bincount(part.ravel(), minlength=len(limits)) for part in (ids[high], ids)]
        source = pairs.names[i].rpartition("_")[0]                    # NAME of NAME_00
        losses.setdefault(source, []).append(loss.sum() / max(1, np.count_nonzero(ids)))
    for path in pairs.files():
        if path.is_file() and path.parent.name != "masks":
            link(path, out / path.relative_to(pairs.folder))
    write_json(out / "hardness.json", {source: float(np.mean(values)) for source, values in losses.items()})
    unfinished(out).unlink()
    return counts


def describe_filtered(counts, classes):
    """What `filter_pairs` returned as text: the filtered share of all pixels and of three classes."""
    share = 100 * counts[0] / np.maximum(counts[1], 1)                # (K + 1,)
    most = [f"{classes[k - 1]['name']} {share[k]:.1f} %" for k in np.argsort(-share[1:])[:3] + 1]
    total = 100 * counts[0].sum() / max(1, counts[1, 1:].sum())
    return f"{total:.1f} % of the pixels filtered, the most of {', '.join(most)}"


# ---- the script --------------------------------------------------------------------------------------------

def recipe_table():
    """The recipes' defaults as text, for -h."""
    keys = "preset", "steps", "step_images", "lr", "size", "eval_every", "workers"
    rows = [["recipe", *keys]]
    for name, recipe in RECIPES.items():
        size = "x".join(map(str, recipe["size"][::-1])) if recipe["size"] else "data's"
        values = recipe | {"size": size}
        rows.append([name, *(str(values[key]) for key in keys)])
    lines = ["".join(f"{cell:11}" for cell in row) for row in rows]
    return "\n  ".join(["defaults of the recipes:", *lines])


def training_flags(description):
    """A parser with the flags of a training, which bench/compare.py shares."""
    parser = FlagParser(description=description, epilog=recipe_table(),
                        formatter_class=argparse.RawDescriptionHelpFormatter)
    add, positive = parser.add_argument, number(int, 1)
    add("--data", default="shapes", help="name of a data set (data/NAME), or a folder with train/ and val/")
    add("--synth", nargs="*", metavar="DIR", help="synthetic pair folders; without it, for shapes only, "
        "out/shapes/masksyn and out/shapes/imgsyn, which are made if missing")
    add("--out", type=Path, help="folder of the results; without it a folder of out/NAME")
    add("--init", type=Path, help="segmenter to start from: a checkpoint of ours or of transformers")
    add("--new-head", action="store_true", help="the classes of --init are others: start a new classifier")
    add("--task", choices=TASKS, default="semantic", help="kind of segmentation (%(default)s)")
    add("--recipe", choices=tuple(RECIPES), default="tiny", help="augmentation, schedule and the defaults "
        "listed below (%(default)s)")
    add("--preset", choices=tuple(PRESETS), help="network")
    add("--backbone", type=Path, metavar="FOLDER", help="a Swin as transformers stores it: it decides the "
        "network, whose backbone starts with its weights instead of torchvision's")
    add("--queries", type=positive, help="queries of the network; without it 40 for tiny, 200 for swin_l, "
        "else 100")
    add("--size", type=picture_size, help="training crop: 512, or 240x192 for width x height. Except for "
        "coco, also the shorter side of evaluated images")
    add("--steps", type=positive, help="optimiser steps")
    add("--batch", type=positive, help="images per micro-batch and rank; without it, the recipe's images of "
        "a step, shared by ranks and micro-batches")
    add("--accumulate", type=positive, default=1, help="micro-batches of a step (%(default)s)")
    add("--lr", type=number(float, 0, above=True), help="peak learning rate")
    add("--p-synth", type=number(float, 0, 1), default=0.6, help="probability that a synthetic sample "
        "replaces a real one (%(default)s)")
    add("--pretrain", action="store_true", help="synthetic samples for half of the steps, then real ones")
    add("--limit-real", type=positive, help="use the first N real pairs only")
    add("--device", default="auto", help="cpu, cuda, cuda:1 ...; without it a GPU if there is one")
    add("--compile", action="store_true", help="torch.compile, for CUDA")
    add("--workers", type=number(int, 0), help="processes that load data")
    add("--splits", nargs="+", help="splits to evaluate on; without it val, unseen and test if they exist")
    add("--eval-pairs", nargs="+", default=[], metavar="DIR", help="pair folders to evaluate on as well")
    return parser


def flags():
    parser = training_flags(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--seed", type=number(int, 0), default=0, help="another seed, another run")
    add("--eval-every", type=number(int, 0), metavar="STEPS", help="evaluate on val so often, and keep the "
        "best weights as best.safetensors; 0: only at the end, of the last weights")
    add = parser.add_argument_group("filtering without training").add_argument
    add("--judge", type=Path, metavar="W", help="a segmenter trained on real pairs (train.py --synth): a "
        "checkpoint, as --init takes it")
    add("--filter", type=Path, nargs="+", metavar="DIR", help="write DIR_filtered, a copy of each synthetic "
        f"folder in which pixels are void where the judge's loss is over {TOLERANCE} times the mean of their "
        "class on real pairs; and hardness.json for imgsyn.py")
    add = parser.add_argument_group("evaluation without training").add_argument
    add("--eval-only", action="store_true", help="evaluate --init, or what --out holds, or demo weights")
    add("--predictions", type=Path, metavar="DIR", help="write the predictions as pair folders")
    add("--multi-scale", action="store_true", help="average six sizes, mirrored too; for semantic")
    return parser


# (flag, other, together): the flag does something only together with the other one, or only without it
RULES = [("predictions", "eval_only", True), ("multi_scale", "eval_only", True), ("new_head", "init", True),
         ("p_synth", "pretrain", False), ("preset", "backbone", False)]
RULES += [(flag, "init", False) for flag in ("preset", "backbone", "queries")]
RULES += [("judge", "filter", True), ("filter", "judge", True), ("limit_real", "eval_only", False)]
RULES += [(flag, other, False) for other in ("eval_only", "filter") for flag in (
    "synth", "new_head", "preset", "backbone", "queries", "steps", "batch", "accumulate", "lr", "p_synth",
    "pretrain", "compile", "workers", "seed", "eval_every")]
RULES += [(flag, "filter", False) for flag in ("out", "init", "task", "splits", "eval_pairs", "eval_only")]


def parse(parser, argv):
    """The flags, and what follows from them: device, rank, world, and the sides of evaluated images.

    Raises ValueError where a flag would do nothing beside the others.
    """
    args = parser.parse_args(argv)
    given = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    for flag, other, together in RULES:
        if flag in given and (other in given) != together:
            flag, other = (name.replace("_", "-") for name in (flag, other))
            if together:
                raise ValueError(f"--{flag} has no effect without --{other}. Give both of them")
            raise ValueError(f"--{flag} has no effect with --{other}. Give one of them")
    args.device, args.rank, args.world = setup(args.device)
    if args.backbone:
        args.preset = swin_name(args.backbone / "config.json")
    if args.workers is None:
        args.workers = RECIPES[args.recipe]["workers"]
    args.sides = RECIPES[args.recipe]["sides"]
    if args.size and args.recipe != "coco":           # ADE20K: 512, 2048 for semantic; 640, 2560 for panoptic
        args.sides = min(args.size), 4 * min(args.size)
    return args


def synthetic_folders(args):
    """The synthetic folders to train on. Rank 0 makes what the built-in data lacks; the other ranks wait."""
    if args.synth is not None or not is_shapes(args.data):
        return args.synth or []
    folders = [Path("out/shapes/masksyn"), Path("out/shapes/imgsyn")]
    for folder in folders if args.rank == 0 else []:
        make_synthetic(folder)
    if args.world > 1:
        dist.barrier()
    return folders


def make_synthetic(folder):
    """Run masksyn.py or imgsyn.py, after which the folder is named, unless it has its 500 pairs."""
    count = len(list(folder.glob("images/[!.]*")))
    if count >= PAIRS:
        return
    command = [f"{folder.name}.py", "--out", str(folder), "--limit", str(PAIRS)]
    print(f"{folder}: {count} of {PAIRS} pairs are there. Running: python {' '.join(command)}", flush=True)
    # Without torchrun's variables, so that the script does not wait for other ranks.
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    if subprocess.run([sys.executable, ROOT / command[0], *command[1:]], env=env).returncode:
        raise ValueError(f"{folder}: could not be made. See the lines above")


def open_pairs(folder, task, classes=None, **part):
    """A PairFolder that has these classes and what the task needs."""
    pairs = PairFolder(folder, **part)
    if classes:
        check_classes(pairs.classes, classes, folder)
    things = pairs.has_instances and any(c["isthing"] for c in pairs.classes)
    if task == "instance" and not things or task == "panoptic" and not pairs.has_instances:
        raise ValueError(f"{folder}: {task} segmentation needs instances/ and classes with isthing true. "
                         "Add them, or choose semantic segmentation")
    return pairs


def open_data(args):
    """The real pairs, and all that is evaluated on -> PairFolder, {split: PairFolder}."""
    train = find_split(args.data, "train")
    real = open_pairs(train, args.task, limit=args.limit_real)
    names = args.splits or [name for name in ("val", "unseen", "test") if (train.parent / name).is_dir()]
    folders = {name: find_split(args.data, name) for name in names}
    folders |= {path: path for path in args.eval_pairs}
    if not folders:
        raise ValueError(f"{train.parent}: no val/, unseen/ or test/ to evaluate on. Name others by --splits")
    return real, {name: open_pairs(path, args.task, real.classes) for name, path in folders.items()}


def settings(args, real, synth):
    """What decides the last weights of a run, as JSON values: the recipe, the flags over it, the data."""
    recipe = RECIPES[args.recipe]
    cfg = recipe | {key: value for key, value in vars(args).items() if key in recipe and value is not None}
    del cfg["eval_every"], cfg["workers"]                             # do not change these weights
    del cfg["step_images"]                                            # the recipe's: see micro_batch
    cfg["batch"] = args.batch
    if cfg["size"] is None:                                           # up to the network's stride
        stride = 16 if cfg["preset"] == "tiny" else 32
        cfg["size"] = [math.ceil(side / stride) * stride for side in median_size(real)]
    for key in ("recipe", "task", "accumulate", "p_synth", "pretrain", "seed", "world"):
        cfg[key] = getattr(args, key)
    if args.queries:
        cfg["queries"] = args.queries
    first = args.init or args.backbone
    cfg["init"] = f"{first} {segmenter_hash(first)}" if first else None
    cfg["real"] = real.fingerprint()
    cfg["synth"] = [pairs.fingerprint() for pairs in synth]
    return cfg


def segmenter_hash(path):
    """Which weights a segmenter's checkpoint holds: the hashes of its files."""
    return " ".join(weights_hash(file) for file in weight_files(path))


def micro_batch(cfg):
    """Images of a micro-batch and rank: --batch, else the recipe's images of a step, shared by all."""
    shared = RECIPES[cfg["recipe"]]["step_images"] // (cfg["world"] * cfg["accumulate"])
    return cfg["batch"] or max(1, shared)


def training_batches(cfg, real, synth=(), rank=0, class_ids=None):
    """The batches of a run with these settings."""
    keys = "recipe", "size", "task", "steps", "accumulate", "p_synth", "pretrain", "seed", "world"
    return Batches(real, synth, batch=micro_batch(cfg), rank=rank, class_ids=class_ids,
                   **{key: cfg[key] for key in keys})


def train_segmenter(args, cfg, real, synth, out, measure=None, eval_every=0):
    """Build the segmenter of these settings and train it in the folder `out`."""
    model = build(real.classes, cfg["task"], cfg["preset"], cfg["seed"], args.init, args.new_head,
                  args.backbone, args.queries)
    batches = training_batches(cfg, real, synth, args.rank, list_class_ids(model, real.classes))
    if args.rank == 0:
        print(describe_run(args, cfg, model, real, synth, out), flush=True)
    return train(model.to(args.device), batches, out, cfg, args.device, args.compile, args.workers, measure,
                 eval_every)


def describe_run(args, cfg, model, real, synth, out):
    """What is trained, on what, how: the lines before a training."""
    pairs = ", ".join(f"{len(one)} pairs of {one.folder}" for one in (real, *synth))
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    images = micro_batch(cfg) * cfg["accumulate"] * cfg["world"]
    (h, w), (H, W) = cfg["size"], median_size(real)
    return "\n".join([
        f"{out}: {pairs}",
        f"{args.device}, {precision(args.device)}, {model.config['backbone']} of {millions:.1f} M "
        f"parameters, {cfg['steps']} steps of {images} images",
        f"crops of {w} x {h}, {CROPS[cfg['recipe']]}; pictures are about {W} x {H}",
        *describe_leaks(real, synth)])


def describe_leaks(real, synth):
    """A line for each synthetic folder whose generators were trained on more pairs than this training gets:
    through it the training learns from the others too."""
    lines = []
    for pairs in synth:
        path = pairs.folder / "meta.json"
        meta = read_json(path) if path.is_file() else {}
        seen = max(meta.get(f"{stage}_pairs") or 0 for stage in ("text2mask", "mask2img"))
        if seen > len(real):
            lines.append(f"{pairs.folder}: its generators were trained on {seen} pairs, but this training "
                         f"gets {len(real)} of {real.folder}: the other {seen - len(real)} leak in")
    return lines


def evaluate_splits(args, model, splits, predictions=None, multi_scale=False):
    """-> {split: metrics}; predictions: the folder that gets a pair folder for each split."""
    scores = {}
    for split, pairs in splits.items():
        folder = predictions / pairs.folder.name if predictions else None
        scores[split] = evaluate(model, pairs, args.task, args.sides, args.rank, args.world,
                                 multi_scale, folder)
    return scores


def run_training(args, real, splits):
    """What the script does without --eval-only -> {split: metrics}."""
    synth = [open_pairs(folder, args.task, real.classes) for folder in synthetic_folders(args)]
    if args.pretrain and not synth:
        raise ValueError("--pretrain begins with synthetic pairs, but there are none. Name them by --synth")
    for pairs in (real, *synth, *splits.values()):
        pairs.keep()                     # small sets are decoded now: a broken file shows before training
    if args.rank == 0:
        print(describe_classes(count_classes(real), real.classes), flush=True)

    split, score, scores = judged_split(splits), SCORE[args.task], {}

    def measure(model):
        scores.update(evaluate_splits(args, model, {split: splits[split]}))
        return {f"{splits[split].folder.name}_{score}": scores[split][score]}
    eval_every = RECIPES[args.recipe]["eval_every"] if args.eval_every is None else args.eval_every
    cfg = settings(args, real, synth)
    model = train_segmenter(args, cfg, real, synth, args.out, measure, eval_every)

    # Only the splits are left that the training has not measured with its last weights.
    others = {name: pairs for name, pairs in splits.items() if name not in scores}
    scores |= evaluate_splits(args, model, others)
    if args.rank == 0:
        write_json(args.out / "metrics.json", scores)
        rows, captions = examples(model, splits, args.task, args.sides)
        write_picture(args.out / "samples.png", contact_sheet(rows, captions, real.classes))
    return scores


def judged_split(splits):
    """The split on which the best weights are chosen: val, else the first."""
    return "val" if "val" in splits else next(iter(splits))


def run_evaluation(args, real, splits):
    """What the script does with --eval-only -> {split: metrics}."""
    path = weights_to_evaluate(args)
    if args.predictions:
        check_predictions(args.predictions, splits)
    if args.world > 1:
        dist.barrier()                                                # every rank looks before one writes
    if args.rank == 0:
        print(f"weights: {path}", flush=True)
    model = build(real.classes, args.task, init=path).to(args.device)
    return evaluate_splits(args, model, splits, args.predictions, args.multi_scale)


def weights_to_evaluate(args):
    """The checkpoint of --init, else of --out, else the demo's."""
    if args.init:
        return args.init
    trained = args.out / "model.safetensors"
    demo = ROOT / "weights" / dataset_name(args.data) / "mask2former"
    for path in (trained, demo):
        if path.exists():
            return path
    raise ValueError(f"{trained}: no such file. Train a segmenter, or give one by --init")


def check_predictions(folder, splits):
    """Raises ValueError where the pair folders of predictions would mix with each other or older ones."""
    names = [pairs.folder.name for pairs in splits.values()]
    for name in names:
        if (folder / name).exists() or names.count(name) > 1:
            raise ValueError(f"{folder / name}: exists, or two sets would go there. Choose another folder, "
                             "or evaluate one set at a time")


def filtered_copy(args, folder, real, judge_hash):
    """A folder of --filter -> its PairFolder, the path of its filtered copy and the copy's meta.json.

    Raises ValueError where the folder is not of a synthesis, or the copy is there with other settings, data
    or weights.
    """
    pairs = open_pairs(folder, "semantic", real.classes)
    if pairs.filtered or not (folder / "meta.json").is_file():
        raise ValueError(f"{folder}: no folder of a synthesis, or filtered already. Give one that masksyn.py "
                         "or imgsyn.py made")
    meta = read_json(folder / "meta.json")
    meta["filter"] = dict(judge=judge_hash, tolerance=TOLERANCE, sides=list(args.sides or ()),
                          real=real.fingerprint(), pairs=pairs.fingerprint())
    out = Path(f"{folder}_filtered")
    check_output(out, meta)
    return pairs, out, meta


def run_filter(args):
    """What the script does with --filter: a filtered copy of each folder, unless it is complete."""
    if args.world > 1:
        raise ValueError("--filter runs in one process. Start it without torchrun")
    real = open_pairs(find_split(args.data, "train"), "semantic", limit=args.limit_real)
    model = build(real.classes, init=args.judge).to(args.device).eval()
    judge_hash = segmenter_hash(args.judge)
    limits = None
    for pairs, out, meta in [filtered_copy(args, folder, real, judge_hash) for folder in args.filter]:
        if (out / "meta.json").exists() and not unfinished(out).exists():
            print(f"{out}: is complete")
            continue
        if limits is None:
            limits = TOLERANCE * class_losses(model, real, args.sides)
        counts = filter_pairs(model, pairs, limits, out, meta, args.sides)
        print(f"{out}: {describe_filtered(counts, real.classes)}")


def print_results(args, scores):
    """The metrics of each split, those of the classes of one, where the files are and what to run next."""
    score, judge = SCORE[args.task], judged_split(scores)
    for split, result in scores.items():
        print(format_metrics(split, result))
        if split in args.eval_pairs and scores[judge][score] and result[score] is not None:
            share = result[score] / scores[judge][score]
            print(f"           {score} is {share:.3f} of {judge}'s")
    print(f"{score.removeprefix('m')} of the classes on {judge}:")
    print(format_classes(scores[judge]["per_class"]))
    if not args.eval_only:
        print(f"{args.out}: metrics.json, samples.png, log.png and the weights. Next: python mask2former.py "
              f"IMAGE ... --weights {args.out / 'model.safetensors'}")


def main(argv=None):
    args = parse(flags(), argv)
    if args.filter:
        return run_filter(args)
    args.out = args.out or Path("out") / dataset_name(args.data) / "mask2former"
    real, splits = open_data(args)
    scores = run_evaluation(args, real, splits) if args.eval_only else run_training(args, real, splits)
    if args.rank == 0:
        print_results(args, scores)


if __name__ == "__main__":
    run(main)
