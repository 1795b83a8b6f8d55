"""The training command: set a run up, hand it to the loop of `train.py`, report at the end."""
import json
import math
import shutil
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import matplotlib
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import BertTokenizer

import data
from harness import console, fetching, figures, folder, logs, models, pictures, ranks, report, torchrun
from harness import settings as settings_
from harness.settings import Settings
from sources.files import BadInput, check_folder, explained, locked, write_whole
from user import MomentumContrast

SAVE_EVERY = 600  # seconds between two checkpoints within an epoch
LOOK_EVERY = 10   # steps between two looks at the loss


@dataclass
class Run:
    """A run: what is trained and on what, where it stands, and all that surrounds the loop of `train.py`."""

    settings: Settings
    model: nn.Module
    momentum: MomentumContrast | None
    tokenizer: BertTokenizer
    splits: dict[str, data.Split]
    words: dict[str, list]     # of each split, the word pieces of its captions
    inputs: dict               # feature_dim, seen and bert, which build the model; train_data and val_data, digests
    out: Path
    device: torch.device
    precision: str
    workers: int | None = None  # that read batches; None: some for a GPU
    last: dict | None = None   # the checkpoint to go on from
    quiet: bool = False        # no progress bar, no line an epoch
    pieces: int = 1            # in which a batch is encoded, to save memory
    log: Callable[[dict], None] = lambda line: None  # see harness/logs.py
    epoch: int = 0
    step: int = 0              # within the epoch
    losses: list[float] = field(default_factory=list)  # seen in this epoch, per pair
    history: list[dict] = field(default_factory=list)

    def __post_init__(self):
        self.steps_per_epoch = len(self.plan(0))
        self.started = self.saved = time.perf_counter()
        self.interrupt, self.optimizer = console.Interrupt(), None
        self.bar = tqdm(total=self.settings.training.epochs * self.steps_per_epoch, unit="step", dynamic_ncols=True,
                        disable=self.quiet)

    def restore(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the optimizer in, and go back to where the last checkpoint was, if there is one."""
        self.optimizer = optimizer
        if self.last:
            try:
                for name, part in self.parts().items():
                    part.load_state_dict(self.last[name])
                for name in ("epoch", "step", "losses", "history"):
                    setattr(self, name, self.last[name])
                torch.set_rng_state(self.last["rng"])
                self.started -= self.history[-1]["seconds"] if self.history else 0
            except torch.OutOfMemoryError:
                raise
            except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
                raise BadInput(f"{self.out / 'checkpoint.pt'}: not a checkpoint of this model ({error})") from error
            if self.device.type == "cuda" and "cuda_rng" in self.last:
                torch.cuda.set_rng_state(self.last["cuda_rng"])
            if torchrun.number() == 0:
                self.write_history()  # a kill may have come between the checkpoint and this file
                settings_.write(self.out / "settings.json", self.settings)  # what --resume changed: all of it fits
            self.last = None  # it has the size of the model, the copy and the optimizer
        self.bar.update(self.epoch * self.steps_per_epoch + self.step)

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """What is left of the epoch, on the device. The batches depend on the seed and the epoch alone."""
        noise = data.CaptionNoise(self.tokenizer, chance) if (chance := self.settings.text.noise) else None
        pairs = data.Pairs(self.splits["train"], self.words["train"], noise, (self.settings.run.seed, self.epoch))
        few = min(4, torch.get_num_threads()) if self.device.type == "cuda" else 0  # a GPU should not wait for the disk
        workers = few if self.workers is None else self.workers
        # A generator of the loader's own leaves the global one alone, on which an exact resume rests.
        loader = DataLoader(pairs, sampler=self.plan(self.epoch)[self.step :], batch_size=None,
                            num_workers=workers, generator=torch.Generator(),
                            worker_init_fn=console.ignore_interrupts, collate_fn=console.as_arrays)
        for batch in loader:
            ranks.reseed(self.settings.run.seed, self.epoch * self.steps_per_epoch + self.step)
            yield {name: torch.from_numpy(value).to(self.device) for name, value in batch.items()}

    def plan(self, epoch: int) -> list[list[int]]:
        training = self.settings.training
        return data.epoch_batches(self.splits["train"].image_of, training.batch_size, training.captions_per_image,
                                  self.settings.run.seed, epoch)

    def shared(self, loss_of: Callable) -> Callable:
        """The loss of a batch that is encoded in shares, one a rank, and in pieces."""
        share = partial(ranks.encode, pieces=self.pieces)
        return partial(loss_of, share=share) if torchrun.count() * self.pieces > 1 else loss_of

    def sum_gradients(self) -> None:
        ranks.sum_gradients(self.model)

    def after_step(self, loss: Tensor, pairs: int) -> bool:
        """Watch the loss of a batch of `pairs`, save now and then. Returns False if the user asked to stop.

        The state is saved then. history.jsonl has the loss of one pair: TGDT's is a sum over the pairs.
        """
        if self.step % LOOK_EVERY == 0 or self.step == self.steps_per_epoch:
            self.losses.append(loss.item() / (pairs if self.settings.run.model == "tgdt" else 1))
            if not math.isfinite(self.losses[-1]):
                raise folder.diverged(self.out, f"the loss is {self.losses[-1]}", self.epoch, self.step)
            self.bar.set_postfix(refresh=False, epoch=self.epoch + 1, loss=f"{self.losses[-1]:.3f}")
        self.bar.update()  # after the loss: if nobody reads the output any more, this is the state that is saved
        stop = torchrun.any_of(self.interrupt.seen)
        if stop or time.perf_counter() - self.saved > SAVE_EVERY:
            self.save()
        return not stop

    def finish_epoch(self) -> None:
        """Evaluate on val; write a line of history, the curves, and the checkpoints. Only rank 0 does."""
        if torchrun.number() > 0:
            self.epoch, self.step, self.losses = self.epoch + 1, 0, []
            return
        folder.check_finite(self.model, self.out, self.epoch, self.step)
        val = self.evaluate(self.kept)  # before the epoch counts as done, since this may end with an error
        final = report.final(val)
        line = {"epoch": self.epoch + 1, "loss": sum(self.losses) / len(self.losses), "precision": self.precision,
                "lr": self.optimizer.param_groups[0]["lr"], "seconds": round(time.perf_counter() - self.started, 1),
                "val": {name: val[name] for name in ("global", "two_stage") if name in val}}
        if self.kept is not self.model:  # to see what the average over the steps is worth
            line["val_model_rsum"] = report.final(self.evaluate(self.model))["rsum"]
        if hasattr(self.kept, "image_pool"):
            line["pooling"] = report.pooling(self.kept, self.splits["val"], self.words["val"])
        if self.settings.run.model == "tgdt":
            line["negatives"] = "mean" if self.epoch < self.settings.training.easy_epochs else "hardest"
        self.history.append(line)
        self.epoch, self.step, self.losses = self.epoch + 1, 0, []
        best = final["rsum"] >= max(report.final(line["val"])["rsum"] for line in self.history)
        if best or not (self.out / "best.pt").exists():
            state = self.inputs | {"settings": asdict(self.settings), "epoch": self.epoch,
                                   "model": self.kept.state_dict()}
            write_whole(self.out / "best.pt", lambda file: torch.save(state, file))
        self.save()
        self.write_history()
        figures.curves(self.history, self.out / "curves.png")
        self.log(line)
        if not self.quiet:
            tqdm.write(f"epoch {self.epoch:3d}  loss {line['loss']:.3f}  val R@1 {final['i2t']['r1']:.1f} / "
                       f"{final['t2i']['r1']:.1f}  rsum {final['rsum']:.1f}{'  best' if best else ''}")

    def write_history(self) -> None:
        lines = "".join(json.dumps(line) + "\n" for line in self.history)
        write_whole(self.out / "history.jsonl", lambda file: file.write(lines.encode()))

    @property
    def kept(self) -> nn.Module:
        """What is evaluated, and kept as best.pt: the model, or its momentum copy."""
        return self.momentum.encoder if self.settings.momentum.keep == "momentum" else self.model

    def evaluate(self, model: nn.Module) -> dict:
        return report.measure(model, self.splits["val"], self.words["val"], self.settings, self.device, self.precision,
                              exhaustive=False)[0]

    def parts(self) -> dict:
        return {name: part for name in ("model", "momentum", "optimizer") if (part := getattr(self, name))}

    def save(self) -> None:
        """Write checkpoint.pt: all that an exact resume needs. Only rank 0 does. Raises BadInput if a weight is NaN."""
        if torchrun.number() > 0:
            return
        folder.check_finite(self.model, self.out, self.epoch, self.step)  # else the last checkpoint is better
        state = self.inputs | {"settings": asdict(self.settings), "rng": torch.get_rng_state()}
        state |= {name: getattr(self, name) for name in ("epoch", "step", "losses", "history")}
        state |= {name: part.state_dict() for name, part in self.parts().items()}
        if self.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state()
        write_whole(self.out / "checkpoint.pt", lambda file: torch.save(state, file))
        self.saved = time.perf_counter()


def set_up(settings: Settings, out: Path, device: str = "auto", resume: bool = False, workers: int | None = None,
           quiet: bool = False, pieces: int = 1) -> Run:
    """Load data, text encoder and features, and build the model. Rank 0 writes settings.json before the features.

    Raises BadInput if data, a text encoder, a CLIP, a checkpoint or a folder cannot be used.
    """
    if pieces > 1 and settings.run.model != "tgdt":
        raise BadInput(f"--pieces {pieces}: only for --model tgdt; the BatchNorm of --model {settings.run.model} takes "
                       "its statistics from the whole batch")
    where, precision = models.resolve(device, settings.run.precision)
    torch.manual_seed(settings.run.seed)
    last = folder.last_checkpoint(out, settings) if resume else None
    say = partial(print, file=sys.stderr) if not quiet else lambda text: None
    say(f"loading the data: {settings.run.dataset}")
    splits = data.load(settings.run.dataset, settings.run.data_root, regions=settings.pictures.regions,
                       split_seed=settings.pictures.split_seed)
    settings.pictures.regions = pictures.kind(settings, splits, where)
    if settings.pictures.regions == "files":
        say(f"regions come from files: {splits['train'].features.path}")
    say(f"loading the text encoder: {settings.text.text_encoder}")
    known = last and (out / "tokenizer").is_dir()  # then the text encoder's own files are not needed any more
    bert, tokenizer = folder.text_encoder(out / "checkpoint.pt", last) if known else models.text_encoder(settings)
    if torchrun.number() == 0 and not last:  # before the features, which take long, so that --resume works
        settings_.write(out / "settings.json", settings)
    words_of = partial(data.tokenize, tokenizer=tokenizer, longest=settings.text.longest)
    words = {name: words_of(split.captions) for name, split in splits.items()}  # a bad caption is found first
    seen = pictures.prepare(splits, settings, out, where, workers, last and last["seen"])
    inputs = {"feature_dim": splits["train"].features.dim, "seen": seen, "bert": bert.config.to_dict()}
    inputs |= {f"{name}_data": folder.fingerprint(splits[name]) for name in ("train", "val")}
    if last:
        folder.check_data(out, last, inputs)
    model = models.build(settings, bert, inputs["feature_dim"], (seen["clip"] or {}).get("dim", 0)).to(where)
    momentum, of = None, settings.momentum
    queue = of.queue if settings.run.model != "tgdt" else 0
    if queue or of.keep == "momentum":
        momentum = MomentumContrast(model, settings.architecture.dim, queue, of.momentum, warm=True).to(where)
    words |= {name: words_of(split.captions) for name, split in splits.items()
              if len(split.captions) < len(words[name])}  # pictures were left out, by --skip-bad
    if torchrun.number() == 0:
        models.warn(splits, words, tokenizer)
    if torchrun.number() == 0 and not known:
        with explained(out / "tokenizer", "a folder that can be written"):
            tokenizer.save_pretrained(out / "tokenizer")
    return Run(settings, model, momentum, tokenizer, splits, words, inputs, out, where, precision, workers, last, quiet,
               pieces)


def main(train: Callable[[Run], bool], given: dict, options: Namespace) -> int:
    """The command of `train.py`, whose loop is `train`. given, options: from `flags.parse`. Returns the exit code."""
    matplotlib.use("Agg")  # a run draws into files, also where there is no screen
    return console.run_command(lambda: command(train, given, options))


def command(train: Callable[[Run], bool], given: dict, options: Namespace) -> int:
    # With --resume, the run's own settings count. Until they are read, only its folder has to be known.
    settings = settings_.make({name: given[name] for name in (("dataset", "model") if options.resume else given)})
    out = options.out or Path("runs") / f"{settings.run.dataset}-{settings.run.model}"
    if options.resume:
        settings = folder.resumed_settings(out, given)
    if options.print_settings:
        print(json.dumps(asdict(settings), indent=2))
        return 0
    if options.fetch_only:
        fetching.find_data(settings, True, options.quiet)
        pictures.fetch_models(settings)
        print(f"{settings.run.dataset} is complete: all that had to be fetched is here")
        return 0
    with torchrun.started(options.device), locked(out) if torchrun.number() == 0 else nullcontext():
        first, quiet = torchrun.number() == 0, options.quiet or torchrun.number() > 0
        if first and not options.resume and (found := [name for name in folder.PARTS if (out / name).exists()]):
            raise BadInput(f"{out} already holds a run or an index ({found[0]}): take --resume, or another --out")
        try:
            with torchrun.first_alone():  # it fetches and computes; the others then find it done
                if settings.pictures.cache:
                    check_folder(Path(settings.pictures.cache))
                if not options.resume:
                    fetching.find_data(settings, False, quiet)
                log = logs.open_log(options.log if first else None, out, settings)
                run = set_up(settings, out, options.device, options.resume, options.workers, quiet, options.pieces)
                run.log = log
            ranks.join(run.model, run.momentum)
            finished = train_guarded(train, run)
        except (BadInput, OSError, MemoryError, RuntimeError) as error:
            if first and not options.resume and not folder.best_checkpoint(out).exists():  # nothing to go on from
                (out / "settings.json").unlink(missing_ok=True)
                shutil.rmtree(out / "tokenizer", ignore_errors=True)
                if type(error) is ConnectionError:  # of torchrun; its subclass BrokenPipeError is about our output
                    raise BadInput("another process has ended before there was a checkpoint: start again") from error
            raise
        if not finished:
            print(f"stopped at epoch {run.epoch + 1}, step {run.step}; go on with --resume --out {out}")
            return 130
        if first:
            report.report(folder.open_run(out), run.splits, run.words, out, run.device, run.precision)
    return 0


def train_guarded(train: Callable[[Run], bool], run: Run) -> bool:
    """Train; if nobody reads the output any more, save before the error goes on."""
    # On a CPU the fused attention has a slow backward pass; without it a step takes up to a fifth less.
    attention = sdpa_kernel(SDPBackend.MATH) if run.device.type == "cpu" else nullcontext()
    with run.interrupt, run.bar, attention:
        try:
            return train(run) and not run.interrupt.seen
        except OSError as error:
            if error.errno in console.CLOSED and not error.filename:
                run.save()
            raise
