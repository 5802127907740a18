"""PackedFP4: one weight matrix as 4-bit codes with its scales, in memory and in a safetensors file."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from .errors import BadFile, BadInput
from .formats import (
    E8M0,
    FP4_ELEMENTS,
    INT8_MAX,
    INTEGER,
    SCALES,
    X_SCALES,
    Dynamic,
    Element,
    Scale,
    is_integer_product,
)
from .formats import element as element_named

FORMAT, VERSION = "llmfp4", 1
FP32_MAX = torch.finfo(torch.float32).max


def pack(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes [..., k] in 0..15 → bytes [..., ceil(k/2)]; even k in the low nibble, an odd tail gets code 0."""
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[..., 0::2] | codes[..., 1::2] << 4


def unpack(packed: torch.Tensor, k: int) -> torch.Tensor:
    """Bytes [..., ceil(k/2)] → uint8 codes [..., k]."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)[..., :k]


def padded_inputs(k: int) -> int:
    """Inputs of the layouts under kernels: a multiple of 64."""
    return -(-k // 64) * 64


def codes_shape(n: int, k: int, layout: str) -> list[int]:
    """Shape of the codes of an [n, k] weight in a layout of layout.py: "row", or padded "tiled", "units", "pairs"."""
    strips, units = -(-n // 16), padded_inputs(k) // 64
    return {
        "row": [n, (k + 1) // 2],
        "tiled": [strips, units * 8, 64],
        "units": [strips, units, 32, 16],
        "pairs": [-(-n // 2) * padded_inputs(k)],
    }[layout]


def describe_dynamic(dynamic: Dynamic | None) -> dict | None:
    """As JSON."""
    if dynamic is None:
        return None
    return {"group_size": dynamic.group_size, "group_scale": dynamic.group_scale.name if dynamic.group_scale else None}


def dynamic_of(described: dict | None) -> Dynamic | None:
    """Inverse of `describe_dynamic`; raises BadInput for an unknown scale."""
    if described is None:
        return None
    name = described.get("group_scale")
    if name not in (None, *X_SCALES):
        raise BadInput(f"unsupported activation group scale {name!r}: known are {', '.join(X_SCALES)}")
    return Dynamic(int(described.get("group_size", 0)), X_SCALES.get(name))


@dataclass
class PackedFP4:
    """A weight [n, k] with 4 bits per value, and what the activations that meet it look like.

    codes        uint8 [n, ceil(k/2)]   two codes a byte, row order, even k in the low nibble; or, under a kernel,
                                        a layout of `layout.py` ("tiled", "units", "pairs")
    row_scale    float32 [n]            per output channel
    group_scale  uint8 [n, ceil(k/G)]   raw bytes of `scale` (E8M0 or E4M3), or None
    shift        uint8 [k]              pre-shifted exponent bias of each input channel, or None
    x_scale      float32 []             static activation scale, 2^shift / x_scale within fp32; None with dynamic scales
                                        or 16-bit activations
    x_factor     float32 [k]            what activations are multiplied by before anything else (ModelOpt's
                                        pre_quant_scale), or None

    `activation` is the element of the activations (4, 6 or 8 bits; None: 16 or 32 bits), `dynamic` says how they get
    scales at run time (None: x_scale). Raises BadInput when shapes, dtypes or bytes contradict each other.
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
    x_factor: torch.Tensor | None = None
    dynamic: Dynamic | None = None
    recipe: str = ""
    layout: str = "row"

    TENSORS = ("codes", "row_scale", "group_scale", "x_scale", "shift", "x_factor")

    def __post_init__(self):
        n, k = self.shape
        if n < 1 or k < 1:
            raise BadInput(f"a packed weight needs n ≥ 1 and k ≥ 1, got n = {n}, k = {k}")
        self._check("codes", torch.uint8, codes_shape(n, k, self.layout))
        self._check("row_scale", torch.float32, [n])
        if not self.row_scale.isfinite().all():
            raise BadInput(f"row_scale holds {int((~self.row_scale.isfinite()).sum())} values that are NaN or Inf")
        if (self.group_scale is None) != (self.scale is None) or (self.scale is None) != (self.group_size == 0):
            raise BadInput("group_scale, scale and group_size belong together: all of them or none")
        if self.group_scale is not None:
            self._check("group_scale", torch.uint8, [n, -(-k // self.group_size)])
            bad = torch.tensor(self.scale.values, device="cpu").isnan()[self.group_scale.cpu().long()].sum().item()
            if bad:
                raise BadInput(f"group_scale holds {bad} bytes that mean NaN in {self.scale.name}")
        self._check_activation()

    def _check_activation(self):
        k = self.k
        if (self.activation is None) != (self.x_scale is None and self.dynamic is None):
            raise BadInput(
                "an activation and its scales belong together: x_scale or dynamic with an element, or neither"
            )
        if self.dynamic is not None and (self.x_scale is not None or self.shift is not None):
            raise BadInput("dynamic activation scales exclude a static x_scale and a shift")
        if self.dynamic is not None and self.dynamic.group_scale == INTEGER and not self.activation.max_factor:
            name, units = self.activation.name, self.activation.max_integer
            raise BadInput(f"integer groups need an element of at most {INT8_MAX} units, {name} has {units}")
        if self.x_scale is not None:
            self._check("x_scale", torch.float32, [])
            if not (self.x_scale.isfinite() and self.x_scale > 0):
                raise BadInput(f"x_scale is {self.x_scale.item()}: it must be positive and finite")
        top = 0
        if self.shift is not None:
            self._check("shift", torch.uint8, [k])
            top, limit = int(self.shift.max()), self.activation.max_shift if self.activation else 15
            if top > limit:
                raise BadInput(f"shift goes up to {top}, its limit here is {limit}")
        if self.x_scale is not None and 2.0**top / self.x_scale.item() > FP32_MAX:
            raise BadInput(
                f"x_scale is {self.x_scale.item()} beside shifts up to {top}: 2^shift / x_scale exceeds fp32"
            )
        if self.x_factor is not None:
            if self.x_scale is not None:
                raise BadInput("x_factor goes with dynamic or 16-bit activations, these have a static x_scale")
            self._check("x_factor", torch.float32, [k])
            bad = int((~(self.x_factor.isfinite() & (self.x_factor > 0))).sum())
            if bad:
                raise BadInput(f"x_factor holds {bad} values that are not positive and finite")

    def _check(self, name, dtype, shape):
        tensor = getattr(self, name)
        if tensor is None or tensor.dtype != dtype or list(tensor.shape) != shape:
            got = "missing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
            raise BadInput(f"{name} must be {dtype} {shape}, got {got}")

    @property
    def shape(self) -> tuple[int, int]:
        return self.row_scale.numel(), self.k

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: t for name in self.TENSORS if (t := getattr(self, name)) is not None}

    @property
    def integer(self) -> bool:
        """Whether the product with this weight is a sum of integers, exact in int32: every integer kernel's terms."""
        return is_integer_product(self.activation, self.scale, self.dynamic, self.shift is not None)

    @functools.cached_property
    def scale_span(self) -> int:
        """Binades between the largest and the smallest E8M0 scale of a row, of the row with most; 0 without E8M0."""
        if self.scale != E8M0:
            return 0
        return int((self.group_scale.amax(1).int() - self.group_scale.amin(1).int()).max())

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
            "dynamic": describe_dynamic(self.dynamic),
            "recipe": self.recipe,
        }

    @staticmethod
    def from_spec(spec: dict, tensors: dict[str, torch.Tensor]) -> PackedFP4:
        """Inverse of `spec` and `tensors`; raises BadInput for unknown names."""
        element, activation, scale = spec["element"], spec.get("activation"), spec.get("scale")
        if element not in FP4_ELEMENTS or scale not in (None, *SCALES):
            raise BadInput(f"unsupported format: element {element!r}, scale {scale!r}")
        return PackedFP4(
            k=int(spec["k"]),
            element=FP4_ELEMENTS[element],
            activation=element_named(activation) if activation else None,
            dynamic=dynamic_of(spec.get("dynamic")),
            scale=SCALES.get(scale),
            group_size=int(spec.get("group_size", 0)),
            recipe=spec.get("recipe", ""),
            layout=spec.get("layout", "row"),
            **tensors,
        )

    def save(self, path: str | Path) -> None:
        """Write one safetensors file: the tensors above in row order, and `spec`, shape and recipe as metadata."""
        if self.layout != "row":
            raise BadInput(f"only row order is saved, these codes are in layout {self.layout!r}: unshuffle them first")
        described = {"version": VERSION, "shape": self.shape} | self.spec()
        write_safetensors(path, self.tensors, {"format": "pt", FORMAT: json.dumps(described)})

    @staticmethod
    def load(path: str | Path) -> PackedFP4:
        """Read what `save` wrote. Raises BadFile for a missing, truncated or foreign file."""
        with open_safetensors(path) as file:
            spec = json.loads(file.metadata()[FORMAT])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        try:
            unknown = set(tensors) - set(PackedFP4.TENSORS)
            if unknown:
                raise BadInput(f"unknown tensors {sorted(unknown)}")
            return PackedFP4.from_spec(spec, tensors)
        except (KeyError, TypeError, ValueError) as error:
            raise BadFile(f"{path} is not a packed FP4 tensor: {error!r}") from error


def path_of(path: str | Path) -> Path:
    """`path` as a Path. Raises BadInput for what names no file."""
    if not isinstance(path, str | os.PathLike):
        raise BadInput(f"a path is needed, got {path!r}, a {type(path).__name__}")
    return Path(path)


def write_beside(path: str | Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, then rename it: an interrupted write leaves the old file or none."""
    path = path_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    beside = Path(name)
    try:
        write(beside)
        beside.chmod(0o644)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_safetensors(path: str | Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write tensors (copied to the CPU) and metadata as one safetensors file, beside `path` first."""
    from safetensors.torch import save_file

    whole = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    write_beside(path, lambda beside: save_file(whole, beside, metadata))


def open_safetensors(path: str | Path):
    """An open safetensors file whose metadata names our format and a version we read. Raises BadFile."""
    from safetensors import safe_open

    path = path_of(path)
    if not path.is_file():
        raise BadFile(f"there is no file {path}")
    try:
        file = safe_open(path, "pt")
        metadata = file.metadata() or {}
    except Exception as error:
        size = path.stat().st_size
        raise BadFile(f"{path} ({size} bytes) is not a whole safetensors file: {error}") from error
    try:
        version = json.loads(metadata[FORMAT])["version"]
    except (KeyError, TypeError, ValueError) as error:
        raise BadFile(f"{path} is not of format {FORMAT!r}: its metadata is {metadata}") from error
    if version != VERSION:
        raise BadFile(f"{path} has version {version} of format {FORMAT!r}, this package reads {VERSION}")
    return file
