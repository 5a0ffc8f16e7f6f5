"""Padding on either side, or in the middle, changes nothing for real tokens; with a cache and without, for each kind of
attention."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from moejax import decode
from moejax.attention.inputs import NOWHERE, attention_input
from moejax.config import RopeConfig
from tests import moe_fakes as fakes
from tests.attention_fakes import LATENT

B, S, WIDTH = 3, 9, 12
LENGTHS = (6, 9, 1)
KINDS = {
    "window and sinks": {"window": 3, "window_layers": (1,), "sinks": True},
    "latent": LATENT | {"query_rank": 6, "window": 4, "window_layers": (0,), "rope": RopeConfig(layout="interleaved")},
}
KINDS["chunks, no positions"] = {
    "window": 3, "window_layers": (0,), "window_kind": "chunks", "no_rope_layers": (1,), "qk_unit_norm": True,
    "temperature": 0.5, "temperature_length": 2,
}  # fmt: skip
ALL = [*KINDS, "experts"]
STARTS = {"right": (0, 0, 0), "left": (6, 3, 11), "either": (0, 3, 7), "middle": (2, 3, 5)}
"""Where each row begins; "middle" also takes two places between its tokens."""


@functools.cache
def model(kind):
    """Dense FFNs compile faster; one model has experts."""
    return fakes.small_model(attention=KINDS.get(kind, {}), moe={"first_dense": 0 if kind == "experts" else 2})


@fakes.jit
def forward(model, tokens, mask=None, cache=None):
    return model(tokens, mask=mask, cache=cache)


def padded(side, rows):
    """``(tokens, mask)`` with the first ``LENGTHS`` of each row; padding holds other random tokens."""
    out, mask = fakes.tokens(B, WIDTH, seed=5), np.zeros((B, WIDTH), bool)
    for b, (row, n, start) in enumerate(zip(rows, LENGTHS, STARTS[side], strict=True)):
        places = start + np.arange(n)
        if side == "middle" and n <= WIDTH - start - 2:
            places[n // 2 :] += 2
        out[b, places], mask[b, places] = row[:n], True
    return out, mask


def assert_rows(got, mask, expected):
    for b, n in enumerate(LENGTHS):
        np.testing.assert_allclose(np.asarray(got)[b][mask[b]], expected[b, :n], rtol=1e-4, atol=1e-5)


@functools.cache
def unpadded(kind):
    """Whole rows without a mask: no token sees a later one, so their beginnings are those of shorter rows."""
    return np.asarray(forward(model(kind), fakes.tokens(B, S)).logits)


@pytest.mark.parametrize("kind", ALL)
def test_padding_on_any_side_equals_none(kind):
    rows, metrics = fakes.tokens(B, S), []
    for side in STARTS:
        tokens, mask = padded(side, rows)
        out = forward(model(kind), tokens, mask)
        assert_rows(out.logits, mask, unpadded(kind))
        metrics.append(out.metrics)
    for other in metrics[1:]:
        fakes.assert_close(other, metrics[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_that_fills_a_new_cache_is_continued_like_any_other(kind):
    """What padding behind the prompt leaves in the cache is seen by nobody."""
    rows, rest = fakes.tokens(B, S), S - min(LENGTHS)
    tokens, _ = padded("right", rows)
    logits, cache = decode.prefill(model(kind), tokens, np.asarray(LENGTHS), WIDTH)
    np.testing.assert_allclose(logits, [unpadded(kind)[b, n - 1] for b, n in enumerate(LENGTHS)], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(cache.length, LENGTHS)
    then, real = np.zeros((B, rest), np.int32), np.zeros((B, rest), bool)
    for b, n in enumerate(LENGTHS):
        then[b, : S - n], real[b, : S - n] = rows[b, n:], True
    out = forward(model(kind), then, real, cache)
    for b, n in enumerate(LENGTHS):
        np.testing.assert_allclose(out.logits[b, : S - n], unpadded(kind)[b, n:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_on_any_side_enters_no_cache(kind):
    """The beginnings with padding, then the rest of each row, right-aligned."""
    rows, rest, start = fakes.tokens(B, S), S - min(LENGTHS), np.asarray(LENGTHS)
    for side in STARTS:
        tokens, mask = padded(side, rows)
        out = forward(model(kind), tokens, mask, model(kind).init_cache(B, S))
        assert_rows(out.logits, mask, unpadded(kind))
        np.testing.assert_array_equal(out.cache.length, LENGTHS)
        then, real = np.zeros((B, rest), np.int32), np.arange(rest) >= rest - (S - start)[:, None]
        for b in range(B):
            then[b, real[b]] = rows[b, LENGTHS[b] :]
        out = forward(model(kind), then, real, out.cache)
        for b in range(B):
            expected = unpadded(kind)[b, LENGTHS[b] :]
            np.testing.assert_allclose(np.asarray(out.logits)[b][real[b]], expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(out.cache.length, S)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_equals_its_rows(kind):
    rows = fakes.tokens(B, S)
    for b in range(B):
        one = forward(model(kind), rows[b : b + 1]).logits[0]
        np.testing.assert_allclose(one, unpadded(kind)[b], rtol=1e-4, atol=1e-5)


def test_what_a_mask_makes_of_places_positions_and_documents():
    mask = jnp.asarray([[False, True, True, False, True]])
    made = attention_input(None, None, mask, None, (1, 5))
    np.testing.assert_array_equal(made.index, [[NOWHERE, 0, 1, NOWHERE, 2]])
    np.testing.assert_array_equal(np.asarray(made.positions)[np.asarray(mask)], [0, 1, 2])
    np.testing.assert_array_equal(made.segment_ids, [[-1, 0, 0, -1, 0]])
    documents = attention_input(jnp.asarray([[9, 0, 1, 9, 0]]), jnp.asarray([[0, 1, 1, 0, 2]]), mask, None, (1, 5))
    np.testing.assert_array_equal(documents.segment_ids, [[-1, 1, 1, -1, 2]])
    np.testing.assert_array_equal(documents.positions, [[9, 0, 1, 9, 0]])
    later = attention_input(None, None, mask, jnp.asarray([7]), (1, 5))
    np.testing.assert_array_equal(later.index, [[NOWHERE, 7, 8, NOWHERE, 9]])
    assert later.segment_ids is None
    whole = attention_input(None, None, None, None, (1, 5))
    np.testing.assert_array_equal(whole.index, [[0, 1, 2, 3, 4]])
    assert whole.segment_ids is None


def test_a_row_of_padding_only_is_finite():
    tokens, mask = fakes.tokens(B, WIDTH), np.arange(B)[:, None] < np.full(WIDTH, B - 1)
    for kind in KINDS:
        for cache in (None, model(kind).init_cache(B, S)):
            assert np.isfinite(forward(model(kind), tokens, mask, cache).logits).all()
