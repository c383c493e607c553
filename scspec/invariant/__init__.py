"""Batch-invariant float arithmetic: every row gets the same bits alone, beside others, in prefill, on any thread count.

Each result is a fixed sequence of IEEE float32 operations on its own row (sums in ascending order, exp as a fixed
polynomial), so no library's choice of summation order or vector tail can reach it.
"""

from scspec.invariant.modules import InvariantRMSNorm, InvariantRotary, InvariantSiLU

__all__ = ["InvariantRMSNorm", "InvariantRotary", "InvariantSiLU"]
