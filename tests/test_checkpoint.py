"""Checkpoints: what is saved comes back bit for bit, on any mesh; what is damaged is named."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import jax
import numpy as np
import pytest
from flax import nnx

from moejax import checkpoint
from moejax.checkpoint import Checkpoints, load_model, locate
from moejax.config import ConfigError, MeshConfig, RouterConfig, to_dict
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
