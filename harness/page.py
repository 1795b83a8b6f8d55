"""The page: search in a browser, with the shortlist beside the re-ranked list. A word lights up the regions it matches.

    python retrieve.py page RUN_OR_INDEX [SECOND_RUN_OR_INDEX]

What is shown is computed in `harness/queries.py` and written as HTML in `harness/markup.py`. Gradio serves it. It is
optional, and imported only where it is used.
"""
import argparse
import os
import random
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from urllib.request import getproxies

from harness import markup, queries
from harness.queries import Click, Query, Side
from sources.files import BadInput

OLDEST = (6, 31)  # the oldest Gradio that will do
LARGEST = 500     # K
PRIVATE = {"api_visibility": "private"}  # clicks are not an API for other programs
SCRIPT = """element.addEventListener('click', event => {
  const word = event.target.closest('[data-word]'), picture = event.target.closest('[data-picture]')
  if (word) trigger('click', {...word.dataset})
  if (picture) trigger('select', {...picture.dataset})
})"""


def build(gr: ModuleType, sides: list[Side]):
    """The page, as a gradio.Blocks: what is on it, and what happens after a click."""
    captions, names = sides[0].run.split.captions, sides[0].run.split.image_names

    def show(asked: list[Query] | None, click: Click | None, k: int, *weights: float) -> list:
        if asked is None:
            return [gr.skip()] * len(sides)
        return [draw(*each, click, k, weight) for *each, weight in zip(sides, asked, weights, strict=True)]

    def ask(how: Callable[[Side, str], Query], what: str | None, k: int, *weights: float) -> list:
        """Ask all sides. An error is shown above the answers, which stay."""
        try:
            asked = [how(side, what or "") for side in sides]
        except BadInput as error:
            return [gr.skip(), gr.skip(), markup.problem(str(error)), *[gr.skip()] * len(sides)]
        return [asked, None, "", *show(asked, None, k, *weights)]

    def click_word(event: gr.EventData, asked: list[Query], k: int, *weights: float) -> list:
        click = Click(int(event.caption), int(event.word), event.piece)
        return [click, *show(asked, click, k, *weights)]

    def click_picture(event: gr.EventData) -> str:
        return event.picture

    with gr.Blocks(title=markup.TITLE, analytics_enabled=False, fill_width=True, delete_cache=(600, 600)) as page:
        gr.HTML(markup.ABOUT)
        with gr.Row():
            by_caption = caption_box(gr, captions)
            by_picture = picture_box(gr, sides)
            options = sliders(gr, sides)
        message, asked, click = gr.HTML(elem_id="message"), gr.State(), gr.State()
        with gr.Row():
            shown = [gr.HTML(f'<div class="page">{markup.heading(side)}</div>', js_on_load=SCRIPT, min_width=300,
                             apply_default_css=False, elem_classes="side") for side in sides]

        def answer(how: Callable[[Side, str], Query], what: gr.components.Component) -> dict:
            return {"fn": partial(ask, how), "inputs": [what, *options], "outputs": [asked, click, message, *shown],
                    **PRIVATE}

        find_pictures = answer(queries.ask_caption, by_caption.box)
        find_captions = answer(queries.ask_picture, by_picture.box)
        start = [page.load] if captions else []
        gr.on([*start, by_caption.box.submit, by_caption.find.click], **find_pictures)
        gr.on([by_picture.box.submit, by_picture.find.click], **find_captions)
        by_picture.upload.upload(**answer(queries.ask_upload, by_picture.upload))
        by_caption.lot.click(lambda: random.choice(captions), None, by_caption.box, **PRIVATE).then(**find_pictures)
        by_picture.lot.click(lambda: random.choice(names), None, by_picture.box, **PRIVATE).then(**find_captions)
        for html in shown:
            html.click(click_word, [asked, *options], [click, *shown], **PRIVATE)
            html.select(click_picture, None, by_picture.box, **PRIVATE).then(**find_captions)
        for slider in options:
            slider.change(show, [asked, click, *options], shown, trigger_mode="always_last", **PRIVATE)
    return page


def draw(side: Side, query: Query, click: Click | None, k: int, weight: float) -> str:
    try:
        return markup.draw(side, query, click, int(k), weight)  # 2.5 can be typed beside the slider
    except BadInput as error:  # a picture has gone since the page was opened
        return markup.problem(str(error))


def caption_box(gr: ModuleType, captions: list[str]) -> SimpleNamespace:
    """Where a caption is written. It starts with the first caption of the split."""
    with gr.Column(scale=3):
        box = gr.Textbox(captions[0] if captions else "", label="A caption finds pictures", elem_id="caption")
        with gr.Row():
            find = gr.Button("Find pictures", variant="primary", size="sm", min_width=90)
            lot = gr.Button("Random caption", size="sm", min_width=90, visible=bool(captions))
    return SimpleNamespace(box=box, find=find, lot=lot)


def picture_box(gr: ModuleType, sides: list[Side]) -> SimpleNamespace:
    """Where a picture is named or uploaded. Hidden if there are no captions to find."""
    names = sides[0].run.split.image_names
    uploads = all(side.run.seen["regions"]["kind"] != "files" for side in sides)
    with gr.Column(scale=3, visible=all(side.run.split.captions for side in sides)):
        box = gr.Textbox(label="A picture finds captions", elem_id="picture",
                         placeholder=f"a name, as {names[0]}, or a row from 0 to {len(names) - 1}")
        with gr.Row():
            find = gr.Button("Find captions", variant="primary", size="sm", min_width=90)
            lot = gr.Button("Random picture", size="sm", min_width=90)
            upload = gr.UploadButton("Upload a picture", size="sm", min_width=90, elem_id="upload", visible=uploads)
    return SimpleNamespace(box=box, find=find, lot=lot, upload=upload)


def sliders(gr: ModuleType, sides: list[Side]) -> list:
    """K, and for each side the weight of the local similarity. They start from the settings of the runs."""
    most = min(LARGEST, max(len(part) for side in sides for part in (side.images, side.texts)))
    with gr.Column(scale=3):
        out = [gr.Slider(1, most, min(most, sides[0].run.settings.search.images_shortlist), step=1, elem_id="k",
                         label="K, the length of the shortlist")]
        for side in sides:
            usual = side.run.settings.cmc.local_weight
            label = f"Weight, {side.name}" if len(sides) > 1 else "Weight of the local similarity"
            out.append(gr.Slider(0, max(20, 2 * usual), usual, step=0.5, label=label, visible=side.fine,
                                 elem_classes="weight"))
    return out


def run_page(args: argparse.Namespace) -> int:
    """Open the page and wait for Ctrl-C. Raises BadInput if Gradio, the address, a run or an index is not there."""
    try:
        import gradio as gr
    except ImportError as error:
        raise BadInput("the page needs Gradio, which is not installed: "
                       f'pip install "gradio>={OLDEST[0]}.{OLDEST[1]}"') from error
    if tuple(map(int, gr.__version__.split(".")[:2])) < OLDEST:
        raise BadInput(f"the page needs Gradio {OLDEST[0]}.{OLDEST[1]} or newer, found {gr.__version__}: "
                       "pip install --upgrade gradio")
    check_address(args.host, args.port)
    sides = [queries.open_side(place, args) for place in (args.run, args.second) if place]
    page = build(gr, sides)
    style = Path(__file__).with_name("page.css")
    theme = gr.themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["monospace"])
    theme.set(layout_gap="10px")
    hosts = [*getproxies().get("no", "").split(","), "localhost", args.host]
    os.environ["no_proxy"] = ",".join(filter(None, hosts))  # Gradio asks the page itself whether it is there
    try:
        page.launch(
            server_name=args.host, server_port=args.port, prevent_thread_lock=True, quiet=True, share=False,
            ssr_mode=False, mcp_server=False, pwa=False, run_history=False, enable_monitoring=False, inline=False,
            footer_links=[], max_file_size="50mb", css_paths=style, theme=theme)
        print(f"The page is at {page.local_url} (Ctrl-C ends it)", flush=True)
        while True:
            time.sleep(1)
    finally:
        page.close(verbose=False)


def check_address(host: str, port: int | None) -> None:
    """Raises BadInput if no page can be opened there. It takes a while to encode everything, so this comes first."""
    try:
        socket.create_server((host, port or 0)).close()
    except (OSError, UnicodeError) as error:
        where = f"--host {host}" + (f" --port {port}" if port else "")
        raise BadInput(f"{where}: the page cannot be opened there ({error}): give another one") from error
