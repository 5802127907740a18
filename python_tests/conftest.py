"""Poisoned memory for every test: what a kernel forgets to write is NaN, not an old right answer."""

import pytest
import torch


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
    """torch.set_num_threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
