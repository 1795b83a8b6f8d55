"""A user loses nothing: two programs in one folder, kills at bad moments, changed files, a full disk, a closed
pipe. Each ends in one line."""
import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from filelock import FileLock

import losses
import retrieve
import train
from harness import console, fetching, folder, pictures, report, search, start, training
from sources import files

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("undrawn")


def refused(main, arguments: list[str], capsys, *said: str) -> None:
    capsys.readouterr()
    assert main(arguments) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: ") and all(words in message for words in said), message


def resume(run: Path, *more: str) -> list[str]:
    return ["--resume", "--out", str(run), "--device", "cpu", *more]


def test_two_trainings_do_not_share_a_folder(flags, tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    with FileLock(out / ".lock"):
        refused(train.main, flags, capsys, "another program is writing there")
    assert train.main([*flags, "--epochs", "1"]) == 0 and not (out / ".lock").exists()
    with FileLock(out / ".lock"):
        refused(train.main, [*flags, "--resume"], capsys, "another program is writing there")


def test_a_file_system_without_locks_is_named(flags, tmp_path, capsys, monkeypatch):
    def acquire(*given: object, **more: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(FileLock, "acquire", acquire)
    refused(train.main, flags, capsys, str(tmp_path / "run"), "cannot be locked (No locks available)")


def test_on_windows_a_file_that_somebody_reads_is_replaced_a_little_later(tmp_path, monkeypatch):
    failures = [PermissionError(), PermissionError()]

    def put(source: Path, target: Path) -> None:
        if failures:
            raise failures.pop()
        os.rename(source, target)

    monkeypatch.setattr(files, "WINDOWS", True)
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(os, "replace", put)
    files.write_whole(tmp_path / "best.pt", lambda file: file.write(b"new"))
    assert (tmp_path / "best.pt").read_bytes() == b"new" and not failures
    failures += [PermissionError(errno.EACCES, "Permission denied")] * 6
    with pytest.raises(OSError, match="Permission denied"):
        files.write_whole(tmp_path / "best.pt", lambda file: file.write(b"newer"))
    assert (tmp_path / "best.pt").read_bytes() == b"new"


def test_flags_beside_resume_are_compared_with_the_run_and_not_with_the_defaults(run, capsys):
    """A batch of 4 is the run's own, but too small for the three captions an image of the default preset."""
    assert train.main(resume(run, "--batch-size", "4", "--epochs", "1", "--quiet")) == 0
    refused(train.main, resume(run, "--batch-size", "8"), capsys, "--batch-size 4, not 8")


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
    after_step = training.Run.after_step

    def broken(run, *given):  # in the last step of the epoch, after the last look at the loss
        told = after_step(run, *given)
        if run.step == run.steps_per_epoch:
            next(run.model.parameters()).data[:] = float("nan")
        return told

    monkeypatch.setattr(training.Run, "after_step", broken)
    refused(train.main, flags, capsys, "a weight is not finite at epoch 1", "Nothing was kept")
    monkeypatch.undo()
    assert train.main([*flags, "--epochs", "1"]) == 0


def test_no_checkpoint_is_written_over_a_good_one_once_a_weight_is_nan(flags, tmp_path, capsys, monkeypatch):
    """The weights are lost in the third step. Every step saves, and no look at the loss comes before the next one."""
    after_step, saved = training.Run.after_step, []

    def broken(run, *given):
        saved.append((tmp_path / "run" / "checkpoint.pt").is_file())
        if run.step == 3:
            next(run.model.parameters()).data[:] = float("nan")
        return after_step(run, *given)

    monkeypatch.setattr(training, "SAVE_EVERY", 0)
    monkeypatch.setattr(training.Run, "after_step", broken)
    refused(train.main, flags, capsys, "a weight is not finite at epoch 1, step 3", "holds the last good state")
    assert saved == [False, True, True]
    state = folder.read_checkpoint(tmp_path / "run" / "checkpoint.pt")
    assert state["step"] == 2 and all(torch.isfinite(weight).all() for weight in state["model"].values())


def test_after_too_little_memory_a_smaller_batch_can_be_tried_at_once(flags, capsys, monkeypatch):
    def too_large(*given):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(losses, "cmc", too_large)
    refused(train.main, flags, capsys, "smaller --batch-size")
    monkeypatch.undo()
    assert train.main([*flags, "--batch-size", "2", "--epochs", "1"]) == 0


class Broken(torch.utils.data.Dataset):
    """Whose first item tells what a process that reads batches does with Ctrl-C, and whose second one is bad."""

    def __getitem__(self, row: int) -> bool:
        if row == 1:
            raise files.BadInput("train_ims.npy, row 1: found NaN")
        return all(signal.getsignal(number) == signal.SIG_IGN for number in console.SIGNALS)


def test_processes_that_read_batches_leave_ctrl_c_to_the_loop_and_end_in_one_line(capsys):
    loader = torch.utils.data.DataLoader(Broken(), sampler=[0, 1], batch_size=None, num_workers=1,
                                         worker_init_fn=console.ignore_interrupts)
    read = iter(loader)
    assert next(read) is True
    assert console.run_command(lambda: next(read)) == 2
    assert capsys.readouterr().err == "error: train_ims.npy, row 1: found NaN\n"

    def killed():
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's "
                           "workers are out of shared memory.")

    assert console.run_command(killed) == 2
    assert "--workers" in capsys.readouterr().err


def test_an_error_takes_one_line_and_leaves_names_as_they_are(capsys):
    def fail():
        raise files.BadInput("Screenshot\u202f1  b.png: found\n  two lines")

    assert console.run_command(fail) == 2
    assert capsys.readouterr().err == "error: Screenshot\u202f1  b.png: found two lines\n"


@pytest.mark.parametrize(("fault", "code"), [(errno.ENOSPC, 2), (errno.EPIPE, 141)])
def test_output_that_cannot_be_written_at_the_end_is_reported_or_left(fault, code, capsys, monkeypatch):
    """What a command prints may wait in a buffer until it ends."""
    full = io.StringIO()
    full.flush = lambda: (_ for _ in ()).throw(OSError(fault, os.strerror(fault)))
    monkeypatch.setattr(sys, "stdout", full)
    assert console.run_command(lambda: 0) == code
    assert capsys.readouterr().err == (f"error: {os.strerror(fault)}\n" if code == 2 else "")


def test_a_terminal_that_lacks_a_letter_gets_its_number(monkeypatch):
    found = [{"name": "a café", "score": 1.0, "global": 1.0, "local": 0.0}]
    for as_json, lines in ((False, "a caf\\xe9"), (True, "a caf\\u00e9")):
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
        assert console.run_command(lambda as_json=as_json: report.show("→", found, as_json, False, True) or 0) == 0
        said = sys.stdout.buffer.getvalue().decode("ascii")
        assert lines in said and (not as_json or json.loads(said)["query"] == "→")


def test_a_run_goes_on_without_its_text_encoder_s_files_and_with_its_own_command(flags, bert, tmp_path):
    moved = tmp_path / "bert"
    shutil.copytree(bert, moved)
    flags = [str(moved) if flag == str(bert) else flag for flag in flags] + ["--regions", "auto"]
    assert train.main([*flags, "--epochs", "1"]) == 0
    shutil.rmtree(moved)
    assert train.main([*flags, "--resume"]) == 0
    history = folder.read_checkpoint(tmp_path / "run" / "checkpoint.pt")["history"]
    assert [line["epoch"] for line in history] == [1, 2] and history[0]["seconds"] < history[1]["seconds"]


def fails(message: str) -> None:
    raise RuntimeError(message)


@pytest.mark.parametrize("work", [lambda: torch.empty(2**60), lambda: bytearray(2**62),
                                  lambda: fails("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
                                  lambda: fails("unable to mmap 16 bytes: Cannot allocate memory (12)")])
def test_too_little_memory_is_one_line(work, capsys):
    assert console.run_command(work) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "memory" in message and "--batch-size" in message


def test_an_error_of_the_program_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="size mismatch"):
        console.run_command(lambda: torch.nn.Linear(2, 3).load_state_dict(torch.nn.Linear(3, 3).state_dict()))


def test_training_ends_when_nobody_reads_its_output(flags, tmp_path):
    """As in `python train.py | head`: it saves and stops, without a traceback."""
    command = [sys.executable, str(ROOT / "train.py"), *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 141 and "Traceback" not in said
    assert folder.read_checkpoint(tmp_path / "run" / "checkpoint.pt")["epoch"] >= 1


@pytest.mark.parametrize("moment", ["the last step of epoch 2", "the measuring after it"])
def test_output_that_closes_loses_no_epoch(moment, flags, tmp_path, monkeypatch):
    """A progress bar writes too, and nobody may read it any more. (Each epoch has four steps.)"""
    closed = [BrokenPipeError(errno.EPIPE, "Broken pipe")]  # it is raised once

    def closing(bar, *given):
        if closed and (bar.n, moment) == (7, "the last step of epoch 2"):
            raise closed.pop()
        return update(bar, *given)

    def measuring(run, model):
        if closed and (len(run.history), moment) == (1, "the measuring after it"):
            raise closed.pop()
        return evaluate(run, model)

    update, evaluate = training.tqdm.update, training.Run.evaluate
    monkeypatch.setattr(training.tqdm, "update", closing)
    monkeypatch.setattr(training.Run, "evaluate", measuring)
    monkeypatch.setattr(console, "leave_quietly", lambda: 141)
    assert train.main([*flags, "--epochs", "3"]) == 141 and not closed
    assert train.main(resume(tmp_path / "run")) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3]


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


def test_a_run_without_its_best_weights_is_not_searched_with_others(run, capsys):
    (run / "best.pt").unlink()
    for command in (["evaluate"], ["search", "a dog"], ["index", "--out", str(run) + "-index"]):
        refused(retrieve.main, [command[0], str(run), *command[1:]], capsys, "best.pt: missing, though 1 epochs")
    (run / "best.pt").mkdir()
    refused(retrieve.main, ["evaluate", str(run)], capsys, "best.pt: no such file, expected a checkpoint")
    (run / "best.pt").rmdir()
    assert train.main(resume(run, "--epochs", "2")) == 0 and (run / "best.pt").is_file()
    assert "best.pt is missing; the next epoch writes a new one" in capsys.readouterr().err
    (run / "best.pt").write_bytes(b"half")
    refused(train.main, resume(run, "--epochs", "3"), capsys, "best.pt: expected a checkpoint of this program")


@pytest.mark.parametrize("change", [{"seen": 3}, {"seen": {}},
                                    {"seen": {"regions": {"kind": "../out", "regions": 3, "dim": 4}, "clip": None}},
                                    {"seen": {"regions": {"kind": "grid"}, "clip": None}}, {"bert": 3},
                                    {"bert": {"hidden_size": "x"}},
                                    {"model": {}}, {"settings": {"run": 3}}, {"epoch": "1"}, {"feature_dim": 7},
                                    {"feature_dim": 1.5}], ids=str)
def test_a_checkpoint_of_another_shape_is_reported(run, change, capsys):
    state = torch.load(run / "best.pt", weights_only=True)
    torch.save(state | change, run / "best.pt")
    refused(retrieve.main, ["evaluate", str(run)], capsys, "best.pt")


@pytest.mark.parametrize("change", [{"bert": {"hidden_size": "x"}}, {"settings": {"run": 3}}, {"optimizer": 5},
                                    {"history": [3]}, {"rng": 1}], ids=str)
def test_a_damaged_checkpoint_is_not_gone_on_with(run, change, capsys):
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    torch.save(state | change, run / "checkpoint.pt")
    refused(train.main, resume(run, "--epochs", "2"), capsys, str(run))


def test_too_little_memory_is_not_the_checkpoint_s_fault(run):
    resumed = training.set_up(folder.resumed_settings(run, {}), run, "cpu", resume=True)

    class Full:
        def load_state_dict(self, state):
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        resumed.restore(Full())


def test_a_checkpoint_decides_the_shape_of_its_bert_and_nothing_else(run):
    state = torch.load(run / "best.pt", weights_only=True)
    state["bert"] |= {"attn_implementation": "kernels-community/flash-attn2", "is_decoder": True}
    torch.save(state, run / "best.pt")
    config = folder.open_run(run).model.bert.config
    assert not config.is_decoder and config._attn_implementation == "sdpa"


def test_a_tokenizer_that_cannot_be_read_is_reported(run, capsys):
    for content in ("", "[]", '{"model": 1}'):
        (run / "tokenizer" / "tokenizer.json").write_text(content)
        refused(retrieve.main, ["evaluate", str(run)], capsys, "tokenizer: the tokenizer cannot be read")


def test_a_tokenizer_of_another_run_is_reported(run, capsys):
    tokenizer = folder.open_run(run).tokenizer
    known = len(tokenizer)
    tokenizer.add_tokens(["platypus"])
    tokenizer.save_pretrained(run / "tokenizer")
    refused(retrieve.main, ["search", str(run), "a dog"], capsys, f"numbers up to {known}", f"knows {known}")


def test_a_bert_that_reads_less_than_the_longest_caption_is_reported(flags, capsys):
    refused(train.main, [*flags, "--longest", "65"], capsys, "--longest 65", "64 word pieces at most")


def test_features_that_have_changed_are_noticed_and_moved_ones_are_welcome(run, root, tmp_path, capsys):
    moved = tmp_path / "moved"
    shutil.copytree(root, moved)
    assert train.main(resume(run, "--data-root", f"{moved}/", "--skip-bad")) == 0
    changed, kept = tmp_path / "changed", (run / "settings.json").read_text()
    shutil.copytree(root, changed)
    features = np.load(changed / "train_ims.npy")
    features[0] += 1
    np.save(changed / "train_ims.npy", features)
    refused(train.main, resume(run, "--data-root", f"{changed}/"), capsys, "features of split train have changed")
    assert str(moved) in kept and (run / "settings.json").read_text() == kept


@pytest.fixture(params=["file", "file/below", "read-only"])
def closed(request, tmp_path) -> Path:
    """A folder that cannot be made or written: a file is in its way, or the file system is read-only."""
    if request.param == "read-only":
        return Path("/proc/nothing-can-be-written-here") if Path("/proc/self").exists() else pytest.skip("no /proc")
    (tmp_path / "file").write_text("mine")
    return tmp_path / request.param


@pytest.mark.parametrize("flag", ["--out", "--cache"])
def test_a_folder_that_cannot_be_made_is_reported_before_the_data_is_loaded(flags, closed, flag, tmp_path, capsys,
                                                                            monkeypatch):
    monkeypatch.setattr(training.data, "load", lambda *arguments, **options: pytest.fail("the data was loaded"))
    monkeypatch.setattr(fetching, "find_data", lambda *arguments: pytest.fail("the data was fetched"))
    refused(train.main, [*flags, flag, str(closed)], capsys, str(closed), "expected a folder that can be written")
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "file").exists() or (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("command", [["search", "a dog", "--save", "a.png"], ["index", "--out", "index"],
                                     ["evaluate", "--shortlist", "2", "--save", "a.png"]], ids=lambda words: words[0])
def test_a_file_that_cannot_be_written_is_reported_before_the_run_is_opened(closed, command, capsys, monkeypatch):
    monkeypatch.setattr(folder, "open_run", lambda where: pytest.fail("the run was opened"))
    first, *rest, last = command
    refused(retrieve.main, [first, "run", *rest, str(closed / last)], capsys, str(closed))


@contextmanager
def file_system(at: Path, options: str) -> Iterator[None]:
    """Mount a file system in memory at a folder. Skips the test where only root may do so."""
    at.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(at)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a file system")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True)


def test_a_run_in_a_read_only_folder_is_searched(run, tmp_path, capsys):
    still = tmp_path / "still"
    with file_system(still, "size=9m"):
        shutil.copytree(run, still / "run")
        subprocess.run(["mount", "-o", "remount,ro", str(still)], check=True)
        for command in (["evaluate"], ["search", "a red dog"], ["search", "--image", "0"],
                        ["index", "--out", str(tmp_path / "index")]):
            assert retrieve.main([command[0], str(still / "run"), *command[1:]]) == 0
        refused(retrieve.main, ["evaluate", str(still / "run"), "--shortlist", "2"], capsys, "Read-only file system")
        refused(train.main, resume(still / "run"), capsys, "Read-only file system")


def fill(disk: Path, leave: int) -> None:
    """Fill a disk up to the last `leave` bytes."""
    free = os.statvfs(disk)
    (disk / "ballast").write_bytes(bytes(max(0, free.f_bavail * free.f_frsize - leave)))


@pytest.mark.parametrize("leave", [0, 8_000, 32_000, 100_000])
def test_a_disk_that_fills_while_training(flags, tmp_path, capsys, leave):
    """Settings, tokenizer, best.pt and checkpoint.pt are the first that have no room, one after the other."""
    disk, quick = tmp_path / "disk", ["--epochs", "1", "--quiet"]
    with file_system(disk, "size=8m"):
        fill(disk, leave)
        refused(train.main, [*flags, *quick, "--out", str(disk / "run")], capsys, str(disk / "run"), "No space left")
        assert not [path for path in disk.rglob("*") if "partial" in path.name or path.name == ".lock"]
        (disk / "ballast").unlink()
        if not (disk / "run" / "best.pt").exists():  # the same command, or --resume, goes on where there is room
            again = ["--resume"] if (disk / "run").exists() else []
            assert train.main([*flags, *quick, "--out", str(disk / "run"), *again]) == 0


@pytest.mark.parametrize("leave", [0, 32_000])
def test_a_disk_that_fills_keeps_what_was_there(run, tmp_path, capsys, leave):
    disk = tmp_path / "disk"
    with file_system(disk, "size=8m"):
        shutil.copytree(run, disk / "run")
        assert retrieve.main(["index", str(run), "--out", str(disk / "index"), "--dtype", "float32"]) == 0
        (disk / "found.png").write_text("mine")
        kept = [path for path in disk.rglob("*") if path.is_file() and path.name != "settings.json"]
        before = {path: path.read_bytes() for path in kept}
        fill(disk, leave)
        refused(train.main, resume(disk / "run", "--epochs", "2", "--quiet"), capsys, str(disk), "No space left")
        if leave < 8_000:
            refused(retrieve.main, ["index", str(run), "--out", str(disk / "index")], capsys, "No space left")
        assert before == {path: path.read_bytes() for path in kept}
        (disk / "ballast").unlink()
        assert train.main(resume(disk / "run", "--epochs", "2", "--quiet")) == 0
        assert retrieve.main(["index", str(run), "--out", str(disk / "index")]) == 0


def test_a_full_disk_is_one_line_and_keeps_what_was_there(run, capsys, monkeypatch):
    before = {name: (run / name).read_bytes() for name in ("checkpoint.pt", "best.pt")}

    def full(number):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    refused(train.main, resume(run, "--epochs", "2"), capsys, "No space left on device")
    monkeypatch.undo()
    assert before == {name: (run / name).read_bytes() for name in before}
    assert train.main(resume(run, "--epochs", "2")) == 0


# ------------------------------------------------------------------------------------------------- Ctrl-C, and help

ALARM = """
import os, runpy, signal, sys, threading
threading.Timer(float(sys.argv[1]), os.kill, (os.getpid(), signal.SIGINT)).start()
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("moment", ["0.1", "0.8"])
@pytest.mark.parametrize("command", [["train.py", "--out"], ["retrieve.py", "evaluate"]], ids=lambda words: words[0])
def test_ctrl_c_during_the_imports_ends_without_a_traceback(command, moment, tmp_path):
    """A shell reports both codes as 130. What is left of the time is the run's, so the moments fall into it as well."""
    said = subprocess.run([sys.executable, "-c", ALARM, moment, *command, str(tmp_path / "run")], cwd=ROOT,
                          capture_output=True, text=True)
    assert said.returncode in (-signal.SIGINT, 130) or "no run here" in said.stderr
    assert "Traceback" not in said.stderr and "KeyboardInterrupt" not in said.stderr


@pytest.mark.parametrize("command", [["evaluate"], ["index", "--out", "index"], ["search", "a dog"]],
                         ids=lambda words: words[0])
def test_ctrl_c_in_a_search_ends_quietly_and_the_next_one_works(run, command, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    encode = retrieve.encode

    def interrupted(model, batches, kind, *rest):
        if kind == "text":
            signal.raise_signal(signal.SIGINT)
        return encode(model, batches, kind, *rest)

    for module in (report.retrieve, search):
        monkeypatch.setattr(module, "encode", interrupted)
    capsys.readouterr()
    assert retrieve.main([command[0], str(run), *command[1:]]) == 130
    assert capsys.readouterr().out == "" and not (tmp_path / "index").exists()
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert retrieve.main([command[0], str(run), *command[1:]]) == 0
    assert not list(tmp_path.glob(".*"))  # no lock and nothing half done is left


def test_ctrl_c_is_heard_again_when_the_command_begins():
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        assert console.run_command(lambda: signal.raise_signal(signal.SIGINT) or 0) == 130
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_program_in_the_background_of_a_script_goes_on_ignoring_ctrl_c(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["retrieve.py", "evaluate", "run"])
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        start.first_look("retrieve")
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_while_the_last_epoch_is_measured_is_heard():
    run = SimpleNamespace(interrupt=console.Interrupt(), bar=nullcontext(), device=torch.device("cpu"))

    def train_to_the_end(run) -> bool:
        signal.raise_signal(signal.SIGINT)
        return True

    assert not training.train_guarded(train_to_the_end, run)


def test_without_an_output_the_command_runs_all_the_same():
    shell = f"{sys.executable} train.py --print-settings >&-; echo $? >&2"
    said = subprocess.run(["sh", "-c", shell], cwd=ROOT, capture_output=True, text=True)
    assert said.stderr == "0\n"


def test_a_disk_that_fails_is_no_closed_terminal(capsys):
    def fails():
        raise OSError(errno.EIO, "Input/output error", "/disk/checkpoint.pt")

    assert console.run_command(fails) == 2
    assert capsys.readouterr().err == "error: /disk/checkpoint.pt: Input/output error\n"


def test_what_nohup_ignores_is_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with console.Interrupt() as interrupt:
            signal.raise_signal(signal.SIGHUP)
            assert not interrupt.seen
            signal.raise_signal(signal.SIGTERM)
            assert interrupt.seen
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("words", ["train.py", "retrieve.py", "retrieve.py evaluate", "retrieve.py index",
                                   "retrieve.py search"])
def test_help_fits_80_columns_and_imports_no_torch(words):
    command = [sys.executable, "-X", "importtime", *words.split(), "--help"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert said.returncode == 0 and "usage: " in said.stdout and "torch" not in said.stderr
    assert max(map(len, said.stdout.splitlines())) <= 80


def test_a_run_can_be_quiet(flags, capsys):
    assert train.main([*flags, "--epochs", "1", "--quiet"]) == 0
    said = capsys.readouterr()
    assert "epoch   1" not in said.out and "two-stage" in said.out and "step" not in said.err


class Wandb:
    """Stands for the library wandb: `sent` has what was logged."""

    sent: dict = {}

    @staticmethod
    def init(dir: Path, name: str, config: dict) -> "Wandb":
        assert config["epochs"] == 2
        return Wandb()

    def log(self, values: dict, step: int) -> None:
        self.sent |= {(step, name): value for name, value in values.items()}


class SummaryWriter:
    """Stands for the one of torch.utils.tensorboard."""

    sent: dict = {}

    def __init__(self, out: Path):
        assert out.name == "tensorboard"

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.sent[step, name] = value

    def flush(self) -> None:
        pass


@pytest.mark.parametrize("name, module, stub, log", [
    ("wandb", "wandb", Wandb, Wandb),
    ("tensorboard", "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter), SummaryWriter)])
def test_a_log_gets_what_history_has_or_says_what_to_install(name, module, stub, log, flags, tmp_path, capsys,
                                                             monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)  # not installed
    refused(train.main, [*flags, "--log", name], capsys, f"pip install {name}")
    monkeypatch.setitem(sys.modules, module, stub)
    monkeypatch.setattr(log, "sent", {})
    assert train.main([*flags, "--log", name]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    found = {step: value for (step, key), value in log.sent.items() if key == "val/two_stage/rsum"}
    assert found == {line["epoch"]: line["val"]["two_stage"]["rsum"] for line in lines} and found.keys() == {1, 2}


def test_a_log_that_refuses_is_one_line(flags, capsys, monkeypatch):
    def unknown(**given):
        raise Exception("api_key not configured")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=unknown))
    refused(train.main, [*flags, "--log", "wandb"], capsys, "api_key not configured")
