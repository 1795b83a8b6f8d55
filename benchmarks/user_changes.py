"""Train USER with one of this project's changes to the released code undone, to see what each is worth.

    python benchmarks/user_changes.py CHANGE [flags of train.py]      # CHANGE: a name below, none, or all

Everything else stays as it is. Other changes are settings and need nothing of this: --slots 36, --reward-floor,
--weights model, and --batch-size 128 --captions-per-image 1 --lr 5e-4 --momentum 0.999 --schedule step --drop-every 6;
"all" with these is the released training but for its exponential, which overflows in half precision. `claims.py` makes
the same changes one at a time, in a smaller budget.
"""
from __future__ import annotations

import functools
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import batching
import losses
import train
import user


def unmask_batch() -> None:
    """Other captions of an image count as negatives in the batch."""
    uto_batch = losses.uto_batch
    losses.uto_batch = lambda similarity, mu, gamma, positives, floor: uto_batch(similarity, mu, gamma, floor=floor)


def unmask_queue() -> None:
    """Other captions of a query's image count as negatives in the queue."""
    user.Queue.no_negatives = lambda self, image_index: (self.owner < 0).expand(len(image_index), -1)


def shuffle_captions() -> None:
    """An epoch is one shuffle of all captions, so that those of an image may stand close together."""

    def shuffled(image_of: np.ndarray, batch_size: int, captions_per_image: int, seed: int, epoch: int) -> list:
        order = np.random.default_rng([seed, epoch]).permutation(len(image_of)).tolist()
        return [order[at : at + batch_size] for at in range(0, len(order) - batch_size + 1, batch_size)]

    batching.epoch_batches = shuffled


class InTraining(user.MomentumContrast):
    """Keys as while training: with dropout, by the batch's own statistics; only parameters follow the model."""

    def train(self, mode: bool = True) -> InTraining:
        return torch.nn.Module.train(self, True)

    @torch.no_grad()
    def update(self, model: torch.nn.Module) -> None:
        keep = min(self.momentum, 1 - 1 / (int(self.steps) + 1)) if self.warm else self.momentum
        torch._foreach_lerp_(list(self.encoder.parameters()), list(model.parameters()), 1 - keep)
        self.steps += 1


def fill(momentum: user.MomentumContrast) -> user.MomentumContrast:
    """The queues are full of random positive vectors at the start."""
    for queue in (momentum.image_queue, momentum.text_queue):
        queue.keys.copy_(F.normalize(torch.rand_like(queue.keys), dim=1))
        queue.owner.fill_(2**40)
    return momentum


Original = user.MomentumContrast


def replace_momentum(by: object) -> None:
    user.MomentumContrast = by


CHANGES = {
    "none": lambda: None,
    "batch-unmasked": unmask_batch,
    "queue-unmasked": unmask_queue,
    "shuffle": shuffle_captions,
    "keys-in-training": lambda: replace_momentum(InTraining),
    "cold-momentum": lambda: replace_momentum(functools.partial(Original, warm=False)),
    "full-queue": lambda: replace_momentum(lambda *given: fill(Original(*given))),
    "all": lambda: (shuffle_captions(), unmask_batch(), unmask_queue(),
                    replace_momentum(lambda *given: fill(InTraining(*given, warm=False)))),
}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in CHANGES:
        sys.exit(f"{__doc__}\nCHANGE: {', '.join(CHANGES)}")
    CHANGES[sys.argv[1]]()
    sys.exit(train.main(sys.argv[2:]))
