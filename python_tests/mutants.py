"""What every suite of planted bugs asks of a kernel with one."""

from __future__ import annotations

import re
from collections.abc import Callable

from ptx import FAULTS

WRONG, RIGHT = "wrong values", "right values"
LEFT = "outputs unwritten or counters left"
"""What cuda_on_cpu.OnCpu asserts."""


def assert_caught(run: Callable[[], str], expected: str, kernel: str | None = None) -> tuple[str, str]:
    """Runs it; what it returns, or the name of the fault it ends in, must stand in `expected`.

    A fault's text must say where in `kernel` it was. Returns (what was found, the fault's text).
    """
    try:
        found, text = run(), ""
    except AssertionError as left:
        found, text = LEFT, str(left)
        assert re.search("bytes of y unwritten|is not 0 again", text), text
    except tuple(FAULTS.values()) as fault:
        found, text = type(fault).__name__, str(fault)
        assert kernel is None or (text.startswith(f"kernel {kernel}, block (") and "PTX line" in text), text
    assert found in expected, f"{found}: {text}"
    return found, text
