"""PackedFP4: one weight matrix as 4-bit codes with its scales, in memory and in a safetensors file."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from .errors import BadFile, BadInput
from .formats import FP4_ELEMENTS, SCALES, Element, Scale

FORMAT, VERSION = "llmfp4", 1


def pack(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes [..., k] in 0..15 → bytes [..., ceil(k/2)]; even k in the low nibble, an odd tail padded with code 0."""
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[..., 0::2] | codes[..., 1::2] << 4


def unpack(packed: torch.Tensor, k: int) -> torch.Tensor:
    """Bytes [..., ceil(k/2)] → uint8 codes [..., k]."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)[..., :k]


@dataclass
class PackedFP4:
    """A weight [n, k] with 4 bits per value, and what the activations that meet it look like.

    codes        uint8 [n, ceil(k/2)]   two codes a byte, row order, even k in the low nibble
    row_scale    float32 [n]            per output channel
    group_scale  uint8 [n, ceil(k/G)]   raw bytes of `scale` (E8M0 or E4M3), or None
    shift        uint8 [k]              pre-shifted exponent bias of each input channel, or None
    x_scale      float32 []             static activation scale, or None when activations stay in 16 bits

    Raises BadInput when shapes, dtypes or bytes contradict each other.
    """

    codes: torch.Tensor
    row_scale: torch.Tensor
    k: int
    element: Element
    group_scale: torch.Tensor | None = None
    scale: Scale | None = None
    group_size: int = 0
    activation: Element | None = None
    x_scale: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    recipe: str = ""

    TENSORS = ("codes", "row_scale", "group_scale", "x_scale", "shift")

    def __post_init__(self):
        n, k = self.shape
        if self.codes.ndim != 2 or n < 1 or k < 1 or self.codes.shape[1] != (k + 1) // 2:
            raise BadInput(f"codes of shape {list(self.codes.shape)} do not hold n x {k} 4-bit values, n and k ≥ 1")
        self._check("codes", torch.uint8, list(self.codes.shape))
        self._check("row_scale", torch.float32, [n])
        if not self.row_scale.isfinite().all():
            raise BadInput(f"row_scale holds {int((~self.row_scale.isfinite()).sum())} values that are NaN or Inf")
        if (self.group_scale is None) != (self.scale is None) or (self.scale is None) != (self.group_size == 0):
            raise BadInput("group_scale, scale and group_size belong together: all of them or none")
        if self.group_scale is not None:
            self._check("group_scale", torch.uint8, [n, -(-k // self.group_size)])
            bad = torch.tensor(self.scale.values).isnan()[self.group_scale.cpu().long()].sum().item()
            if bad:
                raise BadInput(f"group_scale holds {bad} bytes that mean NaN in {self.scale.name}")
        if (self.activation is None) != (self.x_scale is None):
            raise BadInput("activation and x_scale belong together: both or none")
        if self.x_scale is not None:
            self._check("x_scale", torch.float32, [])
            if not (self.x_scale.isfinite() and self.x_scale > 0):
                raise BadInput(f"x_scale is {self.x_scale.item()}: it must be positive and finite")
        if self.shift is not None:
            self._check("shift", torch.uint8, [k])
            limit = self.activation.max_shift if self.activation else 15
            if int(self.shift.max()) > limit:
                raise BadInput(f"shift goes up to {int(self.shift.max())}, its limit here is {limit}")

    def _check(self, name, dtype, shape):
        tensor = getattr(self, name)
        if tensor is None or tensor.dtype != dtype or list(tensor.shape) != shape:
            got = "missing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
            raise BadInput(f"{name} must be {dtype} {shape}, got {got}")

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.k

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: t for name in self.TENSORS if (t := getattr(self, name)) is not None}

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / (self.shape[0] * self.k)

    def to(self, device) -> PackedFP4:
        return dataclasses.replace(self, **{name: t.to(device) for name, t in self.tensors.items()})

    def spec(self) -> dict:
        """Everything but the tensors, as JSON."""
        return {
            "k": self.k,
            "element": self.element.name,
            "scale": self.scale.name if self.scale else None,
            "group_size": self.group_size,
            "activation": self.activation.name if self.activation else None,
            "recipe": self.recipe,
        }

    @staticmethod
    def from_spec(spec: dict, tensors: dict[str, torch.Tensor]) -> PackedFP4:
        """Inverse of `spec` and `tensors`; raises BadInput for unknown names."""
        element, activation, scale = spec["element"], spec.get("activation"), spec.get("scale")
        if element not in FP4_ELEMENTS or activation not in (None, *FP4_ELEMENTS) or scale not in (None, *SCALES):
            raise BadInput(f"unsupported format: element {element!r}, activation {activation!r}, scale {scale!r}")
        return PackedFP4(
            k=int(spec["k"]),
            element=FP4_ELEMENTS[element],
            activation=FP4_ELEMENTS.get(activation),
            scale=SCALES.get(scale),
            group_size=int(spec.get("group_size", 0)),
            recipe=spec.get("recipe", ""),
            **tensors,
        )

    def save(self, path: str | Path) -> None:
        """Write one safetensors file: the tensors above, and `spec` under the metadata key "llmfp4"."""
        metadata = {"format": FORMAT, "version": str(VERSION), FORMAT: json.dumps(self.spec())}
        write_safetensors(path, self.tensors, metadata)

    @staticmethod
    def load(path: str | Path) -> PackedFP4:
        """Read what `save` wrote. Raises BadFile for a missing, truncated or foreign file."""
        tensors, metadata = read_safetensors(path)
        try:
            spec = json.loads(metadata[FORMAT])
            unknown = set(tensors) - set(PackedFP4.TENSORS)
            if unknown:
                raise BadInput(f"unknown tensors {sorted(unknown)}")
            return PackedFP4.from_spec(spec, tensors)
        except (KeyError, TypeError, ValueError) as error:
            raise BadFile(f"{path} is not a packed FP4 tensor: {error!r}") from error


def write_safetensors(path: str | Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write beside `path`, then rename, so that an interrupted write leaves the old file or none."""
    from safetensors.torch import save_file

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, beside, metadata)
        os.chmod(beside, 0o644)
        os.replace(beside, path)
    except BaseException:
        os.unlink(beside)
        raise


def open_safetensors(path: str | Path):
    """An open safetensors file whose metadata says it is ours, of a version we read. Raises BadFile."""
    from safetensors import safe_open

    if not Path(path).is_file():
        raise BadFile(f"there is no file {path}")
    try:
        file = safe_open(path, "pt")
        metadata = file.metadata() or {}
    except Exception as error:
        size = Path(path).stat().st_size
        raise BadFile(f"{path} ({size} bytes) is not a whole safetensors file: {error}") from error
    if metadata.get("format") != FORMAT or metadata.get("version") != str(VERSION):
        found = f"format {metadata.get('format')!r} version {metadata.get('version')!r}"
        raise BadFile(f"{path} holds {found}, expected format {FORMAT!r} version {VERSION}")
    return file


def read_safetensors(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors and the metadata of a file that `write_safetensors` wrote. Raises BadFile."""
    with open_safetensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
