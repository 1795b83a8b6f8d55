"""What several test files train on: a tiny BERT, a tiny SCAN folder, and the flags that name them."""
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizer

WORDS = "a red blue green small dog cat ball runs sits on under the grass snow near two men".split()


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    """A tiny BERT folder, as `--text-encoder FOLDER` takes it."""
    folder = tmp_path_factory.mktemp("bert")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    BertTokenizer(vocab={word: i for i, word in enumerate(vocabulary)}).save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                         intermediate_size=32, max_position_embeddings=32)).save_pretrained(folder)
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
    return ["--dataset", "flickr8k", "--data-root", str(root), "--text-encoder", str(bert), "--text-layers", "1",
            "--dim", "8", "--region-width", "8", "--feedforward", "16", "--batch-size", "4", "--epochs", "2",
            "--device", "cpu", "--out", str(tmp_path / "run")]
