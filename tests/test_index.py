"""index.py and the search command line: an index gives what the run gives, and survives kills and changes."""
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import index
import retrieve
import train
from files import BadInput
from twostage import Embeddings, cumulated, search


def unit(*shape: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.fixture
def sides() -> dict[str, Embeddings]:
    mask = {"image": torch.arange(4) < torch.tensor([[4], [1], [3], [2], [4]]),
            "text": torch.arange(3) < torch.tensor([[1], [3], [2]] * 3)}
    return {kind: Embeddings(kind, unit(len(m), 8, seed=0), unit(*m.shape, 8, seed=1), m) for kind, m in mask.items()}


IDENTITY = {"checkpoint": "abc", "run": "runs/x", "split": "test", "dtype": "float32", "dim": 8, "tokens": True}


def build(out: Path, sides: dict, calls: list | None = None, **changes: object) -> dict:
    def encode(kind: str, items: np.ndarray) -> Embeddings:
        if calls is not None:
            calls.append((kind, items.tolist()))
        return sides[kind][torch.from_numpy(items)]

    counts = {kind: len(side) for kind, side in sides.items()}
    return index.build(out, IDENTITY | changes, counts, encode, {"images": ["a"]}, faiss="never")


@pytest.mark.parametrize("block", [2, 1024])
@pytest.mark.parametrize("dtype", list(index.DTYPES))
def test_an_index_holds_what_was_encoded(sides, tmp_path, monkeypatch, block, dtype):
    monkeypatch.setattr(index, "BLOCK", block)
    build(tmp_path / "index", sides, dtype=dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["index"]
    opened = index.load(tmp_path / "index")
    assert opened.names == {"images": ["a"]} and opened.manifest["checkpoint"] == "abc"
    for ours, side in ((opened.images, sides["image"]), (opened.texts, sides["text"])):
        assert torch.equal(ours.globals, side.globals)
        assert torch.equal(ours.tokens, side.tokens[side.mask].to(index.DTYPES[dtype]))
        assert torch.equal(ours.offsets, cumulated(side.mask.sum(1)))
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
    old = {kind: Embeddings(kind, -side.globals, side.tokens, side.mask) for kind, side in sides.items()}
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
    with open(out.with_name("index.partial") / "image.tokens", "ab") as file:
        file.write(b"half a block")  # written, but not yet safe when the kill came
    again = []
    build(out, sides, again)
    assert calls[:after] + again == [*calls[:after], *every_call(sides)[after:]]
    opened = index.load(out)
    assert torch.equal(opened.images.tokens, sides["image"].tokens[sides["image"].mask])
    assert torch.equal(opened.texts.globals, sides["text"].globals)
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_a_kill_at_the_very_end_costs_no_encoding(sides, tmp_path, monkeypatch):
    out, calls = tmp_path / "index", []
    build(out, sides, checkpoint="old")
    rename, renamed = index.os.replace, []

    def killed(a, b):
        if Path(b) == out:
            raise Killed
        renamed.append(b)
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
        index.build(out, IDENTITY, {"image": 5, "text": 9}, encode, {})
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
    with pytest.raises(BadInput, match="other.*no index"):
        build(folder, sides)


def test_faiss_takes_over_stage_1(sides, tmp_path):
    pytest.importorskip("faiss")
    many = {"image": Embeddings("image", unit(3000, 8, seed=0)), "text": Embeddings("text", unit(500, 8, seed=1))}
    counts = {kind: len(side) for kind, side in many.items()}
    out = tmp_path / "index"
    manifest = index.build(out, IDENTITY | {"tokens": False}, counts,
                           lambda kind, items: many[kind][torch.from_numpy(items)], {}, faiss="always")
    opened = index.load(out)
    assert opened.images.faiss is not None and 0.3 < manifest["faiss"]["image"] <= 1
    opened.images.faiss.nprobe = opened.images.faiss.nlist  # looks everywhere: then it is exact
    exact = search(many["text"][:20], many["image"], 50)
    found = search(many["text"][:20], opened.images, 50)
    assert torch.allclose(exact[1], found[1], atol=1e-5) and torch.equal(exact[0], found[0])


def test_without_faiss_stage_1_stays_exact(sides, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(index, "LARGE", 3)
    monkeypatch.setattr(index.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "faiss", None)
    counts = {kind: len(side) for kind, side in sides.items()}

    def encode(kind: str, items: np.ndarray) -> Embeddings:
        return sides[kind][torch.from_numpy(items)]

    assert index.build(tmp_path / "index", IDENTITY, counts, encode, {}, "auto")["faiss"] == {}
    assert "FAISS is not installed" in capsys.readouterr().out
    assert index.load(tmp_path / "index").images.faiss is None
    with pytest.raises(BadInput, match="faiss-cpu"):
        index.build(tmp_path / "other", IDENTITY, counts, encode, {}, "always")


# ------------------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize("model", ["tgdt", "user"])
def test_an_index_answers_as_its_run_does(flags, tmp_path, capsys, model, monkeypatch):
    run, out = str(tmp_path / "run"), str(tmp_path / "index")
    assert train.main([*flags, "--model", model, "--epochs", "1"]) == 0
    assert retrieve.main(["index", run, "--out", out, "--dtype", "float32"]) == 0
    for query in (["a red dog"], ["--image", "2"]):
        capsys.readouterr()
        answers = []
        for where in (run, out):
            assert retrieve.main(["search", where, *query, "--top", "3", "--json"]) == 0
            answers.append(json.loads(capsys.readouterr().out))
        a, b = ([(found["name"], found["row"]) for found in answer["found"]] for answer in answers)
        assert a == b and len(a) == 3
        for ours, theirs in zip(answers[0]["found"], answers[1]["found"], strict=True):
            assert ours["score"] == pytest.approx(theirs["score"], abs=1e-4)
            fine = 10 * ours["local"] if model == "tgdt" else 0
            assert ours["score"] == pytest.approx(ours["global"] + fine, abs=1e-4)
    captions = tmp_path / "captions.txt"
    captions.write_text("a red dog\na small ball\n")
    monkeypatch.setattr(retrieve, "QUERIES", 1)
    assert retrieve.main(["search", out, "--queries", str(captions), "--json", "--top", "2"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["query"] for line in lines] == ["a red dog", "a small ball"]
    alone = answers_of(out, "a red dog", capsys)
    assert [found["row"] for found in lines[0]["found"]] == [found["row"] for found in alone]
    assert lines[0]["found"][0]["score"] == pytest.approx(alone[0]["score"], abs=1e-4)
    picture = tmp_path / "found.png"
    assert retrieve.main(["search", out, "a red dog", "--save", str(picture)]) == 0 and picture.stat().st_size > 0

    weights = Path(run) / "best.pt"
    weights.write_bytes(weights.read_bytes() + b"trained on")
    capsys.readouterr()
    assert retrieve.main(["search", out, "a red dog"]) == 2
    message = capsys.readouterr().err
    assert "another checkpoint" in message and message.count("\n") == 1


def answers_of(where: str, caption: str, capsys) -> list:
    assert retrieve.main(["search", where, caption, "--top", "2", "--json"]) == 0
    return json.loads(capsys.readouterr().out)["found"]


def test_half_precision_and_an_index_s_own_split(flags, tmp_path, capsys):
    run, out = str(tmp_path / "run"), str(tmp_path / "index")
    assert train.main([*flags, "--epochs", "1"]) == 0
    for dtype in ("float16", "bfloat16"):
        assert retrieve.main(["evaluate", run, "--dtype", dtype, "--memory", "0.001"]) == 0
    assert retrieve.main(["index", run, "--out", out]) == 0
    assert retrieve.main(["search", out, "a red dog"]) == 0
    capsys.readouterr()
    assert retrieve.main(["search", out, "a red dog", "--split", "train"]) == 2
    assert "split val, not train" in capsys.readouterr().err


def test_shortlists_of_several_lengths(flags, tmp_path, capsys):
    assert train.main([*flags, "--epochs", "1"]) == 0
    capsys.readouterr()
    assert retrieve.main(["evaluate", str(tmp_path / "run"), "--shortlist", "1,2,8"]) == 0
    said = capsys.readouterr().out
    assert (tmp_path / "run" / "shortlist.png").stat().st_size > 0
    rows = [line.split() for line in said.splitlines()]
    assert [row[0] for row in rows if len(row) == 5 and row[0] in "128"] == ["1", "2", "8"]
    mixed = next(row for row in rows if row[:2] == ["exhaustive", "mixed"])
    assert next(row for row in rows if row[:1] == ["8"])[3] == mixed[-2]  # the whole corpus on the list
