"""What the page computes: queries, the shortlist and the re-ranked list, the regions that a word matches.

Nothing here knows of HTML or of Gradio.
"""
import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw

import data
from harness import engines, index, pictures, qdrant
from harness import search as searching
from harness import settings as settings_
from retrieve import Embeddings
from sources.files import BadInput

LONGEST = 10_000  # characters of a caption
DARK = 0.25       # brightness of a region that a word does not take


@dataclass
class Side:
    """One run or index, opened. Everything is encoded once."""

    name: str
    run: searching.Searched
    images: Embeddings
    texts: Embeddings

    @property
    def fine(self) -> bool:
        """Whether the model has tokens."""
        return self.images.tokens is not None


class Query(NamedTuple):
    """A caption or a picture that was asked of one side."""

    encoded: Embeddings              # of the one item
    right: set[int]                  # rows of the right answers, as far as they are known
    pieces: list[str]                # word pieces of a caption
    split: data.Split | None = None  # where a picture is
    row: int = 0                     # and in which row

    @property
    def is_caption(self) -> bool:
        return self.encoded.kind == "text"


class Found(NamedTuple):
    row: int
    score: float
    moved: int  # how many places re-ranking moved it up


class Click(NamedTuple):
    """A word piece that was clicked."""

    caption: int  # row of the caption that it is in, -1 for the query
    word: int     # its place there
    piece: str


def open_side(place: Path | str, args: argparse.Namespace) -> Side:
    """Open a run or an index, with its pictures. Raises BadInput if something is missing or has changed."""
    if qdrant.is_address(place):
        raise BadInput(f"{place}: the page needs a run or an index on disk")
    is_index = index.is_index(place)
    args = argparse.Namespace(**vars(args) | {"run": place, "from_run": args.from_run if is_index else None})
    opened = searching.open_index(args) if is_index else None
    where, split = (opened.folder, opened.manifest["split"]) if opened else (place, args.split)
    run = searching.open_run(where, args, split, with_data=split != "images")
    if split == "images":  # an index of a folder of pictures
        settings = settings_.from_flat(settings_.flat(run.settings) | {
            "data_root": str(args.data_root or opened.manifest["data"]), "skip_bad": True,
            "cache": str(args.cache or f"{place.resolve()}.cache")})
        run.split, run.words = pictures.of_folder(settings, where, run.device, args.workers, run.seen), []
    if opened:
        searching.check_content(place, opened, run.split)
    images, texts = (opened.images, opened.texts) if opened else (run.side("image"), run.side("text"))
    return Side(str(place), run, images, texts)


def ask_caption(side: Side, text: str) -> Query:
    """A caption as a query. Raises BadInput if it is empty or too long."""
    text = text.encode("utf8", "replace").decode().strip()
    if not text:
        raise BadInput("The caption is empty. Write what the picture should show.")
    if len(text) > LONGEST:
        raise BadInput(f"The caption has {len(text):,} characters. Write at most {LONGEST:,}.")
    split = side.run.split
    right = {int(image) for image, caption in zip(split.image_of, split.captions, strict=True) if caption == text}
    return Query(side.run.texts([text]), right, pieces_of(side, text))


def ask_picture(side: Side, name: str) -> Query:
    """A picture of the split as a query, by its name or its row. Raises BadInput if there is none."""
    split, row = side.run.split, side.run.split.row_of(name.strip())
    if row is None:
        raise BadInput(f"{side.name} has no picture {name.strip()[:80]!r}. Give a name, or a row from 0 to "
                       f"{len(split.image_names) - 1}.")
    return Query(side.run.image(split, row), set(np.flatnonzero(split.image_of == row).tolist()), [], split, row)


def ask_upload(side: Side, path: str) -> Query:
    """Another picture as a query. Raises BadInput if the file is not a picture."""
    try:
        split = pictures.one(Path(path), side.run.settings, side.run.device, side.run.seen)
    except BadInput as error:
        raise BadInput(str(error).replace(path, Path(path).name)) from None
    split.image_names = [Path(path).name]
    return Query(side.run.image(split, 0), set(), [], split)


def pieces_of(side: Side, text: str) -> list[str]:
    """The word pieces of a caption that have tokens."""
    words = data.tokenize([text], side.run.tokenizer, side.run.settings.text.longest)[0]
    return side.run.tokenizer.convert_ids_to_tokens(words[1:-1])


def fits(side: Side, query: Query, click: Click) -> bool:
    """Whether this side has the word that was clicked. The other side may have other captions, or word pieces."""
    if not side.fine or query.is_caption != (click.caption < 0) or click.caption >= len(side.run.split.captions):
        return False
    pieces = query.pieces if query.is_caption else pieces_of(side, side.run.split.captions[click.caption])
    return pieces[click.word : click.word + 1] == [click.piece]


def both_lists(query: Embeddings, corpus: Embeddings, k: int, weight: float,
               reduction: str) -> tuple[list[Found], list[Found]]:
    """The K answers of stage 1, and the same K re-ranked. The best comes first."""
    query = query.to(corpus.globals.device)
    coarse, mixed = ([part[0].tolist() for part in engines.search(query, corpus, k, each, reduction)]
                     for each in (0.0, weight))
    place = {row: at for at, row in enumerate(coarse[0])}
    first = [Found(row, score, 0) for row, score in zip(*coarse, strict=True)]
    again = [Found(row, score, place[row] - at) for at, (row, score) in enumerate(zip(*mixed, strict=True))]
    return first, again


def similarities(images: Embeddings, image: int, texts: Embeddings, caption: int) -> np.ndarray:
    """The similarity of each word of a caption with each region of an image, [W, R]."""
    words, regions = texts.tokens_of(torch.tensor([caption])), images.tokens_of(torch.tensor([image]))
    return (words.float().cpu() @ regions.float().cpu().T).numpy()


def lit(picture: Image.Image, boxes: np.ndarray, similar: np.ndarray) -> Image.Image:
    """A picture in which the regions light up that are similar to a word. The most similar one has a white frame.

    boxes: [R, 4] in 0..1. similar: [R].
    """
    width, height = picture.size
    corners = np.rint(boxes.clip(0, 1) * [width, height, width, height]).astype(int)
    strength = ((similar - similar.min()) / max(np.ptp(similar), 1e-6)) ** 4  # few regions stand out
    light = np.full((height, width, 1), DARK)
    for (x1, y1, x2, y2), value in zip(corners, strength, strict=True):
        light[y1:y2, x1:x2] = light[y1:y2, x1:x2].clip(min=DARK + (1 - DARK) * value)
    out = Image.fromarray((np.asarray(picture) * light).astype(np.uint8))
    x1, y1, x2, y2 = corners[similar.argmax()].tolist()
    ImageDraw.Draw(out).rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline="white", width=3)
    return out
