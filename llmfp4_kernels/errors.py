"""The exceptions of the package. Each carries one sentence with the numbers that caused it."""


class LLMFP4Error(Exception):
    """Base of every error this package raises on purpose."""


class BadInput(LLMFP4Error, ValueError):
    """A tensor, shape, dtype, option or text that cannot be quantized or multiplied."""


class BadFile(LLMFP4Error, ValueError):
    """A file or folder that is missing, truncated, foreign or of an unsupported version."""


class NoKernel(LLMFP4Error, RuntimeError):
    """No kernel takes the problem, or the forced one refuses it."""
