"""Routers, limits and policies on a recorded trace, without the model (``docs/traces.md``).

A replay runs the registered functions themselves, on the numbers that the run's own routers gave: limits see each
rank's tokens as they did on line, and a router that reads its input only as ``x @ kernel`` is fed the recorded logits.
What no replay can know is how later layers' inputs would have changed.

Letters: L MoE layers, G ranks (token shards), t tokens of one rank, E experts, R routing rows, K choices per row.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moejax import dispatch, limits, routing
from moejax.config import ConfigError, MoEConfig, RouterConfig
from moejax.metrics import load_summary
from moejax.moe import summarise
from moejax.trace import Chunk, Trace
from moejax.types import Limit, MoEMetrics, RouteContext, Routing

GRID = tuple(i / 8 for i in range(2, 33))
"""Capacity factors among which :func:`fit_layer_factors` chooses."""
OF_TRAINING = ("jitter", "bias_update_rate", "noncausal")
"""Fields of a router's config that change nothing in evaluation."""


# --- decisions ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a replay puts in the place of the run's own choices."""

    limits: tuple[Limit, ...]
    router: RouterConfig | None
    """None: the pairs that were recorded. Otherwise routed anew, from the recorded logits."""
    ranks: int
    """Over how many ranks a batch is split; each limits its own tokens."""
    expert_ranks: int = 1
    """Over how many of them the experts are spread, in order of ids; 1: each hosts all."""
    expert_dim: int = 0
    """F, of which a limit may leave the major neurons; 0: not known, they count as half."""
    apart: bool = False
    """As in :func:`moejax.dispatch.whole_experts`."""


def setting_of(moe: MoEConfig, trace: Trace, ranks: int = 0) -> Setting:
    """The setting that ``moe`` asks for on ``trace``; ``ranks=0`` takes the recorded ones.

    Raises:
      ConfigError: another number of experts, a router that a trace cannot feed, ranks that do not divide the batch, or
        a limit that draws at random where no key was recorded.
    """
    for name in ("num_experts", "zero_experts"):
        if (asked := getattr(moe, name)) != (recorded := trace.meta.get(name, 0)):
            raise ConfigError(
                f"model.moe.{name}={asked}, but {trace.path} was recorded with {recorded}: give the run's own config, "
                "or leave --config out"
            )
    if moe.router.bias != trace.router.bias:
        raise ConfigError(
            f"router.bias={moe.router.bias}, but {trace.path} was recorded with {trace.router.bias}: a trace's logits "
            "hold the bias, and it can be neither added nor taken away; give the run's own config"
        )
    spread = moe.virtual_ranks
    if spread == 1 and moe.dispatcher == "ep":
        spread = trace.config.mesh.expert
    ranks = ranks or (spread if trace.ranks % spread else trace.ranks)
    rows = trace.meta["batch_shape"][0]
    if ranks < 1 or rows % ranks:
        raise ConfigError(f"ranks={ranks} does not divide the {rows} sequences of a recorded batch: choose a divisor")
    if ranks % spread:
        raise ConfigError(
            f"ranks={ranks} is not a multiple of the {spread} ranks that model.moe.virtual_ranks (or expert "
            f"parallelism) spreads the experts over: choose one, e.g. {spread}"
        )
    in_force = limits.of_config(moe)
    limits.check(in_force, moe, len(trace.layers), causal=routing.FAMILIES[moe.router.name].causal)
    if ranks != trace.ranks and any(getattr(limit, "order", None) == "random" for limit in in_force):
        raise ConfigError(
            f"ranks={ranks}: a limit at random draws from the keys of the {trace.ranks} ranks that were recorded; "
            f"choose another order, or ranks={trace.ranks}"
        )
    asked, recorded = (
        {k: v for k, v in dataclasses.asdict(r).items() if k not in OF_TRAINING} for r in (moe.router, trace.router)
    )
    anew = asked != recorded or (ranks != trace.ranks and not routing.FAMILIES[trace.router.name].causal)
    if anew:
        check_router(moe.router, trace)
    if ranks != spread > 1 and any(_asks_ranks(limit) for limit in in_force):
        raise ConfigError(
            f"ranks={ranks}: load_aware and loads='all' are of one group of {spread} ranks, and these are several: "
            f"choose ranks={spread}"
        )
    return Setting(in_force, moe.router if anew else None, ranks, spread, moe.expert_dim, moe.parts_apart)


def _asks_ranks(limit: Limit) -> bool:
    return getattr(limit, "load_aware", "none") != "none" or getattr(limit, "loads", "rank") == "all"


def check_router(config: RouterConfig, trace: Trace) -> None:
    """Raises ConfigError, with the router's name, where it cannot be replayed from ``trace``."""
    free = trace.meta.get("zero_experts", 0)
    family = routing.family(config, trace.num_experts, zero_experts=free, causal_model=False)
    if not trace.meta["logits"]:
        raise ConfigError(
            f"router.name={config.name!r} differs from the recorded {trace.router.name!r} with k={trace.router.k}, and "
            f"{trace.path} holds no logits to route anew from: record it with --logits"
        )
    choices = trace.num_experts + free
    spare = jnp.zeros((2 * choices, choices), jnp.float32)
    state = {name: jnp.asarray(array[0]) for name, array in trace.state.items()}
    jax.eval_shape(lambda x: family.route(x, _Weights(config.name, x, state), RouteContext(), _fed(config)), spare)


class _Weights(Mapping):
    """Of a router that is fed logits: the identity as its kernel, and the state that the trace holds."""

    def __init__(self, name: str, logits: Array, state: Mapping[str, Array]) -> None:
        self._name, self._arrays = name, {"kernel": jnp.eye(logits.shape[-1], dtype=jnp.float32), **state}

    def __getitem__(self, name: str) -> Array:
        if name not in self._arrays:
            raise ConfigError(
                f"router.name={self._name!r} cannot be replayed from this trace: it reads its array {name!r}, and a "
                f"trace holds logits and {sorted(set(self._arrays) - {'kernel'}) or 'no state'} of the run's routers"
            )
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


def _fed(config: RouterConfig) -> RouterConfig:
    """For a router that is fed logits: they hold the bias already."""
    return dataclasses.replace(config, bias=False)


@functools.partial(jax.jit, static_argnames=("router", "expert_ranks", "expert_dim", "apart"))
def _decide(
    made: Routing,
    key: Array | None,
    state: dict[str, Array],
    tokens: dict[str, Array],
    in_force: tuple[Limit, ...],
    router: RouterConfig | None,
    expert_ranks: int,
    expert_dim: int,
    apart: bool,
) -> tuple[Routing, Routing, MoEMetrics, Array]:
    """``(made, kept, sums over ranks, whether the router's logits are the recorded ones)``, all leading with L."""

    hosted = dispatch.whole_experts(made.probs.shape[-1] - made.zero_experts, expert_ranks, apart)

    def on_rank(
        made: Routing, key: Array | None, state: dict[str, Array], tokens: dict[str, Array], rank: Array, layer: Array
    ) -> tuple:
        first = rank % expert_ranks * hosted
        ctx = RouteContext(
            key=None if key is None else jax.random.wrap_key_data(key), mask=tokens["mask"],
            token_ids=tokens["token_ids"], positions=tokens["positions"], request_ids=tokens["requests"],
            local_experts=first + jnp.arange(hosted, dtype=jnp.int32) if expert_ranks > 1 else None,
            axis_name="rank" if expert_ranks > 1 else None, expert_dim=expert_dim,
        )  # fmt: skip
        fed = made.logits
        if router is not None:
            table = routing.FAMILIES[router.name].route(fed, _Weights(router.name, fed, state), ctx, _fed(router))
            made = dataclasses.replace(table, zero_experts=made.zero_experts)
        kept = limits.apply(limits.for_layer(in_force, layer), made, ctx)
        same = jnp.all(made.logits == fed) if router is not None else jnp.bool_(True)
        skipped = 1 - limits.major_columns(expert_dim, kept.major) / expert_dim if expert_dim else 0.5
        return made, kept, summarise(made, kept, ctx, jnp.int32(0), skipped_share=skipped), same

    layers, ranks = (jnp.arange(n, dtype=jnp.int32) for n in made.probs.shape[:2])
    on_ranks = jax.vmap(on_rank, in_axes=(0, 0, None, 0, 0, None), axis_name="rank")
    made, kept, sums, same = jax.vmap(on_ranks, in_axes=(0, 0, 0, None, None, 0))(
        made, key, state, tokens, ranks, layers
    )
    return made, kept, jax.tree.map(lambda leaf: jnp.sum(leaf, axis=1), sums), jnp.all(same)


def decide(chunk: Chunk, setting: Setting, state: Mapping[str, np.ndarray]) -> tuple[Chunk, MoEMetrics]:
    """One batch under ``setting``: the same tokens with other decisions, and their sums, ``[L, ...]``.

    A new capacity factor does not recompile; a new order, router or number of ranks does.

    Raises:
      ConfigError: the router does more with its input than multiply it by its kernel.
    """
    chunk = _regrouped(chunk, setting.ranks)
    held = {} if setting.router is None else dict(state)
    made, kept, sums, same = jax.device_get(
        _decide(
            chunk.made,
            chunk.key,
            held,
            chunk.tokens,
            setting.limits,
            router=setting.router,
            expert_ranks=setting.expert_ranks,
            expert_dim=setting.expert_dim,
            apart=setting.apart,
        )
    )
    if setting.router is not None and not same:
        raise ConfigError(
            f"router.name={setting.router.name!r} cannot be replayed from logits: it changes its input before its "
            "matrix, so that it has other logits on the recorded ones"
        )
    return dataclasses.replace(chunk, made=made, kept=kept), sums


def _regrouped(chunk: Chunk, ranks: int) -> Chunk:
    """The batch split over ``ranks``: tokens are in order of rank, so each gets a run of the batch's rows."""
    if ranks == chunk.made.expert.shape[1]:
        return chunk

    def split(leaf: np.ndarray, axis: int) -> np.ndarray:
        return leaf.reshape(*leaf.shape[:axis], ranks, -1, *leaf.shape[axis + 2 :])

    made = chunk.made
    if made.token is not None:  # pairs over the old ranks mean nothing: only what a router is fed stays
        blank: Any = np.zeros((*made.probs.shape[:-1], 1), np.int32)
        made = dataclasses.replace(made, expert=blank, weight=blank, score=blank, valid=blank, token=None)
    made = jax.tree.map(lambda leaf: split(leaf, 1), made)
    return Chunk(made, made, {name: split(array, 0) for name, array in chunk.tokens.items()}, None)


# --- figures --------------------------------------------------------------------------------------


class Tally:
    """Sums over batches of what the layers did."""

    def __init__(self) -> None:
        self.sums: MoEMetrics | None = None

    def add(self, sums: MoEMetrics) -> None:
        new = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), sums)
        self.sums = new if self.sums is None else jax.tree.map(np.add, self.sums, new)

    def rows(self, layers: Sequence[int]) -> list[dict[str, Any]]:
        """A row for each layer and one in total: pairs ``routed`` = ``kept`` + ``dropped``, pairs ``added``, work
        ``skipped`` of kept ones in whole pairs, ``tokens``, ``lost`` tokens, and the load before and after limits.

        Loads are of the whole trace. In total, ``max_over_mean`` and ``cv`` are those of the worst layer.
        """
        assert self.sums is not None  # a trace has a batch
        m = self.sums
        before, after = load_summary(m), load_summary(dataclasses.replace(m, routed=m.computed))
        rows: list[dict[str, Any]] = [
            {"layer": layer, "routed": m.routed[i].sum(), "kept": m.routed[i].sum() - m.dropped[i],
             "dropped": m.dropped[i], "added": m.added[i],
             "skipped": 0.0 if m.skipped is None else m.skipped[i], "tokens": m.tokens[i], "lost": m.lost_tokens[i],
             **{name: (before[name][i], after[name][i]) for name in ("max_over_mean", "cv", "dead")}}
            for i, layer in enumerate(layers)
        ]  # fmt: skip
        counts = ("routed", "kept", "dropped", "added", "skipped", "tokens", "lost")
        total: dict[str, Any] = {"layer": "total", **{name: sum(row[name] for row in rows) for name in counts}}
        for name, join in (("max_over_mean", max), ("cv", max), ("dead", sum)):
            total[name] = tuple(join(values) for values in zip(*(row[name] for row in rows), strict=True))
        return [*rows, total]


def fit_layer_factors(
    source: Trace, moe: MoEConfig, mean: float, ranks: int = 0, grid: Sequence[float] = GRID
) -> tuple[tuple[float, ...], tuple[float, float]]:
    """Capacity factors of Token Drop by score, one for each MoE layer, with this mean: those that lose the least gate
    weight in all.

    The weight that a layer loses falls with its factor, and ever more slowly; so, from the lowest factor of ``grid``
    on, the layer that gains most by its next factor gets it, until the mean is reached. With one expert on a rank the
    sum of the factors is that of the busiest ranks' capacities, hence of the time, where every layer is at its limit.

    Returns:
      The factors, and the share of all gate weight that is lost with them and with ``mean`` in every layer.

    Raises:
      ConfigError: as :func:`setting_of`, or a mean outside the grid.
    """
    if not min(grid) <= mean <= max(grid):
        raise ConfigError(f"mean={mean}: factors of layers are chosen in [{min(grid)}, {max(grid)}]")
    plain = dataclasses.replace(moe, capacity_factor=0.0, capacity_limits=())
    base, steps = setting_of(plain, source, ranks), sorted({*grid, mean})
    lost, whole = np.zeros((len(source.layers), len(steps))), 0.0
    for chunk in source:
        for i, factor in enumerate(steps):
            made, _ = decide(chunk, dataclasses.replace(base, limits=(limits.token_drop(factor),)), source.state)
            gone = made.made.valid & ~made.kept.valid
            lost[:, i] += np.where(gone, made.made.weight, 0.0).sum(axis=(1, 2, 3), dtype=np.float64)
        whole += np.where(made.made.valid, made.made.weight, 0.0).sum(dtype=np.float64)
    at, spent = np.zeros(len(lost), int), len(lost) * steps[0]
    while True:
        # Capacities are whole numbers, so a step may gain nothing and the two after it much: any number of them is one.
        room = len(lost) * mean - spent + 1e-9
        moves = [
            ((lost[i, a] - lost[i, b]) / (steps[b] - steps[a]), i, b)
            for i, a in enumerate(at)
            for b in range(a + 1, len(steps))
            if steps[b] - steps[a] <= room
        ]
        if not moves:
            break
        _, best, to = max(moves, key=lambda move: move[0])
        spent += steps[to] - steps[at[best]]
        at[best] = to
    chosen = tuple(steps[a] + (len(lost) * mean - spent) / len(lost) for a in at)
    fitted, even = sum(lost[i, a] for i, a in enumerate(at)), lost[:, steps.index(mean)].sum()
    return chosen, (float(fitted / max(whole, 1e-20)), float(even / max(whole, 1e-20)))


# --- policies -------------------------------------------------------------------------------------

Policy = Callable[[Iterable[Chunk], int, Sequence[int]], Mapping[int, Float[np.ndarray, "L"]]]
"""``(batches, E, sizes) -> {size: hit rate of each layer}``: how well a store that holds ``size`` experts of each layer
would serve the pairs that are left after limits (``Chunk.kept``), rank by rank."""

POLICIES: dict[str, Policy] = {}


def register(name: str) -> Callable[[Policy], Policy]:
    """Registers a policy under ``name``: ``experiments.replay --policy=name`` then runs it."""

    def add(policy: Policy) -> Policy:
        if name in POLICIES:
            raise ValueError(f"policy {name!r} is registered twice")
        POLICIES[name] = policy
        return policy

    return add


@register("lru")
def lru(chunks: Iterable[Chunk], num_experts: int, sizes: Sequence[int]) -> dict[int, Float[np.ndarray, "L"]]:
    """A cache of the experts used last, one for each layer and rank, filled on demand from empty.

    Accesses are in order of tokens (row after row of a batch, as if each text were decoded on its own), and within a
    token in order of its choices. An access hits iff fewer than ``size`` other experts were used since that expert's
    last use (Mattson et al. 1970), so that one pass serves all sizes. The rate is hits / accesses, first uses counted
    as misses; NaN without an access.
    """
    used, counts, clock = None, None, 0
    for chunk in chunks:
        expert, valid = _accesses(chunk.kept)
        if used is None or counts is None:
            used = jnp.full((*expert.shape[:2], num_experts), -1, jnp.int32)
            counts = np.zeros((expert.shape[0], num_experts + 1), np.int64)
        used, distances = _stack_distances(used, expert, valid, jnp.int32(clock))
        clock += expert.shape[-1]
        counts += np.asarray(distances).sum(axis=1)
    if counts is None:
        raise ConfigError("a policy needs at least one batch")
    with np.errstate(invalid="ignore"):
        return {size: counts[:, : min(size, num_experts)].sum(axis=1) / counts.sum(axis=1) for size in sizes}


def _accesses(kept: Routing) -> tuple[np.ndarray, np.ndarray]:
    """Experts of all pairs in order of tokens, ``[L, G, R K]``, and which of them need their weights."""
    expert, valid = np.asarray(kept.expert), np.asarray(routing.computing(kept))
    if kept.token is not None:
        order = np.argsort(np.asarray(kept.token), axis=-1, kind="stable")[..., None]
        expert, valid = np.take_along_axis(expert, order, axis=-2), np.take_along_axis(valid, order, axis=-2)
    return expert.reshape(*expert.shape[:2], -1), valid.reshape(*valid.shape[:2], -1)


@jax.jit
def _stack_distances(
    used: Int[Array, "L G E"], expert: Int[Array, "L G P"], valid: Array, clock: Int[Array, ""]
) -> tuple[Int[Array, "L G E"], Int[Array, "L G E+1"]]:
    """Time of each expert's last use after these accesses, and how many had each number of other experts used since;
    the last place counts first uses."""

    def on_rank(used: Array, expert: Array, valid: Array) -> tuple[Array, Array]:
        def access(carry: tuple[Array, Array], pair: tuple) -> tuple[tuple[Array, Array], None]:
            used, counts = carry
            expert, valid, time = pair
            since = jnp.sum(used > used[expert])
            place = jnp.where(used[expert] < 0, used.size, since)
            return (used.at[expert].set(jnp.where(valid, time, used[expert])), counts.at[place].add(valid)), None

        times = clock + jnp.arange(expert.size, dtype=jnp.int32)
        start = (used, jnp.zeros(used.size + 1, jnp.int32))
        return jax.lax.scan(access, start, (expert, valid, times))[0]

    return jax.vmap(jax.vmap(on_rank))(used, expert, valid)
