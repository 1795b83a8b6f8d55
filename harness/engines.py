"""Search for speed: the results of `retrieve.search`, one thread per product, and fewer products for few captions."""
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

import losses
import retrieve
from retrieve import Embeddings

SHARED = 32    # from this many captions an image, on average, going image by image is faster
QUERIES = 256  # queries that a thread searches at once


def search(queries: Embeddings, corpus: Embeddings, shortlist: int = 100, weight: float = 10.0,
           reduction: str = "sum") -> tuple[Tensor, Tensor]:
    """`retrieve.search`, by as many threads as PyTorch may use, each with queries of its own.

    PyTorch shares a product out to all threads and waits for the slowest. Stage 2 has thousands of small products, so
    beside another busy program it would wait most of the time.
    """
    def one(block: Embeddings) -> tuple[Tensor, Tensor]:
        return retrieve.search(block, corpus, shortlist, weight, reduction, local_of_pairs)

    threads = torch.get_num_threads()
    if threads == 1 or len(queries) < threads or queries.globals.device.type != "cpu":
        return one(queries)
    size = min(QUERIES, -(-len(queries) // threads))
    blocks = [queries[start : start + size] for start in range(0, len(queries), size)]
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            found = list(pool.map(one, blocks))
    finally:
        torch.set_num_threads(threads)
    indices, scores = zip(*found, strict=True)
    return torch.cat(indices), torch.cat(scores)


def local_of_pairs(images: Embeddings, texts: Embeddings, image: Tensor, caption: Tensor,
                   reduction: str = "sum") -> Tensor:
    """The local similarity of P pairs, image [P] and caption [P] as rows -> [P] float32 (TGDT, local similarity).

    `retrieve.local_of_pairs` goes image by image, which pays if captions share images. A few captions share none in a
    large corpus: then each caption takes one product with the regions of all its images.
    """
    if images.tokens.is_cuda and texts.tokens.is_cuda:
        return local_in_blocks(images, texts, image, caption, reduction)
    if len(image) >= SHARED * len(image.unique()):
        return retrieve.local_of_pairs(images, texts, image, caption, reduction)
    order = caption.argsort(stable=True)
    image, caption = image[order].to(images.offsets.device), caption[order]
    items, counts = caption.unique_consecutive(return_counts=True)
    local = []
    for item, candidates in zip(items.to(texts.offsets.device), image.split(counts.tolist()), strict=True):
        regions = images.tokens_of(candidates).to(order.device, texts.tokens.dtype)                 # [n, D]
        words = texts.tokens_of(item[None]).to(order.device)                                        # [W, D]
        lengths = images.lengths(candidates).to(order.device)
        best = torch.segment_reduce((regions @ words.T).float(), "max", lengths=lengths, axis=0)    # [images, W]
        local.append(losses.over_words(best.sum(1), torch.tensor(best.shape[1]), reduction))
    scores = torch.cat(local)
    return torch.empty_like(scores).index_copy(0, order, scores)


def local_in_blocks(images: Embeddings, texts: Embeddings, image: Tensor, caption: Tensor,
                    reduction: str = "sum") -> Tensor:
    """The local similarity of P pairs on a GPU, image [P] and caption [P] as rows -> [P] float32.

    The tokens of many pairs are gathered and padded, and take one batched product. Image by image, a GPU would
    start thousands of small products. (Not measured on a GPU.)
    """
    widest = [int(side.offsets.diff().max()) for side in (images, texts)]
    size = max(1, retrieve.BLOCK // (sum(widest) * images.tokens.shape[1]))
    local = []
    for items, captions in zip(image.split(size), caption.split(size), strict=True):
        regions, region_mask = padded_rows(images, items, widest[0])                                # [P, R, D], [P, R]
        words, word_mask = padded_rows(texts, captions, widest[1])                                  # [P, W, D], [P, W]
        dots = (regions.to(words.dtype) @ words.transpose(1, 2)).float()                            # [P, R, W]
        best = dots.masked_fill(~region_mask[:, :, None], float("-inf")).amax(1)                    # [P, W]
        total = best.masked_fill(~word_mask, 0).sum(1)
        local.append(losses.over_words(total, word_mask.sum(1), reduction))
    return torch.cat(local)


def padded_rows(side: Embeddings, items: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The tokens of some items, [P, width, D], and which of them are real, [P, width]."""
    place = torch.arange(width, device=items.device)
    rows = (side.offsets[items][:, None] + place).clamp(max=len(side.tokens) - 1)
    return side.tokens[rows], place < side.lengths(items)[:, None]
