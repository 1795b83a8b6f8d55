"""Data: what a split and a batch are, word pieces, caption noise, and which captions meet in a batch.

Read beside both papers' experiments. An image is a set of regions, each with a feature vector and a box. A caption
belongs to one image, and `image_of` (caption -> row of its image) says which one. Five captions per image are usual,
but nothing here relies on that. `sources/` says where the files come from; docs/symbols.md lists the papers' symbols.

A batch is a dictionary of tensors, for B captions and their I images, each image once:

    regions [I, R, F]   boxes [I, R, 4] in 0..1   region_mask [I, R] True for real regions   clip [I, E] with CGE only
    word_ids [B, W]     word_mask [B, W]          image_row [B], the row of `regions` that each caption belongs to
    image_index [B]     caption_index [B]         rows of the whole split; image_index tells true negatives from false
"""
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sources import layouts, photos, scenes
from sources.features import InMemory, ManyFiles, OneArray, Stored
from sources.files import BadInput

# ----------------------------------------------------------------------------------------------------------- splits


@dataclass
class Split:
    """A split of a dataset: M captions of N images."""

    name: str                            # "train", "val" or "test"
    captions: list[str]                  # M, as written
    image_of: np.ndarray                 # [M] int64, caption -> row of its image
    features: InMemory | OneArray | ManyFiles | Stored | None  # None until they are computed from the pictures
    image_names: list[str]               # N, a file name, or "row 7" or "scene 7" if there is none
    pictures: Sequence[Path | np.ndarray | None]  # N, a file or pixels; None where there is no picture
    truth: scenes.Scenes | None = None   # what is where in a scene, to measure alignment (scenes only)
    clip: np.ndarray | None = None       # [N, E] the embeddings of a frozen CLIP (CGE only)

    def picture(self, row: int) -> Image.Image | None:
        """The picture of an image, RGB and upright, or None. Raises BadInput if the file is not a picture."""
        return None if self.pictures[row] is None else photos.read(self.pictures[row])

    def row_of(self, name: str) -> int | None:
        """The row of an image, given by its name or as a row. None if there is no such image."""
        if name in self.image_names:
            return self.image_names.index(name)
        return int(name) if re.fullmatch("[0-9]{1,9}", name) and int(name) < len(self.image_names) else None

    def keep(self, good: np.ndarray) -> None:
        """Drop the images that are not good, and their captions. Call it before there are features. good: [N] bool."""
        kept = good[self.image_of]                                                    # [M] bool
        self.captions = [caption for caption, stays in zip(self.captions, kept, strict=True) if stays]
        new_row = np.cumsum(good) - 1                                                 # [N], for the good images
        self.image_of = new_row[self.image_of[kept]]
        self.image_names = [name for name, stays in zip(self.image_names, good, strict=True) if stays]
        self.pictures = [picture for picture, stays in zip(self.pictures, good, strict=True) if stays]


def load(dataset: str, root: Path | str | None, splits: Sequence[str] = ("train", "val", "test"), regions: str = "auto",
         split_seed: int = 0) -> dict[str, Split]:
    """The splits of a dataset: "scenes", which needs no files, "flickr8k", "flickr30k", "coco" or "folder" (your own).

    root: the folder of the files. A "test" split is left out if the dataset has none. regions: "files" wants files of
    region features, "auto" takes them if they are there, any other word leaves `features` None. split_seed:
    seed of the splits of your own pictures, if their table names none. Raises BadInput if a file is missing or wrong,
    or if there is only one picture to train on.
    """
    if dataset == "scenes":
        return {name: load_scenes(name, regions) for name in splits}
    listings = layouts.read(dataset, root, splits, regions, split_seed)
    if "train" in listings and len(listings["train"].image_names) < 2:
        raise BadInput(f"{root}: found one picture to train on, expected two or more, to tell them apart")
    return {name: Split(name, **listing._asdict()) for name, listing in listings.items()}


def load_scenes(name: str, regions: str = "auto") -> Split:
    """A split of the built-in scenes, the same for every training seed."""
    truth = scenes.make(name, seed=0)
    features = InMemory(f"scenes {name}", truth.regions, truth.boxes) if regions in ("auto", "files") else None
    names = [f"scene {row}" for row in range(len(truth.pictures))]
    return Split(name, truth.captions, truth.image_of, features, names, truth.pictures, truth)


# ------------------------------------------------------------------------------------------------------ word pieces


def tokenize(captions: Sequence[str], tokenizer, longest: int) -> list[np.ndarray]:
    """Captions to word pieces: for each caption its ids, [CLS] and [SEP] included, int32.

    tokenizer: a fast tokenizer of `transformers`. A caption is cut to `longest` pieces, and keeps its [SEP]. Raises
    BadInput if the tokenizer finds no word in a caption.
    """
    words: list[np.ndarray] = []
    for start in range(0, len(captions), 10_000):
        part = tokenizer(list(captions[start : start + 10_000]), truncation=True, max_length=longest)
        words += [np.array(ids, np.int32) for ids in part["input_ids"]]
    for row, ids in enumerate(words):
        if len(ids) <= tokenizer.num_special_tokens_to_add():
            raise BadInput(f"caption {row + 1} of {len(words)}, {captions[row]!r}: the tokenizer finds no word in it")
    return words


def pad(words: Sequence[np.ndarray]) -> dict[str, Tensor]:
    """Captions of different lengths -> word_ids [B, W] long and word_mask [B, W] bool, W that of the longest.

    Shorter captions end in zeros. The mask hides them, so no model sees what stands there.
    """
    lengths = torch.tensor([len(ids) for ids in words])
    word_ids = pad_sequence([torch.from_numpy(ids).long() for ids in words], batch_first=True)
    return {"word_ids": word_ids, "word_mask": torch.arange(word_ids.shape[1]) < lengths[:, None]}


class CaptionNoise:
    """Disturb each word with probability `chance` (USER, details of training).

    Half of the disturbed words become [MASK], one in ten a random word piece, the rest vanish; these are the shares of
    the released code. All pieces of a word share its fate. [CLS] and [SEP] stay, and a caption that would lose all its
    words stays as it is.
    """

    def __init__(self, tokenizer, chance: float):
        pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        self.continues = np.array([piece.startswith("##") for piece in pieces])  # belongs to the word before it
        self.ordinary = np.setdiff1d(range(len(pieces)), tokenizer.all_special_ids)
        self.mask_id, self.chance = tokenizer.mask_token_id, chance

    def __call__(self, ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """ids [W] int32, with [CLS] and [SEP] -> the ids with fresh noise, at most W. rng draws the noise."""
        noisy, fate = [], ""
        for piece in ids[1:-1].tolist():
            if not fate or not self.continues[piece]:  # a new word draws its fate
                fate = self.draw_fate(rng)
            if fate == "stays":
                noisy.append(piece)
            elif fate == "hidden":
                noisy.append(self.mask_id)
            elif fate == "changed":
                noisy.append(rng.choice(self.ordinary))
        return np.array([ids[0], *noisy, ids[-1]], np.int32) if noisy else ids

    def draw_fate(self, rng: np.random.Generator) -> str:
        draw = rng.random()
        if draw < 0.5 * self.chance:
            return "hidden"
        if draw < 0.6 * self.chance:
            return "changed"
        return "vanishes" if draw < self.chance else "stays"


# ---------------------------------------------------------------------------------------------------------- batches


def image_side(split: Split, images: np.ndarray) -> dict[str, Tensor]:
    """regions [I, R, F], boxes [I, R, 4], region_mask [I, R], and clip [I, E] if a CLIP guides."""
    regions, boxes, mask = split.features.read(images)
    batch = {"regions": regions, "boxes": boxes, "region_mask": mask}
    if split.clip is not None:
        batch["clip"] = split.clip[images]
    return {name: torch.from_numpy(array) for name, array in batch.items()}


class Pairs(torch.utils.data.Dataset):
    """Training batches: pairs[rows of captions] is the batch of these captions and their images.

    Use it as DataLoader(pairs, sampler=batches, batch_size=None), with batches from `epoch_batches`. The noise
    depends on `seed` and on the first caption of the batch, so a resumed run draws the same noise.
    """

    def __init__(self, split: Split, words: list[np.ndarray], noise: CaptionNoise | None = None,
                 seed: Sequence[int] = (0,)):
        self.split, self.words, self.noise, self.seed = split, words, noise, list(seed)

    def __getitem__(self, captions: Sequence[int]) -> dict[str, Tensor]:
        captions = np.asarray(captions, np.int64)
        images, image_row = np.unique(self.split.image_of[captions], return_inverse=True)
        words = [self.words[caption] for caption in captions]
        if self.noise:
            rng = np.random.default_rng([*self.seed, captions[0]])
            words = [self.noise(ids, rng) for ids in words]
        who = {"image_row": image_row, "image_index": images[image_row], "caption_index": captions}
        return (image_side(self.split, images) | pad(words)
                | {name: torch.from_numpy(index) for name, index in who.items()})


def epoch_batches(image_of: np.ndarray, batch_size: int, captions_per_image: int, seed: int,
                  epoch: int) -> list[list[int]]:
    """The batches of an epoch, lists of caption rows: some images, and `captions_per_image` captions of each.

    An epoch goes in rounds. In each round every image gives its next captions, or what is left of them, and the images
    come in a new order. So an image is encoded once for several captions. The last batch is dropped if it is not full,
    unless it is the only one. The result depends on (seed, epoch) alone.

    A batch has two images or more (if there are two), as one alone has no negatives. So the image with the most
    captions gives only as many as the image with the second most. The rest would meet no other image.
    """
    rng = np.random.default_rng([seed, epoch])
    captions_of: dict[int, list[int]] = {}
    # (The argsort of a shuffle is a shuffle, too. This one gives the batches of the stored results.)
    for caption in np.argsort(rng.permutation(len(image_of))).tolist():
        captions_of.setdefault(int(image_of[caption]), []).append(caption)
    counts = sorted(map(len, captions_of.values()))
    most = counts[-2] if len(counts) > 1 else counts[0]  # the second most that an image has
    per_image = min(captions_per_image, batch_size // 2, most)  # at most half a batch, so that two images fit

    groups = []  # (round, image, the captions that it gives in this round)
    for image in sorted(captions_of):
        captions = captions_of[image][:most]
        for start in range(0, len(captions), per_image):
            groups.append((start // per_image, image, captions[start : start + per_image]))
    groups = [groups[place] for place in np.argsort(rng.permutation(len(groups)))]
    groups.sort(key=lambda group: group[0])  # by round; sort is stable, so a round stays in random order

    size = batch_size // per_image  # images in a batch
    batches = [groups[start : start + size] for start in range(0, len(groups), size)]
    for batch, after in pairwise(batches):
        if len({image for _, image, _ in batch}) == 1:  # an image was last in one round and first in the next
            batch[-1], after[0] = after[0], batch[-1]
    if len(batches) > 1 and len(batches[-1]) < size:
        batches.pop()
    return [[caption for _, _, captions in batch for caption in captions] for batch in batches]


def image_batches(split: Split, batch_size: int, images: np.ndarray | None = None) -> Iterator[dict[str, Tensor]]:
    """All images in order, or some, to encode them: what `image_side` gives, and image_index [I]."""
    images = np.arange(len(split.features)) if images is None else images
    for start in range(0, len(images), batch_size):
        some = images[start : start + batch_size]
        yield image_side(split, some) | {"image_index": torch.from_numpy(some)}


def text_batches(words: list[np.ndarray], batch_size: int) -> Iterator[dict[str, Tensor]]:
    """All captions, to encode them: word_ids, word_mask, caption_index [B]. Sorted by length, to save padding."""
    by_length = np.argsort([len(ids) for ids in words], kind="stable")
    for start in range(0, len(words), batch_size):
        captions = by_length[start : start + batch_size]
        yield pad([words[caption] for caption in captions]) | {"caption_index": torch.from_numpy(captions)}
