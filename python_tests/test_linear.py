"""FP4Linear and FP4Embedding as modules: drop-in behaviour, copies, checkpoints, autograd, compile, LoRA."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.utils.prune
from cases import random_packed, random_x
from torch import nn
from torch.library import opcheck

from llmfp4_kernels import reference
from llmfp4_kernels.embedding import FP4Embedding
from llmfp4_kernels.errors import BadInput, NoKernel
from llmfp4_kernels.formats import E2M1, E3M0, E4M3, E8M0, RECIPES
from llmfp4_kernels.nn import FP4Linear
from llmfp4_kernels.ops import Multiplier
from llmfp4_kernels.packed import PackedFP4

W4A4 = dict(activation=E2M1, shift=True)


@pytest.fixture(params=["w4a4", "w4a16", "nvfp4"])
def packed(request) -> PackedFP4:
    options = {"w4a4": W4A4, "w4a16": {}, "nvfp4": dict(scale=E4M3, group_size=16)}[request.param]
    return random_packed(40, 72, E2M1, **options)


def expected(x, packed, bias):
    rows = x.reshape(x.numel() // packed.k, packed.k)
    return reference.gemm(rows, packed, bias).view(*x.shape[:-1], packed.shape[0])


def test_forward_any_shape(packed):
    bias = torch.randn(40)
    layer = FP4Linear.from_packed(packed, bias)
    for shape in [(72,), (1, 72), (2, 3, 72), (4, 0, 72), (33, 72)]:
        x = torch.randn(shape)
        y = layer(x)
        assert y.shape == (*shape[:-1], 40) and y.dtype == x.dtype
        torch.testing.assert_close(y, expected(x, packed, bias), rtol=1e-5, atol=1e-3)
    assert isinstance(layer, nn.Linear)


@pytest.mark.parametrize("copied", [
    copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.to(torch.float16).float(), lambda m: m.cpu(),
], ids=["deepcopy", "pickle", "half", "cpu"])  # fmt: skip
@pytest.mark.parametrize("warm", [False, True])
def test_copies_give_the_same_bits(packed, copied, warm):
    layer, x = FP4Linear.from_packed(packed), torch.randn(5, 72)
    y = FP4Linear.from_packed(packed)(x)
    if warm:
        layer(x)
    assert torch.equal(copied(layer)(x), y)


@pytest.mark.parametrize("warm", [False, True])
def test_state_dict_is_row_order_and_round_trips(packed, warm):
    layer, x = FP4Linear.from_packed(packed, torch.randn(40)), torch.randn(5, 72)
    y = layer(x)
    state = layer.state_dict()
    assert torch.equal(state["codes"], packed.codes)
    assert all(t.dtype == torch.uint8 for name, t in state.items() if name != "bias")
    recipe = "nvfp4" if packed.scale else "llm-fp4" if packed.activation else "llm-fp4-a16"
    other = FP4Linear(72, 40, recipe=recipe)
    if warm:
        assert not other(x).any(), "a fresh layer is all zeros"
    other.load_state_dict(state)
    assert torch.equal(other(x), y)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(x), y)


def test_writing_to_a_tensor_is_noticed(packed):
    layer, x = FP4Linear.from_packed(packed, torch.zeros(40)), torch.randn(5, 72)
    y = layer(x)
    with torch.no_grad():
        layer.bias += 1
    assert torch.equal(layer(x), y + 1)
    layer.row_scale = nn.Parameter(layer.row_scale.clone(), requires_grad=False)
    with torch.no_grad():
        layer.row_scale.view(torch.float32).mul_(2)
        layer.bias.zero_()
    assert torch.equal(layer(x), 2 * y)


def test_wrong_checkpoints_are_refused(packed):
    layer = FP4Linear.from_packed(packed)
    state = layer.state_dict()
    with pytest.raises(BadInput, match="torch.float32"):
        layer.load_state_dict(state | {"codes": state["codes"].float()})
    with pytest.raises(RuntimeError, match="size mismatch"):
        FP4Linear(72, 41, recipe="llm-fp4").load_state_dict(state, strict=False)
    with pytest.raises(BadInput, match="7"):
        layer.load_state_dict(state | {"elements": torch.tensor([7, 0], dtype=torch.uint8)})
        layer(torch.randn(2, 72))


def test_bad_input_is_refused(packed):
    layer = FP4Linear.from_packed(packed)
    for x in (torch.randn(2, 71), torch.ones(2, 72, dtype=torch.int32), torch.randn(2, 72, 3)):
        with pytest.raises(BadInput, match="k = 72"):
            layer(x)
    with pytest.raises(BadInput, match=r"\[39\]"):
        FP4Linear.from_packed(packed, torch.zeros(39))
    for value in ("nan", "-inf"):
        bias = torch.zeros(40)
        bias[7] = float(value)
        with pytest.raises(BadInput, match=r"bias of shape \[40\] holds 1 values that are NaN or Inf"):
            FP4Linear.from_packed(packed, bias)
    for sizes in [(0, 4), (4, 0)]:
        with pytest.raises(BadInput, match="at least 1"):
            FP4Linear(*sizes)
    with pytest.raises(BadInput, match="mxfp4"):
        FP4Linear(4, 4, recipe="fp5")


@pytest.mark.parametrize("recipe", RECIPES)
def test_from_linear_every_recipe(recipe):
    torch.manual_seed(3)  # some weights quantize a little worse
    linear, x = nn.Linear(72, 40), random_x(64, 72)
    layer = FP4Linear.from_linear(linear, recipe, calibration=x)
    y, dense = layer(x), linear(x)
    assert ((y - dense).norm() / dense.norm()).item() < (0.6 if recipe.endswith("-w4a4") else 0.25)
    torch.testing.assert_close(y, expected(x, layer.packed(), linear.bias), rtol=1e-5, atol=1e-4)
    again = FP4Linear.from_linear(linear, layer.packed())
    assert torch.equal(again(x), y)
    assert recipe in repr(layer) and "kernel=" in repr(layer)


@pytest.mark.parametrize("spoil", ["nan", "empty", "shape", "missing", "weight"])
def test_from_linear_refuses(spoil):
    linear, x = nn.Linear(8, 4), torch.randn(16, 8)
    if spoil == "nan":
        x[3, 3] = float("nan")
    if spoil == "weight":
        linear.weight.data[0, 0] = float("inf")
    x = {"empty": x[:0], "shape": x[:, :7], "missing": None}.get(spoil, x)
    with pytest.raises(BadInput):
        FP4Linear.from_linear(linear, "llm-fp4", calibration=x)


def test_conv1d_is_a_transposed_linear():
    from transformers.pytorch_utils import Conv1D

    conv = Conv1D(40, 72)
    linear = nn.Linear(72, 40)
    linear.weight.data, linear.bias.data = conv.weight.data.T.contiguous(), conv.bias.data
    x = torch.randn(8, 72)
    assert torch.equal(FP4Linear.from_linear(conv, "mxfp4")(x), FP4Linear.from_linear(linear, "mxfp4")(x))


def test_gradient_is_that_of_the_dequantized_weight(packed):
    layer = FP4Linear.from_packed(packed, torch.randn(40))
    x = torch.randn(3, 5, 72, requires_grad=True)
    g = torch.randn(3, 5, 40)
    y = layer(x)
    y.backward(g)
    torch.testing.assert_close(x.grad, g @ reference.dequantize(packed))
    assert torch.equal(y.detach(), layer(x.detach()))
    assert all(p.grad is None for p in layer.parameters())


@pytest.mark.parametrize("bias", [torch.zeros(3), torch.zeros(40, 1), torch.zeros(40, dtype=torch.int32)], ids=str)
def test_a_bias_that_does_not_match_is_refused_everywhere(bias):
    packed = random_packed(40, 64, E2M1)
    with pytest.raises(BadInput, match="does not match n = 40"):
        FP4Linear.from_packed(packed, bias)
    with pytest.raises(BadInput, match="does not match n = 40"):
        Multiplier(packed, bias)


def test_a_trained_bias_gets_its_gradient(packed):
    layer = FP4Linear.from_packed(packed, torch.randn(40))
    x = torch.randn(5, 72)
    y = layer(x)
    layer.bias.requires_grad_()
    z = layer(x)
    z.sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((40,), 5.0))
    torch.testing.assert_close(z.detach(), y)


@pytest.mark.filterwarnings("ignore:.*float64 reference")
def test_gradgradcheck_in_float64():
    layer = FP4Linear.from_packed(random_packed(6, 10, E2M1))
    x = torch.randn(3, 10, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x) and torch.autograd.gradgradcheck(layer, x)


@pytest.mark.parametrize("shape", [(4, 72), (2, 2, 72)])
def test_opcheck(packed, shape):
    layer = FP4Linear.from_packed(packed, torch.randn(40))
    *tensors, spec = layer.op_arguments()
    x = torch.randn(shape, requires_grad=True)
    opcheck(torch.ops.llmfp4.linear.default, (x, *tensors, layer.bias, spec))
    opcheck(torch.ops.llmfp4.linear_dx.default, (torch.randn(4, 40, requires_grad=True), *tensors, spec))


def loaded(packed, bias, how: str) -> FP4Linear:
    """A layer that was never called, with its tensors from a state dict."""
    state = FP4Linear.from_packed(packed, bias).state_dict()
    recipe = "nvfp4" if packed.scale else "llm-fp4" if packed.activation else "llm-fp4-a16"
    layer = FP4Linear(packed.k, packed.shape[0], recipe=recipe, device="cpu" if how == "copied" else "meta")
    if how == "emptied":
        layer.to_empty(device="cpu")
    layer.load_state_dict(state, assign=how == "assigned")
    return layer


@pytest.fixture(params=["packed", "called", "copied", "assigned", "emptied"])
def traced(request, packed) -> tuple[FP4Linear, torch.Tensor, torch.Tensor]:
    """(a layer as it is before a trace, x, its result)."""
    if request.param != "called":
        packed.element = E3M0  # not what a fresh layer has
    bias, x = torch.randn(40), torch.randn(6, 72)
    y = FP4Linear.from_packed(packed, bias)(x)
    if request.param in ("packed", "called"):
        layer = FP4Linear.from_packed(packed, bias)
        if request.param == "called":
            layer(x)
    else:
        layer = loaded(packed, bias, request.param)
    torch._dynamo.reset()
    return layer.requires_grad_(False), x, y


def test_compile_fullgraph(traced):
    layer, x, y = traced
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), y)


def test_export(traced):
    layer, x, y = traced
    assert torch.equal(torch.export.export(layer, (x,)).module()(x), y)


def test_inductor(packed):
    layer, x = FP4Linear.from_packed(packed, torch.randn(40)), torch.randn(6, 72)
    torch._dynamo.reset()
    y = layer(x)
    assert torch.equal(torch.compile(layer, fullgraph=True)(x), y)


def test_autocast_rounds_the_input(packed):
    layer, x = FP4Linear.from_packed(packed), torch.randn(6, 72)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16 and torch.equal(y, layer(x.bfloat16()))


def test_lora_trains_on_top(packed):
    peft = pytest.importorskip("peft")
    model = nn.Sequential(FP4Linear.from_packed(packed), nn.ReLU())
    x = torch.randn(4, 72)
    y = model(x)
    lora = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"], r=2))
    assert torch.equal(lora(x), y)
    lora(x).sum().backward()
    assert sum(p.grad is not None for p in lora.parameters()) == 2


def test_forced_kernel(packed, monkeypatch):
    x = torch.randn(3, 72)
    monkeypatch.setenv("LLMFP4_KERNEL", "cpu.scalar")
    layer = FP4Linear.from_packed(packed)
    assert layer.kernel(3) == "cpu.scalar" and layer(x).shape == (3, 40)
    monkeypatch.setenv("LLMFP4_KERNEL", "cpu.scalr")
    with pytest.raises(NoKernel, match="cpu.scalr"):
        FP4Linear.from_packed(packed)(x)
    monkeypatch.setenv("LLMFP4_KERNEL", "cpu.scalar")
    with pytest.raises(NoKernel, match="float64"):
        FP4Linear.from_packed(packed)(x.double())


def test_float64_runs_on_the_reference_and_says_so(packed):
    with pytest.warns(UserWarning, match="float64 reference"):
        FP4Linear.from_packed(packed)(torch.randn(3, 72, dtype=torch.float64))


@pytest.mark.parametrize("warm", [False, True])
def test_embedding_shares_a_head(warm):
    packed = random_packed(50, 24, E2M1)
    head = FP4Linear.from_packed(packed)
    table = FP4Embedding.sharing(head)
    if warm:
        head(torch.randn(2, 24))
    ids = torch.randint(0, 50, (2, 7))
    assert table.codes is head.codes
    assert torch.equal(table(ids), reference.dequantize(packed)[ids])
    assert table.to(torch.bfloat16)(ids).dtype == torch.bfloat16


def test_a_table_that_shares_a_loaded_head():
    """It follows the head's element, also where only the head is in the state dict."""
    packed, ids = random_packed(50, 24, E3M0), torch.randint(0, 50, (2, 7))
    head = FP4Linear(24, 50, bias=False, recipe="llm-fp4-a16")
    tree = nn.ModuleDict({"table": FP4Embedding.sharing(head), "head": head})
    state = FP4Linear.from_packed(packed).state_dict(prefix="head.")
    tree.load_state_dict(state, strict=False)
    assert torch.equal(tree["table"](ids), reference.dequantize(packed)[ids])


def test_compile_and_export_a_loaded_table():
    packed, ids = random_packed(50, 24, E3M0), torch.randint(0, 50, (2, 7))
    packed.x_factor = torch.rand(24) + 0.5
    expected = reference.dequantize(packed)[ids]
    table = FP4Embedding(50, 24, recipe="gptq-fp4-a16")
    table.load_state_dict(FP4Embedding.from_packed(packed).state_dict())
    torch._dynamo.reset()
    exported = torch.export.export(table, (ids,)).module()
    for run in (torch.compile(table, fullgraph=True, backend="aot_eager"), exported):
        assert torch.equal(run(ids), expected)


@pytest.mark.parametrize("recipe", ["llm-fp4-a16", "nvfp4", "mxfp4"])
def test_embedding_round_trip(recipe):
    from llmfp4_kernels.quantizer.linear import quantize_linear

    packed = quantize_linear(torch.randn(30, 40), recipe, torch.eye(40))
    table = FP4Embedding.from_packed(packed)
    ids = torch.randint(0, 30, (5,))
    assert torch.equal(table(ids), reference.dequantize(packed)[ids])
    other = FP4Embedding(30, 40, recipe=recipe)
    other.load_state_dict(table.state_dict())
    assert torch.equal(other(ids), table(ids))


def test_packed_tensors_cannot_require_gradients():
    layer = FP4Linear.from_packed(random_packed(4, 8, E2M1), torch.zeros(4))
    with pytest.raises(RuntimeError, match="floating point"):
        layer.requires_grad_(True)
    layer.bias.requires_grad_(True)
    layer(torch.randn(2, 8)).sum().backward()
    assert layer.bias.grad is not None


def test_few_rows_keep_what_follows_from_their_shape(packed):
    """The first call and later ones, any shape of the same m, strided x, another dtype in between; a foreign device."""
    multiply, x = Multiplier(packed, None), random_x(6, 2 * packed.k)[:, ::2]
    expected = multiply(x.contiguous())
    for shape in ((6,), (2, 3), (6,), (1, 6)):
        assert torch.equal(multiply(x.reshape(*shape, packed.k)), expected.view(*shape, -1))
    assert multiply(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(multiply(x), expected)
    with pytest.raises(BadInput, match="x is on meta, the weight on the CPU"):
        multiply(x.to("meta"))


@pytest.mark.parametrize("form", [{}, {"activation": E2M1, "shift": True}, {"scale": E8M0, "group_size": 32}], ids=str)
def test_another_default_device_changes_nothing(form):
    """What a kernel reads and writes is made on the CPU, whatever `torch.device` says meanwhile."""
    warm, cold, again = (FP4Linear.from_packed(random_packed(40, 64, E2M1, **form)) for _ in range(3))
    x = random_x(3, 64)
    expected = warm(x)
    with torch.device("meta"):
        assert torch.equal(cold(x), expected) and torch.equal(warm(x), expected)
        state = warm.state_dict()
    assert all(not torch.is_tensor(value) or value.is_cpu for value in state.values())
    again.load_state_dict(state)
    assert torch.equal(again(x), expected)


def test_what_has_no_memory_or_another_device_is_refused(packed):
    layer, x = FP4Linear.from_packed(packed, torch.zeros(40)), random_x(2, packed.k)
    expected = layer(x)
    assert torch.equal(layer(torch._neg_view(x)), layer(-x))
    for wrong, message in (
        (torch._efficientzerotensor(2, packed.k), "has no memory"),
        (torch.empty(2, packed.k, device="meta"), "x is on meta, the weight on cpu"),
    ):
        with pytest.raises(BadInput, match=message):
            layer(wrong)
    with pytest.raises(BadInput, match="x is on cpu, the weight on meta"):
        copy.deepcopy(layer).to("meta")(x)
    with pytest.raises(BadInput, match="does not match a weight"):
        copy.deepcopy(layer).to("meta")(torch.empty(2, packed.k + 1, device="meta"))
    for name in ("codes", "bias"):
        bad = copy.deepcopy(layer)
        assert torch.equal(bad(x), expected)
        getattr(bad, name).untyped_storage().resize_(0)
        with pytest.raises(BadInput, match=f"{name} of .* has no memory"):
            bad(x)


def test_forward_mode_derivatives_are_refused(packed):
    layer, x = FP4Linear.from_packed(packed), random_x(2, packed.k)
    with pytest.raises(BadInput, match="no forward-mode derivative"):
        torch.func.jvp(layer, (x,), (x,))


def test_a_bias_that_is_no_parameter_any_more_is_seen(packed):
    x, bias = random_x(2, packed.k), torch.randn(40)
    plain, layer = FP4Linear.from_packed(packed)(x), FP4Linear.from_packed(packed, bias)
    layer(x)
    nn.utils.prune.random_unstructured(layer, "bias", amount=0.9)
    assert torch.equal(layer(x), FP4Linear.from_packed(packed, layer.bias.detach())(x))
    layer = FP4Linear.from_packed(packed, bias)
    layer(x)
    del layer.bias
    assert torch.equal(layer(x), plain)
