"""Finished layers on disk, so that an interrupted quantization goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import torch

from ..errors import BadFile
from ..formats import Recipe
from ..packed import PackedFP4, write_beside


class WorkDir:
    """Finished layers: a safetensors file and, written last, a report row that says what it depends on."""

    def __init__(self, path: str | Path | None, settings: str):
        self.path = Path(path) if path else None
        self.settings = settings

    def fingerprint(self, recipe: Recipe, weight: torch.Tensor) -> str:
        digest = hashlib.blake2b(f"{self.settings} {recipe} {list(weight.shape)}".encode(), digest_size=16)
        digest.update(weight.float().contiguous().view(-1).cpu().numpy().data)
        return digest.hexdigest()

    def _files(self, name: str) -> tuple[Path, Path]:
        stem = re.sub(r"[^\w.-]", "_", name)
        if stem != name:  # two names must not become one file
            stem += "." + hashlib.blake2b(name.encode(), digest_size=4).hexdigest()
        return self.path / f"{stem}.safetensors", self.path / f"{stem}.json"

    def load(self, name: str, fingerprint: str) -> tuple[PackedFP4, dict] | None:
        """What an earlier run finished, if it depended on the same things."""
        if not self.path or not all(file.is_file() for file in self._files(name)):
            return None
        tensors, row_file = self._files(name)
        try:
            row = json.loads(row_file.read_text())
            if row.pop("fingerprint") != fingerprint:
                return None
            return PackedFP4.load(tensors), row
        except (BadFile, KeyError, json.JSONDecodeError):
            return None  # an interrupted or edited file: the layer is done again

    def save(self, name: str, fingerprint: str, packed: PackedFP4, row: dict) -> None:
        if self.path:
            tensors, row_file = self._files(name)
            packed.save(tensors)
            write_beside(row_file, lambda beside: beside.write_text(json.dumps(row | {"fingerprint": fingerprint})))
