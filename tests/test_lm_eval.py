"""The lm-eval adapter against lm-eval's definitions, computed by brute force on a model of random parameters.

Brute force: one sequence at a time, token by token from the logits of a whole forward pass. Padding behind its tokens
lets one program run all lengths; tests/test_parity.py and test_attention_padding.py hold that it changes nothing.
"""

import copy
import dataclasses
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from absl import flags

from experiments import lm_eval as program
from experiments import session
from moejax import derived, importers, limits
from moejax.checkpoint import Checkpoints, load_model
from moejax.config import (
    AttentionConfig,
    ConfigError,
    ExperimentConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    RopeConfig,
    RouterConfig,
    to_dict,
)
from moejax.data import load_tokenizer
from moejax.evaluate import harness as definitions
from moejax.evaluate.harness import Harness
from moejax.model import Decoder, build
from moejax.pretrained import _with_config
from moejax.sharding import make_mesh
from moejax.train import Trainer
from tests.small import quick_compilation, small_config, small_model, start
from tests.test_pretrained_tokenizer import byte_level
from tests.test_pretrained_tokenizer import write as write_tokenizer

LENGTH = 12  # tokens that the model sees at once
EOT, IDS = 256, 257
TOKENIZER = load_tokenizer("byte")


@pytest.fixture(scope="module", autouse=True)
def quickly() -> Iterator[None]:
    with quick_compilation():
        yield


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    # Limits that would drop most pairs of a training batch: the adapter leaves them out.
    model = dataclasses.replace(small_model(first_dense=0, every=1, capacity_factor=0.5), num_layers=1, vocab_size=320)
    config = small_config(model)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, seq_len=LENGTH))
    made = Trainer(config, np.ones(320), make_mesh(MeshConfig(), jax.devices()[:1]))
    checkpoints = Checkpoints(folder / "checkpoints")
    meta = {"step": 7, "config": to_dict(config), "data": {"tokenizer": TOKENIZER.hash}}
    checkpoints.save(7, start(made), meta, score=1.0)
    checkpoints.close()
    return folder


@pytest.fixture(scope="module")
def model(workdir: Path) -> Decoder:
    return load_model(workdir)[0]


@pytest.fixture(scope="module")
def harness(workdir: Path) -> Harness:
    made, name = program.open_harness(workdir, batch_size=2)
    assert (made.max_length, made.max_gen_toks) == (LENGTH, 256) and "step 7" in name and TOKENIZER.hash in name
    return made


@jax.jit
def forward(model: Decoder, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    return model(tokens, mask=mask, limits=()).logits


def ids(text: str) -> list[int]:
    return list(text.encode())


def next_logits(model: Decoder, sequence: list[int]) -> np.ndarray:
    """After the last token."""
    count = len(sequence)
    mask = np.arange(max(count, LENGTH))[None] < count
    tokens = np.full(mask.shape, EOT, np.int32)
    tokens[mask] = sequence
    return np.asarray(forward(model, tokens, mask)[0, count - 1], np.float64)


def by_hand(model: Decoder, before: list[int], after: list[int]) -> tuple[float, bool]:
    """(log p(after | before), whether each of its tokens is the likeliest)"""
    sequence = (before + after)[-(LENGTH + 1) :]
    total, greedy = 0.0, True
    for i in range(len(sequence) - len(after), len(sequence)):
        logits = next_logits(model, sequence[:i])
        total += logits[sequence[i]] - np.logaddexp.reduce(logits)
        greedy &= int(np.argmax(logits[:IDS])) == sequence[i]
    return total, greedy


def by_steps(model: Decoder, context: list[int], count: int) -> list[int]:
    """The likeliest tokens one after the other, up to end-of-text."""
    made: list[int] = []
    while len(made) < count:
        token = int(np.argmax(next_logits(model, context + made)[:IDS]))
        if token == EOT:
            break
        made.append(token)
    return made


# --- log-likelihood ---------------------------------------------------------------------------------------------------

PAIRS = {
    "plain": ("ab", " cd", "ab", " cd"),
    "one token": ("abc", "d", "abc", "d"),
    "spaces go to the continuation": ("ab \n", "cd", "ab", " \ncd"),
    "nothing before": ("", "cd", None, "cd"),
    "only spaces before": ("  ", "cd", None, "  cd"),
    "characters of several bytes": ("né", "€", "né", "€"),
    "just fits": ("abcde", "fghijklm", "abcde", "fghijklm"),
    "the left end is lost": ("0123456789abcdef", "ghij", "789abcdef", "ghij"),
    "one token of context is left": ("0123456789", "abcdefghijkl", "9", "abcdefghijkl"),
}


def test_loglikelihoods_are_those_of_single_forward_passes(harness: Harness, model: Decoder):
    made = harness.loglikelihood([(context, continuation) for context, continuation, _, _ in PAIRS.values()])
    for (name, (_, _, before, after)), (value, greedy) in zip(PAIRS.items(), made, strict=True):
        expected = by_hand(model, [EOT] if before is None else ids(before), ids(after))
        assert value == pytest.approx(expected[0], abs=1e-5, rel=1e-5), name
        assert isinstance(value, float) and greedy is expected[1], name
    assert len({round(value, 3) for value, _ in made}) == len(PAIRS)


def test_nan_is_no_likelihood(harness: Harness):
    broken = dataclasses.replace(harness, score=lambda batch: (np.full(batch["tokens"].shape, np.nan),) * 2)
    for ask in (lambda: broken.loglikelihood([("ab", "c")]), lambda: broken.loglikelihood_rolling([("ab",)])):
        with pytest.raises(FloatingPointError, match="request 0: the model gave NaN"):
            ask()


def test_greedy_means_every_token_is_the_likeliest(harness: Harness, model: Decoder):
    before = ids("abc")
    likeliest = by_steps(model, before, 6)
    assert len(likeliest) == 6
    wrong = [[*likeliest[:i], (likeliest[i] + 1) % 256, *likeliest[i + 1 :]] for i in (0, 3, 5)]
    pairs = [(before, tokens) for tokens in (likeliest, likeliest[:1], *wrong)]
    made = harness.score_pairs(pairs, lambda index, answer: None)
    assert [greedy for _, greedy in made] == [True, True, False, False, False]
    for (_, tokens), (value, _) in zip(pairs, made, strict=True):
        assert value == pytest.approx(by_hand(model, before, tokens)[0], abs=1e-5, rel=1e-5)


def test_neither_batch_nor_order_nor_padding_changes_an_answer(harness: Harness):
    requests = [(context, continuation) for context, continuation, _, _ in PAIRS.values()]
    expected = harness.loglikelihood(requests)
    other = dataclasses.replace(harness, batch_size=5)
    made = other.loglikelihood(requests[::-1])[::-1]
    np.testing.assert_allclose([v for v, _ in made], [v for v, _ in expected], rtol=1e-5, atol=1e-5)
    assert [greedy for _, greedy in made] == [greedy for _, greedy in expected]


def test_limited_steps_on_virtual_ranks_are_refused_before_anything_is_asked(workdir: Path, monkeypatch: Any):
    opened = program.open_weights

    def on_ranks(*args: Any, **more: Any) -> tuple:
        model, config, meta = opened(*args, **more)
        moe = dataclasses.replace(model.config.moe, virtual_ranks=2)
        return _with_config(model, dataclasses.replace(model.config, moe=moe)), config, meta

    monkeypatch.setattr(program, "open_weights", on_ranks)
    some = (limits.token_drop(1.0, rounding="at_least_one"),)
    with pytest.raises(ConfigError, match=r"--limit_decode with model\.moe\.virtual_ranks=2 in the checkpoint"):
        program.open_harness(workdir, limits=lambda model: some, limit_steps=True)
    program.open_harness(workdir, limits=lambda model: some)


def test_limits_count_only_where_asked_for(workdir: Path, harness: Harness):
    limited, _ = program.open_harness(workdir, batch_size=2, dropless=False)
    in_force = (limits.token_drop(1.0),)
    assert limited.fills and not program.open_harness(workdir, limits=lambda model: in_force)[0].fills
    requests = [("abcdef", "ghijk"), ("xyzxyz", " and")]
    difference = [
        a - b for (a, _), (b, _) in zip(*(h.loglikelihood(requests) for h in (limited, harness)), strict=True)
    ]
    assert np.max(np.abs(difference)) > 1e-3


def test_contexts_may_begin_with_end_of_text(harness: Harness, model: Decoder):
    marked = dataclasses.replace(harness, add_bos_token=True)
    for context, before in (("ab ", [EOT, *ids("ab")]), ("", [EOT])):
        after = ids(context[2:] + "cd")
        ((value, _),) = marked.loglikelihood([(context, "cd")])
        assert value == pytest.approx(by_hand(model, before, after)[0], abs=1e-5, rel=1e-5)


class Pairs:
    """Bytes, but "ab" is one token."""

    eot_id, byte_lengths = EOT, np.ones(300, np.int32)

    def encode(self, text: str) -> np.ndarray:
        return np.array([ord(c) if c != "\0" else 290 for c in text.replace("ab", "\0")], np.int32)

    def decode(self, tokens: Any) -> str:
        return "".join("ab" if i == 290 else chr(i) for i in tokens)


def test_tokens_across_the_boundary_are_counted_as_lm_eval_counts_them(harness: Harness):
    merging = dataclasses.replace(harness, tokenizer=Pairs())
    x, a, c, ab = ord("x"), ord("a"), ord("c"), 290
    assert merging.encode_pair("xa", "ca") == ([x, a], [c, a])
    assert merging.encode_pair("xa", "bc") == ([x, a], [c])  # the whole is x, ab, c
    assert merging.encode_pair("xx", "abc") == ([x, x], [ab, c])
    with pytest.raises(ConfigError, match="context='xa', continuation='b': the continuation adds no token"):
        merging.loglikelihood([("xa", "b")])


@pytest.mark.parametrize(
    ("context", "continuation", "message"),
    [
        ("ab", "", "adds no token to its context"),
        ("", "", "adds no token to its context"),
        ("ab", "0123456789abc", "has 13 tokens, more than max_length=12"),
    ],
)
def test_what_cannot_be_scored_is_named(harness: Harness, context: str, continuation: str, message: str):
    with pytest.raises(ConfigError, match=message):
        harness.loglikelihood([("ab", "cd"), (context, continuation)])


# --- rolling ----------------------------------------------------------------------------------------------------------


def test_windows_are_those_of_lm_evals_documentation():
    found = list(definitions.rolling_windows(list(range(10)), -1, 4))
    assert found == [([-1], [0, 1, 2, 3]), ([3], [4, 5, 6, 7]), ([5, 6, 7], [8, 9])]
    assert list(definitions.rolling_windows([], -1, 4)) == []
    for size in range(1, 14):
        windows = list(definitions.rolling_windows(list(range(size)), -1, 4))
        assert [token for _, after in windows for token in after] == list(range(size))
        assert all(len(before) + len(after) == 5 for before, after in windows[1:])  # all the context that fits


def test_rolling_likelihoods_are_sums_over_windows(harness: Harness, model: Decoder):
    texts = [
        "",
        "a",
        "twelve bytes",
        "thirteen byte",
        "two windows of 24 bytes.",
        "a window and not quite 2"[:19],
        "é" * 15,
    ]
    made = harness.loglikelihood_rolling([(text,) for text in texts])
    for text, value in zip(texts, made, strict=True):
        tokens, expected = ids(text), 0.0
        for begin in range(0, len(tokens), LENGTH):
            after = tokens[begin : begin + LENGTH]
            expected += by_hand(model, [EOT, *tokens[:begin]], after)[0]
        assert value == pytest.approx(expected, abs=2e-5, rel=1e-5), text
    assert made[0] == 0


# --- generation -------------------------------------------------------------------------------------------------------


def test_generated_text_is_the_argmax_of_each_step(harness: Harness, model: Decoder):
    contexts = ["a", "abc d", "Hé", "0123456789abcdef", ""]
    requests = [(context, {"until": [], "max_gen_toks": 6 - i % 2}) for i, context in enumerate(contexts)]
    made = harness.generate_until(requests)
    for i, (context, text) in enumerate(zip(contexts, made, strict=True)):
        count = 6 - i % 2
        assert text == TOKENIZER.decode(by_steps(model, ids(context)[-(LENGTH - count) :] or [EOT], count))
    assert len(set(made)) > 2 and all(made)
    assert [harness.generate_until([request])[0] for request in requests[1::2]] == made[1::2]  # of one length each


def says(*tokens: int) -> Any:
    """Decoding that gives these tokens for every prompt, and keeps what it was asked for."""

    def generate(
        prompts: list[np.ndarray], max_new_tokens: int, pad_to: int, ended: np.ndarray
    ) -> Iterator[np.ndarray]:
        asked.append((prompts, max_new_tokens, pad_to))
        for i, token in enumerate(tokens[:max_new_tokens]):
            steps.append(i)
            yield np.full(len(prompts), token)

    asked: list[Any] = []
    steps: list[int] = []
    generate.asked, generate.steps = asked, steps
    return generate


@pytest.mark.parametrize(
    ("until", "expected", "steps"),
    [
        ("lo", "hel", 5),
        (["o w", "ell"], "h", 4),
        (["l", "e"], "h", 2),  # whichever stands first
        (["", "zz"], "hello world", 12),  # end-of-text
        (None, "hello world", 12),
        (["h"], "", 1),
    ],
)
def test_stop_strings_and_end_of_text_end_a_text(harness: Harness, until: Any, expected: str, steps: int):
    generate = says(*ids("hello world"), EOT, *ids(" again"))
    fake = dataclasses.replace(harness, generate=generate, max_length=64)
    made = fake.generate_until([("x", {"until": until, "max_gen_toks": 40, "do_sample": False, "top_p": 0.9})])
    assert made == [expected] and len(generate.steps) == steps


def test_any_end_token_ends_a_text_and_the_first_token_does_not(harness: Harness):
    """Mixtral begins documents with one token and ends answers with another."""

    tokenizer = copy.copy(harness.tokenizer)
    tokenizer.stop_ids = (7, 9)
    generate = says(*ids("ab"), EOT, *ids("cd"), 9, *ids("ef"))
    fake = dataclasses.replace(harness, tokenizer=tokenizer, generate=generate, max_length=64)
    assert fake.generate_until([("x", {"max_gen_toks": 40})]) == ["abcd"] and len(generate.steps) == 6


def test_a_short_batch_is_filled_and_padded_to_few_lengths(harness: Harness):
    generate = says(*ids("abcdefgh"))
    fake = dataclasses.replace(harness, generate=generate, max_length=64, batch_size=4)
    texts = fake.generate_until([("x" * n, {"until": [], "max_tokens": 8}) for n in (3, 20, 9, 5, 40)])
    assert texts == ["abcdefgh"] * 5
    assert [(len(prompts), limit, pad) for prompts, limit, pad in generate.asked] == [(4, 8, 64), (4, 8, 8)]
    assert [len(p) for p in generate.asked[0][0]] == [40, 20, 9, 5] and generate.asked[1][0][3].tolist() == [EOT]
    # Rows that nobody asked for would take part in limits.
    dataclasses.replace(fake, fills=False).generate_until([("x", {"until": [], "max_tokens": 8})])
    assert len(generate.asked[-1][0]) == 1
    few = dataclasses.replace(fake, max_gen_toks=3)
    assert few.generate_until([("x", {})]) == ["abc"] and generate.asked[-1][1:] == (3, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_gen_toks": 12}, "max_gen_toks=12 leaves no room for a context in max_length=12"),
        ({}, "max_gen_toks=256 leaves no room"),
        ({"max_gen_toks": 0}, "max_gen_toks=0: must be at least 1"),
        ({"max_new_tokens": 4, "do_sample": True}, "only greedy decoding is there"),
        ({"max_new_tokens": 4, "temperature": 0.7}, "temperature=0.7: only greedy"),
        ({"max_new_tokens": 4, "num_beams": 4}, "generation argument num_beams=4 is not known here"),
        ({"max_new_tokens": 4, "until": [3]}, r"until=\[3\]: stop sequences must be strings"),
    ],
)
def test_what_cannot_be_generated_is_named(harness: Harness, arguments: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        harness.generate_until([("a", arguments)])


def test_answers_are_told_as_they_come(harness: Harness):
    told: list[Any] = []
    talking = dataclasses.replace(harness, generate=says(*ids("ab")), done=lambda *answer: told.append(answer))
    pairs, texts = [("a", "b"), ("ab", "c"), ("abcdefgh", "i")], [("twenty-one characters",), ("a",)]
    answers = talking.loglikelihood(pairs)
    assert sorted(told) == sorted(("loglikelihood", pair, answer) for pair, answer in zip(pairs, answers, strict=True))
    told.clear()
    totals = talking.loglikelihood_rolling(texts)
    assert sorted(told) == sorted(("loglikelihood_rolling", t, v) for t, v in zip(texts, totals, strict=True))
    told.clear()
    request = ("a", {"max_gen_toks": 2})
    assert talking.generate_until([request]) == ["ab"] and told == [("generate_until", request, "ab")]


# --- the command ------------------------------------------------------------------------------------------------------


def run(*arguments: str) -> int:
    return session.call(program.define_flags, program.command, arguments)


def test_the_command_names_what_is_wrong(
    workdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    good = {"checkpoint": str(workdir), "tasks": "arc_easy"}
    bad = {
        ("checkpoint", ""): "--checkpoint is missing",
        ("tasks", ""): "--tasks is missing",
        ("output", str(tmp_path / "no" / "x.json")): "there is no folder",
        ("include_path", str(tmp_path / "no")): "there is no such folder",
        ("batch_size", "0"): "batch_size=0",
        ("dtype", "float16"): "dtype=float16",
    }
    for (name, value), message in bad.items():
        assert run(*(f"--{k}={v}" for k, v in {**good, name: value}.items())) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and message in said, said
    monkeypatch.setattr(program.importlib.util, "find_spec", lambda name: None)
    assert run(*(f"--{k}={v}" for k, v in good.items())) == 2
    assert "pip install 'moejax[eval]'" in capsys.readouterr().err


def test_without_lm_eval_the_adapter_says_how_to_get_it(harness: Harness, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"pip install 'moejax\[eval\]'"):
        definitions.adapt(harness, "name")


def test_how_many_requests_were_cut_is_told(
    harness: Harness, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    fresh = dataclasses.replace(harness, generate=says(*ids("ab")))
    fresh.loglikelihood([(context, continuation) for context, continuation, _, _ in PAIRS.values()])
    assert fresh.truncated == sum(len(c + t) > LENGTH + 1 for c, t, _, _ in PAIRS.values() if c.isascii()) == 2
    fresh.loglikelihood_rolling([("x" * 40,)])
    assert fresh.truncated == 2  # windows lose nothing
    fresh.generate_until([("x" * n, {"max_gen_toks": 2}) for n in (3, LENGTH - 2, LENGTH - 1)])
    assert fresh.truncated == 3

    lm_eval, api, utils = (types.ModuleType(name) for name in ("lm_eval", "lm_eval.api.model", "lm_eval.utils"))
    api.LM = type("LM", (), {"cache_hook": types.SimpleNamespace(add_partial=lambda *args: None)})  # ty: ignore
    asked = [types.SimpleNamespace(args=("x" * 30, "y")), types.SimpleNamespace(args=("x", "y"))]

    def simple_evaluate(model: Any, **settings: Any) -> dict[str, Any]:
        answers = model.loglikelihood(asked)
        return {"results": {"scores": [value for value, _ in answers]}}

    lm_eval.__version__, lm_eval.simple_evaluate = "0", simple_evaluate  # ty: ignore
    utils.handle_non_serializable, utils.make_table = str, str  # ty: ignore
    for module in (lm_eval, api, utils, types.ModuleType("lm_eval.api")):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    manager = types.SimpleNamespace(match_tasks=lambda names: names)
    output, values = tmp_path / "out.json", flags.FlagValues()
    program.define_flags(values)
    values(["lm_eval", "--tasks=t", f"--output={output}"])
    program.evaluate(dataclasses.replace(harness), "name", manager, values)
    assert "note: 1 requests lost the left end of their context, to fit --max_length=12" in capsys.readouterr().err
    assert json.loads(output.read_text())["truncated"] == 1
    asked.pop(0)
    program.evaluate(dataclasses.replace(harness), "name", manager, values)
    assert "note:" not in capsys.readouterr().err and json.loads(output.read_text())["truncated"] == 0


# --- Hugging Face folders ---------------------------------------------------------------------------------------------


def test_a_folder_is_read_at_its_own_length(tmp_path: Path):
    """Not at the 512 tokens of a trace: a context of 600 counts as a whole, also once the weights were rewritten."""
    model = ModelConfig(
        vocab_size=320, num_layers=1, dim=8, tie_embeddings=False, scale_embeddings=False, compute_dtype="float32",
        attention=AttentionConfig(num_heads=1, num_kv_heads=1, head_dim=8, qk_norm=True, qk_norm_over="projection"),
        moe=MoEConfig(num_experts=2, expert_dim=8, router=RouterConfig(k=1, renormalise=False), losses=()),
        init_scale=3.0,
    )  # fmt: skip
    folder = tmp_path / "published"
    importers.write(build(model, seed=1), model, folder, family="olmoe", context=700)
    write_tokenizer(folder, byte_level(), generation_config={"eos_token_id": [0]})
    rng = np.random.default_rng(0)
    request = ("".join(rng.choice(list("abcdefgh "), 600)) + "a", "bc")
    made = {}
    for length in (None, 700, 512):
        opened, _ = program.open_harness(folder, max_length=length, batch_size=1)
        assert opened.max_length == (length or 700)
        made[length] = opened.loglikelihood([request])[0][0]
        assert opened.truncated == (length == 512)
    assert made[None] == made[700] and abs(made[None] - made[512]) > 1e-4

    source = derived.read(folder)
    derived.write(tmp_path / "rewritten", source, source.config, source.arrays, {"command": "test"})
    assert program.open_harness(tmp_path / "rewritten")[0].max_length == 700
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if k != "max_position_embeddings"}))
    with pytest.raises(ConfigError, match=r"has no max_position_embeddings.*--max_length=N"):
        program.open_harness(folder)


def test_short_requests_of_a_model_of_long_text_are_not_padded_to_its_length(harness: Harness):
    shapes = []

    def score(batch: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        shapes.append(batch["tokens"].shape)
        return np.zeros(shapes[-1]), np.zeros(shapes[-1], bool)

    wide = dataclasses.replace(harness, score=score, generate=says(*ids("ab")), max_length=131072, batch_size=2)
    wide.loglikelihood([("x" * 50, "y")])
    wide.loglikelihood([("x" * 50, "y"), ("x" * 5000, "y")])
    wide.loglikelihood([("x" * 131072, "y")])
    assert shapes == [(2, 2048), (2, 8192), (2, 131072)]
    wide.generate_until([("x" * 50, {"max_gen_toks": 2})])
    assert wide.generate.asked[-1][2] == 256  # ty: ignore[unresolved-attribute]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_longrope_takes_the_factors_that_a_request_has_alone(batch_size: int, monkeypatch: pytest.MonkeyPatch):
    """They are chosen by the width of the batch: requests of up to original_length tokens stay in rows of that."""
    rope = RopeConfig(
        scaling="longrope", original_length=20, short_factor=(1.0,) * 4, long_factor=(1.0, 2.0, 4.0, 6.0),
        long_mscale=1.2,
    )  # fmt: skip
    attention = AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=8, rope=rope)
    moe = MoEConfig(num_experts=2, expert_dim=8, router=RouterConfig(k=1))
    config = ModelConfig(
        vocab_size=320, num_layers=1, dim=16, compute_dtype="float32", init_scale=3.0, attention=attention, moe=moe
    )
    model = build(config, 1)
    short = [("a cat", " sat"), ("a", " b"), ("x" * 16, "more")]
    long = [("x" * 17, "more"), ("x" * 50, " text")]
    opened = model, ExperimentConfig(name="long", model=config), {"step": 1, "data": {"tokenizer": TOKENIZER.hash}}
    monkeypatch.setattr(program, "open_weights", lambda *args, **settings: opened)
    made = program.open_harness("runs/long", max_length=64, batch_size=batch_size)[0].loglikelihood(short + long)
    for (context, continuation), (value, _) in zip(short + long, made, strict=True):
        tokens = np.array([ids(context + continuation)])
        logits = np.asarray(model(tokens[:, :-1], limits=()).logits[0], np.float64)
        logprob = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        expected = sum(logprob[i - 1, tokens[0, i]] for i in range(len(context), tokens.shape[1]))
        assert value == pytest.approx(expected, abs=1e-4), (context, continuation)


TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
{rest}
"""
KINDS = {
    "choice": """output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_target: "{{gold}}"
doc_to_choice: "{{choices}}"
metric_list:
  - metric: acc""",
    "text": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{context}}"
metric_list:
  - metric: bits_per_byte""",
    "made": """output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: "{{made}}"
generation_kwargs:
  until: ["~~"]
  max_gen_toks: 4
metric_list:
  - metric: exact_match""",
}


def test_lm_eval_itself(workdir: Path, model: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Where the extra is installed: its own definitions, and a run of one task of each kind by the command."""
    pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class Template(TemplateLM):
        eot_token_id = EOT
        _loglikelihood_tokens = loglikelihood_rolling = generate_until = None

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **more: Any) -> list[int]:
            return tokenizer.encode(string).tolist()

    harness, name = program.open_harness(workdir, batch_size=2)
    for tokenizer in (TOKENIZER, Pairs()):
        mine = dataclasses.replace(harness, tokenizer=tokenizer)
        for pair in (("ab", " cd"), ("ab \n", "cd"), ("xa", "bc"), ("x ", "abc")):
            assert mine.encode_pair(*pair) == Template()._encode_pair(*pair)
    for size in range(30):
        theirs = map(make_disjoint_window, get_rolling_token_windows(list(range(size)), EOT, LENGTH, 1))
        assert list(definitions.rolling_windows(list(range(size)), EOT, LENGTH)) == list(theirs)

    lm = definitions.adapt(harness, name)
    kinds = {
        "loglikelihood": [("ab", "c")],
        "loglikelihood_rolling": [("abc",)],
        "generate_until": [("a", {"max_gen_toks": 3})],
    }
    for kind, requests in kinds.items():
        made = getattr(lm, kind)([Instance(kind, {}, args, i) for i, args in enumerate(requests)])
        assert made == getattr(harness, kind)(requests)

    contexts = ["a", "bc", "def "]
    choices = [[" x", " yz"], [" a", " bcd"], ["q", "r"]]
    made = [TOKENIZER.decode(by_steps(model, ids(c), 4)) for c in contexts]
    docs = [
        {"context": c, "choices": o, "gold": 0, "made": text if i else "other"}
        for i, (c, o, text) in enumerate(zip(contexts, choices, made, strict=True))
    ]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    for kind, rest in KINDS.items():
        (tmp_path / f"{kind}.yaml").write_text(TASK.format(name=f"my_{kind}", file=tmp_path / "docs.jsonl", rest=rest))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    output = tmp_path / "out.json"
    tasks = ",".join(f"my_{kind}" for kind in KINDS)
    assert run(f"--checkpoint={workdir}", f"--tasks={tasks}", f"--include_path={tmp_path}", f"--output={output}") == 0
    table = json.loads(output.read_text())
    results = table["results"]
    assert table["truncated"] == 0

    best = []
    for context, options in zip(contexts, choices, strict=True):
        stripped = context.rstrip()
        scores = [by_hand(model, ids(stripped), ids(context[len(stripped) :] + option))[0] for option in options]
        best.append(int(np.argmax(scores)))
    assert results["my_choice"]["acc,none"] == pytest.approx(np.mean(np.array(best) == 0))
    nll = -sum(by_hand(model, [EOT], ids(c))[0] for c in contexts)
    bits = nll / np.log(2) / sum(map(len, contexts))
    assert results["my_text"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-5)
    assert results["my_made"]["exact_match,none"] == pytest.approx(2 / 3)
    assert run(f"--checkpoint={workdir}", "--tasks=no_such_task") == 2
