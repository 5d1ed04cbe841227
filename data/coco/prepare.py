"""COCO panoptic (annotations + PNG) in the official layout -> pair folders train and val.

One folder serves all tasks: masks/ holds the semantic view (the 133 categories, whose ids have holes, as 1 to
133), instances/ tells the things apart, and a (class, instance) pair is a segment. A crowd is instance 255.
Captions are COCO's own, or those of any captioner (--captions), or are composed from what is in the picture.

Differs: things are numbered over the whole image; where more than 254 are in it, within each class, and
         beyond 254 of one class the smallest join its crowd.
Reads:   RAW/{train2017,val2017}/*.jpg, RAW/annotations/panoptic_{train2017,val2017}.json, their PNG files
         in a folder of the same name in RAW/annotations or RAW; RAW/annotations/captions_*.json if there
Writes:  OUT/{train,val}/{classes.json,images,masks,instances,captions}, by default beside this file
Needs:   no sibling file
Run:     python data/coco/prepare.py --root RAW
"""

import argparse
import glob
import json
import os
import random
import re
import shutil
import sys
from collections import Counter, defaultdict
from functools import partial
from multiprocessing import Pool

import numpy as np
from PIL import Image
from tqdm import tqdm

CROWD = 255
COUNTS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
PLURALS = {"person": "people", "sheep": "sheep", "knife": "knives", "mouse": "mice", "skis": "pairs of skis",
           "scissors": "pairs of scissors", "broccoli": "pieces of broccoli"}
PLAIN = {"skis": "skis", "scissors": "scissors", "broccoli": "broccoli", "window-blind": "window blind",
         "playingfield": "playing field"}
SEEN = 0.003        # stuff with a smaller share of the picture is not mentioned


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


def load_json(path):
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError) as error:
        sys.exit(f"{path}: a JSON file was looked for, found none ({error}); unpack it again")


def views(colours, segments, class_of, path):
    """(H, W, 3) panoptic colours and their segments -> (H, W) uint8 class ids and (H, W) uint8 instances.

    segments: COCO's segments_info, {"id", "category_id", "iscrowd"} each; class_of: category id -> (class id,
    isthing). Every pixel of a segment gets its class. Stuff has instance 0, a thing 1 to 254, a crowd 255.
    """
    if len({segment["id"] for segment in segments}) < len(segments):
        raise ValueError(f"{path}: each segment once was looked for in its JSON, found an id twice; take both"
                         " from the same release")
    ids = colours.astype(np.int32) @ np.array([1, 256, 256 ** 2], np.int32)
    found, where, areas = np.unique(ids, return_inverse=True, return_counts=True)
    info = {segment["id"]: segment for segment in segments}
    for lost, place in ((set(found) - {0} - set(info), "its JSON"), (set(info) - set(found), "the PNG")):
        if lost:
            raise ValueError(f"{path}: the same segments in PNG and JSON were looked for, found {len(lost)}"
                             f" (id {min(lost)}, ...) not in {place}; take both from the same release")
    kinds = {segment["id"]: class_of[segment["category_id"]] for segment in segments}
    things = [int(i) for i in found[np.argsort(-areas, kind="stable")]
              if i and kinds[i][1] and not info[i].get("iscrowd")]                   # largest first
    rank, instance = Counter(), {}
    for i in things:
        group = kinds[i][0] if len(things) >= CROWD else "all"
        rank[group] += 1
        instance[i] = min(rank[group], CROWD)
    classes = [kinds[i][0] if i else 0 for i in found.tolist()]
    numbers = [instance.get(i, CROWD if i and kinds[i][1] else 0) for i in found.tolist()]
    return (np.array(view, np.uint8)[where].reshape(ids.shape) for view in (classes, numbers))


# ---- captions --------------------------------------------------------------------------------------------

def listed(words):
    return ", ".join(words[:-1]) + " and " + words[-1] if len(words) > 1 else "".join(words)


def counted(name, count):
    """("dog", 1) -> "a dog"; ("bus", 3) -> "three buses"; ("person", 40) -> "many people"."""
    name = PLAIN.get(name, name)
    if count == 1:
        return name if name in PLAIN else ("an " if name[0] in "aeiou" else "a ") + name
    plural = PLURALS.get(name) or name + ("es" if name.endswith(("s", "x", "ch", "sh")) else "s")
    return (COUNTS[count] if count < len(COUNTS) else "many") + " " + plural


def stuff(name):
    """Stuff as people say it: "wall-brick" -> "brick wall", "sky-other-merged" -> "sky"."""
    parts = [part for part in name.split("-") if part not in ("other", "merged", "stuff")]
    return PLAIN.get(name, " ".join(reversed(parts)))


def composed(name, ids, instances, classes):
    """Two captions from the views of an image: its things by number, then its stuff; and a short one."""
    size, numbers = np.bincount(ids.ravel(), minlength=len(classes) + 1), defaultdict(set)
    for code in np.unique(ids.astype(np.int32) * 256 + instances).tolist():
        numbers[code // 256].add(code % 256)
    large = [k for k in np.argsort(-size).tolist() if k and size[k]]
    things = [counted(classes[k - 1]["name"], CROWD if CROWD in numbers[k] else len(numbers[k]))
              for k in large if classes[k - 1]["isthing"]]
    around = [stuff(classes[k - 1]["name"]) for k in large
              if not classes[k - 1]["isthing"] and size[k] >= SEEN * ids.size]
    around = list(dict.fromkeys(around))
    rng = random.Random(name)
    few = listed((things + around)[:rng.choice((1, 2, 3))] or ["a picture"])
    return [listed(things[:5]) + (" with " if things and around else "") + listed(around[:5]) or few, few]


def caption_rows(data):
    """Parsed JSON -> (image name, caption or captions) for each entry; see caption_file."""
    data = data.get("annotations", data) if isinstance(data, dict) else data
    for row in data if isinstance(data, list) else [data]:
        name = next((row[k] for k in ("file_name", "image", "name", "image_id") if k in row), None)
        said = next((row[k] for k in ("caption", "captions", "text") if k in row), None)
        yield from row.items() if name is None or said is None else [(name, said)]


def caption_file(path):
    """A captioner's file -> {image name without ending: [captions]}.

    JSON or JSONL of {name: caption or captions}, or of entries with the name under "file_name", "image",
    "name" or "image_id" and what is said under "caption", "captions" or "text". COCO's own captions
    are read too, and a bare number is padded to COCO's 12 digits.
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
            captions[stem.zfill(12) if stem.isdigit() else stem] += filter(None, lines)
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
    """A job (image path, PNG path, segments, lines, folder) -> image, ids, instances, caption lines."""
    source, label, segments, lines, _ = job
    image, mask = read(source, cheap=not shorter), read(label)
    size = image.info["size"]
    if size != mask.size:
        raise ValueError(f"{label}: width, height {size} of its image was looked for, found {mask.size}; take"
                         " both from the same release")
    if mask.mode not in ("RGB", "RGBA"):
        raise ValueError(f"{label}: panoptic colours (id = R + 256 G + 65536 B) were looked for, found mode"
                         f" {mask.mode}; take the PNG files of COCO's panoptic annotations")
    class_of = {c["source_id"]: (i + 1, c["isthing"]) for i, c in enumerate(classes)}
    if not (isinstance(segments, list) and all(
            isinstance(s, dict) and isinstance(s.get("id"), int) and isinstance(s.get("category_id"), int)
            for s in segments)):
        raise ValueError(f"{label}: segments with an id and a category_id were looked for in its JSON, found"
                         " others; unpack the annotations again")
    strange = {segment["category_id"] for segment in segments} - set(class_of)
    if strange:
        raise ValueError(f"{label}: known categories were looked for, found id {min(strange)}; take JSON"
                         " and PNG files from the same release")
    ids, instances = views(np.asarray(mask)[..., :3], segments, class_of, label)
    stem = os.path.splitext(os.path.basename(source))[0]
    lines = lines or composed(stem, ids, instances, classes)
    if shorter:
        image = image.convert("RGB").resize(shrunk(size, shorter), Image.LANCZOS)
    size = shrunk(size, shorter)
    ids, instances = (Image.fromarray(view).resize(size, Image.NEAREST) for view in (ids, instances))
    return image, ids, instances, lines


def pair(job, classes, shorter):
    """One job of made() -> its files in the folder, the image last. Returns a list of one-line errors.

    classes: the content of classes.json; shorter: the length to resize the shorter side to, or None to link
    the image. Of a pair in place only the captions are renewed.
    """
    source, _, _, lines, folder = job
    stem, ending = os.path.splitext(os.path.basename(source))
    target = os.path.join(folder, "images", stem + ending)
    try:
        whole = os.path.exists(target)
        if whole and same_size(source, target, shorter):
            return same_size(source, target, shorter)
        if not whole:
            image, ids, instances, lines = made(job, classes, shorter)
        if lines:
            put(os.path.join(folder, "captions", stem + ".txt"), partial(write_text, "\n".join(lines) + "\n"))
        if not whole:
            ids.putpalette(palette(len(classes)))
            put(os.path.join(folder, "instances", stem + ".png"), partial(instances.save, format="PNG"))
            put(os.path.join(folder, "masks", stem + ".png"), partial(ids.save, format="PNG"))
            put(target, partial(image.save, format="JPEG", quality=95) if shorter else partial(link, source))
    except ValueError as error:
        return [str(error)]
    except OSError as error:
        return [f"{target}: cannot be written ({error}); free the disk or choose another --out"]
    return []


def folder_of(*places):
    for place in places:
        if os.path.isdir(place):
            return place
    sys.exit(f"{places[0]}: a folder was looked for here or at {' or '.join(places[1:])}, found none; unpack"
             " the images and the panoptic annotations (both archives) of COCO there")


def raw_split(root, path, captions):
    """A panoptic JSON file -> (classes, [(image path, PNG path, segments, caption lines)])."""
    year = os.path.basename(path)[len("panoptic_"):-len(".json")]
    data = load_json(path)
    keys = [key for key, value in data.items() if value] if isinstance(data, dict) else []
    if not {"images", "annotations", "categories"} <= set(keys):
        sys.exit(f"{path}: images, annotations and categories were looked for, found {keys}; take the"
                 " panoptic annotations of COCO")
    for part, fields in (("images", {"id": int, "file_name": str}),
                         ("categories", {"id": int, "name": str, "isthing": int}),
                         ("annotations", {"image_id": int, "file_name": str, "segments_info": list})):
        if not isinstance(data[part], list) or not all(
                isinstance(one, dict) and all(isinstance(one.get(key), kind) for key, kind in fields.items())
                for one in data[part]):
            sys.exit(f"{path}: {part} with {', '.join(fields)} were looked for, found others; take the"
                     " panoptic annotations of COCO")
        twice = [i for i, n in Counter(one[next(iter(fields))] for one in data[part]).items() if n > 1]
        if twice:
            sys.exit(f"{path}: each of {part} once was looked for, found {twice[0]} twice; unpack it again")
    pngs = folder_of(path[:-len(".json")], os.path.join(root, f"panoptic_{year}"))
    photos = folder_of(os.path.join(root, year), os.path.join(root, "images", year))
    names = {image["id"]: image["file_name"] for image in data["images"]}
    marked = {one["image_id"]: one for one in data["annotations"]}
    for lost in sorted(names.keys() ^ marked.keys())[:1]:
        sys.exit(f"{path}: an image and an annotation for each id were looked for, found only an"
                 f" {'image' if lost in names else 'annotation'} for {lost}; unpack it again")
    for wanted, folder in ((set(names.values()), photos), ({m["file_name"] for m in marked.values()}, pngs)):
        lost = sorted(wanted - set(os.listdir(folder)))
        if lost:
            sys.exit(f"{folder}: {len(wanted)} files named in {path} were looked for, {len(lost)} not found"
                     f" ({lost[0]}, ...); unpack them again")
    classes = [{"name": c["name"], "isthing": bool(c["isthing"]), "source_id": c["id"]}
               for c in sorted(data["categories"], key=lambda c: c["id"])]
    official = os.path.join(root, "annotations", f"captions_{year}.json")
    said = captions or (caption_file(official) if os.path.exists(official) else {})
    lines = {i: said.get(os.path.splitext(name)[0], []) for i, name in names.items()}
    composed = sum(not found for found in lines.values())
    if composed:
        print(f"{year}: {composed} of {len(names)} images lack a caption: composed from class names")
    return classes, [(os.path.join(photos, names[i]), os.path.join(pngs, marked[i]["file_name"]),
                      marked[i]["segments_info"], lines[i]) for i in sorted(names)]


def open_folder(folder, classes):
    """Make the empty pair folder, or clear a killed run's temporary files from the one in place -> what calls
    it whole: classes.json comes last, and without it no reader takes the folder.
    """
    path, text = os.path.join(folder, "classes.json"), json.dumps(classes, indent=1)
    try:
        if os.path.exists(path) and open(path, "rb").read() != text.encode():
            sys.exit(f"{path}: the classes of --root were looked for, found others; choose another --out")
        for kind in ("images", "masks", "instances", "captions"):
            os.makedirs(os.path.join(folder, kind), exist_ok=True)
        for part in glob.glob(os.path.join(glob.escape(folder), ".*.part")):
            os.remove(part)
        return partial(put, path, partial(write_text, text))
    except OSError as error:
        sys.exit(f"{folder}: a folder to write in was looked for, found none ({error}); choose another --out")


def main():
    parser = argparse.ArgumentParser(description="COCO panoptic (official layout) -> pair folders train, val")
    parser.add_argument("--root", required=True, help="the folder that holds annotations, train2017, val2017")
    parser.add_argument("--out", default=os.path.dirname(os.path.abspath(__file__)), help="(%(default)s)")
    parser.add_argument("--captions", help="JSON or JSONL: image name -> caption(s), not COCO's")
    parser.add_argument("--size", type=int, metavar="N", help="resize shorter side (default: link images)")
    args = parser.parse_args()
    if args.size is not None and args.size < 1:
        sys.exit(f"--size: a positive number was looked for, found {args.size}")
    looked = os.path.join(args.root, "annotations", "panoptic_*.json")
    files = [f for f in sorted(glob.glob(looked)) if re.search(r"panoptic_(train|val)\d*\.json$", f)]
    if not files:
        sys.exit(f"{looked}: panoptic_train2017.json or panoptic_val2017.json was looked for, found none;"
                 " give as --root the folder that holds COCO's annotations, train2017 and val2017")
    captions = caption_file(args.captions) if args.captions else {}
    names = [re.search("train|val", os.path.basename(file))[0] for file in files]
    splits = {name: raw_split(args.root, file, captions) for name, file in zip(names, files)}
    classes = next(iter(splits.values()))[0]
    if any(other != classes for other, _ in splits.values()):
        sys.exit(f"{looked}: the same categories in each were looked for, found others; take one release")
    if len(classes) > 214:
        sys.exit(f"{files[0]}: up to 214 categories were looked for, found {len(classes)}; masks have 8 bits")
    jobs, finish = [], []
    for split, (_, found) in splits.items():
        finish.append(open_folder(os.path.join(args.out, split), classes))
        jobs += [(*files, os.path.join(args.out, split)) for files in found]
    with Pool() as pool:
        done = pool.imap_unordered(partial(pair, classes=classes, shorter=args.size), jobs, chunksize=8)
        errors = sorted(sum(tqdm(done, "coco", len(jobs), unit=" pairs"), []))
    if errors:
        sys.exit(f"{errors[0]} ({len(errors)} of {len(jobs)} pairs could not be made; a new folder has no"
                 " classes.json before all are)")
    try:
        for write in finish:
            write()
    except OSError as error:
        sys.exit(f"{args.out}: cannot be written ({error}); free the disk or choose another --out")
    print(f"{args.out}: " + ", ".join(f"{split} {len(found)} pairs" for split, (_, found) in splits.items()))


if __name__ == "__main__":
    main()
