"""From a full-precision weight, and inputs where the recipe wants them, to a PackedFP4."""

from .calibrate import LayerInputs, collect
from .scales import quantize_weight
from .search import LinearSearch, search_linear

__all__ = ["LayerInputs", "LinearSearch", "collect", "quantize_weight", "search_linear"]
