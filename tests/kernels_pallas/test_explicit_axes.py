"""Arrays split over mesh axes of type Explicit: the same numbers as on one device, from every back end of the CPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from kernels_pallas import grouped_ffn, grouped_matmul, moe_ffn
from kernels_pallas.grouped_matmul import specs
from tests.kernels_pallas import oracle
from tests.kernels_pallas.backends import ALWAYS, MARKS, QUICK, ffn_inputs, normal

pytestmark = [*MARKS, pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")]

ROWS, EXPERTS = 16, 4
SIZES, EXTENTS = np.array([3, 0, 7, 6], np.int32), np.array([64, 64, 0, 1], np.int32)
SPLITS = {
    "replicated": lambda a: (),
    "rows": lambda a: ("i",) if len(a) in (ROWS, ROWS // 2) else (),
    "experts": lambda a: ("i",) if len(a) == EXPERTS else (),
    "columns": lambda a: (*[None] * (a.ndim - 1), "i") if a.ndim > 1 else (),
}


def with_gradients(call, operands, rest):
    out, pull = jax.vjp(lambda *operands: call(*operands, *rest), *operands)
    return out, *pull(jnp.sin(out))


def matmul(name):
    call = functools.partial(grouped_matmul, implementation=name, extents=jnp.asarray(EXTENTS), extent_axis="k")
    return call, (normal(1, (ROWS, 8)), normal(2, (EXPERTS, 8, 6))), (SIZES,)


def ffn(name):
    shape = dataclasses.replace(specs.SHAPES["tiny"], rows=ROWS, experts=EXPERTS)
    xs, weights, _, row_weights = ffn_inputs(shape, "swiglu", bias=True)

    def call(xs, gate, up, down, up_bias, row_weights, sizes):
        options = {"activation": "swiglu", "row_weights": row_weights, "implementation": name}
        return grouped_ffn(up=up, gate=gate, down=down, xs=xs, up_bias=up_bias, group_sizes=sizes, **options)

    return call, (xs, *weights[:3], weights.up_bias, row_weights), (SIZES,)


def layer(name):
    (x, *others), _ = ffn(name)[1:]
    expert = np.random.default_rng(3).integers(0, EXPERTS, (ROWS // 2, 2)).astype(np.int32)

    def call(x, weight, gate, up, down, down_bias, expert):
        options = {"activation": "swiglu", "down_bias": down_bias, "implementation": name}
        return moe_ffn(x, expert, weight, gate, up, down, **options)

    bias = normal(4, (EXPERTS, x.shape[1]))
    return call, (x[: ROWS // 2], normal(5, expert.shape), *others[:3], bias), (expert,)


# What is common to the three functions one back end shows.
CASES = [(matmul, name) for name in ALWAYS] + [(ffn, "cpu_tiled"), (layer, "cpu_tiled")]
REST = [pytest.param(made, name, marks=pytest.mark.slow) for made in (ffn, layer) for name in ALWAYS[1:]]


@pytest.mark.parametrize(("made", "name"), [*CASES, *REST])
def test_split_arrays_give_the_numbers_of_one_device(made, name):
    call, *arrays = made(name)
    run = jax.jit(functools.partial(with_gradients, call), compiler_options=QUICK)
    expected = run(*arrays)
    mesh = jax.make_mesh((2,), ("i",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:2])
    for split in SPLITS.values():
        placed = jax.tree.map(lambda a, at=split: jax.device_put(a, NamedSharding(mesh, PartitionSpec(*at(a)))), arrays)
        with jax.set_mesh(mesh):
            actual = run(*placed)
        rows = placed[0][0].sharding.spec[:1]
        for a, like in zip(actual, (None, *placed[0]), strict=True):
            spec = PartitionSpec(*rows) if like is None else like.sharding.spec
            assert a.sharding.is_equivalent_to(NamedSharding(mesh, spec), a.ndim)
        for a, b in zip(actual, expected, strict=True):
            assert np.linalg.norm(b) > 0 and oracle.error(a, b) < 1e-5
    assert oracle.error(with_gradients(call, *placed)[0], expected[0]) < 1e-5  # op by op, outside of the mesh
