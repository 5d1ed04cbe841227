"""ImgSyn: human masks -> new images: every annotation gets as many pictures as are asked for.

Paper:   SegGen (2311.03355) section 3, ImgSyn. ADE20K: 50 images a mask; COCO: 10; 40 steps [N].
         FreeMask (2310.15160): masks that are hard to segment get more images, --hardness.
Differs: DPM-Solver++(2M); small models take 15 steps.
Reads:   masks/ and captions/ of --data's train split; a trained Mask2Img; hardness.json of
         train.py --filter.
Writes:  OUT pair folder (classes.json, images, masks, instances, captions), meta.json, samples.png.
Needs:   unet.py, diffusion.py, text2mask.py, mask2img.py, masksyn.py, data/pairs.py.

    python imgsyn.py                                         # 64 pairs from the shipped demo weights
    python imgsyn.py --per-mask 4 --limit 100 --out out/shapes/imgsyn4
    python imgsyn.py --per-mask 4 --hardness out/shapes/imgsyn_filtered/hardness.json --out out/shapes/hard

Dimension key: B batch, H W pixels, K classes. A job is (source name, k): the k-th image of a mask.
"""
from pathlib import Path

import numpy as np

import diffusion
from data.pairs import FlagParser, PairFolder, check_classes, dataset_name, find_split, read_json, run
from diffusion import seed_of
from mask2img import Mask2Img
from masksyn import (choose_captions, describe, find_generators, limit_sources, load_generator, paint,
                     synthesis_flags, synthesize)
from text2mask import ResizeCrop, painted_size, painted_sizes


def count_images(path, sources, names, per_mask):
    """How many images each source gets by its hardness -> {source: number}, the easiest source first.

    path      a JSON file {source: hardness}
    sources   the masks that get images, n of them
    names     all masks of the data
    per_mask  N, the mean number of images, at least 2

    The mask of rank r (0 the easiest) gets 1 + round((2 r + 1) (N - 1) / n) images: from 1 to at most 2 N - 1
    and n N in all. Raises ValueError where the file is of other masks. FreeMask's resampling (2310.15160).
    """
    hardness = read_json(path)
    if not isinstance(hardness, dict) or set(sources) - hardness.keys() or hardness.keys() - set(names):
        raise ValueError(f"{path}: not a hardness for these masks. Give the hardness.json of the filtered "
                         "ImgSyn pairs of the same --data, --split and --limit")
    if per_mask == 1:
        raise ValueError("--hardness has no effect with --per-mask 1. Give 2 or more")
    order = sorted(sources, key=hardness.get)
    return {source: 1 + round((2 * rank + 1) * (per_mask - 1) / len(order))
            for rank, source in enumerate(order)}


def main(argv=None):
    parser = FlagParser(description="ImgSyn: human masks -> new images.")
    synthesis_flags(parser, "--per-mask")
    parser.add_argument("--split", default="train", help="the split whose masks are used")
    parser.add_argument("--hardness", type=Path, metavar="FILE", help="hardness.json of train.py --filter: "
                        "the number of images grows linearly with the rank of a mask's hardness, from 1 to "
                        "2 N - 1, N of --per-mask on average. Give another --out too")
    args = parser.parse_args(argv)
    device, _, _ = diffusion.setup(args.device)
    path = find_generators(args, ("mask2img",))["mask2img"]
    pairs = PairFolder(find_split(args.data, args.split), ("ids", "instances"))
    sources = limit_sources(args, pairs.names)
    counts = dict.fromkeys(sources, args.per_source)
    if args.hardness:  # sorted by their number, so that most batches are full
        counts = count_images(args.hardness, sources, pairs.names, args.per_source)
    mask2img = load_generator(Mask2Img, path, args, device)
    check_classes(mask2img.config["classes"], pairs.classes, path)

    def read_mask(source, k):
        """A human mask in the size that Mask2Img paints, another crop for each k -> class ids and instances,
        both (H, W) uint8, and SDXL's time_ids: original size, crop corner, target size."""
        pair = pairs.read(pairs.positions[source])
        shape = pair["ids"].shape
        size = painted_size(mask2img, shape)
        crop = ResizeCrop(shape, size, np.random.default_rng(seed_of(args.seed, source, k, "crop")))
        return (crop(pair["ids"]), crop(pair["instances"])), (*shape, crop.top, crop.left, *size)

    def make(jobs):
        """Jobs -> the arguments of write_pair of each: a human mask, and a new image on it."""
        masks, time_ids = zip(*(read_mask(*job) for job in jobs))
        captions = choose_captions(jobs, pairs)
        return paint(jobs, captions, masks, pairs.has_instances, mask2img, args, time_ids)
    out = args.out or Path("out") / dataset_name(args.data) / "imgsyn"
    meta = describe(args, pairs.fingerprint(), mask2img=path)
    if args.hardness:
        meta["hardness"] = diffusion.weights_hash(args.hardness)
    synthesize(args, out, counts, make, pairs.classes, meta, painted_sizes(mask2img, pairs, counts))


if __name__ == "__main__":
    run(main)
