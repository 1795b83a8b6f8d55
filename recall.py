"""Metrics, as pure functions of scores and of who belongs to whom.

Recall at 1, 5 and 10, median and mean rank, in both directions (experiments of both papers), and how often a word
looks at what it names. Nothing here assumes five captions an image: two vectors say which image a row belongs to.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def ranks(scores: Tensor, query_image: Tensor, corpus_image: Tensor) -> Tensor:
    """The rank of the best right answer of each query, 1 is first; [Q] long.

    scores [Q, N]; query_image [Q] and corpus_image [N] tell which image a row belongs to, and an answer is right
    when they agree. Among equal scores the truth ranks last, so that a constant similarity scores nothing; a NaN
    counts as a lost comparison.
    """
    right = query_image[:, None] == corpus_image[None, :]
    truth = scores.masked_fill(~right, float("-inf")).amax(1, keepdim=True)
    return (~(scores < truth) & ~right).sum(1) + 1


def shortlist_ranks(indices: Tensor, scores: Tensor, query_image: Tensor, corpus_image: Tensor,
                    stage1: Tensor) -> Tensor:
    """Ranks after two stages: [Q] long, from `search`'s indices and scores [Q, K].

    A query whose answer is not on its shortlist has missed it: it keeps its rank in stage 1 (`stage1` [Q] from
    `ranks`), which is beyond K. (The released evaluator gives such a query rank 1.)
    """
    found = corpus_image[indices]
    hit = (found == query_image[:, None]).any(1)
    right = found == query_image[:, None]
    truth = scores.masked_fill(~right, float("-inf")).amax(1, keepdim=True)
    within = (~(scores < truth) & ~right).sum(1) + 1
    return torch.where(hit, within, stage1.clamp(min=indices.shape[1] + 1))


def metrics(i2t: Tensor, t2i: Tensor) -> dict:
    """Ranks of all image queries and of all caption queries -> R@1/5/10 in percent, median and mean rank, rsum."""
    out = {}
    for name, rank in (("i2t", i2t), ("t2i", t2i)):
        rank = rank.double()
        recalls = {f"r{k}": 100 * (rank <= k).double().mean().item() for k in (1, 5, 10)}
        out[name] = {**recalls, "median_rank": rank.quantile(0.5).item(), "mean_rank": rank.mean().item()}
    out["rsum"] = sum(out[name][r] for name in ("i2t", "t2i") for r in ("r1", "r5", "r10"))
    return out


def recall(similarity: Tensor, image_of: Tensor) -> dict:
    """The metrics of a whole similarity matrix [images, captions]; image_of [captions] is each caption's image."""
    rows = torch.arange(len(similarity), device=similarity.device)
    image_of = torch.as_tensor(image_of, device=similarity.device)
    return metrics(ranks(similarity, rows, image_of), ranks(similarity.T, image_of, rows))


def alignment(word_tokens: Tensor, region_tokens: Tensor, image_of: Sequence[int], boxes: Sequence,
              object_boxes: Sequence, word_objects: Sequence[list[tuple[int, int]]]) -> dict:
    """Does a word look at what it names? For data that tells which words name which objects, as scenes do.

    word_tokens [M, W, D], one a word; region_tokens [N, R, D]; image_of [M]; boxes [N, R, 4]; object_boxes: [O, 4] an
    image; word_objects: (word, object of its image) pairs a caption. A word is aligned when its most similar region
    lies on its object (see `overlaps`). Returns the percentage, and chance: that of a random region.
    """
    hits, chance = [], []
    for caption, named in enumerate(word_objects):
        image = int(image_of[caption])
        best = (word_tokens[caption] @ region_tokens[image].T).argmax(1).cpu()                    # [W]
        on = overlaps(torch.as_tensor(boxes[image]), torch.as_tensor(object_boxes[image]))        # [R, O] bool
        for word, thing in named:
            hits.append(on[best[word], thing])
            chance.append(on[:, thing].float().mean())
    return {"aligned": 100 * torch.stack(hits).float().mean().item(),
            "chance": 100 * torch.stack(chance).mean().item(), "words": len(hits)}


def overlaps(boxes: Tensor, objects: Tensor) -> Tensor:
    """Which of boxes [R, 4] lie on which of objects [O, 4]: IoU at least 0.3 or centre inside; [R, O] bool."""
    low = torch.maximum(boxes[:, None, :2], objects[None, :, :2])
    high = torch.minimum(boxes[:, None, 2:], objects[None, :, 2:])
    shared = (high - low).clamp(min=0).prod(2)
    area = [(b[:, 2:] - b[:, :2]).prod(1) for b in (boxes, objects)]
    centre = (boxes[:, None, :2] + boxes[:, None, 2:]) / 2
    inside = ((centre >= objects[None, :, :2]) & (centre <= objects[None, :, 2:])).all(2)
    return inside | (shared / (area[0][:, None] + area[1][None] - shared) >= 0.3)
