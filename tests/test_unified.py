"""unified.py: what the fine level may change, and what not."""
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_BERT, make_batch
from transformers import BertConfig, BertModel

import losses
import tgdt
import train
import unified
import user
from harness import settings


def make_model(trained: bool = True, fine_gradient: float = 0.0) -> unified.Unified:
    torch.manual_seed(0)
    bert = BertModel(BertConfig(**TINY_BERT), add_pooling_layer=False)
    model = unified.Unified(bert, 12, 8, layers=2, heads=2, feedforward=16, fine_gradient=fine_gradient)
    if trained:  # nothing is zero any more
        for weight in [*model.geometry.parameters(), *model.fine_regions.parameters(), *model.fine_words.parameters()]:
            torch.nn.init.normal_(weight, std=0.5)
    return model.eval()


def encoded(model: unified.Unified, batch: dict) -> tuple:
    return model.encode_images(batch), model.encode_texts(batch)


@torch.inference_mode()
def test_the_coarse_vectors_are_those_of_user_with_the_same_weights():
    model = make_model()
    twin = user.USER(BertModel(BertConfig(**TINY_BERT), add_pooling_layer=False), 12, 8).eval()
    twin.load_state_dict({name: value for name, value in model.state_dict().items() if name in twin.state_dict()})
    for ours, users in zip(encoded(model, make_batch()), encoded(twin, make_batch()), strict=True):
        assert torch.equal(ours.globals, users.globals)


@torch.inference_mode()
def test_all_is_of_unit_length_and_float32_also_in_mixed_precision():
    bert = BertModel(BertConfig(**TINY_BERT), add_pooling_layer=False)
    small = dict(region_width=8, region_layers=1, local_layers=1, global_layers=1, heads=2, feedforward=16)
    for model in (make_model(), user.USER(bert, 12, 8).eval(), tgdt.TGDT(bert, 12, 8, **small).eval()):
        with torch.autocast("cpu", torch.bfloat16):
            sides = encoded(model, make_batch())
        for side in sides:
            for vectors in (side.globals, *(part[side.mask] for part in (side.tokens, side.plain) if part is not None)):
                assert vectors.dtype == torch.float32  # in which the losses are computed
                assert torch.allclose(vectors.norm(dim=-1), torch.ones(()), atol=1e-5)


@torch.inference_mode()
def test_untrained_the_fine_level_changes_nothing():
    for side in encoded(make_model(trained=False), make_batch()):
        assert torch.allclose(side.tokens[side.mask], side.plain[side.mask], atol=1e-6)
    for side in encoded(make_model(), make_batch()):
        assert not torch.allclose(side.tokens[side.mask], side.plain[side.mask], atol=1e-2)


@torch.inference_mode()
def test_the_fine_level_equals_its_definition_layer_by_layer():
    """Regions with their boxes, and captions with [CLS] and [SEP]. Pre-norm, with ReLU; read row by row."""
    def by_hand(layers: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        for layer in layers.layers:
            normed = layer.norm1(tokens)
            tokens = tokens + layer.self_attn(normed, normed, normed)[0]
            tokens = tokens + layer.linear2(layer.linear1(layer.norm2(tokens)).relu())
        return F.normalize(tokens, dim=-1)

    model, batch = make_model(), make_batch()
    (regions, region_mask), (words, word_mask) = model.region_tokens(batch), model.word_tokens(batch)
    images, texts = encoded(model, batch)
    for row in range(3):
        real, x1, y1, x2, y2 = region_mask[row], *batch["boxes"][row].T
        geometry = torch.stack([x1, y1, x2, y2, (x2 - x1) * (y2 - y1)], 1)
        placed = (regions[row] + model.geometry(geometry))[real][None]
        assert torch.allclose(images.tokens[row][real], by_hand(model.fine_regions, placed)[0], atol=1e-5)
        fine = by_hand(model.fine_words, words[row][word_mask[row]][None])[0, 1:-1]
        assert torch.allclose(texts.tokens[row][texts.mask[row]], fine, atol=1e-5)


@torch.inference_mode()
def test_padding_and_the_other_rows_change_nothing():
    model, batch = make_model(), make_batch()
    wider = make_batch(regions=7, words=12)
    alone = {name: value[1:2] for name, value in batch.items()}
    for side, in_wider, by_itself in zip(encoded(model, batch), encoded(model, wider), encoded(model, alone),
                                         strict=True):
        for name in ("globals", "tokens", "plain"):
            whole, padded, single = (getattr(part, name) for part in (side, in_wider, by_itself))
            if name != "globals":
                whole, padded, single = whole[side.mask], padded[in_wider.mask], single[by_itself.mask]
                assert torch.allclose(single, whole[int(side.mask[0].sum()):][:len(single)], atol=1e-5)
            else:
                assert torch.allclose(single, whole[1:2], atol=1e-5)
            assert torch.allclose(whole, padded, atol=1e-5), name


def test_words_are_counted_without_the_special_pieces():
    texts = make_model().encode_texts(make_batch())
    assert texts.tokens.shape == texts.plain.shape == (3, 7, 8) and texts.mask.sum(1).tolist() == [7, 2, 4]


def test_boxes_are_seen_by_the_fine_tokens_alone():
    model, batch = make_model(), make_batch()
    moved = batch | {"boxes": batch["boxes"].flip(2)}
    here, there = model.encode_images(batch), model.encode_images(moved)
    assert torch.equal(here.globals, there.globals) and torch.equal(here.plain, there.plain)
    assert not torch.allclose(here.tokens[here.mask], there.tokens[there.mask], atol=1e-3)


@pytest.mark.parametrize("level", ["tokens", "plain", "globals"])
def test_a_level_trains_what_is_below_it_and_nothing_above(level):
    model = make_model(fine_gradient=1).train()
    for side in encoded(model, make_batch()):
        getattr(side, level).sum().backward()
    moved = {name.split(".")[0] for name, weight in model.named_parameters() if weight.grad is not None}
    assert {"project", "mlp_out", "bert", "project_words"} <= moved
    assert ({"fine_regions", "fine_words", "geometry"} <= moved) == (level == "tokens")
    assert ({"image_pool", "text_pool"} <= moved) == (level == "globals")


def test_the_share_of_the_fine_gradient_that_goes_below():
    """It changes no value, and scales the gradient of what is below the fine level, but not that of the fine level."""
    below, within, tokens = [], [], []
    for share in (1.0, 0.25, 0.0):
        model = make_model(fine_gradient=share)
        for side in encoded(model, make_batch()):
            (side.tokens[..., 0] * side.mask).sum().backward()
            tokens.append(side.tokens)
        below.append(torch.cat([model.project.weight.grad, model.project_words.weight.grad], 1))
        within.append(model.fine_words.layers[0].linear1.weight.grad)
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(tokens, tokens[2:], strict=False))
    assert below[0].abs().max() > 1e-3 and torch.allclose(0.25 * below[0], below[1], atol=1e-6)
    assert below[2].abs().max() == 0
    assert torch.allclose(within[0], within[1], atol=1e-6) and torch.allclose(within[0], within[2], atol=1e-6)


def test_the_loss_reaches_every_weight():
    model = make_model().train()
    images, texts = encoded(model, make_batch())
    losses.unified_loss(images, texts, torch.arange(3), None).backward()
    unused = [name for name, weight in model.named_parameters() if weight.grad is None]
    assert unused == []


def test_captions_in_groups_of_like_length_are_encoded_as_all_at_once():
    """So are the gradients and the order. Fine and plain tokens of all groups are padded to one width."""
    model, rng = make_model(), torch.Generator().manual_seed(2)
    lengths = torch.randint(3, 12, (170,), generator=rng)
    lengths[5] = 12
    mask = torch.arange(12) < lengths[:, None]
    batch = {"word_ids": torch.randint(5, 90, mask.shape, generator=rng) * mask, "word_mask": mask}
    sizes, gradients = [], []

    def watched(part: dict) -> tgdt.Encoded:
        sizes.append(part["word_ids"].shape)
        return model.encode_texts(part)

    whole, grouped = model.encode_texts(batch), train.by_length(watched, batch)
    assert len(sizes) == 4 and sum(rows for rows, _ in sizes) == 170 and sizes[0][1] < sizes[-1][1] == 12
    assert torch.equal(whole.mask, grouped.mask) and torch.allclose(whole.globals, grouped.globals, atol=1e-5)
    for name in ("tokens", "plain"):
        ours, want = getattr(grouped, name), getattr(whole, name)
        assert ours.shape == want.shape and torch.allclose(ours[whole.mask], want[whole.mask], atol=1e-5)
    for side in (whole, grouped):
        model.zero_grad()
        (side.globals.sum() + (side.tokens * side.plain)[side.mask].sum()).backward()
        gradients.append(model.project_words.weight.grad.clone())
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_the_keys_of_the_unified_model_are_its_coarse_vectors():
    model, batch = make_model(), make_batch() | {"image_row": torch.tensor([0, 1, 2])}
    momentum = user.MomentumContrast(model, 8, 20)
    coarse = train.encode(momentum.encoder, batch, "float32", coarse=True)
    assert [side.tokens for side in coarse] == [None, None]  # so the fine level is not run
    keys, (images, texts) = train.momentum_keys(momentum, batch, *coarse), encoded(model, batch)
    assert torch.allclose(keys.text, texts.globals) and torch.allclose(keys.image, images.globals[batch["image_row"]])


def test_the_momentum_copy_is_the_teacher():
    """`batch_loss` with --distill is the model's loss with what the copy encodes as the teacher."""
    chosen = settings.make({"model": "tgdt-user", "distill": 0.5, "queue": 0, "keep": "momentum"})
    model, batch = make_model(), make_batch() | {"image_row": torch.tensor([0, 1, 2])}
    momentum = user.MomentumContrast(model, 8, 1, momentum=1.0)  # keeps what it is
    for weight in momentum.encoder.parameters():
        weight.data += 0.1
    sides, row = encoded(model, batch), batch["image_row"]
    given = {"keys": None, **vars(chosen.uto), **vars(chosen.infonce)}
    want = losses.unified_loss(*sides, row, **given, teacher=encoded(momentum.encoder, batch))
    found = train.batch_loss(model, momentum, batch, chosen)
    assert torch.isclose(found, want, rtol=1e-5)
    assert not torch.isclose(found, losses.unified_loss(*sides, row, **given, teacher=sides), rtol=1e-3)


@pytest.mark.parametrize("level", ["plain", "globals"])
def test_where_the_fine_gradient_is_cut_off_the_other_levels_still_train_the_tokens(level):
    model = make_model(fine_gradient=0).train()
    for side in encoded(model, make_batch()):
        getattr(side, level).sum().backward()
    for part in (model.project, model.project_words):
        assert part.weight.grad is not None and part.weight.grad.abs().max() > 0


def test_groups_of_captions_are_as_wide_as_the_batch_even_where_all_is_padding():
    """Several processes join their shares, so these need one width."""
    mask = torch.arange(15) < torch.arange(3, 12).repeat(10)[:, None]
    batch = {"word_ids": 5 * mask, "word_mask": mask}
    assert train.by_length(make_model().encode_texts, batch).tokens.shape == (90, 13, 8)
