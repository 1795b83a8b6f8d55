"""Drawing: the objects of the built-in scenes, twin scenes, and the pictures of them.

A scene has three to six flat shapes. Most scenes have a twin, which differs in one detail only. `paint` pastes
the shapes with smooth edges on a clouded ground, under uneven light.

All machines draw the same bytes. Every choice comes from `RandomState`, whose stream NumPy has frozen, as doubles or
bytes (its integers depend on the platform), and all else is computed in integers or in floats that are exact.
"""
import zlib
from collections.abc import Sequence
from functools import cache
from itertools import combinations
from typing import NamedTuple

import numpy as np

from sources.windows import SIDE

Rng = np.random.RandomState
SPLITS = {"train": 2000, "val": 250, "test": 500}  # scenes in each
COLOURS = {"red": (212, 48, 46), "orange": (242, 134, 28), "yellow": (246, 216, 60), "green": (58, 158, 74),
           "blue": (48, 100, 214), "purple": (142, 66, 176), "white": (242, 242, 240), "black": (28, 28, 32)}
STAR = ((0, -1000), (951, -309), (588, 809), (-588, 809), (-951, -309))  # the directions that its five sides face
SHAPES = {  # which points lie inside: x to the right and y down, in thousandths of half the extent
    "circle": lambda x, y: x * x + y * y <= 1000**2,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) <= 860,
    "triangle": lambda x, y: (y <= 800) & (1730 * abs(x) <= 1000 * (y + 930)),
    "star": lambda x, y: sum((a * x + b * y <= 309 * 1000).astype(int) for a, b in STAR) >= 4,
    "ring": lambda x, y: (x * x + y * y <= 1000**2) & (x * x + y * y >= 550**2),
    "cross": lambda x, y: np.minimum(abs(x), abs(y)) <= 330,
    "diamond": lambda x, y: 1000 * abs(x) + 780 * abs(y) <= 780 * 1000,
    "moon": lambda x, y: (x * x + y * y <= 1000**2) & ((x - 450) ** 2 + (y + 200) ** 2 >= 800**2),
}
SIZES = {"small": (20, 22, 24, 26), "large": (38, 40, 42, 44, 46)}  # pixels across
LOOKS = {"shape": tuple(SHAPES), "colour": tuple(COLOURS), "size": tuple(SIZES)}
SWAPS = {"places swapped": ("x", "y"), "colours swapped": ("colour",)}
TWINS = (*LOOKS, *SWAPS)  # how twins may differ


class Object(NamedTuple):
    """A flat shape: its looks, its centre (x, y) and its extent `across`. The last three are in pixels."""

    shape: str
    colour: str
    size: str
    x: int
    y: int
    across: int

    def box(self) -> np.ndarray:
        """[4] the tight box around it, x1 y1 x2 y2 in pixels."""
        return mask(self.shape, self.across)[1] + (self.x, self.y, self.x, self.y) - self.across // 2


def pick(rng: Rng, items: Sequence):
    return items[int(rng.random_sample() * len(items))]


def shuffled(rng: Rng, items: Sequence) -> list:
    return [items[i] for i in np.argsort(rng.random_sample(len(items)), kind="stable")]


def split_of(objects: Sequence[Object]) -> str:
    """The only split in which a scene with these looks may occur. A hash decides, so that splits share no scene."""
    return list(SPLITS)[zlib.crc32(repr(sorted(o[:3] for o in objects)).encode()) % len(SPLITS)]


def fit_together(objects: Sequence[Object]) -> bool:
    """Do all objects lie on the canvas, look different, and leave each other visible? A slight overlap is allowed."""
    for o in objects:
        margin = o.across // 2 + 2
        if not (margin <= o.x <= SIDE - margin and margin <= o.y <= SIDE - margin):
            return False
    for a, b in combinations(objects, 2):
        right, down = a.x - b.x, a.y - b.y
        # 20 pixels apart in x or in y, so that any scene has true captions of five forms
        apart = max(abs(right), abs(down)) >= 20 and 5 * (right**2 + down**2) >= (a.across + b.across) ** 2
        if a[:3] == b[:3] or not apart:
            return False
    return True


def invent(rng: Rng, split: str) -> list[Object]:
    """A new scene for the split. Objects often share a shape or a colour, so that neither alone names one of them."""
    objects: list[Object] = []
    while not 3 <= len(objects) <= 6:
        objects = []
        for _ in range(pick(rng, (6, 8, 10, 12, 16))):  # attempts; an object that has no room is left out
            shape, colour, size = (pick(rng, names) for names in LOOKS.values())
            if objects and rng.random_sample() < 0.5:
                shape, colour = pick(rng, ((pick(rng, objects).shape, colour), (shape, pick(rng, objects).colour)))
            o = Object(shape, colour, size, pick(rng, range(SIDE)), pick(rng, range(SIDE)), pick(rng, SIZES[size]))
            objects += [o] if fit_together([*objects, o]) else []
    while split_of(objects) != split or not fit_together(objects):  # other colours may belong to another split
        i = pick(rng, range(len(objects)))
        objects[i] = objects[i]._replace(colour=pick(rng, LOOKS["colour"]))
    return objects


def alter(rng: Rng, objects: list[Object], how: str, split: str) -> list[Object] | None:
    """The twin of a scene. It differs as `how` says, one of TWINS, and all objects move by up to three pixels.

    Returns None if no twin is found that fits together and belongs to the split.
    """
    before = {o[:3] for o in objects}
    for _ in range(30):
        twin = [o._replace(x=o.x + pick(rng, range(-3, 4)), y=o.y + pick(rng, range(-3, 4))) for o in objects]
        (i, a), (j, b) = shuffled(rng, list(enumerate(twin)))[:2]
        if how in SWAPS:
            twin[i] = a._replace(**{field: getattr(b, field) for field in SWAPS[how]})
            twin[j] = b._replace(**{field: getattr(a, field) for field in SWAPS[how]})
        else:
            new = pick(rng, [look for look in LOOKS[how] if look != getattr(a, how)])
            twin[i] = a._replace(**{how: new}, across=pick(rng, SIZES[new]) if how == "size" else a.across)
        differs = how == "places swapped" or not {o[:3] for o in twin} <= before
        if differs and fit_together(twin) and split_of(twin) == split:
            return twin
    return None


@cache
def mask(shape: str, across: int) -> tuple[np.ndarray, np.ndarray]:
    """How much of each pixel a shape covers, 0..256 [across, across], and the tight box x1 y1 x2 y2 around it."""
    at = (2 * np.arange(4 * across, dtype=np.int64) + 1 - 4 * across) * 1000 // (4 * across)  # 4 x 4 samples a pixel
    inside = SHAPES[shape](at[None, :], at[:, None])
    alpha = inside.reshape(across, 4, across, 4).sum((1, 3)).astype(np.int32) * 16
    columns, rows = (np.flatnonzero((alpha >= 128).any(axis)) for axis in (0, 1))
    return alpha, np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])


# Bilinear interpolation from a 9 x 9 lattice, times 16 each way: whole numbers, so that float products are exact.
LATTICE = np.maximum(0, 16 - abs(np.arange(SIDE)[:, None] - 16 * np.arange(9)[None, :])).astype(np.float64)


def paint(rng: Rng, objects: Sequence[Object]) -> np.ndarray:
    """Draw a scene: [128, 128, 3] uint8. Ground, smudges, light and exact shades differ from picture to picture."""
    u, v = np.arange(SIDE, dtype=np.int32)[None, :], np.arange(SIDE, dtype=np.int32)[:, None]
    clouds = LATTICE @ np.floor(rng.random_sample((9, 9)) * 37 - 18) @ LATTICE.T
    ground = clouds.astype(np.int32) // 256 + pick(rng, range(112, 162))
    for _ in range(pick(rng, (2, 3, 4))):  # faint blots and streaks, which are no objects
        tone, x, y = pick(rng, (-16, -12, -8, 8, 12, 16)), u - pick(rng, range(SIDE)), v - pick(rng, range(SIDE))
        if pick(rng, range(2)):
            ground += tone * (x * x + y * y * pick(rng, (1, 2, 3)) < pick(rng, range(8, 22)) ** 2)
        else:
            ground += tone * (abs(x * pick(rng, range(-4, 5)) + y * pick(rng, range(2, 6))) < pick(rng, range(5, 13)))
    canvas = ground + np.array([pick(rng, range(-8, 9)) for _ in range(3)], np.int32)[:, None, None]
    for o in objects:
        alpha, left, top = mask(o.shape, o.across)[0], o.x - o.across // 2, o.y - o.across // 2
        shade = [value + pick(rng, range(-12, 13)) for value in COLOURS[o.colour]]
        for shift, cover, colour in ((2, alpha // 4, (20, 20, 24)), (0, alpha, shade)):  # the shadow, then the object
            under = canvas[:, top + shift : top + shift + o.across, left + shift : left + shift + o.across]
            cover = cover[: under.shape[1], : under.shape[2]]
            under += (np.array(colour, np.int32)[:, None, None] - under) * cover >> 8
    light = 256 + ((u - 64) * pick(rng, range(-40, 41)) + (v - 64) * pick(rng, range(-40, 41))) // 64
    grain = np.frombuffer(rng.bytes(SIDE * SIDE), np.uint8).reshape(SIDE, SIDE) // np.int32(20) - 6
    return np.clip((canvas * light >> 8) + grain, 0, 255).astype(np.uint8).transpose(1, 2, 0)
