"""What is timed: one problem, as plain data that any family and any process can read.

Letters: P rows, E experts, D model, F expert hidden, K x N one expert's matrix (D x F for the up projection,
F x D for the down projection), T tokens, k experts for each token.
"""

import dataclasses

import numpy as np

OPERATIONS = ("forward", "dlhs", "drhs", "decode", "major")
PROJECTIONS = ("up", "down")
PASSES = ("forward", "forward+backward")
# Relative norm of the error that a result may have; above it there is no time.
TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-3, "float16": 1e-3}
# A layer rounds at each of its steps: pre-activations, activation, result, and their gradients.
LAYER_TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2, "float16": 3e-3}
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
BETWEEN_USES = 500_000_000  # bytes between two uses of an input, ten times the L2 of an H100
MANY = 16  # how often a program of short calls goes over its sets of inputs
TILE = 128  # rows of a tile: what the dense ceiling is discounted by
EXTENT_BLOCK = 64  # columns that extents count in: `grouped_matmul.groups`, which other processes do not import


class WrongResult(AssertionError):
    """An implementation whose result is not within tolerance; it gets no time."""


def shares(experts: int, alpha: float, seed: int) -> np.ndarray:
    """Each expert's share of the rows, from Dirichlet(alpha); infinite alpha gives equal shares."""
    if np.isinf(alpha):
        return np.full(experts, 1 / experts)
    return np.random.default_rng(seed).dirichlet(np.full(experts, alpha))


@dataclasses.dataclass(frozen=True)
class Case:
    """One grouped matmul.

    Attributes:
        operation: one of OPERATIONS; `decode` is a forward that counts bytes, `major` a forward of which every
            group takes the leading half of F.
        projection: "up" (D x F) or "down" (F x D).
        name, experts, d_model, d_expert, rows: the shape.
        alpha: concentration of the Dirichlet distribution that the groups were drawn from.
        dtype: of all operands and the result.
        group_sizes: rows of each expert; they sum to `rows`.
    """

    operation: str
    projection: str
    name: str
    experts: int
    d_model: int
    d_expert: int
    rows: int
    alpha: float
    dtype: str
    group_sizes: tuple[int, ...]

    @property
    def operand_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of a and b: lhs and rhs; dy and rhs for `dlhs`; lhs and dy for `drhs`."""
        p, e, k, n = self.rows, self.experts, self.k, self.n
        return {"dlhs": ((p, n), (e, k, n)), "drhs": ((p, k), (p, n))}.get(self.operation, ((p, k), (e, k, n)))

    @property
    def k(self) -> int:
        return self.d_model if self.projection == "up" else self.d_expert

    @property
    def n(self) -> int:
        return self.d_expert if self.projection == "up" else self.d_model

    @property
    def extent(self) -> int | None:
        """Columns of F that take part in `major`, rounded up as `grouped_matmul` does; None for all."""
        if self.operation != "major":
            return None
        return min(-(-(self.d_expert // 2) // EXTENT_BLOCK) * EXTENT_BLOCK, self.d_expert)

    @property
    def flops(self) -> int:
        """Of valid rows and columns only: padding does no useful work."""
        return 2 * sum(self.group_sizes) * self.d_model * (self.extent or self.d_expert)

    @property
    def bytes(self) -> int:
        """What must move: weights of experts with rows, rows in, rows out."""
        weights = sum(size > 0 for size in self.group_sizes) * self.d_model * self.d_expert
        return ITEMSIZE[self.dtype] * (weights + sum(self.group_sizes) * (self.d_model + self.d_expert))

    @property
    def tile_share(self) -> float:
        """Rows over rows padded to TILE in each group: what a kernel of whole tiles cannot win back."""
        padded = sum(-(-size // TILE) * TILE for size in self.group_sizes)
        return sum(self.group_sizes) / padded

    @property
    def starts(self) -> np.ndarray:
        return np.cumsum(self.group_sizes) - np.asarray(self.group_sizes)

    def fields(self) -> dict:
        """The columns of a row that say what was timed."""
        row = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        sizes = row.pop("group_sizes")
        return row | {"empty_groups": sum(size == 0 for size in sizes), "largest_group": max(sizes)}


@dataclasses.dataclass(frozen=True)
class LayerCase:
    """A whole MoE layer.

    Attributes:
        passes: one of PASSES.
        scope: "experts" takes the routing as given; "layer" has a linear router with softmax and top-k before it.
        name, tokens, d_model, d_expert, experts, top_k: the shape.
        alpha: skew of the given routing; a random router's own is close to even.
    """

    passes: str
    scope: str
    name: str
    tokens: int
    d_model: int
    d_expert: int
    experts: int
    top_k: int
    alpha: float
    dtype: str

    @property
    def rows(self) -> int:
        return self.tokens * self.top_k

    @property
    def flops(self) -> int:
        """Of the three matmuls, twice more for the backward; routing and activation are not counted."""
        return 6 * self.rows * self.d_model * self.d_expert * (3 if "backward" in self.passes else 1)

    def routing(self, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """(expert [T,k] int32, weight [T,k] float32): k different experts for each token, by Gumbel top-k.

        Token by token the k experts are drawn without replacement with the shares of Dirichlet(alpha) (Efraimidis
        and Spirakis 2006); weights are random and sum to 1.
        """
        rng = np.random.default_rng(seed)
        logits = np.log(shares(self.experts, self.alpha, seed) + 1e-30)
        keys = logits + rng.gumbel(size=(self.tokens, self.experts))
        expert = np.argpartition(-keys, self.top_k - 1, axis=1)[:, : self.top_k].astype(np.int32)
        weight = rng.uniform(0.2, 1.0, (self.tokens, self.top_k)).astype(np.float32)
        return expert, weight / weight.sum(axis=1, keepdims=True)

    def fields(self) -> dict:
        """The columns of a row that say what was timed."""
        row = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        alpha = None if np.isinf(self.alpha) else self.alpha
        return row | {"operation": "layer", "pass": row.pop("passes"), "rows": self.rows, "alpha": alpha}


AnyCase = Case | LayerCase


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to time.

    Attributes:
        repeats: timings of each implementation.
        target_ms: back-to-back calls are repeated until one timing lasts about this long.
        implementations: names to run, all if empty.
        layouts: of the weights: "EKN" as stored, "ENK" transposed.
        tune: "short" (a few configurations), "full" (all that the rival lists) or "none".
        ceilings: of family `dense` to run, all if empty.
        known: configurations found before, by `key`: they save the sweep.
        in_turn: all implementations of a case are timed in turn (`turns.py`), not one after the other.
    """

    repeats: int = 20
    target_ms: float = 25.0
    implementations: tuple[str, ...] = ()
    layouts: tuple[str, ...] = ("EKN",)
    tune: str = "short"
    ceilings: tuple[str, ...] = ()
    known: dict[str, str] = dataclasses.field(default_factory=dict)
    in_turn: bool = False


def key(implementation: str, case: Case) -> str:
    """Under which a configuration found by a sweep is kept: skews and seeds share one."""
    return f"{implementation} {case.operation} {case.projection} {case.name} {case.rows} {case.dtype}"


def without_groups(case: Case) -> Case:
    """What a program is compiled for: group sizes are data on the device, so skews share a program."""
    return dataclasses.replace(case, alpha=0.0, group_sizes=())


def sampled_rows(case: Case, groups: int = 8, rows: int = 64, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(groups [G], rows [G,R]) to check: the largest, the smallest that has rows, and random ones; R with repeats."""
    rng = np.random.default_rng(seed)
    sizes = np.asarray(case.group_sizes)
    alive = np.flatnonzero(sizes)
    extremes = [alive[np.argmax(sizes[alive])], alive[np.argmin(sizes[alive])]]
    chosen = np.concatenate([extremes, rng.choice(alive, groups - 2)])
    picked = [case.starts[g] + rng.integers(0, sizes[g], rows) for g in chosen]
    for row, g in zip(picked, chosen, strict=True):  # a group's first and last row are where kernels go wrong
        row[0], row[1] = case.starts[g], case.starts[g] + sizes[g] - 1
    return chosen.astype(np.int32), np.stack(picked).astype(np.int32)


def sampled_experts(case: Case) -> np.ndarray:
    """Experts whose weight gradient is checked: largest, middle and smallest of those with rows."""
    sizes = np.asarray(case.group_sizes)
    order = [e for e in np.argsort(-sizes) if sizes[e]]
    return np.unique([order[0], order[len(order) // 2], order[-1]]).astype(np.int32)
