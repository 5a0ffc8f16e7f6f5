"""The product of router logits in three bfloat16 parts: its numbers, its gradients, and where it runs.

On a CPU it runs only where a test forces it (``product.IN_PARTS``).
"""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moejax import dispatch, routing
from moejax.config import RouterConfig
from moejax.routing import product
from moejax.sharding import MESH_AXES
from tests import moe_fakes as fakes
from tests.moe_fakes import f64

T, D, E = 48, 512, 16
KERNELS = ("usual", "tiny", "huge", "columns of all sizes", "wide", "few bits")


@pytest.fixture
def forced(monkeypatch):
    monkeypatch.setattr(product, "IN_PARTS", True)


def activations(seed=0, count=T, dim=D):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(count, dim)), jnp.bfloat16)


def kernel_of(kind="usual", dim=D, experts=E):
    rng = np.random.default_rng(1)
    made = rng.normal(size=(dim, experts)) / np.sqrt(dim)
    if kind == "few bits":
        return jnp.asarray(made, jnp.bfloat16).astype(jnp.float32)
    scale = {"tiny": 1e-25, "huge": 1e30, "columns of all sizes": 10.0 ** np.linspace(-20, 20, experts)}
    # numbers of many sizes in each sum, above those whose smallest part would be a subnormal number
    wide = 10.0 ** rng.uniform(-25, 25, made.shape) if kind == "wide" else 1.0
    return jnp.asarray(made * wide * scale.get(kind, 1.0), jnp.float32)


def errors(made, x, kernel):
    """Against float64, as a share of the sum of the terms' sizes: what a sum's rounding goes by."""
    return np.abs(f64(made) - f64(x) @ f64(kernel)) / (np.abs(f64(x)) @ np.abs(f64(kernel)))


def assert_equal(got, expected):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_array_equal(f64(a), f64(b))


# --- the numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KERNELS)
def test_parts_are_roundings_and_sum_to_the_kernel(kind):
    """As compiled: a compiler that left the roundings out would put the whole kernel's rounding in the first part."""
    kernel = np.asarray(kernel_of(kind))
    made = np.asarray(jax.jit(product.parts)(kernel))
    assert made.dtype == ml_dtypes.bfloat16 and made.shape == (D, 3, E)
    rest = kernel
    for part in range(3):
        expected = rest.astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(made[:, part].astype(np.float32), expected.astype(np.float32))
        rest = rest - expected.astype(np.float32)
    assert (rest == 0).all()
    np.testing.assert_array_equal(f64(made).sum(axis=1), f64(kernel))
    assert (f64(made)[:, 1] != 0).any() == (kind != "few bits")


@pytest.mark.parametrize("kind", KERNELS)
def test_it_is_as_exact_as_the_product_in_float32(kind):
    """At most twice its error, the largest and the mean, and a few roundings (2**-24) of the terms.

    For a kernel of bfloat16 numbers there is no second part, and the two differ by the order of their sums alone.
    """
    x, kernel = activations(count=512, dim=2048), kernel_of(kind, dim=2048)
    made, plain = jax.jit(product.in_parts)(x, kernel), jax.jit(product.in_float32)(x, kernel)
    assert made.dtype == jnp.float32 and made.shape == (512, E)
    ours, theirs = errors(made, x, kernel), errors(plain, x, kernel)
    assert ours.max() <= 8 * 2.0**-24
    if kind == "few bits":
        return
    assert ours.max() <= 2 * theirs.max() and ours.mean() <= 2 * theirs.mean()
    in_bfloat16 = jnp.dot(x, kernel.astype(jnp.bfloat16), preferred_element_type=jnp.float32)
    assert errors(in_bfloat16, x, kernel).max() > 50 * ours.max()


@pytest.mark.parametrize("kind", KERNELS)
def test_with_sums_in_the_same_order_it_is_more_exact(kind):
    """What the parts themselves cost, without how a matmul of bfloat16 numbers sums: nothing."""
    x, kernel = activations(), kernel_of(kind)
    a, b, c = jnp.unstack(product.parts(kernel).astype(jnp.float32), axis=1)
    by_part = [product.in_float32(x, part) for part in (a, b, c)]
    made, plain = by_part[0] + (by_part[1] + by_part[2]), product.in_float32(x, kernel)
    # numbers of many sizes: the largest error is that of few terms, where chance decides
    share = 2.0 if kind == "wide" else 1.0
    assert errors(made, x, kernel).max() <= share * errors(plain, x, kernel).max()
    if kind == "few bits":
        assert_equal(made, plain)


def test_zeros_give_zeros():
    x, kernel = activations(), kernel_of()
    made = jax.jit(product.in_parts)(x.at[3].set(0), kernel.at[:, 5].set(0))
    assert (np.asarray(made)[3] == 0).all() and (np.asarray(made)[:, 5] == 0).all()
    assert (np.asarray(jax.jit(product.in_parts)(x, jnp.zeros_like(kernel))) == 0).all()


@pytest.mark.parametrize("kind", ["usual", "few bits"])
def test_what_is_not_finite_is_that_of_the_product_in_float32(kind):
    """An infinite activation, two that cancel, one that meets a 0, NaN; and the same in the kernel."""
    x, kernel = activations(), kernel_of(kind).at[7, 2].set(0)
    x = x.at[0, 3].set(jnp.inf).at[1, 4].set(-jnp.inf).at[2, :2].set(jnp.asarray([jnp.inf, -jnp.inf], x.dtype))
    x = x.at[3, 5].set(jnp.nan).at[4, 7].set(jnp.inf)
    for weights in (kernel, kernel.at[3, 0].set(jnp.inf).at[4, 1].set(-jnp.inf).at[5, 2].set(jnp.nan)):
        made, plain = (np.asarray(jax.jit(f)(x, weights)) for f in (product.in_parts, product.in_float32))
        assert np.isposinf(plain).any() and np.isneginf(plain).any() and np.isnan(plain).any()
        finite = np.isfinite(plain)
        np.testing.assert_array_equal(made[~finite], plain[~finite])
        np.testing.assert_allclose(made[finite], plain[finite], rtol=1e-4, atol=1e-5)


# --- the gradients ----------------------------------------------------------------------------------------------------


def pulled(f, x, kernel, dy):
    return jax.vjp(f, x, kernel)[1](dy)


@pytest.mark.parametrize("kind", ["usual", "wide"])
def test_gradients_are_those_of_the_product_in_float32(kind):
    x, kernel = activations(), kernel_of(kind)
    dy = jnp.asarray(np.random.default_rng(2).normal(size=(T, E)), jnp.float32)
    run = jax.jit(pulled, static_argnums=0)
    got = run(product.in_parts, x, kernel, dy)
    assert got[0].dtype == jnp.bfloat16 and got[1].dtype == jnp.float32
    assert_equal(got, run(product.in_float32, x, kernel, dy))
    assert_equal(pulled(product.in_parts, x, kernel, dy), pulled(product.in_float32, x, kernel, dy))


# --- where it runs ----------------------------------------------------------------------------------------------------


def runs_in_parts(dtype=jnp.bfloat16, **settings):
    made = jax.make_jaxpr(lambda x, kernel: routing.pieces.project(x, kernel, RouterConfig(**settings)))(
        activations().astype(dtype), kernel_of()
    )
    return "reduce_precision" in str(made)


def test_bfloat16_on_a_gpu_only(monkeypatch):
    assert product.IN_PARTS is None and not runs_in_parts()
    for platform in ("cpu", "tpu", "gpu"):
        monkeypatch.setattr(jax, "default_backend", lambda platform=platform: platform)
        assert runs_in_parts() == (platform == "gpu")
        assert not runs_in_parts(jnp.float32) and not runs_in_parts(jnp.float16)
    monkeypatch.setattr(product, "IN_PARTS", False)
    assert not runs_in_parts()


def test_the_device_asked_for_decides(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with jax.default_device(jax.devices("cpu")[0]):
        assert not runs_in_parts()
    with jax.default_device("cpu"):
        assert not runs_in_parts()


def test_elsewhere_it_is_the_product_in_float32_bit_for_bit():
    x, kernel = activations(), kernel_of()
    plain = jnp.dot(x.astype(jnp.float32), kernel, precision=jax.lax.Precision.HIGHEST)
    assert_equal(routing.pieces.project(x, kernel, RouterConfig()), plain)


def test_lowered_for_cuda_the_roundings_are_there():
    """So are the three parts in one product with sums in float32, and gradients in float32."""

    def both(x, kernel, dy):
        y, pull = jax.vjp(product.in_parts, x, kernel)
        return y, pull(dy)

    arguments = activations(), kernel_of(), jnp.ones((T, E))
    text = jax.jit(both).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.reduce_precision") == 2 and "format = e8m7" in text
    assert f"(tensor<{T}x{D}xbf16>, tensor<{D}x3x{E}xbf16>) -> tensor<{T}x3x{E}xf32>" in text
    assert f"-> tensor<{D}x{E}xf32>" in text or f"-> tensor<{E}x{D}xf32>" in text


@pytest.mark.parametrize("name", fakes.FAMILIES)
def test_every_family_may_run_on_it(name, forced):
    """Logits as in float64 to 1e-5 in float32, in training too; with jitter the activations are no bfloat16 numbers."""
    x, weights = activations(dim=fakes.DIM), fakes.router_weights(name)
    config, exact = fakes.router_config(name), f64(x) @ f64(weights["kernel"])
    for train in (False, True):
        ctx = fakes.context(np.ones(T, bool), key=jax.random.key(0), train=train)
        run = functools.partial(routing.FAMILIES[name].route, ctx=ctx, config=config)
        assert "reduce_precision" in str(jax.make_jaxpr(run)(x, weights))
        made = fakes.jit(run)(x, weights)
        assert made.logits.dtype == jnp.float32
        np.testing.assert_allclose(made.logits, exact, rtol=1e-5, atol=1e-5)
    jittered = fakes.router_config(name, jitter=0.01)
    ctx = fakes.context(np.ones(T, bool), key=jax.random.key(0), train=True)
    made = jax.make_jaxpr(lambda x: routing.router_logits(x, weights, ctx, jittered))(x)
    assert "reduce_precision" not in str(made)


# --- under transformations --------------------------------------------------------------------------------------------


def value_and_grads(f):
    """The logits, and the gradients of their sum of squares, of a function of (x, kernel)."""

    def run(x, kernel):
        y, pull = jax.vjp(f, x, kernel)
        return y, pull(2 * y)

    return run


def assert_near(got, expected):
    """float32 to a few roundings; bfloat16, the gradient of the activations, to one of its own."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        tolerance = 1e-2 if a.dtype == jnp.bfloat16 else 2e-6
        np.testing.assert_allclose(f64(a), f64(b), rtol=tolerance, atol=tolerance * np.abs(f64(b)).max())


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0)])
def test_under_vmap(axes, forced):
    x, kernel = activations().reshape(4, -1, D), jnp.stack([kernel_of() * 2.0**n for n in range(4)])
    x, kernel = (a if axis == 0 else a[0] for a, axis in zip((x, kernel), axes, strict=True))
    got = jax.jit(jax.vmap(value_and_grads(product.matmul), axes))(x, kernel)
    expected = jax.jit(jax.vmap(value_and_grads(product.in_float32), axes))(x, kernel)
    assert_near(got, expected)


@pytest.mark.parametrize("policy", [None, jax.checkpoint_policies.dots_saveable])
def test_in_a_scan_over_layers_that_are_recomputed(policy, forced):
    kernels = jnp.stack([kernel_of(dim=E, experts=E) * n for n in (1.0, 0.5, 0.25)])

    def loss(product_of, x, kernels):
        def layer(x, kernel):
            return (x + jnp.tanh(product_of(x, kernel))).astype(x.dtype), None

        y, _ = jax.lax.scan(jax.checkpoint(layer, policy=policy), x, kernels)
        return jnp.sum(y.astype(jnp.float32) ** 2)

    run = jax.jit(jax.value_and_grad(loss, argnums=(1, 2)), static_argnums=0)
    got, expected = (run(f, activations(dim=E), kernels) for f in (product.matmul, product.in_float32))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(f64(a), f64(b), rtol=1e-2, atol=1e-2 * np.abs(f64(b)).max())


def mesh_of(axis_type, sizes=(2, 2, 2)):
    return Mesh(np.asarray(jax.devices()).reshape(sizes), MESH_AXES, axis_types=(axis_type,) * 3)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [(None, None), (None, "model"), ("model", None)], ids=["whole", "by expert", "by D"])
def test_on_a_mesh_under_jit(axis_type, spec, forced):
    """Tokens split over two axes, the kernel as it may be. Explicit types are those of the product in float32."""
    mesh = mesh_of(axis_type)
    expected = jax.jit(value_and_grads(product.in_float32))(activations(), kernel_of())
    with jax.set_mesh(mesh):
        x = jax.device_put(activations(), NamedSharding(mesh, PartitionSpec(("data", "expert"))))
        kernel = jax.device_put(kernel_of(), NamedSharding(mesh, PartitionSpec(*spec)))
        got = jax.jit(value_and_grads(product.matmul))(x, kernel)
        if axis_type == AxisType.Explicit:
            plain = jax.eval_shape(value_and_grads(product.in_float32), x, kernel)
            made = jax.eval_shape(value_and_grads(product.matmul), x, kernel)
            assert jax.tree.map(jax.typeof, made) == jax.tree.map(jax.typeof, plain)
            assert plain[0].sharding.spec == PartitionSpec(("data", "expert"), spec[1])
    assert_near(got, expected)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_on_each_shard(axis_type, forced):
    """As layers run it: within a shard_map that checks over which axes a value varies."""
    expected = jax.jit(value_and_grads(product.in_float32))(activations(), kernel_of())
    mesh = mesh_of(axis_type)

    def on_shards(x, kernel):
        return dispatch.per_shard(lambda x, kernel: product.matmul(x, kernel), (x,), kernel, stacked=False)

    with jax.set_mesh(mesh):
        x = jax.device_put(activations(), NamedSharding(mesh, PartitionSpec(("data", "expert"))))
        kernel = jax.device_put(kernel_of(), NamedSharding(mesh, PartitionSpec()))
        got = jax.jit(value_and_grads(on_shards))(x, kernel)
    assert_near(got, expected)


def test_a_kernel_that_varies_over_no_axis(forced):
    """In a shard_map the gradient of such a kernel is the sum over devices, as that of the product in float32."""
    expected = jax.jit(value_and_grads(product.in_float32))(activations(), kernel_of())
    rows, whole = PartitionSpec(("data", "expert")), PartitionSpec()
    with jax.set_mesh(mesh_of(AxisType.Auto)):
        run = jax.shard_map(
            value_and_grads(product.matmul),
            in_specs=(rows, whole),
            out_specs=(rows, (rows, whole)),
            axis_names={"data", "expert"},
            check_vma=True,
        )
        got = jax.jit(run)(activations(), kernel_of())
    assert_near(got, expected)


@pytest.mark.parametrize("axis_type", [None, AxisType.Auto])
def test_a_layer_trains_on_it(axis_type, forced):
    """Its loss and gradients are those with the product in float32, on one device and on a mesh."""
    layer = fakes.small_layer(implementation="ref")
    x = activations(count=16 * 4, dim=fakes.DIM).reshape(16, 4, fakes.DIM)

    def loss(layer, x):
        y, metrics = layer(x, fakes.context(jnp.ones(x.shape[:2], bool), key=jax.random.key(0), train=True))
        return jnp.sum(y.astype(jnp.float32) ** 2) + metrics.z_sum

    ctx = fakes.context(jnp.ones(x.shape[:2], bool))
    assert "reduce_precision" in str(jax.make_jaxpr(lambda x: layer.begin(x, ctx))(x))

    def run():
        # a function of its own for each run: a compiled program does not know of the switch
        return fakes.jit(jax.value_and_grad(lambda layer, x: loss(layer, x), argnums=(0, 1)))(layer, x)

    if axis_type is None:
        got = run()
    else:
        with jax.set_mesh(mesh_of(axis_type)):
            got = run()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(product, "IN_PARTS", False)
        expected = run()
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(f64(a), f64(b), rtol=1e-2, atol=1e-2 * max(1e-3, np.abs(f64(b)).max()))
