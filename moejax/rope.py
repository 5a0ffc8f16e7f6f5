"""Rotary position embedding (2104.09864) and its extensions to longer contexts.

Letters: B batch, S sequence, H heads, N head dim.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.config import RopeConfig

PLAIN = RopeConfig()


def rotary(
    x: Float[Array, "B S H N"], positions: Int[Array, "B S"], theta: float, rope: RopeConfig = PLAIN, places: int = 0
) -> Float[Array, "B S H N"]:
    """Rotates pairs of dimensions by ``position * frequency``, in float32.

    The first :func:`rotated_dims` dimensions of each head rotate, paired as ``rope.layout`` says; the others stay.
    ``places``: how many there are (of the batch or the cache), which only LongRoPE reads.
    """
    dims = rotated_dims(rope, x.shape[-1])
    angle = positions.astype(jnp.float32)[..., None, None] * frequencies(rope, theta, dims, places)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    if (factor := magnitude(rope, places)) != 1:
        cos, sin = cos * factor, sin * factor
    y = x.astype(jnp.float32)
    y, rest = y[..., :dims], y[..., dims:]
    if rope.layout == "halves":
        a, b = jnp.split(y, 2, axis=-1)
        y = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    else:
        a, b = y[..., 0::2], y[..., 1::2]
        y = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(y.shape)
    return jnp.concatenate([y, rest], axis=-1).astype(x.dtype) if rest.shape[-1] else y.astype(x.dtype)


def rotated_dims(rope: RopeConfig, head_dim: int) -> int:
    """How many leading dimensions of a head carry the position: ``fraction`` of them, rounded down."""
    return int(head_dim * rope.fraction)


def is_long(rope: RopeConfig, places: int) -> bool:
    """Whether LongRoPE takes its long factors. ``places`` is static, so all that is cached was rotated alike; published
    code takes the length so far, and what it cached before that passed ``original_length`` stays as it was."""
    return places > rope.original_length


def frequencies(rope: RopeConfig, theta: float, dims: int, places: int = 0) -> Float[Array, "dims//2"]:
    """Radians per position of each pair of ``dims`` rotated dimensions, float32.

    Without scaling pair i has ``f_i = theta^(-2i / dims)``. With s = ``factor`` and L = ``original_length``:

    - linear: ``f_i / s``, positions interpolated (2306.15595);
    - yarn (2309.00071, section 3.2): ``f_i (1 - ramp_i) + f_i / s * ramp_i``; ramp rises from 0 to 1 between the pair
      that turns ``beta_fast`` times over L and the one that turns ``beta_slow`` times;
    - llama3 (Llama 3.1): ``f_i`` where it turns more than ``high_freq_factor`` times over L, ``f_i / s`` where less
      than ``low_freq_factor`` times, and between the two linear in the number of turns;
    - longrope (2402.13753, equation 2): ``f_i / short_factor_i``, or ``f_i / long_factor_i`` where there are more than
      L ``places``.
    """
    half = dims // 2
    plain = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if rope.scaling == "none":
        return plain
    if rope.scaling == "linear":
        return plain / rope.factor
    if rope.scaling == "longrope":
        return plain / jnp.asarray(rope.long_factor if is_long(rope, places) else rope.short_factor, jnp.float32)
    if rope.scaling == "yarn":
        low, high = _ramp_ends(rope, theta, dims)
        # ends on one pair: a step, as every published implementation has it
        ramp = (jnp.arange(half, dtype=jnp.float32) - low) / (high - low if high != low else 0.001)
        interpolated = jnp.clip(ramp, 0, 1)
    else:
        turns = rope.original_length * plain / (2 * math.pi)
        # one bound (Llama 4 Scout): a step
        kept = (turns - rope.low_freq_factor) / ((rope.high_freq_factor - rope.low_freq_factor) or 1e-9)
        interpolated = 1 - jnp.clip(kept, 0, 1)
    return plain * (1 - interpolated) + plain / rope.factor * interpolated


def magnitude(rope: RopeConfig, places: int = 0) -> float:
    """What multiplies cos and sin. YaRN: ``attention_factor``, or else ``m(mscale) / m(mscale_all_dim)``, or ``m(1)``
    where neither is set; see :func:`m`. LongRoPE: ``short_mscale`` or ``long_mscale``. 1 for the other scalings."""
    if rope.scaling == "longrope":
        return rope.long_mscale if is_long(rope, places) else rope.short_mscale
    if rope.scaling != "yarn":
        return 1.0
    if rope.attention_factor:
        return rope.attention_factor
    if rope.mscale or rope.mscale_all_dim:
        return m(rope, rope.mscale) / m(rope, rope.mscale_all_dim)
    return m(rope, 1.0)


def m(rope: RopeConfig, scale: float) -> float:
    """``0.1 scale ln(factor) + 1`` (2309.00071, equation 22, with DeepSeek-V2's scale); 1 where nothing is extended."""
    return 0.1 * scale * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0


def _ramp_ends(rope: RopeConfig, theta: float, dims: int) -> tuple[float, float]:
    """Pairs that turn ``beta_fast`` and ``beta_slow`` times over the original context, as real numbers or rounded
    outwards, within the dimensions."""

    def pair(turns: float) -> float:
        return dims * math.log(rope.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(rope.beta_fast), pair(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    return max(low, 0), min(high, dims - 1)
