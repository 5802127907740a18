"""A causal language model on transformers' static cache: prefill and greedy decode as steps that ask the host nothing,
as CUDA graphs need them."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from llmfp4_kernels.backends.graphs import GraphTurns


class EagerTurns:
    """GraphTurns without a graph: a call at a time, by the clock. For a CPU."""

    def __init__(self, call: Callable):
        self.call = call

    def replayed(self, times: int) -> float:
        """Seconds of so many calls."""
        started = time.perf_counter()
        for _ in range(times):
            self.call()
        return time.perf_counter() - started


class StaticSession:
    """One sequence of batch 1: `prefill` takes the prompt, each `decode` appends the likeliest token.

    ids [1, tokens] is the prompt; room the tokens that may follow. What is not in the cache yet is masked: attention
    reads the whole cache at every step, as transformers does with it. Call under torch.inference_mode.
    """

    def __init__(self, model, ids: torch.Tensor, room: int):
        from transformers import StaticCache

        config, device = model.config, ids.device
        self.model, self.ids, self.tokens = model, ids, ids.shape[1]
        self.cache = StaticCache(config=config, max_cache_len=self.tokens + room)
        heads = {"num_heads": config.num_key_value_heads, "head_dim": config.head_dim}
        self.cache.early_initialization(1, dtype=model.lm_head.weight.dtype, device=device, **heads)
        self.slots = torch.arange(self.tokens + room, device=device)
        self.positions = self.slots[None, : self.tokens]
        self.token = torch.zeros(1, 1, dtype=torch.int64, device=device)
        self.position = torch.zeros(1, 1, dtype=torch.int64, device=device)

    def seek(self, tokens: int) -> None:
        """The next step is the one after so many tokens, which the cache holds."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(tokens)
        self.position.fill_(tokens)

    def prefill(self) -> torch.Tensor:
        """Logits [1, vocabulary] of the token after the prompt."""
        self.seek(0)
        return self._forward(self.ids, self.positions)

    def decode(self) -> torch.Tensor:
        """Logits [1, vocabulary] of the token after the last one that was found."""
        return self._forward(self.token, self.position.clone())

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        seen = self.slots <= positions[0, :, None]
        logits = self.model(
            input_ids=ids, position_ids=positions, attention_mask=seen[None, None], past_key_values=self.cache,
            use_cache=True, logits_to_keep=1,
        ).logits[:, -1]  # fmt: skip
        self.token.copy_(logits.argmax(-1, keepdim=True))
        self.position.copy_(positions[:, -1:] + 1)
        return logits

    def turns(self) -> dict:
        """{"prefill", "decode"}: with replayed(times), as graphs on a GPU. Decoding needs room: `seek` before."""
        calls = {"prefill": self.prefill, "decode": self.decode}
        if self.ids.device.type == "cpu":
            return {phase: EagerTurns(call) for phase, call in calls.items()}
        return {phase: GraphTurns([lambda _, call=call: call()], self.ids) for phase, call in calls.items()}
