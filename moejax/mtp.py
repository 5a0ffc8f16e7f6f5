"""Multi-token prediction (DeepSeek-V3, 2412.19437, section 2.2): modules that predict tokens beyond the next one.

With t_i the token at place i, and h_i^0 what the main model's output head reads there, module k = 1..K computes
(eqs. 21 to 23)::

    h'_i = [norm(embed(t_{i+k})); norm(h_i^{k-1})] M_k
    h_i^k = final_norm_k(block_k(h'))_i
    logits of t_{i+k+1} = h_i^k @ head

Embedding and head are the main model's; the two norms, M_k, the block and the final norm are the module's own. The
paper leaves two things open, and here they are as in published weights and the programs that run them:

* M_k multiplies the embedding's half first, as ``eh_proj`` lies in DeepSeek's files (the paper writes it last).
* h^{k-1} is taken *after* the norm before the output head, the main model's or module k-1's. So does the modelling code
  that was published with DeepSeek's weights; so do vLLM (``DeepseekV2Model.forward`` ends with its norm), SGLang and
  Megatron-LM.

vLLM also sets the embedding at place 0 to zero; the paper, SGLang and Megatron-LM do not, and neither is it done here.

Letters: K modules, B batch, S sequence, D model, V vocabulary.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from moejax.attention import AttentionInput, attention_input
from moejax.blocks import WIRINGS
from moejax.config import ModelConfig
from moejax.norm import make_norm
from moejax.sharding import ArraySpec, create
from moejax.types import LayerReport, Limit, MoEMetrics, RouteContext, pytree

_STREAM = 1 << 20
"""Folded into keys, beyond the number of any layer: a model's own arrays and draws are the same without modules."""


@pytree
class Predictions:
    """What the modules say of each place. Module k (from 1) is at index k - 1."""

    logits: Float[Array, "K B S V"]
    """Float32: at place i of the token k + 1 places on, given those up to k places on. Undefined where not valid."""
    valid: Bool[Array, "K B S"]
    """Real tokens that have a real token of their own document k places on. The last k of each have none."""
    place: Int[Array, "K B S"]
    """Where that token stands; S where there is none. In a batch of training, what is predicted is its target."""
    metrics: MoEMetrics | None
    """Sums over the valid places, with a leading axis of modules; None where their blocks are dense."""


class PredictionModule(nnx.Module):
    """One depth of prediction: two norms, a projection of both inputs together, a block, and the norm of its output."""

    def __init__(self, config: ModelConfig, is_moe: bool, key: PRNGKeyArray) -> None:
        keys = jax.random.split(key)
        proj = ArraySpec((2 * config.dim, config.dim), ("joined", "embed"), fan_in=2 * config.dim)
        self.embed_norm = make_norm(config)
        self.hidden_norm = make_norm(config)
        self.proj = create(proj, keys[0], config.init_scale)
        self.block = WIRINGS[config.wiring](config, is_moe, keys[1])
        self.final_norm = make_norm(config)

    def __call__(
        self,
        hidden: Float[Array, "B S D"],
        embedded: Float[Array, "B S D"],
        tokens: AttentionInput,
        ctx: RouteContext,
        limits: tuple[Limit, ...] | None,
    ) -> tuple[Float[Array, "B S D"], LayerReport | None]:
        """The next depth's hidden state, normed."""
        joined = jnp.concatenate([self.embed_norm(embedded), self.hidden_norm(hidden)], axis=-1)
        x, report, _ = self.block(joined @ self.proj[...].astype(joined.dtype), tokens, ctx, limits, None)
        return self.final_norm(x), report


def make_modules(config: ModelConfig, is_moe: bool, key: PRNGKeyArray) -> nnx.List | None:
    """``model.mtp_layers`` modules, or None for 0. ``is_moe``: of their blocks, which are like the model's last."""
    if not config.mtp_layers:
        return None
    keys = jax.random.split(jax.random.fold_in(key, _STREAM), config.mtp_layers)
    return nnx.List([PredictionModule(config, is_moe, k) for k in keys])


def predict(
    modules: Iterable[PredictionModule],
    hidden: Float[Array, "B S D"],
    ctx: RouteContext,
    limits: tuple[Limit, ...] | None,
    *,
    embed: Callable[[Int[Array, "B S"]], Float[Array, "B S D"]],
    head: Callable[[Float[Array, "B S D"]], Float[Array, "B S V"]],
    facts: Mapping[str, Array],
    remat: Callable[[Callable], Callable] = lambda call: call,
) -> Predictions:
    """Runs the modules on given tokens (teacher forcing).

    Args:
      hidden: what the main model's head reads.
      ctx: of the main model's pass: token ids, positions, documents and mask are those of the batch.
      embed, head: of the main model.
      facts: fields of ``AttentionInput`` that the model's last layer has apart from the tokens (its window, ...).
      remat: rematerialises a module's call.
    """
    tokens, documents = ctx.token_ids, ctx.request_ids
    assert tokens is not None and ctx.positions is not None  # the model has set them
    seq = tokens.shape[1]
    real = jnp.ones(tokens.shape, bool) if ctx.mask is None else ctx.mask
    following = next_places(real)
    place = jnp.broadcast_to(jnp.arange(seq), tokens.shape)
    valid = real
    logits, valids, places, reports = [], [], [], []
    for k, module in enumerate(modules, start=1):
        place = _at(following, place, seq)
        valid &= place < seq
        if documents is not None:
            valid &= _at(documents, place, 0) == documents
        place = jnp.where(valid, place, seq)
        ahead = _at(tokens, place, 0)
        seen = attention_input(ctx.positions, documents, valid, None, tokens.shape)
        key = None if ctx.key is None else jax.random.fold_in(ctx.key, _STREAM + k)
        its_ctx = dataclasses.replace(ctx, key=key, mask=valid, token_ids=ahead, record=False)

        def call(module: PredictionModule, hidden: Array, ahead: Array, seen: AttentionInput, its: RouteContext):
            return module(hidden, embed(ahead), dataclasses.replace(seen, **facts), its, limits)

        hidden, report = remat(call)(module, hidden, ahead, seen, its_ctx)
        logits.append(head(hidden))
        valids.append(valid)
        places.append(place)
        reports += [] if report is None else [report.metrics]
    return Predictions(
        logits=jnp.stack(logits),
        valid=jnp.stack(valids),
        place=jnp.stack(places),
        metrics=jax.tree.map(lambda *leaves: jnp.stack(leaves), *reports) if reports else None,
    )


def next_places(real: Bool[Array, "B S"]) -> Int[Array, "B S"]:
    """For each place the next one of a real token, S where there is none; padding may stand anywhere."""
    batch, seq = real.shape
    own = jnp.where(real, jnp.arange(seq), seq)
    first = jax.lax.cummin(own, axis=1, reverse=True)  # at or after each place
    return jnp.concatenate([first[:, 1:], jnp.full((batch, 1), seq, first.dtype)], axis=1)


def _at(values: Int[Array, "B S"], place: Int[Array, "B S"], beyond: int) -> Int[Array, "B S"]:
    """``values`` at the places of each row; ``beyond`` where a place is S."""
    seq = values.shape[1]
    found = jnp.take_along_axis(values, jnp.minimum(place, seq - 1), axis=1)
    return jnp.where(place < seq, found, beyond)
