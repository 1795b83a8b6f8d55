"""Scenes: a set of pictures and captions that the program draws itself, the same on every machine.

    claims     what a caption says, in a form that can be checked against any scene
    captions   a claim put into words; five captions for each scene, each with another form of sentence
    the set    `make` puts all together, with the regions that `windows.py` finds in the pictures

Objects, twins and pictures come from `drawing.py`. The captions of twins share nearly all their words, so a bag of
words cannot tell twins apart: a model has to match words with regions.
"""
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations, product
from typing import NamedTuple

import numpy as np

from sources.drawing import COLOURS, SHAPES, SIZES, SPLITS, TWINS, Object, Rng, alter, invent, paint, pick, shuffled
from sources.windows import SIDE, describe, propose

CAPTIONS, LONGEST = 5, 20  # captions of a scene; words of a caption at most

# A phrase describes an object by (shape, colour, size). None leaves one of these open.
# A fact is a name and the numbers of the phrases that it is about, as ("left", 0, 1); or ("count", phrase, how many).
# A claim is (phrases, facts). It says that the scene has a different object for each phrase, and that all facts are
# true of these objects.
Phrase = Fact = Claim = tuple
SIDES = {"left": (1, 0), "right": (-1, 0), "above": (0, 1), "below": (0, -1)}  # direction from the first to the second
ENDS = {"leftmost": "left", "rightmost": "right", "highest": "above", "lowest": "below"}  # compared with all others
PLACES = {"in the top left corner": (0, 0), "in the top right corner": (2, 0), "near the top edge": (None, 0),
          "in the middle": (1, 1), "in the bottom left corner": (0, 2), "in the bottom right corner": (2, 2),
          "near the bottom edge": (None, 2), "near the left edge": (0, None), "near the right edge": (2, None)}


def fits(o: Object, phrase: Phrase) -> bool:
    shape, colour, size = phrase
    return shape in (None, o.shape) and colour in (None, o.colour) and size in (None, o.size)


def is_true(fact: Fact, who: Sequence[Object], objects: Sequence[Object], clearly: bool = False) -> bool:
    """Is a fact true of a scene, if the phrases mean the objects `who`? clearly: so that nobody can doubt it."""
    name, *args = fact
    if name == "count":
        return sum(fits(o, args[0]) for o in objects) == args[1]
    a, *others = (who[i] for i in args)
    if name in SIDES:
        (right, down), b = SIDES[name], others[0]
        return (b.x - a.x) * right + (b.y - a.y) * down >= (20 if clearly else 10)
    if name in ENDS:
        return all(is_true((ENDS[name], 0, 1), (a, o), objects, clearly) for o in objects if o != a)
    if name in PLACES:
        column, row = PLACES[name]  # of 3 x 3 cells
        margin, bounds = 4 if clearly else -4, (-SIDE, 43, 85, 2 * SIDE)
        return all(cell is None or bounds[cell] + margin <= at < bounds[cell + 1] - margin
                   for at, cell in ((a.x, column), (a.y, row)))
    if name == "between":
        b, c = others
        dx, dy, px, py = c.x - b.x, c.y - b.y, a.x - b.x, a.y - b.y
        length, along, aside = dx * dx + dy * dy, px * dx + py * dy, abs(px * dy - py * dx)
        ends, width = (20, 25) if clearly else (10, 40)  # in hundredths of the way from b to c
        return ends * length <= 100 * along <= (100 - ends) * length and 100 * aside <= width * length
    return (a.size, others[0].size) == (("large", "small") if name == "bigger" else ("small", "large"))


def holds(claim: Claim, objects: Sequence[Object]) -> bool:
    """Is the claim true of a scene?"""
    phrases, facts = claim
    for who in product(*([o for o in objects if fits(o, phrase)] for phrase in phrases)):
        if len(set(who)) == len(who) and all(is_true(fact, who, objects) for fact in facts):
            return True
    return False


NUMBERS = ("none", "one", "two", "three", "four", "five", "six")
WORDS = {name: (name,) for name in (*SHAPES, *COLOURS, *ENDS, *PLACES, *NUMBERS, "shape", "shapes")} | {
    f"in the {level} {side} corner": (f"in the {level} {side} corner", f"at the {level} {side}")
    for level in ("top", "bottom") for side in ("left", "right")
} | {  # the ways to say each name
    "circle": ("circle", "disc"), "ring": ("ring", "hoop"), "diamond": ("diamond", "rhombus"),
    "moon": ("moon", "crescent"), "purple": ("purple", "violet"), "highest": ("highest", "topmost"),
    "large": ("large", "big", "huge"), "small": ("small", "little", "tiny"), "exactly": ("exactly", "just"),
    "left": ("left of", "to the left of", "on the left of", "on the left side of"), "its left": ("to its left",),
    "right": ("right of", "to the right of", "on the right of", "on the right side of"), "its right": ("to its right",),
    "above": ("above", "over", "higher than"), "its above": ("above it", "over it"), "smaller": ("smaller than",),
    "below": ("below", "under", "beneath", "lower than"), "its below": ("below it", "under it", "beneath it"),
    "bigger": ("bigger than", "larger than"), "in the middle": ("in the middle", "in the centre"),
}


class Form(NamedTuple):
    """A form of sentence."""

    name: str
    number: int  # of objects that it names
    weight: int  # how readily it is chosen
    gaps: tuple  # each is filled by one of the facts in GAPS
    templates: tuple  # `a0` and `the0` stand for phrase 0, `r0` and `its0` for fact 0


GAPS = {"side": tuple(SIDES), "row": ("left", "right"), "level": ("above", "below"), "end": tuple(ENDS),
        "upper": tuple(PLACES)[:4], "lower": tuple(PLACES)[4:], "compare": ("bigger", "smaller")}
FORMS = [Form(*form) for form in (
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
)]
VOCABULARY = sorted(
    {word for form in FORMS for text in form.templates for word in text.split() if word.isalpha()}
    | {word for ways in WORDS.values() for way in ways for word in way.split()} | {"a", "an", "the"})


def fillings(gap: tuple, who: Sequence[Object], objects: Sequence[Object]) -> list[Fact]:
    """The facts that may fill a gap. All are clearly true. A count is about objects other than `who`."""
    name, *args = gap
    if name == "count":
        kinds = [(None, look, None) for look in COLOURS] + [(None, None, look) for look in SIZES]
        counts = [("count", kind, sum(fits(o, kind) for o in objects)) for kind in kinds]
        return [fact for fact in counts if fact[2] and not any(fits(o, fact[1]) for o in who)]
    facts = [(fact, *args) for fact in GAPS.get(name, (name,))]
    return [fact for fact in facts if is_true(fact, who, objects, clearly=True)]


def describe_object(rng: Rng, o: Object, objects: Sequence[Object], sized: bool) -> Phrase | None:
    """Some of an object's looks, enough to tell it from the others of its scene; None if that cannot be done."""
    full = (o.shape, o.colour, o.size if sized else None)
    some = tuple(look if rng.random_sample() < p else None for look, p in zip(full, (0.94, 0.92, 0.65), strict=True))
    for phrase in (some, full):
        if (phrase[0] or phrase[1]) and sum(fits(other, phrase) for other in objects) == 1:
            return phrase
    return None


def find_claim(rng: Rng, form: Form, objects: Sequence[Object]) -> tuple[Claim, tuple[int, ...]] | None:
    """A claim of the given form that is clearly true of the scene, and which objects it is about; None if none is."""
    for chosen in shuffled(rng, list(permutations(range(len(objects)), form.number))):
        who = [objects[i] for i in chosen]
        options = [fillings(gap, who, objects) for gap in form.gaps]
        if all(options):
            phrases = tuple(describe_object(rng, o, objects, sized=form.name != "compare") for o in who)
            if all(phrases):
                return (phrases, tuple(pick(rng, facts) for facts in options)), chosen
    return None


def put_into_words(rng: Rng, template: str, claim: Claim) -> tuple[str, list[tuple[int, int]]]:
    """The caption of a claim, and for each of its nouns (number of the word, number of the phrase)."""
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
            name = facts[number][0]
            words += pick(rng, WORDS[f"its {name}" if head == "its" else name]).split()
    return " ".join(words), nouns


def caption(rng: Rng, objects: Sequence[Object]) -> list[tuple[str, Claim, list[tuple[int, int]]]]:
    """Five captions of a scene, each of another form: the words, the claim, and (word, object) for each noun."""
    captions: dict[str, tuple] = {}
    for i in np.argsort(rng.random_sample(len(FORMS)) / [form.weight for form in FORMS], kind="stable"):
        form = FORMS[i]
        if len(captions) == CAPTIONS or form.name in captions:
            continue
        found = find_claim(rng, form, objects)
        if found:
            claim, chosen = found
            text, nouns = put_into_words(rng, pick(rng, form.templates), claim)
            while len(text.split()) > LONGEST:  # every form has shorter words for the same claim
                text, nouns = put_into_words(rng, pick(rng, form.templates), claim)
            captions[form.name] = text, claim, [(word, chosen[number]) for word, number in nouns]
    return list(captions.values())


@dataclass
class Scenes:
    """A split: first what a model may see, then the truth, which only measurements may see."""

    pictures: np.ndarray  # [N, 128, 128, 3] uint8
    captions: list[str]  # 5 N, five a scene, in the order of scenes; words and single spaces only
    image_of: np.ndarray  # [5 N] int64, caption -> scene
    regions: np.ndarray  # [N, 36, 181] float32
    boxes: np.ndarray  # [N, 36, 4] float32, x1 y1 x2 y2 in 0..1
    objects: list[list[Object]]
    object_boxes: list[np.ndarray]  # of each scene [objects, 4] float32, like `boxes`
    word_objects: list[list[tuple[int, int]]]  # of each caption: (word, object of its scene) for each noun
    claims: list[Claim]  # what each caption says
    twin_of: np.ndarray  # [N] int64, the twin of a scene, or -1
    twin_kind: list[str]  # how the two differ, one of TWINS; "" if there is no twin


def make(split: str, seed: int = 0, count: int | None = None) -> Scenes:
    """Draw a split: "train" (2,000 scenes), "val" (250) or "test" (500), or `count` scenes fit for that split.

    Six scenes in ten have a twin. Equal arguments give equal bytes. Another seed or count gives other scenes, but two
    splits never share a scene. Raises ValueError for an unknown split or a count below one.
    """
    if split not in SPLITS or (count is not None and count < 1):
        raise ValueError(f"no such scenes: split {split!r} (there are {', '.join(SPLITS)}), count {count}")
    count = SPLITS[split] if count is None else count
    rng = Rng([seed, list(SPLITS).index(split), count])
    drawn: list[tuple[list[Object], int, str]] = []  # a scene, the place of its twin, how they differ
    while len(drawn) < count * 3 // 10 * 2:
        objects, how = invent(rng, split), TWINS[len(drawn) // 2 % len(TWINS)]
        twin = alter(rng, objects, how, split)
        if twin:
            drawn += [(objects, len(drawn) + 1, how), (twin, len(drawn), how)]
    drawn += [(invent(rng, split), -1, "") for _ in range(count - len(drawn))]
    order = shuffled(rng, range(count))  # otherwise twins would be neighbours
    place = [*np.argsort(order), -1]
    scenes = [shuffled(rng, drawn[i][0]) for i in order]
    captions, claims, nouns = zip(*(found for objects in scenes for found in caption(rng, objects)), strict=True)
    pictures = np.stack([paint(rng, objects) for objects in scenes])
    boxes = propose(pictures)
    return Scenes(
        pictures=pictures, captions=list(captions), image_of=np.repeat(np.arange(count, dtype=np.int64), CAPTIONS),
        regions=describe(pictures, boxes), boxes=boxes, objects=scenes,
        object_boxes=[np.array([o.box() for o in objects], np.float32) / SIDE for objects in scenes],
        word_objects=list(nouns), claims=list(claims),
        twin_of=np.array([place[drawn[i][1]] for i in order], np.int64), twin_kind=[drawn[i][2] for i in order])


def oracle(scenes: Scenes) -> np.ndarray:
    """How many of the scenes each caption is true of: [5 N] int64, at least one."""
    phrases = {phrase for phrases, _ in scenes.claims for phrase in phrases}
    having = {p: {i for i, objects in enumerate(scenes.objects) if any(fits(o, p) for o in objects)} for p in phrases}
    likely = [set.intersection(*(having[phrase] for phrase in phrases)) for phrases, _ in scenes.claims]
    return np.array([sum(holds(c, scenes.objects[i]) for i in at) for c, at in zip(scenes.claims, likely, strict=True)])
