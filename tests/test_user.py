"""user.py: brute-force twins, and what may not change an embedding."""
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_BERT, make_batch
from transformers import BertConfig, BertModel

import user


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_model(guide: str = "self") -> user.USER:
    torch.manual_seed(0)
    guides = {"none": lambda: None, "self": lambda: user.SelfGuidedEnhancement(12),
              "clip": lambda: user.CLIPGuidedEnhancement(7, 12)}
    model = user.USER(BertModel(BertConfig(**TINY_BERT), add_pooling_layer=False), 12, 8, guides[guide]())
    for module in model.modules():  # BatchNorm as after some training, so that its statistics matter
        if isinstance(module, torch.nn.BatchNorm1d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2.0)
    return model


@torch.inference_mode()
def both(model: user.USER, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    return model.encode_images(batch).globals, model.encode_texts(batch).globals


# ----------------------------------------------------------------------------------------- semantic enhancement


def test_enhancement_by_hand():
    regions = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [9.0, 9.0]]])
    mask, guide = torch.tensor([[True, True, False]]), torch.tensor([[1.0, 0.0]])
    e = torch.tensor([1.0, 0.0]).mul(2.0).softmax(0)  # sharpness 2, agreements 1 and 0
    a = e / e.norm()
    want = torch.tensor([[[1 + a[0], 0.0], [a[1], 1.0], [9.0, 9.0]]])
    assert torch.allclose(user.enhance(regions, mask, guide, sharpness=2.0), want, atol=1e-6)


@pytest.mark.parametrize("guide", [user.SelfGuidedEnhancement(12, sharpness=3.0),
                                   user.CLIPGuidedEnhancement(7, 12, sharpness=3.0)], ids=["SGE", "CGE"])
def test_a_guide_enhances_with_its_own_sharpness(guide):
    batch = make_batch()
    regions, mask, clip = batch["regions"], batch["region_mask"], batch["clip"]
    guide.eval()
    vector = guide.guide(regions, mask) if hasattr(guide, "guide") else F.normalize(guide.project(clip), dim=1)
    assert torch.equal(guide(regions, mask, clip), user.enhance(regions, mask, vector, 3.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_regions_in_half_precision_are_enhanced_in_it(dtype):
    torch.manual_seed(0)
    regions, mask = torch.randn(2, 5, 4), torch.ones(2, 5, dtype=torch.bool)
    sge = user.SelfGuidedEnhancement(4).eval()
    want = sge(regions, mask)
    found = sge.to(dtype)(regions.to(dtype), mask)
    assert found.dtype == dtype and torch.allclose(found.float(), want, atol=0.05)


def test_sge_equals_its_definition_region_by_region():
    torch.manual_seed(0)
    sge = make_model().guide.eval()
    batch = make_batch()
    for b in range(3):
        real = batch["regions"][b][batch["region_mask"][b]]
        normed = sge.local_norm(sge.local(real)).tanh()
        picture = sge.picture_norm(sge.picture(real.mean(0, keepdim=True))).tanh()
        weights = sge.score(normed * picture).squeeze(1).softmax(0)
        guide = F.normalize((weights[:, None] * real).sum(0), dim=0)
        ours = sge.guide(batch["regions"], batch["region_mask"])[b]
        assert torch.allclose(ours, guide, atol=1e-6)


class Half(torch.nn.Module):
    def forward(self, given: torch.Tensor) -> torch.Tensor:
        return given / 2


def test_sge_drops_out_what_it_reads_of_the_regions_and_of_the_picture():
    """Both after the tanh. A layer that halves, in the place of the dropout, makes each score a quarter of itself."""
    sge, batch, scores = make_model().guide.eval(), make_batch(), []
    sge.score.register_forward_hook(lambda layer, given, score: scores.append(score))
    for dropout in (torch.nn.Identity(), Half()):
        sge.dropout = dropout
        sge.guide(batch["regions"], batch["region_mask"])
    assert torch.allclose(scores[0], 4 * scores[1], atol=1e-6)


def test_the_layers_that_the_released_code_starts_by_xavier_start_so_here():
    """Uniform up to sqrt(6 / (inputs + outputs)), without a bias. PyTorch's own start ends at 1 / sqrt(inputs)."""
    torch.manual_seed(0)
    sge = user.SelfGuidedEnhancement(40)
    model = user.USER(BertModel(BertConfig(**TINY_BERT), add_pooling_layer=False), 40, 60)
    for linear in (sge.local, sge.picture, sge.score, model.project):
        bound = (6 / sum(linear.weight.shape)) ** 0.5
        assert 0.8 * bound < linear.weight.abs().max() <= bound and linear.bias.abs().max() == 0


def test_statistics_are_of_the_real_regions_only():
    """In training mode, where BatchNorm takes its statistics from the batch: padding must not be among them."""
    outputs = []
    for regions in (5, 8):
        torch.manual_seed(0)
        model, batch = make_model(), make_batch(regions=regions)
        model.guide.dropout.p = 0.0
        model.train()
        model.bert.eval()
        outputs.append((model.encode_images(batch).globals, model.guide.local_norm.running_mean.clone(),
                        model.mlp_norm.running_var.clone()))
    for few, many in zip(*outputs, strict=True):
        assert torch.allclose(few, many, atol=1e-5)


# ----------------------------------------------------------------------------------------------------- encoders


@pytest.mark.parametrize("guide", ["none", "self", "clip"])
def test_an_embedding_depends_on_its_own_input_only(guide):
    """Not on the padding, the order or the size of its batch."""
    model = make_model(guide).eval()
    batch = make_batch()
    whole = both(model, batch)
    for globals_ in whole:
        assert torch.allclose(globals_.norm(dim=1), torch.ones(3), atol=1e-5)
    order = torch.tensor([2, 0, 1])
    padded, turned = both(model, make_batch(8, 15)), both(model, {name: value[order] for name, value in batch.items()})
    for a, b, c in zip(whole, padded, turned, strict=True):
        assert torch.allclose(a, b, atol=1e-6) and torch.allclose(a[order], c, atol=1e-6)
    for row in range(3):
        alone = both(model, {name: value[row : row + 1] for name, value in batch.items()})
        assert all(torch.allclose(a[row], b[0], atol=1e-6) for a, b in zip(whole, alone, strict=True))


def test_the_order_of_regions_does_not_matter():
    model, batch = make_model().eval(), make_batch()
    batch["region_mask"][:] = True
    turned = {**batch, "regions": batch["regions"][:, torch.tensor([3, 1, 4, 0, 2])]}
    assert torch.allclose(both(model, batch)[0], both(model, turned)[0], atol=1e-6)


def pool(tokens: torch.Tensor, mask: torch.Tensor, scores: list[float]) -> torch.Tensor:
    """GPO with the scores of the places given, by hand: sort, softmax, weigh."""
    rows = []
    for row, real in zip(tokens, mask, strict=True):
        ordered = row[real].sort(0, descending=True)[0]
        rows.append((torch.tensor(scores[: len(ordered)]).softmax(0)[:, None] * ordered).sum(0))
    return torch.stack(rows)


def test_gpo_is_mean_pooling_with_equal_scores_and_max_pooling_with_a_high_first_one(monkeypatch):
    gpo, tokens, mask = user.GeneralizedPooling(), rand(3, 6, 5), torch.arange(6) < torch.tensor([[6], [1], [4]])
    torch.nn.init.zeros_(gpo.score.weight)
    mean = torch.stack([row[real].mean(0) for row, real in zip(tokens, mask, strict=True)])
    assert torch.allclose(gpo(tokens, mask), mean, atol=1e-6)

    def first(lengths, longest):
        return torch.eye(longest)[torch.zeros_like(lengths)]

    monkeypatch.setattr(gpo, "pooling_weights", first)
    largest = torch.stack([row[real].max(0)[0] for row, real in zip(tokens, mask, strict=True)])
    assert torch.allclose(gpo(tokens, mask), largest, atol=1e-6)


def test_gradients_of_gpo_in_double_precision():
    pool, mask = user.GeneralizedPooling(width=4).double(), torch.tensor([[True] * 3, [True, False, True]])
    tokens = rand(2, 3, 2).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda tokens: pool(tokens, mask), tokens)


def test_gpo_weights_depend_on_the_number_of_tokens_and_on_nothing_else():
    torch.manual_seed(0)
    gpo = user.GeneralizedPooling()
    lengths = torch.tensor([3, 6, 3, 1])
    weights = gpo.pooling_weights(lengths, 8)
    assert torch.allclose(weights.sum(1), torch.ones(4), atol=1e-6)
    assert torch.equal(weights > 0, torch.arange(8) < lengths[:, None])
    assert torch.equal(weights[0], weights[2]) and not torch.allclose(weights[0, :3], weights[1, :3])
    for row, n in enumerate(lengths.tolist()):  # the GRU run on n places alone
        alone = gpo.pooling_weights(torch.tensor([n]), n)[0]
        assert torch.allclose(weights[row, :n], alone, atol=1e-6)
    tokens, mask = rand(4, 8, 5), torch.arange(8) < lengths[:, None]
    for row, n in enumerate(lengths.tolist()):
        want = pool(tokens[row : row + 1], mask[row : row + 1], weights[row, :n].log().tolist())
        assert torch.allclose(gpo(tokens, mask)[row], want[0], atol=1e-5)


def test_gpo_pools_in_float32_under_autocast():
    gpo, tokens, mask = user.GeneralizedPooling(), rand(2, 9, 4), torch.ones(2, 9, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        found = gpo(tokens, mask)
    assert torch.equal(found, gpo(tokens, mask))


def test_gpo_masks_need_not_be_a_prefix_and_gradients_stay_finite():
    torch.manual_seed(0)
    gpo = user.GeneralizedPooling()
    tokens = rand(2, 4, 3).requires_grad_()
    scattered = torch.tensor([[True, False, True, True], [False, False, True, False]])
    packed = torch.stack([torch.cat([row[real], row[~real]]) for row, real in zip(tokens, scattered, strict=True)])
    pooled = gpo(tokens, scattered)
    assert torch.allclose(pooled, gpo(packed, torch.arange(4) < torch.tensor([[3], [1]])), atol=1e-6)
    pooled.sum().backward()
    assert tokens.grad.isfinite().all() and all(p.grad.isfinite().all() for p in gpo.parameters())
    assert (tokens.grad[~scattered] == 0).all() and (tokens.grad[scattered] != 0).any()


def test_gradients_reach_every_part():
    model, batch = make_model().train(), make_batch()
    image, text = model.encode_images(batch).globals, model.encode_texts(batch).globals
    (image * text).sum().backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not still
    dead = {name for name, p in model.named_parameters() if p.grad.abs().sum() == 0}
    # softmax does not see what is added to all its scores, nor BatchNorm what is added to all its inputs
    assert all(name.endswith("bias") for name in dead), dead


# -------------------------------------------------------------------------------------------- momentum contrast


@pytest.mark.parametrize("length, batches", [(6, [2] * 10), (7, [3, 2, 5, 1, 7, 4, 3]), (5, [5, 5, 5])])
def test_a_queue_holds_the_newest_keys_over_several_laps(length, batches):
    """Against a list: any length, any batch size, keys with their owners."""
    queue, twin, number = user.Queue(length, 2), [], 0
    for size in batches:
        numbers = torch.arange(number, number + size)
        number += size
        stored, queue = queue.state_dict(), user.Queue(length, 2)  # as after --resume
        queue.load_state_dict(stored)
        queue.add(torch.stack([numbers.float(), -numbers.float()], 1), numbers + 100)
        twin = (twin + numbers.tolist())[-length:]
        filled = queue.owner >= 0
        assert sorted(queue.owner[filled].tolist()) == [n + 100 for n in twin]
        assert torch.equal(queue.keys[filled][:, 0], queue.owner[filled] - 100.0)
        assert torch.equal(queue.keys[:, 1], -queue.keys[:, 0])
    order = torch.arange(length).roll(-int(queue.end))  # from the oldest to the newest
    assert queue.owner[order].tolist() == [n + 100 for n in twin]


def test_keys_of_the_query_s_own_image_and_empty_places_are_not_negatives():
    queue = user.Queue(5, 2)
    queue.add(torch.eye(2)[[0, 1, 0]], torch.tensor([4, 8, 4]))
    assert queue.positives(torch.tensor([4, 8, 1])).tolist() == [
        [True, False, True, True, True], [False, True, False, True, True], [False, False, False, True, True]]


def test_a_batch_larger_than_the_queue_is_refused():
    with pytest.raises(ValueError, match="batch of 4 keys.*queue of 3"):
        user.Queue(3, 2).add(torch.zeros(4, 2), torch.zeros(4, dtype=torch.long))


def test_a_queue_can_be_added_to_between_a_loss_and_its_gradient():
    queue, query = user.Queue(4, 2), torch.ones(1, 2, requires_grad=True)
    queue.add(torch.eye(2), torch.tensor([0, 1]))
    loss = (query @ queue.keys.T).pow(2).sum()
    queue.add(9 * torch.eye(2), torch.tensor([0, 1]))
    loss.backward()
    assert query.grad.tolist() == [[2.0, 2.0]]


def test_momentum_update_by_hand_parameters_and_buffers():
    model = make_model()
    momentum = user.MomentumContrast(model, 8, 16, momentum=0.9)
    before = {name: value.clone() for name, value in momentum.encoder.state_dict().items()}
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(1)
    momentum.update(model)
    after, theirs = momentum.encoder.state_dict(), model.state_dict()
    assert any("running_var" in name for name in after) and any("word_embeddings" in name for name in after)
    for name in before:
        if before[name].is_floating_point():
            assert torch.allclose(after[name], 0.9 * before[name] + 0.1 * theirs[name], atol=1e-6), name
        else:
            assert torch.equal(after[name], theirs[name]), name


def test_a_warm_momentum_encoder_is_the_mean_of_what_the_model_has_been():
    model = make_model()
    momentum = user.MomentumContrast(model, 8, 16, momentum=0.999, warm=True)
    with torch.no_grad():
        for value in (5.0, 3.0, 1.0):
            model.project.bias.fill_(value)
            momentum.update(model)
    assert torch.allclose(momentum.encoder.project.bias, torch.full((8,), 3.0))
    momentum.steps.fill_(5_000)  # 1 - 1 / 5001 is more than 0.999
    model.project.bias.data.fill_(1003.0)
    momentum.update(model)
    assert torch.allclose(momentum.encoder.project.bias, torch.full((8,), 4.0))


def test_the_momentum_encoder_has_no_gradient_and_no_dropout():
    model, batch = make_model(), make_batch()
    momentum = user.MomentumContrast(model, 8, 16).train()
    assert not any(module.training for module in momentum.encoder.modules())
    assert not any(p.requires_grad for p in momentum.encoder.parameters())
    assert all(torch.equal(a, b) for a, b in zip(both(momentum.encoder, batch), both(momentum.encoder, batch),
                                                 strict=True))
    assert all(p.requires_grad for p in model.parameters())


def test_the_momentum_encoder_is_in_eval_mode_from_the_start():
    """Also where the model is training when it is copied, as in a run."""
    model = make_model().train()
    assert not any(module.training for module in user.MomentumContrast(model, 8, 16).modules())
    assert model.training and model.guide.dropout.training
