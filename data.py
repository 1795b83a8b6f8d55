"""Batches: captions to word pieces, word pieces with noise, and which captions meet in a batch.

Part of both papers' experiments: captions are cut into WordPiece ids once; while training USER each word may be hidden,
changed or left out (caption noise); a batch holds pairs of captions and images, each distinct image once.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sources import layouts, photos, scenes
from sources.features import InMemory, ManyFiles, OneArray
from sources.files import BadInput


@dataclass
class Split:
    """A split of a dataset: M captions of N images."""

    name: str  # "train", "val" or "test"
    captions: list[str]  # M, as written
    image_of: np.ndarray  # [M] int64, caption -> image row
    features: InMemory | OneArray | ManyFiles | None  # None: to be computed from the pictures, by extract.prepare
    image_names: list[str]  # N: a file name, an id or a row number
    pictures: Sequence[Path | np.ndarray | None]  # N: a file or pixels, None where there is none
    truth: scenes.Scenes | None = None  # scenes only: what is where, to measure alignment by
    clip: np.ndarray | None = None  # [N, E] a frozen CLIP's embeddings, where they guide (see frozen.Clip)

    def picture(self, row: int) -> Image.Image | None:
        """An image row's picture, RGB and upright; None if it has none. Raises BadInput for a file that is none."""
        return None if self.pictures[row] is None else photos.read(self.pictures[row])

    def keep(self, good: np.ndarray) -> None:
        """Go on with some of the images, `good` [N] bool, and their captions."""
        captions = good[self.image_of]
        self.captions = [caption for caption, stays in zip(self.captions, captions, strict=True) if stays]
        self.image_of = (np.cumsum(good) - 1)[self.image_of[captions]]
        self.image_names, self.pictures = ([each for each, stays in zip(every, good, strict=True) if stays]
                                           for every in (self.image_names, self.pictures))


def load(dataset: str, root: Path | None, splits: Sequence[str] = ("train", "val", "test"), regions: str = "auto",
         split_seed: int = 0) -> dict[str, Split]:
    if dataset == "scenes":
        return {name: scenes_split(name, regions) for name in splits}
    return {name: Split(name, *listing) for name, listing in layouts.read(dataset, root, splits, regions, split_seed).items()}


def scenes_split(name: str, regions: str) -> Split:
    truth = scenes.make(name, seed=0)  # the same for every training seed
    names = [f"scene {row}" for row in range(len(truth.pictures))]
    features = InMemory(f"scenes {name}", truth.regions, truth.boxes) if regions in ("auto", "files") else None
    return Split(name, truth.captions, truth.image_of, features, names, truth.pictures, truth)


# ------------------------------------------------------------------------------------------------------- tokenisation


@dataclass
class Words:
    """All captions' word pieces with [CLS] and [SEP]: caption i has ids[offsets[i] : offsets[i + 1]]."""

    ids: np.ndarray  # [total] int32
    offsets: np.ndarray  # [M + 1] int64

    def padded(self, rows: np.ndarray, pad_id: int) -> dict[str, torch.Tensor]:
        """word_ids [B, W] long and word_mask [B, W] bool of some captions, W that of the longest."""
        start, end = self.offsets[rows, None], self.offsets[rows + 1, None]
        where = start + np.arange((end - start).max())
        mask = where < end
        ids = np.where(mask, self.ids[np.minimum(where, end - 1)], pad_id)
        return {"word_ids": torch.from_numpy(ids.astype(np.int64)), "word_mask": torch.from_numpy(mask)}

    def take(self, rows: np.ndarray) -> Words:
        """Some captions by themselves, in the order given."""
        lengths = self.offsets[rows + 1] - self.offsets[rows]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        return Words(self.ids[np.repeat(self.offsets[rows] - offsets[:-1], lengths) + np.arange(offsets[-1])], offsets)


def tokenize(captions: Sequence[str], tokenizer, longest: int) -> Words:
    """Ids by a fast tokenizer of `transformers`, `longest` at most, [SEP] kept; BadInput where it finds no word."""
    ids, lengths = [np.zeros(0, np.int32)], []
    for start in range(0, len(captions), 10_000):
        part = list(captions[start : start + 10_000])
        lists = tokenizer(part, truncation=True, max_length=longest, return_attention_mask=False)["input_ids"]
        lengths += map(len, lists)
        ids.append(np.fromiter(chain.from_iterable(lists), np.int32))
    for row in np.flatnonzero(np.array(lengths) <= tokenizer.num_special_tokens_to_add()).tolist():
        raise BadInput(f"caption {row}, {captions[row]!r}: the tokenizer finds no word in it")
    return Words(np.concatenate(ids), np.cumsum([0, *lengths], dtype=np.int64))


# ------------------------------------------------------------------------------------------------------ caption noise


class CaptionNoise:
    """Each word is disturbed with probability `chance`: half of these become [MASK], a tenth a random word piece, the
    rest vanish (USER, details of training; the shares are those of the released code). The pieces of a word share its
    fate, [CLS] and [SEP] stay, and so does a caption that would lose all its words. `seed`: numbers to draw by."""

    def __init__(self, tokenizer, chance: float, seed: Sequence[int]):
        pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        self.inner = np.array([piece.startswith("##") for piece in pieces])  # goes on with the word before it
        self.fixed = np.isin(range(len(pieces)), [tokenizer.cls_token_id, tokenizer.sep_token_id])
        self.random = np.setdiff1d(range(len(pieces)), tokenizer.all_special_ids)
        self.hidden = tokenizer.mask_token_id
        self.chance, self.seed = chance, list(seed)

    def __call__(self, words: Words, who: int) -> Words:
        """The captions with fresh noise; the same for the same `seed` and `who`, wherever it is computed."""
        rng = np.random.default_rng([*self.seed, who])
        ids, caption = words.ids.copy(), np.repeat(np.arange(len(words.offsets) - 1), np.diff(words.offsets))
        word = np.cumsum(~self.inner[ids]) - 1                          # [total]: the word that a piece belongs to
        fate = np.where(self.fixed[ids], 1.0, rng.random(word[-1] + 1)[word] / max(self.chance, 1e-9))
        changed = (fate >= 0.5) & (fate < 0.6)
        ids[fate < 0.5] = self.hidden
        ids[changed] = rng.choice(self.random, changed.sum())
        stays = (fate < 0.6) | (fate >= 1)
        left = np.bincount(caption, stays & ~self.fixed[words.ids])   # words left, by caption
        stays |= left[caption] == 0
        return Words(ids[stays], np.concatenate([[0], np.cumsum(np.bincount(caption, stays))]).astype(np.int64))


# ------------------------------------------------------------------------------------------------------------ batches


def image_side(split: Split, images: np.ndarray) -> dict[str, torch.Tensor]:
    """regions [I, R, F], boxes [I, R, 4], region_mask [I, R], and clip [I, E] where a CLIP guides."""
    parts = [*split.features.read(images), *([] if split.clip is None else [split.clip[images]])]
    return {name: torch.from_numpy(part) for name, part in zip(("regions", "boxes", "region_mask", "clip"), parts,
                                                               strict=False)}


class Pairs(torch.utils.data.Dataset):
    """pairs[caption rows] -> a batch of B captions and their I distinct images, each once: regions [I, R, F], boxes
    [I, R, 4], region_mask [I, R], word_ids and word_mask [B, W], image_row [B] (caption -> row of regions), image_index
    and caption_index [B]. For DataLoader(pairs, sampler=batches, batch_size=None)."""

    def __init__(self, split: Split, words: Words, pad_id: int = 0, noise: CaptionNoise | None = None,
                 region_noise: float = 0.0, seed: Sequence[int] = (0,)):
        self.split, self.words, self.pad_id, self.noise = split, words, pad_id, noise
        self.region_noise, self.seed = region_noise, list(seed)

    def __len__(self) -> int:
        return len(self.split.image_of)

    def __getitem__(self, captions: Sequence[int]) -> dict[str, torch.Tensor]:
        captions = np.asarray(captions, np.int64)
        images, image_row = np.unique(self.split.image_of[captions], return_inverse=True)
        who = {"image_row": image_row, "image_index": images[image_row], "caption_index": captions}
        words = self.words.take(captions)
        if self.noise:
            words = self.noise(words, int(captions[0]))
        words = words.padded(np.arange(len(captions)), self.pad_id)
        pictures = image_side(self.split, images)
        if self.region_noise:
            seed = [*self.seed, int(captions[0])]
            pictures["region_mask"] = thinned(pictures["region_mask"], self.region_noise, seed)
        return pictures | words | {name: torch.from_numpy(a) for name, a in who.items()}


def thinned(mask: torch.Tensor, chance: float, seed: Sequence[int]) -> torch.Tensor:
    """[I, R] -> the same without some of the real regions, each with probability `chance`; one stays at least."""
    rng = np.random.default_rng([*seed, 1])
    draw = np.where(mask.numpy(), rng.random(mask.shape), -1)
    return torch.from_numpy((draw >= chance) | (draw == draw.max(1, keepdims=True))) & mask


def epoch_batches(image_of: np.ndarray, batch_size: int, captions_per_image: int, seed: int, epoch: int) -> list:
    """An epoch's batches, lists of caption rows: of batch_size // captions_per_image images captions_per_image each.

    An epoch goes in rounds. In each the images come in a new order and give their next captions, each in its own
    shuffled order, so that an image is encoded once for several captions; one with fewer left gives those. The last,
    incomplete batch is dropped unless it is alone. Depends on (seed, epoch) only."""
    rng = np.random.default_rng([seed, epoch])
    each = min(captions_per_image, batch_size, int(np.bincount(image_of).max()))  # no more than any image has
    captions = np.lexsort((rng.permutation(len(image_of)), image_of))  # image by image, shuffled inside each
    place = np.arange(len(captions)) - np.searchsorted(image_of[captions], image_of[captions])  # in its image's order
    first = np.flatnonzero(place % each == 0)  # a group is what an image gives in a round: here it begins,
    size = np.diff(first, append=len(captions))  # so many captions are in it
    order = np.lexsort((rng.permutation(len(first)), place[first] // each))  # round by round, shuffled inside each
    end = np.cumsum(size[order])
    captions = captions[np.repeat(first[order] - (end - size[order]), size[order]) + np.arange(len(captions))].tolist()
    cuts = [0, *(end[batch_size // each - 1 :: batch_size // each].tolist() or [len(captions)])]
    return [captions[a:b] for a, b in zip(cuts[:-1], cuts[1:], strict=True)]


def image_batches(split: Split, batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
    """All images in order: regions, boxes, region_mask, image_index."""
    for images in np.split(np.arange(len(split.features)), range(batch_size, len(split.features), batch_size)):
        yield image_side(split, images) | {"image_index": torch.from_numpy(images)}


def text_batches(words: Words, batch_size: int, pad_id: int = 0) -> Iterator[dict[str, torch.Tensor]]:
    """All captions by length, so that little padding is computed: word_ids, word_mask, caption_index."""
    by_length = np.argsort(np.diff(words.offsets), kind="stable")
    for captions in np.split(by_length, range(batch_size, len(by_length), batch_size)):
        yield words.padded(captions, pad_id) | {"caption_index": torch.from_numpy(captions)}
