"""What SDXL's VAE alone does to the masks of a data set: colour map -> latents -> colour map -> mask.

Text2Mask on SDXL paints latents, so no mask of it can be better than what comes back here. Thin and small
regions are lost in the VAE's blur, and between two colours a third one may appear. Look at these figures
before you train: a class that does not survive is not learned.

Reads:   a split of --data; SDXL's public folder, of which only vae/ is needed.
Writes:  --out: a picture of masks before and after.
Needs:   diffusion.py, unet.py, text2mask.py, mask2former.py, train.py, data/pairs.py.

    python bench/vae.py --data ade20k --sdxl sdxl

Dimension key: H W pixels, K classes.
"""
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import diffusion
import unet as networks
from data.pairs import (FlagParser, PairFolder, contact_sheet, find_split, number, outline, palette,
                        run, spread, write_picture)
from text2mask import EDGE_WIDTH, MIN_REGION, ResizeCrop, decode, fit_size, segments, to_pixels
from train import PanopticQuality

SIDE = 768   # pixels: the side of a square with as many as the masks get
SHOWN = 16


def through_vae(vae, codes, K):
    """(H, W) codes -> the codes that come back."""
    colours = torch.from_numpy(palette(K)[codes]).float() / 127.5 - 1    # (H, W, 3)
    x = colours.permute(2, 0, 1)[None].to(vae.post_quant_conv.weight)    # (1, 3, H, W)
    with torch.no_grad():
        return decode(to_pixels(vae.decode(vae.encode(x)))[0], K)


def compare(ids, found_ids):
    """A mask and what came back, both (H, W) -> what is counted of their classes."""
    classes, found_classes = ({*np.unique(a)} - {0} for a in (ids, found_ids))
    counts = Counter(masks=1, pixels=(ids > 0).sum(), right=((ids == found_ids) & (ids > 0)).sum(),
                     classes=len(classes), lost=len(classes - found_classes),
                     ghosts=len(found_classes - classes))
    return counts


def main(argv=None):
    parser = FlagParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", required=True, help="NAME (data/NAME) or a folder with train/ and val/")
    add("--split", default="val", help="the split whose masks are used")
    add("--sdxl", type=Path, required=True, metavar="FOLDER", help="SDXL's public folder")
    add("--limit", type=number(int, 1), default=100, help="use N masks, evenly apart")
    add("--out", type=Path, default=Path("out/vae.png"), help="the picture")
    add("--device", default="auto", help="cpu, cuda, cuda:1 ...")
    args = parser.parse_args(argv)
    device, _, _ = diffusion.setup(args.device)
    pairs = PairFolder(find_split(args.data, args.split), ("ids", "instances"))
    vae = networks.read_part(networks.VAE, args.sdxl / "vae", device)
    K, isthing = len(pairs.classes), [c["isthing"] for c in pairs.classes]
    counts, matches = Counter(), PanopticQuality(pairs.classes)
    before, after = [], []
    for i in tqdm(spread(len(pairs), args.limit), "masks"):
        pair = pairs.read(i)
        height, width = pair["ids"].shape
        crop = ResizeCrop((height, width), fit_size(width / height, SIDE, 64))
        ids, instances = crop(pair["ids"]), crop(pair["instances"])
        codes = outline(ids, instances, K, EDGE_WIDTH[1]) if pairs.has_instances else ids
        torch.manual_seed(i)  # the VAE draws a sample of its latents
        again = through_vae(vae, codes, K)
        found = segments(again, isthing, MIN_REGION[1])
        counts += compare(ids, found[0])
        matches.add(found, (ids, instances))
        if len(before) < SHOWN:
            before.append(palette(K)[codes])
            after.append(palette(K)[again])
    print(f"{counts['masks']} masks of {pairs.folder}, with about {SIDE} x {SIDE} pixels each")
    print(f"pixels of the right class   {100 * counts['right'] / counts['pixels']:.2f} %")
    print(f"classes lost                {100 * counts['lost'] / counts['classes']:.2f} %")
    print(f"classes that were not there {counts['ghosts'] / counts['masks']:.2f} a mask")
    if pairs.has_instances:
        _, again, _, missed = matches.counts[:, matches.isthing].sum(1).astype(int)
        print(f"instances found again       {again} of {again + missed}, with an IoU over 0.5")
    write_picture(args.out, contact_sheet({"mask": before, "read": after}, (), pairs.classes))
    print(f"{args.out}: masks, and what was read before cleaning")


if __name__ == "__main__":
    run(main)
