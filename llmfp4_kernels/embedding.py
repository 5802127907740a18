"""FP4Embedding: a lookup table of packed FP4 rows, which may share its codes with an output head."""

from __future__ import annotations

import torch
from torch import nn

from . import layout
from .formats import FP4_ELEMENTS, Recipe
from .formats import recipe as recipe_named
from .nn import FP4Module
from .ops import from_bytes
from .packed import PackedFP4
from .reference import decode, decode_scale, expand_groups


class FP4Embedding(FP4Module):
    """y [..., embedding_dim] = rows `ids` of a packed table [num_embeddings, embedding_dim], one scale per row.

    LLM-FP4 section 4.1: one exponent bias per vocabulary entry. Only the rows asked for are decoded.
    """

    def __init__(self, num_embeddings, embedding_dim, device=None, dtype=None, *, recipe: str | Recipe = "llm-fp4-a16"):
        super().__init__()
        recipe = recipe_named(recipe)
        self._set_format(
            embedding_dim, num_embeddings, recipe.name, recipe.group_scale, recipe.group_size, recipe.dynamic
        )
        self._fresh_tensors(recipe, device)
        self._describe(num_embeddings, embedding_dim, dtype or torch.get_default_dtype(), None)

    def _describe(self, num_embeddings, embedding_dim, dtype, padding_idx):
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        # An empty float buffer follows .to(dtype), which says what dtype the rows are wanted in.
        self.register_buffer("_like", torch.empty(0, dtype=dtype), persistent=False)

    @classmethod
    def from_packed(cls, packed: PackedFP4, dtype=torch.float32, padding_idx=None) -> FP4Embedding:
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._take(packed)
        self._describe(*packed.shape, dtype, padding_idx)
        return self

    @classmethod
    def sharing(cls, head: FP4Module, dtype=torch.float32, padding_idx=None) -> FP4Embedding:
        """A table that uses the very Parameters of a head FP4Linear [vocabulary, hidden] (tied weights)."""
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._set_format(head.in_features, head.out_features, head.recipe, head.scale, head.group_size, head.dynamic)
        for name in cls.TENSORS:
            setattr(self, name, getattr(head, name))
        self._spec, self._spec_text, self._unread = head.spec(), head._spec_text, head._unread
        self._describe(head.out_features, head.in_features, dtype, padding_idx)
        return self

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        k = self.embedding_dim
        codes = layout.code_rows(self.codes, ids, k)
        rows = decode(codes, FP4_ELEMENTS[self.spec()["element"]])
        if self.group_scale is not None:
            scales = decode_scale(self.group_scale[ids], self.scale)
            rows = rows * expand_groups(scales.flatten(0, -2), self.group_size, k).view(rows.shape)
        rows = rows * self.row_scale[ids].view(torch.float32)
        if self.x_factor is not None:
            rows = rows * from_bytes(self.x_factor)
        return rows.to(self._like.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, recipe={self.recipe!r}"
