"""MaskSyn: captions -> new masks -> new images: training pairs whose layout no human has drawn.

Text2Mask paints masks of a training caption, and Mask2Img paints an image on each. The mask is the label, so
what a segmenter can learn is not capped by another segmenter.

Paper:   SegGen (2311.03355) section 3, MaskSyn. ADE20K: 10 new pairs a training image; masks in 200 steps of
         EDM's sampler, images in 40 steps [N].
Differs: EDM in 12 steps (masks), DPM-Solver++(2M) in 15 (images); masks are cleaned of specks; instances are
         connected regions.
Reads:   captions/ of --data's train split; a trained Text2Mask and Mask2Img.
Writes:  OUT pair folder (classes.json, images, masks, instances, captions), meta.json, samples.png.
Needs:   unet.py, diffusion.py, text2mask.py, mask2img.py, data/pairs.py.

    python masksyn.py                                        # 64 pairs from the shipped demo weights
    python masksyn.py --prompt "two red houses by the water at sunset" --count 8
    torchrun --nproc_per_node 2 masksyn.py --limit 1000      # each rank makes its share

Dimension key: B batch, H W pixels, K classes. A job is (source name, k): the k-th pair of a source.
"""
import argparse
import shutil
from pathlib import Path

import numpy as np
import torch.distributed as dist
from tqdm import tqdm

import diffusion
from data.pairs import (ROOT, PairFolder, ShowDefaults, check_classes, contact_sheet, dataset_name,
                        find_split, list_files, number, open_picture, outline, palette, read_captions,
                        read_ids, read_json, remove_temporary, run, spread, write_json, write_pair,
                        write_picture)
from diffusion import SAMPLERS, seed_of
from mask2img import Mask2Img
from text2mask import Text2Mask, segments, words_of


def split_jobs(sources, per_source, batch, rank, world):
    """Source names -> this rank's batches of jobs.

    Batches are cut before they are shared out, and all jobs of one have the same k. So a sample is made in
    the same batch, and comes out the same, for any number of ranks and for a larger per_source.
    """
    parts = [sources[i:i + batch] for i in range(0, len(sources), batch)]
    batches = []
    for k in range(per_source):
        batches += [[(source, k) for source in part] for part in parts]
    return batches[rank::world]


def pair_name(job):
    return f"{job[0]}_{job[1]:02d}"


def exists(out, job):
    """Whether a job's pair is complete: its image is written last."""
    return (out / "images" / f"{pair_name(job)}.png").exists()


def check_output(out, meta):
    """Raises ValueError where `out` holds pairs of other settings, data or weights, or other images."""
    if not any(out.glob("images/*")):
        return
    if not (out / "meta.json").is_file():
        raise ValueError(f"{out}: holds images, but no meta.json of a synthesis. Choose another "
                         "folder")
    if read_json(out / "meta.json") != meta:
        raise ValueError(f"{out}: holds pairs of other settings, data or weights (see meta.json). "
                         "Choose another folder or delete it")


def holds_prompt(out):
    """Whether a folder holds pairs of --prompt, which the next prompt replaces; no others are deleted."""
    return (out / "meta.json").is_file() and "prompt" in read_json(out / "meta.json")


def describe(args, source, **checkpoints):
    """The settings, source data and weights that decide a pair's content, for meta.json."""
    # Left out: flags that change only how many pairs, where they go, or the device.
    passed_over = ("out", "limit", "per_source", "device", "count", "prompt")
    meta = {key: str(value) for key, value in vars(args).items() if key not in passed_over}
    for name, path in checkpoints.items():
        meta[f"{name}_weights"] = diffusion.weights_hash(path)
    return meta | {"source": source}


def synthesize(args, out, sources, make, classes, meta, title=""):
    """Write the pairs of all jobs that `out` lacks: the loop of both modes.

    sources  names; each gets args.per_source pairs
    make     make(jobs) -> for each job the arguments of write_pair: image, ids, instances, captions
    classes  the content of classes.json
    meta     what makes these pairs what they are; raises ValueError where `out` holds others
    title    the caption of all pairs (--prompt); they replace those of an earlier prompt
    """
    _, rank, world = diffusion.setup(args.device)
    replace = bool(title) and holds_prompt(out)
    if not replace:
        check_output(out, meta)
    batches = split_jobs(sources, args.per_source, args.batch, rank, world)
    todo = [jobs for jobs in batches if replace or not all(exists(out, job) for job in jobs)]
    # The first batch comes before the folder: bad input ends the run here, and leaves nothing.
    first = make(todo[0]) if todo else []
    if world > 1:
        dist.barrier()  # every rank has looked at the folder
    if rank == 0:
        if replace:
            shutil.rmtree(out)
        remove_temporary(out)
        write_json(out / "meta.json", meta)
        write_json(out / "classes.json", classes)
    if world > 1:
        dist.barrier()
    count = sum(len(jobs) for jobs in todo)
    with tqdm(total=count, desc=out.name, unit="pair", disable=rank > 0) as bar:
        for n, jobs in enumerate(todo):
            # A batch is made as one even where some of its pairs exist: the same batch gives the same bytes.
            for job, pair in zip(jobs, make(jobs) if n else first):
                if not exists(out, job):
                    write_pair(out, pair_name(job), K=len(classes), **pair)
            bar.update(len(jobs))
    if world > 1:
        dist.barrier()
    if rank == 0:
        draw_samples(out, classes, title)
        count = len(sources) * args.per_source
        print(f"{out}: {count} pairs; look at {out / 'samples.png'}")


def draw_samples(out, classes, title="", count=24):
    """OUT/samples.png: pairs from all over the folder, each with its caption."""
    images = list(list_files(out / "images", (".png",)).items())  # each means a complete pair
    images = [images[i] for i in spread(len(images), count)]
    masks = [read_ids(out / "masks" / f"{name}.png", len(classes)) for name, _ in images]
    rows = {"mask": list(palette(len(classes))[np.stack(masks)]),
            "image": [np.asarray(open_picture(path)) for _, path in images]}
    captions = [] if title else [read_captions(out, name)[0] for name, _ in images]
    write_picture(out / "samples.png", contact_sheet(rows, captions, classes, title))


def find_weights(data, stage, given):
    """The folder given, else the shipped weights of this data, else out/NAME/STAGE."""
    shipped = ROOT / "weights" / dataset_name(data) / stage
    trained = Path("out") / dataset_name(data) / stage
    return given or (shipped if diffusion.checkpoint_file(shipped).exists() else trained)


def unknown_words(prompt, data):
    """The words of a prompt that no training caption of the data holds; none where it has no captions."""
    try:
        folder = find_split(data, "train")
    except ValueError:  # a prompt needs no data
        return []
    known = set()
    for path in folder.glob("captions/[!.]*.txt"):
        known.update(words_of(" ".join(read_captions(folder, path.stem))))
    words = dict.fromkeys(words_of(prompt))  # each once, in their order
    return [word for word in words if word not in known] if known else []


def synthesis_flags(parser, per_source):
    """The flags that MaskSyn and ImgSyn share."""
    add = parser.add_argument
    positive = number(int, 1)
    add("--data", default="shapes", help="NAME (data/NAME) or a folder with train/ and val/")
    add("--out", type=Path, help="pair folder to write (default: out/NAME/masksyn or imgsyn)")
    add("--mask2img", type=Path,
        help="trained Mask2Img (default: the shipped one, else out/NAME/mask2img)")
    add("--limit", type=positive, default=64, help="use the first N captions or masks")
    add(per_source, dest="per_source", type=positive, default=1, help="pairs of each")
    add("--batch", type=positive, default=16, help="pairs at a time")
    add("--steps", type=positive, default=15, help="sampling steps of an image")
    add("--guidance", type=number(float, 0), default=1.5,
        help="guidance of images; 1 = none")
    add("--sampler", choices=tuple(SAMPLERS), default="dpm++",
        help="of images; edm evaluates the network twice a step and adds fresh noise")
    add("--seed", type=int, default=0, help="another seed, other pairs")
    add("--device", default="auto", help="cpu, cuda, cuda:1 ...")


def parse(argv):
    parser = argparse.ArgumentParser(description="MaskSyn: captions -> new masks -> new images.",
                                     formatter_class=ShowDefaults)
    synthesis_flags(parser, "--per-caption")
    add = parser.add_argument
    add("--text2mask", type=Path,
        help="trained Text2Mask (default: the shipped one, else out/NAME/text2mask)")
    positive = number(int, 1)
    add("--mask-steps", type=positive, default=12, help="sampling steps of a mask")
    add("--mask-sampler", choices=tuple(SAMPLERS), default="edm", help="of masks")
    add("--mask-guidance", type=number(float, 0), default=2.0,
        help="guidance of masks; 1 = none")
    add("--min-region", type=positive, default=8,
        help="smaller regions of a mask go to their surroundings")
    add("--prompt",
        help="pairs of this caption, in out/NAME/prompt, which is replaced each time")
    add("--count", type=positive, default=8, help="pairs of --prompt")
    return parser.parse_args(argv)


def load_generators(args, device):
    """Text2Mask, Mask2Img and {stage: path of its weights}. Raises ValueError where they do not fit."""
    paths = {"text2mask": find_weights(args.data, "text2mask", args.text2mask),
             "mask2img": find_weights(args.data, "mask2img", args.mask2img)}
    text2mask = diffusion.load(Text2Mask, paths["text2mask"], device)
    mask2img = diffusion.load(Mask2Img, paths["mask2img"], device)
    first, second = text2mask.config, mask2img.config
    check_classes(second["classes"], first["classes"], paths["mask2img"])
    if second["size"] != first["size"]:
        raise ValueError(f"{paths['mask2img']}: paints (H, W) {second['size']}, and "
                         f"{paths['text2mask']} {first['size']}. Train both at one size")
    return text2mask, mask2img, paths


def make_pairs(jobs, captions, text2mask, mask2img, args):
    """Jobs and their captions -> the arguments of write_pair of each: a new mask, and a new image on it."""
    classes = text2mask.config["classes"]
    isthing = [c["isthing"] for c in classes]
    seeds = [seed_of(args.seed, *job, "mask") for job in jobs]
    codes = text2mask.sample(captions, seeds, args.mask_steps, args.mask_guidance,
                             args.mask_sampler)
    masks = [segments(c, isthing, args.min_region) for c in codes]  # [(ids, instances)]
    return paint(jobs, captions, masks, any(isthing), mask2img, args)


def paint(jobs, captions, masks, has_instances, mask2img, args):
    """The second half of both modes: an image on each mask -> the arguments of write_pair of each job.

    masks: (ids, instances) of each, both (H, W) uint8.
    """
    edges = mask2img.config["edges"] and has_instances
    K = len(mask2img.config["classes"])
    codes = np.stack([outline(*mask, K) if edges else mask[0] for mask in masks])
    seeds = [seed_of(args.seed, *job, "image") for job in jobs]
    images = mask2img.sample(codes, captions, seeds, args.steps, args.guidance, args.sampler)
    pairs = []
    for image, (ids, instances), caption in zip(images, masks, captions):
        instances = instances if has_instances else None
        pairs.append(dict(image=image, ids=ids, instances=instances, captions=[caption]))
    return pairs


def choose_captions(jobs, pairs):
    """A caption of each job's source, its captions in turn; pairs: the PairFolder of the sources."""
    position = {name: i for i, name in enumerate(pairs.names)}
    captions = []
    for source, k in jobs:
        choices = pairs.captions(position[source])
        captions.append(choices[k % len(choices)])
    return captions


def main(argv=None):
    args = parse(argv)
    if args.prompt is not None:
        return paint_prompt(args)
    device, _, _ = diffusion.setup(args.device)
    folder = find_split(args.data, "train")
    text2mask, mask2img, paths = load_generators(args, device)
    pairs = PairFolder(folder, ("ids",))
    check_classes(text2mask.config["classes"], pairs.classes, paths["text2mask"])

    def make(jobs):
        return make_pairs(jobs, choose_captions(jobs, pairs), text2mask, mask2img, args)
    out = args.out or Path("out") / dataset_name(args.data) / "masksyn"
    meta = describe(args, pairs.fingerprint(), **paths)
    synthesize(args, out, pairs.names[:args.limit], make, pairs.classes, meta)


def paint_prompt(args):
    """--prompt: --count pairs of one caption. It needs no data: the classes are those of the weights."""
    if not args.prompt.strip():
        raise ValueError("--prompt: is empty. Say what the pictures should show")
    device, rank, _ = diffusion.setup(args.device)
    text2mask, mask2img, paths = load_generators(args, device)
    unknown = unknown_words(args.prompt, args.data)
    if unknown and rank == 0:
        print(f"No training caption of {args.data} holds: {', '.join(unknown)}. The weights have not "
              "learned what that looks like.")

    def make(jobs):
        return make_pairs(jobs, [args.prompt] * len(jobs), text2mask, mask2img, args)
    out = args.out or Path("out") / dataset_name(args.data) / "prompt"
    meta = describe(args, args.prompt, **paths) | {"prompt": args.prompt}
    sources, classes = [f"prompt{n}" for n in range(args.count)], text2mask.config["classes"]
    synthesize(args, out, sources, make, classes, meta, title=args.prompt)


if __name__ == "__main__":
    run(main)
