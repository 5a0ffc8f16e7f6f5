"""The decoder blocks (seam 6): what stands in which order among attention, dense FFN and the stages of an MoE layer.

Letters: B batch, S sequence, D model.
"""

import jax
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from moejax.attention import AttentionInput, BlockCache, make_attention
from moejax.config import ModelConfig
from moejax.experts import DenseFFN
from moejax.moe import MoELayer
from moejax.norm import Norm, make_norm
from moejax.types import LayerReport, Limit, RouteContext


class Block(nnx.Module):
    """Pre-norm decoder block: ``h = x + attention(norm(x)); y = h + ffn(norm(h))``, its FFN dense or MoE.

    With ``sandwich_norm`` (Grok-1) what is added has a norm of its own:
    ``h = x + norm(attention(norm(x))); y = h + norm(ffn(norm(h)))``.
    """

    def __init__(self, config: ModelConfig, is_moe: bool, key: PRNGKeyArray) -> None:
        keys = jax.random.split(key, 2)
        scale = config.init_scale
        self.attention_norm = make_norm(config)
        self.attention = make_attention(config.attention, config.dim, config.norm_eps, keys[0], scale)
        self.ffn_norm = make_norm(config)
        self.moe = MoELayer(config.moe, config.dim, config.activation, keys[1], scale) if is_moe else None
        self.ffn = None if is_moe else DenseFFN(config.dim, config.ffn_dim, config.activation, keys[1], scale)
        self.attention_out_norm = make_norm(config) if config.sandwich_norm else None
        self.ffn_out_norm = make_norm(config) if config.sandwich_norm else None

    def __call__(
        self,
        x: Float[Array, "B S D"],
        tokens: AttentionInput,
        ctx: RouteContext,
        limits: tuple[Limit, ...] | None,
        cache: BlockCache | None,
    ) -> tuple[Float[Array, "B S D"], LayerReport | None, BlockCache | None]:
        assert not isinstance(cache, tuple)
        attended, cache = self.attention(self.attention_norm(x), tokens, cache)
        x = x + _normed(self.attention_out_norm, attended)
        z = self.ffn_norm(x)
        if self.ffn is not None:
            return x + _normed(self.ffn_out_norm, self.ffn(z)), None, cache
        assert self.moe is not None  # a block has one of the two
        y, report = self.moe.reported(z, ctx, limits)
        return x + _normed(self.ffn_out_norm, y), report, cache


def _normed(norm: Norm | None, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
    return x if norm is None else norm(x)


class LongCatBlock(nnx.Module):
    """LongCat-Flash's shortcut block (2509.01322, section 2.2): two attentions and two dense FFNs; the experts are
    routed after the first attention and their output is added at the block's end::

        h = x + attention(norm(x));  z = ffn_norm(h);  h = h + ffn(z)
        h = h + attention_2(attention_norm_2(h));  y = h + ffn_2(ffn_norm_2(h)) + moe(z)

    Nothing between ``moe.begin`` and ``moe.complete`` reads what the experts make: dispatch, experts and combine may
    run beside the dense path, by data dependence alone. Its cache is one for each attention.
    """

    def __init__(self, config: ModelConfig, is_moe: bool, key: PRNGKeyArray) -> None:
        if not is_moe:
            raise ValueError("wiring='longcat' has experts in every block: leave first_dense, every and dense_layers")
        keys = jax.random.split(key, 5)
        dim, eps, scale = config.dim, config.norm_eps, config.init_scale
        self.attention_norm = make_norm(config)
        self.attention = make_attention(config.attention, dim, eps, keys[0], scale)
        self.ffn_norm = make_norm(config)
        self.moe = MoELayer(config.moe, dim, config.activation, keys[1], scale)
        self.ffn = DenseFFN(dim, config.ffn_dim, config.activation, keys[2], scale)
        self.attention_norm_2 = make_norm(config)
        self.attention_2 = make_attention(config.attention, dim, eps, keys[3], scale)
        self.ffn_norm_2 = make_norm(config)
        self.ffn_2 = DenseFFN(dim, config.ffn_dim, config.activation, keys[4], scale)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        tokens: AttentionInput,
        ctx: RouteContext,
        limits: tuple[Limit, ...] | None,
        cache: BlockCache | None,
    ) -> tuple[Float[Array, "B S D"], LayerReport | None, BlockCache | None]:
        first, second = cache if isinstance(cache, tuple) else (None, None)
        attended, first = self.attention(self.attention_norm(x), tokens, first)
        x = x + attended
        z = self.ffn_norm(x)
        flight = self.moe.begin(z, ctx, limits)
        x = x + self.ffn(z)
        attended, second = self.attention_2(self.attention_norm_2(x), tokens, second)
        x = x + attended
        x = x + self.ffn_2(self.ffn_norm_2(x))
        y, report = self.moe.complete(flight, z)
        return x + y, report, None if first is None or second is None else (first, second)


WIRINGS: dict[str, type[Block | LongCatBlock]] = {"standard": Block, "longcat": LongCatBlock}
"""The block of each ``model.wiring``."""
