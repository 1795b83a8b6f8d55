"""The drawn scenes: the same everywhere, true captions, splits and twins apart, regions from pixels."""

import hashlib
import itertools
import re

import numpy as np
import pytest

from sources import drawing, scenes, windows


@pytest.fixture(scope="module")
def val() -> scenes.Scenes:
    return scenes.make("val")


def looks(objects: list[scenes.Object]) -> tuple:
    return tuple(sorted(o[:3] for o in objects))


def pairs(made: scenes.Scenes) -> list[tuple[int, int]]:
    return [(i, int(j)) for i, j in enumerate(made.twin_of) if j > i]


def test_same_bytes_on_every_machine():
    made = scenes.make("test", seed=3, count=12)
    digest = hashlib.sha256(made.pictures.tobytes() + made.boxes.tobytes() + "\n".join(made.captions).encode())
    assert digest.hexdigest() == "be7a4707d1ea32bed3fd869586af33c6c674957835fb446c9558c39e7a1065eb"
    # Features pass through divisions of floats, so they are pinned to a tolerance.
    some = made.regions[0, 0, [0, 5, 100, -3, -1]]
    assert np.allclose(some, [0.084961, 0.828125, 1.168583, -0.009521, 0.000000], atol=1e-5)


def test_another_seed_draws_other_scenes():
    a, b, again = (scenes.make("val", seed=seed, count=4) for seed in (0, 1, 0))
    assert (a.pictures != b.pictures).any() and a.captions != b.captions
    assert (a.pictures == again.pictures).all() and a.captions == again.captions


def test_shapes_and_types(val):
    assert val.pictures.shape == (250, 128, 128, 3) and val.pictures.dtype == np.uint8
    assert val.boxes.shape == (250, 36, 4) and val.regions.shape == (250, 36, 181)
    assert val.boxes.dtype == val.regions.dtype == val.object_boxes[0].dtype == np.float32
    assert val.image_of.tolist() == [i // 5 for i in range(5 * 250)] and len(val.captions) == 5 * 250
    assert np.isfinite(val.regions).all() and abs(val.regions.mean()) < 0.5 and 0.5 < val.regions.std() < 2
    assert {len(objects) for objects in val.objects} == {3, 4, 5, 6}


@pytest.mark.parametrize("split, count", [("dev", None), ("val", 0), ("val", -1)])
def test_what_cannot_be_drawn_is_refused(split, count):
    with pytest.raises(ValueError, match="no such scenes"):
        scenes.make(split, count=count)


def test_splits_share_no_scene():
    # By construction for any seed and count: each multiset of looks has one split, and `make` keeps to it.
    made = {split: scenes.make(split, count=150) for split in scenes.SPLITS}
    seen = {split: {looks(objects) for objects in made[split].objects} for split in made}
    for a, b in itertools.combinations(seen, 2):
        assert not seen[a] & seen[b]
    for split in made:
        assert all(drawing.split_of(objects) == split for objects in made[split].objects)
        assert all(drawing.split_of(objects[::-1]) == split for objects in made[split].objects)


def test_captions_are_true_and_tell_scenes_apart(val):
    assert all(scenes.holds(claim, val.objects[i]) for claim, i in zip(val.claims, val.image_of, strict=True))
    counts = scenes.oracle(val)
    every = [sum(scenes.holds(claim, objects) for objects in val.objects) for claim in val.claims[:25]]
    assert counts[:25].tolist() == every
    assert counts.min() >= 1 and counts.mean() < 5  # of 250


def test_claims_can_be_false():
    def at(shape, x, y, size="small"):
        return scenes.Object(shape, "red", size, x, y, 20)

    star, ring, moon = at("star", 20, 60), at("ring", 60, 64), at("moon", 110, 60, "large")
    phrases = (("star", "red", None), ("ring", None, None), ("moon", None, "large"))
    truths = {
        ("left", 0, 1): True, ("right", 0, 1): False, ("above", 0, 1): False, ("below", 1, 0): False,
        ("between", 1, 0, 2): True, ("between", 0, 1, 2): False, ("leftmost", 0): True, ("rightmost", 0): False,
        ("bigger", 2, 0): True, ("smaller", 2, 0): False, ("bigger", 0, 1): False,
        ("near the left edge", 0): True, ("near the left edge", 1): False, ("in the middle", 1): True,
        ("count", (None, "red", None), 3): True, ("count", (None, None, "small"), 3): False,
    }
    for fact, truth in truths.items():
        assert scenes.holds((phrases, (fact,)), [moon, star, ring]) is truth, fact
    assert not scenes.holds(((("star", "blue", None),), ()), [moon, star, ring])
    assert not scenes.holds((phrases[:1] * 2, ()), [moon, star, ring])  # two phrases want two objects


def form_of(caption: str, claim: scenes.Claim) -> str:
    """The form with the most words of its own that the caption can be read as."""
    found = []
    for name, number, _, _, templates in scenes.FORMS:
        for template in templates if number == len(claim[0]) else ():
            own = [word for word in template.split() if word.isalpha()]
            pattern = re.sub(r"\b(an?|the)\d", r"\1n? .+", re.sub(r"\b(r|its)\d", ".+", template))
            found += [(len(own), name)] if re.fullmatch(pattern, caption) else []
    return max(found)[1]


def test_captions_are_plain_words_in_five_forms(val):
    for i in range(250):
        five = val.captions[5 * i : 5 * i + 5]
        assert len(set(five)) == 5
        assert len({form_of(text, claim) for text, claim in zip(five, val.claims[5 * i : 5 * i + 5], strict=True)}) == 5
    words = [caption.split() for caption in val.captions]
    assert all(" ".join(w) == caption and 5 <= len(w) <= 20 for w, caption in zip(words, val.captions, strict=True))
    assert {word for w in words for word in w} <= set(scenes.VOCABULARY)
    assert all(word.isalpha() and word.islower() for word in scenes.VOCABULARY)
    for w in words:
        for article, after in itertools.pairwise(w):
            assert article not in ("a", "an") or (article == "an") == (after[0] in "aeiou")


def test_nouns_name_one_object(val):
    shape_of = {way: shape for shape in scenes.SHAPES for way in scenes.WORDS[shape]}
    for k, nouns in enumerate(val.word_objects):
        words, objects, (phrases, _) = val.captions[k].split(), val.objects[val.image_of[k]], val.claims[k]
        assert len(nouns) == len({i for _, i in nouns}) == len(phrases)
        for word, i in nouns:
            assert words[word] == "shape" or shape_of[words[word]] == objects[i].shape
        assert all(sum(scenes.fits(o, phrase) for o in objects) == 1 for phrase in phrases)


def test_twins_differ_in_one_detail(val):
    assert sum(val.twin_of >= 0) == 150 and {val.twin_kind[i] for i, _ in pairs(val)} == set(scenes.TWINS)
    for i, j in pairs(val):
        a, b, kind = val.objects[i], val.objects[j], val.twin_kind[i]
        assert val.twin_of[j] == i and val.twin_kind[j] == kind
        ours, theirs = (sorted(set(looks(x)) - set(looks(y))) for x, y in ((a, b), (b, a)))
        if kind == "places swapped":
            place, moved = {o[:3]: (o.x, o.y) for o in b}, 0
            for o in a:
                moved += max(abs(np.subtract(place[o[:3]], (o.x, o.y)))) > 3
            assert looks(a) == looks(b) and moved == 2
        elif kind == "colours swapped":
            assert sorted(x[1] for x in ours) == sorted(x[1] for x in theirs)
            assert len(ours) == len(theirs) == 2 and len({x[1] for x in ours}) == 2
        else:
            field = scenes.Object._fields.index(kind)
            assert len(ours) == len(theirs) == 1
            assert [k for k in range(3) if ours[0][k] != theirs[0][k]] == [field]


def test_twins_have_their_own_pictures_and_order_says_nothing(val):
    assert all(abs(val.pictures[i].astype(int) - val.pictures[j]).mean() > 2 for i, j in pairs(val))
    apart = [j - i for i, j in pairs(val)]
    assert np.mean(apart) > 250 / 6  # two random places of 250 are 250 / 3 apart
    lengths = np.array([len(caption.split()) for caption in val.captions]).reshape(250, 5).mean(1)
    assert abs(np.mean([lengths[i] - lengths[j] for i, j in pairs(val)])) < 1  # words


def test_captions_of_twins_often_touch_the_difference(val):
    twins = [(k, val.twin_of[i]) for k, i in enumerate(val.image_of) if val.twin_of[i] >= 0]
    told = [not scenes.holds(val.claims[k], val.objects[twin]) for k, twin in twins]
    assert 0.5 < np.mean(told) < 0.9


def test_regions_come_from_pixels_alone(val):
    boxes = windows.propose(val.pictures[40:60])  # another batch, no truth at hand
    assert (boxes == val.boxes[40:60]).all()
    assert np.allclose(windows.describe(val.pictures[40:60], boxes), val.regions[40:60], atol=1e-6)
    blank = np.full((1, 128, 128, 3), 90, np.uint8)
    assert windows.describe(blank, windows.propose(blank)).shape == (1, 36, 181)


def test_boxes_are_boxes_and_mostly_no_objects(val):
    assert val.boxes.min() >= 0 and val.boxes.max() <= 1 and (val.boxes[..., :2] < val.boxes[..., 2:]).all()
    overlaps = [windows.overlap(mine, found) for mine, found in zip(val.object_boxes, val.boxes, strict=True)]
    best = np.concatenate([o.max(1) for o in overlaps])
    assert (best >= 0.5).mean() > 0.9 and (best >= 0.3).mean() > 0.95
    for k, found in enumerate(val.boxes):
        assert len({tuple(box) for box in found.tolist()}) == 36, k
    # A region drawn by chance fits a given object in less than one case in ten.
    assert np.concatenate([(o >= 0.5).mean(1) for o in overlaps]).mean() < 0.1


def test_object_boxes_are_where_the_colour_is():
    made = scenes.make("val", count=6)
    for objects, boxes, picture in zip(made.objects, made.object_boxes, made.pictures.astype(int), strict=True):
        for o, (x1, y1, x2, y2) in zip(objects, np.rint(boxes * 128).astype(int), strict=True):
            assert 0 <= x1 < x2 <= 128 and 0 <= y1 < y2 <= 128 and max(x2 - x1, y2 - y1) <= o.across
            if o.shape in ("square", "circle", "star", "cross") and o.colour in ("red", "green", "blue"):
                channel = ("red", "green", "blue").index(o.colour)
                assert picture[(y1 + y2) // 2, (x1 + x2) // 2].argmax() == channel


@pytest.mark.parametrize("shape, kind", [((2, 64, 64, 3), "u1"), ((2, 128, 128, 3), "f4"), ((0, 128, 128, 3), "u1")])
def test_other_arrays_are_refused(shape, kind):
    with pytest.raises(ValueError, match="pictures should be uint8"):
        windows.propose(np.zeros(shape, kind))
    with pytest.raises(ValueError, match="boxes should be"):
        windows.describe(np.zeros((2, 128, 128, 3), np.uint8), np.zeros((1, 36, 4)))
