"""Where does the time of a training step go, and how far is it from the arithmetic alone?

    OMP_NUM_THREADS=1 python benchmarks/step.py             # the small presets for photographs; two minutes on one core
    OMP_NUM_THREADS=1 python benchmarks/step.py --padded    # all captions of a batch padded to the longest

Random numbers in the shapes of Flickr8K: 32 images of 36 regions of 1,280 numbers and 160 captions of 6 to 40 word
pieces, and a BERT of MiniLM's size (6 layers, 384 wide) with random weights. The limit is the time in which the step's
matrix products would be done at the rate of a large one, in bfloat16 or in float32.
"""
import argparse
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel

sys.path.insert(0, str(Path(__file__).parent.parent))
from retrieval import DEVICE, rate

import data
import train
from harness import models, settings
from sources.features import InMemory
from user import MomentumContrast

PHASES = ("images", "captions", "momentum", "loss", "backward", "optimizer")


def make_batch() -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.normal(13.5, 4.0, 160).round().astype(int), 6, 40)
    words = [rng.integers(1000, 30_000, length).astype(np.int32) for length in lengths]
    regions, boxes = rng.standard_normal((32, 36, 1280), np.float32), np.tile(np.float32([0, 0, 1, 1]), (32, 36, 1))
    split = data.Split("train", ["?"] * 160, np.repeat(np.arange(32), 5), InMemory("random numbers", regions, boxes),
                       [], [None] * 32)
    return {name: value.to(DEVICE) for name, value in data.Pairs(split, words)[range(160)].items()}


def measure(name: str, precision: str, batch: dict[str, torch.Tensor], padded: bool, steps: int = 3
            ) -> tuple[dict, float]:
    """The seconds of each phase of a step, the median of a few steps, and the operations of its matrix products."""
    torch.manual_seed(0)
    chosen = settings.make({"dataset": "flickr8k", "model": name})
    bert = BertModel(BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536),
                     add_pooling_layer=False)
    model = models.build(chosen, bert, 1280).to(DEVICE).train()
    queue = chosen.momentum.queue if name != "tgdt" else 0
    momentum = MomentumContrast(model, chosen.architecture.dim, queue, chosen.momentum.momentum, True).to(DEVICE)
    optimizer, taken = train.make_optimizer(model, chosen.training), []

    def timed(phase: str, work, *args):
        start = time.perf_counter()
        out = work(*args)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        taken[-1][phase] = taken[-1].get(phase, 0.0) + time.perf_counter() - start
        return out

    update = momentum.update
    momentum.update = lambda model: timed("momentum", update, model)

    def share(branch, batch):
        """Times the encoders inside the loss; those of the momentum copy have no gradients."""
        phase = "captions" if branch.func is train.by_length else "images"
        if phase == "captions" and padded:
            branch = branch.args[0]  # what by_length calls with each group
        return timed(phase if torch.is_grad_enabled() else "momentum", branch, batch)

    def step() -> None:
        loss = timed("loss", lambda: train.batch_loss(model, momentum, batch, chosen, precision, share=share))
        timed("backward", loss.backward)
        timed("optimizer", lambda: (nn.utils.clip_grad_norm_(model.parameters(), 2.0), optimizer.step(),
                                    optimizer.zero_grad()))

    for _ in range(steps + 1):
        taken.append({})
        step()
    for each in taken:  # the loss was timed with the encoders inside it
        each["loss"] -= sum(each.get(phase, 0.0) for phase in ("images", "captions", "momentum"))
    torch.backends.mha.set_fastpath_enabled(False)  # the counter cannot look into it
    with FlopCounterMode(display=False) as counter:
        taken.append({})
        step()
    torch.backends.mha.set_fastpath_enabled(True)
    return {phase: float(np.median([each.get(phase, 0.0) for each in taken[1:-1]])) for phase in PHASES}, \
        counter.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--padded", action="store_true", help="pad all captions of a batch to the longest")
    padded, batch = parser.parse_args().padded, make_batch()
    print(f"{DEVICE}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}; percent of a step's time")
    print(f"{'model':12}{'precision':>10}" + "".join(f"{phase:>11}" for phase in PHASES)
          + f"{'seconds':>10}{'captions/s':>12}{'of limit':>10}")
    attention = sdpa_kernel(SDPBackend.MATH) if DEVICE == "cpu" else nullcontext()  # as train.py does
    with attention:
        for name in ("tgdt", "user", "tgdt-user"):
            for precision in ("float32", "bfloat16"):
                phases, operations = measure(name, precision, batch, padded)
                whole = sum(phases.values())
                limit = operations / rate(getattr(torch, precision))
                print(f"{name:12}{precision:>10}" + "".join(f"{100 * phases[phase] / whole:10.0f}%" for phase in PHASES)
                      + f"{whole:10.2f}{160 / whole:12.0f}{limit / whole:10.2f}", flush=True)


if __name__ == "__main__":
    main()
