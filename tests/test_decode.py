"""Decoding: with a cache and step by step, the tokens of full forward passes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax import decode
from moejax.config import ConfigError
from moejax.decode import generate, greedy, sampled
from moejax.limits import token_drop
from tests import moe_fakes as fakes
from tests.attention_fakes import LATENT

PROMPTS = [fakes.tokens(1, 6)[0], fakes.tokens(1, 2, seed=1)[0], fakes.tokens(1, 4, seed=2)[0]]
NEW = 5


KINDS = {
    "window and sinks": {"attention": {"sinks": True, "window": 4, "window_layers": (0,)}, "moe": {"first_dense": 2}},
    "latent": {"attention": LATENT | {"query_rank": 6, "window": 6}, "moe": {"first_dense": 2}},
}


@functools.cache
def model(kind="plain"):
    """Longcat's two caches: tests/test_blocks.py."""
    if kind in KINDS:
        return fakes.small_model(tie_embeddings=False, **KINDS[kind])
    return fakes.small_model(num_layers=1, tie_embeddings=False, moe={"shared_experts": 1})


@functools.cache
def by_full_forwards(kind="plain"):
    """Argmax after each row's last token, then the row again with that token, without a cache."""
    run = fakes.jit(lambda model, tokens, mask: model(tokens, mask=mask).logits)
    rows, width = [list(p) for p in PROMPTS], max(map(len, PROMPTS)) + NEW
    for _ in range(NEW):
        tokens, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), bool)
        for i, row in enumerate(rows):
            tokens[i, : len(row)], mask[i, : len(row)] = row, True
        out = np.asarray(run(model(kind), jnp.asarray(tokens), jnp.asarray(mask)))
        for i, row in enumerate(rows):
            row.append(int(out[i, len(row) - 1].argmax()))
    return [row[-NEW:] for row in rows]


def run(kind="plain", **more):
    return np.asarray(list(generate(model(kind), PROMPTS, NEW, **more))).T.tolist()


def test_greedy_equals_repeated_full_forwards_for_prompts_of_any_length():
    expected = by_full_forwards()
    assert len({tuple(row) for row in expected}) == len(PROMPTS)  # rows differ, and so do tokens
    assert len({token for row in expected for token in row}) > 3
    assert run() == expected


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_attention_generates_with_its_cache_what_it_does_without(kind):
    expected = by_full_forwards(kind)
    assert len({token for row in expected for token in row}) > 3
    assert run(kind) == expected


def test_prompts_padded_on_the_left_are_continued_alike():
    length = max(map(len, PROMPTS))
    logits = []
    for side in ("right", "left"):
        tokens, mask = np.zeros((len(PROMPTS), length), np.int32), np.zeros((len(PROMPTS), length), bool)
        for row, prompt in enumerate(PROMPTS):
            places = slice(None, len(prompt)) if side == "right" else slice(-len(prompt), None)
            tokens[row, places], mask[row, places] = prompt, True
        cache = model().init_cache(len(PROMPTS), length + NEW)
        last, cache = decode.forward_cached(model(), jnp.asarray(tokens), jnp.asarray(mask), cache)
        np.testing.assert_array_equal(cache.length, [len(p) for p in PROMPTS])
        logits.append(last)
    np.testing.assert_array_equal(logits[0].argmax(-1), [row[0] for row in by_full_forwards()])
    np.testing.assert_allclose(logits[1], logits[0], rtol=1e-4, atol=1e-5)


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
        until = [[*row[: i + 1], *[stop] * NEW][:steps] for row, i in zip(expected.tolist(), first, strict=True)]
        for at_a_time in (1, 8):
            assert run(stop_id=stop, at_a_time=at_a_time) == until


def middle(logits, key):
    """What is likeliest may stay so without an expert."""
    return jnp.argsort(logits, axis=-1)[:, logits.shape[1] // 2]


def test_rows_that_have_ended_are_no_tokens_of_a_limited_step():
    """Two rows choose an expert that one of them may have: alone, each has it."""
    built, steps = model(), 4
    limits = (token_drop(1.0, rounding="at_least_one"),)

    def go_on(rows, ended):
        prompts = [PROMPTS[1]] * rows
        logits, cache = decode.prefill(built, jnp.asarray(prompts), jnp.full(rows, len(PROMPTS[1])), 9)
        ended = jnp.asarray(ended), jnp.zeros(0, jnp.int32)
        more = (jax.random.key(0), jnp.int32(1), *ended, middle, steps, limits)
        return np.asarray(decode.extend(built, greedy(logits, more[0]), cache, *more)[0])

    alone = go_on(1, [False])
    both = go_on(3, [True, False, True])
    np.testing.assert_array_equal(both[:, 1], alone[:, 0])
    assert len({tuple(row) for row in go_on(3, [False] * 3).T}) > 1  # else: they took places from one another
    assert len(set(both[:, 0].tolist())) == 1


def test_a_caller_may_end_a_row():
    ended = np.zeros(len(PROMPTS), bool)
    made = []
    for new in generate(model(), PROMPTS, NEW, ended=ended, at_a_time=1):
        made.append(new.tolist())
        ended[0] = len(made) == 2 or ended[0]
    expected = np.asarray(by_full_forwards()).T.tolist()
    assert made == expected[:2] + [[expected[1][0], *row[1:]] for row in expected[2:]]
    assert len(list(generate(model(), PROMPTS, NEW, ended=np.ones(len(PROMPTS), bool)))) == 1


def scripted(monkeypatch: pytest.MonkeyPatch, rows: list[list[int]], stops: int | tuple[int, ...] | None) -> list:
    """What is generated where the model's tokens are those of ``rows``, whatever it computes."""
    later = [*rows[1:], *([rows[-1]] * 8)]
    monkeypatch.setattr(decode, "extend", lambda model, token, cache, *rest: (jnp.asarray(later), cache))
    first = lambda z, key: jnp.asarray(rows[0])  # noqa: E731
    return list(generate(model(), PROMPTS, 4, sampler=first, stop_id=stops))


@pytest.mark.parametrize(("stops", "steps"), [((7, 9), 3), (7, 4), ((8,), 4), ((), 4), (None, 4), (9, 4)])
def test_generation_stops_at_any_of_several_tokens(monkeypatch: pytest.MonkeyPatch, stops, steps: int):
    """Rows that have stopped give tokens until all have."""
    made = scripted(monkeypatch, [[7, 1, 1], [2, 9, 1], [3, 3, 7], [4, 4, 4]], stops)
    assert np.asarray(made).tolist() == [[7, 1, 1], [2, 9, 1], [3, 3, 7], [4, 4, 4]][:steps]


def test_tokens_are_made_several_at_a_time_and_no_call_follows_the_last(monkeypatch: pytest.MonkeyPatch):
    calls, first, more = [], decode.prefill, decode.extend
    monkeypatch.setattr(decode, "prefill", lambda *a: calls.append(a[1].shape) or first(*a))
    monkeypatch.setattr(decode, "extend", lambda *a: calls.append((int(a[4]), a[-1])) or more(*a))
    whole = run()
    assert calls == [(3, 6), (1, 8)] and NEW < 9
    calls.clear()
    assert run(at_a_time=2) == whole
    assert calls == [(3, 6), *((i, 2) for i in range(1, NEW, 2))]


def test_a_prompt_begins_its_cache_anew_and_says_itself_what_is_padding():
    run = fakes.jit(lambda model, tokens, cache, lengths: model(tokens, cache=cache, prompt=lengths))
    tokens, lengths = fakes.tokens(3, 6), jnp.asarray([6, 1, 3])
    first = run(model(), tokens, model().init_cache(3, 8), lengths)
    again = run(model(), tokens, first.cache, lengths)
    np.testing.assert_array_equal(again.cache.length, lengths)
    np.testing.assert_array_equal(again.logits, first.logits)
    with pytest.raises(ValueError, match="no mask, and a cache"):
        model()(tokens, prompt=lengths)
    with pytest.raises(ValueError, match="no mask, and a cache"):
        model()(tokens, cache=first.cache, mask=tokens > 0, prompt=lengths)


def test_prompts_are_padded_for_fused_attention_and_the_cache_is_not(monkeypatch: pytest.MonkeyPatch):
    """LongRoPE chooses by the cache's places: the device must not change them."""
    calls = []
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    logits = jnp.zeros((3, fakes.VOCAB))
    monkeypatch.setattr(decode, "prefill", lambda _, tokens, lengths, places, *rest: (
        calls.append((tokens.shape, places)) or (logits, None)))  # fmt: skip
    next(generate(model(), PROMPTS, NEW))
    assert calls == [((3, decode.FUSED_LENGTH), 6 + NEW)]


@pytest.mark.parametrize("place", [-1, 0, 2])
def test_logits_that_are_nan_name_no_token(place: int):
    """The embedding of one token is broken: of one in the prompt, or of one that is made."""
    rows = [[*prompt, *new] for prompt, new in zip(PROMPTS, by_full_forwards(), strict=True)]
    token = rows[1][len(PROMPTS[1]) + place]
    read = [
        row.index(token) + 1 - len(prompt) if token in row else NEW for row, prompt in zip(rows, PROMPTS, strict=True)
    ]
    first = max(min(read), 0)  # tokens that are made before any row has read it
    broken = nnx.clone(model())
    broken.embed[...] = broken.embed[...].at[token].set(jnp.nan)
    made = generate(broken, PROMPTS, NEW)
    for i in range(first):
        np.testing.assert_array_equal(next(made), [row[len(p) + i] for row, p in zip(rows, PROMPTS, strict=True)])
    with pytest.raises(FloatingPointError, match=rf"token {first + 1} of row \d: the model gave NaN for its logits"):
        next(made)


def test_calls_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="an empty prompt has no last token"):
        next(generate(model(), [PROMPTS[0], np.zeros(0, np.int32)], 1))
    with pytest.raises(ValueError, match="at_a_time=0"):
        next(generate(model(), PROMPTS, 1, at_a_time=0))
    assert next(generate(model(), PROMPTS, 0), None) is None  # and ends
    for temperature in (0.0, -1.0):
        with pytest.raises(ValueError, match=r"temperature=.*use greedy"):
            sampled(temperature)
    np.testing.assert_array_equal(greedy(jnp.asarray([[0.0, 2.0, 1.0]]), jax.random.key(0)), [1])


@functools.cache
def on_ranks(ranks):
    return fakes.small_model(num_layers=1, tie_embeddings=False, moe={"virtual_ranks": ranks})


LIMITED = {"limits": (token_drop(0.5, rounding="at_least_one"),), "limit_steps": True, "sampler": middle}


def test_each_virtual_rank_limits_rows_of_its_own():
    """Each row, in its prompt and in each step, keeps what it keeps alone."""

    def made(ranks, prompts):
        return np.asarray(list(generate(on_ranks(ranks), prompts, NEW, **LIMITED))).T.tolist()

    prompts = [*PROMPTS, fakes.tokens(1, 6, seed=3)[0]]
    alone = [made(1, [prompt])[0] for prompt in prompts]
    assert made(4, prompts) == alone != made(1, prompts)


def test_virtual_ranks_that_do_not_divide_the_tokens_are_refused_before_anything_runs(monkeypatch):
    monkeypatch.setattr(decode, "prefill", lambda *args: pytest.fail("a prompt was computed"))
    prompts, way_out = [fakes.tokens(1, 4)[0]] * 3, "on a device: generate for a multiple of 4 prompts, so that each"
    with pytest.raises(ConfigError, match=f"virtual_ranks=4 does not divide the 3 tokens of a decoding step {way_out}"):
        next(generate(on_ranks(4), prompts, NEW, **LIMITED))
    odd = [prompt[:3] for prompt in prompts]
    with pytest.raises(ConfigError, match=f"virtual_ranks=4 does not divide the 9 tokens of the prompts {way_out}"):
        next(generate(on_ranks(4), odd, NEW, **LIMITED | {"limit_steps": False}))
