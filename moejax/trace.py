"""Traces: what each MoE layer decided for each token of a run, in one ``.npz`` (``docs/traces.md``).

A trace is written batch by batch: each array of each batch is a member of its own (``probs/000003``), so neither the
writer nor the reader holds more than one batch, and ``numpy.load`` opens the file as any other. What it knows about the
run stands in the member ``meta``, as JSON.

Letters: L MoE layers, G ranks (token shards), t tokens of one rank, E experts, R routing rows, K choices per row.
"""

import contextlib
import dataclasses
import json
import zipfile
import zlib
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np
from flax import nnx

from moejax.config import ConfigError, ExperimentConfig, RouterConfig, config_hash, from_mapping, to_dict
from moejax.data import Batch
from moejax.data.cache import replacing
from moejax.limits import describe as describe_limits
from moejax.model import Decoder, moe_layer_ids
from moejax.sharding import RouterState
from moejax.types import Limit, Routing, RoutingRecord

SCHEMA, VERSION = "moejax.trace", 1
TOKEN_ARRAYS = ("token_ids", "positions", "segments", "requests", "mask", "domain")
"""``[G, t]`` each; int32, but for ``mask`` (bool) and ``domain`` (int16)."""
PAIR_ARRAYS = ("expert", "weight", "score", "made", "valid")
"""``[L, G, R, K]`` each."""


@dataclasses.dataclass(frozen=True)
class Chunk:
    """One batch of a trace, as NumPy arrays. All leaves of the Routings lead with ``[L, G]``."""

    made: Routing
    """The router's pairs, before limits."""
    kept: Routing
    """The pairs after limits. Its first columns are those of ``made``; a limit that adds pairs appends columns."""
    tokens: dict[str, np.ndarray]
    """The arrays of :data:`TOKEN_ARRAYS`."""
    key: np.ndarray | None
    """``[L, G, n]`` uint32: data of the key that each layer drew from on each rank."""


# --- recording ------------------------------------------------------------------------------------


def record_fn(graphdef: nnx.GraphDef, mesh: jax.sharding.Mesh) -> Callable[..., RoutingRecord]:
    """A compiled ``(state, batch, limits, key) -> RoutingRecord`` with a leading axis of MoE layers.

    Routing only: what the last layer computes from it, and the logits, are dead code. Limits are arguments, as in
    evaluation; None takes the config's.
    """

    @jax.jit
    def run(state: nnx.State, batch: dict, limits: tuple[Limit, ...] | None, key: jax.Array) -> Any:
        out = nnx.merge(graphdef, state)(
            batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"], mask=batch["mask"],
            limits=limits, key=key, record=True,
        )  # fmt: skip
        return out.routing

    def record(state: nnx.State, batch: dict, limits: tuple[Limit, ...] | None, key: jax.Array) -> RoutingRecord:
        with jax.set_mesh(mesh):
            return run(state, batch, limits, key)

    return record


def chunk_of(record: RoutingRecord, batch: Batch, first_request: int = 0) -> Chunk:
    """The record of ``batch`` on the host, with the batch's tokens beside it.

    A request is what the model treats as one text: a document within a row. Requests are numbered from
    ``first_request`` in the order of rows and places, so that ids are unique over batches; padding is -1.
    """
    host = jax.device_get(record)
    ranks = host.made.expert.shape[1]
    mask = np.asarray(batch["mask"], bool)
    segments = np.asarray(batch["segment_ids"], np.int32)
    place = np.arange(len(mask))[:, None] * (int(segments.max(initial=0)) + 1) + segments
    requests = np.full(mask.shape, -1, np.int32)
    requests[mask] = first_request + np.unique(place[mask], return_inverse=True)[1]
    domain = np.broadcast_to(np.asarray(batch["domain"], np.int16)[:, None], mask.shape)
    arrays = (batch["tokens"], batch["positions"], segments, requests, mask, domain)
    tokens = {name: np.asarray(array).reshape(ranks, -1) for name, array in zip(TOKEN_ARRAYS, arrays, strict=True)}
    return Chunk(made=host.made, kept=host.kept, tokens=tokens, key=host.key)


def router_state(model: Decoder) -> dict[str, np.ndarray]:
    """What routers remember beside their weights (a selection bias), ``[L, ...]`` by name."""
    parts: dict[str, list[np.ndarray]] = {}
    for group in model.groups:
        routers = [block.moe.router.arrays for block in group.blocks if block.moe is not None]
        for name in [n for n, v in routers[0].items() if isinstance(v, RouterState)] if routers else []:
            stacked = np.stack([np.asarray(arrays[name][...]) for arrays in routers], axis=1)
            parts.setdefault(name, []).append(stacked.reshape(-1, *stacked.shape[2:]))
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def header(
    config: ExperimentConfig,
    limits: tuple[Limit, ...],
    *,
    ranks: int,
    batch_shape: tuple[int, int],
    dtype: str = "float32",
    logits: bool = True,
    **facts: Any,
) -> dict[str, Any]:
    """The ``meta`` of a trace of ``config``'s model with ``limits`` in force; ``facts`` are added to it."""
    moe = config.model.moe
    return {
        "schema": SCHEMA, "version": VERSION, "config": to_dict(config), "config_hash": config_hash(config),
        "layers": moe_layer_ids(config.model), "num_experts": moe.num_experts, "zero_experts": moe.zero_experts,
        "router": to_dict(moe.router), "limits": describe_limits(limits), "ranks": ranks, "dtype": dtype,
        "batch_shape": list(batch_shape), "logits": logits, "key_impl": str(jax.config.jax_default_prng_impl), **facts,
    }  # fmt: skip


# --- writing --------------------------------------------------------------------------------------


class TraceWriter:
    """Appends batches to a trace. Made by :func:`writing`."""

    def __init__(
        self, path: Path, file: IO[bytes], meta: dict[str, Any], state: dict[str, np.ndarray], max_bytes: int
    ) -> None:
        self.path, self.meta, self.max_bytes = path, dict(meta), max_bytes
        self.chunks = self.tokens = 0
        self.ended = "all"
        """Why nothing follows the last batch: "all" was recorded, "max_bytes", or "interrupted"."""
        self._file = file
        self._zip = zipfile.ZipFile(file, "w", allowZip64=True)
        self._members = 0
        for name, array in state.items():
            self._put(f"router_state/{name}", array)

    def add(self, chunk: Chunk) -> bool:
        """Appends a batch; False, and nothing written, where the file could then grow beyond ``max_bytes``.

        Raises:
          ConfigError: not even the first batch fits, or a limit changed pairs of the router other than by dropping.
        """
        arrays = self._arrays(chunk)
        if self.max_bytes and (size := self._size_with(arrays)) > self.max_bytes:
            if not self.chunks:
                raise ConfigError(
                    f"max_bytes={self.max_bytes:,} is less than one batch takes, {size:,} bytes: raise it, lower "
                    "the batch size, or record less (no logits, float16)"
                )
            self.ended = "max_bytes"
            return False
        with _unwritable(self.path):
            for name, array in arrays.items():
                self._put(f"{name}/{self.chunks:06d}", array)
        self.chunks += 1
        self.tokens += int(chunk.tokens["mask"].sum())
        return True

    def close(self) -> None:
        if not self.chunks:
            raise ConfigError("a trace without a batch is not written: there was nothing to record")
        self._put("meta", np.array(json.dumps(self._closing(), sort_keys=True)))
        self._zip.close()

    def abandon(self) -> None:
        """Lets go of a file that is about to be removed."""
        with contextlib.suppress(Exception):
            self._zip.close()

    def _closing(self) -> dict[str, Any]:
        return self.meta | {"chunks": self.chunks, "tokens": self.tokens, "ended": self.ended}

    def _arrays(self, chunk: Chunk) -> dict[str, np.ndarray]:
        made, kept = chunk.made, chunk.kept
        width = made.expert.shape[-1]
        if self.meta.setdefault("choices", width) != width:
            raise ValueError(f"batches of one trace differ in choices per row: {self.meta['choices']} and {width}")
        same = made.expert.shape[:-1] == kept.expert.shape[:-1] and all(
            np.array_equal(getattr(made, name), getattr(kept, name)[..., :width], equal_nan=True)
            for name in ("expert", "weight", "score")
        )
        if not same:
            raise ConfigError(
                f"limits={self.meta['limits']}: one of them rewrote pairs of the router in place; a trace of version "
                f"{VERSION} holds limits that clear pairs or append columns"
            )
        before = np.zeros(kept.valid.shape, bool)
        before[..., :width] = made.valid
        arrays: dict[str, Any] = {
            "expert": kept.expert.astype(np.int16 if made.probs.shape[-1] < 1 << 15 else np.int32),
            "weight": kept.weight, "score": kept.score, "made": before, "valid": kept.valid,
            "probs": made.probs.astype(self.meta["dtype"]), **chunk.tokens,
        }  # fmt: skip
        if self.meta["logits"]:
            arrays["logits"] = made.logits.astype(self.meta["dtype"])
        if made.token is not None:
            arrays["token"] = made.token
        if kept.level is not None:
            arrays["level"] = kept.level.astype(np.int8)
        if chunk.key is not None:
            arrays["key"] = chunk.key
        return arrays

    def _size_with(self, arrays: dict[str, np.ndarray]) -> int:
        """Bytes of the finished file with ``arrays`` in it, at most: compression can only make it less."""
        member = 512  # headers of the member and of its array, and its line in the list at the end
        members = (self._members + len(arrays) + 1) * member
        end = 4 * len(json.dumps(self._closing())) + 4096
        return self._file.tell() + sum(a.nbytes + a.nbytes // 512 for a in arrays.values()) + members + end

    def _put(self, name: str, array: np.ndarray) -> None:
        # Whole numbers and flags shrink to a fraction; floats hardly do and cost time. No date: same run, same bytes.
        info = zipfile.ZipInfo(f"{name}.npy")
        info.compress_type = zipfile.ZIP_STORED if array.dtype.kind == "f" else zipfile.ZIP_DEFLATED
        with self._zip.open(info, "w", force_zip64=True) as member:
            np.lib.format.write_array(member, np.ascontiguousarray(array).reshape(array.shape), allow_pickle=False)
        self._members += 1


@contextlib.contextmanager
def writing(
    path: str | Path, meta: dict[str, Any], state: dict[str, np.ndarray] | None = None, *, max_bytes: int = 0
) -> Generator[TraceWriter]:
    """A :class:`TraceWriter` whose file takes the place of ``path`` when the block ends, and vanishes if it raises.

    Args:
      path: file to write.
      meta: from :func:`header`.
      state: from :func:`router_state`.
      max_bytes: size of the file, at most. 0: no bound.

    Raises:
      ConfigError: no batch was added, or the file cannot be written.
    """
    path = Path(path)
    with contextlib.ExitStack() as stack:
        with _unwritable(path):
            writer = TraceWriter(path, stack.enter_context(replacing(path)), meta, state or {}, max_bytes)
        stack.callback(writer.abandon)
        yield writer
        with _unwritable(path):
            writer.close()
            stack.close()


@contextlib.contextmanager
def _unwritable(path: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written ({error.strerror or error}): nothing was left behind; free some space or choose "
            "another place"
        ) from error


# --- reading --------------------------------------------------------------------------------------


class Trace:
    """An open trace: ``meta``, and its batches one at a time, as often as wanted. Made by :func:`read`."""

    def __init__(self, path: Path, archive: Any) -> None:
        self.path, self._archive = path, archive
        self._names = names = set(archive.files)
        if "meta" not in names:
            raise ConfigError(f"{path} is an archive of arrays, but no trace: it has no member 'meta' ({_SOURCE})")
        self.meta: dict[str, Any] = json.loads(str(archive["meta"]))
        if self.meta.get("schema") != SCHEMA:
            raise ConfigError(f"{path} is no trace: its schema is {self.meta.get('schema')!r}, not {SCHEMA!r}")
        if self.meta.get("version") != VERSION:
            raise ConfigError(
                f"{path} is a trace of version {self.meta.get('version')}; this program reads version {VERSION}: "
                "record it again, or read it with the program that wrote it"
            )
        needed = [*PAIR_ARRAYS, "probs", *TOKEN_ARRAYS, *(["logits"] if self.meta["logits"] else [])]
        missing = [f"{n}/{i:06d}" for i in range(len(self)) for n in needed if f"{n}/{i:06d}" not in names]
        if missing:
            raise ConfigError(f"{path} lacks {len(missing)} of its members, e.g. {missing[:3]}: copy it again")
        self.state: dict[str, np.ndarray] = {
            name.removeprefix("router_state/"): archive[name] for name in names if name.startswith("router_state/")
        }

    def __len__(self) -> int:
        """Batches."""
        return self.meta["chunks"]

    @property
    def layers(self) -> list[int]:
        """Indices of the MoE layers in the model."""
        return self.meta["layers"]

    @property
    def num_experts(self) -> int:
        """Those that compute; the ids behind them are of ``meta["zero_experts"]`` zero-computation experts."""
        return self.meta["num_experts"]

    @property
    def ranks(self) -> int:
        """Token shards: each limited its own tokens."""
        return self.meta["ranks"]

    @property
    def router(self) -> RouterConfig:
        """Of the run."""
        return from_mapping(RouterConfig, self.meta["router"], f"{self.path}: router")

    @property
    def config(self) -> ExperimentConfig:
        """Of the run, with the limits that were in force."""
        return from_mapping(ExperimentConfig, self.meta["config"], f"{self.path}: config")

    def __iter__(self) -> Iterator[Chunk]:
        for index in range(len(self)):
            yield self.chunk(index)

    def chunk(self, index: int) -> Chunk:
        """Batch ``index``.

        Raises:
          ConfigError: the file is damaged there.
        """
        with _reading(self.path):
            return self._chunk(index)

    def _chunk(self, index: int) -> Chunk:
        def get(name: str) -> Any:
            return self._archive[f"{name}/{index:06d}"]

        def optional(name: str) -> Any:
            return get(name) if f"{name}/{index:06d}" in self._names else None

        probs = get("probs").astype(np.float32)
        logits = get("logits").astype(np.float32) if self.meta["logits"] else np.full_like(probs, np.nan)
        whole: dict[str, Any] = {name: get(name) for name in ("weight", "score")}
        whole["expert"] = get("expert").astype(np.int32)
        first = {name: array[..., : self.meta["choices"]] for name, array in whole.items()}
        both: dict[str, Any] = {"probs": probs, "logits": logits, "token": optional("token")}
        both["zero_experts"] = self.meta.get("zero_experts", 0)
        made = Routing(**first, **both, valid=get("made")[..., : self.meta["choices"]])
        kept = Routing(**whole, **both, valid=get("valid"), level=optional("level"))
        return Chunk(made, kept, {name: get(name) for name in TOKEN_ARRAYS}, optional("key"))


_SOURCE = "python -m experiments.trace records one"


@contextlib.contextmanager
def read(path: str | Path) -> Generator[Trace]:
    """Opens a trace.

    Raises:
      ConfigError: no such file, not a trace, one of another version, or cut short or damaged.
    """
    path = Path(path)
    with _reading(path):
        archive = np.load(path, allow_pickle=False)
        if isinstance(archive, np.ndarray):
            raise ConfigError(f"{path} holds one array: it is no trace ({_SOURCE})")
    with archive:
        with _reading(path):
            trace = Trace(path, archive)
        yield trace


@contextlib.contextmanager
def _reading(path: Path) -> Generator[None]:
    """NumPy and zipfile raise errors of many kinds for a damaged file; all become one that names it."""
    try:
        yield
    except ConfigError:
        raise
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: there is no such file ({_SOURCE})") from error
    except (OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise ConfigError(
            f"{path} cannot be read as a trace: it is cut short, damaged, or of another kind ({type(error).__name__}: "
            f"{str(error)[:120]}). Copy it again; {_SOURCE}"
        ) from error
