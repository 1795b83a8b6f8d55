"""The HTML of the page: a query, its words as buttons, and the two lists of answers. `page.css` is its style."""
import base64
import io
from html import escape

import numpy as np

import data
from harness import queries
from harness.queries import Click, Found, Query, Side

SHOWN = 10   # answers of a list
WIDTH = 256  # pixels of a picture, and of its height, at most

TITLE = "Search pictures by a caption, captions by a picture"
ABOUT = f"""<div class="page"><h1>{TITLE}</h1><p>Coarse vectors choose K candidates from the whole collection. Then
tokens, one for each word and one for each region, sort these K again. Click on a word to see which regions it matches.
Click on a picture to find captions for it.</p></div>"""
NO_TOKENS = "This model has no tokens: the shortlist is not sorted again, and a word has no regions to light up."
SHORTLIST = "Score: the dot product of the coarse vectors."
RERANKED = "Score: global + weight × local. ▲ and ▼: places moved up or down."


def heading(side: Side) -> str:
    """What stands above one side."""
    settings, split = side.run.settings, side.run.split
    captions = f" and {len(split.captions):,} captions" if split.captions else ""
    what = f"{settings.run.model}: {len(split.image_names):,} pictures{captions}, {settings.run.dataset} {split.name}"
    return f"<h2>{escape(side.name)}</h2><p>{escape(what)}</p>"


def problem(text: str) -> str:
    return f'<div class="page"><p class="problem" role="alert">{escape(text)}</p></div>'


def image(split: data.Split, row: int, similar: np.ndarray | None, kind: str = "found") -> str:
    """A picture, lit up by the similarities of its regions [R], if there are some and if its boxes are known."""
    name, picture = escape(split.image_names[row]), split.picture(row)
    if picture is None:
        return f'<span class="none">{name}</span>'
    scale = WIDTH / max(picture.size)
    picture = picture.resize([max(1, round(side * scale)) for side in picture.size])
    _, boxes, mask = split.features.read([row])
    if similar is not None and boxes.any() and mask.sum() == len(similar):
        picture = queries.lit(picture, boxes[0][mask[0]], similar)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=90)
    held = base64.b64encode(file.getvalue()).decode()
    return f'<img class="{kind}" alt="{name}" src="data:image/jpeg;base64,{held}">'


def words(pieces: list[str], caption: int, click: Click | None) -> str:
    """Word pieces as buttons. caption: its row, -1 for the query."""
    pressed = click.word if click and click.caption == caption else -1
    return "".join(
        f'{"" if piece.startswith("##") else " "}<button class="word" data-caption="{caption}" data-word="{at}" '
        f'data-piece="{escape(piece)}" aria-pressed="{str(at == pressed).lower()}">{escape(piece.removeprefix("##"))}'
        "</button>" for at, piece in enumerate(pieces))


def answers(side: Side, query: Query, found: list[Found], click: Click | None) -> str:
    """The first answers of a list. The right ones have a tick and a green frame."""
    lines, split = [], side.run.split
    for place, (row, score, moved) in enumerate(found[:SHOWN], 1):
        move = f'<span class="{"up" if moved > 0 else "down"}">{"▲▼"[moved < 0]} {abs(moved)}</span>' if moved else ""
        said = f'<b>{place}.</b> {"✓ " * (row in query.right)}{score:.3f} {move}'
        if query.is_caption:
            similar = queries.similarities(side.images, row, query.encoded, 0)[click.word] if click else None
            said += f"<br>similarity {similar.max():.2f}" if click else ""
            name = escape(split.image_names[row])
            inside = (f'<button data-picture="{name}" title="Find captions for {name}">'
                      f"{image(split, row, similar)}</button><small>{said}</small>")
        else:
            text = split.captions[row]
            inside = f"<small>{said}</small> " + (
                words(queries.pieces_of(side, text), row, click) if side.fine else escape(text))
        lines.append(f'<li class="{"right" * (row in query.right)}">{inside}</li>')
    return f'<ol class="{"pictures" if query.is_caption else "captions"}">{"".join(lines)}</ol>'


def asked(side: Side, query: Query, click: Click | None) -> str:
    """The query: the words of a caption, or a picture. One line says what a word that was clicked has done."""
    if query.is_caption:
        shown = f'<p class="query">{words(query.pieces, -1, click)}</p>' if side.fine else ""
        notes = ["[UNK] is a word that the model does not know."] if "[UNK]" in query.pieces else []
        if len(query.pieces) + 2 == side.run.settings.text.longest:
            notes.append(f"The model reads {len(query.pieces)} word pieces of a caption, and no more.")
    else:
        similar = queries.similarities(query.encoded, 0, side.texts, click.caption)[click.word] if click else None
        shown, notes = image(query.split, query.row, similar, "query"), []
    if not side.fine:
        notes.append(NO_TOKENS)
    elif click:
        _, boxes, _ = (side.run.split if query.is_caption else query.split).features.read([query.row])
        notes.append(f"The brighter a region, the more similar it is to “{click.piece}”. The most similar one has a "
                     "white frame." if boxes.any() else "This dataset has no boxes, so no region can light up.")
    else:
        which = "word" if query.is_caption else "word of a caption"
        notes.append(f"Click on a {which} to light up the regions that it matches.")
    return f"{shown}<p>{escape(' '.join(notes))}</p>"


def verdict(query: Query, first: list[Found], again: list[Found], fine: bool) -> str:
    """Where the right answer stands, if it is known."""
    if not query.right:
        return ""
    what = "picture" if query.is_caption else "caption"
    places = [[at for at, each in enumerate(found, 1) if each.row in query.right] for found in (first, again)]
    if not places[0]:
        return f"<p>✓ No right {what} is among these K, and re-ranking cannot bring it back.</p>"
    after = f", place <b>{places[1][0]}</b> after re-ranking" if fine else ""
    return f"<p>✓ The right {what}: place <b>{places[0][0]}</b> of the shortlist{after}.</p>"


def draw(side: Side, query: Query, click: Click | None, k: int, weight: float) -> str:
    """All that the page shows of one side."""
    click = click if click and queries.fits(side, query, click) else None
    corpus = side.images if query.is_caption else side.texts
    first, again = queries.both_lists(query.encoded, corpus, k, weight, side.run.settings.cmc.reduction)
    lists = f"<div><h3>1. Shortlist: the best of {len(first)}</h3><p>{SHORTLIST}</p>"\
            f"{answers(side, query, first, click)}</div>"
    if side.fine:
        lists += f"<div><h3>2. The same {len(first)}, re-ranked</h3><p>{RERANKED}</p>"\
                 f"{answers(side, query, again, click)}</div>"
    return f'<div class="page">{heading(side)}{asked(side, query, click)}{verdict(query, first, again, side.fine)}'\
           f'<div class="lists">{lists}</div></div>'
