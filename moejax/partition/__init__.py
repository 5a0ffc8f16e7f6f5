"""ExpertTransform (seam 3), and what DualSparse-MoE (2508.18376) does to experts: exact partition, parts, levels.

Letters: E experts, P parts of each, F expert hidden, D model, R routing rows, K choices per row.
"""

from moejax.partition.levels import by_level, merged_pairs, parting, prepared, split, spread
from moejax.partition.transform import ExpertTransform, Identity

__all__ = ["ExpertTransform", "Identity", "by_level", "merged_pairs", "parting", "prepared", "split", "spread"]
