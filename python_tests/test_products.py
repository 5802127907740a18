"""The search for a product of two activations: against all pairs of a grid, and what it leaves out."""

import pytest
import torch

from llmfp4_kernels.errors import BadInput
from llmfp4_kernels.formats import E2M1, searched_elements
from llmfp4_kernels.quantizer.products import Operand, Part, merge, search_product

DELTAS = [i / 8 for i in range(-4, 16)]


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_the_search_finds_no_worse_than_a_grid(bits):
    """Every pair of formats and of 40 scales around the largest magnitudes, on a product small enough for that."""
    generator = torch.Generator().manual_seed(bits)
    parts = [Part(torch.randn(1, 5, 8, generator=generator) ** 3, torch.randn(1, 8, 6, generator=generator))]
    found = search_product(parts, bits=bits)

    def error(a, b):
        x, y = parts[0].a, parts[0].b
        return ((a.round(x) @ b.round(y) - x @ y).square().sum() / (x @ y).square().sum()).item()

    assert found.relative_error == pytest.approx(error(found.a, found.b), rel=1e-3)
    grid = [
        [Operand(e, (x.abs().max() / e.max * 2**-delta).item()) for e in searched_elements(bits) for delta in DELTAS]
        for x in (parts[0].a, parts[0].b)
    ]
    assert found.relative_error < 1.6 * min(error(a, b) for a in grid[0] for b in grid[1])
    minmax = [Operand(E2M1, (x.abs().max() / E2M1.max).item()) for x in (parts[0].a, parts[0].b)]
    assert found.relative_error < error(*minmax)


def test_results_that_do_not_count_are_ignored():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 9, 5, generator=generator), torch.randn(2, 5, 7, generator=generator)
    counts = torch.ones(2, 9, 7, dtype=torch.bool)
    counts[:, :, 4:] = False
    whole, part = (
        search_product([Part(a, b, counts)]),
        search_product([Part(a, b[:, :, :4])], largest_b=b.abs().max().item()),
    )
    assert (whole.a, whole.b) == (part.a, part.b)
    assert whole.relative_error == pytest.approx(part.relative_error)


def test_merged_parts_are_the_same_product():
    """Parts of many sizes, with and without results that do not count, in fewer tensors with zeros between them."""
    generator = torch.Generator().manual_seed(0)
    parts = []
    for i, (r, c, s) in enumerate([(5, 4, 7), (6, 4, 7), (3, 4, 2), (40, 9, 33), (44, 8, 31), (4, 7, 6)]):
        counts = torch.rand(2, 1, r, s, generator=generator) > 0.4 if i % 2 else None
        parts.append(Part(*(torch.randn(2, 3, *shape, generator=generator) for shape in ((r, c), (c, s))), counts))
    merged = merge(parts)
    assert 1 < len(merged) < len(parts) and sum(len(part.a) for part in merged) == 12
    separate, together = search_product(parts), search_product(merged)
    assert (separate.a, separate.b) == (together.a, together.b)
    assert together.relative_error == pytest.approx(separate.relative_error)


def test_zeros_and_bad_input():
    assert search_product([Part(torch.zeros(3, 4), torch.ones(4, 2))]).relative_error == 0
    for parts, rounds, message in [
        ([], 3, "got 0 and 3"),
        ([Part(torch.ones(3, 4), torch.ones(4, 2))], 0, "got 1 and 0"),
        ([Part(torch.ones(3, 4), torch.full((4, 2), torch.inf))], 1, r"operand b of shape \[4, 2\] holds 8 values"),
    ]:
        with pytest.raises(BadInput, match=message):
            search_product(parts, rounds=rounds)
