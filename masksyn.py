"""MaskSyn: captions -> new masks -> new images: training pairs whose layout no human has drawn.

Text2Mask paints masks of a training caption, Mask2Img paints an image on each. The mask is the label, so what
a segmenter learns is not capped by another segmenter.

Paper: SegGen (2311.03355) section 3, MaskSyn. ADE20K: 10 new pairs a training image; masks in 200 steps of
       EDM's sampler, images in 40 steps [N].
Differs: EDM in 12 steps (masks), DPM-Solver++(2M) in 15 (images); masks are cleaned of specks; instances are
       connected regions.
Reads: captions/ of --data's train split; trained Text2Mask and Mask2Img.
Writes: OUT pair folder (classes.json, images, masks, instances, captions), meta.json, samples.png.
Needs: unet.py, diffusion.py, text2mask.py, mask2img.py.
    python masksyn.py                                        # 64 pairs from the shipped demo weights
    torchrun --nproc_per_node 2 masksyn.py --limit 1000      # each rank makes its share
Dimension key: B batch, H W pixels, K classes.
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import diffusion
from diffusion import SAMPLERS, positive, replacing, seed_of, within
from mask2img import Mask2Img
from text2mask import (ROOT, Text2Mask, check_classes, dataset_folder, digest, encode, evenly, grid, legend,
                       name_of, names_of, outlined, read_captions, read_classes, segments, write_mask)


def work(sources, per, batch, rank, world):
    """Source names -> this rank's batches of (source, k). Batches are cut before they are shared out, each of
    one k: a sample sits in the same batch, and comes out the same, for any number of ranks and a larger
    `per`."""
    parts = [sources[i:i + batch] for i in range(0, len(sources), batch)]
    return [[(source, k) for source in part] for k in range(per) for part in parts][rank::world]


def present(out, job):
    return (out / "images" / f"{job[0]}_{job[1]:02d}.png").exists()


def write_pair(out, job, caption, instances, ids, image, K):
    """Caption, instances, mask, then image, each under a temporary name first: an image that exists is a
    whole pair. There is an instances/ only where a pair has instances: readers take the folder as a yes."""
    name = f"{job[0]}_{job[1]:02d}"
    with replacing(out / "captions" / f"{name}.txt") as path:
        path.write_text(caption + "\n", encoding="utf-8")
    if instances is not None:
        with diffusion.writable(out):
            (out / "instances").mkdir(exist_ok=True)
        with replacing(out / "instances" / f"{name}.png") as path:
            Image.fromarray(instances).save(path)
    write_mask(out / "masks" / f"{name}.png", ids, K)
    with replacing(out / "images" / f"{name}.png") as path:
        Image.fromarray(image).save(path)


def refuse(out, meta):
    """Ends the program where pairs are in OUT that were made with other settings than meta, or by others."""
    path = out / "meta.json"
    if not any(out.glob("images/*")):
        return
    if not path.is_file():
        sys.exit(f"{out}: looked for a folder of synthetic pairs, found images without a meta.json; give "
                 "another --out")
    if path.read_bytes() != meta.encode():
        sys.exit(f"{out}: pairs made with other settings are there (see meta.json); give another --out or "
                 "delete it")


def prepare(out, listing, meta, rank):
    """Makes the pair folder: meta.json first, then classes.json, the text `listing`."""
    with diffusion.writable(out):
        for part in ("images", "masks", "captions"):
            (out / part).mkdir(parents=True, exist_ok=True)
    if rank == 0:
        for left in (*out.glob(".*.tmp*"), *out.glob("*/.*.tmp*")):      # of a run that was killed in a write
            if left.is_file():
                left.unlink(missing_ok=True)
        for file, content in ((out / "meta.json", meta), (out / "classes.json", listing)):
            with replacing(file) as part:
                part.write_text(content, encoding="utf-8")


def contact_sheet(out, classes, count=24, columns=8):
    """OUT/samples.png: pairs from all over the folder, rows of masks above their images, the legend."""
    paths = sorted(out.glob("images/[!.]*.png"))                         # each is a whole pair
    paths = [paths[i] for i in evenly(len(paths), count)]
    masks = [np.asarray(Image.open(out / "masks" / path.name)) for path in paths]
    images = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
    blank = [np.full_like(images[0], 255)] * (-len(images) % columns)
    rows = [[*[encode(m, len(classes)) for m in masks], *blank], [*images, *blank]]
    rows = [row[i:i + columns] for i in range(0, len(rows[0]), columns) for row in rows]
    scale = 2 if max(masks[0].shape) <= 256 else 1
    with replacing(out / "samples.png") as path:
        legend(grid(rows, scale), np.concatenate([m.ravel() for m in masks]), classes).save(path)


def about(args, folder, **checkpoints):
    """What makes pairs what they are, for meta.json: the settings, the masks and captions of the source
    folder by name and size, and which weights were read."""
    files = [p for part in ("masks", "captions") for p in sorted((folder / part).glob("[!.]*"))]
    other = ("out", "limit", "per", "device")                            # more of the same, or elsewhere
    kept = {key: str(value) for key, value in vars(args).items() if key not in other}
    kept["source"] = f"{len(files)} files {digest(files)}"
    return kept | {f"{name}_weights": diffusion.identity(path) for name, path in checkpoints.items()}


def synthesize(args, stage, folder, sources, make, classes, meta):
    """Runs make(jobs) -> [(caption, instances, ids, image)] over every batch that lacks a pair; the loop of
    both modes. folder: the pair folder of the sources, whose classes.json the new one has too."""
    _, rank, world = diffusion.start(args.device)
    out = args.out or Path("out") / name_of(args.data) / stage
    meta = json.dumps(meta, indent=1, sort_keys=True) + "\n"
    refuse(out, meta)
    batches = work(sources, args.per, args.batch, rank, world)
    lack = [jobs for jobs in batches if not all(present(out, job) for job in jobs)]
    first = make(lack[0]) if lack else []                                # bad input is told, no folder made
    prepare(out, (folder / "classes.json").read_text(encoding="utf-8"), meta, rank)
    if world > 1:
        torch.distributed.barrier()
    with tqdm(total=sum(map(len, lack)), desc=stage, unit="pair", disable=rank > 0) as bar:
        for n, jobs in enumerate(lack):                                  # a batch is made whole: same bytes
            for job, pair in zip(jobs, make(jobs) if n else first):
                if not present(out, job):
                    write_pair(out, job, *pair, len(classes))
            bar.update(len(jobs))
    if world > 1:
        torch.distributed.barrier()
    if rank == 0:
        contact_sheet(out, classes)
        print(f"{out}: {len(sources) * args.per} pairs; look at {out / 'samples.png'}")


def demo_or_trained(data, stage, given):
    """--text2mask / --mask2img if given, else the shipped demo weights of this data, else out/NAME/STAGE."""
    demo, trained = ROOT / "weights" / name_of(data) / stage, Path("out") / name_of(data) / stage
    return given or (demo if diffusion.checkpoint(demo).exists() else trained)


def mask2img_flags(parser, limit, per):
    """The flags that MaskSyn and ImgSyn share."""
    parser.add_argument("--data", default="shapes", help="NAME (data/NAME) or a folder with train/ and val/")
    parser.add_argument("--out", type=Path, help="pair folder to write (default: out/NAME/masksyn or imgsyn)")
    parser.add_argument("--mask2img", type=Path,
                        help="trained Mask2Img (default: the demo's, else out/NAME/mask2img)")
    parser.add_argument("--limit", type=positive(int), default=limit,
                        help="use the first N captions or masks")
    parser.add_argument(*per, dest="per", type=positive(int), default=1, help="pairs of each")
    parser.add_argument("--batch", type=positive(int), default=16, help="pairs at a time")
    parser.add_argument("--steps", type=positive(int), default=15, help="sampling steps of an image")
    parser.add_argument("--guidance", type=within(float, 0), default=1.5, help="guidance of images; 1 = none")
    parser.add_argument("--sampler", choices=tuple(SAMPLERS), default="dpm++",
                        help="of images; edm evaluates twice a step and adds fresh noise")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other pairs")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ...")


def main():
    parser = argparse.ArgumentParser(description="MaskSyn: captions -> new masks -> new images.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    mask2img_flags(parser, 64, ("--per-caption",))
    parser.add_argument("--text2mask", type=Path,
                        help="trained Text2Mask (default: the demo's, else out/NAME/text2mask)")
    parser.add_argument("--mask-steps", type=positive(int), default=12, help="sampling steps of a mask")
    parser.add_argument("--mask-sampler", choices=tuple(SAMPLERS), default="edm",
                        help="of masks")
    parser.add_argument("--mask-guidance", type=within(float, 0), default=2.0,
                        help="guidance of masks; 1 = none")
    parser.add_argument("--min-region", type=positive(int), default=8,
                        help="smaller regions go to their surroundings")
    args = parser.parse_args()
    device, _, _ = diffusion.start(args.device)
    folder = dataset_folder(args.data, "train")
    paths = [demo_or_trained(args.data, stage, given)
             for stage, given in (("text2mask", args.text2mask), ("mask2img", args.mask2img))]
    painter, printer = (diffusion.load(cls, path, device) for cls, path in zip((Text2Mask, Mask2Img), paths))
    classes = painter.config["classes"]
    check_classes(read_classes(folder), classes, paths[0])
    check_classes(classes, printer.config["classes"], paths[1])
    if (size := printer.config["size"]) != painter.config["size"]:
        sys.exit(f"{paths[1]}: looked for the (H, W) {painter.config['size']} of {paths[0]}, found {size}; "
                 "train both at one --size")
    isthing, has_instances = [c["isthing"] for c in classes], any(c["isthing"] for c in classes)
    edged = printer.config["edges"] and has_instances
    sources = [name for _, name in names_of(folder)][:args.limit]

    def make(jobs):
        lines = [read_captions(folder, source, classes) for source, _ in jobs]
        captions = [choices[k % len(choices)] for (_, k), choices in zip(jobs, lines)]
        seeds = [[seed_of(args.seed, *job, what) for job in jobs] for what in ("mask", "image")]
        codes = painter.sample(captions, seeds[0], args.mask_steps, args.mask_guidance, args.mask_sampler)
        masks = [segments(c, isthing, args.min_region) for c in codes]   # [(ids, instances)]
        drawn = [outlined(*m, len(classes)) if edged else m[0] for m in masks]
        images = printer.sample(np.stack(drawn), captions, seeds[1], args.steps, args.guidance, args.sampler)
        return [(caption, instances if has_instances else None, ids, image)
                for caption, (ids, instances), image in zip(captions, masks, images)]
    meta = about(args, folder, text2mask=paths[0], mask2img=paths[1])
    synthesize(args, "masksyn", folder, sources, make, classes, meta)


if __name__ == "__main__":
    main()
