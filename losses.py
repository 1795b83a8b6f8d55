"""The losses: TGDT's consistent multimodal contrastive training (CMC) and what it is made of.

Read beside Liu et al., "Efficient Token-Guided Image-Text Retrieval With Consistent Multimodal Contrastive
Training" (TGDT), the part on CMC. Everything here is a function of tensors: it knows no model and no data.

A batch holds B true pairs: image i belongs to caption i, so the true pairs stand on the diagonal of a [B, B]
similarity matrix. Two captions of one image may meet in a batch; the pairs (i, j) that they form off the diagonal
are true as well, and calling them negatives would push an image away from its own caption. `positives` [B, B]
marks all true pairs, so that no loss uses one as a negative.
"""
from __future__ import annotations

import torch
from torch import Tensor


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
    best = dots.masked_fill(~region_mask[:, :, None], float("-inf")).amax(1)                          # [I, n]
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
