"""search_linear against the slow judge of LLM-FP4's method: never above it, and with its grid never far from it."""

from itertools import chain
from pathlib import Path

import numpy as np
import paper_search
import pytest
import torch
from paper_search import KINDS, layer

from llmfp4_kernels.quantizer import objective, search_linear

VECTORS = Path(__file__).parent / "vectors"
PAPER = {"grid": "gamma", "shift_rule": "paper"}
BITS = ((4, 4), (6, 6), (4, 8), (8, 8), (4, 16), (6, 16))


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


def output_mse(x, w, found, importance=1.0):
    exact = x.double() @ w.double().T
    got = found.activation_dequantized(x).double() @ found.weight_dequantized().double().T
    return ((got - exact).square() * importance).mean().item()


def test_judge_quantizes_as_the_authors_code():
    with np.load(VECTORS / "A_elementwise.npz") as vectors:
        for e, m in chain(*paper_search.FORMATS.values()):
            x, b, expected = (torch.from_numpy(vectors[f"E{e}M{m}_0_{name}"]).double() for name in ("x", "b", "search"))
            assert torch.equal(paper_search.quantize(x, e, m, b), expected), (e, m)


def both_orders(x, w, rule, **kwargs):
    orders = ("paper", "release") if kwargs["activation_bits"] != 16 else ("paper",)
    return [paper_search.paper_search(x, w, order=order, rule=rule, **kwargs).mse for order in orders]


@pytest.mark.parametrize("number", range(len(KINDS) * 2))
def test_against_the_judge(number):
    """Each kind of layer at two of the bit widths, with and without pre-shift in turn."""
    kind, bits, preshift = KINDS[number % len(KINDS)], BITS[number % len(BITS)], number % 4 != 3
    x, w = layer(kind, n=20, k=25 if number % 2 else 16, tokens=40 if number % 3 else 10, seed=number)
    kwargs = {"weight_bits": bits[0], "activation_bits": bits[1], "preshift": preshift}
    paper, release = both_orders(x, w, "paper", **kwargs), both_orders(x, w, "release", **kwargs)
    with_its_grid = output_mse(x, w, search_linear(x, w, **kwargs, **PAPER))
    assert with_its_grid <= 1.03 * min(paper)
    if max(paper) <= 1.03 * min(paper):
        assert with_its_grid >= 0.9 * min(paper)
    ours = output_mse(x, w, search_linear(x, w, **kwargs))
    assert ours <= with_its_grid
    if max(bits[0], bits[1] % 16) > 4:
        assert ours <= 1.05 * min(release)
        of_release = search_linear(x, w, **kwargs, grid="gamma", shift_rule="release")
        assert ours <= output_mse(x, w, of_release)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_embeddings(bits):
    """A table's rows are searched by their own error: x is the identity."""
    table, x = layer("student", n=40, k=24)[1], torch.eye(24)
    kwargs = {"weight_bits": bits, "activation_bits": 16}
    (paper,) = both_orders(x, table, "paper", **kwargs)
    with_its_grid = search_linear(x, table, **kwargs, **PAPER).mse
    assert with_its_grid == pytest.approx(paper, rel=1e-4)
    assert search_linear(x, table, **kwargs).mse <= with_its_grid


@pytest.mark.parametrize("shape", [(140, 48, 600), (40, 130, 600)])
@pytest.mark.parametrize("bits", [(4, 4), (4, 16), (8, 8)])
def test_defaults_are_never_worse_where_searches_look_at_a_part(bits, shape, monkeypatch):
    monkeypatch.setattr(objective, "WHOLE", 1 << 20)
    monkeypatch.setattr(objective, "SMALL", 1 << 16)
    x, w = layer("outlier", *shape)
    assert len(objective.Layer(x, w).probe().x) < len(x)
    kwargs = {"weight_bits": bits[0], "activation_bits": bits[1]}
    ours = search_linear(x, w, **kwargs).mse
    assert ours <= search_linear(x, w, **kwargs, **PAPER).mse
    if bits == (8, 8):
        assert ours <= search_linear(x, w, **kwargs, grid="gamma", shift_rule="release").mse


@pytest.mark.parametrize("bits", [(4, 4), (4, 16)])
@pytest.mark.parametrize("n", [16, 40])
def test_fisher(bits, n):
    """Gradients that weigh each row's tokens differently."""
    x, w = layer("outlier", n=n, k=20, tokens=60)
    g = torch.randn(60, n, generator=torch.Generator().manual_seed(1)).exp().mul(1e-3)
    kwargs = {"weight_bits": bits[0], "activation_bits": bits[1]}
    judged = [
        paper_search.paper_search(x, w, order=order, output_gradient=g, **kwargs).mse for order in ("paper", "release")
    ]
    kwargs |= {"objective": "fisher", "output_gradient": g}
    with_its_grid = search_linear(x, w, **kwargs, **PAPER)
    assert 0.9 * min(judged) <= with_its_grid.objective_value <= 1.03 * min(judged)
    ours = search_linear(x, w, **kwargs)
    assert ours.objective_value <= with_its_grid.objective_value
    assert ours.objective_value == pytest.approx(output_mse(x, w, ours, g.double().square()), rel=1e-4)
    assert ours.mse == pytest.approx(output_mse(x, w, ours), rel=1e-4)
    plain = search_linear(x, w, weight_bits=bits[0], activation_bits=bits[1])
    assert ours.objective_value < output_mse(x, w, plain, g.double().square())


def test_fisher_finds_each_rows_best_scale():
    """Against every point of both grids, one row at a time."""
    from llmfp4_kernels.formats import E2M1
    from llmfp4_kernels.quantizer.row_scales import DELTAS

    x, w = layer("student", n=12, k=16, tokens=50)
    g = torch.randn(50, 12, generator=torch.Generator().manual_seed(2)).exp()
    found = search_linear(x, w, activation_bits=16, weight_elements=(E2M1,), objective="fisher", output_gradient=g)
    errors = []
    for delta in DELTAS:
        bias = paper_search.bias_of_largest(w.double().abs().amax(1), 2, 1) + delta
        e = paper_search.quantize(w.double(), 2, 1, bias[:, None]) - w
        errors.append(((x.double() @ e.T).square() * g.double().square()).mean(0))
    assert found.objective_value <= 1.01 * torch.stack(errors).amin(0).mean().item()


def test_fisher_of_alike_gradients_is_the_mse():
    x, w = layer("gauss")
    plain = search_linear(x, w)
    found = search_linear(x, w, objective="fisher", output_gradient=torch.full((len(x), len(w)), 2.0))
    assert found.objective_value == pytest.approx(4 * found.mse, rel=1e-5)
    assert found.mse == pytest.approx(plain.mse, rel=0.02)
    nothing = search_linear(x, w, objective="fisher", output_gradient=torch.zeros(len(x), len(w)))
    assert nothing.objective_value == 0 and nothing.row_scale.isfinite().all()


def test_rows_that_repeat_and_rows_that_hold_the_error():
    """Layers that are not searched whole are judged by some rows: regular ones, and those of largest output."""
    g = torch.Generator().manual_seed(9)
    randn = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    few = randn(1024, 200) * 0.01
    few[[101, 333, 615, 817]] = randn(4, 200) / randn(4, 200).abs().clamp(min=0.2) * 3
    regular = randn(512, 320) / randn(512, 320).abs().clamp(min=0.2) * 0.02
    regular[::4] = randn(128, 320) * 0.002
    for x, weight in ((randn(400, 200), few), (randn(600, 320) * randn(320).exp(), regular)):
        paper = paper_search.paper_search(x, weight, activation_bits=16, order="paper").mse
        assert search_linear(x, weight, activation_bits=16, grid="gamma", shift_rule="paper").mse < 1.03 * paper
        assert search_linear(x, weight, activation_bits=16).mse <= paper
