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
from text2mask import Text2Mask, expected_colours, find_weights, segments, to_pixels

CAPTIONS = [
    "two red houses on a green meadow by the lake under a blue sky with the sun",
    "a boat with a white sail on the sea at sunset with two pink clouds",
    "a woman in yellow on the beach by the sea, mountains behind, on a clear day",
    "two trees and a white house by a road, hills behind, under a blue sky",
    "three pine trees on the grass by the river, mountains behind, in the morning",
    "two boats with red sails on the lake, grass in front, under a grey sky with a cloud",
]
SEED = 1       # chosen of 0 to 5 after a look
ANIMATED = -6  # the caption of the animation, from the end
FOLDER = Path(__file__).resolve().parent


def noise_frames(model, n, sample):
    """Run sample() -> what it returns, and what the network was given for sample n at each call: (H, W, 3)
    uint8 each, with ever less noise. n counts from the end: where guidance doubles the batch, the samples
    with their captions come last."""
    frames = []

    def keep_frame(_, inputs, output):
        x, t, logits = inputs[0][[n]], inputs[1][[n]].long(), output[[n]]
        if isinstance(model, Text2Mask):
            # It may paint with other colours than people see: repaint what it takes the mask for.
            own, seen = (expected_colours(logits, colours) for colours in (model.colours, model.palette))
            x = x + model.schedule.a[t] * (seen - own)
        frames.append(to_pixels(x)[0])
    hook = model.register_forward_hook(keep_frame)
    result = sample()
    hook.remove()
    return result, frames


def animate(caption, mask, image, mask_noise, image_noise, path, side=192):
    """The GIF of a caption: its mask comes first on the left, then its image on the right.

    mask, image  (H, W, 3) uint8;  mask_noise, image_noise: lists of the same, ever less noisy
    """
    masks = mask_noise + [mask] * (len(image_noise) + 1)
    images = image_noise[:1] * len(mask_noise) + image_noise + [image]
    frames = []
    for pair in zip(masks, images):
        frame = Image.new("RGB", (2 * side + 12, side + 44), "white")
        for left, pixels in zip((4, side + 8), pair):
            picture = Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
            frame.paste(picture, (left, 4))
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
    isthing = [c["isthing"] for c in classes]
    seeds = {part: [seed_of(SEED, n, part) for n in range(len(CAPTIONS))] for part in ("mask", "image")}
    codes, mask_noise = noise_frames(
        text2mask, ANIMATED, lambda: text2mask.sample(CAPTIONS, seeds["mask"]))
    masks = np.stack([segments(c, isthing)[0] for c in codes])
    images, image_noise = noise_frames(
        mask2img, ANIMATED, lambda: mask2img.sample(masks, CAPTIONS, seeds["image"]))

    found = []
    for image in images:
        ids, _, _ = mask2former.predict(segmenter, torch.from_numpy(image).permute(2, 0, 1) / 255, "semantic")
        found.append((0.5 * image + 0.5 * colours[np.asarray(ids.cpu())]).astype(np.uint8))
    rows = {"mask": list(colours[masks]), "image": list(images), "segmenter": found}
    write_picture(FOLDER / "hero.png", contact_sheet(rows, CAPTIONS, classes, columns=6))
    animate(CAPTIONS[ANIMATED], colours[masks[ANIMATED]], images[ANIMATED], mask_noise[::2], image_noise[::3],
            FOLDER / "noise.gif")
    print(f"{FOLDER}: hero.png, noise.gif")


if __name__ == "__main__":
    run(main)
