"""Residual and SwiGLU behind a product: the bits of the reference where sums are integers, one rounding, gradients."""

import dataclasses

import pytest
import torch
from cases import random_packed, random_x, same_bits
from torch import nn
from torch.library import opcheck

from llmfp4_kernels import FP4GatedLinear, FP4Linear, epilogue, fuse_gated_mlps, reference, registry
from llmfp4_kernels.backends import cpu, rounded
from llmfp4_kernels.errors import BadInput
from llmfp4_kernels.formats import E1M2, E2M1
from llmfp4_kernels.formats import element as element_named
from llmfp4_kernels.problem import Problem

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KERNELS = [*cpu.KERNELS, *rounded.KERNELS]


def expected(x, packed, bias, residual, gated):
    """One rounding after the reference's fp32 product."""
    return epilogue.finish(reference.gemm(x.float(), packed, bias), residual, gated, x.dtype)


def test_exponential_and_silu_are_near_and_the_same_for_any_length():
    x = torch.cat([torch.linspace(-87, 87, 200_001), torch.tensor([0.0, -0.0, 1e-30, -1e-30])])
    y = epilogue.exponential(x)
    exact = torch.exp(x.double())
    assert ((y.double() - exact).abs() <= exact * 2**-22).all()
    assert same_bits(y, torch.cat([epilogue.exponential(part) for part in x.split(7777)]))
    wide = torch.cat([x * 3, torch.tensor([float("nan"), 1e30, -1e30])])
    torch.testing.assert_close(epilogue.silu(wide), nn.functional.silu(wide), rtol=2e-6, atol=1e-35, equal_nan=True)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_every_cpu_kernel_returns_the_bits_of_the_composition(kernel, gated, monkeypatch):
    monkeypatch.setenv(registry.FORCE, kernel.name)
    kind = dict(activation=E2M1, shift=True) if kernel.name != "cpu.rounded" else dict(activation=element_named("e4m3"))
    packed, bias, ran = random_packed(48, 130, E2M1, **kind), torch.randn(48), 0
    for dtype, m in zip(DTYPES, (1, 17, 40)):
        if kernel.refusal(Problem.of(packed, m, torch.float32)) is not None:
            continue
        x, columns = random_x(m, 130, dtype) / 8, 24 if gated else 48
        residual = random_x(m, columns, dtype, seed=4)
        layer = (FP4GatedLinear if gated else FP4Linear).from_packed(packed, bias)
        for given in (residual, None):
            y = layer(x, given)
            wanted = expected(x, packed, bias, given, gated) if given is not None or gated else layer(x)
            assert y.shape == (m, columns)
            assert same_bits(y, wanted) or not packed.integer
            torch.testing.assert_close(y, wanted)
        ran += 1
    assert ran or kernel.refusal(Problem.of(packed, 40, torch.float32))


def test_a_sum_and_its_residual_are_rounded_once():
    """1 + 2^-8 is no bf16, and a rounding before the residual would lose the 2^-8."""
    packed = random_packed(16, 64, E2M1)
    packed.codes, packed.row_scale = torch.zeros_like(packed.codes), torch.ones(16)
    bias = torch.full((16,), 1 + 2.0**-8)
    layer = FP4Linear.from_packed(packed, bias)
    y = layer(torch.ones(1, 64, dtype=torch.bfloat16), torch.full((1, 16), -1.0, dtype=torch.bfloat16))
    assert (y == 2.0**-8).all() and (bias.bfloat16() - 1 != 2.0**-8).all()


def pair(recipe="gptq-fp4-a8"):
    torch.manual_seed(0)
    x = torch.randn(64, 72)
    gate, up = nn.Linear(72, 40), nn.Linear(72, 40)
    return gate, up, x, [FP4Linear.from_linear(part, recipe, x) for part in (gate, up)]


def test_gate_and_up_of_two_layers_are_one():
    _, _, x, (gate, up) = pair()
    joined = FP4GatedLinear.from_pair(gate, up)
    y = joined(x)
    assert y.shape == (64, 40)
    assert same_bits(y, epilogue.silu(gate(x)) * up(x))
    assert "out_features=80" in repr(joined)


def test_two_dense_layers_are_quantized_as_one():
    gate, up, x, _ = pair()
    joined = FP4GatedLinear.from_linears(gate, up, "llm-fp4-a16", x)
    wide = nn.functional.silu(gate(x)) * up(x)
    assert (joined(x) - wide).norm() / wide.norm() < 0.3
    interleaved = epilogue.interleave(gate.weight.detach(), up.weight.detach())
    assert (joined.dequantize() - interleaved).norm() / interleaved.norm() < 0.2
    assert torch.equal(torch.cat(epilogue.gate_and_up(interleaved.T)[:1]).T, gate.weight.detach())


@pytest.mark.filterwarnings("ignore:.*float64 reference")
def test_gradients_in_float64():
    layer = FP4GatedLinear.from_packed(random_packed(16, 10, E2M1), torch.randn(16))
    x = torch.randn(3, 10, dtype=torch.float64, requires_grad=True) / 4
    residual = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x.detach().requires_grad_(), residual))
    plain = FP4Linear.from_packed(random_packed(8, 10, E2M1))
    assert torch.autograd.gradcheck(plain, (x.detach().requires_grad_(), residual))
    assert torch.autograd.gradgradcheck(layer, (x.detach().requires_grad_(), residual))


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_opcheck_and_compile(gated):
    packed = random_packed(48, 72, E2M1, activation=E2M1, shift=True)
    layer = (FP4GatedLinear if gated else FP4Linear).from_packed(packed, torch.randn(48))
    *tensors, spec = layer.op_arguments()
    x, residual = torch.randn(4, 72, requires_grad=True), torch.randn(4, 24 if gated else 48, requires_grad=True)
    opcheck(torch.ops.llmfp4.linear.default, (x, *tensors, layer.bias, spec, residual, gated))
    x, residual = x.detach(), residual.detach()
    torch._dynamo.reset()
    assert torch.equal(torch.compile(layer, fullgraph=True)(x, residual), layer(x, residual))
    assert layer(x[:0], residual[:0]).shape == (0, residual.shape[1])


def test_a_trained_bias_and_a_residual():
    packed, x, residual = random_packed(48, 72, E2M1), torch.randn(4, 72), torch.randn(4, 48)
    layer = FP4Linear.from_packed(packed, torch.randn(48))
    y = layer(x, residual)
    layer.bias.requires_grad_()
    torch.testing.assert_close(layer(x, residual).detach(), y)
    gated = FP4GatedLinear.from_packed(packed, torch.randn(48))
    gated.bias.requires_grad_()
    with pytest.raises(BadInput, match="cannot be trained"):
        gated(x)


def test_what_does_not_fit_is_refused():
    packed, x = random_packed(48, 72, E2M1), torch.randn(4, 72)
    layer = FP4Linear.from_packed(packed)
    for wrong in (torch.randn(4, 24), torch.randn(48), torch.randn(4, 48).half()):
        with pytest.raises(BadInput, match=r"the residual is .* y is torch.float32 \[4, 48\]"):
            layer(x, wrong)
    with pytest.raises(BadInput, match="n in 16s, not 40"):
        FP4GatedLinear.from_packed(random_packed(40, 72, E2M1))(x)
    with pytest.raises(BadInput, match="rows in 8s"):
        epilogue.interleave(torch.zeros(12, 3), torch.zeros(12, 3))
    _, _, _, (gate, up) = pair()
    up.x_factor.data[0] += 1
    with pytest.raises(BadInput, match="same x_factor"):
        FP4GatedLinear.from_pair(gate, up)
    other = FP4Linear.from_packed(random_packed(40, 72, E1M2))
    with pytest.raises(BadInput, match="same element"):
        FP4GatedLinear.from_pair(FP4Linear.from_packed(random_packed(40, 72, E2M1)), other)
    up.bias = None
    with pytest.raises(BadInput, match="a bias, or neither"):
        FP4GatedLinear.from_pair(gate, up)


def test_llama_mlps_with_one_gated_product(tmp_path):
    transformers = pytest.importorskip("transformers")
    from llmfp4_kernels import quantize_model, save_quantized

    torch.manual_seed(0)
    config = transformers.LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
                                      vocab_size=50)  # fmt: skip
    model, ids = transformers.LlamaForCausalLM(config).eval(), torch.arange(40)[None]
    quantize_model(model, "minmax-w4a4", [ids], progress=False)
    with torch.inference_mode():
        before = model(ids).logits
        assert fuse_gated_mlps(model) == ["model.layers.0.mlp", "model.layers.1.mlp"]
        after = model(ids).logits
    assert (after - before).norm() / before.norm() < 0.05
    with pytest.raises(BadInput, match="save before fuse_gated_mlps"):
        save_quantized(model, tmp_path / "m")


def test_explain_says_which_kernels_fuse():
    assert registry.epilogue_of("cuda.sm90") == "fused" and registry.epilogue_of("cpu.scalar") == "composed"
    fused = {kernel.name for kernel in registry.table() if kernel.fuses_epilogue}
    assert {name for name in fused if name.startswith("cuda.")} == fused
    assert dataclasses.replace(cpu.KERNELS[0], fuses_epilogue=True).fuses_epilogue
