"""Traces: recording changes no number, a file says exactly what the layers decided, and a bad file is one error."""

import dataclasses
import functools
import io
import json
import re
import signal
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import session
from experiments import trace as command
from moejax import limits, moe, trace
from moejax.checkpoint import Checkpoints
from moejax.config import ConfigError, ExperimentConfig, MeshConfig, from_mapping, to_dict
from moejax.data import eval_batches, load_corpus, load_tokenizer
from moejax.sharding import make_mesh
from moejax.train import Trainer
from tests import moe_fakes as fakes
from tests.small import quick_compilation, small_config, small_model, start, write_texts
from tests.trace_fakes import LAYERS, SHAPE, batches, mesh_of, model_of, record

ROUTER = fakes.router_config()


@pytest.fixture(scope="module", autouse=True)
def quickly() -> Iterator[None]:
    with quick_compilation():
        yield


@pytest.fixture(scope="module")
def model():
    return model_of(ROUTER, capacity_factor=0.75)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, model) -> Path:
    path = tmp_path_factory.mktemp("trace") / "trace.npz"
    record(path, model)
    return path


# --- recording ----------------------------------------------------------------------------------------------------


def lowered(model, **settings: Any) -> str:
    run = jax.jit(lambda model, tokens: jax.tree.leaves(model(tokens, **settings)))
    return run.lower(model, jnp.zeros(SHAPE, jnp.int32)).as_text()


def test_the_program_is_unchanged_when_off(model, monkeypatch: pytest.MonkeyPatch):
    off = lowered(model, record=False)

    def never(*args: Any) -> None:
        raise AssertionError("a record was made")

    monkeypatch.setattr(moe, "RoutingRecord", never)
    assert lowered(model) == off
    with pytest.raises(AssertionError, match="a record was made"):
        lowered(model, record=True)


@pytest.mark.parametrize(("loop", "remat", "devices"), [("unroll", "block", 1), ("scan", "none", 8)])
def test_recording_changes_no_number(loop: str, remat: str, devices: int):
    made = model_of(ROUTER, capacity_factor=0.75, layer_loop=loop, remat=remat)
    batch = batches(1)[0]

    @functools.partial(jax.jit, static_argnums=1)
    def run(made, on: bool):
        return made(batch["tokens"], mask=batch["mask"], key=jax.random.key(0), record=on)

    with jax.set_mesh(mesh_of(devices)):
        off, on = run(made, False), run(made, True)
    assert off.routing is None
    fakes.assert_same((off.logits, off.metrics), (on.logits, on.metrics))
    kept = on.routing.kept
    assert kept.expert.shape == (LAYERS, devices, batch["mask"].size // devices, ROUTER.k)
    # each layer in its place: what is recorded adds up to what that layer said
    for layer in range(LAYERS):
        for table, sums in ((on.routing.made, on.metrics.routed), (kept, on.metrics.computed)):
            chosen = np.asarray(table.expert[layer])[np.asarray(table.valid[layer])]
            np.testing.assert_array_equal(np.bincount(chosen, minlength=4), sums[layer])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loop", "remat", "devices"), [("scan", "block", 8), ("scan", "dots", 1), ("unroll", "dots", 1)]
)
def test_recording_changes_no_gradient(loop: str, remat: str, devices: int):
    made = model_of(fakes.router_config("noisy_topk"), capacity_factor=0.75, layer_loop=loop, remat=remat)
    batch = batches(1)[0]

    @functools.partial(jax.jit, static_argnums=1)
    def run(made, on: bool) -> tuple:
        def loss(made) -> tuple:
            out = made(batch["tokens"], mask=batch["mask"], key=jax.random.key(0), train=True, record=on)
            return jnp.sum(out.logits**2), out.routing

        return jax.grad(loss, has_aux=True)(made)

    with jax.set_mesh(mesh_of(devices)):
        (off, nothing), (on, routing) = run(made, False), run(made, True)
    fakes.assert_close(off, on, rtol=1e-4, atol=1e-3)  # another program: XLA fuses the backward pass anew
    assert nothing is None and routing.made.load_prob is not None


# --- the file -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [n if n == "sigmoid_bias" else pytest.param(n, marks=pytest.mark.slow) for n in fakes.FAMILIES]
)
def test_a_file_gives_back_what_was_recorded(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[trace.Chunk] = []
    add = trace.TraceWriter.add
    monkeypatch.setattr(trace.TraceWriter, "add", lambda self, chunk: seen.append(chunk) or add(self, chunk))
    made = model_of(fakes.router_config(name), capacity_factor=0.75, capacity_order="random")
    record(tmp_path / "t.npz", made)
    with trace.read(tmp_path / "t.npz") as read:
        assert len(read) == 2 and read.layers == [0, 1] and read.ranks == 1 and read.num_experts == 4
        assert read.router == made.config.moe.router and read.config.model == made.config
        assert read.meta["limits"] == [{"name": "TokenDrop", "factor": 0.75, "order": "random"}]
        assert read.meta["tokens"] == sum(int(batch["mask"].sum()) for batch in batches())
        assert set(read.state) == ({"bias"} if name in ("sigmoid_bias", "softmax_bias") else set())
        if read.state:
            bias = made.groups[0].blocks[0].moe.router.arrays["bias"][...]
            np.testing.assert_array_equal(read.state["bias"], bias)
        for chunk, batch, original in zip(read, batches(), seen, strict=True):
            fakes.assert_same((chunk.made, chunk.kept, chunk.key), (original.made, original.kept, original.key))
            fakes.assert_same(chunk.tokens, original.tokens)
            np.testing.assert_array_equal(chunk.tokens["token_ids"].reshape(SHAPE), batch["tokens"])
            np.testing.assert_array_equal(chunk.tokens["mask"].reshape(SHAPE), batch["mask"])
            assert (chunk.tokens["domain"].reshape(SHAPE) == batch["domain"][:, None]).all()


def test_numpy_reads_it_without_us(file: Path):
    archive = np.load(file, allow_pickle=False)
    meta = json.loads(str(archive["meta"]))
    assert (meta["schema"], meta["version"], meta["chunks"], meta["ended"]) == ("moejax.trace", 1, 2, "all")
    tokens = SHAPE[0] * SHAPE[1]
    for name, shape in {
        "probs": (LAYERS, 1, tokens, 4), "logits": (LAYERS, 1, tokens, 4), "expert": (LAYERS, 1, tokens, 2),
        "weight": (LAYERS, 1, tokens, 2), "made": (LAYERS, 1, tokens, 2), "requests": (1, tokens),
    }.items():  # fmt: skip
        assert archive[f"{name}/000001"].shape == shape, name


def test_requests_are_unique_over_batches_and_rows(file: Path):
    with trace.read(file) as read:
        first, second = (chunk.tokens for chunk in read)
    whole = np.concatenate([first["requests"], second["requests"]], axis=None)
    padding = ~np.concatenate([first["mask"], second["mask"]], axis=None)
    assert (whole[padding] == -1).all()
    # two documents in each row that has a token: 8 rows, then 3
    np.testing.assert_array_equal(np.unique(whole[~padding]), np.arange(22))
    rows = first["requests"].reshape(SHAPE)
    assert rows[0, 0] != rows[0, -1] != rows[1, 0]


def copy(file: Path, out: Path, **changes: Any) -> None:
    meta, chunks = chunks_of(file)
    with trace.writing(out, meta | changes) as writer:
        assert all(writer.add(chunk) for chunk in chunks)


def test_the_same_decisions_give_the_same_bytes(file: Path, tmp_path: Path):
    copy(file, tmp_path / "again.npz")
    assert (tmp_path / "again.npz").read_bytes() == file.read_bytes()


def test_less_can_be_kept(file: Path, tmp_path: Path):
    copy(file, tmp_path / "small.npz", dtype="float16", logits=False)
    assert (tmp_path / "small.npz").stat().st_size < 0.75 * file.stat().st_size
    with trace.read(file) as whole, trace.read(tmp_path / "small.npz") as small:
        for a, b in zip(whole, small, strict=True):
            fakes.assert_same((a.kept.valid, a.kept.score), (b.kept.valid, b.kept.score))
            np.testing.assert_allclose(b.made.probs, a.made.probs, rtol=1e-3, atol=1e-4)
            assert np.isnan(b.made.logits).all()


def chunks_of(file: Path) -> tuple[dict[str, Any], list[trace.Chunk]]:
    with trace.read(file) as read:
        keep = {k: v for k, v in read.meta.items() if k not in ("chunks", "tokens", "ended")}
        return keep, list(read)


def test_max_bytes_is_a_bound(file: Path, tmp_path: Path):
    meta, (chunk, _) = chunks_of(file)
    out = tmp_path / "bounded.npz"
    for bound in (60_000, 150_000):
        with trace.writing(out, meta, max_bytes=bound) as writer:
            while writer.add(chunk):
                pass
        assert writer.ended == "max_bytes" and out.stat().st_size <= bound
        with trace.read(out) as read:
            assert len(read) == writer.chunks == len(list(read)) and read.meta["ended"] == "max_bytes"
    assert writer.chunks > 3
    with (
        pytest.raises(ConfigError, match=r"max_bytes=9,000 is less than one batch takes, [\d,]+ bytes: raise it"),
        trace.writing(out, meta, max_bytes=9000) as writer,
    ):
        writer.add(chunk)
    assert [path.name for path in tmp_path.iterdir()] == ["bounded.npz"] and out.stat().st_size > 60_000


def appended(chunk: trace.Chunk) -> trace.Chunk:
    """As after a limit that reroutes: a column more, valid where the first choice was dropped."""

    def wider(leaf: np.ndarray, column: np.ndarray) -> np.ndarray:
        return np.concatenate([leaf, column], axis=-1)

    kept = chunk.kept
    column = {name: getattr(kept, name)[..., :1] for name in ("weight", "score")}
    column |= {"expert": (kept.expert[..., :1] + 1) % 4, "valid": ~kept.valid[..., :1] & chunk.made.valid[..., :1]}
    changes: Any = {name: wider(getattr(kept, name), extra) for name, extra in column.items()}
    return dataclasses.replace(chunk, kept=dataclasses.replace(kept, **changes))


def test_pairs_that_a_limit_adds_are_kept_apart_from_the_routers(file: Path, tmp_path: Path):
    meta, chunks = chunks_of(file)
    wide = [appended(chunk) for chunk in chunks]
    with trace.writing(tmp_path / "wide.npz", meta) as writer:
        assert all(writer.add(chunk) for chunk in wide)
    _, back = chunks_of(tmp_path / "wide.npz")
    assert back[0].kept.expert.shape[-1] == 3 and back[0].made.expert.shape[-1] == 2
    for a, b in zip(wide, back, strict=True):
        fakes.assert_same((a.made, a.kept), (b.made, b.kept))


@pytest.mark.parametrize("field", ["expert", "weight", "score"])
def test_a_limit_that_rewrites_pairs_is_not_recorded_as_something_else(file: Path, tmp_path: Path, field: str):
    meta, (chunk, _) = chunks_of(file)
    changes: Any = {field: getattr(chunk.kept, field) + 1}
    changed = dataclasses.replace(chunk, kept=dataclasses.replace(chunk.kept, **changes))
    with (
        pytest.raises(ConfigError, match="rewrote pairs of the router in place"),
        trace.writing(tmp_path / "t.npz", meta) as writer,
    ):
        writer.add(changed)
    assert list(tmp_path.iterdir()) == []


def test_an_error_or_nothing_to_record_leaves_the_old_file(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    meta, (chunk, _) = chunks_of(file)
    out = tmp_path / "t.npz"
    out.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), trace.writing(out, meta) as writer:
        writer.add(chunk)
        raise KeyboardInterrupt
    with pytest.raises(ConfigError, match="without a batch"), trace.writing(out, meta):
        pass
    with pytest.raises(OSError, match="of the data"), trace.writing(out, meta) as writer:
        raise OSError("of the data")  # not taken for one of the trace
    with pytest.raises(ConfigError, match=r"no/t.npz cannot be written"), trace.writing(out / "no" / "t.npz", meta):
        pass

    def full(*args: Any, **more: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trace.np.lib.format, "write_array", full)
    with (
        pytest.raises(ConfigError, match=r"t.npz cannot be written \(No space left on device\)"),
        trace.writing(out, meta) as writer,
    ):
        writer.add(chunk)
    assert [path.name for path in tmp_path.iterdir()] == ["t.npz"] and out.read_bytes() == b"old"


def rewritten(file: Path, out: Path, change: Any) -> Path:
    """``file`` with each member's bytes as ``change(name, bytes)`` gives them; None leaves it out."""
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            data = change(name.removesuffix(".npy"), old.read(name))
            if data is not None:
                new.writestr(name, data)
    return out


def with_meta(**changes: Any) -> Any:
    def change(name: str, data: bytes) -> bytes:
        if name != "meta":
            return data
        meta = json.loads(str(np.load(io.BytesIO(data)))) | changes
        out = io.BytesIO()
        np.save(out, np.array(json.dumps(meta)))
        return out.getvalue()

    return change


def test_a_bad_file_is_one_sentence_that_names_it(file: Path, tmp_path: Path):
    whole = file.read_bytes()
    bad = tmp_path / "bad.npz"

    def refused(message: str) -> None:
        with pytest.raises(ConfigError, match=message) as caught, trace.read(bad) as read:
            list(read)
        assert str(bad) in str(caught.value) and "\n" not in str(caught.value)

    refused("there is no such file")
    for size in (0, 3, 100, len(whole) // 2, len(whole) - 1):
        bad.write_bytes(whole[:size])
        refused("cut short, damaged")
    flipped = bytearray(whole)
    flipped[len(whole) // 3] ^= 0xFF  # inside of an array
    bad.write_bytes(flipped)
    refused("cut short, damaged")
    bad.write_text("not an archive")
    refused("cut short, damaged")
    with bad.open("wb") as out:
        np.save(out, np.zeros(3))
    refused("holds one array: it is no trace")
    with bad.open("wb") as out:
        np.savez(out, a=np.zeros(3))
    refused("no member 'meta'")
    rewritten(file, bad, with_meta(schema="other"))
    refused("its schema is 'other'")
    rewritten(file, bad, with_meta(version=2))
    refused("of version 2; this program reads version 1")
    rewritten(file, bad, lambda name, data: None if name == "valid/000001" else data)
    refused(r"lacks 1 of its members, e.g. \['valid/000001'\]")
    rewritten(file, bad, lambda name, data: b"{" if name == "meta" else data)
    refused("cut short, damaged")


def test_batches_are_read_one_at_a_time(file: Path, tmp_path: Path):
    """The first is readable though the second is damaged: nothing beyond it was touched."""
    bad = rewritten(file, tmp_path / "bad.npz", lambda name, data: data[:100] if name == "probs/000001" else data)
    with trace.read(bad) as read:
        assert read.chunk(0).kept.valid.any()
        with pytest.raises(ConfigError, match="cut short, damaged"):
            read.chunk(1)


# --- the command --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random parameters, and the texts that its config names."""
    folder = tmp_path_factory.mktemp("run")
    write_texts(folder)
    domains = {name: {split: f"{split}/{name}.txt" for split in ("train", "valid", "test")} for name in ("a", "b")}
    config = small_config(dataclasses.replace(small_model(first_dense=0, every=1), num_layers=2, vocab_size=320))
    plain = to_dict(config)
    plain["data"] |= {
        "source": "files", "root": str(folder), "cache_dir": str(folder / "cache"), "domains": domains, "seq_len": 16,
    }  # fmt: skip
    plain["eval"]["batch_size"] = 8
    config = from_mapping(ExperimentConfig, plain)
    made = Trainer(config, np.ones(320), make_mesh(MeshConfig(), jax.devices()[:1]))
    checkpoints = Checkpoints(folder / "checkpoints")
    meta = {"step": 7, "config": plain, "data": {"tokenizer": load_tokenizer("byte").hash}}
    checkpoints.save(7, start(made), meta, score=1.0)
    checkpoints.close()
    return folder


def run(*arguments: str) -> int:
    return session.call(command.define_flags, command.command, arguments)


def test_the_command_records_all_domains_in_turn(workdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "t.npz"
    call = [f"--checkpoint={workdir}", f"--output={out}", "--max_tokens=300"]
    assert run(*call, "--capacity_factor=1", "--capacity_order=order") == 0
    said = capsys.readouterr().err
    assert "first 300 tokens of each of a, b (test), at most 1,024 MiB" in said and "6 batches, 600 tokens" in said
    with trace.read(out) as read:
        meta = read.meta
        assert meta["limits"] == [{"name": "TokenDrop", "factor": 1.0, "order": "order"}]
        assert read.config.model.moe.capacity_factor == 1.0
        assert meta["checkpoint"]["step"] == 7 and re.fullmatch("[0-9a-f]{12}", meta["checkpoint"]["hash"])
        assert meta["ranks"] == len(jax.devices()) and meta["data"]["split"] == "test"
        corpus = load_corpus(read.config.data)
        for i, name in enumerate(("a", "b")):  # each domain's batches are those of evaluation
            expected = list(eval_batches(corpus, name, "test", batch_size=8, max_tokens=300))
            mine = [chunk.tokens for chunk in read if (chunk.tokens["domain"] == i).all()]
            for tokens, batch in zip(mine, expected, strict=True):
                np.testing.assert_array_equal(tokens["token_ids"].reshape(8, 16), batch["tokens"])
        assert [int(chunk.tokens["domain"][0, 0]) for chunk in read] == [0, 1, 0, 1, 0, 1]
        kept = read.chunk(0).kept.valid  # 16 tokens, 2 of 4 experts each, on each of 8 devices: 8 for each expert
        load = (kept[..., None] & (read.chunk(0).kept.expert[..., None] == np.arange(4))).sum(axis=(2, 3))
        assert load.max() == 8


def test_ctrl_c_leaves_a_valid_shorter_trace(
    workdir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    whole = command.in_turn

    def interrupted(streams: list) -> Iterator[Any]:
        for i, batch in enumerate(whole(streams)):
            if i == 2:
                signal.raise_signal(signal.SIGINT)
            yield batch

    monkeypatch.setattr(command, "in_turn", interrupted)
    out = tmp_path / "t.npz"
    assert run(f"--checkpoint={workdir}", f"--output={out}", "--max_tokens=1000", "--devices=1") == 130
    assert "ended early: Ctrl-C; the trace is valid and shorter" in capsys.readouterr().err
    with trace.read(out) as read:
        assert len(list(read)) == 3 and read.meta["ended"] == "interrupted" and read.ranks == 1
    assert [path.name for path in tmp_path.iterdir()] == ["t.npz"]


def test_what_cannot_work_is_one_sentence_and_no_file(
    workdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    good = {"checkpoint": str(workdir), "output": str(tmp_path / "t.npz")}
    bad = {
        ("checkpoint", ""): "--checkpoint is missing",
        ("output", ""): "--output is missing",
        ("checkpoint", str(tmp_path)): "no finished checkpoint there",
        ("output", str(tmp_path / "no" / "t.npz")): "there is no folder",
        ("split", "dev"): "split=dev",
        ("domains", "a,c"): "--domains=c: the domains with a 'test' split are a, b",
        ("capacity_order", "last"): "capacity_order=last: value should be one of",
        ("capacity_order", "score"): "--capacity_order=score orders nothing: add --capacity_factor",
        ("capacity_factor", "-1"): "model.moe.capacity_factor=-1.0: must be 0 or more",
        ("batch_size", "3"): "--batch_size=3 does not divide over 8 devices",
        ("devices", "99"): "needs 99 devices, 8 are there: --devices=1 reads batches on one device",
        ("max_bytes", "1000"): "max_bytes=1,000 is less than one batch takes",
        ("max_token", "5"): "max_token",
    }
    for (name, value), message in bad.items():
        more = {} if name == "batch_size" else {"devices": "1"}
        assert run(*(f"--{k}={v}" for k, v in {**good, **more, name: value}.items())) == 2, name
        said = capsys.readouterr().err
        assert message in said and "Traceback" not in said, (name, said)
    assert list(tmp_path.iterdir()) == []


def test_a_mesh_that_is_not_here_names_the_flag(workdir: Path):
    """The commands that call this have no fields of a config."""
    config = small_config()
    for mesh, what in ((MeshConfig(data=4, expert=4), "needs 16 devices, 8 are"), (MeshConfig(expert=3), "expert=3 x")):
        with pytest.raises(ConfigError, match=rf"config\.mesh.*{what}.*: --devices=1 reads batches on one") as raised:
            command.mesh_of(dataclasses.replace(config, mesh=mesh))
        assert "mesh.data=-1" not in str(raised.value) and "set config" not in str(raised.value)


def test_limits_describe_themselves():
    limit = limits.token_drop(0.3, "reverse")
    assert trace.describe_limits((limit,)) == [{"name": "TokenDrop", "factor": 0.3, "order": "reverse"}]
