"""The search command: an index answers as its run does, and what cannot be asked is refused in one line."""
import io
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import retrieve
import train
from harness import folder, index, report
from harness import search as command_line
from sources.files import BadInput


@pytest.mark.parametrize("model", ["tgdt", "user"])
@pytest.mark.usefixtures("undrawn")
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
            assert ("local" in ours) == (model == "tgdt")
            fine = 10 * ours.get("local", 0)
            assert ours["score"] == pytest.approx(ours["global"] + fine, abs=1e-4)
    captions = tmp_path / "captions.txt"
    captions.write_text("\ufeffa red dog\na small ball\n")  # Windows begins a file with such a mark
    monkeypatch.setattr(command_line, "QUERIES", 1)
    assert retrieve.main(["search", out, "--queries", str(captions), "--json", "--top", "2"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["query"] for line in lines] == ["a red dog", "a small ball"]
    captions.write_text("a red dog\n" + "a red dog " * 30)
    assert retrieve.main(["search", out, "--queries", str(captions), "--top", "2"]) == 0
    assert "warning: only the first 62 word pieces of a caption are read\n" in capsys.readouterr().err
    captions.write_text("a red dog\n\u200b\n")  # an empty caption, found before the first one is answered
    capsys.readouterr()
    assert retrieve.main(["search", out, "--queries", str(captions)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and "caption 2 of 2" in said.err
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a red dog\n" * 5000 + b"\xff cat")))
    assert retrieve.main(["search", out, "--queries", "-"]) == 2
    assert "standard input, line 5001: byte 0xff is not UTF-8" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", None)
    assert retrieve.main(["search", str(out), "--queries", "-"]) == 2 and "closed" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a red dog\n\na small ball")))
    assert retrieve.main(["search", out, "--queries", "-"]) == 2
    assert "standard input, line 2: empty, expected a caption" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a red dog\na small ball\n")))
    assert retrieve.main(["search", out, "--queries", "-", "--json", "--top", "2"]) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == lines
    assert retrieve.main(["search", out, "a zebra", "--json"]) == 0
    assert "does not know 1 of 2 word pieces" in capsys.readouterr().err
    alone = answers_of(out, "a red dog", capsys)
    assert [found["row"] for found in lines[0]["found"]] == [found["row"] for found in alone]
    assert lines[0]["found"][0]["score"] == pytest.approx(alone[0]["score"], abs=1e-4)
    picture = tmp_path / "found.png"
    assert retrieve.main(["search", out, "a red dog", "--save", str(picture)]) == 0 and picture.stat().st_size > 0

    load = data.load

    def fewer(*given):  # the data has shrunk since
        splits = load(*given)
        splits["val"].keep(np.arange(4) == 0)
        return splits

    with monkeypatch.context() as patch:
        patch.setattr(data, "load", fewer)
        capsys.readouterr()
        assert retrieve.main(["search", out, "a red dog", "--save", str(picture)]) == 2
        assert "have changed since it was made" in capsys.readouterr().err

    weights = Path(run) / "best.pt"
    with monkeypatch.context() as patch:  # an epoch ends while the data is read
        patch.setattr(data, "load", lambda *given: weights.write_bytes(weights.read_bytes() + b"trained on")
                      and load(*given))
        capsys.readouterr()
        assert retrieve.main(["index", run, "--out", out]) == 2
        assert "was trained further while its data was read" in capsys.readouterr().err
    assert retrieve.main(["search", out, "a red dog"]) == 2
    message = capsys.readouterr().err
    assert "another checkpoint" in message and message.count("\n") == 1


@pytest.mark.usefixtures("undrawn")
def test_an_index_of_other_captions_or_features_is_another_index(flags, root, tmp_path):
    """So that a build that was interrupted is not gone on with after the data has changed."""
    copy = Path(shutil.copytree(root, tmp_path / "data"))
    flags[flags.index("--data-root") + 1] = str(copy)
    run, seen = str(tmp_path / "run"), []
    assert train.main([*flags, "--epochs", "1"]) == 0
    captions, features = copy / "dev_caps.txt", np.load(copy / "dev_ims.npy")
    changes = (lambda: None, lambda: captions.write_text(captions.read_text().replace("a", "two", 1)),
               lambda: np.save(copy / "dev_ims.npy", features[::-1]))
    for number, change in enumerate(changes):
        change()
        assert retrieve.main(["index", run, "--out", str(tmp_path / str(number))]) == 0
        seen.append(json.loads((tmp_path / str(number) / "manifest.json").read_text())["content"])
    assert len(set(seen)) == 3


def answers_of(where: str, caption: str, capsys) -> list:
    assert retrieve.main(["search", where, caption, "--top", "2", "--json"]) == 0
    return json.loads(capsys.readouterr().out)["found"]


def test_the_tokens_have_the_precision_that_is_asked_for(trained, tmp_path, monkeypatch):
    run, seen, evaluate = str(trained), [], retrieve.evaluate

    def watched(images, texts, *rest, **options):
        seen.append((images.tokens.dtype, texts.tokens.dtype))
        return evaluate(images, texts, *rest, **options)

    monkeypatch.setattr(retrieve, "evaluate", watched)
    for name, dtype in (("float16", torch.float16), ("bfloat16", torch.bfloat16)):
        assert retrieve.main(["evaluate", run, "--dtype", name]) == 0 and seen.pop() == (dtype, dtype)
        assert retrieve.main(["index", run, "--dtype", name, "--out", str(tmp_path / name)]) == 0
        assert index.load(tmp_path / name).images.tokens.dtype == dtype


def test_an_index_knows_one_split_only(trained, tmp_path, capsys):
    out = str(tmp_path / "index")
    assert retrieve.main(["index", str(trained), "--out", out]) == 0
    assert retrieve.main(["search", out, "a red dog", "--split", "val"]) == 0
    capsys.readouterr()
    assert retrieve.main(["search", out, "a red dog", "--split", "train"]) == 2
    assert "split val, not train" in capsys.readouterr().err


def test_an_index_of_pictures_that_changed_is_refused(flags, root, tmp_path, capsys, undrawn):
    copy = Path(shutil.copytree(root, tmp_path / "data"))
    flags[flags.index("--data-root") + 1] = str(copy)
    out, picture = str(tmp_path / "index"), str(tmp_path / "found.png")
    assert train.main([*flags, "--epochs", "1"]) == retrieve.main(["index", str(tmp_path / "run"), "--out", out]) == 0
    np.save(copy / "dev_ims.npy", np.load(copy / "dev_ims.npy")[::-1].copy())  # the names are the same
    assert retrieve.main(["search", out, "a red dog"]) == 0  # an index alone needs no data
    capsys.readouterr()
    assert retrieve.main(["search", out, "a red dog", "--save", picture]) == 2
    assert "have changed since it was made" in capsys.readouterr().err
    assert train.main(["--resume", "--out", str(tmp_path / "run"), "--epochs", "2", "--device", "cpu"]) == 2
    assert "captions or features of split val have changed" in capsys.readouterr().err


def test_an_index_notices_pictures_that_have_swapped_their_names(root):
    split = data.load("flickr8k", root, ("val",))["val"]
    before = folder.content(split), folder.fingerprint(split)
    split.image_names[:2] = split.image_names[1::-1]
    assert folder.content(split) != before[0] and folder.fingerprint(split) == before[1]


def test_the_test_files_alone_are_enough(trained, root, tmp_path, capsys):
    for name in ("ims.npy", "caps.txt"):
        shutil.copy(root / f"dev_{name}", tmp_path / f"test_{name}")
    assert retrieve.main(["evaluate", str(trained), "--data-root", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("test: 4 images")


def test_a_damaged_picture_is_not_drawn_and_costs_nothing_else(run, root, tmp_path, capsys):
    """The features come from files, so nobody has looked at the pictures."""
    copy = Path(shutil.copytree(root, tmp_path / "data"))
    captions = (copy / "dev_caps.txt").read_text().splitlines()
    images = [{"filename": f"{i}.jpg", "split": "val", "sentences": [{"raw": text} for text in captions[2 * i :][:2]]}
              for i in range(4)]
    (copy / "dataset_flickr8k.json").write_text(json.dumps({"images": images}))
    for image in images:
        (copy / image["filename"]).write_bytes(b"nonsense")
    picture = tmp_path / "found.png"
    assert retrieve.main(["search", str(run), "a red dog", "--data-root", str(copy), "--save", str(picture)]) == 0
    assert picture.stat().st_size > 0 and "warning: " in capsys.readouterr().err


def test_a_caption_is_printed_without_what_would_change_the_terminal(capsys):
    report.show("", [{"name": "a\u202f\x1b[31mred\ndog", "score": 1.0, "global": 1.0}], False, False)
    assert capsys.readouterr().out.splitlines()[1].endswith("a\u202f [31mred dog")  # a blank stays what it is


def test_shortlists_of_several_lengths(run, capsys):
    assert retrieve.main(["evaluate", str(run), "--shortlist", "1,2,8"]) == 0
    said = capsys.readouterr().out
    assert (run / "shortlist.png").stat().st_size > 0
    rows = [line.split() for line in said.splitlines()]
    assert [row[0] for row in rows if len(row) == 5 and row[0] in "128"] == ["1", "2", "8"]
    mixed = next(row for row in rows if row[:2] == ["exhaustive", "mixed"])
    assert next(row for row in rows if row[:1] == ["8"])[3] == mixed[-2]  # the whole corpus on the list


def test_a_picture_that_cannot_be_drawn_is_refused_before_the_work(tmp_path, capsys):
    for command in (["evaluate", str(tmp_path)], ["search", str(tmp_path), "a dog"]):
        assert retrieve.main([*command, "--save", "found.xyz"]) == 2
        assert "found.xyz: expected a name that ends in .png" in capsys.readouterr().err


def test_a_model_without_fine_tokens_has_no_shortlists(flags, tmp_path, capsys, undrawn):
    assert train.main([*flags, "--model", "user", "--epochs", "1"]) == 0
    capsys.readouterr()
    assert retrieve.main(["evaluate", str(tmp_path / "run"), "--shortlist", "1,2"]) == 2
    said = capsys.readouterr()
    assert "no fine tokens" in said.err and said.out == ""


def test_a_picture_is_asked_for_by_its_name_or_row_and_a_file_is_that_file(tmp_path, monkeypatch):
    split = data.Split("test", [], np.zeros(0, np.int64), None, ["a.png", "7", "b.png"], [None] * 3)
    run = SimpleNamespace(split=split, seen={"regions": {"kind": "grid"}}, settings=None, device="cpu")
    monkeypatch.setattr(command_line.pictures, "one", lambda picture, *rest: f"looked at {picture}")
    for name, row in (("a.png", 0), ("2", 2), ("7", 1)):  # "7" is the name of the second one
        assert command_line.picture_query(run, name) == (split, row)
    other = tmp_path / "a.png"  # not the split's
    other.write_bytes(b"")
    assert command_line.picture_query(run, str(other)) == (f"looked at {other}", 0)
    run.seen["regions"]["kind"] = "files"  # nobody can look at a picture as these files did
    assert command_line.picture_query(run, str(other)) == (split, 0)
    for name in ("3", "-1", str(tmp_path / "c.png"), str(tmp_path / "2")):  # the last one is a path, not a row
        with pytest.raises(BadInput, match="by name or by row"):
            command_line.picture_query(run, name)
