"""Matrix product of rows sorted by group with one matrix per group."""

from pallas_kernels.grouped_matmul.api import (
  group_starts,
  grouped_matmul,
  grouped_matmul_gelu,
  grouped_matmul_gelu_backward,
  grouped_outer,
  resolve,
  row_alignment,
  take_rows,
)

__all__ = [
  "group_starts",
  "grouped_matmul",
  "grouped_matmul_gelu",
  "grouped_matmul_gelu_backward",
  "grouped_outer",
  "resolve",
  "row_alignment",
  "take_rows",
]
