"""MaskSyn: captions -> new masks -> new images: training pairs whose layout no human has drawn.

Text2Mask paints masks of a training caption, and Mask2Img paints an image on each. The mask is the label, so
what a segmenter can learn is not capped by another segmenter.

Paper:   SegGen (2311.03355) section 3, MaskSyn. ADE20K: 10 new pairs a training image; masks in 200 steps of
         EDM's sampler, images in 40 steps [N].
Differs: fewer steps (text2mask.SAMPLING); masks are cleaned of specks; instances are connected regions. The
         paper's way: --mask-sampler edm --mask-steps 200.
Reads:   captions/ of --data's train split, or --captions FILE; a trained Text2Mask and Mask2Img.
Writes:  OUT pair folder (classes.json, images, masks, instances, captions), meta.json, samples.png.
Needs:   unet.py, diffusion.py, text2mask.py, mask2img.py, data/pairs.py.

    python masksyn.py                                        # 64 pairs from the shipped demo weights
    python masksyn.py --prompt "two red houses by the water at sunset" --count 8
    python masksyn.py --captions captions.txt                # a pair of every line
    torchrun --nproc_per_node 2 masksyn.py --limit 1000      # each rank makes its share
    python masksyn.py --limit 1000 --part 1/4                # or four machines, --part 1/4 to 4/4

Dimension key: B batch, H W pixels, K classes. A job is (source name, k): the k-th pair of a source.
"""
import argparse
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch.distributed as dist
from tqdm import tqdm

import diffusion
import unet as networks
from data.pairs import (FlagParser, PairFolder, check_classes, contact_sheet, dataset_name, find_split,
                        is_shapes, list_names, number, outline, palette, read_captions, read_ids, read_json,
                        read_text, remove_temporary, run, spread, write_json, write_pair, write_picture)
from diffusion import seed_of
from mask2img import Mask2Img
from text2mask import (Text2Mask, choose_sampling, chosen_sampling, find_weights, list_shapes, painted_size,
                       painted_sizes, region_flag, sampler_flags, segments, words_of)


def split_jobs(sources, per_source, batch, rank, world, sizes=None):
    """Source names -> this rank's batches of jobs.

    Batches are cut before they are shared out, and all jobs of one have the same k and, where sizes {source:
    (H, W)} are given, the same size. So a sample is made in the same batch for any number of ranks and for a
    larger per_source, and comes out the same; in another batch it would differ by rounding.
    """
    groups = {}
    for source in sources:
        groups.setdefault(sizes[source] if sizes else None, []).append(source)
    parts = [group[i:i + batch] for group in groups.values() for i in range(0, len(group), batch)]
    batches = []
    for k in range(per_source):
        batches += [[(source, k) for source in part] for part in parts]
    return batches[rank::world]


def pair_name(job):
    return f"{job[0]}_{job[1]:02d}"


def complete_pairs(out):
    """The names of the pairs that are complete: not those of which somebody deleted a part."""
    images, masks = list_names(out / "images", (".png", ".jpg")), list_names(out / "masks", (".png",))
    return images.keys() & masks.keys() & list_names(out / "captions", (".txt",)).keys()


def holds_prompt(out):
    """Whether a folder holds pairs of --prompt, which the next prompt replaces; no others are deleted."""
    return (out / "meta.json").is_file() and "prompt" in read_json(out / "meta.json")


def prepare_output(out, meta, classes, replace, alone):
    """Delete `out` if it is to be replaced; else only temporary files of a killed run. Write what describes
    the pairs. alone: False where other processes may be writing temporary files now."""
    if replace:
        shutil.rmtree(out)
    if alone:
        remove_temporary(out)
    write_json(out / "meta.json", meta)
    write_json(out / "classes.json", classes)


def describe(args, fingerprint, **checkpoints):
    """The settings, source data and weights that decide a pair's content, for meta.json."""
    # Left out: flags that change only how many pairs, where they go, or the device; and paths of weights,
    # whose content counts.
    passed_over = ("out", "limit", "per_source", "hardness", "device", "compile", "count", "prompt",
                   "captions", "part", *checkpoints)
    meta = {key: str(value) for key, value in vars(args).items()
            if key not in passed_over and value is not False}  # False: a switch that is off
    for name, path in checkpoints.items():
        meta[f"{name}_weights"] = diffusion.weights_hash(path)
        trained_on = diffusion.read_header(path).get("trained_on")
        if trained_on:
            meta[f"{name}_pairs"] = trained_on
    return meta | {"source": fingerprint}


def plan(args, counts, rank, world, sizes):
    """This rank's or this part's batches of jobs. Raises ValueError where --part cannot be."""
    if args.part and world > 1:
        raise ValueError("--part shares the work out, and so does torchrun. Use one of them")
    batches = split_jobs(list(counts), max(counts.values()), args.batch, *(args.part or (rank, world)), sizes)
    if args.part and not batches:
        raise ValueError(f"--part: no batch of {args.batch} pairs is left for this one. Use fewer parts")
    return [[job for job in jobs if job[1] < counts[job[0]]] for jobs in batches]


def synthesize(args, out, counts, make, classes, meta, sizes=None, title="", replace=False):
    """Write the pairs of all jobs that `out` lacks: the loop of both modes.

    counts   {source name: how many pairs it gets}
    make     make(jobs) -> for each job the arguments of write_pair: image, ids, instances, captions
    classes  the content of classes.json
    meta     what makes these pairs what they are; raises ValueError where `out` holds others
    sizes    {source name: (H, W) of its pairs}, where they differ: a batch holds one size
    title    the caption of all pairs (--prompt), above the samples
    replace  delete what `out` holds first
    """
    _, rank, world = diffusion.setup(args.device)
    if not replace:
        diffusion.check_output(out, meta)
    complete = set() if replace else complete_pairs(out)
    batches = plan(args, counts, rank, world, sizes)
    todo = [jobs for jobs in batches if not complete.issuperset(map(pair_name, jobs))]
    bar = tqdm(total=sum(map(len, todo)), desc=out.name, unit="pair", disable=rank > 0)
    # The first batch comes before the folder: bad input ends the run here, and leaves nothing.
    clock = time.time()
    first = make(todo[0]) if todo else []
    minutes = (time.time() - clock) * len(todo) / 60
    if rank == 0 and todo:
        bar.write(f"{out}: {sum(map(len, todo))} pairs to make, in about {minutes:.1f} min")
    if world > 1:
        dist.barrier()  # every rank has looked at the folder
    if rank == 0:
        prepare_output(out, meta, classes, replace, alone=not args.part)
    if world > 1:
        dist.barrier()

    def write(jobs, pairs):
        for job, pair in zip(jobs, pairs):
            if (name := pair_name(job)) not in complete:
                write_pair(out, name, K=len(classes), ending=".jpg" if args.jpeg else ".png", **pair)
        bar.update(len(jobs))
    # A batch is made as one even where some of its pairs exist: the same batch gives the same bytes.
    call_in_background(write, ((jobs, make(jobs) if n else first) for n, jobs in enumerate(todo)))
    bar.close()
    if world > 1:
        dist.barrier()
    if rank == 0:
        # Listed by images, which come last: other parts may be writing pairs now.
        pairs = PairFolder(out, ("image",))
        draw_samples(pairs, classes, title)
        print(f"{out}: {len(pairs)} pairs; look at {out / 'samples.png'}")


def call_in_background(function, arguments):
    """Call function(*a) for each a of an iterator in a thread, while the iterator makes the next one."""
    with ThreadPoolExecutor(1) as thread:
        last = None
        for a in arguments:
            if last:
                last.result()  # waits, and raises the error of the thread here
            last = thread.submit(function, *a)
        if last:
            last.result()


def draw_samples(pairs, classes, title="", count=24):
    """OUT/samples.png: pairs from all over the folder, each with its caption."""
    chosen = spread(len(pairs), count)
    masks = [read_ids(pairs.mask_path(i), len(classes)) for i in chosen]
    rows = {"mask": [palette(len(classes))[mask] for mask in masks],
            "image": [pairs.read(i)["image"] for i in chosen]}
    captions = [] if title else [pairs.captions(i)[0] for i in chosen]
    write_picture(pairs.folder / "samples.png", contact_sheet(rows, captions, classes, title))


def find_generators(args, stages, need_data=True):
    """{stage: path of its weights}. Raises ValueError, which names all that is missing at once."""
    missing = []
    if need_data:
        try:
            find_split(args.data, "train")
        except ValueError as error:
            missing.append(str(error))
    paths = {stage: find_weights(args.data, stage, getattr(args, stage)) for stage in stages}
    for stage, path in paths.items():
        if not diffusion.checkpoint_file(path).exists():
            missing.append(f"{path}: no trained weights. Train them with: python {stage}.py train --data "
                           f"{args.data} --init BASE, or give others by --{stage}")
    if len(missing) > 1:  # nothing is trained yet, so BASE may be news
        missing.append(f"BASE is made by: python mask2img.py base --data {args.data} --split train; or it is "
                       "SDXL's folder")
    if missing:
        raise ValueError("  ".join(f"({n}) {text}." for n, text in enumerate(missing, 1)))
    _, rank, _ = diffusion.setup(args.device)
    if rank == 0:
        print(f"weights: {', '.join(map(str, paths.values()))}", flush=True)
    return paths


def warn_of_unknown_words(prompt, data):
    """Print the words of a prompt that no training caption of the data holds, if it has captions."""
    try:
        folder = find_split(data, "train")
    except ValueError:  # a prompt needs no data
        return
    known = set()
    for path in folder.glob("captions/[!.]*.txt"):
        known.update(words_of(" ".join(read_captions(folder, path.stem))))
    words = dict.fromkeys(words_of(prompt))  # each once, in their order
    unknown = [word for word in words if word not in known] if known else []
    if unknown:
        more = " ..." if unknown[10:] else ""
        print(f"No training caption of {data} holds: {', '.join(unknown[:10])}{more}. The weights have not "
              "learned what that looks like.")


def share(text):
    """An argparse type: "I/N", part I of N -> (I - 1, N)."""
    part, parts = map(int, text.split("/"))
    if not 1 <= part <= parts:
        raise argparse.ArgumentTypeError(f"{text}: I/N is needed, with I from 1 to N")
    return part - 1, parts


def synthesis_flags(parser, per_source_flag):
    """The flags that MaskSyn and ImgSyn share; per_source_flag: its name in this mode."""
    add = parser.add_argument
    positive = number(int, 1)
    add("--data", default="shapes", help="NAME (data/NAME) or a folder with train/ and val/")
    add("--out", type=Path, help="pair folder to write (default: out/NAME/masksyn or imgsyn)")
    add("--mask2img", type=Path,
        help="trained Mask2Img (default: out/NAME/mask2img, else the shipped one)")
    add("--limit", type=positive,
        help="use the first N captions or masks (default: 64 of the built-in data, else all)")
    add(per_source_flag, dest="per_source", metavar="N", type=positive, default=1, help="pairs of each")
    add("--batch", type=positive, default=16, help="pairs at a time")
    add("--jpeg", action="store_true", help="images as JPEG of quality 95 instead of PNG")
    add("--part", metavar="I/N", type=share,
        help="make only part I of N; each part may run on another machine")
    sampler_flags(parser, "mask2img")
    add("--seed", type=int, default=0, help="another seed, other pairs")
    add("--device", default="auto", help="cpu, cuda, cuda:1 ...")
    add("--compile", action="store_true", help="torch.compile the networks, for CUDA and many pairs")


def parse(argv):
    parser = FlagParser(description="MaskSyn: captions -> new masks -> new images.")
    synthesis_flags(parser, "--per-caption")
    add = parser.add_argument
    add("--text2mask", type=Path,
        help="trained Text2Mask (default: out/NAME/text2mask, else the shipped one)")
    positive = number(int, 1)
    sampler_flags(parser, "text2mask", "mask_")
    region_flag(parser)
    add("--captions", type=Path, metavar="FILE",
        help="pairs of the captions in this file, one a line, in out/FILE/masksyn; no data is needed")
    add("--prompt",
        help="pairs of this caption, in out/NAME/prompt, which is replaced each time")
    add("--count", type=positive, default=8, help="pairs of --prompt")
    return parser.parse_args(argv)


def load_generator(Model, path, args, device, prefix=""):
    """The Text2Mask or Mask2Img (Model) of a checkpoint, ready to paint as the flags say."""
    model = diffusion.load(Model, path, device, getattr(args, f"{prefix}base"))
    if args.compile:
        diffusion.compile_blocks(model, networks.BLOCKS)
    choose_sampling(args, model, prefix)
    return model


def load_generators(args, device, need_data=True):
    """Text2Mask, Mask2Img and {stage: path of its weights}. Raises ValueError where they do not fit."""
    paths = find_generators(args, ("text2mask", "mask2img"), need_data)
    text2mask = load_generator(Text2Mask, paths["text2mask"], args, device, "mask_")
    mask2img = load_generator(Mask2Img, paths["mask2img"], args, device)
    first, second = text2mask.config, mask2img.config
    check_classes(second["classes"], first["classes"], paths["mask2img"])
    if second["size"] != first["size"]:
        raise ValueError(f"{paths['mask2img']}: paints (H, W) {second['size']}, and "
                         f"{paths['text2mask']} {first['size']}. Train both at one --size")
    return text2mask, mask2img, paths


def make_pairs(jobs, captions, text2mask, mask2img, args, shapes=None):
    """Jobs and their captions -> the arguments of write_pair of each: a new mask, and a new image on it.

    shapes: the (H, W) of the pictures that the captions are of; all are painted in the size that fits the
    first. Without them, in the size of the training.
    """
    size = painted_size(text2mask, shapes[0]) if shapes else None
    # Original size, crop corner, target size: see CaptionedPairs.
    time_ids = [(*shape, 0, 0, *size) for shape in shapes] if shapes else None
    classes = text2mask.config["classes"]
    isthing = [c["isthing"] for c in classes]
    seeds = [seed_of(args.seed, *job, "mask") for job in jobs]
    codes = text2mask.sample(captions, seeds, size, time_ids=time_ids, **chosen_sampling(args, "mask_"))
    masks = [segments(c, isthing, args.min_region) for c in codes]  # [(ids, instances)]
    return paint(jobs, captions, masks, any(isthing), mask2img, args, time_ids)


def paint(jobs, captions, masks, has_instances, mask2img, args, time_ids=None):
    """The second half of both modes: an image on each mask -> the arguments of write_pair of each job.

    masks: (ids, instances) of each, both (H, W) uint8; time_ids: as in TextToImage.generate.
    """
    edges = mask2img.config["edges"] and has_instances
    K, width = len(mask2img.config["classes"]), mask2img.edge_width
    codes = np.stack([outline(*mask, K, width) if edges else mask[0] for mask in masks])
    seeds = [seed_of(args.seed, *job, "image") for job in jobs]
    images = mask2img.sample(codes, captions, seeds, time_ids, **chosen_sampling(args))
    pairs = []
    for image, (ids, instances), caption in zip(images, masks, captions):
        instances = instances if has_instances else None
        pairs.append(dict(image=image, ids=ids, instances=instances, captions=[caption]))
    return pairs


def choose_captions(jobs, pairs):
    """A caption of each job's source, its captions in turn; pairs: the PairFolder of the sources."""
    captions = []
    for source, k in jobs:
        choices = pairs.captions(pairs.positions[source])
        captions.append(choices[k % len(choices)])
    return captions


def limit_sources(args, sources):
    """The first --limit of the sources; without it, 64 of the built-in data and all of any other -> list."""
    limit = 64 if is_shapes(args.data) else None
    return list(sources)[:args.limit or limit]


def read_caption_lines(path):
    """A text file with a caption a line -> {line number: caption}, without empty lines."""
    if path.suffix.lower() in (".json", ".jsonl"):
        raise ValueError(f"{path}: a text file with one caption per line is needed, no JSON. Convert it")
    lines = read_text(path).split("\n")
    captions = {f"{n:06d}": line.strip() for n, line in enumerate(lines, 1) if line.strip()}
    if not captions:
        raise ValueError(f"{path}: holds no caption. Write one a line")
    return captions


def main(argv=None):
    args = parse(argv)
    if args.prompt is not None and args.captions:
        raise ValueError("--prompt has no effect with --captions. Give one of them")
    if args.prompt is not None and args.part:
        raise ValueError("--prompt replaces its folder, the pairs of other parts too. Leave --part out")
    if args.prompt is not None:
        return paint_prompt(args)
    if args.captions:
        return paint_captions(args)
    device, _, _ = diffusion.setup(args.device)
    text2mask, mask2img, paths = load_generators(args, device)
    pairs = PairFolder(find_split(args.data, "train"), ("ids",))
    check_classes(text2mask.config["classes"], pairs.classes, paths["text2mask"])

    def make(jobs):
        shapes = list_shapes(pairs, [source for source, _ in jobs])
        return make_pairs(jobs, choose_captions(jobs, pairs), text2mask, mask2img, args, shapes)
    out = args.out or Path("out") / dataset_name(args.data) / "masksyn"
    meta = describe(args, pairs.fingerprint(), **paths)
    counts = dict.fromkeys(limit_sources(args, pairs.names), args.per_source)
    synthesize(args, out, counts, make, pairs.classes, meta, painted_sizes(text2mask, pairs, counts))


def paint_captions(args):
    """--captions: pairs of the lines of a file. It needs no data: the classes are those of the weights."""
    captions = read_caption_lines(args.captions)
    device, rank, _ = diffusion.setup(args.device)
    text2mask, mask2img, paths = load_generators(args, device, need_data=False)
    if rank == 0:
        warn_of_unknown_words(" ".join(captions.values()), args.data)

    def make(jobs):
        return make_pairs(jobs, [captions[source] for source, _ in jobs], text2mask, mask2img, args)
    out = args.out or Path("out") / args.captions.stem / "masksyn"
    meta = describe(args, f"{len(captions)} captions {seed_of(captions):x}", **paths)
    counts = dict.fromkeys(list(captions)[:args.limit], args.per_source)
    synthesize(args, out, counts, make, text2mask.config["classes"], meta)


def paint_prompt(args):
    """--prompt: --count pairs of one caption. It needs no data: the classes are those of the weights."""
    if not args.prompt.strip():
        raise ValueError("--prompt: is empty. Say what the pictures should show")
    device, rank, _ = diffusion.setup(args.device)
    text2mask, mask2img, paths = load_generators(args, device, need_data=False)
    if rank == 0:
        warn_of_unknown_words(args.prompt, args.data)

    def make(jobs):
        return make_pairs(jobs, [args.prompt] * len(jobs), text2mask, mask2img, args)
    out = args.out or Path("out") / dataset_name(args.data) / "prompt"
    meta = describe(args, None, **paths) | {"prompt": args.prompt}
    counts = dict.fromkeys([f"prompt{n}" for n in range(args.count)], args.per_source)
    synthesize(args, out, counts, make, text2mask.config["classes"], meta, title=args.prompt,
               replace=holds_prompt(out))


if __name__ == "__main__":
    run(main)
