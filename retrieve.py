"""Retrieval: encode, shortlist by the coarse vectors, re-rank by the fine tokens; ranks and recall.

Read beside TGDT, the part on two-stage inference, and both papers' experiments. Stage 1 takes dot products of the
global embeddings and keeps the best K of the corpus. Stage 2 sorts these K by global + weight x local. Both are exact:
only what misses the shortlist is lost. An image searches captions, a caption images. docs/symbols.md has the symbols.
"""
if __name__ == "__main__":  # --help, a mistake in a flag and Ctrl-C need not wait for the slow imports below
    from harness import start
    start.first_look("retrieve")

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import losses

BLOCK = 2**26  # numbers computed at once, 256 MB, so that the memory of a search does not grow with the corpus
PIECE = 512    # words gathered at once in stage 2: they fit into a CPU's cache

# ------------------------------------------------------------------------------------------------ what is searched


@dataclass
class Embeddings:
    """N encoded images or captions.

    kind: "image" or "text".  globals: [N, D] unit length.  tokens: unit length, None for a model without fine tokens.
    Give tokens padded, [N, T, D] with mask [N, T] bool, or packed, [total, D] with offsets [N + 1] long. They are held
    packed, so item n has tokens[offsets[n] : offsets[n + 1]]. Raises ValueError if these do not fit together.
    """

    kind: str
    globals: Tensor
    tokens: Tensor | None = None
    mask: Tensor | None = None
    offsets: Tensor | None = None

    def __post_init__(self):
        if self.tokens is not None and self.mask is not None:
            self.tokens, self.offsets, self.mask = self.tokens[self.mask.bool()], offsets_of(self.mask.sum(1)), None
        if self.tokens is not None and (self.offsets is None or len(self.offsets) != len(self) + 1):
            raise ValueError(f"tokens need a mask if padded, or offsets if packed, for each of the {len(self)} items")

    def __len__(self) -> int:
        return len(self.globals)

    def __getitem__(self, items: slice | Tensor) -> "Embeddings":
        if self.tokens is None:
            return Embeddings(self.kind, self.globals[items])
        which = torch.arange(len(self), device=self.offsets.device)[items]
        return Embeddings(self.kind, self.globals[items], self.tokens_of(which), None, offsets_of(self.lengths(which)))

    def lengths(self, items: Tensor) -> Tensor:
        """How many tokens each of `items` [n] has, [n] long."""
        return self.offsets[items + 1] - self.offsets[items]

    def rows(self, items: Tensor) -> Tensor:
        """Where in `tokens` the tokens of `items` [n] lie, one item after the other: [all their tokens] long."""
        lengths = self.lengths(items)
        shift = self.offsets[items] - offsets_of(lengths)[:-1]  # from a place in the result to the row in `tokens`
        return torch.arange(int(lengths.sum()), device=shift.device) + shift.repeat_interleave(lengths)

    def tokens_of(self, items: Tensor) -> Tensor:
        """The tokens of `items` [n], one item after the other: [all their tokens, D]."""
        return self.tokens.index_select(0, self.rows(items))

    def padded(self) -> tuple[Tensor, Tensor]:
        """tokens [N, T, D] and mask [N, T], T that of the item with the most tokens."""
        lengths = self.offsets.diff()
        tokens = torch.nn.utils.rnn.pad_sequence(list(self.tokens.split(lengths.tolist())), batch_first=True)
        return tokens, torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Embeddings":
        """On another device, or with tokens of another type; the globals stay float32."""
        whole = Embeddings(self.kind, self.globals.to(device))
        if self.tokens is not None:
            whole.tokens, whole.offsets = self.tokens.to(device, dtype), self.offsets.to(device)
        return whole


def offsets_of(lengths: Tensor) -> Tensor:
    return F.pad(lengths.cumsum(0), (1, 0))  # [n] -> [n + 1]: 0, then the running sums


@torch.inference_mode()
def encode(model: torch.nn.Module, batches: Iterable[Mapping[str, Tensor]], kind: str, count: int,
           device: torch.device | str = "cpu", precision: str = "float32") -> Embeddings:
    """Encode all images or all captions once.

    batches: from `data.image_batches` or `data.text_batches`. kind: "image" or "text". count: rows of all batches.
    precision: of the network, "float32" or "bfloat16"; the embeddings are float32.
    """
    model.eval()
    encode_batch = model.encode_images if kind == "image" else model.encode_texts
    parts, order = [], []
    with tqdm(total=count, desc=f"encode {kind}s", unit=kind, leave=False, delay=2, disable=None) as bar:
        for batch in batches:
            batch = {name: value.to(device) for name, value in batch.items()}
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bfloat16"):
                encoded = encode_batch(batch)
            parts.append(Embeddings(kind, *encoded[:3]))  # without `plain`, which only the loss needs
            order.append(batch["image_index" if kind == "image" else "caption_index"])
            bar.update(len(order[-1]))
    whole = Embeddings(kind, torch.cat([part.globals for part in parts]))
    if parts[0].tokens is not None:
        whole.tokens = torch.cat([part.tokens for part in parts])
        whole.offsets = offsets_of(torch.cat([part.offsets.diff() for part in parts]))
    return whole[torch.cat(order).argsort()]  # captions come sorted by length, and go back to their own order


# ------------------------------------------------------------------------------------------------ two-stage search


@torch.inference_mode()
def search(queries: Embeddings, corpus: Embeddings, shortlist: int = 100, weight: float = 10.0,
           reduction: str = "sum", local_of: Callable | None = None) -> tuple[Tensor, Tensor]:
    """Two-stage retrieval (TGDT, two-stage inference) -> indices [Q, K] into the corpus and scores [Q, K] float32.

    The best comes first. K is `shortlist`, or the size of the corpus if that is smaller. Without tokens, or with
    weight 0, the order of stage 1 stands. reduction: as in `losses.local_similarity`. local_of: used instead of
    `local_of_pairs`. Raises ValueError if corpus or shortlist is empty, or if both sides are of one kind.
    """
    if len(corpus) == 0 or shortlist < 1:
        raise ValueError(f"a shortlist of {shortlist} from a corpus of {len(corpus)} is empty, expected at least one")
    if {queries.kind, corpus.kind} != {"image", "text"}:
        raise ValueError(f"kinds {queries.kind!r} and {corpus.kind!r}: one side should be 'image', the other 'text'")
    scores, indices = nearest(queries.globals, corpus.globals, min(shortlist, len(corpus)))         # [Q, K], [Q, K]
    if weight and len(queries) and queries.tokens is not None and corpus.tokens is not None:
        query = torch.arange(len(queries), device=indices.device)[:, None].expand_as(indices).flatten()  # [Q * K]
        found = indices.flatten()                                                                   # [Q * K]
        pairs = (queries, corpus, query, found) if queries.kind == "image" else (corpus, queries, found, query)
        local = (local_of or local_of_pairs)(*pairs, reduction)                                     # [Q * K]
        scores, order = (scores + weight * local.view_as(scores)).sort(dim=1, descending=True, stable=True)
        indices = indices.gather(1, order)
    return indices, scores.float()


def nearest(queries: Tensor, corpus: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Stage 1: the k largest dot products of each query, [Q, k] scores and [Q, k] indices, best first.

    queries [Q, D], corpus [N, D]. The corpus is read in blocks, so the whole [Q, N] matrix never exists.
    """
    best = index = None
    size = max(1, BLOCK // max(1024, len(queries)))
    for start in range(0, len(corpus), size):
        block = corpus[start : start + size].to(queries.device, queries.dtype)
        here, place = (queries @ block.T).topk(min(k, len(block)), dim=1)
        if best is not None:  # the best of this block and of those before
            here, place = torch.cat([best, here], 1), torch.cat([index, start + place], 1)
            here, order = here.topk(min(k, here.shape[1]), dim=1)
            place = place.gather(1, order)
        best, index = here, place
    return best, index


def local_of_pairs(images: Embeddings, texts: Embeddings, image: Tensor, caption: Tensor,
                   reduction: str = "sum") -> Tensor:
    """The local similarity of P pairs, image [P] and caption [P] as rows -> [P] float32 (TGDT, local similarity).

    The pairs are sorted by image, so that the words of all captions that meet an image take one product with it.
    """
    order = image.argsort(stable=True)
    image, caption = image[order].to(images.offsets.device), caption[order].to(texts.offsets.device)
    items, counts = image.unique_consecutive(return_counts=True)
    best = []  # for each word, the similarity of its most similar region
    for item, captions in zip(items, caption.split(counts.tolist()), strict=True):
        regions = images.tokens[images.offsets[item] : images.offsets[item + 1]].to(order.device, texts.tokens.dtype)
        for rows in texts.rows(captions).split(PIECE):
            words = texts.tokens.index_select(0, rows).to(order.device)                             # [n, D]
            best.append((regions @ words.T).amax(0).float())                                        # [n]
    lengths = texts.lengths(caption).to(order.device)                                               # [P]
    total = torch.segment_reduce(torch.cat(best), "sum", lengths=lengths)  # [P], over the words of each pair's caption
    local = losses.over_words(total, lengths, reduction)
    return torch.empty_like(local).index_copy(0, order, local)             # back into the order of the pairs


@torch.inference_mode()
def local_matrix(images: Embeddings, texts: Embeddings, reduction: str = "sum") -> Tensor:
    """The local similarity of every image with every caption, [images, captions], in blocks of captions."""
    regions, region_mask = images.to(dtype=texts.tokens.dtype).padded()
    step = max(1, BLOCK // (region_mask.numel() * max(1, len(texts.tokens) // len(texts))))
    blocks = tqdm(range(0, len(texts), step), desc="exhaustive local", unit="block", leave=False, delay=2, disable=None)
    return torch.cat([losses.local_similarity(regions, region_mask, *texts[start : start + step].padded(), reduction)
                      for start in blocks], 1)


# ----------------------------------------------------------------------------------------------- ranks and recall


def ranks(scores: Tensor, query_image: Tensor, corpus_image: Tensor) -> Tensor:
    """The rank of the best right answer of each query, 1 is first; [Q] long.

    scores [Q, N]. query_image [Q] and corpus_image, [N] or [Q, N], say which image a row belongs to; an answer is right
    if they agree; without one the rank is N + 1. Among equal scores the right answer ranks last, so a constant
    similarity scores nothing. A NaN never helps: a right answer that is NaN ranks last, and a wrong one counts as
    better. Raises ValueError if shapes differ.
    """
    right = query_image[:, None] == corpus_image
    if right.shape != scores.shape:
        raise ValueError(f"scores {tuple(scores.shape)} do not fit {tuple(right.shape)} queries and answers")
    truth = scores.masked_fill(~right | scores.isnan(), float("-inf")).amax(1, keepdim=True)
    return (~(scores < truth) & ~right).sum(1) + 1  # not `scores >= truth`, which is False for a NaN


def global_ranks(queries: Embeddings, corpus: Embeddings, query_image: Tensor, corpus_image: Tensor) -> Tensor:
    """Ranks by the coarse vectors, [Q] long, in blocks of queries: the whole matrix of a large split never exists."""
    size = max(1, BLOCK // len(corpus))
    return torch.cat([ranks(block @ corpus.globals.T, own, corpus_image)
                      for block, own in zip(queries.globals.split(size), query_image.split(size), strict=True)])


def shortlist_ranks(indices: Tensor, scores: Tensor, query_image: Tensor, corpus_image: Tensor,
                    stage1: Tensor) -> Tensor:
    """Ranks after two stages, [Q] long, from `search`'s indices and scores [Q, K].

    A miss is a miss: a query whose answer is not among the first K of stage 1 keeps its rank there, `stage1` [Q]. (The
    released evaluator gives such a query rank 1.) An answer that ties for the last place of the list is a miss too.
    """
    return torch.where(stage1 <= indices.shape[1], ranks(scores, query_image, corpus_image[indices]), stage1)


def metrics(i2t: Tensor, t2i: Tensor) -> dict:
    """Ranks of all image queries and of all caption queries -> R@1/5/10 in percent, median and mean rank, rsum."""
    out = {}
    for name, rank in (("i2t", i2t.double()), ("t2i", t2i.double())):
        recalls = {f"r{k}": 100 * (rank <= k).sum().item() / len(rank) for k in (1, 5, 10)}
        out[name] = {**recalls, "median_rank": rank.quantile(0.5).item(), "mean_rank": rank.mean().item()}
    out["rsum"] = sum(out[name][r] for name in ("i2t", "t2i") for r in ("r1", "r5", "r10"))
    return out


def recall(similarity: Tensor, image_of: Tensor) -> dict:
    """The metrics of a whole similarity matrix [images, captions]; image_of [captions], the image of each caption."""
    rows = torch.arange(len(similarity), device=similarity.device)
    image_of = torch.as_tensor(image_of, device=rows.device)
    return metrics(ranks(similarity, rows, image_of), ranks(similarity.T, image_of, rows))


@torch.inference_mode()
def evaluate(images: Embeddings, texts: Embeddings, image_of: Tensor, shortlist: tuple[int, int] = (50, 100),
             weight: float = 10.0, reduction: str = "sum", exhaustive: bool = True, find: Callable = search) -> dict:
    """The metrics of global only, exhaustive local, two-stage, and the mixed similarity without a shortlist.

    image_of [captions] long. shortlist: captions for an image, images for a caption. exhaustive=False leaves out what
    needs every local similarity. find: used instead of `search`. Without tokens there is "global" alone.
    """
    image_of, rows = (of.to(images.globals.device) for of in (torch.as_tensor(image_of), torch.arange(len(images))))
    out, seconds, start = {}, {}, perf_counter()
    i2t, t2i = global_ranks(images, texts, rows, image_of), global_ranks(texts, images, image_of, rows)
    out["global"], seconds["global"] = metrics(i2t, t2i), perf_counter() - start
    if images.tokens is None or texts.tokens is None:
        return {**out, "seconds": seconds}
    start = perf_counter()
    i2t = shortlist_ranks(*find(images, texts, shortlist[0], weight, reduction), rows, image_of, i2t)
    t2i = shortlist_ranks(*find(texts, images, shortlist[1], weight, reduction), image_of, rows, t2i)
    out["two_stage"], seconds["two_stage"] = metrics(i2t, t2i), perf_counter() - start
    if exhaustive:
        start = perf_counter()  # for both: "mixed" needs "local", so its seconds include it
        local = local_matrix(images, texts, reduction)
        out["local"], seconds["local"] = recall(local, image_of), perf_counter() - start
        mixed = images.globals @ texts.globals.T + weight * local
        out["mixed"], seconds["mixed"] = recall(mixed, image_of), perf_counter() - start
    return {**out, "seconds": seconds}


def main(argv: list[str] | None = None) -> int:
    from harness import flags  # here, because the code above does not use it
    return flags.run_search(argv)


if __name__ == "__main__":
    sys.exit(main())
