"""Training on several ranks, here two processes on one machine, and in pieces: the same gradients as one process."""
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

import train
from harness import figures, folder, models, ranks, report, settings, torchrun, training
from sources.files import BadInput
from user import MomentumContrast

ROOT = Path(__file__).parent.parent
CONTEXT = multiprocessing.get_context("forkserver")  # it imports PyTorch once, for all processes of this file
CONTEXT.set_forkserver_preload(["transformers.models.bert.modeling_bert", "matplotlib.pyplot"])
LIMIT = 300  # seconds after which a process that hangs is killed, on a busy machine

# ----------------------------------------------------------------------------------------------------- two processes


def two_ranks(function, *arguments) -> list[tuple[int, str]]:
    """Call function(*arguments) in two processes as torchrun would. For each its exit code and what it printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said = Path(arguments[0])
    said.mkdir(exist_ok=True)
    processes = [CONTEXT.Process(target=one_rank, args=(rank, port, said / f"said{rank}", function, arguments))
                 for rank in range(2)]
    for process in processes:
        process.start()
    end = time.monotonic() + LIMIT
    for process in processes:
        process.join(max(0, end - time.monotonic()))
    hung = [process.exitcode is None for process in processes]
    for process in processes:
        process.kill()
    ended = [(process.exitcode, (said / f"said{rank}").read_text()) for rank, process in enumerate(processes)]
    print(ended)  # seen if a test fails
    assert not any(hung)
    return ended


def one_rank(rank: int, port: int, said: Path, function, arguments) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    report.draw = figures.curves = lambda *arguments: None
    file = os.open(said, os.O_CREAT | os.O_WRONLY)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = open(1, "w", closefd=False)
    sys.stderr = open(2, "w", closefd=False, buffering=1)
    try:
        sys.exit(function(*arguments))
    finally:
        sys.stdout.flush()


# --------------------------------------------------------------------------------------------------- equal gradients


def made_batch(regions: list[int], captions: list[int], seed: int) -> dict[str, torch.Tensor]:
    """A batch of images with so many regions, of which each has so many captions."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(regions)) < torch.tensor(regions)[:, None]
    words = torch.randint(3, 9, (sum(captions),), generator=g).sort().values  # the shares differ in their longest
    row = torch.arange(len(regions)).repeat_interleave(torch.tensor(captions))
    return {"regions": torch.randn(*mask.shape, 6, generator=g) * mask[:, :, None],
            "boxes": torch.rand(*mask.shape, 4, generator=g), "region_mask": mask,
            "word_ids": torch.randint(5, 30, (len(row), 9), generator=g),
            "word_mask": torch.arange(9) < words[:, None], "image_row": row, "image_index": row + 10 * seed}


def three_steps(out: Path, model_name: str, fixed: int, pieces: int, many: int) -> None:
    """Three steps of gradient descent in float64. Writes gradients and weights, for each rank, into the folder.

    many: the batch has 7 x many captions. From 80 captions on, a share is encoded in groups of like length.
    """
    torch.set_default_dtype(torch.float64)
    with torchrun.started("cpu"):
        torch.manual_seed(torchrun.number())  # the ranks start apart, and are to take rank 0's weights
        guide = {} if model_name == "tgdt" else {"guide": "self", "guide_dropout": 0.0, "fixed_regions": fixed}
        guide |= {"distill": 0.5} if model_name == "tgdt-user" else {}
        chosen = settings.make({"model": model_name, "dim": 8, "region_width": 8, "feedforward": 16, "dropout": 0.0,
                                "batch_size": 8 * many, "queue": 20 * many, **guide})
        model = models.build(chosen, models.text_encoder(chosen)[0], 6)
        momentum = MomentumContrast(model, 8, 20 * many, 0.9) if model_name != "tgdt" else None
        ranks.join(model, momentum)
        gradients = []
        for step in range(3):
            regions = [3] * 5 if fixed else [2, 4, 3, 1, 4]
            loss = train.batch_loss(model, momentum, made_batch(regions, [many, 2 * many, many, 2 * many, many], step),
                                    chosen, share=partial(ranks.encode, pieces=pieces))
            model.zero_grad()
            loss.backward()
            ranks.sum_gradients(model)
            gradients.append({name: weight.grad.clone() for name, weight in model.named_parameters()})
            with torch.no_grad():
                for weight in model.parameters():
                    weight -= 0.01 * weight.grad
        followed = momentum.state_dict() if momentum else {}
        state = model.state_dict() | {f"momentum.{name}": value for name, value in followed.items()}
        torch.save({"gradients": gradients, "state": state, "loss": loss.detach()}, out / f"{torchrun.number()}.pt")


def furthest(a: dict, b: dict) -> float:
    """The largest difference between tensors of the same names."""
    assert a.keys() == b.keys()
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)


def agree(a: dict, b: dict) -> None:
    assert abs(a["loss"] - b["loss"]) < 1e-10 and furthest(a["state"], b["state"]) < 1e-10
    for ours, theirs in zip(a["gradients"], b["gradients"], strict=True):
        assert max(gradient.abs().max() for gradient in ours.values()) > 1e-3
        assert furthest(ours, theirs) < 1e-10


@pytest.fixture
def one(tmp_path):
    """What one process makes of `three_steps`."""
    def made(*arguments):
        (tmp_path / "one").mkdir()
        try:
            three_steps(tmp_path / "one", *arguments)
        finally:
            torch.set_default_dtype(torch.float32)
        return torch.load(tmp_path / "one" / "0.pt")
    return made


@pytest.mark.parametrize("model, fixed, many", [("tgdt", 0, 1), ("user", 3, 1), ("tgdt-user", 0, 30)])
def test_two_ranks_train_as_one_does(tmp_path, one, model, fixed, many):
    """Gradients, weights, BatchNorm's statistics and queues, in float64; 5 images and 7 captions, cut unevenly, and
    30 times as many captions."""
    assert [code for code, _ in two_ranks(three_steps, tmp_path, model, fixed, 1, many)] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    agree(first, one(model, fixed, 1, many))
    assert furthest(first["state"], second["state"]) == 0
    assert model == "tgdt" or any("queue.keys" in name for name in first["state"])
    assert model == "tgdt" or any("running_var" in name for name in first["state"])


# ------------------------------------------------------------------------------------------------------ whole runs


def run_main(out: Path, flags: list[str], at: int = 0, sent: int = 0) -> int:
    """`train.py` with these flags; after step `at`, rank 1 gets the signal `sent`."""
    after_step, seen = training.Run.after_step, []

    def interrupted(run, *arguments):
        seen.append(1)
        if len(seen) == at and torchrun.number() == 1:
            print("signal", file=sys.stderr)
            os.kill(os.getpid(), sent)
        return after_step(run, *arguments)

    training.Run.after_step = interrupted
    return train.main([*flags, "--out", str(out)])


def test_resume_on_two_ranks_takes_exactly_the_path_of_the_uninterrupted_run(flags, tmp_path):
    """Dropout and caption noise are at work. One rank alone hears the Ctrl-C, and both stop after step 6 of 8."""
    flags = [*flags[:-2], "--model", "tgdt-user", "--guide", "self", "--queue", "7", "--noise", "0.2"]
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert [code for code, _ in two_ranks(run_main, whole, flags)] == [0, 0]
    stopped = two_ranks(run_main, out, flags, 6, signal.SIGINT)
    assert [code for code, _ in stopped] == [130, 130]
    assert "stopped at epoch" in stopped[0][1] and stopped[1][1] == "signal\n"
    state = folder.read_checkpoint(out / "checkpoint.pt")
    assert (state["epoch"], state["step"]) == (1, 2)
    assert [code for code, _ in two_ranks(run_main, out, [*flags, "--resume"])] == [0, 0]
    ours, theirs = (folder.read_checkpoint(place / "checkpoint.pt") for place in (out, whole))
    assert furthest(ours["model"], theirs["model"]) == 0 and furthest(ours["momentum"], theirs["momentum"]) == 0
    assert [line["val"] for line in ours["history"]] == [line["val"] for line in theirs["history"]]


def test_two_ranks_evaluate_and_report_as_one_does(flags, tmp_path, undrawn):
    flags = [*flags[:-2], "--dropout", "0"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert train.main([*flags, "--out", str(one)]) == 0
    (code, said), (other, nothing) = two_ranks(run_main, two, flags)
    assert (code, other, nothing) == (0, 0, "") and "two-stage" in said
    a, b = (json.loads((out / "metrics.json").read_text()) for out in (one, two))
    assert a["two_stage"] == b["two_stage"]
    a, b = (folder.read_checkpoint(out / "checkpoint.pt")["history"] for out in (one, two))
    assert [line["loss"] for line in a] == pytest.approx([line["loss"] for line in b], rel=1e-3)


def test_a_lost_rank_ends_the_others_with_a_line(flags, tmp_path):
    out = tmp_path / "run"
    (code, said), (lost, _) = two_ranks(run_main, out, flags[:-2], 3, signal.SIGKILL)
    assert (code, lost) == (2, -signal.SIGKILL)
    assert said.splitlines()[-1].startswith("error: another process") and "Traceback" not in said


def test_one_rank_alone_reports_a_mistake(flags, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "settings.json").write_text("{}")
    ended = two_ranks(run_main, out, flags[:-2])
    assert [code for code, _ in ended] == [2, 2]
    assert "".join(said for _, said in ended).count("\n") == 1 and "already holds a run" in ended[0][1]
    assert (out / "settings.json").read_text() == "{}"


def test_a_collective_that_fails_says_why():
    def broken(text: str):
        raise RuntimeError(text)

    for text, said in (("NCCL error: unhandled system error\nmore", r"checkpoint \(NCCL error: unhandled"),
                       ("Connection closed by peer", "last checkpoint$")):
        with pytest.raises(ConnectionError, match=said):
            torchrun.exchange(broken, text)


def test_torchrun_trains_and_ctrl_c_saves(flags, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               str(ROOT / "train.py"), *flags, "--epochs", "10000"]
    with open(tmp_path / "said", "w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, cwd=tmp_path,
                                   env=os.environ | {"MASTER_ADDR": "127.0.0.1"})
        try:
            end, history = time.monotonic() + LIMIT, tmp_path / "run" / "history.jsonl"
            while not history.is_file() and process.poll() is None and time.monotonic() < end:
                time.sleep(0.1)
            assert history.is_file(), (tmp_path / "said").read_text()
            process.send_signal(signal.SIGINT)
            process.wait(LIMIT)
        finally:
            process.kill()
    said = (tmp_path / "said").read_text()
    assert said.count("stopped at epoch") == 1 and said.count("epoch   1 ") == 1
    assert folder.read_checkpoint(tmp_path / "run" / "checkpoint.pt")["epoch"] >= 1


# --------------------------------------------------------------------------------------------------------- pieces


@pytest.mark.parametrize("many", [1, 40])
def test_pieces_have_the_gradients_of_the_whole(tmp_path, one, many):
    whole = one("tgdt", 0, 1, many)
    (tmp_path / "one").rename(tmp_path / "whole")
    agree(one("tgdt", 0, 3, many), whole)


def test_pieces_are_computed_again_with_the_same_dropout(monkeypatch):
    """Beside the same pieces, encoded once and kept."""
    torch.manual_seed(0)
    chosen = settings.make({"dim": 8, "region_width": 8, "feedforward": 16, "dropout": 0.3})
    model, batch = models.build(chosen, models.text_encoder(chosen)[0], 6), made_batch([2, 4, 3], [2, 1, 1], 0)
    gradients = []
    for checkpoint in (ranks.checkpoint, lambda branch, piece, use_reentrant: branch(piece)):
        monkeypatch.setattr(ranks, "checkpoint", checkpoint)
        torch.manual_seed(1)
        train.batch_loss(model, None, batch, chosen, share=partial(ranks.encode, pieces=3)).backward()
        gradients.append({name: weight.grad.clone() for name, weight in model.named_parameters()})
        model.zero_grad()
    assert furthest(*gradients) == 0


def test_a_batch_is_not_cut_into_more_pieces_than_it_has_images():
    with pytest.raises(BadInput, match="a batch of 2 images.*1 processes x 3 pieces"):
        ranks.encode(None, made_batch([2, 2], [2, 2], 0), pieces=3)


def test_pieces_are_refused_where_they_would_not_be_exact(flags, tmp_path, capsys):
    for model in ("user", "tgdt-user"):
        assert train.main([*flags, "--model", model, "--pieces", "2"]) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and "--pieces 2" in message and "BatchNorm" in message
    assert not (tmp_path / "run").exists()
