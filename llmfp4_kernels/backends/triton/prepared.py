"""A weight ready for the Triton kernels, and the launches of one call."""

from __future__ import annotations

import torch

from ...encode import E4M3_MAX
from ...errors import BadInput, NoKernel
from ...layout import to_layout
from ...packed import PackedFP4, padded_inputs
from ...problem import Kernel, Problem
from ...reference import integer_scale
from ..cuda import relative_scales
from . import configs, fp8, machine, tuned
from .configs import Config
from .decode import Lookup, lookup
from .form import Form, Operands
from .operands import quantize, split
from .product import add_splits, product

QUANTIZE_BLOCK, SPLIT_BLOCK, ADD_BLOCK = 1024, 1024, 256
EXACT = {"enable_fp_fusion": False}
"""The reference rounds products before it adds them."""


class Prepared:
    """Codes in layout "pairs", scales and bias of one weight."""

    def __init__(self, packed: PackedFP4, bias: torch.Tensor | None):
        self.device = packed.codes.device
        given = packed.tensors | ({} if bias is None else {"bias": bias})
        others = {name: t.device for name, t in given.items() if t.device != self.device and name != "x_scale"}
        if self.device.type != machine.here.device_type or others:
            raise NoKernel(
                f"the Triton kernels take tensors on one GPU: codes are on {self.device}, others on {others}"
            )
        self.limits = machine.here.capability(self.device.index), machine.version()
        self.packed = packed = to_layout(packed, "pairs")
        self.n, self.k = packed.shape
        self.padded_k, self.half = padded_inputs(self.k), -(-self.n // 2)
        self.codes, self.row_scale, self.scales = packed.codes.contiguous(), packed.row_scale.contiguous(), None
        if packed.scale:
            self.scales, self.row_scale = relative_scales(packed)
            self.scales = self.scales.contiguous()
        self.bias = None if bias is None else bias.detach().float().contiguous()
        self.shift = None if packed.shift is None else packed.shift.contiguous()
        self.factor = self._factor()
        self.static_scale = 1.0 if packed.x_scale is None else packed.x_scale.item()
        self.lookups: dict[torch.dtype, Lookup] = {}
        self.configs: dict[tuple[str, torch.dtype, int], Config] = {}

    def _factor(self) -> torch.Tensor | None:
        """fp32 [k] by which activations are multiplied first; of unquantized ones with 2^-shift in it."""
        packed = self.packed
        if packed.shift is None or packed.activation:
            return packed.x_factor if packed.x_factor is None else packed.x_factor.contiguous()
        ones = torch.ones(self.k, device=self.device) if packed.x_factor is None else packed.x_factor
        return torch.ldexp(ones, -packed.shift.int())

    def run(self, kernel: Kernel, x: torch.Tensor) -> torch.Tensor:
        """x [..., k] → y [..., n] of x's dtype, on torch's current stream; nothing waits for the GPU."""
        if x.device != self.device:
            raise BadInput(f"x is on {x.device}, the weight on {self.device}")
        x, m = x.contiguous(), x.numel() // self.k
        y = torch.empty((*x.shape[:-1], self.n), dtype=x.dtype, device=x.device)
        if m == 0:
            return y
        with machine.here.on(self.device):
            config = self._config(kernel.name.removeprefix("triton."), x.dtype, m)
            self.multiply(config, *self.activations(x), y)
        return y

    def _config(self, name: str, dtype: torch.dtype, m: int) -> Config:
        """The tile of m tokens, with its splits."""
        key = name, dtype, m
        if key not in self.configs:
            form = Form.of(name, Problem.of(self.packed, m, dtype))
            self.configs[key] = tuned.choose(form, m, self.device).config
        return self.configs[key]

    def activations(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x [..., k], contiguous → (operands [planes or parts, m, a multiple of 16], worth of one unit [m] of quantized
        ones)."""
        kind, m = Operands.of(Problem.of(self.packed, 1, x.dtype)), x.numel() // self.k
        if not self.packed.activation and kind.parts == 1 and self.k % 16 == 0 and x.data_ptr() % 16 == 0:
            return x.view(1, m, self.k), None
        shape = (kind.planes * kind.parts, m, self.padded_k)
        operands = torch.empty(shape, dtype=kind.dtype, device=x.device)
        if self.packed.activation:
            return operands, self._quantize(x, m, operands, kind)
        split[(m, -(-self.padded_k // SPLIT_BLOCK))](
            x, operands, self.factor, m, self.k, self.padded_k, PARTS=kind.parts, BLOCK=SPLIT_BLOCK, **EXACT
        )
        return operands, None

    def _quantize(self, x: torch.Tensor, m: int, operands: torch.Tensor, kind: Operands) -> torch.Tensor:
        packed, element, dynamic = self.packed, self.packed.activation, self.packed.dynamic
        integer, group = kind.dtype == torch.int8, dynamic.group_scale if dynamic else None
        unit = 2.0 ** -fp8.exponent(packed) if kind.dtype == torch.float8_e4m3fn else 1.0
        reach = {"integer": element.max_factor, "e4m3": E4M3_MAX}.get(group.name, 1) if group else 1
        x_scale = torch.empty(m, dtype=torch.float32, device=x.device)
        quantize[(m,)](
            x, operands, x_scale, self.shift, self.factor,
            static_scale=self.static_scale, unit=integer_scale(packed) if integer else unit,
            top=element.max, reach=element.max * reach, most=float(element.max_factor),
            integer_scale=float(element.integer_scale), scale_out=float(element.integer_scale) if integer else 1.0,
            mantissa=element.mantissa_bits, least=1 - element.bias, emax=element.max_shift - element.bias,
            shift_top=element.max_shift if integer and packed.shift is not None else 0,
            m=m, k=self.k, padded_k=self.padded_k,
            STATIC=dynamic is None, KIND=group.name if group else "none", GROUP=dynamic.group_size if dynamic else 0,
            PLANES=kind.planes, BLOCK=QUANTIZE_BLOCK, **EXACT,
        )  # fmt: skip
        return x_scale

    def _lookup(self, dtype: torch.dtype) -> Lookup:
        if dtype not in self.lookups:
            exponent = fp8.exponent(self.packed) if dtype == torch.float8_e4m3fn else 0
            self.lookups[dtype] = lookup(self.packed.element, dtype, machine.here.ptx, exponent)
        return self.lookups[dtype]

    def multiply(self, config: Config, operands: torch.Tensor, x_scale: torch.Tensor | None, y: torch.Tensor) -> None:
        """What `activations` made of x → y [..., n], in tiles of `config`."""
        m, splits = operands.shape[1], config.splits
        planes = len(operands) if operands.dtype == torch.int8 else 1
        parts, table = len(operands) // planes, self._lookup(operands.dtype)
        total = torch.int32 if operands.dtype == torch.int8 else torch.float32
        partial = None
        if splits > 1:
            partial = torch.empty((splits, planes, m, self.n), dtype=total, device=y.device)
        groups = self.scales.shape[1] if self.packed.scale else 0
        product[(-(-m // config.tokens), -(-self.half // config.rows), splits)](
            self.codes, operands, y, partial, self.row_scale, self.bias, x_scale, self.scales,
            m, self.n, self.half, operands.shape[2], self.padded_k, groups,
            PLANES=planes, PARTS=parts,
            SCALE=self.packed.scale.name if self.packed.scale else "none", GROUP=self.packed.group_size,
            ROWS=config.rows, TOKENS=config.tokens, BLOCK_K=config.block_k,
            TABLE=table.table, LOW=table.low, HIGH=table.high,
            FENCE=configs.adds_fence(config, *self.limits),
            num_warps=config.warps, num_stages=config.stages, **EXACT,
        )  # fmt: skip
        if splits > 1:
            add_splits[(-(-self.n // ADD_BLOCK), m)](
                partial, y, self.row_scale, self.bias, x_scale, m, self.n, splits,
                PLANES=planes, OUTPUTS=ADD_BLOCK, **EXACT,
            )  # fmt: skip
