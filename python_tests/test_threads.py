import threading
import time

import pytest
import torch

from llmfp4_kernels.quantizer.threads import in_threads


@pytest.mark.parametrize("threads", [1, 3])
def test_results_come_in_order_and_jobs_are_drawn_as_needed(threads):
    drawn = []

    def jobs():
        for i in range(20):
            drawn.append(i)
            yield (i,)

    def slow(i):
        time.sleep(0.002 * (i % 3))
        return i, torch.get_num_threads()

    before = torch.get_num_threads()
    results = in_threads(slow, jobs(), threads)
    first = next(results)
    assert first[0] == 0 and len(drawn) <= threads + 1
    rest = list(results)
    assert [i for i, _ in rest] == list(range(1, 20))
    assert threads == 1 or {n for _, n in rest} == {1}
    assert torch.get_num_threads() == before


def test_threads_run_at_once():
    together = threading.Barrier(2, timeout=10)
    assert list(in_threads(lambda i: together.wait() >= 0 and i, [(0,), (1,)], 2)) == [0, 1]


def test_an_exception_ends_it():
    def fail(i):
        if i == 2:
            raise ValueError("layer 2")
        return i

    before = torch.get_num_threads()
    with pytest.raises(ValueError, match="layer 2"):
        list(in_threads(fail, ((i,) for i in range(100)), 2))
    assert torch.get_num_threads() == before
