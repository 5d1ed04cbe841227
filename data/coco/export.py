"""A pair folder (real, synthetic or predicted) -> COCO's panoptic JSON + PNG and instance JSON.

A (class, instance) pair is a segment, its id is class + 256 instance: R of the PNG is the class, G the
instance. Stuff is one segment a class; instance 255 is a crowd. What prepare.py read comes out as it went in.

Differs: An image whose name is no number has its name as id; a thing without an instance is one segment.
         Predictions come from `python train.py --eval-only --predictions FOLDER`, which keeps its instances
         with their scores in FOLDER/*/results/*.json: results.json, for pycocotools' loadRes, holds those.
         Without them it holds the instances of the pair folder, each with the score 1.
Reads:   FOLDER/{classes.json,masks} and, if there, FOLDER/{images,instances,results}
Writes:  OUT/{panoptic.json,panoptic/*.png,instances.json,results.json}, OUT = FOLDER/coco by default
Needs:   data/prepare.py, data/pairs.py
Run:     python data/coco/export.py data/coco/val
"""
import contextlib
import functools
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
from pycocotools import mask as rle
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.pairs import (CROWD, FlagParser, category, image_id, list_partners, read_classes, read_ids,
                        read_json, run, write_picture, write_text)
from data.prepare import run_jobs

RESULT_FIELDS = ("category_id", "bbox", "segmentation", "score")


# ---- one image ---------------------------------------------------------------------------------------------

def export_image(folder, classes, target, name):
    """Write TARGET/panoptic/NAME.png -> (width, height), segments_info, instance annotations."""
    ids = read_ids(folder / "masks" / f"{name}.png", len(classes))
    instances = np.zeros_like(ids)
    if (folder / "instances").is_dir():
        instances = read_ids(folder / "instances" / f"{name}.png", 255, ids.shape)
    codes, info = list_segments(ids, instances, classes)
    colours = np.stack([codes % 256, codes // 256, np.zeros_like(codes)], -1)       # (H, W, 3)
    write_picture(target / "panoptic" / f"{name}.png", colours.astype(np.uint8))
    return ids.shape[::-1], info, list_instances(codes, info, classes)


def list_segments(ids, instances, classes):
    """(H, W) class ids and instances -> (H, W) segment ids, 0 void, and COCO's segments_info."""
    isthing = np.array([False] + [c["isthing"] for c in classes])
    codes = ids.astype(np.int32) + 256 * np.where(isthing[ids], instances, 0).astype(np.int32)
    values, areas = np.unique(codes[codes > 0], return_counts=True)
    info = []
    for code, area in zip(values.tolist(), areas.tolist()):
        rows = np.flatnonzero((codes == code).any(1))
        columns = np.flatnonzero((codes == code).any(0))
        box = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
        info.append({"id": code, "category_id": category(classes, code % 256), "area": area,
                     "bbox": [int(n) for n in box], "iscrowd": int(code // 256 == CROWD)})
    return codes, info


def list_instances(codes, info, classes):
    """The things among the segments as COCO's instance annotations, with RLE masks."""
    annotations = []
    for segment in info:
        if classes[segment["id"] % 256 - 1]["isthing"]:
            mask = rle.encode(np.asfortranarray(codes == segment["id"], dtype=np.uint8))
            mask["counts"] = mask["counts"].decode("ascii")
            annotations.append({"category_id": segment["category_id"], "segmentation": mask,
                                "area": segment["area"], "bbox": segment["bbox"],
                                "iscrowd": segment["iscrowd"]})
    return annotations


# ---- the folder --------------------------------------------------------------------------------------------

def list_images(folder):
    """{name: image file name} for all masks of a pair folder. Predictions may have masks without images."""
    folders = {folder / "masks": (".png",)}
    if (folder / "instances").is_dir():
        folders[folder / "instances"] = (".png",)
    has_images = any(folder.glob("images/[!.]*"))
    if has_images:
        folders[folder / "images"] = (".png", ".jpg", ".jpeg")
    files = dict(zip(folders, list_partners(folders)))
    names = files[folder / "masks"]
    if not names:
        raise ValueError(f"{folder / 'masks'}: no PNG files. Give a pair folder such as data/coco/val")
    if has_images:
        return {name: files[folder / "images"][name].name for name in names}
    return {name: f"{name}.jpg" for name in names}


def read_results(folder, names):
    """{name: results with scores} that `train.py --predictions` keeps; None where the folder has none."""
    if not (folder / "results").is_dir():
        return None
    return {name: read_json(folder / "results" / f"{name}.json") for name in names}


def image_ids(names):
    """{name: id}: the number that a name is; the names themselves where one is no number, or two are one."""
    ids = {name: image_id(name) for name in names}
    numbers = {i for i in ids.values() if isinstance(i, int)}
    return ids if len(numbers) == len(names) else {name: name for name in names}


def write_annotations(target, classes, images, exported, results):
    """Write the three JSON files -> the numbers of segments and of things.

    images and results: as list_images and read_results return them; exported: what export_image returned
    """
    ids = image_ids(images)
    records, panoptic, instances, scored = [], [], [], []
    for (name, file), ((width, height), info, things) in zip(images.items(), exported):
        key = {"image_id": ids[name]}
        records.append({"id": ids[name], "file_name": file, "width": width, "height": height})
        panoptic.append(key | {"file_name": f"{name}.png", "segments_info": info})
        instances += [{"id": n} | key | thing for n, thing in enumerate(things, len(instances) + 1)]
        perfect = [thing | {"score": 1.0} for thing in things if not thing["iscrowd"]]
        for found in results[name] if results else perfect:
            scored.append(key | {field: found[field] for field in RESULT_FIELDS if field in found})

    categories = [{"id": category(classes, k), "name": c["name"], "supercategory": c["name"],
                   "isthing": int(c["isthing"])} for k, c in enumerate(classes, 1)]
    things = [c for c in categories if c["isthing"]]
    shared = {"info": {"description": "pair folder"}, "licenses": [], "images": records}
    files = {"panoptic": shared | {"annotations": panoptic, "categories": categories},
             "instances": shared | {"annotations": instances, "categories": things},
             "results": scored}
    for name, content in files.items():
        write_text(target / f"{name}.json", json.dumps(content))
    return sum(len(each["segments_info"]) for each in panoptic), len(instances)


def export(folder, out):
    """Export a pair folder. All files are written beside and moved: a failure leaves an earlier export."""
    classes = read_classes(folder)
    images = list_images(folder)
    results = read_results(folder, images)
    target = out / ".unfinished"
    shutil.rmtree(target, ignore_errors=True)               # a killed run may have left it
    try:
        work = functools.partial(export_image, folder, classes, target)
        exported = list(tqdm(run_jobs(work, list(images)), "export", len(images), unit=" images"))
        segments, things = write_annotations(target, classes, images, exported, results)
        (out / "panoptic").mkdir(exist_ok=True)
        for path in (*target.glob("*/*.png"), *target.glob("*.json")):
            os.replace(path, out / path.relative_to(target))
    finally:
        shutil.rmtree(target, ignore_errors=True)
        with contextlib.suppress(OSError):
            out.rmdir()                                     # where nothing is in it
    print(f"{out}: {len(images)} images, {segments} segments, {things} of them things")


def main(argv=None):
    parser = FlagParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a pair folder; it may lack images and instances")
    parser.add_argument("--out", type=Path, help="folder to write (default: FOLDER/coco)")
    args = parser.parse_args(argv)
    export(args.folder, args.out or args.folder / "coco")


if __name__ == "__main__":
    run(main)
