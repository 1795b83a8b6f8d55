"""The hidden tests of the tasks "Write it yourself". They print what is wrong, and return True if nothing is.

Read them when you are done: they give the answer away.
"""
from collections.abc import Callable, Iterable

import numpy as np
import torch

import losses
import retrieve
import user


def try_out(function: Callable, cases: Iterable[tuple[str, tuple, object]], atol: float = 1e-5) -> bool:
    """Call a function with the arguments of each case, (about what, arguments, expected), up to the first error."""
    count = 0
    for about, arguments, expected in cases:
        got = function(*arguments)
        if got is None or got is ...:
            print("Not written yet: the function returns nothing.")
            return False
        got = got.copy() if isinstance(got, np.ndarray) else got  # PyTorch refuses the view that [::-1] gives
        got, expected = (torch.as_tensor(value, dtype=torch.float64) for value in (got, expected))
        if got.shape != expected.shape or not torch.allclose(got, expected, atol=atol):
            print(f"Not yet. {about}: expected {expected.round(decimals=4).tolist()}, "
                  f"got {got.round(decimals=4).tolist()}")
            return False
        count += 1
    print(f"All {count} cases are right.")
    return True


def rank(function: Callable) -> bool:
    """rank(scores [N], right [N] bool) -> the rank of the best right answer, wrong ones first among equals."""
    def case(about: str, scores: list[float], right: list[int]):
        scores, right = torch.tensor(scores), torch.tensor(right, dtype=torch.bool)
        owner = torch.where(right, 0, 1)  # 0: of the image that asks
        return about, (scores, right), retrieve.ranks(scores[None], torch.zeros(1), owner)[0]

    cases = [case("no ties", [0.2, 0.9, 0.7], [1, 0, 0]),
             case("several right answers", [0.2, 0.9, 0.7, 0.1], [1, 0, 1, 1]),
             case("a tie", [0.5, 0.5, 0.1], [0, 1, 0]),
             case("everything is equal", [0.5] * 6, [0, 0, 1, 0, 0, 1]),
             case("a tie among right answers", [0.5, 0.5, 0.4], [1, 1, 0]),
             case("nothing is similar", [-5.0, -2.0, -3.0], [1, 0, 0])]
    draw = torch.Generator().manual_seed(0)
    for _ in range(50):
        scores = torch.randint(-2, 2, (8,), generator=draw) / 4
        right = torch.rand(8, generator=draw) < 0.3
        right[0] = True
        cases.append(case("a random list with many ties", scores.tolist(), right.tolist()))
    return try_out(function, cases)


def masked_hinge(function: Callable) -> bool:
    """masked_hinge(similarity [B, B], positives [B, B] bool, margin) -> scalar, as `losses.hinge` gives it."""
    draw = torch.Generator().manual_seed(0)
    cases = []
    for each in (1, 1, 2, 3):  # captions of one image in the batch
        owner = torch.arange(6) // each
        positives = owner[:, None] == owner
        for margin in (0.2, 0.5):
            similarity = 2 * torch.rand(6, 6, generator=draw) - 1
            about = "no false negatives" if each == 1 else f"{each} captions an image"
            cases.append((about, (similarity, positives, margin), losses.hinge(similarity, margin, positives)))
    nothing = torch.eye(6)
    cases.append(("all is as it should be", (nothing, nothing.bool(), 0.2), 0.0))
    return try_out(function, cases)


def two_stage(function: Callable) -> bool:
    """two_stage(coarse [N], fine, k, weight) -> k rows, best first. fine(rows) may be called for these k rows alone."""
    draw = torch.Generator().manual_seed(0)
    cases = []
    for k, weight in ((1, 10.0), (5, 10.0), (5, 0.0), (20, 10.0), (20, 100.0)):
        coarse, local = (2 * torch.rand(20, generator=draw) - 1 for _ in range(2))
        shortlist = sorted(range(20), key=lambda row, coarse=coarse: -float(coarse[row]))[:k]
        mixed = coarse + weight * local
        expected = sorted(shortlist, key=lambda row, mixed=mixed: -float(mixed[row]))

        def fine(rows, local=local, shortlist=shortlist):
            rows = torch.as_tensor(np.array(rows))  # a list, a tensor or an array, also a reversed one
            if others := set(rows.flatten().tolist()) - set(shortlist):
                raise ValueError(f"fine was asked for rows that are not on the shortlist: {sorted(others)}")
            return local[rows]

        cases.append((f"k = {k}, weight {weight:g}", (coarse, fine, k, weight), expected))
    return try_out(function, cases)


def late_interaction(function: Callable) -> bool:
    """late_interaction(regions [R, D], real_regions [R] bool, words [W, D], real_words [W] bool) -> scalar, a sum."""
    draw = torch.Generator().manual_seed(0)

    def case(about: str, regions: torch.Tensor, words: torch.Tensor, real_regions: int, real_words: int):
        regions, words = (torch.nn.functional.normalize(tokens, dim=1) for tokens in (regions, words))
        masks = torch.arange(len(regions)) < real_regions, torch.arange(len(words)) < real_words
        expected = losses.local_similarity(regions[None], masks[0][None], words[None], masks[1][None])[0, 0]
        return about, (regions, masks[0], words, masks[1]), expected

    cases = []
    for about, regions, words in (("no padding", 6, 4), ("padded words", 6, 2), ("padded regions", 3, 4)):
        cases.append(case(about, torch.randn(6, 5, generator=draw), torch.randn(4, 5, generator=draw), regions, words))
    away = torch.rand(6, 5, generator=draw)
    cases.append(case("every word dislikes every region", away, -away[:4], 3, 3))
    zeros = torch.cat([away[:3], torch.zeros(3, 5)])
    cases.append(case("the same, and the padding is zeros", zeros, -away[:4], 3, 3))
    return try_out(function, cases)


def gpo(function: Callable) -> bool:
    """gpo(tokens [T, D], real [T] bool, weights [T]) -> [D], as `user.GeneralizedPooling` pools."""
    draw, cases = torch.Generator().manual_seed(0), []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pool = user.GeneralizedPooling()
    for about, real, shift in (("no padding", [1, 1, 1, 1, 1, 1], 0), ("padding", [1, 1, 1, 1, 0, 0], 0),
                               ("padding, and all values are negative", [1, 1, 1, 1, 0, 0], -9),
                               ("padding in between", [1, 0, 1, 1, 0, 1], -9),
                               ("a single token", [1, 0, 0, 0, 0, 0], 0)):
        real = torch.tensor(real).bool()
        tokens = (torch.randn(6, 3, generator=draw) + shift) * real[:, None]
        with torch.no_grad():
            weights = pool.pooling_weights(real.sum()[None], 6)[0]
            cases.append((about, (tokens, real, weights), pool(tokens[None], real[None])[0]))
    return try_out(function, cases)


def leaks(function: Callable) -> bool:
    """leaks(train [N, F], test [M, F], threshold) -> [M] bool, True where some cosine is above the threshold."""
    draw, cases = torch.Generator().manual_seed(0), []
    for about, shift, lengths in (("plain vectors", 0.0, 1.0), ("vectors of many lengths", 0.0, 20.0),
                                  ("features without a sign", 2.0, 1.0)):
        train, test = torch.randn(6, 9, generator=draw) + shift, torch.randn(5, 9, generator=draw) + shift
        test[1:3] = train[[4, 0]] + 0.1 * torch.randn(2, 9, generator=draw)  # near-duplicates
        test = test * (1 + lengths * torch.rand(5, 1, generator=draw))
        cosine = torch.nn.functional.normalize(test, dim=1) @ torch.nn.functional.normalize(train, dim=1).T
        cases += [(f"{about}, threshold {threshold}", (train, test, threshold), (cosine > threshold).any(1))
                  for threshold in (0.5, 0.95)]
    return try_out(function, cases)


def paired_interval(function: Callable) -> bool:
    """paired_interval(a, b, t) -> (low, high): Student's interval of the mean of a - b, seed by seed."""
    draw, cases = torch.Generator().manual_seed(0), []
    for about, noise in (("seeds that move both alike", 0.5), ("seeds that move each on its own", 5.0)):
        for count, t in ((2, 12.71), (3, 4.30), (5, 2.78)):
            seeds = 250 + 10 * torch.randn(count, generator=draw, dtype=torch.float64)
            a, b = (seeds + noise * torch.randn(count, generator=draw, dtype=torch.float64) for _ in range(2))
            gains = a - b
            reach = t * gains.std() / count**0.5
            cases.append((f"{count} seeds, {about}", (a.tolist(), b.tolist(), t),
                          [gains.mean() - reach, gains.mean() + reach]))
    return try_out(function, cases, atol=1e-3)  # float32 will do: the values are near 250
