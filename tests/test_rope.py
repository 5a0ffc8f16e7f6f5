"""Rotary positions: against the papers' formulas in float64, and values of published implementations."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import RopeConfig
from moejax.rope import frequencies, m, magnitude, rotary
from tests import moe_fakes as fakes
from tests.attention_fakes import formula

LINEAR = RopeConfig(scaling="linear", factor=4.0)
GPT_OSS = RopeConfig(scaling="yarn", factor=32.0, original_length=4096, truncate=False)
DEEPSEEK = RopeConfig(scaling="yarn", factor=40.0, original_length=4096, mscale=0.707, mscale_all_dim=0.707)
LLAMA = RopeConfig(scaling="llama3", factor=8.0, original_length=8192)
SCOUT = RopeConfig(scaling="llama3", factor=16.0, original_length=8192, high_freq_factor=1.0)
LONG = RopeConfig(scaling="longrope", original_length=64, short_factor=(1.0, 1.5, 2.0, 3.0),
                  long_factor=(2.0, 5.0, 20.0, 60.0), short_mscale=1.1, long_mscale=1.3)  # fmt: skip
SHORT = RopeConfig(scaling="yarn", factor=4.0, original_length=64, beta_fast=8.0, beta_slow=1.0)
EVERY = {
    "none": (RopeConfig(), 10_000.0, 32),
    "linear": (LINEAR, 10_000.0, 32),
    "gpt-oss": (GPT_OSS, 150_000.0, 64),
    "deepseek": (DEEPSEEK, 10_000.0, 64),
    "short": (SHORT, 10_000.0, 16),
    "llama3": (LLAMA, 500_000.0, 128),
    "scout": (SCOUT, 500_000.0, 128),
    "longrope": (LONG, 10_000.0, 8),
}
run = fakes.jit(rotary, static_argnums=(2, 3))


@pytest.mark.parametrize("name", EVERY)
def test_frequencies_equal_the_formula_in_float64(name):
    rope, theta, dims = EVERY[name]
    got = frequencies(rope, theta, dims)
    assert got.dtype == jnp.float32 and got.shape == (dims // 2,)
    np.testing.assert_allclose(got, formula(rope, theta, dims), rtol=5e-6)  # float32 powers of theta


@pytest.mark.parametrize(
    ("rope", "theta", "dims", "expected", "factor"),
    [
        (GPT_OSS, 150_000.0, 64, {1: 0.689044297, 8: 0.0508132726, 13: 0.00386035908, 16: 0.000456483918,
                                  20: 1.8188337e-05, 31: 3.0235114e-07}, 1.3465735902799727),
        (DEEPSEEK, 10_000.0, 64, {1: 0.749894202, 8: 0.100000001, 13: 0.0183781441, 16: 0.00550000044,
                                  20: 0.000790569407, 24: 2.49999994e-05, 31: 3.33380353e-06}, 1.0),
        (dataclasses.replace(DEEPSEEK, mscale=1.0, mscale_all_dim=0.5), 10_000.0, 64, {13: 0.0183781441},
         1.1557219901962608),
        (LLAMA, 500_000.0, 128, {1: 0.814617217, 16: 0.0376060307, 29: 0.00216657063, 32: 0.000524846022,
                                 36: 7.78465546e-05, 63: 3.06892588e-07}, 1.0),
        (LINEAR, 10_000.0, 32, {0: 0.25, 1: 0.140585333, 8: 0.00249999994, 15: 4.44569851e-05}, 1.0),
    ],
)  # fmt: skip
def test_values_of_transformers(rope, theta, dims, expected, factor):
    """Printed by ``transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS`` of 4.57.6 and 5.17.0 (equal)."""
    got = frequencies(rope, theta, dims)
    np.testing.assert_allclose([got[i] for i in expected], list(expected.values()), rtol=5e-6)
    assert magnitude(rope) == pytest.approx(factor, rel=1e-12)


def test_longrope_takes_its_long_factors_where_there_are_more_places():
    """One place more than ``original_length`` is enough; the switch is by places, not by a token's position."""
    plain = frequencies(RopeConfig(), 10_000.0, 8)
    for places, factors, scale in [(n, LONG.short_factor, 1.1) for n in (0, 64)] + [(65, LONG.long_factor, 1.3)]:
        np.testing.assert_allclose(frequencies(LONG, 10_000.0, 8, places), plain / np.asarray(factors), rtol=1e-6)
        assert magnitude(LONG, places) == scale
    x, positions = jnp.ones((1, 2, 1, 8)), jnp.asarray([[3, 5]])
    short, long = (rotary(x, positions, 10_000.0, LONG, places) for places in (64, 65))
    assert np.abs(short - long).min() > 0.02


def test_bounds_of_llama3_that_are_one_make_a_step():
    """Frequencies of wavelengths above the original length are divided by the factor, the others kept."""
    plain, got = (np.asarray(frequencies(r, 500_000.0, 128)) for r in (RopeConfig(), SCOUT))
    long = 2 * math.pi / plain > 8192
    assert 0 < long.sum() < 64
    np.testing.assert_array_equal(got[~long], plain[~long])
    np.testing.assert_allclose(got[long], plain[long] / 16, rtol=1e-6)


def test_what_multiplies_cos_and_sin():
    yarn = RopeConfig(scaling="yarn", factor=10.0, original_length=64)
    one = 0.1 * math.log(10) + 1
    assert m(yarn, 1.0) == pytest.approx(one) and m(yarn, 0.0) == 1
    assert m(dataclasses.replace(yarn, factor=1.0), 1.0) == 1
    assert magnitude(yarn) == pytest.approx(one)
    both = dataclasses.replace(yarn, mscale=2.0, mscale_all_dim=1.0)
    assert magnitude(both) == pytest.approx((2 * one - 1) / one)
    assert magnitude(dataclasses.replace(yarn, attention_factor=1.25)) == 1.25
    assert magnitude(LLAMA) == magnitude(LINEAR) == 1


@pytest.mark.parametrize("layout", ["halves", "interleaved"])
@pytest.mark.parametrize(("fraction", "name"), [(1.0, "none"), (0.75, "short"), (0.5, "linear")])
def test_pairs_are_multiplied_as_complex_numbers(layout, fraction, name):
    """Equation 34 of 2104.09864 (2 x 2 rotations) is a product with exp(i p f)."""
    rope = dataclasses.replace(EVERY[name][0], layout=layout, fraction=fraction)
    rng = np.random.default_rng(0)
    n, theta = 16, 100.0
    dims = int(n * fraction)
    x, positions = rng.normal(size=(2, 5, 3, n)), rng.integers(0, 50, (2, 5))
    expected = x.copy()
    for i, f in enumerate(formula(rope, theta, dims)):
        a, b = (2 * i, 2 * i + 1) if layout == "interleaved" else (i, i + dims // 2)
        z = (x[..., a] + 1j * x[..., b]) * np.exp(1j * positions * f)[..., None] * magnitude(rope)
        expected[..., a], expected[..., b] = z.real, z.imag
    got = run(jnp.asarray(x, jnp.float32), jnp.asarray(positions), theta, rope)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=2e-5)  # angles up to 50 in float32
    np.testing.assert_array_equal(got[..., dims:], jnp.asarray(x[..., dims:], jnp.float32))


def test_the_plain_settings_are_the_default_bit_for_bit():
    x = jax.random.normal(jax.random.key(0), (2, 7, 3, 8))
    positions = jnp.arange(14).reshape(2, 7)
    half = 4
    angle = positions.astype(jnp.float32)[..., None, None] * 100.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    a, b = x[..., :half], x[..., half:]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    expected = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
    np.testing.assert_array_equal(rotary(x, positions, 100.0), expected)
    np.testing.assert_array_equal(rotary(x, positions, 100.0, RopeConfig()), expected)


CHANGES = [
    (LINEAR, {"layout": "interleaved"}), (LINEAR, {"fraction": 0.5}), (LINEAR, {"factor": 5.0}),
    (LINEAR, {"scaling": "none"}), (SHORT, {"factor": 5.0}), (SHORT, {"original_length": 256}),
    (SHORT, {"beta_fast": 2.0}), (SHORT, {"beta_slow": 0.1}), (SHORT, {"truncate": False}),
    (SHORT, {"mscale": 1.0, "mscale_all_dim": 0.5}), (SHORT, {"mscale": 0.7, "mscale_all_dim": 0.5}),
    (SHORT, {"attention_factor": 1.5}), (LLAMA, {"factor": 4.0}), (LLAMA, {"original_length": 4096}),
    (LLAMA, {"low_freq_factor": 2.0}), (LLAMA, {"high_freq_factor": 8.0}),
]  # fmt: skip


@pytest.mark.parametrize(("rope", "change"), CHANGES, ids=[str(change) for _, change in CHANGES])
def test_each_setting_moves_the_output(rope, change):
    x = np.random.default_rng(0).normal(size=(1, 3, 1, 16)).astype(np.float32)
    positions = jnp.asarray([[1, 40, 3000]])
    theta = 10_000.0 if rope is SHORT else 500_000.0
    before, after = (np.asarray(rotary(x, positions, theta, r)) for r in (rope, dataclasses.replace(rope, **change)))
    assert np.abs(before - after).max() > 1e-2
