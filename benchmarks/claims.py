"""Do the papers' claims hold? Each idea with and without, same data, same steps, several seeds, val split.

    python benchmarks/claims.py train --out DIR --dataset flickr8k --data-root DATA --text-encoder FOLDER
    python benchmarks/claims.py train --out DIR --dataset scenes
    python benchmarks/claims.py speed --out DIR
    python benchmarks/claims.py table --out DIR

`train` trains every arm that is not trained yet, seed by seed, each in a process of its own, and may be stopped and
started again at will; `--arms "a; b"` takes some, `--seeds 0,1` some seeds. `table` prints the claims and draws them,
from whatever is there, and copies the metrics to benchmarks/results.

On photographs BERT is frozen, without dropout and noise, so that each caption goes through it once for all arms, and
a batch holds all five captions of its images, so that each image is encoded once an epoch: the smallest budget in
which all arms can be trained on two cores. An arm changes one thing against the arm it is compared with.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers.modeling_outputs import BaseModelOutput

sys.path.insert(0, str(Path(__file__).parent.parent))
import user_changes

import batching
import data
import extract
import files
import losses
import measure
import run as runs
import tgdt
import train
import twostage
import user

HERE = Path(__file__).resolve().parent
PHOTOGRAPHS = ["--precision", "bfloat16", "--text-lr", "0", "--dropout", "0", "--noise", "0", "--longest", "32",
               "--dim", "256", "--feedforward", "512", "--schedule", "linear", "--weights", "model",
               "--batch-size", "160", "--captions-per-image", "5", "--epochs", "5", "--momentum", "0.995"]
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57}  # seeds -> the 97.5 % point of Student's t; smaller for more
LENGTHS, WEIGHTS = (10, 20, 50, 100, 200), (0.0, 1.0, 3.0, 10.0, 30.0, 100.0)

# -------------------------------------------------------------------------------------------------------------- changes


def detached() -> None:
    """TGDT's local tokens are detached before its global encoder, as in the released training."""

    def forward(self, slots, mask):
        tokens = self.local_encoder(self.project(slots), src_key_padding_mask=~mask)
        globals_ = self.global_encoder(tokens.detach(), src_key_padding_mask=~mask)[:, 0]
        return F.normalize(globals_, dim=-1), F.normalize(tokens, dim=-1)

    tgdt.TokenGuidedEncoder.forward = forward


def beside() -> None:
    """TGDT's global encoder reads what the local one reads, instead of its tokens: no token guidance."""

    def forward(self, slots, mask):
        slots = self.project(slots)
        tokens = self.local_encoder(slots, src_key_padding_mask=~mask)
        globals_ = self.global_encoder(slots, src_key_padding_mask=~mask)[:, 0]
        return F.normalize(globals_, dim=-1), F.normalize(tokens, dim=-1)

    tgdt.TokenGuidedEncoder.forward = forward


def fine_alone() -> None:
    """CMC's hinge on the local similarities only: nothing trains the coarse vectors."""
    losses.cmc = lambda image_global, text_global, local, positives, margin, intra_margin, weight, negatives: (
        losses.hinge(weight * local, margin, positives, negatives))


def hinge_for_uto() -> None:
    """USER on the batch alone, by the hinge with hardest negatives, the mean over negatives in the first epoch."""

    def objective(model, batch, settings, easy, precision, momentum=None):
        images, texts = train.encode_pairs(model, batch, precision)
        row = batch["image_row"]
        similarity = images.globals.float()[row] @ texts.globals.float().T
        return losses.hinge(similarity, settings.margin, row[:, None] == row, "mean" if easy else "hardest") / len(row)

    train.objective = objective


def stand_in_for_clip() -> None:
    """A stand-in for CLIP's embedding: the mean of the picture's own region features. No CLIP can be had here."""

    def prepare(splits, *given, **more):
        for split in splits.values():
            parts = np.array_split(np.arange(len(split.features)), -(-len(split.features) // 256))
            split.clip = np.concatenate([split.features.read(rows)[0].mean(1) for rows in parts])
            split.clip /= np.linalg.norm(split.clip, axis=1, keepdims=True)
        return {"regions": {"kind": "files"}, "clip": {"kind": "stand-in", "dim": splits["train"].features.dim}}

    extract.prepare = prepare


def pool_evenly_at_first() -> None:
    """GPO starts as mean pooling: the scores of all places are zero."""
    drawn = user.GeneralizedPooling.__init__

    def init(self, *given):
        drawn(self, *given)
        torch.nn.init.zeros_(self.score.weight)

    user.GeneralizedPooling.__init__ = init


def nothing() -> None:
    pass


TGDT, USER = ["--model", "tgdt"], ["--model", "user", "--lr", "0.001"]  # rates by a look at seed 0 on val
PLAIN = [*USER, "--guide", "none"]
AVERAGED = ["--schedule", "constant", "--weights", "momentum"]  # the momentum copy over a rate that does not fall
LONGER = ["--epochs", "10"]  # twice the steps: five epochs leave USER not quite trained
ARMS = {  # what is trained: flags of train.py, and a change that no flag makes
    "tgdt": (TGDT, nothing), "user": (USER, nothing), "unified": (["--model", "tgdt-user"], nothing),
    "tgdt, trained coarse": ([*TGDT, "--local-weight", "0"], nothing), "tgdt, trained fine": (TGDT, fine_alone),
    "tgdt, no intra-modal term": ([*TGDT, "--intra-margin", "9"], nothing),
    "tgdt, intra-modal margin 0.1": ([*TGDT, "--intra-margin", "0.1"], nothing),
    "user, no guide": (PLAIN, nothing),
    "user, no queue": ([*PLAIN, "--queue", "0"], nothing),
    "user, queue 512": ([*PLAIN, "--queue", "512"], nothing),
    "user, queue 8192": ([*PLAIN, "--queue", "8192"], nothing),
    "user, hinge": ([*PLAIN, "--queue", "0"], hinge_for_uto),
    "user, batch unmasked": (PLAIN, user_changes.CHANGES["batch-unmasked"]),
    "user, queue unmasked": (PLAIN, user_changes.CHANGES["queue-unmasked"]),
    "user, stand-in for CLIP": ([*USER, "--guide", "clip"], stand_in_for_clip),
    "user, longer": ([*USER, *LONGER], nothing),
    "user, no guide, longer": ([*PLAIN, *LONGER], nothing),
    "user, no queue, longer": ([*PLAIN, "--queue", "0", *LONGER], nothing),
    "user, hinge, longer": ([*PLAIN, "--queue", "0", *LONGER], hinge_for_uto),
    "user, slot statistics": ([*USER, "--slots", "36"], nothing),
    "user, momentum copy": ([*PLAIN, "--weights", "momentum"], nothing),
    "user, constant rate": ([*PLAIN, *AVERAGED], nothing),
    "user, guided, constant rate": ([*USER, *AVERAGED], nothing),
    "user, one caption an image": ([*PLAIN, *AVERAGED, "--captions-per-image", "1"], nothing),
    "user, mean first": ([*PLAIN, *AVERAGED], pool_evenly_at_first),
    "user, guided, mean first": ([*USER, *AVERAGED], pool_evenly_at_first),
    "tgdt, constant rate": ([*TGDT, *AVERAGED], nothing),
    "unified, constant rate": (["--model", "tgdt-user", *AVERAGED], nothing),
    "user, guided, constant rate, longer": ([*USER, *AVERAGED, *LONGER], nothing),
    "tgdt, constant rate, longer": ([*TGDT, *AVERAGED, *LONGER], nothing),
    "unified, constant rate, longer": (["--model", "tgdt-user", *AVERAGED, *LONGER], nothing),
    "user, reward floor": ([*PLAIN, "--reward-floor"], nothing),
    "user, keys in training": (PLAIN, user_changes.CHANGES["keys-in-training"]),
    "user, cold momentum": (PLAIN, user_changes.CHANGES["cold-momentum"]),
    "user, full queue": (PLAIN, user_changes.CHANGES["full-queue"]),
    "tgdt, beside": (TGDT, beside), "tgdt, detached": (TGDT, detached),
    "tgdt, margin 0.1": ([*TGDT, "--margin", "0.1"], nothing),
    "tgdt, margin 0.4": ([*TGDT, "--margin", "0.4"], nothing),
}
CLAIMS = [  # the idea, the arm with it and how it is searched, the arm without it and how
    ("1 one model, searched two-stage, or by coarse alone", ("tgdt", "two_stage"), ("tgdt", "global")),
    ("1 one model, searched by both, or by fine alone", ("tgdt", "mixed"), ("tgdt", "local")),
    ("1 trained on both, or on coarse alone", ("tgdt", "two_stage"), ("tgdt, trained coarse", "global")),
    ("1 trained on both, or on fine alone", ("tgdt", "two_stage"), ("tgdt, trained fine", "local")),
    ("2 CMC's intra-modal term", ("tgdt", "two_stage"), ("tgdt, no intra-modal term", "two_stage")),
    ("2 its margin 0.3, or 0.1", ("tgdt", "two_stage"), ("tgdt, intra-modal margin 0.1", "two_stage")),
    ("2 the hinge's margin 0.2, or 0.1", ("tgdt", "two_stage"), ("tgdt, margin 0.1", "two_stage")),
    ("2 the hinge's margin 0.2, or 0.4", ("tgdt", "two_stage"), ("tgdt, margin 0.4", "two_stage")),
    ("3 two-stage, or everything re-ranked", ("tgdt", "two_stage"), ("tgdt", "mixed")),
    ("5 token guidance: on top of the tokens, or beside", ("tgdt", "two_stage"), ("tgdt, beside", "two_stage")),
    ("5 gradients through the tokens, or detached", ("tgdt", "two_stage"), ("tgdt, detached", "two_stage")),
    ("6 SGE", ("user", "global"), ("user, no guide", "global")),
    ("6 SGE, twice the steps", ("user, longer", "global"), ("user, no guide, longer", "global")),
    ("6 CGE by a stand-in for CLIP, or SGE", ("user, stand-in for CLIP", "global"), ("user", "global")),
    ("7 UTO, or the hinge, both on the batch", ("user, no queue", "global"), ("user, hinge", "global")),
    ("7 UTO, or the hinge, twice the steps", ("user, no queue, longer", "global"), ("user, hinge, longer", "global")),
    ("8 queues of 512", ("user, queue 512", "global"), ("user, no queue", "global")),
    ("8 queues of 2,048", ("user, no guide", "global"), ("user, no queue", "global")),
    ("8 queues of 2,048, twice the steps", ("user, no guide, longer", "global"),
     ("user, no queue, longer", "global")),
    ("8 queues of 8,192", ("user, queue 8192", "global"), ("user, no queue", "global")),
    ("9 false negatives masked in the batch", ("user, no guide", "global"), ("user, batch unmasked", "global")),
    ("9 false negatives masked in the queue", ("user, no guide", "global"), ("user, queue unmasked", "global")),
    ("10 the unified model, or TGDT", ("unified", "two_stage"), ("tgdt", "two_stage")),
    ("10 the unified model, or USER", ("unified", "two_stage"), ("user", "global")),
    ("10 averaged at a constant rate: the unified model, or TGDT", ("unified, constant rate", "two_stage"),
     ("tgdt, constant rate", "two_stage")),
    ("10 averaged at a constant rate: the unified model, or USER", ("unified, constant rate", "two_stage"),
     ("user, guided, constant rate", "global")),
    ("10 the same, twice the steps: the unified model, or TGDT", ("unified, constant rate, longer", "two_stage"),
     ("tgdt, constant rate, longer", "two_stage")),
    ("10 the same, twice the steps: the unified model, or USER", ("unified, constant rate, longer", "two_stage"),
     ("user, guided, constant rate, longer", "global")),
]
OURS = [  # what we do otherwise than the released code, or tried, in the same form
    ("TGDT's average at a constant rate, or TGDT", ("tgdt, constant rate", "two_stage"), ("tgdt", "two_stage")),
    ("the unified model's average at a constant rate, or the model", ("unified, constant rate", "two_stage"),
     ("unified", "two_stage")),
    ("statistics of SGE over regions, or by slot", ("user", "global"), ("user, slot statistics", "global")),
    ("the momentum copy at a constant rate, or the model at a falling one", ("user, constant rate", "global"),
     ("user, no guide", "global")),
    ("the momentum copy, or the model, both at a falling rate", ("user, momentum copy", "global"),
     ("user, no guide", "global")),
    ("five captions of an image in a batch, or one", ("user, constant rate", "global"),
     ("user, one caption an image", "global")),
    ("generalized pooling starts as the mean, or at random", ("user, mean first", "global"),
     ("user, constant rate", "global")),
    ("a reward below 0, or none", ("user, no guide", "global"), ("user, reward floor", "global")),
    ("keys as when testing, or training", ("user, no guide", "global"), ("user, keys in training", "global")),
    ("a momentum that grows, or not", ("user, no guide", "global"), ("user, cold momentum", "global")),
    ("queues empty at the start, or random", ("user, no guide", "global"), ("user, full queue", "global")),
]

# ------------------------------------------------------------------------------------------------------------- training


def freeze(text_encoder, cache: Path):
    """BERT in eval mode, and each caption through it once for all arms: its states are kept in a file in `cache`."""

    def frozen(settings):
        bert, tokenizer = text_encoder(settings)
        splits = data.load(settings.dataset, Path(settings.data_root), ("train", "val"))
        captions = [caption for split in splits.values() for caption in split.captions]
        words = batching.tokenize(captions, tokenizer, settings.longest)
        bounds = list(zip(words.offsets, words.offsets[1:], strict=False))
        place = {words.ids[start:end].astype(np.int64).tobytes(): (start, end) for start, end in bounds}
        key = hashlib.sha256(words.ids.tobytes() + settings.text_encoder.encode()).hexdigest()[:12]
        path, width, run_bert = cache / f"words-{key}.npy", bert.config.hidden_size, bert.eval().forward
        if not path.is_file():
            states = np.zeros((len(words.ids), width), np.float16)
            for batch in tqdm(list(batching.text_batches(words, 256)), desc="words", unit="batch"):
                with torch.no_grad():
                    found = run_bert(input_ids=batch["word_ids"], attention_mask=batch["word_mask"].long())
                for caption, state in zip(batch["caption_index"].tolist(), found.last_hidden_state, strict=True):
                    start, end = bounds[caption]
                    states[start:end] = state[: end - start].half().numpy()
            cache.mkdir(parents=True, exist_ok=True)
            files.write_whole(path, lambda file: np.save(file, states))
        states = torch.from_numpy(np.load(path))

        def remembered(input_ids, attention_mask):
            out, ids = torch.zeros(*input_ids.shape, width), input_ids.cpu().numpy()
            for row, n in enumerate(attention_mask.sum(1).tolist()):
                start, end = place[ids[row, :n].tobytes()]
                out[row, :n] = states[start:end]
            return BaseModelOutput(out.to(input_ids.device))

        bert.forward = remembered
        return bert, tokenizer

    return frozen


def one(arm: str, flags: list[str], out: Path) -> int:
    """Train an arm, and measure it on val in every way of searching."""
    own, change = ARMS[arm]
    change()
    if "flickr8k" in flags:
        runs.text_encoder = freeze(runs.text_encoder, out.parent)
    resume = (out / "checkpoint.pt").is_file()
    code = train.main(["--out", str(out), "--resume"] if resume else [*flags, *own, "--out", str(out)])
    if code:
        return code
    result = files.read_json(out / "metrics.json")
    if result["split"] != "val" or arm == "tgdt":
        settings, _, model, tokenizer = runs.open_run(out)
        splits = data.load(settings.dataset, settings.data_root and Path(settings.data_root), ("train", "val"))
        extract.prepare(splits, settings, out)
        split = splits["val"]
        words = batching.tokenize(split.captions, tokenizer, settings.longest)
        where, precision = runs.resolve("auto", settings.precision)
        result, images, texts = measure.measure(model.to(where), split, words, settings, where, precision)
        if arm == "tgdt":
            options = dict(words=settings.words, exhaustive=False)
            result["shortlists"] = measure.shortlists(images, texts, split.image_of, LENGTHS, settings.local_weight,
                                                      settings.words)
            result["weights"] = {weight: measure.evaluate(images, texts, split.image_of, weight=weight, **options)[
                "two_stage"] for weight in WEIGHTS}
    result["val_by_epoch"] = [measure.final(json.loads(line)["val"])["rsum"]
                              for line in (out / "history.jsonl").read_text().splitlines()]
    files.write_json(out / "val.json", result)
    return 0


def place(out: Path, dataset: str, arm: str, seed: int) -> Path:
    return out / dataset / f"{arm.replace(', ', '-').replace(' ', '_')}-{seed}"


def train_all(args: argparse.Namespace, flags: list[str]) -> None:
    for seed in args.seeds:
        for arm in args.arms or ARMS:
            if args.dataset == "scenes" and arm == "user, stand-in for CLIP":
                continue  # its regions' mean is no stand-in for anything
            folder = place(args.out, args.dataset, arm, seed)
            if (folder / "val.json").is_file():
                continue
            folder.mkdir(parents=True, exist_ok=True)
            given = ["--dataset", args.dataset, "--seed", str(seed)]
            given += [*(PHOTOGRAPHS if args.dataset != "scenes" else ()), *flags]
            started = time.perf_counter()
            with open(folder / "log.txt", "ab") as log:
                call = [sys.executable, __file__, "one", arm, str(folder), *given]
                done = subprocess.run(call, stdout=log, stderr=log)
            told = "done" if done.returncode == 0 else f"FAILED ({done.returncode}), see {folder / 'log.txt'}"
            print(f"{arm}, seed {seed}: {told}, {time.perf_counter() - started:.0f} s", flush=True)


# ---------------------------------------------------------------------------------------------------------------- speed


def cross_attention(words: torch.Tensor, regions: torch.Tensor) -> torch.Tensor:
    """SCAN's kind of matcher, text to image: each word attends to each image's regions and is compared with what it
    finds there. words [n, D] of one caption, regions [I, R, D], unit length -> similarities [I]."""
    dots = F.normalize((regions @ words.T).relu(), dim=2)                       # [I, R, n]
    found = (9 * dots).softmax(1).transpose(1, 2) @ regions                     # [I, n, D]
    return F.cosine_similarity(found, words[None], dim=2).mean(1)


def speed(args: argparse.Namespace) -> None:
    """Milliseconds a caption, 1,000 images x 36 regions, D 1024: cross-attention, two-stage, coarse vectors alone."""
    g = torch.Generator().manual_seed(0)

    def unit(*shape: int) -> torch.Tensor:
        return F.normalize(torch.randn(*shape, generator=g), dim=-1)

    def side(kind: str, n: int, tokens: int) -> twostage.Embeddings:
        return twostage.Embeddings(kind, unit(n, 1024), unit(n, tokens, 1024), torch.ones(n, tokens, dtype=torch.bool))

    images, texts = side("image", 1000, 36), side("text", 200, 12)

    def timed(call, captions: int) -> float:
        call()
        start = time.perf_counter()
        call()
        return 1000 * (time.perf_counter() - start) / captions

    found = {"cross-attention": timed(lambda: [cross_attention(texts.tokens[c], images.tokens) for c in range(10)], 10),
             "two-stage (TGDT)": timed(lambda: twostage.search(texts, images, 100, 10.0, "mean"), 200),
             "coarse alone (USER)": timed(lambda: (texts.globals @ images.globals.T).topk(100), 200)}
    args.out.mkdir(parents=True, exist_ok=True)
    files.write_json(args.out / "speed.json", found)
    for name, value in found.items():
        print(f"{name:22}{value:10.3f} ms a caption{found['cross-attention'] / value:10.1f} times")


# ---------------------------------------------------------------------------------------------------------------- table


def results(out: Path, dataset: str, arm: str) -> dict[int, dict]:
    """The metrics of an arm by seed, of the seeds that are done."""
    found = (out / dataset).glob(f"{place(out, dataset, arm, 0).name.removesuffix('0')}[0-9]*/val.json")
    return {int(path.parent.name.rsplit("-", 1)[1]): files.read_json(path) for path in sorted(found)}


def compare(out: Path, dataset: str, ideas: list) -> list[tuple[str, list]]:
    """The ideas of which both arms are trained, each with its pairs of metrics, with it and without, a pair a seed."""
    lines = []
    for idea, (a, how_a), (b, how_b) in ideas:
        with_it, without = results(out, dataset, a), results(out, dataset, b)
        pairs = [(with_it[s][how_a], without[s][how_b]) for s in sorted(with_it.keys() & without.keys())
                 if how_a in with_it[s] and how_b in without[s]]
        if pairs:
            lines.append((idea, pairs))
    return lines


def row(idea: str, pairs: list[tuple[dict, dict]]) -> list:
    """A line of the table of claims."""
    gains = [a["rsum"] - b["rsum"] for a, b in pairs]
    return [idea, *(spread([pair[side]["rsum"] for pair in pairs]) for side in (0, 1)), spread(gains, "+"),
            *(spread([a[way]["r1"] - b[way]["r1"] for a, b in pairs], "+") for way in ("i2t", "t2i")),
            verdict(gains), len(pairs)]


def table(args: argparse.Namespace) -> None:
    """Differences seed by seed, their mean and standard deviation; as text, as a picture, and the metrics as files."""
    for dataset in ("flickr8k", "scenes"):
        lines, ours = compare(args.out, dataset, CLAIMS), compare(args.out, dataset, OURS)
        if not lines:
            continue
        for title, found in ((f"{dataset}, val", lines), *((("our changes", ours),) if ours else ())):
            print(f"\n**{title}**\n")
            print_table("claim", "with", "without", "rsum", "R@1 image to text", "R@1 text to image", "holds?", "seeds",
                        rows=[row(idea, pairs) for idea, pairs in found])
        told = [line for line in lines if len(line[1]) > 2] or lines  # one or two seeds say nothing
        draw(dataset, told, HERE.parent / "docs" / f"claims-{dataset}.png")
        print_searches(list(results(args.out, dataset, "tgdt").values()))
        for arm in ARMS:
            for seed, found in results(args.out, dataset, arm).items():
                target = HERE / "results" / dataset / f"{place(args.out, dataset, arm, seed).name}.json"
                target.parent.mkdir(parents=True, exist_ok=True)
                files.write_json(target, found)
    if (args.out / "speed.json").is_file():
        found = files.read_json(args.out / "speed.json")
        print()
        print_table("11 search, 1,000 images x 36 regions", "ms a caption", "times cross-attention's speed", rows=[
            [name, f"{value:.2f}", f"{found['cross-attention'] / value:.0f}"] for name, value in found.items()])


def print_searches(runs: list[dict]) -> None:
    """Claims 3 and 4, after training: the shortlist's length, and the weight of local."""
    if not runs:
        return
    whole = [run["mixed"] for run in runs]
    rows = [["all", spread([run["rsum"] for run in whole]), "", "", "", "1.0"]]
    for at, k in enumerate(LENGTHS):
        short = [run["shortlists"][at] for run in runs]
        lost = [[a["rsum"] - b["rsum"] for a, b in zip(short, whole, strict=True)]]
        lost += [[a[way]["r1"] - b[way]["r1"] for a, b in zip(short, whole, strict=True)] for way in ("i2t", "t2i")]
        faster = [run["seconds"]["mixed"] / a["seconds"] for run, a in zip(runs, short, strict=True)]
        rows.append([k, spread([a["rsum"] for a in short]), *(spread(values, "+") for values in lost), spread(faster)])
    print()
    print_table("3 shortlist", "rsum", "against all", "R@1 image to text", "R@1 text to image", "times the speed",
                rows=rows)
    print()
    print_table("4 weight of local", *(f"{weight:g}" for weight in WEIGHTS), rows=[
        ["two-stage rsum", *(spread([run["weights"][str(weight)]["rsum"] for run in runs]) for weight in WEIGHTS)]])


def print_table(*titles: str, rows: list[list]) -> None:
    print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |")


def spread(values: list[float], sign: str = "") -> str:
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.1f}{deviation}"


def verdict(gains: list[float]) -> str:
    """Whether the mean over the seeds lies further from 0 than Student's 95 % interval reaches; if not, how far from 0
    the interval goes at most: within 1 is as good as no difference, within 10 is no knowledge."""
    if len(gains) < 2:
        return "too few seeds"
    reach = STUDENT.get(len(gains), STUDENT[6]) * statistics.stdev(gains) / len(gains) ** 0.5
    if abs(statistics.mean(gains)) <= reach:
        return f"cannot tell: within {abs(statistics.mean(gains)) + reach:.1f}"
    return "yes" if statistics.mean(gains) > 0 else "**no: it costs**"


def draw(dataset: str, lines: list, path: Path) -> None:
    """A dot a seed, a bar for the mean: what each idea adds in rsum."""
    figure, axis = plt.subplots(figsize=(9, 0.42 * len(lines) + 1.2))
    for row, (_, pairs) in enumerate(reversed(lines)):
        found = [a["rsum"] - b["rsum"] for a, b in pairs]
        mean = statistics.mean(found)
        axis.barh(row, mean, color="#1a9850" if mean > 0 else "#d73027", alpha=0.35)
        axis.plot(found, [row] * len(found), "o", color="black", markersize=4)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(lines)), [idea for idea, _ in reversed(lines)])
    axis.set(xlabel="difference in val rsum, with the idea less without (a dot a seed)", title=dataset)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def main() -> int:
    matplotlib.use("Agg")
    if sys.argv[1:2] == ["one"]:
        return one(sys.argv[2], sys.argv[4:], Path(sys.argv[3]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("train", "speed", "table"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dataset", choices=("flickr8k", "scenes"), default="scenes")
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--arms", type=lambda text: [part.strip() for part in text.split(";")],
                        help="some arms, separated by semicolons: " + "; ".join(ARMS))
    args, flags = parser.parse_known_args()
    unknown = [arm for arm in args.arms or () if arm not in ARMS]
    if unknown:
        parser.error(f"no arm is called {unknown[0]!r}")
    if args.command == "train":
        train_all(args, flags)
    else:
        {"speed": speed, "table": table}[args.command](args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
