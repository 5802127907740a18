"""Each instruction form of the CUDA kernels alone: the PTX machine against numpy, and against a GPU's results."""

import numpy as np
import pytest
import torch
from cuda_on_cpu import headers_key
from instruction_forms import FORMS, INCLUDES, SOURCE, VECTORS, disagreements, record
from ptx import In, Out, compile_cuda, missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=missing() or "")


@pytest.fixture(scope="module")
def program():
    return compile_cuda(SOURCE.read_text(), "sm_80", ("-I", str(INCLUDES), f"-DHEADERS={headers_key()}"))


def runner(program):
    """run(name, inputs, outputs) on the PTX machine."""

    def run(name, inputs, outputs):
        given = torch.from_numpy(inputs.view(np.int32).copy())
        out = torch.empty(len(inputs), outputs, inputs.shape[-1], dtype=torch.int32)
        assert program.run(f"form_{name}", len(inputs), 32, [In(given), Out(out)]).unwritten == [0]
        return out.numpy().view(np.uint32)

    return run


def test_the_machine_is_numpy(program):
    assert disagreements(record(runner(program))) == []


@pytest.mark.parametrize("name", FORMS)
def test_one_wrong_word_is_found(program, name):
    """The lowest bit of one word, or, where sums may round, of a block whose sums are exact."""
    vectors = record(runner(program))
    vectors[f"{name} out"][0, -1, 17] ^= 1
    (found,) = disagreements(vectors)
    assert found.startswith(f"{name}: 1 of") and "of lane 17, block 0" in found


@pytest.mark.skipif(not VECTORS.exists(), reason="no vectors of a GPU are recorded: make gpu-check writes them on one")
def test_the_machine_is_the_gpu(program):
    """Equal bits, but for sums of tensor cores that round."""
    stored = dict(np.load(VECTORS))
    assert disagreements({name: stored[name] for name in stored if name != "about"}) == []
    run = runner(program)
    for name, form in FORMS.items():
        inputs, got = stored[f"{name} in"], stored[f"{name} out"]
        if form.expect(inputs)[1] is None:
            assert np.array_equal(run(name, inputs, form.outputs), got), name
