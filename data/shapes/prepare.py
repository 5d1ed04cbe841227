"""Draw the built-in data set: small picture-book landscapes with masks, instances and captions.

A scene is painted back to front on a canvas 3 x finer than the picture: sky, sun, clouds, hills, ground, then
things from far to near. Every stroke goes to the picture and to an owner map alike, so mask edges are image
edges. Captions are composed from what the mask shows. Scene i of a split depends on (seed, split, i) alone.

Paper:  none; the stand-in for ADE20K and COCO that needs no download; captions are composed, not BLIP-2's.
Differs: `unseen` (the same world by night, in fog, in ink) makes measurable what the paper shows in pictures.
Reads:  nothing.
Writes: OUT/{train,val,unseen}/ pair folders: classes.json, images, masks, instances, captions, words.json
        (the words that name each class); with --unlabelled N, OUT/unlabelled/{images,captions}.
Needs:  data/prepare.py, data/pairs.py
Run:    python data/shapes/prepare.py

Dimension key: N side of the canvas (3 x size), R rows of it, H W pixels. Coordinates are 0..1, y down; in
shape comments and signatures, c is the canvas and v the nearness of the ground: 0 at the horizon, 1 in front.
"""
import functools
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.pairs import (FlagParser, check_classes, list_files, number, open_picture, read_classes,
                        remove_temporary, run, to_rgb, unfinished, write_json, write_pair, write_text)
from data.prepare import join_words, run_jobs, with_article

# In the order in which the palette's colours suit them: blue water, maroon houses, purple hills, a red sun,
# green trees, azure sky, olive grass, grey roads. No colour is left for skin or sand.
CLASSES = ["person", "water", "house", "hill", "ball", "sun", "sand", "boat", "tree", "cloud", "sky", "grass",
           "road"]
ID = {name: k for k, name in enumerate(CLASSES, 1)}
THINGS = {"sun", "cloud", "house", "tree", "boat", "ball", "person"}
WORDS = {       # what a caption may call each class
    "sky": ["sky", "skies"],
    "hill": ["hill", "hills", "mountain", "mountains"],
    "grass": ["grass", "meadow", "field", "lawn"],
    "water": ["water", "lake", "sea", "river", "stream", "bay"],
    "sand": ["sand", "beach"],
    "road": ["road", "path", "lane"],
    "sun": ["sun", "moon"],             # by night the disc in the sky is the moon
    "cloud": ["cloud", "clouds"],
    "house": ["house", "houses", "cottage", "cottages", "home", "homes"],
    "tree": ["tree", "trees", "pine", "pines"],
    "boat": ["boat", "boats", "sailboat", "sailboats"],
    "ball": ["ball", "balls"],
    "person": ["person", "people", "man", "men", "woman", "women"],
}
SPLITS = {"train": 2000, "val": 300, "unseen": 300}
# A split has random numbers of its own, so that no scene is in two of them.
STREAMS = {"train": 0, "val": 1, "unseen": 2, "unlabelled": 3}
UNSEEN = ["night", "fog", "ink"]
FINE = 3                                # canvas pixels per picture pixel, each way
CAPTION_BYTES = 110

LIGHTS = {      # sky at the top, sky at the horizon, light on things
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
    "night": [((10, 14, 44), (46, 60, 108), (.38, .44, .66)),
              ((8, 20, 40), (36, 66, 96), (.36, .48, .62))],
}
WALLS = {"red": (196, 66, 56), "white": (240, 236, 226), "yellow": (240, 200, 92), "blue": (92, 140, 204)}
ROOFS = {"red": (92, 70, 72), "white": (198, 82, 60), "yellow": (150, 78, 58), "blue": (70, 70, 92)}
LEAVES = {"green": (72, 138, 62), "orange": (226, 130, 42), "red": (190, 64, 48), "pink": (238, 158, 182)}
PAINTS = {"red": (214, 52, 48), "blue": (48, 92, 208), "yellow": (246, 206, 50),
          "white": (246, 244, 238), "orange": (240, 134, 40), "purple": (142, 70, 170)}
LIGHT_WORDS = {
    "day": ["under a blue sky", "on a clear day", "under a bright blue sky"],
    "morning": ["in the morning", "on a bright morning", "at sunrise"],
    "sunset": ["at sunset", "at dusk", "in the evening"],
    "overcast": ["under a grey sky", "on a dull day"],
    "rain": ["in the rain", "under a rainy sky", "on a rainy day"],
    "night": ["at night", "by night", "under a starry sky"],
    "fog": ["in the fog", "on a foggy day", "in thick fog"],
    "ink": ["in ink", "drawn in ink"],
}
NUMBERS = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight"]


# ---- canvas ------------------------------------------------------------------------------------------------

def mix(a, b, t):
    """Colours a and b (..., 3) blended, t = share of b."""
    return np.asarray(a, np.float32) * (1 - t) + np.asarray(b, np.float32) * t


class Canvas:
    """A picture and its owner map, drawn together. `segments[k - 1]` is the class of owner value k."""

    def __init__(self, size, tint, fog=0.0, fog_colour=(214, 218, 222)):
        self.n = size * FINE
        self.tint = np.array(tint, np.float32)
        self.fog = fog
        self.fog_colour = fog_colour
        self.picture = Image.new("RGB", (self.n, self.n))
        self.owner = Image.new("L", (self.n, self.n))
        self.pen = ImageDraw.Draw(self.picture, "RGBA")
        self.ids = ImageDraw.Draw(self.owner)
        self.segments = []
        self.depth = 1.0
        steps = (np.arange(self.n) + 0.5) / self.n
        self.x = steps[None].astype(np.float32)                     # (1, N)
        self.y = steps[:, None].astype(np.float32)                  # (N, 1)

    def light(self, colour, depth=None):
        """Albedo 0..255 -> colour under this light, faded by the fog before it (depth 1 = near)."""
        colour = np.clip(np.asarray(colour, np.float32) * self.tint, 0, 255)
        return self.veil(colour, self.depth if depth is None else depth)

    def veil(self, colour, depth):
        """Colour seen through the fog."""
        return mix(colour, self.fog_colour, self.fog * (1 - 0.8 * depth)) if self.fog else colour

    def layer(self, name, inside, colour, top=None):
        """Paint stuff: colour (R, N, 3) where inside (R, N) is true, from row `top` on (None: at the foot).

        A layer with the name None decorates what is there: the owner map keeps its values.
        """
        rows = len(inside)
        corner = (0, self.n - rows if top is None else top)
        stencil = np.broadcast_to(inside, (rows, self.n)).astype(np.uint8) * np.uint8(255)
        stencil = Image.fromarray(stencil)
        colour = np.clip(colour, 0, 255).astype(np.uint8)
        colour = np.broadcast_to(colour, (rows, self.n, 3))
        self.picture.paste(Image.fromarray(np.ascontiguousarray(colour)), corner, stencil)
        if name is None:
            return
        if name not in self.segments:
            self.segments.append(name)
        box = (*corner, self.n, corner[1] + rows)
        self.owner.paste(self.segments.index(name) + 1, box, stencil)

    def begin(self, name, depth):
        """The next solid strokes belong to a new thing of this class."""
        self.segments.append(name)
        self.depth = depth

    def ink(self, colour, alpha=255, lit=True):
        colour = self.light(colour) if lit else colour
        return (*np.clip(colour, 0, 255).astype(int).tolist(), int(alpha))

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
        """Class id at every canvas pixel: (N, N)."""
        table = np.array([0] + [ID[name] for name in self.segments])
        return table[np.asarray(self.owner)]


class Frame:
    """The coordinates of a thing that stands on (x, y): u to the side and v up, in units of its width w."""

    def __init__(self, canvas, x, y, w, flip=1, middle=0):
        self.canvas, self.x, self.y, self.w = canvas, x, y, w
        self.flip = flip                # -1 mirrors the thing
        self.middle = middle            # the u of x

    def at(self, u, v):
        return self.x + self.flip * (u - self.middle) * self.w, self.y - v * self.w

    def polygon(self, points, colour, **options):
        self.canvas.polygon([self.at(u, v) for u, v in points], colour, **options)

    def box(self, u, v, du, dv, colour, **options):
        corners = [(u, v), (u + du, v), (u + du, v + dv), (u, v + dv)]
        self.polygon(corners, colour, **options)


def wavy(rng, t, low, high, terms=3):
    """A smooth random curve over t, about -1..1: a few sines of low..high periods."""
    curve = 0
    for _ in range(terms):
        phase = rng.uniform(low, high) * t + rng.random()
        curve = curve + np.sin(2 * np.pi * phase) * rng.uniform(.5, 1)
    return curve / terms ** .5 / 1.2


# ---- sky and stuff -----------------------------------------------------------------------------------------

def paint_sky(c, rng, sky, horizon, sun, night):
    """Gradient, the sun's glow, by night stars; `sun` is (x, y, radius) or None."""
    y = c.y[:int((horizon + .04) * c.n)]                            # (R, 1) the land hides the rest
    t = np.clip(y / horizon, 0, 1) ** 1.2
    colour = mix(np.array(sky[0]), np.array(sky[1]), t[..., None])  # (R, 1, 3)
    if sun is not None:
        distance = (c.x - sun[0]) ** 2 + (y - sun[1]) ** 2
        glow = np.exp(-distance / (0.03 if not night else 0.012))[..., None]
        colour = mix(colour, (255, 240, 190) if not night else (120, 136, 180), 0.6 * glow)
    c.depth = 0.0
    c.layer("sky", y < 2, mix(colour, c.fog_colour, c.fog * 0.8), top=0)
    for _ in range(rng.integers(14, 26) if night else 0):
        x = rng.random()
        y = rng.random() * horizon
        r = rng.uniform(.004, .009)
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


CLOUD_COLOURS = {
    "sunset": (255, 206, 190), "overcast": (226, 228, 232), "rain": (128, 136, 150),
    "night": (66, 76, 116), "morning": (255, 248, 238), "day": (255, 255, 255),
}


def paint_cloud(c, rng, x, y, w, kind):
    """Puffs on a flat base: shaded below, bright above."""
    c.begin("cloud", 0.0)
    bright = mix(CLOUD_COLOURS[kind], c.fog_colour, c.fog * 0.6)
    dark = {"sunset": (170, 96, 130), "night": (20, 26, 60)}.get(kind, (130, 148, 176))
    shade = mix(bright, dark, .35)
    h = w * .36
    puffs = []
    for u in (-.3, -.1, .12, .3):
        up = h * rng.uniform(.25, .5) * (1.3 - abs(u) * 2)
        puffs.append((x + w * u, y - up, w * rng.uniform(.17, .24)))
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
        periods = (1, 2.4) if high else (.6, 1.5)
        top = rng.uniform(.12, .2) if high else rng.uniform(.07, .14)
        ridge = wavy(rng, c.x, *periods)                            # (1, N)
        if high:
            ridge = 2 * np.abs(ridge) ** .8 - .6
        height = np.clip(top * (.55 + .5 * ridge) * (1 if k == 0 else .6), .012, None)
        slope = np.gradient(height[0])[None] * c.n
        start = max(int((horizon - height.max()) * c.n) - 2, 0)
        y = c.y[start:int((horizon + .03) * c.n)]                   # (R, 1)
        inside = (y > horizon - height) & (y < horizon + .02)
        depth = (y - (horizon - height)) / height                   # (R, N) 0 at the ridge .. 1 at the foot
        relief = 1 + .12 * np.tanh(slope * 2.5) - .14 * np.clip(depth, 0, 1)
        colour = base * relief[..., None]                           # (R, N, 3)
        colour = mix(colour, (190, 206, 222), .25 if k == 0 else .05)
        if high and k == 0 and top > .15:
            cap = depth * height < .035 + .012 * wavy(rng, c.x, 6, 9, 2)
            snow = mix((246, 248, 252), base, .15)
            colour = np.where((cap & (height > .1))[..., None], snow, colour)
        c.layer("hill", inside, c.light(colour, 0.15), top=start)
        base = base * .86


def grass_colour(c, rng, y, v, tone):
    """Soft stripes that open towards the viewer, broken by slow patches: (R, N, 3)."""
    base = np.array({"green": (112, 168, 74), "lush": (86, 152, 70), "dry": (188, 174, 92)}[tone])
    stripe = np.sin(14 * np.log(v + .25) + 2.2 * wavy(rng, c.x, .4, 1.2) + rng.random() * 6)
    patch = wavy(rng, c.x, .5, 1.6) * wavy(rng, y, .8, 2)           # (R, N)
    return base * (1.06 - .16 * v + .045 * stripe + .06 * patch)[..., None]


def water_colour(c, rng, v, sky, sun, kind):
    """Wave dashes, closer near the horizon, over sky-coloured depth; a glitter path under the sun."""
    far = np.array(sky[1])
    deep = np.array([(38, 96, 168), (32, 112, 150), (52, 106, 190)][rng.integers(3)]) * c.tint
    colour = mix(mix(deep, far, .42), deep, np.clip(v * 1.3, 0, 1)[..., None])
    phase = 19 * np.log(v + .25) + .9 * wavy(rng, c.x, 1, 3)        # (R, N)
    dash = np.sin(2 * np.pi * (rng.uniform(1.6, 2.6) * c.x) + .8 * phase + rng.random() * 6)
    crest = np.clip(np.sin(phase) - .35, 0, 1) * np.clip(.6 + dash, 0, 1)
    colour = mix(colour, mix(far, (255, 255, 255), .4), (.5 * crest)[..., None])
    if sun is not None:
        path = np.exp(-((c.x - sun[0]) / (.05 + .08 * v)) ** 2)
        path = path * np.clip(np.sin(phase * 1.0) + .3, 0, 1)
        glitter = (255, 226, 160) if kind != "night" else (190, 200, 220)
        colour = mix(colour, glitter, (.65 * path)[..., None])
    return c.veil(colour, np.clip(v, 0, 1)[..., None])


def sand_colour(c, rng, v):
    base = np.array([(236, 212, 156), (226, 196, 142)][rng.integers(2)])
    ripple = np.sin(22 * np.log(v + .3) + 2.5 * wavy(rng, c.x, .6, 1.6))
    return base * (1.02 - .08 * v + .035 * ripple)[..., None]


def shore(c, rng, a, b):
    """y of a shoreline: a tilted, gently waving curve (1, N)."""
    return a + b * (c.x - .5) + .018 * wavy(rng, c.x, .8, 2)


def paint_ground(c, rng, horizon, sky, sun, kind):
    """Choose the land and paint it: -> layout, grass tone."""
    layouts = ["meadow", "lake", "river", "bay", "beach", "sea"]
    layout = rng.choice(layouts, p=[.34, .17, .11, .12, .2, .06])
    tone = rng.choice(["green", "lush", "dry"], p=[.45, .35, .2])
    y = c.y[int(horizon * c.n) - 4:]                                # (R, 1) only the rows that show land
    v = np.clip((y - horizon) / (1 - horizon), 0, 1)                # (R, 1) 0 far .. 1 near
    depth = np.clip(v, 0, 1)[..., None]                             # (R, 1, 1)
    rough = layout not in ("sea", "beach", "lake")
    below = y > horizon + .006 * wavy(rng, c.x, .5, 1.5) * rough    # (R, N)
    if layout != "sea" and layout != "beach":
        c.layer("grass", below, c.light(grass_colour(c, rng, y, v, tone), depth))
    if layout == "meadow":
        if rng.random() < .6:
            paint_road(c, rng, y, v, below)
        return layout, tone

    line = shore(c, rng, horizon + (1 - horizon) * rng.uniform(.35, .6), rng.uniform(-.2, .2))
    wet = wet_part(c, rng, y, v, layout, line)
    if layout == "beach":
        c.layer("sand", below, c.light(sand_colour(c, rng, v), depth))
        foam = np.abs(y - line - .004) < .011
        c.layer(None, below & foam, c.light(np.array((250, 250, 246)), .5))
    c.layer("water", below & wet, water_colour(c, rng, v, sky, sun, kind))
    if layout == "lake" and rng.random() < .35:
        paint_road(c, rng, y, v, y > line + .05, across=True)
    return layout, tone


def wet_part(c, rng, y, v, layout, line):
    """Where the water of a layout is: (R, N) bool. line: (1, N) y of the shore."""
    if layout == "bay":
        x0 = rng.uniform(.35, .65)
        x1 = rng.uniform(.25, .75)
        side = rng.choice([-1, 1])
        return (c.x - (x0 + (x1 - x0) * v) - .05 * wavy(rng, y, 1, 2.5)) * side > 0
    if layout == "river":
        far = rng.uniform(.03, .05)
        near = rng.uniform(.14, .22)
        return winding(c, rng, v, far, near)
    return y < (2 if layout == "sea" else line)


def winding(c, rng, v, far, near):
    """A band that winds from the horizon to the viewer: (R, N) bool."""
    middle = rng.uniform(.3, .7)
    swing = rng.uniform(.08, .22)
    bend = np.sin(rng.uniform(3, 5.5) * v ** .7 + rng.random() * 6.3)
    centre = middle + swing * bend * (.3 + v)
    return np.abs(c.x - centre) < far + near * v ** 1.3


def paint_road(c, rng, y, v, allowed, across=None):
    """A grey road with a dashed line or an earthen path, away from the viewer or across the picture."""
    paved = rng.random() < .5
    base, edge = ((122, 122, 130), (176, 176, 176)) if paved else ((196, 160, 112), (164, 128, 84))
    across = rng.random() < .35 if across is None else across
    if across:
        centre = shore(c, rng, rng.uniform(.8, .9), rng.uniform(-.1, .1))
        half = .065
        off = y - centre                                            # (R, N) from the middle of the road
        dashes = (np.abs(off) < .008) & (np.sin(c.x * 38) > -.1)
        border = np.abs(np.abs(off) - half + .008) < .008
    else:
        start = rng.uniform(.35, .65)
        swing = rng.uniform(.06, .2)
        bend = np.sin(rng.uniform(3, 5) * v ** .7 + rng.random() * 6.3)
        half = .022 + .15 * v ** 1.2                                # (R, 1)
        off = c.x - (start + swing * bend * (.3 + v))
        dashes = (np.abs(off) < .06 * half) & (np.sin(16 * np.log(v + .25)) > 0)
        border = np.abs(np.abs(off) - half * .93) < half * .07
    inside = (np.abs(off) < half) & allowed
    depth = np.clip(v, 0, 1)[..., None]
    c.layer("road", inside, c.light(np.array(base) * (1.05 - .1 * v)[..., None], depth))
    flat = np.ones_like(depth)                                      # (R, 1, 1)
    c.layer(None, border & inside, c.light(np.array(edge) * flat, depth))
    if paved:
        c.layer(None, dashes & inside, c.light(np.array((244, 238, 210)) * flat, depth))


def paint_flowers(c, rng, horizon, grass):
    """A handful of flowers on the grass (part of it)."""
    paint = list(PAINTS.values())[rng.integers(4)]
    for _ in range(rng.integers(10, 20)):
        x = rng.random()
        y = rng.uniform(horizon + .15, .98)
        v = (y - horizon) / (1 - horizon)
        if grass[int(y * c.n), int(x * c.n)]:
            c.depth = v
            r = .006 + .009 * v
            c.ellipse(x, y, r, r, paint, solid=False)


# ---- things: each stands on (x, y), s = its scale ----------------------------------------------------------

def shadow(c, x, y, rx, ry):
    c.ellipse(x, y, rx, ry, (20, 30, 20), solid=False, alpha=70 * (1 - c.fog))


def draw_house(c, rng, x, y, s, colour, lamps):
    """A gabled front and a long side under one roof; lamps light the windows."""
    w = .36 * s
    f = Frame(c, x, y, w, flip=rng.choice([-1, 1]), middle=.5)
    wall = np.array(WALLS[colour])
    roof = np.array(ROOFS[colour])
    glass = (255, 214, 110) if lamps else (92, 116, 150)
    shadow(c, x, y, w * .58, w * .06)
    f.box(.7, .5, .1, .36, wall * .6)                               # chimney
    f.box(.44, 0, .54, .42, wall * .8)
    f.polygon([(0, 0), (0, .42), (.22, .74), (.44, .42), (.44, 0)], wall)
    for v in (.1, .2, .3, .4):                                      # rows of brick or board
        c.line([f.at(.02, v), f.at(.98, v)], wall * .55, .02 * w, alpha=90)
    f.polygon([(.22, .76), (.8, .76), (1.03, .38), (.46, .38)], roof)
    c.line([f.at(.26, .64), f.at(.86, .64)], roof * 1.3, .03 * w, alpha=150)
    c.line([f.at(.37, .51), f.at(.94, .51)], roof * 1.3, .03 * w, alpha=150)
    f.polygon([(-.04, .36), (.22, .78), (.26, .76), (.03, .36)], roof * .8)
    f.box(.14, 0, .16, .27, (104, 66, 48), solid=False)             # door
    c.ellipse(*f.at(.22, .5), .055 * w, .055 * w, glass, solid=False, lit=not lamps)
    for u in (.53, .76):
        f.box(u, .14, .14, .16, glass, solid=False, lit=not lamps)


def draw_tree(c, rng, x, y, s, colour, lamps):
    h = .42 * s * rng.uniform(.9, 1.12)
    shadow(c, x, y, h * .26, h * .05)
    trunk = [(-.05, 0), (-.035, .5), (.035, .5), (.05, 0)]
    Frame(c, x, y, h).polygon(trunk, (112, 76, 50))
    if colour == "pine":
        draw_needles(c, x, y, h)
        return
    leaf = np.array(LEAVES[colour])
    crown = [(-.17, .5, .18), (.17, .52, .18), (-.08, .74, .19), (.1, .72, .2), (0, .58, .2)]
    blobs = [(x + h * dx, y - h * dy, h * r * rng.uniform(.92, 1.1)) for dx, dy, r in crown]
    for bx, by, r in blobs:
        c.ellipse(bx, by, r, r, leaf * .74)
    for bx, by, r in blobs:
        c.ellipse(bx - r * .16, by - r * .2, r * .74, r * .72, leaf, solid=False)
    bright = mix(leaf, (255, 250, 200), .3)
    for bx, by, r in blobs[:4]:
        c.ellipse(bx - r * .32, by - r * .4, r * .3, r * .26, bright, solid=False)


def draw_needles(c, x, y, h):
    """Three tiers, shaded on the right."""
    green = np.array((44, 104, 72))
    for v, r in ((.16, .27), (.4, .22), (.64, .16)):
        left = (x - r * h, y - v * h)
        top = (x, y - h * (v + .4))
        right = (x + r * h, y - v * h)
        c.polygon([left, top, right], green * (.85 + .35 * v))
        c.polygon([right, top, (x + r * h * .15, y - v * h)], green * .66, solid=False)


def draw_boat(c, rng, x, y, s, colour, lamps):
    w = .3 * s
    f = Frame(c, x, y, w, flip=rng.choice([-1, 1]))
    hulls = [(128, 72, 46), (178, 48, 44), (44, 60, 104), (240, 236, 228)]
    hull = np.array(hulls[rng.integers(4)])
    sail = np.array(PAINTS[colour])
    c.ellipse(x, y + .03 * w, w * .46, w * .06, hull * .4, solid=False, alpha=110)
    f.polygon([(-.06, -.04), (-.02, -.4), (.3, -.06)], sail, solid=False, alpha=60)
    f.polygon([(-.02, .2), (-.02, 1.2), (.03, 1.2), (.03, .2)], (96, 70, 50))           # mast
    f.polygon([(.01, .2), (.03, 1.18), (.46, .2)], sail)
    f.polygon([(.05, .2), (.045, .46), (.34, .46), (.46, .2)], sail * .86, solid=False)
    f.polygon([(.02, .2), (-.01, 1.0), (-.38, .2)], sail * .93)
    f.polygon([(-.5, .22), (.52, .22), (.36, 0), (-.34, 0)], hull)
    rail = mix(hull, (255, 255, 255), .4)
    f.polygon([(-.5, .22), (.52, .22), (.48, .15), (-.46, .15)], rail, solid=False)


def draw_ball(c, rng, x, y, s, colour, lamps):
    r = .068 * s * rng.uniform(.92, 1.15)
    paint = np.array(PAINTS[colour])
    cy = y - r
    shadow(c, x + r * .25, y, r * 1.05, r * .28)
    c.ellipse(x, cy, r, r, paint * .78)
    c.ellipse(x - r * .1, cy - r * .12, r * .84, r * .82, paint, solid=False)
    stripe = (60, 110, 210) if colour == "white" else (250, 248, 240)
    band = [(-.9, .28), (-.5, .06), (.5, .06), (.9, .28), (.5, .4), (-.5, .4)]
    c.polygon([(x + r * u, cy + r * v) for u, v in band], stripe, solid=False, alpha=225)
    c.ellipse(x - r * .36, cy - r * .42, r * .22, r * .18, (255, 255, 255), solid=False, alpha=230)


def draw_person(c, rng, x, y, s, look, lamps):
    """look: (colour, "man" or "woman"), in trousers or a dress."""
    colour, kind = look
    man = kind == "man"
    h = .3 * s
    f = Frame(c, x, y, h)
    paint = np.array(PAINTS[colour])
    skin = np.array([(244, 204, 172), (206, 152, 112), (138, 92, 66)][rng.integers(3)])
    hair = np.array([(64, 44, 34), (184, 128, 62), (34, 30, 32)][rng.integers(3)])
    shadow(c, x, y, h * .22, h * .05)
    wide = .075 if man else .05
    for u in (-.09, .09):
        leg = [(u - wide, 0), (u - wide, .46), (u + wide, .46), (u + wide, 0)]
        f.polygon(leg, (58, 62, 92) if man else skin)
    hand = rng.choice([.3, .62])                                    # one arm may wave
    f.polygon([(-.15, .74), (-.28, .4), (-.2, .38), (-.09, .66)], paint * .82)
    f.polygon([(.1, .74), (.29, hand + .1), (.25, hand + .02), (.08, .62)], paint * .82)
    hem = .17 if man else .27
    low = .4 if man else .24
    f.polygon([(-hem, low), (-.15, .75), (.15, .75), (hem, low)], paint)
    f.polygon([(hem * .3, low), (.06, .75), (.15, .75), (hem, low)], paint * .86, solid=False)
    c.ellipse(*f.at(0, .88), .135 * h, .135 * h, hair)
    if not man:
        f.polygon([(-.135, .72), (-.135, .9), (.135, .9), (.135, .72)], hair)
    c.ellipse(*f.at(.015, .855), .1 * h, .105 * h, skin, solid=False)


DRAW = {"house": draw_house, "tree": draw_tree, "boat": draw_boat, "ball": draw_ball, "person": draw_person}
EXTENT = {"house": (.18, .28), "tree": (.13, .42), "boat": (.15, .36),      # half width, height
          "ball": (.07, .14), "person": (.08, .3)}
STANDS = {"house": ["grass"], "tree": ["grass"], "boat": ["water"], "ball": ["grass", "sand", "road"],
          "person": ["grass", "sand", "road"]}
WEIGHT = {"house": 1.2, "tree": 1.3, "boat": 2.2, "ball": .8, "person": .9}


# ---- the scene ---------------------------------------------------------------------------------------------

def pick_look(rng, name):
    """What a thing looks like, in the words that captions use."""
    if name == "house":
        return str(rng.choice(list(WALLS)))
    if name == "tree":
        leaves = ["green", "pine", "orange", "red", "pink"]
        return str(rng.choice(leaves, p=[.4, .28, .14, .08, .1]))
    if name == "boat":
        sails = ["white", "red", "yellow", "orange", "blue"]
        return str(rng.choice(sails, p=[.4, .2, .15, .15, .1]))
    if name == "ball":
        return str(rng.choice(["red", "blue", "yellow", "orange", "purple", "white"]))
    colour = str(rng.choice(["red", "blue", "yellow", "white", "purple"]))
    return colour, str(rng.choice(["man", "woman"]))


def pick_things(rng, ground):
    """Names of the things of a scene: some classes that its ground can carry, each one to five times."""
    share = np.bincount(ground.ravel(), minlength=len(CLASSES) + 1) / ground.size
    able = [name for name, stuff in STANDS.items() if any(share[ID[s]] > .06 for s in stuff)]
    weights = np.array([WEIGHT[name] for name in able])
    count = min(len(able), rng.choice([1, 2, 3], p=[.3, .45, .25]))
    names = []
    for name in rng.choice(able, size=count, replace=False, p=weights / weights.sum()):
        names += [str(name)] * rng.choice([1, 2, 3], p=[.55, .3, .15])
    if "tree" in names and rng.random() < .3:
        names += ["tree"] * 2
    return names[:6]


def place_things(rng, names, ground, horizon):
    """Find a place that carries each thing, with little overlap: [(y, x, scale, name, look)], far to near."""
    n = len(ground)
    things, boxes, looks = [], [], {}
    for name in names:
        for _ in range(24):
            v = rng.uniform(.3 if name in ("ball", "person") else .1, .97)
            x = rng.uniform(.07, .93)
            y = horizon + (1 - horizon) * v
            s = .55 + .6 * v
            half, tall = EXTENT[name][0] * s, EXTENT[name][1] * s
            columns = [int(np.clip(x + d * half, .01, .99) * n) for d in (-.8, 0, .8)]
            feet = ground[min(int(y * n), n - 1), columns]
            box = (x - half, y - tall, x + half, y)
            carried = all(CLASSES[k - 1] in STANDS[name] for k in feet)
            if carried and all(overlap(box, other) < .3 for other in boxes):
                if name not in looks or rng.random() < .4:          # things of a class are often the same
                    looks[name] = pick_look(rng, name)
                things.append((y, x, s, name, looks[name]))
                boxes.append(box)
                break
    return sorted(things, key=lambda thing: thing[0])


def overlap(a, b):
    """Shared area of two boxes over the smaller one's."""
    w = min(a[2], b[2]) - max(a[0], b[0])
    h = min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((r[2] - r[0]) * (r[3] - r[1]) for r in (a, b))
    return max(w, 0) * max(h, 0) / smaller


def paint_air(c, rng, horizon, kind, sun):
    """Clouds apart from each other and from the sun."""
    overcast = kind == "overcast"
    count = rng.choice([0, 1, 2, 3], p=[.25, .3, .3, .15] if overcast else [.3, .3, .25, .15])
    discs = [(sun[0], sun[1], sun[2] * 2.2)] if sun is not None else []
    for _ in range(count):
        for _ in range(12):
            x = rng.uniform(.08, .92)
            y = rng.uniform(.07, max(horizon - .2, .1))
            w = rng.uniform(.24, .4)
            if all(abs(x - d[0]) > (w + d[2]) * .55 or abs(y - d[1]) > .15 for d in discs):
                discs.append((x, y, w))
                paint_cloud(c, rng, x, y, w, kind)
                break


def paint_rain(c, rng):
    slant = rng.uniform(-.03, .03)
    for _ in range(36):
        x, y = rng.random(2)
        streak = [x * c.n, y * c.n, (x + slant) * c.n, (y + .1) * c.n]
        c.pen.line(streak, fill=(214, 224, 236, 90), width=max(1, c.n // 110))


def ink_drawing(c, rng):
    """The canvas in pen and ink: outlines at strong edges, hatching in the dark: (N, N, 3) uint8."""
    grey = np.asarray(c.picture.convert("L"), np.float32)
    owner = np.asarray(c.owner).astype(int)
    edge = np.zeros((c.n, c.n), bool)
    for shift in ((1, 0), (0, 1), (2, 0), (0, 2)):
        edge |= owner != np.roll(owner, shift, (0, 1))
        edge |= np.abs(grey - np.roll(grey, shift, (0, 1))) > 26
    edge[:3] = False
    edge[:, :3] = False

    step = c.n // 14
    pen = max(1, c.n // 80)
    i, j = np.arange(c.n)[:, None], np.arange(c.n)[None]
    owners = c.owners()                                             # (N, N)
    solid = np.isin(owners, [ID[n] for n in ("house", "tree", "boat", "ball", "person", "hill")])
    hatch = ((i + j) % step < pen) & (grey < 150) & solid
    hatch |= ((i - j) % (step // 2) < pen) & (grey < 105) & solid
    waves = (i % step < pen) & (np.sin(j / step * 1.7 + i // step * 2.3) > .2)
    hatch |= waves & (owners == ID["water"])

    grain = 1 + .015 * wavy(rng, c.x, .5, 2) * wavy(rng, c.y, .5, 2)
    paper = np.array((244, 238, 224.)) * grain[..., None]
    sheet = np.where(hatch[..., None], (112, 106, 112), paper)
    return np.where(edge[..., None], (34, 30, 40), sheet).astype(np.uint8)


def pick_light(rng, style):
    """-> kind of weather, colours of the sky (top, horizon), tint of the light."""
    kinds = ["day", "morning", "sunset", "overcast", "rain"]
    kind = str(rng.choice(kinds, p=[.36, .18, .22, .16, .08]))
    kind = {"night": "night", "fog": "overcast", "ink": "day"}.get(style, kind)
    top, low, tint = LIGHTS[kind][rng.integers(len(LIGHTS[kind]))]
    sky = [np.clip(np.array(s) + rng.uniform(-10, 10, 3), 0, 255) for s in (top, low)]
    return kind, sky, tint


def pick_sun(rng, kind, horizon):
    """-> (x, y, radius), or None where no sun or moon shows."""
    if kind not in ("day", "morning", "sunset", "night") or rng.random() >= .62:
        return None
    low = kind == "sunset"
    r = rng.uniform(.06, .09) if low else rng.uniform(.055, .075)
    x = rng.uniform(.12, .88)
    y = horizon - rng.uniform(.06, .2) if low else rng.uniform(.1, .18)
    return x, y, r


def scene(rng, size=64, style="day"):
    """One scene. Style "day" is the world of train and val in any light; "night", "fog", "ink" are unseen's.

    -> {"image": (H, W, 3), "mask": (H, W) class ids, "instances": (H, W), 0 none, all uint8; "captions": 3}
    """
    kind, sky, tint = pick_light(rng, style)
    horizon = rng.uniform(.34, .5)
    sun = pick_sun(rng, kind, horizon)
    c = Canvas(size, tint, fog=rng.uniform(.72, .9) if style == "fog" else 0.0)
    paint_sky(c, rng, sky, horizon, sun, kind == "night")
    if sun is not None:
        paint_sun(c, sun, kind, kind == "night")
    paint_air(c, rng, horizon, kind, sun)
    if rng.random() < .42:
        paint_hills(c, rng, horizon)
    layout, tone = paint_ground(c, rng, horizon, sky, sun, kind)
    ground = c.owners()                                             # (N, N)
    if rng.random() < .3:
        paint_flowers(c, rng, horizon, ground == ID["grass"])
    looks = [""] * len(c.segments)
    for y, x, s, name, look in place_things(rng, pick_things(rng, ground), ground, horizon):
        c.begin(name, (y - horizon) / (1 - horizon))
        looks.append(look)
        DRAW[name](c, rng, x, y, s, look, lamps=kind in ("sunset", "night"))
    if kind == "rain":
        paint_rain(c, rng)

    picture = Image.fromarray(ink_drawing(c, rng)) if style == "ink" else c.picture
    owner = np.asarray(c.owner)[FINE // 2::FINE, FINE // 2::FINE]   # (H, W)
    seen = visible_parts(owner, c.segments, looks, size)
    captions = [compose_caption(rng, seen, layout, tone, kind, style, k) for k in range(3)]
    return {"image": np.asarray(picture.reduce(FINE)),              # (H, W, 3)
            "mask": np.array([0] + [ID[name] for name in c.segments], np.uint8)[owner],
            "instances": number_things(owner, c.segments),
            "captions": captions}


def number_things(owner, segments):
    """Owner map -> instances (H, W) uint8: the visible things numbered from 1."""
    table = np.zeros(len(segments) + 1, np.uint8)
    things = [s for s in np.unique(owner) if s and segments[s - 1] in THINGS]
    table[things] = np.arange(1, len(things) + 1)
    return table[owner]


def visible_parts(owner, segments, looks, size):
    """{class: [(look, x, y, area)]} of what can be seen; specks do not count."""
    seen = {}
    for k, (name, look) in enumerate(zip(segments, looks), 1):
        ys, xs = np.nonzero(owner == k)
        if len(ys) >= (12 if name in THINGS else 30) * (size / 64) ** 2:
            part = (look, xs.mean() / size, ys.max() / size, len(ys))
            seen.setdefault(name, []).append(part)
    return seen


# ---- captions ----------------------------------------------------------------------------------------------

TREE_WORDS = {"green": ["green", "leafy", ""], "orange": ["orange", "autumn"], "red": ["red", "autumn"],
              "pink": ["pink", "blossoming"]}
CLOUD_WORDS = {"rain": "dark", "overcast": "grey", "sunset": "pink", "night": "dark"}


def group_phrase(rng, name, items, kind, rich):
    """"two red houses", "a boat with a white sail": the things of one class as a phrase."""
    count = len(items)
    looks = {look for look, *_ in items}
    look = looks.pop() if len(looks) == 1 and rich else ""
    many = NUMBERS[count] if count < 4 or rng.random() < .6 else "several"

    def say(adjective, noun, plural=None):
        if count == 1:
            return with_article(f"{adjective} {noun}".strip())
        return f"{many} {adjective} {plural or noun + 's'}".replace("  ", " ")

    if name == "house":
        return say(look, rng.choice(["house", "house", "cottage"]))
    if name == "tree" and look == "pine":
        return say("pine", "tree")
    if name == "tree":
        return say(rng.choice(TREE_WORDS.get(look, [""])), "tree")
    if name == "boat":
        boats = say("", rng.choice(["boat", "boat", "sailboat"]))
        sails = f"{with_article(look)} sail" if look and count == 1 else f"{look} sails"
        return f"{boats} with {sails}" if look else boats
    if name == "ball":
        return say(look, "ball")
    if name == "person":
        return person_phrase(rng, items, say, rich)
    return say(CLOUD_WORDS.get(kind, "white") if rich and rng.random() < .5 else "", "cloud")


def person_phrase(rng, items, say, rich):
    colours = {colour for (colour, _), *_ in items}
    kinds = {kind for (_, kind), *_ in items}
    if len(kinds) > 1 or rng.random() < .3:
        people = say("", "person", "people")
    else:
        people = say("", "man", "men") if kinds == {"man"} else say("", "woman", "women")
    return f"{people} in {colours.pop()}" if rich and len(colours) == 1 else people


def sky_phrase(rng, kind, style, seen, brief):
    """Light and weather, with the sun and the clouds if they show."""
    light = LIGHT_WORDS[style if style in ("fog", "ink") else kind]
    parts = []
    if "sun" in seen:
        parts.append("the moon" if kind == "night" else "the sun")
    if "cloud" in seen:
        parts.append(group_phrase(rng, "cloud", seen["cloud"], kind, not brief))
    words = min(light, key=len) if brief else rng.choice(light)
    return f"{words} with {join_words(parts)}" if parts else words


def land_phrase(rng, seen, layout, tone, afloat, brief):
    """Where the things on land stand, naming the ground that shows (and the water, unless a boat does)."""
    if "sand" in seen:
        sea = "water" in seen and not afloat and not brief
        return rng.choice(["on the beach", "on the sand"]) + (" by the sea" if sea else "")
    words = []
    if "grass" in seen:
        green = ["on the grass", "on a green meadow", "in a meadow", "on a lawn"]
        words.append(rng.choice(["on dry grass", "in a dry field"] if tone == "dry" else green))
    if "road" in seen:
        words.append(rng.choice(["by a road", "beside a path", "near a road", "along a lane"]))
    if "water" in seen and not afloat:
        water = {"lake": "by the lake", "river": "by the river", "bay": "by the bay"}
        near = water.get(layout, "by the water")
        words.append(near if rng.random() < .6 else "by the water")
    return " ".join(words[:1] if brief else words) or "outside"


def water_phrase(rng, layout):
    """Where boats are."""
    names = {"lake": ["on the lake"], "river": ["on the river"], "bay": ["in the bay"]}
    words = rng.choice(names.get(layout, ["at sea", "on the sea"]))
    return "on the water" if rng.random() < .4 else words


def view_phrase(rng, seen, tone):
    """A landscape without things."""
    names = {"sand": ["a beach", "sand"],
             "water": ["the water", "the sea" if "sand" in seen else "calm water"],
             "road": ["a road", "a path"],
             "grass": ["a meadow", "a dry field" if tone == "dry" else "green grass"]}
    parts = [str(rng.choice(words)) for name, words in names.items() if name in seen]
    return join_words(parts or ["an open view"])


def relation_phrase(one, other):
    """Two single things side by side or one before the other: "a ball to the left of a house"."""
    (a, [(_, ax, ay, _)]), (b, [(_, bx, by, _)]) = one, other
    if abs(ax - bx) < .14:
        return f"{a} in front of {b}" if ay > by else f"{b} in front of {a}"
    return f"{a} to the {'left' if ax < bx else 'right'} of {b}"


def scene_clauses(rng, seen, layout, tone, kind, rich, brief):
    """-> the clauses about land, water and hills, and the phrases of the things in them."""
    names = [name for name in ("house", "tree", "person", "ball") if name in seen]
    names = [names[i] for i in rng.permutation(len(names))]
    land = [(group_phrase(rng, name, seen[name], kind, rich), seen[name]) for name in names]
    boats = [group_phrase(rng, "boat", seen["boat"], kind, rich)] if "boat" in seen else []
    where = water_phrase(rng, layout)
    phrases = [phrase for phrase, _ in land]
    clauses = []
    if land:
        single = len(land) == 2 and all(len(items) == 1 for _, items in land) and rng.random() < .6
        what = relation_phrase(*land) if single and not brief else join_words(phrases)
        clauses.append(f"{what} {land_phrase(rng, seen, layout, tone, bool(boats), brief)}")
    if boats:
        clauses.append(f"{boats[0]} {where}")
    if boats and not land and "sand" in seen:
        clauses.append(rng.choice(["a beach in front", "sand in front"]))
    elif boats and not land and "grass" in seen:
        clauses.append(rng.choice(["grass in front", "a meadow in front", "grass on the bank"]))
    if not clauses:
        clauses.append(view_phrase(rng, seen, tone))
    if "hill" in seen and not brief:
        clauses.append(rng.choice(["hills behind", "hills in the distance", "mountains behind"]))
    return clauses, phrases + boats


def compose_caption(rng, seen, layout, tone, kind, style, k):
    """Caption k of a scene.

    0 names all that shows before its colours, 1 begins with the light and puts colours before the background,
    2 is plain. Shorter and shorter wordings are tried until one fits.
    """
    for attempt in range(12):
        level = attempt // 4
        colourful = style != "ink" and (level == 0 or level == 1 and k == 1)
        rich = colourful and not (k == 2 and rng.random() < .4)
        brief = level == 2 or level == 1 and k != 0
        clauses, phrases = scene_clauses(rng, seen, layout, tone, kind, rich, brief)
        light = sky_phrase(rng, kind, style, seen, not rich)
        parts = [light, *clauses] if k == 1 else [*clauses, light]
        text = " ".join(parts) if k != 1 and len(clauses) == 1 else ", ".join(parts)
        if len(text.encode()) <= CAPTION_BYTES:
            return text
    return join_words(phrases + [name for name in ("sun", "cloud") if name in seen] or ["an open view"])


# ---- files -------------------------------------------------------------------------------------------------

def split_scene(split, index, size, seed):
    """Scene `index` of a split."""
    rng = np.random.default_rng((seed, STREAMS[split], index))
    style = UNSEEN[index * len(UNSEEN) // SPLITS["unseen"]] if split == "unseen" else "day"
    return scene(rng, size, style)


def write_scene(out, size, seed, job):
    """Draw and write one scene. It is a worker's job: (split, index)."""
    split, index = job
    pair = split_scene(split, index, size, seed)
    labels = (None, None) if split == "unlabelled" else (pair["mask"], pair["instances"])
    write_pair(out / split, f"{index:05d}", pair["image"], *labels, pair["captions"], len(CLASSES))


def missing_scenes(out, split, count, size, seed):
    """-> the jobs of a split that are still to do. Raises ValueError if its folder holds another world."""
    folder = out / split
    names = list_files(folder / "images", (".png",))
    if split == "train" and len(names) > count:
        raise ValueError(f"{folder}: {len(names)} scenes, more than {count}. Remove it or choose another")
    if "00000" in names:
        if split != "unlabelled":
            check_classes(read_classes(folder), [{"name": name} for name in CLASSES], folder,
                          "Remove the folder or choose another")
        check_world(names["00000"], split_scene(split, 0, size, seed)["image"])
    return [(split, i) for i in range(count) if f"{i:05d}" not in names]


def check_world(path, expected):
    """Raises ValueError unless the picture on disk is the expected one: not of another size or seed."""
    image = np.asarray(to_rgb(open_picture(path)), np.float32)
    if image.shape != expected.shape:
        raise ValueError(f"{path}: the scenes there have another size. Remove the folder or choose another")
    if np.abs(image - expected).mean() > 4:         # processors round differently
        raise ValueError(f"{path}: the scenes there have another seed. Remove the folder or choose another")


def start_split(folder, labelled, complete):
    """Make the folder of a split. While a marker stands beside it, nobody takes a part of it for the data."""
    if not complete:
        write_text(unfinished(folder), "")
    remove_temporary(folder)
    if labelled:
        classes = [{"name": name, "isthing": name in THINGS, "source_id": k} for name, k in ID.items()]
        write_json(folder / "classes.json", classes)
        write_json(folder / "words.json", WORDS)


def prepare(out, size=64, seed=0, limit_train=None, unlabelled=0, processes=None):
    """Draw the missing scenes of all splits below `out`; what exists stays. -> the number of new scenes.

    The bytes do not depend on `processes`, nor on how often a run was interrupted.
    """
    counts = SPLITS | {"unlabelled": unlabelled}
    counts["train"] = min(limit_train or counts["train"], counts["train"])
    missing = {split: missing_scenes(out, split, count, size, seed)
               for split, count in counts.items() if count}
    for split, jobs in missing.items():
        start_split(out / split, labelled=split != "unlabelled", complete=not jobs)
    jobs = sum(missing.values(), [])
    if jobs:
        work = functools.partial(write_scene, out, size, seed)
        for _ in tqdm(run_jobs(work, jobs, processes), "drawing", len(jobs), unit="scene"):
            pass
    for split in missing:
        unfinished(out / split).unlink(missing_ok=True)
    return len(jobs)


def main(argv=None):
    parser = FlagParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent,
                        help="folder that gets train/, val/, unseen/")
    parser.add_argument("--size", type=number(int, 16), default=64,
                        help="side of the pictures in pixels, 16 or more")
    parser.add_argument("--seed", type=number(int, 0), default=0, help="another seed, another world")
    parser.add_argument("--limit-train", type=number(int, 1), help="only the first N training scenes")
    parser.add_argument("--unlabelled", type=number(int, 0), default=0,
                        help="also draw N scenes without masks, for the base")
    parser.add_argument("--processes", type=number(int, 1), help="worker processes, all cores if not given")
    args = parser.parse_args(argv)
    count = prepare(args.out, args.size, args.seed, args.limit_train, args.unlabelled, args.processes)
    print(f"{args.out}: {count} new scenes" if count else f"{args.out}: complete, nothing to draw")


if __name__ == "__main__":
    run(main)
