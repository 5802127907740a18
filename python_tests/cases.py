"""Shapes and problems shared by tests and benchmarks."""

import itertools

import torch

from llmfp4_kernels.formats import E4M3, E8M0, FP4_ELEMENTS
from llmfp4_kernels.packed import PackedFP4, pack

LINEAR_SHAPES = {
    "smollm2-135m": [(576, 576), (192, 576), (1536, 576), (576, 1536)],
    "llama-7b": [(4096, 4096), (11008, 4096), (4096, 11008)],
    "llama-13b": [(5120, 5120), (13824, 5120), (5120, 13824)],
    "llama-70b": [(8192, 8192), (1024, 8192), (28672, 8192), (8192, 28672)],
    "odd": [(100, 1027), (1000, 1111), (4099, 2050)],
}
"""(n, k) of the linear layers of a model; "odd" ones are no multiples of anything."""

ODD_SHAPES = [
    (1, 1, 1),
    (2, 3, 2),
    (3, 17, 65),
    (5, 33, 130),
    (8, 16, 64),
    (9, 70, 515),
    (17, 100, 1027),
    (33, 65, 70),
    (200, 65, 70),
]
"""(m, n, k) around every tile edge: 16 outputs, 8 and 64 inputs, 4, 6, 16 and 32 rows, one block of rows."""

ELEMENT_PAIRS = list(itertools.product(FP4_ELEMENTS.values(), repeat=2))
GROUP_SCALES = [(None, 0), (E8M0, 32), (E4M3, 16), (E4M3, 128)]


def random_packed(n, k, element, activation=None, shift=False, scale=None, group_size=0, seed=0) -> PackedFP4:
    """Random codes, scales and shifts: every code and every shift occurs, no row is zero."""
    g = torch.Generator().manual_seed(seed)
    group_scale = None
    if scale is not None:
        low, high = (117, 137) if scale is E8M0 else (1, 127)
        group_scale = torch.randint(low, high, (n, -(-k // group_size)), generator=g, dtype=torch.uint8)
    max_shift = activation.max_shift if activation else 3
    return PackedFP4(
        codes=pack(torch.randint(0, 16, (n, k), generator=g, dtype=torch.uint8)),
        row_scale=torch.rand(n, generator=g) + 0.5,
        k=k,
        element=element,
        group_scale=group_scale,
        scale=scale,
        group_size=group_size,
        activation=activation,
        x_scale=torch.tensor(0.37) if activation else None,
        shift=torch.randint(0, max_shift + 1, (k,), generator=g, dtype=torch.uint8) if shift else None,
    )


def random_x(m, k, dtype=torch.float32, seed=1) -> torch.Tensor:
    """Activations with a few outlier channels."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=g)
    x[:, :: max(k // 3, 1)] *= 8
    return x.to(dtype)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal, NaN where NaN; -0 and +0 differ."""
    view = {4: torch.int32, 2: torch.int16}[a.element_size()]
    nan = a.isnan()
    return torch.equal(nan, b.isnan()) and torch.equal(a.view(view)[~nan], b.view(view)[~nan])
