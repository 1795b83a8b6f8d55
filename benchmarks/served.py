"""An index in Qdrant beside the index on disk: bytes and milliseconds.

    python benchmarks/served.py --images 1000 --dim 1024
    python benchmarks/served.py --images 12000 --dim 256 --approximate    # shortlists by HNSW, without tokens

Random unit vectors, as many captions as images; 36 regions an image, 12 words a caption, float16 tokens. Qdrant's
engine runs in this process, on files. PyTorch has one thread. A query is asked alone, three times; the median of the
best times of 100 queries is printed. A shortlist has 100 images or 50 captions.
"""
import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
from harness import engines, index, push, served
from retrieve import Embeddings

TOKENS = {"image": 36, "text": 12}
SHORTLIST = {"image": 100, "text": 50}
QUERIES = 100


def encode(kind: str, items: np.ndarray, dim: int, fine: bool) -> Embeddings:
    """Random items, with tokens if `fine`; the same numbers give the same items."""
    chance = torch.Generator().manual_seed(int(items[0]) + 10**6 * (kind == "text"))
    count, tokens = len(items), TOKENS[kind]
    globals_, packed = (F.normalize(torch.randn(n, dim, generator=chance), dim=1) for n in (count, count * tokens))
    return Embeddings(kind, globals_, packed, None, torch.arange(count + 1) * tokens) if fine else \
        Embeddings(kind, globals_)


def size(folder: Path) -> int:
    """Bytes on the disk. The engine's files are sparse. Its journal, about 30 MB however many items, is left out."""
    return sum(file.stat().st_blocks * 512 for file in folder.rglob("segments/**/*") if file.is_file())


def answers(ask: Callable, queries: Embeddings) -> tuple[list, float]:
    """What is found for each query, asked alone, and the median of their milliseconds, best of three."""
    found, seconds = [], []
    for row in range(len(queries)):
        best = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            answer = ask(queries[row : row + 1])
            best = min(best, time.perf_counter() - start)
        found.append(answer)
        seconds.append(best)
    return found, 1000 * statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--approximate", action="store_true", help="shortlists by HNSW, without tokens")
    args = parser.parse_args()
    torch.set_num_threads(1)
    identity = {"checkpoint": "none", "run": "none", "split": "test", "data": None, "dtype": "float16",
                "dim": args.dim, "tokens": not args.approximate}
    names = {"images": ["x"] * args.images, "captions": ["x"] * args.images}
    counts = dict.fromkeys(index.KINDS, args.images)
    with tempfile.TemporaryDirectory() as temporary:
        disk, folder = Path(temporary, "disk"), Path(temporary, "qdrant")
        make = partial(encode, dim=args.dim, fine=identity["tokens"])
        whole = (identity, counts, make, names)
        index.build(disk, *whole)
        start = time.perf_counter()
        push.push(f"qdrant:{folder}", *whole, SHORTLIST if args.approximate else None)
        print(f"{args.images} images and captions, D {args.dim}: pushed in {time.perf_counter() - start:.0f} s")
        opened, ours = served.load(f"qdrant:{folder}"), index.load(disk)
        for kind, corpus, own in (("image", opened.images, ours.images), ("text", opened.texts, ours.texts)):
            queries = make("text" if kind == "image" else "image", np.arange(-QUERIES, 0))
            here, ms_here = answers(partial(engines.search, corpus=own, shortlist=SHORTLIST[kind]), queries)
            there, ms_there = answers(partial(corpus.search, shortlist=SHORTLIST[kind], weight=10.0, reduction="sum"),
                                      queries)
            on_disk = sum(file.stat().st_size for file in disk.glob(f"{kind}.*"))
            equal = sum(bool(torch.equal(a[0], b[0])) for a, b in zip(here, there, strict=True))
            apart = max((a[1] - b[1]).abs().max().item() for a, b in zip(here, there, strict=True))
            print(f"{kind}s searched on disk: {on_disk / args.images:,.0f} bytes an item, {ms_here:.2f} ms a query")
            print(f"{kind}s searched in Qdrant: {size(folder / kind) / args.images:,.0f} bytes an item, {ms_there:.2f} "
                  f"ms a query; {equal} of {QUERIES} lists in the same order, scores within {apart:.4f}")


if __name__ == "__main__":
    main()
