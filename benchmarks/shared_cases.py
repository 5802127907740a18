"""What tests and benchmarks share lives in python_tests/cases.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "python_tests"))

from cases import LINEAR_SHAPES, random_packed, random_x

__all__ = ["LINEAR_SHAPES", "random_packed", "random_x"]
