"""How well masks, and the images on them, show what their captions say.

Text2Mask paints a mask for each of a split's first captions; or --pairs FOLDER gives the masks and images
that masksyn.py or imgsyn.py made. A clean mask has only colours of the palette and no specks. An obedient one
shows the classes that its caption names and no others, and as many things of each as it says; a thing in the
image has the colour that the caption gives it. The split's own pairs pass the same checks: what they reach is
the best that can be asked for.

Differs: which words name a class is said in words.json of the data set. Without that file, class names and
         their plurals stand in; captions may then leave out what the picture shows, so the precision is
         unknown. Numbers and colours are read as composed captions say them: "two red houses", "a woman in
         blue", "a boat with a white sail".
Reads:   a split of --data; a trained Text2Mask, or --pairs; for colours the train split too.
Writes:  nothing, unless --json FILE.
Needs:   diffusion.py, text2mask.py, data/pairs.py.

    python bench/masks.py                                      # the shipped weights on data/shapes/val
    python bench/masks.py --pairs out/shapes/masksyn
    python bench/masks.py --data camvid --init out/camvid/text2mask

Dimension key: B batch, H W pixels, K classes, N reference things.
"""
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import diffusion
from data.pairs import (FlagParser, PairFolder, check_classes, find_split, number, palette, read_json, run,
                        write_json)
from diffusion import seed_of
from text2mask import (Text2Mask, choose_sampling, chosen_sampling, components, find_weights, sampling_flags,
                       segments, words_of)

SPECK = 8                      # regions under so many pixels
OFF_COLOUR = 20                # grey levels from the nearest colour of the palette
REFERENCE = 1000               # training pairs whose things show what a colour looks like
NUMBERS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7,
           "eight": 8, "several": None}
COLOURS = {"black", "blue", "brown", "green", "grey", "orange", "pink", "purple", "red", "white", "yellow"}
FIGURES = {
    "off_colour": f"% of the pixels are over {OFF_COLOUR} grey levels from every colour",
    "specks_sampled": f"% of the pixels are in specks under {SPECK} px, as sampled",
    "specks": "% after cleaning",
    "recall": "% of the named classes are there",
    "recall_things": "% of the named things are there",
    "recall_stuff": "% of the named stuff is there",
    "precision": "% of the classes are named; an unnamed sky is no error",
    "number": "% of the things with a number are there as often as the caption says",
    "colour": "% of the things with a colour have that colour in the image",
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


def described_things(caption, words):
    """"two red houses and a woman in blue" -> {"house": (2, "red"), "person": (1, "blue")}.

    Of classes that one word of the caption names, with a number before it. The number is None for "several",
    the colour None where there is none.
    """
    text = words_of(caption)
    things = {}
    for name, forms in words.items():
        places = [i for i, word in enumerate(text) if word in forms]
        if len(places) != 1:
            continue
        place = places[0]
        before = text[max(0, place - 3):place]
        starts = [n for n, word in enumerate(before) if word in NUMBERS]
        if not starts:
            continue
        colours = [word for word in before[starts[-1]:] if word in COLOURS]
        after = text[place + 1:place + 5]
        if after[:1] == ["in"] and COLOURS & set(after[1:2]):
            colours.append(after[1])
        elif after[:1] == ["with"] and {"sail", "sails"} & set(after):
            colours += [word for word in after if word in COLOURS]
        things[name] = NUMBERS[before[starts[-1]]], colours[0] if colours else None
    return things


# ---- what pictures show ------------------------------------------------------------------------------------

def speck_pixels(ids):
    """How many pixels of (H, W) ids are in 4-connected regions of under SPECK pixels."""
    sizes = np.bincount(components(ids).ravel())
    return sizes[sizes < SPECK].sum()


def off_colour_pixels(colour_map, colours):
    """How many pixels of (H, W, 3) are over OFF_COLOUR grey levels from all of `colours` (K + 2, 3)."""
    nearest = np.full(colour_map.shape[:2], np.inf)                      # (H, W)
    for colour in colours:
        distance = np.linalg.norm(colour_map - colour, axis=-1)
        nearest = np.minimum(nearest, distance)
    return (nearest > OFF_COLOUR).sum()


def look(image, inside):
    """How the part `inside` (H, W) bool of an image looks, and in which light: (15,) grey levels."""
    part = image[inside].astype(np.float32)
    quartiles = np.percentile(part, (25, 50, 75), axis=0)                # (3, 3)
    light = 0.5 * image.reshape(-1, 3).mean(0)
    return np.concatenate([part.mean(0), quartiles.ravel(), light])


class ColourCheck:
    """Names the colour of a thing: that of the thing of its class in real pairs that looks most alike."""

    def __init__(self, pairs, words):
        """pairs: a PairFolder of image and ids, whose captions say the colours."""
        self.ids = {c["name"]: k for k, c in enumerate(pairs.classes, 1) if c["isthing"]}
        looks, self.colours = defaultdict(list), defaultdict(list)
        for i in tqdm(range(len(pairs)), "colours of real things", leave=False):
            pair = pairs.read(i)
            for name, inside, colour in self.coloured_things(pair["ids"], pairs.captions(i), words):
                looks[name].append(look(pair["image"], inside))
                self.colours[name].append(colour)
        self.looks = {name: np.stack(rows) for name, rows in looks.items()}  # (N, 15) of each class

    def coloured_things(self, ids, captions, words):
        """Yield (class, where it is (H, W) bool, colour) of what the captions give a colour and ids show."""
        said = {(name, colour) for caption in captions
                for name, (_, colour) in described_things(caption, words).items() if colour}
        for name, colour in sorted(said):  # each once, though several captions say it
            inside = ids == self.ids.get(name, -1)
            if inside.sum() >= SPECK:
                yield name, inside, colour

    def count(self, image, ids, caption, words):
        """-> how many of a caption's coloured things have their colour in the image, and of how many."""
        right = []
        for name, inside, colour in self.coloured_things(ids, [caption], words):
            if name in self.looks:
                distance = np.square(self.looks[name] - look(image, inside)).sum(1)
                right.append(self.colours[name][distance.argmin()] == colour)
        return sum(right), len(right)


def check(ids, instances, caption, classes, words, complete=True):
    """What a mask shows of its caption -> {figure: (right, of how many)}.

    ids, instances (H, W); words: {class: [words]}; complete: whether captions name all that there is.
    """
    named = named_classes(caption, words)
    there = {classes[k - 1]["name"] for k in np.unique(ids) if k}
    things = {c["name"] for c in classes if c["isthing"]}
    hits = named & there
    # Errors are only classes that a caption would name: not those without words, nor the sky.
    countable = {name for name, forms in words.items() if forms} - {"sky"}
    judged = there & (countable | named)

    right = total = 0
    described = described_things(caption, words)
    for k, c in enumerate(classes, 1):
        wanted, _ = described.get(c["name"], (None, None))
        if c["isthing"] and wanted:
            total += 1
            right += len(np.unique(instances[ids == k])) == wanted
    return {
        "specks": (speck_pixels(ids), ids.size),
        "recall": (len(hits), len(named)),
        "recall_things": (len(hits & things), len(named & things)),
        "recall_stuff": (len(hits - things), len(named - things)),
        "precision": (len(hits), len(judged) if complete else 0),
        "number": (right, total),
    }


# ---- sets of pictures --------------------------------------------------------------------------------------

def check_pairs(pairs, words, complete, colours=None):
    """The first caption of each pair against its mask and, with a ColourCheck, its image -> [check's dicts].

    Instances are found in the mask, as in a sampled one: things of a class that touch are one.
    """
    isthing = [c["isthing"] for c in pairs.classes]
    rows = []
    for i in range(len(pairs)):
        pair, caption = pairs.read(i), pairs.captions(i)[0]
        ids, instances = segments(pair["ids"], isthing, 1)
        row = check(ids, instances, caption, pairs.classes, words, complete)
        if colours:
            row["colour"] = colours.count(pair["image"], pair["ids"], caption, words)
        rows.append(row)
    return rows


def check_samples(model, pairs, words, complete, args):
    """Sample a mask of every pair's first caption -> [check's dicts], and the seconds that sampling took."""
    classes = pairs.classes
    isthing, colours = [c["isthing"] for c in classes], palette(len(classes)).astype(np.float32)
    rows, seconds = [], 0.0
    for first in tqdm(range(0, len(pairs), args.batch), "sample"):
        part = range(first, min(first + args.batch, len(pairs)))
        captions = [pairs.captions(i)[0] for i in part]
        seeds = [seed_of(args.seed, pairs.names[i]) for i in part]
        start = time.perf_counter()
        codes, maps = model.sample(captions, seeds, maps=True, **chosen_sampling(args))
        seconds += time.perf_counter() - start
        for code, colour_map, caption in zip(codes, maps, captions):
            ids, instances = segments(code, isthing, args.min_region)
            row = check(ids, instances, caption, classes, words, complete)
            row["off_colour"] = off_colour_pixels(colour_map, colours), code.size
            row["specks_sampled"] = speck_pixels(code), code.size
            rows.append(row)
    return rows, seconds


def summarise(rows):
    """[{figure: (right, of how many)}] -> {figure: percent}, None where there was nothing to count."""
    right, total = Counter(), Counter()
    for row in rows:
        for key, (hits, of) in row.items():
            right[key] += hits
            total[key] += of
    return {key: 100 * float(right[key]) / total[key] if total[key] else None for key in FIGURES}


def main(argv=None):
    parser = FlagParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data", default="shapes", help="NAME (data/NAME) or a folder with train/ and val/")
    add("--split", default="val", help="the split whose captions are used, and whose pairs stand beside")
    add("--pairs", type=Path, metavar="FOLDER", help="judge these pairs instead of sampling masks")
    add("--json", type=Path, metavar="FILE", help="also write the figures here")
    add("--limit", type=number(int, 1), default=300, help="use the first N captions")
    add("--batch", type=number(int, 1), default=25, help="masks at a time")
    sampling_flags(parser, "text2mask", "NAME")
    args = parser.parse_args(argv)
    device, _, _ = diffusion.setup(args.device)
    parts = ("image", "ids") if args.pairs else ("ids",)
    real = PairFolder(find_split(args.data, args.split), parts, limit=args.limit)
    words, complete = class_words(real)
    if args.pairs:
        made = PairFolder(args.pairs, parts, limit=args.limit)
        check_classes(made.classes, real.classes, made.folder / "classes.json")
        train = PairFolder(find_split(args.data, "train"), parts, limit=REFERENCE)
        colours = ColourCheck(train, words)
        rows = check_pairs(made, words, complete, colours)
        beside = check_pairs(real, words, complete, colours)
        print(f"{len(rows)} pairs of {made.folder}, beside {len(beside)} of {real.folder}")
    else:
        model = diffusion.load(Text2Mask, find_weights(args.data, "text2mask", args.init), device)
        check_classes(real.classes, model.config["classes"], real.folder / "classes.json")
        choose_sampling(args, model)
        rows, seconds = check_samples(model, real, words, complete, args)
        beside = check_pairs(real, words, complete)
        print(f"{len(rows)} masks of captions of {real.folder}, beside its own; "
              f"{60 * len(rows) / seconds:.0f} masks a minute")

    figures = {"sampled": summarise(rows), "real": summarise(beside)}
    print(f"{'':15} {'sampled':>8} {'real':>8}")
    for key, meaning in FIGURES.items():
        values = [figures[column][key] for column in figures]
        texts = ["unknown" if value is None else f"{value:.3f}" for value in values]
        print(f"{key.replace('_', ' '):15} {texts[0]:>8} {texts[1]:>8} {meaning}")
    if args.json:
        write_json(args.json, figures)


if __name__ == "__main__":
    run(main)
