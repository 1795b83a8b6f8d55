"""How fast is two-stage retrieval? One run times ours, a loop over the queries as released evaluators have it, the
exhaustive local similarity, and what the machine's matrix products alone would need; then again while another program
multiplies matrices on all cores.

    python benchmarks/retrieval.py                        # Flickr30K's test size; about ten minutes on two cores
    python benchmarks/retrieval.py --images 5000          # the same at COCO's test size, with 25,000 captions
    python benchmarks/retrieval.py --grow --out PICTURE   # time against the size of the corpus, 1,000 to 200,000 images
    python benchmarks/retrieval.py --million              # a million images, D 128: captions 1, 32 and 1,024 at once

Embeddings are random: 1,000 images x 36 regions, 5,000 captions of 10 to 20 words, D 1024; K is 50 captions for an
image and 100 images for a caption.
"""
import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
from harness import engines
from retrieve import Embeddings, local_matrix

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(images: int, captions: int, dim: int, dtype: torch.dtype) -> tuple[Embeddings, Embeddings]:
    """Random embeddings of unit length: 36 regions an image, 10 to 20 words a caption, padded to 20."""
    g = torch.Generator().manual_seed(0)

    def unit(*shape: int) -> torch.Tensor:
        out = torch.empty(*shape, dtype=dtype)
        for part in out.split(1000):  # never the whole in float32
            part.copy_(F.normalize(torch.randn(part.shape, generator=g), dim=-1))
        return out

    words = torch.arange(20) < torch.randint(10, 21, (captions, 1), generator=g)
    regions, ends = unit(images, 36, dim).flatten(0, 1), 36 * torch.arange(images + 1)  # packed, so it is not copied
    sides = (Embeddings("image", unit(images, dim).float(), regions, None, ends),
             Embeddings("text", unit(captions, dim).float(), unit(captions, 20, dim), words))
    return tuple(side.to(DEVICE) for side in sides)


def seconds(work: Callable, repeat: int = 3) -> float:
    """The best of a few runs, the first of which warms up."""
    best = float("inf")
    for _ in range(repeat):
        start = time.perf_counter()
        work()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def loop(queries: Embeddings, corpus: Embeddings, padded: dict, k: int, weight: float = 10.0) -> list[np.ndarray]:
    """One query after the other, as released evaluators do: all scores, a full argsort, then a padded product.

    padded: kind -> the tokens and the mask of all items of that kind.
    """
    corpus_globals, found = corpus.globals.cpu().numpy(), []
    (query_tokens, query_mask), (corpus_tokens, corpus_mask) = padded[queries.kind], padded[corpus.kind]
    for query in range(len(queries)):
        scores = corpus_globals @ queries.globals[query].cpu().numpy()
        best = np.argsort(scores)[::-1][:k].copy()
        tokens, mask = corpus_tokens[best], corpus_mask[best]
        own = query_tokens[query].expand(k, -1, -1)
        if corpus.kind == "image":
            dots = torch.matmul(own, tokens.transpose(1, 2))                                    # [k, words, regions]
            local = dots.masked_fill(~mask[:, None], 0).amax(2).masked_fill(~query_mask[query], 0).sum(1)
        else:
            dots = torch.matmul(tokens, own.transpose(1, 2))
            local = dots.amax(2).masked_fill(~mask, 0).sum(1)
        mixed = scores[best] + weight * local.float().cpu().numpy()
        found.append(best[np.argsort(mixed)[::-1]])
    return found


def rate(dtype: torch.dtype) -> float:
    """The machine's own matrix-product rate, operations a second."""
    n = 1024 if DEVICE == "cpu" else 4096  # a smaller product does not fill a GPU
    a, b = torch.randn(2 * n, n, device=DEVICE).to(dtype), torch.randn(n, n, device=DEVICE).to(dtype)
    return 20 * 2 * 2 * n**3 / seconds(lambda: [a @ b for _ in range(20)], 5)


def busy() -> None:
    """What the other program does: it multiplies matrices with all threads, and never ends."""
    a = torch.randn(1500, 1500)
    while True:
        a @ a


def compare(size: int) -> None:
    """One query at a time, all at once, and all at once beside another program, each against the arithmetic alone."""
    print(f"{DEVICE}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}; milliseconds a query, and in\n"
          "brackets the part of the limit: the shortlists' operations at the rate of a large product")
    print(f"{'':10}{'query':>8}{'loop':>8}{'one at a time':>16}{'all at once':>16}{'x loop':>8}{'exhaustive':>12}"
          f"{'busy: rate':>12}{'all at once':>13}{'exhaustive':>12}")
    base = {}
    for dtype in (torch.float32, torch.bfloat16):
        images, texts = make(size, 5 * size, 1024, dtype)
        padded = {side.kind: side.padded() for side in (images, texts)}
        for queries, corpus, k in ((images, texts, 50), (texts, images, 100)):
            part = queries[:200]  # enough where the time of a query does not depend on their number
            if dtype == torch.float32:
                base[queries.kind] = seconds(lambda q=part, c=corpus, p=padded, k=k: loop(q, c, p, k), 2) / len(part)

            def single(part=part, corpus=corpus, k=k) -> None:
                for row in range(len(part)):
                    engines.search(part[row : row + 1], corpus, k)

            def whole(queries=queries, corpus=corpus, k=k) -> None:
                engines.search(queries, corpus, k)

            def exhaustive(i=images[:20], t=texts) -> None:
                local_matrix(i, t)

            indices = engines.search(queries, corpus, k)[0]
            words = texts.lengths(indices.flatten()).sum() if corpus.kind == "text" else len(texts.tokens) * k
            speed, one, ours, every = rate(dtype), seconds(single, 2), seconds(whole), seconds(exhaustive, 2)
            limit = 2 * 36 * 1024 * int(words) / speed / len(queries)
            one, ours, every = one / len(part), ours / len(queries), every / 20 * size / len(queries)
            other = subprocess.Popen([sys.executable, __file__, "--busy"])
            try:
                time.sleep(10)  # it has to import torch first
                slower, beside, every2 = rate(dtype) / speed, seconds(whole), seconds(exhaustive, 2)
            finally:
                other.kill()
                other.wait()
            print(f"{str(dtype).removeprefix('torch.'):10}{queries.kind:>8}{base[queries.kind] * 1e3:8.2f}"
                  f"{one * 1e3:9.2f} ({limit / one:.2f}){ours * 1e3:9.2f} ({limit / ours:.2f})"
                  f"{base[queries.kind] / ours:8.1f}{every * 1e3:12.2f}{slower:12.2f}"
                  f"{beside / len(queries) * 1e3:13.2f}{every2 / 20 * size / len(queries) * 1e3:12.2f}", flush=True)
    print(f"peak memory {peak():.1f} GB")


def peak() -> float:
    """The most memory that this process has held, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def grow(out: Path, dim: int = 256, k: int = 100) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sizes, lines = (1000, 3000, 10_000, 30_000, 100_000, 200_000), []
    print(f"{DEVICE}; 64 captions search N images, D {dim}, bfloat16 tokens, K {k}; milliseconds a query")
    print(f"{'N':>8}{'two-stage':>11}{'stage 1':>9}{'exhaustive':>12}")
    for size in sizes:
        images, texts = make(size, 64, dim, torch.bfloat16)
        two, one = (seconds(lambda w=w, i=images, t=texts: engines.search(t, i, k, w)) / 64 * 1e3
                    for w in (10.0, 0.0))
        exhaustive = sum(seconds(lambda p=part, t=texts: local_matrix(p, t), 2)
                         for part in (images[at : at + 1000] for at in range(0, min(size, 3000), 1000)))
        exhaustive *= size / min(size, 3000) / 64 * 1e3  # linear in N: three thousand images tell
        lines.append((size, two, one, exhaustive))
        print(f"{size:8d}{two:11.2f}{one:9.2f}{exhaustive:12.1f}", flush=True)
    print(f"peak memory {peak():.1f} GB")
    figure, axis = plt.subplots(figsize=(6, 3.6))
    for column, name, style in ((1, "two-stage", "k.-"), (2, "stage 1 alone", "k.:"), (3, "exhaustive local", "r.--")):
        axis.loglog(sizes, [line[column] for line in lines], style, label=name)
    axis.set(xlabel="images in the corpus", ylabel="milliseconds a caption")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(out, dpi=110, bbox_inches="tight")
    print(f"picture: {out}")


def million(dim: int = 128, k: int = 100, size: int = 1_000_000) -> None:
    images, texts = make(size, 1024, dim, torch.float16)
    block, other = torch.zeros(2, 2**28, dtype=torch.uint8, device=DEVICE)
    bandwidth = 2 * len(block) / seconds(lambda: other.copy_(block), 5)  # bytes a second, read and written
    speed = rate(torch.float32)
    print(f"{DEVICE}; {size} images, D {dim}, float16 tokens, K {k}; milliseconds a caption; the floor: its bytes at\n"
          f"{bandwidth / 1e9:.0f} GB/s, or its operations at {speed / 1e9:.0f} GF/s, whichever takes longer")
    print(f"{'at once':>8}{'two-stage':>11}{'stage 1':>9}{'floor':>9}")
    for count in (1, 32, 1024):
        query = texts[:count]
        two, one = (seconds(lambda w=w, q=query: engines.search(q, images, k, w)) / count * 1e3
                    for w in (10.0, 0.0))
        gathered = count * k * 36 * dim
        read = size * dim * 4 + 2 * gathered
        operations = 2 * count * size * dim + 2 * 15 * gathered
        floor = max(read / bandwidth, operations / speed) / count * 1e3
        print(f"{count:8d}{two:11.3f}{one:9.3f}{floor:9.3f}", flush=True)
    print(f"peak memory {peak():.1f} GB")


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--grow", action="store_true", help="time against the size of the corpus")
    arguments.add_argument("--out", type=Path, default=Path("growth.png"), help="the picture of --grow")
    arguments.add_argument("--images", type=int, default=1000, help="images of the comparison (default 1000)")
    arguments.add_argument("--million", action="store_true", help="a million images, a few captions at once")
    arguments.add_argument("--busy", action="store_true", help="be the other program: multiply matrices, never end")
    given = arguments.parse_args()
    if given.busy:
        busy()
    elif given.grow:
        grow(given.out)
    elif given.million:
        million()
    else:
        compare(given.images)
