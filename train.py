"""Training: one step, the loop.

Read beside both papers' experiments, the details of training; docs/symbols.md lists the papers' symbols.

    python train.py                                             the built-in scenes, TGDT, three minutes on two cores
    python train.py --dataset flickr30k                         Flickr30K; fetches what is missing
    python train.py --dataset folder --data-root DIR            your own pictures and captions
    python train.py --model user                                USER; --model tgdt-user is both papers in one model
    python train.py --dataset coco --data-root DIR --preset paper --device cuda
    torchrun --nproc-per-node 4 train.py FLAGS                  on four GPUs, see docs/gpus.md

--preset small (the default) fits a laptop, and --preset paper has the released sizes and rates. `--help` lists every
setting. A run leaves a folder with settings.json, checkpoint.pt (the last state), best.pt (the best by validation
rsum), history.jsonl (one line per epoch), metrics.json and pictures. Ctrl-C saves and stops, and --resume goes on from
there. On a CPU it then gives bit for bit what the uninterrupted run would have given.
"""
if __name__ == "__main__":  # --help, a mistake in a flag and Ctrl-C need not wait for the slow imports below
    from harness import start
    start.first_look("train")

import sys
from collections.abc import Callable, Mapping
from functools import partial
from operator import call

import torch
from torch import Tensor, nn

import losses
from tgdt import Encoded
from user import USER, MomentumContrast

# ------------------------------------------------------------------------------------------------------ one step


def by_length(encode_texts: Callable[[Mapping], Encoded], batch: Mapping[str, Tensor]) -> Encoded:
    """Encode the captions of a large batch in up to four groups, from short to long, and put them back in order.

    Otherwise all are padded to the longest, and half of the work on Flickr8K's captions would go into padding. A GPU
    takes them all at once, since groups would have it start four times as many operations. (Not measured on a GPU.)
    """
    lengths = batch["word_mask"].sum(1)
    order = lengths.argsort()
    groups = order.tensor_split(max(1, min(4, len(order) // 40)))  # 40 captions or more in each
    if len(groups) == 1 or order.is_cuda:
        return encode_texts(batch)
    widths = [int(lengths[rows[-1]]) for rows in groups]
    widths[-1] = batch["word_mask"].shape[1]  # so that the shares of several processes have the same width
    parts = [encode_texts({name: batch[name][rows, :width] for name in ("word_ids", "word_mask")})
             for rows, width in zip(groups, widths, strict=True)]
    back = order.argsort()
    fields = zip(*parts, strict=True)  # the globals of all groups, then their tokens, their masks, their plain tokens
    return Encoded(*(None if field[0] is None else pad_and_join(field)[back] for field in fields))


def pad_and_join(parts: tuple[Tensor, ...]) -> Tensor:
    """Parts [b, w, ...], each with its own b and w -> [sum of the b, greatest w, ...], padded with zeros.

    Globals, [b, D], all have the same w and get no padding. (`pad_sequence` pads too, but its backward pass copies the
    whole result once per row.)
    """
    width = max(part.shape[1] for part in parts)
    return torch.cat([torch.cat([part, part.new_zeros(len(part), width - part.shape[1], *part.shape[2:])], 1)
                      for part in parts])


def encode(model: nn.Module, batch: Mapping[str, Tensor], precision: str, share: Callable = call,
           coarse: bool = False) -> tuple[Encoded, Encoded]:
    """The I images and B captions of a batch. The network may run in mixed precision; what it gives is float32.

    share: `share(encoder, batch)` runs an encoder; `call` just calls it. With several GPUs each encodes a part, see
    harness/ranks.py. coarse: encode the coarse vectors only, which is all that the queues need.
    """
    branches = USER if coarse else type(model)  # USER's own methods leave out the fine level of a unified model
    encode_images = partial(branches.encode_images, model)
    encode_texts = partial(by_length, partial(branches.encode_texts, model))
    with torch.autocast(batch["regions"].device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        return share(encode_images, batch), share(encode_texts, batch)


def momentum_keys(momentum: MomentumContrast, batch: Mapping[str, Tensor], images: Encoded, texts: Encoded
                  ) -> losses.Keys:
    """The keys of a batch, and the queues before it (USER, momentum contrast).

    images, texts: the batch, encoded by the momentum copy. Afterwards the new keys enter the queues: each image once,
    each caption once.
    """
    row, image_index = batch["image_row"], batch["image_index"]                                      # [B], [B]
    image_queue, text_queue = momentum.image_queue, momentum.text_queue
    keys = losses.Keys(images.globals[row], texts.globals, image_queue.keys, text_queue.keys,
                       image_queue.positives(image_index), text_queue.positives(image_index))
    # The row of each image in the split, [I]. (Captions of one image all write the same number.)
    image_owner = image_index.new_zeros(len(images.globals)).index_put((row,), image_index)
    momentum.enqueue(images.globals, texts.globals, image_owner, image_index)  # `keys` still holds the old queues
    return keys


def forward(model: nn.Module, momentum: MomentumContrast | None, batch: Mapping[str, Tensor], settings, precision: str,
            share: Callable = call) -> tuple[Encoded, Encoded, losses.Keys | None, tuple | None]:
    """What a loss needs of a batch: images, texts, keys and teacher. The arguments are those of `batch_loss`.

    keys: of the queues, None without queues. teacher: images and texts by the momentum copy, None without --distill.
    """
    queue = settings.run.model != "tgdt" and settings.momentum.queue > 0
    distill = settings.infonce.distill > 0
    if momentum is not None:  # without queue and distill, it is there to be evaluated (--keep momentum)
        momentum.update(model)
    images, texts = encode(model, batch, precision, share)
    if not queue and not distill:
        return images, texts, None, None
    with torch.no_grad():
        by_copy = encode(momentum.encoder, batch, precision, share, coarse=not distill)  # a key is a coarse vector
    keys = momentum_keys(momentum, batch, *by_copy) if queue else None
    return images, texts, keys, by_copy if distill else None


def batch_loss(model: nn.Module, momentum: MomentumContrast | None, batch: Mapping[str, Tensor], settings,
               precision: str = "float32", negatives: str = "hardest", share: Callable = call) -> Tensor:
    """The loss of one batch: CMC (TGDT), UTO (USER), or UTO and InfoNCE (the unified model). A scalar.

    batch: from `data.Pairs`. settings: `harness.settings.Settings`. negatives: "hardest", or "mean" in CMC's first
    epochs. share: see `encode`. Also lets the momentum copy follow the model by one step.
    """
    images, texts, keys, teacher = forward(model, momentum, batch, settings, precision, share)
    row, infonce = batch["image_row"], vars(settings.infonce) | {"teacher": teacher}
    if settings.run.model == "tgdt":
        return losses.tgdt_loss(images, texts, row, negatives=negatives, **vars(settings.cmc), **infonce)
    if settings.run.model == "user":
        return losses.user_loss(images, texts, row, keys, **vars(settings.uto), **infonce)
    infonce["reduction"] = settings.cmc.reduction
    return losses.unified_loss(images, texts, row, keys, **vars(settings.uto), **infonce)


def make_optimizer(model: nn.Module, training) -> torch.optim.Optimizer:
    """AdamW. BERT is pre-trained, so it can take smaller steps than the rest: lr x text_lr.

    training: the group of settings of that name. With text_lr 0 BERT is frozen, but keeps its dropout. (AdamW without
    weight decay is Adam, which TGDT's authors used.) "peak" is a group's rate after the warm-up.
    """
    bert = list(model.bert.parameters())
    for weight in bert:
        weight.requires_grad_(training.text_lr > 0)
    in_bert = {id(weight) for weight in bert}
    others = [weight for weight in model.parameters() if id(weight) not in in_bert]
    groups = [{"params": others, "peak": training.lr},
              {"params": [weight for weight in bert if weight.requires_grad], "peak": training.lr * training.text_lr}]
    return torch.optim.AdamW(groups, lr=training.lr, weight_decay=training.weight_decay, fused=True)


def learning_rate(step: int, steps_per_epoch: int, training) -> float:
    """The learning rate at a step, as a share of its peak: a factor from 0 to 1.

    A linear warm-up, at most half of all steps, then as `training.schedule` says: "step" is x 0.1 after every
    `drop_every` epochs, "linear" falls to 0, "constant" stays.
    """
    total = steps_per_epoch * training.epochs
    warmup = min(training.warmup, total // 2)
    if step < warmup:
        return (step + 1) / warmup
    if training.schedule == "step":
        return 0.1 ** (step // steps_per_epoch // training.drop_every)
    if training.schedule == "constant":
        return 1.0
    return (total - step) / (total - warmup)


# ------------------------------------------------------------------------------------------------------ the loop


def train(run, loss_of=batch_loss) -> bool:
    """Train from where the run stands to its last epoch. Returns False if it was stopped before.

    run: `harness.training.Run`, which holds the model, its settings and where the run stands. It also looks after
    checkpoints, Ctrl-C and the progress bar. loss_of: the loss of a batch, for experiments with another one.
    """
    settings, model = run.settings, run.model
    optimizer = make_optimizer(model, settings.training)
    loss_of = run.shared(loss_of)  # several GPUs each encode a share of the batch
    run.restore(optimizer)  # with --resume, the state of the last checkpoint
    while run.epoch < settings.training.epochs:
        model.train()
        negatives = "mean" if run.epoch < settings.training.easy_epochs else "hardest"
        for batch in run.batches():
            factor = learning_rate(run.epoch * run.steps_per_epoch + run.step, run.steps_per_epoch, settings.training)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor

            loss = loss_of(model, run.momentum, batch, settings, run.precision, negatives)
            optimizer.zero_grad()
            loss.backward()
            run.sum_gradients()  # over the GPUs, if there are several
            nn.utils.clip_grad_norm_(model.parameters(), settings.training.max_norm)
            optimizer.step()

            run.step += 1
            if not run.after_step(loss, len(batch["image_row"])):
                return False
        run.finish_epoch()  # evaluate on val, keep the best
    return True


def main(argv: list[str] | None = None) -> int:
    from harness import flags  # here, because the code above does not use it

    given, options = flags.parse(argv)
    from harness import training  # after the flags, so that --help need not wait for it

    return training.main(train, given, options)


if __name__ == "__main__":
    sys.exit(main())
