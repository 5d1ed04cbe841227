"""COCO panoptic (annotations + PNG) in the official layout -> pair folders train and val.

One folder serves all tasks: masks/ holds the semantic view (the 133 categories, whose ids have holes, as 1 to
133), instances/ separates the things, and a (class, instance) pair is a segment. A crowd is instance 255.
Captions are COCO's own, or those of any captioner (--captions), or are composed from what is in the picture.

Differs: things are numbered over the whole image; where more than 254 are in it, within each class, and
         beyond 254 of one class the smallest join its crowd.
Reads:   RAW/{train2017,val2017}/*.jpg, RAW/annotations/panoptic_{train2017,val2017}.json, their PNG files
         in a folder of the same name in RAW/annotations or RAW; if there, captions_*.json and
         instances_*.json in RAW/annotations
Writes:  OUT/{train,val}/{classes.json,images,masks,instances,captions}, by default beside this file, and a
         link instances.json there to COCO's own instances, for AP (not with --size: they have other sizes)
Needs:   data/prepare.py, data/pairs.py
Run:     python data/coco/prepare.py --root RAW
"""
import functools
import os
import random
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.pairs import CROWD, FlagParser, link, number, open_picture, read_json, run
from data.prepare import (check_captions, image_name, join_words, prepare_splits, read_caption_file,
                          with_article)

COUNTS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
PLURALS = {
    "person": "people", "sheep": "sheep", "knife": "knives", "mouse": "mice",
    "skis": "pairs of skis", "scissors": "pairs of scissors", "broccoli": "pieces of broccoli",
}
UNCOUNTED = ("skis", "scissors", "broccoli")        # take no article
SPELLING = {"window-blind": "window blind", "playingfield": "playing field"}
LEAST_SHARE = 0.003                                 # no caption mentions stuff that covers less


# ---- raw data ----------------------------------------------------------------------------------------------

def find_folders(root, path):
    """The folders of the images and of the PNG files that a panoptic JSON file names."""
    year = path.stem.removeprefix("panoptic_")
    places = (root / year, root / "images" / year), (path.with_suffix(""), root / path.stem)
    found = [next(filter(Path.is_dir, each), None) for each in places]
    missing = [str(each[0]) for each, folder in zip(places, found) if folder is None]
    if missing:
        raise ValueError(f"{' and '.join(missing)}: no such folder. Unpack {year}.zip in {root}, and both "
                         "archives within the panoptic annotations where they lie")
    return found


def check_files(folder, names):
    """Raises ValueError unless the folder holds all these files."""
    missing = sorted(set(names) - set(os.listdir(folder)))
    if missing:
        raise ValueError(f"{folder}: {missing[0]} is missing ({len(missing)} of {len(names)} files). "
                         "Unpack them again")


def list_raw(root, path, captions):
    """A panoptic JSON file -> (classes, [(image path, captions, PNG path, segments)]).

    captions: a captioner's file, or None for COCO's own where they are there
    """
    data = read_json(path)
    photos, pngs = find_folders(root, path)
    names = {image["id"]: image["file_name"] for image in data["images"]}
    annotations = {each["image_id"]: each for each in data["annotations"]}
    for i in sorted(names.keys() ^ annotations.keys()):
        lacks = "an annotation" if i in names else "an image"
        raise ValueError(f"{path}: image {i} lacks {lacks}. Unpack the annotations again")
    check_files(photos, names.values())
    check_files(pngs, [each["file_name"] for each in annotations.values()])

    classes = []
    for c in sorted(data["categories"], key=lambda c: c["id"]):
        classes.append({"name": c["name"], "isthing": bool(c["isthing"]), "source_id": c["id"]})
    official = path.with_name(path.name.replace("panoptic", "captions"))
    texts = {}
    if captions or official.exists():
        texts = read_caption_file(captions or official, names)
    if not captions:
        check_captions(official, texts, names.values())
    jobs = []
    for i in sorted(names):
        lines = texts.get(image_name(names[i]), [])
        label = annotations[i]
        jobs.append((photos / names[i], lines, pngs / label["file_name"], label["segments_info"]))
    return classes, jobs


def read_labels(classes, name, image, path, segments):
    """A panoptic PNG and its segments_info -> (H, W) uint8 class ids, (H, W) uint8 instances, captions."""
    picture = open_picture(path)
    if picture.mode not in ("RGB", "RGBA"):
        raise ValueError(f"{path}: mode {picture.mode}, not panoptic colours. Take the PNG files of COCO's "
                         "panoptic annotations")
    ids, instances = split_segments(np.asarray(picture)[..., :3], segments, classes, path)
    return ids, instances, compose_captions(name, ids, instances, classes)


def split_segments(colours, segments, classes, path):
    """(H, W, 3) panoptic colours -> (H, W) uint8 class ids and (H, W) uint8 instances.

    segments: COCO's segments_info, {"id", "category_id", "iscrowd"} each. The colour of a segment is its id,
    R + 256 G + 65536 B. Stuff has instance 0, a thing 1 to 254, a crowd 255.
    """
    codes = colours.astype(np.int32) @ np.array([1, 256, 256 ** 2], np.int32)      # (H, W)
    found, where, areas = np.unique(codes, return_inverse=True, return_counts=True)
    check_segments(found, segments, classes, path)
    class_of = {c["source_id"]: k for k, c in enumerate(classes, 1)}
    kinds = {s["id"]: class_of[s["category_id"]] for s in segments}     # id -> class

    # Number the things, the largest first: over the image, or within each class where there are too many.
    numbers = {i: CROWD for i, k in kinds.items() if classes[k - 1]["isthing"]}    # id -> instance
    crowds = {s["id"] for s in segments if s.get("iscrowd")}
    largest = found[np.argsort(-areas, kind="stable")].tolist()
    countable = [i for i in largest if i in numbers and i not in crowds]
    rank = Counter()
    for i in countable:
        group = kinds[i] if len(countable) >= CROWD else "image"
        rank[group] += 1
        numbers[i] = min(rank[group], CROWD)

    tables = [[values.get(i, 0) for i in found.tolist()] for values in (kinds, numbers)]
    return [np.array(table, np.uint8)[where].reshape(codes.shape) for table in tables]


def check_segments(found, segments, classes, path):
    """Raises ValueError unless PNG and JSON hold the same segments, of known categories."""
    listed = {s["id"] for s in segments}
    for i in sorted((set(found.tolist()) - {0}) ^ listed):
        lacks = "PNG" if i in listed else "JSON"
        raise ValueError(f"{path}: its {lacks} lacks the segment {i}. Take both from the same release")
    for k in sorted({s["category_id"] for s in segments} - {c["source_id"] for c in classes}):
        raise ValueError(f"{path}: its JSON has the unknown category {k}. Take both from the same release")


# ---- captions ----------------------------------------------------------------------------------------------

def count_phrase(name, count):
    """("dog", 1) -> "a dog"; ("bus", 3) -> "three buses"; ("person", 40) -> "many people"."""
    if count == 1:
        return name if name in UNCOUNTED else with_article(name)
    ending = "es" if name.endswith(("s", "x", "ch", "sh")) else "s"
    word = COUNTS[count] if count < len(COUNTS) else "many"
    return word + " " + PLURALS.get(name, name + ending)


def stuff_phrase(name):
    """Stuff as people say it: "wall-brick" -> "brick wall", "sky-other-merged" -> "sky"."""
    parts = [part for part in name.split("-") if part not in ("other", "merged", "stuff")]
    return SPELLING.get(name, " ".join(reversed(parts)))


def compose_captions(name, ids, instances, classes):
    """Two captions from the labels of an image: its things by number, then its stuff; and a short one."""
    area = np.bincount(ids.ravel(), minlength=len(classes) + 1)
    numbers = defaultdict(set)                                          # class -> its instances
    for code in np.unique(ids.astype(np.int32) * 256 + instances).tolist():
        numbers[code // 256].add(code % 256)
    things, stuff = [], []
    for k in np.argsort(-area).tolist():
        if k == 0 or area[k] == 0:
            continue
        if classes[k - 1]["isthing"]:
            count = CROWD if CROWD in numbers[k] else len(numbers[k])
            things.append(count_phrase(classes[k - 1]["name"], count))
        elif area[k] >= LEAST_SHARE * ids.size:
            stuff.append(stuff_phrase(classes[k - 1]["name"]))
    stuff = list(dict.fromkeys(stuff))              # several classes may have one phrase
    few = random.Random(name).choice((1, 2, 3))
    short = join_words((things + stuff)[:few] or ["a picture"])
    parts = [join_words(phrases[:5]) for phrases in (things, stuff) if phrases]
    return [" with ".join(parts) or short, short]


# ---- both splits -------------------------------------------------------------------------------------------

def prepare(root, out, captions=None, size=None):
    """Write the splits of the raw data.

    captions: a captioner's file or None; size: None links the images, N resizes their shorter side.
    """
    paths = [path for path in sorted((root / "annotations").glob("panoptic_*.json"))
             if re.fullmatch(r"panoptic_(train|val)\d*", path.stem)]
    if not paths:
        raise ValueError(f"{root / 'annotations'}: no panoptic_train2017.json or panoptic_val2017.json. Give "
                         "the folder that holds COCO's annotations, train2017 and val2017")
    paths = {re.search("train|val", path.stem)[0]: path for path in paths}
    raw = {split: list_raw(root, path, captions) for split, path in paths.items()}
    classes, _ = next(iter(raw.values()))
    if any(others != classes for others, _ in raw.values()):
        raise ValueError(f"{root / 'annotations'}: train and val have other categories. Take one release")
    splits = {split: jobs for split, (_, jobs) in raw.items()}
    if captions and not any(lines for jobs in splits.values() for _, lines, *_ in jobs):
        photos = [job[0].name for job in sum(splits.values(), [])]
        check_captions(captions, read_caption_file(captions), photos)
    prepare_splits(out, splits, classes, functools.partial(read_labels, classes), size)
    for split, path in paths.items():
        instances = path.with_name(path.name.replace("panoptic", "instances"))
        if instances.exists() and not size:
            link(instances, Path(out) / split / "instances.json")


def main(argv=None):
    parser = FlagParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, required=True,
                        help="the folder of annotations, train2017 and val2017")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="(default: %(default)s)")
    parser.add_argument("--captions", help="JSON or JSONL of image name -> caption(s), instead of COCO's")
    parser.add_argument("--size", type=number(int, 1), metavar="N",
                        help="resize the shorter side to N (default: link the images)")
    args = parser.parse_args(argv)
    prepare(args.root, args.out, args.captions, args.size)


if __name__ == "__main__":
    run(main)
