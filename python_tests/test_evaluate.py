"""Perplexity against a direct computation, token rates, and the texts and ids that are refused."""

import math

import pytest
import torch

from llmfp4_kernels import evaluate
from llmfp4_kernels.errors import BadFile, BadInput

transformers = pytest.importorskip("transformers")
VOCABULARY = 61


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def tokens(count: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (count,), generator=torch.Generator().manual_seed(count))


def direct(model, ids: torch.Tensor, window: int) -> float:
    """Perplexity one window and one token at a time, in float64."""
    logs = []
    for start in range(0, len(ids), window):
        piece = ids[start : start + window]
        with torch.no_grad():
            log_p = model(piece[None]).logits[0].double().log_softmax(-1)
        logs += [log_p[i, piece[i + 1]].item() for i in range(len(piece) - 1)]
    return math.exp(-sum(logs) / len(logs))


@pytest.mark.parametrize(
    "count, window, batch", [(2, 512, 4), (40, 8, 1), (64, 16, 3), (75, 16, 4), (33, 16, 4), (5, 2, 2)]
)
def test_perplexity_is_the_direct_sum(model, count, window, batch):
    """Whole windows, tails of several tokens, and a tail of one token, which has nothing to score."""
    ids = tokens(count)
    assert evaluate.perplexity(model, ids, window, batch) == pytest.approx(direct(model, ids, window), rel=1e-5)


def test_perplexity_of_a_uniform_model_is_the_vocabulary(model):
    with torch.no_grad():
        saved = model.lm_head.weight.clone()
        model.lm_head.weight.zero_()
        assert evaluate.perplexity(model, tokens(50), 16) == pytest.approx(VOCABULARY, rel=1e-6)
        model.lm_head.weight.copy_(saved)


@pytest.mark.parametrize("count", [0, 1])
def test_perplexity_refuses_too_few_tokens(model, count):
    with pytest.raises(BadInput, match=f"got {count}"):
        evaluate.perplexity(model, tokens(count))


def test_perplexity_refuses_wrong_ids(model):
    with pytest.raises(BadInput, match=f"to {VOCABULARY}, the model has {VOCABULARY}"):
        evaluate.perplexity(model, torch.tensor([0, VOCABULARY]))
    with pytest.raises(BadInput, match=r"got torch.float32 \[4\]"):
        evaluate.perplexity(model, torch.zeros(4))
    with pytest.raises(BadInput, match=r"\[2, 4\]"):
        evaluate.perplexity(model, torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(BadInput, match="window = 1"):
        evaluate.perplexity(model, tokens(9), window=1)


def test_perplexity_refuses_a_model_that_gives_nan(model):
    with torch.no_grad():
        saved = model.model.norm.weight.clone()
        model.model.norm.weight.fill_(float("nan"))
        with pytest.raises(BadInput, match="NaN"):
            evaluate.perplexity(model, tokens(20))
        model.model.norm.weight.copy_(saved)


def test_windows_keep_every_token_in_order():
    for count in (1, 7, 16, 50, 64):
        pieces = evaluate.windows(tokens(count), 16, 3)
        assert torch.equal(torch.cat([piece.flatten() for piece in pieces]), tokens(count))
        assert all(piece.shape[0] <= 3 and piece.shape[1] <= 16 for piece in pieces)


def test_decoding_goes_on_from_the_prompt(model, monkeypatch):
    """What is timed is what `generate` computes: the same greedy tokens, each from one new token and the cache."""
    prompt, seen = tokens(6), []
    forward = model.forward

    def spy(ids, **kwargs):
        out = forward(ids, **kwargs)
        seen.append((ids.shape[1], out.logits[0, -1].argmax().item()))
        return out

    monkeypatch.setattr(model, "forward", spy)
    monkeypatch.setattr(evaluate, "_last_logits", lambda model: {"logits_to_keep": 1})
    evaluate._time_decode(model, prompt, 5)
    monkeypatch.undo()
    expected = model.generate(prompt[None], max_new_tokens=6, do_sample=False, eos_token_id=None)[0, 6:].tolist()
    assert [length for length, _ in seen] == [6, 1, 1, 1, 1, 1]
    assert [token for _, token in seen] == expected


def test_rates_are_interleaved_medians(monkeypatch):
    """A B A B, the first round of each being a warm-up: 10 tokens in 1, 2, 9 s are 5 tokens/s."""
    calls, times = [], {"a": iter([50, 1, 2, 9]), "b": iter([50, 4, 4, 4])}

    class Named:
        def __init__(self, name):
            self.name = name

        def eval(self):
            return self

    def seconds(model):
        calls.append(model.name)
        return next(times[model.name])

    rates = evaluate._rates({"a": Named("a"), "b": Named("b")}, 10, seconds, repeats=3)
    assert calls == ["a", "b"] * 4
    assert rates == {"a": 5.0, "b": 2.5}


def test_rates_of_a_model_are_positive(model):
    rates = evaluate.compare_rates({"a": model, "b": model}, tokens(20), prompt_tokens=4, new_tokens=3, repeats=1)
    assert {kind: set(by_name) for kind, by_name in rates.items()} == {"decode": {"a", "b"}, "prefill": {"a", "b"}}
    assert all(rate > 0 for by_name in rates.values() for rate in by_name.values())
    assert evaluate.decode_rate(model, tokens(4), 2, repeats=1) > 0
    assert evaluate.prefill_rate(model, tokens(4), repeats=1) > 0


def test_rates_refuse_nothing_to_do(model):
    with pytest.raises(BadInput, match="got 0 and 3"):
        evaluate.decode_rate(model, tokens(0), 3)
    with pytest.raises(BadInput, match="got 4 and 0"):
        evaluate.decode_rate(model, tokens(4), 0)
    with pytest.raises(BadInput, match="0 tokens"):
        evaluate.prefill_rate(model, tokens(0))
    with pytest.raises(BadInput, match="got 0"):
        evaluate.prefill_rate(model, tokens(4), repeats=0)
    with pytest.raises(BadInput, match="of 21 tokens cannot be taken from 20"):
        evaluate.compare_rates({"a": model}, tokens(20), 21, 3)


class Letters:
    """A tokenizer of one token per letter, which knows no other character."""

    def __call__(self, text, **kwargs):
        return {"input_ids": [ord(c) - 97 for c in text if "a" <= c <= "z"]}


def test_load_ids_reads_strings_and_files(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("abc def" * 100)
    assert evaluate.load_ids(Letters(), "abcd").tolist() == [0, 1, 2, 3]
    assert evaluate.load_ids(Letters(), file, 4).tolist() == [0, 1, 2, 3]
    assert len(evaluate.load_ids(Letters(), file)) == 600


@pytest.mark.parametrize("text", ["", " \n\t", "123"])
def test_load_ids_refuses_a_text_without_tokens(tmp_path, text):
    (tmp_path / "text.txt").write_text(text)
    for source in (text, tmp_path / "text.txt"):
        with pytest.raises(BadInput, match="holds 0 tokens"):
            evaluate.load_ids(Letters(), source)


def test_load_ids_refuses_missing_and_binary_files(tmp_path):
    (tmp_path / "binary").write_bytes(b"abc\xff")
    with pytest.raises(BadFile, match="0xff at 3"):
        evaluate.load_ids(Letters(), tmp_path / "binary")
    with pytest.raises(BadFile, match="there is no text file"):
        evaluate.load_ids(Letters(), tmp_path / "missing")
