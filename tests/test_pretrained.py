"""A Hugging Face folder in the commands: evaluated as it is, continued, fine-tuned, refused where it does not fit."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from experiments import generate, logits, session
from moejax import checkpoint, importers, metrics, pretrained, validate
from moejax.config import (
    AttentionConfig,
    ConfigError,
    ExperimentConfig,
    ModelConfig,
    MoEConfig,
    RouterConfig,
    TrainConfig,
    to_dict,
)
from moejax.model import build, moe_layer_ids
from tests.small import execute
from tests.test_pretrained_tokenizer import byte_level
from tests.test_pretrained_tokenizer import write as write_tokenizer

pytestmark = pytest.mark.usefixtures("compiled_once")

MODEL = ModelConfig(
    vocab_size=320, num_layers=1, dim=24, tie_embeddings=False, scale_embeddings=False, compute_dtype="float32",
    attention=AttentionConfig(num_heads=3, num_kv_heads=3, head_dim=8, qk_norm=True, qk_norm_over="projection"),
    moe=MoEConfig(num_experts=4, expert_dim=16, router=RouterConfig(k=2, renormalise=False), losses=()),
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("published") / "olmoe-tiny"
    importers.write(build(MODEL, seed=1), MODEL, path, family="olmoe")
    return write_tokenizer(path, byte_level(), generation_config={"eos_token_id": [0, 5]})


@pytest.fixture(scope="module")
def arguments(workspace: Path) -> tuple[str, ...]:
    """Text for ``configs/pretrained.py``, and few steps of everything."""
    return (
        "--config.data.source=files", f"--config.data.root={workspace}", "--config.data.seq_len=32",
        "--config.data.domains={'a': {'train': 'train/a.txt', 'valid': 'valid/a.txt', 'test': 'test/a.txt'}}",
        f"--config.data.cache_dir={workspace / 'cache'}", "--config.model.compute_dtype=float32",
        "--config.eval.batch_size=4", "--config.eval.final_max_tokens=256", "--config.train.batch_size=4",
        "--config.mesh.data=1",
    )  # fmt: skip


def test_a_folder_is_evaluated_as_it_is(folder: Path, tmp_path: Path, arguments: tuple[str, ...], capfd):
    workdir = tmp_path / "run"
    command = (f"--config=configs/pretrained.py:{folder}", f"--workdir={workdir}", *arguments)
    assert execute(*command) == 0
    said = capfd.readouterr().err
    assert "no training" in said and "perplexity" in said and "expert load of step 0" in said
    kinds = [row["kind"] for row in metrics.read_metrics(workdir / "metrics.jsonl")]
    assert kinds == ["final_load", "final"]
    assert not list((workdir / "checkpoints").iterdir())
    env = json.loads((workdir / "env.json").read_text())
    assert env["init_from"] == pretrained.origin(folder) and env["parameters"]["total"] > 0
    assert execute(*command) == 0 and "done before" in capfd.readouterr().err

    model, config, _ = pretrained.open_model(workdir)  # the workdir stands for the weights
    tokens = np.arange(12, dtype=np.int32).reshape(2, 6) * 7
    theirs = logits.logits(importers.load(folder, dtype="float32"), tokens)
    np.testing.assert_allclose(logits.logits(model, tokens), theirs, rtol=1e-6, atol=1e-6)
    assert config.data.tokenizer == f"pretrained:{folder}"


def test_a_damaged_folder_leaves_no_workdir(folder: Path, tmp_path: Path, arguments: tuple[str, ...], capfd):
    copy = shutil.copytree(folder, tmp_path / "copy")
    os.truncate(copy / "model.safetensors", 10_000)
    command = (f"--config=configs/pretrained.py:{copy}", f"--workdir={tmp_path / 'run'}", *arguments)
    assert execute(*command) == 2 and "is damaged" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_evaluation_needs_held_out_text_only(
    folder: Path, tmp_path: Path, arguments: tuple[str, ...], capfd, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(folder.parent)  # a relative folder is remembered as the place that it was
    root = Path(__file__).parents[1]
    command = [f"--config={root}/configs/pretrained.py:{folder.name}", f"--workdir={tmp_path / 'run'}", *arguments]
    command = [*command, "--config.data.domains={'a': {'test': 'test/a.txt'}}"]
    assert execute(*command) == 0 and "perplexity" in capfd.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert pretrained.open_model(tmp_path / "run")[1].init_from == str(folder.resolve())
    assert execute(*command, "--config.train.steps=1") == 2


def test_a_tokenizer_with_more_ids_than_the_model(folder: Path):
    _, config, _ = pretrained.open_model(folder)
    with pytest.raises(ConfigError, match=r"tokens, and the model 100: it is the tokenizer of another model"):
        generate.tokenizer_of(config.data, {}, 100)


def test_a_limit_is_the_configs_and_changes_what_is_read(folder: Path, tmp_path: Path, arguments: tuple[str, ...]):
    shares = {}
    for factor in ("0.0", "0.5"):
        workdir = tmp_path / factor
        command = (f"--config=configs/pretrained.py:{folder}", f"--workdir={workdir}", *arguments)
        assert execute(*command, f"--config.model.moe.capacity_factor={factor}") == 0
        (load,) = [r for r in metrics.read_metrics(workdir / "metrics.jsonl") if r["kind"] == "final_load"]
        shares[factor] = load["dropped_share"]
    assert max(shares["0.0"]) == 0 and min(shares["0.5"]) > 0.3


def test_fine_tuning_begins_from_the_folder(folder: Path, tmp_path: Path, arguments: tuple[str, ...]):
    workdir = tmp_path / "tuned"
    assert (
        execute(
            f"--config=configs/pretrained.py:{folder}", f"--workdir={workdir}", *arguments, "--config.train.steps=2",
            "--config.train.learning_rate=1e-30",
        )
        == 0
    )  # fmt: skip
    arrays, meta = checkpoint.read_all(workdir / "checkpoints" / "2")
    assert meta["init_from"]["weights"] == pretrained.fingerprint(folder)
    given = checkpoint.flatten(pretrained.open_model(folder, compute_dtype="float32")[0])
    for name, value in given.items():
        np.testing.assert_allclose(arrays[f"params/{name}"], np.asarray(value), rtol=1e-5, atol=1e-7)
    model, config, _ = pretrained.open_model(workdir)
    assert config.model.attention.qk_norm_over == "projection" and model.config.dim == MODEL.dim


def test_other_weights_in_the_folder_are_noticed(folder: Path, tmp_path: Path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    known = pretrained.origin(copy)
    pretrained.still(known)
    importers.write(build(MODEL, seed=2), MODEL, tmp_path / "other", family="olmoe")
    shutil.copy(tmp_path / "other" / "model.safetensors", copy)
    with pytest.raises(ConfigError, match="now holds other weights"):
        pretrained.still(known)
    shutil.rmtree(copy)
    with pytest.raises(ConfigError, match="is gone"):
        pretrained.still(known)


def test_a_workdir_whose_facts_are_damaged_does_not_pass_for_one_without(folder: Path, tmp_path: Path):
    """env.json has the hash of the weights: read past, others in their place would go unseen."""
    run = dataclasses.replace(pretrained.stored_config(folder), model_from="config")
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, steps=0))
    (tmp_path / "config.json").write_text(json.dumps(to_dict(run)))
    assert pretrained.stored_config(tmp_path).init_from == str(folder)  # interrupted before it was written
    for damaged in ("{", "[]", '"a'):
        (tmp_path / "env.json").write_text(damaged)
        with pytest.raises(ConfigError, match=r"env\.json is no JSON object .*: restore it, or give"):
            pretrained.stored_config(tmp_path)


def test_a_model_that_is_not_the_folders_is_told_field_by_field(folder: Path):
    other = dataclasses.replace(MODEL, norm_eps=1e-4, compute_dtype="bfloat16", remat="block")
    with pytest.raises(ConfigError, match=r"holds another model: model\.norm_eps=1e-06, 0\.0001 \(there, here\)"):
        pretrained.check_fit(pretrained.origin(folder), other)
    pretrained.check_fit(pretrained.origin(folder), dataclasses.replace(other, norm_eps=MODEL.norm_eps))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_from": ""}, "needs init_from=DIR"),
        ({"init_from": "nowhere"}, "no finished checkpoint there"),
        ({"model": ModelConfig(dim=7)}, r"model\.dim=7 is not read with model_from='init_from'"),
        ({"model": ModelConfig(moe=MoEConfig(router=RouterConfig(k=1)))}, r"model\.moe\.router\.k=1 is not read"),
    ],
)
def test_what_cannot_be_adopted(folder: Path, changes: dict, message: str):
    config = ExperimentConfig(init_from=str(folder), model_from="init_from")
    with pytest.raises(ConfigError, match=message):
        pretrained.adopt(dataclasses.replace(config, **changes))


def test_choices_are_the_configs_and_the_rest_is_the_folders(folder: Path):
    asked = ModelConfig(compute_dtype="bfloat16", moe=MoEConfig(capacity_factor=1.5, implementation="ref"))
    config = pretrained.adopt(ExperimentConfig(init_from=str(folder), model_from="init_from", model=asked))
    assert config.model.compute_dtype == "bfloat16" and config.model.moe.capacity_factor == 1.5
    assert config.model.moe.implementation == "ref" and config.model.dim == MODEL.dim
    assert config.model.moe.router == MODEL.moe.router


def test_what_is_said_of_a_model_that_is_not_known_yet_waits_for_it(folder: Path):
    """Limits and ranks are held against the folder's model, and not against the one that stands in its place."""
    asked = ModelConfig(moe=MoEConfig(capacity_limits=("token_drop:factor=1",), virtual_ranks=1))
    config = ExperimentConfig(init_from=str(folder), model_from="init_from", train=TrainConfig(steps=0), model=asked)
    layers = len(moe_layer_ids(config.model))
    assert (layers, config.model.moe.num_experts) != (1, 4)  # the folder has one layer of four experts
    for text in ("threshold_drop:threshold=0.2", "device_budget:factor=1,ranks=4", "expert_drop:experts=3"):
        moe = dataclasses.replace(asked.moe, capacity_limits=(text,))
        one = dataclasses.replace(config, model=dataclasses.replace(asked, moe=moe))
        validate.check(one)
        validate.check(pretrained.adopt(one))
    for text in ("threshold_drop:threshold=" + "/".join(["0.2"] * (layers + 1)), "expert_drop:experts=4"):
        moe = dataclasses.replace(asked.moe, capacity_limits=(text,))
        one = dataclasses.replace(config, model=dataclasses.replace(asked, moe=moe))
        validate.check(one)
        with pytest.raises(ConfigError):
            pretrained.adopt(one)


def test_limits_that_stay_behind_are_told(folder: Path, monkeypatch: pytest.MonkeyPatch):
    config = ExperimentConfig(init_from=str(folder), model_from="init_from")
    assert pretrained.limits_left_out(config) is None
    text = "threshold_drop:threshold=0.2,gap=0.01"
    theirs = ExperimentConfig(
        model=dataclasses.replace(MODEL, moe=dataclasses.replace(MODEL.moe, capacity_limits=(text,)))
    )
    monkeypatch.setattr(pretrained, "stored_config", lambda path: theirs)
    assert pretrained.limits_left_out(config) == f"\"--config.model.moe.capacity_limits=('{text}',)\""
    mine = dataclasses.replace(config, model=ModelConfig(moe=MoEConfig(capacity_factor=1.5)))
    assert pretrained.limits_left_out(mine) is None and pretrained.limits_left_out(theirs) is None


def run(module, *arguments: str) -> int:
    return session.call(module.define_flags, module.command, arguments)


def test_generate_streams_until_an_end_token(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch):
    assert run(generate, f"--checkpoint={folder}", "--prompt=the cat", "--max_new_tokens=6", "--dtype=float32") == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("the cat") and "6 tokens, too few to time" in captured.err
    model, config, _ = pretrained.open_model(folder, compute_dtype="float32")
    tokenizer = generate.tokenizer_of(config.data, {})
    made: list[int] = []
    text = "".join(generate.stream(model, tokenizer, "the cat", 6, made=made))
    assert captured.out == f"the cat{text}\n" and len(made) == 6
    tokenizer.stop_ids = (0, made[2])
    again: list[int] = []
    list(generate.stream(model, tokenizer, "the cat", 6, made=again))
    assert again == made[: made.index(made[2]) + 1]
    assert run(generate, f"--checkpoint={folder}", "--prompt=the", "--chat") == 2
    assert "no chat template" in capsys.readouterr().err
    assert run(generate, f"--checkpoint={folder}", "--prompt=") == 2
    assert "give some text" in capsys.readouterr().err


@pytest.mark.parametrize("mesh", ["data=2,expert=4", "data=1,expert=2"])
def test_logits_on_a_mesh_are_those_of_one_device(folder: Path, tmp_path: Path, mesh: str):
    np.save(tmp_path / "tokens.npy", np.arange(30, dtype=np.int32).reshape(5, 6))
    common = (f"--checkpoint={folder}", f"--tokens={tmp_path / 'tokens.npy'}", "--dtype=float32")
    assert run(logits, *common, f"--output={tmp_path / 'one.npy'}") == 0
    assert run(logits, *common, f"--output={tmp_path / 'many.npy'}", f"--mesh={mesh}", "--batch_size=3") == 0
    one, many = (np.load(tmp_path / f"{name}.npy") for name in ("one", "many"))
    np.testing.assert_allclose(many, one, rtol=1e-5, atol=1e-5)


def test_a_mesh_that_cannot_be(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    np.save(tmp_path / "tokens.npy", np.zeros((1, 2), np.int32))
    common = (f"--checkpoint={folder}", f"--tokens={tmp_path / 'tokens.npy'}", f"--output={tmp_path / 'o.npy'}")
    for mesh, message in (("data=64", "64 devices, 8 are there"), ("experts=2", "not AXIS=DEVICES")):
        assert run(logits, *common, f"--mesh={mesh}") == 2
        assert message in capsys.readouterr().err
