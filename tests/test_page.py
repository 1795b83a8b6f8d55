"""What the page computes and writes: queries, lists, lights, HTML. Gradio is not needed, tests/browser.py uses it."""
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import draw_nothing
from PIL import Image

import losses
import retrieve
import train
from harness import flags, markup, queries
from retrieve import Embeddings
from sources import scenes
from sources.files import BadInput

OPTIONS = flags.search_parser().parse_args(["page", "run", "--device", "cpu"])


def random(kind: str, lengths: list[int], seed: int) -> Embeddings:
    """Items of 8 numbers, with so many tokens."""
    chance = torch.Generator().manual_seed(seed)
    unit = torch.nn.functional.normalize
    return Embeddings(kind, unit(torch.randn(len(lengths), 8, generator=chance), dim=1),
                      unit(torch.randn(sum(lengths), 8, generator=chance), dim=1), None,
                      retrieve.offsets_of(torch.tensor(lengths)))


@pytest.fixture(scope="module")
def side(tmp_path_factory) -> queries.Side:
    """A run of tgdt after one epoch, on 12 scenes."""
    run = tmp_path_factory.mktemp("page") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "SPLITS", {"train": 16, "val": 12, "test": 12})
        draw_nothing(patch)
        flags = ["--epochs", "1", "--batch-size", "16", "--dim", "8", "--region-width", "8", "--feedforward", "8"]
        assert train.main([*flags, "--text-layers", "1", "--device", "cpu", "--quiet", "--out", str(run)]) == 0
        yield queries.open_side(run, OPTIONS)


def test_both_lists_hold_the_same_and_say_what_moved():
    query, corpus = random("text", [5], 0), random("image", [4] * 30, 1)
    first, again = queries.both_lists(query, corpus, 10, 3.0, "mean")
    assert {each.row for each in first} == {each.row for each in again} and len(first) == 10
    for found in (first, again):
        assert [each.score for each in found] == sorted((each.score for each in found), reverse=True)
    place = {each.row: at for at, each in enumerate(first)}
    assert [each.moved for each in again] == [place[each.row] - at for at, each in enumerate(again)]
    assert any(each.moved for each in again) and sum(each.moved for each in again) == 0
    unmoved = queries.both_lists(query, corpus, 10, 0.0, "mean")[1]
    assert [each.row for each in unmoved] == [each.row for each in first]


def test_the_similarities_are_those_of_the_local_similarity():
    images, texts = random("image", [4, 6, 3], 2), random("text", [5, 7], 3)
    local = losses.local_similarity(*images.padded(), *texts.padded(), "sum")
    for image in range(3):
        for caption in range(2):
            similar = queries.similarities(images, image, texts, caption)
            assert similar.shape == ((5, 7)[caption], (4, 6, 3)[image])
            assert similar.max(1).sum() == pytest.approx(local[image, caption].item(), abs=1e-5)


def test_the_region_that_a_word_takes_is_the_brightest():
    picture = Image.new("RGB", (100, 50), (200, 200, 200))
    boxes = np.array([[0, 0, 0.5, 1], [0.5, 0, 1, 0.5], [0.9, 0.5, 2, 1]])
    pixels = np.asarray(queries.lit(picture, boxes, np.array([-0.2, 0.9, 0.6])))
    assert pixels[12, 75].tolist() == [200] * 3 and pixels[0, 75].tolist() == [255] * 3  # the region, its frame
    assert pixels[25, 25].tolist() == [int(200 * queries.DARK)] * 3                      # the least similar one
    assert int(200 * queries.DARK) < pixels[40, 95, 0] < 200
    assert np.asarray(queries.lit(picture, boxes, np.zeros(3))).shape == (50, 100, 3)    # all alike


def test_a_caption_of_the_split_knows_its_picture(side):
    split = side.run.split
    query = queries.ask_caption(side, f"  {split.captions[7]} ")
    assert int(split.image_of[7]) in query.right and " ".join(query.pieces) == split.captions[7].lower()
    assert torch.allclose(query.encoded.globals[0], side.texts.globals[7], atol=1e-5)
    assert queries.ask_caption(side, "a dragon").right == set()
    for text, said in (("", "empty"), (" \n", "empty"), ("red " * 6000, "23,999"), ("\u200b", "no word")):
        with pytest.raises(BadInput, match=said):
            queries.ask_caption(side, text)
    queries.ask_caption(side, "red \ud800")  # half a character


def test_a_picture_is_named_numbered_or_given(side, tmp_path):
    for name in ("scene 3", "3", " 3 "):
        query = queries.ask_picture(side, name)
        assert query.row == 3 and query.right == set(np.flatnonzero(side.run.split.image_of == 3).tolist())
        assert torch.allclose(query.encoded.globals[0], side.images.globals[3], atol=1e-5)
    for name in ("", "12", "-1", "²", __file__):
        with pytest.raises(BadInput, match="a row from 0 to 11"):
            queries.ask_picture(side, name)
    side.run.split.picture(3).save(tmp_path / "mine.png")
    mine = queries.ask_upload(side, str(tmp_path / "mine.png"))
    assert torch.allclose(mine.encoded.globals[0], side.images.globals[3], atol=1e-4) and mine.right == set()
    (tmp_path / "bad.png").write_text("no picture")
    with pytest.raises(BadInput, match="^bad.png: expected a picture"):
        queries.ask_upload(side, str(tmp_path / "bad.png"))


def test_what_the_page_says(side):
    query = queries.ask_caption(side, side.run.split.captions[0])
    html = markup.draw(side, query, None, 5, 10.0)
    assert html.count("<li") == 10 and html.count("<img") == 10 and "Click on a word" in html
    click = queries.Click(-1, 1, query.pieces[1])
    lit = markup.draw(side, query, click, 5, 10.0)
    assert lit.count('aria-pressed="true"') == 1 and "white frame" in lit and lit.count("similarity") == 10
    for other in (click._replace(piece="dragon"), click._replace(word=99), click._replace(caption=3)):
        assert markup.draw(side, query, other, 5, 10.0) == html  # a word that is not here
    picture = queries.ask_picture(side, "3")
    word = queries.pieces_of(side, side.run.split.captions[4])[0]
    html = markup.draw(side, picture, queries.Click(4, 0, word), 50, 1.0)
    assert html.count("<img") == 1 and "white frame" in html
    assert "<b>" not in markup.problem("<b>") and "12 pictures" in markup.heading(side)


def test_an_index_is_opened_and_a_changed_one_is_refused(side, tmp_path, monkeypatch):
    out = tmp_path / "index"
    assert retrieve.main(["index", side.name, "--out", str(out), "--device", "cpu"]) == 0
    opened = queries.open_side(out, OPTIONS)
    caption = side.run.split.captions[0]
    both = [queries.both_lists(queries.ask_caption(each, caption).encoded, each.images, 5, 0.0, "mean")[0]
            for each in (side, opened)]
    assert [each.row for each in both[0]] == [each.row for each in both[1]]
    monkeypatch.setattr(scenes, "SPLITS", {"train": 16, "val": 12, "test": 13})
    with pytest.raises(BadInput, match="make the index again"):
        queries.open_side(out, OPTIONS)
    with pytest.raises(BadInput, match="on disk"):
        queries.open_side("qdrant://127.0.0.1:1/name", OPTIONS)


def test_an_index_of_pictures_takes_captions(side, tmp_path):
    (tmp_path / "mine").mkdir()
    for row in range(4):
        side.run.split.picture(row).save(tmp_path / "mine" / f"{row}.png")
    out = tmp_path / "index"
    assert retrieve.main(["index", side.name, "--images", str(tmp_path / "mine"), "--out", str(out)]) == 0
    opened = queries.open_side(out, OPTIONS)
    query = queries.ask_caption(opened, "a red star")
    html = markup.draw(opened, query, queries.Click(-1, 1, "red"), 100, 10.0)
    assert html.count("<img") == 8 and "white frame" in html and "captions" not in markup.heading(opened)
    elsewhere = Namespace(**vars(OPTIONS) | {"cache": tmp_path / "elsewhere"})
    (tmp_path / "index.cache").rename(elsewhere.cache)
    queries.open_side(out, elsewhere)
    assert not (tmp_path / "index.cache").exists()
    (tmp_path / "mine" / "3.png").unlink()
    with pytest.raises(BadInput, match="make the index again"):
        queries.open_side(out, OPTIONS)


def test_without_gradio_one_line_says_how_to_install_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert retrieve.main(["page", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert 'pip install "gradio>=' in said and said.count("\n") == 1
