"""``experiments.logits`` and ``experiments.generate`` on a checkpoint of random parameters."""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import generate, logits, session
from moejax.checkpoint import Checkpoints, load_model
from moejax.config import ConfigError, DataConfig, ExperimentConfig, MeshConfig, from_mapping, to_dict
from moejax.data import load_corpus, load_tokenizer
from moejax.limits import expanded_drop
from moejax.model import Decoder
from moejax.pretrained import _with_config, open_model
from moejax.sharding import make_mesh
from moejax.train import Trainer
from tests.small import quick_compilation, small_config, small_model, start, write_texts

VOCAB = 320
TOKENS = np.random.default_rng(0).integers(0, 257, (3, 10), dtype=np.int32)


@pytest.fixture(scope="module", autouse=True)
def quickly() -> Iterator[None]:
    with quick_compilation():
        yield


def save(folder: Path, config: ExperimentConfig, **data: str) -> None:
    made = Trainer(config, np.ones(config.model.vocab_size), make_mesh(MeshConfig(), jax.devices()[:1]))
    checkpoints = Checkpoints(folder / "checkpoints")
    checkpoints.save(7, start(made), {"step": 7, "config": to_dict(config), "data": data}, score=1.0)
    checkpoints.close()


@pytest.fixture(scope="module")
def config() -> ExperimentConfig:
    return small_config(dataclasses.replace(small_model(first_dense=0, every=1), num_layers=1, vocab_size=VOCAB))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory, config: ExperimentConfig) -> Path:
    folder = tmp_path_factory.mktemp("run")
    save(folder, config, tokenizer=load_tokenizer("byte").hash)
    np.save(folder / "tokens.npy", TOKENS)
    return folder


@pytest.fixture(scope="module")
def model(workdir: Path) -> Decoder:
    return load_model(workdir)[0]


@jax.jit
def forward(model: Decoder, tokens: jax.Array) -> jax.Array:
    return model(tokens).logits


def run_logits(*arguments: str) -> int:
    return session.call(logits.define_flags, logits.command, arguments)


def run_generate(*arguments: str) -> int:
    return session.call(generate.define_flags, generate.command, arguments)


# --- logits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["", "checkpoints", "checkpoints/7"])
def test_logits_are_the_models(workdir: Path, model: Decoder, tmp_path: Path, place: str):
    out = tmp_path / "logits.npy"
    assert run_logits(f"--checkpoint={workdir / place}", f"--tokens={workdir / 'tokens.npy'}", f"--output={out}") == 0
    made = np.load(out)
    assert made.shape == (3, 10, VOCAB) and made.dtype == np.float32
    np.testing.assert_allclose(made, forward(model, TOKENS), rtol=1e-5, atol=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["logits.npy"]


def test_rows_at_a_time_make_no_difference(model: Decoder):
    whole = logits.logits(model, TOKENS)
    np.testing.assert_allclose(
        logits.logits(model, TOKENS, 2), whole, rtol=1e-5, atol=1e-5
    )  # the last one is filled up
    wide = TOKENS.astype(np.int64)  # whole numbers of any width
    np.testing.assert_array_equal(logits.logits(model, wide), whole)


def test_dtype_is_that_of_the_computation(workdir: Path, model: Decoder, tmp_path: Path):
    out = tmp_path / "logits.npy"
    call = [f"--checkpoint={workdir}", f"--tokens={workdir / 'tokens.npy'}", f"--output={out}"]
    assert run_logits(*call, "--dtype=bfloat16") == 0
    made, exact = np.load(out), np.asarray(forward(model, TOKENS))
    assert made.dtype == np.float32
    error = np.linalg.norm(made - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < 3e-2


BAD_TOKENS = {
    "float": (np.zeros((2, 3), np.float32), "has dtype float32: token ids are int32"),
    "bool": (np.zeros((2, 3), bool), "has dtype bool"),
    "one row": (np.zeros(3, np.int32), r"has shape \(3,\): expected \[B, S\]"),
    "three axes": (np.zeros((1, 2, 3), np.int32), r"has shape \(1, 2, 3\)"),
    "empty": (np.zeros((0, 3), np.int32), r"has shape \(0, 3\)"),
    "too large": (np.array([[1, VOCAB], [2, 999]]), r"tokens\[0, 1\]=320 and 1 others lie outside .* 0\.\.319"),
    "negative": (np.array([[1, 2], [-1, 2]]), r"tokens\[1, 0\]=-1 and 0 others lie outside"),
    "objects": (np.array([[None]]), "cannot be read as one .npy array"),
}


@pytest.mark.parametrize("what", BAD_TOKENS)
def test_bad_tokens_are_one_sentence(workdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str):
    array, message = BAD_TOKENS[what]
    file, out = tmp_path / "tokens.npy", tmp_path / "logits.npy"
    np.save(file, array, allow_pickle=True)
    assert run_logits(f"--checkpoint={workdir}", f"--tokens={file}", f"--output={out}") == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and re.search(message, said)
    assert not out.exists()


def test_what_is_missing_is_named(workdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    good = {
        "checkpoint": str(workdir),
        "tokens": str(workdir / "tokens.npy"),
        "output": str(tmp_path / "out.npy"),
    }
    bad = {
        ("checkpoint", ""): "--checkpoint is missing",
        ("tokens", ""): "--tokens is missing",
        ("output", ""): "--output is missing",
        ("checkpoint", str(tmp_path)): "no finished checkpoint there",
        ("tokens", "absent.npy"): "--tokens=absent.npy cannot be read",
        ("output", str(tmp_path / "no" / "out.npy")): "there is no folder .*/no; make it first",
        ("dtype", "float16"): "dtype=float16",
        ("batch_size", "-1"): "batch_size=-1",
    }
    for (name, value), message in bad.items():
        assert run_logits(*(f"--{k}={v}" for k, v in {**good, name: value}.items())) == 2
        assert re.search(message, capsys.readouterr().err), name
    archive = tmp_path / "archive.npz"
    np.savez(archive, TOKENS)
    assert run_logits(*(f"--{k}={v}" for k, v in {**good, "tokens": str(archive)}.items())) == 2
    assert "archive of arrays" in capsys.readouterr().err


def test_a_failed_write_leaves_the_old_file(workdir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "logits.npy"
    out.write_bytes(b"old")

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(logits.np, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        run_logits(f"--checkpoint={workdir}", f"--tokens={workdir / 'tokens.npy'}", f"--output={out}")
    assert [path.name for path in tmp_path.iterdir()] == ["logits.npy"] and out.read_bytes() == b"old"


# --- generate -----------------------------------------------------------------------------------------------------


def test_greedy_text_is_the_argmax_of_the_whole_forward_pass(
    workdir: Path, model: Decoder, capsys: pytest.CaptureFixture[str]
):
    tokenizer = load_tokenizer("byte")
    ids = [tokenizer.eot_id, *tokenizer.encode("Hé")]
    prompt = len(ids)
    for _ in range(6):  # right padding does not change what stands before it
        padded = np.zeros((1, prompt + 6), np.int32)
        padded[0, : len(ids)] = ids
        ids.append(int(jnp.argmax(forward(model, padded)[0, len(ids) - 1, :257])))
        if ids[-1] == tokenizer.eot_id:
            break
    assert run_generate(f"--checkpoint={workdir}", "--prompt=Hé", "--max_new_tokens=6") == 0
    assert capsys.readouterr().out == "Hé" + tokenizer.decode(ids[prompt:]) + "\n"


def say_these(monkeypatch: pytest.MonkeyPatch, ids: list[int]) -> dict[str, Any]:
    """Replaces decoding by given tokens; returns what it was asked for."""
    asked: dict[str, Any] = {}

    def fake(model: Decoder, prompts: list[np.ndarray], max_new_tokens: int, **more: Any) -> Iterator[np.ndarray]:
        asked.update(more, prompts=prompts)
        yield from (np.array([token]) for token in ids[:max_new_tokens])

    monkeypatch.setattr(generate.decode, "generate", fake)
    return asked


def test_characters_are_printed_whole(model: Decoder, monkeypatch: pytest.MonkeyPatch):
    tokenizer = load_tokenizer("byte")
    asked = say_these(monkeypatch, list("a€é".encode()))
    assert list(generate.stream(model, tokenizer, "x", 10)) == ["a", "", "", "€", "", "é", ""]
    assert list(generate.stream(model, tokenizer, "x", 3)) == ["a", "", "", "\ufffd"]  # cut within a character
    assert asked["stop_id"] == (tokenizer.eot_id,)
    np.testing.assert_array_equal(asked["prompts"], [[tokenizer.eot_id, ord("x")]])


def test_broken_bytes_still_come_out(model: Decoder, monkeypatch: pytest.MonkeyPatch):
    say_these(monkeypatch, [0xE2, 0xE2, ord("a"), 0x80])
    pieces = list(generate.stream(model, load_tokenizer("byte"), "", 10))
    assert pieces == ["", "", "\ufffd\ufffda", "", "\ufffd"]


def test_a_character_that_was_shown_is_not_shown_again(model: Decoder, monkeypatch: pytest.MonkeyPatch):
    """Byte fallback decodes a run of bytes as a whole: until it is whole, its first characters are lost again."""

    class Run(type(load_tokenizer("byte"))):
        def _decode(self, ids: np.ndarray) -> str:
            data = bytes(ids[ids < 256].tolist())
            try:
                return data.decode()
            except UnicodeDecodeError:
                return "\ufffd" * len(data)

    say_these(monkeypatch, list("é中x".encode()))
    assert list(generate.stream(model, Run(), "", 10)) == ["", "é", "", "", "中", "x", ""]


def test_a_space_after_a_special_token_is_kept(model: Decoder, monkeypatch: pytest.MonkeyPatch):
    """Some decoders take a space off the beginning, and special tokens give no text that would stand before it."""

    class Strips(type(load_tokenizer("byte"))):
        def _decode(self, ids: np.ndarray) -> str:
            return bytes(ids[ids < 256].tolist()).decode().removeprefix(" ")

    tokenizer = Strips()
    say_these(monkeypatch, [ord("a"), tokenizer.eot_id, ord(" "), ord("b")])
    assert list(generate.stream(model, tokenizer, "x", 10)) == ["a", "", " ", "b", ""]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_padding_of_the_vocabulary_is_never_said(model: Decoder, monkeypatch: pytest.MonkeyPatch, temperature: float):
    asked = say_these(monkeypatch, [])
    list(generate.stream(model, load_tokenizer("byte"), "", 1, temperature=temperature))
    scores = jnp.zeros((1, VOCAB)).at[0, 300].set(1e9).at[0, 65].set(1e6)
    assert asked["sampler"](scores, jax.random.key(0)).tolist() == [65]


def test_draws_follow_the_seed(workdir: Path, capsys: pytest.CaptureFixture[str]):
    def say(*arguments: str) -> str:
        assert run_generate(f"--checkpoint={workdir}", "--prompt=a", "--max_new_tokens=12", *arguments) == 0
        return capsys.readouterr().out

    warm = ["--temperature=1.5", "--top_k=50"]
    assert say(*warm, "--seed=1") == say(*warm, "--seed=1") != say(*warm, "--seed=2")
    assert say("--temperature=2", "--top_k=1") == say()


def test_a_text_on_several_devices_is_that_of_one(workdir: Path, model: Decoder):
    """Every device has a row: what the others would draw neither changes a text nor keeps it from ending."""
    tokenizer = load_tokenizer("byte")
    tokenizer.stop_ids = tuple(range(0, 257, 9))

    def made(model: Decoder, seed: int) -> list[int]:
        ids: list[int] = []
        list(generate.stream(model, tokenizer, "a", 40, temperature=2.0, seed=seed, made=ids))
        return ids

    alone = [made(model, seed) for seed in range(4)]
    assert all(ids[-1] in tokenizer.stop_ids and len(ids) < 40 for ids in alone)
    mesh = make_mesh(MeshConfig(data=2), jax.devices()[:2])
    with jax.set_mesh(mesh):
        spread = open_model(workdir, mesh=mesh)[0]
        assert [made(spread, seed) for seed in range(4)] == alone


def test_a_limited_text_on_virtual_ranks_is_that_of_real_ones(
    workdir: Path, model: Decoder, monkeypatch: pytest.MonkeyPatch
):
    """On each rank a row of the text, in its prompt of three tokens and in its steps of one."""
    # What is likeliest may stay so whatever the experts add.
    monkeypatch.setattr(generate.decode, "greedy", lambda logits, key: jnp.argsort(logits)[:, logits.shape[1] // 2])
    tokenizer, limits = load_tokenizer("byte"), (expanded_drop(1.0, rounding="at_least_one"),)

    def made(model: Decoder, steps: bool = True, **moe: Any) -> list[int]:
        ids: list[int] = []
        config = dataclasses.replace(model.config, moe=dataclasses.replace(model.config.moe, **moe))
        built = _with_config(model, config)
        list(generate.stream(built, tokenizer, "ab", 20, made=ids, limits=limits, limit_steps=steps))
        return ids

    mesh = make_mesh(MeshConfig(data=1, expert=2), jax.devices()[:2])
    with jax.set_mesh(mesh):
        spread = open_model(workdir, mesh=mesh)[0]
        real = {steps: made(spread, steps, dispatcher="ep") for steps in (False, True)}
    for steps in (False, True):
        assert made(model, steps, virtual_ranks=2) == real[steps]
    assert made(model) != real[True]  # one rank, which hosts all experts


def test_a_text_beyond_what_the_model_was_made_for_is_pointed_out(
    workdir: Path, config: ExperimentConfig, capsys: pytest.CaptureFixture[str]
):
    room = config.data.seq_len - 2  # the token that begins a text, and the prompt
    for tokens, told in ((room, False), (room + 1, True)):
        assert run_generate(f"--checkpoint={workdir}", "--prompt=a", f"--max_new_tokens={tokens}") == 0
        said = capsys.readouterr().err
        assert f"{tokens} tokens, " in said
        assert (f"are {tokens + 2} tokens, and the model was made for {room + 2}" in said) == told


def test_the_speed_is_that_of_tokens_made_after_the_clock_began(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """A program makes eight tokens, and takes a second here: the first one's are there when the clock starts."""
    clock, extend, endless = [0.0], generate.decode.extend, generate.decode.generate

    def slow(*args):
        clock[0] += 1
        return extend(*args)

    monkeypatch.setattr(generate.decode, "extend", slow)
    monkeypatch.setattr(generate.decode, "generate", lambda *args, **more: endless(*args, **more | {"stop_id": None}))
    monkeypatch.setattr(generate.time, "monotonic", lambda: clock[0])
    for tokens, told in ((8, "8 tokens, too few to time"), (9, "9 tokens, too few to time"),
                         (41, "41 tokens, 8.0 tokens/s after the first 9")):  # fmt: skip
        assert run_generate(f"--checkpoint={workdir}", "--prompt=a", f"--max_new_tokens={tokens}") == 0
        assert told in capsys.readouterr().err


def test_generate_names_what_is_wrong(workdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    bad = {
        "--checkpoint is missing": ["--prompt=a"],
        "--prompt is missing": [f"--checkpoint={workdir}"],
        "no finished checkpoint there": [f"--checkpoint={tmp_path}", "--prompt=a"],
        "top_k=5 draws at random": [f"--checkpoint={workdir}", "--prompt=a", "--top_k=5"],
        "temperature=-1": [f"--checkpoint={workdir}", "--prompt=a", "--temperature=-1"],
        "temperature=nan": [f"--checkpoint={workdir}", "--prompt=a", "--temperature=nan"],
        "seed=-1": [f"--checkpoint={workdir}", "--prompt=a", "--temperature=1", "--seed=-1"],
        "no UTF-8 text, at character 1": [f"--checkpoint={workdir}", "--prompt=a\udcff"],
    }
    for message, arguments in bad.items():
        assert run_generate(*arguments) == 2
        said = capsys.readouterr()
        assert message in said.err and said.err.startswith("error: ") and said.out == ""


def test_tokenizers_are_made_again_and_checked(tmp_path: Path):
    write_texts(tmp_path)
    domains = {name: {"train": f"train/{name}.txt", "valid": f"valid/{name}.txt"} for name in ("a", "b")}
    data = from_mapping(
        DataConfig,
        {
            "source": "files",
            "root": str(tmp_path),
            "cache_dir": str(tmp_path / "cache"),
            "domains": domains,
            "tokenizer": "bpe-train:300",
        },
    )
    trained = load_corpus(data).tokenizer
    assert generate.tokenizer_of(data, {"tokenizer": trained.hash}).hash == trained.hash
    (tmp_path / "train" / "a.txt").write_text("quite another text about quilts and quinces " * 50)
    with pytest.raises(ConfigError, match=f"is .* now and was {trained.hash} when the model was trained"):
        generate.tokenizer_of(data, {"tokenizer": trained.hash})
    with pytest.raises(ConfigError, match="now and was None"):
        generate.tokenizer_of(DataConfig(), {})
