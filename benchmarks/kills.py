"""Kill a training at random moments; resumed, it must end with the same weights and the same history.

    python benchmarks/kills.py [--moments 20] [--seed 0] [--models tgdt user tgdt-user]

For each of the models a tiny run is trained once without a break. Then, for each moment, the same run is killed
(kill -9, and every third time Ctrl-C) after a random time and resumed, up to three times, and then to its end.
Checkpoints are written every 0.05 seconds within an epoch, so that kills fall into the writing of files as well. Prints
a line a model; the exit code is 1 if any run ended differently.
"""
import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import BertConfig, BertModel, BertTokenizer

ROOT = Path(__file__).resolve().parent.parent
WORDS = "a red blue green small dog cat ball runs sits on under the grass snow near two men".split()
CHILD = """
import signal, sys
sys.path.insert(0, sys.argv.pop(1))
import train
from harness import training
training.SAVE_EVERY = 0.05                                     # seconds, in place of ten minutes
signal.signal(signal.SIGINT, signal.default_int_handler)       # which a job in the background would ignore
sys.exit(train.main(sys.argv[1:]))
"""


def write_data(folder: Path) -> list[str]:
    """Forty training images of 3 regions x 6 numbers and a tiny BERT; returns the flags that name them."""
    rng = np.random.default_rng(0)
    for name, images in (("train", 40), ("dev", 6)):
        np.save(folder / f"{name}_ims.npy", rng.normal(size=(images, 3, 6)).astype(np.float32))
        captions = [" ".join(rng.choice(WORDS, 6)) for _ in range(2 * images)]
        (folder / f"{name}_caps.txt").write_text("\n".join(captions))
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    BertTokenizer(vocab={word: i for i, word in enumerate(vocabulary)}).save_pretrained(folder / "bert")
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                         intermediate_size=32, max_position_embeddings=64)).save_pretrained(folder / "bert")
    return ["--dataset", "flickr8k", "--data-root", str(folder), "--text-encoder", str(folder / "bert"),
            "--text-layers", "1", "--dim", "8", "--region-width", "8", "--feedforward", "16", "--batch-size", "4",
            "--captions-per-image", "1", "--epochs", "3", "--queue", "7", "--device", "cpu"]


def start(arguments: list[str]) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", CHILD, str(ROOT), *arguments], stdout=subprocess.DEVNULL,
                            stderr=subprocess.DEVNULL)


def outcome(out: Path) -> tuple[dict, list]:
    """The weights of the last checkpoint and of the best, and history without its seconds."""
    weights = {}
    for name in ("checkpoint.pt", "best.pt"):
        state = torch.load(out / name, map_location="cpu", weights_only=True)
        weights |= {f"{name} {key}": value for key, value in state["model"].items()}
    lines = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    return weights, [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def same(a: tuple, b: tuple) -> bool:
    return a[0].keys() == b[0].keys() and all(torch.equal(a[0][key], b[0][key]) for key in a[0]) and a[1] == b[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=20, help="runs that are killed, for each model (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments (default 0)")
    parser.add_argument("--models", nargs="+", default=["tgdt", "user", "tgdt-user"], help="default: all three")
    args = parser.parse_args()
    chance, wrong = random.Random(args.seed), 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        flags = write_data(folder)
        for model in args.models:
            whole, kills, equal = folder / f"{model}-whole", 0, 0
            began = time.perf_counter()
            if start([*flags, "--model", model, "--out", str(whole)]).wait():
                raise SystemExit(f"{model}: the run without a break failed")
            seconds, want = time.perf_counter() - began, outcome(whole)
            for moment in range(args.moments):
                out, code, number = folder / f"{model}-{moment}", None, 0
                while code != 0:
                    # Before settings.json there is nothing to resume: the same command starts again.
                    again = (out / "settings.json").is_file()
                    child = start(["--resume", "--out", str(out), "--device", "cpu"] if again else
                                  [*flags, "--model", model, "--out", str(out)])
                    try:
                        code = child.wait(chance.uniform(0.4, 1.1) * seconds if number < 3 else 20 * seconds)
                    except subprocess.TimeoutExpired:
                        child.send_signal(signal.SIGINT if number % 3 == 2 else signal.SIGKILL)
                        child.wait()
                        number += 1
                    if code in (1, 2):  # it failed, and would again
                        break
                kills += number
                equal += code == 0 and same(want, outcome(out))
            wrong += args.moments - equal
            print(f"{model}: {equal} of {args.moments} runs, killed {kills} times, ended as the run without a break",
                  flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
