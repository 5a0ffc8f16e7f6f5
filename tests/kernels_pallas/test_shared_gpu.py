"""Several processes on one GPU: the device suspends and resumes their kernels in turn, and results must not change."""

import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import grouped_ffn
from kernels_pallas.gather_rows import combine_rows, gather_rows

PROCESSES, SECONDS = 3, 15.0


def _program(case: str, tokens: int, dim: int, implementation: str):
    """A jitted program of kernels, and its arguments. Each result is the same in every call, bit by bit."""
    experts, k = dim // 8, 4
    grouped = tokens * k - 7  # rows behind them are in no group: what a result has there is unspecified
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((tokens, dim)), jnp.bfloat16)
    index = jnp.asarray(rng.integers(-1, tokens + 1, tokens * k), jnp.int32)
    sizes = jnp.asarray(rng.multinomial(grouped, rng.dirichlet(np.full(experts, 5.0))), jnp.int32)
    row_of_pair = jnp.asarray(rng.permutation(tokens * k).reshape(tokens, k), jnp.int32)
    weight = jnp.asarray(rng.random((tokens, k)), jnp.float32)
    gate, up, down = (
        jnp.asarray(rng.standard_normal((experts, dim, dim)) / 16, jnp.bfloat16) for _ in ("gate", "up", "down")
    )

    def gather(x, *weights):
        return gather_rows(x, index, implementation=implementation)

    def combine(x, *weights):
        return combine_rows(gather(x), row_of_pair, weight, implementation=implementation)

    def experts_of(rows, *weights):
        return grouped_ffn(rows, sizes, *weights, activation="swiglu", implementation=implementation)[:grouped]

    def ffn(x, *weights):
        return experts_of(gather(x), *weights)

    def gradients(x, *weights):
        # Of the gathered rows and not of x: a scatter-add on a GPU adds in no fixed order.
        pull = jax.grad(lambda *args: jnp.sum(experts_of(*args).astype(jnp.float32)), argnums=(0, 1, 2, 3))
        of_rows, *of_weights = pull(gather(x), *weights)
        return of_rows[:grouped], *of_weights

    run = {"gather": gather, "combine": combine, "ffn": ffn, "gradients": gradients}[case]
    return jax.jit(run), (x, gate, up, down)


def repeat(case: str, tokens: int, dim: int, implementation: str, seconds: float) -> int:
    """Calls the program until the time is over; how often. Raises where a result differs from the first."""
    run, args = _program(case, tokens, dim, implementation)
    first, calls, begin = jax.block_until_ready(run(*args)), 0, time.monotonic()
    while not calls or time.monotonic() - begin < seconds:
        for _ in range(20):
            out = run(*args)
        calls += 20
        jax.tree.map(np.testing.assert_array_equal, *jax.device_get((out, first)))
    return calls


@pytest.mark.parametrize("case", ["combine", "gradients"])
def test_one_process_repeats_itself(case: str):
    assert repeat(case, 16, 32, "ref", 0.0) == 20


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["gather", "combine", "ffn", "gradients"])
def test_processes_may_share_a_gpu(case: str):
    program = (
        f"from tests.kernels_pallas.test_shared_gpu import repeat; repeat({case!r}, 8192, 256, 'mosaic_gpu', {SECONDS})"
    )
    env = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    started = [
        subprocess.Popen([sys.executable, "-c", program], env=env, stderr=subprocess.PIPE, text=True)
        for _ in range(PROCESSES)
    ]
    said = [process.communicate()[1] for process in started]
    for process, text in zip(started, said, strict=True):
        assert process.returncode == 0, text[-2000:]
