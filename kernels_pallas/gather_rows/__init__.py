"""Rows of an array by number, copied (dispatch) or summed by token (combine): bound by memory."""

from kernels_pallas.gather_rows.api import COMBINE_ROWS, GATHER_ROWS, combine_rows, gather_rows

__all__ = ["COMBINE_ROWS", "GATHER_ROWS", "combine_rows", "gather_rows"]
