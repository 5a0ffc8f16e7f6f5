"""``experiments.partition``: a checkpoint of ours with its optimizer's state, a Hugging Face folder, and what is
refused. The numbers are held by ``test_partition.py``."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from experiments import export, logits, partition, session
from moejax import checkpoint, count, derived, pretrained, sharding
from moejax.config import ConfigError, ExperimentConfig, MeshConfig, RouterConfig, config_hash, from_mapping, to_dict
from moejax.partition.stored import layer_array
from moejax.plan import sizes
from moejax.train import Trainer
from tests import importers_fakes
from tests.small import execute, small_config, small_model, start

pytestmark = pytest.mark.usefixtures("compiled_once")

ROOT = Path(__file__).resolve().parent.parent
STEP = 7
ROUTER = RouterConfig(name="softmax_bias", bias=True, renormalise=False)
MODEL = small_model(ROUTER, expert_bias=True, shared_experts=1, losses=(), first_dense=0, every=1)
CONFIG = small_config(dataclasses.replace(MODEL, num_layers=1))


def command(*arguments: str) -> int:
    return session.call(partition.define_flags, partition.command, arguments)


def trainer(config: ExperimentConfig) -> Trainer:
    mesh = sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1])
    return Trainer(config, np.ones(config.model.vocab_size, np.int32), mesh)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of a run at step 7, with random numbers in every array, moments and selection biases too."""
    workdir, made = tmp_path_factory.mktemp("runs") / "mine", trainer(CONFIG)
    rng = np.random.default_rng(4)
    state = jax.tree.map(
        lambda leaf: rng.uniform(0.1, 1, leaf.shape).astype(leaf.dtype) if leaf.ndim else np.asarray(STEP, np.int32),
        start(made),
    )
    random = start(made)
    state = dataclasses.replace(state, params=random.params)
    meta = {"step": STEP, "seconds": 1.0, "data": {"place": 3}, "config": to_dict(CONFIG), "since_log": [{"old": 1}],
            "config_hash": config_hash(CONFIG)}  # fmt: skip
    checkpoints = checkpoint.Checkpoints(workdir / "checkpoints")
    checkpoints.save(STEP, state, meta, score=1.25)
    checkpoints.close()
    (workdir / "config.json").write_text(json.dumps(to_dict(CONFIG)))
    (workdir / "env.json").write_text(json.dumps({"data": {"hash": "of the texts"}, "sessions": [{"host": "here"}]}))
    return workdir


@pytest.fixture(scope="module")
def split(run: Path) -> dict[str, Path]:
    """What the command makes of it."""
    made = {form: run.parent / form for form in ("complete", "partial")}
    for form, output in made.items():
        assert command(f"--checkpoint={run}", "--parts=2", f"--form={form}", f"--output={output}") == 0
    return made


TOKENS = np.random.default_rng(5).integers(0, 11, (2, 9)).astype(np.int32)


def logits_of(path: Path) -> np.ndarray:
    return logits.logits(pretrained.open_model(path, compute_dtype="float32")[0], TOKENS)


def close(got: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(got, wanted, rtol=0, atol=3e-6 * np.abs(wanted).max())


def test_the_outcome_computes_the_same(run: Path, split: dict[str, Path]):
    wanted = logits_of(run)
    for path in split.values():
        close(logits_of(path), wanted)


def test_the_outcome_is_a_run_that_goes_on(run: Path, split: dict[str, Path]):
    """Step, place in the data, score, texts and every array of the optimizer are there and fit the new model."""
    old, _ = checkpoint.read_all(run / "checkpoints" / str(STEP))
    for form, path in split.items():
        config = from_mapping(ExperimentConfig, json.loads((path / "config.json").read_bytes()))
        moe = config.model.moe
        assert (moe.num_experts, moe.router.copies, moe.parts) == ((8, 2, 1) if form == "complete" else (4, 1, 2))
        assert config.train == CONFIG.train
        folder = path / "checkpoints" / str(STEP)
        arrays, meta = checkpoint.read_all(folder)
        wanted = {name: leaf.shape for name, leaf in checkpoint.flatten(trainer(config).abstract).items()}
        assert {name: array.shape for name, array in arrays.items()} == wanted
        assert meta["config"] == to_dict(config) and meta["config_hash"] == config_hash(config)
        assert (meta["step"], meta["data"], meta["since_log"]) == (STEP, {"place": 3}, [])
        assert meta["made_by"][0]["form"] == form and meta["made_by"][0]["source"] == checkpoint.origin(run)
        assert checkpoint.score_of(folder) == 1.25 and int(arrays["step"]) == STEP
        env = json.loads((path / "env.json").read_bytes())
        assert env["data"] == {"hash": "of the texts"} and env["sessions"] == [{"host": "here"}]
        assert json.loads((path / "partition.json").read_bytes())["parts"] == 2
        for name in old:
            if not layer_array(name)[0]:
                np.testing.assert_array_equal(arrays[name], old[name])
        mu, nu = ("opt_state/1/0/" + f"{m}/groups/0/blocks/0/moe/store/down" for m in ("mu", "nu"))
        factor = 2 if form == "complete" else 1
        np.testing.assert_array_equal(arrays[mu].reshape(old[mu].shape) * factor, old[mu])
        np.testing.assert_array_equal(arrays[nu].reshape(old[nu].shape) * factor**2, old[nu])


def test_merging_gives_the_bits_that_were_split(run: Path, split: dict[str, Path], tmp_path: Path, capfd):
    old, meta = checkpoint.read_all(run / "checkpoints" / str(STEP))
    for form, path in split.items():
        output = tmp_path / form
        assert command(f"--checkpoint={path}", "--form=merge", f"--output={output}", "--steps=30") == 0
        said = capfd.readouterr().err
        assert "-> 4 experts of width 8, top-2;" in said and "--config.train.steps=30" in said
        arrays, new = checkpoint.read_all(output / "checkpoints" / str(STEP))
        assert arrays.keys() == old.keys()
        for name, array in old.items():
            np.testing.assert_array_equal(arrays[name], array)
        assert new["config"]["model"] == meta["config"]["model"] and new["config"]["train"]["steps"] == 30
        assert [done["form"] for done in new["made_by"]] == [form, "merge"]


def test_parts_may_stand_apart(run: Path, split: dict[str, Path], tmp_path: Path, capfd):
    """The same arrays in another order, the optimizer's too. One order is never taken for the other, and merging and
    splitting again leads from one to the other."""
    apart, back = tmp_path / "apart", tmp_path / "back"
    arguments = ("--form=partial", "--parts=2", "--part_order=part", f"--output={apart}")
    assert command(f"--checkpoint={run}", *arguments) == 0
    said = capfd.readouterr().err
    assert "each stored as 2 parts that stand apart" in said and "--config.model.moe.part_order=part" in said
    together, _ = checkpoint.read_all(split["partial"] / "checkpoints" / str(STEP))
    arrays, meta = checkpoint.read_all(apart / "checkpoints" / str(STEP))
    assert meta["config"]["model"]["moe"]["part_order"] == "part"
    stores = [name for name in arrays if "/moe/store/" in name]
    assert {name.split("/")[0] for name in stores} == {"params", "opt_state"}
    for name, array in together.items():
        if name in stores:
            array = array[:, [0, 2, 4, 6, 1, 3, 5, 7]]
        np.testing.assert_array_equal(arrays[name], array)

    theirs = pretrained.stored_config(split["partial"]).model
    with pytest.raises(ConfigError, match=r"moe\.part_order='part', here 'expert': set that to 'part', or merge"):
        pretrained.check_fit(pretrained.origin(apart), theirs)
    pretrained.check_fit(pretrained.origin(apart), pretrained.stored_config(apart).model)
    wrong = {
        "leave it out": (f"--checkpoint={apart}", "--form=merge", "--part_order=expert"),
        "merge them first": (f"--checkpoint={apart}", "--form=partial", "--parts=2", "--part_order=expert"),
        "is of --form=partial": (f"--checkpoint={run}", "--form=complete", "--parts=2", "--part_order=part"),
    }
    for reason, given in wrong.items():
        assert command(*given, f"--output={back}") == 2
        assert reason in capfd.readouterr().err and not back.exists()

    assert command(f"--checkpoint={apart}", "--form=merge", f"--output={back}") == 0
    old, _ = checkpoint.read_all(run / "checkpoints" / str(STEP))
    arrays, meta = checkpoint.read_all(back / "checkpoints" / str(STEP))
    assert meta["config"]["model"]["moe"]["part_order"] == "expert"
    for name, array in old.items():
        np.testing.assert_array_equal(arrays[name], array)


def test_parts_of_a_seed_are_the_whole_of_that_seed():
    """``moe.parts`` cuts what the seed gives: the same model, however stored; its plan fits its arrays."""
    model = CONFIG.model
    parted = dataclasses.replace(CONFIG, model=dataclasses.replace(model, moe=dataclasses.replace(model.moe, parts=4)))
    mine, wanted = trainer(parted).abstract, count.parameters(parted.model)
    assert wanted.total == sum(leaf.size for leaf in jax.tree.leaves(mine.params))
    stored = {name: leaf.shape for name, leaf in checkpoint.flatten(mine.params).items() if "/moe/store/" in name}
    assert {shape[1] for shape in stored.values()} == {16}
    planned = sizes.make(parted, MeshConfig(data=1), "cpu", train=True)
    whole = sizes.make(CONFIG, MeshConfig(data=1), "cpu", train=True)
    assert (planned.rows, planned.experts, planned.expert_dim) == (4 * whole.rows, 16, 2)


def test_a_published_folder(tmp_path: Path, capfd):
    """DeepSeek-V3: sigmoid scores with a selection bias, groups by their two best, a scale, a shared expert."""
    one_layer: dict[str, Any] = {"num_hidden_layers": 1, "first_k_dense_replace": 0}
    folder = importers_fakes.small_folder(tmp_path / "hf", "deepseek_v3", torch_dtype="float32", **one_layer)
    output = tmp_path / "split"
    assert command(f"--checkpoint={folder}", "--parts=2", "--form=complete", f"--output={output}") == 0
    assert "weights alone: train them with python -m experiments.run --config=configs/pre" in capfd.readouterr().err
    close(logits_of(output), logits_of(folder))
    stored = pretrained.stored_config(output)
    assert stored.train.steps and stored.data.tokenizer == f"pretrained:{folder}" and not stored.init_from
    assert not derived.read(output).trains
    back = tmp_path / "back"
    assert command(f"--checkpoint={output}", "--form=merge", f"--output={back}") == 0
    one, two = derived.read(folder), derived.read(back)
    assert one.arrays.keys() == two.arrays.keys() and one.config.model == two.config.model
    for name, array in one.arrays.items():
        np.testing.assert_array_equal(two.arrays[name], array)
    assert (
        command(f"--checkpoint={folder}", "--parts=2", "--form=partial", f"--output={tmp_path / 'x'}", "--steps=9") == 2
    )
    assert "no optimizer's state" in capfd.readouterr().err and not (tmp_path / "x").exists()


def test_a_split_model_is_exported_where_a_family_can_say_it(tmp_path: Path, capfd):
    folder = importers_fakes.small_folder(tmp_path / "hf", "mixtral", torch_dtype="bfloat16")
    made = {form: tmp_path / form for form in ("complete", "partial")}
    for form, output in made.items():
        assert command(f"--checkpoint={folder}", "--parts=2", f"--form={form}", f"--output={output}") == 0
    source = derived.read(made["complete"])
    assert {str(array.dtype) for name, array in source.arrays.items() if "/store/" in name} == {"bfloat16"}
    out = tmp_path / "out"
    arguments = (f"--checkpoint={made['complete']}", f"--output={out}", "--dtype=float32")
    assert session.call(export.define_flags, export.command, arguments) == 0
    raw = json.loads((out / "config.json").read_bytes())
    assert (raw["num_local_experts"], raw["num_experts_per_tok"], raw["intermediate_size"]) == (8, 4, 3)
    for name, array in derived.read(out).arrays.items():  # what export makes of them is held by its own tests
        np.testing.assert_array_equal(array, source.arrays[name].astype(np.float32))
    arguments = (f"--checkpoint={made['partial']}", f"--output={tmp_path / 'y'}")
    assert session.call(export.define_flags, export.command, arguments) == 2
    assert "no family stores an expert in parts" in capfd.readouterr().err


BAD = {
    "no --form": (("--parts=2", "--output=OUT"), "--form is missing"),
    "no --parts": (("--form=partial", "--output=OUT"), "--parts is missing"),
    "a form that is none": (("--form=whole", "--output=OUT"), "--form=whole"),
    "no divisor": (("--form=complete", "--parts=3", "--output=OUT"), "parts=3: must be 2 or more and divide"),
    "nothing split": (("--form=merge", "--output=OUT"), "nothing to merge"),
    "fewer steps": (
        ("--form=partial", "--parts=2", "--steps=7", "--output=OUT"),
        "--steps=7: the checkpoint is of step",
    ),
    "no folder": (("--form=partial", "--parts=2", "--output=OUT/below"), "there is no folder"),
}


@pytest.mark.parametrize(("arguments", "reason"), BAD.values(), ids=BAD)
def test_what_is_refused(run: Path, tmp_path: Path, arguments: tuple[str, ...], reason: str, capfd):
    output = tmp_path / "out"
    given = [argument.replace("OUT", str(output)) for argument in arguments]
    assert command(f"--checkpoint={run}", *given) == 2
    assert reason in capfd.readouterr().err and not list(tmp_path.iterdir())


def test_what_is_there_is_not_overwritten(run: Path, split: dict[str, Path], tmp_path: Path, capfd):
    before = sorted(split["partial"].rglob("*"))
    assert command(f"--checkpoint={run}", "--form=partial", "--parts=2", f"--output={split['partial']}") == 2
    assert "not empty" in capfd.readouterr().err and sorted(split["partial"].rglob("*")) == before
    damaged = Path(shutil.copytree(run, tmp_path / "damaged"))
    for data in (damaged / "checkpoints").rglob("d/*"):
        data.write_bytes(data.read_bytes()[:-40])
    assert command(f"--checkpoint={damaged}", "--form=partial", "--parts=2", f"--output={tmp_path / 'new'}") == 2
    assert "damaged" in capfd.readouterr().err and not (tmp_path / "new").exists()


def test_limits_of_whole_experts_do_not_go_with_the_complete_form():
    limited = dataclasses.replace(CONFIG.model.moe, capacity_limits=("threshold_drop:threshold=0.1",))
    model = dataclasses.replace(CONFIG.model, moe=limited)
    with pytest.raises(ConfigError, match="add --without_limits"):
        partition.planned(model, "complete", 2)
    assert partition.planned(model, "partial", 2)[0].moe.capacity_limits == limited.capacity_limits
    drawn = dataclasses.replace(CONFIG.model.moe, capacity_factor=1.0, capacity_order="random")
    with pytest.raises(ConfigError, match="draws for each expert"):
        partition.planned(dataclasses.replace(CONFIG.model, moe=drawn), "complete", 2)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_end_midway_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Any):
    whole = checkpoint.Checkpoints.close

    def close(self: checkpoint.Checkpoints) -> None:
        whole(self)
        monkeypatch.setattr(checkpoint.Checkpoints, "close", whole)
        raise error

    monkeypatch.setattr(checkpoint.Checkpoints, "close", close)
    arguments = (f"--checkpoint={run}", "--form=partial", "--parts=2", f"--output={tmp_path / 'out'}")
    assert command(*arguments) == (130 if error is KeyboardInterrupt else 2)
    assert not list(tmp_path.iterdir())


MIDWAY = """
import os, signal
from experiments import partition, session
from moejax import checkpoint

whole = checkpoint.Checkpoints.close

def close(self):
    checkpoint.Checkpoints.close = whole
    os.kill(os.getpid(), signal.SIGTERM)

checkpoint.Checkpoints.close = close
session.launch(partition.define_flags, partition.command)
"""


def test_sigterm_midway_leaves_nothing_either(run: Path, tmp_path: Path):
    arguments = (f"--checkpoint={run}", "--form=partial", "--parts=2", f"--output={tmp_path / 'out'}")
    call = [sys.executable, "-c", MIDWAY, *arguments]
    made = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert made.returncode == 143, made.stderr
    assert made.stderr == "interrupted: what was finished is kept; the same command goes on\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.slow  # the same law without training: test_the_outcome_is_a_run_that_goes_on
@pytest.mark.parametrize("form", ["complete", "partial"])
def test_training_goes_on(form: str, workspace: Path, tmp_path: Path, capfd):
    """The run's own command, with the fields that were printed, goes on at the step and the loss that it had."""
    config = f"--config={workspace}/small_config.py:plain"
    assert execute(config, f"--workdir={tmp_path / 'run'}") == 0
    source = tmp_path / "run" / "checkpoints" / "4"
    arguments = (f"--checkpoint={source}", "--parts=2", f"--form={form}", f"--output={tmp_path / 'split'}")
    capfd.readouterr()
    assert command(*arguments) == 0
    fields = [word for word in capfd.readouterr().err.split() if word.startswith("--config.")]
    assert execute(config, f"--workdir={tmp_path / 'split'}", *fields) == 0
    assert "resuming at step 4" in capfd.readouterr().err
    rows = [[json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
            for name in ("run", "split")]  # fmt: skip
    losses = [{row["step"]: row["ce"] for row in of_run if row["kind"] == "train"} for of_run in rows]
    assert losses[0][6] == pytest.approx(losses[1][6], rel=2e-3)  # of steps 5 and 6: AdamW's steps differ a little
