"""What history.jsonl says, sent to TensorBoard or Weights & Biases as well (--log), if that library is installed."""
from collections.abc import Callable, Iterator
from pathlib import Path

from harness import settings as settings_
from sources.files import BadInput


def open_log(kind: str | None, out: Path, settings: settings_.Settings) -> Callable[[dict], None]:
    """A function that takes a line of history. kind: "tensorboard", "wandb" or None.

    Raises BadInput if the library is not installed, or if it refuses.
    """
    try:
        if kind == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(out / "tensorboard")

            def log(line: dict) -> None:
                for name, value in numbers(line):
                    writer.add_scalar(name, value, line["epoch"])
                writer.flush()

            return log
        if kind == "wandb":
            import wandb

            try:
                run = wandb.init(dir=out, name=out.name, config=settings_.flat(settings))
            except Exception as error:  # of its own kinds, as without a login
                raise BadInput(f"--log wandb: {error}") from error
            return lambda line: run.log(dict(numbers(line)), step=line["epoch"])
    except ImportError as error:
        raise BadInput(f"--log {kind}: not installed; pip install {kind}") from error
    return lambda line: None


def numbers(line: dict, prefix: str = "") -> Iterator[tuple[str, float]]:
    """{"val": {"global": {"rsum": 3}}} -> ("val/global/rsum", 3), for all numbers in it."""
    for name, value in line.items():
        if isinstance(value, dict):
            yield from numbers(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            yield prefix + name, value
