"""Sentence embeddings of an encoder of transformers, and how far those of a quantized one agree with them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .errors import BadInput
from .reference import require_finite


def _max_tokens(model, tokenizer) -> int:
    return min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", tokenizer.model_max_length))


def _check_sentences(tokenizer, sentences, batch: int) -> None:
    if isinstance(sentences, str) or not len(sentences) or not all(isinstance(s, str) for s in sentences):
        raise BadInput(f"sentences must be a list of at least one string, got a {type(sentences).__name__}")
    if batch < 1:
        raise BadInput(f"batch must be at least 1, got {batch}")
    if tokenizer.pad_token is None:
        raise BadInput(f"the tokenizer has no padding token, which batches of {batch} sentences need")


@torch.inference_mode()
def sentence_embeddings(model, tokenizer, sentences: Sequence[str], batch: int = 32) -> torch.Tensor:
    """float32 [sentences, hidden]: the mean of a sentence's last hidden states, normalised to length 1.

    That is the convention of sentence-transformers' all-MiniLM-L6-v2. Sentences run in the order of their length, with
    little padding; what is longer than the model's context is cut. Raises BadInput for no sentences, a tokenizer
    without a padding token, and NaN.
    """
    _check_sentences(tokenizer, sentences, batch)
    model.eval()
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    rows: list[torch.Tensor | None] = [None] * len(sentences)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        inputs = tokenizer([sentences[i] for i in chosen], padding=True, truncation=True, return_tensors="pt",
                           max_length=_max_tokens(model, tokenizer)).to(model.device)  # fmt: skip
        hidden = model(**inputs).last_hidden_state.float()
        attended = inputs["attention_mask"][..., None].to(hidden.dtype)
        mean = (hidden * attended).sum(1) / attended.sum(1)
        for i, row in zip(chosen, torch.nn.functional.normalize(mean, dim=1).cpu()):
            rows[i] = row
    embeddings = torch.stack(rows)
    require_finite("embeddings", embeddings)
    return embeddings


def ranks(x: torch.Tensor) -> torch.Tensor:
    """The rank (float64, from 0) of each x [..., n] among its row; equal numbers share the mean of their ranks."""
    ordered, positions = x.sort(-1)
    below, above = (torch.searchsorted(ordered, ordered, side=side) for side in ("left", "right"))
    shared = (below + above - 1).double() / 2
    return torch.empty_like(shared).scatter_(-1, positions, shared)


def correlation(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Pearson's correlation along the last dimension, float64; NaN where one side is constant."""
    a, b = a.double(), b.double()
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    return (a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1)).sqrt()


def _others(similarity: torch.Tensor) -> torch.Tensor:
    """[n, n] → [n, n - 1]: without each sentence's similarity to itself."""
    n = len(similarity)
    return similarity.flatten()[1:].view(n - 1, n + 1)[:, :-1].reshape(n, n - 1)


def embedding_agreement(reference: torch.Tensor, quantized: torch.Tensor, top: int = 10) -> dict[str, float]:
    """How well embeddings [n, d] of a quantized model keep those of the full-precision one, in float64.

    cosine, worst_cosine  of each sentence to its full-precision embedding: the mean, and the least
    pearson, spearman     of the cosine similarities of all n(n-1)/2 pairs
    top1                  share of sentences whose nearest other sentence is the same
    overlap               mean share of the `top` nearest that both hold
    rank_correlation      mean over queries of Spearman's correlation of the ranking of all other sentences

    Raises BadInput for NaN, a row of zeros, shapes that differ, and n < top + 2.
    """
    for name, x in (("reference", reference), ("quantized", quantized)):
        if x.ndim != 2 or x.shape != reference.shape or len(x) < top + 2:
            raise BadInput(
                f"{name} embeddings are {list(x.shape)} beside {list(reference.shape)}: expected two equal shapes "
                f"[n ≥ {top + 2}, d]"
            )
        require_finite(f"{name} embeddings", x)
        zeros = int((x == 0).all(1).sum())
        if zeros:
            raise BadInput(f"{zeros} of {len(x)} {name} embeddings are zero and have no direction")
    a, b = (torch.nn.functional.normalize(x.double(), dim=1) for x in (reference, quantized))
    cosine = (a * b).sum(1)
    pairs = torch.triu_indices(len(a), len(a), 1)
    similar_a, similar_b = a @ a.T, b @ b.T
    pairs_a, pairs_b = similar_a[pairs[0], pairs[1]], similar_b[pairs[0], pairs[1]]
    others_a, others_b = _others(similar_a), _others(similar_b)
    nearest_a, nearest_b = (x.topk(top, 1).indices for x in (others_a, others_b))
    return {
        "cosine": cosine.mean().item(),
        "worst_cosine": cosine.min().item(),
        "pearson": correlation(pairs_a, pairs_b).item(),
        "spearman": correlation(ranks(pairs_a), ranks(pairs_b)).item(),
        "top1": (nearest_a[:, 0] == nearest_b[:, 0]).double().mean().item(),
        "overlap": (nearest_a[:, :, None] == nearest_b[:, None]).any(2).double().mean().item(),
        "rank_correlation": correlation(ranks(others_a), ranks(others_b)).mean().item(),
    }
