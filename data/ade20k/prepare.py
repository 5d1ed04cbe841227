"""ADE20K scene parsing (SceneParsing150) in the official layout -> pair folders train and val.

Masks are kept as they are: 0 is unlabelled and 1 to 150 are the classes of objectInfo150.txt. Where the
instance challenge's annotations_instance lies beside them, its 100 classes are things and instances/ tells
them apart. Captions are any captioner's (--captions), or composed from the scene's name and its classes.

Differs: the semantic mask is never changed, so that mIoU is the benchmark's: an instance keeps only pixels
         whose class is its own, and pixels of a thing without an instance are a crowd (255): not scored.
Reads:   RAW/images/{training,validation}/*.jpg, RAW/annotations/{training,validation}/*.png,
         RAW/objectInfo150.txt; RAW/annotations_instance/{training,validation}/*.png and
         RAW/sceneCategories.txt if there
Writes:  OUT/{train,val}/{classes.json,images,masks,instances,captions}, by default beside this file
Needs:   no sibling file
Run:     python data/ade20k/prepare.py --root RAW/ADEChallengeData2016
"""

import argparse
import glob
import json
import os
import random
import shutil
import sys
from collections import defaultdict
from functools import partial
from multiprocessing import Pool

import numpy as np
from PIL import Image
from tqdm import tqdm

CLASSES, CROWD = 150, 255
STUFF = (1, 2, 3, 4, 5, 6, 7, 10, 12, 14, 17, 18, 22, 26, 27, 29, 30, 35, 41, 47, 49, 52, 53, 55, 60, 61,
         62, 64, 69, 78, 80, 85, 92, 95, 97, 100, 101, 102, 106, 107, 110, 114, 115, 118, 123, 129, 132, 141,
         142, 146)
THINGS = [k for k in range(1, CLASSES + 1) if k not in STUFF]      # the instance challenge's classes in order
UNCOUNTED = ("stairs", "food", "apparel")                          # said without an article
SEEN = 0.004        # a class with a smaller share of the picture is not mentioned


def palette(classes):
    """K -> the K + 2 colours (void, classes, edge) of the mask codec as one flat list r, g, b, r, ..."""
    b = next(b for b in range(2, 7) if b ** 3 >= classes + 2)
    step = round(255 / (b - 1))
    return [min(255, step * digit) for v in range(classes + 2) for digit in (v // b % b, v // b ** 2, v % b)]


# ---- raw data --------------------------------------------------------------------------------------------

def read(path, cheap=False):
    """The decoded picture at path, its raw size in .info; ValueError where it is unreadable or cut short.

    cheap: a JPEG is decoded at an eighth of its size: enough to see that it is whole.
    """
    try:
        with Image.open(path) as image:
            image.info = {"size": image.size}
            if cheap:
                image.draft("L", (1, 1))
            image.load()
            return image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: a whole picture was looked for, found none ({error}); unpack it again")


def views(label, instance):
    """Raw mask and instance picture (or None) -> (H, W) uint8 class ids and (H, W) uint8 instances (or None).

    The instance picture holds the class, 1 to 100, in R and a number that is its own within the image in G.
    """
    mask = read(label)
    if mask.mode not in ("L", "P"):
        raise ValueError(f"{label}: one channel of class ids was looked for, found {mask.mode} colours; take"
                         " the annotations of SceneParsing150 (ADEChallengeData2016)")
    ids = np.asarray(mask)
    if ids.max() > CLASSES:
        raise ValueError(f"{label}: class ids 0 to {CLASSES} were looked for, found {ids.max()}; take the"
                         " annotations of SceneParsing150 (ADEChallengeData2016)")
    if instance is None:
        return ids, None
    marked = read(instance)
    if marked.mode not in ("RGB", "RGBA") or marked.size != mask.size:
        raise ValueError(f"{instance}: RGB of size {mask.size} was looked for, found {marked.mode} of size"
                         f" {marked.size}; take annotations_instance of the same release")
    kinds, numbers = np.asarray(marked)[..., 0], np.asarray(marked)[..., 1]
    if kinds.max() > len(THINGS):
        raise ValueError(f"{instance}: classes 0 to {len(THINGS)} in R were looked for, found {kinds.max()};"
                         " take annotations_instance of the same release")
    own = (numbers > 0) & (np.array([0] + THINGS)[kinds] == ids)
    found, where = np.unique(np.where(own, numbers, 0), return_inverse=True)
    order = np.minimum(np.arange(len(found)) + (found[0] > 0), CROWD)  # 0 none, 1 to 254, then crowd
    rest = np.where(np.isin(ids, THINGS), CROWD, 0)
    return ids, np.where(own, order[where].reshape(ids.shape), rest).astype(np.uint8)


# ---- captions --------------------------------------------------------------------------------------------

def listed(words):
    return ", ".join(words[:-1]) + " and " + words[-1] if len(words) > 1 else "".join(words)


def one(name, k):
    """A class as people say it: things with an article ("an armchair"), stuff without ("grass")."""
    return name if k in STUFF or name in UNCOUNTED else ("an " if name[0] in "aeiou" else "a ") + name


def composed(name, scene, ids, classes):
    """Two captions of (H, W) class ids: the scene with its large classes, and with one to three of them."""
    size = np.bincount(ids.ravel(), minlength=CLASSES + 1)
    words = [one(classes[k - 1]["name"], k) for k in np.argsort(-size, kind="stable").tolist()
             if k and size[k] >= SEEN * ids.size]
    place = scene.replace("_", " ") if scene not in ("", "misc", "outliers") else "scene"
    place = ("an " if place[0] in "aeiou" else "a ") + place
    rng = random.Random(name)
    few = words[:rng.choice((1, 2, 3))]
    return [place + (f" with {listed(some)}" if some else "") for some in (words[:8], few)]


def caption_rows(data):
    """Parsed JSON -> (image name, caption or captions) for each entry; see caption_file."""
    for row in data if isinstance(data, list) else [data]:
        name = next((row[k] for k in ("file_name", "image", "name", "id") if k in row), None)
        said = next((row[k] for k in ("caption", "captions", "text") if k in row), None)
        yield from row.items() if name is None or said is None else [(name, said)]


def caption_file(path):
    """A captioner's file -> {image name without ending: [captions]}.

    JSON or JSONL of {name: caption or captions}, or of entries with the name under "file_name", "image",
    "name" or "id" and what is said under "caption", "captions" or "text".
    """
    captions = defaultdict(list)
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
        try:
            data = json.loads(text)
        except ValueError:
            data = [json.loads(line) for line in text.splitlines() if line.strip()]
        for name, said in caption_rows(data):
            stem = os.path.splitext(os.path.basename(str(name)))[0]
            lines = [" ".join(line.split()) for line in ([said] if isinstance(said, str) else said)]
            captions[stem] += filter(None, lines)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        captions = error
    if not captions or isinstance(captions, Exception):
        sys.exit(f"{path}: JSON or JSONL of image name -> caption was looked for, found"
                 f" {captions or 'none'}; write {{\"NAME.jpg\": \"a caption\", ...}}")
    return captions


# ---- pairs -----------------------------------------------------------------------------------------------

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


def shrunk(size, shorter):
    """(width, height) with the shorter side given; the size itself where None is."""
    return tuple(round(n * shorter / min(size)) for n in size) if shorter else size


def same_size(source, target, shorter):
    """-> [] where the pair in place has the size asked for now, else one error."""
    with Image.open(source) as raw, Image.open(target) as image:
        wanted, found = shrunk(raw.size, shorter), image.size
    return [] if found == wanted else [f"{target}: width, height {wanted} was looked for, found {found} of an"
                                       " earlier run; delete its folder or choose another --out"]


def made(job, classes, shorter):
    """A job (image, mask and instance path or None, scene, lines, folder) -> image, {kind: view}, lines."""
    source, label, instance, scene, lines, _ = job
    image = read(source, cheap=not shorter)
    ids, instances = views(label, instance)
    size, stem = image.info["size"], os.path.splitext(os.path.basename(source))[0]
    if size != ids.shape[::-1]:
        raise ValueError(f"{label}: width, height {size} of its image was looked for, found"
                         f" {ids.shape[::-1]}; take both from the same release")
    if shorter:
        image = image.convert("RGB").resize(shrunk(size, shorter), Image.LANCZOS)
    kinds = {"instances": instances, "masks": ids} if instances is not None else {"masks": ids}
    size = shrunk(size, shorter)
    kinds = {kind: Image.fromarray(view).resize(size, Image.NEAREST) for kind, view in kinds.items()}
    kinds["masks"].putpalette(palette(CLASSES))
    return image, kinds, lines or composed(stem, scene, ids, classes)


def pair(job, classes, shorter):
    """One job of made() -> its files in the folder, the image last. Returns a list of one-line errors.

    classes: the content of classes.json; shorter: the length to resize the shorter side to, or None to link
    the image. Of a pair in place only the captions are renewed.
    """
    source, _, _, _, lines, folder = job
    stem, ending = os.path.splitext(os.path.basename(source))
    target = os.path.join(folder, "images", stem + ending)
    try:
        whole = os.path.exists(target)
        if whole and same_size(source, target, shorter):
            return same_size(source, target, shorter)
        if not whole:
            image, kinds, lines = made(job, classes, shorter)
        if lines:
            put(os.path.join(folder, "captions", stem + ".txt"), partial(write_text, "\n".join(lines) + "\n"))
        if not whole:
            for kind, view in kinds.items():
                put(os.path.join(folder, kind, stem + ".png"), partial(view.save, format="PNG"))
            put(target, partial(image.save, format="JPEG", quality=95) if shorter else partial(link, source))
    except ValueError as error:
        return [str(error)]
    except OSError as error:
        return [f"{target}: cannot be written ({error}); free the disk or choose another --out"]
    return []


def names_in(folder, ending):
    """-> {name: path} of a folder's files with this ending; ends the program where there is none."""
    if not os.path.isdir(folder):
        sys.exit(f"{folder}: a folder of {ending} files was looked for, found none; give as --root the folder"
                 " ADEChallengeData2016, which holds images, annotations and objectInfo150.txt")
    files = sorted(f for f in os.listdir(folder) if f.endswith(ending))
    return {f[:-len(ending)]: os.path.join(folder, f) for f in files}


def raw_classes(root):
    """objectInfo150.txt -> the content of classes.json; a class goes by the first of its names."""
    path = os.path.join(root, "objectInfo150.txt")
    instances = os.path.isdir(os.path.join(root, "annotations_instance"))
    try:
        with open(path, encoding="utf-8") as file:
            rows = [line.split("\t") for line in file.read().splitlines()[1:] if line.strip()]
        classes = [{"name": row[-1].split(",")[0].strip(), "isthing": instances and int(row[0]) in THINGS,
                    "source_id": int(row[0])} for row in rows]
    except (OSError, ValueError) as error:
        sys.exit(f"{path}: the list of {CLASSES} classes was looked for, found none ({error}); give as --root"
                 " the folder ADEChallengeData2016")
    if [c["source_id"] for c in classes] != list(range(1, CLASSES + 1)):
        sys.exit(f"{path}: classes 1 to {CLASSES} were looked for, found {len(classes)}; unpack it again")
    return classes


def raw_split(root, part, captions):
    """training or validation -> [(image path, mask path, instance path or None, scene, caption lines)]."""
    images = names_in(os.path.join(root, "images", part), ".jpg")
    others = {"annotations": names_in(os.path.join(root, "annotations", part), ".png")}
    if os.path.isdir(os.path.join(root, "annotations_instance")):
        others["annotations_instance"] = names_in(os.path.join(root, "annotations_instance", part), ".png")
    for kind, found in others.items():
        for lost in sorted(images.keys() ^ found.keys())[:1]:
            has, lacks = ("images", kind) if lost in images else (kind, "images")
            sys.exit(f"{root}/{lacks}/{part}: {lost} was looked for, as {has} holds it, found none"
                     f" ({len(images)} images, {len(found)} {kind}); add it or delete the other")
    if not images:
        sys.exit(f"{root}/images/{part}: JPEG images were looked for, found none; unpack ADE20K again")
    scenes, path = {}, os.path.join(root, "sceneCategories.txt")
    if os.path.exists(path):
        try:
            with open(path, encoding="utf-8") as file:
                lines = [line.split(maxsplit=1) for line in file]
        except (OSError, ValueError) as error:
            sys.exit(f"{path}: lines of a name and a scene were looked for, found none ({error}); unpack it"
                     " again")
        scenes = dict(line for line in lines if len(line) == 2)
    composed = sum(not captions.get(name) for name in images)
    if composed:
        print(f"{part}: {composed} of {len(images)} images lack a caption: composed from class names")
    return [(path, others["annotations"][name], others.get("annotations_instance", {}).get(name),
             scenes.get(name, "").strip(), captions.get(name, [])) for name, path in images.items()]


def open_folder(folder, classes):
    """Make the empty pair folder, or clear a killed run's temporary files from the one in place -> what calls
    it whole: classes.json comes last, and without it no reader takes the folder.
    """
    path, text = os.path.join(folder, "classes.json"), json.dumps(classes, indent=1)
    try:
        if os.path.exists(path) and open(path, "rb").read() != text.encode():
            sys.exit(f"{path}: the classes of --root were looked for, found others; choose another --out")
        for kind in ("images", "masks", "captions", "instances")[:3 + any(c["isthing"] for c in classes)]:
            os.makedirs(os.path.join(folder, kind), exist_ok=True)
        for part in glob.glob(os.path.join(glob.escape(folder), ".*.part")):
            os.remove(part)
        return partial(put, path, partial(write_text, text))
    except OSError as error:
        sys.exit(f"{folder}: a folder to write in was looked for, found none ({error}); choose another --out")


def main():
    parser = argparse.ArgumentParser(description="ADE20K SceneParsing150 -> pair folders train, val")
    parser.add_argument("--root", required=True, help="the folder ADEChallengeData2016")
    parser.add_argument("--out", default=os.path.dirname(os.path.abspath(__file__)), help="(%(default)s)")
    parser.add_argument("--captions", help="JSON or JSONL of image name -> caption(s)")
    parser.add_argument("--size", type=int, metavar="N", help="resize shorter side (default: link images)")
    args = parser.parse_args()
    if args.size is not None and args.size < 1:
        sys.exit(f"--size: a positive number was looked for, found {args.size}")
    classes = raw_classes(args.root)
    captions = caption_file(args.captions) if args.captions else {}
    parts = {"train": "training", "val": "validation"}
    there = {s: p for s, p in parts.items() if os.path.isdir(os.path.join(args.root, "images", p))} or parts
    splits = {split: raw_split(args.root, part, captions) for split, part in there.items()}
    jobs, finish = [], []
    for split, found in splits.items():
        finish.append(open_folder(os.path.join(args.out, split), classes))
        jobs += [(*files, os.path.join(args.out, split)) for files in found]
    with Pool() as pool:
        done = pool.imap_unordered(partial(pair, classes=classes, shorter=args.size), jobs, chunksize=8)
        errors = sorted(sum(tqdm(done, "ade20k", len(jobs), unit=" pairs"), []))
    if errors:
        sys.exit(f"{errors[0]} ({len(errors)} of {len(jobs)} pairs could not be made; a new folder has no"
                 " classes.json before all are)")
    try:
        for write in finish:
            write()
    except OSError as error:
        sys.exit(f"{args.out}: cannot be written ({error}); free the disk or choose another --out")
    print(f"{args.out}: " + ", ".join(f"{split} {len(found)} pairs" for split, found in splits.items()))


if __name__ == "__main__":
    main()
