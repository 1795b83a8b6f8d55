"""The report of a run: five folds, what a word looks at, and dollars in a picture."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import unit
from PIL import Image

import data
import retrieve
from harness import figures, report, settings
from retrieve import Embeddings
from sources.features import InMemory


def test_five_folds_are_the_mean_of_their_parts():
    images, texts = Embeddings("image", unit(20, 8, seed=0)), Embeddings("text", unit(40, 8, seed=1))
    image_of = torch.arange(40) // 2
    folds = [retrieve.evaluate(images[slice(f, f + 4)], texts[slice(2 * f, 2 * f + 8)], torch.arange(8) // 2)
             for f in range(0, 20, 4)]
    mean = report.five_folds(images, texts, image_of)
    assert mean["global"]["rsum"] == pytest.approx(np.mean([f["global"]["rsum"] for f in folds]))
    assert mean["global"]["t2i"]["r1"] == pytest.approx(np.mean([f["global"]["t2i"]["r1"] for f in folds]))


def test_the_search_settings_are_the_options_of_evaluate():
    chosen = settings.make({"captions_shortlist": 3, "images_shortlist": 7, "local_weight": 2.0, "reduction": "mean"})
    assert report.search_options(chosen) == {"shortlist": (3, 7), "weight": 2.0, "reduction": "mean"}


def test_a_region_lies_on_an_object():
    objects = np.array([[0.2, 0.2, 0.4, 0.4]])
    boxes = np.array([
        [0.2, 0.2, 0.4, 0.4],    # the object itself
        [0.0, 0.0, 0.6, 0.6],    # large, but its centre is inside
        [0.3, 0.2, 0.55, 0.4],   # IoU 0.1 / 0.35 < 0.3, centre outside
        [0.25, 0.1, 0.45, 0.4],  # IoU 0.03 / 0.07 >= 0.3
        [0.6, 0.6, 0.9, 0.9],    # elsewhere
    ])
    assert report.lies_on(boxes, objects)[:, 0].tolist() == [True, True, False, True, False]


def test_words_are_aligned_with_the_regions_that_the_model_saw():
    """Two regions, the second on the object. A caption of three words is cut to two; the last one names it too."""
    boxes = np.array([[[0, 0, 0.1, 0.1], [0.5, 0.5, 0.9, 0.9]]], np.float32)
    truth = SimpleNamespace(word_objects=[[(0, 0), (1, 0), (2, 0)]], object_boxes=[np.array([[0.5, 0.5, 0.9, 0.9]])])
    split = data.Split("test", ["a b c"], np.array([0]), InMemory("", np.eye(2)[None], boxes), ["0"], [None], truth)
    images = Embeddings("image", unit(1, 2, seed=0), torch.eye(2)[None], torch.ones(1, 2, dtype=torch.bool))
    texts = Embeddings("text", unit(1, 2, seed=0), torch.eye(2)[None], torch.ones(1, 2, dtype=torch.bool))
    assert report.alignment(images, texts, split) == {"aligned": 50.0, "chance": 50.0, "words": 2}
    truth.word_objects = [[(2, 0)]]
    assert report.alignment(images, texts, split) is None


def test_a_found_picture_has_its_name_above_it(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.extend(axis.get_title() for axis in figure.axes))
    names = ["1000268201_693b08cb0e.jpg", "COCO_train2014_000000391895.jpg"]
    figures.found_images(data.Split("test", [], np.array([]), None, names, [None] * 2), "a dog", [0, 1], tmp_path)
    assert drawn == ["1. 1000268201_693b08cb0e.jpg", "2. COCO_train...00000391895.jpg"]


def test_a_strip_of_found_pictures_ends_and_letters_without_a_picture_take_one_line(tmp_path, capsys):
    split = data.Split("test", [], np.array([]), None, ["a.png"] * 300, [None] * 300)
    figures.found_images(split, "\u72d7\u732b", list(range(300)), tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").width < 20 * 300
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("text", ["#1: $5, #2: $6", "$\\frac$"])
def test_a_dollar_in_a_caption_or_a_name_is_a_dollar(tmp_path, text):
    split = data.Split("test", [text] * 5, np.array([0] * 5), None, [text], [None])
    figures.found_images(split, text, [0], tmp_path / "a.png")
    figures.found_captions(None, [text], tmp_path / "b.png")
    one, five = torch.tensor([0]), torch.zeros(1, 5, dtype=torch.long)
    figures.retrieval(split, five, five, one, one, tmp_path / "c.png")
    assert len(list(tmp_path.iterdir())) == 3
