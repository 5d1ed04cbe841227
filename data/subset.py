"""Few labels, many photos: every N-th pair of a data set, and all of its photos without their masks.

A base may learn from photos and captions alone, which are cheap; masks are not. So OUT/train holds a part of
the pairs, evenly apart (frames of a film that follow each other look alike), and OUT/unlabelled the images
and captions of all of them, and of the data's own unlabelled split. Generators and segmenter then read one
folder, and no mask but those of OUT/train can leak into any of them.

Reads:   --data, with train/ and perhaps unlabelled/ and other splits.
Writes:  OUT: train/ and unlabelled/ as above, the other splits whole. All files are links.
Needs:   data/pairs.py.

    python data/subset.py --data camvid --every 8 --out data/camvid46
    python mask2img.py base --data camvid46 --split unlabelled
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.pairs import FlagParser, PairFolder, find_dataset, find_split, link, number, run

LABELS = "masks", "instances"


def link_split(source, out, names=None, leave_out=()):
    """Link the files of a pair folder, of all names or of a set of them, but for some of its folders."""
    for path in sorted(source.rglob("[!.]*")):
        part = path.parent.relative_to(source).as_posix()  # "." for classes.json and words.json
        wanted = part == "." or names is None or path.stem in names
        if path.is_file() and wanted and part not in leave_out:
            link(path, out / part / path.name)


def write_subset(data, every, out):
    """Write the data set `out` -> how many pairs have labels, and how many photos there are."""
    root = find_dataset(data)
    names = list(PairFolder(find_split(data, "train"), ("ids",)).names)
    labelled = set(names[::every])
    for split in sorted(path.parent.name for path in root.glob("*/images")):
        if split in ("train", "unlabelled"):
            link_split(root / split, out / "unlabelled", leave_out=LABELS)
        if split != "unlabelled":
            link_split(root / split, out / split, labelled if split == "train" else None)
    return len(labelled), len(PairFolder(out / "unlabelled", ("image",)))


def main(argv=None):
    parser = FlagParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", required=True, help="NAME (data/NAME) or a folder with train/")
    add("--every", type=number(int, 1), required=True, metavar="N", help="keep the labels of every N-th pair")
    add("--out", type=Path, required=True, help="the new data set")
    args = parser.parse_args(argv)
    if args.out.exists():
        raise ValueError(f"{args.out}: exists already. Delete it or choose another folder")
    labels, photos = write_subset(args.data, args.every, args.out)
    print(f"{args.out}: {labels} pairs with labels in train, {photos} photos in unlabelled")


if __name__ == "__main__":
    run(main)
