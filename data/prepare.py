"""Any folder of images and any folder of masks -> pair folders train and val.

Masks hold ids (palette or grey, of any depth) or colours (--colours); a mask is named like its image, or has
one ending more, the same for all: x_mask.png. All masks are read twice: first to find which ids or colours
occur, so that a mask that does not fit is refused before anything is written, then to write them. Look at
OUT/preview.png and at the table of class shares before you train: they show a wrong flag at a glance.

Above that stands what every data set's own prepare script shares: worker processes, the pairs of all splits,
files of captions.

Differs: no instances, so no class is a thing; the data sets' own scripts write them.
Reads:   IMAGES/*.{jpg,png}, MASKS/*.{png,bmp,gif,tif}
Writes:  OUT/{train,val}/{classes.json,images,masks,captions}, OUT/preview.png; images are linked
Needs:   data/pairs.py
Run:     python data/prepare.py --images DIR --masks DIR --out data/mine

Dimension key: H W pixels, K classes.
"""
import functools
import json
import os
import random
import re
import shutil
import signal
import sys
import unicodedata
from collections import Counter
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.pairs import (MAX_CLASSES, FlagParser, PairFolder, contact_sheet, count_classes, describe_classes,
                        header_size, list_files, number, open_picture, palette, picture_file, read_json,
                        read_text, read_values, remedy, remove_temporary, run, spread, to_rgb,
                        write_captions, write_json, write_pair, write_picture)


# ---- preparing, shared by all data sets --------------------------------------------------------------------

def run_jobs(work, jobs, processes=None):
    """Yield work(job) for every job, in their order, from worker processes.

    A job that ends in a ValueError or OSError yields nothing; the first such error is raised after the last
    job, with the number of them: one run finds all broken files.
    """
    errors = []
    processes = min(processes or os.cpu_count(), max(len(jobs), 1))
    # Ctrl-C reaches the workers too: they ignore it, and the pool ends them.
    with Pool(processes, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        results = pool.imap(work, jobs)
        for _ in jobs:
            try:
                yield next(results)
            except (ValueError, OSError) as error:
                errors.append(error)
    if errors:
        raise ValueError(f"{errors[0]} ({len(errors)} of {len(jobs)} failed)")


def prepare_splits(out, splits, classes, read, size=None):
    """Raw data -> the pair folders OUT/SPLIT. What is there already stays; a killed run goes on.

    splits   {split: [(image path, captions, *labels), ...]}: captions may be an empty list
    classes  the content of classes.json. It is written last, so that no reader takes a part for the set
    read     read(name, image, *labels) -> ids (H, W), instances (H, W) or None, captions for where there are
             none; called in worker processes
    size     None links the images; N resizes their shorter side, (H, W) both sides. Masks: by NEAREST
    """
    palette(len(classes))  # refuses too many classes
    folders = {Path(out) / split: jobs for split, jobs in splits.items()}
    for folder in folders:
        path = folder / "classes.json"
        if path.exists() and read_json(path) != classes:
            raise ValueError(f"{path}: lists other classes. Remove the folder or choose another")
        remove_temporary(folder)
    for split, jobs in splits.items():
        without = sum(not captions for _, captions, *_ in jobs)
        if without:
            old = (Path(out) / split / "captions").is_dir()
            print(f"{split}: {without} of {len(jobs)} images lack a caption. One is composed from class names"
                  f"{'; pairs that are there already keep theirs' if old else ''}")
    jobs = [(folder, *job) for folder, jobs in folders.items() for job in jobs]
    work = functools.partial(prepare_pair, read, size, len(classes))
    for _ in tqdm(run_jobs(work, jobs), total=len(jobs), unit=" pairs"):
        pass
    for folder in folders:
        write_json(folder / "classes.json", classes)
    print(f"{out}: " + ", ".join(f"{split} {len(jobs)} pairs" for split, jobs in splits.items()))


def prepare_pair(read, size, K, job):
    """Write one pair of prepare_splits. Where it is there already, only its captions are written."""
    folder, source, captions, *labels = job
    for path in (folder / "images" / source.name, folder / "images" / f"{source.stem}.png"):
        if path.exists():
            if header_size(path) != new_size(header_size(source), size):
                raise ValueError(f"{path}: prepared at another size. Remove the folder or choose another")
            if captions:
                write_captions(folder, source.stem, captions)
            return
    image = to_rgb(open_picture(source))
    ids, instances, composed = read(source.stem, image, *labels)
    if image.size != ids.shape[::-1]:
        raise ValueError(f"{source}: {image.width} x {image.height} pixels, its mask {ids.shape[1]} x "
                         f"{ids.shape[0]}. Take both from the same release")
    if size:
        image = image.resize(new_size(image.size, size), Image.Resampling.LANCZOS)
        ids, instances = (resize_ids(each, image.size) for each in (ids, instances))
    write_pair(folder, source.stem, image if size else source, ids, instances, captions or composed, K)


def new_size(size, wanted):
    """(width, height) of a resized picture. wanted: None for its own, N for the shorter side, or (H, W)."""
    if isinstance(wanted, int):
        return tuple(round(side * wanted / min(size)) for side in size)
    return wanted[::-1] if wanted else size


def resize_ids(ids, size):
    """(H, W) ids, or None, at another (width, height). Mixing neighbours would invent classes."""
    return ids if ids is None else np.asarray(Image.fromarray(ids).resize(size, Image.Resampling.NEAREST))


# ---- files of captions -------------------------------------------------------------------------------------

# Under which keys captioners write the name of an image, and its caption
NAME_KEYS = ("file_name", "filename", "image", "image_path", "img_path", "image_name", "img", "path", "name",
             "image_id", "id")
TEXT_KEYS = "caption", "captions", "text"
ENDINGS = ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"


def read_caption_file(path, files=()):
    """A captioner's JSON or JSONL file -> {image name without ending: [caption, ...]}.

    It holds {image name: caption or captions}, or a list of entries, each with a key of NAME_KEYS and one of
    TEXT_KEYS; COCO's own captions are such. Names without a caption are left out. Raises ValueError for
    anything else.

    files: {image id: file name}, for entries that name an image by its id. It overrides the list inside
           COCO's own files, whose names of 2014 differ from those of 2017
    """
    captions = {}
    try:
        for name, texts in caption_entries(read_text(path), files):
            texts = [texts] if isinstance(texts, str) else texts or []
            lines = [clean_text(text) for text in texts if text]
            captions.setdefault(image_name(name), []).extend(filter(None, lines))
        captions = {name: lines for name, lines in captions.items() if lines}
        if not captions:
            raise ValueError("it holds none")
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(f'{path}: not a file of captions ({error}). Write {{"NAME.jpg": "a caption", ...}}')
    return captions


def caption_entries(text, files):
    """The text of such a file and `files` -> (image name, caption or captions) of each entry."""
    try:
        data = json.loads(text)
    except ValueError:
        data = [json.loads(line) for line in text.split("\n") if line.strip()]
    if isinstance(data, dict) and "annotations" in data:  # COCO's own
        files = {image["id"]: image["file_name"] for image in data.get("images", ())} | dict(files)
        data = data["annotations"]
    by_id = {str(i): name for i, name in dict(files).items()}
    by_name = {image_name(name) for name in by_id.values()}
    for entry in data if isinstance(data, list) else [data]:
        name_key = next((key for key in NAME_KEYS if key in entry), None)
        text_key = next((key for key in TEXT_KEYS if key in entry), None)
        if name_key and text_key:
            name = entry[name_key]
            if name_key in ("image_id", "id"):
                name = by_id.get(str(name), name)
            yield name, entry[text_key]
        elif name_key or text_key:
            raise ValueError(f"an entry has the keys {', '.join(entry)}, but not one of "
                             f"{', '.join(TEXT_KEYS if name_key else NAME_KEYS)}")
        else:
            for name, texts in entry.items():  # a name, else an id
                if image_name(name) not in by_name:
                    name = by_id.get(name, name)
                yield name, texts


def image_name(path):
    """"C:\\photos\\a.b.JPG" -> "a.b": an image's name without folder and ending, accents in one way (NFC)."""
    name = str(path).replace("\\", "/").split("/")[-1]
    stem, ending = os.path.splitext(name)
    return unicodedata.normalize("NFC", stem if ending.lower() in ENDINGS else name)


def clean_text(text):
    """One line of text that can be written: half of an emoji, as cut JSON strings hold it, cannot."""
    return " ".join(re.sub("[\ud800-\udfff]", "\ufffd", text).split())


def check_captions(path, captions, names):
    """Raises ValueError unless a caption file names at least one of these images."""
    if captions and not captions.keys() & set(map(image_name, names)):
        raise ValueError(f"{path}: names none of the {len(names)} images. It has {min(captions)!r}, they "
                         f"have {min(names)!r}. Give the captions of these images")


def join_words(words):
    """["grass", "sky", "a road"] -> "grass, sky and a road"."""
    return ", ".join(words[:-1]) + " and " + words[-1] if len(words) > 1 else "".join(words)


def with_article(noun):
    """"old house" -> "an old house"."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


# ---- masks of any kind -------------------------------------------------------------------------------------

MASKS = ".png", ".bmp", ".gif", ".tif", ".tiff"
IMAGES = ".png", ".jpg", ".jpeg"
VOID_NAMES = "void", "unlabelled", "unlabeled"


def list_jobs(images, masks):
    """Two folders -> [(image path, mask path)], sorted by name. They may be one: JPEG photos, PNG masks."""
    for folder in (images, masks):
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder. Give a folder of pictures")
    same = images.samefile(masks)
    photos = list_files(images, IMAGES[1:] if same else IMAGES)
    if not photos:
        raise ValueError(f"{images}: no {'.jpg' if same else '.png or .jpg'} images. Give the folder that "
                         f"holds them, {'and one of masks alone' if same else 'not one above it'}")
    labels = {image_name(f"{name}.png"): path
              for name, path in list_files(masks, MASKS if same else MASKS + IMAGES[1:]).items()}
    ending = shared_ending([image_name(path.name) for path in photos.values()], labels)
    jobs = []
    for name, path in photos.items():
        mask = labels.pop(image_name(path.name) + ending, None)
        if mask is None:
            raise ValueError(f"{masks}: no mask {name}{ending}.png ({len(photos)} images). "
                             f"{remedy(masks, name + ending, MASKS)}")
        jobs.append((path, mask))
    if labels:
        raise ValueError(f"{masks}: {min(labels.values()).name} is the mask of no image ({len(photos)} "
                         f"images, {len(labels)} such masks). Give a folder with one mask per image")
    return jobs


def shared_ending(names, masks):
    """What masks are named beyond their images: "_mask" for x_mask.png beside x.jpg, "" for x.png."""
    endings = Counter()
    for i in spread(len(names), 50):
        endings.update(mask.removeprefix(names[i]) for mask in masks if mask.startswith(names[i]))
    return max(endings, key=lambda ending: (endings[ending], -len(ending)), default="")


def read_raw(path, coloured=False):
    """A mask -> (H, W) ids as they are in the file; with `coloured`, 65536 R + 256 G + B instead.

    Raises ValueError for a JPEG, which holds other values than were saved, and for colours without a table.
    """
    picture = open_picture(path)
    if picture.format == "JPEG":
        raise ValueError(f"{path}: a JPEG, which has changed the ids. Save masks as PNG, from where they "
                         "were made")
    if coloured and not picture.mode.startswith(("I", "F")):
        return np.asarray(picture.convert("RGB")).astype(np.int32) @ np.array([65536, 256, 1], np.int32)
    if picture.mode in ("RGB", "RGBA", "LA"):
        channels = np.asarray(picture.convert("RGB"))               # (H, W, 3)
        if (channels != channels[..., :1]).any():
            raise ValueError(f"{path}: holds colours, not ids. Say which colour is which class: --colours "
                             "TABLE")
        return channels[..., 0].astype(np.int32)                    # grey, saved in three channels
    holds_ids = picture.mode in ("P", "L", "1") or picture.mode.startswith("I")
    if coloured or not holds_ids:
        wanted = "colours" if coloured else "ids"
        raise ValueError(f"{path}: mode {picture.mode}, not {wanted}. Save it as a PNG of {wanted}")
    return read_values(picture, path)


def examine(coloured, job):
    """Check the sizes of one (image, mask) -> the mask's path, {id or colour in it: its colour as shown}."""
    image, path = job
    raw = read_raw(path, coloured)
    size = header_size(image)
    if size != raw.shape[::-1]:
        with picture_file(image) as picture:
            turned = picture.size == raw.shape[::-1]
        raise ValueError(f"{path}: {raw.shape[1]} x {raw.shape[0]} pixels, its image {size[0]} x {size[1]}"
                         f"{' when its EXIF orientation is heeded' if turned else ''}. Give both one size")
    with picture_file(path) as picture:
        shown = picture.getpalette() if picture.mode == "P" and not coloured else []
    return path, {value: tuple(shown[3 * value:3 * value + 3]) for value in np.unique(raw).tolist()}


def find_values(jobs, coloured):
    """-> {id or colour: the first mask that holds it}. Warns where one id has two colours."""
    found, colours, warning = {}, {}, ""
    work = functools.partial(examine, coloured)
    for path, values in tqdm(run_jobs(work, jobs), "reading masks", len(jobs), unit=" masks"):
        for value, colour in values.items():
            first = found.setdefault(value, path)
            if colours.setdefault(value, colour) != colour:
                warning = (f"Warning: {first.name} shows the id {value} as {colours[value]}, {path.name} as "
                           f"{colour}. If an editor has sorted the palettes, give --colours TABLE")
    if warning:
        print(warning)
    return found


# Three kinds of masks. Each function: what find_values found -> class names, {value in the file: class id}

def match_colours(found, path):
    """Classes by the colours of a table; names such as "void" become 0."""
    names, table = [], {}
    for name, (red, green, blue) in read_colours(path):
        code = 65536 * red + 256 * green + blue
        if code in table:
            raise ValueError(f"{path}: lists the colour {red}, {green}, {blue} twice. Remove one")
        is_void = name.lower() in VOID_NAMES
        names += [] if is_void else [name]
        table[code] = 0 if is_void else len(names)
    unknown = sorted(found.keys() - table.keys())
    if unknown:
        code = unknown[0]
        colour = f"{code >> 16}, {code >> 8 & 255}, {code & 255}"
        raise ValueError(f"{found[code]}: holds the colour {colour}, which {path} does not list "
                         f"({len(unknown)} such colours). Add it, named void where it is no class")
    return names, table


def match_binary(found, name, void):
    """0 is the background, which is a class too; 255 or 1 is the class `name`."""
    values = found.keys() - {void}
    if not (values <= {0, 1} or values <= {0, 255}):
        value = 255 if values <= {0, 1, 255} else min(values - {0, 255})
        advice = "If it means void, add --void 255" if value == 255 else "Save two values, without soft edges"
        raise ValueError(f"{found[value]}: holds the id {value}, where --binary expects 0 and 1, or 0 and "
                         f"255. {advice}")
    return ["background", name], {value: 1 + (value > 0) for value in values} | {void: 0}


def match_ids(found, zero_based, void, names):
    """Ids as they are, or one more where 0 is a class."""
    table = {value: value + zero_based for value in found.keys() - {void}}
    most = len(names) if names else MAX_CLASSES
    wrong = sorted(value for value, k in table.items() if not 0 <= k <= most)
    if wrong:
        value = wrong[-1]
        if table.keys() == {0, 255}:
            advice = "Add --binary NAME"
        elif wrong == [255]:
            advice = "If it means void, add --void 255"
        elif names:
            advice = f"Give the names of all ids, or --void {value} if that means void"
        else:
            few = len(table) <= MAX_CLASSES
            advice = "Number them 1, 2, 3 ..." if few else "Merge some classes, or save without soft edges"
        raise ValueError(f"{found[value]}: holds the id {value}, where {most} "
                         f"{'names are given' if names else 'classes are possible'}. {advice}")
    last = max(table.values(), default=0)
    if last == 0:
        advice = "Give --binary NAME instead" if void in found else "If 0 is a class, add --zero-based"
        raise ValueError(f"{min(found.values())}: this mask and all others are void. {advice}")
    return names or [f"class {k}" for k in range(1, last + 1)], table | {void: 0}


def read_colours(path):
    """A table of colours, JSON or label_colors.txt -> [(class name, (R, G, B)), ...]."""
    try:
        if path.suffix.lower() == ".json":
            entries = [(c["name"], c["color"]) for c in read_json(path)]
        else:
            lines = [line.split(maxsplit=3) for line in read_text(path).split("\n") if line.strip()]
            entries = [(name, [int(n) for n in colour]) for *colour, name in lines]
        right = entries and all(len(c) == 3 and all(type(n) is int and 0 <= n < 256 for n in c)
                                for _, c in entries)
        if not right:
            raise ValueError("a colour is three numbers, 0 to 255")
        return [(clean_text(name), colour) for name, colour in entries]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f'{path}: not a table of colours ({error}). Write [{{"name": "sky", "color": [0, 0, '
                         '255]}, ...], or lines of "0 0 255 sky" in a .txt')


def read_names(path):
    """A file of class names -> list: a name a line, or a JSON list of names or of {"name": ...}."""
    if path.suffix.lower() == ".json":
        content = read_json(path)
        names = [c.get("name") if isinstance(c, dict) else c for c in content]
        names = names if isinstance(content, list) else [None]
    else:
        names = read_text(path).strip().split("\n")
    if not all(isinstance(name, str) and name.strip() for name in names):
        raise ValueError(f"{path}: an entry is no name. Write one class per line, in the order of their ids")
    names = [clean_text(name) for name in names]
    for name in names:
        if name.lower() in VOID_NAMES:
            raise ValueError(f"{path}: {name} is no class. Leave it out, and give its id by --void")
        if names.count(name) > 1:
            raise ValueError(f"{path}: lists {name} twice. Give every class a name of its own")
    return names


# ---- the script --------------------------------------------------------------------------------------------

def read_labels(coloured, table, name, image, path):
    """A mask -> (H, W) uint8 class ids, no instances, no captions. table: {value in the file: class id}."""
    values = np.array(sorted(table))
    ids = np.array([table[value] for value in values.tolist()], np.uint8)
    return ids[np.searchsorted(values, read_raw(path, coloured))], None, []


def split_jobs(jobs, share, seed):
    """Jobs -> {"train": jobs, "val": jobs}, a share of them drawn for val, at least one."""
    count = round(share * len(jobs))
    if share > 0:
        count = max(count, 1)
    if count == len(jobs):
        raise ValueError(f"{len(jobs)} pair: too few for train and val. Add more, or give --val-share 0")
    chosen = set(random.Random(seed).sample(range(len(jobs)), count))
    splits = {"train": [job for i, job in enumerate(jobs) if i not in chosen],
              "val": [job for i, job in enumerate(jobs) if i in chosen]}
    return {split: jobs for split, jobs in splits.items() if jobs}


def write_preview(pairs, path, count=16, side=192):
    """A picture of some pairs with their masks, names and the colours of all classes."""
    colours, rows, names = palette(len(pairs.classes)), {"image": [], "mask": []}, []
    for i in spread(len(pairs), count):
        pair = pairs.read(i)
        image, mask = Image.fromarray(pair["image"]), Image.fromarray(colours[pair["ids"]])
        rows["image"].append(np.asarray(ImageOps.pad(image, (side, side), color="white")))
        nearest = Image.Resampling.NEAREST
        rows["mask"].append(np.asarray(ImageOps.pad(mask, (side, side), nearest, color="white")))
        names.append(clean_text(pairs.names[i]))
    title = f"{pairs.folder}: {len(names)} of {len(pairs)} pairs. Black is void"
    write_picture(path, contact_sheet(rows, names, pairs.classes, title))


def prepare(args):
    """Write both splits; all arguments as in main()."""
    if args.out.is_dir() and any(args.out.iterdir()):
        raise ValueError(f"{args.out}: not empty. Remove it, or choose another --out")
    jobs = list_jobs(args.images, args.masks)
    texts = read_caption_file(args.captions) if args.captions else {}
    check_captions(args.captions, texts, [image.name for image, _ in jobs])
    coloured = args.colours is not None
    found = find_values(jobs, coloured)
    if coloured:
        names, table = match_colours(found, args.colours)
    elif args.binary:
        names, table = match_binary(found, args.binary, args.void)
    else:
        listed = read_names(args.names) if args.names else []
        names, table = match_ids(found, args.zero_based, args.void, listed)
    table.pop(None, None)  # where there is no --void

    classes = [{"name": name, "isthing": False} for name in names]
    jobs = [(image, texts.get(image_name(image.name), []), mask) for image, mask in jobs]
    splits = split_jobs(jobs, args.val_share, args.seed)
    try:
        prepare_splits(args.out, splits, classes, functools.partial(read_labels, coloured, table))
        pairs = PairFolder(args.out / "train")
        write_preview(pairs, args.out / "preview.png")
    except BaseException:
        shutil.rmtree(args.out, ignore_errors=True)  # it was empty: all in it is from this run
        raise
    print(describe_classes(count_classes(pairs), classes))
    print(f"Look at {args.out / 'preview.png'}. If all is right: python train.py --data {args.out}")


def check_flags(args):
    """Raises ValueError for flags that contradict each other."""
    if args.colours and (args.binary or args.names or args.zero_based or args.void is not None):
        raise ValueError("--colours lists all names and void. Leave out --binary, --names, --zero-based and "
                         "--void")
    if args.binary and (args.names or args.zero_based):
        raise ValueError("--binary says what 0 and 1 or 255 are. Leave out --names and --zero-based")


def main(argv=None):
    parser = FlagParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="folder of images: .jpg or .png")
    parser.add_argument("--masks", type=Path, required=True,
                        help="folder of masks, named like their images: x.png, or x_mask.png and the like")
    parser.add_argument("--out", type=Path, required=True, help="new folder, such as data/mine")
    parser.add_argument("--zero-based", action="store_true", help="0 is a class (without it: 0 is void)")
    parser.add_argument("--void", type=number(int, 0), metavar="N", help="this id of the masks means void")
    parser.add_argument("--binary", metavar="NAME", help="0 is background, a class too; 1 or 255 is NAME")
    parser.add_argument("--colours", type=Path, metavar="TABLE",
                        help='masks hold colours: JSON [{"name": "sky", "color": [0, 0, 255]}, ...], or a '
                             'text file of lines "0 0 255 sky"; what is named void is no class')
    parser.add_argument("--names", type=Path, metavar="FILE",
                        help="class names in the order of the ids, one a line, or a JSON list (default: "
                             "class 1, class 2, ...)")
    parser.add_argument("--captions", help="JSON or JSONL of image name -> caption(s); see data/caption.py")
    parser.add_argument("--val-share", type=number(float, 0, 0.9), default=0.1,
                        help="share of the pairs that become val (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="draws val (default: %(default)s)")
    args = parser.parse_args(argv)
    check_flags(args)
    prepare(args)


if __name__ == "__main__":
    run(main)
