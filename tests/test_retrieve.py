"""Two-stage retrieval against a brute-force twin; ranks and recall by hand."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import losses
import recall
import retrieve
import twostage
from retrieve import Embeddings


def unit(*shape: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.fixture
def corpus() -> tuple[Embeddings, Embeddings]:
    """12 images of 1 to 6 regions and 31 captions of 1 to 7 words, ragged; captions 5 and 20 are equal."""
    g = torch.Generator().manual_seed(9)
    regions = torch.arange(6) < torch.randint(1, 7, (12, 1), generator=g)
    words = torch.arange(7) < torch.randint(1, 8, (31, 1), generator=g)
    images = Embeddings("image", unit(12, 16, seed=0), unit(12, 6, 16, seed=1), regions)
    texts = Embeddings("text", unit(31, 16, seed=2), unit(31, 7, 16, seed=3), words)
    for part in (texts.globals, texts.tokens, texts.mask):
        part[20] = part[5]
    return images, texts


def brute_force(query: int, queries: Embeddings, corpus: Embeddings, k: int, weight: float) -> list[tuple[float, int]]:
    coarse = [float(queries.globals[query] @ corpus.globals[c]) for c in range(len(corpus))]
    best = sorted(range(len(corpus)), key=lambda c: -coarse[c])[:k]
    out = []
    for c in best:
        pair = {queries.kind: (queries, query), corpus.kind: (corpus, c)}
        (images, i), (texts, t) = pair["image"], pair["text"]
        dots = texts.tokens[t][texts.mask[t]] @ images.tokens[i][images.mask[i]].T
        out.append((coarse[c] + weight * float(dots.amax(1).sum()), c))
    return sorted(out, reverse=True)


def packed(padded: Embeddings) -> Embeddings:
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), padded.mask.sum(1).cumsum(0)])
    return Embeddings(padded.kind, padded.globals, padded.tokens[padded.mask], None, offsets)


@pytest.mark.parametrize("form", [lambda e: e, packed])
@pytest.mark.parametrize("memory", [None, 4_000, 1])
@pytest.mark.parametrize("anchor", [0, 10**6])
@pytest.mark.parametrize("k", [1, 4, 100])
@pytest.mark.parametrize("direction", ["i2t", "t2i"])
def test_search_equals_brute_force(corpus, direction, k, anchor, memory, form, monkeypatch):
    """Ragged words and regions, duplicates, a list longer than the corpus; many blocks, the last ones short."""
    monkeypatch.setattr(twostage, "WIDTH", 5)
    monkeypatch.setattr(twostage, "CHUNK", 9)
    monkeypatch.setattr(twostage, "ANCHOR", anchor)
    queries, found = corpus if direction == "i2t" else corpus[::-1]
    indices, scores = retrieve.search(form(queries), form(found), shortlist=k, weight=2.0, memory=memory)
    assert indices.shape == scores.shape == (len(queries), min(k, len(found)))
    for q in range(len(queries)):
        want = brute_force(q, queries, found, k, 2.0)
        assert np.allclose(scores[q], [score for score, _ in want], atol=1e-4)
        # Captions 5 and 20 are equal: where only one fits on the list, either will do.
        assert sorted({20: 5}.get(c, c) for c in indices[q].tolist()) == sorted({20: 5}.get(c, c) for _, c in want)


@pytest.mark.parametrize("form", [lambda e: e, packed])
def test_pairs_are_scored_alike_image_by_image_and_caption_by_caption(corpus, form, monkeypatch):
    images, texts = corpus
    want = losses.local_similarity(images.tokens, images.mask, texts.tokens, texts.mask)
    g = torch.Generator().manual_seed(0)
    image, caption = torch.randint(0, 12, (80,), generator=g), torch.randint(0, 31, (80,), generator=g)
    for words, scale in (("sum", 1), ("mean", texts.mask.sum(1))):
        for one in (image, torch.full_like(image, 3)):
            for other in (caption, torch.full_like(caption, 8)):
                ours = twostage.local_of_pairs(form(images), form(texts), one, other, words)
                assert torch.allclose(ours, (want / scale)[one, other], atol=1e-5)


def test_a_fused_kernel_is_given_packed_tokens_and_believed(corpus, monkeypatch):
    """With a stand-in of the library's signature: no GPU is needed to see that the pairs arrive as they should."""
    images, texts = corpus
    want = retrieve.search(images, texts, 4, 2.0, "mean")

    def kernel(query, document, query_ends, document_ends, which_query, which_document):
        query, document = query.split(query_ends.diff().tolist()), document.split(document_ends.diff().tolist())
        return torch.stack([(query[q] @ document[d].T).amax(1).sum()
                            for q, d in zip(which_query.tolist(), which_document.tolist(), strict=True)])

    assert twostage.fused_kernel(images, texts) is None  # on a processor there is none
    monkeypatch.setattr(twostage, "fused_kernel", lambda *sides: kernel)
    indices, scores = retrieve.search(images, texts, 4, 2.0, "mean")
    assert torch.allclose(scores, want[1], atol=1e-5) and torch.equal(indices, want[0])


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
    assert torch.allclose(retrieve.local_matrix(*half), retrieve.local_matrix(images, texts), atol=allowed)


def test_part_of_the_embeddings(corpus):
    which = torch.tensor([7, 2, 2])
    for whole in corpus:
        part, again = whole[which], packed(whole)[which]
        assert torch.equal(part.tokens[part.mask], again.tokens) and torch.equal(again.globals, whole.globals[which])
        assert again.offsets.tolist() == [0, *part.mask.sum(1).cumsum(0).tolist()]


def test_one_query_no_corpus_no_tokens(corpus):
    images, texts = corpus
    one = retrieve.search(texts[torch.tensor([3])], images, shortlist=4)
    every = retrieve.search(texts, images, shortlist=4)
    assert torch.equal(one[0][0], every[0][3])
    coarse = retrieve.search(Embeddings("text", texts.globals), images, shortlist=12)[0]
    assert torch.equal(coarse, (texts.globals @ images.globals.T).argsort(1, descending=True))
    with pytest.raises(ValueError, match="empty"):
        retrieve.search(texts, images[torch.tensor([], dtype=torch.long)])
    with pytest.raises(ValueError, match="kind"):
        retrieve.search(texts, texts)
    with pytest.raises(ValueError, match="at least one"):
        retrieve.search(texts, images, shortlist=0)


def test_a_query_for_which_faiss_finds_too_few_is_searched_exactly(corpus):
    class Short:
        """Finds the last three images for any query; for the second query one of them only."""

        def search(self, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
            indices = np.tile(np.arange(n - 3, n), (len(vectors), 1))
            indices[1, 1:] = -1
            return np.zeros(indices.shape, np.float32), indices

    images, texts = corpus
    n = len(images)
    exact = twostage.nearest(texts.globals, images.globals, 3)
    scores, indices = twostage.first_stage(texts.globals, Embeddings("image", images.globals, faiss=Short()), 3, 2**28)
    assert torch.equal(indices[0], torch.arange(n - 3, n)) and scores[0].eq(0).all()
    assert torch.equal(indices[1], exact[1][1]) and torch.allclose(scores[1], exact[0][1])


def test_the_whole_shortlist_is_the_exhaustive_mixed_similarity(corpus):
    images, texts = corpus
    image_of = torch.arange(31) % 12
    result = retrieve.evaluate(images, texts, image_of, shortlist=(31, 12), weight=0.7)
    assert {k: v for k, v in result["two_stage"].items()} == result["mixed"]
    local = losses.local_similarity(images.tokens, images.mask, texts.tokens, texts.mask)
    assert torch.allclose(retrieve.local_matrix(images, texts), local, atol=1e-6)


def test_ranks_by_hand():
    #                        captions of image 0, 0, 1, 1
    similarity = torch.tensor([[0.1, 0.7, 0.9, 0.2],   # image 0: its best caption is second
                               [0.3, 0.2, 0.4, 0.5]])  # image 1: first
    image_of, rows = torch.tensor([0, 0, 1, 1]), torch.arange(2)
    assert recall.ranks(similarity, rows, image_of).tolist() == [2, 1]
    assert recall.ranks(similarity.T, image_of, rows).tolist() == [2, 1, 2, 1]
    out = retrieve.recall(similarity, image_of)
    assert out["i2t"] == {"r1": 50.0, "r5": 100.0, "r10": 100.0, "median_rank": 1.5, "mean_rank": 1.5}
    assert out["rsum"] == pytest.approx(500.0)


def test_captions_an_image_may_differ_in_number():
    similarity = torch.eye(3)[:, [0, 0, 0, 0, 1, 2, 2]]
    assert retrieve.recall(similarity, torch.tensor([0, 0, 0, 0, 1, 2, 2]))["rsum"] == 600


def test_a_constant_similarity_scores_nothing():
    out = retrieve.recall(torch.zeros(40, 200), torch.arange(200) // 5)
    assert out["rsum"] == 0
    assert out["t2i"]["mean_rank"] == 40 and out["i2t"]["mean_rank"] == 196
    equal = Embeddings("image", torch.ones(40, 1)), Embeddings("text", torch.ones(200, 1))
    assert retrieve.evaluate(*equal, torch.arange(200) // 5)["global"]["rsum"] == 0


def test_nan_scores_nothing():
    assert retrieve.recall(torch.full((20, 100), float("nan")), torch.arange(100) // 5)["rsum"] == 0


def test_a_shortlist_miss_is_a_miss():
    """Unrelated embeddings of 200 images: the released evaluator reports R@1 79 / 53 here, chance is 0.5 / 0.5."""
    images = Embeddings("image", unit(200, 32, seed=0), unit(200, 4, 32, seed=1), torch.ones(200, 4, dtype=torch.bool))
    texts = Embeddings("text", unit(1000, 32, seed=2), unit(1000, 6, 32, seed=3), torch.ones(1000, 6, dtype=torch.bool))
    result = retrieve.evaluate(images, texts, torch.arange(1000) // 5, shortlist=(50, 100), exhaustive=False)
    assert result["two_stage"]["i2t"]["r1"] <= 5 and result["two_stage"]["t2i"]["r1"] <= 2
    # A query whose answer is not on the list keeps its rank of stage 1, which lies beyond the list.
    indices = torch.tensor([[3, 1]])
    ranks = recall.shortlist_ranks(indices, torch.tensor([[0.9, 0.8]]), torch.tensor([7]), torch.arange(10),
                                     torch.tensor([6]))
    assert ranks.tolist() == [6]


def test_five_folds_are_the_mean_of_their_parts():
    images, texts = Embeddings("image", unit(20, 8, seed=0)), Embeddings("text", unit(40, 8, seed=1))
    image_of = torch.arange(40) // 2
    folds = [retrieve.evaluate(images[slice(f, f + 4)], texts[slice(2 * f, 2 * f + 8)], torch.arange(8) // 2)
             for f in range(0, 20, 4)]
    mean = retrieve.five_folds(images, texts, image_of)
    assert mean["global"]["rsum"] == pytest.approx(np.mean([f["global"]["rsum"] for f in folds]))
    assert mean["global"]["t2i"]["r1"] == pytest.approx(np.mean([f["global"]["t2i"]["r1"] for f in folds]))


def test_a_region_lies_on_an_object():
    objects = torch.tensor([[0.2, 0.2, 0.4, 0.4]])
    boxes = torch.tensor([
        [0.2, 0.2, 0.4, 0.4],    # the object itself
        [0.0, 0.0, 0.6, 0.6],    # large, but its centre is inside
        [0.3, 0.2, 0.55, 0.4],   # IoU 0.1 / 0.35 < 0.3, centre outside
        [0.25, 0.1, 0.45, 0.4],  # IoU 0.03 / 0.07 >= 0.3
        [0.6, 0.6, 0.9, 0.9],    # elsewhere
    ])
    assert recall.overlaps(boxes, objects)[:, 0].tolist() == [True, True, False, True, False]
