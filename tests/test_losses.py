"""Losses: parity with the released code, hand-worked numbers, and what may not change a result."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import losses

PARITY = Path(__file__).parent / "parity"


@pytest.fixture(scope="module")
def given() -> dict[str, torch.Tensor]:
    with np.load(PARITY / "tgdt_losses.npz", allow_pickle=False) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays}


@pytest.fixture(scope="module")
def expected() -> dict:
    return json.loads((PARITY / "tgdt_losses.json").read_text())


def word_mask(given: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.arange(given["word_tokens"].shape[1]) < given["word_lengths"][:, None]


def random_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double), dim=-1)


def test_cmc_equals_the_released_code(given, expected):
    images, texts, want = given["images"], given["texts"], expected["cmc_global"]
    assert losses.hinge(images @ texts.T).item() == pytest.approx(want["inter_margin_0.2"], abs=1e-5)
    assert losses.intra_consistency(images, texts).item() == pytest.approx(want["intra_margin_0.3"], abs=1e-5)
    assert losses.cmc(images, texts).item() == pytest.approx(want["total"], abs=1e-5)


def test_local_similarity_equals_the_released_code(given, expected):
    regions = given["region_tokens"]
    everywhere = torch.ones(regions.shape[:2], dtype=torch.bool)
    local = losses.local_similarity(regions, everywhere, given["word_tokens"], word_mask(given))
    assert torch.allclose(10 * local, given["local_similarity_x10"], atol=1e-5, rtol=1e-5)
    want = expected["local_hinge_on_x10_similarity"]["loss"]
    assert losses.hinge(10 * local).item() == pytest.approx(want, rel=1e-5)
    total = losses.cmc(given["images"], given["texts"], local)
    assert total.item() == pytest.approx(want + expected["cmc_global"]["total"], rel=1e-5)


def test_hinge_by_hand():
    similarity = torch.tensor([[0.9, 0.8, 0.1], [0.2, 0.5, 0.6], [0.3, 0.0, 0.7]])
    # rows: .2+.8-.9, .2+.6-.5, .2+.3-.7 -> .1, .3, 0; columns: 0, .2+.8-.5, .2+.6-.7 -> 0, .5, .1
    assert losses.hinge(similarity).item() == pytest.approx(1.0)
    # the mean over two negatives: rows .05, .15, 0; columns 0, .25, .05
    assert losses.hinge(similarity, negatives="mean").item() == pytest.approx(0.5)


def test_false_negatives_are_masked():
    similarity = torch.tensor([[0.5, 0.9, 0.0], [0.9, 0.5, 0.0], [0.0, 0.0, 0.5]])
    same_image = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.bool)
    assert losses.hinge(similarity).item() == pytest.approx(4 * 0.6)
    assert losses.hinge(similarity, positives=same_image).item() == 0
    assert losses.hinge(similarity, positives=same_image, negatives="mean").item() == 0


def test_hinge_wants_a_square_and_a_known_word():
    with pytest.raises(ValueError, match="square"):
        losses.hinge(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="hardest"):
        losses.hinge(torch.zeros(2, 2), negatives="some")


def test_intra_consistency_by_hand():
    images = torch.eye(2)
    texts = torch.tensor([[1.0, 0.0], [0.8, 0.6]])  # text-text 0.8 where image-image is 0
    assert losses.intra_consistency(images, texts).item() == pytest.approx(2 * 0.5)
    assert losses.intra_consistency(images, images).item() == 0


def test_local_similarity_equals_three_loops():
    regions, words = random_tokens(3, 5, 8), random_tokens(4, 6, 8, seed=1)
    region_mask = torch.arange(5) < torch.tensor([[5], [2], [3]])
    real_words = torch.arange(6) < torch.tensor([[6], [1], [4], [3]])
    local = losses.local_similarity(regions, region_mask, words, real_words)
    for i in range(3):
        for c in range(4):
            best = [max(float(r @ w) for r in regions[i][region_mask[i]]) for w in words[c][real_words[c]]]
            assert local[i, c].item() == pytest.approx(sum(best), abs=1e-12)
    mean = losses.local_similarity(regions, region_mask, words, real_words, words="mean")
    assert torch.allclose(mean, local / torch.tensor([6, 1, 4, 3]))


def test_padding_changes_nothing_even_where_all_similarities_are_negative():
    """A padded region filled with 0 would beat every negative similarity, as it does in the released code."""
    direction = F.normalize(torch.ones(8, dtype=torch.double), dim=0)
    regions, words = -direction.expand(2, 3, 8).clone(), direction.expand(2, 4, 8).clone()
    full = losses.local_similarity(regions, torch.ones(2, 3, dtype=torch.bool), words, torch.ones(2, 4).bool())
    assert torch.allclose(full, torch.full((2, 2), -4.0, dtype=torch.double))
    padded = losses.local_similarity(
        F.pad(regions, (0, 0, 0, 2)), F.pad(torch.ones(2, 3, dtype=torch.bool), (0, 2)),
        F.pad(words, (0, 0, 0, 3), value=9.0), F.pad(torch.ones(2, 4, dtype=torch.bool), (0, 3)),
    )
    assert torch.equal(full, padded)


def test_gradients():
    regions, words = random_tokens(3, 4, 5).requires_grad_(), random_tokens(3, 2, 5, seed=1).requires_grad_()
    image, text = random_tokens(3, 5, seed=2).requires_grad_(), random_tokens(3, 5, seed=3).requires_grad_()
    region_mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)
    real_words = torch.tensor([[1, 1], [1, 0], [1, 1]], dtype=torch.bool)

    def objective(image, text, regions, words):
        local = losses.local_similarity(regions, region_mask, words, real_words)
        return losses.cmc(image, text, local, margin=0.5, intra_margin=0.1)

    assert torch.autograd.gradcheck(objective, (image, text, regions, words))
