"""Grouped matmul and the expert FFN built on it."""

from kernels_pallas.grouped_matmul.api import GROUPED_FFN, GROUPED_MATMUL, grouped_ffn, grouped_matmul
from kernels_pallas.grouped_matmul.ffn import Activation

__all__ = ["GROUPED_FFN", "GROUPED_MATMUL", "Activation", "grouped_ffn", "grouped_matmul"]
