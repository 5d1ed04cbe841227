"""ImgSyn: human masks -> new images: every annotation gets as many pictures as are asked for.

Paper: SegGen (2311.03355) section 3, ImgSyn. ADE20K: 50 images a mask; COCO: 10 images a mask; 40 steps [N].
Differs: DPM-Solver++(2M) in 15 steps.
Reads: masks/ and captions/ of --data's train split; a trained Mask2Img.
Writes: OUT pair folder (classes.json, images, masks, instances, captions), meta.json, samples.png.
Needs: unet.py, diffusion.py, text2mask.py, mask2img.py, masksyn.py (the writing loop).
    python imgsyn.py                                         # 64 pairs from the shipped demo weights
    python imgsyn.py --per-mask 4 --limit 100 --out out/shapes/imgsyn4
Dimension key: B batch, H W pixels, K classes.
"""
import argparse

import numpy as np
from PIL import Image

import diffusion
from diffusion import seed_of
from mask2img import Mask2Img
from masksyn import about, demo_or_trained, mask2img_flags, synthesize
from text2mask import (check_classes, dataset_folder, names_of, outlined, placed, read_captions, read_classes,
                       read_ids)


def read_mask(folder, name, K, size):
    """A human mask at the generator's (H, W) -> class ids and instances or None, both (H, W) uint8."""
    ids = read_ids(folder / "masks" / f"{name}.png", K)
    fit, *_ = placed((ids.shape[1], ids.shape[0]), size, None)
    path = folder / "instances" / f"{name}.png"
    maps = [ids, read_ids(path, 255, ids.shape[::-1])] if path.exists() else [ids]
    maps = [np.asarray(fit(Image.fromarray(m))) for m in maps]
    return maps[0], (maps[1] if len(maps) > 1 else None)


def main():
    parser = argparse.ArgumentParser(description="ImgSyn: human masks -> new images.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    mask2img_flags(parser, 64, ("--per-mask",))
    parser.add_argument("--split", default="train", help="the split whose masks are used")
    args = parser.parse_args()
    device, _, _ = diffusion.start(args.device)
    folder = dataset_folder(args.data, args.split)
    path = demo_or_trained(args.data, "mask2img", args.mask2img)
    printer, classes = diffusion.load(Mask2Img, path, device), read_classes(folder)
    check_classes(classes, printer.config["classes"], path)
    sources, K = [name for _, name in names_of(folder)][:args.limit], len(classes)

    def make(jobs):
        masks = [read_mask(folder, source, K, printer.config["size"]) for source, _ in jobs]
        lines = [read_captions(folder, source, classes, ids) for (source, _), (ids, _) in zip(jobs, masks)]
        captions = [choices[k % len(choices)] for (_, k), choices in zip(jobs, lines)]
        edged = [printer.config["edges"] and instances is not None for _, instances in masks]
        drawn = [outlined(*m, K) if edge else m[0] for m, edge in zip(masks, edged)]
        seeds = [seed_of(args.seed, *job, "image") for job in jobs]
        images = printer.sample(np.stack(drawn), captions, seeds, args.steps, args.guidance, args.sampler)
        return [(caption, m[1], m[0], image) for caption, m, image in zip(captions, masks, images)]
    synthesize(args, "imgsyn", folder, sources, make, classes, about(args, folder, mask2img=path))


if __name__ == "__main__":
    main()
