"""Attention in slow, plain NumPy (float64): one row, one head, one pair of tokens after the other."""

import math

import numpy as np

from moejax.rope import magnitude
from tests.moe_fakes import f64

LATENT = {"kind": "latent", "num_heads": 3, "num_kv_heads": 3, "head_dim": 5, "latent_rank": 7, "rope_head_dim": 4,
          "value_head_dim": 6}  # fmt: skip
"""Sizes that all differ."""


def formula(rope, theta, dims, places=0):
    """Pair by pair. LongRoPE: 2402.13753, equation 2, with the factors of the number of places. YaRN: 2309.00071,
    equations 17 to 20 with the ramp over dimensions (section A.2 and the released code); llama3: the release of Llama
    3.1."""
    out = []
    for i in range(dims // 2):
        f = theta ** (-2 * i / dims)
        turns = rope.original_length * f / (2 * math.pi)
        if rope.scaling == "linear":
            f /= rope.factor
        elif rope.scaling == "longrope":
            f /= (rope.long_factor if places > rope.original_length else rope.short_factor)[i]
        elif rope.scaling == "yarn":
            ends = [dims / 2 * math.log(rope.original_length / (b * 2 * math.pi), theta)
                    for b in (rope.beta_fast, rope.beta_slow)]  # fmt: skip
            low, high = (math.floor(ends[0]), math.ceil(ends[1])) if rope.truncate else ends
            low, high = max(low, 0), min(high, dims - 1)
            gamma = min(max((i - low) / (high - low), 0), 1)
            f = (1 - gamma) * f + gamma * f / rope.factor
        elif rope.scaling == "llama3":
            if turns < rope.low_freq_factor:
                f /= rope.factor
            elif turns < rope.high_freq_factor:
                smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
                f = (1 - smooth) * f / rope.factor + smooth * f
        out.append(f)
    return np.asarray(out)


def rotate(x, position, theta, rope, places=0):
    """One head's dimensions at one position."""
    dims = int(len(x) * rope.fraction)
    y = x.copy()
    m = magnitude(rope, places)
    for i, f in enumerate(formula(rope, theta, dims, places)):
        a, b = (2 * i, 2 * i + 1) if rope.layout == "interleaved" else (i, i + dims // 2)
        cos, sin = math.cos(position * f) * m, math.sin(position * f) * m
        y[a], y[b] = x[a] * cos - x[b] * sin, x[b] * cos + x[a] * sin
    return y


def norm(x, scale, eps):
    return x / np.sqrt((x * x).mean() + eps) * scale


def weigh(q, keys, values, scale, sink=None, cap=0.0):
    """Softmax of scale * q k, capped, over the keys and, if there is one, the sink, which has no value."""
    capped = (lambda s: cap * math.tanh(s / cap)) if cap else (lambda s: s)
    weights = [math.exp(capped(scale * (q @ k))) for k in keys]
    total = sum(weights) + (0 if sink is None else math.exp(sink))
    return sum(w / total * v for w, v in zip(weights, values, strict=True))


def arrays(module):
    """Its parameters by name, in float64; None where it has none."""
    names = vars(module)
    made = {name: f64(value[...]) for name, value in names.items() if hasattr(value, "get_raw_value")}
    made |= {name: f64(value.scale[...]) for name, value in names.items() if hasattr(value, "scale")}
    return {name: made.get(name) for name in names}


def grouped(module, x, positions, seen, rotates=True):
    """``[S, D]`` of one row; ``seen[s]`` are the places that token s sees. ``rotates``: the layer has positions."""
    config, w = module.config, arrays(module)
    heads, groups = config.num_heads, config.num_kv_heads
    eps = 1e-6

    def project(z, name, count):
        y = np.stack([z @ w[name][:, h] for h in range(count)])
        if w[name + "_bias"] is not None:
            y = y + w[name + "_bias"]
        scale = w.get(name + "_norm")
        if scale is not None and config.qk_norm_over == "projection":
            y = norm(y, scale, eps)
        elif scale is not None:
            y = np.stack([norm(head, scale, eps) for head in y])
        return np.clip(y, -config.clip_qkv, config.clip_qkv) if config.clip_qkv else y

    def turn(head, p, is_query):
        if not rotates:
            grows = 1 + config.temperature * math.log(1 + (p + 1) // config.temperature_length)
            return head * (grows if is_query else 1)
        head = rotate(head, p, config.rope_theta, config.rope, len(x))
        return norm(head, 1.0, eps) if config.qk_unit_norm else head

    q = [[turn(head, p, True) for head in project(z, "q", heads)] for z, p in zip(x, positions, strict=True)]
    k = [[turn(head, p, False) for head in project(z, "k", groups)] for z, p in zip(x, positions, strict=True)]
    v = [project(z, "v", groups) for z in x]
    out = np.zeros_like(x)
    for s, places in enumerate(seen):
        for h in range(heads):
            g = h * groups // heads
            scale = config.softmax_scale or config.head_dim**-0.5
            sink = None if w["sinks"] is None else w["sinks"][h]
            picked = [k[j][g] for j in places], [v[j][g] for j in places]
            out[s] += weigh(q[s][h], *picked, scale, sink, config.score_softcap) @ w["o"][h]
        if w["o_bias"] is not None:
            out[s] += w["o_bias"]
    return out


def latent(module, x, positions, seen):
    """``[S, D]`` of one row: equations 9 to 19 of 2405.04434, as they stand there."""
    config, w = module.config, arrays(module)
    n, rope = config.head_dim, config.rope
    plus = lambda y, name: y if w[name] is None else y + w[name]  # noqa: E731
    factor = lambda rank: math.sqrt(x.shape[1] / rank) if config.scale_latents else 1  # noqa: E731
    queries, keys, values = [], [], []
    for z, p in zip(x, positions, strict=True):
        source = z
        if config.query_rank:
            source = norm(plus(z @ w["q_down"], "q_down_bias"), w["q_down_norm"], 1e-6) * factor(config.query_rank)
        q = [source @ w["q"][:, h] for h in range(config.num_heads)]
        queries.append([np.r_[head[:n], rotate(head[n:], p, config.rope_theta, rope)] for head in q])
        c = norm(plus(z @ w["kv_down"], "kv_down_bias"), w["kv_norm"], 1e-6) * factor(config.latent_rank)
        shared = rotate(plus(z @ w["k_rope"], "k_rope_bias"), p, config.rope_theta, rope)
        keys.append([np.r_[c @ w["k_up"][:, h], shared] for h in range(config.num_heads)])
        values.append([c @ w["v_up"][:, h] for h in range(config.num_heads)])
    scale = config.softmax_scale or 1 / math.sqrt(n + config.rope_head_dim)
    if rope.scaling == "yarn" and not config.softmax_scale:
        scale *= (0.1 * rope.mscale_all_dim * math.log(rope.factor) + 1) ** 2
    out = np.zeros_like(x)
    for s, places in enumerate(seen):
        for h in range(config.num_heads):
            picked = [keys[j][h] for j in places], [values[j][h] for j in places]
            out[s] += weigh(queries[s][h], *picked, scale) @ w["o"][h]
        out[s] = plus(out[s], "o_bias")
    return out
