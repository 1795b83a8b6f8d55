"""Measuring: encode a split, search it in two stages, count recall.

Read beside both papers' experiments. What two stages are stands in `twostage.py`, what recall is in `recall.py`; here
trained models meet both.
"""
from __future__ import annotations

import torch

import data
from harness import run as runs
from retrieve import Clock, Embeddings, alignment, encode, evaluate, five_folds

# ------------------------------------------------------------------------------------------------ a whole split


def measure(model: torch.nn.Module, split: data.Split, words: data.Words, settings: runs.Settings,
            device: torch.device | str, precision: str, exhaustive: bool = True, dtype: torch.dtype | None = None,
            memory: int | None = None) -> tuple[dict, Embeddings, Embeddings]:
    """Encode a split and evaluate it: the metrics (see `evaluate`), its pictures and its captions encoded.

    dtype: how tokens are stored while searching, by default as they are, float32.
    """
    clock = Clock(device)
    images = encode(model, data.image_batches(split, 128), "image", len(split.features), device, precision)
    texts = encode(model, data.text_batches(words, 256), "text", len(split.captions), device, precision)
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
