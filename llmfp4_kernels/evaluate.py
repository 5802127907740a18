"""Perplexity on a text, and tokens per second of decode and prefill, of any causal language model of transformers."""

from __future__ import annotations

import inspect
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from .errors import BadFile, BadInput

CHARACTERS_PER_TOKEN = 32
"""No more of a file than this many characters for each token wanted is read; English has 4 to 5."""


def read_text(path: str | Path, max_characters: int = -1) -> str:
    """The first characters of a UTF-8 file; raises BadFile if it is missing or not UTF-8."""
    if not Path(path).is_file():
        raise BadFile(f"there is no text file {path}")
    try:
        with open(path, encoding="utf-8") as file:
            return file.read(max_characters)
    except UnicodeDecodeError as error:
        raise BadFile(f"{path} is not UTF-8 text: byte {error.object[error.start]:#04x} at {error.start}") from error


def load_ids(tokenizer, text: str | Path, max_tokens: int | None = None) -> torch.Tensor:
    """The first tokens (int64 [tokens]) of a text, given as a string, or as a Path of a UTF-8 file.

    Raises BadFile for a missing file, BadInput if the text holds no token.
    """
    source = str(text) if isinstance(text, Path) else "the text"
    if isinstance(text, Path):
        text = read_text(text, CHARACTERS_PER_TOKEN * max_tokens if max_tokens else -1)
    if not text.strip():
        raise BadInput(f"{source} holds 0 tokens: it has {len(text)} characters, none of them printable")
    # verbose=False: the whole text is longer than the model's context on purpose.
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
    if not len(ids):
        raise BadInput(f"{source} holds 0 tokens of this tokenizer in {len(text)} characters")
    return ids[:max_tokens]


def windows(ids: torch.Tensor, window: int, batch: int) -> list[torch.Tensor]:
    """ids [tokens] cut into [≤ batch, window] pieces, in order; a shorter last window comes alone as [1, tail]."""
    if ids.ndim != 1 or ids.dtype != torch.int64:
        raise BadInput(f"token ids must be int64 of shape [tokens], got {ids.dtype} {list(ids.shape)}")
    if window < 2 or batch < 1:
        raise BadInput(f"window must be at least 2 and batch at least 1, got window = {window}, batch = {batch}")
    whole = len(ids) // window * window
    pieces = list(ids[:whole].view(-1, window).split(batch)) if whole else []
    return pieces + ([ids[None, whole:]] if whole < len(ids) else [])


@torch.inference_mode()
def perplexity(model, ids: torch.Tensor, window: int = 512, batch: int = 4) -> float:
    """exp(-mean log-likelihood) of ids [tokens] in windows that do not overlap.

    A window's first token is conditioned on nothing and is not scored. Log-likelihoods are summed in float64.
    Raises BadInput for fewer than 2 tokens, ids outside the vocabulary, and a model whose output is NaN.
    """
    if ids.numel() < 2:
        raise BadInput(f"perplexity needs at least 2 tokens, got {ids.numel()}")
    vocabulary = model.config.vocab_size
    if int(ids.max()) >= vocabulary or int(ids.min()) < 0:
        raise BadInput(f"token ids run from {int(ids.min())} to {int(ids.max())}, the model has {vocabulary}")
    model.eval()
    total, scored = 0.0, 0
    for piece in windows(ids, window, batch):
        if piece.shape[1] < 2:
            continue
        logits = model(piece.to(model.device), use_cache=False).logits[:, :-1]
        for row, target in zip(logits, piece[:, 1:]):  # one window at a time: float32 [window, vocabulary] is large
            loss = torch.nn.functional.cross_entropy(row.float(), target.to(row.device), reduction="none")
            total, scored = total + loss.double().sum().item(), scored + len(target)
    if not math.isfinite(total):
        raise BadInput(f"the model's log-likelihood of {scored} tokens is {-total}: its output holds NaN or Inf")
    return math.exp(total / scored)


def _last_logits(model) -> dict:
    """The option that computes logits of the last token only, as generation does, where the model has it."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


@torch.inference_mode()
def _time_decode(model, prompt_ids: torch.Tensor, new_tokens: int) -> float:
    """Seconds of `new_tokens` greedy steps after the prompt [tokens]; the prompt itself is not timed."""
    out = model(prompt_ids[None].to(model.device), use_cache=True, **_last_logits(model))
    started = time.perf_counter()
    for _ in range(new_tokens):
        token = out.logits[:, -1:].argmax(-1)
        out = model(token, past_key_values=out.past_key_values, use_cache=True)
    out.logits[0, -1, 0].item()  # waits for a GPU
    return time.perf_counter() - started


@torch.inference_mode()
def _time_prefill(model, ids: torch.Tensor) -> float:
    """Seconds from a prompt [tokens] to the logits of the next token and a filled KV cache."""
    started = time.perf_counter()
    out = model(ids[None].to(model.device), use_cache=True, **_last_logits(model))
    out.logits[0, -1, 0].item()
    return time.perf_counter() - started


def _rates(models: dict, tokens: int, seconds: Callable[[object], float], repeats: int) -> dict[str, float]:
    """Tokens/s of each model: the median of repeats in the order A, B, A, B after one warm-up of each.

    Interleaved, because on a shared machine the clock and the neighbours change from second to second.
    """
    if repeats < 1:
        raise BadInput(f"repeats must be at least 1, got {repeats}")
    times = {name: [] for name in models}
    for repeat in range(repeats + 1):
        for name, model in models.items():
            elapsed = seconds(model.eval())
            if repeat:
                times[name].append(elapsed)
    return {name: tokens / statistics.median(t) for name, t in times.items()}


def decode_rates(models: dict, prompt_ids: torch.Tensor, new_tokens: int, repeats: int = 3) -> dict[str, float]:
    """Tokens/s of greedy decoding with a KV cache after prompt_ids [tokens], for {name: model}, interleaved."""
    if not len(prompt_ids) or new_tokens < 1:
        raise BadInput(f"decoding needs a prompt and new tokens, got {len(prompt_ids)} and {new_tokens} tokens")
    return _rates(models, new_tokens, lambda model: _time_decode(model, prompt_ids, new_tokens), repeats)


def prefill_rates(models: dict, ids: torch.Tensor, repeats: int = 3) -> dict[str, float]:
    """Prompt tokens/s from ids [tokens] to the next token's logits, for {name: model}, interleaved."""
    if not len(ids):
        raise BadInput("prefill needs a prompt, got 0 tokens")
    return _rates(models, len(ids), lambda model: _time_prefill(model, ids), repeats)


def compare_rates(models: dict, ids: torch.Tensor, prompt_tokens: int, new_tokens: int, repeats: int = 3) -> dict:
    """{"decode": {name: tokens/s}, "prefill": {name: tokens/s}}: prefill of ids [tokens], decode after a part of it."""
    if not 1 <= prompt_tokens <= len(ids):
        raise BadInput(f"a prompt of {prompt_tokens} tokens cannot be taken from {len(ids)} tokens")
    return {
        "decode": decode_rates(models, ids[:prompt_tokens], new_tokens, repeats),
        "prefill": prefill_rates(models, ids, repeats),
    }


def decode_rate(model, prompt_ids: torch.Tensor, new_tokens: int, repeats: int = 3) -> float:
    """`decode_rates` of one model."""
    return decode_rates({"model": model}, prompt_ids, new_tokens, repeats)["model"]


def prefill_rate(model, ids: torch.Tensor, repeats: int = 3) -> float:
    """`prefill_rates` of one model."""
    return prefill_rates({"model": model}, ids, repeats)["model"]
