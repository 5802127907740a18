"""Calls that do not pass through Python: what they take, what they leave to the long way, and that nothing leaks."""

import functools
import gc
import sys
import threading
import tracemalloc
import weakref

import pytest
import torch
from cases import random_packed, random_x
from torch.overrides import TorchFunctionMode

from llmfp4_kernels import native, reference
from llmfp4_kernels.backends import cpu
from llmfp4_kernels.errors import BadInput
from llmfp4_kernels.formats import E2M1
from llmfp4_kernels.ops import Multiplier

N, K = 40, 70
KERNEL = cpu.KERNELS[-1]


@pytest.fixture
def multiply():
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        pytest.skip("this torch lacks the C API of DLPack")
    return Multiplier(random_packed(N, K, E2M1, E2M1), torch.randn(N))


def test_every_number_of_rows_and_dtype(multiply):
    for dtype in cpu.DTYPES:
        for m in range(1, 18):
            x = random_x(m, K).to(dtype)
            expected = multiply(x)  # the long way: these rows of this dtype come for the first time
            quick = multiply.few_rows(x)
            if m > 16:
                assert quick is None
                continue
            assert torch.equal(quick, expected) and quick.dtype == dtype and quick.shape == (m, N)
            wide = multiply.few_rows(x.reshape(1, m, 1, K))
            assert wide.shape == (1, m, 1, N) and torch.equal(wide.view(m, N), expected)
    vector = multiply.few_rows(torch.ones(K))
    assert vector.shape == (N,) and torch.equal(vector, multiply(torch.ones(1, K))[0])


def test_the_rest_is_left_to_the_long_way(multiply):
    x = random_x(2, K)
    multiply(x)
    multiply(x[:1])
    expected = multiply.few_rows(x)

    class Labelled(torch.Tensor):
        pass

    for other in (
        random_x(3, K),  # not yet seen
        x.bfloat16(),
        x.double(),
        x.to(torch.int32),
        random_x(2, 2 * K)[:, ::2],
        random_x(1, 2 * K)[:, ::2],
        random_x(K, 2).t(),
        torch._neg_view(x),
        torch._efficientzerotensor(2, K),
        x.as_subclass(Labelled),
        torch.nn.Parameter(x),
        x.to("meta"),
        x.to_sparse(),
        random_x(2, K + 1),
        random_x(0, K),
        torch.tensor(1.0),
        x.reshape(1, 1, 1, 1, 1, 1, 1, 2, K),
        torch.empty(2, 0),
        x.numpy(),
        None,
        "x",
    ):
        assert multiply.few_rows(other) is None
    assert torch.equal(multiply(torch._neg_view(x)), multiply(-x))
    assert torch.equal(multiply(random_x(2, 2 * K)[:, ::2]), multiply(random_x(2, 2 * K)[:, ::2].contiguous()))
    assert torch.equal(multiply.few_rows(x[0:2]), expected)
    offset = torch.cat([torch.full((1, K), float("nan")), x])
    assert torch.equal(multiply.few_rows(offset[1:]), expected), "a view begins behind the start of its memory"
    with pytest.raises(BadInput, match="does not match a weight"):
        multiply(random_x(2, K + 1))


def test_a_torch_without_the_api_takes_the_long_way(monkeypatch):
    linear = cpu.Prepared(random_packed(N, K, E2M1), None)._linear
    assert native.module().few_rows(linear, None, object, torch.get_num_threads) is None
    monkeypatch.setattr(cpu.Prepared, "_few_rows", None)
    packed, x = random_packed(N, K, E2M1, E2M1), random_x(2, K)
    multiply = Multiplier(packed, None)
    y = multiply(x)
    assert multiply.few_rows is None and torch.equal(multiply(x), y)
    assert torch.equal(y, reference.gemm(x, packed).to(y.dtype))


def test_errors_of_what_it_asks_reach_the_caller(multiply):
    def threads():
        raise OverflowError("too many")

    prepared = cpu.Prepared(random_packed(N, K, E2M1), None)
    few = native.module().few_rows(prepared._linear, prepared.tensors, torch.Tensor, threads)
    few.add(native.module().kernel("scalar"), 1, native.module().Dtype.float32)
    with pytest.raises(OverflowError, match="too many"):
        few.call(torch.ones(1, K))
    for m in (0, 17):
        with pytest.raises(ValueError, match=f"1 to 16 rows, not {m}"):
            few.add(native.module().kernel("scalar"), m, native.module().Dtype.float32)


class Answers(TorchFunctionMode):
    """What somebody else says new_empty is."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return self.answer() if function is torch.Tensor.new_empty else function(*args, **(kwargs or {}))


def test_memory_that_is_not_there(multiply):
    x = random_x(2, K)
    multiply(x)

    def fails():
        raise MemoryError("no more")

    with Answers(fails), pytest.raises(MemoryError, match="no more"):
        multiply.few_rows(x)
    for answer in (
        torch.ones(2, N - 1),
        torch.ones(2, N).double(),
        torch.ones(2, N).bfloat16(),
        torch.ones(N, 2).t(),
        1,
    ):
        with Answers(lambda answer=answer: answer):
            assert multiply.few_rows(x) is None


def test_a_residual_and_a_gate_go_the_long_way(multiply):
    x, residual = random_x(2, K), random_x(2, N, seed=2)
    plain = multiply(x)
    assert torch.equal(multiply(x), plain)
    assert torch.equal(multiply(x, residual), plain + residual)
    gated = Multiplier(random_packed(48, K, E2M1, E2M1), None)
    both = gated(x).view(2, 3, 2, 8)
    gated(x)
    expected = torch.nn.functional.silu(both[:, :, 0]) * both[:, :, 1]
    torch.testing.assert_close(gated(x, gated=True), expected.reshape(2, 24))


def meet(*calls):
    """Run all of them at once."""
    barrier = threading.Barrier(len(calls))
    team = [threading.Thread(target=lambda call=call: (barrier.wait(), call())) for call in calls]
    for thread in team:
        thread.start()
    for thread in team:
        thread.join()


def test_threads_that_meet_at_the_first_calls_share_one_weight():
    xs = [random_x(m, K) for m in range(1, 5)]
    for trial in range(30):
        multiply = Multiplier(random_packed(N, K, E2M1, seed=trial), None)
        meet(*(functools.partial(multiply, x) for x in xs))
        assert len({id(prepared) for _, prepared in multiply.choices.values()}) == 1
        if multiply.few_rows:
            assert all(multiply.few_rows(x) is not None for x in xs)


def test_nothing_leaks(multiply):
    x = random_x(2, K)
    multiply(x)
    quick = multiply.few_rows
    y = quick(x)
    assert sys.getrefcount(y) == 2
    held = (x, torch.Tensor, torch.get_num_threads)
    references = [sys.getrefcount(thing) for thing in held]
    tracemalloc.start()
    for _ in range(2000):
        quick(x), quick("no tensor"), quick(x.double())
    assert tracemalloc.get_traced_memory()[0] < 20_000
    tracemalloc.stop()
    assert [sys.getrefcount(thing) for thing in held] == references


def test_the_function_keeps_its_weight_alive_and_nothing_else_does(multiply):
    x = random_x(2, K)
    prepared = cpu.Prepared(multiply.packed, None)
    expected = prepared.run(KERNEL, x)
    quick = prepared.few_rows(KERNEL, 2, torch.float32)
    tiles, linear = weakref.ref(prepared.tensors["codes"]), weakref.ref(prepared)
    del prepared
    gc.collect()
    assert torch.equal(quick(x), expected)
    del quick
    gc.collect()
    assert tiles() is None and linear() is None


def test_threads_share_a_function(multiply):
    xs = [random_x(1 + i % 3, K, seed=i) for i in range(12)]
    expected = [multiply(x) for x in xs]
    wrong = []

    def work(i):
        for _ in range(200):
            for j in range(i, 12, 4):
                if not torch.equal(multiply.few_rows(xs[j]), expected[j]):
                    wrong.append(j)

    meet(*(functools.partial(work, i) for i in range(4)))
    assert not wrong
