"""Grouped matmul and the expert FFN built on it."""

from kernels_pallas.grouped_matmul.api import GROUPED_FFN, GROUPED_MATMUL, grouped_ffn, grouped_matmul
from kernels_pallas.grouped_matmul.ffn import GATED, Activation, clamped_swiglu

__all__ = ["GATED", "GROUPED_FFN", "GROUPED_MATMUL", "Activation", "clamped_swiglu", "grouped_ffn", "grouped_matmul"]
