"""The pictures of a run folder: learning curves, what was retrieved, what a word looks at."""
from __future__ import annotations

import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from PIL import Image

import data
from sources.files import write_whole

RIGHT, WRONG, QUIET = "#1a9850", "#d73027", "#888888"


def save(figure: Figure, path: Path) -> None:
    """Write a picture of the kind that the ending of its name says, and forget the figure."""
    write_whole(path, lambda file: figure.savefig(file, format=path.suffix[1:], dpi=110, bbox_inches="tight"))
    plt.close(figure)


def curves(history: list[dict], path: Path) -> None:
    """Training loss, and validation recall, epoch by epoch; `history` as in history.jsonl."""
    epochs = [line["epoch"] for line in history]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.6))
    left.plot(epochs, [line["loss"] for line in history], ".-", color="black")
    left.set(xlabel="epoch", title="training loss, per pair")
    if min(line["loss"] for line in history) > 0:  # UTO falls below it
        left.set_ylim(0, None)
    easy = [line["epoch"] for line in history if line.get("negatives") == "mean"]
    if easy and len(easy) < len(history):
        left.axvline(easy[-1] + 0.5, color=QUIET, linestyle=":")
        left.text(easy[-1] + 0.55, left.get_ylim()[0], "hardest negatives from here", color=QUIET, fontsize=8,
                  va="bottom")
    stages = [(name, style) for name, style in (("global", ":"), ("two_stage", "-")) if name in history[0]["val"]]
    for way, color, name in (("i2t", "#4575b4", "image to text"), ("t2i", "#f46d43", "text to image")):
        for stage, style in stages:
            recall = [line["val"][stage][way]["r1"] for line in history]
            middle.plot(epochs, recall, style, marker=".", color=color, label=f"{name}, {stage.replace('_', '-')}")
    middle.set(xlabel="epoch", title="validation R@1, %", ylim=(0, None))
    middle.legend(frameon=False, fontsize=8)
    for stage, style in stages:
        right.plot(epochs, [line["val"][stage]["rsum"] for line in history], style, marker=".", color="black",
                   label=stage.replace("_", "-"))
    right.set(xlabel="epoch", title="validation rsum, at most 600", ylim=(0, None))
    right.legend(frameon=False, fontsize=8)
    for axis in (left, middle, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    save(figure, path)


def show_picture(axis: Axes, split: data.Split, row: int, color: str | None = None, width: int = 26) -> None:
    """A picture in a coloured frame, or its name where the dataset came without pictures."""
    picture = split.picture(row)
    if picture is None:
        axis.text(0.5, 0.5, "\n".join(textwrap.wrap(split.image_names[row], width)), ha="center", va="center",
                  fontsize=7, color=QUIET)
        axis.set(xlim=(0, 1), ylim=(0, 1))
    else:
        axis.imshow(picture)
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set(color=color or "#cccccc", linewidth=4 if color else 1)


def show_caption(axis: Axes, text: str, color: str = "black", size: float = 9, width: int = 30) -> None:
    axis.axis("off")
    lines = [line for paragraph in text.splitlines() for line in textwrap.wrap(paragraph, width)]
    axis.text(0.0, 0.5, "\n".join(lines), va="center", fontsize=size, color=color,
              transform=axis.transAxes)


def retrieval(split: data.Split, images_found: torch.Tensor, captions_found: torch.Tensor,
              caption_queries: torch.Tensor, image_queries: torch.Tensor, path: Path) -> None:
    """A sheet of queries beside what two-stage search found; a green frame or letter is right, a red one wrong.

    caption_queries [q] rows of captions and images_found [q, 5] rows of images; image_queries [p] rows of images and
    captions_found [p, 5] rows of captions.
    """
    lines = len(caption_queries) + len(image_queries)
    figure = plt.figure(figsize=(13, 2.1 * lines + 0.6))
    grid = figure.add_gridspec(lines, 6, width_ratios=[1.5, 1, 1, 1, 1, 1], hspace=0.12, wspace=0.06)
    for line, (query, found) in enumerate(zip(caption_queries.tolist(), images_found.tolist(), strict=True)):
        show_caption(figure.add_subplot(grid[line, 0]), split.captions[query])
        for place, row in enumerate(found):
            show_picture(figure.add_subplot(grid[line, place + 1]), split, row,
                         RIGHT if row == split.image_of[query] else WRONG)
    for line, (query, found) in enumerate(zip(image_queries.tolist(), captions_found.tolist(), strict=True),
                                          len(caption_queries)):
        show_picture(figure.add_subplot(grid[line, 0]), split, query)
        axis = figure.add_subplot(grid[line, 1:])
        axis.axis("off")
        for place, row in enumerate(found):
            right = split.image_of[row] == query
            text = f"{place + 1}.  {textwrap.shorten(split.captions[row], 115)}"
            axis.text(0.02, 0.9 - place * 0.2, text, fontsize=10, va="center", color=RIGHT if right else WRONG,
                      transform=axis.transAxes)
    figure.suptitle("A caption finds pictures, a picture finds captions (green: right, red: wrong)", y=0.9, fontsize=12)
    save(figure, path)


def alignment(split: data.Split, row: int, words: list[str], dots: np.ndarray, boxes: np.ndarray, path: Path) -> None:
    """What each word of a caption looks at: its most similar region on the picture, and all similarities.

    row: the image; words [W]; dots [W, R] local similarities; boxes [R, 4] in 0..1 (zeros where unknown).
    """
    known = boxes.any()
    best = dots.argmax(1)
    colors = plt.get_cmap("turbo")(np.linspace(0.05, 0.95, len(words)))
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 0.3 * len(words) + 2.2), width_ratios=[1, 1.6])
    show_picture(left, split, row)
    width, height = (picture.size if (picture := split.picture(row)) is not None else (1, 1))
    if known:
        drawn: dict[int, int] = {}
        for word, region, color in zip(words, best, colors, strict=True):
            x1, y1, x2, y2 = boxes[region] * [width, height, width, height]
            left.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=color, linewidth=2))
            shift = drawn[region] = drawn.get(region, -1) + 1
            left.text(x1, y1 + shift * 0.05 * height, word, fontsize=8, color="white", va="top",
                      bbox={"facecolor": color, "edgecolor": "none", "pad": 1.2})
    left.set_title("each word on its most similar region" if known else "this layout has no boxes", fontsize=10)
    shown = right.imshow(dots, aspect="auto", cmap="viridis")
    right.scatter(best, range(len(words)), marker="x", color="white", s=22)
    right.set(yticks=range(len(words)), yticklabels=words, xlabel="region", title="similarity of words and regions")
    figure.colorbar(shown, ax=right, fraction=0.03, pad=0.01)
    save(figure, path)


def shortlists(lines: list[dict], result: dict, path: Path) -> None:
    """Recall and time against the length of the shortlist; `lines` as from `measure.shortlists`."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    lengths = [line["k"] for line in lines]
    for axis, name, title in ((left, "rsum", "rsum, at most 600"), (right, "seconds", "seconds, both directions")):
        axis.plot(lengths, [line[name] for line in lines], ".-", color="black", label="two-stage")
        axis.set(xlabel="K, length of the shortlist", title=title, xscale="log", xticks=lengths, xticklabels=lengths)
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
    for stage, style, label in (("global", ":", "global only"), ("mixed", "--", "exhaustive mixed")):
        left.axhline(result[stage]["rsum"], color=QUIET, linestyle=style, label=label)
    right.axhline(result["seconds"]["mixed"], color=QUIET, linestyle="--", label="exhaustive mixed")
    right.set_ylim(0, None)
    for axis in (left, right):
        axis.legend(frameon=False, fontsize=8)
    save(figure, path)


def guided(split: data.Split, row: int, attention: np.ndarray, boxes: np.ndarray, path: Path) -> None:
    """Which regions of an image the guide strengthens, and by how much: attention [R], boxes [R, 4] in 0..1."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4), width_ratios=[1, 1.6])
    show_picture(left, split, row)
    width, height = (picture.size if (picture := split.picture(row)) is not None else (1, 1))
    strength = (attention - attention.min()) / max(np.ptp(attention), 1e-9)
    colors = plt.get_cmap("viridis")(strength)
    for (x1, y1, x2, y2), value, color in zip(boxes * [width, height, width, height], strength, colors, strict=True):
        left.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=color, linewidth=0.5 + 2.5 * value))
    left.set_title("what the guide strengthens" if boxes.any() else "this layout has no boxes", fontsize=10)
    right.bar(range(len(attention)), attention, color=colors)
    right.set(xlabel="region", title="the guide's attention")
    right.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def found_images(split: data.Split, caption: str, rows: list[int], path: Path) -> None:
    """The pictures that a caption found; `rows` of images, best first."""
    figure, axes = plt.subplots(1, len(rows), figsize=(2.4 * len(rows), 3), squeeze=False)
    for place, (axis, row) in enumerate(zip(axes[0], rows, strict=True), 1):
        show_picture(axis, split, row)
        axis.set_title(f"{place}. {textwrap.shorten(split.image_names[row], 24)}", fontsize=8)
    figure.suptitle(caption, fontsize=11)
    save(figure, path)


def found_captions(picture: Image.Image | None, captions: list[str], path: Path) -> None:
    """The captions that a picture found, best first."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.2), width_ratios=[1, 2.4])
    left.axis("off")
    if picture is not None:
        left.imshow(picture)
    show_caption(right, "\n".join(f"{place}.  {text}" for place, text in enumerate(captions, 1)), size=11, width=80)
    save(figure, path)
