"""Imports golden models and holds their logits against those that transformers computed: one results row for each.

    python -m experiments.parity --bundle=tests/golden --output=rows.jsonl [--only=mixtral]

A bundle is a folder of files that ``scripts/make_golden.py`` wrote; torch and transformers are not needed. Each model
is loaded from every config.json and every layout of weights that its file holds, computes the file's tokens at once,
and again through the cache. Errors are shares of the largest logit, in float32. The exit code is 1 if one is not under
the bound, or if a file of the bundle is damaged; the others are measured all the same.
"""

import dataclasses
import hashlib
import io
import json
import lzma
import math
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments import session
from moejax import importers
from moejax.config import ConfigError
from moejax.model import Decoder, ModelOutput
from moejax.results import ResultRow, append_rows, environment_facts

PAPER, TABLE = "parity", "logits"
BOUND = 1e-4
"""Of the largest logit."""
WEIGHTS = ("model", "written", "fused")
"""Files of weights that a case may hold: the published layout, and those of transformers 5."""
BESIDE = ("tokenizer.json", "tokenizer_config.json", "requests.json")
BROKEN = (
    OSError, EOFError, KeyError, ValueError, NotImplementedError, zipfile.BadZipFile, zlib.error, lzma.LZMAError,
)  # fmt: skip
"""What reading a damaged file raises."""
CHUNK = 5
"""Tokens of a prompt that go through the cache together."""


@dataclasses.dataclass(frozen=True)
class Golden:
    """A model as transformers wrote it, and what it computed."""

    path: Path
    facts: dict[str, Any]
    """``case.json``: family, seed, versions of transformers."""
    tokens: np.ndarray
    """int32 ``[B, S]``"""
    logits: np.ndarray
    """float32 ``[B, S, V]``"""
    configs: dict[str, dict[str, Any]]
    """config.json by the major version of transformers that wrote it."""
    weights: tuple[str, ...]
    """Those of :data:`WEIGHTS` that are there, the published layout first."""

    @property
    def folders(self) -> list[tuple[str, str]]:
        """Version and weights of each folder that stands for the model: all configs, then all layouts."""
        return [(version, WEIGHTS[0]) for version in self.configs] + [(max(self.configs), w) for w in self.weights[1:]]


def read(path: Path) -> Golden:
    """The golden model of a file.

    Raises:
      ConfigError: it cannot be read, or lacks a part.
    """
    try:
        with zipfile.ZipFile(path) as file:
            if broken := file.testzip():
                raise zipfile.BadZipFile(f"{broken} has another checksum than the file says")
            members = set(file.namelist())
            with np.load(io.BytesIO(file.read("golden.npz"))) as arrays:
                tokens, logits = arrays["tokens"], arrays["logits"]
            case = Golden(
                path=path,
                facts=json.loads(file.read("case.json")),
                tokens=tokens,
                logits=logits,
                configs={v: json.loads(file.read(n)) for v in "45" if (n := f"config.{v}.json") in members},
                weights=tuple(weights for weights in WEIGHTS if f"{weights}.safetensors" in members),
            )
    except BROKEN as error:
        raise _damaged(path, error) from error
    if not case.configs or WEIGHTS[0] not in case.weights or not {"family", "versions"} <= case.facts.keys():
        raise _damaged(path, "its config, its weights or its family is missing")
    return case


def _damaged(path: Path, why: object) -> ConfigError:
    return ConfigError(f"{path} is damaged ({why}): fetch it again, or make it anew with scripts/make_golden.py")


def unpack(case: Golden, folder: Path, version: str = "", weights: str = WEIGHTS[0], **changes: Any) -> Path:
    """``folder`` as a Hugging Face folder of the case: config.json and model.safetensors.

    Args:
      version: of transformers, whose config.json it is; empty: the oldest there is.
      weights: one of :data:`WEIGHTS`.
      changes: to config.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {**case.configs[version or min(case.configs)], **changes}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with zipfile.ZipFile(case.path) as file:
        (folder / "model.safetensors").write_bytes(file.read(f"{weights}.safetensors"))
        for member in set(BESIDE) & set(file.namelist()):
            (folder / member).write_bytes(file.read(member))
    return folder


def error(logits: Any, reference: np.ndarray) -> float:
    """The largest difference, as a share of the reference's largest logit."""
    return float(np.abs(np.asarray(logits) - reference).max() / np.abs(reference).max())


@jax.jit
def run(model: Decoder, tokens: Any, mask: Any = None, cache: Any = None) -> ModelOutput:
    return model(tokens, mask=mask, cache=cache)


def through_cache(model: Decoder, tokens: np.ndarray) -> np.ndarray:
    """Logits ``[B, S, V]`` of tokens that pass through the cache: two chunks of a prompt, then one token at a time.

    One program: a single token is a chunk whose other places are padding.
    """
    batch, seq = tokens.shape
    chunks = min(2, seq // CHUNK)
    cache = jax.device_put(model.init_cache(batch, seq), jax.devices()[0])  # as it comes back: compiled once
    at, found = 0, []
    for size in [CHUNK] * chunks + [1] * (seq - chunks * CHUNK):
        chunk, mask = np.zeros((batch, CHUNK), np.int32), np.zeros((batch, CHUNK), bool)
        chunk[:, -size:], mask[:, -size:] = tokens[:, at : at + size], True
        out = run(model, chunk, mask, cache)
        cache = out.cache
        found.append(np.asarray(out.logits)[:, -size:])
        at += size
    return np.concatenate(found, axis=1)


def measure(case: Golden, scratch: Path) -> tuple[dict[str, float], float]:
    """Error of the logits for each folder of the case, and that of the cache against the whole sequence at once.

    Raises:
      ConfigError: a folder is not read.
    """
    errors, cached = {}, math.nan
    for version, weights in case.folders:
        model = importers.load(unpack(case, scratch / f"{version}-{weights}", version, weights), dtype="float32")
        logits = np.asarray(run(model, case.tokens).logits)
        errors[f"{weights}, transformers {version}"] = error(logits, case.logits)
        if len(errors) == 1:
            cached = error(through_cache(model, case.tokens), logits)
    return errors, cached


def row_of(case: Golden, errors: dict[str, float], cached: float, shared: dict[str, Any]) -> ResultRow:
    """The row of a model; an error that is no number is null."""
    family = str(case.facts["family"])
    known = {name: value if math.isfinite(value) else None for name, value in (*errors.items(), ("cache", cached))}
    worst = max(errors.values()) if None not in known.values() else None
    return ResultRow(
        **shared,
        row=case.path.stem,
        metric="logits_error",
        unit="share of the largest logit",
        value=worst,
        verdict_note="" if worst is not None else "a logit is not a finite number",
        checkpoint_hash=hash_of(case.path),
        batch_shape=case.tokens.shape,
        extra={
            "family": family, "variant": case.path.stem.removeprefix(f"{family}-"), "bound": BOUND,
            "cache_error": known.pop("cache"), "errors": known,
            "transformers": [case.facts["versions"][version] for version in case.configs],
        },
    )  # fmt: skip


def hash_of(path: Path) -> str:
    """12 hex digits of the file's SHA-256."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def hold(paths: list[Path], output: Path, say: Callable[[str], None]) -> int:
    """Measures each file and appends its row; 1 if a bound is missed or a file is damaged."""
    facts = environment_facts()
    shared: dict[str, Any] = {
        "kind": "value", "paper": PAPER, "table": TABLE, "command": session.command_line(),
        **{name: facts[name] for name in ("commit", "dirty", "device", "device_count", "versions")},
    }  # fmt: skip
    wrong = []
    for path in paths:
        with tempfile.TemporaryDirectory() as scratch:
            try:
                case = read(path)
                errors, cached = measure(case, Path(scratch))
            except ConfigError as problem:
                say(f"{path.stem}: {str(problem).replace(scratch, str(path))}")
                wrong.append(path.stem)
                continue
        append_rows(output, [row_of(case, errors, cached, shared)])
        worst, where = max((value if math.isfinite(value) else math.inf, name) for name, value in errors.items())
        told = f"{path.stem:28s} {worst:.1e} of the largest logit ({where}); through the cache {cached:.1e}"
        if not (worst < BOUND and cached < BOUND):
            wrong.append(path.stem)
            told += f"  NOT UNDER {BOUND:g}"
        say(told)
    if wrong:
        say(f"{len(wrong)} of {len(paths)} models are not as transformers computed them: {', '.join(wrong)}")
    return 1 if wrong else 0


def define_flags(values: flags.FlagValues, argv: list[str] | None = None) -> None:
    del argv
    flags.DEFINE_string("bundle", None, "Folder of golden models (scripts/make_golden.py).", flag_values=values)
    flags.DEFINE_string("output", None, "Results file (.jsonl) that rows are appended to.", flag_values=values)
    flags.DEFINE_string("only", "", "Models whose name contains this. Empty: all.", flag_values=values)


def command(values: flags.FlagValues) -> int:
    if not values.bundle or not values.output:
        raise ConfigError("--bundle and --output are needed: a folder of golden models, and the results file")
    session.check_output(values.output)
    paths = [path for path in sorted(Path(values.bundle).glob("*.zip")) if values.only in path.stem]
    if not paths:
        which = f" whose name contains {values.only!r}" if values.only else ""
        raise ConfigError(f"--bundle={values.bundle} holds no .zip file{which}: see scripts/make_golden.py")
    return hold(paths, Path(values.output), session.say)


if __name__ == "__main__":
    session.launch(define_flags, command)
