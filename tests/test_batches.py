"""data.py: word pieces, caption noise, and which captions meet in a batch."""
import pickle

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch.utils.data import DataLoader
from transformers import BertTokenizer, PreTrainedTokenizerFast

import data
from data import Split
from sources.files import BadInput


@pytest.fixture
def tokenizer():
    words = "[PAD] [UNK] [CLS] [SEP] a red ball two dogs play blue house".split()
    core = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    core.normalizer, core.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


def test_tokenize(tokenizer):
    words = data.tokenize(["a red ball", "dogs", "A blue house two dogs"], tokenizer, longest=6)
    assert [ids.tolist() for ids in words] == [[2, 4, 5, 6, 3], [2, 8, 3], [2, 4, 10, 11, 7, 3]]  # cut before [SEP]
    assert all(ids.dtype == np.int32 for ids in words)
    with pytest.raises(BadInput, match="caption 2 of 2.*no word"):
        data.tokenize(["dogs", "\u200b"], tokenizer, longest=6)


def test_tokenize_more_than_a_chunk(tokenizer):
    words = data.tokenize(["dogs", "a ball"] * 5_001, tokenizer, longest=9)
    assert [ids.tolist() for ids in words] == [[2, 8, 3], [2, 4, 6, 3]] * 5_001


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
    return split, data.tokenize(captions, tokenizer, longest=9)


def test_pairs(pairs, tokenizer):
    split, words = pairs
    chosen = [6, 1, 3, 2]  # of the images 2, 1, 2, 1
    batch = data.Pairs(split, words)[chosen]
    assert {name: value.dtype for name, value in batch.items()} == {
        "regions": torch.float32, "boxes": torch.float32, "region_mask": torch.bool, "word_ids": torch.int64,
        "word_mask": torch.bool, "image_row": torch.int64, "image_index": torch.int64, "caption_index": torch.int64,
    }
    assert len(batch["regions"]) == 2  # each image once
    assert batch["caption_index"].tolist() == chosen and batch["image_index"].tolist() == [2, 1, 2, 1]
    for place, caption in enumerate(chosen):
        regions, box, mask = split.features.read([split.image_of[caption]])
        row, n = batch["image_row"][place], mask.sum()
        assert torch.equal(batch["regions"][row][:n], torch.from_numpy(regions[0]))
        assert torch.equal(batch["boxes"][row][:n], torch.from_numpy(box[0]))
        assert batch["region_mask"][row].sum() == n and batch["region_mask"][row][:n].all()
        ids = tokenizer(split.captions[caption])["input_ids"]
        assert batch["word_ids"][place].tolist() == ids + [0] * (6 - len(ids))
        assert batch["word_mask"][place].tolist() == [True] * len(ids) + [False] * (6 - len(ids))


def test_pairs_in_a_loader(pairs):
    split, words = pairs
    dataset = pickle.loads(pickle.dumps(data.Pairs(split, words)))  # as a worker process gets it
    batches = data.epoch_batches(split.image_of, 2, 1, seed=0, epoch=0)
    seen = [batch["caption_index"].tolist() for batch in DataLoader(dataset, sampler=batches, batch_size=None)]
    assert seen == batches


def test_image_batches(pairs):
    split, _ = pairs
    batches = list(data.image_batches(split, 2))
    assert [batch["image_index"].tolist() for batch in batches] == [[0, 1], [2]]
    assert [tuple(batch["regions"].shape) for batch in batches] == [(2, 3, 4), (1, 5, 4)]
    assert torch.equal(batches[1]["regions"][0], torch.from_numpy(split.features.read([2])[0][0]))
    assert batches[0]["region_mask"].tolist() == [[True, True, False], [True, True, True]]
    assert set(batches[0]) == {"regions", "boxes", "region_mask", "image_index"}


def test_text_batches(pairs, tokenizer):
    split, words = pairs
    batches = list(data.text_batches(words, 3))
    order = [i for batch in batches for i in batch["caption_index"].tolist()]
    assert sorted(order) == list(range(7)) and [len(batch["word_ids"]) for batch in batches] == [3, 3, 1]
    lengths = [batch["word_mask"].sum(1).tolist() for batch in batches]
    assert sum(lengths, []) == sorted(sum(lengths, []))
    for batch in batches:
        for ids, mask, caption in zip(batch["word_ids"], batch["word_mask"], batch["caption_index"], strict=True):
            assert ids[mask].tolist() == tokenizer(split.captions[caption])["input_ids"] and (ids[~mask] == 0).all()
            assert batch["word_ids"].shape[1] == batch["word_mask"].sum(1).max()


@pytest.mark.parametrize("each", [1, 2, 5])
def test_epoch_batches(each):
    image_of = np.random.default_rng(1).permutation(np.repeat(np.arange(40), 5))  # captions in any order
    batches = data.epoch_batches(image_of, 10, each, seed=3, epoch=7)
    captions = sum(batches, [])
    groups = 40 * -(-5 // each)  # with two captions per image, the rounds take 2, 2 and 1
    assert len(batches) == groups // (10 // each)
    assert sorted(captions) == list(range(200))
    for batch in batches:
        images, counts = np.unique(image_of[batch], return_counts=True)
        assert len(images) == 10 // each and len(set(counts.tolist())) == 1 and counts[0] in (each, 5 % each)
        assert len(batch) <= 10 and all(type(row) is int for row in batch)
    assert batches == data.epoch_batches(image_of, 10, each, seed=3, epoch=7)
    stored = data.epoch_batches(np.repeat(np.arange(40), 4), 8, 2, seed=0, epoch=0)[0]  # as in the stored results
    assert stored == [44, 47, 91, 88, 117, 116, 86, 85]
    others = [data.epoch_batches(image_of, 10, each, seed=s, epoch=e) for s, e in ((3, 8), (4, 7), (7, 3))]
    assert all(batches != other for other in others)


def test_the_order_of_the_images_and_the_captions_that_meet_differ_by_epoch():
    image_of = np.repeat(np.arange(40), 4)
    epochs = [data.epoch_batches(image_of, 8, 2, seed=0, epoch=epoch) for epoch in (0, 1)]
    pairs = [[batch[place : place + 2] for batch in batches for place in (0, 2, 4, 6)] for batches in epochs]
    images = [[int(image_of[one]) for one, _ in each[:40]] for each in pairs]  # in the order of the first round
    assert images[0] != images[1] and sorted(images[0]) == list(range(40)) != images[0]
    assert set(map(frozenset, pairs[0])) != set(map(frozenset, pairs[1]))


def test_epoch_batches_of_images_with_different_numbers_of_captions():
    counts = np.arange(12) % 6  # none to five; two images have no caption at all
    image_of = np.repeat(np.arange(12), counts)
    batches = data.epoch_batches(image_of, 4, 2, seed=0, epoch=0)
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
    assert [len(batch) for batch in data.epoch_batches(image_of, 4, 1, 0, 0)] == [4, 4]
    assert [len(batch) for batch in data.epoch_batches(image_of, 5, 1, 0, 0)] == [5, 5]
    assert [len(batch) for batch in data.epoch_batches(image_of, 16, 1, 0, 0)] == [10]
    assert [len(batch) for batch in data.epoch_batches(image_of, 5, 5, 0, 0)] == [5, 5]  # one caption per image
    assert [len(batch) for batch in data.epoch_batches(image_of.repeat(5), 3, 5, 0, 0)] == [3] * 16  # one each


@pytest.mark.parametrize("counts, batch_size, each, left_out", [
    ([5] * 3, 2, 1, 0),             # an image may be the last of one round and the first of the next
    ([90] + [2] * 9, 10, 2, 88),    # after the first round one image alone has captions left
    ([5, 3], 4, 2, 2),              # the first gives no more than the second has, also in its last round
    ([7, 7, 1], 4, 2, 0)])
def test_no_batch_has_a_single_image(counts, batch_size, each, left_out):
    image_of = np.repeat(np.arange(len(counts)), counts)
    for epoch in range(50):
        batches = data.epoch_batches(image_of, batch_size, each, 0, epoch)
        assert all(len(set(image_of[batch])) > 1 for batch in batches)
        captions = sum(batches, [])
        assert len(captions) == len(set(captions)) >= len(image_of) - left_out - batch_size + 1
        assert np.bincount(image_of[captions]).max() <= sorted(counts)[-2]


def test_one_image_with_many_captions_does_not_make_the_batches_smaller():
    image_of = np.repeat(np.arange(101), [5] + [1] * 100)
    assert [len(batch) for batch in data.epoch_batches(image_of, 20, 5, 0, 0)] == [20] * 5


# -------------------------------------------------------------------------------------------------------- caption noise


@pytest.fixture(scope="module")
def pieces() -> BertTokenizer:
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] walk ##ing ##s dog sand".split()
    return BertTokenizer(vocab={word: i for i, word in enumerate(words)})


def noisy(words: list[np.ndarray], pieces: BertTokenizer, chance: float, *seed: int) -> list[np.ndarray]:
    noise, rng = data.CaptionNoise(pieces, chance), np.random.default_rng(seed)
    return [noise(ids, rng) for ids in words]


def test_noise_has_the_shares_that_the_released_code_has(pieces):
    """Of many words a fifth is disturbed: a tenth hidden, a fiftieth changed, two in 25 gone."""
    captions = ["dog dog dog dog dog dog dog dog dog dog"] * 3_000
    ids = np.concatenate(noisy(data.tokenize(captions, pieces, longest=64), pieces, 0.2, 0))
    total = 10 * len(captions)
    hidden = (ids == pieces.mask_token_id).sum() / total
    changed = np.isin(ids, pieces.convert_tokens_to_ids(["walk", "##ing", "##s", "sand"])).sum() / total
    gone = 1 - (len(ids) - 2 * len(captions)) / total
    # Standard deviations below 0.002. One random piece in five is the word itself again.
    assert hidden == pytest.approx(0.1, abs=0.01)
    assert changed == pytest.approx(0.02 * 4 / 5, abs=0.006)
    assert gone == pytest.approx(0.08, abs=0.01)


def test_noise_treats_the_pieces_of_a_word_alike_and_leaves_the_ends(pieces):
    words = data.tokenize(["walking dogs walking sand"] * 500, pieces, longest=64)
    for ids in noisy(words, pieces, 0.6, 1):
        assert ids[0] == pieces.cls_token_id and ids[-1] == pieces.sep_token_id
    noise, rng = data.CaptionNoise(pieces, 0.6), np.random.default_rng(3)
    noise.ordinary = np.array([pieces.mask_token_id])  # so that what is changed is known from what is not
    for ids in words:
        text = " ".join(pieces.convert_ids_to_tokens(noise(ids, rng)[1:-1]))
        assert text and set(text.replace("walk ##ing", "").replace("dog ##s", "").replace("sand", "").split()) <= {
            "[MASK]"}


def test_a_caption_that_begins_inside_a_word_gets_its_noise_too(pieces):
    ids = np.array(pieces.convert_tokens_to_ids(["[CLS]", "##ing", "dog", "[SEP]"]), np.int32)
    assert noisy([ids], pieces, 0.0, 0)[0].tolist() == ids.tolist()


def test_noise_never_takes_all_words_and_none_at_zero(pieces):
    words = data.tokenize(["dog", "sand", "walk"] * 300, pieces, longest=64)
    assert min(map(len, noisy(words, pieces, 0.999, 0))) == 3
    assert all(np.array_equal(a, b) for a, b in zip(noisy(words, pieces, 0.0, 0), words, strict=True))


def test_noise_is_a_function_of_the_seed_the_epoch_and_the_batch(pieces):
    captions = ["walking dogs walking sand"] * 50
    words = data.tokenize(captions, pieces, longest=64)
    split = Split("train", captions, np.zeros(50, np.int64), Ragged(), ["0", "1", "2"], [None] * 3)

    def ids(*seed: int, first: int) -> list[int]:
        pairs = data.Pairs(split, words, data.CaptionNoise(pieces, 0.5), seed)
        return pairs[[first, *range(10, 40)]]["word_ids"][1:].flatten().tolist()

    assert ids(0, 1, first=7) == ids(0, 1, first=7)
    others = ids(0, 1, first=7), ids(0, 2, first=7), ids(1, 1, first=7), ids(0, 1, first=8)
    assert len(set(map(tuple, others))) == 4
    batch = data.Pairs(split, words, data.CaptionNoise(pieces, 0.5), (0, 1))[list(range(10, 40))]
    assert len(set(map(tuple, batch["word_ids"].tolist()))) > 10  # though all are one text


def test_noisy_pairs_keep_their_order_and_their_images(pieces):
    captions = ["dog", "sand dog", "walking sand dogs", "sand sand"]
    words = data.tokenize(captions, pieces, longest=64)
    split = Split("train", captions, np.array([0, 1, 2, 2]), Ragged(), ["0", "1", "2"], [None] * 3)
    plain, calm = (data.Pairs(split, words, noise)[[3, 0, 2]]
                   for noise in (None, data.CaptionNoise(pieces, 0.0)))
    assert plain.keys() == calm.keys() and all(torch.equal(plain[name], calm[name]) for name in plain)
    split.clip = np.arange(6, dtype=np.float32).reshape(3, 2)
    assert data.Pairs(split, words)[[3, 0, 2]]["clip"].tolist() == [[0, 1], [4, 5]]


def test_a_changed_word_may_become_any_ordinary_piece(pieces):
    ids = np.concatenate(noisy(data.tokenize(["dog dog dog dog"] * 3_000, pieces, longest=64), pieces, 0.9, 0))
    assert set(ids.tolist()) == set(range(len(pieces))) - {pieces.pad_token_id, pieces.unk_token_id}


def test_a_piece_with_number_0_is_a_word_too():
    assert data.pad([np.array([2, 0, 3], np.int32), np.array([2, 3], np.int32)])["word_mask"].tolist() == [
        [True, True, True], [True, True, False]]


def test_image_batches_of_some_images(pairs):
    batches = list(data.image_batches(pairs[0], 2, np.array([2, 0])))
    assert [batch["image_index"].tolist() for batch in batches] == [[2, 0]]
    assert batches[0]["region_mask"].sum(1).tolist() == [5, 2] and batches[0]["regions"][:, 0, 0].tolist() == [2, 0]
