"""Kernels that are launched while the one before ends read nothing too early and write nothing too early."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import grouped_ffn, grouped_matmul
from kernels_pallas.grouped_matmul.ffn import Weights
from kernels_pallas.grouped_matmul.mosaic_gpu import backend
from tests.kernels_pallas.test_mosaic_gpu import hopper, normal


def test_both_kernels_of_an_ffn_await_the_kernel_before_and_let_the_next_be_launched():
    rows, experts, dim = 1024, 4, 256
    args = normal(0, rows, dim), *(normal(i, experts, dim, dim) for i in range(3)), jnp.full(experts, 256, jnp.int32)

    def ffn(xs, gate, up, down, sizes):
        return backend.KERNELS.grouped_ffn(xs, sizes, Weights(gate, up, down), "swiglu")

    with hopper(132):
        text = jax.jit(ffn).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    kernels = re.findall(r"custom_call @mosaic_gpu_v2.*", text)
    assert len(kernels) == 2
    for kernel in kernels:
        for wanted in ("uses_pdl", "griddepcontrol.wait", "griddepcontrol.launch_dependents"):
            assert wanted in kernel


def chain(xs, weights, sizes, *, apart: bool, implementation: str = "mosaic_gpu"):
    """Kernels each of which needs the one before: its rows, its group sizes, or its matrices. `apart`: the next one
    starts when the result is there."""
    ended = jax.block_until_ready if apart else lambda x: x
    experts, dim = weights[0].shape[:2]
    for i in range(4):
        xs = ended(grouped_ffn(xs, sizes, *weights, activation="swiglu", implementation=implementation))
        if i % 2:  # sizes that an operation of XLA has just made
            sizes = ended(jnp.roll(sizes, jnp.argmax(jnp.abs(xs[0].astype(jnp.float32)))))
        product = ended(grouped_matmul(xs, weights[1], sizes, implementation=implementation))
        made = product[: experts * dim].reshape(experts, dim, dim)  # matrices that a kernel has just made
        xs = ended(grouped_matmul(xs, made, sizes, implementation=implementation))
        xs = ended((xs / (1e-6 + jnp.abs(xs).max(axis=1, keepdims=True))).astype(xs.dtype))
    return xs


def chained(rows: int, experts: int, dim: int):
    weights = [normal(i, experts, dim, dim) for i in range(1, 4)]
    sizes = np.random.default_rng(rows).multinomial(rows, np.full(experts, 1 / experts))
    return normal(0, rows, dim), weights, jnp.asarray(sizes, jnp.int32)


def test_the_chain_depends_on_each_of_its_steps():
    xs, weights, sizes = chained(1024, 8, 64)
    plain = chain(xs, weights, sizes, apart=True, implementation="ref")
    assert np.isfinite(np.asarray(plain, np.float32)).all()
    for other in (chain(xs, weights[::-1], sizes, apart=True, implementation="ref"),
                  chain(xs, weights, jnp.roll(sizes, 1), apart=True, implementation="ref")):  # fmt: skip
        assert (np.asarray(other != plain).mean(axis=1) > 0.5).mean() > 0.5


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [2048, 16384])
@pytest.mark.parametrize("graphs", [False, True])
def test_on_a_device_a_chain_has_the_bits_of_its_steps_one_by_one(rows, graphs):
    args = chained(rows, 8, 256)
    expected = np.asarray(chain(*args, apart=True))
    # XLA records the operations of a program as a CUDA graph where it has enough of them; here never, or always.
    options = {"xla_gpu_enable_command_buffer": "FUSION,CUSTOM_CALL" if graphs else ""}
    options["xla_gpu_graph_min_graph_size"] = 1
    run = jax.jit(lambda *args: chain(*args, apart=False), compiler_options=options).lower(*args).compile()
    for _ in range(50):
        np.testing.assert_array_equal(np.asarray(run(*args)), expected)
