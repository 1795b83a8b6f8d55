"""A fuzz of both command lines, the same on every machine: whatever a flag is given, the program takes it, or says one
line and ends with code 2. It never ends in a traceback."""
import json
import math
import random
import zlib

import pytest

import retrieve
import train
from harness import flags as command_line
from harness import settings

FIELDS = settings.FIELDS
ODD = ["", " ", "nan", "-nan", "inf", "-inf", "1e999", "1e-999", "-1", "0x10", "1_000", "1,5", "9" * 5000, "None",
       "true", "-", "--", "é", "٣", "\U0001f415", "caf\udce9", "a\nb", "%s", "{}", "a" * 5000,
       "/dev/null", "../..", "[]"]


def outcome(main, arguments: list[str], capsys) -> tuple[int, str, str]:
    """The exit code, and what was printed: on standard output, and as the error. Checks that an error is one line."""
    capsys.readouterr()
    try:
        code = main(arguments)
    except SystemExit as exit:
        code = exit.code
    said = capsys.readouterr()
    lines = said.err.splitlines()
    found = [line for line in lines if line.startswith("error: ")]
    assert code in (0, 2) and len(found) == (code == 2), (arguments, code, said.err[-1000:])
    if found:  # the last line, or a hint stands below it
        assert found[0] == lines[-1] or found[0] == lines[-2] and "--help" in lines[-1], (arguments, lines[-3:])
    return code, said.out, found[0] if found else ""


def in_range(name: str, chance: random.Random) -> list:
    """The ends of a number's range, and numbers between them."""
    low, high = FIELDS[name].range
    if FIELDS[name].type is int:
        return [low, high, *(chance.randint(low, high) for _ in range(2))]
    return [float(low), float(high), *(chance.uniform(low, high) for _ in range(2))]


def chance_of(name: str) -> random.Random:
    return random.Random(zlib.crc32(name.encode()))


# -------------------------------------------------------------------------------------------------------- train.py


@pytest.mark.parametrize("name", FIELDS)
def test_whatever_a_setting_is_given(name, capsys):
    known, flag = FIELDS[name], settings.flag(name)
    good = in_range(name, chance_of(name)) if known.range else known.choices
    for value in [*good, *chance_of(name).sample(ODD, 14)]:
        code, out, error = outcome(train.main, [f"{flag}={value}", "--print-settings"], capsys)
        if value in good:  # taken, or in contradiction to another setting, which is named
            assert code == 0 or error.count("--") > 1 or "heads" in error, (value, error)
        if code == 0:
            taken = json.loads(out)[known.group][name]
            settings.check_value(name, taken)
            assert known.range is None or math.isfinite(taken)


@pytest.mark.parametrize("seed", range(60))
def test_whatever_several_flags_are_given(seed, capsys):
    chance, arguments = random.Random(seed), ["--print-settings"]
    for name in chance.sample([*FIELDS], chance.randint(2, 6)):
        known = FIELDS[name]
        pool = in_range(name, chance) if known.range else [*known.choices]
        arguments += [settings.flag(name), str(chance.choice([*pool, *pool, *ODD]))]
    chance.shuffle(arguments)  # so that values stand in the wrong places as well
    outcome(train.main, arguments, capsys)


TRAINED = ["lr", "text_lr", "margin", "intra_margin", "local_weight", "weight_decay", "max_norm", "dropout", "noise",
           "momentum", "mu", "gamma", "batch_weight", "warmup", "seed", "captions_shortlist", "images_shortlist",
           "guide_dropout", "sharpness"]  # at both ends of their ranges a tiny run stays tiny


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.usefixtures("undrawn")
def test_two_ends_of_ranges_make_a_run_or_one_line(flags, seed, tmp_path, capsys):
    chance = random.Random(seed)
    chosen = [f"{settings.flag(name)}={chance.choice(FIELDS[name].range)}" for name in chance.sample(TRAINED, 2)]
    model = chance.choice(FIELDS["model"].choices)
    rest = ["--model", model, "--queue", "8", "--epochs", "1", "--quiet"]
    code, _, error = outcome(train.main, [*flags, *rest, *chosen], capsys)
    if code == 0:
        assert outcome(retrieve.main, ["evaluate", str(tmp_path / "run")], capsys)[0] == 0
    else:
        assert "diverged" in error and not (tmp_path / "run" / "settings.json").exists()


# ----------------------------------------------------------------------------------------------------- retrieve.py


def flags_of(command: str) -> list[str]:
    """All flags of a command of `retrieve.py`."""
    parser = command_line.search_parser()
    of = next(action for action in parser._actions if action.dest == "command").choices[command]
    return [action.option_strings[0] for action in of._actions if action.option_strings and action.dest != "help"]


@pytest.mark.parametrize("command", ["evaluate", "index", "search"])
def test_whatever_a_search_is_given(command, run, tmp_path, capsys, monkeypatch, undrawn):
    monkeypatch.chdir(tmp_path)
    needed = {"evaluate": [], "index": ["--out", "made"], "search": ["a red dog"]}[command]
    assert outcome(retrieve.main, [command, str(run), *needed, "--device", "cpu"], capsys)[0] == 0
    for flag in flags_of(command):
        for value in [*chance_of(flag).sample(ODD, 4), "0", "1000000", str(run)]:
            outcome(retrieve.main, [command, str(run), *needed, f"{flag}={value}"], capsys)
    for value in chance_of(command).sample(ODD, 12):
        outcome(retrieve.main, [command, value, *needed], capsys)
        if command == "search":
            outcome(retrieve.main, [command, str(run), f"--image={value}"], capsys)
            outcome(retrieve.main, [command, str(run), value], capsys)
