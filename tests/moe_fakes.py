"""Small routers, layers and models with reproducible weights, and the same maths in slow, plain NumPy (float64)."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from moejax import routing
from moejax.config import AttentionConfig, ModelConfig, MoEConfig, RouterConfig
from moejax.model import Decoder, build
from moejax.moe import MoELayer
from moejax.types import RouteContext, Routing

DIM, EXPERTS, EXPERT_DIM, VOCAB = 16, 8, 8, 29
FAMILIES = sorted(routing.FAMILIES)
TOKEN_CHOICE = [name for name in FAMILIES if routing.FAMILIES[name].causal]
NONCAUSAL = [name for name in FAMILIES if not routing.FAMILIES[name].causal]


# Most of the time of these tests is compilation, and 40 % of that is LLVM's optimiser.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def router_config(name="topk_of_softmax", **changes):
    """A valid config of any registered family: k as near to 2 as it allows."""
    fam = routing.FAMILIES[name]
    k = max(fam.min_k, 2 if fam.max_k is None else min(2, fam.max_k))
    return dataclasses.replace(RouterConfig(name=name, k=k, noncausal="allow"), **changes)


def filled(make, seed=0):
    """The module that ``make`` builds, with NumPy's random numbers: nothing is compiled, and no bias is left at 0."""
    rng = np.random.default_rng(seed)

    def one(path, leaf):
        name = jax.tree_util.keystr(path)
        value = rng.normal(0, 0.25, leaf.shape)
        if "scale" in name:
            value = 1 + value
        return jnp.asarray(value, leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, jax.eval_shape(make))


def router_weights(name, dim=DIM, experts=EXPERTS, seed=0):
    rng = np.random.default_rng(seed)
    specs = routing.FAMILIES[name].arrays(dim, experts)
    return {n: jnp.asarray(rng.normal(0, 0.3, s.shape), jnp.float32) for n, s in sorted(specs.items())}


@functools.cache
def small_layer(router=None, *, activation="swiglu", seed=0, **moe):
    router = router_config() if router is None else router
    config = MoEConfig(**({"num_experts": EXPERTS, "expert_dim": EXPERT_DIM, "router": router} | moe))
    return filled(lambda: MoELayer(config, DIM, activation, jax.random.key(0)), seed)


def model_config(**changes):
    """A two-layer float32 config; ``moe`` and ``attention`` are given as dicts of changes."""
    moe = {"num_experts": 4, "expert_dim": EXPERT_DIM, "router": router_config(), "implementation": "ref"}
    attention = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 4}
    base = {"vocab_size": VOCAB, "num_layers": 2, "dim": DIM, "ffn_dim": 24, "compute_dtype": "float32"}
    return ModelConfig(
        **(base | {k: v for k, v in changes.items() if k not in ("moe", "attention")}),
        moe=MoEConfig(**(moe | changes.get("moe", {}))),
        attention=AttentionConfig(**(attention | changes.get("attention", {}))),
    )


def small_model(seed=0, **changes) -> Decoder:
    return filled(lambda: build(model_config(**changes)), seed)


def tokens(batch, seq, seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB, (batch, seq)).astype(np.int32)


def random_table(rng, rows, k, experts, *, skew=0.0, drop=0.0, masked=0, decimals=None):
    """A token-choice Routing with random distinct experts in each row, and its mask (the last ``masked`` are
    padding)."""
    taste = rng.normal(size=(rows, experts)) - skew * np.arange(experts)
    expert = np.argsort(-taste, axis=1)[:, :k]
    score = rng.uniform(0.1, 1, (rows, k))
    score = score if decimals is None else score.round(decimals)
    mask = np.arange(rows) < rows - masked
    return table(
        expert, score, rng.uniform(0.1, 1, (rows, k)), mask[:, None] & (rng.random((rows, k)) >= drop), experts
    )


def table(expert, score, weight, valid, experts, token=None):
    """A Routing from arrays; its probabilities play no part."""
    rows = int(np.max(token)) + 1 if token is not None else len(expert)
    flat = jnp.full((rows, experts), 1 / experts, jnp.float32)
    return Routing(
        expert=jnp.asarray(expert, jnp.int32),
        weight=jnp.asarray(weight, jnp.float32),
        score=jnp.asarray(score, jnp.float32),
        valid=jnp.asarray(valid, bool),
        probs=flat,
        logits=jnp.log(flat),
        token=None if token is None else jnp.asarray(token, jnp.int32),
    )


def context(mask=None, **more):
    return RouteContext(mask=None if mask is None else jnp.asarray(mask), **more)


def f64(x):
    return np.asarray(x, np.float64)


def assert_same(a, b):
    """Equal bit for bit, leaf by leaf."""
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


def assert_close(a, b, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=rtol, atol=atol), a, b)


# --- NumPy references ---------------------------------------------------------------------------------------


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def gelu(z):
    return 0.5 * z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def ffn(x, up, gate, down, activation):
    up = x @ up
    if activation == "swiglu":
        hidden = (x @ gate) * sigmoid(x @ gate) * up
    elif activation == "geglu":
        hidden = gelu(x @ gate) * up
    else:
        hidden = gelu(up) if activation == "gelu" else np.maximum(up, 0)
    return hidden @ down


def experts_of(layer):
    """``(up, gate, down)`` of each expert."""
    w = layer.store.get()
    return [(f64(w.up[e]), None if w.gate is None else f64(w.gate[e]), f64(w.down[e])) for e in range(w.up.shape[0])]


def moe(x, made, experts, activation):
    """Sum over valid pairs of weight * expert(token), one pair after the other."""
    y = np.zeros_like(x)
    for r in range(made.expert.shape[0]):
        t = r if made.token is None else int(made.token[r])
        for k in range(made.expert.shape[1]):
            if made.valid[r, k]:
                y[t] += float(made.weight[r, k]) * ffn(x[t], *experts[int(made.expert[r, k])], activation)
    return y


def topk_rows(p, k):
    return np.argsort(-p, axis=1, kind="stable")[:, :k]
