"""Points of a sweep from values: thin words over ``itertools`` for sweep files.

A point is a dict from the full name of a config field to its value. Every function here yields points, and takes
anything that does, so they nest; ``itertools.chain`` or ``yield from`` puts sweeps after each other.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

Point = dict[str, Any]
SEED = "train.seed"


def grid(fields: Mapping[str, Iterable[Any]]) -> Iterator[Point]:
    """Every combination; the last field changes fastest.

    >>> list(grid({"train.steps": (10, 20), "train.seed": range(2)}))[1]
    {'train.steps': 10, 'train.seed': 1}
    """
    for values in itertools.product(*fields.values()):
        yield dict(zip(fields, values, strict=True))


def together(fields: Mapping[str, Iterable[Any]]) -> Iterator[Point]:
    """The first values of all fields, then the second ones, and so on.

    Raises:
      ValueError: the fields have different numbers of values.
    """
    values = {name: tuple(found) for name, found in fields.items()}
    sizes = {name: len(found) for name, found in values.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"together: {sizes} values: give every field the same number, or use grid")
    for row in zip(*values.values(), strict=True):
        yield dict(zip(values, row, strict=True))


def product(*sweeps: Iterable[Point]) -> Iterator[Point]:
    """Every point of the first sweep with every point of the others, merged.

    Raises:
      ValueError: a field is set by two of them.
    """
    for points in itertools.product(*map(tuple, sweeps)):
        merged: Point = {}
        for point in points:
            if twice := sorted(merged.keys() & point.keys()):
                raise ValueError(f"product: {', '.join(twice)} is set by two of the sweeps")
            merged |= point
        yield merged


def seeds(points: Iterable[Point], seeds: int | Iterable[int] = 3) -> Iterator[Point]:
    """Each point once for each training seed: 0, 1, ... ``seeds - 1``, or the given ones."""
    return product(points, grid({SEED: range(seeds) if isinstance(seeds, int) else seeds}))
