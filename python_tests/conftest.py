"""Poisoned memory for every test: what a kernel forgets to write is NaN, not an old right answer."""

import pytest
import torch

from llmfp4_kernels import native


@pytest.fixture(scope="session", autouse=True)
def own_inductor_cache(tmp_path_factory):
    """What torch compiled for another version of the package does not serve: its key says nothing of our operators."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


@pytest.fixture(autouse=True)
def poisoned_memory():
    before = torch.utils.deterministic.fill_uninitialized_memory, torch.are_deterministic_algorithms_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)  # torch.empty is filled (NaN, largest integer) only in this mode
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before[0]
    torch.use_deterministic_algorithms(before[1])


@pytest.fixture
def threads():
    """torch.set_num_threads for one test, in which kernels use all of them, however little there is to do."""
    before, module = torch.get_num_threads(), None if native.problem_with_module() else native.module()
    wake = module and module.wake_microseconds()
    if module:
        module.set_wake_microseconds(1e-6)
    yield torch.set_num_threads
    torch.set_num_threads(before)
    if module:
        module.set_wake_microseconds(wake)
