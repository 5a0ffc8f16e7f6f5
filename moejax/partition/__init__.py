"""ExpertTransform (seam 3), and what DualSparse-MoE (2508.18376) does to experts: exact partition, parts, levels.

Letters: E experts, P parts of each, F expert hidden, D model, R routing rows, K choices per row.
"""

from moejax.partition.complete import merge_arrays, merge_moe, prune, split_arrays, split_moe
from moejax.partition.levels import by_level, merged_pairs, parting, prepared, split, spread
from moejax.partition.transform import ExpertTransform, Identity

__all__ = [
    "ExpertTransform",
    "Identity",
    "by_level",
    "merge_arrays",
    "merge_moe",
    "merged_pairs",
    "parting",
    "prepared",
    "prune",
    "split",
    "split_arrays",
    "split_moe",
    "spread",
]
