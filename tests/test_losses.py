"""Losses: parity with the released code, hand-worked numbers, and what may not change a result."""
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import losses
import tgdt

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


def test_the_mean_is_over_the_negatives_alone():
    similarity = torch.tensor([[0.5, 0.9, 0.6], [0.9, 0.5, 0.5], [0.4, 0.7, 0.5]])
    same_image = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.bool)
    # rows: .3 / 1, .2 / 1, (.1 + .4) / 2; columns: .1 / 1, .4 / 1, (.3 + .2) / 2
    assert losses.hinge(similarity, positives=same_image, negatives="mean").item() == pytest.approx(1.5)


def test_false_negatives_are_masked():
    similarity = torch.tensor([[0.5, 0.9, 0.0], [0.9, 0.5, 0.0], [0.0, 0.0, 0.5]])
    same_image = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.bool)
    assert losses.hinge(similarity).item() == pytest.approx(4 * 0.6)
    without_diagonal = same_image & ~torch.eye(3, dtype=torch.bool)  # a pair on it is true all the same
    for positives in (same_image, without_diagonal):
        assert losses.hinge(similarity, positives=positives).item() == 0
        assert losses.hinge(similarity, positives=positives, negatives="mean").item() == 0
    assert losses.hinge(similarity[:2, :2], positives=same_image[:2, :2], negatives="mean") == 0  # without a negative


def test_a_loss_refuses_a_matrix_that_is_not_square_and_an_unknown_word():
    with pytest.raises(ValueError, match="square"):
        losses.hinge(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="hardest"):
        losses.hinge(torch.zeros(2, 2), negatives="some")
    for loss in (losses.uto_batch, losses.info_nce):
        with pytest.raises(ValueError, match="square"):
            loss(torch.zeros(2, 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cmc_of_half_precision_is_computed_in_float32(dtype):
    """The sum over 4,000 pairs is beyond float16."""
    similarity = torch.linspace(-1, 1, 16).to(dtype).repeat(250)[:, None] + torch.zeros(4000, dtype=dtype)
    assert losses.hinge(similarity, margin=20.0) == losses.hinge(similarity.float(), margin=20.0) > 65504
    images, texts = (F.normalize(torch.randn(50, 8), dim=1).to(dtype) for _ in range(2))
    assert losses.cmc(images, texts).dtype == losses.intra_consistency(images, texts).dtype == torch.float32


def test_intra_consistency_by_hand():
    images = torch.eye(2)
    texts = torch.tensor([[1.0, 0.0], [0.8, 0.6]])  # text-text 0.8 where image-image is 0
    assert losses.intra_consistency(images, texts).item() == pytest.approx(2 * 0.5)
    assert losses.intra_consistency(images, images).item() == 0


def test_cmc_is_the_sum_of_its_parts():
    images, texts, local = random_tokens(3, 6), random_tokens(3, 6, seed=1), random_tokens(3, 3, seed=5)
    positives = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 0, 1]], dtype=torch.bool)
    parts = (losses.hinge(images @ texts.T, 0.4, positives, "mean") + losses.hinge(3 * local, 0.4, positives, "mean")
             + losses.intra_consistency(images, texts, 0.1))
    assert losses.cmc(images, texts, local, positives, 0.4, 0.1, 3.0, "mean") == parts


def test_local_similarity_equals_three_loops():
    regions, words = random_tokens(3, 5, 8), random_tokens(4, 6, 8, seed=1)
    region_mask = torch.arange(5) < torch.tensor([[5], [2], [3]])
    real_words = torch.arange(6) < torch.tensor([[6], [1], [4], [3]])
    local = losses.local_similarity(regions, region_mask, words, real_words)
    for i in range(3):
        for c in range(4):
            best = [max(float(r @ w) for r in regions[i][region_mask[i]]) for w in words[c][real_words[c]]]
            assert local[i, c].item() == pytest.approx(sum(best), abs=1e-12)
    mean = losses.local_similarity(regions, region_mask, words, real_words, reduction="mean")
    assert torch.allclose(mean, local / torch.tensor([6, 1, 4, 3]))
    assert losses.local_similarity(regions, region_mask, words, real_words & False, "mean").abs().max() == 0


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


# ---------------------------------------------------------------------------------------------------------- UTO


@pytest.fixture(scope="module")
def uto_given() -> dict[str, torch.Tensor]:
    with np.load(PARITY / "user_losses.npz", allow_pickle=False) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays}


def test_uto_equals_the_released_code(uto_given):
    g, want = uto_given, json.loads((PARITY / "user_losses.json").read_text())
    batch = losses.uto_batch(g["images"] @ g["texts"].T)
    queue = (losses.uto_queue(g["images"], g["text_keys"], g["text_queue"])
             + losses.uto_queue(g["texts"], g["image_keys"], g["image_queue"]))
    assert batch.item() == pytest.approx(want["uto_batch_mu90_gamma0.5"], abs=1e-5)
    assert queue.item() == pytest.approx(want["uto_queue_mu90_gamma0.5"], abs=1e-5)
    nothing = torch.zeros(len(g["images"]), len(g["image_queue"]), dtype=torch.bool)
    keys = losses.Keys(g["image_keys"], g["text_keys"], g["image_queue"], g["text_queue"], nothing, nothing)
    whole = losses.uto(g["images"], g["texts"], keys)
    assert whole.item() == pytest.approx(20 * batch.item() + queue.item(), rel=1e-6)


def test_uto_on_a_batch_equals_its_formula_term_by_term():
    s, mu, gamma = random_tokens(4, 6) @ random_tokens(4, 6, seed=1).T, 7.0, 0.1
    total = 0.0
    for i in range(4):
        others = [j for j in range(4) if j != i]
        for negatives in (s[i, others], s[others, i]):
            total += float(torch.log(1 + torch.exp(mu * (negatives - gamma)).sum())) / mu
        total -= float(torch.log(1 + s[i, i].clamp(min=0)))
    assert losses.uto_batch(s, mu, gamma).item() == pytest.approx(total / 4, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_uto_is_stable_where_the_exponential_overflows(dtype):
    """s = 1 and mu = 90 everywhere: e^45 is beyond float16, the loss and its gradient are not."""
    similarity = torch.ones(4, 4, dtype=dtype, requires_grad=True)
    loss = losses.uto_batch(similarity)
    want = 2 * (np.log1p(3 * np.exp(45.0)) / 90) - np.log(2)
    assert loss.item() == pytest.approx(want, abs=1e-6)
    loss.backward()
    assert similarity.grad.isfinite().all() and similarity.grad.dtype == dtype
    unit = F.normalize(torch.ones(3, 8, dtype=dtype), dim=1)
    queue = losses.uto_queue(unit, unit, unit.repeat(2, 1))
    assert queue.item() == pytest.approx(np.log1p(6 * np.exp(45.0)) / 90 - np.log(2), abs=0.01)


def test_uto_uses_no_false_negative():
    similarity = torch.tensor([[0.9, 0.95, 0.1], [0.95, 0.9, 0.2], [0.0, 0.3, 0.8]], dtype=torch.double)
    same_image = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.bool)
    pushed = similarity.clone()
    pushed[0, 1] = pushed[1, 0] = -5  # as far away as may be: what is masked has no say
    assert losses.uto_batch(similarity, positives=same_image) == losses.uto_batch(pushed, positives=same_image)
    assert losses.uto_batch(similarity) > losses.uto_batch(similarity, positives=same_image) + 0.4

    queries, keys, queue = random_tokens(2, 6), random_tokens(2, 6, seed=1), random_tokens(5, 6, seed=2)
    false = torch.tensor([[1, 0, 0, 1, 0], [0, 1, 0, 0, 0]], dtype=torch.bool)
    masked = losses.uto_queue(queries, keys, queue, mu=5.0, gamma=0.0, positives=false)
    by_hand = [losses.uto_queue(queries[i : i + 1], keys[i : i + 1], queue[~false[i]], mu=5.0, gamma=0.0)
               for i in range(2)]
    assert masked.item() == pytest.approx(sum(by_hand).item() / 2, abs=1e-12)


def test_an_empty_queue_adds_nothing():
    queries, keys = random_tokens(2, 6), random_tokens(2, 6, seed=1)
    nothing = torch.ones(2, 3, dtype=torch.bool)
    loss = losses.uto_queue(queries, keys, torch.zeros(3, 6, dtype=torch.double), positives=nothing)
    assert loss.item() == pytest.approx(-(queries * keys).sum(1).clamp(min=0).log1p().mean().item(), abs=1e-12)


def test_without_its_floor_the_reward_pulls_up_pairs_that_start_below_zero():
    truth = torch.tensor([-0.4, 0.3], dtype=torch.double, requires_grad=True)
    assert torch.allclose(losses.reward(truth), torch.tensor([0.0, np.log(1.3)]).double())
    assert torch.allclose(losses.reward(truth, floor=False), torch.tensor([-0.4, np.log(1.3)]).double())
    for floor, slope in ((True, 0.0), (False, 1.0)):
        found, = torch.autograd.grad(losses.reward(truth, floor).sum(), truth)
        assert torch.allclose(found, torch.tensor([slope, 1 / 1.3]).double())
    apart = -torch.eye(4, dtype=torch.double, requires_grad=True)  # a batch whose every pair looks away from itself
    loss = losses.uto_batch(apart, reward_floor=True)
    assert abs(loss.item()) < 1e-15 and torch.autograd.grad(loss, apart)[0].abs().max() < 1e-15
    slope, = torch.autograd.grad(losses.uto_batch(apart, reward_floor=False), apart)
    assert torch.allclose(slope, -torch.eye(4).double() / 4)


@pytest.mark.parametrize("floor, want", [(False, 0.6), (True, 0.0)])
def test_uto_on_a_queue_by_hand(floor, want):
    """The pair has similarity -0.6. The negative has 0, far below gamma = 1, so the reward is all that counts."""
    query, key, queue = torch.tensor([[1.0, 0.0]]), torch.tensor([[-0.6, 0.8]]), torch.zeros(1, 2)
    loss = losses.uto_queue(query, key, queue, mu=1e4, gamma=1.0, reward_floor=floor)
    assert loss.item() == pytest.approx(want, abs=1e-3)


@pytest.mark.parametrize("floor", [True, False])
def test_uto_is_the_sum_of_its_parts(floor):
    """An image meets the keys of captions, a caption those of images, each with its own mask."""
    image, text, image_key, text_key = (random_tokens(3, 6, seed=seed) for seed in range(4))
    image_queue, text_queue = random_tokens(5, 6, seed=4), random_tokens(5, 6, seed=5)
    own = torch.eye(3, 5, dtype=torch.bool)
    keys = losses.Keys(image_key, text_key, image_queue, text_queue, own, own.flip(1))
    positives = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 0, 1]], dtype=torch.bool)
    parts = (3 * losses.uto_batch(image @ text.T, 6.0, 0.1, positives, floor)
             + losses.uto_queue(image, text_key, text_queue, 6.0, 0.1, own.flip(1), floor)
             + losses.uto_queue(text, image_key, image_queue, 6.0, 0.1, own, floor))
    assert losses.uto(image, text, keys, positives, 6.0, 0.1, 3.0, floor) == parts


def test_gradients_of_uto_on_a_queue_flow_into_the_queries_alone():
    queries, keys, queue = (random_tokens(2, 6, seed=seed).requires_grad_() for seed in range(3))
    losses.uto_queue(queries, keys, queue, gamma=-1.0).backward()
    assert queries.grad.abs().min() > 0 and keys.grad is None and queue.grad is None


def test_uto_gradients():
    image, text = random_tokens(3, 5).requires_grad_(), random_tokens(3, 5, seed=1).requires_grad_()
    key, queue, nothing = random_tokens(3, 5, seed=2), random_tokens(4, 5, seed=3), torch.zeros(3, 4, dtype=torch.bool)
    keys = losses.Keys(key, key, queue, queue, nothing, nothing)
    for floor in (True, False):
        assert torch.autograd.gradcheck(lambda image, text, floor=floor: losses.uto(
            image, text, keys, mu=6.0, gamma=0.1, reward_floor=floor), (image, text))


# ------------------------------------------------------------------------------------------------------- InfoNCE


def test_info_nce_by_hand():
    """Rows: log(1 + e^-2) and log(1 + e^-1); columns: log(1 + e^-3) and log(1 + e^0)."""
    similarity = 0.5 * torch.tensor([[3.0, 1.0], [0.0, 1.0]], dtype=torch.double)
    e = math.exp
    want = sum(math.log(1 + x) for x in (e(-2), e(-1), e(-3), 1)) / 2
    assert losses.info_nce(similarity, temperature=0.5).item() == pytest.approx(want, rel=1e-12)


def test_info_nce_leaves_out_the_other_true_pairs():
    """With captions 0 and 2 of one image, s(0, 2) and s(2, 0) take no part, and the diagonal stays the answer."""
    similarity = torch.randn(3, 3, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    positives = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 0, 1]], dtype=torch.bool)
    moved = similarity.clone()
    moved[0, 2], moved[2, 0] = 5.0, -3.0
    masked = losses.info_nce(similarity, positives=positives)
    assert masked == losses.info_nce(moved, positives=positives) and masked < losses.info_nce(similarity)
    assert torch.autograd.gradcheck(lambda s: losses.info_nce(s, 0.5, positives), similarity.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_info_nce_of_half_precision_is_computed_in_float32(dtype):
    similarity = torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    positives = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 0, 1]], dtype=torch.bool)
    found = losses.info_nce(similarity, 1e-5, positives, teacher=similarity.T, distill=0.5)  # 100,000 is beyond float16
    want = losses.info_nce(similarity.double(), 1e-5, positives, teacher=similarity.T.double(), distill=0.5)
    assert torch.isclose(found.double(), want, rtol=1e-5)


def test_info_nce_with_a_teacher_by_hand():
    """The teacher is sure of nothing: each answer is 1/2 truth and 1/2 a coin, so 3/4 and 1/4."""
    similarity = torch.tensor([[3.0, 1.0], [0.0, 1.0]], dtype=torch.double)
    want = losses.info_nce(similarity, 1.0) + 0.25 * (2 + 1 + 3 + 0) / 2  # a quarter of what the truth is ahead
    assert torch.isclose(losses.info_nce(similarity, 1.0, teacher=torch.zeros(2, 2), distill=0.5), want, rtol=1e-12)
    assert losses.info_nce(similarity, 1.0, teacher=torch.zeros(2, 2), distill=0.0) == losses.info_nce(similarity, 1.0)


def test_a_teacher_gets_no_gradient():
    similarity, teacher = (random_tokens(3, 3, seed=seed).requires_grad_() for seed in (0, 1))
    losses.info_nce(similarity, 0.5, teacher=teacher, distill=0.5).backward()
    assert similarity.grad.abs().min() > 0 and teacher.grad is None


def test_a_model_that_agrees_with_its_teacher_learns_nothing_from_it():
    """With distill = 1 the gradient is 0 where the two agree, and other true pairs take no part in the teacher."""
    rng = torch.Generator().manual_seed(3)
    similarity = torch.randn(3, 3, dtype=torch.double, generator=rng).requires_grad_()
    positives = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 0, 1]], dtype=torch.bool)
    teacher = similarity.detach().clone()
    teacher[0, 2] = teacher[2, 0] = 9.0
    gradient, = torch.autograd.grad(losses.info_nce(similarity, 0.5, positives, teacher, 1.0), similarity)
    assert gradient.abs().max() < 1e-12
    other = torch.randn(3, 3, dtype=torch.double, generator=rng)
    assert torch.autograd.gradcheck(lambda s: losses.info_nce(s, 0.5, positives, other, 0.3), similarity)


# ---------------------------------------------------------------------------------------------- one loss per model


def encoded(rows: int, length: int, seed: int) -> tgdt.Encoded:
    mask = torch.arange(length) < torch.randint(1, length + 1, (rows, 1), generator=torch.Generator().manual_seed(seed))
    return tgdt.Encoded(random_tokens(rows, 6, seed=seed), random_tokens(rows, length, 6, seed=seed + 1), mask)


def test_the_loss_of_each_model_knows_which_captions_share_an_image():
    """Three captions, two images: each loss equals its parts on matrices with one row per caption."""
    images, texts, row = encoded(2, 4, seed=0), encoded(3, 5, seed=7), torch.tensor([1, 0, 1])
    positives = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 0, 1]], dtype=torch.bool)
    local, total = (losses.local_similarity(images.tokens, images.mask, texts.tokens, texts.mask, reduction)[row]
                    for reduction in ("mean", "sum"))
    coarse = images.globals[row]
    tgdt_loss = losses.cmc(coarse, texts.globals, total, positives, 0.4, 0.05, 3.0, "mean")
    given = {"margin": 0.4, "intra_margin": 0.05, "local_weight": 3.0, "reduction": "sum"}
    assert losses.tgdt_loss(images, texts, row, **given, negatives="mean") == tgdt_loss

    key, queue, nothing = random_tokens(3, 6, seed=9), random_tokens(4, 6, seed=10), torch.zeros(3, 4, dtype=torch.bool)
    keys = losses.Keys(key, key, queue, queue, nothing, nothing)
    user_loss = losses.uto(coarse, texts.globals, keys, positives, mu=8.0)
    assert losses.user_loss(images, texts, row, keys, mu=8.0) == user_loss
    alone = losses.user_loss(images, texts, row, batch_weight=3.0)
    assert alone == 3 * losses.uto_batch(coarse @ texts.globals.T, positives=positives)

    coarse_nce, fine_nce, total_nce = (losses.info_nce(level, 0.1, positives)
                                       for level in (coarse @ texts.globals.T, local, total))
    nce = {"infonce_weight": 2.0, "temperature": 0.1}
    assert torch.isclose(losses.tgdt_loss(images, texts, row, **given, negatives="mean", **nce),
                         tgdt_loss + 2 * 3 * (coarse_nce + total_nce), rtol=1e-12)
    coarse_alone = [side._replace(tokens=None) for side in (images, texts)]  # what USER encodes
    assert torch.isclose(losses.user_loss(*coarse_alone, row, keys, mu=8.0, **nce), user_loss + 2 * coarse_nce,
                         rtol=1e-12)
    images, texts = images._replace(plain=images.tokens.flip(2)), texts._replace(plain=texts.tokens)
    plain = losses.local_similarity(images.plain, images.mask, texts.plain, texts.mask, "mean")[row]
    want = user_loss + 2 * (coarse_nce + fine_nce + losses.info_nce(plain, 0.1, positives))
    assert torch.isclose(losses.unified_loss(images, texts, row, keys, mu=8.0, **nce), want, rtol=1e-12)

    teacher = [side._replace(globals=side.globals.flip(1), tokens=side.plain, plain=side.tokens)
               for side in (images, texts)]
    taught_by = (teacher[0].globals[row] @ teacher[1].globals.T, local, plain)  # the levels: globals, plain, fine
    want = user_loss + 2 * sum(losses.info_nce(level, 0.1, positives, by, 0.3) for level, by in zip(
        (coarse @ texts.globals.T, plain, local), taught_by, strict=True))
    found = losses.unified_loss(images, texts, row, keys, mu=8.0, **nce, distill=0.3, teacher=teacher)
    assert torch.isclose(found, want, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_words_of_half_precision_are_summed_in_float32(dtype):
    regions, words = random_tokens(2, 3, 8).to(dtype), random_tokens(2, 40, 8, seed=1).to(dtype)
    masks = [torch.ones(tokens.shape[:2], dtype=torch.bool) for tokens in (regions, words)]
    found = losses.local_similarity(regions, masks[0], words, masks[1])
    best = torch.stack([(r @ w.T).amax(0) for r in regions for w in words]).float().sum(1).view(2, 2)
    assert found.dtype == torch.float32 and torch.allclose(found, best, atol=1e-5)


def test_the_reduction_is_that_of_the_model_and_of_its_teacher():
    images, texts, row = encoded(2, 4, seed=0), encoded(3, 5, seed=7), torch.tensor([1, 0, 1])
    teacher, positives = images._replace(tokens=images.tokens.flip(2)), row[:, None] == row
    coarse = images.globals[row] @ texts.globals.T
    ours, taught = (losses.local_similarity(of.tokens, of.mask, texts.tokens, texts.mask, "sum")[row]
                    for of in (images, teacher))
    want = (losses.user_loss(images, texts, row) + losses.info_nce(coarse, 0.1, positives, coarse, 0.3)
            + losses.info_nce(ours, 0.1, positives, taught, 0.3))
    found = losses.unified_loss(images, texts, row, temperature=0.1, reduction="sum", distill=0.3,
                                teacher=(teacher, texts))
    assert torch.isclose(found, want, rtol=1e-12)
