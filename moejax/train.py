"""Training: the state, one optimizer step, and the loop around it.

A step is a pure function ``(state, batch) -> (state, StepMetrics)``. Batches arrive as ``[micro-batches, B, S]``.
Everything random is derived from the seed and the step, so the state needs no key and a run that stopped continues as
if it had not.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from moejax import losses
from moejax.config import ExperimentConfig, ModelConfig, TrainConfig
from moejax.metrics import tree_sum
from moejax.model import Decoder, build, layer_groups, moe_layer_ids
from moejax.mtp import Predictions
from moejax.recompile import Watched
from moejax.sharding import RouterState, replicated, tree_shardings
from moejax.types import MoEMetrics, TokenClass, pytree


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
    """Cross entropy plus weighted auxiliary losses (and that of multi-token prediction), nats per token."""
    ce: Float[Array, ""]
    """Cross entropy, nats per token."""
    nll: Float[Array, ""]
    """Sum of -log p over targets that stand for text, nats; with ``text_bytes`` it gives bits per byte."""
    text_bytes: Float[Array, ""]
    tokens: Float[Array, ""]
    aux: dict[str, Float[Array, ""]]
    """Raw auxiliary losses, means over layers; with ``train.mtp_weight`` also "mtp", the mean over modules."""
    grad_norm: Float[Array, ""]
    """Of all gradients, before clipping."""
    layer_grad_norm: Float[Array, "L"]
    """Of each layer, dense ones included, in order."""
    outer_grad_norm: dict[str, Float[Array, ""]]
    """Of what lies outside the layers: embed, unembed, final_norm, mtp."""
    param_norm: Float[Array, ""]
    """Of the parameters after the step: not finite if one of them is not, or is beyond 1e19."""
    moe: MoEMetrics | None


def schedule(config: TrainConfig) -> optax.Schedule:
    """Linear warm-up from 0 at the first step, then cosine down to ``final_fraction`` of the peak, which the step after
    the last one would have (as optax counts: with warm-up the first step moves nothing)."""
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
    queries is a vector; the rotary key of latent attention has no heads), and so has each expert its own.
    """

    def is_matrix(variable: nnx.Variable) -> nnx.Variable:
        axes = set(variable.get_metadata()["axes"]) - {"experts"}
        if not axes.isdisjoint(("heads", "kv_heads")):
            axes -= {"head_dim"}
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
        self.step_fn = Watched(jax.jit(self._step, donate_argnums=0), "the training step", ("state", "batch"), mesh)
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
        if train.mtp_weight:
            ce, raw["mtp"] = sums[2:]
            aux += train.mtp_weight * raw["mtp"]
        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
        params = cast(nnx.State, optax.apply_updates(state.params, updates))
        new = TrainState(
            step=state.step + 1,
            params=params,
            router_state=self._update_routers(state.router_state, moe),
            opt_state=opt_state,
        )
        layer_norms, outer_norms = gradient_norms(grads, self.config.model)
        metrics = StepMetrics(
            loss=ce + aux, ce=ce, nll=sums[0], text_bytes=sums[1], tokens=total_tokens, aux=raw,
            grad_norm=optax.tree.norm(grads), layer_grad_norm=layer_norms, outer_grad_norm=outer_norms,
            param_norm=optax.tree.norm(params), moe=self._main(moe),
        )  # fmt: skip
        return new, metrics

    def _forward(self, router_state: nnx.State, key: Array, total_tokens: Array) -> Callable:
        """``(params, micro-batch, its number) -> (loss, metrics, sums)``: sums of nll and of bytes over text, and with
        multi-token prediction the two parts of the loss."""
        weight = self.config.train.mtp_weight

        def forward(
            params: nnx.State, piece: dict[str, Array], index: Array | int
        ) -> tuple[Array, MoEMetrics | None, Array]:
            model = nnx.merge(self.graphdef, params, router_state)
            out = model(
                piece["tokens"], positions=piece["positions"], segment_ids=piece["segment_ids"], mask=piece["mask"],
                key=jax.random.fold_in(key, index), train=True, mtp=bool(weight),
            )  # fmt: skip
            nll = token_nll(out.logits, piece["targets"]) * piece["mask"]
            text = self.byte_lengths[piece["targets"]] * piece["mask"]
            sums = jnp.stack([jnp.sum(jnp.where(text > 0, nll, 0.0)), jnp.sum(text)])
            loss, metrics = jnp.sum(nll) / total_tokens, out.metrics
            if out.further is not None:
                further = prediction_loss(out.further, piece["targets"]) / total_tokens
                sums = jnp.concatenate([sums, jnp.stack([loss, further])])
                loss += weight * further
                if out.further.metrics is not None:  # the modules' routers are balanced like the others
                    parts = [m for m in (metrics, out.further.metrics) if m is not None]
                    metrics = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
            return loss, metrics, jax.lax.stop_gradient(sums)

        return forward

    def _main(self, moe: MoEMetrics | None) -> MoEMetrics | None:
        """The metrics of the main model's layers, without those of multi-token-prediction modules behind them."""
        layers = len(moe_layer_ids(self.config.model))
        return jax.tree.map(lambda leaf: leaf[:layers], moe) if self.config.train.mtp_weight else moe

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

        sums = jnp.zeros(4 if self.config.train.mtp_weight else 2)
        zero = (jax.tree.map(jnp.zeros_like, params), jnp.float32(0), sums)
        (grads, ce, sums), moe = jax.lax.scan(body, zero, (batch, indices))
        return grads, ce, None if moe is None else jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), moe), sums

    def _update_routers(self, router_state: nnx.State, moe: MoEMetrics | None) -> nnx.State:
        """Applies the router family's own update rule to each layer's state, from the step's global counts."""
        from moejax.routing import FAMILIES  # the registry may have grown since import

        router, experts = self.config.model.moe.router, self.config.model.moe.num_experts
        update = FAMILIES[router.name].update
        if update is None or moe is None:
            return router_state
        pairs = losses.pairs_by_id(moe)
        flat = dict(nnx.to_flat_state(router_state))
        first = 0
        for g, (pattern, repeats) in enumerate(layer_groups(self.config.model)):
            width = sum(pattern)
            routed = pairs[first : first + width * repeats].reshape(repeats, width, pairs.shape[-1])
            first += width * repeats
            places = [b for b, is_moe in enumerate(pattern) if is_moe]
            for slot, b in enumerate(places):
                stem = ("groups", g, "blocks", b, "moe", "router", "arrays")
                names = [str(path[-1]) for path in flat if path[:-1] == stem]
                old = {n: flat[(*stem, n)][...] for n in names}
                new = jax.vmap(lambda state, counts: update(state, counts, router, experts))(old, routed[:, slot])
                flat.update({(*stem, n): flat[(*stem, n)].replace(value) for n, value in new.items()})
        for k, counts in enumerate(pairs[first:]):  # of multi-token-prediction modules
            stem = ("mtp", k, "block", "moe", "router", "arrays")
            old = {str(path[-1]): leaf[...] for path, leaf in flat.items() if path[:-1] == stem}
            new = update(old, counts, router, experts)
            flat.update({(*stem, n): flat[(*stem, n)].replace(value) for n, value in new.items()})
        return nnx.from_flat_state(flat)


def gradient_norms(grads: nnx.State, config: ModelConfig) -> tuple[Float[Array, "L"], dict[str, Float[Array, ""]]]:
    """Euclidean norms of the gradients of each layer, in order, and of each array group outside the layers."""
    outer: dict[str, Array] = {}
    inside: dict[tuple[int, int], Array] = {}  # (group, block of its pattern) -> squares of its repeats
    for path, leaf in nnx.to_flat_state(grads):
        square = jnp.square(leaf[...].astype(jnp.float32))
        if path[0] == "groups":
            place = (int(str(path[1])), int(str(path[3])))
            inside[place] = inside.get(place, 0.0) + jnp.sum(square, axis=range(1, square.ndim))
        else:
            name = str(path[0])
            outer[name] = outer.get(name, 0.0) + jnp.sum(square)
    layers = [
        jnp.stack([inside[g, b] for b in range(len(pattern))], axis=1).reshape(-1)  # [repeats, blocks] in layer order
        for g, (pattern, _) in enumerate(layer_groups(config))
    ]
    return jnp.sqrt(jnp.concatenate(layers)), {name: jnp.sqrt(square) for name, square in outer.items()}


def token_nll(logits: Float[Array, "B S V"], targets: Int[Array, "B S"]) -> Float[Array, "B S"]:
    """``-log softmax(logits)[target]`` in nats, float32."""
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.scipy.special.logsumexp(logits, axis=-1) - picked


def prediction_loss(made: Predictions, targets: Int[Array, "B S"]) -> Float[Array, ""]:
    """Sum of ``-log p`` over all valid predictions, divided by the number of modules (2412.19437, eqs. 24 and 25: over
    the number of tokens it is the loss, without its weight), in nats. ``targets``: of the main model."""
    place = jnp.minimum(made.place, targets.shape[1] - 1)
    wanted = jnp.take_along_axis(targets[None], place, axis=2)
    nll = jax.vmap(token_nll)(made.logits, wanted)
    return jnp.sum(jnp.where(made.valid, nll, 0.0)) / len(made.logits)


def _opt_shardings(opt_state: Any, mesh: jax.sharding.Mesh) -> Any:
    """Shardings of the optimizer state: moments like their parameters, counters replicated."""

    def one(node: Any) -> Any:
        return tree_shardings(node, mesh) if isinstance(node, nnx.Variable) else replicated(mesh)

    return jax.tree.map(one, opt_state, is_leaf=lambda v: isinstance(v, nnx.Variable))


def score_fn(model_def: nnx.GraphDef, mesh: jax.sharding.Mesh, token_classes: int = 0) -> Watched:
    """A compiled ``(params, router_state, batch, limits, key) -> (logprob[B,S], greedy[B,S], MoEMetrics)``.

    Limits are arguments: a new capacity factor does not recompile. A batch with ``token_class`` (ids below
    ``token_classes``) has its loads summed by class too. Unarmed: whoever expects one program only arms it.
    """

    @jax.jit
    def score(params: nnx.State, router_state: nnx.State, batch: dict, limits: tuple | None, key: Array) -> tuple:
        model = nnx.merge(model_def, params, router_state)
        token_class = TokenClass(batch["token_class"], token_classes) if "token_class" in batch else None
        out = model(
            batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"], mask=batch["mask"],
            limits=limits, key=key, token_class=token_class,
        )  # fmt: skip
        greedy = jnp.argmax(out.logits, axis=-1) == batch["targets"]
        return -token_nll(out.logits, batch["targets"]), greedy, out.metrics

    return Watched(score, "validation", ("params", "router_state", "batch", "limits", "key"), mesh, armed=False)


@dataclasses.dataclass
class Scorer:
    """The model as evaluation sees it: batches in, log-probabilities out; expert loads add up in ``metrics``."""

    run: Callable
    params: nnx.State
    router_state: nnx.State
    put: Callable[[dict], dict]
    limits: tuple | None = None
    seed: int = 0
    classify: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None
    """``(tokens, segment_ids) ->`` the class of each token, by which loads are kept apart too; None: they are not."""
    metrics: MoEMetrics | None = None
    calls: int = 0

    def __call__(self, batch: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        keys = ("tokens", "targets", "positions", "segment_ids", "mask")
        key = jax.random.fold_in(jax.random.key(self.seed), self.calls)
        self.calls += 1
        given = {k: batch[k] for k in keys}
        if self.classify is not None:
            given["token_class"] = self.classify(batch["tokens"], batch["segment_ids"])
        logprob, greedy, metrics = self.run(self.params, self.router_state, self.put(given), self.limits, key)
        self.metrics = tree_sum(self.metrics, metrics)
        return np.asarray(logprob), np.asarray(greedy)
