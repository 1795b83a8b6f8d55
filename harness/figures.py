"""The pictures of a run folder: learning curves, what was retrieved, what a word looks at."""
import sys
import textwrap
import warnings
from collections import Counter
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
from sources.files import BadInput, check_folder, write_whole

RIGHT, WRONG, QUIET = "#1a9850", "#d73027", "#888888"


def check_place(path: Path) -> None:
    """Raises BadInput if no figure can be saved there: its ending is unknown, or its folder cannot be written."""
    if path.suffix not in (".png", ".jpg", ".pdf", ".svg"):
        raise BadInput(f"--save {path}: expected a name that ends in .png, .jpg, .pdf or .svg")
    if path.is_dir():
        raise BadInput(f"--save {path}: a folder, expected the name of a picture")
    check_folder(path.parent)


def save(figure: Figure, path: Path) -> None:
    """Write a figure to a file and close it. The ending of the name says the format."""
    with warnings.catch_warnings(record=True) as heard:  # such as of letters that the font lacks, one by one
        write_whole(path, lambda file: figure.savefig(file, format=path.suffix[1:], dpi=110, bbox_inches="tight"))
    plt.close(figure)
    if said := sorted({str(each.message) for each in heard}):
        more = f" (and {len(said) - 1} more like this)" if len(said) > 1 else ""
        print(f"warning: {path}: {said[0]}{more}", file=sys.stderr)


def curves(history: list[dict], path: Path) -> None:
    """Training loss, validation R@1 and validation rsum, epoch by epoch. history: the lines of history.jsonl."""
    epochs = [line["epoch"] for line in history]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.6))
    left.plot(epochs, [line["loss"] for line in history], ".-", color="black")
    left.set(xlabel="epoch", title="training loss, per pair")
    if min(line["loss"] for line in history) > 0:  # UTO can fall below 0
        left.set_ylim(0, None)
    easy = [line["epoch"] for line in history if line.get("negatives") == "mean"]
    if easy and len(easy) < len(history):  # mark the epoch in which the loss changed
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


def show_picture(axis: Axes, split: data.Split, row: int, color: str | None = None) -> tuple[int, int]:
    """Draw image `row` in a coloured frame, or write its name if there is no picture that can be read.

    Returns its width and height in the units of the axis: pixels, or (1, 1) if there is no picture.
    """
    try:
        picture = split.picture(row)
    except BadInput as error:  # with files of features nobody has looked at it before
        print(f"warning: {error}", file=sys.stderr)
        picture = None
    if picture is None:
        axis.text(0.5, 0.5, textwrap.fill(split.image_names[row], 26), ha="center", va="center",
                  fontsize=7, color=QUIET, parse_math=False)
        axis.set(xlim=(0, 1), ylim=(0, 1))
    else:
        axis.imshow(picture)
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set(color=color or "#cccccc", linewidth=4 if color else 1)
    return (1, 1) if picture is None else picture.size


def show_box(axis: Axes, box: np.ndarray, color: np.ndarray, linewidth: float) -> None:
    """Draw the outline of a box: x1, y1, x2, y2 in the units of the axis."""
    x1, y1, x2, y2 = box
    axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=color, linewidth=linewidth))


def show_caption(axis: Axes, text: str, size: float = 9, width: int = 30) -> None:
    """Write a text, in lines of at most `width` characters."""
    axis.axis("off")
    lines = [line for paragraph in text.splitlines() for line in textwrap.wrap(paragraph, width)]
    axis.text(0.0, 0.5, "\n".join(lines), va="center", fontsize=size, transform=axis.transAxes,
              parse_math=False)  # a $ in a caption is a dollar


def retrieval(split: data.Split, images_found: torch.Tensor, captions_found: torch.Tensor,
              caption_queries: torch.Tensor, image_queries: torch.Tensor, path: Path) -> None:
    """Queries beside what two-stage search found. Right answers are green, wrong ones red.

    caption_queries [q] are rows of captions, images_found [q, 5] the rows of the images that they found.
    image_queries [p] are rows of images, captions_found [p, 5] the rows of the captions that they found.
    """
    lines = len(caption_queries) + len(image_queries)
    figure = plt.figure(figsize=(13, 2.1 * lines + 0.6))
    grid = figure.add_gridspec(lines, 6, width_ratios=[1.5, 1, 1, 1, 1, 1], hspace=0.12, wspace=0.06)
    for line, (query, found) in enumerate(zip(caption_queries.tolist(), images_found.tolist(), strict=True)):
        show_caption(figure.add_subplot(grid[line, 0]), split.captions[query])
        for place, row in enumerate(found):
            color = RIGHT if row == split.image_of[query] else WRONG
            show_picture(figure.add_subplot(grid[line, place + 1]), split, row, color)
    for line, (query, found) in enumerate(zip(image_queries.tolist(), captions_found.tolist(), strict=True),
                                          len(caption_queries)):
        show_picture(figure.add_subplot(grid[line, 0]), split, query)
        axis = figure.add_subplot(grid[line, 1:])
        axis.axis("off")
        for place, row in enumerate(found):
            color = RIGHT if split.image_of[row] == query else WRONG
            text = f"{place + 1}.  {textwrap.shorten(split.captions[row], 115)}"
            axis.text(0.02, 0.9 - place * 0.2, text, fontsize=10, va="center", color=color, transform=axis.transAxes,
                      parse_math=False)
    figure.suptitle("A caption finds pictures, a picture finds captions (green: right, red: wrong)", y=0.9, fontsize=12)
    save(figure, path)


def alignment(split: data.Split, row: int, words: list[str], dots: np.ndarray, boxes: np.ndarray, path: Path) -> None:
    """The most similar region of each word of a caption, and the similarities of all words and regions.

    row: the image. words: W texts. dots: their similarities [W, R]. boxes: [R, 4] in 0..1, all 0 if not known.
    """
    known = boxes.any()
    best = dots.argmax(1)  # [W], a region for each word
    colors = plt.get_cmap("turbo")(np.linspace(0.05, 0.95, len(words)))
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 0.3 * len(words) + 2.2), width_ratios=[1, 1.6])
    width, height = show_picture(left, split, row)
    if known:
        corners = boxes * [width, height, width, height]
        labels = Counter()  # how many words stand on a region already; the next one goes below them
        for word, region, color in zip(words, best, colors, strict=True):
            show_box(left, corners[region], color, 2)
            x, y = corners[region, :2]
            left.text(x, y + labels[region] * 0.05 * height, word, fontsize=8, color="white", va="top",
                      bbox={"facecolor": color, "edgecolor": "none", "pad": 1.2})
            labels[region] += 1
    left.set_title("each word on its most similar region" if known else "this layout has no boxes", fontsize=10)
    shown = right.imshow(dots, aspect="auto", cmap="viridis")
    right.scatter(best, range(len(words)), marker="x", color="white", s=22)
    right.set(yticks=range(len(words)), yticklabels=words, xlabel="region", title="similarity of words and regions")
    figure.colorbar(shown, ax=right, fraction=0.03, pad=0.01)
    save(figure, path)


def shortlists(lines: list[dict], result: dict, path: Path) -> None:
    """Recall and time against the length of the shortlist.

    lines: from `report.shortlists`. result: from `report.measure`, which gives the horizontal lines.
    """
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
    """How much the guide strengthens each region of image `row`. attention: [R]. boxes: [R, 4] in 0..1."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4), width_ratios=[1, 1.6])
    width, height = show_picture(left, split, row)
    strength = attention - attention.min()
    strength = strength / max(strength.max(), 1e-9)  # 0 for the least, 1 for the most
    colors = plt.get_cmap("viridis")(strength)
    for box, value, color in zip(boxes * [width, height, width, height], strength, colors, strict=True):
        show_box(left, box, color, 0.5 + 2.5 * value)
    left.set_title("what the guide strengthens" if boxes.any() else "this layout has no boxes", fontsize=10)
    right.bar(range(len(attention)), attention, color=colors)
    right.set(xlabel="region", title="the guide's attention")
    right.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def found_images(split: data.Split, caption: str, rows: list[int], path: Path) -> None:
    """The images that a caption found, at most 20 of them. rows: of the images, best first."""
    rows = rows[:20]  # Matplotlib has a widest figure
    figure, axes = plt.subplots(1, len(rows), figsize=(2.4 * len(rows), 3), squeeze=False)
    for place, (axis, row) in enumerate(zip(axes[0], rows, strict=True), 1):
        show_picture(axis, split, row)
        name = split.image_names[row]
        name = name if len(name) <= 28 else f"{name[:10]}...{name[-15:]}"
        axis.set_title(f"{place}. {name}", fontsize=8, parse_math=False)
    figure.suptitle(textwrap.fill(caption[:300], 22 * len(rows)), fontsize=11, parse_math=False)
    save(figure, path)


def found_captions(picture: Image.Image | None, captions: list[str], path: Path) -> None:
    """The captions that a picture found, best first. picture: None if the dataset has no pictures."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.2), width_ratios=[1, 2.4])
    left.axis("off")
    if picture is not None:
        left.imshow(picture)
    show_caption(right, "\n".join(f"{place}.  {text}" for place, text in enumerate(captions, 1)), size=11, width=80)
    save(figure, path)
