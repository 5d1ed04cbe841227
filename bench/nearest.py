"""Do synthetic pairs repeat training pairs? Each one's distance to the nearest of them.

Images are compared as thumbnails, so that a copy with other details counts as a copy: the distance is the
root mean square of their difference, in grey levels. Photos of val, which no generator saw, show what
distance is natural. A generator that memorises paints images that are nearer to a training photo than those
of val are. ImgSyn's images are nearer too, to the photo of their own mask, whose layout they share.
Masks are compared by the share of their pixels in which the most similar training mask has the same class.

Reads:   --pairs, a synthetic folder; the train split of --data, or another one that the generators saw; val.
Writes:  --out: a picture of the synthetic images that are nearest to a photo, each beside it.
Needs:   data/pairs.py.

    python bench/nearest.py --data shapes --pairs out/shapes/masksyn

Dimension key: N pairs, M training pairs, P values of a thumbnail, Q pixels of a small mask.
"""
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.pairs import FlagParser, PairFolder, contact_sheet, find_split, number, run, write_picture

SIDE = 16    # of a thumbnail
CLOSE = 5    # % of val's photos are nearer than what is called close
SHOWN = 16


def shrink(pairs):
    """A PairFolder of images and ids -> thumbnails (N, P) float32, and small masks (N, Q) uint8."""
    images, masks = [], []
    for i in range(len(pairs)):
        pair = pairs.read(i)
        image = Image.fromarray(pair["image"]).resize((SIDE, SIDE), Image.Resampling.BOX)
        mask = Image.fromarray(pair["ids"]).resize((4 * SIDE, 4 * SIDE), Image.Resampling.NEAREST)
        images.append(np.float32(image).ravel())
        masks.append(np.asarray(mask).ravel())
    return np.stack(images), np.stack(masks)


def agreement(masks, seen):
    """(N, Q), (M, Q) ids -> for each mask, the most % of its pixels that one of `seen` shares, (N,)."""
    return np.array([100 * (seen == mask).mean(1).max() for mask in masks])


def nearest(images, photos):
    """(N, P), (M, P) -> the distance (N,) of each image to the nearest photo, and which it is (N,)."""
    squares = (images ** 2).sum(1)[:, None] - 2 * images @ photos.T + (photos ** 2).sum(1)
    which = squares.argmin(1)
    return np.sqrt(((images - photos[which]) ** 2).mean(1)), which


def main(argv=None):
    parser = FlagParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", default="shapes", help="NAME (data/NAME) or a folder with train/ and val/")
    add("--split", default="train", help="the photos that the generators saw")
    add("--limit", type=number(int, 1), help="the first N of them only")
    add("--pairs", type=Path, required=True, help="a synthetic pair folder")
    add("--out", type=Path, default=Path("out/nearest.png"), help="the picture")
    args = parser.parse_args(argv)
    parts = ("image", "ids")
    seen = PairFolder(find_split(args.data, args.split), parts, limit=args.limit)
    val, synthetic = PairFolder(find_split(args.data, "val"), parts), PairFolder(args.pairs, parts)
    photos, seen_masks = shrink(seen)
    val_images, val_masks = shrink(val)
    images, masks = shrink(synthetic)
    natural, _ = nearest(val_images, photos)
    distance, which = nearest(images, photos)
    limit = np.percentile(natural, CLOSE)
    for name, values, own in (("val", natural, val_masks), (str(args.pairs), distance, masks)):
        low, middle = np.percentile(values, (CLOSE, 50))
        share = 100 * (values < limit).mean()
        print(f"{name}: {low:.1f} grey levels at {CLOSE} %, {middle:.1f} at 50 %; {share:.1f} % are "
              f"nearer to a photo than {limit:.1f}")
        middle, high = np.percentile(agreement(own, seen_masks), (50, 100 - CLOSE))
        print(f"{name}: the most similar training mask has the same class in {middle:.1f} % of a mask's "
              f"pixels (median; {high:.1f} % in the {CLOSE} % most similar masks)")
    closest = distance.argsort()[:SHOWN]
    rows = {"synthetic": [synthetic.read(i)["image"] for i in closest],
            "photo": [seen.read(which[i])["image"] for i in closest]}
    write_picture(args.out, contact_sheet(rows, [f"{distance[i]:.1f}" for i in closest]))
    print(f"{args.out}: the nearest of them, each above its photo")


if __name__ == "__main__":
    run(main)
