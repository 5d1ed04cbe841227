"""A pair folder (real, synthetic or predicted) -> COCO's panoptic JSON + PNG and instance JSON.

A (class, instance) pair is a segment, its id is class + 256 instance: R of the PNG is the class, G the
instance. Stuff is one segment a class; instance 255 is a crowd. What prepare.py read comes out as it went in.

Differs: An image whose name is no number has its name as id; a thing without an instance is one segment.
         Predictions come from `python train.py --eval-only --predictions FOLDER`, which keeps its instances
         with their scores in FOLDER/*/results/*.json: results.json, for pycocotools' loadRes, holds those.
         Without them it holds the instances of the pair folder, each with the score 1.
Reads:   FOLDER/{classes.json,masks} and, if there, FOLDER/{images,instances,results}
Writes:  OUT/{panoptic.json,panoptic/*.png,instances.json,results.json}, OUT = FOLDER/coco by default
Needs:   no sibling file
Run:     python data/coco/export.py data/coco/val
"""

import argparse
import glob
import json
import os
import shutil
import sys
import tempfile
from functools import partial
from multiprocessing import Pool

import numpy as np
from PIL import Image
from pycocotools import mask as rle
from tqdm import tqdm

CROWD = 255


def read(path):
    """A picture of ids -> (H, W) uint8; ValueError in one line where it is something else."""
    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: a whole picture was looked for, found none ({error}); make it again")
    if image.mode not in ("L", "P", "1", "I", "I;16"):
        raise ValueError(f"{path}: ids (a palette or grey PNG) were looked for, found {image.mode}; save ids")
    ids = np.array(image).astype(np.int64)
    if ids.min(initial=0) < 0 or ids.max(initial=0) > 255:
        raise ValueError(f"{path}: ids of 0 to 255 were looked for, found {ids.min()} to {ids.max()}; save"
                         " ids")
    return ids.astype(np.uint8)


def segments(ids, instances, classes):
    """(H, W) class ids and instances -> (H, W) segment ids, 0 void, and COCO's segments_info."""
    things = np.array([False] + [c["isthing"] for c in classes])
    ids = ids.astype(np.int32)
    codes = ids + 256 * np.where(things[ids], instances, 0).astype(np.int32)
    info = []
    for code, area in zip(*(n.tolist() for n in np.unique(codes[codes > 0], return_counts=True))):
        rows, columns = (np.flatnonzero((codes == code).any(axis)) for axis in (1, 0))
        box = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
        info.append({"id": code, "category_id": category(classes, code % 256), "area": area,
                     "bbox": [int(n) for n in box], "iscrowd": int(code // 256 == CROWD)})
    return codes, info


def category(classes, k):
    """The id of class k in the data set it comes from; k itself where there is none."""
    return classes[k - 1].get("source_id", k)


def regions(codes, info, classes):
    """The things among the segments as COCO's instance annotations, with RLE masks."""
    things = {category(classes, k + 1) for k, c in enumerate(classes) if c["isthing"]}
    for one in info:
        if one["category_id"] in things:
            mask = rle.encode(np.asfortranarray(codes == one["id"], dtype=np.uint8))
            mask["counts"] = mask["counts"].decode("ascii")
            yield {"category_id": one["category_id"], "segmentation": mask, "area": one["area"],
                   "bbox": one["bbox"], "iscrowd": one["iscrowd"]}


def export(name, folder, out, classes):
    """Write out/panoptic/NAME.png -> (width, height), segments_info, instance annotations; or an error."""
    mask, instance = (os.path.join(folder, kind, name + ".png") for kind in ("masks", "instances"))
    path = os.path.join(out, "panoptic", name + ".png")
    try:
        ids = read(mask)
        instances = read(instance) if os.path.isdir(os.path.dirname(instance)) else np.zeros_like(ids)
        if ids.shape != instances.shape:
            raise ValueError(f"{instance}: the size of its mask, {ids.shape}, was looked for, found"
                             f" {instances.shape}; make both again")
        if ids.max() > len(classes):
            raise ValueError(f"{mask}: ids up to the {len(classes)} of classes.json were looked for, found"
                             f" {ids.max()}; make the mask again or complete classes.json")
        codes, info = segments(ids, instances, classes)
        colours = np.stack([codes % 256, codes // 256, np.zeros_like(codes)], -1)   # R + 256 G + 65536 B
        Image.fromarray(colours.astype(np.uint8)).save(path, format="PNG")
        return ids.shape[::-1], info, list(regions(codes, info, classes))
    except ValueError as error:
        return str(error)
    except OSError as error:
        return f"{path}: cannot be written ({error}); free the disk or choose another --out"


def files(folder):
    """-> {name: file name} of a folder's pictures; nothing where there is no such folder."""
    found = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    return {os.path.splitext(f)[0]: f for f in found if not f.startswith(".")}


def open_folder(folder):
    """-> (classes, {name: image file name}) of a pair folder; ends the program where it is none."""
    path = os.path.join(folder, "classes.json")
    try:
        with open(path, encoding="utf-8") as file:
            classes = json.load(file)
        classes = [{"isthing": False, **c} for c in classes]
        assert all(isinstance(c["name"], str) and isinstance(c["isthing"], bool)
                   and isinstance(c.get("source_id", 0), int) for c in classes)
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        sys.exit(f"{path}: a list of {{\"name\", \"isthing\", \"source_id\"}} was looked for, found none"
                 f" ({error!r}); give a pair folder such as data/coco/val")
    images, masks, instances = (files(os.path.join(folder, k)) for k in ("images", "masks", "instances"))
    if not masks:
        sys.exit(f"{folder}/masks: PNG files were looked for, found none; give a pair folder such as"
                 " data/coco/val")
    for kind, found in (("images", images), ("instances", instances)):
        for lost in sorted(found.keys() ^ masks.keys())[:1] if found else []:
            has, lacks = (kind, "masks") if lost in found else ("masks", kind)
            sys.exit(f"{folder}/{lacks}: {lost} was looked for, as {has} holds it, found none; add it or"
                     " delete it from the other")
    return classes, {name: images.get(name, name + ".jpg") for name in masks}


def scored(folder, names):
    """{name: results with scores} that `train.py --predictions` kept; None where the folder has none."""
    folder, found, wanted = os.path.join(folder, "results"), {}, {"category_id", "segmentation", "score"}
    for name in names if os.path.isdir(folder) else ():
        path = os.path.join(folder, name + ".json")
        try:
            with open(path, encoding="utf-8") as file:
                found[name] = json.load(file)
            assert all(wanted <= one.keys() for one in found[name])
        except (OSError, ValueError, TypeError, AttributeError, AssertionError) as error:
            sys.exit(f"{path}: a list of {{\"category_id\", \"segmentation\", \"score\"}} was looked for,"
                     f" found none ({error!r}); predict again, or delete {folder}")
    return found or None


def write_json(data, path):
    with open(path, "w", encoding="utf-8") as file:
        json.dump(data, file)


def write_all(out, classes, names, found, said):
    """The three JSON files from {name: image file name}, what export() returned for each name, and what
    scored() returned.
    """
    keys = ("category_id", "bbox", "segmentation", "score")
    numbers = all(name.isdigit() for name in names) and len({int(name) for name in names}) == len(names)
    categories = [{"id": category(classes, k), "name": c["name"], "supercategory": c["name"],
                   "isthing": int(c["isthing"])} for k, c in enumerate(classes, 1)]
    images, panoptic, instances, results = [], [], [], []
    for (name, file), ((width, height), info, things) in zip(names.items(), found):
        image_id = int(name) if numbers else name
        images.append({"id": image_id, "file_name": file, "width": width, "height": height})
        panoptic.append({"image_id": image_id, "file_name": name + ".png", "segments_info": info})
        instances += [{"id": n, "image_id": image_id, **thing}
                      for n, thing in enumerate(things, len(instances) + 1)]
        sure = [{**thing, "score": 1.0} for thing in things if not thing["iscrowd"]]
        results += [{"image_id": image_id, **{key: one[key] for key in keys if key in one}}
                    for one in (said[name] if said else sure)]
    shared = {"info": {"description": "pair folder"}, "licenses": [], "images": images}
    things = [c for c in categories if c["isthing"]]
    for name, data in (("panoptic", {**shared, "annotations": panoptic, "categories": categories}),
                       ("instances", {**shared, "annotations": instances, "categories": things}),
                       ("results", results)):
        write_json(data, os.path.join(out, name + ".json"))
    return sum(len(one["segments_info"]) for one in panoptic), len(instances)


def main():
    parser = argparse.ArgumentParser(description="pair folder -> COCO's panoptic and instance formats")
    parser.add_argument("folder", help="pair folder: classes.json, masks, instances and images if there")
    parser.add_argument("--out", help="folder to write (default: FOLDER/coco)")
    args = parser.parse_args()
    out = args.out or os.path.join(args.folder, "coco")
    classes, names = open_folder(args.folder)
    said = scored(args.folder, names)
    try:
        os.makedirs(os.path.join(out, "panoptic"), exist_ok=True)
        for left in glob.glob(os.path.join(glob.escape(out), ".export*.part")):      # of a killed run
            shutil.rmtree(left)
        with tempfile.TemporaryDirectory(prefix=".export", suffix=".part", dir=out) as beside:
            os.mkdir(os.path.join(beside, "panoptic"))
            with Pool() as pool:
                work = partial(export, folder=args.folder, out=beside, classes=classes)
                found = list(tqdm(pool.imap(work, names, chunksize=8), "export", len(names), unit=" images"))
            errors = [one for one in found if isinstance(one, str)]
            if errors:
                sys.exit(f"{errors[0]} ({len(errors)} of {len(names)} images failed; nothing was exported)")
            segment_count, thing_count = write_all(beside, classes, names, found, said)
            for path in sorted(glob.glob(f"{glob.escape(beside)}/**/*.*", recursive=True)):
                os.replace(path, os.path.join(out, os.path.relpath(path, beside)))
    except OSError as error:
        sys.exit(f"{out}: a folder with room was looked for, found none ({error}); free the disk or choose"
                 " another --out")
    finally:
        for folder in (os.path.join(out, "panoptic"), out):
            if os.path.isdir(folder) and not os.listdir(folder):
                os.rmdir(folder)
    print(f"{out}: {len(names)} images, {segment_count} segments, {thing_count} of them things")


if __name__ == "__main__":
    main()
