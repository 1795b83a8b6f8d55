"""What several test files train on: a tiny BERT, a tiny SCAN folder, and the flags that name them."""
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import BertConfig, BertModel, BertTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel

import train
from sources.files import BadInput

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts the tests in the background, or nohup,
signal.signal(signal.SIGHUP, signal.SIG_DFL)               # has them ignore these signals, which some tests send
torch.set_num_threads(1)  # the tests make small products, for which a second thread costs more than it gives
os.environ["OMP_NUM_THREADS"] = "1"  # likewise in the processes that they start

# The BERT of tests/parity.
TINY_BERT = dict(vocab_size=100, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32,
                 max_position_embeddings=64)
WORDS = "a red blue green small dog cat ball runs sits on under the grass snow near two men".split()


def refused(call: Callable, *said: str) -> None:
    """The call raises BadInput in one line that says all of this."""
    with pytest.raises(BadInput) as error:
        call()
    message = str(error.value)
    assert "\n" not in message and all(words in message for words in said), message


def unit(*shape: int, seed: int) -> torch.Tensor:
    """Random vectors of unit length."""
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def make_batch(regions: int = 5, words: int = 9) -> dict[str, torch.Tensor]:
    """Three pairs with ragged regions and captions, padded to the widths given with what must not count."""
    g = torch.Generator().manual_seed(0)
    batch = {
        "regions": torch.randn(3, 5, 12, generator=g), "clip": torch.randn(3, 7, generator=g),
        "region_mask": torch.arange(5) < torch.tensor([[5], [2], [3]]),
        "word_ids": torch.randint(1, 100, (3, 9), generator=g),
        "word_mask": torch.arange(9) < torch.tensor([[9], [4], [6]]),
        "boxes": torch.rand(3, 5, 4, generator=g), "image_index": torch.tensor([4, 9, 2]),
    }
    for name, filler, width in (("regions", 7.0, regions), ("boxes", 0.5, regions), ("region_mask", False, regions),
                                ("word_ids", 3, words), ("word_mask", False, words)):
        extra = torch.full((3, width - batch[name].shape[1], *batch[name].shape[2:]), filler, dtype=batch[name].dtype)
        batch[name] = torch.cat([batch[name], extra], 1)
    return batch


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    """A tiny BERT folder, as `--text-encoder FOLDER` takes it."""
    folder = tmp_path_factory.mktemp("bert")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    BertTokenizer(vocab={word: i for i, word in enumerate(vocabulary)}).save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                         intermediate_size=32, max_position_embeddings=64)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Eight training and four validation images of 3 regions x 6 numbers, two captions each; no test split."""
    folder = tmp_path_factory.mktemp("scan")
    rng = np.random.default_rng(0)
    for name, images in (("train", 8), ("dev", 4)):
        np.save(folder / f"{name}_ims.npy", rng.normal(size=(images, 3, 6)).astype(np.float32))
        captions = [" ".join(rng.choice(WORDS, 6)) for _ in range(2 * images)]
        (folder / f"{name}_caps.txt").write_text("\n".join(captions))
    return folder


@pytest.fixture
def flags(root, bert, tmp_path) -> list[str]:
    return flags_for(root, bert, tmp_path / "run")


def flags_for(root: Path, bert: Path, out: Path) -> list[str]:
    return ["--dataset", "flickr8k", "--data-root", str(root), "--text-encoder", str(bert), "--text-layers", "1",
            "--dim", "8", "--region-width", "8", "--feedforward", "16", "--batch-size", "4", "--epochs", "2",
            "--captions-per-image", "1", "--device", "cpu", "--out", str(out)]


def draw_nothing(patch: pytest.MonkeyPatch) -> None:
    """Let a run draw nothing. Drawing takes most of the time of a tiny run."""
    for name in ("harness.report.draw", "harness.figures.curves"):
        patch.setattr(name, lambda *given: None)


@pytest.fixture
def undrawn(monkeypatch) -> None:
    """For tests that are not about the pictures of a run."""
    draw_nothing(monkeypatch)


@pytest.fixture(scope="module")
def trained(root, bert, tmp_path_factory) -> Path:
    """A run after one epoch, not to be changed."""
    out = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch)
        assert train.main([*flags_for(root, bert, out), "--epochs", "1"]) == 0
    return out


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A run after one epoch, to be damaged."""
    return shutil.copytree(trained, tmp_path / "run")


def save_clip(folder: Path, seed: int = 0) -> Path:
    """A whole CLIP of random weights, as huggingface.co has them. `networks.Clip` must not need its text half."""
    torch.manual_seed(seed)
    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = CLIPConfig(text_config=small | {"vocab_size": 9, "max_position_embeddings": 8},
                        vision_config=small | {"image_size": 16, "patch_size": 8}, projection_dim=6)
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def save_pictures(folder: Path, names: list[str], seed: int = 0) -> None:
    """Noise of many sizes under these names."""
    rng = np.random.default_rng(seed)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (*rng.integers(20, 40, 2), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)


@pytest.fixture
def no_proxy(monkeypatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
