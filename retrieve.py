"""Two-stage inference: shortlist by the coarse vectors, re-rank by the fine tokens.

Read beside TGDT, the part on two-stage inference. Stage 1 takes dot products of the global embeddings and keeps the
best K of the corpus; stage 2 sorts those K by the mixed similarity, global + weight x local. Both directions work
alike: an image is a query for captions, a caption is a query for images. Both stages are exact, and neither makes
more than a block of its work at a time, whose size follows from the memory that it may use.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

import losses

WIDTH = 2**16  # vectors of the corpus scored together in stage 1
CHUNK = 1024   # token rows gathered for one matrix product in stage 2: they should fit into a processor's cache
ANCHOR = 200   # what starting a matrix product costs in stage 2, in token rows gathered


@dataclass
class Embeddings:
    """N encoded pictures or captions.

    kind: "image" or "text".  globals: [N, D] unit length.
    tokens: [N, T, D] unit length with mask [N, T] bool, the real ones; or packed, [total, D] with offsets [N + 1] long,
    item n having tokens[offsets[n] : offsets[n + 1]]; or None for a model without fine tokens. Of any floating type, on
    any device, or memory-mapped. faiss: a FAISS index of the globals, which then does stage 1 (see `index.py`).
    """

    kind: str
    globals: Tensor
    tokens: Tensor | None = None
    mask: Tensor | None = None
    offsets: Tensor | None = None
    faiss: object | None = None

    def __len__(self) -> int:
        return len(self.globals)

    def __getitem__(self, items: slice | Tensor) -> Embeddings:
        if self.tokens is None:
            return Embeddings(self.kind, self.globals[items])
        if self.mask is not None:
            return Embeddings(self.kind, self.globals[items], self.tokens[items], self.mask[items])
        which = torch.arange(len(self))[items]
        return Embeddings(self.kind, self.globals[items], self.tokens[self.rows(which)], None,
                          cumulated(self.lengths(which)))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Embeddings:
        """On another device, or with tokens of another type (globals stay float32)."""
        parts = (None if part is None else part.to(device) for part in (self.mask, self.offsets))
        tokens = None if self.tokens is None else self.tokens.to(device, dtype)
        return Embeddings(self.kind, self.globals.to(device), tokens, *parts)

    def packed(self) -> Embeddings:
        """The same items with packed tokens."""
        if self.mask is None:
            return self
        return Embeddings(self.kind, self.globals, self.tokens[self.mask], None, cumulated(self.mask.sum(1)))

    def lengths(self, items: Tensor) -> Tensor:
        """How many real tokens each of `items` [n] has; [n] long."""
        items = items.to(self.tokens.device)
        return self.mask[items].sum(1) if self.mask is not None else self.offsets[items + 1] - self.offsets[items]

    def rows(self, items: Tensor) -> Tensor:
        """Where the real tokens of `items` [n] are among all token rows, item after item; [their sum] long."""
        items = items.to(self.tokens.device)
        if self.mask is not None:
            width = self.mask.shape[1]
            return (items[:, None] * width + torch.arange(width, device=items.device))[self.mask[items]]
        lengths = self.lengths(items)
        first = self.offsets[items] - cumulated(lengths)[:-1]
        return first.repeat_interleave(lengths) + torch.arange(int(lengths.sum()), device=items.device)

    @property
    def flat(self) -> Tensor:
        """All token rows, [rows, D]; no copy."""
        return self.tokens.flatten(0, -2)


def cumulated(lengths: Tensor) -> Tensor:
    """[n] -> [n + 1]: 0, and the sums so far."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def free_memory(device: torch.device | str) -> int:
    """A quarter of the bytes that are free on `device` now: what a search may use unless it is told."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 4
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    except (ValueError, OSError):  # not every system tells
        return 2**30


# ----------------------------------------------------------------------------------------------------- the search


@torch.inference_mode()
def search(queries: Embeddings, corpus: Embeddings, shortlist: int = 100, weight: float = 10.0, words: str = "sum",
           memory: int | None = None) -> tuple[Tensor, Tensor]:
    """Two-stage retrieval (TGDT). Returns indices [Q, K] into the corpus and scores [Q, K] float32, best first.

    K is `shortlist`, or the corpus's size if that is smaller. Stage 1 ranks by the global embeddings; stage 2
    re-ranks by global + weight x local, where `words` is as in `losses.local_similarity`. Without tokens, or with
    weight 0, stage 1's order stands. `memory`: bytes for what is computed on the way, by default a quarter of what is
    free. Raises ValueError for an empty corpus or two of one kind.
    """
    if len(corpus) == 0:
        raise ValueError("the corpus is empty: there is nothing to search in")
    if shortlist < 1:
        raise ValueError(f"a shortlist holds at least one candidate, not {shortlist}")
    if queries.kind == corpus.kind:
        raise ValueError(f"queries and corpus are both of kind {corpus.kind!r}: one is to be image, the other text")
    memory = memory or free_memory(queries.globals.device)
    scores, indices = first_stage(queries.globals, corpus, min(shortlist, len(corpus)), memory)
    if queries.tokens is None or corpus.tokens is None or weight == 0:
        return indices, scores
    local = local_of_shortlists(queries, corpus, indices, words, memory)
    scores, order = (scores + weight * local).sort(dim=1, descending=True, stable=True)
    return indices.gather(1, order), scores


def first_stage(queries: Tensor, corpus: Embeddings, k: int, memory: int) -> tuple[Tensor, Tensor]:
    """The k best by the global embeddings, [Q, k] scores and indices: exact, or as FAISS finds them.

    FAISS gives -1 where the parts it looks into hold fewer than k: such a query is searched exactly.
    """
    if corpus.faiss is None:
        return nearest(queries, corpus.globals, k, memory)
    scores, indices = (torch.from_numpy(found).to(queries.device)
                       for found in corpus.faiss.search(queries.cpu().numpy(), k))
    short = (indices < 0).any(1)
    if short.any():
        scores[short], indices[short] = nearest(queries[short], corpus.globals, k, memory)
    return scores, indices


def nearest(queries: Tensor, corpus: Tensor, k: int, memory: int = 2**28) -> tuple[Tensor, Tensor]:
    """Stage 1: the k largest dot products of each query, [Q, k] scores and [Q, k] indices, best first.

    queries [Q, D], corpus [N, D]. Works in blocks: the [Q, N] matrix never exists.
    """
    width = max(k, min(len(corpus), WIDTH))
    height = max(1, min(1024, memory // (16 * (width + k))))  # scores, and what topk makes of them
    all_scores, all_indices = [], []
    for query in queries.split(height):
        best, index = None, None
        for start in range(0, len(corpus), width):
            block = corpus[start : start + width].to(query.device, query.dtype)
            here, order = (query @ block.T).topk(min(k, len(block)), dim=1)
            order = order + start
            if best is not None:  # the best of what came before and of what is here
                here, order = torch.cat([best, here], 1), torch.cat([index, order], 1)
                here, place = here.topk(min(k, here.shape[1]), dim=1)
                order = order.gather(1, place)
            best, index = here, order
        all_scores.append(best)
        all_indices.append(index)
    return torch.cat(all_scores), torch.cat(all_indices)


# ------------------------------------------------------------------------------------------- stage 2, the re-ranking


def local_of_shortlists(queries: Embeddings, corpus: Embeddings, indices: Tensor, words: str, memory: int) -> Tensor:
    """The local similarity of each of Q queries with its own K candidates, [Q, K] float32; indices [Q, K]."""
    per_pair = 64 * max(1, len(corpus.flat) // len(corpus))  # bytes: an index, a maximum and more, a token
    height = max(1, memory // (per_pair * indices.shape[1]))
    if fused_kernel(queries, corpus):
        queries, corpus = queries.packed(), corpus.packed()
    out = []
    for start in range(0, len(queries), height):
        block = indices[start : start + height]
        query = torch.arange(start, start + len(block), device=block.device)[:, None].expand_as(block)
        image, caption = (query, block) if queries.kind == "image" else (block, query)
        images, texts = (queries, corpus) if queries.kind == "image" else (corpus, queries)
        out.append(local_of_pairs(images, texts, image.flatten(), caption.flatten(), words).view_as(block))
    return torch.cat(out)


def local_of_pairs(images: Embeddings, texts: Embeddings, image: Tensor, caption: Tensor, words: str = "sum") -> Tensor:
    """The local similarity of P pairs, image [P] and caption [P] as rows; [P] float32 (TGDT, local similarity).

    Pairs that share an image are scored together: the words of their captions are gathered and multiplied with the
    image's regions, so that the work is one matrix product an image. Or the other way round, the regions of many images
    with the words of one caption, where that gathers less: for a single query on either side there is a single product.
    """
    regions, spoken = images.lengths(image), texts.lengths(caption)
    if kernel := fused_kernel(images, texts):
        images, texts = images.packed(), texts.packed()
        scores = kernel(texts.tokens, images.tokens, texts.offsets, images.offsets, caption, image)
        return scores if words == "sum" else scores / spoken.clamp(min=1)
    by_image = spoken.sum() + ANCHOR * len(image.unique()) <= regions.sum() + ANCHOR * len(caption.unique())
    anchor, order = (image if by_image else caption).sort(stable=True)
    still, moving, mover = (images, texts, caption) if by_image else (texts, images, image)
    rows, lengths = moving.rows(mover[order]), moving.lengths(mover[order])
    ends, step = cumulated(lengths).tolist(), max(1, CHUNK * len(lengths) // max(1, len(rows)))
    who, count = anchor.unique_consecutive(return_counts=True)
    kept, parts = still.rows(who), still.lengths(who).tolist()
    gather = Gather(moving.flat, image.device)
    best = torch.empty(len(rows) if by_image else len(anchor), device=image.device)
    for own, after, n in zip(kept.split(parts), count.cumsum(0).tolist(), count.tolist(), strict=True):
        fixed = still.flat.index_select(0, own).to(image.device, moving.tokens.dtype)            # [t, D]
        for first in range(after - n, after, step):
            last = min(first + step, after)
            dots = gather(rows[ends[first] : ends[last]]) @ fixed.T                              # [n, t]
            if by_image:
                best[ends[first] : ends[last]] = dots.amax(1)                                    # of each word
            else:
                best[first:last] = segment_max(dots, lengths[first:last]).sum(1)                 # of each image
    if by_image:
        best = torch.segment_reduce(best, "sum", lengths=lengths.to(best.device))
    scores = torch.empty_like(best).index_copy(0, order, best)
    return scores if words == "sum" else scores / spoken.clamp(min=1).to(scores.device)


def fused_kernel(one: Embeddings, other: Embeddings) -> Callable | None:
    """The MaxSim of pairs of the `late-interaction-kernels` library, where it is installed and all is on a GPU.

    It makes one kernel of product, maximum and sum. It multiplies float32 with fewer digits than PyTorch does, so it is
    for half precision only, where both round alike. None where it cannot be used.
    """
    if any(side.tokens.device.type != "cuda" or side.tokens.dtype == torch.float32 for side in (one, other)):
        return None
    try:
        from late_interaction_kernels.score_pairs import score_pairs_packed
    except ImportError:
        return None
    return score_pairs_packed


class Gather:
    """Rows of `tokens` on `device`, brought together in one piece of memory that is used again and again."""

    def __init__(self, tokens: Tensor, device: torch.device):
        self.tokens, self.device, self.room = tokens, device, tokens.new_empty(0, tokens.shape[1])

    def __call__(self, rows: Tensor) -> Tensor:
        if len(rows) > len(self.room):
            self.room = self.tokens.new_empty(len(rows), self.tokens.shape[1])
        return torch.index_select(self.tokens, 0, rows, out=self.room[: len(rows)]).to(self.device)


def segment_max(dots: Tensor, lengths: Tensor) -> Tensor:
    """[n, t] -> [p, t] float32: the maximum over each of p segments of the rows, of the lengths given."""
    if (lengths == lengths[0]).all():
        return dots.view(len(lengths), -1, dots.shape[1]).amax(1).float()
    return torch.segment_reduce(dots.float(), "max", lengths=lengths.to(dots.device), axis=0)


@torch.inference_mode()
def local_matrix(images: Embeddings, texts: Embeddings, words: str = "sum", memory: int | None = None) -> Tensor:
    """The local similarity of every image with every caption, [images, captions], in blocks of captions.

    Padded tokens. `memory`: bytes for what is computed on the way, by default a quarter of what is free.
    """
    memory = memory or free_memory(images.globals.device)
    step = max(1, min(256, memory // (12 * images.mask.numel() * texts.mask.shape[1])))
    starts = tqdm(range(0, len(texts), step), desc="exhaustive local", unit="block", leave=False, delay=2)
    return torch.cat([
        losses.local_similarity(
            images.tokens, images.mask, texts.tokens[at : at + step], texts.mask[at : at + step], words)
        for at in starts
    ], 1)


# ---- RECALL

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


# ---- ENCODE EVALUATE

@torch.inference_mode()
def encode(model: torch.nn.Module, batches: Iterable[Mapping[str, Tensor]], kind: str, count: int,
           device: torch.device | str = "cpu", precision: str = "float32") -> Embeddings:
    """Encode all pictures or all captions once; `batches` as from `data.image_batches` or `data.text_batches`.

    kind is "image" or "text", count the number of rows over all batches, precision "float32" or "bfloat16" (the
    network's; what comes back is float32). A batch's `image_index` or `caption_index` says where its rows go.
    """
    model.eval()
    encode_batch, key = {"image": (model.encode_images, "image_index"), "text": (model.encode_texts, "caption_index")}[
        kind]
    done, rows = [], []
    bar = tqdm(total=count, desc=f"encode {kind}s", unit=kind, leave=False, delay=2)
    for batch in batches:
        batch = {name: value.to(device) for name, value in batch.items()}
        with autocast(device, precision):
            encoded = encode_batch(batch)
        done.append(Embeddings(kind, encoded.globals.float(), encoded.tokens, encoded.mask))
        rows.append(batch[key])
        bar.update(len(batch[key]))
    bar.close()
    globals_ = done[0].globals.new_empty(count, done[0].globals.shape[1])
    tokens = mask = None
    if done[0].tokens is not None:
        longest = max(part.tokens.shape[1] for part in done)
        tokens = globals_.new_zeros(count, longest, done[0].tokens.shape[2])
        mask = torch.zeros(count, longest, dtype=torch.bool, device=globals_.device)
    for part, row in zip(done, rows, strict=True):
        globals_[row] = part.globals
        if tokens is not None:
            tokens[row, : part.tokens.shape[1]] = part.tokens.float()
            mask[row, : part.mask.shape[1]] = part.mask
    return Embeddings(kind, globals_, tokens, mask)


def autocast(device: torch.device | str, precision: str) -> contextlib.AbstractContextManager:
    """Mixed precision on `device` when precision is "bfloat16", nothing when it is "float32"."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bfloat16")


# ----------------------------------------------------------------------------------------------------- evaluate


@torch.inference_mode()
def evaluate(images: Embeddings, texts: Embeddings, image_of: Tensor, shortlist: tuple[int, int] = (50, 100),
             weight: float = 10.0, words: str = "sum", exhaustive: bool = True, memory: int | None = None) -> dict:
    """Global only, exhaustive local, two-stage, and the mixed similarity without a shortlist: the metrics of each.

    image_of [captions] long. shortlist: captions for an image, images for a caption. `exhaustive=False` leaves out
    what needs every local similarity. Without tokens there is only "global". "seconds" says how long each took.
    """
    image_of = torch.as_tensor(image_of, device=images.globals.device)
    rows = torch.arange(len(images), device=images.globals.device)
    out, seconds, clock = {}, {}, Clock(images.globals.device)

    dots = images.globals @ texts.globals.T
    i2t, t2i = ranks(dots, rows, image_of), ranks(dots.T, image_of, rows)
    out["global"], seconds["global"] = metrics(i2t, t2i), clock.lap()
    if images.tokens is None:
        return {**out, "seconds": seconds}
    if exhaustive:
        local = local_matrix(images, texts, words, memory)
        out["local"], seconds["local"] = recall(local, image_of), clock.lap()
    after_i2t = shortlist_ranks(*search(images, texts, shortlist[0], weight, words, memory), rows, image_of, i2t)
    after_t2i = shortlist_ranks(*search(texts, images, shortlist[1], weight, words, memory), image_of, rows, t2i)
    out["two_stage"], seconds["two_stage"] = metrics(after_i2t, after_t2i), clock.lap()
    if exhaustive:
        out["mixed"], seconds["mixed"] = recall(dots + weight * local, image_of), clock.lap() + seconds["local"]
    return {**out, "seconds": seconds}


def final(result: dict) -> dict:
    """The metrics by which a run is judged: two-stage, or global for a model without fine tokens."""
    return result.get("two_stage", result["global"])


def five_folds(images: Embeddings, texts: Embeddings, image_of: Tensor, **options: object) -> dict:
    """COCO's 1K protocol: the mean of the metrics over five folds of a fifth of the images each."""
    image_of = torch.as_tensor(image_of, device=images.globals.device)
    size, folds = len(images) // 5, []
    for fold in range(5):
        keep = image_of.div(size, rounding_mode="floor") == fold
        folds.append(evaluate(images[fold * size : (fold + 1) * size], texts[keep], image_of[keep] - fold * size,
                              **options))
    return mean_of(folds)


def shortlists(images: Embeddings, texts: Embeddings, image_of: Tensor, lengths: Sequence[int], weight: float,
               words: str, memory: int | None = None) -> list[dict]:
    """Two-stage recall and seconds for several lengths K of the shortlist, the same in both directions."""
    image_of = torch.as_tensor(image_of, device=images.globals.device)
    rows = torch.arange(len(images), device=images.globals.device)
    dots = images.globals @ texts.globals.T
    i2t, t2i = ranks(dots, rows, image_of), ranks(dots.T, image_of, rows)
    out = []
    for k in lengths:
        clock = Clock(images.globals.device)
        found = [search(*pair, k, weight, words, memory) for pair in ((images, texts), (texts, images))]
        seconds = clock.lap()
        out.append({"k": k, "seconds": seconds, **metrics(shortlist_ranks(*found[0], rows, image_of, i2t),
                                                          shortlist_ranks(*found[1], image_of, rows, t2i))})
    return out


def mean_of(results: list[dict]) -> dict:
    """Dictionaries of one shape -> their mean, number by number."""
    first = results[0]
    return {key: mean_of([r[key] for r in results]) if isinstance(first[key], dict)
            else sum(r[key] for r in results) / len(results) for key in first}


class Clock:
    """Seconds since the last lap, with the device's queue waited for."""

    def __init__(self, device: torch.device | str):
        self.device, self.last = torch.device(device), time.perf_counter()

    def lap(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        before, self.last = self.last, time.perf_counter()
        return self.last - before



def main(argv=None):
    from harness import search as command
    return command.main(argv)


if __name__ == "__main__":
    import sys
    sys.exit(main())
