"""Each instruction form of the CUDA kernels alone: the PTX machine against numpy, and against a GPU's results."""

import functools

import instruction_forms
import instruction_forms_sm90
import numpy as np
import pytest
import torch
from cuda_on_cpu import headers_key
from instruction_forms import INCLUDES, VECTORS, disagreements, record
from ptx import In, Out, compile_cuda, missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=missing() or "")
MODULES = {"sm_80": instruction_forms, "sm_90a": instruction_forms_sm90}
FORMS = [(arch, name) for arch, module in MODULES.items() for name in module.FORMS]


@functools.cache
def runner(arch):
    """run(name, inputs, outputs) on the PTX machine."""
    source = MODULES[arch].SOURCE.read_text()
    program = compile_cuda(source, arch, ("-I", str(INCLUDES), f"-DHEADERS={headers_key()}"))

    def run(name, inputs, outputs):
        given = torch.from_numpy(inputs.view(np.int32).copy())
        blocks, _, threads = inputs.shape
        out = torch.empty(blocks, outputs, threads, dtype=torch.int32)
        assert program.run(f"form_{name}", blocks, threads, [In(given), Out(out)]).unwritten == [0]
        return out.numpy().view(np.uint32)

    return run


@functools.cache
def recorded(arch):
    return record(runner(arch), MODULES[arch].FORMS)


@pytest.mark.parametrize("arch", MODULES)
def test_the_machine_is_numpy(arch):
    assert disagreements(recorded(arch), MODULES[arch].FORMS) == []


@pytest.mark.parametrize(("arch", "name"), FORMS)
def test_one_wrong_word_is_found(arch, name):
    """The lowest bit of one word, or, where sums may round, of a block whose sums are exact."""
    vectors = recorded(arch) | {f"{name} out": recorded(arch)[f"{name} out"].copy()}
    vectors[f"{name} out"][0, -1, 17] ^= 1
    (found,) = disagreements(vectors, MODULES[arch].FORMS)
    assert found.startswith(f"{name}: 1 of") and "of lane 17, block 0" in found


@pytest.mark.skipif(not VECTORS.exists(), reason="no vectors of a GPU are recorded: make gpu-check writes them on one")
@pytest.mark.parametrize("arch", MODULES)
def test_the_machine_is_the_gpu(arch):
    """Equal bits, but for sums of tensor cores that round."""
    stored = dict(np.load(VECTORS))
    forms = {name: form for name, form in MODULES[arch].FORMS.items() if f"{name} in" in stored}
    if not forms:
        pytest.skip(f"the vectors were recorded on a GPU without {arch}'s instructions")
    assert disagreements(stored, forms) == []
    for name, form in forms.items():
        inputs, got = stored[f"{name} in"], stored[f"{name} out"]
        if form.expect(inputs)[1] is None:
            assert np.array_equal(runner(arch)(name, inputs, form.outputs), got), name
