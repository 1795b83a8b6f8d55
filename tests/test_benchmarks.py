"""What the benchmarks compute themselves: the verdict on a claim, the matcher they compare with, the shortened BERT."""
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, BertModel

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import bundle
import claims


def test_a_claim_holds_where_student_s_interval_excludes_zero():
    assert claims.verdict([5.0, 6.0, 7.0]) == "yes"             # 6 +- 2.5
    assert claims.verdict([-5.0, -6.0, -7.0]).startswith("**no")
    assert claims.verdict([0.0, 6.0, 12.0]) == "cannot tell: within 20.9"    # 6 +- 14.9
    assert claims.verdict([2.0, 2.0 + 1e-9]) == "yes" and claims.verdict([2.0, 3.0]).startswith("cannot tell")
    assert claims.verdict([9.0]) == "too few seeds"


def test_every_claim_compares_arms_that_are_trained():
    for _, (a, how_a), (b, how_b) in claims.CLAIMS + claims.OURS:
        assert {a, b} <= claims.ARMS.keys() and {how_a, how_b} <= {"global", "local", "mixed", "two_stage"}


def test_cross_attention_by_loops():
    g = torch.Generator().manual_seed(0)
    words, regions = (F.normalize(torch.randn(*shape, generator=g), dim=-1) for shape in ((3, 5), (2, 4, 5)))
    for image, found in enumerate(claims.cross_attention(words, regions).tolist()):
        total = 0.0
        dots = torch.stack([F.normalize((words @ region).clamp(min=0), dim=0) for region in regions[image]])  # [4, 3]
        for word in range(3):
            weights = [math.exp(9 * dots[region, word]) for region in range(4)]
            attended = sum(w * regions[image, region] for region, w in enumerate(weights)) / sum(weights)
            total += F.cosine_similarity(words[word], attended, dim=0).item() / 3
        assert found == pytest.approx(total, abs=1e-5)


def test_a_bert_cut_to_the_words_of_some_captions_reads_them_alike(bert, tmp_path):
    captions = ["a dog runs", "a cat"]
    bundle.shorten(str(bert), captions, tmp_path / "short")
    states = []
    for folder, dtype in ((bert, torch.float16), (tmp_path / "short", torch.float16)):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = BertModel.from_pretrained(folder, add_pooling_layer=False).to(dtype).float().eval()
        with torch.no_grad():
            given = tokenizer(captions, padding=True, return_tensors="pt")
            states.append(model(input_ids=given["input_ids"], attention_mask=given["attention_mask"])[0])
    assert torch.allclose(*states, atol=1e-4)
    assert model.config.vocab_size < BertModel.from_pretrained(bert).config.vocab_size
