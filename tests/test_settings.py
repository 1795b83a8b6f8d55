"""Settings, presets and their checks; the command line made of them; the models that they describe."""
import argparse
import inspect
import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_batch
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from transformers import BertConfig, BertModel

import losses
import retrieve
import tgdt
import train
import unified
import user
from harness import fetching, flags, models, settings
from sources import scenes
from sources.files import BadInput

MODELS = settings.FIELDS["model"].choices
EVERY = [{"dataset": dataset, "model": model, "preset": preset} for dataset in settings.FIELDS["dataset"].choices
         for model in MODELS for preset in ("small", "paper")]
NUMBERS = [name for name, known in settings.FIELDS.items() if known.type in (int, float)]


def tiny_bert() -> BertModel:
    return BertModel(BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                                intermediate_size=8), add_pooling_layer=False)


# ----------------------------------------------------------------------------------------------------- presets


def test_the_paper_preset_is_the_released_configuration():
    paper = settings.make({"dataset": "flickr30k", "preset": "paper"})
    values = settings.flat(paper)
    assert [values[name] for name in ("dim", "batch_size", "lr", "max_norm", "warmup")] == [1024, 30, 1e-5, 2.0, 1000]
    assert [values[name] for name in ("schedule", "drop_every", "reduction", "weight_decay")] == ["step", 20, "sum", 0]
    assert [values[name] for name in ("text_encoder", "text_layers", "local_weight")] == ["bert-base-uncased", 6, 10.0]
    model = models.build(paper, tiny_bert(), 32)
    assert model.region_encoder.geometry[0].weight.shape == (32, 37)
    assert len(model.region_encoder.encoder.layers) == 4 and len(model.text_branch.global_encoder.layers) == 2
    coco = settings.make({"dataset": "coco", "preset": "paper"}).training
    assert (coco.batch_size, coco.warmup) == (40, 0)
    assert settings.make({"dataset": "coco", "preset": "paper", "batch_size": 8}).training.batch_size == 8


def test_the_paper_preset_of_user_is_the_released_configuration():
    paper = settings.make({"dataset": "flickr30k", "preset": "paper", "model": "user"})
    values = settings.flat(paper)
    assert [values[name] for name in ("dim", "batch_size", "lr", "text_lr", "max_norm")] == [1024, 128, 5e-4, 0.1, 2.0]
    assert [values[name] for name in ("weight_decay", "schedule", "epochs", "easy_epochs")] == [1e-4, "step", 20, 0]
    assert [values[name] for name in ("queue", "momentum", "batch_weight")] == [2048, 0.999, 20.0]
    assert [values[name] for name in ("mu", "gamma", "reward_floor")] == [90.0, 0.5, True]
    assert [values[name] for name in ("text_layers", "noise")] == [12, 0.2]
    assert [values[name] for name in ("guide", "guide_dropout", "sharpness")] == ["self", 0.4, 1.0]
    rates = [train.learning_rate(100 * epoch, 100, paper.training) for epoch in (0, 9, 10, 19)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1])
    coco = settings.flat(settings.make({"dataset": "coco", "preset": "paper", "model": "user"}))
    assert [coco[name] for name in ("epochs", "drop_every", "queue", "batch_weight", "batch_size")] == [
        25, 15, 4096, 1.0, 128]
    model = models.build(paper, tiny_bert(), 32)
    assert isinstance(model, user.USER) and model.guide.local_norm.num_features == 32
    assert model.mlp_in.weight.shape == (512, 32) and model.project_words.weight.shape == (1024, 8)


def test_the_defaults_are_the_paper_preset_of_tgdt_on_flickr30k():
    values = settings.flat(settings.make({"dataset": "flickr30k", "preset": "paper"}))
    differ = {name for name, value in settings.flat(settings.Settings()).items() if values[name] != value}
    assert differ == {"dataset", "preset"}


OTHER_NAMES = {"length": "queue", "weight": "local_weight", "shortlist": "images_shortlist"}  # there -> a setting


@pytest.mark.parametrize("function, other_names", [
    (losses.cmc, {}), (losses.tgdt_loss, {}), (losses.uto, {}), (losses.user_loss, {}), (losses.info_nce, {}),
    (losses.hinge, {}), (losses.intra_consistency, {"margin": "intra_margin"}), (losses.uto_batch, {}),
    (losses.uto_queue, {}),
    (tgdt.TGDT, {}), (user.USER, {}), (unified.Unified, {}), (user.SelfGuidedEnhancement, {"dropout": "guide_dropout"}),
    (user.CLIPGuidedEnhancement, {}), (user.MomentumContrast, {}), (retrieve.search, {}),
], ids=lambda value: getattr(value, "__name__", ""))
def test_a_default_is_the_same_in_the_settings_and_in_the_concept_files(function, other_names):
    defaults, compared = settings.flat(settings.Settings()), []
    for name, parameter in inspect.signature(function).parameters.items():
        name = (OTHER_NAMES | other_names).get(name, name)
        if name in defaults and parameter.default is not inspect.Parameter.empty and name != "guide":
            assert parameter.default == defaults[name], name
            compared.append(name)
    assert compared


def test_the_preset_of_the_unified_model_has_the_defaults_of_its_loss():
    values = settings.flat(settings.make({"model": "tgdt-user", "dataset": "flickr30k"}))
    assert inspect.signature(losses.unified_loss).parameters["infonce_weight"].default == values["infonce_weight"]
    assert inspect.signature(losses.contrast).parameters["reduction"].default == values["reduction"]


def test_the_loss_groups_are_keyword_arguments():
    assert vars(settings.InfoNCE()).keys() <= inspect.signature(losses.contrast).parameters.keys()
    assert vars(settings.CMC()).keys() <= inspect.signature(losses.tgdt_loss).parameters.keys()
    assert vars(settings.UTO()).keys() <= inspect.signature(losses.user_loss).parameters.keys()


def test_what_is_given_counts_and_none_is_not_given():
    made = settings.make({"model": "user", "lr": 0.25, "epochs": None})
    assert made.training.lr == 0.25 and made.training.epochs == settings.make({"model": "user"}).training.epochs
    assert settings.make({"lr": 1}).training.lr == 1  # a whole number will do
    with pytest.raises(BadInput, match="learning_rate"):
        settings.make({"learning_rate": 0.1})


# ------------------------------------------------------------------------------------------------------ checks


def test_every_setting_has_help_and_every_number_a_range():
    names = [name for group in settings.GROUPS.values() for name in inspect.signature(group).parameters]
    assert names == list(settings.FIELDS) and len(set(names)) == len(names)
    for name, known in settings.FIELDS.items():
        assert known.type in (bool, int, float, str) and len(known.help) > 5, name
        assert bool(known.range) == (name in NUMBERS), name
        assert not known.range or all(math.isfinite(end) for end in known.range)
        default = settings.flat(settings.Settings())[name]
        assert known.optional and default is None or type(default) is known.type, name
    assert all(group.__doc__ for group in settings.GROUPS.values())


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_outside_of_its_range_is_refused_by_name(name):
    low, high = settings.FIELDS[name].range
    nudge = 1 if settings.FIELDS[name].type is int else 1e-9
    for value in (low - nudge, high + max(nudge, high * 1e-9), float("nan"), float("inf"), float("-inf"), "1", True):
        with pytest.raises(BadInput, match=rf"^{settings.flag(name)} .*: expected a (whole )?number from ") as error:
            settings.make({name: value})
        assert str(value) in str(error.value) and "\n" not in str(error.value)
    for value in (low, high):
        settings.check_value(name, value)


@pytest.mark.parametrize("name", sorted(settings.FIELDS.keys() - NUMBERS))
def test_a_value_of_another_kind_is_refused_by_name(name):
    for value in (3, 0.5, ["a"], "unheard of" if settings.FIELDS[name].choices else {}):
        with pytest.raises(BadInput, match=f"^{settings.flag(name)} .*: expected "):
            settings.make({name: value})


@pytest.mark.parametrize("given, said", [
    ({"dim": 6}, "--dim 6"), ({"region_width": 6}, "--region-width 6"), ({"batch_size": 5}, "--batch-size 5"),
    ({"model": "user", "guide": "none", "fixed_regions": 36}, "--fixed-regions 36: .* --guide self"),
    ({"model": "user", "distill": 0.5}, "--distill 0.5: .* --infonce-weight"),
    ({"distill": 0.5, "infonce_weight": 1, "keep": "model"}, "--distill 0.5: .* --keep momentum"),
    ({"model": "user", "distill": 0.5, "infonce_weight": 1, "queue": 0, "keep": "model"}, "--distill 0.5: .* --queue"),
    ({"guide": "self"}, "--guide self"), ({"model": "user", "queue": 3}, "--queue 3"), ({"boxes": 10_000}, "--boxes"),
    ({"regions": "grid", "boxes": 40}, "--boxes 40: .* square"), ({"longest": 100_000}, "--longest"),
    ({"picture_side": 5}, "--picture-side 5"), ({"lr": -1.0}, "--lr -1"),
    ({"dataset": "coco", "text_encoder": "from-scratch"}, "scenes only"), ({"batch_size": 2**40}, "--batch-size"),
])
def test_settings_that_contradict_each_other_or_are_absurd_are_refused(given, said):
    with pytest.raises(BadInput, match=said):
        settings.make(given)


def test_the_command_refuses_an_impossible_setting_by_name(tmp_path, capsys):
    assert train.main(["--lr", "nan", "--out", str(tmp_path / "run")]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: --lr nan") and message.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("preset", ["paper", "small"])
@pytest.mark.parametrize("model", ["tgdt", "user", "tgdt-user"])
def test_each_preset_builds_a_model_for_the_scenes(preset, model):
    made = settings.make({"preset": preset, "model": model})
    found = scenes.make("val", count=3)
    built = models.build(made, models.text_encoder(made)[0], found.regions.shape[2]).eval()
    batch = {"regions": found.regions, "boxes": found.boxes, "region_mask": np.ones(found.boxes.shape[:2], bool)}
    images = built.encode_images({name: torch.from_numpy(value) for name, value in batch.items()})
    assert images.globals.shape == (3, made.architecture.dim) and bool(images.globals.isfinite().all())


@pytest.mark.parametrize("model", MODELS)
def test_what_a_model_is_without_changes_neither_its_weights_nor_its_loss(model):
    """`settings.WITHOUT` is true: another value of such a setting leaves the batch loss as it is."""
    batch = make_batch() | {"image_row": torch.arange(3)}
    batch["word_ids"] = batch["word_ids"] % 30

    def found(given: dict) -> torch.Tensor:
        torch.manual_seed(0)
        usual = {"model": model, "guide": "none", "queue": 0, "distill": 0, "easy_epochs": 0, "gamma": -1}
        made = settings.make(usual | given)
        built = models.build(made, models.text_encoder(made)[0], 12)
        for weight in built.parameters():  # some start at zero, and would hide what reaches them
            torch.nn.init.normal_(weight, std=0.5)
        negatives = "mean" if made.training.easy_epochs else "hardest"
        return train.batch_loss(built, None, batch, made, negatives=negatives).detach()

    usual, names = found({}), settings.WITHOUT[model].split()
    for name in names:
        known, value = settings.FIELDS[name], settings.flat(settings.make({"model": model}))[name]
        other = {"reduction": "sum", "reward_floor": not value, "heads": 2, "gamma": 0.25, "queue": 9,
                 "region_width": 64}.get(name, value + 1 if known.type is int else known.range and known.range[1] / 2)
        assert other != value and torch.equal(found({name: other}), usual), name


def test_a_flag_without_effect_is_warned_of(capsys):
    given, options = flags.parse(["--queue", "512", "--lr", "0.1"])
    fetching.first_look(given, options)
    assert capsys.readouterr().err == "warning: --queue has no effect with --model tgdt\n"
    given, options = flags.parse(["--boxes", "49"])
    fetching.first_look(given, options)
    assert capsys.readouterr().err == "warning: --boxes has no effect with features that are computed already\n"
    idle = {"--split-seed": "1", "--clip-model": "x", "--temperature": "2", "--drop-every": "3", "--momentum": "0.5",
            "--guide-dropout": "0", "--sharpness": "2"}
    alone = ["--keep", "model", "--schedule", "linear", "--infonce-weight", "0"]
    given, options = flags.parse([*alone, *(word for pair in idle.items() for word in pair)])
    fetching.first_look(given, options)
    said = capsys.readouterr().err.splitlines()
    assert {line.split()[1] for line in said} == {*idle} and "warning: --drop-every has no effect with --schedule " \
        "linear" in said and "warning: --momentum has no effect with --keep model" in said
    needed = ["--schedule", "step", "--infonce-weight", "1", "--model", "user", "--guide", "self"]
    given, options = flags.parse([*needed, *(word for name in list(idle)[2:] for word in (name, idle[name]))])
    fetching.first_look(given, options)
    assert capsys.readouterr().err == ""
    given, options = flags.parse(["--queue", "512", "--model", "user", "--regions", "grid", "--boxes", "49"])
    fetching.first_look(given, options)
    assert capsys.readouterr().err == ""


def test_the_heads_divide_what_they_share():
    settings.make({"model": "tgdt-user", "heads": 3, "dim": 96})  # it has no region encoder
    with pytest.raises(BadInput, match="--region-width 128: expected a multiple of the 3 heads"):
        settings.make({"heads": 3, "dim": 96})
    made = settings.make({"region_width": 0})
    with pytest.raises(BadInput, match="width of the features, 181: expected a multiple of the 4 heads"):
        models.build(made, models.text_encoder(made)[0], 181)


# -------------------------------------------------------------------------------------------------- settings.json


@pytest.mark.parametrize("change, said", [
    (lambda s: s["cmc"].pop("margin"), "cmc.margin is missing"),
    (lambda s: s["cmc"].update(height=3), "cmc.height is no setting"),
    (lambda s: s.pop("uto"), "uto.batch_weight is missing"),
    (lambda s: s.update(seed=3), "by group"),
    (lambda s: s["training"].update(lr="fast"), "--lr fast"),
    (lambda s: s["training"].update(lr=float("nan")), "--lr nan"),
    (lambda s: s["training"].update(epochs=1.5), "--epochs 1.5"),
    (lambda s: s["uto"].update(reward_floor=1), "--reward-floor 1"),
    (lambda s: s["run"].update(model=["tgdt"]), "--model"),
    (lambda s: s["run"].update(model=None), "--model None"),
    (lambda s: s["architecture"].update(heads=3), "--dim 128"),
])
def test_a_settings_file_of_another_shape_is_refused(change, said, tmp_path):
    stored = asdict(settings.make({}))
    change(stored)
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(stored))
    with pytest.raises(BadInput, match=said) as error:
        settings.read(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["[1]", "3", "null", "{", ""])
def test_a_settings_file_that_holds_something_else_is_refused(text, tmp_path):
    (tmp_path / "settings.json").write_text(text)
    with pytest.raises(BadInput, match="settings.json"):
        settings.read(tmp_path / "settings.json")


# ------------------------------------------------------------------------------------------------ command line


@pytest.mark.parametrize("given", EVERY, ids=lambda given: "-".join(given.values()))
def test_help_fits_80_columns_and_shows_the_defaults_of_the_preset(given, capsys):
    with pytest.raises(SystemExit) as exit:
        flags.parse([*(f"--{name}={value}" for name, value in given.items()), "--help"])
    said = capsys.readouterr().out
    assert exit.value.code == 0 and max(map(len, said.splitlines())) <= 80
    for group in settings.GROUPS.values():
        assert f"\n{group.__doc__}:\n" in said
    words = " ".join(said.split())
    for name, value in settings.flat(settings.make(given)).items():
        note = settings.FIELDS[name].help
        assert (f"{note} (default {value})" if value not in (None, "") else note) in words, name


@pytest.mark.parametrize("arguments, said", [
    (["--epoch", "5"], "--epochs"), (["--learning-rte=1"], ""), (["--datset", "coco"], "--dataset"),
    (["--batchsize", "8"], "--batch-size"), (["--dataset", "flickr"], "flickr30k"), (["--lr", "fast"], "--lr"),
    (["--workers", "-1"], "from 0 to 256"), (["--optimizer", "adam"], ""), (["--xyz", "a\nb"], ""),
    (["scenes"], ""), (["--text-encoder", ""], "found nothing"), (["--clip-model", ""], "found nothing"),
])
def test_a_mistake_in_a_flag_takes_two_lines(arguments, said, capsys):
    with pytest.raises(SystemExit) as exit:
        flags.parse(arguments)
    message = capsys.readouterr().err
    assert exit.value.code == 2 and message.startswith("error: ") and message.count("\n") <= 2 and said in message


def test_the_parser_knows_the_flags_of_its_commands(capsys):
    parser = flags.Parser(prog="retrieve.py")
    commands = parser.add_subparsers()
    commands.add_parser("search").add_argument("--queries")
    commands.add_parser("page")
    with pytest.raises(SystemExit):
        parser.parse_args(["search", "--querys", "x"])
    assert "did you mean --queries?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parser.parse_args(["search", "dog", "runs"])
    assert "put quotes around a caption of several words" in capsys.readouterr().err
    with pytest.raises(SystemExit):  # a flag of another command is no misspelling
        parser.parse_args(["page", "--queries", "x"])
    assert "did you mean" not in capsys.readouterr().err


@pytest.mark.parametrize("text", ["a,b", "10,,20", "0,5", "", "1.5"])
def test_lengths_of_shortlists_are_whole_numbers(text):
    assert flags.lengths("20,10,20") == [10, 20]
    with pytest.raises(argparse.ArgumentTypeError, match="whole numbers from 1 on"):
        flags.lengths(text)


@pytest.mark.parametrize("text", ["0", "11", "-1", "1.5", "", "\u0663", "9" * 5000], ids=lambda text: text[:5])
def test_a_whole_number_has_a_range(text):
    assert flags.whole(1, 10)("10") == 10
    with pytest.raises(argparse.ArgumentTypeError, match="expected a whole number from 1 to 10"):
        flags.whole(1, 10)(text)


def test_the_command_line_in_parts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bert").mkdir()
    given, options = flags.parse(["--model", "user", "--lr", "0.1", "--no-reward-floor", "--data-root", "data/",
                                  "--text-encoder", "bert", "--clip-model", "openai/clip", "--workers", "2",
                                  "--out", "x", "--resume"])
    assert given.keys() == settings.FIELDS.keys()
    assert {name: value for name, value in given.items() if value is not None} == {
        "model": "user", "lr": 0.1, "reward_floor": False, "data_root": str(tmp_path / "data"),
        "text_encoder": str(tmp_path / "bert"), "clip_model": "openai/clip"}
    assert vars(options) == {"device": "auto", "workers": 2, "out": Path("x"), "resume": True, "print_settings": False,
                             "quiet": False, "log": None, "fetch_only": False, "pieces": 1}


@pytest.mark.parametrize("given", EVERY, ids=lambda given: "-".join(given.values()))
def test_print_settings_prints_what_settings_json_will_hold(given, tmp_path, capsys):
    arguments = [part for name, value in given.items() for part in (f"--{name}", value)]
    assert train.main([*arguments, "--lr", "0.002", "--out", str(tmp_path / "run"), "--print-settings"]) == 0
    (tmp_path / "settings.json").write_text(capsys.readouterr().out)
    made = settings.make(given | {"lr": 0.002})
    assert settings.read(tmp_path / "settings.json") == made == settings.make(settings.flat(made))
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------------ models


def test_each_setting_of_a_model_reaches_its_part():
    given = {"dim": 8, "region_width": 12, "region_layers": 3, "local_layers": 1, "global_layers": 2, "heads": 2,
             "feedforward": 20, "dropout": 0.25, "fine_gradient": 0.5, "guide_dropout": 0.3, "sharpness": 2.0}

    def built(**more):
        return models.build(settings.make(given | more), tiny_bert(), 6, 7)

    def shape(encoder) -> tuple:
        layer = encoder.layers[0]
        return len(encoder.layers), *layer.linear1.weight.shape, layer.self_attn.num_heads, layer.dropout.p

    model = built()
    assert shape(model.region_encoder.encoder) == (3, 20, 12, 2, 0.25)
    for branch in (model.image_branch, model.text_branch):
        assert shape(branch.local_encoder) == (1, 20, 8, 2, 0.25)
        assert shape(branch.global_encoder) == (2, 20, 8, 2, 0.25)
    model = built(model="tgdt-user", guide="self")
    assert shape(model.fine_regions) == shape(model.fine_words) == (1, 20, 8, 2, 0.25)
    assert (model.fine_gradient, model.guide.sharpness, model.guide.dropout.p) == (0.5, 2.0, 0.3)
    assert built(model="user", guide="self", fixed_regions=9).guide.fixed_regions == 9
    guide = built(model="user", guide="clip").guide
    assert (guide.sharpness, *guide.project.weight.shape) == (2.0, 6, 7)


def test_the_dropout_setting_is_the_text_encoder_s_too(bert):
    chosen = settings.make({"dataset": "flickr8k", "text_encoder": str(bert), "text_layers": 1, "dropout": 0.25})
    rates = {m.p for m in models.text_encoder(chosen)[0].modules() if isinstance(m, torch.nn.Dropout)}
    assert rates == {0.25}


def test_more_layers_than_bert_has_are_refused(bert):
    with pytest.raises(BadInput, match="--text-layers: .* 2 layers, 3 "):
        models.text_encoder(settings.make({"dataset": "flickr8k", "text_encoder": str(bert), "text_layers": 3}))


def test_a_damaged_text_encoder_is_refused(tmp_path, bert):
    for file in bert.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[: 50 if file.suffix == ".safetensors" else None])
    with pytest.raises(BadInput, match="cannot load the text encoder") as error:
        models.text_encoder(settings.make({"dataset": "flickr8k", "text_encoder": str(tmp_path), "text_layers": 1}))
    assert "\n" not in str(error.value)


def test_the_scenes_vocabulary_is_closed_and_for_scenes_only():
    tokenizer = models.text_encoder(settings.make({}))[1]
    assert tokenizer("a big red circle")["input_ids"][0] == tokenizer.cls_token_id
    assert tokenizer.unk_token_id not in tokenizer("the leftmost of all is a tiny violet star")["input_ids"]
    with pytest.raises(BadInput, match="scenes only"):
        models.text_encoder(settings.make({"dataset": "flickr8k", "text_encoder": "from-scratch"}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_device_and_precision_without_a_gpu():
    assert models.resolve("auto", "auto") == (torch.device("cpu"), "float32")
    assert models.resolve("cpu", "bfloat16") == (torch.device("cpu"), "bfloat16")
    with pytest.raises(BadInput, match="--device cuda"):
        models.resolve("cuda", "auto")


def test_a_gpu_that_pytorch_was_not_built_for_is_not_taken(monkeypatch):
    def ones(*given: object, **more: object) -> None:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", ones)
    assert models.resolve("auto", "auto") == (torch.device("cpu"), "float32")
    with pytest.raises(BadInput, match="--device cuda: this PyTorch was not built for a GPU as old as this"):
        models.resolve("cuda", "auto")


def test_a_gpu_without_bfloat16_gets_float32(monkeypatch):
    monkeypatch.setattr(models, "gpu_fault", lambda: "")
    for has_it, expected in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has_it=has_it: has_it)
        assert models.resolve("auto", "auto") == (torch.device("cuda"), expected)
        assert models.resolve("auto", "float32")[1] == "float32"


def test_a_text_encoder_whose_words_bert_s_tokenizer_would_not_find_is_refused(bert, tmp_path):
    """BertTokenizer takes over the vocabulary of any tokenizer.json, and then all words of a caption are unknown."""
    copied = shutil.copytree(bert, tmp_path / "bert")
    pieces = [(piece, -1.0) for piece in ("<unk>", "<s>", "</s>", "\u2581a", "\u2581dog", "s")]
    Tokenizer(Unigram(pieces, unk_id=0)).save(str(copied / "tokenizer.json"))
    with pytest.raises(BadInput, match="does not read BERT's word pieces"):
        models.text_encoder(settings.make({"dataset": "flickr8k", "text_encoder": str(copied), "text_layers": 1}))


def test_a_text_encoder_reads_in_both_directions_whatever_its_config_says(bert, tmp_path):
    copied = shutil.copytree(bert, tmp_path / "bert")
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"is_decoder": True, "add_cross_attention": True}))
    chosen = {"dataset": "flickr8k", "text_layers": 2}
    ids = torch.tensor([[2, 7, 8, 9, 3]])
    first, second = (models.text_encoder(settings.make(chosen | {"text_encoder": str(folder)}))[0].eval()(ids)[0]
                     for folder in (bert, copied))
    assert torch.equal(first, second)


def test_a_text_encoder_in_half_precision_is_trained_in_float32(bert, tmp_path):
    shutil.copytree(bert, tmp_path / "half")
    BertModel.from_pretrained(bert).half().save_pretrained(tmp_path / "half")
    chosen = settings.make({"dataset": "flickr8k", "text_encoder": str(tmp_path / "half"), "text_layers": 1})
    assert {weight.dtype for weight in models.text_encoder(chosen)[0].parameters()} == {torch.float32}
