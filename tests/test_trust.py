"""Nothing of a user's is lost: two programs in one folder, kills at bad moments, changed files, a full disk, a closed
pipe. Each ends in one line."""
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

import losses
import retrieve
import train
from harness import folder, pictures, training
from sources import files

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("undrawn")


def refused(main, arguments: list[str], capsys, *said: str) -> None:
    capsys.readouterr()
    assert main(arguments) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: ") and all(words in message for words in said), message


@pytest.fixture
def run(flags, tmp_path) -> Path:
    assert train.main([*flags, "--epochs", "1"]) == 0
    return tmp_path / "run"


def resume(run: Path, *more: str) -> list[str]:
    return ["--resume", "--out", str(run), "--device", "cpu", *more]


def test_two_trainings_do_not_share_a_folder(flags, tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    with FileLock(out / ".lock"):
        refused(train.main, flags, capsys, "another program is writing there")
        refused(train.main, [*flags, "--resume"], capsys, "another program is writing there")
    assert train.main([*flags, "--epochs", "1"]) == 0 and not (out / ".lock").exists()


def test_a_run_without_its_last_checkpoint_is_not_started_over(run, capsys):
    (run / "checkpoint.pt").unlink()
    before = (run / "best.pt").read_bytes()
    refused(train.main, resume(run), capsys, "checkpoint.pt: missing")
    assert (run / "best.pt").read_bytes() == before


def test_history_is_written_again_from_the_checkpoint(run):
    whole = (run / "history.jsonl").read_text()
    (run / "history.jsonl").unlink()  # killed between the two
    assert train.main(resume(run)) == 0
    assert (run / "history.jsonl").read_text() == whole


def test_a_run_that_is_killed_while_features_are_computed_goes_on(flags, tmp_path, monkeypatch):
    prepare = pictures.prepare

    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(pictures, "prepare", killed)
    assert train.main([*flags, "--epochs", "1"]) == 130
    monkeypatch.setattr(pictures, "prepare", prepare)
    assert train.main(resume(tmp_path / "run")) == 0


def test_a_run_that_diverges_says_so_and_leaves_the_folder_usable(flags, capsys, monkeypatch):
    cmc = losses.cmc
    monkeypatch.setattr(losses, "cmc", lambda *given: cmc(*given) * float("nan"))
    refused(train.main, flags, capsys, "training diverged", "Nothing was kept")
    monkeypatch.undo()
    assert train.main([*flags, "--epochs", "1"]) == 0


def test_training_ends_when_nobody_reads_its_output(flags, tmp_path):
    """As in `python train.py | head`: it saves and stops, without a traceback, and can go on."""
    command = [sys.executable, str(ROOT / "train.py"), *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 141 and "Traceback" not in said
    assert folder.read_checkpoint(tmp_path / "run" / "checkpoint.pt")["epoch"] >= 1
    assert train.main(resume(tmp_path / "run")) == 0


def test_settings_that_were_edited_and_a_checkpoint_of_another_model_are_noticed(run, flags, tmp_path, capsys):
    text = (run / "settings.json").read_text()
    edited = json.loads(text)
    edited["cmc"]["local_weight"] = 3.0
    (run / "settings.json").write_text(json.dumps(edited))
    refused(retrieve.main, ["evaluate", str(run)], capsys, "--local-weight 10.0", "settings.json", "3.0")
    refused(train.main, resume(run), capsys, "--local-weight 10.0")
    (run / "settings.json").write_text(text)
    other = tmp_path / "other"
    assert train.main([*flags[:-1], str(other), "--model", "user", "--queue", "8", "--epochs", "1"]) == 0
    for name in ("best.pt", "checkpoint.pt"):
        shutil.copy(other / name, run / name)
    refused(retrieve.main, ["evaluate", str(run)], capsys, "best.pt", "--model user")
    refused(train.main, resume(run), capsys, "checkpoint.pt", "--model user")


def test_features_that_have_changed_are_noticed_and_moved_ones_are_welcome(run, root, tmp_path, capsys):
    moved = tmp_path / "moved"
    shutil.copytree(root, moved)
    assert train.main(resume(run, "--data-root", f"{moved}/", "--skip-bad")) == 0
    features = np.load(moved / "train_ims.npy")
    features[0] += 1
    np.save(moved / "train_ims.npy", features)
    refused(train.main, resume(run), capsys, "other captions or features")


@pytest.mark.parametrize("where", ["file", "file/run"])
def test_a_folder_that_cannot_be_made_is_said_before_the_data_is_loaded(flags, tmp_path, capsys, monkeypatch, where):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(training.data, "load", lambda *arguments, **options: pytest.fail("the data was loaded"))
    refused(train.main, [*flags[:-1], str(tmp_path / where)], capsys, "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_disk_is_one_line_and_keeps_what_was_there(run, capsys, monkeypatch):
    before = {name: (run / name).read_bytes() for name in ("checkpoint.pt", "best.pt")}

    def full(number):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    refused(train.main, resume(run, "--epochs", "2"), capsys, "No space left on device")
    monkeypatch.undo()
    assert before == {name: (run / name).read_bytes() for name in before}
    assert train.main(resume(run, "--epochs", "2")) == 0


def test_a_run_can_be_quiet(flags, capsys):
    assert train.main([*flags, "--epochs", "1", "--quiet"]) == 0
    said = capsys.readouterr()
    assert "epoch   1" not in said.out and "two-stage" in said.out and "step" not in said.err


def test_a_log_gets_what_history_has_or_says_what_to_install(flags, tmp_path, capsys, monkeypatch):
    refused(train.main, [*flags, "--log", "wandb"], capsys, "pip install wandb")
    sent = []

    class Wandb:
        @staticmethod
        def init(dir: Path, name: str, config: dict) -> "Wandb":
            assert config["epochs"] == 2
            return Wandb()

        def log(self, values: dict, step: int) -> None:
            sent.append((step, values))

    monkeypatch.setitem(sys.modules, "wandb", Wandb)
    assert train.main([*flags, "--log", "wandb"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert [step for step, _ in sent] == [1, 2]
    assert [values["val/two_stage/rsum"] for _, values in sent] == [line["val"]["two_stage"]["rsum"] for line in lines]
