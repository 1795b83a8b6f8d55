"""Worked answers of the notebooks, as code. The notebooks run them and fold code and output away (`show.answer`).

The first line of a docstring is what stands on the fold.
"""
import math

import checks
import numpy as np
import show
import torch

import data
import losses
import retrieve
from harness import report
from sources import drawing, scenes

# ------------------------------------------------------------------------------------------- 1, pictures and words


def which_picture(test, candidates, query):
    """Which of the six pictures? The generator checks the caption's claim against each scene."""
    for letter, row in zip("ABCDEF", candidates, strict=True):
        print(letter, scenes.holds(test.claims[query], test.objects[row]))


def true_of_the_twin(test):
    """Captions that are true of the twin, too"""
    for kind in drawing.TWINS:
        rows = [c for c, i in enumerate(test.image_of) if test.twin_kind[i] == kind]
        twins = [test.twin_of[test.image_of[c]] for c in rows]
        also = [scenes.holds(test.claims[c], test.objects[t]) for c, t in zip(rows, twins, strict=True)]
        print(f"{kind:16} {100 * np.mean(also):5.1f} % of {len(rows)} captions are true of the twin, too")


def a_scene_of_your_own():
    """A scene of your own"""
    mine = [drawing.Object("star", "yellow", "large", 96, 30, 44),
            drawing.Object("moon", "white", "large", 34, 36, 40),
            drawing.Object("ring", "blue", "small", 64, 96, 24)]
    figure, axis = show.panels(width=2.6, height=2.6)
    show.picture(axis, drawing.paint(np.random.RandomState(1), mine))
    show.done(figure, "a white moon, a yellow star, and a small blue ring below them.")


def a_random_region(test):
    """How often a random region lies on the object that a word names, and how often on any object"""
    on = [report.lies_on(b, o) for b, o in zip(test.boxes, test.object_boxes, strict=True)]  # [36, objects] each
    named = [on[test.image_of[c]][:, thing].mean()
             for c, pairs in enumerate(test.word_objects) for _, thing in pairs]
    print(f"on the one object that a word names: {100 * np.mean(named):.1f} %")
    print(f"on an object, whichever it is:       {100 * np.mean([each.any(1).mean() for each in on]):.1f} %")


def unknown_words(tokenizer):
    """An unknown word; the ways to say "left" """
    print(tokenizer.tokenize("a red elephant above a blue ring"))
    print(scenes.WORDS["left"])


def one_number_changed(table):
    """One number changed"""
    changed = table.clone()
    changed[1, 2] = 0.45
    result = retrieve.recall(changed, torch.arange(4))
    print(result["i2t"]["r1"], result["t2i"]["r1"])
    assert (result["i2t"]["r1"], result["t2i"]["r1"]) == (75, 75)


def the_best_of_five(colours_only, results):
    """The colour reader the other way round, and the median rank of chance"""
    print("image to text R@1 of colours only:", round(colours_only["i2t"]["r1"], 1))
    for way, expected in (("t2i", 500 / 2), ("i2t", 2500 * (1 - 0.5 ** (1 / 5)))):
        median = np.mean([result[way]["median_rank"] for result in results])
        print(f"{way} median rank: {median:.0f}, expected {expected:.0f}")


def write_rank():
    """One way to write it"""
    def rank(scores, right):
        best = scores[right].max()
        return 1 + (scores[~right] >= best).sum()

    assert checks.rank(rank)


# ------------------------------------------------------------------------------------------------------- 2, TGDT


def shuffled_regions(encoder, batch):
    """Regions and boxes shuffled together, and boxes shuffled alone"""
    order = torch.randperm(36, generator=torch.Generator().manual_seed(0))
    regions, boxes, mask = batch["regions"], batch["boxes"], batch["region_mask"]
    with torch.no_grad():
        plain, _ = encoder(regions, boxes, mask)
        together, _ = encoder(regions[:, order], boxes[:, order], mask)
        places, _ = encoder(regions, boxes[:, order], mask)
    print("together: the same image token:", torch.allclose(together[:, 0], plain[:, 0], atol=1e-5))
    print("together: the regions move along:", torch.allclose(together[:, 1:], plain[:, 1:][:, order], atol=1e-5))
    print("boxes alone: the same image token:", torch.allclose(places[:, 0], plain[:, 0], atol=1e-5))


def parameters(model):
    """Parameters by part"""
    for name, part in model.named_children():
        print(f"{name:16} {sum(p.numel() for p in part.parameters()):8,}")


def guidance_backwards(model, batch):
    """The gradient of a coarse similarity at the region encoder's first layer"""
    model.zero_grad()
    (model.encode_images(batch).globals * model.encode_texts(batch).globals).sum().backward()
    print(f"gradient norm {model.region_encoder.geometry[0].weight.grad.norm():.3f}, more than 0")
    model.zero_grad()


def write_late_interaction():
    """One way to write it"""
    def late_interaction(regions, real_regions, words, real_words):
        dots = words[real_words] @ regions[real_regions].T
        return dots.max(1).values.sum()

    assert checks.late_interaction(late_interaction)


def training_steps(settings):
    """Training steps"""
    training = settings.training
    steps = len(data.epoch_batches(np.repeat(np.arange(2000), 5), training.batch_size, training.captions_per_image,
                                   settings.run.seed, 0))
    print(f"{steps} steps an epoch, {3 * steps} in all")


def how_alike(untrained, trained):
    """How alike the eight captions' vectors are, each with the seven others"""
    for when, texts in (("untrained", untrained), ("trained", trained)):
        cosines = texts.globals @ texts.globals.T
        print(f"{when:9} mean cosine {(cosines.sum() - 8) / 56:.2f}")


def same_word_twice(model, tokenizer, settings):
    """The same word in two captions"""
    asked = data.tokenize(["there is a red square", "there is a blue square"], tokenizer, settings.text.longest)
    two = retrieve.encode(model, data.text_batches(asked, 2), "text", 2)
    red, blue = (two.tokens_of(torch.tensor([i]))[4] for i in range(2))
    print(f"cosine of the two tokens of 'square': {red @ blue:.2f}")


def a_wrong_picture(test, dots_of, show_word):
    """The first noun of caption 30 on its own picture and on a wrong one"""
    word = test.truth.word_objects[30][0][0]
    figure, axes = show.panels(1, 4, width=8, height=2.3)
    for pair, image in zip((axes[:2], axes[2:]), (6, 7), strict=True):
        show.picture(pair[0], test.pictures[image], f"scene {image}")
        name = test.captions[30].split()[word]
        show_word(pair[1], 30, word, image, f"{name}: best {dots_of(30, image)[word].max():.2f}")
    show.done(figure, "on its own picture the word lights up its object, on the wrong one something else; the best "
                      "similarity is lower there.")


def best_by_group(test, dots_of):
    """The best similarity by group of words"""
    kinds = {word: kind for kind, looks in drawing.LOOKS.items() for look in looks for word in scenes.WORDS[look]}
    best = {}
    for c in range(0, 2500, 5):
        for word, value in zip(test.captions[c].split(), dots_of(c).max(1).values.tolist(), strict=True):
            best.setdefault(kinds.get(word, "other"), []).append(value)
    for kind, values in best.items():
        print(f"{kind:7} {np.mean(values):.2f}")


def weights_on_twins(coarse_of, fine_of, own, twin):
    """The weight of the fine part, on the twins"""
    for weight in (0, 1, 3, 10, 30, 100):
        first, second = (coarse_of(i) + weight * fine_of(i) for i in (own, twin))
        print(f"weight {weight:3d}: right twin first for {100 * (first > second).double().mean():.1f} %")


def memory(images):
    """Bytes in float32"""
    print(f"coarse {images.globals.nbytes / 1e6:.2f} MB, fine {images.tokens.nbytes / 1e6:.2f} MB")


# ------------------------------------------------------------------------------------------------------ 3, losses


def cells_with_a_gradient():
    """Cells with a gradient in a batch of 128"""
    similarity = torch.randn(128, 128, generator=torch.Generator().manual_seed(0)) / 4
    touched = {}
    for negatives in ("hardest", "mean"):
        moving = similarity.clone().requires_grad_()
        push = torch.autograd.grad(losses.hinge(moving, negatives=negatives), moving)[0]
        touched[negatives] = int((push != 0).sum())
    print(f"of {similarity.numel()} cells: hardest {touched['hardest']}, mean {touched['mean']}")
    assert touched["hardest"] <= 3 * 128 < touched["mean"]


def collapsed():
    """The loss of a collapsed batch, per pair"""
    B = 128
    same = torch.nn.functional.normalize(torch.ones(B, 16), dim=1)
    ones = torch.ones(B, B)
    print(f"hinge {losses.hinge(ones) / B:.2f}   CMC, both levels {losses.cmc(same, same, ones) / B:.2f}   "
          f"InfoNCE {losses.info_nce(ones):.2f}   UTO {losses.uto_batch(ones):.2f}")


def disagreeing_pairs():
    """Two pairs whose hinge is 0 and whose intra-modal part is not"""
    v, t = show.unit(torch.deg2rad(torch.tensor([[0.0, 100.0], [0.0, 160.0]])))
    print(f"hinge {losses.hinge(v @ t.T):.2f}   intra-modal {losses.intra_consistency(v, t):.2f}"
          f"   (images {(v[0] @ v[1]):.2f}, captions {(t[0] @ t[1]):.2f})")
    assert losses.hinge(v @ t.T) == 0 < losses.intra_consistency(v, t)


def even_pairs(S):
    """Pairs evenly on the circle, and a shift of all similarities"""
    for pairs in (5, 6, 7):
        points = show.unit(torch.arange(pairs) * 2 * math.pi / pairs)
        print(f"{pairs} pairs: UTO {losses.uto_batch(points @ points.T):.3f}  (smallest possible {-math.log(2):.3f})")
    for name, loss in (("hinge", losses.hinge), ("InfoNCE", losses.info_nce), ("UTO", losses.uto_batch)):
        print(f"shift by 0.1: {name} {loss(S):.3f} -> {loss(S + 0.1):.3f}")


def expected_false_negatives(split):
    """Expected false negatives"""
    print(f"Flickr30K, batch of 128: {128 * 127 * 4 / 144999:.2f}   queue of 2048: {2048 * 4 / 145000:.3f} a query")
    first = data.epoch_batches(split.image_of, 72, 3, seed=0, epoch=0)[0]
    who = torch.as_tensor(split.image_of[first])
    print(f"scenes, batch of 72: {int((who[:, None] == who).sum()) - 72}")


def sum_of_thirty():
    """A sum of 30 words, word by word, in bfloat16 and in float32"""
    values = 0.8 + 0.05 * torch.randn(30, generator=torch.Generator().manual_seed(0))
    total = torch.zeros((), dtype=torch.bfloat16)
    for value in values.bfloat16():
        total = total + value
    print(f"bfloat16 {total.item():.3f}   float32 {values.sum().item():.3f}")


def write_masked_hinge():
    """One way to write it"""
    def masked_hinge(similarity, positives, margin):
        truth = similarity.diagonal()
        rows = (margin + similarity - truth[:, None]).clamp(min=0)
        columns = (margin + similarity - truth[None, :]).clamp(min=0)
        rows[positives] = columns[positives] = 0
        return rows.amax(1).sum() + columns.amax(0).sum()

    assert checks.masked_hinge(masked_hinge)


# ------------------------------------------------------------------------------------------------------- 4, USER


def equal_regions(sge, regions, mask):
    """36 equal regions"""
    same = regions[:1, :1].expand(1, 36, -1)
    strength = (sge(same, mask[:1]) - same).norm(dim=2)[0]
    print(f"added to each: from {strength.min():.4f} to {strength.max():.4f}, a sixth is {1 / 6:.4f}")
    assert torch.allclose(strength, torch.full((36,), 1 / 6), atol=1e-4)


def write_gpo():
    """One way to write it"""
    def gpo(tokens, real, weights):
        ordered = tokens[real].sort(0, descending=True).values  # padding is left out before it is sorted
        return weights[: len(ordered)] @ ordered

    assert checks.gpo(gpo)


def weights_by_length(model):
    """Text weights by the number of pieces"""
    lengths = torch.tensor([5, 10, 20])
    for length, weights in zip(lengths, model.text_pool.pooling_weights(lengths, 20), strict=True):
        print(f"{int(length):2} pieces:", " ".join(f"{value:.2f}" for value in weights[:8].tolist()))
        assert torch.isclose(weights.sum(), torch.tensor(1.0), atol=1e-5)


def copy_retrieval(rsum, model, momentum, stored, tell):
    """Retrieval by the momentum encoder"""
    print(f"rsum here: the model {rsum(model):.1f}, its momentum copy {rsum(momentum.encoder):.1f}")
    for name, arm in (("constant rate, the average", "user, no guide, averaged"),
                      ("falling rate, the average", "user, no guide, averaged, falling rate"),
                      ("falling rate, the model", "user, no guide")):
        tell(name, stored("flickr8k", arm))


def permuted_regions(model, batch):
    """The same regions in another order"""
    order = torch.randperm(36, generator=torch.Generator().manual_seed(0))
    mixed = {"regions": batch["regions"][:, order], "region_mask": batch["region_mask"][:, order]}
    difference = (model.encode_images(mixed).globals - model.encode_images(batch).globals).abs().max()
    print("the same vector:", bool(difference < 1e-4))
    assert difference < 1e-4


# -------------------------------------------------------------------------------------------- 5, two-stage retrieval


def captions_for_a_picture(images, texts, test, options, row):
    """Captions for one picture; a star marks its own"""
    found, _ = retrieve.search(images[row : row + 1], texts, 10, **options)
    for place, c in enumerate(found[0].tolist(), 1):
        print(f"{place:2d} {'*' if test.image_of[c] == row else ' '} {test.captions[c]}")


def length_for(before):
    """The K that loses one caption in a hundred"""
    print("K =", int(before.kthvalue(math.ceil(0.99 * len(before))).values))


def no_answer(encode_text, images, options):
    """The best score of a sensible and of an impossible query"""
    for text in ("there is a red star", "there is a red elephant"):
        _, scores = retrieve.search(encode_text(text), images, 100, **options)
        print(f"{scores[0, 0]:.2f}  {text}")


def compete(encode_text, one, texts, options):
    """Captions of your own among the 2,500 others, by the mixed similarity"""
    def mixed(captions):
        local = retrieve.local_matrix(one, captions, options["reduction"])
        return one.globals @ captions.globals.T + options["weight"] * local

    others = mixed(texts)
    for text in ("there is a white moon as well as a blue ring and a yellow star",
                 "there is a yellow moon as well as a white ring and a blue star"):
        score = mixed(encode_text(text))
        print(f"rank {1 + int((others >= score).sum()):4d} of 2501: {text}")


def write_two_stage():
    """One way to write it"""
    def two_stage(coarse, fine, k, weight):
        scores, rows = coarse.topk(k)
        order = (scores + weight * fine(rows)).argsort(descending=True)
        return rows[order]

    assert checks.two_stage(two_stage)


# ------------------------------------------------------------------------------------------------- 6, photographs


def write_leaks(train_vectors, test_vectors, names):
    """One way to write it, and what it finds"""
    def leaks(train_vectors, test_vectors, threshold):
        train, test = (torch.nn.functional.normalize(vectors, dim=1) for vectors in (train_vectors, test_vectors))
        return (test @ train.T).amax(1) > threshold

    assert checks.leaks(leaks)
    for threshold in (0.7, 0.8, 0.9, 0.95):
        found = leaks(train_vectors, test_vectors, threshold)
        print(threshold, "of seen photographs:", int(found[:8].sum()), "of 8;  of unseen ones:",
              [name for name, leak in zip(names[8:], found[8:].tolist(), strict=True) if leak])


# ------------------------------------------------------------------------------------------ 7, do the claims hold?


def write_paired_interval():
    """One way to write it"""
    def paired_interval(a, b, t):
        gains = np.array(a) - np.array(b)
        mean, reach = gains.mean(), t * gains.std(ddof=1) / len(gains) ** 0.5
        return mean - reach, mean + reach

    assert checks.paired_interval(paired_interval)
