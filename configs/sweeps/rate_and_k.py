"""Learning rate against experts per token, three training seeds each, plus the untuned baseline::

    python -m experiments.sweep --config=configs/quickstart.py:short \\
        --sweep=configs/sweeps/rate_and_k.py --workdir=runs/rate_and_k

Fifteen runs of half a minute to a minute on 2 cores. ``--only='k=1, learning_rate=0.003'`` runs one row of the table.
"""

from collections.abc import Iterator
from typing import Any

from configs.sweeps.combine import grid, seeds


def sweep() -> Iterator[dict[str, Any]]:
    fields = {"model.moe.router.k": (1, 4), "train.learning_rate": (3e-3, 1e-2)}
    yield from seeds(grid(fields))
    yield from seeds([{}])  # the config as it is
