"""Draw the README's first picture and its animation from the shipped weights, or from those in out/shapes.

Reads:  weights of Text2Mask, Mask2Img and the segmenter.
Writes: assets/hero.png: caption, mask, image, what the segmenter finds in it; assets/noise.gif: a mask and
        then its image come out of the noise.
Needs:  the generators, mask2former.py, data/pairs.py.

    python assets/draw.py
"""
import sys
import textwrap
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import diffusion
import mask2former
from data.pairs import FONT, FlagParser, contact_sheet, palette, run, write_picture
from diffusion import seed_of
from mask2img import Mask2Img
from text2mask import Text2Mask, find_weights, segments

CAPTIONS = [
    "two red houses on a green meadow by the lake under a blue sky with the sun",
    "a boat with a white sail on the sea at sunset with two pink clouds",
    "a woman in yellow on the beach by the sea, mountains behind, on a clear day",
    "two trees and a white house by a road, hills behind, under a blue sky",
    "three pine trees on the grass by the river, mountains behind, in the morning",
    "two boats with red sails on the lake, grass in front, under a grey sky with a cloud",
]
FOLDER = Path(__file__).resolve().parent


def noise_frames(model, sample):
    """Run sample() -> what it returns, and what the network was given at each call: (B, 3, H, W) each, with
    ever less noise."""
    frames = []
    hook = model.register_forward_hook(lambda _, inputs, output: frames.append(inputs[0]))
    result = sample()
    hook.remove()
    return result, frames


def to_picture(x, side):
    """x (3, H, W) in [-1, 1], clipped to it -> a PIL picture of that many pixels a side."""
    pixels = ((x.clamp(-1, 1) + 1) * 127.5).byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)


def animate(text2mask, mask2img, n, path, side=192):
    """The GIF of caption n: the mask on the left comes first, then the image on the right."""
    caption = CAPTIONS[n]
    classes = text2mask.config["classes"]
    isthing = [c["isthing"] for c in classes]
    codes, left = noise_frames(text2mask, lambda: text2mask.sample([caption], [seed_of(0, n, "mask")]))
    ids, _ = segments(codes[0], isthing)
    mask = torch.from_numpy(palette(len(classes))[ids]).permute(2, 0, 1) / 127.5 - 1
    image, right = noise_frames(
        mask2img, lambda: mask2img.sample(ids[None], [caption], [seed_of(0, n, "image")]))
    image = torch.from_numpy(image[0]).permute(2, 0, 1) / 127.5 - 1
    # Every second step of the mask, then every third of the image.
    masks = [x[0] for x in left[::2]] + [mask] * (len(right[::3]) + 1)
    images = [right[0][0]] * len(left[::2]) + [x[0] for x in right[::3]] + [image]
    frames = []
    for one, other in zip(masks, images):
        frame = Image.new("RGB", (2 * side + 12, side + 44), "white")
        frame.paste(to_picture(one, side), (4, 4))
        frame.paste(to_picture(other, side), (side + 8, 4))
        ImageDraw.Draw(frame).multiline_text((6, side + 8), textwrap.fill(caption, 58), "black", FONT)
        frames.append(frame)
    durations = [160] * (len(frames) - 1) + [2500]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0)


def main(argv=None):
    FlagParser(description=__doc__.split("\n")[0]).parse_args(argv)
    text2mask = diffusion.load(Text2Mask, find_weights("shapes", "text2mask"))
    mask2img = diffusion.load(Mask2Img, find_weights("shapes", "mask2img"))
    segmenter = mask2former.load(find_weights("shapes", "mask2former"))
    classes = text2mask.config["classes"]
    colours = palette(len(classes))
    codes = text2mask.sample(CAPTIONS, [seed_of(0, n, "mask") for n in range(len(CAPTIONS))])
    masks = np.stack([segments(c, [k["isthing"] for k in classes])[0] for c in codes])
    images = mask2img.sample(masks, CAPTIONS, [seed_of(0, n, "image") for n in range(len(CAPTIONS))])
    found = []
    for image in images:
        ids, _, _ = mask2former.predict(segmenter, torch.from_numpy(image).permute(2, 0, 1) / 255, "semantic")
        found.append((0.5 * image + 0.5 * colours[np.asarray(ids.cpu())]).astype(np.uint8))
    rows = {"mask": list(colours[masks]), "image": list(images), "segmenter": found}
    write_picture(FOLDER / "hero.png", contact_sheet(rows, CAPTIONS, classes, columns=6))
    animate(text2mask, mask2img, 3, FOLDER / "noise.gif")
    print(f"{FOLDER}: hero.png, noise.gif")


if __name__ == "__main__":
    run(main)
