"""The losses: TGDT's consistent multimodal contrastive loss (CMC), InfoNCE, USER's unified objective (UTO).

Read beside Liu et al., "Efficient Token-Guided Image-Text Retrieval With Consistent Multimodal Contrastive
Training" (TGDT), the part on CMC, and Zhang et al., "USER: Unified Semantic Enhancement With Momentum Contrast for
Image-Text Retrieval" (USER), the part on UTO. The symbols of both papers are listed in docs/symbols.md.

Everything here is a function of tensors. A batch holds B captions, and row i of a [B, B] similarity matrix is the
image of caption i, so the true pairs are on the diagonal. If two captions of one image meet in a batch, there are
true pairs off the diagonal, too. `positives` marks all true pairs, and no loss uses one of them as a negative.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def at_least_float32(values: Tensor) -> Tensor:
    """Half precision becomes float32, because the sums of a loss would lose digits in it; float64 stays."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def with_diagonal(similarity: Tensor, positives: Tensor | None) -> Tensor:
    """[B, B] bool: the pairs marked as true, and the diagonal. Raises ValueError if the matrix is not square."""
    if similarity.ndim != 2 or similarity.shape[0] != similarity.shape[1]:
        raise ValueError(f"expected a square similarity matrix, got {tuple(similarity.shape)}")
    diagonal = torch.eye(len(similarity), dtype=torch.bool, device=similarity.device)
    return diagonal if positives is None else diagonal | positives


# ------------------------------------------------------------------------------------------------- TGDT: CMC


def hinge(similarity: Tensor, margin: float = 0.2, positives: Tensor | None = None,
          negatives: str = "hardest") -> Tensor:
    """Hinge loss with negatives from the batch, both directions summed (VSE++; TGDT, CMC).

    For row i:  max over the negatives j of  [margin + s(i, j) - s(i, i)]+ ,  and the same for the columns.

    similarity: [B, B], images by captions, true pairs on the diagonal.
    positives:  [B, B] bool, all true pairs; None means the diagonal alone. They are never negatives.
    negatives:  "hardest" takes the hardest negative of a row, as TGDT does. "mean" takes the mean over the negatives,
                which is gentler while the embeddings are still random.
    Returns a scalar. Raises ValueError if the matrix is not square or `negatives` is another word.
    """
    similarity, positives = at_least_float32(similarity), with_diagonal(similarity, positives)
    truth = similarity.diagonal()
    # A true pair gets 0, the least that a hinge can be, so it is never the worst. rows, columns: [B, B]
    rows = (margin + similarity - truth[:, None]).clamp(min=0).masked_fill(positives, 0)
    columns = (margin + similarity - truth[None, :]).clamp(min=0).masked_fill(positives, 0)
    if negatives == "hardest":
        return rows.amax(1).sum() + columns.amax(0).sum()
    if negatives == "mean":
        in_row, in_column = (~positives).sum(1).clamp(min=1), (~positives).sum(0).clamp(min=1)
        return (rows.sum(1) / in_row).sum() + (columns.sum(0) / in_column).sum()
    raise ValueError(f'negatives is "hardest" or "mean", not {negatives!r}')


def local_similarity(region_tokens: Tensor, region_mask: Tensor, word_tokens: Tensor, word_mask: Tensor,
                     reduction: str = "sum") -> Tensor:
    """Late interaction: each word takes its most similar region (TGDT, local similarity).

    region_tokens: [I, R, D] unit length, region_mask: [I, R] bool, at least one real region per image.
    word_tokens:   [C, W, D] unit length, word_mask:   [C, W] bool.
    reduction:     "sum" over the caption's words is the paper's form. "mean" does not favour long captions.
    Returns [I, C]. Raises ValueError if `reduction` is another word. Padding never changes the result: padded words
    are left out, and a padded region has similarity -inf, so that it cannot win the maximum. (With 0 in its place,
    as in the released code, it would beat every negative similarity.)
    """
    words = word_tokens[word_mask]                                   # [n, D], the real words of all captions
    caption = word_mask.nonzero()[:, 0]                              # [n], the caption that each word belongs to
    dots = (region_tokens.flatten(0, 1) @ words.T).view(*region_mask.shape, len(words))         # [I, R, n]
    dots = dots.masked_fill(~region_mask[:, :, None], float("-inf"))
    best = at_least_float32(dots.max(1).values)                      # [I, n]; max has a cheaper gradient than amax
    total = best.new_zeros(len(best), len(word_mask)).index_add(1, caption, best)               # [I, C]
    return over_words(total, word_mask.sum(1), reduction)


def over_words(total: Tensor, count: Tensor, reduction: str) -> Tensor:
    """total [..., C], sums over each caption's words: as they are ("sum"), or divided by the count [C] ("mean").

    Raises ValueError for another reduction.
    """
    if reduction not in ("sum", "mean"):
        raise ValueError(f'reduction is "sum" or "mean", not {reduction!r}')
    return total if reduction == "sum" else total / count.clamp(min=1)


def intra_consistency(image_global: Tensor, text_global: Tensor, margin: float = 0.3) -> Tensor:
    """Two images should be as similar as their captions are (TGDT, the intra-modal part of CMC).

    Sum over i of [ max over j of |t(i, j) - v(i, j)| - margin ]+ , where v are the similarities of image with image
    and t those of caption with caption. image_global, text_global: [B, D] unit length. Returns a scalar.
    """
    images, texts = at_least_float32(image_global @ image_global.T), at_least_float32(text_global @ text_global.T)
    return ((texts - images).abs().amax(0) - margin).clamp(min=0).sum()  # symmetric: rows or columns


def cmc(image_global: Tensor, text_global: Tensor, local: Tensor | None = None, positives: Tensor | None = None,
        margin: float = 0.2, intra_margin: float = 0.3, local_weight: float = 10.0,
        negatives: str = "hardest") -> Tensor:
    """Consistent multimodal contrastive loss: inter-modal on both levels, plus intra-modal (TGDT, CMC).

    image_global, text_global: [B, D] unit length.  local: [B, B] from `local_similarity`, or None for the coarse level
    alone. The local similarity gets its weight before the hinge, the same weight that it has in re-ranking.
    Returns a scalar, a sum over the pairs. Raises ValueError as `hinge` does.
    """
    loss = hinge(image_global @ text_global.T, margin, positives, negatives)
    if local is not None:
        loss = loss + hinge(local_weight * local, margin, positives, negatives)
    return loss + intra_consistency(image_global, text_global, intra_margin)


# ------------------------------------------------------------------------------------------------- InfoNCE


def info_nce(similarity: Tensor, temperature: float = 0.05, positives: Tensor | None = None,
             teacher: Tensor | None = None, distill: float = 0.0) -> Tensor:
    """InfoNCE (CPC; half of it is CLIP's loss): both directions summed, each a mean over the pairs.

    Each row and each column is a question with B answers, and the one on the diagonal is right: the cross-entropy of
    softmax(s / temperature). similarity: [B, B], images by captions. positives: [B, B] bool, all true pairs; those off
    the diagonal are left out, and are neither right nor wrong answers. (An image with two captions in the batch counts
    twice as a wrong answer to other captions.) teacher: [B, B], the same similarities by a better model. Its softmax
    gives the share `distill` of the target, the diagonal the rest (momentum distillation, ALBEF). Returns a scalar.
    Raises ValueError if the matrix is not square.
    """
    diagonal = with_diagonal(similarity, None)
    left_out = with_diagonal(similarity, positives) & ~diagonal
    # Not -inf, which times a target of 0 would be NaN in cross_entropy.
    logits = (at_least_float32(similarity) / temperature).masked_fill(left_out, torch.finfo(torch.float32).min)
    row_target = column_target = diagonal.to(logits.dtype)                                          # [B, B]
    if teacher is not None:
        taught = (at_least_float32(teacher.detach()) / temperature).masked_fill(left_out, float("-inf"))
        row_target = (1 - distill) * row_target + distill * taught.softmax(1)
        column_target = (1 - distill) * column_target + distill * taught.T.softmax(1)
    return F.cross_entropy(logits, row_target) + F.cross_entropy(logits.T, column_target)


# ------------------------------------------------------------------------------------------------- USER: UTO


def soft_hinge(similarity: Tensor, positives: Tensor | None, mu: float, gamma: float) -> Tensor:
    """(1 / mu) log(1 + sum over the negatives j of e^{mu (s(i, j) - gamma)}) for each row i (USER, UTO).

    This is a smooth maximum of how far the negatives rise above gamma, [B, K] -> [B]. logsumexp never overflows.
    """
    rise = mu * (at_least_float32(similarity) - gamma)
    if positives is not None:
        rise = rise.masked_fill(positives, float("-inf"))
    return F.pad(rise, (1, 0)).logsumexp(1) / mu  # the zero in front is the 1 in log(1 + ...)


def reward(truth: Tensor, floor: bool = True) -> Tensor:
    """log(1 + [s]+) of the similarities of true pairs, [B] -> [B] (USER, UTO).

    This form gives a pair below zero no gradient. If all pairs start there, which depends on the seed, nothing ever
    moves. Without the floor the reward goes on below zero as s, with the slope that it has at zero.
    """
    truth = at_least_float32(truth)
    above = truth.clamp(min=0).log1p()
    return above if floor else above + truth.clamp(max=0)


def uto_batch(similarity: Tensor, mu: float = 90.0, gamma: float = 0.5, positives: Tensor | None = None,
              reward_floor: bool = True) -> Tensor:
    """The unified training objective on a batch, a mean over its pairs (USER, UTO).

    similarity: [B, B], images by captions, true pairs on the diagonal. positives: [B, B] bool, all true pairs; None
    means the diagonal alone. reward_floor: see `reward`. Returns a scalar. Raises ValueError if it is not square.
    """
    positives = with_diagonal(similarity, positives)
    rows = soft_hinge(similarity, positives, mu, gamma)
    columns = soft_hinge(similarity.T, positives.T, mu, gamma)
    return (rows + columns - reward(similarity.diagonal(), reward_floor)).mean()


def uto_queue(queries: Tensor, keys: Tensor, queue: Tensor, mu: float = 90.0, gamma: float = 0.5,
              positives: Tensor | None = None, reward_floor: bool = True) -> Tensor:
    """The unified training objective on a queue, one direction, a mean over the queries (USER, UTO and momentum).

    queries: [B, D], embeddings of one modality. keys: [B, D], their true partners by the momentum encoder. queue:
    [K, D], earlier keys, the negatives. All have unit length. positives: [B, K] bool, the keys that must not count
    as negatives of a query. reward_floor: see `reward`. Returns a scalar. Gradients flow into the queries alone.
    """
    negatives = soft_hinge(queries @ queue.detach().to(queries.dtype).T, positives, mu, gamma)
    return (negatives - reward((queries * keys.detach()).sum(1), reward_floor)).mean()


class Keys(NamedTuple):
    """What the momentum encoders add to a batch of B pairs: its keys, and two queues of K earlier ones (USER)."""

    image: Tensor            # [B, D], the image of each caption, by the momentum encoder
    text: Tensor             # [B, D], the captions, by the momentum encoder
    image_queue: Tensor      # [K, D]
    text_queue: Tensor       # [K, D]
    image_positives: Tensor  # [B, K] bool, the keys of image_queue that are not negatives of a caption
    text_positives: Tensor   # [B, K] bool, the keys of text_queue that are not negatives of an image


def uto(image_global: Tensor, text_global: Tensor, keys: Keys | None = None, positives: Tensor | None = None,
        mu: float = 90.0, gamma: float = 0.5, batch_weight: float = 20.0, reward_floor: bool = True) -> Tensor:
    """USER's objective: batch_weight * UTO on the batch + UTO on both queues (USER, UTO and momentum).

    image_global, text_global: [B, D] unit length. An image queries the text queue, a caption the image queue; without
    keys there is the batch alone. Returns a scalar, a mean over the pairs.
    """
    loss = batch_weight * uto_batch(image_global @ text_global.T, mu, gamma, positives, reward_floor)
    if keys is None:
        return loss
    loss = loss + uto_queue(image_global, keys.text, keys.text_queue, mu, gamma, keys.text_positives, reward_floor)
    return loss + uto_queue(text_global, keys.image, keys.image_queue, mu, gamma, keys.image_positives, reward_floor)


# ------------------------------------------------------------------------------------------ one loss per model


def levels(images, texts, image_row: Tensor, reduction: str) -> list[Tensor]:
    """A similarity matrix [B, B] for each level of a model: globals, plain tokens (unified model), fine tokens."""
    found = [images.globals[image_row] @ texts.globals.T]
    for regions, words in ((images.plain, texts.plain), (images.tokens, texts.tokens)):
        if regions is not None:
            found.append(local_similarity(regions, images.mask, words, texts.mask, reduction)[image_row])
    return found


def contrast(images, texts, image_row: Tensor, reduction: str = "mean", infonce_weight: float = 0.0,
             temperature: float = 0.05, distill: float = 0.0, teacher: tuple | None = None) -> Tensor:
    """InfoNCE on each of `levels`, summed. Returns a scalar, a mean over the B pairs.

    images, texts: what the model encoded (`tgdt.Encoded`). image_row: [B] long, the row of `images` that each caption
    belongs to; all captions of an image are its true pairs. teacher: the same images and texts, encoded by the
    momentum copy; for `distill` see `info_nce`.
    """
    if infonce_weight == 0:
        return images.globals.new_zeros(())
    positives = image_row[:, None] == image_row                                                   # [B, B]
    ours = levels(images, texts, image_row, reduction)
    taught = levels(*teacher, image_row, reduction) if teacher else [None] * len(ours)
    return infonce_weight * sum(info_nce(similarity, temperature, positives, by_teacher, distill)
                                for similarity, by_teacher in zip(ours, taught, strict=True))


def tgdt_loss(images, texts, image_row: Tensor, margin: float = 0.2, intra_margin: float = 0.3,
              local_weight: float = 10.0, reduction: str = "sum", negatives: str = "hardest", **infonce) -> Tensor:
    """CMC of a batch of I images and B captions, as `--model tgdt` is trained (TGDT, CMC).

    images, texts, image_row: as in `contrast`. infonce: its other arguments. The paper has no InfoNCE, so its
    weight is 0, except in controls for the unified model. Returns a scalar, a sum over the B pairs.
    """
    positives = image_row[:, None] == image_row                                                   # [B, B]
    local = local_similarity(images.tokens, images.mask, texts.tokens, texts.mask, reduction)[image_row]   # [B, B]
    globals_ = images.globals[image_row], texts.globals
    loss = cmc(*globals_, local, positives, margin, intra_margin, local_weight, negatives)
    # CMC is a sum over the pairs and `contrast` a mean, hence the factor B.
    return loss + len(image_row) * contrast(images, texts, image_row, reduction, **infonce)


def user_loss(images, texts, image_row: Tensor, keys: Keys | None = None, mu: float = 90.0, gamma: float = 0.5,
              batch_weight: float = 20.0, reward_floor: bool = True, **infonce) -> Tensor:
    """UTO of a batch of I images and B captions, as `--model user` is trained (USER, UTO and momentum contrast).

    images, texts, image_row, infonce: as in `tgdt_loss`. Returns a scalar, a mean over the B pairs.
    """
    positives = image_row[:, None] == image_row                                                   # [B, B]
    loss = uto(images.globals[image_row], texts.globals, keys, positives, mu, gamma, batch_weight, reward_floor)
    return loss + contrast(images, texts, image_row, **infonce)


def unified_loss(images, texts, image_row: Tensor, keys: Keys | None = None, infonce_weight: float = 1.0,
                 **options) -> Tensor:
    """USER's loss, and InfoNCE on the globals, the plain tokens and the fine tokens. Neither paper has this model.

    options: the others of `user_loss`. Returns a scalar, a mean over the B pairs.
    """
    return user_loss(images, texts, image_row, keys, infonce_weight=infonce_weight, **options)
