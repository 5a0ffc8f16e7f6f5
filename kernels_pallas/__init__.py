"""Kernels for Mixture-of-Experts in JAX; needs jax only, usable without moejax.

One folder for each operation, the same file names in each: `api.py` (the public functions), `ref.py` (slow
and obvious, the oracle), one file for each back end, `specs.py` (shapes shared by tests and benchmark),
`bench.py`.
"""

from kernels_pallas.dispatch import Backend, BackendRefused, Explanation, Implementation, Operation
from kernels_pallas.gather_rows import COMBINE_ROWS, GATHER_ROWS, combine_rows, gather_rows
from kernels_pallas.grouped_matmul import (
    GATED,
    GROUPED_FFN,
    GROUPED_MATMUL,
    clamped_swiglu,
    grouped_ffn,
    grouped_matmul,
)
from kernels_pallas.moe_ffn import MOE_FFN, moe_ffn

__all__ = [
    "COMBINE_ROWS",
    "GATED",
    "GATHER_ROWS",
    "GROUPED_FFN",
    "GROUPED_MATMUL",
    "MOE_FFN",
    "Backend",
    "BackendRefused",
    "Explanation",
    "Implementation",
    "Operation",
    "clamped_swiglu",
    "combine_rows",
    "gather_rows",
    "grouped_ffn",
    "grouped_matmul",
    "moe_ffn",
]
