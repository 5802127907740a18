"""A KV cache of packed 4-bit codes, for models whose attention rounds keys and values to FP4 anyway."""

from __future__ import annotations

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicLayer

from ..errors import BadInput
from ..formats import FP4_ELEMENTS
from ..packed import pack, unpack
from ..quantizer.products import Operand
from ..reference import decode, encode
from .attention import AttentionOperands, attention_operands


def _pack(x: torch.Tensor, operand: Operand) -> torch.Tensor:
    return pack(encode(x.float() * (1 / operand.scale), operand.element))


def _unpack(codes: torch.Tensor, operand: Operand, d: int, dtype: torch.dtype) -> torch.Tensor:
    return (decode(unpack(codes, d), operand.element) * operand.scale).to(dtype)


class FP4CacheLayer(DynamicLayer):
    """keys and values are codes, uint8 [b, key heads, t, ceil(d/2)]: what selects, crops or moves them stays as it is.

    The attention rounds what `update` returns to the codes it came from: the cache changes no bit of the output.
    """

    def __init__(self, operands: AttentionOperands):
        super().__init__()
        self.operands = operands

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = torch.tensor([], dtype=torch.uint8, device=self.device)
        self.values = self.keys.clone()
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """All keys and values [b, key heads, t, d] after the new ones, rounded, in the dtype of the new ones."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        key, value = self.operands.key, self.operands.value
        self.keys = torch.cat([self.keys, _pack(key_states, key)], dim=-2)
        self.values = torch.cat([self.values, _pack(value_states, value)], dim=-2)
        return (
            _unpack(self.keys, key, key_states.shape[-1], key_states.dtype),
            _unpack(self.values, value, value_states.shape[-1], value_states.dtype),
        )


def fp4_cache(model: nn.Module) -> Cache:
    """An empty cache for `past_key_values` of a decoder whose attention is quantized: d/2 bytes per key and value.

    It saves memory, not time: all of it is decoded at every step. Raises BadInput unless every attention layer has
    4-bit keys and values, and for encoder-decoders and sliding windows.
    """
    modules = dict(model.named_modules())
    layers = {modules[name].layer_idx: operands for name, operands in attention_operands(model).items()}
    if not layers or sorted(layers) != list(range(model.config.get_text_config(decoder=True).num_hidden_layers)):
        raise BadInput(
            f"{type(model).__name__} has FP4 attention in {len(layers)} layers: quantize_attention comes first"
        )
    wide = [i for i, o in layers.items() if not all(x and x.element.name in FP4_ELEMENTS for x in (o.key, o.value))]
    if wide:
        raise BadInput(f"{len(wide)} of {len(layers)} layers, such as {wide[0]}, have no 4-bit keys and values")
    kinds = set(getattr(model.config, "layer_types", None) or ["full_attention"]) - {"full_attention"}
    if kinds or model.config.is_encoder_decoder or getattr(model.config, "sliding_window", None):
        raise BadInput(f"{type(model).__name__} needs a cache for {sorted(kinds) or 'cross or sliding attention'}")
    return Cache(layers=[FP4CacheLayer(layers[i]) for i in range(len(layers))])
