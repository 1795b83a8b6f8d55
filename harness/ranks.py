"""Several processes train one model, one on each GPU. `torchrun` starts them, and calls each of them a rank.

Every rank holds the whole model and reads the whole batch. A step goes like this:

1. A rank encodes its share of the images and its share of the captions (`encode`).
2. The ranks exchange what they encoded (`gather`), and each computes the loss of the whole batch. Only a rank's own
   share has a graph behind it, so its backward pass yields the gradient by way of that share.
3. The sum of these gradients over the ranks is the gradient of the batch (`sum_gradients`). All take the same step.

So the losses and the queues see whole batches and know nothing of all this. A process that was not started by torchrun
is the only rank, and exchanges nothing.
"""
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.utils.checkpoint import checkpoint

from harness.torchrun import count, exchange, number
from sources.files import BadInput
from tgdt import Encoded


def encode(branch: Callable[[Mapping], Encoded], batch: Mapping[str, Tensor], pieces: int = 1) -> Encoded:
    """Encode a batch with `branch`, a model's encode_images or encode_texts. Each rank encodes its share.

    pieces: how many parts a share is encoded in, to save memory. What the network computes inside is then thrown
    away, and computed again in the backward pass, piece by piece, with the same dropout. The gradient stays exact if
    the rows of a batch do not see each other in the network. Raises BadInput if the batch has too few images.
    """
    parts = count() * pieces
    if parts == 1:
        return branch(batch)
    if len(batch["regions"]) < parts:
        raise BadInput(f"a batch of {len(batch['regions'])} images cannot be shared out to {count()} processes x "
                       f"{pieces} pieces; take fewer --pieces or processes, or, in a new run, a "
                       "larger --batch-size")
    cut = {name: rows.tensor_split(parts) for name, rows in batch.items()}
    encoded = []
    for part in range(number() * pieces, (number() + 1) * pieces):
        piece = {name: rows[part] for name, rows in cut.items()}
        encoded.append(branch(piece) if pieces == 1 else checkpoint(branch, piece, use_reentrant=False))
    return Encoded(*(None if part[0] is None else gather(torch.cat(part)) for part in zip(*encoded, strict=True)))


def gather(own: Tensor) -> Tensor:
    """The rows of all ranks in their order. Those of this rank, `own`, keep their graph; the others have none."""
    if count() == 1:
        return own
    rows = torch.zeros(count(), dtype=torch.long)
    rows[number()] = len(own)
    exchange(distributed.all_reduce, rows)
    padded = own.new_zeros(int(rows.max()), *own.shape[1:])  # all_gather wants the same shape from each rank
    padded[: len(own)] = own.detach()
    parts = [torch.empty_like(padded) for _ in rows]
    exchange(distributed.all_gather, parts, padded)
    parts = [part[:n] for part, n in zip(parts, rows.tolist(), strict=True)]
    parts[number()] = own
    return torch.cat(parts)


# ---------------------------------------------------------------------------------------------------- the model


def join(*networks: nn.Module | None) -> None:
    """Give all ranks the weights of rank 0, and let BatchNorm see the rows of all ranks. Call it before training."""
    if count() == 1:
        return
    for network in filter(None, networks):
        for value in network.state_dict().values():
            exchange(distributed.broadcast, value, src=0)
        for module in list(network.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.BatchNorm1d):
                    shared = BatchNorm(child.num_features).to(child.weight.device).train(child.training)
                    shared.load_state_dict(child.state_dict())
                    setattr(module, name, shared)


def sum_gradients(model: nn.Module) -> None:
    """After the backward pass: give each weight the sum of its gradients over the ranks."""
    if count() > 1:
        for weight in model.parameters():
            if weight.grad is not None:
                exchange(distributed.all_reduce, weight.grad)


def reseed(seed: int, step: int) -> None:
    """Draw this step's dropout from (seed, step, rank): no checkpoint has the random state of all ranks."""
    if count() > 1:
        torch.manual_seed(int(np.random.SeedSequence([seed, step, number()]).generate_state(1, np.uint64)[0]))


class Total(torch.autograd.Function):
    """The sum of a tensor over the ranks. Its gradient is a sum too, for each rank knows that of its own rows alone."""

    @staticmethod
    def forward(ctx: object, own: Tensor) -> Tensor:
        total = own.clone()
        exchange(distributed.all_reduce, total)
        return total

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return Total.forward(ctx, gradient)


class BatchNorm(nn.BatchNorm1d):
    """BatchNorm over the rows of all ranks. (PyTorch's SyncBatchNorm does the same on GPUs alone.)"""

    def forward(self, rows: Tensor) -> Tensor:
        """[n, C] or [n, C, L], of which n may differ between the ranks -> the same shape."""
        if not self.training:
            return super().forward(rows)
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32)).movedim(1, -1)            # [.., C]
        flat = wide.flatten(0, -2)
        n = Total.apply(flat.new_tensor(float(len(flat))))
        mean = Total.apply(flat.sum(0)) / n                                                      # [C]
        variance = Total.apply((flat - mean).square().sum(0)) / n                                # [C]
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * n / (n - 1), self.momentum)
        normal = (wide - mean) / (variance + self.eps).sqrt() * self.weight + self.bias
        return normal.movedim(-1, 1).to(rows.dtype)
