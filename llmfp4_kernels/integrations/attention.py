"""4-bit operands of QK^T and PV in transformers models, through transformers' attention interface (LLM-FP4 section 4).

Simulated: operands are rounded to the grid of their format and multiplied in float32; there are no packed kernels for
these products. Products of 4-bit elements are small integers times a power of two, so their float32 sums are exact (to
2^16 terms and more) and equal whatever the order. The KV cache keeps what the model puts there: keys and values are
rounded when they are read. Where it shall hold codes, cache.fp4_cache makes one.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from ..errors import BadInput
from ..formats import element
from ..packed import FORMAT
from ..quantizer.products import Operand

_MORE_THAN_SOFTMAX = (
    "softcap",
    "s_aux",
    "sinks",
    "position_bias",
    "indices",
    "block_indices",
    "cu_seq_lens_q",
    "cache",
)
"""Arguments of some models' attention that change its result; the others (is_causal, windows) are in the mask."""

ATTRIBUTE = "fp4_attention"
"""Where an attention module keeps its AttentionOperands, or what records its operands in a calibration."""


def _units(x: torch.Tensor, operand: Operand | None) -> tuple[torch.Tensor, float]:
    """(float32 numbers, their scale)."""
    return (operand.units(x), operand.scale) if operand else (x.float(), 1.0)


def fold_heads(x: torch.Tensor, key_heads: int) -> torch.Tensor:
    """[b, heads, q, d] → [b, key_heads, heads/key_heads · q, d]: queries that share a key head (GQA) as its rows."""
    b, heads, q, d = x.shape
    return x.reshape(b, key_heads, heads // key_heads * q, d)


@dataclass(frozen=True)
class AttentionOperands:
    """How the four operands of an attention layer are rounded; None leaves one as it is."""

    query: Operand | None = None
    key: Operand | None = None
    probabilities: Operand | None = None
    value: Operand | None = None

    def to_dict(self) -> dict:
        """As JSON: {operand: [element's name, scale] or None}; a decimal number keeps every bit of an fp32 scale."""
        operands = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: operand and [operand.element.name, operand.scale] for name, operand in operands.items()}

    @staticmethod
    def from_dict(entry: dict) -> AttentionOperands:
        """Inverse of `to_dict`; raises BadInput for anything else."""
        try:
            return AttentionOperands(**{k: v and Operand(element(v[0]), float(v[1])) for k, v in entry.items()})
        except (TypeError, ValueError, IndexError, AttributeError) as error:
            raise BadInput(f"{entry} describes no attention operands: {error}") from error

    def attend(self, query, key, value, mask, scaling: float, dropout: float = 0.0):
        """(output [b, heads, q, d], probabilities before rounding), float32: softmax(scaling · Q K^T + mask) V.

        query [b, heads, q, d]; key, value [b, key heads, k, d]; mask [b or 1, heads or 1, q, k], added or bool.
        """
        shape, key_heads = (*query.shape[:3], key.shape[2]), key.shape[1]
        (q, q_scale), (k, k_scale) = _units(query, self.query), _units(key, self.key)
        scores = (fold_heads(q, key_heads) @ k.transpose(2, 3)).view(shape) * (q_scale * k_scale * scaling)
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.where(mask, 0.0, torch.finfo(scores.dtype).min)
        probabilities = (scores if mask is None else scores + mask).softmax(-1)
        (p, p_scale), (v, v_scale) = _units(probabilities, self.probabilities), _units(value, self.value)
        p = nn.functional.dropout(p, dropout, training=dropout > 0)
        output = (fold_heads(p, key_heads) @ v).view(*shape[:3], value.shape[3])
        return output * (p_scale * v_scale), probabilities


def _check_call(module, query, key, mask, is_causal, options: dict) -> None:
    found = [name for name in _MORE_THAN_SOFTMAX if options.get(name) is not None]
    if found:
        raise BadInput(f"{type(module).__name__} gives {', '.join(found)} to its attention, which FP4 attention lacks")
    if (
        mask is None
        and query.shape[2] > 1
        and (getattr(module, "is_causal", False) if is_causal is None else is_causal)
    ):
        raise BadInput(f"{type(module).__name__} is causal over {query.shape[2]} queries and gives no mask")
    if query.shape[1] % key.shape[1]:
        raise BadInput(f"{type(module).__name__} has {query.shape[1]} heads over {key.shape[1]} key heads")


def fp4_attention(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, is_causal=None, **options
) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' attention function `llmfp4`: (output [b, q, heads, d], probabilities [b, heads, q, k]).

    Raises BadInput for a module without operands, and for one whose attention is more than softmax(QK^T + mask) V.
    """
    _check_call(module, query, key, attention_mask, is_causal, options)
    operands = getattr(module, ATTRIBUTE, None)
    if operands is None:
        raise BadInput(f"{type(module).__name__} has no FP4 operands: it was not called in the calibration")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    output, probabilities = operands.attend(query, key, value, attention_mask, scaling, dropout)
    return output.transpose(1, 2).contiguous().to(query.dtype), probabilities.to(query.dtype)


AttentionInterface.register(FORMAT, fp4_attention)
AttentionMaskInterface.register(FORMAT, eager_mask)


def require_redirectable(model: nn.Module) -> None:
    """Raise BadInput unless transformers can hand the attention of this model to another function."""
    if not isinstance(model, PreTrainedModel):
        raise BadInput(f"{type(model).__name__} is no transformers model: its attention cannot be redirected")
    if not model._can_set_attn_implementation():
        raise BadInput(f"{type(model).__name__} computes its attention without transformers' AttentionInterface")


def attention_operands(model: nn.Module) -> dict[str, AttentionOperands]:
    """{module name: operands} of the attention layers that were redirected."""
    found = {name: getattr(module, ATTRIBUTE, None) for name, module in model.named_modules()}
    return {name: operands for name, operands in found.items() if operands is not None}


def use_attention(model: nn.Module, operands: dict[str, AttentionOperands]) -> None:
    """Redirect the attention of `model` to FP4 operands, in place; {} gives it back the default of transformers.

    Raises BadInput for a model that cannot be redirected and names it does not have.
    """
    require_redirectable(model)
    modules = dict(model.named_modules())
    unknown = [name for name in operands if name not in modules]
    if unknown:
        raise BadInput(
            f"{type(model).__name__} has no attention {unknown[0]} ({len(unknown)} of {len(operands)} names)"
        )
    for name, module in modules.items():
        setattr(module, ATTRIBUTE, operands.get(name)) if name in operands else module.__dict__.pop(ATTRIBUTE, None)
    model.set_attn_implementation(FORMAT if operands else None)
