"""Sentence embeddings against one sentence at a time, and their agreement against numpy."""

import numpy as np
import pytest
import torch

from llmfp4_kernels import evaluate_embeddings as embeddings
from llmfp4_kernels.errors import BadInput

transformers = pytest.importorskip("transformers")
VOCABULARY = 61


class Words:
    """A tokenizer of one token per word: its letters' sum; 0 pads."""

    pad_token, model_max_length = "0", 9

    def __call__(self, sentences, max_length, **kwargs):
        ids = [[1 + sum(map(ord, word)) % (VOCABULARY - 1) for word in s.split()][:max_length] for s in sentences]
        longest = max(map(len, ids))
        padded = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
        return transformers.BatchEncoding({"input_ids": padded, "attention_mask": (padded > 0).long()})


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40,
        max_position_embeddings=12,
    )  # fmt: skip
    return transformers.BertModel(config).eval()


SENTENCES = [" ".join(f"word{i * j % 17}" for j in range(1 + i * 5 % 12)) for i in range(14)]


def test_sentence_embeddings_are_masked_means(encoder):
    """Batches with padding give what one sentence alone gives: its mean hidden state, of length 1, cut at 9 tokens."""
    got = embeddings.sentence_embeddings(encoder, Words(), SENTENCES, batch=5)
    assert got.dtype == torch.float32 and got.shape == (14, 24)
    for sentence, row in zip(SENTENCES, got):
        with torch.no_grad():
            ids = Words()([sentence], max_length=9)["input_ids"]
            mean = encoder(ids).last_hidden_state[0].mean(0)
        torch.testing.assert_close(row, mean / mean.norm(), atol=1e-5, rtol=1e-4)


def test_agreement_with_itself_is_full():
    x = torch.randn(20, 7, generator=torch.Generator().manual_seed(0))
    agreement = embeddings.embedding_agreement(x, 3 * x)
    assert all(value == pytest.approx(1) for value in agreement.values())


def test_agreement_is_the_direct_computation():
    """Query by query with numpy's argsort and corrcoef, on embeddings with noise."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(17, 5, generator=generator)
    y = x + 0.5 * torch.randn(17, 5, generator=generator)
    a, b = ((e / e.norm(dim=1, keepdim=True)).double().numpy() for e in (x, y))
    top1, overlap, rho, pairs = 0, 0, 0, ([], [])
    for i in range(17):
        others = [j for j in range(17) if j != i]
        s, t = a[others] @ a[i], b[others] @ b[i]
        top1 += s.argmax() == t.argmax()
        overlap += len(set(s.argsort()[-4:]) & set(t.argsort()[-4:])) / 4
        rho += np.corrcoef(s.argsort().argsort(), t.argsort().argsort())[0, 1]
        for store, e in zip(pairs, (a, b)):
            store.extend(e[i] @ e[j] for j in range(i))
    expected = {
        "cosine": (a * b).sum(1).mean(), "worst_cosine": (a * b).sum(1).min(), "top1": top1 / 17,
        "overlap": overlap / 17, "rank_correlation": rho / 17, "pearson": np.corrcoef(*pairs)[0, 1],
        "spearman": np.corrcoef(*(np.argsort(np.argsort(p)) for p in pairs))[0, 1],
    }  # fmt: skip
    assert embeddings.embedding_agreement(x, y, top=4) == pytest.approx(expected)


def test_equal_numbers_share_their_rank():
    assert embeddings.ranks(torch.tensor([[3.0, 1.0, 3.0, 0.0], [1, 1, 1, 2]])).tolist() == [
        [2.5, 1, 2.5, 0],
        [1, 1, 1, 3],
    ]


def test_embeddings_refuse_bad_input(encoder):
    with pytest.raises(BadInput, match="at least one string, got a list"):
        embeddings.sentence_embeddings(encoder, Words(), [])
    with pytest.raises(BadInput, match="got a str"):
        embeddings.sentence_embeddings(encoder, Words(), "one sentence")
    with pytest.raises(BadInput, match="got 0"):
        embeddings.sentence_embeddings(encoder, Words(), SENTENCES, batch=0)
    x = torch.randn(12, 3)
    for spoilt, message in [
        (torch.randn(12, 4), r"\[12, 4\] beside \[12, 3\]"),
        (x * torch.nan, "36 values"),
        (x * (torch.arange(12)[:, None] > 1), "2 of 12 quantized embeddings are zero"),
    ]:
        with pytest.raises(BadInput, match=message):
            embeddings.embedding_agreement(x, spoilt)
    with pytest.raises(BadInput, match="n ≥ 12"):
        embeddings.embedding_agreement(x[:11], x[:11])
