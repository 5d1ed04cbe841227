"""The pair folder: the one format in which images with masks lie on disk, real and synthetic alike.

    data/coco/train/
      classes.json                 [{"name": "person", "isthing": true}, ...]; class id = position + 1
      images/000000000009.jpg      or .jpeg, .png
      masks/000000000009.png       palette PNG, same size: pixel = class id, 0 = unlabelled
      instances/000000000009.png   only where the data has instances: 0 none, 1..254 an instance, 255 a crowd
      captions/000000000009.txt    one caption a line; without one, class names stand in for it

All that reads, checks or writes it stands here: the stages, the prepare scripts and the benchmarks use it.
A folder is checked when it is opened (names, partners, classes.json) and a file when it is read (mode, size,
ids). Below that stands what every script shares: the atomic write, pictures to look at, types of flags, and
`run`, which ends a script in one line where its user made a mistake.

Paper:  SegGen (2311.03355). The palette is measured in the authors' published pictures: ADE20K's wall is
        (0, 0, 51), building (0, 0, 102), ceiling (51, 0, 0); COCO's edge has the code 134.
Reads:  data/NAME/{train,val,...} or any folder of that layout.   Writes: pair folders, pictures.
Needs:  no sibling file (to make the built-in data, data/shapes/prepare); numpy and Pillow.

    from data.pairs import PairFolder
    pairs = PairFolder("data/shapes/train")
    pairs.read(0)["ids"]           # (H, W) uint8 class ids of the first pair

Dimension key: H W pixels, K classes.
"""
import argparse
import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
import unicodedata
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.sharedctypes import RawArray
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps

ROOT = Path(__file__).resolve().parent.parent      # the project
MAX_CLASSES = 214                                  # 6 x 6 x 6 colours, less void and edge
CROWD = 255                                        # the instance number of a crowd region
KEEP_BYTES = 2e9                                   # sets up to this size stay in memory, decoded
CHANNELS = {"image": 3, "ids": 1, "instances": 1}  # what a pair consists of
FONT = ImageFont.load_default(12)


# ---- colours -----------------------------------------------------------------------------------------------

def palette_levels(K):
    """The base b of the palette of K classes, and the step between two of the b levels of a channel."""
    base = next(b for b in range(2, 7) if b ** 3 >= K + 2)
    return base, round(255 / (base - 1))


def palette(K):
    """The colours of K classes: (K + 2, 3) uint8 for the codes 0 void, 1..K classes, K + 1 edge.

    A code is written in base b, the smallest with b^3 >= K + 2, and its three digits become green, red and
    blue. Raises ValueError for more than 214 classes. Paper [D].
    """
    if not 1 <= K <= MAX_CLASSES:
        raise ValueError(f"{K} classes: the palette has colours for 1 to {MAX_CLASSES}. Merge or remove some")
    base, step = palette_levels(K)
    code = np.arange(K + 2)
    green, red, blue = code // base ** 2, code // base % base, code % base
    return np.minimum(step * np.stack([red, green, blue], 1), 255).astype(np.uint8)


def outline(ids, instances, K, width=1):
    """(H, W) class ids and instances -> codes. A pixel whose right or lower neighbour belongs to another
    segment becomes edge. width: of the edges in pixels, odd; they grow to both sides."""
    segment = ids.astype(np.int64) * 256 + instances
    edge = np.zeros(ids.shape, bool)
    edge[:, :-1] |= segment[:, :-1] != segment[:, 1:]
    edge[:-1] |= segment[:-1] != segment[1:]
    for _ in range(width // 2):  # a pixel more on every side
        edge = np.pad(edge, 1)
        edge = edge[:-2] | edge[1:-1] | edge[2:]
        edge = edge[:, :-2] | edge[:, 1:-1] | edge[:, 2:]
    return np.where(edge, K + 1, ids).astype(np.uint8)


# ---- reading -----------------------------------------------------------------------------------------------

def read_text(path):
    """A UTF-8 file's text, without Windows' byte order mark, every line end as "\\n". Raises ValueError."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}). Save it as UTF-8")
    except (FileNotFoundError, IsADirectoryError):
        raise ValueError(f"{path}: no such file")


def read_json(path):
    """The content of a JSON file. Raises ValueError with the path if it is not JSON."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not a JSON file ({error}). Repair it or make it again")


def read_classes(folder):
    """FOLDER/classes.json -> [{"name": str, "isthing": bool, ...}], a list of 1 to 214 classes."""
    path = Path(folder) / "classes.json"
    if not path.is_file():
        raise ValueError(f"{path}: no such file. Write it, or run the data set's prepare.py to its end")
    classes = read_json(path)
    right = isinstance(classes, list) and all(
        isinstance(c, dict) and isinstance(c.get("name"), str) and isinstance(c.get("isthing", False), bool)
        for c in classes)
    if not right:
        raise ValueError(f'{path}: not a list of {{"name": "sky", "isthing": false}}, one for each class. '
                         "Write it so")
    if not 1 <= len(classes) <= MAX_CLASSES:
        raise ValueError(f"{path}: {len(classes)} classes; 1 to {MAX_CLASSES} are possible. Merge some")
    return [c | {"isthing": c.get("isthing", False)} for c in classes]


def check_classes(found, expected, where, advice="Use data and weights of the same classes"):
    """Raises ValueError unless two lists of classes have the same names in the same order."""
    names = [c["name"] for c in found]
    wanted = [c["name"] for c in expected]
    for k, (name, other) in enumerate(itertools.zip_longest(names, wanted, fillvalue="missing"), 1):
        if name != other:
            counts = f" ({len(names)} classes instead of {len(wanted)})" if len(names) != len(wanted) else ""
            raise ValueError(f"{where}: class {k} is {name}, where {other} was expected{counts}. {advice}")


def has_left_or_right(classes):
    """Whether a class is named for its side ("left shoe"): labels of a mirrored picture would be wrong."""
    return any({"left", "right"} & set(re.findall("[a-z]+", c["name"].lower())) for c in classes)


def list_names(folder, endings):
    """{name without ending: file name} of a folder's files with one of these endings, sorted, none hidden."""
    files = {}
    listed = os.listdir(folder) if os.path.isdir(folder) else []
    for file in sorted(listed, key=lambda file: file.rpartition(".")):  # by name, then by ending
        name, dot, ending = file.rpartition(".")
        if dot + ending.lower() not in endings or file.startswith("."):
            continue
        if name in files:
            raise ValueError(f"{folder}: {files[name]} and {file} have one name. Remove one")
        files[name] = file
    return files


def list_files(folder, endings):
    """`list_names` with paths: {name without ending: path}. A path takes ten times the memory of a name."""
    return {name: Path(folder, file) for name, file in list_names(folder, endings).items()}


def list_partners(folders, list_folder=list_files):
    """{folder: endings} -> [{name: path}, ...], one for each folder.

    list_folder: list_names gives names of files instead of paths. Raises ValueError unless all folders hold
    the same names.
    """
    listing = {folder: list_folder(folder, endings) for folder, endings in folders.items()}
    first, *others = listing
    for other in others:
        for name in sorted(listing[first].keys() ^ listing[other].keys()):
            lacks, has = (other, first) if name in listing[first] else (first, other)
            raise ValueError(f"{lacks}: {name} is missing, which {has} holds ({len(listing[lacks])} and "
                             f"{len(listing[has])} files). {remedy(lacks, name, folders[lacks])}")
    return list(listing.values())


def remedy(folder, name, endings):
    """What to do where a folder has no file of this name with one of these endings."""
    for path in sorted(Path(folder).glob("[!.]*")):
        if path.stem == name:
            return f"{path.name} is there: save it as {endings[0]}" + (
                ", from where it was made: a JPEG has changed the ids" if ".jpg" not in endings else "")
        if unicodedata.normalize("NFC", path.stem) == unicodedata.normalize("NFC", name):
            return f"Rename {ascii(path.stem)} to {ascii(name)}: its accents are stored in another way"
    return "Add it, or remove its partner"


def list_pairs(folder, masks=True):
    """The names of a pair folder's image files, sorted without endings: the order of "the first N pairs".

    With masks, every image must have its mask (and its instance map, where there are any) and the other way
    round. Raises ValueError.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder. Prepare or sample this set first")
    if unfinished(folder).exists():
        raise ValueError(f"{folder}: only a part of this set is there. Run again what makes it")
    folders = {folder / "images": (".png", ".jpg", ".jpeg")}
    if masks:
        folders[folder / "masks"] = (".png",)
    if masks and (folder / "instances").is_dir():
        folders[folder / "instances"] = (".png",)
    images = list_partners(folders, list_names)[0]
    if not images:
        raise ValueError(f"{folder / 'images'}: no .png or .jpg images. Prepare or sample this set first")
    return list(images.values())


@contextlib.contextmanager
def picture_file(path):
    """Open a picture file -> a PIL picture, not decoded. Raises ValueError where it is none or cut short."""
    try:
        with Image.open(path) as picture:
            yield picture
    except FileNotFoundError:
        moved = ". It is a link: put the file back that it points to" if Path(path).is_symlink() else ""
        raise ValueError(f"{path}: no such file{moved}")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable picture ({error}). Replace it")


def open_picture(path):
    """A decoded PIL picture."""
    with picture_file(path) as picture:
        picture.load()
        return picture


def header_size(path):
    """(width, height) of a picture held upright, without decoding it."""
    with picture_file(path) as picture:
        exif = picture.getexif() if "exif" in picture.info else {}  # it would decode a PNG to look for it
        turned = exif.get(ExifTags.Base.Orientation, 1) > 4         # by 90 degrees
        return picture.size[::-1] if turned else picture.size


def some_sizes(paths, most=500):
    """(width, height) of up to `most` pictures, evenly apart, by their headers -> list."""
    return [header_size(paths[i]) for i in spread(len(paths), most)]


def to_rgb(picture):
    """A PIL picture of any mode -> upright RGB. PIL's own conversion would clip 16-bit grey to white."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):
        picture = Image.fromarray((np.asarray(picture).clip(0, 65535) >> 8).astype(np.uint8))
    return picture.convert("RGB")


def read_values(picture, path):
    """The ids of an opened picture as they are in its file, (H, W) int64."""
    ids = np.array(picture).astype(np.int64)
    if picture.mode == "L" and picture.format == "PNG":
        with open(path, "rb") as file:
            bits = file.read(25)[24]  # a pixel, by the header
        if bits in (2, 4):  # Pillow has scaled these up to 255
            ids //= 255 // (2 ** bits - 1)
    return ids


def read_ids(path, most, size=None):
    """A mask or instance PNG -> (H, W) uint8 ids, 0 to `most`.

    size: the (H, W) of its image. Raises ValueError where it differs, where the file holds colours instead of
    ids, or an id over `most` (the number of classes; 255 for instances).
    """
    mask = open_picture(path)
    if mask.format == "JPEG":
        raise ValueError(f"{path}: a JPEG, which changes ids. Save it as PNG, from where it was made")
    if mask.mode not in ("P", "L", "1", "I", "I;16"):
        raise ValueError(f"{path}: holds colours (mode {mask.mode}), not ids. Save ids as a palette or grey "
                         "PNG")
    ids = read_values(mask, path)
    if size is not None and ids.shape != tuple(size):
        raise ValueError(f"{path}: {ids.shape[1]} x {ids.shape[0]} pixels, its image {size[1]} x {size[0]}. "
                         "Give both the same size")
    if ids.min(initial=0) < 0 or ids.max(initial=0) > most:
        wrong = ids.min() if ids.min() < 0 else ids.max()
        advice = "Repair the mask, or add the class to classes.json"
        if wrong == 255:
            advice = ("If it means void, see: python data/prepare.py --void 255; if the masks are 0 and 255: "
                      "--binary NAME")
        raise ValueError(f"{path}: holds the id {wrong}, where 0 to {most} are possible. {advice}")
    return ids.astype(np.uint8)


def read_captions(folder, name):
    """The lines of captions/NAME.txt; an empty list where there are none."""
    path = Path(folder) / "captions" / f"{name}.txt"
    lines = read_text(path).split("\n") if path.is_file() else []
    return [line.strip() for line in lines if line.strip()]


@functools.cache
def print_once(text):
    print(text)


class FileNames(Sequence):
    """An array of file names, as bytes -> the sequence of what make(name) returns, made when it is read.

    A list of a million strings or paths takes 100 to 500 MB, and again as much in every worker process: to
    read an object changes its count of references, which copies the memory that the processes share.
    """

    def __init__(self, files, make):
        self.files, self.make = files, make

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        return self.make(os.fsdecode(self.files[i]))


def without_ending(file):
    return file.rpartition(".")[0]


class PairFolder:
    """A pair folder, opened for reading.

    folder    its path
    parts     what `read` returns, of "image", "ids" and "instances"; without "ids", masks and classes.json
              may be missing (images for the text-to-image base)
    start     leave out the first pairs ...
    limit     ... and use at most `limit` of the rest, in the order of their names

    .names, .paths  of the images;  .classes  as read_classes;  .has_instances  whether instances/ exists.
    Raises ValueError where the folder is missing, incomplete or empty.
    """

    def __init__(self, folder, parts=("image", "ids", "instances"), start=0, limit=None):
        self.folder = Path(folder)
        self.parts = [part for part in CHANNELS if part in parts]
        files = list_pairs(folder, "ids" in parts)[start:][:limit]
        if not files:
            raise ValueError(f"{folder}: no pairs are left after the first {start}. Use fewer of them")
        files = np.array([os.fsencode(file) for file in files])
        self.paths = FileNames(files, functools.partial(Path, self.folder, "images"))
        self.names = FileNames(files, without_ending)
        self.classes = read_classes(folder) if "ids" in parts else []
        self.has_instances = (self.folder / "instances").is_dir()
        self.memory = None

    def __len__(self):
        return len(self.names)

    @functools.cached_property
    def positions(self):
        """{name: i}."""
        return {name: i for i, name in enumerate(self.names)}

    @functools.cached_property
    def filtered(self):
        """Whether train.py --filter made this folder: 0 in a mask is then a pixel to ignore."""
        meta = self.folder / "meta.json"
        return meta.is_file() and "filter" in read_json(meta)

    def mask_path(self, i):
        return self.folder / "masks" / f"{self.names[i]}.png"

    def read(self, i):
        """Pair i -> {part: uint8 array}: image (H, W, 3), ids (H, W), instances (H, W; 0 if it has none)."""
        if self.memory is None:
            return self.read_files(i)
        shape = self.shapes[i]
        pixels = np.frombuffer(self.memory, np.uint8, math.prod(shape), self.offsets[i])
        ends = np.cumsum([CHANNELS[part] for part in self.parts])
        arrays = np.split(pixels.reshape(shape), ends[:-1], axis=2)  # (H, W, channels) a part
        return {part: array if part == "image" else array[..., 0]
                for part, array in zip(self.parts, arrays)}

    def read_files(self, i):
        """`read` from the files."""
        name, pair = self.names[i], {}
        if "image" in self.parts:
            pair["image"] = np.asarray(to_rgb(open_picture(self.paths[i])))
        if "ids" in self.parts:
            size = pair["image"].shape[:2] if pair else header_size(self.paths[i])[::-1]
            pair["ids"] = read_ids(self.mask_path(i), len(self.classes), size)
        if "instances" in self.parts:
            pair["instances"] = np.zeros_like(pair["ids"])
            if self.has_instances:
                path = self.folder / "instances" / f"{name}.png"
                pair["instances"] = read_ids(path, 255, pair["ids"].shape)
        return pair

    def keep(self, most=KEEP_BYTES):
        """Decode all pairs now and keep them, if that takes up to `most` bytes. Worker processes share them.

        Without it, decoding and not the GPU would bound the training of small models. Sizes are those of the
        files' headers.
        """
        depth = sum(CHANNELS[part] for part in self.parts)
        self.offsets, end = [], 0
        for i, path in enumerate(self.paths):
            self.offsets.append(end)
            path = path if "image" in self.parts else self.mask_path(i)
            end += math.prod(header_size(path)) * depth
            if end > most:
                return
        memory, self.shapes = RawArray("B", end), [None] * len(self)  # shared by fork and by spawn
        pixels = np.frombuffer(memory, np.uint8)

        def store(i):
            stack = np.dstack(list(self.read_files(i).values()))  # (H, W, channels of all parts)
            pixels[self.offsets[i]:self.offsets[i] + stack.size] = stack.ravel()
            self.shapes[i] = stack.shape
        with ThreadPoolExecutor() as pool:
            list(pool.map(store, range(len(self))))
        self.memory = memory

    def captions(self, i):
        """Captions of pair i, at least one: composed from the names of its classes where it has none."""
        captions = read_captions(self.folder, self.names[i])
        if captions or not self.classes:
            return captions or [""]
        print_once(f"{self.folder}: no captions for some images; composed from class names")
        ids = read_ids(self.mask_path(i), len(self.classes))
        names = [self.classes[k - 1]["name"] for k in np.unique(ids) if k]
        return ["a picture of " + (", ".join(names) or "nothing")]

    def fingerprint(self):
        """{part: hash}, which changes when the data changes, so that no run resumes on other data.

        Of real data: the contents of masks, instances, captions and classes.json, images by name and size. Of
        a synthetic folder: meta.json, which says what made it, and the names.
        """
        digests = {"names": hashlib.sha256(repr(list(self.names)).encode())}
        meta = self.folder / "meta.json"
        for path in [meta] if meta.is_file() else self.files():
            part = path.name if path.parent == self.folder else path.parent.name
            if part == "images":
                content = repr((path.name, path.stat().st_size)).encode()
            elif not path.is_file():
                continue
            elif part == "captions":
                content = read_text(path).encode()  # finds one that is not UTF-8 before training
            else:
                content = path.read_bytes()
            digests.setdefault(part, hashlib.sha256()).update(content)
        return {"pairs": len(self)} | {part: digest.hexdigest()[:12] for part, digest in digests.items()}

    def files(self):
        """The paths of all files of these pairs, there or not; an image last of its pair."""
        yield self.folder / "classes.json"
        yield self.folder / "instances.json"
        for name, path in zip(self.names, self.paths):
            yield self.folder / "masks" / f"{name}.png"
            yield self.folder / "instances" / f"{name}.png"
            yield self.folder / "captions" / f"{name}.txt"
            yield path


def category(classes, k):
    """The id of class k in the data set it comes from; k itself where there is none."""
    return classes[k - 1].get("source_id", k)


def image_id(name):
    """COCO's id of an image: the number that its name is, else the name."""
    return int(name) if name.isascii() and name.isdigit() else name


def count_classes(pairs, most=500):
    """How many pixels each class has in up to `most` masks, evenly apart -> (K + 1,), void first."""
    counts = np.zeros(len(pairs.classes) + 1, np.int64)
    for i in spread(len(pairs), most):
        ids = read_ids(pairs.mask_path(i), len(pairs.classes))
        counts += np.bincount(ids.ravel(), minlength=len(counts))
    return counts


def describe_classes(counts, classes):
    """Pixels of void and every class -> lines of text: their shares, and what looks wrong about them."""
    share = 100 * counts / max(counts.sum(), 1)
    names = ["void", *(c["name"] for c in classes)]
    # "\xa0" keeps a line from breaking between a name and its share.
    lines = textwrap.wrap("   ".join(f"{name} {value:.3g} %".replace(" ", "\xa0")
                                     for name, value in zip(names, share)), 110)
    never = [f"{k} {names[k]}" for k in range(1, len(names)) if not counts[k]]
    if never:
        more = " ..." if never[5:] else ""
        lines.append(f"Warning: no pixel is {', '.join(never[:5])}{more}. Either these classes are rare, or "
                     "the ids are shifted: where 0 is a class, see data/prepare.py --zero-based.")
    if share[0] > 50:
        lines.append(f"Warning: {share[0]:.0f} % of the pixels are void (id 0): nothing is learned there.")
    if len(classes) == 1 and counts[0]:
        lines.append(f"Warning: everything that is not {names[1]} is void, so a segmenter may say {names[1]} "
                     f"everywhere. Make the background a class: data/prepare.py --binary '{names[1]}'")
    return "\n".join(lines).replace("\xa0", " ")


# ---- writing -----------------------------------------------------------------------------------------------

@contextlib.contextmanager
def atomic_write(path):
    """Yield a temporary path that replaces `path` at the end: the file is complete or not there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp{os.urandom(8).hex()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_temporary(folder):
    """Remove the temporary files that a killed run left in a pair folder."""
    for path in (*Path(folder).glob(".tmp*"), *Path(folder).glob("*/.tmp*")):
        path.unlink(missing_ok=True)


def write_text(path, text):
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path, content):
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_picture(path, picture):
    """A PIL picture or a uint8 array -> a file of the kind that its ending says: .png or .jpg."""
    picture = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    with atomic_write(path) as temporary:
        picture.save(temporary, quality=95, subsampling=0)  # 0: 4:4:4. PNG, without loss, passes over both


def write_mask(path, ids, K):
    """(H, W) uint8 class ids -> an 8-bit palette PNG that opens as the colour map."""
    picture = Image.fromarray(ids)
    picture.putpalette(palette(K).ravel().tolist())
    write_picture(path, picture)


def link(source, path):
    """A symbolic link to a file; where the system allows none a hard link, and a copy as the last resort."""
    with atomic_write(path) as temporary:
        for make in (os.symlink, os.link):
            with contextlib.suppress(OSError):
                make(os.path.abspath(source), temporary)
                return
        shutil.copyfile(source, temporary)


def write_captions(folder, name, captions):
    write_text(Path(folder) / "captions" / f"{name}.txt", "\n".join(captions) + "\n")


def write_pair(folder, name, image, ids=None, instances=None, captions=(), K=None, ending=".png"):
    """Write one pair: captions, instances, mask, then the image: one that exists means a complete pair.

    image      (H, W, 3) uint8 or a PIL picture; or the path of a file, which is linked
    ids        (H, W) uint8 class ids of K classes; None for images without masks
    instances  (H, W) uint8 or None. Give them only where the data has instances: readers take an existing
               instances/ as "every pair has a map in it".
    captions   lines of text
    ending     of the image's file, for arrays and PIL pictures: .png or .jpg
    """
    folder = Path(folder)
    if captions:
        write_captions(folder, name, captions)
    if instances is not None:
        write_picture(folder / "instances" / f"{name}.png", instances)
    if ids is not None:
        write_mask(folder / "masks" / f"{name}.png", ids, K)
    if isinstance(image, (str, Path)):
        link(image, folder / "images" / f"{name}{Path(image).suffix}")
    else:
        write_picture(folder / "images" / f"{name}{ending}", image)


def unfinished(folder):
    """The file beside a pair folder that exists while the folder is being made."""
    return Path(folder).parent / f".{Path(folder).name}.unfinished"


# ---- finding -----------------------------------------------------------------------------------------------

def find_dataset(data):
    """A data set's NAME (data/NAME of the project) or a folder with train/ and val/ -> that folder."""
    folder = locate_dataset(data)
    if is_shapes(folder) or any(folder.glob("*/images")):
        return folder
    if (folder / "prepare.py").is_file():
        raise ValueError(f"{folder}: not prepared yet. Create it with: python data/{folder.name}/prepare.py "
                         "--root RAW")
    raise ValueError(f"{folder}: no data set. Give a data set's name (data/NAME) or a folder with train/ and "
                     "val/")


def locate_dataset(data):
    """Where a data set is by its NAME or folder, whether it is there or not. A folder goes before a NAME."""
    given, named = Path(data), ROOT / "data" / data
    return given if any(given.glob("*/images")) or not named.is_dir() else named


def is_shapes(data):
    """Whether a data set, by its NAME or folder, is the built-in one."""
    return locate_dataset(data).resolve() == ROOT / "data" / "shapes"


def find_split(data, split):
    """The pair folder of one split of a data set. A missing split of the built-in shapes is made now."""
    root = find_dataset(data)
    if is_shapes(root):
        make_shapes(split)
    if not (root / split).is_dir():
        names = ", ".join(sorted(p.parent.name for p in root.glob("*/images"))) or "none"
        raise ValueError(f"{root / split}: no such folder. The splits there are: {names}")
    return root / split


def make_shapes(split):
    """Make a split of the built-in data where it is missing or a killed run left a part of it.

    Under torchrun the first rank does it and the others wait.
    """
    folder = ROOT / "data" / "shapes" / split
    first = os.environ.get("RANK", "0") == "0"
    if first and (unfinished(folder).exists() or not folder.is_dir()):
        command = [sys.executable, str(ROOT / "data" / "shapes" / "prepare.py")]
        command += ["--unlabelled", "8000"] if split == "unlabelled" else []
        if subprocess.run(command).returncode:
            raise ValueError(f"{folder}: could not be made. See the line above")
    while not first and (unfinished(folder).exists() or not folder.is_dir()):
        time.sleep(0.5)


def dataset_name(data):
    """NAME or PATH of a data set -> the NAME in out/NAME."""
    return Path(os.path.abspath(data)).name


def spread(n, count):
    """`count` positions of n (all where there are fewer), evenly apart: frames of a film that follow each
    other look alike."""
    return [i * n // min(n, count) for i in range(min(n, count))]


# ---- pictures to look at -----------------------------------------------------------------------------------

def contact_sheet(rows, captions=(), classes=(), title="", columns=8):
    """Pictures with all that a person needs to read them -> one PIL picture.

    rows      {row name: [(H, W, 3) uint8, ...]}, equally many pictures in each row
    captions  a text for each column, wrapped beneath it
    classes   [{"name"}] for a legend of all colours at the foot
    title     a text above all
    """
    height, width = next(iter(rows.values()))[0].shape[:2]
    scale = max(1, round(144 / width)) if width <= 256 else 256 / width  # small ones by a whole number
    resampling = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BOX
    width, height = round(width * scale), round(height * scale)
    texts = [textwrap.fill(text, max(width // 7, 8)) for text in captions]  # 7: the width of a letter
    count = len(next(iter(rows.values())))
    columns = min(columns, count)

    left = 8 + max(round(FONT.getlength(name)) for name in rows)
    row_height, text_height = height + 4, 16 * max([text.count("\n") + 1 for text in texts], default=0)
    block = len(rows) * row_height + text_height + 6  # all rows of `columns` pictures
    top = 22 if title else 2
    foot = top + block * math.ceil(count / columns)
    sheet = Image.new("RGB", (left + columns * (width + 4), foot), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((4, 3), title, "black", FONT)
    for i in range(count):
        x, y = left + i % columns * (width + 4), top + i // columns * block
        for name, pictures in rows.items():
            sheet.paste(ImageOps.contain(Image.fromarray(pictures[i]), (width, height), resampling), (x, y))
            if i % columns == 0:
                draw.text((4, y + height // 2 - 8), name, "black", FONT)
            y += row_height
        if texts:
            draw.multiline_text((x, y), texts[i], "black", FONT, spacing=3)
    return with_legend(sheet, classes) if classes else sheet


def with_legend(sheet, classes):
    """A picture with the colour and the name of every class beneath it."""
    names = [c["name"] for c in classes]
    cell = 32 + max(round(FONT.getlength(name)) for name in names)
    across = max(1, sheet.width // cell)
    height = 20 * math.ceil(len(names) / across) + 4
    larger = Image.new("RGB", (max(sheet.width, cell), sheet.height + height), "white")
    larger.paste(sheet)
    draw = ImageDraw.Draw(larger)
    for n, (name, colour) in enumerate(zip(names, palette(len(names))[1:])):
        x, y = 4 + n % across * cell, sheet.height + n // across * 20
        draw.rectangle((x, y + 2, x + 14, y + 14), fill=tuple(colour.tolist()), outline="black")
        draw.text((x + 20, y), name, "black", FONT)
    return larger


# ---- scripts -----------------------------------------------------------------------------------------------

def run(main):
    """Run a script's main(): a user's mistake ends in one line on stderr, not in a traceback.

    Library code raises ValueError with a message for people, or lets OSError through. An error of a worker
    process arrives with a traceback as its text, whose last line is the message. SEGGEN_DEBUG=1 shows it all.
    """
    try:
        main()
    except KeyboardInterrupt:
        print("Stopped. The same command goes on from the last save.", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        if "SEGGEN_DEBUG" in os.environ:
            raise
        sys.exit((str(error).strip() or repr(error)).splitlines()[-1].removeprefix("ValueError: "))


class ShowDefaults(argparse.ArgumentDefaultsHelpFormatter):
    """-h shows the default of every flag that has one, unless its help says it already."""

    def _get_help_string(self, action):
        none = action.default in (None, "") or action.default is False
        said = none or "(default" in action.help
        return action.help if said else super()._get_help_string(action)


class FlagParser(argparse.ArgumentParser):
    """An ArgumentParser that shows defaults, and ends in one line where a flag is wrong, as `run` does."""

    def __init__(self, *args, formatter_class=ShowDefaults, **options):
        super().__init__(*args, formatter_class=formatter_class, **options)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}. See {self.prog} -h\n")


def number(kind, least, most=float("inf"), above=False):
    """An argparse type: a finite number of that kind from `least` (with `above`: over it) to `most`."""
    def parse(text):
        value = kind(text)
        enough = value > least if above else value >= least
        if not enough or value > most or value == float("inf"):
            wanted = f"over {least}" if above else f"of {least} or more"
            wanted += f" and at most {most}" if most < float("inf") else ""
            raise argparse.ArgumentTypeError(f"{text}: a number {wanted} is needed")
        return value
    parse.__name__ = kind.__name__  # argparse says it: "invalid int value"
    return parse


def picture_size(text):
    """An argparse type: "64" or "96x72" (width x height) -> (H, W)."""
    sides = [number(int, 1, 8192)(part) for part in text.split("x")]
    if len(sides) > 2:
        raise argparse.ArgumentTypeError(f"{text}: 64 or 96x72 (width x height) is needed")
    return sides[-1], sides[0]
