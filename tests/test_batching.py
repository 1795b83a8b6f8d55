"""batching.py: word pieces, caption noise, and which captions meet in a batch."""
import pickle

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch.utils.data import DataLoader
from transformers import BertTokenizer, PreTrainedTokenizerFast

import batching
from data import Split
from files import BadInput


@pytest.fixture
def tokenizer():
    words = "[PAD] [UNK] [CLS] [SEP] a red ball two dogs play blue house".split()
    core = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    core.normalizer, core.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


def test_tokenize(tokenizer):
    words = batching.tokenize(["a red ball", "dogs", "A blue house two dogs"], tokenizer, longest=6)
    assert words.ids.tolist() == [2, 4, 5, 6, 3] + [2, 8, 3] + [2, 4, 10, 11, 7, 3]  # cut off before [SEP]
    assert words.offsets.tolist() == [0, 5, 8, 14]
    assert words.ids.dtype == np.int32 and words.offsets.dtype == np.int64
    with pytest.raises(BadInput, match="caption 1.*no word"):
        batching.tokenize(["dogs", "\u200b"], tokenizer, longest=6)


def test_tokenize_more_than_a_chunk(tokenizer):
    words = batching.tokenize(["dogs", "a ball"] * 5_001, tokenizer, longest=9)
    assert words.offsets[-1] == len(words.ids) == 7 * 5_001
    assert np.array_equal(words.ids.reshape(-1, 7), np.tile([2, 8, 3, 2, 4, 6, 3], (5_001, 1)))


class Ragged:
    """Three images of 2, 3 and 5 regions."""

    dim, counts = 4, (2, 3, 5)

    def __len__(self) -> int:
        return 3

    def read(self, rows):
        width = max(self.counts[row] for row in rows)
        mask = np.arange(width) < np.array([[self.counts[row]] for row in rows])
        regions = np.where(mask[:, :, None], np.array(rows)[:, None, None] + np.zeros(4), 0).astype(np.float32)
        return regions, regions / 10, mask


@pytest.fixture
def pairs(tokenizer):
    captions = ["a", "red ball two", "ball", "two dogs", "a", "play blue", "house two a red"]
    split = Split("train", captions, np.array([0, 1, 1, 2, 2, 2, 2]), Ragged(), ["0", "1", "2"], [None] * 3)
    return split, batching.tokenize(captions, tokenizer, longest=9)


def test_pairs(pairs, tokenizer):
    split, words = pairs
    chosen = [6, 1, 3, 2]  # of the images 2, 1, 2, 1
    batch = batching.Pairs(split, words, pad_id=9)[chosen]
    assert {name: value.dtype for name, value in batch.items()} == {
        "regions": torch.float32, "boxes": torch.float32, "region_mask": torch.bool, "word_ids": torch.int64,
        "word_mask": torch.bool, "image_row": torch.int64, "image_index": torch.int64, "caption_index": torch.int64,
    }  # fmt: skip
    assert len(batch["regions"]) == 2  # each image once
    assert batch["caption_index"].tolist() == chosen and batch["image_index"].tolist() == [2, 1, 2, 1]
    for place, caption in enumerate(chosen):
        regions, box, mask = split.features.read([split.image_of[caption]])
        row, n = batch["image_row"][place], mask.sum()
        assert torch.equal(batch["regions"][row][:n], torch.from_numpy(regions[0]))
        assert torch.equal(batch["boxes"][row][:n], torch.from_numpy(box[0]))
        assert batch["region_mask"][row].sum() == n and batch["region_mask"][row][:n].all()
        ids = tokenizer(split.captions[caption])["input_ids"]
        assert batch["word_ids"][place].tolist() == ids + [9] * (6 - len(ids))
        assert batch["word_mask"][place].tolist() == [True] * len(ids) + [False] * (6 - len(ids))


def test_pairs_in_a_loader(pairs):
    split, words = pairs
    dataset = pickle.loads(pickle.dumps(batching.Pairs(split, words)))  # as a worker process gets it
    batches = batching.epoch_batches(split.image_of, 2, 1, seed=0, epoch=0)
    seen = [batch["caption_index"].tolist() for batch in DataLoader(dataset, sampler=batches, batch_size=None)]
    assert seen == batches and len(dataset) == 7


def test_image_batches(pairs):
    split, _ = pairs
    batches = list(batching.image_batches(split, 2))
    assert [batch["image_index"].tolist() for batch in batches] == [[0, 1], [2]]
    assert [tuple(batch["regions"].shape) for batch in batches] == [(2, 3, 4), (1, 5, 4)]
    assert torch.equal(batches[1]["regions"][0], torch.from_numpy(split.features.read([2])[0][0]))
    assert batches[0]["region_mask"].tolist() == [[True, True, False], [True, True, True]]
    assert set(batches[0]) == {"regions", "boxes", "region_mask", "image_index"}


def test_text_batches(pairs, tokenizer):
    split, words = pairs
    batches = list(batching.text_batches(words, 3, pad_id=9))
    order = [i for batch in batches for i in batch["caption_index"].tolist()]
    assert sorted(order) == list(range(7)) and [len(batch["word_ids"]) for batch in batches] == [3, 3, 1]
    lengths = [batch["word_mask"].sum(1).tolist() for batch in batches]
    assert sum(lengths, []) == sorted(sum(lengths, []))
    for batch in batches:
        for ids, mask, caption in zip(batch["word_ids"], batch["word_mask"], batch["caption_index"], strict=True):
            assert ids[mask].tolist() == tokenizer(split.captions[caption])["input_ids"] and (ids[~mask] == 9).all()
            assert batch["word_ids"].shape[1] == batch["word_mask"].sum(1).max()


@pytest.mark.parametrize("each", [1, 2, 5])
def test_epoch_batches(each):
    image_of = np.random.default_rng(1).permutation(np.repeat(np.arange(40), 5))  # captions in any order
    batches = batching.epoch_batches(image_of, 10, each, seed=3, epoch=7)
    captions = sum(batches, [])
    groups = 40 * -(-5 // each)  # 2 captions an image in a round: 2, 2 and 1
    assert len(batches) == groups // (10 // each)
    assert sorted(captions) == list(range(200))
    for batch in batches:
        images, counts = np.unique(image_of[batch], return_counts=True)
        assert len(images) == 10 // each and len(set(counts.tolist())) == 1 and counts[0] in (each, 5 % each)
        assert len(batch) <= 10 and all(type(row) is int for row in batch)
    assert batches == batching.epoch_batches(image_of, 10, each, seed=3, epoch=7)
    others = [batching.epoch_batches(image_of, 10, each, seed=s, epoch=e) for s, e in ((3, 8), (4, 7), (7, 3))]
    assert all(batches != other for other in others)


def test_epoch_batches_of_images_with_different_numbers_of_captions():
    counts = np.arange(12) % 6  # none to five; two images have no caption at all
    image_of = np.repeat(np.arange(12), counts)
    batches = batching.epoch_batches(image_of, 4, 2, seed=0, epoch=0)
    captions = sum(batches, [])
    assert len(captions) == len(set(captions)) >= len(image_of) - 2
    groups = (-(-counts // 2)).sum()
    assert len(batches) == groups // 2
    rounds = [np.minimum(np.maximum(counts - 2 * r, 0), 2) for r in range(3)]  # what each image gives in each round
    for given in rounds[:2]:
        own, captions = captions[: given.sum()], captions[given.sum() :]
        assert np.array_equal(np.bincount(image_of[own], minlength=12), given)


def test_epoch_batches_drop_the_last_only_if_incomplete_and_not_alone():
    image_of = np.arange(10)
    assert [len(batch) for batch in batching.epoch_batches(image_of, 4, 1, 0, 0)] == [4, 4]
    assert [len(batch) for batch in batching.epoch_batches(image_of, 5, 1, 0, 0)] == [5, 5]
    assert [len(batch) for batch in batching.epoch_batches(image_of, 16, 1, 0, 0)] == [10]
    assert [len(batch) for batch in batching.epoch_batches(image_of, 5, 5, 0, 0)] == [5, 5]  # a caption an image
    assert [len(batch) for batch in batching.epoch_batches(image_of.repeat(5), 3, 5, 0, 0)] == [3] * 10 + [2] * 10


# -------------------------------------------------------------------------------------------------------- caption noise


@pytest.fixture(scope="module")
def pieces() -> BertTokenizer:
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] walk ##ing ##s dog sand".split()
    return BertTokenizer(vocab={word: i for i, word in enumerate(words)})


def test_noise_has_the_shares_that_the_released_code_has(pieces):
    """Of many words a fifth is disturbed: a tenth hidden, a fiftieth changed, two in 25 gone."""
    captions = ["dog dog dog dog dog dog dog dog dog dog"] * 3_000
    words = batching.tokenize(captions, pieces, longest=64)
    noisy = batching.CaptionNoise(pieces, 0.2, (0, 0))(words, 0)
    total = 10 * len(captions)
    hidden = (noisy.ids == pieces.mask_token_id).sum() / total
    changed = np.isin(noisy.ids, pieces.convert_tokens_to_ids(["walk", "##ing", "##s", "sand"])).sum() / total
    gone = 1 - (len(noisy.ids) - 2 * len(captions)) / total
    # Standard deviations below 0.002. One random piece in five is the word itself again.
    assert hidden == pytest.approx(0.1, abs=0.01)
    assert changed == pytest.approx(0.02 * 4 / 5, abs=0.006)
    assert gone == pytest.approx(0.08, abs=0.01)


def test_noise_treats_the_pieces_of_a_word_alike_and_leaves_the_ends(pieces):
    words = batching.tokenize(["walking dogs walking sand"] * 500, pieces, longest=64)
    noisy = batching.CaptionNoise(pieces, 0.6, (1, 2))(words, 3)
    starts, ends = noisy.ids[noisy.offsets[:-1]], noisy.ids[noisy.offsets[1:] - 1]
    assert (starts == pieces.cls_token_id).all() and (ends == pieces.sep_token_id).all()
    without_random = batching.CaptionNoise(pieces, 0.6, (1, 2))
    without_random.random = np.array([pieces.mask_token_id])  # so that what is changed is known from what is not
    for start, end in zip(*[(n := without_random(words, 3)).offsets[:-1], n.offsets[1:]], strict=True):
        text = " ".join(pieces.convert_ids_to_tokens(n.ids[start + 1 : end - 1]))
        assert text and set(text.replace("walk ##ing", "").replace("dog ##s", "").replace("sand", "").split()) <= {
            "[MASK]"}


def test_noise_never_takes_all_words_and_none_at_zero(pieces):
    words = batching.tokenize(["dog", "sand", "walk"] * 300, pieces, longest=64)
    noisy = batching.CaptionNoise(pieces, 0.999, (0, 0))(words, 0)
    assert np.diff(noisy.offsets).min() == 3
    calm = batching.CaptionNoise(pieces, 0.0, (0, 0))(words, 0)
    assert np.array_equal(calm.ids, words.ids) and np.array_equal(calm.offsets, words.offsets)


def test_noise_is_a_function_of_the_seed_the_epoch_and_the_batch(pieces):
    words = batching.tokenize(["walking dogs walking sand"] * 50, pieces, longest=64)

    def ids(*seed: int, who: int) -> list[int]:
        return batching.CaptionNoise(pieces, 0.2, seed)(words, who).ids.tolist()

    assert ids(0, 1, who=7) == ids(0, 1, who=7)
    others = ids(0, 1, who=7), ids(0, 2, who=7), ids(1, 1, who=7), ids(0, 1, who=8)
    assert len(set(map(tuple, others))) == 4


def test_noisy_pairs_keep_their_order_and_their_images(pieces):
    captions = ["dog", "sand dog", "walking sand dogs", "sand sand"]
    words = batching.tokenize(captions, pieces, longest=64)
    split = Split("train", captions, np.array([0, 1, 2, 2]), Ragged(), ["0", "1", "2"], [None] * 3)
    plain, noisy = (batching.Pairs(split, words, 0, noise)[[3, 0, 2]]
                    for noise in (None, batching.CaptionNoise(pieces, 0.0, (0, 0))))
    assert plain.keys() == noisy.keys() and all(torch.equal(plain[name], noisy[name]) for name in plain)
    split.clip = np.arange(6, dtype=np.float32).reshape(3, 2)
    assert batching.Pairs(split, words)[[3, 0, 2]]["clip"].tolist() == [[0, 1], [4, 5]]


def test_regions_are_left_out_at_random_and_one_always_stays():
    mask = torch.ones(400, 10, dtype=torch.bool)
    mask[:, 7:] = False
    thin = batching.thinned(mask, 0.3, [0])
    assert not thin[:, 7:].any() and thin.any(1).all()
    assert 0.66 < thin[:, :7].float().mean() < 0.74
    assert torch.equal(thin, batching.thinned(mask, 0.3, [0]))
    assert not torch.equal(thin, batching.thinned(mask, 0.3, [1]))
    assert batching.thinned(mask, 0.999, [0]).sum(1).eq(1).all()
