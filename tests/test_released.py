"""The authors' checkpoints: their weights give their outputs, and no other file is taken for one."""
import argparse
import json
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_BERT
from transformers import BertConfig, BertTokenizer

import losses
import tgdt
import user
from harness import models, released
from sources.files import BadInput, read_weights

PARITY = Path(__file__).parent / "parity"


@torch.inference_mode()
def both(model: torch.nn.Module, batch: dict) -> tuple[tgdt.Encoded, tgdt.Encoded]:
    return model.encode_images(batch), model.encode_texts(batch)


def test_released_weights_of_tgdt_give_the_released_outputs():
    model = released.load_tgdt(PARITY / "tgdt_released_tiny.pth.tar", BertConfig(**TINY_BERT))
    assert not model.training
    with np.load(PARITY / "tgdt_released_tiny.npz", allow_pickle=False) as arrays:
        given = {name: torch.from_numpy(arrays[name]) for name in arrays}
    batch = {
        "regions": given["regions"], "boxes": given["boxes"],
        "region_mask": torch.ones(given["regions"].shape[:2], dtype=torch.bool),
        "word_ids": given["word_ids"], "word_mask": torch.ones_like(given["word_ids"], dtype=torch.bool),
    }
    images, texts = both(model, batch)
    # The released text tokens still hold [SEP]'s, the last of ten; ours do not.
    for ours, theirs in ((images.globals, given["image_global"]), (texts.globals, given["text_global"]),
                         (images.tokens, given["image_tokens"]), (texts.tokens, given["text_tokens"][:, :9])):
        assert torch.allclose(ours, theirs, atol=1e-5)
    # The released similarity cuts off the last word piece together with [SEP].
    cut = texts.mask.clone()
    cut[:, -1] = False
    local = losses.local_similarity(images.tokens, images.mask, texts.tokens, cut)
    assert torch.allclose(10 * local, given["local_similarity_x10"], atol=1e-5, rtol=1e-5)


def test_what_is_not_a_checkpoint_of_tgdt_is_refused_by_name(tmp_path):
    nonsense = tmp_path / "weights.pth.tar"
    nonsense.write_bytes(b"not weights")
    with pytest.raises(ValueError, match="weights.pth.tar"):
        released.load_tgdt(nonsense)
    other = tmp_path / "other.pth.tar"
    torch.save({"model": {}}, other)
    with pytest.raises(ValueError, match="other.pth.tar"):
        released.load_tgdt(other)
    whole = read_weights(PARITY / "tgdt_released_tiny.pth.tar", "a checkpoint", allowed=(argparse.Namespace,))
    for group, name, value in (("model", "embed-size", 7), ("model", "dropout", 3.0),
                               ("text-model", "extraction-hidden-layer", -1)):
        config = {**whole["config"], group: {**whole["config"][group], name: value}}
        torch.save({**whole, "config": config}, other)
        with pytest.raises(BadInput, match="other.pth.tar: expected a released TGDT checkpoint"):
            released.load_tgdt(other, BertConfig(**TINY_BERT))
    with pytest.raises(ValueError, match=r"\[30522, 768\]"):  # the tiny BERT is not bert-base
        released.load_tgdt(PARITY / "tgdt_released_tiny.pth.tar")


def test_the_lines_that_evaluate_released_weights(tmp_path, monkeypatch, capsys):
    """Those of docs/differences.md, on six images, with the tiny BERT in the place of bert-base-uncased."""
    with np.load(PARITY / "tgdt_released_tiny.npz", allow_pickle=False) as arrays:
        regions, boxes = arrays["regions"], arrays["boxes"]
    sentences = [{"raw": f"word{row} word{row + 1} word9"} for row in range(30)]
    images = [{"filename": f"{row}.jpg", "split": "test", "sentences": sentences[5 * row : 5 * row + 5]}
              for row in range(6)]
    for name in ("annotations", "features_36/bu_att", "features_36/bu_box"):
        (tmp_path / "DIR" / name).mkdir(parents=True)
    (tmp_path / "DIR/annotations/dataset_flickr30k.json").write_text(json.dumps({"images": images}))
    for row in range(6):
        np.savez(tmp_path / f"DIR/features_36/bu_att/{row}.npz", feat=regions[row])
        np.save(tmp_path / f"DIR/features_36/bu_box/{row}.npy", 100 * boxes[row])
    shutil.copy(PARITY / "tgdt_released_tiny.pth.tar", tmp_path / "model_best_rsum.pth.tar")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{row}" for row in range(95))]
    tokenizer = BertTokenizer(vocab={word: row for row, word in enumerate(vocabulary)})
    monkeypatch.setattr(models, "read_tokenizer", lambda name: tokenizer)
    monkeypatch.setattr(released, "load_tgdt", partial(released.load_tgdt, text_config=BertConfig(**TINY_BERT)))
    monkeypatch.chdir(tmp_path)
    page = (PARITY.parent.parent / "docs" / "differences.md").read_text()
    lines, = re.findall("```python\n(.*?)```", page, re.DOTALL)
    exec(compile(lines, "docs/differences.md", "exec"), {})
    result = eval(capsys.readouterr().out)
    assert set(result) == {"global", "two_stage", "seconds"} and 0 < result["two_stage"]["rsum"] <= 600


# --------------------------------------------------------------------------------------------- released weights


@pytest.fixture(scope="module")
def released_user() -> user.USER:
    return released.load_user(PARITY / "user_released_tiny.pth", BertConfig(**TINY_BERT))


@pytest.fixture(scope="module")
def given() -> dict[str, torch.Tensor]:
    with np.load(PARITY / "user_released_tiny.npz", allow_pickle=False) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays}


def test_released_weights_of_user_give_the_released_outputs(released_user, given):
    assert not released_user.training
    everywhere = torch.ones(given["regions"].shape[:2], dtype=torch.bool)
    batch = {
        "regions": given["regions"], "region_mask": everywhere, "word_ids": given["word_ids"],
        "word_mask": torch.arange(given["word_ids"].shape[1]) < given["word_lengths"][:, None],
    }
    images, texts = (encoded.globals for encoded in both(released_user, batch))
    assert torch.allclose(images, given["image_global"], atol=1e-5)
    assert torch.allclose(texts, given["text_global"], atol=1e-5)
    with torch.inference_mode():
        assert torch.allclose(released_user.guide(given["regions"], everywhere), given["sge"], atol=1e-5)
        cge = user.CLIPGuidedEnhancement(24, 24, sharpness=1.0)
        cge.project.weight.copy_(torch.eye(24))
        cge.project.bias.zero_()
        assert torch.allclose(cge(given["regions"], everywhere, given["clip"]), given["cge_lambda_1"], atol=1e-5)


def test_the_released_statistics_are_slot_by_slot(released_user, given):
    with pytest.raises(ValueError, match="36 regions.*found 35"):
        released_user.guide(given["regions"][:, 1:], torch.ones(6, 35, dtype=torch.bool))
    ragged = torch.ones(6, 36, dtype=torch.bool)
    ragged[2, 30:] = False
    with pytest.raises(ValueError, match="36 regions.*found 30 to 36"):
        released_user.guide(given["regions"], ragged)


def test_what_is_not_a_checkpoint_of_user_is_refused_by_name(tmp_path):
    nonsense = tmp_path / "weights.pth"
    nonsense.write_bytes(b"not weights")
    with pytest.raises(ValueError, match="weights.pth"):
        released.load_user(nonsense)
    with pytest.raises(ValueError, match="other.pth"):
        torch.save({"model": [{}, {}]}, tmp_path / "other.pth")
        released.load_user(tmp_path / "other.pth")
    with pytest.raises(ValueError, match="user_released_tiny.pth: Missing.*bert.encoder.layer.2"):  # not bert-base
        released.load_user(PARITY / "user_released_tiny.pth")
    with pytest.raises(ValueError, match="none.pth: no such file"):
        released.load_user(tmp_path / "none.pth")
