"""Real FP4 matmul for LLMs: weights stay packed, two 4-bit floats a byte, and are multiplied as such."""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

# Where each public name lives; loaded on first use, so that the import is silent and quick.
_HOMES = {
    "FP4Embedding": "embedding",
    "FP4GatedLinear": "gated",
    "FP4Linear": "nn",
    "PackedFP4": "packed",
    "Problem": "problem",
    "choose": "registry",
    "explain": "registry",
    "fp4_cache": "integrations.cache",
    "fuse_gated_mlps": "gated",
    "load_dense": "integrations.transformers",
    "load_quantized": "integrations.transformers",
    "quantize_attention": "integrations.attention_search",
    "quantize_model": "quantizer.pipeline",
    "save_quantized": "integrations.transformers",
    "search_linear": "quantizer.search",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
