"""ADE20K scene parsing (SceneParsing150) in the official layout -> pair folders train and val.

Masks are kept as they are: 0 is unlabelled and 1 to 150 are the classes of objectInfo150.txt. Where the
instance challenge's annotations_instance lies beside them, its 100 classes are things: instances/ separates
them. Captions are any captioner's (--captions), or composed from the scene's name and its classes.

Differs: the semantic mask is never changed, so that mIoU is the benchmark's: an instance keeps only pixels
         whose class is its own, and pixels of a thing without an instance are a crowd (255): not scored.
Reads:   RAW/images/{training,validation}/*.jpg, RAW/annotations/{training,validation}/*.png,
         RAW/objectInfo150.txt; RAW/annotations_instance/{training,validation}/*.png and
         RAW/sceneCategories.txt if there
Writes:  OUT/{train,val}/{classes.json,images,masks,instances,captions}, by default beside this file
Needs:   data/prepare.py, data/pairs.py
Run:     python data/ade20k/prepare.py --root RAW/ADEChallengeData2016
"""
import functools
import random
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.pairs import CROWD, FlagParser, list_partners, number, open_picture, read_ids, read_text, run
from data.prepare import (check_captions, image_name, join_words, prepare_splits, read_caption_file,
                          with_article)

CLASSES = 150
STUFF = (1, 2, 3, 4, 5, 6, 7, 10, 12, 14, 17, 18, 22, 26, 27, 29, 30, 35, 41, 47, 49, 52, 53, 55, 60, 61,
         62, 64, 69, 78, 80, 85, 92, 95, 97, 100, 101, 102, 106, 107, 110, 114, 115, 118, 123, 129, 132, 141,
         142, 146)
# The instance challenge numbers the other classes from 1, in this order.
THINGS = [k for k in range(1, CLASSES + 1) if k not in STUFF]
UNCOUNTED = ("stairs", "food", "apparel")       # take no article
LEAST_SHARE = 0.004                             # no caption mentions a class that covers less
SPLITS = {"train": "training", "val": "validation"}


# ---- raw data ----------------------------------------------------------------------------------------------

def read_raw_classes(root):
    """objectInfo150.txt -> the content of classes.json; a class goes by the first of its names."""
    path = root / "objectInfo150.txt"
    if not path.is_file():
        raise ValueError(f"{path}: no such file. Give the folder ADEChallengeData2016, which holds it")
    has_instances = (root / "annotations_instance").is_dir()
    rows = [line.split("\t") for line in read_text(path).strip().split("\n")[1:]]
    if [row[0].strip() for row in rows] != [str(k) for k in range(1, CLASSES + 1)]:
        raise ValueError(f"{path}: {len(rows)} classes, not those from 1 to {CLASSES}. Unpack it again")
    return [{"name": row[-1].split(",")[0].strip(), "isthing": has_instances and k in THINGS, "source_id": k}
            for k, row in enumerate(rows, 1)]


def list_raw(root, part, captions):
    """-> [(image path, captions, mask path, instance path or None, scene)] of training or validation."""
    photos = root / "images" / part
    folders = {photos: (".jpg",), root / "annotations" / part: (".png",)}
    if (root / "annotations_instance").is_dir():
        folders[root / "annotations_instance" / part] = (".png",)
    images, masks, *instances = list_partners(folders)
    if not images:
        raise ValueError(f"{photos}: no JPEG images. Give the folder ADEChallengeData2016, which holds "
                         "images, annotations and objectInfo150.txt")
    scenes = read_scenes(root / "sceneCategories.txt")
    jobs = []
    for name, path in images.items():
        instance = instances[0][name] if instances else None
        lines = captions.get(image_name(path), [])
        jobs.append((path, lines, masks[name], instance, scenes.get(name, "")))
    return jobs


def read_scenes(path):
    """sceneCategories.txt -> {image name: scene}; empty where there is no such file."""
    text = read_text(path) if path.is_file() else ""
    words = [line.split() for line in text.split("\n") if line.strip()]
    return {name: " ".join(scene) for name, *scene in words if scene}


def read_labels(classes, name, image, mask, instance, scene):
    """Raw mask and instance picture (or None) -> (H, W) uint8 class ids, instances (or None), captions."""
    ids = read_ids(mask, CLASSES)
    instances = None if instance is None else read_instances(instance, ids)
    return ids, instances, compose_captions(name, scene, ids, classes)


def read_instances(path, ids):
    """An instance picture and its (H, W) class ids -> (H, W) uint8 instances.

    The picture holds the class, 1 to 100, in R and a number that is its own within the image in G.
    """
    picture = open_picture(path)
    if picture.mode not in ("RGB", "RGBA") or picture.size != ids.shape[::-1]:
        raise ValueError(f"{path}: mode {picture.mode} of {picture.width} x {picture.height} pixels, not RGB "
                         "of its mask's size. Take both from the same release")
    kinds = np.asarray(picture)[..., 0]                                     # (H, W)
    numbers = np.asarray(picture)[..., 1]
    if kinds.max() > len(THINGS):
        raise ValueError(f"{path}: holds the class {kinds.max()}, where 0 to {len(THINGS)} are possible. "
                         "Take the annotations of the same release")
    # An instance keeps the pixels where the mask shows its class: the mask is the benchmark's.
    own = (numbers > 0) & (np.array([0] + THINGS)[kinds] == ids)            # (H, W)
    values, where = np.unique(np.where(own, numbers, 0), return_inverse=True)
    first = int(values[0] > 0)                                              # without 0, count from 1
    order = np.minimum(np.arange(len(values)) + first, CROWD)               # beyond 254: a crowd
    others = np.where(np.isin(ids, THINGS), CROWD, 0)
    return np.where(own, order[where].reshape(ids.shape), others).astype(np.uint8)


# ---- captions ----------------------------------------------------------------------------------------------

def class_phrase(name, k):
    """A class as people say it: things with an article ("an armchair"), stuff without ("grass")."""
    return name if k in STUFF or name in UNCOUNTED else with_article(name)


def compose_captions(name, scene, ids, classes):
    """Two captions of (H, W) class ids: the scene with its large classes, and with one to three of them."""
    area = np.bincount(ids.ravel(), minlength=CLASSES + 1)
    largest = np.argsort(-area, kind="stable").tolist()
    phrases = [class_phrase(classes[k - 1]["name"], k) for k in largest
               if k and area[k] >= LEAST_SHARE * ids.size]
    known = scene not in ("", "misc", "outliers")
    place = with_article(scene.replace("_", " ") if known else "scene")
    few = random.Random(name).choice((1, 2, 3))
    captions = []
    for some in (phrases[:8], phrases[:few]):
        captions.append(f"{place} with {join_words(some)}" if some else place)
    return captions


# ---- both splits -------------------------------------------------------------------------------------------

def prepare(root, out, captions=None, size=None):
    """Write both splits of the raw data.

    captions: a captioner's file or None; size: None links the images, N resizes their shorter side.
    """
    classes = read_raw_classes(root)
    texts = read_caption_file(captions) if captions else {}
    splits = {split: part for split, part in SPLITS.items() if (root / "images" / part).is_dir()}
    splits = {split: list_raw(root, part, texts) for split, part in (splits or SPLITS).items()}
    check_captions(captions, texts, [job[0].name for job in sum(splits.values(), [])])
    prepare_splits(out, splits, classes, functools.partial(read_labels, classes), size)


def main(argv=None):
    parser = FlagParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, required=True, help="the folder ADEChallengeData2016")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="(default: %(default)s)")
    parser.add_argument("--captions", help="JSON or JSONL of image name -> caption(s)")
    parser.add_argument("--size", type=number(int, 1), metavar="N",
                        help="resize the shorter side to N (default: link the images)")
    args = parser.parse_args(argv)
    prepare(args.root, args.out, args.captions, args.size)


if __name__ == "__main__":
    run(main)
