"""The losses: TGDT's consistent multimodal contrastive training (CMC) and USER's unified training objective (UTO).

Read beside Liu et al., "Efficient Token-Guided Image-Text Retrieval With Consistent Multimodal Contrastive
Training" (TGDT), the part on CMC, and Zhang et al., "USER: Unified Semantic Enhancement With Momentum Contrast for
Image-Text Retrieval" (USER), the part on UTO. Everything here is a function of tensors: it knows no model and no data.

A batch holds B true pairs: image i belongs to caption i, so the true pairs stand on the diagonal of a [B, B]
similarity matrix. Two captions of one image may meet in a batch; the pairs (i, j) that they form off the diagonal
are true as well, and calling them negatives would push an image away from its own caption. `positives` [B, B]
marks all true pairs, so that no loss uses one as a negative.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# ------------------------------------------------------------------------------------------------- TGDT: CMC


def hinge(
    similarity: Tensor, margin: float = 0.2, positives: Tensor | None = None, negatives: str = "hardest"
) -> Tensor:
    """Hinge loss on the negatives of every row and every column, both directions summed (VSE++; TGDT, CMC).

    For row i:  max over the negatives j of  [margin + s(i, j) - s(i, i)]+ ,  and the same for the columns.

    similarity: [B, B], images by captions, true pairs on the diagonal.
    positives:  [B, B] bool, all true pairs; None means the diagonal alone. They are never negatives.
    negatives:  "hardest" takes the worst negative of a row, as the papers do; "mean" takes their mean, which is
                gentler while the embedding is still random.
    Returns a scalar. Raises ValueError for another word or a matrix that is not square.
    """
    if similarity.ndim != 2 or similarity.shape[0] != similarity.shape[1]:
        raise ValueError(f"hinge needs a square similarity matrix, got {tuple(similarity.shape)}")
    truth = similarity.diagonal()
    ignored = torch.eye(len(truth), dtype=torch.bool, device=similarity.device)
    if positives is not None:
        ignored = ignored | positives
    rows = (margin + similarity - truth[:, None]).clamp(min=0).masked_fill(ignored, 0)
    columns = (margin + similarity - truth[None, :]).clamp(min=0).masked_fill(ignored, 0)
    if negatives == "hardest":
        return rows.amax(1).sum() + columns.amax(0).sum()
    if negatives == "mean":
        count = (~ignored).sum(1).clamp(min=1), (~ignored).sum(0).clamp(min=1)
        return (rows.sum(1) / count[0]).sum() + (columns.sum(0) / count[1]).sum()
    raise ValueError(f'negatives is "hardest" or "mean", not {negatives!r}')


def local_similarity(
    region_tokens: Tensor, region_mask: Tensor, word_tokens: Tensor, word_mask: Tensor, words: str = "sum"
) -> Tensor:
    """Late interaction: each word takes its most similar region; a caption sums its words (TGDT, local similarity).

    region_tokens: [I, R, D] unit length, region_mask: [I, R] bool, at least one real region an image.
    word_tokens:   [C, W, D] unit length, word_mask:   [C, W] bool.
    words:         "sum" over the caption's words, the paper's form; "mean" does not favour long captions.
    Returns [I, C]. A padded region can never win the maximum (it is -inf there, not 0, which would beat every
    negative similarity); padded words are not computed at all, so padding cannot change a result.
    """
    images, regions = region_mask.shape
    packed = word_tokens[word_mask]                                       # [n, D]: the real words of all captions
    owner = word_mask.nonzero()[:, 0]                                     # [n]: the caption that each belongs to
    dots = (region_tokens.flatten(0, 1) @ packed.T).view(images, regions, -1)
    if not region_mask.all():
        dots = dots.masked_fill(~region_mask[:, :, None], float("-inf"))
    best = dots.max(1).values                                             # [I, n]; its gradient is cheaper than amax's
    best = best.to(torch.promote_types(best.dtype, torch.float32))  # sums in half precision would lose digits
    total = best.new_zeros(images, len(word_mask)).index_add(1, owner, best)
    if words == "sum":
        return total
    if words == "mean":
        return total / word_mask.sum(1).clamp(min=1)
    raise ValueError(f'words is "sum" or "mean", not {words!r}')


def intra_consistency(image_global: Tensor, text_global: Tensor, margin: float = 0.3) -> Tensor:
    """Two pictures should be as similar as their captions are (TGDT, the intra-modal part of CMC).

    Sum over i of [ max over j of |t(i, j) - v(i, j)| - margin ]+ , where v and t are the image-image and the
    text-text similarities. image_global, text_global: [B, D] unit length. Returns a scalar.
    """
    images, texts = image_global @ image_global.T, text_global @ text_global.T
    return ((texts - images).abs().amax(0) - margin).clamp(min=0).sum()


def cmc(
    image_global: Tensor,
    text_global: Tensor,
    local: Tensor | None = None,
    positives: Tensor | None = None,
    margin: float = 0.2,
    intra_margin: float = 0.3,
    local_weight: float = 10.0,
    negatives: str = "hardest",
) -> Tensor:
    """Consistent multimodal contrastive loss: inter-modal on both levels, plus intra-modal (TGDT, CMC).

    image_global, text_global: [B, D] unit length.  local: [B, B] from `local_similarity`, or None without it.
    The local similarity is weighted before the hinge, as it is weighted when it re-ranks. Returns a scalar.
    """
    loss = hinge(image_global @ text_global.T, margin, positives, negatives)
    if local is not None:
        loss = loss + hinge(local_weight * local, margin, positives, negatives)
    return loss + intra_consistency(image_global, text_global, intra_margin)


# ------------------------------------------------------------------------------------------------- USER: UTO


def soft_hinge(similarity: Tensor, ignored: Tensor | None, mu: float, gamma: float) -> Tensor:
    """(1 / mu) log(1 + sum over j of e^{mu (s(i, j) - gamma)}) for each row i; [B, K] -> [B] (USER, UTO).

    A smooth max over the negatives of how far each rises above gamma. The exponential of 45 and more does not fit into
    half precision: it is never taken, and whatever comes in is computed in float32 at least.
    """
    rises = mu * (similarity.to(torch.promote_types(similarity.dtype, torch.float32)) - gamma)
    if ignored is not None:
        rises = rises.masked_fill(ignored, float("-inf"))
    return F.pad(rises, (1, 0)).logsumexp(1) / mu


def reward(truth: Tensor, floor: bool = True) -> Tensor:
    """log(1 + [s]+) of the true pairs' similarities, [B] -> [B] (USER, UTO).

    The paper's form gives a pair below zero no gradient. Where all pairs start there, which is a matter of the seed,
    nothing ever moves: without the floor the reward goes on below zero as s, with the slope that it has at zero.
    """
    truth = truth.to(torch.promote_types(truth.dtype, torch.float32))
    above = truth.clamp(min=0).log1p()
    return above if floor else above + truth.clamp(max=0)


def uto_batch(
    similarity: Tensor, mu: float = 90.0, gamma: float = 0.5, positives: Tensor | None = None, floor: bool = True
) -> Tensor:
    """Unified training objective on a batch: the mean over its pairs (USER, UTO).

    similarity: [B, B], images by captions, true pairs on the diagonal. positives: [B, B] bool, all true pairs, no
    negatives; None means the diagonal alone. floor: see `reward`. Returns a scalar.
    """
    ignored = torch.eye(len(similarity), dtype=torch.bool, device=similarity.device)
    if positives is not None:
        ignored = ignored | positives
    rows, columns = soft_hinge(similarity, ignored, mu, gamma), soft_hinge(similarity.T, ignored.T, mu, gamma)
    return (rows + columns - reward(similarity.diagonal(), floor)).mean()


def uto_queue(
    queries: Tensor, keys: Tensor, queue: Tensor, mu: float = 90.0, gamma: float = 0.5,
    false_negatives: Tensor | None = None, floor: bool = True,
) -> Tensor:
    """Unified training objective on a queue, one direction: the mean over the queries (USER, UTO and momentum).

    queries: [B, D] of one modality; keys: [B, D], what the momentum encoder makes of their true counterparts; queue:
    [K, D], earlier keys, the negatives; all of unit length. false_negatives: [B, K] bool, keys that are none after all.
    floor: see `reward`. Returns a scalar. Gradients flow to the queries only.
    """
    negatives = soft_hinge(queries @ queue.detach().to(queries.dtype).T, false_negatives, mu, gamma)
    return (negatives - reward((queries * keys.detach()).sum(1), floor)).mean()


def uto(
    image_global: Tensor, text_global: Tensor, image_keys: Tensor, text_keys: Tensor, image_queue: Tensor,
    text_queue: Tensor, mu: float = 90.0, gamma: float = 0.5, batch_weight: float = 20.0,
    positives: Tensor | None = None, no_image: Tensor | None = None, no_text: Tensor | None = None, floor: bool = True,
) -> Tensor:
    """The whole objective of USER: batch_weight * UTO on the batch + UTO on both queues (USER, UTO and momentum).

    image_global, text_global: [B, D]; image_keys, text_keys: [B, D], the same pairs by the momentum encoders;
    image_queue, text_queue: [K, D]; no_image, no_text: [B, K] bool, their keys that are no negatives of a caption, of
    an image. An image queries the text queue, a caption the image queue. Returns a scalar, a mean over the pairs.
    """
    return (batch_weight * uto_batch(image_global @ text_global.T, mu, gamma, positives, floor)
            + uto_queue(image_global, text_keys, text_queue, mu, gamma, no_text, floor)
            + uto_queue(text_global, image_keys, image_queue, mu, gamma, no_image, floor))
