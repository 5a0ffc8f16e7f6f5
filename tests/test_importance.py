"""Neuron importance against slow loops over pairs; what is measured moves no number, and streams."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax import checkpoint, importance, moe, neurons
from moejax.config import ConfigError, RouterConfig
from moejax.dispatch import emulated
from moejax.importance import Importance, leading_losses, measure
from moejax.model import Decoder, build, layer_groups, moe_layer_ids
from moejax.neurons import METRICS
from moejax.partition import reconstruct, stored
from moejax.types import ExpertWeights, RouteContext
from tests import moe_fakes as fakes
from tests.small import quick_compilation
from tests.trace_fakes import batches, mesh_of

F = fakes.EXPERT_DIM


@pytest.fixture(scope="module", autouse=True)
def quickly(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with quick_compilation(tmp_path_factory.mktemp("programs")):
        yield


# --- the sums -----------------------------------------------------------------------------------------------------


def of_pair(x: np.ndarray, weight: float, w: ExpertWeights, e: int, activation: str) -> dict[str, np.ndarray]:
    """The five numbers of each neuron of expert e for one pair, in float64."""

    def projected(name: str) -> np.ndarray | None:
        matrix, bias = getattr(w, name), getattr(w, f"{name}_bias")
        if matrix is None:
            return None
        return fakes.f64(x) @ fakes.f64(matrix[e]) + (0 if bias is None else fakes.f64(bias[e]))

    up, gate = projected("up"), projected("gate")
    assert up is not None
    if activation == "swiglu_clamped":
        assert gate is not None
        gate = np.minimum(gate, 7)
        act, up = gate * fakes.sigmoid(1.702 * gate), np.clip(up, -7, 7) + 1
    elif activation == "swiglu":
        assert gate is not None
        act = gate * fakes.sigmoid(gate)
    elif activation == "geglu":
        act = fakes.gelu(gate)
    else:  # without a gate: up is what is activated, and there is nothing to multiply
        act, up = (fakes.gelu(up) if activation == "gelu" else np.maximum(up, 0)), np.ones(F)
    hidden = act * up
    norm = np.sqrt((fakes.f64(w.down[e]) ** 2).sum(axis=-1))
    return {
        "gate": act, "gate_abs": np.abs(act), "gate_up": hidden, "gate_up_abs": np.abs(hidden),
        "output": weight * np.abs(hidden) * norm,
    }  # fmt: skip


def assert_sums(made: Any, pairs: list[tuple[int, dict[str, np.ndarray]]], experts: int) -> None:
    for name in METRICS:
        expected = np.zeros((experts, F))
        for e, values in pairs:
            expected[e] += values[name]
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(getattr(made, name), expected, rtol=1e-4, atol=1e-5, err_msg=name)
    np.testing.assert_array_equal(made.pairs, np.bincount([e for e, _ in pairs], minlength=experts))


@pytest.mark.parametrize(
    ("activation", "bias"),
    [("swiglu", False), ("geglu", True), ("gelu", True), ("relu", False), ("swiglu_clamped", True)],
)
def test_sums_are_those_of_a_loop_over_pairs(activation: Any, bias: bool):
    rng = np.random.default_rng(1)
    layer = fakes.small_layer(activation=activation, expert_bias=bias)
    weights = layer.store.get()
    assert (weights.up_bias is not None) == bias and (weights.gate is None) == (activation in ("gelu", "relu"))
    sizes = np.array([3, 0, 5, 1, 0, 2, 4, 0])  # the first, a middle and the last expert differ; some have no row
    xs = rng.normal(size=(sizes.sum() + 3, fakes.DIM)).astype(np.float32) * 2
    xs[sizes.sum() :] = np.nan  # belong to no pair
    weight = rng.uniform(0.1, 1, len(xs)).astype(np.float32)
    made = jax.jit(neurons.sums, static_argnums=4)(xs, weight, sizes, weights, activation)
    owner = np.repeat(np.arange(len(sizes)), sizes)
    pairs = [(e, of_pair(x, float(w), weights, e, activation)) for e, x, w in zip(owner, xs, weight, strict=False)]
    assert_sums(made, pairs, len(sizes))


ROUTERS = {
    "two_devices": {},
    "sigmoid_bias": {"router": fakes.router_config("sigmoid_bias", scale=2.5), "zero_experts": 4},
    "expert_choice": {"router": fakes.router_config("expert_choice")},
    "weigh_input": {"weigh": "input"},
}


@pytest.mark.parametrize("name", ROUTERS)
def test_a_layer_sums_over_the_pairs_of_real_tokens(name: str):
    layer = fakes.small_layer(implementation="ref", **ROUTERS[name])
    x = np.random.default_rng(2).normal(size=(2, 8, fakes.DIM)).astype(np.float32)
    mask = np.ones((2, 8), bool)
    mask[0, 5:], mask[1, 2] = False, False

    @jax.jit
    def run(layer: moe.MoELayer, x: jax.Array, mask: jax.Array) -> Any:
        return layer.reported(x, RouteContext(mask=mask, record=True, neurons=True), ())[1]

    with emulated(2 if name == "two_devices" else 1):
        report = run(layer, x, mask)
    assert report.record.kept.expert.shape[0] == (2 if name == "two_devices" else 1)
    tokens, weights, pairs = x.reshape(-1, fakes.DIM), layer.store.get(), []
    tables = report.record.kept
    for rank in range(tables.expert.shape[0]):  # each rank has its own tokens
        table = jax.tree.map(lambda leaf, rank=rank: np.asarray(leaf)[rank], tables)
        first = rank * len(tokens) // tables.expert.shape[0]
        for r, k in np.argwhere(table.valid):
            t = first + (r if table.token is None else int(table.token[r]))
            assert mask.reshape(-1)[t]
            e, weight = int(table.expert[r, k]), float(table.weight[r, k])
            if e >= fakes.EXPERTS:
                continue  # has no neurons
            seen, weight = (tokens[t] * weight, 1.0) if name == "weigh_input" else (tokens[t], weight)
            pairs.append((e, of_pair(seen, weight, weights, e, "swiglu")))
    assert_sums(report.neurons, pairs, fakes.EXPERTS)


def test_the_program_is_unchanged_when_off(monkeypatch: pytest.MonkeyPatch):
    model = fakes.small_model(num_layers=1)

    def lowered(on: bool) -> str:
        run = jax.jit(lambda model, tokens: jax.tree.leaves(model(tokens, neurons=on)))
        return run.lower(model, jnp.zeros((2, 4), jnp.int32)).as_text()

    off = lowered(False)

    def never(*args: Any) -> None:
        raise AssertionError("neurons were measured")

    monkeypatch.setattr(moe.neurons, "of_layer", never)
    assert lowered(False) == off
    with pytest.raises(AssertionError, match="neurons were measured"):
        lowered(True)


def test_tokens_that_travel_are_refused():
    layer = fakes.small_layer(dispatcher="ep")
    x = jnp.zeros((2, 4, fakes.DIM))
    with emulated(2), pytest.raises(ConfigError, match=r"moe.dispatcher='ep': neurons are measured where the tokens"):
        jax.eval_shape(lambda: layer.reported(x, RouteContext(neurons=True), ()))
    dense = fakes.small_layer(dispatcher="dense")
    with pytest.raises(ConfigError, match="set it to 'local'"):
        jax.eval_shape(lambda: dense.reported(x, RouteContext(neurons=True), ()))


# --- the pass -----------------------------------------------------------------------------------------------------


def model_of(**moe_settings: Any) -> Decoder:
    return fakes.small_model(moe={"router": RouterConfig(), **moe_settings})


@pytest.fixture(scope="module")
def model() -> Decoder:
    return model_of()


@pytest.fixture(scope="module")
def measured(model: Decoder) -> Importance:
    return measure(model, batches(), mesh_of(1))


def assert_equal(a: Importance, b: Importance, rtol: float) -> None:
    for name in METRICS:
        np.testing.assert_allclose(a.sums[name], b.sums[name], rtol=rtol, atol=1e-4 if rtol > 1e-9 else 0)
    np.testing.assert_array_equal(a.pairs, b.pairs)
    assert a.tokens == b.tokens


def test_two_calls_are_one_and_limits_take_no_part(model: Decoder, measured: Importance):
    first, second = batches()
    parts = measure(model_of(capacity_factor=0.25), [first], mesh_of(1)) + measure(model, [second], mesh_of(1))
    assert_equal(parts, measured, 1e-12)
    assert measured.tokens == sum(int(b["mask"].sum()) for b in batches())
    k, layers = model.config.moe.router.k, 2
    np.testing.assert_array_equal(measured.pairs.sum(axis=1), np.full(layers, k * measured.tokens))
    assert all(np.ptp(values.sum(axis=(1, 2))) > 0 for values in measured.sums.values())  # layers differ


@pytest.mark.slow
def test_devices_share_the_text(model: Decoder, measured: Importance):
    """Also those of an expert axis, whatever the checkpoint's dispatcher: each computes its own tokens."""
    changed = dataclasses.replace(model.config, moe=dataclasses.replace(model.config.moe, dispatcher="ep"))
    graph, state = jax.tree.flatten(model)[1], jax.tree.leaves(model)
    ep = jax.tree.unflatten(graph, state)
    ep.config = changed
    assert_equal(measure(ep, batches(), mesh_of(4)), measured, 1e-4)


def test_no_text(model: Decoder):
    with pytest.raises(ConfigError, match="there is no text to measure"):
        measure(model, [], mesh_of(1))
    padding = batches(1)[0] | {"mask": np.zeros_like(batches(1)[0]["mask"])}
    with pytest.raises(ConfigError, match="there is no text to measure"):
        measure(model, [padding], mesh_of(1))


def test_a_broken_model_has_no_order(model: Decoder):
    """Every loss is NaN then, and none of the metrics "loses least"."""
    graph, *states = nnx.split(model, nnx.Param, ...)
    for name, why in (("/moe/store/gate", r"layer \d: what its neurons do is NaN"), ("embed", "NaN")):
        arrays = {path: np.asarray(leaf).copy() for path, leaf in checkpoint.flatten(states[0]).items()}
        next(array for path, array in arrays.items() if path.endswith(name) or name in path).fill(np.nan)
        params = jax.tree.unflatten(jax.tree.structure(states[0]), list(map(jnp.asarray, arrays.values())))
        broken = nnx.merge(graph, params, *states[1:])
        with pytest.raises(FloatingPointError, match=why):
            measure(broken, batches(1), mesh_of(1))
    orders = {"x": np.broadcast_to(np.arange(F), (len(moe_layer_ids(model.config)), model.config.moe.num_experts, F))}
    with pytest.raises(FloatingPointError, match="leading 4 neurons by 'x' is nan"):
        leading_losses(broken, orders, 4, batches(1), mesh_of(1))


def by_path(model: Decoder) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in checkpoint.flatten(nnx.state(model, nnx.Param)).items()}


def with_arrays(config: Any, arrays: dict[str, np.ndarray]) -> Decoder:
    """A model of ``config`` with these parameters, by path."""
    graph, params, rest = nnx.split(jax.eval_shape(lambda: build(config)), nnx.Param, ...)
    flat = {
        path: leaf.replace(jnp.asarray(arrays["/".join(map(str, path))])) for path, leaf in nnx.to_flat_state(params)
    }
    return nnx.merge(graph, nnx.from_flat_state(flat), rest)


def test_a_sorted_model_is_the_same_model_in_order(model: Decoder, measured: Importance):
    order = reconstruct.order(measured.sums["output"])
    assert (order != np.arange(F)).any(axis=-1).all()
    arrays, moved = reconstruct.reconstructed(by_path(model), importance.by_store(model.config, order))
    assert [name.rpartition("/")[2] for name in moved] == ["down", "gate", "up"]
    again = with_arrays(model.config, arrays)
    after = measure(again, batches(), mesh_of(1))
    for name in METRICS:  # each layer's own neurons, moved as told: the same numbers at other places
        expected = np.take_along_axis(measured.sums[name], order, axis=-1)
        np.testing.assert_allclose(after.sums[name], expected, rtol=1e-4, atol=1e-4)
    assert (np.diff(after.sums["output"], axis=-1) < 1e-4).all()
    tokens = fakes.tokens(2, 6)
    run = jax.jit(lambda model: model(tokens).logits)
    np.testing.assert_allclose(run(again), run(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", ["part", pytest.param("expert", marks=pytest.mark.slow)])
def test_an_expert_in_parts_is_measured_as_one(order: Any, model: Decoder, measured: Importance):
    config = dataclasses.replace(model.config, moe=dataclasses.replace(model.config.moe, parts=2, part_order=order))
    arrays = stored.split_checkpoint(by_path(model), model.config.moe, 2, "partial", order)
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    assert_equal(measure(with_arrays(config, arrays), batches(), mesh_of(1)), measured, 1e-4)


def test_layers_find_their_stores():
    """Layers 0, 1, 3 and 4 of a pattern of two MoE layers and a dense one, twice."""
    config = fakes.model_config(num_layers=6, moe={"dense_layers": (2, 5)})
    assert layer_groups(config) == [((True, True, False), 2)]
    made = importance.by_store(config, np.array(moe_layer_ids(config)))
    expected = {"groups/0/blocks/0/moe/store": [0, 3], "groups/0/blocks/1/moe/store": [1, 4]}
    assert {path: values.tolist() for path, values in made.items()} == expected
    there = checkpoint.flatten(nnx.state(jax.eval_shape(lambda: build(config)), nnx.Param))
    assert {path.rpartition("/")[0] for path in there if "/store/" in path} == set(made)


def test_losses_are_those_of_experts_that_have_no_other_neurons(model: Decoder, measured: Importance):
    """A model with narrower experts, cut out of the sorted arrays, has the loss that the judge tells. Of their down
    bias they have the share that halved pairs have."""
    columns, orders = 3, {"gate": reconstruct.order(measured.sums["gate"])}
    model = fakes.filled(lambda: build(dataclasses.replace(
        model.config, moe=dataclasses.replace(model.config.moe, expert_bias=True)
    )))  # fmt: skip
    texts = [batch | {"targets": batch["targets"] % fakes.VOCAB} for batch in batches()]
    told = leading_losses(model, orders, columns, texts, mesh_of(1))
    arrays, _ = reconstruct.reconstructed(by_path(model), importance.by_store(model.config, orders["gate"]))
    narrow = dataclasses.replace(model.config, moe=dataclasses.replace(model.config.moe, expert_dim=columns))
    cut = {
        name: array[..., :columns, :] if name.endswith("store/down")
        else array * np.float32(columns / F) if name.endswith("down_bias")
        else array[..., :columns] if "/store/" in name else array
        for name, array in arrays.items()
    }  # fmt: skip
    total = tokens = 0.0
    run, made = jax.jit(lambda model, tokens, given: model(tokens, **given).logits), with_arrays(narrow, cut)
    for batch in texts:
        logits = fakes.f64(run(made, batch["tokens"], {key: batch[key] for key in importance.SEEN[1:]}))
        logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        nll = -np.take_along_axis(logits, batch["targets"][..., None], axis=-1)[..., 0]
        total, tokens = total + nll[batch["mask"]].sum(), tokens + batch["mask"].sum()
    np.testing.assert_allclose(told["gate"], total / tokens, rtol=1e-5)
    assert abs(told["gate"] - told["all"]) > 1e-3


# --- the file -----------------------------------------------------------------------------------------------------


def test_the_file_gives_back_what_was_measured(tmp_path: Path, measured: Importance):
    path = tmp_path / "importance.npz"
    importance.save(path, measured, {"layers": [1, 2]})
    again, meta = importance.read(path)
    assert_equal(again, measured, 0)
    assert meta["layers"] == [1, 2] and meta["tokens"] == measured.tokens
    assert set(np.load(path).files) == {*METRICS, "pairs", "meta"}


def test_a_bad_file_is_one_sentence_that_names_it(tmp_path: Path, measured: Importance):
    path, bad = tmp_path / "importance.npz", tmp_path / "bad.npz"
    importance.save(path, measured, {})
    with pytest.raises(ConfigError, match=r"none\.npz: there is no such file"):
        importance.read(tmp_path / "none.npz")
    for content in (b"", b"text", path.read_bytes()[:-100]):
        bad.write_bytes(content)
        with pytest.raises(ConfigError, match=r"bad\.npz cannot be read as neuron importance"):
            importance.read(bad)
    np.savez(bad, gate=np.zeros(3))
    with pytest.raises(ConfigError, match=r"bad\.npz cannot be read"):
        importance.read(bad)
    importance.save(bad, measured, {"version": 2})
    with pytest.raises(ConfigError, match="version 2; this program reads"):
        importance.read(bad)
    importance.save(bad, dataclasses.replace(measured, pairs=measured.pairs[1:]), {})
    with pytest.raises(ConfigError, match="do not fit together"):
        importance.read(bad)
