"""Measuring: encode a split, search it in two stages, count recall.

Read beside both papers' experiments. What two stages are stands in `twostage.py`, what recall is in `recall.py`; here
trained models meet both.
"""
from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

import batching
import data
import run as runs
from recall import alignment, metrics, ranks, recall, shortlist_ranks
from twostage import Embeddings, local_matrix, search

# ------------------------------------------------------------------------------------------------------- encode


@torch.inference_mode()
def encode(model: torch.nn.Module, batches: Iterable[Mapping[str, Tensor]], kind: str, count: int,
           device: torch.device | str = "cpu", precision: str = "float32") -> Embeddings:
    """Encode all pictures or all captions once; `batches` as from `batching.image_batches` or `batching.text_batches`.

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


# ------------------------------------------------------------------------------------------------ a whole split


def measure(model: torch.nn.Module, split: data.Split, words: batching.Words, settings: runs.Settings,
            device: torch.device | str, precision: str, exhaustive: bool = True, dtype: torch.dtype | None = None,
            memory: int | None = None) -> tuple[dict, Embeddings, Embeddings]:
    """Encode a split and evaluate it: the metrics (see `evaluate`), its pictures and its captions encoded.

    dtype: how tokens are stored while searching, by default as they are, float32.
    """
    clock = Clock(device)
    images = encode(model, batching.image_batches(split, 128), "image", len(split.features), device, precision)
    texts = encode(model, batching.text_batches(words, 256), "text", len(split.captions), device, precision)
    seconds = clock.lap()
    images, texts = images.to(dtype=dtype), texts.to(dtype=dtype)
    options = dict(shortlist=settings.shortlist, weight=settings.local_weight, words=settings.words, memory=memory)
    result = evaluate(images, texts, split.image_of, exhaustive=exhaustive, **options)
    result["seconds"]["encode"] = seconds
    if settings.dataset == "coco" and exhaustive and len(images) == 5000:
        result["folds_1k"] = five_folds(images, texts, split.image_of, **options)
    if split.truth is not None and exhaustive and texts.tokens is not None:
        result["alignment"] = alignment(
            texts.tokens, images.tokens, split.image_of, split.truth.boxes, split.truth.object_boxes,
            split.truth.word_objects)
    return {"split": split.name, "images": len(images), "captions": len(texts), **result}, images, texts


NAMES = {"global": "global only", "local": "exhaustive local", "two_stage": "two-stage", "mixed": "exhaustive mixed"}


def table(result: dict) -> str:
    """The metrics of `measure` as text: a line a way of searching, both directions, and the seconds each took."""
    lines = [f"{result['split']}: {result['images']} images, {result['captions']} captions, "
             f"encoded in {result['seconds']['encode']:.1f} s"]
    for title, part in (("", result), ("mean of five folds of 1K", result.get("folds_1k"))):
        if part is None:
            continue
        lines += [title] if title else []
        lines.append(f"{'':18}{'image to text':^24}{'text to image':^24}")
        lines.append(f"{'':18}" + f"{'R@1':>6}{'R@5':>6}{'R@10':>6}{'med':>5} " * 2 + f"{'rsum':>7}{'seconds':>9}")
        for key, name in NAMES.items():
            if key in part:
                row = "".join("".join(f"{part[key][way][r]:6.1f}" for r in ("r1", "r5", "r10"))
                              + f"{part[key][way]['median_rank']:5.0f} " for way in ("i2t", "t2i"))
                lines.append(f"{name:18}{row}{part[key]['rsum']:7.1f}{part['seconds'][key]:9.2f}")
    if "alignment" in result:
        a = result["alignment"]
        lines.append(f"alignment: {a['aligned']:.1f} % of {a['words']} words that name an object look at it "
                     f"(chance {a['chance']:.1f} %)")
    return "\n".join(lines)
