"""How clean sampled masks are, and how well they obey their captions.

Text2Mask paints a mask for each of a split's first captions. A clean mask has only colours of the palette and
no specks; real masks have a few too, so their share stands beside. An obedient mask shows the classes that
its caption names, and no others.

Differs: which words name a class is said in words.json of the data set. Without that file, class names and
         their plurals stand in. Captions may then leave out what the picture shows, so the precision is
         unknown.
Reads:   a split of --data; a trained Text2Mask.
Writes:  nothing, unless --json FILE.
Needs:   diffusion.py, text2mask.py, data/pairs.py.

    python bench/masks.py                                      # the shipped weights on data/shapes/val
    python bench/masks.py --data camvid --init out/camvid/text2mask

Dimension key: B batch, H W pixels, K classes.
"""
import sys
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import diffusion
from data.pairs import (FlagParser, PairFolder, check_classes, find_split, number, palette, read_json, run,
                        write_json)
from diffusion import seed_of
from text2mask import (ResizeCrop, Text2Mask, components, find_weights, sampling_flags, segments,
                       words_of)

SPECK = 8                      # regions under so many pixels
OFF = 20                       # grey levels from the nearest colour of the palette
SHARES = {
    "off_colour": f"% of the pixels are over {OFF} grey levels from every colour",
    "specks_sampled": f"% of the pixels are in specks under {SPECK} px, as sampled",
    "specks_cleaned": "% after cleaning",
    "specks_real": "% in real masks",
}
FIGURES = SHARES | {
    "recall": "% of the named classes are painted",
    "precision": "% of the painted classes are named; an unnamed sky is no error",
    "masks_a_minute": "are sampled",
}


# ---- what captions name ------------------------------------------------------------------------------------

def read_words(path):
    """words.json -> {class: [words or phrases that name it]}. Raises ValueError where it is garbled."""
    words = read_json(path)
    lists = words.values() if isinstance(words, dict) else [None]
    for forms in lists:
        if not isinstance(forms, list) or not all(isinstance(form, str) for form in forms):
            raise ValueError(f'{path}: not a list of words a class, {{"sky": ["sky", "skies"]}}. Repair or '
                             "delete it")
    return words


def class_words(pairs):
    """A PairFolder -> {class: [words]}, and whether its captions name all that the pictures show."""
    path = pairs.folder / "words.json"
    if path.exists():
        return read_words(path), True
    names = [c["name"] for c in pairs.classes]
    return {name: [name, f"{name}s"] for name in names}, False


def named_classes(caption, words):
    """The classes that a caption names, a set; words: {class: [words or phrases]}."""
    text = spaced_words(caption)
    return {name for name, forms in words.items() if any(spaced_words(form) in text for form in forms)}


def spaced_words(text):
    """The words of a text between single spaces: found in a longer one only where all words are whole."""
    return " " + " ".join(words_of(text)) + " "


# ---- what masks show ---------------------------------------------------------------------------------------

def speck_share(ids):
    """The share of the pixels of (H, W) ids in 4-connected regions of under SPECK pixels."""
    sizes = np.bincount(components(ids).ravel())
    return sizes[sizes < SPECK].sum() / ids.size


def off_colour_share(colour_map, colours):
    """The share of the pixels of (H, W, 3) over OFF grey levels from all of `colours` (K + 2, 3)."""
    nearest = np.full(colour_map.shape[:2], np.inf)                      # (H, W)
    for colour in colours:
        distance = np.linalg.norm(colour_map - colour, axis=-1)
        nearest = np.minimum(nearest, distance)
    return (nearest > OFF).mean()


def judge(codes, colour_map, real, caption, classes, words):
    """The figures of one mask -> dict: shares in 0..1 and numbers of classes.

    codes       (H, W) uint8, as sampled
    colour_map  (H, W, 3) in [0, 255], from which the codes were read
    real        (H, W) uint8, the real mask of the same caption
    """
    colours = palette(len(classes)).astype(np.float32)
    isthing = [c["isthing"] for c in classes]
    ids, _ = segments(codes, isthing, SPECK)
    named = named_classes(caption, words)
    painted = {classes[k - 1]["name"] for k in np.unique(ids) if k}

    # Errors are only classes that a caption would name: not those without words, nor the sky.
    countable = {name for name, forms in words.items() if forms} - {"sky"}
    painted &= countable | named
    return {
        "off_colour": off_colour_share(colour_map, colours),
        "specks_sampled": speck_share(codes),
        "specks_cleaned": speck_share(ids),
        "specks_real": speck_share(real),
        "named": len(named),
        "painted": len(painted),
        "hits": len(named & painted),
    }


def measure(model, pairs, args):
    """Sample a mask of every pair's first caption -> {figure: value}; shares are in percent.

    precision is None where the captions may leave something out.
    """
    words, complete = class_words(pairs)
    rows, seconds = [], 0.0
    for first in tqdm(range(0, len(pairs), args.batch), "sample"):
        part = range(first, min(first + args.batch, len(pairs)))
        captions = [pairs.captions(i)[0] for i in part]
        seeds = [seed_of(args.seed, pairs.names[i]) for i in part]
        start = time.perf_counter()
        codes, maps = model.sample(captions, seeds, args.steps, args.guidance, args.sampler, maps=True)
        seconds += time.perf_counter() - start                           # (B, H, W), (B, H, W, 3)
        for n, i in enumerate(part):
            ids = pairs.read(i)["ids"]
            real = ResizeCrop(ids.shape, codes[n].shape)(ids)
            rows.append(judge(codes[n], maps[n], real, captions[n], pairs.classes, words))

    figures = {key: 100 * float(np.mean([row[key] for row in rows])) for key in SHARES}
    named, painted, hits = (sum(row[key] for row in rows) for key in ("named", "painted", "hits"))
    return figures | {
        "recall": 100 * hits / max(named, 1),
        "precision": 100 * hits / max(painted, 1) if complete else None,
        "masks_a_minute": 60 * len(rows) / seconds,
        "captions": len(rows),
    }


def main(argv=None):
    parser = FlagParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data", default="shapes", help="NAME (data/NAME) or a folder with train/ and val/")
    add("--split", default="val", help="the split whose captions are used")
    add("--json", type=Path, metavar="FILE", help="also write the figures here")
    add("--limit", type=number(int, 1), default=300, help="use the first N captions")
    add("--batch", type=number(int, 1), default=25, help="masks at a time")
    sampling_flags(parser, "text2mask", 12, 2.0, "edm")
    args = parser.parse_args(argv)
    device, _, _ = diffusion.setup(args.device)
    pairs = PairFolder(find_split(args.data, args.split), ("ids",), limit=args.limit)
    model = diffusion.load(Text2Mask, find_weights(args.data, "text2mask", args.init), device)
    check_classes(pairs.classes, model.config["classes"], pairs.folder / "classes.json")

    figures = measure(model, pairs, args)
    print(f"{figures['captions']} captions of {pairs.folder}")
    for key, meaning in FIGURES.items():
        value = "unknown" if figures[key] is None else f"{figures[key]:.3f}"
        print(f"{key.replace('_', ' '):15} {value:>8} {meaning}")
    if args.json:
        write_json(args.json, figures)


if __name__ == "__main__":
    run(main)
