"""The index on disk: it holds what was encoded, survives kills, and notices changes."""
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import unit

from harness import index
from retrieve import Embeddings, search
from sources.files import BadInput


@pytest.fixture
def sides() -> dict[str, Embeddings]:
    mask = {"image": torch.arange(4) < torch.tensor([[4], [1], [3], [2], [4]]),
            "text": torch.arange(3) < torch.tensor([[1], [3], [2]] * 3)}
    return {kind: Embeddings(kind, unit(len(m), 8, seed=0), unit(*m.shape, 8, seed=1), m) for kind, m in mask.items()}


IDENTITY = {"checkpoint": "abc", "run": "runs/x", "split": "test", "dtype": "float32", "dim": 8, "tokens": True}


def names_of(counts: dict) -> dict:
    return {"images": [f"image {row}" for row in range(counts["image"])],
            "captions": [f"caption {row}" for row in range(counts["text"])]}


def build(out: Path, sides: dict, calls: list | None = None, **changes: object) -> dict:
    def encode(kind: str, items: np.ndarray) -> Embeddings:
        if calls is not None:
            calls.append((kind, items.tolist()))
        return sides[kind][torch.from_numpy(items)]

    counts = {kind: len(side) for kind, side in sides.items()}
    return index.build(out, IDENTITY | changes, counts, encode, names_of(counts))


@pytest.mark.parametrize("block", [2, 1024])
@pytest.mark.parametrize("dtype", list(index.DTYPES))
def test_an_index_holds_what_was_encoded(sides, tmp_path, monkeypatch, block, dtype):
    monkeypatch.setattr(index, "BLOCK", block)
    build(tmp_path / "index", sides, dtype=dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["index"]
    opened = index.load(tmp_path / "index")
    assert opened.names["images"][4] == "image 4" and opened.manifest["checkpoint"] == "abc"
    for ours, side in ((opened.images, sides["image"]), (opened.texts, sides["text"])):
        assert torch.equal(ours.globals, side.globals)
        assert torch.equal(ours.tokens, side.tokens.to(index.DTYPES[dtype]))
        assert torch.equal(ours.offsets, side.offsets)
    half = {kind: side.to(dtype=index.DTYPES[dtype]) for kind, side in sides.items()}
    for a, b, c, d in ((opened.texts, opened.images, half["text"], half["image"]),
                       (opened.images, opened.texts, half["image"], half["text"])):
        assert torch.allclose(search(a, b, 4)[1], search(c, d, 4)[1], atol=1e-4)


def test_a_model_without_fine_tokens(sides, tmp_path):
    coarse = {kind: Embeddings(kind, side.globals) for kind, side in sides.items()}
    build(tmp_path / "index", coarse, tokens=False)
    opened = index.load(tmp_path / "index")
    assert opened.images.tokens is None and torch.equal(opened.texts.globals, sides["text"].globals)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", [0, 1, 2, 3, 5, 7])
def test_a_kill_leaves_the_old_index_and_the_next_attempt_goes_on(sides, tmp_path, monkeypatch, after):
    monkeypatch.setattr(index, "BLOCK", 2)
    out, calls = tmp_path / "index", []
    old = {kind: Embeddings(kind, -side.globals, side.tokens, None, side.offsets) for kind, side in sides.items()}
    build(out, old, checkpoint="old")

    class Failing(dict):
        def __getitem__(self, kind):
            if len(calls) > after:
                raise Killed
            return super().__getitem__(kind)

    with pytest.raises(Killed):
        build(out, Failing(sides), calls)
    assert index.load(out).manifest["checkpoint"] == "old"
    assert torch.equal(index.load(out).images.globals, -sides["image"].globals)
    growing = out.with_name(".index.index-in-progress")
    growing.mkdir(exist_ok=True)
    with open(growing / "image.tokens", "ab") as file:
        file.write(b"half a block")  # written, but not yet safe when the kill came
    again = []
    build(out, sides, again)
    assert again == every_call(sides)[after:]
    opened = index.load(out)
    assert torch.equal(opened.images.tokens, sides["image"].tokens)
    assert torch.equal(opened.texts.globals, sides["text"].globals)
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_a_kill_at_the_very_end_costs_no_encoding(sides, tmp_path, monkeypatch):
    out, calls = tmp_path / "index", []
    build(out, sides, checkpoint="old")
    rename = index.os.replace

    def killed(a, b):
        if Path(b) == out:
            raise Killed
        rename(a, b)

    monkeypatch.setattr(index.os, "replace", killed)
    with pytest.raises(Killed):
        build(out, sides)
    monkeypatch.undo()
    assert not out.exists()
    build(out, sides, calls)
    assert calls == [] and index.load(out).manifest["checkpoint"] == "abc"
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def every_call(sides: dict) -> list:
    return [(kind, list(range(start, min(start + 2, len(sides[kind]))))) for kind in index.KINDS
            for start in range(0, len(sides[kind]), 2)]


def test_what_another_checkpoint_began_is_not_gone_on_with(sides, tmp_path, monkeypatch):
    monkeypatch.setattr(index, "BLOCK", 2)
    out, calls = tmp_path / "index", []

    def encode(kind: str, items: np.ndarray) -> Embeddings:
        if items[0] == 2:
            raise Killed
        return sides[kind][torch.from_numpy(items)]

    with pytest.raises(Killed):
        index.build(out, IDENTITY, {"image": 5, "text": 9}, encode, names_of({"image": 5, "text": 9}))
    build(out, sides, calls, checkpoint="other")
    assert calls == every_call(sides)


def test_damage_is_named(sides, tmp_path):
    out = tmp_path / "index"
    build(out, sides)
    with open(out / "text.tokens", "ab") as file:
        file.write(b"more")
    with pytest.raises(BadInput, match="text.tokens.*expected"):
        index.load(out)
    (out / "text.tokens").unlink()
    with pytest.raises(BadInput, match="text.tokens.*found 0"):
        index.load(out)
    (out / "manifest.json").write_text("{}")
    with pytest.raises(BadInput, match="manifest.json"):
        index.load(out)
    folder = tmp_path / "other"
    folder.mkdir()
    with pytest.raises(BadInput, match="other.*is not an index"):
        build(folder, sides)


def test_an_index_may_be_larger_than_the_memory(tmp_path):
    size = 2 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with open(tmp_path / "image.tokens", "wb") as file:
        file.truncate(size)  # it takes no room on the disk
    assert index.mapped(tmp_path / "image.tokens", torch.float16, size // 2)[-1] == 0


def test_an_unfinished_index_that_lost_bytes_is_refused(sides, tmp_path, monkeypatch):
    """Zeros in their place would get a checksum like any other numbers."""
    monkeypatch.setattr(index, "BLOCK", 2)

    def killed(kind: str, items: np.ndarray) -> Embeddings:
        if items[0] > 0:
            raise KeyboardInterrupt
        return sides[kind][torch.from_numpy(items)]

    counts = {kind: len(side) for kind, side in sides.items()}
    with pytest.raises(KeyboardInterrupt):
        index.build(tmp_path / "index", IDENTITY, counts, killed, names_of(counts))
    (tmp_path / ".index.index-in-progress" / "image.globals").write_bytes(b"")
    with pytest.raises(BadInput, match="image.globals: found 0 bytes, expected 64"):
        build(tmp_path / "index", sides)


def test_what_is_not_ours_is_never_touched(sides, tmp_path):
    """Folders beside the index with telling names, and a second program that writes the same index."""
    beside = ("index.old", "index.partial", "index.cache")
    for name in beside:
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("mine")
    out = tmp_path / "index"
    build(out, sides)
    build(out, sides, checkpoint="other")
    assert all((tmp_path / name / "mine.txt").read_text() == "mine" for name in beside)

    def encode(kind: str, items: np.ndarray) -> Embeddings:
        with pytest.raises(BadInput, match="another program is writing"):
            build(out, sides)
        return sides[kind][torch.from_numpy(items)]

    counts = {kind: len(side) for kind, side in sides.items()}
    index.build(out, IDENTITY, counts, encode, names_of(counts))


def test_an_index_is_one_program_s_until_it_is_whole(sides, tmp_path, monkeypatch):
    """Also after its folder has got its last name, when another program could begin the next one."""
    def replace(growing: Path, out: Path) -> None:
        put_in_place(growing, out)
        with pytest.raises(BadInput, match="another program is writing"):
            build(out, sides)

    put_in_place = index.replace
    monkeypatch.setattr(index, "replace", replace)
    build(tmp_path / "index", sides)
    assert [path.name for path in tmp_path.iterdir()] == ["index"]  # no lock is left


@pytest.mark.parametrize("garbage", ["{", "[]", '{"identity": 3}', "null"])
def test_garbage_where_progress_was_kept_starts_anew(sides, tmp_path, garbage):
    growing = tmp_path / ".index.index-in-progress"
    growing.mkdir()
    (growing / "progress.json").write_text(garbage)
    (growing / "image.tokens").write_bytes(b"garbage")
    build(tmp_path / "index", sides)
    assert torch.equal(index.load(tmp_path / "index").images.tokens, sides["image"].tokens)


def test_arrays_that_were_swapped_or_overwritten_are_noticed(sides, tmp_path):
    out = tmp_path / "index"
    build(out, sides)
    content = bytearray((out / "image.tokens").read_bytes())
    content[3] ^= 1
    (out / "image.tokens").write_bytes(content)
    with pytest.raises(BadInput, match="image.tokens: missing, or changed since"):
        index.load(out)
    build(out, sides)
    names = json.loads((out / "names.json").read_text())
    (out / "names.json").write_text(json.dumps(names | {"images": ["a"]}))
    with pytest.raises(BadInput, match="names.json: missing, or changed"):
        index.load(out)


@pytest.mark.parametrize("left", [["manifest.json", "text.tokens"], ["text.tokens"]])
def test_a_kill_while_the_old_index_is_removed_stops_no_later_one(sides, tmp_path, left):
    build(tmp_path / "index", sides)
    old = tmp_path / ".index.index-replaced"
    old.mkdir()
    for name in left:
        (old / name).write_text("{}")
    build(tmp_path / "index", sides, checkpoint="new")
    assert index.load(tmp_path / "index").manifest["checkpoint"] == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


@pytest.mark.parametrize("name", ["names.json", "manifest.json"])
@pytest.mark.parametrize("garbage", ["{", "[]", "3", "null"])
def test_garbage_in_the_folder_is_named(sides, tmp_path, name, garbage):
    build(tmp_path / "index", sides)
    (tmp_path / "index" / name).write_text(garbage)
    with pytest.raises(BadInput, match=name):
        index.load(tmp_path / "index")


@pytest.mark.parametrize("change", [{"counts": {}}, {"counts": {"image": -1, "text": 9}}, {"run": 3}, {"dim": "8"},
                                    {"counts": {"image": 5.0, "text": 9}}, {"dtype": "int8"}, {"dtype": []},
                                    {"tokens": 1}, {"checksums": []}, {"checksums": {}}, {"checksums": {"../a": ""}}],
                         ids=str)
def test_a_manifest_of_another_shape_is_reported(sides, tmp_path, change):
    build(tmp_path / "index", sides)
    path = tmp_path / "index" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(BadInput, match="manifest.json.*make the index again"):
        index.load(tmp_path / "index")


def test_a_folder_of_something_else_is_left_alone(sides, tmp_path):
    """A web app has a manifest.json, too."""
    page = tmp_path / "app"
    page.mkdir()
    (page / "manifest.json").write_text("{}")
    (page / "index.html").write_text("mine")
    with pytest.raises(BadInput, match="app: is there already, and is not an index .it has no names.json"):
        build(page, sides)
    assert (page / "index.html").read_text() == "mine"
    build(tmp_path / "index", sides)
    (tmp_path / "index" / "found.png").write_text("mine")
    with pytest.raises(BadInput, match="also holds found.png"):
        build(tmp_path / "index", sides, checkpoint="new")
    assert (tmp_path / "index" / "found.png").read_text() == "mine"


def test_an_index_is_written_where_a_link_leads_to(sides, tmp_path):
    """A link may point to a larger disk, also to a folder that is not there yet."""
    (tmp_path / "link").symlink_to(tmp_path / "large")
    for _ in range(2):
        build(tmp_path / "link", sides)
        assert (tmp_path / "link").is_symlink() and index.load(tmp_path / "large").manifest["dim"] == 8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large", "link"]
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(BadInput, match="loop"):
        build(tmp_path / "loop", sides)
