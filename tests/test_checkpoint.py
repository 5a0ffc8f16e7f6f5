"""Checkpoints: what is saved comes back bit for bit, on any mesh; what is damaged is named."""

import contextlib
import dataclasses
import functools
import json
import logging
import random
import resource
import shutil
import signal
import threading
import time
import types
import zlib
from collections import Counter, namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from orbax.checkpoint import v1 as ocp

from moejax import checkpoint
from moejax.checkpoint import Checkpoints, checksums, load_model, locate, reading, store
from moejax.config import ConfigError, MeshConfig, RouterConfig, to_dict
from moejax.interrupt import Terminated, terminate
from moejax.model import Decoder
from moejax.sharding import make_mesh
from moejax.train import Trainer
from tests.small import VOCAB, flat, small_config, small_model, start

CONFIG = small_config(small_model(RouterConfig(name="sigmoid_bias")))
SCORES = {1: 2.0, 2: 3.0, 3: None, 4: 4.0}  # step 1 is the best, 3 was not validated


def trainer(mesh: MeshConfig | None = None, devices: int = 1, **model: Any) -> Trainer:
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, **model))
    return Trainer(config, np.ones(VOCAB), make_mesh(mesh or MeshConfig(), jax.devices()[:devices]))


def state_of(made: Trainer, step: int) -> Any:
    """A state in which no array is a constant, other for each step."""
    rng = np.random.default_rng(step)
    noise = jax.tree.map(
        lambda leaf: (leaf + rng.integers(1, 9)) if leaf.ndim == 0 else rng.random(leaf.shape, np.float32), start(made)
    )
    return jax.device_put(noise, made.shardings)


@pytest.fixture(scope="module")
def made() -> Trainer:
    return trainer()


@pytest.fixture(scope="module")
def saved(made: Trainer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workdir with checkpoints of four steps; nobody writes to it afterwards."""
    workdir = tmp_path_factory.mktemp("run")
    checkpoints = Checkpoints(workdir / "checkpoints", keep=2)
    for step, score in SCORES.items():
        meta = {"step": step, "config": to_dict(CONFIG), "data": {"seed": 3}}
        checkpoints.save(step, state_of(made, step), meta, score=score)
    checkpoints.close()
    return workdir


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "copy")


# --- saving and restoring -----------------------------------------------------------------------------------------


def test_the_newest_and_the_best_are_kept(saved: Path):
    checkpoints = Checkpoints(saved / "checkpoints", writer=False)
    assert checkpoints.steps() == [1, 3, 4]
    assert (checkpoints.latest(), checkpoints.best()) == (4, 1)
    checkpoints.close()


def test_without_scores_the_best_is_the_newest(made: Trainer, tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    assert checkpoints.latest() is None and checkpoints.best() is None
    for step in (5, 7):
        checkpoints.save(step, {"a": np.arange(3)}, {}, score=None)
    assert checkpoints.steps() == [7]
    assert checkpoints.best() == 7
    checkpoints.close()


def test_a_score_that_is_no_number_is_not_the_best(tmp_path: Path):
    """NaN compares with nothing: it would stay the least of all, and the best would be deleted."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step, score in ((1, float("nan")), (2, 2.0), (3, 3.0), (4, float("nan"))):
        checkpoints.save(step, {"a": np.arange(3)}, {}, score=score)
    assert checkpoints.steps() == [2, 4] and checkpoints.best() == 2 and locate(tmp_path).name == "2"
    checkpoints.close()


@pytest.mark.parametrize(
    ("mesh", "devices"),
    [(MeshConfig(), 1), (MeshConfig(), 8), (MeshConfig(expert=4), 8)],
    ids=["1 device", "data 8", "data 2 expert 4"],
)
def test_restored_state_is_bit_equal_on_any_mesh(made: Trainer, saved: Path, mesh: MeshConfig, devices: int):
    checkpoints = Checkpoints(saved / "checkpoints", writer=False)
    other = trainer(mesh, devices)
    restored, meta = checkpoints.restore(other.abstract, 3)
    checkpoints.close()
    expected = flat(state_of(made, 3))
    assert "opt_state/1/0/mu/groups/1/blocks/1/moe/store/up" in expected
    chex.assert_trees_all_equal(flat(restored), expected)
    assert int(restored.step) == int(expected["step"]) > 0
    assert meta == {"step": 3, "config": to_dict(CONFIG), "data": {"seed": 3}}
    for leaf, sharding in zip(jax.tree.leaves(restored), jax.tree.leaves(other.shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


DEGREES = (1, 2, 4, 8)
CROSSED = [(1, 8), (8, 2), (2, 4)]


def expert_parallel(degree: int) -> Trainer:
    moe = dataclasses.replace(CONFIG.model.moe, num_experts=8, dispatcher="ep")
    return trainer(MeshConfig(expert=degree), 8, moe=moe)


@pytest.fixture(scope="module")
def saved_by_degree(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The same numbers, saved by 8 devices with so many ranks of experts."""

    @functools.cache
    def save(degree: int) -> Path:
        folder = tmp_path_factory.mktemp(f"ep{degree}") / "checkpoints"
        checkpoints = Checkpoints(folder, keep=1)
        checkpoints.save(7, state_of(expert_parallel(degree), 7), {"step": 7}, score=None)
        checkpoints.close()
        return folder

    return save


@pytest.mark.parametrize(
    ("written", "read"),
    [
        *CROSSED,
        *(pytest.param(a, b, marks=pytest.mark.slow) for a in DEGREES for b in DEGREES if (a, b) not in CROSSED),
    ],
)
def test_every_degree_of_expert_parallelism_reads_every_other(
    saved_by_degree: Callable[[int], Path], written: int, read: int
):
    """Experts and their optimizer moments, bit for bit, each on the ranks that host it now."""
    other = expert_parallel(read)
    checkpoints = Checkpoints(saved_by_degree(written), writer=False)
    restored, _ = checkpoints.restore(other.abstract, 7)
    checkpoints.close()
    chex.assert_trees_all_equal(flat(restored), flat(state_of(other, 7)))
    found = checkpoint.flatten(restored)
    for name in ("params", "opt_state/1/0/mu", "opt_state/1/0/nu"):
        leaf = found[f"{name}/groups/1/blocks/1/moe/store/up"]
        assert leaf.shape[1] == 8 and leaf.addressable_shards[0].data.shape[1] == 8 // read


def test_only_the_named_arrays_are_read(made: Trainer, saved: Path, copy: Path):
    folder = copy / "checkpoints" / "4"
    params, meta = checkpoint.load(folder, made.abstract.params, prefix="params/")
    chex.assert_trees_all_equal(flat(params), flat(state_of(made, 4).params))
    assert meta["step"] == 4
    router_state, _ = checkpoint.load(folder, made.abstract.router_state, prefix="router_state/")
    chex.assert_trees_all_equal(flat(router_state), flat(state_of(made, 4).router_state))
    one, _ = checkpoint.load(folder, {"embed": made.abstract.params["embed"]}, prefix="params/")
    assert list(flat(one)) == ["embed"]
    nothing, meta = checkpoint.load(folder, {}, prefix="router_state/")
    assert nothing == {} and meta["step"] == 4


def test_arrays_of_another_type_are_read_where_a_mesh_is_in_force(tmp_path: Path):
    """As `--mesh` has it, of what was made of a published folder in bfloat16."""
    value = np.arange(8.0, dtype=np.float32).reshape(2, 4)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"params": {"a": jnp.asarray(value, jnp.bfloat16)}}, {"step": 1, "data": {}}, score=1.0)
    checkpoints.close()
    with jax.set_mesh(make_mesh(MeshConfig(data=1, expert=2), jax.devices()[:2])):
        like = {"params": {"a": jax.ShapeDtypeStruct(value.shape, np.float32)}}
        read, _ = checkpoint.load(tmp_path / "1", like)
    assert read["params"]["a"].dtype == np.float32
    np.testing.assert_array_equal(read["params"]["a"], value)


def test_meta(saved: Path):
    assert checkpoint.read_meta(saved / "checkpoints" / "1")["step"] == 1


def test_paths_name_every_level():
    tree = {"a": [np.zeros(1), {"b": np.ones(2)}], "c": nnx.Param(np.zeros(3))}
    assert sorted(checkpoint.flatten(tree)) == ["a/0", "a/1/b", "c"]


# --- what does not fit --------------------------------------------------------------------------------------------


def test_another_model_is_refused_with_names(saved: Path):
    folder = saved / "checkpoints" / "4"
    wider = trainer(ffn_dim=32).abstract
    with pytest.raises(ConfigError, match=r"4 has \d+ arrays of another shape.*down: \(1, 24, 16\) != \(1, 32, 16\)"):
        checkpoint.load(folder, wider)
    untied = trainer(tie_embeddings=False).abstract
    with pytest.raises(ConfigError, match=r"lacks 3 arrays of this model.*unembed"):
        checkpoint.load(folder, untied)


def largest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


DAMAGE: dict[str, Callable[[Path], None]] = {
    "arrays cut short": lambda folder: cut(largest(folder / "arrays" / "ocdbt.process_0" / "d")),
    "arrays missing": lambda folder: largest(folder / "arrays" / "ocdbt.process_0" / "d").unlink(),
    "index cut short": lambda folder: cut(next((folder / "arrays" / "d").iterdir())),
    "manifest missing": lambda folder: (folder / "arrays" / "manifest.ocdbt").unlink(),
    "metadata cut short": lambda folder: cut(folder / "arrays" / "_METADATA"),
    "meta cut short": lambda folder: (folder / "meta" / "_strings.json").write_text('{"json'),
    "no arrays": lambda folder: shutil.rmtree(folder / "arrays"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named(made: Trainer, copy: Path, damage: str):
    folder = copy / "checkpoints" / "4"
    DAMAGE[damage](folder)
    with pytest.raises(ConfigError, match=r"checkpoint .*/copy/checkpoints/4 .*damaged.*delete this folder") as error:
        checkpoint.load(folder, made.abstract)
    assert "\n" not in str(error.value)


def everything(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def flip(path: Path, at: int, bits: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= bits
    path.write_bytes(data)


def test_no_flipped_byte_is_loaded_in_silence(tmp_path: Path):
    """20 of any byte, 20 of any file (most bytes are arrays'): each is reported, or changes nothing that is read."""
    rng = np.random.default_rng(0)
    state = {"params": {"a": rng.random((64, 8), np.float32), "b": np.zeros((8, 8)), "c": np.arange(9)}}
    checkpoints = Checkpoints(tmp_path)
    for step, score in ((3, 2.0), (4, 3.0)):
        checkpoints.save(step, {**state, "step": np.array(step)}, {"step": step, "data": {"next": 77}}, score=score)
    checkpoints.close()
    folder, like = tmp_path / "4", {**state, "step": np.array(4)}
    expected, meta = checkpoint.load(folder, like)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    dice, found = random.Random(0), Counter[str]()
    for weights in ([path.stat().st_size for path in files], None):
        for path in dice.choices(files, weights, k=20):
            sound = path.read_bytes()
            flip(path, dice.randrange(len(sound)), dice.randrange(1, 256))
            try:
                loaded, text = checkpoint.load(folder, like)
                reader = Checkpoints(tmp_path, writer=False)
                steps = reader.best(), reader.latest()
            except ConfigError as error:
                found["detected"] += 1
                assert "that of step 3. Nothing was deleted" in str(error) and str(folder) in str(error)
            else:
                found["harmless"] += 1
                chex.assert_trees_all_equal(flat(loaded), flat(expected))
                assert text == meta and steps == (3, 4)
            path.write_bytes(sound)
    # About 24 of 40: Orbax leaves files that are read no more, and its names, so which files are hit, are random.
    assert found["detected"] >= 10 and found["harmless"] > 0 and found.total() == 40


def test_the_array_and_an_undamaged_checkpoint_are_named(made: Trainer, copy: Path):
    folder, record = copy / "checkpoints" / "4", checksums.read(copy / "checkpoints" / "4")
    assert record is not None
    name = "params/final_norm/scale"
    right = record["arrays"][name]
    rewrite(folder, lambda record: record["arrays"].update({name: "0badc0de"}))
    before = everything(copy)
    message = rf"checkpoint {folder} is damaged: array '{name}' is not what was saved: CRC-32 {right}, .* 0badc0de"
    offer = rf"of step 3\. Nothing was deleted: .*delete this folder \({folder}\); the same command .* from step 3$"
    for read in (
        lambda: checkpoint.load(folder, made.abstract),
        lambda: load_model(folder),
    ):
        with pytest.raises(ConfigError, match=f"{message}\\. .*{offer}"):
            read()
    assert checkpoint.load(folder, {"embed": made.abstract.params["embed"]}, prefix="params/")  # it is another array
    assert everything(copy) == before
    largest(folder.with_name("3") / "arrays").unlink()
    with pytest.raises(ConfigError, match=r"of step 1\. Nothing was deleted"):
        checkpoint.read_all(folder)
    largest(folder.with_name("1") / "arrays").unlink()
    with pytest.raises(ConfigError, match=r"No other checkpoint beside it is undamaged: copy it again, or delete"):
        checkpoint.read_all(folder)


def swallowed(number: int, *args: Any) -> Any:
    """Ctrl-C as Orbax takes it in its metadata: for a file that is not there."""
    with contextlib.suppress(KeyboardInterrupt):
        signal.raise_signal(number)
    return types.SimpleNamespace(metadata=None)


def turned(number: int, *args: Any) -> Any:
    """And in its arrays: as an error of its own."""
    try:
        signal.raise_signal(number)
    except KeyboardInterrupt as error:
        raise ValueError("Failed to load checkpointable: arrays") from error


@pytest.mark.parametrize(
    ("number", "handler", "raised"),
    [(signal.SIGINT, signal.default_int_handler, KeyboardInterrupt), (signal.SIGTERM, terminate, Terminated)],
    ids=["ctrl_c", "sigterm"],
)
@pytest.mark.parametrize(("name", "orbax"), [("metadata", swallowed), ("load_checkpointables", turned)])
def test_a_signal_while_a_checkpoint_is_read_is_no_damage(
    copy: Path, monkeypatch: pytest.MonkeyPatch, name: str, orbax: Any, number: int, handler: Any, raised: Any
):
    monkeypatch.setattr(ocp, name, functools.partial(orbax, number))
    before = signal.signal(number, handler)
    try:
        with pytest.raises(KeyboardInterrupt) as came:
            checkpoint.read_all(copy / "checkpoints" / "4")
        assert came.type is raised
        with pytest.raises(raised), reading._reading(copy):
            swallowed(number)  # and all went on
        assert signal.getsignal(number) is handler
        signal.signal(number, signal.SIG_IGN)  # it has another handler: an error is an error
        with pytest.raises(ConfigError, match=r"checkpoint .*/copy/checkpoints/4 .*damaged.*delete this folder"):
            checkpoint.read_all(copy / "checkpoints" / "4")
    finally:
        signal.signal(number, before)


def rewrite(folder: Path, change: Callable[[dict], Any], stamp: bool = True) -> None:
    """Changes the record of checksums; ``stamp``: as if it had been written so."""
    path = folder / "checksums" / "checksums.json"
    content = json.loads(path.read_text())
    change(content["record"])
    if stamp:
        content["crc32"] = checksums._of_record(content["record"])
    path.write_text(json.dumps(content))


def test_a_damaged_record_is_damage(made: Trainer, copy: Path):
    folder = copy / "checkpoints" / "4"
    changes: dict[str, Callable[[], Any]] = {
        "its record of checksums is damaged": lambda: rewrite(folder, lambda r: r.update(score=1.0), stamp=False),
        "its JSON text .* is not what was saved": lambda: rewrite(folder, lambda r: r.update(meta="00000000")),
        "the list of its arrays is not what was saved: .'params/embed'": lambda: rewrite(
            folder, lambda r: r["arrays"].pop("params/embed")
        ),
        "its record of checksums is missing": lambda: shutil.rmtree(folder / "checksums"),
    }
    for message, change in changes.items():
        change()
        with pytest.raises(ConfigError, match=f"checkpoint {folder} is damaged: {message}"):
            checkpoint.load(folder, made.abstract)
        shutil.rmtree(folder / "checksums", ignore_errors=True)
        shutil.copytree(folder.with_name("3") / "checksums", folder / "checksums")
        rewrite(folder, lambda r: None)


def test_a_damaged_score_is_named_when_the_best_is_asked_for(copy: Path):
    folder = copy / "checkpoints"
    rewrite(folder / "3", lambda record: record.update(score=0.5), stamp=False)
    checkpoints = Checkpoints(folder)
    assert checkpoints.latest() == 4
    for ask in (checkpoints.best, lambda: locate(copy)):
        with pytest.raises(ConfigError, match=f"checkpoint {folder / '3'} is damaged"):
            ask()
    for step in (5, 6):  # training goes on, and what may be the best stays
        checkpoints.save(step, {"a": np.ones(2)}, {}, score=4.0)
    assert checkpoints.steps() == [1, 3, 5, 6]


def test_checksums_are_zlibs_and_know_no_mesh(made: Trainer, saved: Path, tmp_path: Path):
    values, other = flat(state_of(made, 3)), trainer(MeshConfig(expert=4), 8)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, jax.tree.map(jax.device_put, state_of(made, 3), other.shardings), {}, score=None)
    checkpoints.close()
    one, eight = saved / "checkpoints" / "3", tmp_path / "3"
    records = [checksums.read(folder) for folder in (one, eight)]
    assert records[0] is not None and records[1] is not None
    assert records[0]["arrays"] == records[1]["arrays"]
    assert records[0]["arrays"] == {n: f"{zlib.crc32(array.tobytes()):08x}" for n, array in values.items()}
    assert checkpoint.fingerprint(one) == checkpoint.fingerprint(eight)


@pytest.mark.parametrize("value", [np.float32(1.5), np.zeros((0, 3)), np.ones((2, 3), jnp.bfloat16), np.arange(6)[::2]])
def test_a_checksum_of_any_array(value: np.ndarray):
    assert checksums.crc32(value) == f"{zlib.crc32(np.asarray(value).tobytes()):08x}"


def test_a_checkpoint_of_before_checksums_is_loaded_with_a_note(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    folder, arrays = tmp_path / "7", {"params/a": np.arange(4.0), "step": np.array(7)}
    with ocp.training.Checkpointer(str(tmp_path)) as before:
        items = {"arrays": arrays, "meta": {"json": '{"step": 7}'}}
        before.save_checkpointables(7, items, metrics={"score": 1.5}, force=True)
    monkeypatch.setattr(logging.getLogger("absl"), "propagate", True)
    with caplog.at_level("WARNING"):
        for _ in range(2):
            loaded, meta = checkpoint.load(folder, arrays)
    assert meta == {"step": 7} and (np.asarray(loaded["params/a"]) == arrays["params/a"]).all()
    notes = [r.getMessage() for r in caplog.records if "made before there were checksums" in r.getMessage()]
    assert len(notes) == 1 and str(folder) in notes[0]
    assert locate(tmp_path) == folder and Checkpoints(tmp_path, writer=False).best() == 7
    assert store.score_of(folder) == 1.5
    now = Checkpoints(tmp_path)
    now.save(8, arrays, {"step": 8}, score=2.0)
    now.close()
    assert checkpoint.fingerprint(folder) == checkpoint.fingerprint(tmp_path / "8")


def test_damaged_meta_is_named(copy: Path):
    (copy / "checkpoints" / "4" / "meta" / "_strings.json").unlink()
    with pytest.raises(ConfigError, match=r"checkpoint .*/checkpoints/4 cannot be read"):
        checkpoint.read_meta(copy / "checkpoints" / "4")


def test_a_partial_policy_is_refused(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, policy=lambda step, loads: loads > 0)
    with pytest.raises(ValueError, match="partial policy"):
        checkpoints.save(1, {"a": np.ones(1)}, {}, score=None, loads=np.array([[1.0, 0.0]]))
    checkpoints.save(1, {"a": np.ones(1)}, {}, score=None, loads=np.array([[1.0, 2.0]]))
    assert checkpoints.steps() == [1]
    checkpoints.close()
    assert checkpoint.all_experts(1, np.zeros((2, 3))).all()


# --- saving ---------------------------------------------------------------------------------------------------------


def test_checksums_are_made_beside_the_save_of_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The training goes on, and overwrites the arrays, while the save is under way."""
    go, of_arrays = threading.Event(), checksums.of_arrays

    def late(*arguments: Any) -> Any:
        assert go.wait(60)
        return of_arrays(*arguments)

    monkeypatch.setattr(checksums, "of_arrays", late)
    state = {"a": jnp.arange(5000.0), "b": jax.device_put(jnp.ones((8, 4)), jax.sharding.NamedSharding(
        jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)), jax.sharding.PartitionSpec("data")
    ))}  # fmt: skip
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, {}, score=None)
    state = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)(state)
    jax.block_until_ready(state)
    checkpoints.check()  # under way is not failed
    assert checkpoint.steps_in(tmp_path) == []
    go.set()
    assert checkpoints.steps() == [1]
    arrays, _ = checkpoint.read_all(tmp_path / "1")
    assert (arrays["a"] == np.arange(5000.0)).all() and (arrays["b"] == 1).all()


def test_what_was_left_half_written_or_half_deleted_goes(copy: Path):
    folder = copy / "checkpoints"
    for name in ("9.orbax-checkpoint-tmp", "2.deleted"):
        shutil.copytree(folder / "4" / "meta", folder / name)
    before = everything(folder)
    reader = Checkpoints(folder, writer=False)
    assert reader.steps() == [1, 3, 4] and everything(folder) == before
    writer = Checkpoints(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["1", "3", "4"] and writer.steps() == [1, 3, 4]


def test_a_deletion_that_is_cut_off_leaves_no_half_checkpoint(copy: Path, monkeypatch: pytest.MonkeyPatch):
    folder = copy / "checkpoints"
    checkpoints = Checkpoints(folder, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(store.shutil, "rmtree", lambda *_, **__: None)  # killed before it removed anything
        checkpoints.save(5, {"a": np.ones(2)}, {}, score=9.0)
        checkpoints.close()
    assert checkpoint.steps_in(folder) == [1, 5] and (folder / "3.deleted").is_dir()
    assert Checkpoints(folder).best() == 1 and not (folder / "3.deleted").exists()


def test_what_cannot_be_deleted_ends_no_training(copy: Path):
    folder = copy / "checkpoints"
    checkpoints = Checkpoints(folder, keep=1)
    (folder / "3.deleted").mkdir()
    (folder / "3.deleted" / "busy").touch()  # nothing can be renamed to it
    checkpoints.save(5, {"a": np.ones(2)}, {}, score=9.0)
    assert checkpoints.steps() == [1, 3, 5]
    checkpoints.close()
    later = Checkpoints(folder, keep=1)
    later.save(6, {"a": np.ones(2)}, {}, score=9.0)
    assert later.steps() == [1, 6]
    later.close()


Usage = namedtuple("Usage", "total used free")


def test_a_full_disk_is_seen_before_the_save(copy: Path, monkeypatch: pytest.MonkeyPatch):
    folder, state = copy / "checkpoints", {"a": np.ones(3_000_000, np.float32)}
    checkpoints = Checkpoints(folder)
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: Usage(10**9, 0, 4_000_000))
    before = everything(folder)
    for attempt in (lambda: checkpoints.require_space(state, 9), lambda: checkpoints.save(9, state, {}, score=1.0)):
        with pytest.raises(ConfigError, match=r"of step 9 cannot be saved in .*: the disk is full") as error:
            attempt()
        text = str(error.value)
        assert "It takes about 13,048,576 bytes (13.0 MB); 4,000,000 bytes (4.0 MB) were free, 9.0 MB too few" in text
        assert "The last good checkpoint is that of step 4. Training stops" in text and "from step 4" in text
        assert "\n" not in text
    assert everything(folder) == before
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: Usage(10**9, 0, 14_000_000))
    checkpoints.save(9, state, {}, score=1.0)
    assert checkpoints.best() == 9


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file above 100 kB can be written."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("ask", ["check", "save", "steps", "best", "close"])
def test_a_save_that_fails_is_told_once_and_leaves_nothing(
    copy: Path, small_files: None, ask: str, capfd: pytest.CaptureFixture[str]
):
    """The real writer fails here, as it does on a full disk."""
    folder, state = copy / "checkpoints", {"a": np.random.default_rng(0).random(100_000)}
    checkpoints = Checkpoints(folder)
    before = everything(folder)
    checkpoints.save(9, state, {}, score=0.5)
    deadline = time.monotonic() + 60

    def asking() -> None:
        while ask == "check" and time.monotonic() < deadline:
            checkpoints.check()
            time.sleep(0.01)
        checkpoints.save(10, state, {}, score=0.5) if ask == "save" else getattr(checkpoints, ask)()

    with pytest.raises(
        ConfigError, match=r"of step 9 cannot be saved in .*: .*File too large.* 1,848,576 bytes"
    ) as error:
        asking()
    assert "The last good checkpoint is that of step 4" in str(error.value) and "\n" not in str(error.value)
    assert everything(folder) == before
    assert checkpoints.steps() == [1, 3, 4] and checkpoints.best() == 1
    checkpoints.close()
    assert "Traceback" not in capfd.readouterr().err


# --- where weights come from ----------------------------------------------------------------------------------------


def test_origin(copy: Path):
    found = checkpoint.origin(copy)
    folder = copy / "checkpoints" / "1"
    assert found == {"folder": str(folder), "step": 1, "config_hash": None, "weights": checkpoint.fingerprint(folder)}
    assert json.loads(json.dumps(found)) == found == checkpoint.still(found)
    assert checkpoint.origin(folder) == found != checkpoint.origin(copy / "checkpoints" / "3")
    with pytest.raises(ConfigError, match=r"now holds other weights .*step 1 in .*begin again in a new --workdir"):
        checkpoint.still({**found, "weights": "0" * 16})
    shutil.rmtree(folder)
    with pytest.raises(ConfigError, match=r"init_from: .*checkpoints/1 is gone, and the run began from step 1"):
        checkpoint.still(found)


# --- finding ------------------------------------------------------------------------------------------------------


def test_locate(saved: Path, tmp_path: Path):
    best = saved / "checkpoints" / "1"
    assert locate(saved) == locate(saved / "checkpoints") == locate(str(best)) == best
    assert locate(saved / "checkpoints" / "4") == saved / "checkpoints" / "4"
    for nothing in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ConfigError, match=r"no finished checkpoint there; give a workdir"):
            locate(nothing)
    assert not (tmp_path / "absent").exists()


def test_locate_leaves_a_save_under_way_alone(copy: Path):
    """A report or an evaluation may look while the run is writing."""
    folder = copy / "checkpoints"
    unfinished = folder / "9.orbax-checkpoint-tmp"
    shutil.copytree(folder / "4", unfinished)
    before = sorted(folder.rglob("*"))
    assert locate(copy) == folder / "1"
    assert sorted(folder.rglob("*")) == before


def test_an_unfinished_save_does_not_count(copy: Path):
    folder = copy / "checkpoints"
    shutil.copytree(folder / "4", folder / "9.orbax-checkpoint-tmp")
    checkpoints = Checkpoints(folder)
    assert checkpoints.latest() == 4
    checkpoints.close()


# --- a model from a checkpoint ------------------------------------------------------------------------------------


def test_load_model(made: Trainer, saved: Path):
    model, config, meta = load_model(saved)
    assert isinstance(model, Decoder) and config == CONFIG and meta["step"] == 1
    state = state_of(made, 1)
    _, params, router_state = nnx.split(model, nnx.Param, ...)
    chex.assert_trees_all_equal(flat(params), flat(state.params))
    chex.assert_trees_all_equal(flat(router_state), flat(state.router_state))
    other, config, _ = load_model(saved / "checkpoints" / "4", compute_dtype="bfloat16")
    assert other.config.compute_dtype == config.model.compute_dtype == "bfloat16"
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(other, nnx.Param))} == {np.dtype("float32")}


def test_load_model_needs_a_config(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"a": np.ones(1)}, {"step": 1}, score=None)
    checkpoints.close()
    with pytest.raises(ConfigError, match="names no config"):
        load_model(tmp_path)
