"""Draw the built-in data set: small picture-book landscapes with masks, instances and captions.

A scene is painted back to front on a canvas 3 x finer than the picture: sky, sun, clouds, hills, ground, then
things from far to near. Every stroke goes to the picture and to an owner map alike, so mask edges are image
edges. Captions are composed from what the mask shows. Scene i of a split depends on (seed, split, i) alone.

Paper:  none; the stand-in for ADE20K and COCO that needs no download; captions are composed, not BLIP-2's.
Differs: `unseen` (the same world by night, in fog, in ink) makes measurable what the paper shows in pictures.
Reads:  nothing.
Writes: OUT/{train,val,unseen}/ pair folders: classes.json, images, masks, instances, captions, words.json
        (the words that name each class); with --unlabelled N, OUT/unlabelled/{images,captions}.
Needs:  no sibling file.
Run:    python data/shapes/prepare.py

Dimension key: N side of the canvas (3 x size), R rows of it, H W pixels. Coordinates are 0..1, y down.
"""
import argparse
import contextlib
import json
import os
import sys
from multiprocessing import Pool

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

CLASSES = ["sky", "hill", "grass", "water", "sand", "road",
           "sun", "cloud", "house", "tree", "boat", "ball", "person"]
THINGS = {"sun", "cloud", "house", "tree", "boat", "ball", "person"}
WORDS = {                                                           # what a caption may call each class
    "sky": ["sky", "skies"],
    "hill": ["hill", "hills", "mountain", "mountains"],
    "grass": ["grass", "meadow", "field", "lawn"],
    "water": ["water", "lake", "sea", "river", "stream", "bay"],
    "sand": ["sand", "beach"],
    "road": ["road", "path", "lane"],
    "sun": ["sun", "moon"],                                         # by night the disc in the sky is the moon
    "cloud": ["cloud", "clouds"],
    "house": ["house", "houses", "cottage", "cottages", "home", "homes"],
    "tree": ["tree", "trees", "pine", "pines"],
    "boat": ["boat", "boats", "sailboat", "sailboats"],
    "ball": ["ball", "balls"],
    "person": ["person", "people", "man", "men", "woman", "women"],
}
SPLITS = {"train": 2000, "val": 300, "unseen": 300}
STREAMS = {"train": 0, "val": 1, "unseen": 2, "unlabelled": 3}      # no scene is in two splits
UNSEEN = ["night", "fog", "ink"]
FINE = 3                                                # canvas pixels per picture pixel, each way
CAPTION_BYTES = 110

LIGHTS = {                                              # sky at the top, sky at the horizon, light on things
    "day": [((74, 148, 226), (196, 228, 246), (1.00, 1.00, 1.00)),
            ((58, 128, 214), (170, 214, 244), (1.00, 1.00, .97))],
    "morning": [((142, 200, 242), (255, 236, 196), (1.06, 1.01, .88)),
                ((168, 206, 236), (255, 220, 208), (1.05, .98, .92))],
    "sunset": [((92, 66, 140), (255, 158, 92), (.90, .64, .56)),
               ((196, 84, 110), (255, 196, 110), (.94, .68, .54)),
               ((58, 74, 150), (250, 132, 124), (.80, .60, .66))],
    "overcast": [((142, 150, 162), (204, 208, 212), (.76, .78, .80)),
                 ((158, 164, 170), (190, 198, 208), (.78, .79, .80))],
    "rain": [((98, 108, 124), (158, 168, 178), (.62, .67, .74))],
    "night": [((10, 14, 44), (46, 60, 108), (.38, .44, .66)), ((8, 20, 40), (36, 66, 96), (.36, .48, .62))],
}
WALLS = {"red": (196, 66, 56), "white": (240, 236, 226), "yellow": (240, 200, 92), "blue": (92, 140, 204)}
ROOFS = {"red": (92, 70, 72), "white": (198, 82, 60), "yellow": (150, 78, 58), "blue": (70, 70, 92)}
LEAVES = {"green": (72, 138, 62), "orange": (226, 130, 42), "red": (190, 64, 48), "pink": (238, 158, 182)}
PAINTS = {"red": (214, 52, 48), "blue": (48, 92, 208), "yellow": (246, 206, 50), "white": (246, 244, 238),
          "orange": (240, 134, 40), "purple": (142, 70, 170)}
LIGHT_WORDS = {
    "day": ["under a blue sky", "on a clear day", "under a bright blue sky"],
    "morning": ["in the morning", "on a bright morning", "at sunrise"],
    "sunset": ["at sunset", "at dusk", "in the evening"],
    "overcast": ["under a grey sky", "on a dull day"],
    "rain": ["in the rain", "under a rainy sky", "on a rainy day"],
    "night": ["at night", "by night", "under a starry sky"],
}
NUMBERS = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight"]


# ---- canvas ------------------------------------------------------------------------------------------------

def mix(a, b, t):
    """Colours a and b (..., 3) blended, t = share of b."""
    return np.asarray(a, np.float32) * (1 - t) + np.asarray(b, np.float32) * t


class Canvas:
    """A picture and its owner map, drawn together. `segments[k - 1]` is the class of owner value k."""

    def __init__(self, size, tint, fog=0.0, fog_colour=(214, 218, 222)):
        self.n, self.tint = size * FINE, np.array(tint, np.float32)
        self.fog, self.fog_colour = fog, fog_colour
        self.picture = Image.new("RGB", (self.n, self.n))
        self.owner = Image.new("L", (self.n, self.n))
        self.pen, self.ids = ImageDraw.Draw(self.picture, "RGBA"), ImageDraw.Draw(self.owner)
        self.segments, self.depth = [], 1.0
        self.x = ((np.arange(self.n)[None] + 0.5) / self.n).astype(np.float32)         # (1, N)
        self.y = ((np.arange(self.n)[:, None] + 0.5) / self.n).astype(np.float32)      # (N, 1)

    def light(self, colour, depth=None):
        """Albedo 0..255 -> colour under this light, faded by the fog before it (depth 1 = near)."""
        colour = np.clip(np.asarray(colour, np.float32) * self.tint, 0, 255)
        return self.veil(colour, self.depth if depth is None else depth)

    def veil(self, colour, depth):
        """Colour seen through the fog."""
        return mix(colour, self.fog_colour, self.fog * (1 - 0.8 * depth)) if self.fog else colour

    def layer(self, name, inside, colour, top=None):
        """Stuff: paint colour (R, N, 3) where inside (R, N) is true, from row `top` on (None: at the foot).
        Name None leaves the owner map alone."""
        rows = len(inside)
        corner = (0, self.n - rows if top is None else top)
        stencil = Image.fromarray(np.broadcast_to(inside, (rows, self.n)).astype(np.uint8) * np.uint8(255))
        colour = np.broadcast_to(np.clip(colour, 0, 255).astype(np.uint8), (rows, self.n, 3))
        self.picture.paste(Image.fromarray(np.ascontiguousarray(colour)), corner, stencil)
        if name is not None:
            if name not in self.segments:
                self.segments.append(name)
            self.owner.paste(self.segments.index(name) + 1, (*corner, self.n, corner[1] + rows), stencil)

    def begin(self, name, depth):
        """The next solid strokes belong to a new thing of this class."""
        self.segments.append(name)
        self.depth = depth

    def ink(self, colour, alpha=255, lit=True):
        return (*np.clip(self.light(colour) if lit else colour, 0, 255).astype(int).tolist(), int(alpha))

    def polygon(self, points, colour, solid=True, alpha=255, lit=True):
        points = [(x * self.n, y * self.n) for x, y in points]
        self.pen.polygon(points, fill=self.ink(colour, alpha, lit))
        if solid:
            self.ids.polygon(points, fill=len(self.segments))

    def ellipse(self, x, y, rx, ry, colour, solid=True, alpha=255, lit=True):
        box = [(x - rx) * self.n, (y - ry) * self.n, (x + rx) * self.n, (y + ry) * self.n]
        self.pen.ellipse(box, fill=self.ink(colour, alpha, lit))
        if solid:
            self.ids.ellipse(box, fill=len(self.segments))

    def line(self, points, colour, width, alpha=255):
        points = [(x * self.n, y * self.n) for x, y in points]
        self.pen.line(points, fill=self.ink(colour, alpha), width=max(1, round(width * self.n)))

    def owners(self):
        """Class name at every canvas pixel as an index into CLASSES + 1: (N, N)."""
        table = np.array([0] + [CLASSES.index(s) + 1 for s in self.segments])
        return table[np.asarray(self.owner)]


def wavy(rng, t, low, high, terms=3):
    """A smooth random curve over t, about -1..1: a few sines of low..high periods."""
    wave = lambda: np.sin(2 * np.pi * (rng.uniform(low, high) * t + rng.random())) * rng.uniform(.5, 1)
    return sum(wave() for _ in range(terms)) / terms ** .5 / 1.2


# ---- sky and stuff -----------------------------------------------------------------------------------------

def paint_sky(c, rng, sky, horizon, sun, night):
    """Gradient, the sun's glow, by night stars; `sun` is (x, y, radius) or None."""
    y = c.y[:int((horizon + .04) * c.n)]                            # (R, 1) the land hides the rest
    t = np.clip(y / horizon, 0, 1) ** 1.2
    colour = mix(np.array(sky[0]), np.array(sky[1]), t[..., None])  # (R, 1, 3)
    if sun is not None:
        glow = np.exp(-((c.x - sun[0]) ** 2 + (y - sun[1]) ** 2) / (0.03 if not night else 0.012))[..., None]
        colour = mix(colour, (255, 240, 190) if not night else (120, 136, 180), 0.6 * glow)
    c.depth = 0.0
    c.layer("sky", y < 2, mix(colour, c.fog_colour, c.fog * 0.8), top=0)
    for _ in range(rng.integers(14, 26) if night else 0):
        x, y, r = rng.random(), rng.random() * horizon, rng.uniform(.004, .009)
        c.ellipse(x, y, r, r, (240, 240, 220), solid=False, lit=False, alpha=220)


def paint_sun(c, sun, kind, night):
    x, y, r = sun
    c.begin("sun", 0.0)
    colour = {"sunset": (255, 120, 60), "morning": (255, 226, 120)}.get(kind, (255, 214, 60))
    colour = (236, 234, 214) if night else colour
    colour = mix(colour, c.fog_colour, c.fog * 0.6)
    c.ellipse(x, y, r, r, colour, lit=False)
    core = mix(colour, (255, 255, 235), .4)
    c.ellipse(x - r * .12, y - r * .12, r * .72, r * .72, core, solid=False, lit=False)
    if night:
        c.ellipse(x + r * .3, y + r * .2, r * .2, r * .2, (196, 196, 186), solid=False, lit=False)
        c.ellipse(x - r * .3, y - r * .1, r * .15, r * .15, (200, 200, 190), solid=False, lit=False)


def paint_cloud(c, rng, x, y, w, kind):
    """Puffs on a flat base: shaded below, bright above."""
    c.begin("cloud", 0.0)
    bright = {"sunset": (255, 206, 190), "overcast": (226, 228, 232), "rain": (128, 136, 150),
              "night": (66, 76, 116), "morning": (255, 248, 238)}.get(kind, (255, 255, 255))
    bright = mix(bright, c.fog_colour, c.fog * 0.6)
    shade = mix(bright, {"sunset": (170, 96, 130), "night": (20, 26, 60)}.get(kind, (130, 148, 176)), .35)
    h = w * .36
    puffs = [(x + w * u, y - h * rng.uniform(.25, .5) * (1.3 - abs(u) * 2), w * rng.uniform(.17, .24))
             for u in (-.3, -.1, .12, .3)]
    c.ellipse(x, y, w * .5, h * .34, shade, lit=False)
    for px, py, r in puffs:
        c.ellipse(px, py, r, r * .8, shade, lit=False)
    for px, py, r in puffs:
        c.ellipse(px, py - r * .14, r * .9, r * .62, bright, solid=False, lit=False)


def paint_hills(c, rng, horizon):
    """One or two ridges; a high far one may carry snow. Flanks are lit from the left."""
    high = rng.random() < .4
    shades = [(98, 116, 150), (106, 108, 142)] if high else [(84, 128, 104), (112, 136, 92)]
    base = np.array(shades[rng.integers(2)])
    for k in range(rng.integers(1, 3)):
        low, top = ((1, 2.4), rng.uniform(.12, .2)) if high else ((.6, 1.5), rng.uniform(.07, .14))
        ridge = wavy(rng, c.x, *low)                                # (1, N)
        if high:
            ridge = 2 * np.abs(ridge) ** .8 - .6
        height = np.clip(top * (.55 + .5 * ridge) * (1 if k == 0 else .6), .012, None)
        slope = np.gradient(height[0])[None] * c.n
        start = max(int((horizon - height.max()) * c.n) - 2, 0)
        y = c.y[start:int((horizon + .03) * c.n)]                   # (R, 1)
        inside = (y > horizon - height) & (y < horizon + .02)
        depth = (y - (horizon - height)) / height                   # (R, N) 0 at the ridge .. 1 at the foot
        colour = base * (1 + .12 * np.tanh(slope * 2.5) - .14 * np.clip(depth, 0, 1))[..., None]
        colour = mix(colour, (190, 206, 222), .25 if k == 0 else .05)
        if high and k == 0 and top > .15:
            cap = depth * height < .035 + .012 * wavy(rng, c.x, 6, 9, 2)
            snow = mix((246, 248, 252), base, .15)
            colour = np.where((cap & (height > .1))[..., None], snow, colour)
        c.layer("hill", inside, c.light(colour, 0.15), top=start)
        base = base * .86


def grass_colour(c, rng, y, v, tone):
    """Soft stripes that open towards the viewer, broken by slow patches: (N, N, 3)."""
    base = np.array({"green": (112, 168, 74), "lush": (86, 152, 70), "dry": (188, 174, 92)}[tone])
    stripe = np.sin(14 * np.log(v + .25) + 2.2 * wavy(rng, c.x, .4, 1.2) + rng.random() * 6)
    patch = wavy(rng, c.x, .5, 1.6) * wavy(rng, y, .8, 2)           # (R, N)
    return base * (1.06 - .16 * v + .045 * stripe + .06 * patch)[..., None]


def water_colour(c, rng, v, sky, sun, kind):
    """Wave dashes, closer near the horizon, over sky-coloured depth; a glitter path under the sun."""
    deep = np.array([(38, 96, 168), (32, 112, 150), (52, 106, 190)][rng.integers(3)]) * c.tint
    colour = mix(mix(deep, np.array(sky[1]), .42), deep, np.clip(v * 1.3, 0, 1)[..., None])
    phase = 19 * np.log(v + .25) + .9 * wavy(rng, c.x, 1, 3)        # (N, N)
    dash = np.sin(2 * np.pi * (rng.uniform(1.6, 2.6) * c.x) + .8 * phase + rng.random() * 6)
    crest = np.clip(np.sin(phase) - .35, 0, 1) * np.clip(.6 + dash, 0, 1)
    colour = mix(colour, mix(np.array(sky[1]), (255, 255, 255), .4), (.5 * crest)[..., None])
    if sun is not None:
        path = np.exp(-((c.x - sun[0]) / (.05 + .08 * v)) ** 2) * np.clip(np.sin(phase * 1.0) + .3, 0, 1)
        colour = mix(colour, (255, 226, 160) if kind != "night" else (190, 200, 220), (.65 * path)[..., None])
    return c.veil(colour, np.clip(v, 0, 1)[..., None])


def sand_colour(c, rng, v):
    base = np.array([(236, 212, 156), (226, 196, 142)][rng.integers(2)])
    ripple = np.sin(22 * np.log(v + .3) + 2.5 * wavy(rng, c.x, .6, 1.6))
    return base * (1.02 - .08 * v + .035 * ripple)[..., None]


def shore(c, rng, a, b):
    """y of a shoreline: a tilted, gently waving curve (1, N)."""
    return a + b * (c.x - .5) + .018 * wavy(rng, c.x, .8, 2)


def paint_ground(c, rng, horizon, sky, sun, kind):
    """Choose the land: returns (layout, grass tone)."""
    layout = rng.choice(["meadow", "lake", "river", "bay", "beach", "sea"], p=[.34, .17, .11, .12, .2, .06])
    tone = rng.choice(["green", "lush", "dry"], p=[.45, .35, .2])
    y = c.y[int(horizon * c.n) - 4:]                                # (R, 1) only the rows that show land
    v = np.clip((y - horizon) / (1 - horizon), 0, 1)                # (R, 1) 0 far .. 1 near
    below = y > horizon + .006 * wavy(rng, c.x, .5, 1.5) * (layout not in ("sea", "beach", "lake"))
    if layout != "sea" and layout != "beach":
        c.layer("grass", below, c.light(grass_colour(c, rng, y, v, tone), np.clip(v, 0, 1)[..., None]))
    if layout == "meadow":
        if rng.random() < .6:
            paint_road(c, rng, y, v, below)
    else:
        line = shore(c, rng, horizon + (1 - horizon) * rng.uniform(.35, .6), rng.uniform(-.2, .2))
        if layout == "bay":
            x0, x1, side = rng.uniform(.35, .65), rng.uniform(.25, .75), rng.choice([-1, 1])
            wet = (c.x - (x0 + (x1 - x0) * v) - .05 * wavy(rng, y, 1, 2.5)) * side > 0
        elif layout == "river":
            wet = winding(c, rng, v, rng.uniform(.03, .05), rng.uniform(.14, .22))
        else:
            wet = y < (2 if layout == "sea" else line)
        if layout == "beach":
            c.layer("sand", below, c.light(sand_colour(c, rng, v), np.clip(v, 0, 1)[..., None]))
            foam = np.abs(y - line - .004) < .011
            c.layer(None, below & foam, c.light(np.array((250, 250, 246)), .5))
        c.layer("water", below & wet, water_colour(c, rng, v, sky, sun, kind))
        if layout == "lake" and rng.random() < .35:
            paint_road(c, rng, y, v, y > line + .05, across=True)
    return layout, tone


def winding(c, rng, v, far, near):
    """A band that winds from the horizon to the viewer: (R, N) bool."""
    middle, swing = rng.uniform(.3, .7), rng.uniform(.08, .22)
    centre = middle + swing * np.sin(rng.uniform(3, 5.5) * v ** .7 + rng.random() * 6.3) * (.3 + v)
    return np.abs(c.x - centre) < far + near * v ** 1.3


def paint_road(c, rng, y, v, allowed, across=None):
    """A grey road with a dashed line or an earthen path, away from the viewer or across the picture."""
    paved = rng.random() < .5
    base, edge = ((122, 122, 130), (176, 176, 176)) if paved else ((196, 160, 112), (164, 128, 84))
    across = rng.random() < .35 if across is None else across
    if across:
        centre = shore(c, rng, rng.uniform(.8, .9), rng.uniform(-.1, .1))
        off, half = y - centre, .065
        inside, middle = np.abs(off) < half, (np.abs(off) < .008) & (np.sin(c.x * 38) > -.1)
        border = np.abs(np.abs(off) - half + .008) < .008
    else:
        start, swing = rng.uniform(.35, .65), rng.uniform(.06, .2)
        centre = start + swing * np.sin(rng.uniform(3, 5) * v ** .7 + rng.random() * 6.3) * (.3 + v)
        half, off = .022 + .15 * v ** 1.2, c.x - centre
        inside, middle = np.abs(off) < half, (np.abs(off) < .06 * half) & (np.sin(16 * np.log(v + .25)) > 0)
        border = np.abs(np.abs(off) - half * .93) < half * .07
    depth = np.clip(v, 0, 1)[..., None]
    c.layer("road", inside & allowed, c.light(np.array(base) * (1.05 - .1 * v)[..., None], depth))
    flat = np.ones_like(depth)                                      # (R, 1, 1)
    c.layer(None, border & inside & allowed, c.light(np.array(edge) * flat, depth))
    if paved:
        c.layer(None, middle & inside & allowed, c.light(np.array((244, 238, 210)) * flat, depth))


def paint_flowers(c, rng, horizon, grass):
    """A handful of flowers on the grass (part of it)."""
    paint = list(PAINTS.values())[rng.integers(4)]
    for _ in range(rng.integers(10, 20)):
        x, y = rng.random(), rng.uniform(horizon + .15, .98)
        v = (y - horizon) / (1 - horizon)
        if grass[int(y * c.n), int(x * c.n)]:
            c.depth, r = v, .006 + .009 * v
            c.ellipse(x, y, r, r, paint, solid=False)


# ---- things: each is drawn standing on (x, y), s = its scale -----------------------------------------------

def shadow(c, x, y, rx, ry):
    c.ellipse(x, y, rx, ry, (20, 30, 20), solid=False, alpha=70 * (1 - c.fog))


def draw_house(c, rng, x, y, s, colour, lamps):
    """A gabled front and a long side under one roof; lamps light the windows."""
    w, flip = .36 * s, rng.choice([-1, 1])
    wall, roof = np.array(WALLS[colour]), np.array(ROOFS[colour])
    at = lambda u, v: (x + flip * (u - .5) * w, y - v * w)   # house coordinates -> picture
    box = lambda u, v, du, dv: [at(u, v), at(u + du, v), at(u + du, v + dv), at(u, v + dv)]
    glass = (255, 214, 110) if lamps else (92, 116, 150)
    shadow(c, x, y, w * .58, w * .06)
    c.polygon(box(.7, .5, .1, .36), wall * .6)                      # chimney
    c.polygon(box(.44, 0, .54, .42), wall * .8)
    c.polygon([at(0, 0), at(0, .42), at(.22, .74), at(.44, .42), at(.44, 0)], wall)
    for v in (.1, .2, .3, .4):                                      # rows of brick or board
        c.line([at(.02, v), at(.98, v)], wall * .55, .02 * w, alpha=90)
    c.polygon([at(.22, .76), at(.8, .76), at(1.03, .38), at(.46, .38)], roof)
    c.line([at(.26, .64), at(.86, .64)], roof * 1.3, .03 * w, alpha=150)
    c.line([at(.37, .51), at(.94, .51)], roof * 1.3, .03 * w, alpha=150)
    c.polygon([at(-.04, .36), at(.22, .78), at(.26, .76), at(.03, .36)], roof * .8)
    c.polygon(box(.14, 0, .16, .27), (104, 66, 48), solid=False)
    c.ellipse(*at(.22, .5), .055 * w, .055 * w, glass, solid=False, lit=not lamps)
    for u in (.53, .76):
        c.polygon(box(u, .14, .14, .16), glass, solid=False, lit=not lamps)
    return w * .5, .78 * w


def draw_tree(c, rng, x, y, s, colour, lamps):
    h = .42 * s * rng.uniform(.9, 1.12)
    shadow(c, x, y, h * .26, h * .05)
    trunk = [(x - h * .05, y), (x - h * .035, y - h * .5), (x + h * .035, y - h * .5), (x + h * .05, y)]
    c.polygon(trunk, (112, 76, 50))
    if colour == "pine":
        green = np.array((44, 104, 72))
        for v, r in ((.16, .27), (.4, .22), (.64, .16)):
            top = y - h * (v + .4)
            c.polygon([(x - r * h, y - v * h), (x, top), (x + r * h, y - v * h)], green * (.85 + .35 * v))
            shaded = [(x + r * h, y - v * h), (x, top), (x + r * h * .15, y - v * h)]
            c.polygon(shaded, green * .66, solid=False)
        return h * .27, h * 1.04
    leaf = np.array(LEAVES[colour])
    crown = ((-.17, .5, .18), (.17, .52, .18), (-.08, .74, .19), (.1, .72, .2), (0, .58, .2))
    blobs = [(x + h * dx, y - h * dy, h * r * rng.uniform(.92, 1.1)) for dx, dy, r in crown]
    for bx, by, r in blobs:
        c.ellipse(bx, by, r, r, leaf * .74)
    for bx, by, r in blobs:
        c.ellipse(bx - r * .16, by - r * .2, r * .74, r * .72, leaf, solid=False)
    for bx, by, r in blobs[:4]:
        c.ellipse(bx - r * .32, by - r * .4, r * .3, r * .26, mix(leaf, (255, 250, 200), .3), solid=False)
    return h * .35, h * .94


def draw_boat(c, rng, x, y, s, colour, lamps):
    w, flip = .3 * s, rng.choice([-1, 1])
    hull = np.array([(128, 72, 46), (178, 48, 44), (44, 60, 104), (240, 236, 228)][rng.integers(4)])
    sail = np.array(PAINTS[colour])
    at = lambda u, v: (x + flip * u * w, y - v * w)
    c.ellipse(x, y + .03 * w, w * .46, w * .06, hull * .4, solid=False, alpha=110)
    c.polygon([at(-.06, -.04), at(-.02, -.4), at(.3, -.06)], sail, solid=False, alpha=60)
    c.polygon([at(-.02, .2), at(-.02, 1.2), at(.03, 1.2), at(.03, .2)], (96, 70, 50))
    c.polygon([at(.01, .2), at(.03, 1.18), at(.46, .2)], sail)
    c.polygon([at(.05, .2), at(.045, .46), at(.34, .46), at(.46, .2)], sail * .86, solid=False)
    c.polygon([at(.02, .2), at(-.01, 1.0), at(-.38, .2)], sail * .93)
    c.polygon([at(-.5, .22), at(.52, .22), at(.36, 0), at(-.34, 0)], hull)
    rail = mix(hull, (255, 255, 255), .4)
    c.polygon([at(-.5, .22), at(.52, .22), at(.48, .15), at(-.46, .15)], rail, solid=False)
    return w * .5, w * 1.2


def draw_ball(c, rng, x, y, s, colour, lamps):
    r = .068 * s * rng.uniform(.92, 1.15)
    paint, cy = np.array(PAINTS[colour]), y - r
    shadow(c, x + r * .25, y, r * 1.05, r * .28)
    c.ellipse(x, cy, r, r, paint * .78)
    c.ellipse(x - r * .1, cy - r * .12, r * .84, r * .82, paint, solid=False)
    stripe = (60, 110, 210) if colour == "white" else (250, 248, 240)
    band = [(-.9, .28), (-.5, .06), (.5, .06), (.9, .28), (.5, .4), (-.5, .4)]
    c.polygon([(x + r * u, cy + r * v) for u, v in band], stripe, solid=False, alpha=225)
    c.ellipse(x - r * .36, cy - r * .42, r * .22, r * .18, (255, 255, 255), solid=False, alpha=230)
    return r, 2 * r


def draw_person(c, rng, x, y, s, colour, lamps):
    """(colour, "man" or "woman"): trousers or a dress."""
    colour, kind = colour
    h, paint = .3 * s, np.array(PAINTS[colour])
    skin = np.array([(244, 204, 172), (206, 152, 112), (138, 92, 66)][rng.integers(3)])
    hair = np.array([(64, 44, 34), (184, 128, 62), (34, 30, 32)][rng.integers(3)])
    at = lambda u, v: (x + u * h, y - v * h)
    shadow(c, x, y, h * .22, h * .05)
    trousers = (58, 62, 92) if kind == "man" else skin
    for u in (-.09, .09):
        wide = .075 if kind == "man" else .05
        c.polygon([at(u - wide, 0), at(u - wide, .46), at(u + wide, .46), at(u + wide, 0)], trousers)
    arm = rng.choice([.3, .62])                                     # one arm may wave
    c.polygon([at(-.15, .74), at(-.28, .4), at(-.2, .38), at(-.09, .66)], paint * .82)
    c.polygon([at(.1, .74), at(.29, arm + .1), at(.25, arm + .02), at(.08, .62)], paint * .82)
    hem = .17 if kind == "man" else .27
    low = .4 if kind == "man" else .24
    c.polygon([at(-hem, low), at(-.15, .75), at(.15, .75), at(hem, low)], paint)
    c.polygon([at(hem * .3, low), at(.06, .75), at(.15, .75), at(hem, low)], paint * .86, solid=False)
    c.ellipse(*at(0, .88), .135 * h, .135 * h, hair)
    if kind == "woman":
        c.polygon([at(-.135, .72), at(-.135, .9), at(.135, .9), at(.135, .72)], hair)
    c.ellipse(*at(.015, .855), .1 * h, .105 * h, skin, solid=False)
    return .27 * h, h


DRAW = {"house": draw_house, "tree": draw_tree, "boat": draw_boat, "ball": draw_ball, "person": draw_person}
WIDE = {"house": (.18, .28), "tree": (.13, .42), "boat": (.15, .36),            # half width, height
        "ball": (.07, .14), "person": (.08, .3)}
STANDS = {"house": ["grass"], "tree": ["grass"], "boat": ["water"], "ball": ["grass", "sand", "road"],
          "person": ["grass", "sand", "road"]}


# ---- the scene ---------------------------------------------------------------------------------------------

def pick_looks(rng, name):
    """What a thing looks like, in the words that captions use."""
    if name == "house":
        return str(rng.choice(list(WALLS)))
    if name == "tree":
        return str(rng.choice(["green", "pine", "orange", "red", "pink"], p=[.4, .28, .14, .08, .1]))
    if name == "boat":
        return str(rng.choice(["white", "red", "yellow", "orange", "blue"], p=[.4, .2, .15, .15, .1]))
    if name == "ball":
        return str(rng.choice(["red", "blue", "yellow", "orange", "purple", "white"]))
    return str(rng.choice(["red", "blue", "yellow", "white", "purple"])), str(rng.choice(["man", "woman"]))


def pick_things(rng, ground):
    """Names of the things to place: some classes the ground can carry, each one to four times."""
    share = np.bincount(ground.ravel(), minlength=len(CLASSES) + 1) / ground.size
    able = [n for n in STANDS if any(share[CLASSES.index(s) + 1] > .06 for s in STANDS[n])]
    names = []
    weights = np.array([{"house": 1.2, "tree": 1.3, "boat": 2.2, "ball": .8, "person": .9}[n] for n in able])
    count = min(len(able), rng.choice([1, 2, 3], p=[.3, .45, .25]))
    kinds = rng.choice(able, size=count, replace=False, p=weights / weights.sum())
    for name in kinds:
        names += [str(name)] * rng.choice([1, 2, 3], p=[.55, .3, .15])
    if "tree" in names and rng.random() < .3:
        names += ["tree"] * 2
    return names[:6]


def place(rng, names, ground, horizon):
    """Things with a place that carries them and little overlap: [(y, x, scale, name, looks)], far to near."""
    n, placed, boxes, looks = len(ground), [], [], {}
    for name in names:
        for _ in range(24):
            v = rng.uniform(.3 if name in ("ball", "person") else .1, .97)
            x, y, s = rng.uniform(.07, .93), horizon + (1 - horizon) * v, .55 + .6 * v
            half, tall = WIDE[name][0] * s, WIDE[name][1] * s
            columns = [int(np.clip(x + d * half, .01, .99) * n) for d in (-.8, 0, .8)]
            feet = ground[min(int(y * n), n - 1), columns]
            box = (x - half, y - tall, x + half, y)
            if all(CLASSES[f - 1] in STANDS[name] for f in feet) and all(overlap(box, b) < .3 for b in boxes):
                if name not in looks or rng.random() < .4:          # things of a class are often alike
                    looks[name] = pick_looks(rng, name)
                placed.append((y, x, s, name, looks[name]))
                boxes.append(box)
                break
    return sorted(placed, key=lambda p: p[0])


def overlap(a, b):
    """Shared area of two boxes over the smaller one's."""
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    area = lambda r: (r[2] - r[0]) * (r[3] - r[1])
    return max(w, 0) * max(h, 0) / min(area(a), area(b))


def paint_air(c, rng, horizon, kind, sun):
    """Clouds apart from each other and from the sun."""
    count = rng.choice([0, 1, 2, 3], p=[.3, .3, .25, .15] if kind != "overcast" else [.25, .3, .3, .15])
    taken = [(sun[0], sun[1], sun[2] * 2.2)] if sun is not None else []
    for _ in range(count):
        for _ in range(12):
            x, y, w = rng.uniform(.08, .92), rng.uniform(.07, max(horizon - .2, .1)), rng.uniform(.24, .4)
            if all(abs(x - t[0]) > (w + t[2]) * .55 or abs(y - t[1]) > .15 for t in taken):
                taken.append((x, y, w))
                paint_cloud(c, rng, x, y, w, kind)
                break


def rain(c, rng):
    slant = rng.uniform(-.03, .03)
    for _ in range(36):
        x, y = rng.random(2)
        drop = [x * c.n, y * c.n, (x + slant) * c.n, (y + .1) * c.n]
        c.pen.line(drop, fill=(214, 224, 236, 90), width=max(1, c.n // 110))


def ink_drawing(c, rng):
    """The canvas in pen and ink: outlines at strong edges, hatching in the dark: (N, N, 3) uint8"""
    grey = np.asarray(c.picture.convert("L"), np.float32)
    owner = np.asarray(c.owner).astype(int)
    edge = np.zeros((c.n, c.n), bool)
    for shift in ((1, 0), (0, 1), (2, 0), (0, 2)):
        edge |= owner != np.roll(owner, shift, (0, 1))
        edge |= np.abs(grey - np.roll(grey, shift, (0, 1))) > 26
    edge[:3], edge[:, :3] = False, False
    step, pen = c.n // 14, max(1, c.n // 80)
    i, j = np.arange(c.n)[:, None], np.arange(c.n)[None]
    owners = c.owners()                                             # (N, N)
    solid = ("house", "tree", "boat", "ball", "person", "hill")
    things = np.isin(owners, [CLASSES.index(n) + 1 for n in solid])
    hatch = ((i + j) % step < pen) & (grey < 150) & things
    hatch |= ((i - j) % (step // 2) < pen) & (grey < 105) & things
    waves = (i % step < pen) & (np.sin(j / step * 1.7 + i // step * 2.3) > .2)
    hatch |= waves & (owners == CLASSES.index("water") + 1)
    paper = np.array((244, 238, 224.)) * (1 + .015 * wavy(rng, c.x, .5, 2) * wavy(rng, c.y, .5, 2))[..., None]
    drawn = np.where(hatch[..., None], (112, 106, 112), paper)
    return np.where(edge[..., None], (34, 30, 40), drawn).astype(np.uint8)


def scene(rng, size=64, style="day"):
    """One drawn scene. Style "day" is the world of train and val in any light; "night", "fog", "ink" are new.
    -> dict(image (H, W, 3), mask (H, W) class ids, instances (H, W), 0 none, all uint8; captions: 3 str)"""
    kind = str(rng.choice(["day", "morning", "sunset", "overcast", "rain"], p=[.36, .18, .22, .16, .08]))
    kind = {"night": "night", "fog": "overcast", "ink": "day"}.get(style, kind)
    top, low, tint = LIGHTS[kind][rng.integers(len(LIGHTS[kind]))]
    sky = [np.clip(np.array(s) + rng.uniform(-10, 10, 3), 0, 255) for s in (top, low)]
    horizon = rng.uniform(.34, .5)
    sun = None
    if kind in ("day", "morning", "sunset", "night") and rng.random() < .62:
        r = rng.uniform(.06, .09) if kind == "sunset" else rng.uniform(.055, .075)
        x = rng.uniform(.12, .88)
        sun = (x, horizon - rng.uniform(.06, .2) if kind == "sunset" else rng.uniform(.1, .18), r)
    c = Canvas(size, tint, fog=rng.uniform(.72, .9) if style == "fog" else 0.0)
    paint_sky(c, rng, sky, horizon, sun, kind == "night")
    if sun is not None:
        paint_sun(c, sun, kind, kind == "night")
    paint_air(c, rng, horizon, kind, sun)
    if rng.random() < .42:
        paint_hills(c, rng, horizon)
    layout, tone = paint_ground(c, rng, horizon, sky, sun, kind)
    ground = c.owners()
    if rng.random() < .3:
        paint_flowers(c, rng, horizon, ground == CLASSES.index("grass") + 1)
    looks = [""] * len(c.segments)
    for y, x, s, name, look in place(rng, pick_things(rng, ground), ground, horizon):
        c.begin(name, (y - horizon) / (1 - horizon))
        looks.append(look)
        DRAW[name](c, rng, x, y, s, look, lamps=kind in ("sunset", "night"))
    if kind == "rain":
        rain(c, rng)
    picture = Image.fromarray(ink_drawing(c, rng)) if style == "ink" else c.picture
    image = np.asarray(picture.reduce(FINE))                        # (H, W, 3)
    owner = np.asarray(c.owner)[FINE // 2::FINE, FINE // 2::FINE]   # (H, W)
    mask = np.array([0] + [CLASSES.index(s) + 1 for s in c.segments], np.uint8)[owner]
    instances = number(owner, c.segments)
    seen = visible(owner, c.segments, looks, size)
    return dict(image=image, mask=mask, instances=instances,
                captions=[write(rng, seen, layout, tone, kind, style, k) for k in range(3)])


def number(owner, segments):
    """Owner map -> instances (H, W) uint8: the visible things numbered from 1."""
    table, k = np.zeros(len(segments) + 1, np.uint8), 0
    for s in np.unique(owner):
        if s and segments[s - 1] in THINGS:
            k += 1
            table[s] = k
    return table[owner]


def visible(owner, segments, looks, size):
    """{class: [(look, x, y, area)]} of what can be seen; specks do not count."""
    seen = {}
    for k, (name, look) in enumerate(zip(segments, looks), 1):
        ys, xs = np.nonzero(owner == k)
        if len(ys) >= (12 if name in THINGS else 30) * (size / 64) ** 2:
            seen.setdefault(name, []).append((look, xs.mean() / size, ys.max() / size, len(ys)))
    return seen


# ---- captions ----------------------------------------------------------------------------------------------

def article(phrase):
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def join(parts):
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def group(rng, name, items, kind, rich):
    """"two red houses", "a boat with a white sail": the things of one class as a phrase."""
    count, looks = len(items), {i[0] for i in items}
    look = looks.pop() if len(looks) == 1 and rich else None
    many = NUMBERS[count] if count < 4 or rng.random() < .6 else "several"
    say = lambda one, plural, adjective="": article(f"{adjective} {one}".strip()) if count == 1 else \
        f"{many} {adjective} {plural}".replace("  ", " ")
    if name == "house":
        noun = rng.choice(["house", "house", "cottage"])
        return say(noun, noun + "s", look or "")
    if name == "tree":
        if look == "pine":
            return say("pine tree", "pine trees")
        adjective = {"green": ["green", "leafy", ""], "orange": ["orange", "autumn"],
                     "red": ["red", "autumn"], "pink": ["pink", "blossoming"]}.get(look, [""])
        return say("tree", "trees", rng.choice(adjective))
    if name == "boat":
        noun = rng.choice(["boat", "boat", "sailboat"])
        sails = f" with {article(look)} sail" if count == 1 and look else f" with {look} sails"
        return say(noun, noun + "s") + (sails if look else "")
    if name == "ball":
        return say("ball", "balls", look or "")
    if name == "person":
        kinds = {i[0][1] for i in items}
        colours = {i[0][0] for i in items}
        one, plural = ("person", "people") if len(kinds) > 1 or rng.random() < .3 else \
            (("man", "men") if kinds == {"man"} else ("woman", "women"))
        return say(one, plural) + (f" in {colours.pop()}" if rich and len(colours) == 1 else "")
    colour = {"rain": "dark", "overcast": "grey", "sunset": "pink", "night": "dark"}.get(kind, "white")
    return say("cloud", "clouds", colour if rich and rng.random() < .5 else "")


def sky_phrase(rng, kind, style, seen, brief):
    """Light and weather, with the sun and the clouds if they show."""
    sun, clouds = "sun" in seen, "cloud" in seen
    disc = "moon" if kind == "night" else "sun"
    light = {"fog": ["in the fog", "on a foggy day", "in thick fog"], "ink": ["in ink", "drawn in ink"]}
    light = light.get(style, LIGHT_WORDS[kind])
    parts = ["the " + disc] if sun else []
    parts += [group(rng, "cloud", seen["cloud"], kind, not brief)] if clouds else []
    words = rng.choice(light) if not brief else min(light, key=len)
    return words if not parts else f"{words} with {join(parts)}"


def land_place(rng, seen, layout, tone, afloat, brief):
    """Where the things on land stand, naming the ground that shows (and the water, unless a boat does)."""
    green = ["on the grass", "on a green meadow", "in a meadow", "on a lawn"]
    grass = ["on dry grass", "in a dry field"] if tone == "dry" else green
    water = {"lake": "by the lake", "river": "by the river", "bay": "by the bay"}.get(layout, "by the water")
    if "sand" in seen:
        sea = " by the sea" if "water" in seen and not (afloat or brief) else ""
        return rng.choice(["on the beach", "on the sand"]) + sea
    words = [rng.choice(grass)] if "grass" in seen else []
    if "road" in seen:
        words.append(rng.choice(["by a road", "beside a path", "near a road", "along a lane"]))
    if "water" in seen and not afloat:
        words.append(water if rng.random() < .6 else "by the water")
    return " ".join(words[:3 if not brief else 1]) or "outside"


def relation(rng, pairs):
    """Two single things side by side or one before the other: "a ball to the left of a house"."""
    (a, ia), (b, ib) = pairs
    if abs(ia[0][1] - ib[0][1]) < .14:
        return f"{a} in front of {b}" if ia[0][2] > ib[0][2] else f"{b} in front of {a}"
    return f"{a} to the {'left' if ia[0][1] < ib[0][1] else 'right'} of {b}"


def write(rng, seen, layout, tone, kind, style, k):
    """Caption k of a scene: 0 names all that shows before its colours, 1 begins with the light and puts
    colours before the background, 2 is plain. Shorter and shorter wordings are tried until one fits."""
    for attempt in range(12):
        level = attempt // 4
        rich = style != "ink" and (level == 0 or level == 1 and k == 1) and not (k == 2 and rng.random() < .4)
        brief = level == 2 or level == 1 and k != 0
        names = [n for n in ("house", "tree", "person", "ball") if n in seen]
        order = [names[i] for i in rng.permutation(len(names))]
        land = [(group(rng, n, seen[n], kind, rich), seen[n]) for n in order]
        water = "boat" in seen and group(rng, "boat", seen["boat"], kind, rich)
        where = {"lake": ["on the lake"], "river": ["on the river"], "bay": ["in the bay"]}
        where = rng.choice(where.get(layout, ["at sea", "on the sea"]))
        where = "on the water" if rng.random() < .4 else where
        clauses = []
        if land:
            single = len(land) == 2 and all(len(i) == 1 for _, i in land) and rng.random() < .6
            what = relation(rng, land) if single and not brief else join([p for p, _ in land])
            clauses.append(f"{what} {land_place(rng, seen, layout, tone, bool(water), brief)}")
        if water:
            clauses.append(f"{water} {where}")
            if not land and "sand" in seen:
                clauses.append(rng.choice(["a beach in front", "sand in front"]))
            elif not land and "grass" in seen:
                clauses.append(rng.choice(["grass in front", "a meadow in front", "grass on the bank"]))
        if not clauses:
            clauses.append(empty_place(rng, seen, tone))
        if "hill" in seen and not brief:
            clauses.append(rng.choice(["hills behind", "hills in the distance", "mountains behind"]))
        light = sky_phrase(rng, kind, style, seen, not rich)
        body = ", ".join(clauses)
        text = f"{light}, {body}" if k == 1 else f"{body}{' ' if len(clauses) == 1 else ', '}{light}"
        if len(text.encode()) <= CAPTION_BYTES:
            return text
    names = [p for p, _ in land] + ([water] if water else []) + [w for w in ("sun", "cloud") if w in seen]
    return join(names or ["an open view"])


def empty_place(rng, seen, tone):
    """A landscape without things."""
    names = {"sand": ["a beach", "sand"],
             "water": ["the water", "the sea" if "sand" in seen else "calm water"],
             "road": ["a road", "a path"],
             "grass": ["a meadow", "a dry field" if tone == "dry" else "green grass"]}
    parts = [str(rng.choice(names[n])) for n in names if n in seen]
    return join(parts or ["an open view"])


# ---- files -------------------------------------------------------------------------------------------------

def palette(count):
    """Colours of the codes 0..count+1 (void, classes, edge): (count + 2, 3) uint8."""
    b = next(b for b in range(2, 256) if b ** 3 >= count + 2)
    v, s = np.arange(count + 2), round(255 / (b - 1))
    return np.minimum(np.stack([s * (v // b % b), s * (v // b ** 2), s * (v % b)], 1), 255).astype(np.uint8)


def replace(path, write_to):
    """Write through a temporary name, so that a file that exists is whole."""
    part = f"{path}.{os.getpid()}.part"
    try:
        write_to(part)
        if not os.path.exists(part):                                # a second run has tidied it away
            write_to(part)
        os.replace(part, path)
    finally:
        if os.path.exists(part):
            os.remove(part)


def save_text(path, text):
    def put(part):
        with open(part, "w", encoding="utf-8", newline="\n") as f:
            f.write(text)
    replace(path, put)


def draw(split, index, size, seed):
    """Scene `index` of a split."""
    rng = np.random.default_rng((seed, STREAMS[split], index))
    return scene(rng, size, UNSEEN[index * len(UNSEEN) // SPLITS["unseen"]] if split == "unseen" else "day")


def draw_one(job):
    """Draw and write one scene: caption, instances, mask, then image, which marks the pair as whole."""
    out, split, index, size, seed = job
    path = lambda kind, end="png": os.path.join(out, split, kind, f"{index:05d}.{end}")
    pair = draw(split, index, size, seed)
    save_text(path("captions", "txt"), "\n".join(pair["captions"]) + "\n")
    if split != "unlabelled":
        mask = Image.fromarray(pair["mask"])
        mask.putpalette(palette(len(CLASSES)).tobytes())
        replace(path("instances"), lambda p: Image.fromarray(pair["instances"]).save(p, "PNG"))
        replace(path("masks"), lambda p: mask.save(p, "PNG"))
    replace(path("images"), lambda p: Image.fromarray(pair["image"]).save(p, "PNG"))


def unfinished(out, split):
    """The file that stands while a split is not whole, so that a half-made one is not taken for the data."""
    return os.path.join(out, f".{split}.unfinished")


def missing(out, split, count, size, seed):
    """Make the folders of one split -> the jobs still to draw. Exits if it holds another world."""
    folder = os.path.join(out, split)
    images = os.path.join(folder, "images")
    have = {name for name in os.listdir(images) if name.endswith(".png")} if os.path.isdir(images) else set()
    if split == "train" and len(have) > count:
        sys.exit(f"{folder}: holds {len(have)} scenes, {count} are wanted; delete it or choose another --out")
    if "00000.png" in have:
        check_world(os.path.join(images, "00000.png"), draw(split, 0, size, seed)["image"])
    jobs = [(out, split, i, size, seed) for i in range(count) if f"{i:05d}.png" not in have]
    if jobs:                                                        # before the folder, let alone a scene
        os.makedirs(out, exist_ok=True)
        save_text(unfinished(out, split), "")
    kinds = ["images", "captions"] + (["masks", "instances"] if split != "unlabelled" else [])
    for kind in kinds:
        os.makedirs(os.path.join(folder, kind), exist_ok=True)
        for name in os.listdir(os.path.join(folder, kind)):
            if name.endswith(".part"):                              # a run that was killed left it
                os.remove(os.path.join(folder, kind, name))
    if split != "unlabelled":
        listing = [{"name": n, "isthing": n in THINGS, "source_id": i} for i, n in enumerate(CLASSES, 1)]
        save_text(os.path.join(folder, "classes.json"), json.dumps(listing, indent=1) + "\n")
        save_text(os.path.join(folder, "words.json"), json.dumps(WORDS, indent=1) + "\n")
    return jobs


def check_world(path, drawn):
    """Exit unless the picture on disk is the one that would be drawn: not of another --size or --seed."""
    try:
        found = np.asarray(Image.open(path).convert("RGB"), np.float32)
    except OSError:
        sys.exit(f"{path}: not a readable picture; delete it, the next run draws it again")
    if found.shape != drawn.shape:
        sys.exit(f"{path}: {found.shape[1]} x {found.shape[0]} pixels found, {len(drawn)} x {len(drawn)} "
                 "wanted; delete the folder or choose another --out")
    if np.abs(found - drawn).mean() > 4:                            # another processor may round otherwise
        sys.exit(f"{path}: drawn with another --seed; delete the folder or choose another --out")


def prepare(out, size=64, seed=0, limit_train=None, unlabelled=0, processes=None):
    """Draw what is missing of all splits below `out`; what exists stays. -> the number of scenes drawn.
    The bytes do not depend on `processes`, nor on how often a run was interrupted."""
    counts = dict(SPLITS, train=min(limit_train or SPLITS["train"], SPLITS["train"]), unlabelled=unlabelled)
    jobs = [job for split, n in counts.items() if n for job in missing(out, split, n, size, seed)]
    if jobs:
        with Pool(processes or os.cpu_count()) as pool:
            done = pool.imap_unordered(draw_one, jobs, chunksize=16)
            for _ in tqdm(done, total=len(jobs), desc="drawing", unit="scene"):
                pass
    for split in (split for split, n in counts.items() if n):       # each is whole now
        with contextlib.suppress(FileNotFoundError):
            os.remove(unfinished(out, split))
    return len(jobs)


def main(argv=None):
    here = os.path.dirname(os.path.abspath(__file__))
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--out", default=here, help="folder that gets train/, val/, unseen/")
    p.add_argument("--size", type=int, default=64, help="side of the pictures in pixels, 16 or more")
    p.add_argument("--seed", type=int, default=0, help="another seed, another world")
    p.add_argument("--limit-train", type=int, default=None, help="only the first N training scenes")
    p.add_argument("--unlabelled", type=int, default=0, help="also draw N scenes without masks, for the base")
    p.add_argument("--processes", type=int, default=None, help="worker processes, all cores if not given")
    a = p.parse_args(argv)
    if a.size < 16:
        sys.exit(f"--size {a.size}: the smallest scene that shows anything is 16")
    for name, least in (("seed", 0), ("limit_train", 1), ("unlabelled", 0), ("processes", 1)):
        value = getattr(a, name)
        if value is not None and value < least:
            sys.exit(f"--{name.replace('_', '-')} {value}: must be {least} or more")
    try:
        drawn = prepare(a.out, a.size, a.seed, a.limit_train, a.unlabelled, a.processes)
    except OSError as error:
        sys.exit(f"{a.out}: cannot write there ({error.strerror or error}); choose another folder with --out")
    print(f"{a.out}: {drawn} scenes drawn" if drawn else f"{a.out}: complete, nothing to draw")


if __name__ == "__main__":
    main()
