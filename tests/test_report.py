"""The report of a run: five folds, and what a word looks at."""
import numpy as np
import pytest
import torch
from conftest import unit

import retrieve
from harness import report
from retrieve import Embeddings


def test_five_folds_are_the_mean_of_their_parts():
    images, texts = Embeddings("image", unit(20, 8, seed=0)), Embeddings("text", unit(40, 8, seed=1))
    image_of = torch.arange(40) // 2
    folds = [retrieve.evaluate(images[slice(f, f + 4)], texts[slice(2 * f, 2 * f + 8)], torch.arange(8) // 2)
             for f in range(0, 20, 4)]
    mean = report.five_folds(images, texts, image_of)
    assert mean["global"]["rsum"] == pytest.approx(np.mean([f["global"]["rsum"] for f in folds]))
    assert mean["global"]["t2i"]["r1"] == pytest.approx(np.mean([f["global"]["t2i"]["r1"] for f in folds]))


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
