"""What the benchmarks compute themselves: the verdict on a claim, the arms and their changes, cross-attention."""
import math
import re
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import ablations
import arms

import data
from harness import flags as command_line
from harness import settings
from harness.models import text_encoder
from sources.files import BadInput, locked


def test_a_claim_holds_where_student_s_interval_excludes_zero():
    assert ablations.verdict([5.0, 6.0, 7.0]) == "yes"             # 6 +- 2.5
    assert ablations.verdict([-5.0, -6.0, -7.0]).startswith("no")
    assert ablations.verdict([0.0, 6.0, 12.0]) == "not shown (interval -8.9 to +20.9)"    # 6 +- 14.9
    assert ablations.verdict([2.0, 2.0 + 1e-9]) == "yes"
    assert ablations.verdict([2.0, 3.0]).startswith("not shown")
    assert ablations.verdict([9.0]) == "too few seeds"


def test_every_claim_compares_arms_that_are_trained():
    for pair in (arms.CLAIMS | arms.UNIFIED | arms.OURS).values():
        for arm, search in map(arms.split_arm, pair):
            assert arm in arms.ARMS and re.fullmatch("global|local|mixed|two_stage|epoch [1-9]", search)
    for arm in arms.ARMS:  # its flags are flags of train.py
        own = " ".join(change.flags for change in arms.changes_of(arm)).split()
        settings.make(command_line.parse([*arms.BUDGETS["flickr8k-full"].split(), *own])[0])
    with pytest.raises(BadInput, match="'no guid' is no model and no change"):
        arms.changes_of("user, no guid")
    with pytest.raises(BadInput, match="'hinge' and 'entropy' are two losses"):
        arms.changes_of("user, hinge, entropy")


def test_every_result_is_of_an_arm_and_every_table_prints(capsys):
    rows = ablations.read_rows(ablations.RESULTS)
    for arm in {row["arm"] for row in rows if row["budget"] != "speed"}:
        arms.changes_of(arm)
    assert len({(row["budget"], row["arm"], row["seed"], row["search"]) for row in rows}) == len(rows)
    for row in rows:  # rsum is the sum of the six recalls
        if row["i2t_r1"]:
            recalls = sum(float(row[f"{way}_{r}"]) for way, r in ablations.RECALLS)
            assert float(row["rsum"]) == pytest.approx(recalls, abs=0.04)
    assert ablations.main(["table", "--courses"]) == 0
    assert "| the unified model, or TGDT |" in capsys.readouterr().out


def test_an_epoch_is_taken_from_runs_of_any_length():
    rows = [dict(zip(("budget", "arm", "seed", "search"), ("b", *each), strict=True)) for each in (
        ("user", "0", "epoch 2"), ("user, --epochs 3", "1", "epoch 2"), ("user, --epochs 6", "1", "epoch 2"),
        ("user, --epochs 6", "2", "epoch 3"), ("user, InfoNCE", "3", "epoch 2"), ("user, --epochs 6", "4", "global"))]
    assert ablations.by_seed(rows, "b", "user", "epoch 2") == {0: rows[0], 1: rows[2]}
    assert ablations.by_seed(rows, "b", "user", "global") == {}  # where a run ends, its length matters


def test_the_claims_in_the_documentation_are_those_that_the_script_prints(capsys):
    ablations.main(["table"])
    printed = set(capsys.readouterr().out.splitlines())
    docs = ablations.HERE.parent / "docs"
    page = [line for name in ("claims.md", "unified.md")
            for line in (docs / name).read_text(encoding="utf8").splitlines()]
    verdicts = r"\| (yes|no: it costs|too few seeds|not shown \(.*\)) \| \d+ \|$"
    claims = [line for line in page if re.search(verdicts, line)]
    assert len(claims) > 80 and set(claims) <= printed


def test_tables_of_a_folder_that_is_not_there_change_nothing(tmp_path, capsys):
    before = ablations.RESULTS.read_bytes()
    with pytest.raises(SystemExit):
        ablations.main(["table", "--out", str(tmp_path / "none")])
    assert "there is no such folder" in capsys.readouterr().err and ablations.RESULTS.read_bytes() == before


AS_RELEASED = ("user, fixed regions, reward floor, batch unmasked, queue unmasked, keys in training, cold momentum, "
               "full queue")
CHANGED = [AS_RELEASED, "user, no queue, hinge, mean first", "user, stand-in for CLIP", "tgdt, fine alone, beside",
           "unified, averaged, own branch, fewer regions", "user, no guide, averaged, entropy"]


def test_two_trainings_of_an_arm_do_not_share_a_folder(tmp_path):
    with locked(tmp_path), pytest.raises(BadInput, match="another program is writing there"):
        ablations.main(["one", "flickr8k", "tgdt", str(tmp_path)])


def test_an_arm_that_ctrl_c_stops_is_the_last_one(tmp_path, monkeypatch, capsys):
    stopped = tmp_path / "stopped"
    stopped.write_text("#!/bin/sh\nexit 130\n")
    stopped.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stopped))
    assert ablations.main(["train", "--out", str(tmp_path), "--arms", "tgdt; user", "--seeds", "0"]) == 130
    said = capsys.readouterr().out
    assert said.startswith("tgdt, seed 0: stopped") and "user" not in said


def test_a_flag_that_is_none_is_told_before_anything_is_trained(tmp_path, capsys):
    trained = ["--out", str(tmp_path)]
    for arguments, said in ((["table", "--darw"], "--darw"), (["speed", "--fast"], "--fast"),
                            (["train", "--epohcs", "1", *trained], "--epohcs"),
                            (["train", "--seeds", "a", *trained], "--seeds"),
                            (["train", "--arms", "nonet", *trained], "nonet")):
        with pytest.raises(SystemExit) as ended:
            ablations.main(arguments)
        assert ended.value.code == 2 and said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_arm_that_fails_is_told_by_the_exit_code(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert ablations.main(["train", "--out", str(tmp_path), "--arms", "tgdt; user", "--seeds", "0"]) == 1
    assert [line.split(",")[0] for line in capsys.readouterr().out.splitlines()] == ["tgdt", "user"]


def test_ctrl_c_ends_all_arms_also_if_the_arm_dies_of_it_before_it_can_save(tmp_path, monkeypatch, capsys):
    class Dying(nullcontext):
        codes = iter([KeyboardInterrupt(), -2])

        def wait(self) -> int:
            if isinstance(code := next(self.codes), KeyboardInterrupt):
                raise code
            return code

    monkeypatch.setattr(ablations.subprocess, "Popen", lambda *given, **more: Dying(Dying()))
    assert ablations.main(["train", "--out", str(tmp_path), "--arms", "tgdt; user", "--seeds", "0"]) == 130
    said = capsys.readouterr().out
    assert said.startswith("tgdt, seed 0: stopped") and "user" not in said


@pytest.mark.parametrize("arm", CHANGED)
def test_a_changed_run_trains_and_goes_on(arm, root, bert, tmp_path, undrawn):
    small = ["--data-root", str(root), "--text-encoder", str(bert), "--text-layers", "1", "--dim", "8",
             "--region-width", "8", "--feedforward", "16", "--device", "cpu"]
    given = (f"{arm}, --batch-size 4, --captions-per-image 2, --epochs 1, --queue {0 if 'no queue' in arm else 8}"
             .replace("fixed regions", "--fixed-regions 3"))
    assert ablations.one("flickr8k", given, tmp_path / "run", small) == 0
    results = (tmp_path / "run" / "results.csv").read_text()
    (tmp_path / "run" / "results.csv").unlink()
    assert ablations.one("flickr8k", given, tmp_path / "run", small) == 0  # from its checkpoint, which is the last one
    again = (tmp_path / "run" / "results.csv").read_text()

    def without_seconds(text: str) -> list[str]:
        return [line.rsplit(",", 2)[0] for line in text.splitlines()]

    assert without_seconds(results) == without_seconds(again)


def test_a_remembered_bert_gives_what_bert_gives(flags, tmp_path):
    chosen = settings.make(command_line.parse(flags)[0])
    bert, tokenizer = text_encoder(chosen)
    words = data.tokenize(["a dog runs", "a cat", "two men under the snow"], tokenizer, 32)
    remembered = arms.Remembered(bert, words, tmp_path / "words.npy")
    batch = data.pad(words[::-1])
    given = {"input_ids": batch["word_ids"], "attention_mask": batch["word_mask"].long()}
    with torch.no_grad():
        expected, found = (model(**given).last_hidden_state for model in (bert.eval(), remembered))
    mask = batch["word_mask"]
    assert torch.allclose(found[mask], expected[mask], atol=2e-3) and not found[~mask].any()


def test_cross_attention_by_loops():
    g = torch.Generator().manual_seed(0)
    words, regions = (F.normalize(torch.randn(*shape, generator=g), dim=-1) for shape in ((3, 5), (2, 4, 5)))
    for image, found in enumerate(ablations.cross_attention(words, regions).tolist()):
        total = 0.0
        dots = torch.stack([F.normalize((words @ region).clamp(min=0), dim=0) for region in regions[image]])  # [4, 3]
        for word in range(3):
            weights = [math.exp(9 * dots[region, word]) for region in range(4)]
            attended = sum(w * regions[image, region] for region, w in enumerate(weights)) / sum(weights)
            total += F.cosine_similarity(words[word], attended, dim=0).item() / 3
        assert found == pytest.approx(total, abs=1e-5)
