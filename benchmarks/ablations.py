"""Do the papers' claims hold? Each idea with and without it: the same data, the same steps, several seeds.

    python benchmarks/ablations.py train --out DIR --budget scenes
    python benchmarks/ablations.py train --out DIR --budget flickr8k --data-root DATA --text-encoder FOLDER
    python benchmarks/ablations.py speed
    python benchmarks/ablations.py table --out DIR

`train` trains the arms of a budget that have no results in DIR yet, seed by seed, each in a process of its own. You can
stop it and start it again at any time. It takes the arms of benchmarks/ablations.csv, or `--arms "tgdt; user, no guide,
--queue 512"`. `--seeds 0,1` takes some seeds, and all other flags go to train.py. `speed` compares a matcher by
cross-attention with two-stage search, and writes its times into benchmarks/ablations.csv. `table` adds the results in
DIR to benchmarks/ablations.csv, which holds all results, and prints the tables. Without --out it prints what the file
holds. --courses also prints rsum after each epoch, and --draw draws the claims.

There are three budgets. "flickr8k" is the smallest one in which all arms can be trained on two cores: BERT is frozen,
without dropout and noise, so each caption passes it once for all arms, and a batch holds all five captions of its
images. "flickr8k-full" is the small preset, with BERT fine-tuned. "scenes" is the small preset on the built-in scenes.
"""
import argparse
import csv
import io
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from arms import ARMS, BUDGETS, CLAIMS, MODELS, OURS, UNIFIED, changes_of, remember, split_arm

import retrieve
import train
from harness import engines, flags, folder, report, settings, training
from harness.training import Run
from sources import drawing, scenes
from sources.files import BadInput, locked, write_whole

# --------------------------------------------------------------------------------------------------------- training

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "ablations.csv"
RECALLS = [(way, r) for way in ("i2t", "t2i") for r in ("r1", "r5", "r10")]
COLUMNS = ["budget", "arm", "seed", "search", *(f"{way}_{r}" for way, r in RECALLS), "rsum", "seconds", "aligned"]
LENGTHS, WEIGHTS = (10, 20, 50, 100, 200), (0.0, 0.25, 0.5, 1.0, 2.0, 3.0, 10.0, 30.0, 100.0)


def one(budget: str, arm: str, out: Path, argv: list[str]) -> int:
    """Train an arm in the run folder `out`, or go on with it, and write out/results.csv. Returns the exit code.

    A run whose model was changed can't be opened as a run folder of train.py: it is measured as it stands in memory.
    """
    parts = changes_of(arm)
    own = " ".join(part.flags for part in parts).split()
    given, options = flags.parse([*BUDGETS[budget].split(), *argv, *own])
    resume = (out / "checkpoint.pt").is_file()
    try:
        chosen = folder.read_settings(out) if resume else settings.make(given)
        run, loss_of = training.set_up(chosen, out, options.device, resume, options.workers), train.batch_loss
        for part in parts:
            run, loss_of = part.to_run(run), part.loss_of or loss_of
        if chosen.training.text_lr == chosen.text.noise == chosen.architecture.dropout == 0:
            run = remember(run)
        if not training.train_guarded(partial(train.train, loss_of=loss_of), run):
            return 130
        run.kept.load_state_dict(folder.read_checkpoint(out / "best.pt")["model"])
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_rows(out / "results.csv", [{"budget": budget, "arm": arm, "seed": chosen.run.seed, **row}
                                     for row in measure(run, more=arm in MODELS)])
    return 0


def measure(run: Run, more: bool) -> list[dict]:
    """The rows of a trained run, on val: each way of searching, the halves of val, and the epochs.

    On the scenes also the twins of test, which are twice as many as those of val. more: also shortlists of several
    lengths, and several weights of the local similarity.
    """
    split, options = run.splits["val"], report.search_options(run.settings)
    result, images, texts = report.measure(run.kept, split, run.words["val"], run.settings, run.device, run.precision)
    ways = [way for way in ("global", "local", "two_stage", "mixed") if way in result]
    rows = [row(way, result[way], result["seconds"][way]) for way in ways]
    if "alignment" in result:
        rows[1]["aligned"] = number(result["alignment"]["aligned"])
    image_of, middle = torch.as_tensor(split.image_of), len(images) // 2
    for half, start, end in (("first half", 0, middle), ("second half", middle, len(images))):
        inside = (image_of >= start) & (image_of < end)
        found = retrieve.evaluate(images[start:end], texts[inside.nonzero()[:, 0]], image_of[inside] - start,
                                  exhaustive=False, **options)
        rows += [row(f"{way}, {half}", found[way]) for way in ways if way in found]
    if more and texts.tokens is not None:
        given = {name: options[name] for name in ("weight", "reduction")}
        rows += [row(f"shortlist {short['k']}", short, short["seconds"])
                 for short in report.shortlists(images, texts, split.image_of, LENGTHS, **given)]
        for weight in WEIGHTS:
            found = retrieve.evaluate(images, texts, split.image_of, exhaustive=False, **options | {"weight": weight})
            rows.append(row(f"weight {weight:g}", found["two_stage"]))
    if run.splits.get("test", split).truth is not None:
        rows += twins(run)
    for line in run.history:
        rows.append(row(f"epoch {line['epoch']}", report.final(line["val"]), line["seconds"]))
        if "val_model_rsum" in line:
            rows.append(row(f"epoch {line['epoch']}, the model itself", {"rsum": line["val_model_rsum"]}))
    return rows


def twins(run: Run) -> list[dict]:
    """How often a caption finds its scene among two, the scene and its twin, in percent. A coin finds half of them.

    A row for each kind of twin, on the captions of test that are false of the twin, by the similarity that the model
    is judged by; for a model with tokens, also rows by the global similarity alone.
    """
    split, settings = run.splits["test"], run.settings
    _, images, texts = report.measure(run.kept, split, run.words["test"], settings, run.device, run.precision, False)
    truth, own = split.truth, torch.as_tensor(split.image_of)
    twin = torch.as_tensor(truth.twin_of)[own]
    asked = torch.tensor([other >= 0 and not scenes.holds(claim, truth.objects[other])
                          for claim, other in zip(truth.claims, twin.tolist(), strict=True)]).nonzero()[:, 0]
    own, twin = own[asked], twin[asked]
    gains = {"": ((images.globals[own] - images.globals[twin]) * texts.globals[asked]).sum(1)}
    if texts.tokens is not None:
        gains["global "] = gains[""]
        device, reduction = images.globals.device, settings.cmc.reduction
        local = [retrieve.local_of_pairs(images, texts, to.to(device), asked.to(device), reduction)
                 for to in (own, twin)]
        gains[""] = gains[""] + settings.cmc.local_weight * (local[0] - local[1])
    kind = np.array(truth.twin_kind)[own]
    return [{"search": f"{way}twins, {name}", "t2i_r1": number(100 * (gain > 0).cpu().numpy()[kind == name].mean())}
            for way, gain in gains.items() for name in drawing.TWINS]


def train_all(args: argparse.Namespace, more_flags: list[str]) -> int:
    """Train the arms one after the other, each in a process of its own with a log in its folder.

    Returns the exit code: 1 if an arm failed, 130 if it was stopped.
    """
    failed = False
    arms = args.arms or dict.fromkeys(row["arm"] for row in read_rows(RESULTS) if row["budget"] == args.budget)
    for seed in args.seeds:
        for arm in arms:
            out = args.out / args.budget / re.sub("[^a-z0-9.]+", "-", f"{arm} {seed}".lower())
            if (out / "results.csv").is_file():
                continue
            out.mkdir(parents=True, exist_ok=True)
            call = [sys.executable, __file__, "one", args.budget, arm, str(out), *more_flags, "--seed", str(seed)]
            started = time.perf_counter()
            with open(out / "log.txt", "ab") as log, subprocess.Popen(call, stdout=log, stderr=log) as child:
                try:
                    code = child.wait()
                except KeyboardInterrupt:  # the child has heard Ctrl-C too; if it trains, it saves
                    child.wait()
                    code = 130
            told = {0: "done", 130: "stopped"}.get(code, f"FAILED ({code}), see {out / 'log.txt'}")
            print(f"{arm}, seed {seed}: {told}, {time.perf_counter() - started:.0f} s", flush=True)
            if code == 130:
                return code
            failed |= code != 0
    return int(failed)


# ---------------------------------------------------------------------------------------------------- results file


def row(search: str, metrics: dict, seconds: float | None = None) -> dict:
    """A row of the results file, without budget, arm and seed."""
    recalls = {f"{way}_{r}": number(metrics[way][r]) for way, r in RECALLS if way in metrics}
    return {"search": search, **recalls, "rsum": number(metrics["rsum"]), "seconds": number(seconds, 6)}


def number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}".rstrip("0").rstrip(".")


def read_rows(path: Path) -> list[dict]:
    with open(path, newline="", encoding="utf8") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: list[dict]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, lambda file: file.write(text.getvalue().encode()))


def add_results(new: list[dict]) -> None:
    """Add rows to the results file. The old rows of the same run (budget, arm, seed) go."""
    def run(row: dict) -> tuple:
        return row["budget"], row["arm"], int(row["seed"])

    again = {run(row) for row in new}
    kept = [row for row in read_rows(RESULTS) if run(row) not in again]
    write_rows(RESULTS, sorted(kept + new, key=run))


def by_seed(rows: list[dict], budget: str, arm: str, search: str) -> dict[int, dict]:
    """The row of each seed of an arm, searched in one way.

    "arm: epoch 6" also takes that epoch from runs of "arm, --epochs N": at a constant rate the length of a run changes
    nothing in its first epochs. If a seed has several such runs, the last one in the file counts.
    """
    found = [row for row in rows if (row["budget"], row["search"]) == (budget, search)]
    wanted = re.compile(re.escape(arm) + "(, --epochs [0-9]+)?" * search.startswith("epoch "))
    return {int(row["seed"]): row for row in found if wanted.fullmatch(row["arm"])}


# ----------------------------------------------------------------------------------------------------------- tables

STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57}  # seeds -> the 97.5 % point of Student's t; smaller for more


def verdict(gains: list[float]) -> str:
    """What the differences seed by seed show: does Student's 95 % interval of their mean exclude 0?"""
    if len(gains) < 2:
        return "too few seeds"
    mean = statistics.mean(gains)
    reach = STUDENT.get(len(gains), STUDENT[6]) * statistics.stdev(gains) / len(gains) ** 0.5
    if abs(mean) <= reach:
        return f"not shown (interval {mean - reach:+.1f} to {mean + reach:+.1f})"
    return "yes" if mean > 0 else "no: it costs"


def spread(values: list[float], sign: str = "") -> str:
    """Mean and standard deviation over the seeds."""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.1f}{deviation}"


def compare(rows: list[dict], budget: str, ideas: dict) -> dict[str, list[tuple[dict, dict]]]:
    """The ideas of which both arms are trained: for each seed a pair of rows, with the idea and without."""
    found = {}
    for idea, (with_it, without) in ideas.items():
        a, b = (by_seed(rows, budget, *split_arm(text)) for text in (with_it, without))
        if seeds := sorted(a.keys() & b.keys()):
            found[idea] = [(a[seed], b[seed]) for seed in seeds]
    return found


def gains_in(column: str, pairs: list[tuple[dict, dict]]) -> list[float]:
    return [float(a[column]) - float(b[column]) for a, b in pairs]


def print_table(*titles: str, rows: list[list]) -> None:
    print(f"\n| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    for cells in rows:
        print(f"| {' | '.join(map(str, cells))} |")


def table(args: argparse.Namespace) -> None:
    """Print all tables, budget by budget, in Markdown."""
    if args.out:
        add_results([row for path in sorted(args.out.glob("*/*/results.csv")) for row in read_rows(path)])
    rows = read_rows(RESULTS)
    for budget in BUDGETS:
        if not any(row["budget"] == budget for row in rows):
            continue
        print(f"\n**{budget}, val**")
        for title, ideas in (("claim", CLAIMS), ("first, or second", UNIFIED), ("what we do otherwise", OURS)):
            if found := compare(rows, budget, ideas):
                print_table(title, "first", "second", "rsum gained", "R@1 image to text", "R@1 text to image",
                            "shown?", "seeds", rows=[claim(idea, pairs) for idea, pairs in found.items()])
        if args.draw:
            for name, ideas in (("claims", CLAIMS), ("unified", UNIFIED)):
                draw(budget, compare(rows, budget, ideas), HERE.parent / "docs" / f"{name}-{budget}.png")
        print_halves(rows, budget)
        print_arms(rows, budget)
        print_searches(rows, budget)
        print_twins(rows, budget)
        if args.courses:
            print_courses(rows, budget)
    if speeds := [row for row in rows if row["budget"] == "speed"]:
        slowest = max(float(row["seconds"]) for row in speeds)
        print_table("10 search, 1,000 images of 36 regions", "ms a caption", "times as fast", rows=[
            [row["arm"], f"{1000 * float(row['seconds']):.2f}", f"{slowest / float(row['seconds']):.0f}"]
            for row in sorted(speeds, key=lambda row: -float(row["seconds"]))])


def claim(idea: str, pairs: list[tuple[dict, dict]]) -> list[str | int]:
    gains = gains_in("rsum", pairs)
    sides = [spread([float(pair[side]["rsum"]) for pair in pairs]) for side in (0, 1)]
    return [idea, *sides, *(spread(gains_in(column, pairs), "+") for column in ("rsum", "i2t_r1", "t2i_r1")),
            verdict(gains), len(pairs)]


def print_halves(rows: list[dict], budget: str) -> None:
    """What each idea gains on each half of val, so that a choice by the one can be checked on the other."""
    halves = [compare(rows, budget, {idea: [f"{': '.join(split_arm(arm))}, {half} half" for arm in arms]
                                     for idea, arms in (CLAIMS | UNIFIED).items()}) for half in ("first", "second")]
    if halves[0]:
        print_table("claim", "gained on the first half", "on the second half", "shown on the second half?", "seeds",
                    rows=[[idea, *(spread(gains_in("rsum", half[idea]), "+") for half in halves),
                           verdict(gains_in("rsum", halves[1][idea])), len(halves[1][idea])] for idea in halves[0]])


def print_arms(rows: list[dict], budget: str) -> None:
    """Every arm that is trained, with its recall, mean ± standard deviation over the seeds."""
    lines = []
    for arm in dict.fromkeys(row["arm"] for row in rows if row["budget"] == budget):
        for search in dict.fromkeys(("global", split_arm(arm)[1])):
            if found := list(by_seed(rows, budget, arm, search).values()):
                columns = [spread([float(row[column]) for row in found]) for column in COLUMNS[4:11]]
                lines.append([arm, search, " / ".join(columns[:3]), " / ".join(columns[3:6]), columns[6], len(found)])
    print_table("arm", "search", "image to text R@1 / 5 / 10", "text to image R@1 / 5 / 10", "rsum", "seeds",
                rows=lines)


def print_searches(rows: list[dict], budget: str) -> None:
    """Claims 3 and 4, for models with tokens: the length of the shortlist, and the weight of the local similarity."""
    for model in MODELS:
        measured = by_seed(rows, budget, model, f"shortlist {LENGTHS[0]}")  # these seeds have all lengths
        whole = {seed: row for seed, row in by_seed(rows, budget, model, "mixed").items() if seed in measured}
        lines = []
        for k in LENGTHS:
            short = by_seed(rows, budget, model, f"shortlist {k}")
            pairs = [(short[seed], whole[seed]) for seed in short]
            if pairs:
                faster = [float(b["seconds"]) / float(a["seconds"]) for a, b in pairs]
                lines.append([k, spread([float(a["rsum"]) for a, _ in pairs]), *(
                    spread(gains_in(column, pairs), "+") for column in ("rsum", "i2t_r1", "t2i_r1")), spread(faster)])
        if lines:
            everything = spread([float(row["rsum"]) for row in whole.values()])
            print_table(f"3 shortlist ({model}, {len(whole)} seeds)", "rsum", "against all", "R@1 image to text",
                        "R@1 text to image", "times as fast", rows=[["all", everything, "", "", "", "1.0"], *lines])
            cells = []
            for weight in WEIGHTS:
                found = by_seed(rows, budget, model, f"weight {weight:g}").values()
                cells.append(spread([float(row["rsum"]) for row in found]) if found else "")
            print_table(f"4 weight of local ({model})", *(f"{weight:g}" for weight in WEIGHTS),
                        rows=[["two-stage rsum", *cells]])


def print_twins(rows: list[dict], budget: str) -> None:
    """On the scenes: how often a caption finds its scene among two, by how the other one, its twin, differs."""
    lines = []
    for arm in dict.fromkeys(row["arm"] for row in rows if row["budget"] == budget):
        for way in ("", "global "):
            found = [by_seed(rows, budget, arm, f"{way}twins, {name}").values() for name in drawing.TWINS]
            if found[0]:
                lines.append([arm, way, *(spread([float(row["t2i_r1"]) for row in each]) for each in found),
                              len(found[0])])
    if lines:
        print_table("captions of test that prefer their scene to its twin, %", "search", *drawing.TWINS, "seeds",
                    rows=lines)


def print_courses(rows: list[dict], budget: str) -> None:
    """Val rsum after each epoch, of what is kept, and in brackets of the model itself if that is something else."""
    lines = {}
    for row in rows:
        if row["budget"] == budget and row["search"].startswith("epoch"):
            courses = lines.setdefault((row["arm"], row["seed"]), [])
            if row["search"].endswith("the model itself"):
                courses[-1] += f" ({float(row['rsum']):.1f})"
            else:
                courses.append(f"{float(row['rsum']):.1f}")
    print_table("arm", "seed", "rsum after each epoch", rows=[[*run, ", ".join(each)] for run, each in lines.items()])


def draw(budget: str, found: dict, path: Path) -> None:
    """How much each idea adds in rsum: one dot per seed, a bar for the mean. Only ideas with three seeds are drawn."""
    lines = [(idea, gains_in("rsum", pairs)) for idea, pairs in found.items() if len(pairs) > 2]
    if not lines:
        return
    figure, axis = plt.subplots(figsize=(9, 0.42 * len(lines) + 1.2))
    for place, (_, gains) in enumerate(reversed(lines)):
        mean = statistics.mean(gains)
        axis.barh(place, mean, color="#1a9850" if mean > 0 else "#d73027", alpha=0.35)
        axis.plot(gains, [place] * len(gains), "o", color="black", markersize=4)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(lines)), [idea for idea, _ in reversed(lines)])
    axis.set(xlabel="difference in val rsum, the first less the second (one dot per seed)", title=budget)
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(y=0.01)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


# ------------------------------------------------------------------------------------------------------------ speed


def cross_attention(words: Tensor, regions: Tensor) -> Tensor:
    """A matcher by cross-attention, text to image (SCAN): each word attends to the regions, and is compared with that.

    words [n, D] of one caption, regions [I, R, D], all of unit length -> similarities [I].
    """
    dots = F.normalize((regions @ words.T).relu(), dim=2)                       # [I, R, n]
    found = (9 * dots).softmax(1).transpose(1, 2) @ regions                     # [I, n, D]
    return F.cosine_similarity(found, words[None], dim=2).mean(1)


def speed() -> None:
    """Time a caption takes: 1,000 images of 36 regions, captions of 12 words, D 1024, tokens and vectors ready.

    The captions come one at a time, and for the two models also 200 at once, which share what is read of an image.
    """
    g = torch.Generator().manual_seed(0)

    def unit(*shape: int) -> Tensor:
        return F.normalize(torch.randn(*shape, generator=g), dim=-1)

    regions, words = unit(1000, 36, 1024), unit(200, 12, 1024)
    images = retrieve.Embeddings("image", unit(1000, 1024), regions, torch.ones(1000, 36, dtype=torch.bool))
    texts = retrieve.Embeddings("text", unit(200, 1024), words, torch.ones(200, 12, dtype=torch.bool))

    def timed(work: Callable, captions: int) -> float:  # the best of four runs
        seconds = []
        for _ in range(4):
            start = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - start)
        return min(seconds) / captions

    def two_stage(captions: retrieve.Embeddings) -> object:
        return engines.search(captions, images, 100, 10.0, "mean")

    def coarse(captions: retrieve.Embeddings) -> object:
        return retrieve.nearest(captions.globals, images.globals, 100)

    single = [texts[c : c + 1] for c in range(len(texts))]
    seconds = {"cross-attention": timed(lambda: [cross_attention(words[c], regions) for c in range(10)], 10),
               "two-stage (TGDT), shortlist of 100": timed(lambda: [two_stage(each) for each in single[:50]], 50),
               "two-stage (TGDT), 200 captions at once": timed(lambda: two_stage(texts), 200),
               "coarse alone (USER)": timed(lambda: [coarse(each) for each in single], 200),
               "coarse alone (USER), 200 captions at once": timed(lambda: coarse(texts), 200)}
    add_results([{"budget": "speed", "arm": name, "seed": 0, "seconds": number(value, 6)}
                 for name, value in seconds.items()])
    for name, value in seconds.items():
        print(f"{name:36}{1000 * value:10.3f} ms a caption{seconds['cross-attention'] / value:10.1f} times as fast")


def seeds(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main(argv: list[str]) -> int:
    matplotlib.use("Agg")
    if argv[:1] == ["one"]:
        with locked(Path(argv[3])):  # an earlier one may still be at it, if only its parent was stopped
            return one(argv[1], argv[2], Path(argv[3]), argv[4:])
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("train", "speed", "table"))
    parser.add_argument("--out", type=Path, help="folder of the runs")
    parser.add_argument("--budget", choices=BUDGETS, default="scenes")
    parser.add_argument("--seeds", type=seeds, default=[0, 1, 2])
    parser.add_argument("--arms", type=lambda text: [part.strip() for part in text.split(";")],
                        help="some arms, separated by semicolons; of the claims: " + "; ".join(ARMS))
    parser.add_argument("--courses", action="store_true", help="print rsum after each epoch, too")
    parser.add_argument("--draw", action="store_true", help="draw the claims into docs/")
    args, more_flags = parser.parse_known_args(argv)
    if args.command == "table" and args.out and not args.out.is_dir():
        parser.error(f"--out {args.out}: there is no such folder")
    if args.command != "train" and more_flags:
        parser.error(f"{args.command} has no {more_flags[0]}")
    if args.command == "speed":
        speed()
    elif args.command == "table":
        table(args)
    else:
        try:
            for arm in args.arms or ():
                changes_of(arm)
        except BadInput as error:
            parser.error(str(error))
        if not args.out:
            parser.error("train needs --out")
        flags.parse([*BUDGETS[args.budget].split(), *more_flags])  # says what is wrong with them before the first arm
        return train_all(args, more_flags)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
