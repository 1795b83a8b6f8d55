"""Training end to end on a tiny SCAN folder: the run folder, resume, kills, Ctrl-C, bad input, both command lines."""
import copy
import json
import math
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import save_clip
from PIL import Image

import data
import losses
import retrieve
import tgdt
import train
import user
from harness import console, folder, models, pictures, report, settings, training
from harness import flags as cli
from sources import files
from sources.files import BadInput


def weights(out: Path, name: str = "checkpoint.pt") -> dict[str, torch.Tensor]:
    return folder.read_checkpoint(out / name)["model"]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_leaves_its_folder_and_prints_the_table(flags, tmp_path, capsys):
    assert train.main(flags) == 0
    out = tmp_path / "run"
    names = {"settings.json", "checkpoint.pt", "best.pt", "history.jsonl", "metrics.json", "curves.png",
             "retrieval.png", "alignment.png", "tokenizer"}
    assert {p.name for p in out.iterdir()} == names
    history = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in history] == [1, 2]
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["split"] == "val" and metrics["images"] == 4 and metrics["captions"] == 8
    best = max(history, key=lambda line: (line["val"]["two_stage"]["rsum"], line["epoch"]))  # the later one of equals
    assert metrics["epoch"] == best["epoch"] and {"global", "local", "two_stage"} <= metrics.keys()
    assert set(metrics["two_stage"]["i2t"]) == {"r1", "r5", "r10", "median_rank", "mean_rank"}
    text, warned = capsys.readouterr()
    assert "no test split" in text and "the val split has 4 images" in warned and "word pieces" not in warned
    assert all(name in text for name in ("global only", "exhaustive local", "two-stage"))

    # The evaluation of the run folder says the same, also after the text encoder's own folder is gone.
    assert retrieve.main(["evaluate", str(out)]) == 0
    again = capsys.readouterr().out
    assert [line[:70] for line in again.splitlines() if line.startswith("two-stage")] == [
        line[:70] for line in text.splitlines() if line.startswith("two-stage")]
    picture = tmp_path / "found.png"
    assert retrieve.main(["search", str(out), "a red dog", "--top", "2", "--save", str(picture)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + 2 + 1 and picture.stat().st_size > 0
    assert retrieve.main(["search", str(out), "--image", "2", "--top", "3"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + 3


@pytest.mark.parametrize("guide", ["self", "none"])
def test_a_run_of_user_has_no_fine_tokens(flags, tmp_path, capsys, guide):
    out = tmp_path / "run"
    assert train.main([*flags, "--model", "user", "--guide", guide]) == 0
    names = {"settings.json", "checkpoint.pt", "best.pt", "history.jsonl", "metrics.json", "curves.png",
             "retrieval.png", "tokenizer"} | ({"guide.png"} if guide == "self" else set())
    assert {p.name for p in out.iterdir()} == names
    metrics = json.loads((out / "metrics.json").read_text())
    assert "global" in metrics and not {"local", "two_stage", "mixed"} & metrics.keys()
    first = json.loads((out / "history.jsonl").read_text().splitlines()[0])
    assert "negatives" not in first and {side: len(first["pooling"][side]) for side in first["pooling"]} == {
        "image": 3, "text": 8}
    assert sum(first["pooling"]["image"]) == pytest.approx(1, abs=1e-3)
    assert retrieve.main(["evaluate", str(out)]) == 0
    said = capsys.readouterr().out
    assert "global only" in said and "two-stage" not in said
    assert retrieve.main(["search", str(out), "a red dog", "--top", "2"]) == 0
    assert retrieve.main(["search", str(out), "--image", "2", "--top", "3"]) == 0


def test_a_run_of_the_unified_model_has_both(flags, tmp_path):
    out = tmp_path / "run"
    assert train.main([*flags, "--model", "tgdt-user", "--epochs", "1"]) == 0
    assert {"global", "local", "two_stage"} <= json.loads((out / "metrics.json").read_text()).keys()
    names = weights(out).keys()
    assert any(name.startswith("fine_words.") for name in names) and any("mlp_in" in name for name in names)
    assert (out / "alignment.png").is_file()


@pytest.mark.parametrize("model", ["user", "tgdt-user"])
@pytest.mark.usefixtures("undrawn")
def test_a_clip_guides_and_its_embeddings_are_kept(flags, root, tmp_path, capsys, model):
    """Pictures by Karpathy's JSON beside the SCAN files; the cache beside the data; evaluation reads it again."""
    pictured = tmp_path / "pictured"
    (pictured / "images").mkdir(parents=True)
    images = []
    for split, stem in (("train", "train"), ("val", "dev")):
        captions = (root / f"{stem}_caps.txt").read_text().split("\n")
        (pictured / f"{stem}_ims.npy").write_bytes((root / f"{stem}_ims.npy").read_bytes())
        (pictured / f"{stem}_caps.txt").write_text("\n".join(captions))
        for row in range(len(captions) // 2):
            name = f"{stem}{row}.png"
            Image.new("RGB", (20, 20), (row * 30, 90, len(stem) * 40)).save(pictured / "images" / name)
            images.append({"filename": name, "split": split,
                           "sentences": [{"raw": text} for text in captions[2 * row : 2 * row + 2]]})
    (pictured / "dataset_flickr8k.json").write_text(json.dumps({"images": images}))
    flags[flags.index("--data-root") + 1] = str(pictured)
    clip, out = save_clip(tmp_path / "clip"), tmp_path / "run"
    flags += ["--model", model, "--guide", "clip", "--clip-model", str(clip), "--epochs", "1"]
    assert train.main(flags) == 0
    assert "guide.project.weight" in weights(out) and not any("vision" in name for name in weights(out))
    kept = [path.name for path in (pictured / "cache").iterdir() if path.is_dir()]
    assert len(kept) == 1 and kept[0].startswith("clip-guide-")
    assert (pictured / "cache" / kept[0] / "clip").stat().st_size == 12 * 6 * 4
    assert retrieve.main(["evaluate", str(out), "--clip-model", "nowhere"]) == 0  # all of it is kept
    assert retrieve.main(["search", str(out), "--image", "dev2.png"]) == 0
    Image.new("RGB", (20, 20)).save(pictured / "images" / "dev3.png")
    capsys.readouterr()
    other = str(save_clip(tmp_path / "other", seed=1))
    assert retrieve.main(["evaluate", str(out), "--clip-model", other]) == 2
    assert "the model was trained with the network CLIP" in capsys.readouterr().err
    (pictured / "images" / "dev3.png").unlink()
    capsys.readouterr()
    assert retrieve.main(["evaluate", str(out)]) == 2
    message = capsys.readouterr().err
    assert "1 of 4" in message and "image 3" in message and message.count("\n") == 1
    assert retrieve.main(["evaluate", str(out), "--data-root", str(root)]) == 2
    assert "4 of 4" in capsys.readouterr().err


@pytest.mark.usefixtures("undrawn")
def test_a_guide_that_cannot_be_is_refused(flags, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused([*flags, "--guide", "self"], capsys, "--guide self", "tgdt-user")
    guided = [*flags, "--model", "user", "--guide", "clip", "--clip-model", str(save_clip(tmp_path / "clip"))]
    assert train.main(guided) == 2  # it looks at pictures, which are to be fetched first
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: there is no network") and "Flickr8k_Dataset.zip" in message
    refused([*flags, "--model", "user", "--queue", "3"], capsys, "--queue 3", "4")
    refused([*flags, "--model", "user", "--fixed-regions", "36"], capsys, "--fixed-regions 36", "image 0 of train", "3")


@pytest.mark.parametrize("model", ["tgdt", "user"])
@pytest.mark.usefixtures("undrawn")
def test_the_momentum_copy_may_be_what_is_kept(flags, tmp_path, model, monkeypatch):
    """It changes what is evaluated and kept, not the training; a line of history tells what the model itself scores."""
    judged, evaluate = [], training.Run.evaluate
    monkeypatch.setattr(training.Run, "evaluate", lambda run, of: judged.append(of is run.kept) or evaluate(run, of))
    for name in ("model", "momentum"):
        own = ["--model", model, "--queue", "8", "--keep", name, "--epochs", "1", "--out", str(tmp_path / name)]
        assert train.main([*flags, *own]) == 0
    a, b = (folder.read_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("model", "momentum"))
    assert judged == [True, True, False]  # of the second run first the copy, then the model itself
    assert same(a["model"], b["model"]) and int(b["momentum"]["steps"]) == 4  # the copy follows in each step
    encoder = {name.removeprefix("encoder."): value for name, value in b["momentum"].items()
               if name.startswith("encoder.")}
    lines = [[json.loads(line) for line in (tmp_path / name / "history.jsonl").read_text().splitlines()]
             for name in ("model", "momentum")]
    stage = "global" if model == "user" else "two_stage"
    assert [line["val"][stage]["rsum"] for line in lines[0]] == [line["val_model_rsum"] for line in lines[1]]
    best = folder.read_checkpoint(tmp_path / "momentum" / "best.pt")
    assert same(best["model"], encoder)
    assert not same(best["model"], folder.read_checkpoint(tmp_path / "model" / "best.pt")["model"])
    assert retrieve.main(["evaluate", str(tmp_path / "momentum")]) == 0


def test_without_a_queue_there_is_uto_on_the_batch_alone(bert):
    chosen = settings.make({"dataset": "flickr8k", "model": "user", "text_encoder": str(bert), "text_layers": 1,
                            "dim": 8, "guide": "none", "queue": 0})
    model = models.build(chosen, models.text_encoder(chosen)[0], 6).eval()
    g = torch.Generator().manual_seed(0)
    batch = {"regions": torch.randn(3, 2, 6, generator=g), "region_mask": torch.ones(3, 2, dtype=torch.bool),
             "word_ids": torch.randint(5, 9, (3, 4), generator=g), "word_mask": torch.ones(3, 4, dtype=torch.bool),
             "image_row": torch.arange(3), "image_index": torch.arange(3)}
    similarity = model.encode_images(batch).globals @ model.encode_texts(batch).globals.T
    want = chosen.uto.batch_weight * losses.uto_batch(similarity, chosen.uto.mu, chosen.uto.gamma, reward_floor=False)
    assert torch.allclose(train.batch_loss(model, None, batch, chosen), want, atol=1e-5)


@pytest.mark.usefixtures("undrawn")
def test_a_frozen_text_encoder_keeps_its_weights_and_its_dropout(flags, tmp_path, monkeypatch):
    """No gradient is computed for them either."""
    in_training, after_step = [], training.Run.after_step
    monkeypatch.setattr(training.Run, "after_step", lambda run, *given: in_training.append(run.model.bert.training)
                        or after_step(run, *given))
    assert train.main([*flags, "--model", "user", "--queue", "8", "--text-lr", "0", "--out", str(tmp_path / "a")]) == 0
    assert in_training == [True] * 8
    trained, chosen = weights(tmp_path / "a"), folder.read_settings(tmp_path / "a")
    encoder = models.text_encoder(chosen)[0]
    for name, value in encoder.state_dict().items():
        assert torch.equal(trained[f"bert.{name}"], value), name
    train.make_optimizer(models.build(chosen, encoder, 6), chosen.training)
    assert not any(weight.requires_grad for weight in encoder.parameters())


def test_the_first_step_of_the_optimizer_by_hand(bert):
    """AdamW: decay first, then a step as long as the rate, whatever the gradient's length. BERT's rate is its own."""
    chosen = settings.make({"dataset": "flickr8k", "model": "user", "text_encoder": str(bert), "text_layers": 1,
                            "dim": 8, "guide": "none", "lr": 0.1, "text_lr": 0.2, "weight_decay": 0.5})
    model = models.build(chosen, models.text_encoder(chosen)[0], 6)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    optimizer = train.make_optimizer(model, chosen.training)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"]
    for weight in model.parameters():
        weight.grad = torch.full_like(weight, 3.0)
    optimizer.step()
    for name, weight in model.named_parameters():
        rate = 0.02 if name.startswith("bert.") else 0.1
        assert torch.allclose(weight, before[name] * (1 - rate * 0.5) - rate, atol=1e-6), name


def test_the_momentum_copy_follows_as_the_settings_say(flags, tmp_path):
    given, _ = cli.parse([*flags, "--model", "user", "--momentum", "0.75", "--queue", "8"])
    found = training.set_up(settings.make(given), tmp_path / "run", "cpu").momentum
    assert (found.momentum, found.warm, len(found.image_queue.owner)) == (0.75, True, 8)


@pytest.mark.usefixtures("undrawn")
def test_the_same_seed_trains_the_same_weights_and_another_does_not(flags, tmp_path):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert train.main([*flags[:-1], str(tmp_path / name), "--seed", seed]) == 0
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))


@pytest.mark.parametrize("model, steps", [("tgdt", 4), ("user", 6), ("tgdt-user", 3)])
@pytest.mark.usefixtures("undrawn")
def test_resume_takes_exactly_the_path_of_the_uninterrupted_run(flags, tmp_path, monkeypatch, model, steps):
    """Stopped by Ctrl-C after some steps, with four per epoch, with dropout and caption noise at work, then resumed."""
    flags = ["--model", model, "--noise", "0.3", "--seed", "5", *flags]
    flags = ["--queue", "7", *flags] if model != "tgdt" else flags
    whole = tmp_path / "whole"
    assert train.main([*flags[:-1], str(whole)]) == 0

    after_step, seen = training.Run.after_step, []

    def interrupted(run, *arguments):
        seen.append(1)
        if len(seen) == steps:
            os.kill(os.getpid(), signal.SIGINT)
        return after_step(run, *arguments)

    monkeypatch.setattr(training.Run, "after_step", interrupted)
    assert train.main(flags) == 130
    assert len(seen) == steps
    out = tmp_path / "run"
    state = folder.read_checkpoint(out / "checkpoint.pt")
    assert state["epoch"] * 4 + state["step"] == steps
    monkeypatch.setattr(training.Run, "after_step", after_step)
    assert retrieve.main(["evaluate", str(out)]) == 0  # usable as it stands
    assert train.main(["--resume", "--out", str(out), "--device", "cpu"]) == 0
    assert same(weights(whole), weights(out)) and same(weights(whole, "best.pt"), weights(out, "best.pt"))
    if model != "tgdt":  # the momentum encoders and the queues as well
        momentum = [folder.read_checkpoint(f / "checkpoint.pt")["momentum"] for f in (whole, out)]
        assert same(*momentum) and momentum[0]["text_queue.owner"].min() >= 0 and int(momentum[0]["steps"]) == 8
    lines = [[json.loads(line) for line in (f / "history.jsonl").read_text().splitlines()] for f in (whole, out)]
    assert [line["val"] for line in lines[0]] == [line["val"] for line in lines[1]]


def test_a_write_that_fails_leaves_nothing_behind(tmp_path):
    def fail(file):
        raise ValueError("too wide a figure")

    with pytest.raises(ValueError, match="too wide"):
        files.write_whole(tmp_path / "a.png", fail)
    assert not list(tmp_path.iterdir())


def test_a_kill_while_writing_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "checkpoint.pt"
    files.write_whole(path, lambda file: file.write(b"old and whole"))

    def killed(file):
        file.write(b"new, ha")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write_whole(path, killed)
    assert path.read_bytes() == b"old and whole"


def test_a_second_interrupt_stops_at_once():
    with console.Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.seen
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_closed_terminal_is_noted_like_ctrl_c():
    with console.Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGHUP)
        assert interrupt.seen


def refused(arguments: list[str], capsys, *said: str) -> None:
    before = {p: p.read_bytes() for p in Path(arguments[arguments.index("--out") + 1]).rglob("*") if p.is_file()}
    assert train.main(arguments) == 2
    *before_it, message = capsys.readouterr().err.splitlines()
    usual = "loading ", "regions ", "warning: "
    assert message.startswith("error: ") and all(line.startswith(usual) for line in before_it)
    for words in said:
        assert words in message
    after = {p: p.read_bytes() for p in Path(arguments[arguments.index("--out") + 1]).rglob("*") if p.is_file()}
    assert after == before


@pytest.mark.usefixtures("undrawn")
def test_a_folder_that_holds_a_run_is_not_written_over(flags, tmp_path, capsys):
    out = tmp_path / "run"
    assert train.main(flags) == 0
    capsys.readouterr()
    refused(flags, capsys, str(out), "--resume")
    refused([*flags, "--resume", "--dim", "16"], capsys, "--dim", "8", "16")
    refused([*flags, "--resume", "--seed", "3"], capsys, "--seed 0, not 3")
    refused([*flags, "--resume", "--epochs", "1"], capsys, "--epochs 2, not 1")
    (out / "checkpoint.pt").write_bytes(b"no checkpoint")
    refused([*flags, "--resume"], capsys, "checkpoint.pt", "a checkpoint of this program")
    torch.save({"other": 1}, out / "checkpoint.pt")
    refused([*flags, "--resume"], capsys, "checkpoint.pt", "a checkpoint of this program")
    (out / "settings.json").write_text("{")
    refused([*flags, "--resume"], capsys, "settings.json")


@pytest.mark.parametrize("name", ["tokenizer/mine.txt", "metrics.json", "guide.png", "manifest.json"])
def test_files_of_somebody_else_are_left_alone(flags, tmp_path, capsys, name):
    mine = tmp_path / "run" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    refused(flags, capsys, "already holds a run")  # compares the folder before and after


@pytest.mark.usefixtures("undrawn")
def test_resume_prints_the_settings_of_its_run(flags, tmp_path, capsys):
    resume = ["--resume", "--print-settings", "--out"]
    assert train.main([*resume, str(tmp_path / "none")]) == 2 and "no run here" in capsys.readouterr().err
    assert train.main([*flags, "--epochs", "1", "--lr", "0.003"]) == 0
    capsys.readouterr()
    assert train.main([*resume, str(tmp_path / "run")]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "run" / "settings.json").read_text())


def test_a_caption_without_a_word_is_found_before_the_pass_over_the_pictures(flags, tmp_path, capsys, monkeypatch):
    def refuse(captions, tokenizer, longest):
        raise BadInput("the tokenizer finds no word in it")

    monkeypatch.setattr(data, "tokenize", refuse)
    monkeypatch.setattr(pictures, "prepare", lambda *given: pytest.fail("looked at the pictures"))
    refused(flags, capsys, "finds no word")


@pytest.mark.usefixtures("undrawn")
def test_resume_wants_a_run_and_the_features_it_was_trained_on(flags, tmp_path, capsys):
    refused([*flags, "--resume"], capsys, "no run here")
    assert train.main([*flags, "--epochs", "1"]) == 0
    wide = tmp_path / "wide"
    wide.mkdir()
    for name in ("train", "dev"):
        np.save(wide / f"{name}_ims.npy", np.zeros((2, 3, 7), np.float32))
        (wide / f"{name}_caps.txt").write_text("a dog\na cat\nred ball\nblue ball\n")
    capsys.readouterr()
    assert retrieve.main(["evaluate", str(tmp_path / "run"), "--data-root", str(wide)]) == 2
    message = capsys.readouterr().err
    assert "6 numbers" in message and "7" in message
    assert retrieve.main(["evaluate", str(tmp_path / "run"), "--split", "test"]) == 2
    assert "no test split" in capsys.readouterr().err


@pytest.mark.usefixtures("undrawn")
def test_more_epochs_may_be_asked_for(flags, tmp_path):
    assert train.main([*flags, "--epochs", "1"]) == 0
    assert train.main([*flags, "--epochs", "3", "--resume"]) == 0
    assert len((tmp_path / "run" / "history.jsonl").read_text().splitlines()) == 3


def test_bad_data_and_a_missing_text_encoder_end_in_one_line(flags, root, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    at = flags.index("--text-encoder") + 1
    refused([*flags[:at], str(tmp_path / "nowhere"), *flags[at + 1 :]], capsys, "nowhere", "--text-encoder")
    at = flags.index("--data-root") + 1
    refused([*flags[:at], str(tmp_path / "nothing"), *flags[at + 1 :], "--regions", "files"], capsys, "nothing")
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("train", "dev"):
        features = np.load(root / f"{name}_ims.npy")
        if name == "train":
            features[5, 1, 2] = np.nan
        np.save(broken / f"{name}_ims.npy", features)
        (broken / f"{name}_caps.txt").write_text((root / f"{name}_caps.txt").read_text())
    assert train.main([*flags[:at], str(broken), *flags[at + 1 :]]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "train_ims.npy" in message and "5" in message


@pytest.mark.usefixtures("undrawn")
def test_workers_read_the_same_batches(flags, tmp_path):
    flags = ["--noise", "0.3", *flags]
    assert train.main([*flags[:-1], str(tmp_path / "a"), "--epochs", "1"]) == 0
    assert train.main([*flags[:-1], str(tmp_path / "b"), "--epochs", "1", "--workers", "2"]) == 0
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))


@pytest.mark.parametrize(("given", "workers"), [((), 1), (("--workers", "0"), 0), (("--workers", "3"), 3)])
def test_a_gpu_has_processes_that_read_unless_none_are_asked_for(flags, given, workers, tmp_path, monkeypatch):
    values, options = cli.parse([*flags, *given])
    run, seen = training.set_up(settings.make(values), tmp_path / "run", "cpu", workers=options.workers), {}
    run.device = torch.device("cuda")
    monkeypatch.setattr(training, "DataLoader", lambda pairs, **options: seen.update(options) or [])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert list(run.batches()) == [] and seen["num_workers"] == workers


def test_batches_cross_processes_as_arrays_for_shared_memory_may_be_too_small(flags, tmp_path, monkeypatch):
    given, options = cli.parse(flags)
    run, seen = training.set_up(settings.make(given), tmp_path / "run", "cpu"), {}
    monkeypatch.setattr(training, "DataLoader", lambda pairs, **options: seen.update(options) or [])
    assert list(run.batches()) == []
    batch = seen["collate_fn"]({"word_ids": torch.ones(2, 3, dtype=torch.long)})
    assert type(batch["word_ids"]) is np.ndarray and batch["word_ids"].dtype == np.int64


def test_the_loss_masks_the_other_captions_of_an_image():
    """Two captions of each image, alike: the loss is 0 only if they are no negatives of each other's image."""

    class Fixed(torch.nn.Module):
        image = torch.eye(2)
        text = torch.eye(2)[[0, 0, 1, 1]]

        def encode_images(self, batch):
            return tgdt.Encoded(self.image, self.image[:, None], torch.ones(2, 1, dtype=torch.bool))

        def encode_texts(self, batch):
            text = self.text[batch["word_ids"][:, 0]]
            return tgdt.Encoded(text, text[:, None], torch.ones(len(text), 1, dtype=torch.bool))

    chosen = settings.make({"dataset": "flickr8k"})
    batch = {"regions": torch.zeros(2, 1, 1), "word_ids": torch.arange(4)[:, None],
             "word_mask": torch.ones(4, 1, dtype=torch.bool), "image_row": torch.tensor([0, 0, 1, 1])}
    assert train.batch_loss(Fixed(), None, batch, chosen).item() == 0
    batch["image_row"] = torch.tensor([0, 1, 1, 0])  # now captions 1 and 3 belong to the image they do not fit
    assert train.batch_loss(Fixed(), None, batch, chosen).item() > 1


@pytest.mark.parametrize("model_name", ["user", "tgdt-user"])
def test_the_loss_of_a_batch_with_queues_by_hand(model_name, bert):
    """The copy follows first; the queues hold what was there before this batch; an image's own keys are masked."""
    chosen = settings.make({"dataset": "flickr8k", "model": model_name, "text_encoder": str(bert), "text_layers": 1,
                            "dim": 8, "guide": "none", "feedforward": 16, "queue": 8, "batch_size": 8,
                            "captions_per_image": 2})
    chosen.uto.mu, chosen.uto.gamma = 5.0, -1.0  # so that each key counts
    model = models.build(chosen, models.text_encoder(chosen)[0], 6).eval()
    momentum = user.MomentumContrast(model, 8, 8, momentum=0.5)
    momentum.steps += 9
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():  # the copy is behind
            weight += 0.3 * torch.randn(weight.shape, generator=g)
    earlier = torch.nn.functional.normalize(torch.randn(2, 6, 8, generator=g), dim=-1)
    owners = torch.tensor([[9, 1, 7, 2, 0, 3], [0, 9, 4, 4, 1, 6]])  # of the keys of images, and of those of captions
    momentum.enqueue(earlier[0], earlier[1], owners[0], owners[1])
    row, image_index = torch.tensor([1, 0, 2, 1]), torch.tensor([9, 7, 1, 9])
    batch = {"regions": torch.randn(3, 2, 6, generator=g), "region_mask": torch.ones(3, 2, dtype=torch.bool),
             "boxes": torch.rand(3, 2, 4, generator=g), "word_ids": torch.randint(5, 9, (4, 5), generator=g),
             "word_mask": torch.ones(4, 5, dtype=torch.bool), "image_row": row, "image_index": image_index}

    follower = copy.deepcopy(momentum)
    follower.update(model)
    ours, its = ((of.encode_images(batch), of.encode_texts(batch)) for of in (model, follower.encoder))
    keys = losses.Keys(its[0].globals[row], its[1].globals, earlier[0], earlier[1],
                       *(torch.tensor([[owner == image for owner in side] for image in image_index.tolist()])
                         for side in owners.tolist()))
    want = losses.uto(ours[0].globals[row], ours[1].globals, keys, row[:, None] == row, **vars(chosen.uto))
    if model_name == "tgdt-user":
        want = want + losses.contrast(*ours, row, chosen.cmc.reduction, **vars(chosen.infonce), teacher=its)
    assert torch.allclose(train.batch_loss(model, momentum, batch, chosen), want, atol=1e-5)
    # Then the new keys come in: two in the empty places, the others in those of the oldest.
    assert momentum.image_queue.owner.tolist() == [1, 1, 7, 2, 0, 3, 7, 9]
    assert momentum.text_queue.owner.tolist() == [1, 9, 4, 4, 1, 6, 9, 7]
    assert torch.allclose(momentum.image_queue.keys[[6, 7, 0]], its[0].globals, atol=1e-6)
    assert torch.allclose(momentum.text_queue.keys[[6, 7, 0, 1]], its[1].globals, atol=1e-6)


@pytest.mark.usefixtures("undrawn")
def test_a_run_does_what_its_settings_say(flags, tmp_path, monkeypatch):
    """Precision, easy epochs, clipping, learning rates, weight decay, the loss on record, and which epoch is best."""
    seen = {"negatives": [], "autocast": [], "norm": [], "groups": [], "loss": []}
    loss, encode_images, after_step = losses.tgdt_loss, tgdt.TGDT.encode_images, training.Run.after_step

    def watched_loss(*given, negatives, **more):
        seen["negatives"].append(negatives)
        seen["loss"].append(loss(*given, negatives=negatives, **more))
        return seen["loss"][-1]

    def watched_encoder(model, batch):
        if model.training:
            seen["autocast"].append(torch.is_autocast_enabled("cpu"))
        return encode_images(model, batch)

    def watched_step(run, *given):
        seen["norm"].append(math.sqrt(sum(w.grad.square().sum().item() for w in run.model.parameters()
                                          if w.grad is not None)))
        seen["groups"].append([(group["lr"], group["weight_decay"]) for group in run.optimizer.param_groups])
        words = {id(weight) for weight in run.model.bert.parameters()}
        assert [all((id(weight) in words) == is_words for weight in group["params"])
                for group, is_words in zip(run.optimizer.param_groups, (False, True), strict=True)] == [True, True]
        return after_step(run, *given)

    monkeypatch.setattr(losses, "tgdt_loss", watched_loss)
    monkeypatch.setattr(tgdt.TGDT, "encode_images", watched_encoder)
    monkeypatch.setattr(training.Run, "after_step", watched_step)
    rsums = iter([30.0, 90.0, 60.0])

    def measured(run, model):
        one_way = {"r1": 0.0, "r5": 0.0, "r10": 0.0}
        return {"global": {"i2t": one_way, "t2i": one_way, "rsum": next(rsums)}}

    monkeypatch.setattr(training.Run, "evaluate", measured)
    monkeypatch.setattr(report, "report", lambda *given: None)
    assert train.main([*flags, "--epochs", "3", "--easy-epochs", "2", "--precision", "bfloat16", "--max-norm", "0.01",
                       "--keep", "model", "--lr", "1e-3", "--text-lr", "0.2", "--weight-decay", "0.03", "--warmup", "4",
                       "--schedule", "linear", "--captions-per-image", "2"]) == 0
    assert seen["negatives"] == ["mean"] * 8 + ["hardest"] * 4
    assert seen["autocast"] == [True] * 12
    assert seen["norm"] == pytest.approx([0.01] * 12, rel=1e-3)
    rates = [0.25, 0.5, 0.75, 1.0, *((12 - step) / 8 for step in range(4, 12))]  # 4 steps of warm-up, then down to 0
    assert seen["groups"] == [[(pytest.approx(1e-3 * rate), 0.03), (pytest.approx(2e-4 * rate), 0.03)]
                              for rate in rates]
    assert folder.read_checkpoint(tmp_path / "run" / "best.pt")["epoch"] == 2
    history = folder.read_checkpoint(tmp_path / "run" / "checkpoint.pt")["history"]
    of_a_pair = [loss.item() / 4 for loss in seen["loss"]]  # 4 captions; it is looked at after the last of 4 steps
    assert [line["loss"] for line in history] == pytest.approx(of_a_pair[3::4])


def test_a_run_trains_on_the_batches_of_its_settings_and_is_judged_by_val(flags, tmp_path):
    """Batch size, captions per image, seed, epoch and noise."""
    given, _ = cli.parse([*flags, "--captions-per-image", "2", "--seed", "3", "--noise", "0.5"])
    run = training.set_up(settings.make(given), tmp_path / "run", "cpu", quiet=True)
    run.epoch, split = 1, run.splits["train"]
    pairs = data.Pairs(split, run.words["train"], data.CaptionNoise(run.tokenizer, 0.5), (3, 1))
    want = [pairs[captions] for captions in data.epoch_batches(split.image_of, 4, 2, 3, 1)]
    for ours, theirs in zip(run.batches(), want, strict=True):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    judged = run.evaluate(run.model)
    assert (judged["split"], judged["images"]) == ("val", 4)


@pytest.mark.parametrize("model", ["tgdt", "user", "tgdt-user"])
def test_the_settings_of_a_loss_reach_it(model, monkeypatch):
    chosen, calls = settings.make({"dataset": "flickr8k", "model": model}), []
    monkeypatch.setattr(train, "forward", lambda *given: ("images", "texts", "keys", "teacher"))
    for name in ("tgdt_loss", "user_loss", "unified_loss"):
        monkeypatch.setattr(losses, name, lambda *given, name=name, **more: calls.append((name, given[3:], more)))
    train.batch_loss(None, None, {"image_row": None}, chosen, negatives="mean")
    infonce = vars(chosen.infonce) | {"teacher": "teacher"}
    assert calls == [{"tgdt": ("tgdt_loss", (), infonce | vars(chosen.cmc) | {"negatives": "mean"}),
                      "user": ("user_loss", ("keys",), infonce | vars(chosen.uto)),
                      "tgdt-user": ("unified_loss", ("keys",),
                                    infonce | vars(chosen.uto) | {"reduction": chosen.cmc.reduction})}[model]]


def test_one_picture_is_too_few_to_train_on(flags, root, tmp_path, capsys):
    alone = tmp_path / "alone"
    alone.mkdir()
    for name, images in (("train", 1), ("dev", 4)):
        np.save(alone / f"{name}_ims.npy", np.load(root / f"{name}_ims.npy")[:images])
        captions = (root / f"{name}_caps.txt").read_text().splitlines()[: 2 * images]
        (alone / f"{name}_caps.txt").write_text("\n".join(captions))
    flags[flags.index("--data-root") + 1] = str(alone)
    refused(flags, capsys, "found one picture to train on")


def test_the_learning_rate():
    chosen = settings.make({"dataset": "flickr8k", "epochs": 4, "warmup": 10, "drop_every": 2,
                            "schedule": "linear"}).training
    rates = [train.learning_rate(step, 25, chosen) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1 and rates[10] == 1
    assert rates[55] == pytest.approx(0.5) and rates[99] == pytest.approx(1 / 90)
    chosen.schedule = "step"
    assert [train.learning_rate(step, 25, chosen) for step in (30, 49, 50, 99)] == pytest.approx([1, 1, 0.1, 0.1])
    chosen.schedule = "constant"
    assert [train.learning_rate(step, 25, chosen) for step in (0, 10, 99)] == pytest.approx([0.1, 1, 1])
    chosen.warmup = 1000  # half of the training at most
    assert [train.learning_rate(step, 25, chosen) for step in (0, 24, 49, 50)] == pytest.approx([0.02, 0.5, 1, 1])


def test_searching_what_is_not_there_ends_in_one_line(tmp_path, capsys):
    for arguments, said in ((["evaluate", str(tmp_path)], "no run here"), (["search", str(tmp_path), " "], "empty"),
                            (["search", str(tmp_path), "a dog", "--from-run", "other"], "--from-run is for an index"),
                            (["evaluate", f"qdrant:{tmp_path}", "--dtype", "float16"], "--dtype need a run")):
        assert retrieve.main(arguments) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and said in message


def test_the_copy_encodes_in_the_model_s_precision_and_no_fine_level_for_the_queues(monkeypatch):
    chosen, seen = settings.make({"model": "user"}), []
    monkeypatch.setattr(train, "encode", lambda of, batch, precision, *rest, coarse=False: (
        seen.append((precision, coarse)), None))
    monkeypatch.setattr(train, "momentum_keys", lambda *given: None)
    train.forward(None, SimpleNamespace(update=lambda model: None, encoder=None), {}, chosen, "bfloat16")
    assert seen == [("bfloat16", False), ("bfloat16", True)]


@pytest.mark.usefixtures("undrawn")
def test_the_gradient_is_clipped_before_the_step(flags, monkeypatch):
    """Adam hides its length, so look at the gradient that a step is given."""
    norms, step = [], torch.optim.AdamW.step

    def watched(optimizer, *given):
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        norms.append(math.sqrt(sum(w.grad.square().sum().item() for w in weights if w.grad is not None)))
        return step(optimizer, *given)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    assert train.main([*flags, "--epochs", "1", "--max-norm", "0.01"]) == 0
    assert norms == pytest.approx([0.01] * 4, rel=1e-3)


def test_each_step_has_the_gradient_of_its_own_batch_alone(flags, tmp_path, monkeypatch):
    """Of a loss that is the sum of the weights, each gradient is 1, also in the second step and later."""
    given, _ = cli.parse([*flags, "--epochs", "1", "--max-norm", "1000"])
    run, seen = training.set_up(settings.make(given), tmp_path / "run", "cpu", quiet=True), []
    monkeypatch.setattr(run, "finish_epoch", lambda: setattr(run, "epoch", 1))
    monkeypatch.setattr(run, "after_step", lambda *given: seen.append(
        {value for weight in run.model.parameters() for value in weight.grad.flatten().tolist()}) or True)
    train.train(run, lambda model, *given: sum(weight.sum() for weight in model.parameters()))
    assert seen == [{1.0}] * 4


@pytest.mark.parametrize("model", ["tgdt", "user", "tgdt-user"])
def test_the_copy_teaches_every_model(model, monkeypatch):
    chosen = settings.make({"model": model, "infonce_weight": 1.0, "distill": 0.5, "queue": 0, "keep": "momentum"})
    monkeypatch.setattr(train, "encode", lambda of, *given, **more: (of, of))
    momentum = SimpleNamespace(update=lambda model: None, encoder="copy")
    assert train.forward("model", momentum, {}, chosen, "float32") == ("model", "model", None, ("copy", "copy"))
