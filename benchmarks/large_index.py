"""Search an index that is ten times larger than the machine's memory.

    python benchmarks/large_index.py [--times 10]        # the files are sparse: they take next to no disk

Writes an index whose arrays are holes of the full size (every page is read from the file system as any other page is,
and holds zeros), searches it with captions, and prints its size, the memory and the milliseconds a query.
"""
from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import index
import run as runs
from twostage import Embeddings, cumulated, search

DIM, REGIONS = 1024, 36


def write(folder: Path, size: float) -> int:
    """An index of images of about `size` bytes; returns how many there are."""
    images = int(size / (DIM * 2 * REGIONS + DIM * 4))
    manifest = {"checkpoint": "", "run": "", "split": "test", "dtype": "float16", "dim": DIM, "tokens": True,
                "faiss": {}, "counts": {"image": images, "text": 0}}
    for name, size in (("image.globals", images * DIM * 4), ("image.tokens", images * REGIONS * DIM * 2),
                       ("text.globals", 0), ("text.tokens", 0)):
        with open(folder / name, "wb") as file:
            file.truncate(size)
    (torch.arange(images + 1) * REGIONS).numpy().tofile(folder / "image.offsets")
    torch.zeros(1, dtype=torch.long).numpy().tofile(folder / "text.offsets")
    runs.write_json(folder / "manifest.json", manifest)
    runs.write_json(folder / "names.json", {})
    return images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=float, default=10, help="the index's size over the memory's (default 10)")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with tempfile.TemporaryDirectory() as temporary:
        images = write(Path(temporary), parser.parse_args().times * memory)
        opened = index.load(Path(temporary))
        size = sum(file.stat().st_size for file in Path(temporary).iterdir())
        print(f"{images} images, {size / 1e9:.0f} GB; the machine has {memory / 1e9:.0f} GB", flush=True)
        for count in (1, 32):
            lengths = torch.full((count,), 12)
            tokens = F.normalize(torch.randn(int(lengths.sum()), DIM), dim=1).half()
            query = Embeddings("text", F.normalize(torch.randn(count, DIM), dim=1), tokens, None, cumulated(lengths))
            start = time.perf_counter()
            scores = search(query, opened.images, 100)[1]
            seconds = time.perf_counter() - start
            print(f"{count:3d} captions at once: {1000 * seconds / count:.0f} ms each, {len(scores)} lists", flush=True)


if __name__ == "__main__":
    main()
