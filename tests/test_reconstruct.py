"""Neuron reconstruction: an exact permutation of weights and moments, and the command that sorts a checkpoint."""

import dataclasses
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from experiments import reconstruct as command
from experiments import session
from moejax import checkpoint, importance
from moejax.checkpoint import Checkpoints
from moejax.config import ExperimentConfig, MoEConfig, from_mapping, to_dict
from moejax.data import load_tokenizer
from moejax.neurons import METRICS
from moejax.partition import complete, reconstruct
from moejax.pretrained import open_model
from moejax.sharding import make_mesh
from moejax.train import Trainer
from tests import moe_fakes as fakes
from tests.small import flat, quick_compilation, random_batch, small_config, small_model, start, write_texts

L, E, D, F = 2, 3, 4, 8
SHAPES = {"up": (D, F), "gate": (D, F), "down": (F, D), "up_bias": (F,), "gate_bias": (F,), "down_bias": (D,)}


@pytest.fixture(scope="module", autouse=True)
def quickly(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with quick_compilation(tmp_path_factory.mktemp("programs")):
        yield


def store(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=(L, E, *shape)).astype(np.float32) for name, shape in SHAPES.items()}


def an_order(seed: int = 0) -> np.ndarray:
    return reconstruct.order(np.random.default_rng(seed).normal(size=(L, E, F)))


# --- orders -------------------------------------------------------------------------------------------------------


def test_the_most_important_first_and_equal_ones_as_they_stood():
    assert reconstruct.order(np.array([[0.5, 2.0, 0.5, -1.0, 2.0, 0.0]])).tolist() == [[1, 4, 0, 2, 5, 3]]
    assert reconstruct.order(np.zeros((1, 5))).tolist() == [[0, 1, 2, 3, 4]]
    assert reconstruct.leading(np.array([[1, 4, 0, 2, 5, 3]]), 2).tolist() == [[False, True, False, False, True, False]]


def test_each_array_follows_the_order_neuron_by_neuron():
    arrays, order = store(), an_order()
    for name, array in arrays.items():
        made = reconstruct.permuted(name, array, order)
        for layer, e in np.ndindex(L, E):
            for place, n in enumerate(order[layer, e]):
                if name == "down_bias":
                    np.testing.assert_array_equal(made, array)
                elif name == "down":
                    np.testing.assert_array_equal(made[layer, e, place], array[layer, e, n])
                else:
                    np.testing.assert_array_equal(made[layer, e, ..., place], array[layer, e, ..., n])
        back = reconstruct.permuted(name, made, reconstruct.inverse(order))
        np.testing.assert_array_equal(back, array)  # bit for bit


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("parts", [2, 4])
def test_an_expert_in_parts_is_sorted_as_a_whole(parts: int, apart: bool):
    moe, order = MoEConfig(num_experts=E, expert_dim=F, expert_bias=True), an_order()

    def in_parts(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        stored = {f"store/{name}": array for name, array in arrays.items()}
        made = complete.split_arrays(stored, moe, parts, "partial", part_order="part" if apart else "expert")
        return {name.removeprefix("store/"): np.asarray(array) for name, array in made.items()}

    arrays = store()
    sorted_first = in_parts({name: reconstruct.permuted(name, array, order) for name, array in arrays.items()})
    for name, array in in_parts(arrays).items():
        assert array.shape[1] == E * parts
        made, _ = reconstruct.reconstructed({f"moe/store/{name}": array}, {"moe/store": order}, apart)
        np.testing.assert_array_equal(made[f"moe/store/{name}"], sorted_first[name], err_msg=name)
    bias = arrays["up_bias"]  # a number of each neuron, as importance is
    np.testing.assert_array_equal(reconstruct.in_parts(bias, parts, apart), in_parts(arrays)["up_bias"])
    np.testing.assert_array_equal(reconstruct.joined(in_parts(arrays)["up_bias"], parts, apart), bias)


def test_an_order_of_other_neurons_is_refused():
    for shape in ((L, E, D, F + 1), (L, E + 1, D, F), (L + 1, E, D, F)):
        with pytest.raises(ValueError, match="does not hold the neurons"):
            reconstruct.permuted("up", np.zeros(shape), an_order())


def test_shares_are_sums_of_the_leading_neurons():
    rng = np.random.default_rng(3)
    values = rng.normal(size=(L, E, F))  # signed: what is below 0 counts as 0
    values[1, 2] = -1.0
    order, columns = reconstruct.order(values), [1, 4, F]
    for given in (None, order):
        made = reconstruct.shares(values, given, columns)
        for layer, e in np.ndindex(L, E):
            row = values[layer, e] if given is None else values[layer, e][given[layer, e]]
            positive = [max(v, 0.0) for v in row]
            expected = [sum(positive[:m]) / sum(positive) if sum(positive) else np.nan for m in columns]
            np.testing.assert_allclose(made[layer, e], expected)
    assert np.isnan(made[1, 2]).all() and (made[0, :, -1] == 1).all()


def test_agreement_counts_leading_neurons_in_common():
    a, b = np.array([[[0, 1, 2, 3], [0, 1, 2, 3]]]), np.array([[[1, 0, 3, 2], [3, 1, 2, 0]]])
    np.testing.assert_array_equal(reconstruct.agreement(a, b, 2), [[1.0, 0.5]])
    np.testing.assert_array_equal(reconstruct.agreement(a, a, 3), [[1.0, 1.0]])


# --- a training state -----------------------------------------------------------------------------------------------


def trainer(**moe: Any) -> Trainer:
    config = small_config(dataclasses.replace(small_model(first_dense=0, every=1, **moe), num_layers=2))
    return Trainer(config, np.ones(64), make_mesh(config.mesh, jax.devices()[:1]))


def test_moments_move_with_their_parameters_and_nothing_else_does():
    made = trainer(expert_bias=True)
    rng = np.random.default_rng(0)
    arrays = {n: rng.normal(size=leaf.shape) for n, leaf in checkpoint.flatten(made.abstract).items()}
    order = reconstruct.order(rng.normal(size=(2, 4, 8)))
    orders = importance.by_store(made.config.model, order)
    changed, moved = reconstruct.reconstructed(arrays, orders)
    names = ["down", "gate", "gate_bias", "up", "up_bias"]
    heads = ["params", "opt_state/1/0/mu", "opt_state/1/0/nu"]
    assert sorted(moved) == sorted(f"{head}/groups/0/blocks/0/moe/store/{name}" for head in heads for name in names)
    for name, array in arrays.items():
        assert (changed[name] is array) == (name not in moved)
        if name in moved:
            expected = reconstruct.permuted(name.rpartition("/")[2], array, order)
            np.testing.assert_array_equal(changed[name], expected)
    back, _ = reconstruct.reconstructed(changed, {path: reconstruct.inverse(o) for path, o in orders.items()})
    for name, array in arrays.items():
        np.testing.assert_array_equal(back[name], array)


@pytest.mark.slow
def test_training_goes_on_as_it_would_have():
    """A step of the sorted state is the step of the state, sorted."""
    made = trainer()
    order = reconstruct.order(np.random.default_rng(0).normal(size=(2, 4, 8)))
    orders = importance.by_store(made.config.model, order)

    def sorted_(state: Any) -> Any:
        arrays, _ = reconstruct.reconstructed(flat(state), orders)
        leaves = [arrays[name] for name in checkpoint.flatten(state)]
        return jax.device_put(jax.tree.unflatten(jax.tree.structure(state), leaves), made.shardings)

    with jax.set_mesh(made.mesh):
        state, _ = made.step(start(made), random_batch(seed=0))
        expected, _ = made.step(jax.tree.map(lambda leaf: leaf + 0, state), random_batch(seed=1))
        got, _ = made.step(sorted_(state), random_batch(seed=1))
    want = flat(sorted_(expected))
    for name, array in flat(got).items():
        np.testing.assert_allclose(
            array, want[name], rtol=2e-3, atol=2e-5, err_msg=name
        )  # Adam divides by small moments


# --- the command --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random parameters, and the texts that its config names."""
    folder = tmp_path_factory.mktemp("run")
    write_texts(folder)
    domains = {name: {split: f"{split}/{name}.txt" for split in ("train", "valid", "test")} for name in ("a", "b")}
    model = dataclasses.replace(small_model(first_dense=0, every=1), num_layers=2, vocab_size=320)
    plain = to_dict(small_config(model))
    plain["data"] |= {
        "source": "files", "root": str(folder), "cache_dir": str(folder / "cache"), "domains": domains, "seq_len": 16,
    }  # fmt: skip
    plain["eval"]["batch_size"] = 8
    config = from_mapping(ExperimentConfig, plain)
    made = Trainer(config, np.ones(320), make_mesh(config.mesh, jax.devices()[:1]))
    checkpoints = Checkpoints(folder / "checkpoints")
    meta = {"step": 7, "config": plain, "data": {"tokenizer": load_tokenizer("byte").hash}}
    checkpoints.save(7, start(made), meta, score=1.0)
    checkpoints.close()
    return folder


def run(*arguments: str) -> int:
    return session.call(command.define_flags, command.command, arguments)


@pytest.fixture(scope="module")
def sorted_one(workdir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("out") / "sorted"
    assert run(f"--checkpoint={workdir}", f"--output={output}", "--tokens=700", "--devices=1") == 0
    return output


def arrays_of(folder: Path) -> dict[str, np.ndarray]:
    return checkpoint.read_all(checkpoint.locate(folder))[0]


def test_the_sorted_checkpoint_computes_the_same(workdir: Path, sorted_one: Path):
    made, meta = importance.read(sorted_one / "importance.npz")
    assert made.tokens + meta["judged_tokens"] == 1400 and meta["text"]["split"] == "train"
    assert meta["metric"] == min(METRICS, key=meta["losses"].__getitem__) and meta["commit"]
    assert set(meta["losses"]) == {*METRICS, "as stored", "all"} and meta["checkpoint"]["step"] == 7
    before, after = arrays_of(workdir), arrays_of(sorted_one)
    expected, moved = reconstruct.reconstructed(before, {"groups/0/blocks/0/moe/store": made.orders()[meta["metric"]]})
    assert len(moved) == 9
    assert before.keys() == after.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(after[name], array, err_msg=name)
    (old, config, _), (new, same, found) = open_model(workdir), open_model(sorted_one)
    assert same == config and found["step"] == 7 and found["made_by"][0]["metric"] == meta["metric"]
    tokens = fakes.tokens(2, 6)
    forward = jax.jit(lambda model: model(tokens).logits)
    np.testing.assert_allclose(forward(new), forward(old), rtol=1e-5, atol=1e-5)


def test_another_metric_without_another_pass(
    workdir: Path, sorted_one: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = sorted_one / "importance.npz"
    again = [f"--checkpoint={workdir}", f"--importance={file}", "--metric=gate_abs"]
    assert run(*again, f"--output={tmp_path / 'new'}") == 0
    said = capsys.readouterr().err
    assert (
        "9 arrays sorted" in said and "training goes on" in said and "share of 'gate_abs' in the leading 4 of 8" in said
    )
    made, meta = importance.read(tmp_path / "new" / "importance.npz")
    assert meta["metric"] == "gate_abs"
    up = "params/groups/0/blocks/0/moe/store/up"
    expected = reconstruct.permuted("up", arrays_of(workdir)[up], made.orders()["gate_abs"])
    np.testing.assert_array_equal(arrays_of(tmp_path / "new")[up], expected)
    # nothing is written without --output, and the sums are of the weights that they were measured on
    assert run(*again) == 0 and "nothing is written" in capsys.readouterr().err
    assert run(f"--checkpoint={sorted_one}", f"--importance={file}") == 2
    assert "give the checkpoint that it was measured on (not the sorted one)" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_ctrl_c_leaves_nothing(
    workdir: Path,
    sorted_one: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    call, known = [f"--checkpoint={workdir}", f"--output={tmp_path / 'new'}"], sorted_one / "importance.npz"

    def interrupted(*args: Any, **more: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    reading, writing = (command, "in_turn", "--devices=1"), (importance, "save", f"--importance={known}")
    for place, name, more in (reading, writing):
        with monkeypatch.context() as patched:
            patched.setattr(place, name, interrupted)
            assert run(*call, more) == 130
        assert "interrupted: nothing was written" in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []


def test_what_cannot_work_is_one_sentence_and_no_folder(
    workdir: Path, sorted_one: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    good = {"checkpoint": str(workdir), "output": str(tmp_path / "new"), "devices": "1"}
    bad = {
        ("checkpoint", ""): "--checkpoint is missing",
        ("checkpoint", str(tmp_path)): "no finished checkpoint there",
        ("output", str(sorted_one)): "is there and not empty",
        ("output", str(tmp_path / "no" / "new")): "there is no folder",
        ("split", "test"): "--split=test: results are reported on that text",
        ("split", "dev"): "split=dev",
        ("metric", "size"): "metric=size",
        ("major", "8"): "--major=8: of 8 neurons of an expert, choose more than 0 and fewer than all",
        ("domains", "a,c"): "--domains=c: the domains with a 'train' split are a, b",
        ("importance", str(tmp_path / "none.npz")): "none.npz: there is no such file",
        ("config", "configs/quickstat.py"): "there is no such file; did you mean configs/quickstart.py?",
        ("token", "5"): "token",
    }
    for (name, value), message in bad.items():
        arguments = {k: v for k, v in {**good, name: value}.items() if not (name == "importance" and k == "devices")}
        assert run(*(f"--{k}={v}" for k, v in arguments.items())) == 2, name
        said = capsys.readouterr().err
        assert message in said and "Traceback" not in said, (name, said)
    assert run(*(f"--{k}={v}" for k, v in good.items()), f"--importance={sorted_one / 'importance.npz'}") == 2
    assert "stands in place of a pass over text: leave --devices out" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_some_batches_judge_and_are_in_no_sum():
    def kept(count: int) -> tuple[list[Any], list[Any]]:
        judging: list[Any] = []
        return list(command.held_back(iter(range(count)), judging)), judging  # ty: ignore[invalid-argument-type]

    assert kept(0) == ([], [])
    assert kept(1) == ([0], [0])
    assert kept(2) == ([0], [1])
    assert kept(15) == (list(range(14)), [14])
    assert kept(16) == (list(range(15)), [15])
    assert kept(34) == ([i for i in range(34) if i not in (15, 31)], [15, 31])


@pytest.mark.parametrize("domains", ["ab", "ba", "abcd", "badcfehg"])
def test_every_domain_judges_whatever_their_number_and_order(domains: str):
    for count in (3, 16, 40):
        judging: list[Any] = []
        streams = [iter([f"{name}{i}" for i in range(count)]) for name in domains]
        summed = list(command.held_back_of_each(streams, judging))  # ty: ignore[invalid-argument-type]
        places = [2] if count == 3 else [15] if count == 16 else [15, 31]
        assert sorted(judging) == sorted(f"{name}{i}" for name in domains for i in places)
        assert len(summed) == len(domains) * count - len(judging) and not set(summed) & set(judging)
