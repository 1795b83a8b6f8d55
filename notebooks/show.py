"""The pictures of the notebooks: one palette, and small functions that draw.

A picture takes three steps. `panels` makes a figure and its axes, the functions in the middle draw on one axis each,
and `done` shows the figure as a PNG with a line that says what you should see:

    figure, axis = show.panels(height=2.5)
    show.bars(axis, {"chance": 0.2, "colours only": 9.8}, [show.NEUTRAL] * 2, xlabel="R@1, %")
    show.done(figure, "Two bars, the second one much longer.")

A colour means one thing in all notebooks. The six colours of roles stay apart for the colour-blind too, and where it
matters a line, a frame or a number says the same as the colour.
"""
import base64
import html
import inspect
import io
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from textwrap import fill as wrap

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import display
from IPython.utils.capture import capture_output
from matplotlib.patches import Circle, Rectangle
from PIL import Image

try:
    import ipywidgets
except ImportError:  # then the pictures stand still
    ipywidgets = None

IMAGE = "#005AB5"    # blue: the image side, and an image that looks for captions
TEXT = "#882255"     # wine: the text side, and a caption that looks for images
TRUTH = "#44AA55"    # green: the right answer, the true pair, what is on an object
HARD = "#CC3311"     # red: a wrong answer that comes close: a hard negative, a twin, an error
FALSE = "#F0C000"    # yellow: a false negative, a true pair that is taken for a wrong one
NEUTRAL = "#999999"  # grey: everything else: other pairs, chance, help lines

RISES, FALLS = "#01665e", "#8c510a"  # teal and brown: what rises or gains, what falls or loses (numbers with a sign)
SIGNED = "BrBG"                      # the scale between the two
SCALE = "cividis"                    # the scale of numbers without a sign; a colour bar stands beside it
PAIRS = ("#332288", "#CC6677", "#DDCC77", "#44AA99", "#88CCEE", "#999933")  # which pair a point of the circle is
LOOKS = ({"color": "black", "ls": "-", "marker": "o"},      # things that are compared and have no colour of their own
         {"color": "#555555", "ls": "--", "marker": "s"},
         {"color": "#888888", "ls": ":", "marker": "^"},
         {"color": "#aaaaaa", "ls": "-.", "marker": "D"})

DPI, WIDEST = 100, 9.0  # 900 pixels
# Jupyter's server sets the name; it is not there when a notebook is run as a script.
LIVE = ipywidgets is not None and "JPY_SESSION_NAME" in os.environ
plt.rcParams.update({
    "font.size": 10, "axes.titlesize": 10, "axes.labelsize": 9, "xtick.labelsize": 9, "ytick.labelsize": 9,
    "legend.fontsize": 9, "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False,
    "lines.linewidth": 2, "lines.markersize": 5, "figure.dpi": DPI})

# ---------------------------------------------------------------------------------------------- begin and end


def panels(rows: int = 1, columns: int = 1, height: float = 3.0, width: float = WIDEST, **options):
    """A figure and its axes, as `plt.subplots` gives them. height and width are inches of 100 pixels, width at most 9.

    Raises ValueError if the figure is too wide for a page.
    """
    if width > WIDEST:
        raise ValueError(f"a picture is at most {WIDEST} inches wide, not {width}")
    return plt.subplots(rows, columns, figsize=(width, height), layout="constrained", **options)


def done(figure, see: str) -> None:
    """Show a figure as a PNG. `see` is its alt text, and stands under it as the line "What you should see"."""
    whole, small = io.BytesIO(), io.BytesIO()
    figure.savefig(whole, format="png", dpi=DPI)
    plt.close(figure)
    # 256 colours are enough, and make the file four times as small.
    picture_ = Image.open(whole).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=4)
    picture_.save(small, "png", optimize=True)
    pixels = base64.b64encode(small.getvalue()).decode()
    display({"image/png": pixels, "text/plain": see}, raw=True, metadata={"image/png": {"alt": see}})
    say(f"*What you should see:* {see}")


def say(text: str) -> None:
    """Show a line of Markdown as the output of a cell."""
    display({"text/markdown": text, "text/plain": text}, raw=True)


def slider(draw: Callable, **choices) -> None:
    """Controls for `draw`, one for each keyword, as `ipywidgets.interact` takes them: (1, 50) is a slider.

    They need a running notebook. In one that was run as a script, as the stored one was, only a line says so; set
    `show.LIVE = True` if your editor runs notebooks live and this module does not notice.
    """
    if LIVE:
        display(ipywidgets.interactive(draw, **choices))
    else:
        say(f"*In a running notebook, controls for {', '.join(choices)} stand here.*")


def inputs(values: dict) -> None:
    """A field for each number of a dictionary, which takes what is typed. Nothing where the notebook isn't running."""
    if not LIVE:
        return
    for name, value in values.items():
        field = ipywidgets.Text("" if value is None else f"{value:g}", description=name, layout={"width": "36em"},
                                style={"description_width": "28em"})

        def typed(change, name=name):
            values[name] = None
            with suppress(ValueError):  # nothing, or half a number, such as a minus
                values[name] = float(change["new"].replace(",", "."))

        field.observe(typed, "value")
        display(field)


def answer(function: Callable, *arguments) -> None:
    """Run a function of answers.py, and show its code, what it prints and its pictures, all of it folded."""
    with capture_output() as caught:
        function(*arguments)
    parts = [f"<pre>{html.escape(text)}</pre>" for text in (inspect.getsource(function), caught.stdout) if text]
    for shown in caught.outputs:
        if "image/png" in shown.data:
            alt = html.escape(shown.metadata["image/png"]["alt"], quote=True)
            parts.append(f'<img alt="{alt}" src="data:image/png;base64,{shown.data["image/png"]}">')
    title = (function.__doc__ or function.__name__).splitlines()[0]
    folded = f"<details><summary>{html.escape(title)}</summary>{''.join(parts)}</details>"
    display({"text/html": folded, "text/plain": "The answer is folded. It stands in answers.py."}, raw=True)


# ----------------------------------------------------------------------------------------------- scenes and regions


def picture(axis, pixels, title: str = "", frame: str | None = None, boxes=(), colour: str = TRUTH) -> None:
    """A picture. frame: TRUTH draws a thick frame, HARD a dashed one, None a thin grey one.

    boxes: [n, 4] in 0..1, drawn in `colour`.
    """
    side = len(pixels)
    axis.imshow(pixels, extent=(0, side, side, 0))
    axis.set(xticks=[], yticks=[], title=title)
    axis.spines[:].set(visible=True, color=frame or "#cccccc", linewidth=4 if frame else 1,
                       linestyle=(0, (2, 1)) if frame == HARD else "-", capstyle="butt")
    for box in np.asarray(boxes):
        box_on(axis, box * side, colour)


def row_title(axes, text: str) -> None:
    """A line of text above a row of pictures, from their left edge, in the colour of the text side."""
    axes[0].text(0, 1.06, text, color=TEXT, transform=axes[0].transAxes).set_in_layout(False)
    axes[0].set_title(" ")  # keeps the room above


def box_on(axis, box, colour: str = TRUTH, width: float = 2.0) -> None:
    """The frame of a box [4] in pixels, with a white edge so that it is seen on any ground."""
    x1, y1, x2, y2 = (float(value) for value in box)
    for line, edge in ((width + 1.6, "white"), (width, colour)):
        axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=edge, linewidth=line))


def light(axis, pixels, boxes, values, title: str = "") -> None:
    """A picture that is lit where the regions have high values; the frame is the highest. boxes [R, 4] in 0..1.

    The light goes from the lowest value of this picture to its highest, so it compares regions, not pictures.
    """
    values, side = np.asarray(values), len(pixels)
    corners = (np.asarray(boxes) * side).round().astype(int)
    lit = np.zeros((side, side, 1))
    for i in values.argsort():  # the best region lies on top
        x1, y1, x2, y2 = corners[i]
        lit[y1:y2, x1:x2] = (values[i] - values.min()) / max(values.max() - values.min(), 1e-9)
    picture(axis, np.asarray(pixels) / 255 * (0.15 + 0.85 * lit**2), title)
    box_on(axis, corners[values.argmax()], "black", 1.5)


def frames(axis, pixels, boxes, values, title: str = "", high: float = 1.0):
    """A picture with its regions as frames, brighter and thicker for a higher value; boxes [R, 4] in 0..1.

    high: the value of the brightest frame. Returns what `figure.colorbar` needs.
    """
    values = np.asarray(values)
    colours = plt.cm.ScalarMappable(plt.Normalize(0, high), SCALE)
    picture(axis, 255 - (255 - np.asarray(pixels)) // 2, title)
    for i in values.argsort():
        x1, y1, x2, y2 = np.asarray(boxes)[i] * len(pixels)
        strength = min(1.0, float(values[i] / high)) ** 0.5
        axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colours.to_rgba(values[i]),
                                 alpha=0.25 + 0.75 * strength, linewidth=0.5 + 3 * strength))
    return colours


def captions(axis, lines: Sequence[str], title: str = "", width: int = 80) -> None:
    """Lines of text, one below the other."""
    axis.axis("off")
    for place, line in enumerate(lines):
        axis.text(0, 1 - (place + 0.5) / len(lines), wrap(line, width), color=TEXT, va="center",
                  transform=axis.transAxes)
    axis.set_title(title, loc="left")


def padded_batch(axis, pieces: Sequence[Sequence[str]], mask, labels: Sequence[str]) -> None:
    """A batch of captions, a cell for each word piece; padding is white and says so."""
    axis.imshow(mask, cmap="Greys", vmin=0, vmax=4, aspect="auto")
    for row, line in enumerate(pieces):
        for column, piece in enumerate(line):
            real = bool(mask[row, column])
            axis.text(column, row, piece if real else "[PAD]", ha="center", va="center", fontsize=9,
                      color="black" if real else "#777777")
    axis.set(yticks=range(len(labels)), yticklabels=labels, xticks=[])
    axis.set_xticks(np.arange(0.5, len(pieces[0]) - 1), minor=True)
    axis.set_yticks(np.arange(0.5, len(pieces) - 1), minor=True)
    axis.grid(which="minor", color="white", linewidth=2)
    axis.tick_params(which="both", length=0)
    axis.spines[:].set_visible(False)


def two_stages(axis, pictures, first: Sequence[int], second: Sequence[int], truth: int, title: str = "") -> None:
    """Left the shortlist of stage 1 from top to bottom, right its order after stage 2; a green line leads to `truth`.

    pictures: pixels by row. first, second: the same rows in two orders.
    """
    for x, order in ((0, first), (2.4, second)):
        for place, row in enumerate(order):
            axis.imshow(pictures[row], extent=(x, x + 0.94, -place - 0.94, -place))
    for place, row in enumerate(first):
        right = row == truth
        axis.plot([1, 2.34], [-place - 0.47, -list(second).index(row) - 0.47],
                  color=TRUTH if right else "#cccccc", linewidth=4 if right else 1.2)
    axis.set(xlim=(-0.25, 3.6), ylim=(-len(first), 0.05), yticks=[], title=title)
    axis.set_xticks([0.47, 2.87], ["stage 1", "stage 2"])
    axis.spines[:].set_visible(False)


# ------------------------------------------------------------------------------------------------- tables of numbers


def table(axis, values, title: str = "", best=(), best_colour: str = IMAGE) -> None:
    """A small table of similarities or costs, images by captions; darker is greater. The true pairs are framed.

    best: cells (row, column) that get a ring.
    """
    values = torch.as_tensor(values, dtype=torch.float32)
    low, high = values.min(), values.max()
    axis.imshow(values, cmap="Greys", vmin=low, vmax=low + 2 * (high - low).clamp(min=1e-9))
    cells(axis, values, "{:.2f}")
    if len(best):
        axis.scatter([column for _, column in best], [row for row, _ in best], s=1100, facecolors="none",
                     edgecolors=best_colour, linewidths=2.5)
    axis.set_title(title)


def push_table(axis, push, title: str = "", limit: float = 1.0, form: str = "{:+.2f}") -> None:
    """What a training step does to each similarity: teal and + is raised, brown and − is lowered.

    limit: the size of a push that gets the full colour.
    """
    push = torch.as_tensor(push, dtype=torch.float32)
    axis.imshow(push, cmap=SIGNED, vmin=-1.6 * limit, vmax=1.6 * limit)
    cells(axis, push, form, zero="0")
    axis.set_title(title)


def cells(axis, values, form: str, zero: str | None = None) -> None:
    """The numbers of a table, and frames around the true pairs."""
    for row in range(len(values)):
        for column in range(values.shape[1]):
            text = form.format(values[row, column]).replace("-", "−")
            nothing = zero is not None and abs(float(values[row, column])) < 5e-4
            axis.text(column, row, zero if nothing else text, ha="center", va="center", fontsize=10)
            if row == column:
                axis.add_patch(Rectangle((column - 0.46, row - 0.46), 0.92, 0.92, fill=False, lw=3, edgecolor=TRUTH))
    axis.set(xticks=range(values.shape[1]), yticks=range(len(values)))
    axis.set_xlabel("caption", color=TEXT)
    axis.set_ylabel("image", color=IMAGE)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)


def false_negatives(pictures, labels: Sequence[str], false):
    """The figure of a batch: its pictures, its captions as rows, and which cells of the table are true.

    The diagonal is green, `false` [B, B] yellow with a cross, the rest grey.
    """
    figure, (left, axis) = panels(1, 2, height=5.2, width_ratios=[1.5, 5.5])
    size, each = len(false), len(false) / len(pictures)
    for place, pixels in enumerate(pictures):
        left.imshow(pixels, extent=(0, 1, each * (place + 1) - 0.6, each * place - 0.4), aspect="auto")
    left.set(ylim=(size - 0.5, -0.5))
    left.axis("off")
    for row in range(size):
        for column in range(size):
            colour = TRUTH if row == column else FALSE if false[row, column] else "#eeeeee"
            axis.add_patch(Rectangle((column - 0.46, row - 0.46), 0.92, 0.92, color=colour))
            if false[row, column]:
                axis.text(column, row, "×", ha="center", va="center", fontsize=12)
    axis.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5), xticks=[], yticks=range(size))
    axis.set_yticklabels([wrap(label, 58) for label in labels], color=TEXT)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    return figure


def heat(axis, values, title: str = "", label: str = "", low: float | None = None, high: float | None = None,
         bar: bool = True, **options):
    """A large table as colours, with its colour bar. Returns what `figure.colorbar` needs."""
    shown = axis.imshow(values, cmap=SCALE, vmin=low, vmax=high, aspect=options.pop("aspect", "auto"), **options)
    axis.set_title(title)
    axis.spines[:].set_visible(False)
    if bar:
        axis.figure.colorbar(shown, ax=axis, label=label)
    return shown


# ------------------------------------------------------------------------------------------------------------ charts


def lines(axis, x, named: Mapping, title: str = "", xlabel: str = "", ylabel: str = "", marker: bool = True,
          legend: bool = True, **options) -> None:
    """A line for each name. named: {name: values}, or {name: (values, look)} with a look as in `LOOKS`.

    Without a look the lines take those of `LOOKS` in turn. options: more of `axis.set`, such as xscale="log".
    """
    for number, (name, values) in enumerate(named.items()):
        look = LOOKS[number % len(LOOKS)]
        if isinstance(values, tuple):
            values, own = values
            look = {"ls": "-", **({"marker": "o"} if marker else {}), **own}
        if not marker:
            look = {key: value for key, value in look.items() if key != "marker"}
        axis.plot(x, values, label=name, **look)
    axis.set(title=title, xlabel=xlabel, ylabel=ylabel, **options)
    if legend:
        axis.legend()


def ticks(axis, values, which: str = "x") -> None:
    """These ticks and no others, as numbers and not as powers of ten."""
    (axis.set_xticks if which == "x" else axis.set_yticks)(values, [f"{value:g}" for value in values])
    axis.minorticks_off()


def bars(axis, named: Mapping[str, float], colours: Sequence[str], xlabel: str = "", form: str = "{:.1f}",
         limit: float | None = None, log: bool = False) -> None:
    """Horizontal bars, each with its name and its number.

    limit: the right end of the axis. log: a logarithmic axis; then the lengths of the bars mean nothing, their ends do.
    """
    shown = axis.barh(list(named), list(named.values()), color=colours)
    axis.bar_label(shown, [form.format(value) for value in named.values()], padding=4, fontsize=9)
    axis.invert_yaxis()
    axis.set(xlabel=xlabel)
    if log:
        axis.set(xscale="log", xlim=(min(named.values()) / 3, 8 * max(named.values())))
    else:
        axis.set(xlim=(0, limit))


def grouped_bars(axis, groups: Sequence[str], series: Mapping, ylabel: str = "", form: str = "{:.0f}",
                 **options) -> None:
    """For each group one bar of each series, with numbers on top. series: {name: values, one a group}."""
    width = 0.8 / len(series)
    for number, (name, values) in enumerate(series.items()):
        places = np.arange(len(groups)) + (number - (len(series) - 1) / 2) * width
        shown = axis.bar(places, values, 0.9 * width, color=LOOKS[number]["color"], label=name)
        axis.bar_label(shown, [form.format(value) for value in values], fontsize=9, padding=2)
    axis.set(ylabel=ylabel, xticks=range(len(groups)), xticklabels=groups, **options)
    axis.legend(ncols=len(series), loc="upper center")


def histograms(axis, named: Mapping, bins, title: str = "", xlabel: str = "", ylabel: str = "", **options) -> None:
    """Histograms over each other. named: {name: (values, colour)}; an empty name gets no legend."""
    for name, (values, colour) in named.items():
        axis.hist(np.asarray(values), bins, color=colour, alpha=0.55, label=name, edgecolor=colour,
                  histtype="stepfilled", **options)
    axis.set(title=title, xlabel=xlabel, ylabel=ylabel)
    if any(named):
        axis.legend()


def spread(axis, x, draws, colour: str, label: str) -> None:
    """At each x the median of some draws [draws, len(x)], and a bar over the middle nine tenths of them."""
    middle = np.median(draws, 0)
    axis.errorbar(x, middle, abs(np.quantile(draws, [0.05, 0.95], 0) - middle), fmt="o", capsize=4, color=colour,
                  label=label)


def strips(axis, named: Mapping, xlabel: str = "") -> None:
    """A row of dots for each name, and a bar at their mean. named: {name: (values, colour)}."""
    rng = np.random.default_rng(0)
    for place, (values, colour) in enumerate(named.values()):
        values = np.asarray(values)
        axis.scatter(values, place + rng.uniform(-0.14, 0.14, len(values)), s=8, color=colour, alpha=0.6)
        axis.plot([values.mean()] * 2, [place - 0.36, place + 0.36], color="black", lw=3)
    axis.set(yticks=range(len(named)), yticklabels=list(named), xlabel=xlabel)
    axis.invert_yaxis()


def upright(axis, x: float, text: str = "", y: float = 0.95) -> None:
    """A dotted upright line at x, with a word beside it at the height y (0 to 1)."""
    axis.axvline(x, color="#555555", ls=":", lw=1.5)
    axis.annotate(text, (x, y), (4, 0), xycoords=axis.get_xaxis_transform(),
                  textcoords="offset points", color="#444444", fontsize=9, va="center", ha="left")


def level(axis, y: float, text: str = "", x: float = 0.98, below: bool = False) -> None:
    """A dotted level line at y, with a word above it (or below) at x (0 to 1)."""
    axis.axhline(y, color="#555555", ls=":", lw=1.5)
    axis.annotate(text, (x, y), (0, -4 if below else 4), xycoords=axis.get_yaxis_transform(),
                  textcoords="offset points", color="#444444", fontsize=9, ha="right" if x > 0.5 else "left",
                  va="top" if below else "bottom")


# ------------------------------------------------------------------------------------------------------- the circle


def unit(angles):
    """Angles [..., n] -> points of the circle [..., n, 2]."""
    return torch.stack([angles.cos(), angles.sin()], -1)


def circle(axis, angles, title: str = "", image_of=None) -> None:
    """Pairs on the circle, images as discs outside, captions as squares inside, both with the number of their image.

    angles: [images, captions], [n] each. image_of [captions]: the image of each caption; None: caption i is of image i.
    """
    captions_ = angles[1]
    image_of = torch.arange(len(captions_)) if image_of is None else image_of
    several = len(image_of) > len(image_of.unique())
    axis.add_patch(Circle((0, 0), 1, fill=False, color="#cccccc"))
    for j, i in enumerate(image_of.tolist()):
        out = 1.0 + 0.16 * i * several  # images in one place stay visible
        ends = torch.stack([out * unit(angles[0][i]), 0.8 * unit(captions_[j])])
        axis.plot(*ends.T, color="#bbbbbb", lw=1.2, zorder=1)
        for point, mark in ((ends[0], "o"), (ends[1], "s")):
            axis.scatter(*point, marker=mark, s=170, color=PAIRS[i], edgecolors="white", zorder=2)
            axis.text(*point, str(i), ha="center", va="center_baseline", fontsize=9, zorder=3,
                      color="black" if i in (1, 2, 3, 4) else "white")
    reach = 1.5 if several else 1.2
    axis.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", title=title)
    axis.axis("off")


def first_step(axis, angles, step) -> None:
    """Arrows along the circle, [2, n] angles long and drawn eight times as long, on top of `circle`."""
    for radius, now, turn in zip((1, 0.8), angles, step, strict=True):
        along = torch.stack([-now.sin(), now.cos()], -1) * turn[:, None] * 8
        axis.quiver(*(unit(now) * radius).T, *along.T, angles="xy", scale_units="xy", scale=1, width=0.008,
                    zorder=1.5)


def journey(axis, path, title: str = "") -> None:
    """A descent on a polar axis: the start inside, the end outside. Solid lines are images, dashed ones captions.

    path: [steps, 2, n] angles. Early steps are drawn wider apart.
    """
    radius = 0.25 + 0.75 * np.linspace(0, 1, len(path)) ** 0.4
    for i in range(path.shape[2]):
        axis.plot(path[:, 0, i], radius, color=PAIRS[i], lw=2.2)
        axis.plot(path[:, 1, i], radius, color=PAIRS[i], lw=1.6, ls="--")
        for end, place, mark in ((path[-1, 0, i], 1.02, "o"), (path[-1, 1, i], 1.16, "s")):
            axis.scatter(end, place, marker=mark, s=130, color=PAIRS[i], edgecolors="white", zorder=3, clip_on=False)
            axis.text(end, place, str(i), ha="center", va="center_baseline", fontsize=9, zorder=4,
                      color="black" if i in (1, 2, 3, 4) else "white")
    axis.text(0, 0, "start", ha="center", va="center", fontsize=9, color="#555555")
    axis.set(xticks=[], yticks=[], ylim=(0, 1.2))
    axis.set_title(title)
    axis.spines["polar"].set_visible(False)


def agreement(axis, images, texts, band: float, title: str = "") -> None:
    """Every two pairs as a point: how similar their images are, how similar their captions. Crosses leave the band."""
    i, j = torch.triu_indices(len(images), len(images), 1)
    v, t = (images @ images.T)[i, j], (texts @ texts.T)[i, j]
    inside = (t - v).abs() <= band
    axis.fill_between([-1, 1], [-1 - band, 1 - band], [-1 + band, 1 + band], color="#eeeeee")
    axis.plot([-1, 1], [-1, 1], color=NEUTRAL, lw=1)
    axis.scatter(v[inside], t[inside], color="black", s=35, zorder=3)
    axis.scatter(v[~inside], t[~inside], color=FALLS, s=50, marker="x", linewidths=2.5, zorder=3)
    axis.set(xlim=(-1.1, 1.1), ylim=(-1.1, 1.1), aspect="equal", title=title,
             xlabel="similarity of two images", ylabel="similarity of their captions")


# --------------------------------------------------------------------------------------- attention and two branches


def attention_table(axis, weights, names: Sequence[str], title: str = "") -> None:
    """Attention weights [tokens, tokens] with their numbers: a row for who asks, a column for who answers."""
    axis.imshow(weights, cmap="Greys", vmin=0, vmax=1.5)
    for row in range(len(weights)):
        for column in range(len(weights)):
            axis.text(column, row, f"{weights[row, column]:.2f}", ha="center", va="center")
    axis.set(xticks=range(len(names)), xticklabels=names, yticks=range(len(names)), yticklabels=names, title=title,
             xlabel="who answers", ylabel="who asks")
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)


def moves(axis, before, after, names: Sequence[str], title: str = "") -> None:
    """Points of the plane [n, 2], and an arrow from each to where it has moved."""
    for start, end, name in zip(before, after, names, strict=True):
        axis.annotate("", end.tolist(), start.tolist(), arrowprops={"arrowstyle": "->", "lw": 1.8, "color": "#555555"})
        axis.scatter(*start, s=200, color="white", edgecolors="black", zorder=3)
        axis.text(*start, name, ha="center", va="center", zorder=4)
    axis.scatter(*after.T, s=30, color="black", zorder=2)
    axis.axhline(0, color="#dddddd", lw=1, zorder=0)
    axis.axvline(0, color="#dddddd", lw=1, zorder=0)
    axis.set(title=title, xticks=[], yticks=[])
    axis.margins(0.15)
    axis.spines[:].set_visible(False)


def two_branches(axis, image_way: Mapping, caption_way: Mapping, region_tokens, word_tokens) -> None:
    """TGDT as boxes and arrows. Both ways: {name of a step: shape of what it makes}, five steps each."""
    def arrow(start, end, colour=NEUTRAL, width=1.4, style="->"):
        axis.annotate("", end, start, arrowprops={"arrowstyle": style, "color": colour, "lw": width})

    places = (0, 1.25, 2.5, 3.75, 6.5)
    for y, colour, way in ((2.6, IMAGE, image_way), (0.4, TEXT, caption_way)):
        for x, (name, shape) in zip(places, way.items(), strict=True):
            axis.add_patch(Rectangle((x - 0.5, y - 0.42), 1, 0.84, facecolor="white", edgecolor=colour, lw=1.5))
            axis.text(x, y + 0.1, name, ha="center", va="center", fontsize=9)
            axis.text(x, y - 0.28, str(list(shape)), ha="center", va="center", fontsize=9, color=colour)
        for left, right in zip(places[:-1], places[1:], strict=True):
            arrow((left + 0.5, y), (right - 0.5, y))
        axis.plot([7, 8], [y, y], color=NEUTRAL, lw=1.4)
    for name, y, start, shape in (("region", 1.95, 2.18, region_tokens), ("word", 1.05, 0.82, word_tokens)):
        arrow((4.25, start), (4.75, y), TRUTH, 2.4)
        axis.text(4.8, y, f"{name} tokens {list(shape)}", va="center", fontsize=9)
    axis.text(4.8, 1.5, "fine: words take regions", va="center", fontsize=9, weight="bold")
    arrow((8, 0.4), (8, 2.6), "black", style="<->")
    axis.text(8.1, 1.5, "coarse: one\ndot product", va="center", fontsize=9, weight="bold")
    axis.set(xlim=(-0.6, 9.3), ylim=(-0.1, 3.1))
    axis.axis("off")
