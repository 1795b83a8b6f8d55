"""tgdt.py: shapes, masks, and embeddings that depend on nothing but their own input."""
import pytest
import torch
from conftest import TINY_BERT, make_batch
from transformers import BertConfig, BertModel

import losses
import tgdt


@pytest.fixture(scope="module")
def model() -> tgdt.TGDT:
    torch.manual_seed(0)
    bert = BertModel(BertConfig(**TINY_BERT), add_pooling_layer=False)
    return tgdt.TGDT(bert, feature_dim=12, dim=8, region_width=16, region_layers=1, feedforward=32).eval()


@torch.inference_mode()
def both(model: tgdt.TGDT, batch: dict) -> tuple[tgdt.Encoded, tgdt.Encoded]:
    return model.encode_images(batch), model.encode_texts(batch)


def test_shapes_lengths_and_what_counts_as_a_word(model):
    images, texts = both(model, make_batch())
    assert images.globals.shape == texts.globals.shape == (3, 8)
    assert images.tokens.shape == (3, 5, 8) and texts.tokens.shape == (3, 7, 8)
    for encoded in (images.globals, images.tokens, texts.globals, texts.tokens):
        assert torch.allclose(encoded.norm(dim=-1), torch.ones(encoded.shape[:-1]), atol=1e-5)
    assert images.mask.sum(1).tolist() == [5, 2, 3]
    assert texts.mask.sum(1).tolist() == [7, 2, 4]  # 9, 4 and 6 pieces without [CLS] and [SEP]; the last word stays


def test_an_embedding_does_not_change_with_the_padding_of_its_batch(model):
    """The released global encoder has no padding mask and fails this."""
    for ours, padded in zip(both(model, make_batch()), both(model, make_batch(regions=8, words=15)), strict=True):
        assert torch.allclose(ours.globals, padded.globals, atol=1e-6)
        assert torch.allclose(ours.tokens[ours.mask], padded.tokens[padded.mask], atol=1e-6)


def test_an_embedding_does_not_change_with_the_order_and_size_of_its_batch(model):
    batch = make_batch()
    whole = both(model, batch)
    order = torch.tensor([2, 0, 1])
    turned = both(model, {name: value[order] for name, value in batch.items()})
    for a, b in zip(whole, turned, strict=True):
        assert torch.allclose(a.globals[order], b.globals, atol=1e-6)
    for row in range(3):
        alone = both(model, {name: value[row : row + 1] for name, value in batch.items()})
        for a, b in zip(whole, alone, strict=True):
            assert torch.allclose(a.globals[row], b.globals[0], atol=1e-6)
            assert torch.allclose(a.tokens[row][a.mask[row]], b.tokens[0][b.mask[0]], atol=1e-6)


def test_the_order_of_regions_does_not_matter_but_the_boxes_do(model):
    batch = make_batch()
    batch["region_mask"][:] = True
    order = torch.tensor([3, 1, 4, 0, 2])
    turned = {**batch, "regions": batch["regions"][:, order], "boxes": batch["boxes"][:, order]}
    moved = {**batch, "boxes": batch["boxes"].flip(1)}
    with torch.inference_mode():
        first, second, third = (model.encode_images(b) for b in (batch, turned, moved))
    assert torch.allclose(first.globals, second.globals, atol=1e-6)
    assert torch.allclose(first.tokens[:, order], second.tokens, atol=1e-6)
    assert not torch.allclose(first.globals, third.globals, atol=1e-3)


def test_the_image_token_is_the_mean_real_region_in_a_box_around_the_whole_image(model):
    batch, seen = make_batch(), []
    watch = model.region_encoder.geometry.register_forward_pre_hook(lambda layer, given: seen.extend(given))
    model.encode_images(batch)
    watch.remove()
    for row, mask in enumerate(batch["region_mask"]):
        mean, box = batch["regions"][row][mask].mean(0), torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0])
        assert torch.allclose(seen[0][row, 0], torch.cat([mean, box]), atol=1e-6)


def test_the_global_loss_trains_every_part_below_it(model):
    """The released training path detaches the tokens; here the global loss reaches BERT and the region encoder."""
    images, texts = model.encode_images(make_batch()), model.encode_texts(make_batch())
    model.zero_grad()
    losses.hinge(images.globals @ texts.globals.T, margin=2.0).backward()
    for part in (model.bert.encoder, model.text_branch.local_encoder,
                 model.region_encoder, model.image_branch.local_encoder):
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters() if p.ndim > 1)


def test_the_first_layers_of_bert_give_its_hidden_state():
    torch.manual_seed(1)
    bert = BertModel(BertConfig(**{**TINY_BERT, "num_hidden_layers": 4}), add_pooling_layer=False).eval()
    ids = torch.randint(1, 100, (2, 7))
    with torch.inference_mode():
        want = bert(input_ids=ids, output_hidden_states=True).hidden_states[3]
        assert torch.allclose(tgdt.first_layers(bert, 3)(input_ids=ids).last_hidden_state, want, atol=1e-6)
    for layers in (4, 0, -1):
        with pytest.raises(ValueError, match="3 layers"):
            tgdt.first_layers(bert, layers)


def test_a_released_image_token_has_no_feature_and_no_box():
    encoder, batch, seen = tgdt.RegionEncoder(12, 8, 1, 2, 16, 0.0, zero_image_token=True), make_batch(), []
    encoder.geometry.register_forward_pre_hook(lambda layer, given: seen.extend(given))
    slots, mask = encoder(batch["regions"], batch["boxes"], batch["region_mask"])
    assert seen[0][:, 0].abs().max() == 0
    assert mask[:, 0].all() and torch.equal(mask[:, 1:], batch["region_mask"])


def test_the_local_loss_trains_every_part_below_it(model):
    images, texts = model.encode_images(make_batch()), model.encode_texts(make_batch())
    model.zero_grad()
    losses.hinge(losses.local_similarity(images.tokens, images.mask, texts.tokens, texts.mask), margin=9.0).backward()
    for part in (model.bert.encoder, model.text_branch.local_encoder,
                 model.region_encoder, model.image_branch.local_encoder):
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters() if p.ndim > 1)
