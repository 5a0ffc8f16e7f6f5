"""Decoding: with a cache and step by step, the tokens of full forward passes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import decode
from moejax.decode import generate, greedy, sampled
from tests import moe_fakes as fakes

PROMPTS = [fakes.tokens(1, 6)[0], fakes.tokens(1, 2, seed=1)[0], fakes.tokens(1, 4, seed=2)[0]]
NEW = 5


@functools.cache
def model():
    return fakes.small_model(num_layers=1, tie_embeddings=False, moe={"shared_experts": 1})


@functools.cache
def by_full_forwards():
    """Argmax after each row's last token, then the row again with that token, without a cache."""
    run = fakes.jit(lambda model, tokens, mask: model(tokens, mask=mask).logits)
    rows, width = [list(p) for p in PROMPTS], max(map(len, PROMPTS)) + NEW
    for _ in range(NEW):
        tokens, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), bool)
        for i, row in enumerate(rows):
            tokens[i, : len(row)], mask[i, : len(row)] = row, True
        out = np.asarray(run(model(), jnp.asarray(tokens), jnp.asarray(mask)))
        for i, row in enumerate(rows):
            row.append(int(out[i, len(row) - 1].argmax()))
    return [row[-NEW:] for row in rows]


def run(**more):
    return np.asarray(list(generate(model(), PROMPTS, NEW, **more))).T.tolist()


def test_greedy_equals_repeated_full_forwards_for_prompts_of_any_length():
    expected = by_full_forwards()
    assert len({tuple(row) for row in expected}) == len(PROMPTS)  # rows differ, and so do tokens
    assert len({token for row in expected for token in row}) > 3
    assert run() == expected


def test_a_row_does_not_depend_on_its_neighbours():
    others = [fakes.tokens(1, len(p), seed=i + 7)[0] for i, p in enumerate(PROMPTS)]
    mixed = np.asarray(list(generate(model(), [others[0], PROMPTS[1], others[2]], NEW))).T.tolist()
    assert mixed[1] == by_full_forwards()[1]
    assert mixed[0] != by_full_forwards()[0]


def test_sampling_from_the_most_likely_one_is_greedy():
    assert run(sampler=sampled(top_k=1), key=jax.random.key(5)) == by_full_forwards()
    assert run(sampler=sampled(temperature=1e-4), key=jax.random.key(5)) == by_full_forwards()


def test_sampling_follows_its_key_and_the_softmax():
    hot = sampled(temperature=3.0)
    assert run(sampler=hot, key=jax.random.key(1)) == run(sampler=hot, key=jax.random.key(1))
    assert run(sampler=hot, key=jax.random.key(1)) != run(sampler=hot, key=jax.random.key(2))
    z, draws = jnp.asarray([[1.0, 3.0, 2.0, -1.0]]), 4000
    many = jnp.broadcast_to(z, (draws, 4))
    frequency = np.bincount(sampled(2.0)(many, jax.random.key(0)), minlength=4) / draws
    np.testing.assert_allclose(frequency, fakes.softmax(fakes.f64(z[0]) / 2), atol=0.04)  # five standard errors
    frequency = np.bincount(sampled(2.0, top_k=2)(many, jax.random.key(0)), minlength=4) / draws
    top = fakes.softmax(np.asarray([3.0, 2.0]) / 2)
    np.testing.assert_allclose(frequency, [0, top[0], top[1], 0], atol=0.04)


def test_generation_stops_when_every_row_has_met_the_stop_token():
    expected = np.asarray(by_full_forwards())
    for stop in set(expected.ravel().tolist()):
        first = [list(row).index(stop) if stop in row else NEW for row in expected]
        steps = min(NEW, max(first) + 1)
        assert run(stop_id=stop) == expected[:, :steps].tolist()
    scripted = iter([[7, 1, 1], [2, 7, 1], [3, 3, 7], [4, 4, 4]])
    out = run(sampler=lambda logits, key: jnp.asarray(next(scripted)), stop_id=7)
    assert np.asarray(out).shape == (3, 3)  # row 0 stopped first, and goes on until all have


def test_no_forward_pass_is_made_for_tokens_that_nobody_asked_for(monkeypatch):
    calls, plain = [], decode.forward_cached
    monkeypatch.setattr(decode, "forward_cached", lambda *a: calls.append(a[1].shape) or plain(*a))
    run()
    assert calls == [(3, 6)] + [(3, 1)] * (NEW - 1)


def test_calls_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="an empty prompt has no last token"):
        next(generate(model(), [PROMPTS[0], np.zeros(0, np.int32)], 1))
    for temperature in (0.0, -1.0):
        with pytest.raises(ValueError, match=r"temperature=.*use greedy"):
            sampled(temperature)
    np.testing.assert_array_equal(greedy(jnp.asarray([[0.0, 2.0, 1.0]]), jax.random.key(0)), [1])
