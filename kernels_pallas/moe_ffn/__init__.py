"""The routed experts of one layer in one call: sort, gather, expert FFN, gate weights, combine."""

from kernels_pallas.moe_ffn.api import MOE_FFN, moe_ffn
from kernels_pallas.moe_ffn.composed import Primitives
from kernels_pallas.moe_ffn.plan import Plan, make_plan

__all__ = ["MOE_FFN", "Plan", "Primitives", "make_plan", "moe_ffn"]
