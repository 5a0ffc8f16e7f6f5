"""Training: the state, one optimizer step, and the loop around it.

A step is a pure function ``(state, batch) -> (state, StepMetrics)``. Batches arrive as ``[micro-batches, B, S]``.
Everything random is derived from the seed and the step, so the state needs no key and a run that stopped continues as
if it had not.
"""

import dataclasses
import signal
import time
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from moejax import losses
from moejax.config import ExperimentConfig, TrainConfig
from moejax.metrics import tree_sum
from moejax.model import Decoder, build, layer_groups
from moejax.sharding import RouterState, replicated, tree_shardings
from moejax.types import MoEMetrics, pytree


@pytree
class TrainState:
    step: Int[Array, ""]
    params: nnx.State
    router_state: nnx.State
    """State of routers that training moves by a rule of its own."""
    opt_state: Any


@pytree
class StepMetrics:
    loss: Float[Array, ""]
    """Cross entropy plus weighted auxiliary losses, nats per token."""
    ce: Float[Array, ""]
    """Cross entropy, nats per token."""
    nll: Float[Array, ""]
    """Sum of -log p over targets that stand for text, nats; with ``text_bytes`` it gives bits per byte."""
    text_bytes: Float[Array, ""]
    tokens: Float[Array, ""]
    aux: dict[str, Float[Array, ""]]
    """Raw auxiliary losses, means over layers."""
    grad_norm: Float[Array, ""]
    moe: MoEMetrics | None


def schedule(config: TrainConfig) -> optax.Schedule:
    """Linear warm-up, then cosine down to ``final_fraction`` of the peak at the last step."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=max(config.steps, config.warmup_steps + 1),
        end_value=config.learning_rate * config.final_fraction,
    )


def optimizer(config: TrainConfig, params: nnx.State) -> optax.GradientTransformation:
    """AdamW with clipping by global norm; weight decay on matrices only.

    A matrix has two or more *logical* axes, as stacking layers adds one; heads and their width are one (a bias of
    queries is a vector).
    """

    def is_matrix(variable: nnx.Variable) -> nnx.Variable:
        axes = [axis for axis in variable.get_metadata()["axes"] if axis != "head_dim"]
        return variable.replace(len(axes) >= 2)

    decayed = jax.tree.map(is_matrix, params, is_leaf=lambda v: isinstance(v, nnx.Variable))
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            schedule(config),
            b1=config.b1,
            b2=config.b2,
            eps=1e-8,
            weight_decay=config.weight_decay,
            mask=decayed,
        ),
    )


def split(model: Decoder) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """``(graphdef, params, router state)``."""
    graphdef, params, router_state = nnx.split(model, nnx.Param, RouterState)
    return graphdef, params, router_state


class Trainer:
    """Builds the sharded state and the compiled step for one config and mesh."""

    def __init__(self, config: ExperimentConfig, byte_lengths: np.ndarray, mesh: jax.sharding.Mesh) -> None:
        self.config, self.mesh = config, mesh
        self.byte_lengths = jnp.asarray(byte_lengths, jnp.float32)
        abstract = jax.eval_shape(lambda: build(config.model, config.train.seed))
        self.graphdef, params, router_state = split(abstract)
        self.optimizer = optimizer(config.train, params)
        self.schedule = schedule(config.train)
        opt_state = jax.eval_shape(self.optimizer.init, params)
        by_shape = tree_shardings(params, mesh)
        # Optimizer moments mirror the parameters: they are nnx.States inside optax's tuples, sharded alike.
        self.shardings = TrainState(
            step=cast(Any, replicated(mesh)),
            params=by_shape,
            router_state=tree_shardings(router_state, mesh),
            opt_state=_opt_shardings(opt_state, mesh),
        )
        self.step_fn = jax.jit(self._step, donate_argnums=0)
        self.abstract = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            TrainState(jnp.int32(0), params, router_state, opt_state),
            self.shardings,
        )

    def init(self) -> TrainState:
        """A fresh state, created where it belongs."""

        def make() -> TrainState:
            _, params, router_state = split(build(self.config.model, self.config.train.seed))
            return TrainState(jnp.int32(0), params, router_state, self.optimizer.init(params))

        return jax.jit(make, out_shardings=self.shardings)()

    def model(self, state: TrainState) -> Decoder:
        return nnx.merge(self.graphdef, state.params, state.router_state)

    def step(self, state: TrainState, batch: dict[str, Array]) -> tuple[TrainState, StepMetrics]:
        with jax.set_mesh(self.mesh):
            return self.step_fn(state, batch)

    # --- one step ---------------------------------------------------------------------------------

    def _step(self, state: TrainState, batch: dict[str, Array]) -> tuple[TrainState, StepMetrics]:
        train = self.config.train
        coefficients = dict(self.config.model.moe.losses)
        total_tokens = jnp.maximum(jnp.sum(batch["mask"], dtype=jnp.float32), 1.0)
        key = jax.random.fold_in(jax.random.key(train.seed), state.step)
        forward = self._forward(state.router_state, key, total_tokens)
        micros = batch["tokens"].shape[0]
        pieces = [jax.tree.map(lambda leaf, i=i: leaf[i], batch) for i in range(micros)]

        if micros == 1:

            def loss(params: nnx.State) -> tuple[Array, tuple]:
                ce, moe, sums = forward(params, pieces[0], 0)
                aux = losses.total(moe, coefficients)[0] if moe is not None else 0.0
                return ce + aux, (ce, moe, sums)

            grads, (ce, moe, sums) = jax.grad(loss, has_aux=True)(state.params)
        else:
            grads, ce, moe, sums = self._accumulate(forward, state.params, batch, coefficients)
        aux, raw = losses.total(moe, coefficients) if moe is not None else (jnp.float32(0), {})
        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
        params = cast(nnx.State, optax.apply_updates(state.params, updates))
        new = TrainState(
            step=state.step + 1,
            params=params,
            router_state=self._update_routers(state.router_state, moe),
            opt_state=opt_state,
        )
        metrics = StepMetrics(
            loss=ce + aux, ce=ce, nll=sums[0], text_bytes=sums[1], tokens=total_tokens, aux=raw,
            grad_norm=optax.tree.norm(grads), moe=moe,
        )  # fmt: skip
        return new, metrics

    def _forward(self, router_state: nnx.State, key: Array, total_tokens: Array) -> Callable:
        def forward(
            params: nnx.State, piece: dict[str, Array], index: Array | int
        ) -> tuple[Array, MoEMetrics | None, Array]:
            model = nnx.merge(self.graphdef, params, router_state)
            out = model(
                piece["tokens"], positions=piece["positions"], segment_ids=piece["segment_ids"], mask=piece["mask"],
                key=jax.random.fold_in(key, index), train=True,
            )  # fmt: skip
            nll = token_nll(out.logits, piece["targets"]) * piece["mask"]
            text = self.byte_lengths[piece["targets"]] * piece["mask"]
            sums = jnp.stack([jnp.sum(jnp.where(text > 0, nll, 0.0)), jnp.sum(text)])
            return jnp.sum(nll) / total_tokens, out.metrics, jax.lax.stop_gradient(sums)

        return forward

    def _accumulate(self, forward: Callable, params: nnx.State, batch: dict[str, Array], coefficients: dict) -> tuple:
        """Gradients over micro-batches. With ``balance_scope="batch"`` auxiliary losses are those of the whole batch.

        A loss is a nonlinear function f of sums over tokens, ``f(sum_m s_m)``. Its gradient is ``sum_m <f'(s), ds_m>``,
        so one forward pass over all micro-batches gives s, and then each micro-batch adds ``<f'(s), s_m>`` to its loss.
        """
        micros = batch["tokens"].shape[0]
        indices = jnp.arange(micros)
        exact = self.config.train.balance_scope == "batch" and any(coefficients.values())
        slope = None
        if exact:

            def gather(_: None, piece: tuple) -> tuple[None, MoEMetrics]:
                return None, forward(params, piece[0], piece[1])[1]

            every = jax.lax.scan(gather, None, (batch, indices))[1]
            if every is not None:
                whole = jax.tree.map(lambda leaf: jax.lax.stop_gradient(jnp.sum(leaf, axis=0)), every)
                slope = jax.grad(lambda m: losses.total(m, coefficients)[0])(whole)

        def micro_loss(p: nnx.State, piece: dict[str, Array], index: Array) -> tuple[Array, tuple]:
            ce, moe, sums = forward(p, piece, index)
            if moe is None:
                aux = jnp.float32(0)
            elif slope is not None:
                aux = sum(jnp.vdot(s, m) for s, m in zip(jax.tree.leaves(slope), jax.tree.leaves(moe), strict=True))
            else:
                aux = losses.total(moe, coefficients)[0] / micros
            return ce + aux, (ce, moe, sums)

        def body(carry: tuple, piece: tuple) -> tuple[tuple, MoEMetrics | None]:
            grads, ce, sums = carry
            g, (c, moe, s) = jax.grad(micro_loss, has_aux=True)(params, piece[0], piece[1])
            return (jax.tree.map(jnp.add, grads, g), ce + c, sums + s), moe

        zero = (jax.tree.map(jnp.zeros_like, params), jnp.float32(0), jnp.zeros(2))
        (grads, ce, sums), moe = jax.lax.scan(body, zero, (batch, indices))
        return grads, ce, None if moe is None else jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), moe), sums

    def _update_routers(self, router_state: nnx.State, moe: MoEMetrics | None) -> nnx.State:
        """Applies the router family's own update rule to each layer's state, from the step's global counts."""
        from moejax.routing import FAMILIES  # the registry may have grown since import

        router = self.config.model.moe.router
        update = FAMILIES[router.name].update
        if update is None or moe is None:
            return router_state
        flat = dict(nnx.to_flat_state(router_state))
        first = 0
        for g, (pattern, repeats) in enumerate(layer_groups(self.config.model)):
            width = sum(pattern)
            routed = moe.routed[first : first + width * repeats].reshape(repeats, width, moe.routed.shape[-1])
            first += width * repeats
            places = [b for b, is_moe in enumerate(pattern) if is_moe]
            for slot, b in enumerate(places):
                stem = ("groups", g, "blocks", b, "moe", "router", "arrays")
                names = [str(path[-1]) for path in flat if path[:-1] == stem]
                old = {n: flat[(*stem, n)][...] for n in names}
                new = jax.vmap(lambda state, counts: update(state, counts, router))(old, routed[:, slot])
                flat.update({(*stem, n): flat[(*stem, n)].replace(value) for n, value in new.items()})
        return nnx.from_flat_state(flat)


def token_nll(logits: Float[Array, "B S V"], targets: Int[Array, "B S"]) -> Float[Array, "B S"]:
    """``-log softmax(logits)[target]`` in nats, float32."""
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.scipy.special.logsumexp(logits, axis=-1) - picked


def _opt_shardings(opt_state: Any, mesh: jax.sharding.Mesh) -> Any:
    """Shardings of the optimizer state: moments like their parameters, counters replicated."""

    def one(node: Any) -> Any:
        return tree_shardings(node, mesh) if isinstance(node, nnx.Variable) else replicated(mesh)

    return jax.tree.map(one, opt_state, is_leaf=lambda v: isinstance(v, nnx.Variable))


def score_fn(model_def: nnx.GraphDef, mesh: jax.sharding.Mesh) -> Callable:
    """A compiled ``(params, router_state, batch, limits, key) -> (logprob[B,S], greedy[B,S], MoEMetrics)``.

    Limits are arguments: a new capacity factor does not recompile.
    """

    @jax.jit
    def score(params: nnx.State, router_state: nnx.State, batch: dict, limits: tuple | None, key: Array) -> tuple:
        model = nnx.merge(model_def, params, router_state)
        out = model(
            batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"], mask=batch["mask"],
            limits=limits, key=key,
        )  # fmt: skip
        greedy = jnp.argmax(out.logits, axis=-1) == batch["targets"]
        return -token_nll(out.logits, batch["targets"]), greedy, out.metrics

    def run(params: nnx.State, router_state: nnx.State, batch: dict, limits: tuple | None, key: Array) -> tuple:
        with jax.set_mesh(mesh):
            return score(params, router_state, batch, limits, key)

    return run


@dataclasses.dataclass
class Scorer:
    """The model as evaluation sees it: batches in, log-probabilities out; expert loads add up in ``metrics``."""

    run: Callable
    params: nnx.State
    router_state: nnx.State
    put: Callable[[dict], dict]
    limits: tuple | None = None
    seed: int = 0
    metrics: MoEMetrics | None = None
    calls: int = 0

    def __call__(self, batch: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        keys = ("tokens", "targets", "positions", "segment_ids", "mask")
        key = jax.random.fold_in(jax.random.key(self.seed), self.calls)
        self.calls += 1
        logprob, greedy, metrics = self.run(
            self.params, self.router_state, self.put({k: batch[k] for k in keys}), self.limits, key
        )
        self.metrics = tree_sum(self.metrics, metrics)
        return np.asarray(logprob), np.asarray(greedy)


class Interrupt:
    """Turns the first Ctrl-C or SIGTERM into a flag that the loop reads between steps; a second one ends at once."""

    def __init__(self) -> None:
        self.asked = False
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


class Meter:
    """Collects device scalars between two log lines, so that no step waits for the host."""

    def __init__(self, flops_per_token: float, peak: float) -> None:
        self.flops_per_token, self.peak = flops_per_token, peak
        self._pending: list[StepMetrics] = []
        self._untimed = 0
        self._seconds = 0.0
        self._since: float | None = time.perf_counter()

    def add(self, metrics: StepMetrics) -> None:
        self._pending.append(metrics)

    def leave_out(self) -> None:
        """The steps since the last row count in no rate: the first one compiled."""
        self._untimed, self._seconds, self._since = len(self._pending), 0.0, time.perf_counter()

    def pause(self) -> None:
        """Stops the clock, for validation and saving, once the steps so far are done on the device."""
        if self._since is None:
            return
        if self._pending:
            jax.block_until_ready(self._pending[-1].loss)
        self._seconds += time.perf_counter() - self._since
        self._since = None

    def go_on(self) -> None:
        """Starts the clock again."""
        self._since = time.perf_counter()

    def row(self) -> dict[str, Any]:
        """Means since the last row; waits for the device."""
        self.pause()
        steps = jax.device_get([dataclasses.replace(m, moe=None) for m in self._pending])
        last = jax.device_get(self._pending[-1].moe)
        text_bytes = max(sum(float(m.text_bytes) for m in steps), 1.0)
        timed = sum(float(m.tokens) for m in steps[self._untimed :])
        rate = timed / self._seconds if timed else 0.0
        row: dict[str, Any] = {
            "loss": float(np.mean([m.loss for m in steps])),
            "ce": float(np.mean([m.ce for m in steps])),
            "bits_per_byte": sum(float(m.nll) for m in steps) / np.log(2) / text_bytes,
            "grad_norm": float(np.mean([m.grad_norm for m in steps])),
            "tokens_per_s": rate,
            "mfu": rate * self.flops_per_token / self.peak,
            "aux": {name: float(np.mean([m.aux[name] for m in steps])) for name in steps[0].aux},
        }
        if last is not None:
            routed = np.asarray(last.routed)
            row["load_max_over_mean"] = float((routed.max(axis=1) / np.maximum(routed.mean(axis=1), 1e-9)).max())
            row["dropped_share"] = float(last.dropped.sum() / max(routed.sum(), 1.0))
            row["overflow"] = float(last.overflow.sum())
        self._pending, self._untimed, self._seconds = [], 0, 0.0
        self.go_on()
        return row
