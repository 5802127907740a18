"""No GPU is needed to see that the search would run on one: tensors carry a pretended device, and must not mix."""

import pytest
import torch
from paper_search import layer
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from llmfp4_kernels.quantizer import search_linear

FACTORIES = {torch.tensor, torch.ones, torch.zeros, torch.full, torch.arange, torch.empty, torch.randn, torch.rand}
MOVES = {torch.Tensor.to, torch.Tensor.cuda}
READS = {torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.cpu}


class PretendedDevice(TorchFunctionMode):
    """What a factory makes without `device`, and what .cpu() returns, is on the CPU; what meets it must be too.

    As torch itself, it lets tensors without dimensions of the CPU meet any other.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        on_gpu = [getattr(t, "on_gpu", False) for t in tensors]
        if function in MOVES | READS and isinstance(out, torch.Tensor):
            out = out.detach()  # where nothing is to be done, it is the very tensor that was given
        if function in FACTORIES:
            where = "device" in kwargs
        elif function in MOVES:
            where = on_gpu[0] or any(isinstance(a, torch.device | torch.Tensor) for a in tree_leaves(args[1:]))
        else:
            where = any(on_gpu) and function not in READS
            alien = [list(t.shape) for t, gpu in zip(tensors, on_gpu) if t.ndim and not gpu]
            assert not (where and alien), f"{function.__name__} of tensors on the GPU and {alien} on the CPU"
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                t.on_gpu = where
        return out


def on_gpu(t):
    t.on_gpu = True
    return t


def test_the_pretended_device_sees_a_mixture():
    with PretendedDevice():
        gpu = on_gpu(torch.randn(3))
        assert (gpu * 2 + torch.tensor(1.0)).on_gpu and not gpu.cpu().on_gpu and torch.ones(3).to(gpu.device).on_gpu
        with pytest.raises(AssertionError, match="on the GPU"):
            gpu + torch.ones(3)


@pytest.mark.parametrize("grid", ["additive", "gamma"])
@pytest.mark.parametrize(
    "kwargs", [{}, {"activation_bits": 16}, {"preshift": False}, {"objective": "fisher"}, {"gram": 1}]
)
@pytest.mark.parametrize("shape", [(20, 24, 40), (150, 280, 600)], ids=["small", "probed"])
def test_search_stays_on_its_device(shape, kwargs, grid, monkeypatch):
    monkeypatch.setattr("llmfp4_kernels.quantizer.objective.WHOLE", 1 << 20)
    x, w = (on_gpu(t) for t in layer("outlier", *shape))
    if "objective" in kwargs:
        kwargs = kwargs | {"output_gradient": on_gpu(torch.ones(len(x), len(w)))}
    if "gram" in kwargs:
        kwargs = {"gram": on_gpu(x.double().T @ x.double()), "gram_tokens": len(x), "activation_bits": 16}
    with PretendedDevice():
        found = search_linear(x, w, grid=grid, **kwargs)
        assert found.row_scale.on_gpu and found.weight_dequantized().on_gpu
        assert found.activation is None or (found.activation.shift.on_gpu and found.activation.x_scale.on_gpu)
