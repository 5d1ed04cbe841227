"""Trains a segmenter on real and synthetic pairs together, and measures it: SegGen's third step.

Each real sample of a batch is replaced by a synthetic one with probability 0.6: the paper's ADE20K recipe. Or
training sees synthetic samples in its first half and real ones in its second: its COCO recipe, --pretrain.
The number of steps is the same with and without synthetic data, so a gain is not more training.

Paper:   SegGen (2311.03355); Mask2Former (2112.01527) for the recipes; Kirillov et al. (1801.00868) for PQ.
Differs: the paper does not say how MaskSyn and ImgSyn samples share the probability: here a synthetic folder
         is chosen uniformly, then a pair in it. The `tiny` recipe (from scratch, minutes on a CPU) is
         ours. ADE20K's brightness is scaled by up to an eighth (the original adds up to 32 of 255).
Reads:   pair folders data/NAME/{train,val,...} and out/NAME/{masksyn,imgsyn}.
Writes:  out/NAME/mask2former/{model.safetensors, state.pt, log.jsonl, metrics.json, samples.png}.
Needs:   mask2former.py, diffusion.py (device, seeds, the run folder), data/pairs.py.

    python train.py                                             # makes what is missing, trains, evaluates
    python train.py --eval-only --eval-pairs out/shapes/imgsyn  # how well synthetic images show their masks

Dimension key: B batch, H W pixels, K classes.
"""
import argparse
import contextlib
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
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from tqdm import tqdm

from data.pairs import (CROWD, ROOT, PairFolder, check_classes, contact_sheet, dataset_name, find_split,
                        number, outline, palette, picture_size, run, spread, write_json, write_mask,
                        write_picture)
from diffusion import RunFolder, accumulate_gradients, load_strict, seed_of, setup, weights_hash
from mask2former import (PRESETS, TASKS, Mask2Former, average_count, final_predictions, load, postprocess,
                         predict, save, targets)

# What a recipe decides. A flag of the same name overrides it.
#   batch  images of a step, over all ranks and micro-batches
#   size   (H, W) of the training crops; None: of the first real image
#   sides  of evaluated images in the network: the shorter one's length, the longer one's limit; None: as is
RECIPES = {
    "tiny": dict(
        preset="tiny", steps=1000, batch=8, lr=2e-3, clip=1.0, schedule="cosine", warmup=30,
        size=None, sides=None, save_every=100),
    "ade20k": dict(
        preset="resnet50", steps=160_000, batch=16, lr=1e-4, clip=0.01, schedule="poly", warmup=0,
        size=(512, 512), sides=(512, 2048), save_every=2000),
    "coco": dict(
        preset="resnet50", steps=368_750, batch=16, lr=1e-4, clip=0.01, schedule="steps", warmup=0,
        size=(1024, 1024), sides=(800, 1333), save_every=2000),
}
SCORE = {"semantic": "mIoU", "panoptic": "PQ", "instance": "AP"}      # the number that a task is judged by
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)                            # of the paper's multi-scale numbers
PAIRS = 500                                                           # of each kind are made for the shapes


# ---- batches -----------------------------------------------------------------------------------------------

def augmentation(recipe, height, width):
    """A recipe's random transform of an image and its maps to height x width.

    Maps are resized by nearest. What lies beyond the picture is grey and void.
    """
    fill = {tv_tensors.Image: 128, tv_tensors.Mask: 0}
    crop = v2.RandomCrop((height, width), pad_if_needed=True, fill=fill)
    flip = v2.RandomHorizontalFlip()
    if recipe == "coco":
        jitter = v2.ScaleJitter((width, height), (0.1, 2.0))          # torchvision takes it as (W, H)
        return v2.Compose([flip, jitter, crop])
    if recipe == "ade20k":
        scale = v2.RandomShortestSize([int(height * 0.1 * n) for n in range(5, 21)], 4 * height)
        spans = dict(brightness=(0.875, 1.125), contrast=(0.5, 1.5), saturation=(0.5, 1.5), hue=0.1)
        jitters = [v2.ColorJitter(**{kind: span}) for kind, span in spans.items()]
        return v2.Compose([flip, scale, crop, *(v2.RandomApply([jitter]) for jitter in jitters)])
    ratio = width / height
    zoom = v2.RandomResizedCrop((height, width), (0.5, 1.0), (0.8 * ratio, 1.25 * ratio))
    return v2.Compose([flip, zoom, v2.ColorJitter(0.3, 0.3, 0.3)])


@functools.lru_cache(2)
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
    p_synth       the probability that a synthetic sample replaces a real one
    pretrain      instead: only synthetic samples in the first half of the steps, only real ones after it
    rank, world   which of how many processes this is: together they pass over the real samples

    A micro-batch is a function of (seed, n, rank).
    """

    def __init__(self, real, synth=(), *, recipe="tiny", size=(64, 64), task="semantic", batch=8, steps=1000,
                 accumulate=1, p_synth=0.6, pretrain=False, seed=0, rank=0, world=1):
        self.real, self.synth = real, synth
        self.augment = augmentation(recipe, *size)
        self.void_counts = recipe != "tiny"                           # as background, as in the original
        self.task, self.isthing = task, [c["isthing"] for c in real.classes]
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
        if not self.void_counts:
            target["valid"] = ids > 0
        return image.as_subclass(torch.Tensor), target

    def choose(self, n, i):
        """Where sample i of micro-batch n comes from -> PairFolder, index."""
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
    if schedule == "steps":                                           # where the original drops its rate
        drops = [n for n in (327_778, 355_092) if step * 368_750 >= n * steps]
        return rising * 0.1 ** len(drops)
    return rising * 0.5 * (1 + math.cos(math.pi * step / steps))


def step_gradients(net, criterion, micro_batches, device):
    """Leave the gradients of a step in the parameters -> its loss.

    net        the model, or what torch.compile and DistributedDataParallel made of it
    criterion  the plain model's `loss`

    A mask loss is a mean over the masks of the step, so all micro-batches are divided by the same number.
    """
    masks = sum(len(target["labels"]) for _, truth in micro_batches for target in truth)
    num_masks = average_count(masks, device) / len(micro_batches)

    def loss(net, batch):
        images, truth = batch
        outputs = net(images.float() / 255)
        return criterion(outputs, truth, num_masks=num_masks)[0]
    return accumulate_gradients(net, loss, micro_batches, device)


def train(model, batches, out, cfg, device, compile=False, workers=0):
    """Train a Mask2Former -> the model in eval mode; `out` gets model.safetensors, state.pt and log.jsonl.

    batches  a Batches, or anything with its indexing, `rank` and `world`
    cfg      the run's settings, JSON values. Read here: steps, accumulate, lr, schedule, warmup, clip, seed,
             save_every. A state of other settings is refused.

    Called again it goes on from state.pt and ends with the same weights as an undisturbed run: bit for bit on
    the CPU of one machine; some CUDA kernels add in no fixed order. Raises ValueError where `out` holds
    another run or the loss is not finite; the last good state stays.
    """
    rank, steps, accumulate = batches.rank, cfg["steps"], cfg["accumulate"]
    optimiser = make_optimiser(model.train(), cfg["lr"])
    folder = RunFolder(out, cfg, rank, model=model, optimiser=optimiser)
    first = folder.resume()

    # Train the compiled and distributed net; save the plain model, whose key names are clean.
    net = torch.compile(model) if compile else model
    if batches.world > 1:
        net = DistributedDataParallel(net, [device.index] if device.type == "cuda" else None)

    # What makes a resume exact: micro-batch n is a function of (seed, n, rank), and the loader starts with
    # the first one that the saved steps have not used.
    remaining = range(first * accumulate, steps * accumulate)
    stream = iter(DataLoader(batches, batch_size=None, sampler=remaining, num_workers=workers,
                             pin_memory=device.type == "cuda"))
    losses, clock = [], time.time()
    bar = tqdm(range(first, steps), "train", initial=first, total=steps, disable=rank > 0, mininterval=1)
    for step in bar:
        # The loss compares masks at random points, which depend on (seed, step, rank) alone.
        micro_batches = [next(stream) for _ in range(accumulate)]
        torch.manual_seed(seed_of(cfg["seed"], step, rank, "points"))
        loss = step_gradients(net, model.loss, micro_batches, device)

        # Take the step; all ranks have the same gradients, hence the same norm.
        norm = nn.utils.clip_grad_norm_(model.parameters(), cfg["clip"])
        losses.append(loss + 0 * norm)                                # NaN where a gradient is not finite
        share = rate(cfg["schedule"], step, steps, cfg["warmup"])
        for group in optimiser.param_groups:
            group["lr"] = cfg["lr"] * group["scale"] * share
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

        # Report, and save after the check: what state.pt holds is finite.
        done = step + 1
        saving = done % cfg["save_every"] == 0 or done == steps
        if saving or done % 50 == 0:
            folder.check_finite(losses, done)
            folder.report(bar, step=done, loss=torch.stack(losses).mean().item(),
                          seconds_per_step=(time.time() - clock) / len(losses))
            if saving and rank == 0:
                save(model, folder.out / "model.safetensors")
            if saving:
                folder.save(done)
            losses, clock = [], time.time()
    return model.eval()


# ---- metrics -----------------------------------------------------------------------------------------------
# Each has add(prediction, truth) for an image, merge() with the same metric of another rank, and result() in
# percent. prediction = (ids, instances, segments), what `postprocess` returns for the metric's task, the maps
# as arrays; truth = (ids, instances). ids (H, W): class 1..K, 0 void. instances (H, W): 0 none.

def percent(values):
    """The mean of an array in percent; None where it is empty."""
    return 100 * float(np.mean(values)) if len(values) else None


class MeanIoU:
    """mIoU: the mean over classes of IoU, the pixels that truth and prediction share / those that either has.

    One confusion matrix counts the pixels of all images. Pixels of void truth are ignored. Classes that the
    truth never shows are left out of the mean and counted as "absent".
    """
    task = "semantic"

    def __init__(self, classes):
        size = len(classes) + 1
        self.matrix = np.zeros((size, size), np.int64)                # [truth, prediction], 0 void

    def add(self, prediction, truth):
        size = len(self.matrix)
        cell = truth[0].astype(np.int64) * size + prediction[0]       # (H, W)
        counts = np.bincount(cell.ravel(), minlength=size ** 2)
        self.matrix += counts.reshape(size, size)

    def merge(self, other):
        self.matrix += other.matrix

    def result(self):
        hits = self.matrix.diagonal()[1:]                             # (K,)
        truth = self.matrix[1:].sum(1)
        predicted = self.matrix[1:, 1:].sum(0)
        seen = truth > 0
        iou = hits[seen] / (truth + predicted - hits)[seen]
        accuracy = hits[seen] / truth[seen]
        total = max(truth.sum(), 1)
        return {"mIoU": percent(iou), "fwIoU": 100 * float(truth[seen] @ iou / total),
                "mACC": percent(accuracy), "pACC": 100 * float(hits.sum() / total),
                "absent": int((~seen).sum())}


class PanopticQuality:
    """PQ: the mean over classes of the IoUs of matched segments, summed / (hits + false / 2 + missed / 2).

    A true and a found segment of one class match if their IoU is over 0.5, so each has one partner at most.
    PQ = SQ x RQ: SQ is the mean IoU of the matched, RQ the F1 score of the matching. Pixels of void truth
    leave the IoU. A found segment is not false if over half of it lies on void or on a crowd of its class. A
    crowd (instance 255) is neither matched nor missed.
    """
    task = "panoptic"

    def __init__(self, classes):
        self.isthing = np.array([False] + [c["isthing"] for c in classes])      # by class id
        self.counts = np.zeros((4, len(classes) + 1))       # by class: summed IoU, hits, false, missed

    def overlaps(self, prediction, truth):
        """{(true segment, found segment): pixels that both have}; a segment is (class, instance)."""
        maps = []
        for ids, instances in (truth, prediction[:2]):
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
        matched = {("true", void), ("found", void)}
        for (true, found), pixels in overlaps.items():
            union = true_area[true] + found_area[found] - pixels - overlaps.get((void, found), 0)
            k, number = true
            if k == found[0] > 0 and number != CROWD and pixels / union > 0.5:
                iou[k] += pixels / union
                hits[k] += 1
                matched |= {("true", true), ("found", found)}
        for k, number in true_area:
            missed[k] += ("true", (k, number)) not in matched and number != CROWD
        for found, area in found_area.items():
            false[found[0]] += ("found", found) not in matched and ignored[found] <= 0.5 * area

    def merge(self, other):
        self.counts += other.counts

    def result(self):
        iou, hits, false, missed = self.counts
        seen = hits + false + missed > 0
        sq = iou / np.maximum(hits, 1)
        rq = hits / np.maximum(hits + 0.5 * false + 0.5 * missed, 0.5)
        result = {}
        for kind, chosen in (("", seen), ("_things", seen & self.isthing), ("_stuff", seen & ~self.isthing)):
            result["PQ" + kind] = percent((sq * rq)[chosen])
            result["SQ" + kind] = percent(sq[chosen])
            result["RQ" + kind] = percent(rq[chosen])
        return result


class AveragePrecision:
    """AP: the area under the precision-recall curve of scored instances, by pycocotools' COCOeval.

    It is the mean over classes and over ten thresholds: an instance is found if its IoU is over 0.50, 0.55,
    ... 0.95. Once for masks, once ("_box") for the boxes around them.
    """
    task = "instance"

    def __init__(self, classes):
        self.things = [k for k, c in enumerate(classes, 1) if c["isthing"]]
        self.images = []                         # {"size", "true" and "found" annotations} of each

    def add(self, prediction, truth):
        ids, instances = truth
        codes = ids.astype(np.int64) * 256 + instances
        true = []
        for code in np.unique(codes).tolist():
            k, n = divmod(code, 256)
            if k in self.things:
                true.append(annotation(codes == code, k, iscrowd=int(n == CROWD)))
        found = [annotation(s["mask"], s["class"], score=s["score"]) for s in prediction[2]]
        self.images.append({"size": ids.shape, "true": true, "found": found})

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
        return result


def run_lengths(mask):
    """(H, W) bool, array or tensor -> COCO's run-length code."""
    return coco_mask.encode(np.asfortranarray(torch.as_tensor(mask).cpu(), np.uint8))


def annotation(mask, k, **values):
    """An instance of class k as COCO describes it, with its box (x, y, width, height) and its area."""
    code = run_lengths(mask)
    box, area = coco_mask.toBbox(code).tolist(), float(coco_mask.area(code))
    return dict(segmentation=code, category_id=k, bbox=box, area=area, **values)


METERS = {
    "semantic": [MeanIoU],
    "panoptic": [PanopticQuality, AveragePrecision, MeanIoU],
    "instance": [AveragePrecision],
}


# ---- evaluation --------------------------------------------------------------------------------------------

def read_batches(pairs, indices, most):
    """Yield lists of up to `most` (index, pair): neighbours whose images have one size."""
    items = ((i, pairs.read(i)) for i in indices)
    for _, run in itertools.groupby(items, lambda item: item[1]["ids"].shape):
        while batch := list(itertools.islice(run, most)):
            yield batch


def resize(images, short, longest):
    """images (B, 3, H, W), the shorter side at `short`, or less where the longer one would pass `longest`."""
    H, W = images.shape[2:]
    scale = min(short / min(H, W), longest / max(H, W))
    size = [max(1, round(side * scale)) for side in (H, W)]
    return v2.functional.resize(images, size, antialias=True)


@torch.no_grad()
def segment(model, images, tasks, sides=None, multi_scale=False):
    """Yield {task: (ids, instances, segments)} of each of images (B, 3, H, W) uint8, at their own size.

    sides        (short, longest) inside the network, see `resize`; None: as they are
    multi_scale  average six sizes and their mirror images; for semantic segmentation only
    """
    size, isthing = images.shape[2:], model.config["isthing"]
    x = images.to(next(model.parameters()).device) / 255
    if multi_scale:
        short = sides[0] if sides else None
        for image in x:
            yield {task: to_arrays(*predict(model, image, task, short, SCALES, flip=True)) for task in tasks}
        return
    for prediction in final_predictions(model, resize(x, *sides) if sides else x):
        yield {task: to_arrays(*postprocess(prediction, size, task, isthing)) for task in tasks}


def to_arrays(ids, instances, segments):
    return ids.cpu().numpy(), instances.cpu().numpy(), segments


def evaluate(model, pairs, task="semantic", sides=None, rank=0, world=1, multi_scale=False, folder=None):
    """The metrics of a segmenter on a PairFolder -> {name: percent}.

    task                semantic: mIoU; panoptic: PQ, AP and mIoU; instance: AP
    sides, multi_scale  as in `segment`
    rank, world         ranks share the images, and each returns the metrics of all
    folder              where the predictions are written as a pair folder, if anywhere
    """
    meters = [Meter(pairs.classes) for Meter in METERS[task]]
    tasks = [meter.task for meter in meters]
    indices = range(rank, len(pairs), world)
    bar = tqdm(total=len(indices), desc=f"evaluate {pairs.folder.name}", disable=rank > 0, leave=False)
    if folder and rank == 0:
        write_json(folder / "classes.json", pairs.classes)
    model.eval()
    for batch in read_batches(pairs, indices, 1 if sides else 16):
        images = torch.stack([to_tensor(pair["image"]) for _, pair in batch])
        results = segment(model, images, tasks, sides, multi_scale)
        for (i, pair), result in zip(batch, results):
            for meter in meters:
                meter.add(result[meter.task], (pair["ids"], pair["instances"]))
            if folder:
                write_prediction(folder, pairs.names[i], result, task, pairs.classes)
            bar.update()
    if world > 1:
        meters = merge_ranks(meters, world)
    return {"images": len(pairs)} | {k: v for meter in meters for k, v in meter.result().items()}


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
    write_picture(folder / "instances" / f"{name}.png", instances.astype(np.uint8))
    entries = []
    for found in result["instance"][2]:
        code = run_lengths(found["mask"])
        code["counts"] = code["counts"].decode()
        category = classes[found["class"] - 1].get("source_id", found["class"])
        entries.append(dict(image_id=int(name) if name.isdigit() else name, category_id=category,
                            score=found["score"], segmentation=code))
    write_json(folder / "results" / f"{name}.json", entries)


def format_metrics(split, result):
    """What `evaluate` returned as one line of text."""
    values = [f"{name} {value:.1f}" if isinstance(value, float) else f"{name} {value}"
              for name, value in result.items()]
    return f"{split:10} {'  '.join(values)}"


# ---- pictures ----------------------------------------------------------------------------------------------

def examples(model, splits, task, sides=None):
    """What a segmenter finds in a few pairs of each split -> rows of a contact sheet, and its captions."""
    rows, captions = {"image": [], "truth": [], "prediction": []}, []
    for split, pairs in splits.items():
        K = len(pairs.classes)
        for i in spread(len(pairs), 4):
            pair = pairs.read(i)
            (result,) = segment(model, to_tensor(pair["image"])[None], [task], sides)
            rows["image"].append(pair["image"])
            for row, (ids, instances) in (("truth", (pair["ids"], pair["instances"])),
                                          ("prediction", result[task][:2])):
                codes = ids if task == "semantic" else outline(ids, instances, K)
                rows[row].append(palette(K)[codes])
            captions.append(f"{Path(split).name} {pairs.names[i]}")
    return rows, captions


# ---- the model ---------------------------------------------------------------------------------------------

def build(classes, task="semantic", preset="tiny", seed=0, init=None, new_head=False):
    """A segmenter for these classes, new or from a checkpoint.

    preset    of a new one: a name in mask2former.PRESETS. All but "tiny" get ImageNet weights
    init      a checkpoint of ours or a folder in transformers' format. Its classes must be these; spelling
              may differ, and for instance segmentation it may know the things alone
    new_head  they may be others: the classifier of `init` is replaced by a new one

    Raises ValueError where the classes differ.
    """
    names, isthing = [c["name"] for c in classes], [c["isthing"] for c in classes]
    labels = dict(num_classes=len(names), class_names=names, isthing=isthing, task=task)
    torch.manual_seed(seed_of(seed, "weights"))
    if not init:
        weights = None if preset == "tiny" else "IMAGENET1K_V1"
        return Mask2Former(**labels, **PRESETS[preset], weights=weights)

    old = load(init, task)
    model = Mask2Former(**old.config | labels)
    state = old.state_dict()
    if new_head:
        state |= {k: v for k, v in model.state_dict().items() if k.startswith("decoder.classes.")}
    else:
        state = fit_classes(state, old.config["class_names"] or names, classes, task, init)
    load_strict(model, state, init)
    return model


def fit_classes(state, known, classes, task, path):
    """The state dict of a segmenter of the classes named `known` -> one for `classes`. Raises ValueError."""
    known = [dict(name=spelling(name)) for name in known]
    expected = [dict(name=spelling(c["name"])) for c in classes]
    things = [k for k, c in enumerate(classes) if c["isthing"]]
    if task == "instance" and known == [expected[k] for k in things] != expected:
        return with_stuff(state, things, len(classes))
    check_classes(known, expected, path)
    return state


def spelling(name):
    """A class name without that in which releases differ: "Traffic-Light, stoplight" -> "traffic light"."""
    first = name.split(",")[0].split(";")[0].casefold()
    return " ".join(first.replace("-", " ").replace("_", " ").split())


def with_stuff(state, things, K):
    """A classifier of some classes, the things -> one of all K, where stuff never wins. things: indices."""
    wide = {}
    for key in ("decoder.classes.weight", "decoder.classes.bias"):
        never = -1e4 if key.endswith("bias") else 0.0
        wide[key] = state[key].new_full((K + 1, *state[key].shape[1:]), never)
        wide[key][[*things, K]] = state[key]                          # the last row: no object
    return state | wide


# ---- the script --------------------------------------------------------------------------------------------

def training_flags(description):
    """A parser with the flags of a training, which bench/compare.py shares."""
    defaults = [f"{name}: preset {r['preset']}, steps {r['steps']}, batch {r['batch']}, lr {r['lr']}, size "
                f"{r['size'] or 'of the first image'}" for name, r in RECIPES.items()]
    parser = argparse.ArgumentParser(description=description, epilog=f"Recipes: {'; '.join(defaults)}.")
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
    add("--workers", type=number(int, 0), default=0, help="processes that load data (%(default)s)")
    add("--splits", nargs="+", help="splits to evaluate on; without it val, unseen and test if they exist")
    add("--eval-pairs", nargs="+", default=[], metavar="DIR", help="pair folders to evaluate on as well")
    return parser


def flags():
    parser = training_flags(__doc__.split("\n")[0])
    parser.add_argument("--seed", type=number(int, 0), default=0, help="another seed, another run")
    add = parser.add_argument_group("evaluation without training").add_argument
    add("--eval-only", action="store_true", help="evaluate --init, or what --out holds, or demo weights")
    add("--predictions", type=Path, metavar="DIR", help="write the predictions as pair folders")
    add("--multi-scale", action="store_true", help="average six sizes, mirrored too; for semantic")
    return parser


# (flag, other, together): the flag does something only together with the other one, or only without it
RULES = [("predictions", "eval_only", True), ("multi_scale", "eval_only", True), ("new_head", "init", True),
         ("preset", "init", False), ("p_synth", "pretrain", False)]
RULES += [(flag, "eval_only", False) for flag in (
    "synth", "new_head", "preset", "steps", "batch", "accumulate", "lr", "p_synth", "pretrain", "limit_real",
    "compile", "workers", "seed")]


def parse(parser, argv):
    """The flags, and what follows from them: device, rank, world, and the sides of evaluated images.

    Raises ValueError where a flag would do nothing beside the others.
    """
    args = parser.parse_args(argv)
    given = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    for flag, other, together in RULES:
        if flag in given and (other in given) != together:
            words = ("without", "both") if together else ("with", "one")
            text = f"--{flag} has no effect {words[0]} --{other}. Give {words[1]} of them"
            raise ValueError(text.replace("_", "-"))
    args.device, args.rank, args.world = setup(args.device)
    args.sides = RECIPES[args.recipe]["sides"]
    if args.size and args.recipe != "coco":           # ADE20K: 512, 2048 for semantic; 640, 2560 for panoptic
        args.sides = min(args.size), 4 * min(args.size)
    return args


def synthetic_folders(args):
    """The synthetic folders to train on. Rank 0 makes what the built-in data lacks; the other ranks wait."""
    if args.synth is not None or args.data != "shapes":
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
    """All that decides the result of a run, as JSON values: the recipe, the flags over it, the data."""
    recipe = RECIPES[args.recipe]
    cfg = recipe | {key: value for key, value in vars(args).items() if key in recipe and value is not None}
    if args.batch is None:
        cfg["batch"] = max(1, recipe["batch"] // (args.world * args.accumulate))
    if cfg["size"] is None:                                           # up to the network's stride
        stride = 16 if cfg["preset"] == "tiny" else 32
        cfg["size"] = [-(-side // stride) * stride for side in real.read(0)["ids"].shape]
    for key in ("recipe", "task", "accumulate", "p_synth", "pretrain", "seed", "world"):
        cfg[key] = getattr(args, key)
    cfg["init"] = f"{args.init} {weights_hash(args.init)}" if args.init else None
    cfg["real"] = real.fingerprint()
    cfg["synth"] = [pairs.fingerprint() for pairs in synth]
    return cfg


def training_batches(cfg, real, synth=(), rank=0):
    """The batches of a run with these settings."""
    keys = "recipe", "size", "task", "batch", "steps", "accumulate", "p_synth", "pretrain", "seed", "world"
    return Batches(real, synth, rank=rank, **{key: cfg[key] for key in keys})


def train_segmenter(args, cfg, real, synth, out):
    """Build the segmenter of these settings and train it in the folder `out`."""
    model = build(real.classes, cfg["task"], cfg["preset"], cfg["seed"], args.init, args.new_head)
    batches = training_batches(cfg, real, synth, args.rank)
    return train(model.to(args.device), batches, out, cfg, args.device, args.compile, args.workers)


def evaluate_splits(args, model, splits, predictions=None, multi_scale=False):
    """-> {split: metrics}; predictions: the folder that gets a pair folder for each split."""
    scores = {}
    for split, pairs in splits.items():
        folder = predictions / pairs.folder.name if predictions else None
        scores[split] = evaluate(model, pairs, args.task, args.sides, args.rank, args.world,
                                 multi_scale, folder)
    return scores


def training(args, real, splits):
    """What the script does without --eval-only -> {split: metrics}."""
    synth = [open_pairs(folder, args.task, real.classes) for folder in synthetic_folders(args)]
    if args.pretrain and not synth:
        raise ValueError("--pretrain begins with synthetic pairs, but there are none. Name them by --synth")
    for pairs in (real, *synth, *splits.values()):
        pairs.keep()                     # small sets are decoded now: a broken file shows before training
    if args.rank == 0:
        data = ", ".join(f"{len(pairs)} pairs of {pairs.folder}" for pairs in (real, *synth))
        print(f"{args.out}: {data}", flush=True)

    model = train_segmenter(args, settings(args, real, synth), real, synth, args.out)
    scores = evaluate_splits(args, model, splits)
    if args.rank == 0:
        write_json(args.out / "metrics.json", scores)
        rows, captions = examples(model, splits, args.task, args.sides)
        write_picture(args.out / "samples.png", contact_sheet(rows, captions, real.classes))
    return scores


def evaluation(args, real, splits):
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


def main(argv=None):
    args = parse(flags(), argv)
    args.out = args.out or Path("out") / dataset_name(args.data) / "mask2former"
    real, splits = open_data(args)
    scores = evaluation(args, real, splits) if args.eval_only else training(args, real, splits)
    score, first = SCORE[args.task], next(iter(scores))
    for split, result in scores.items() if args.rank == 0 else ():
        print(format_metrics(split, result))
        if split in args.eval_pairs and scores[first][score]:
            share = result[score] / scores[first][score]
            print(f"           {score} is {share:.3f} of {first}'s")


if __name__ == "__main__":
    run(main)
