"""Stage 2 for speed: the same scores as `retrieve.local_of_pairs`, faster for few captions and many images."""
from __future__ import annotations

import torch
from torch import Tensor

import retrieve
from retrieve import Embeddings

SHARED = 32  # captions that meet an image on average, from which on going image by image is faster


def local_of_pairs(images: Embeddings, texts: Embeddings, image: Tensor, caption: Tensor,
                   reduction: str = "sum") -> Tensor:
    """The local similarity of P pairs, image [P] and caption [P] as rows -> [P] float32 (TGDT, local similarity).

    `retrieve.local_of_pairs` goes image by image, which pays if captions share images. A few captions share none in a
    large corpus: then each caption takes one product with the regions of all its images.
    """
    if len(image) >= SHARED * len(image.unique()):
        return retrieve.local_of_pairs(images, texts, image, caption, reduction)
    order = caption.argsort(stable=True)
    image, caption = image[order].to(images.offsets.device), caption[order]
    items, counts = caption.unique_consecutive(return_counts=True)
    local = []
    for item, candidates in zip(items.to(texts.offsets.device), image.split(counts.tolist()), strict=True):
        regions = images.tokens_of(candidates).to(order.device)                                     # [n, D]
        words = texts.tokens_of(item[None]).to(order.device, regions.dtype)                         # [W, D]
        lengths = images.lengths(candidates).to(order.device)
        best = torch.segment_reduce((regions @ words.T).float(), "max", lengths=lengths, axis=0)    # [images, W]
        local.append(best.sum(1) if reduction == "sum" else best.mean(1))
    scores = torch.cat(local)
    return torch.empty_like(scores).index_copy(0, order, scores)
