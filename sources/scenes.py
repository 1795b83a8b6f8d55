"""Scenes: an image-text retrieval set that the program draws itself, the same bytes on every machine.

Part 1  objects    three to six flat shapes make a scene; most scenes have a twin that differs in one detail only
Part 2  pictures   shapes pasted with antialiased masks on a clouded ground, under uneven light
Part 3  claims     what a caption says, as a structure that can be checked against any scene
Part 4  captions   a claim put into words, five a scene, each in another sentence form
Part 5  the set    `make` puts the parts together, with the regions that `windows.py` finds in the pictures

Twins share nearly all their words, so a bag of words cannot tell them apart: words have to be matched with regions.
Whatever decides a byte is drawn from `RandomState`, whose stream NumPy has frozen, as doubles or bytes (its integers
depend on the platform), and computed in integers or in floats that are exact.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations, permutations, product, takewhile
from typing import NamedTuple

import numpy as np

from sources.windows import SIDE, describe, propose

SPLITS = {"train": 2000, "val": 250, "test": 500}
CAPTIONS, LONGEST = 5, 20  # captions of a scene, words of a caption at most
Rng = np.random.RandomState

# ---- Part 1: objects ------------------------------------------------------------------------------------------------
COLOURS = {"red": (212, 48, 46), "orange": (242, 134, 28), "yellow": (246, 216, 60), "green": (58, 158, 74),
           "blue": (48, 100, 214), "purple": (142, 66, 176), "white": (242, 242, 240), "black": (28, 28, 32)}
STAR = ((0, -1000), (951, -309), (588, 809), (-588, 809), (-951, -309))  # the ways its five sides face
SHAPES = {  # what lies inside: x to the right and y down, in thousandths of half the extent
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
    """A flat shape: what it looks like, its centre (x, y) and its extent `across`, these three in pixels."""

    shape: str
    colour: str
    size: str
    x: int
    y: int
    across: int


def pick(rng: Rng, items: Sequence):
    return items[int(rng.random_sample() * len(items))]


def shuffled(rng: Rng, items: Sequence) -> list:
    return [items[i] for i in np.argsort(rng.random_sample(len(items)), kind="stable")]


def split_of(objects: Sequence[Object]) -> str:
    """The one split where a scene with these looks may occur: a hash decides, so that splits share no scene."""
    return list(SPLITS)[zlib.crc32(repr(sorted(o[:3] for o in objects)).encode()) % len(SPLITS)]


def sound(objects: Sequence[Object]) -> bool:
    """No two objects look alike, all lie on the canvas, and none hides another (a slight overlap is welcome)."""
    # Any two are 20 pixels apart one way or the other, so that sentences of five forms are true of any scene.
    return all(o.across // 2 + 2 <= at <= SIDE - 2 - o.across // 2 for o in objects for at in (o.x, o.y)) and all(
        a[:3] != b[:3] and max(abs(a.x - b.x), abs(a.y - b.y)) >= 20
        and 5 * ((a.x - b.x) ** 2 + (a.y - b.y) ** 2) >= (a.across + b.across) ** 2
        for a, b in combinations(objects, 2)
    )  # fmt: skip


def invent(rng: Rng, split: str) -> list[Object]:
    """A new scene for the split.  Objects often share a shape or a colour, so that neither alone names one of them."""
    objects: list[Object] = []
    while not 3 <= len(objects) <= 6:
        objects = []
        for _ in range(pick(rng, (6, 8, 10, 12, 16))):  # throws, some of which have no room
            shape, colour, size = (pick(rng, names) for names in LOOKS.values())
            if objects and rng.random_sample() < 0.5:
                shape, colour = pick(rng, ((pick(rng, objects).shape, colour), (shape, pick(rng, objects).colour)))
            o = Object(shape, colour, size, pick(rng, range(SIDE)), pick(rng, range(SIDE)), pick(rng, SIZES[size]))
            objects += [o] if sound([*objects, o]) else []
    while split_of(objects) != split or not sound(objects):  # a change of paint may move it to another split
        i = pick(rng, range(len(objects)))
        objects[i] = objects[i]._replace(colour=pick(rng, LOOKS["colour"]))
    return objects


def alter(rng: Rng, objects: list[Object], how: str, split: str) -> list[Object] | None:
    """The twin of a scene, which differs as `TWINS` says and moves all by up to three pixels; None if none is found."""
    before = {o[:3] for o in objects}
    for _ in range(30):
        twin = [o._replace(x=o.x + pick(rng, range(-3, 4)), y=o.y + pick(rng, range(-3, 4))) for o in objects]
        (i, a), (j, b) = shuffled(rng, list(enumerate(twin)))[:2]
        if how in SWAPS:
            twin[i], twin[j] = (o._replace(**{f: getattr(p, f) for f in SWAPS[how]}) for o, p in ((a, b), (b, a)))
        else:
            new = pick(rng, [look for look in LOOKS[how] if look != getattr(a, how)])
            twin[i] = a._replace(**{how: new}, across=pick(rng, SIZES[new]) if how == "size" else a.across)
        if (how == "places swapped" or not {o[:3] for o in twin} <= before) and sound(twin) and split_of(twin) == split:
            return twin
    return None


# ---- Part 2: pictures -----------------------------------------------------------------------------------------------
@cache
def mask(shape: str, across: int) -> tuple[np.ndarray, np.ndarray]:
    """How much of each pixel a shape covers, 0..256 [across, across], and the tight box x1 y1 x2 y2 of that."""
    at = (2 * np.arange(4 * across, dtype=np.int64) + 1 - 4 * across) * 1000 // (4 * across)  # 4 x 4 samples a pixel
    inside = SHAPES[shape](at[None, :], at[:, None])
    alpha = inside.reshape(across, 4, across, 4).sum((1, 3)).astype(np.int32) * 16
    spans = [np.flatnonzero((alpha >= 128).any(axis)) for axis in (0, 1)]
    return alpha, np.array([span[0] for span in spans] + [span[-1] + 1 for span in spans])


# Bilinear interpolation from a 9 x 9 lattice, times 16 each way: whole numbers, so that float products are exact.
LATTICE = np.maximum(0, 16 - abs(np.arange(SIDE)[:, None] - 16 * np.arange(9)[None, :])).astype(np.float64)


def paint(rng: Rng, objects: Sequence[Object]) -> np.ndarray:
    """Draw a scene: [128, 128, 3] uint8.  Ground, smudges, light and exact shades differ from picture to picture."""
    u, v = np.arange(SIDE, dtype=np.int32)[None, :], np.arange(SIDE, dtype=np.int32)[:, None]
    clouds = LATTICE @ np.floor(rng.random_sample((9, 9)) * 37 - 18) @ LATTICE.T
    ground = clouds.astype(np.int32) // 256 + pick(rng, range(112, 162))
    for _ in range(pick(rng, (2, 3, 4))):  # faint things that are no objects: blots and streaks
        tone, x, y = pick(rng, (-16, -12, -8, 8, 12, 16)), u - pick(rng, range(SIDE)), v - pick(rng, range(SIDE))
        if pick(rng, range(2)):
            ground += tone * (x * x + y * y * pick(rng, (1, 2, 3)) < pick(rng, range(8, 22)) ** 2)
        else:
            ground += tone * (abs(x * pick(rng, range(-4, 5)) + y * pick(rng, range(2, 6))) < pick(rng, range(5, 13)))
    canvas = ground + np.array([pick(rng, range(-8, 9)) for _ in range(3)], np.int32)[:, None, None]
    for o in objects:
        alpha, left, top = mask(o.shape, o.across)[0], o.x - o.across // 2, o.y - o.across // 2
        shade = [value + pick(rng, range(-12, 13)) for value in COLOURS[o.colour]]
        for shift, cover, colour in ((2, alpha // 4, (20, 20, 24)), (0, alpha, shade)):  # its shadow first
            under = canvas[:, top + shift : top + shift + o.across, left + shift : left + shift + o.across]
            cover = cover[: under.shape[1], : under.shape[2]]
            under += (np.array(colour, np.int32)[:, None, None] - under) * cover >> 8
    light = 256 + ((u - 64) * pick(rng, range(-40, 41)) + (v - 64) * pick(rng, range(-40, 41))) // 64
    grain = np.frombuffer(rng.bytes(SIDE * SIDE), np.uint8).reshape(SIDE, SIDE) // np.int32(20) - 6
    return np.clip((canvas * light >> 8) + grain, 0, 255).astype(np.uint8).transpose(1, 2, 0)


# ---- Part 3: claims -------------------------------------------------------------------------------------------------

# A phrase says of an object its (shape, colour, size), None for what it leaves open.  A fact is a name and the phrases,
# by number, that it is about, as ("left", 0, 1), or ("count", phrase, how many objects fit it).  A claim, (phrases,
# facts), says that there are as many different objects as phrases that fit these and of which all facts are true.
Phrase = Fact = Claim = tuple
SIDES = {"left": (1, 0), "right": (-1, 0), "above": (0, 1), "below": (0, -1)}  # the way from the first to the second
ENDS = {"leftmost": "left", "rightmost": "right", "highest": "above", "lowest": "below"}  # of all others
PLACES = {"in the top left corner": (0, 0), "in the top right corner": (2, 0), "near the top edge": (None, 0),
          "in the middle": (1, 1), "in the bottom left corner": (0, 2), "in the bottom right corner": (2, 2),
          "near the bottom edge": (None, 2), "near the left edge": (0, None), "near the right edge": (2, None)}


def fits(o: Object, phrase: Phrase) -> bool:
    shape, colour, size = phrase
    return shape in (None, o.shape) and colour in (None, o.colour) and size in (None, o.size)


def true(fact: Fact, who: Sequence[Object], objects: Sequence[Object], clearly: bool = False) -> bool:
    """Is a fact true of a scene if `who` are meant by the phrases?  `clearly` asks for more, so that nobody doubts."""
    name, *args = fact
    if name == "count":
        return sum(fits(o, args[0]) for o in objects) == args[1]
    a, *others = (who[i] for i in args)
    if name in SIDES:
        (right, down), b = SIDES[name], others[0]
        return (b.x - a.x) * right + (b.y - a.y) * down >= (20 if clearly else 10)
    if name in ENDS:
        return all(true((ENDS[name], 0, 1), (a, o), objects, clearly) for o in objects if o != a)
    if name in PLACES:
        margin, bounds = 4 if clearly else -4, (-SIDE, 43, 85, 2 * SIDE)  # of the columns and rows of 3 x 3
        cells = zip((a.x, a.y), PLACES[name], strict=True)
        return all(c is None or bounds[c] + margin <= at < bounds[c + 1] - margin for at, c in cells)
    if name == "between":
        b, c = others
        dx, dy, px, py = c.x - b.x, c.y - b.y, a.x - b.x, a.y - b.y
        length, along, aside = dx * dx + dy * dy, px * dx + py * dy, abs(px * dy - py * dx)
        ends, width = (20, 25) if clearly else (10, 40)  # hundredths of the way from b to c
        return ends * length <= 100 * along <= (100 - ends) * length and 100 * aside <= width * length
    return (a.size, others[0].size) == (("large", "small") if name == "bigger" else ("small", "large"))


def holds(claim: Claim, objects: Sequence[Object]) -> bool:
    """Is the claim true of a scene?"""
    phrases, facts = claim
    meant = product(*([o for o in objects if fits(o, phrase)] for phrase in phrases))
    return any(len({*who}) == len(who) and all(true(fact, who, objects) for fact in facts) for who in meant)


# ---- Part 4: captions -----------------------------------------------------------------------------------------------

NUMBERS = ("none", "one", "two", "three", "four", "five", "six")
WORDS = {name: (name,) for name in (*SHAPES, *COLOURS, *ENDS, *PLACES, *NUMBERS, "shape", "shapes")} | {
    f"in the {level} {side} corner": (f"in the {level} {side} corner", f"at the {level} {side}")
    for level in ("top", "bottom") for side in ("left", "right")
} | {  # the ways to say a name
    "circle": ("circle", "disc"), "ring": ("ring", "hoop"), "diamond": ("diamond", "rhombus"),
    "moon": ("moon", "crescent"), "purple": ("purple", "violet"), "highest": ("highest", "topmost"),
    "large": ("large", "big", "huge"), "small": ("small", "little", "tiny"), "exactly": ("exactly", "just"),
    "left": ("left of", "to the left of", "on the left of", "on the left side of"), "its left": ("to its left",),
    "right": ("right of", "to the right of", "on the right of", "on the right side of"), "its right": ("to its right",),
    "above": ("above", "over", "higher than"), "its above": ("above it", "over it"), "smaller": ("smaller than",),
    "below": ("below", "under", "beneath", "lower than"), "its below": ("below it", "under it", "beneath it"),
    "bigger": ("bigger than", "larger than"), "in the middle": ("in the middle", "in the centre"),
}  # fmt: skip
SLOTS = {"side": tuple(SIDES), "row": ("left", "right"), "level": ("above", "below"), "end": tuple(ENDS),
         "upper": tuple(PLACES)[:4], "lower": tuple(PLACES)[4:], "compare": ("bigger", "smaller")}  # fmt: skip
# A sentence form: its name, how many objects it names, how readily it is chosen, its slots, each filled by one of the
# facts above, and its templates, in which `a0` and `the0` stand for phrase 0, `r0` and `its0` for fact 0.
FORMS = (
    ("relation", 2, 2, (("side", 0, 1),), ("there is a0 r0 a1", "a0 sits r0 a1", "the picture shows a0 r0 a1")),
    ("fronted", 2, 2, (("side", 0, 1),), ("r0 the1 you can see a0", "r0 the1 there is a0", "r0 a1 we find a0")),
    ("place", 2, 2, (("upper", 0), ("lower", 1)), ("there is a0 r0 and a1 r1", "a1 lies r1 while a0 lies r0")),
    ("list", 3, 3, (), ("there is a0 as well as a1 and a2", "a0 together with a1 and a2", "we see a0 and a1 and a2")),
    ("count", 2, 3, (("count",),), ("here we see r0 plus a0 and a1", "we count r0 apart from a0 and a1")),
    ("compare", 2, 1, (("compare", 0, 1),), ("the0 is r0 the1", "the0 looks r0 the1")),
    ("compare", 3, 4, (("compare", 0, 1), ("compare", 0, 2)), ("the0 is r0 both the1 and the2",)),
    ("chain", 3, 6, (("side", 0, 1), ("side", 1, 2)), ("a0 is r0 a1 which is r1 a2", "a0 r0 a1 that lies r1 a2")),
    ("between", 3, 8, (("between", 0, 1, 2),), ("a0 lies between a1 and a2", "between the1 and the2 there is a0")),
    ("end", 2, 4, (("end", 0), ("end", 1)), ("the r0 of all is a0 and the r1 one is a1",)),
    ("order", 3, 4, (("left", 0, 1), ("left", 1, 2)), ("from left to right we see a0 and a1 and a2",)),
    ("order", 3, 4, (("above", 0, 1), ("above", 1, 2)), ("from top to bottom there are a0 then a1 then a2",)),
    ("around", 3, 8, (("row", 1, 0), ("level", 2, 0)), ("a0 has a1 its0 and a2 its1", "a0 with a2 its1 and a1 its0")),
)
VOCABULARY = sorted(
    {word for *_, templates in FORMS for text in templates for word in text.split() if word.isalpha()}
    | {word for ways in WORDS.values() for way in ways for word in way.split()} | {"a", "an", "the"}
)  # fmt: skip


def fillings(slot: tuple, who: Sequence[Object], objects: Sequence[Object]) -> list[Fact]:
    """The facts that may fill a slot, all clearly true; a count is of what none of `who` belongs to."""
    name, *args = slot
    if name == "count":
        kinds = [(None, look, None) for look in COLOURS] + [(None, None, look) for look in SIZES]
        counts = [("count", kind, sum(fits(o, kind) for o in objects)) for kind in kinds]
        return [fact for fact in counts if fact[2] and not any(fits(o, fact[1]) for o in who)]
    facts = ((fact, *args) for fact in SLOTS.get(name, (name,)))
    return [fact for fact in facts if true(fact, who, objects, clearly=True)]


def refer(rng: Rng, o: Object, objects: Sequence[Object], sized: bool) -> Phrase | None:
    """Some of the looks of an object, enough to tell it from the others of its scene; None where they cannot."""
    full = (o.shape, o.colour, o.size if sized else None)
    some = tuple(look if rng.random_sample() < p else None for look, p in zip(full, (0.94, 0.92, 0.65), strict=True))
    enough = (p for p in (some, full) if (p[0] or p[1]) and sum(fits(other, p) for other in objects) == 1)
    return next(enough, None)


def choose(rng: Rng, form: tuple, objects: Sequence[Object]) -> tuple[Claim, tuple[int, ...]] | None:
    """A claim of the given form that is clearly true of the scene, and which objects it is about; None if none is."""
    name, number, _, slots, _ = form
    for chosen in shuffled(rng, list(permutations(range(len(objects)), number))):
        who = [objects[i] for i in chosen]
        options = list(takewhile(bool, (fillings(slot, who, objects) for slot in slots)))
        if len(options) == len(slots):
            phrases = tuple(refer(rng, o, objects, sized=name != "compare") for o in who)
            if all(phrases):
                return (phrases, tuple(pick(rng, facts) for facts in options)), chosen
    return None


def say(rng: Rng, template: str, claim: Claim) -> tuple[str, list[tuple[int, int]]]:
    """Put a claim into words: the caption and, for each noun of it, (number of the word, number of the phrase)."""
    (phrases, facts), words, nouns = claim, [], []
    for token in template.split():
        head = token.rstrip("012")
        number = int(token[len(head) :] or 0)
        if head == token:
            words.append(token)
        elif head in ("a", "the"):
            shape, colour, size = phrases[number]
            said = [pick(rng, WORDS[look]) for look in (size, colour, shape or "shape") if look]
            words += ["an" if head == "a" and said[0][0] in "aeiou" else head, *said]
            nouns.append((len(words) - 1, number))
        elif facts[number][0] == "count":
            _, (_, colour, size), many = facts[number]
            noun = "shape" if many == 1 else "shapes"
            words += [pick(rng, WORDS[word]) for word in ("exactly", NUMBERS[many], colour or size, noun)]
        else:
            words += pick(rng, WORDS["its " * (head == "its") + facts[number][0]]).split()
    return " ".join(words), nouns


def tell(rng: Rng, objects: Sequence[Object]) -> list[tuple[str, Claim, list[tuple[int, int]]]]:
    """Five captions, each of another form: the words, the claim, and (word, object) for the nouns."""
    told: dict[str, tuple] = {}
    for i in np.argsort(rng.random_sample(len(FORMS)) / [form[2] for form in FORMS], kind="stable"):
        if len(told) < CAPTIONS and FORMS[i][0] not in told and (chosen := choose(rng, FORMS[i], objects)):
            text, nouns = say(rng, pick(rng, FORMS[i][-1]), chosen[0])
            while len(text.split()) > LONGEST:  # every form has shorter words for the same claim
                text, nouns = say(rng, pick(rng, FORMS[i][-1]), chosen[0])
            told[FORMS[i][0]] = text, chosen[0], [(word, chosen[1][number]) for word, number in nouns]
    return list(told.values())


# ---- Part 5: the set ------------------------------------------------------------------------------------------------
@dataclass
class Scenes:
    """A split: what a model may see, then the truth, which only measurements may see."""

    pictures: np.ndarray  # [N, 128, 128, 3] uint8
    captions: list[str]  # 5 N, five a scene, in scene order; words and single spaces only
    image_of: np.ndarray  # [5 N] int64, caption -> scene
    regions: np.ndarray  # [N, 36, 181] float32
    boxes: np.ndarray  # [N, 36, 4] float32, x1 y1 x2 y2 in 0..1
    objects: list[list[Object]]
    object_boxes: list[np.ndarray]  # a scene: [objects, 4] float32, as `boxes`
    word_objects: list[list[tuple[int, int]]]  # a caption: (word, object of its scene) for each noun that names one
    claims: list[Claim]  # what each caption says
    twin_of: np.ndarray  # [N] int64, the twin of a scene, -1 where it has none
    twin_kind: list[str]  # how the two differ, one of `TWINS`; "" where there is no twin


def make(split: str, seed: int = 0, count: int | None = None) -> Scenes:
    """Draw a split: "train" (2000 scenes), "val" (250) or "test" (500), or a set of `count` scenes fit for that split.

    Six scenes in ten have a twin.  Equal arguments give equal bytes; another count or seed is another drawing, yet no
    two splits ever share a scene.  ValueError for an unknown split or a count below one.
    """
    if split not in SPLITS or (count is not None and count < 1):
        raise ValueError(f"no such scenes: split {split!r} (there are {', '.join(SPLITS)}), count {count}")
    count = SPLITS[split] if count is None else count
    rng = Rng([seed, list(SPLITS).index(split), count])
    drawn: list[tuple[list[Object], int, str]] = []  # a scene, the place of its twin, how they differ
    while len(drawn) < count * 3 // 10 * 2:
        objects, how = invent(rng, split), TWINS[len(drawn) // 2 % len(TWINS)]
        if twin := alter(rng, objects, how, split):
            drawn += [(objects, len(drawn) + 1, how), (twin, len(drawn), how)]
    drawn += [(invent(rng, split), -1, "") for _ in range(count - len(drawn))]
    order = shuffled(rng, range(count))  # else twins would be neighbours
    place = [*np.argsort(order), -1]
    scenes = [shuffled(rng, drawn[i][0]) for i in order]
    texts, claims, nouns = zip(*(caption for objects in scenes for caption in tell(rng, objects)), strict=True)
    pictures = np.stack([paint(rng, objects) for objects in scenes])
    boxes = propose(pictures)
    tight = [[mask(o.shape, o.across)[1] + (o.x, o.y) * 2 - o.across // 2 for o in objects] for objects in scenes]
    return Scenes(
        pictures, list(texts), np.repeat(np.arange(count, dtype=np.int64), CAPTIONS), describe(pictures, boxes), boxes,
        scenes, [np.array(t, np.float32) / SIDE for t in tight], list(nouns),
        list(claims), np.array([place[drawn[i][1]] for i in order], np.int64), [drawn[i][2] for i in order],
    )  # fmt: skip


def oracle(scenes: Scenes) -> np.ndarray:
    """Of how many of the scenes each caption is true: [5 N] int64, at least one."""
    phrases = {phrase for phrases, _ in scenes.claims for phrase in phrases}
    having = {p: {i for i, objects in enumerate(scenes.objects) if any(fits(o, p) for o in objects)} for p in phrases}
    likely = [set.intersection(*(having[phrase] for phrase in phrases)) for phrases, _ in scenes.claims]
    return np.array([sum(holds(c, scenes.objects[i]) for i in at) for c, at in zip(scenes.claims, likely, strict=True)])
