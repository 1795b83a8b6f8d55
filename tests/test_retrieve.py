"""Two-stage retrieval against a brute-force twin; ranks and recall by hand."""
import numpy as np
import pytest
import torch
from conftest import unit

import data
import losses
import retrieve
import tgdt
from harness import engines
from retrieve import Embeddings


@pytest.fixture
def corpus() -> tuple[Embeddings, Embeddings]:
    """12 images of 1 to 6 regions and 31 captions of 1 to 7 words, ragged; captions 5 and 20 are equal."""
    g = torch.Generator().manual_seed(9)
    regions = torch.arange(6) < torch.randint(1, 7, (12, 1), generator=g)
    words = torch.arange(7) < torch.randint(1, 8, (31, 1), generator=g)
    images = Embeddings("image", unit(12, 16, seed=0), unit(12, 6, 16, seed=1), regions)
    globals_, tokens = unit(31, 16, seed=2), unit(31, 7, 16, seed=3)
    for part in (globals_, tokens, words):
        part[20] = part[5]
    texts = Embeddings("text", globals_, tokens, words)
    return images, texts


def brute_force(query: int, queries: Embeddings, corpus: Embeddings, k: int, weight: float) -> list[tuple[float, int]]:
    coarse = [float(queries.globals[query] @ corpus.globals[c]) for c in range(len(corpus))]
    best = sorted(range(len(corpus)), key=lambda c: -coarse[c])[:k]
    out = []
    for c in best:
        pair = {queries.kind: (queries, query), corpus.kind: (corpus, c)}
        (images, i), (texts, t) = pair["image"], pair["text"]
        dots = texts.tokens_of(torch.tensor([t])) @ images.tokens_of(torch.tensor([i])).T
        out.append((coarse[c] + weight * float(dots.amax(1).sum()), c))
    return sorted(out, reverse=True)


@pytest.mark.parametrize("block, piece", [(2**26, 512), (5 * 1024, 3), (1, 40)])
@pytest.mark.parametrize("k", [1, 4, 100])
@pytest.mark.parametrize("direction", ["i2t", "t2i"])
def test_search_equals_brute_force(corpus, direction, k, block, piece, monkeypatch):
    """Ragged words and regions, duplicates, a list longer than the corpus; many blocks, the last ones short."""
    monkeypatch.setattr(retrieve, "BLOCK", block)
    monkeypatch.setattr(retrieve, "PIECE", piece)
    asked, found = corpus if direction == "i2t" else corpus[::-1]
    indices, scores = retrieve.search(asked, found, shortlist=k, weight=2.0)
    assert indices.shape == scores.shape == (len(asked), min(k, len(found)))
    for q in range(len(asked)):
        want = brute_force(q, asked, found, k, 2.0)
        assert np.allclose(scores[q], [score for score, _ in want], atol=1e-4)
        # Captions 5 and 20 are equal: where only one fits on the list, either will do.
        assert [{20: 5}.get(c, c) for c in indices[q].tolist()] == [{20: 5}.get(c, c) for _, c in want]


def test_the_local_similarity_of_pairs_is_that_of_the_losses(corpus):
    images, texts = corpus
    want = losses.local_similarity(*images.padded(), *texts.padded())
    g = torch.Generator().manual_seed(0)
    image, caption = torch.randint(0, 12, (80,), generator=g), torch.randint(0, 31, (80,), generator=g)
    for reduction, scale in (("sum", 1), ("mean", texts.offsets.diff())):
        for one in (image, torch.full_like(image, 3)):
            for other in (caption, torch.full_like(caption, 8)):
                for local_of in (retrieve.local_of_pairs, engines.local_of_pairs, engines.local_in_blocks):
                    ours = local_of(images, texts, one, other, reduction)
                    assert torch.allclose(ours, (want / scale)[one, other], atol=1e-5)


def agree(ours: tuple, want: tuple) -> None:
    """The same items with the same scores. Captions 5 and 20 are equal, so either will do."""
    assert torch.equal(ours[0].where(ours[0] != 20, 5), want[0].where(want[0] != 20, 5))
    assert torch.allclose(ours[1], want[1], atol=1e-5)


@pytest.mark.parametrize("shared", [0, 10**6])
def test_the_engine_for_speed_finds_what_the_readable_search_finds(corpus, shared, monkeypatch):
    """Image by image (0) or caption by caption (10**6), in both directions, for few queries and for all, and with half
    of the data in bfloat16."""
    monkeypatch.setattr(engines, "SHARED", shared)
    half = [side.to(dtype=torch.bfloat16) for side in corpus]
    for queries, found in (corpus, corpus[::-1], (corpus[0], half[1]), (corpus[1], half[0])):
        for asked in (queries, queries[:1], queries[2:5]):
            for reduction in ("sum", "mean"):
                want = retrieve.search(asked, found, 5, 2.0, reduction)
                for local_of in (engines.local_of_pairs, engines.local_in_blocks):  # the last one is for a GPU
                    agree(retrieve.search(asked, found, 5, 2.0, reduction, local_of), want)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_several_threads_find_what_one_finds_and_leave_the_number_of_threads_as_it_was(corpus, threads, monkeypatch):
    monkeypatch.setattr(engines, "QUERIES", 4)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for queries, found in (corpus, corpus[::-1]):
            for asked in (queries, queries[:1], queries[2:5]):
                agree(engines.search(asked, found, 5, 2.0), retrieve.search(asked, found, 5, 2.0))
        with pytest.raises(ValueError, match="empty"):
            engines.search(queries, found, 0)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tokens_in_half_precision_change_scores_by_their_rounding_only(corpus, dtype):
    images, texts = corpus
    half = images.to(dtype=dtype), texts.to(dtype=dtype)
    assert half[0].tokens.dtype == dtype and half[0].globals.dtype == torch.float32
    exact = {c: s for c, s in zip(*map(torch.flatten, retrieve.search(texts[:1], images, 12, 1.0)), strict=True)}
    exact = dict(sorted((int(c), float(s)) for c, s in exact.items()))
    indices, scores = retrieve.search(half[1][:1], half[0], 12, 1.0)
    rounded = dict(sorted((int(c), float(s)) for c, s in zip(indices[0], scores[0], strict=True)))
    assert scores.dtype == torch.float32 and exact.keys() == rounded.keys()
    # at most 7 words, each product of two roundings and rounded once more
    allowed = 7 * 3 * torch.finfo(dtype).eps
    assert all(abs(exact[c] - rounded[c]) <= allowed for c in exact)
    for sides in (half, (images, half[1])):
        assert torch.allclose(retrieve.local_matrix(*sides), retrieve.local_matrix(images, texts), atol=allowed)


def test_padded_tokens_are_held_packed():
    g = torch.Generator().manual_seed(4)
    tokens, mask = unit(5, 3, 8, seed=1), torch.arange(3) < torch.randint(1, 4, (5, 1), generator=g)
    given = Embeddings("text", unit(5, 8, seed=0), tokens, mask)
    assert torch.equal(given.tokens, tokens[mask]) and given.offsets.diff().tolist() == mask.sum(1).tolist()
    assert torch.equal(Embeddings("text", given.globals, tokens, mask.long()).tokens, given.tokens)
    again, again_mask = given.padded()
    assert torch.equal(again_mask, mask[:, : again_mask.shape[1]]) and torch.equal(again[again_mask], tokens[mask])
    part = given[torch.tensor([4, 2, 2])]
    assert torch.equal(part.globals, given.globals[[4, 2, 2]])
    assert torch.equal(part.tokens, torch.cat([tokens[row][mask[row]] for row in (4, 2, 2)]))
    assert part.offsets.diff().tolist() == [int(mask[row].sum()) for row in (4, 2, 2)]
    assert torch.equal(given[1:3].tokens, given[torch.tensor([1, 2])].tokens)
    for fits_not in ({}, {"mask": mask[:4]}, {"offsets": given.offsets[:-1]}):
        with pytest.raises(ValueError, match="for each of the 5 items"):
            Embeddings("text", given.globals, tokens[:4] if "mask" in fits_not else tokens, **fits_not)


def test_one_query_no_corpus_no_tokens(corpus):
    images, texts = corpus
    one = retrieve.search(texts[torch.tensor([3])], images, shortlist=4)
    every = retrieve.search(texts, images, shortlist=4)
    assert torch.equal(one[0][0], every[0][3])
    coarse = retrieve.search(Embeddings("text", texts.globals), images, shortlist=12)[0]
    assert torch.equal(coarse, (texts.globals @ images.globals.T).argsort(1, descending=True))
    nothing = torch.tensor([], dtype=torch.long)
    assert [found.shape for found in retrieve.search(texts[nothing], images, shortlist=4)] == [(0, 4), (0, 4)]
    with pytest.raises(ValueError, match="empty"):
        retrieve.search(texts, images[nothing])
    for kinds in (("text", "text"), ("caption", "image"), ("image", "image")):
        with pytest.raises(ValueError, match="one side should be 'image', the other 'text'"):
            retrieve.search(*(Embeddings(kind, texts.globals) for kind in kinds))
    without = Embeddings("text", texts.globals)
    image_of = torch.arange(len(texts)) % len(images)
    assert retrieve.evaluate(images, without, image_of).keys() == {"global", "seconds"}
    with pytest.raises(ValueError, match="at least one"):
        retrieve.search(texts, images, shortlist=0)
    for search in (retrieve.search, engines.search):
        for queries in (texts, texts[:2]):
            with pytest.raises(ValueError, match='"sum" or "mean", not \'median\''):
                search(queries, images, 4, reduction="median")
    with pytest.raises(ValueError, match="mask if padded"):
        Embeddings("image", images.globals, images.padded()[0])


class Echo(torch.nn.Module):
    """Its tokens are the ids of the word pieces, its global vector is the first of them."""

    def encode_texts(self, batch: dict) -> tgdt.Encoded:
        assert not self.training
        self.in_bfloat16 = torch.is_autocast_enabled("cpu")
        ids = batch["word_ids"].float()
        return tgdt.Encoded(ids[:, :1], ids[:, :, None], batch["word_mask"])


def test_captions_are_encoded_without_dropout_and_come_back_in_their_own_order():
    words = [np.array(ids, np.int32) for ids in ([7, 1, 1], [5], [6, 2])]
    for precision in ("bfloat16", "float32"):
        model = Echo()
        texts = retrieve.encode(model, data.text_batches(words, 2), "text", 3, "cpu", precision)
        assert model.in_bfloat16 == (precision == "bfloat16")
    assert texts.globals.tolist() == [[7], [5], [6]]
    assert [texts.tokens_of(torch.tensor([row])).flatten().tolist() for row in range(3)] == [[7, 1, 1], [5], [6, 2]]


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_the_whole_shortlist_is_the_exhaustive_mixed_similarity(corpus, reduction, monkeypatch):
    """Also if the local similarities are computed in several blocks."""
    monkeypatch.setattr(retrieve, "BLOCK", 2_000)
    images, texts = corpus
    image_of, dots = torch.arange(31) % 12, images.globals @ texts.globals.T
    local = losses.local_similarity(*images.padded(), *texts.padded(), reduction)
    assert torch.allclose(retrieve.local_matrix(images, texts, reduction), local, atol=1e-6)
    result = retrieve.evaluate(images, texts, image_of, (31, 12), 0.7, reduction)
    assert result["global"] == retrieve.recall(dots, image_of) and result["local"] == retrieve.recall(local, image_of)
    assert result["two_stage"] == result["mixed"] == retrieve.recall(dots + 0.7 * local, image_of)


def test_each_direction_is_searched_by_the_engine_given_and_with_its_own_length(corpus):
    asked = []

    def engine(queries: Embeddings, found: Embeddings, length: int, *rest: object) -> tuple:
        asked.append((queries.kind, length))
        return retrieve.search(queries, found, length, *rest)

    for lengths in ((), ((4, 3),)):
        retrieve.evaluate(*corpus, torch.arange(31) % 12, *lengths, find=engine)
    assert asked == [("image", 50), ("text", 100), ("image", 4), ("text", 3)]


def test_ranks_by_hand():
    #                        captions of image 0, 0, 1, 1
    similarity = torch.tensor([[0.1, 0.7, 0.9, 0.2],   # image 0: its best caption is second
                               [0.3, 0.2, 0.4, 0.5]])  # image 1: first
    image_of, rows = torch.tensor([0, 0, 1, 1]), torch.arange(2)
    assert retrieve.ranks(similarity, rows, image_of).tolist() == [2, 1]
    assert retrieve.ranks(similarity.T, image_of, rows).tolist() == [2, 1, 2, 1]
    assert retrieve.ranks(similarity, rows + 7, image_of).tolist() == [5, 5]  # no caption belongs to images 7 and 8
    out = retrieve.recall(similarity, image_of)
    assert out["i2t"] == {"r1": 50.0, "r5": 100.0, "r10": 100.0, "median_rank": 1.5, "mean_rank": 1.5}
    assert out["rsum"] == pytest.approx(500.0)


def test_metrics_by_hand():
    assert retrieve.metrics(torch.tensor([1, 5, 6, 10, 11]), torch.tensor([1, 1, 2, 100])) == {
        "i2t": {"r1": 20, "r5": 40, "r10": 80, "median_rank": 6, "mean_rank": 6.6},
        "t2i": {"r1": 50, "r5": 75, "r10": 75, "median_rank": 1.5, "mean_rank": 26}, "rsum": 340}


def test_captions_per_image_may_differ_in_number():
    similarity = torch.eye(3)[:, [0, 0, 0, 0, 1, 2, 2]]
    assert retrieve.recall(similarity, torch.tensor([0, 0, 0, 0, 1, 2, 2]))["rsum"] == 600


def test_scores_of_another_shape_are_refused():
    for scores in (torch.zeros(3, 5), torch.ones(3)):
        with pytest.raises(ValueError, match="do not fit"):
            retrieve.recall(scores, torch.tensor([0]))


def test_the_ranks_by_coarse_vectors_are_those_of_the_whole_matrix_in_blocks_of_any_size(corpus, monkeypatch):
    images, texts = (Embeddings(side.kind, side.globals) for side in corpus)
    image_of = torch.arange(len(texts)) % len(images)
    want = retrieve.recall(images.globals @ texts.globals.T, image_of)
    for block in (1, 40, 2**26):
        monkeypatch.setattr(retrieve, "BLOCK", block)
        assert retrieve.evaluate(images, texts, image_of)["global"] == want


def test_a_constant_similarity_scores_nothing():
    out = retrieve.recall(torch.zeros(40, 200), torch.arange(200) // 5)
    assert out["rsum"] == 0
    assert out["t2i"]["mean_rank"] == 40 and out["i2t"]["mean_rank"] == 196
    equal = Embeddings("image", torch.ones(40, 1)), Embeddings("text", torch.ones(200, 1))
    assert retrieve.evaluate(*equal, torch.arange(200) // 5)["global"]["rsum"] == 0
    # Nor if a shortlist is cut out of equal scores, where it is chance whether the answer is on it.
    equal = [Embeddings(side.kind, side.globals, side.globals[:, None], torch.ones(len(side), 1, dtype=torch.bool))
             for side in equal]
    assert retrieve.evaluate(*equal, torch.arange(200) // 5, (7, 7))["two_stage"]["rsum"] == 0


def test_nan_scores_nothing():
    assert retrieve.recall(torch.full((20, 100), float("nan")), torch.arange(100) // 5)["rsum"] == 0
    one = torch.tensor([[0.9, float("nan"), 0.1]])  # both of the first two are right
    assert retrieve.ranks(one, torch.tensor([0]), torch.tensor([0, 0, 1])).tolist() == [1]


def test_a_shortlist_miss_is_a_miss():
    """Unrelated embeddings of 200 images: the released evaluator reports an R@1 of about 78 / 50, chance is 0.5."""
    images = Embeddings("image", unit(200, 32, seed=0), unit(200, 4, 32, seed=1), torch.ones(200, 4, dtype=torch.bool))
    texts = Embeddings("text", unit(1000, 32, seed=2), unit(1000, 6, 32, seed=3), torch.ones(1000, 6, dtype=torch.bool))
    result = retrieve.evaluate(images, texts, torch.arange(1000) // 5, shortlist=(50, 100), exhaustive=False)
    assert result["two_stage"]["i2t"]["r1"] <= 5 and result["two_stage"]["t2i"]["r1"] <= 2
    # A query whose answer is not on the list keeps its rank of stage 1, which lies beyond the list.
    indices = torch.tensor([[3, 1]])
    ranks = retrieve.shortlist_ranks(indices, torch.tensor([[0.9, 0.8]]), torch.tensor([7]), torch.arange(10),
                                     torch.tensor([6]))
    assert ranks.tolist() == [6]
    # Image 7 is on both lists of two. By stage 1 it is third for the first query: it only shares the last place.
    ranks = retrieve.shortlist_ranks(torch.tensor([[3, 7]] * 2), torch.tensor([[0.9, 0.8]] * 2), torch.tensor([7, 7]),
                                     torch.arange(10), torch.tensor([3, 2]))
    assert ranks.tolist() == [3, 2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_words_of_half_precision_are_summed_in_float32(corpus, dtype):
    images, texts = (side.to(dtype=dtype) for side in corpus)
    pair = torch.tensor([3]), torch.tensor([8])
    best = (images.tokens_of(pair[0]) @ texts.tokens_of(pair[1]).T).amax(0)
    found = retrieve.local_of_pairs(images, texts, *pair)
    assert found.dtype == torch.float32 and torch.allclose(found, best.float().sum(), atol=1e-6)


def test_without_tokens_on_one_side_the_order_of_stage_1_stands(corpus):
    images, texts = corpus
    found = retrieve.search(texts, Embeddings("image", images.globals), shortlist=12)[0]
    assert torch.equal(found, (texts.globals @ images.globals.T).argsort(1, descending=True))


def test_the_last_of_a_shortlist_may_become_the_first():
    ranks = retrieve.shortlist_ranks(torch.tensor([[7, 3]]), torch.tensor([[0.9, 0.8]]), torch.tensor([7]),
                                     torch.arange(10), torch.tensor([2]))
    assert ranks.tolist() == [1]


def test_images_come_back_in_their_own_order():
    class Rows(torch.nn.Module):
        def encode_images(self, batch: dict) -> tgdt.Encoded:
            return tgdt.Encoded(batch["image_index"].float()[:, None], None, None)

    batches = [{"image_index": torch.tensor(rows)} for rows in ([4, 1], [3, 0], [2])]
    assert retrieve.encode(Rows(), batches, "image", 5).globals.flatten().tolist() == [0, 1, 2, 3, 4]


def test_among_equal_scores_the_order_of_stage_1_stands():
    """Two captions, the better of stage 1 as much worse in stage 2."""
    one = torch.ones(1, 1, dtype=torch.bool)
    image = Embeddings("image", torch.tensor([[1.0]]), torch.tensor([[[1.0]]]), one)
    texts = Embeddings("text", torch.tensor([[0.25], [0.5]]), torch.tensor([[[0.5]], [[0.25]]]), one.expand(2, 1))
    assert retrieve.search(image, texts, 2, 1.0)[0].tolist() == [[1, 0]]
