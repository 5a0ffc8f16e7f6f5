"""Several processes on one GPU: the device suspends and resumes their kernels in turn, and results must not change."""

import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import gather_rows, grouped_ffn

PROCESSES, SECONDS = 3, 15.0


def _program(case: str, tokens: int, dim: int, implementation: str):
    """A jitted program of kernels, and its arguments."""
    experts, k = dim // 8, 4
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((tokens, dim)), jnp.bfloat16)
    index = jnp.asarray(rng.integers(-1, tokens + 1, tokens * k), jnp.int32)
    sizes = jnp.asarray(rng.multinomial(tokens * k - 7, rng.dirichlet(np.full(experts, 5.0))), jnp.int32)
    gate, up, down = (
        jnp.asarray(rng.standard_normal((experts, dim, dim)) / 16, jnp.bfloat16) for _ in ("gate", "up", "down")
    )

    def gather(x, *weights):
        return gather_rows(x, index, implementation=implementation)

    def ffn(x, *weights):
        ys = grouped_ffn(gather(x), sizes, *weights, activation="swiglu", implementation=implementation)
        return ys[: tokens * k - 7]

    def gradients(x, *weights):
        return jax.grad(lambda *args: jnp.sum(ffn(*args).astype(jnp.float32)), argnums=(0, 1, 2, 3))(x, *weights)

    return jax.jit({"gather": gather, "ffn": ffn, "gradients": gradients}[case]), (x, gate, up, down)


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


@pytest.mark.parametrize("case", ["gather", "gradients"])
def test_one_process_repeats_itself(case: str):
    assert repeat(case, 16, 32, "ref", 0.0) == 20


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["gather", "ffn", "gradients"])
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
