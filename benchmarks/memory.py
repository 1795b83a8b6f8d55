"""Peak resident memory of a training run must not grow with its feature file.

    python benchmarks/memory.py            # writes sparse feature files of 80 MB and 8 GB to a temporary folder

Each run is a process of its own: a tiny model, one epoch over all pictures, two captions a picture. The feature files
are sparse: they take no space on the disk, but they are read as any file is. Prints both peaks and their difference.
The exit code is 1 if the difference is more than 1 GB.
"""
import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import BertConfig, BertModel, BertTokenizer

ROOT = Path(__file__).parent.parent
REGIONS, WIDTH = 36, 2048
ROW = REGIONS * WIDTH * 4  # bytes a picture


def write_features(folder: Path, split: str, images: int) -> int:
    """Write a SCAN split of zeros, sparse on the disk. Returns the size of its feature file in bytes."""
    folder.mkdir(exist_ok=True)
    header = {"descr": "<f4", "fortran_order": False, "shape": (images, REGIONS, WIDTH)}
    with open(folder / f"{split}_ims.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + images * ROW)
    (folder / f"{split}_caps.txt").write_text("a red dog on grass\na cat\n" * images)
    return images * ROW


def peak(folder: Path, bert: Path, out: Path) -> int:
    """The peak resident bytes of one training run on `folder`, in a process of its own."""
    command = [sys.executable, str(ROOT / "train.py"), "--dataset", "flickr30k", "--data-root", str(folder),
               "--text-encoder", str(bert), "--text-layers", "1", "--dim", "8", "--region-width", "8", "--feedforward",
               "8", "--epochs", "1", "--device", "cpu", "--out", str(out)]
    measured = ("import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL,"
                "stderr=subprocess.DEVNULL); print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)")
    said = subprocess.run([sys.executable, "-c", measured, *command], capture_output=True, text=True, check=True)
    return int(said.stdout) * (1 if sys.platform == "darwin" else 1024)


def main() -> int:
    argparse.ArgumentParser(description=__doc__).parse_args()  # it has no options but --help
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "dog", "on", "grass", "cat"]
        BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(work / "bert")
        torch.manual_seed(0)
        BertModel(BertConfig(vocab_size=len(words), hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                             intermediate_size=8)).save_pretrained(work / "bert")
        peaks = []
        for size in (80e6, 8e9):
            folder = work / f"{size:.0f}"
            wrote = write_features(folder, "train", round(size / ROW))
            write_features(folder, "dev", 100)
            peaks.append(peak(folder, work / "bert", work / f"run-{size:.0f}"))
            print(f"feature file {wrote / 1e9:6.2f} GB: peak resident memory {peaks[-1] / 1e9:.2f} GB", flush=True)
    print(f"difference {(peaks[1] - peaks[0]) / 1e9:.2f} GB (at most 1 GB is allowed)")
    return int(peaks[1] - peaks[0] > 1e9)


if __name__ == "__main__":
    sys.exit(main())
