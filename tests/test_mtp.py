"""Multi-token prediction: against DeepSeek-V3 in float64 NumPy, by the names of its published tensors."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import export, logits, session, zoo
from moejax import count, importers, losses, pretrained, validate
from moejax.config import AttentionConfig, ConfigError, MeshConfig, ModelConfig, MoEConfig, RouterConfig, config_hash
from moejax.importers.config_json import write_config
from moejax.importers.configs import read_config
from moejax.model import Decoder, ModelOutput, build
from moejax.mtp import Predictions, next_places
from moejax.plan import activations, sizes
from moejax.sharding import make_mesh
from moejax.train import StepMetrics, Trainer, TrainState, prediction_loss, token_nll
from moejax.types import MoEMetrics
from tests.goldens import TOLERANCE, error, golden, unpack, with_config
from tests.importers_fakes import SMALL as FAMILIES
from tests.importers_fakes import (
    Arrays,
    assert_equal,
    decode,
    leaves,
    small_tensors,
    write_folder,
)
from tests.small import random_batch, small_config, small_model, start

pytestmark = pytest.mark.usefixtures("compiled_once")

CASE = "deepseek_v3-base"
MODULES = 2


class Reference:
    """DeepSeek-V3 on one document, from tensors by their published names, and its modules as 2412.19437 writes them."""

    def __init__(self, raw: Mapping[str, Any], tensors: Arrays) -> None:
        self.raw = raw
        self.tensors = {name: value.astype(np.float64) for name, value in tensors.items()}

    def norm(self, x: np.ndarray, name: str, eps: float | None = None) -> np.ndarray:
        eps = self.raw["rms_norm_eps"] if eps is None else eps
        return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps) * self.tensors[name + ".weight"]

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self.tensors[name + ".weight"].T

    def rotated(self, x: np.ndarray) -> np.ndarray:
        """``x``: [S, heads, dims], pairs side by side, at positions 0 to S - 1."""
        pairs = x.shape[-1] // 2
        frequency = self.raw["rope_theta"] ** (-np.arange(pairs) / pairs)
        turn = np.exp(1j * np.arange(len(x))[:, None, None] * frequency)
        turned = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
        return np.stack([turned.real, turned.imag], -1).reshape(x.shape)

    def attention(self, x: np.ndarray, p: str) -> np.ndarray:
        raw, seq, heads = self.raw, len(x), self.raw["num_attention_heads"]
        plain, rank = raw["qk_nope_head_dim"], raw["kv_lora_rank"]
        latent = self.norm(self.linear(x, p + "q_a_proj"), p + "q_a_layernorm", 1e-6)  # whatever rms_norm_eps is
        q = self.linear(latent, p + "q_b_proj").reshape(seq, heads, -1)
        q = np.concatenate([q[..., :plain], self.rotated(q[..., plain:])], -1)
        down = self.linear(x, p + "kv_a_proj_with_mqa")
        latent = self.norm(down[:, :rank], p + "kv_a_layernorm", 1e-6)
        kv = self.linear(latent, p + "kv_b_proj").reshape(seq, heads, -1)
        k_rope = np.repeat(self.rotated(down[:, None, rank:]), heads, axis=1)
        k, v = np.concatenate([kv[..., :plain], k_rope], -1), kv[..., plain:]
        scores = np.einsum("shn,mhn->hsm", q, k) / np.sqrt(q.shape[-1])
        scores[:, ~np.tri(seq, dtype=bool)] = -np.inf
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("hsm,mhv->shv", shares / shares.sum(-1, keepdims=True), v)
        return self.linear(mixed.reshape(seq, -1), p + "o_proj")

    def ffn(self, x: np.ndarray, p: str) -> np.ndarray:
        gate = self.linear(x, p + "gate_proj")
        return self.linear(gate / (1 + np.exp(-gate)) * self.linear(x, p + "up_proj"), p + "down_proj")

    def experts(self, x: np.ndarray, p: str) -> np.ndarray:
        raw, out = self.raw, self.ffn(x, p + "shared_experts.")
        scores = 1 / (1 + np.exp(-self.linear(x, p + "gate")))
        for token, score in enumerate(scores):
            biased = (score + self.tensors[p + "gate.e_score_correction_bias"]).reshape(raw["n_group"], -1)
            best = np.argsort(-np.sort(biased, -1)[:, -2:].sum(-1))[: raw["topk_group"]]
            allowed = np.full_like(biased, -np.inf)
            allowed[best] = biased[best]
            chosen = np.argsort(-allowed.ravel())[: raw["num_experts_per_tok"]]
            for e in chosen:
                weight = score[e] / score[chosen].sum() * raw["routed_scaling_factor"]
                out[token] += weight * self.ffn(x[token : token + 1], f"{p}experts.{e}.")[0]
        return out

    def block(self, x: np.ndarray, layer: int) -> np.ndarray:
        p = f"model.layers.{layer}."
        x = x + self.attention(self.norm(x, p + "input_layernorm"), p + "self_attn.")
        z = self.norm(x, p + "post_attention_layernorm")
        return x + (self.experts if layer >= self.raw["first_k_dense_replace"] else self.ffn)(z, p + "mlp.")

    def embed(self, tokens: np.ndarray) -> np.ndarray:
        return self.tensors["model.embed_tokens.weight"][tokens]

    def logits(self, tokens: np.ndarray, *, order: str = "published", normed: bool = True) -> list[np.ndarray]:
        """``[S, V]`` of the model, then ``[S - k, V]`` of module k, as far as there are places.

        ``order``, ``normed``: the ways that the paper leaves open and that are not taken, to see that they differ.
        """
        x = self.embed(tokens)
        for layer in range(self.raw["num_hidden_layers"]):
            x = self.block(x, layer)
        read = self.norm(x, "model.norm")
        out, hidden = [self.linear(read, "lm_head")], read if normed else x
        for k in range(1, min(self.raw["num_nextn_predict_layers"], len(tokens) - 1) + 1):
            layer = self.raw["num_hidden_layers"] + k - 1
            p = f"model.layers.{layer}."
            both = [self.norm(self.embed(tokens[k:]), p + "enorm"), self.norm(hidden[:-1], p + "hnorm")]
            x = self.linear(np.concatenate(both if order == "published" else both[::-1], -1), p + "eh_proj")
            x = self.block(x, layer)
            read = self.norm(x, p + "shared_head.norm")
            hidden = read if normed else x
            out.append(self.linear(read, "lm_head"))
        return out


def published(tensors: Arrays, layers: int, modules: int, seed: int = 3) -> Arrays:
    """``tensors`` with modules under the published names, the block's shapes those of the last layer, copies too."""
    rng, added = np.random.default_rng(seed), {}
    dim = tensors["model.norm.weight"].shape[0]

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        value = 1 + 0.3 * rng.normal(size=shape) if len(shape) == 1 else rng.normal(size=shape) / np.sqrt(shape[-1])
        return value.astype(tensors["model.norm.weight"].dtype)

    for k in range(modules):
        p = f"model.layers.{layers + k}."
        last = f"model.layers.{layers - 1}."
        for name, value in tensors.items():
            if name.startswith(last):
                added[p + name.removeprefix(last)] = draw(value.shape).astype(value.dtype)
        for name, shape in (
            ("enorm", (dim,)),
            ("hnorm", (dim,)),
            ("shared_head.norm", (dim,)),
            ("eh_proj", (dim, 2 * dim)),
        ):
            added[f"{p}{name}.weight"] = draw(shape)
        added[p + "embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
        added[p + "shared_head.head.weight"] = tensors["lm_head.weight"]
    return tensors | added


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What transformers wrote of a tiny DeepSeek-V3, and two modules beside it."""
    path = unpack(CASE, tmp_path_factory.mktemp("published") / "model", num_nextn_predict_layers=MODULES)
    raw = json.loads((path / "config.json").read_text())
    return write_folder(path, raw, published(decode(path / "model.safetensors"), raw["num_hidden_layers"], MODULES))


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    return Reference(json.loads((folder / "config.json").read_text()), decode(folder / "model.safetensors"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Decoder:
    made = importers.load(folder, dtype="float32", mtp_layers=MODULES)
    moe = dataclasses.replace(made.config.moe, implementation="ref")  # compiles faster; the command runs the default
    return with_config(made, dataclasses.replace(made.config, moe=moe))


@jax.jit
def run(model: Decoder, tokens: Any, documents: Any, mask: Any, positions: Any = None) -> ModelOutput:
    return model(tokens, segment_ids=documents, mask=mask, positions=positions, mtp=True)


def test_the_reference_is_the_model_of_transformers(reference: Reference):
    case = golden(CASE)
    for row, expected in zip(case.tokens, case.logits, strict=True):
        assert error(reference.logits(row)[0], expected) < 1e-5


WIDTH = 12
LENGTHS = ((12,), (7, 5), (1, 2, 3, 6), (4, 5))
"""Documents of each row; the last has padding before, between and in them."""
PADDED = [0, 4, 9]


@pytest.fixture(scope="module")
def batch() -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(0).integers(0, 67, (len(LENGTHS), WIDTH)).astype(np.int32)
    mask = np.ones(tokens.shape, bool)
    mask[-1, PADDED] = False
    documents = np.zeros(tokens.shape, np.int32)
    for row, lengths in enumerate(LENGTHS):
        documents[row, mask[row]] = np.repeat(np.arange(len(lengths)) + 1, lengths)
    documents[-1, PADDED[1]] = 1
    return {"tokens": tokens, "documents": documents, "mask": mask}


def test_all_logits_are_those_of_the_reference(model: Decoder, reference: Reference, batch: dict[str, np.ndarray]):
    out = run(model, *batch.values())
    further = out.further
    assert further is not None and further.logits.shape == (MODULES, *batch["tokens"].shape, 67)
    valid = np.zeros(further.valid.shape, bool)
    places = np.full(valid.shape, WIDTH)
    for row, lengths in enumerate(LENGTHS):
        for document in range(1, len(lengths) + 1):
            at = np.flatnonzero((batch["documents"][row] == document) & batch["mask"][row])
            main, *modules = reference.logits(batch["tokens"][row, at])
            assert error(out.logits[row, at], main) < TOLERANCE
            for k, expected in enumerate(modules, start=1):
                valid[k - 1, row, at[:-k]] = True
                places[k - 1, row, at[:-k]] = at[k:]
                assert error(further.logits[k - 1, row, at[:-k]], expected) < TOLERANCE
    np.testing.assert_array_equal(further.valid, valid)
    np.testing.assert_array_equal(further.place, places)
    assert further.metrics is not None and out.metrics is not None
    np.testing.assert_array_equal(further.metrics.tokens, valid.sum((1, 2)))  # only places with a prediction count
    np.testing.assert_array_equal(further.metrics.routed.sum(-1), 2 * valid.sum((1, 2)))
    assert out.metrics.tokens.shape == (1,)  # the model's own, as without modules


def test_what_the_paper_leaves_open_matters(reference: Reference):
    """Else the comparison above could not tell which way was taken."""
    tokens = golden(CASE).tokens[0]
    for other in ({"order": "paper"}, {"normed": False}):
        for taken, not_taken in zip(reference.logits(tokens)[1:], reference.logits(tokens, **other)[1:], strict=True):
            assert error(not_taken, taken) > 0.02


def test_a_module_sees_k_tokens_further_and_no_more(model: Decoder, batch: dict[str, np.ndarray]):
    tokens, one, every = batch["tokens"], np.ones_like(batch["documents"]), np.ones_like(batch["mask"])
    changed = tokens.copy()
    changed[:, 6] = (changed[:, 6] + 1) % 67
    before, after = (run(model, t, one, every).further for t in (tokens, changed))
    assert before is not None and after is not None
    for k in range(1, MODULES + 1):
        moved = np.abs(np.asarray(before.logits[k - 1] - after.logits[k - 1])).max((0, 2))[: WIDTH - k]
        assert np.all(moved[: 6 - k] == 0) and np.all(moved[6 - k :] > 1e-4)


def test_next_places_skip_padding():
    real = np.array([[1, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0]], bool)
    np.testing.assert_array_equal(next_places(jnp.asarray(real)), [[3, 3, 3, 4, 6, 6], [6] * 6])


# --- the library's own model ------------------------------------------------------------------------------------------


def tiny(**moe: Any) -> ModelConfig:
    """One layer, with experts."""
    return dataclasses.replace(small_model(**{"first_dense": 0, "every": 1, **moe}), num_layers=1)


def with_modules(config: ModelConfig, modules: int = 2, **changes: Any) -> ModelConfig:
    return dataclasses.replace(config, mtp_layers=modules, **changes)


def test_without_modules_everything_is_as_before(monkeypatch: pytest.MonkeyPatch):
    plain, more = small_config(tiny()), small_config(with_modules(tiny()))
    assert config_hash(plain) != config_hash(more)
    assert config_hash(plain) == config_hash(dataclasses.replace(plain, model=with_modules(tiny(), 0)))

    def mark_of_key(key: jax.Array, low: float, high: float, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jnp.full(shape, jax.random.key_data(key)[-1] % 65521, dtype)

    monkeypatch.setattr(jax.random, "truncated_normal", mark_of_key)  # which takes seconds to compile
    found, names = (leaves(jax.jit(lambda c=config: build(c.model))()) for config in (more, plain))
    assert not any("mtp" in name for name in names)
    assert {name for name in found if not name.startswith("mtp/")} == names.keys()
    for name, value in names.items():
        np.testing.assert_array_equal(found[name], value)
    one, two = (found[f"mtp/{k}/proj"] for k in (0, 1))
    assert not np.array_equal(one, two)


def test_where_it_cannot_run_it_says_so():
    tokens = jnp.zeros((1, 4), jnp.int32)
    with pytest.raises(ValueError, match=r"needs model\.mtp_layers"):
        drawn(tiny())(tokens, mtp=True)
    made = drawn(with_modules(tiny(), 1))
    with pytest.raises(ValueError, match="no cache"):
        made(tokens, mtp=True, cache=made.init_cache(1, 4))


def drawn(config: ModelConfig) -> Decoder:
    """Random weights without compiling their initialisation."""
    graph, state = nnx.split(jax.eval_shape(lambda: build(config)))
    rng = np.random.default_rng(0)
    return nnx.merge(graph, jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), state))


def test_the_window_is_the_last_layers():
    """Of one place: then a module knows the token at its place and the one that it is given, and nothing else."""
    config = with_modules(tiny(), 1, attention=dataclasses.replace(small_model().attention, window=1))
    model, tokens = drawn(config), np.arange(8, dtype=np.int32)[None] * 5
    other = tokens.copy()
    other[0, 3] += 1
    one, two = (run(model, t, np.ones_like(t), np.ones(t.shape, bool)).further for t in (tokens, other))
    assert one is not None and two is not None
    moved = np.abs(np.asarray(one.logits - two.logits))[0, 0].max(-1)[:-1]
    assert np.flatnonzero(moved > 1e-4).tolist() == [2, 3] and np.count_nonzero(moved) == 2


def test_modules_are_rematerialised_like_layers():
    def calls(remat: str, modules: int) -> int:
        config = with_modules(tiny(), modules, remat=remat)
        tokens = jnp.zeros((1, 8), jnp.int32)
        model = jax.eval_shape(lambda: build(config))
        return str(jax.make_jaxpr(lambda m: m(tokens, mtp=bool(modules)).logits)(model)).count("remat2[")

    assert calls("block", 0) == 1 and calls("block", 2) == 3 and calls("none", 2) == 0


@pytest.mark.parametrize("first_dense", [0, 5])
def test_counted_parameters_are_those_of_the_arrays(first_dense: int):
    moe = dataclasses.replace(small_model().moe, first_dense=first_dense, shared_experts=1)
    config = with_modules(small_model(), moe=moe)
    params = nnx.state(jax.eval_shape(lambda: build(config)), nnx.Param)
    p = count.parameters(config)
    assert p.total == sum(leaf.size for leaf in jax.tree.leaves(params))
    modules = [leaf.size for path, leaf in nnx.to_flat_state(params) if path[0] == "mtp"]
    one = sizes.make(small_config(config), MeshConfig(data=1), "cpu", train=True)
    assert sum(activations.parameters(config, one).values()) == p.total
    assert p.prediction == sum(modules) and p.active == count.parameters(with_modules(config, 0)).active


def test_the_published_module_has_the_published_size(capsys: pytest.CaptureFixture):
    """README_WEIGHTS.md: 11.5 B of its own; the files hold 685 B, with embedding and head once more."""
    assert session.call(zoo.define_flags, zoo.command, ["--model=deepseek_v3", "--mtp=1", "--format=json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    parts = row["parts"]
    own, copies = (parts[name][0] for name in list(parts)[-2:])
    assert own == pytest.approx(11.5e9, rel=0.01)
    assert row["total"] + own + copies == pytest.approx(684.5e9, rel=1e-3)  # of the files, without float8 scales
    assert session.call(zoo.define_flags, zoo.command, ["--mtp=1"]) == 2


# --- training ---------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_papers():
    """Equations 24 and 25 by hand: of one row two places are valid for the first module, one for the second."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(2, 1, 4, 5)).astype(np.float32)
    valid = np.zeros((2, 1, 4), bool)
    valid[0, 0, :2] = valid[1, 0, 0] = True
    place = np.where(valid, np.arange(4) + np.array([1, 2])[:, None, None], 4)
    targets = np.array([[3, 1, 4, 0]])
    log_p = np.log(np.exp(values) / np.exp(values).sum(-1, keepdims=True))
    expected = -(log_p[0, 0, 0, 1] + log_p[0, 0, 1, 4] + log_p[1, 0, 0, 4]) / 2
    made = Predictions(jnp.asarray(values), jnp.asarray(valid), jnp.asarray(place), None)
    assert float(prediction_loss(made, jnp.asarray(targets))) == pytest.approx(expected, rel=1e-5)


ROUTER = RouterConfig(name="sigmoid_bias", bias_update_rate=0.01)


def trainer_of(model: ModelConfig, micros: int = 1) -> Trainer:
    config = small_config(with_modules(model, 1), mtp_weight=0.3, accumulate=micros)
    return Trainer(config, np.ones(64), make_mesh(MeshConfig(data=1), jax.devices()[:1]))


def check_a_step(trainer: Trainer) -> tuple[TrainState, StepMetrics]:
    """The state and the metrics of a step whose loss is that of the model's own logits, and that moved every array."""
    state = start(trainer)
    model = trainer.model(jax.tree.map(jnp.copy, state))
    state, metrics = trainer.step(state, random_batch())
    batch = {name: value[0] for name, value in random_batch().items()}
    out = run(model, batch["tokens"], batch["segment_ids"], batch["mask"], batch["positions"])
    assert out.further is not None
    total = batch["mask"].sum()
    further = float(prediction_loss(out.further, batch["targets"])) / total
    assert float(metrics.aux["mtp"]) == pytest.approx(further, rel=1e-5)
    ce = float(jnp.sum(token_nll(out.logits, batch["targets"]) * batch["mask"])) / total
    assert float(metrics.ce) == pytest.approx(ce, rel=1e-5)
    balance = 0.0
    if out.metrics is not None:
        both = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), out.metrics, out.further.metrics)
        balance = float(losses.total(both, dict(model.config.moe.losses))[0])
        assert metrics.moe is not None and len(metrics.moe.routed) == 1  # the model's own layer is watched and logged
    assert float(metrics.loss) == pytest.approx(ce + 0.3 * further + balance, rel=1e-5)
    assert np.isfinite(float(metrics.grad_norm)) and float(metrics.outer_grad_norm["mtp"]) > 0
    before, after = leaves(model), leaves(trainer.model(state))
    names = [name for name in before if name.startswith("mtp/")]
    assert len(names) == 4 + 2 + 9 + (5 if out.metrics is not None else 3)  # its own, norms, attention, experts or FFN
    assert [name for name in names if np.array_equal(before[name], after[name])] == []
    return state, metrics


def test_a_step_minimises_both_losses():
    check_a_step(trainer_of(tiny(first_dense=1)))


@pytest.mark.slow  # the same with experts and in micro-batches; what is added for those has the next test
def test_a_step_with_experts_and_micro_batches():
    one, a = check_a_step(trainer_of(tiny(router=ROUTER)))
    parts = trainer_of(tiny(router=ROUTER), 2)
    two, b = parts.step(start(parts), random_batch(2))
    for name in ("loss", "ce", "grad_norm"):
        assert float(getattr(a, name)) == pytest.approx(float(getattr(b, name)), rel=1e-4), name
    assert float(a.aux["mtp"]) == pytest.approx(float(b.aux["mtp"]), rel=1e-5)
    for x, y in zip(jax.tree.leaves(one.router_state), jax.tree.leaves(two.router_state), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_modules_router_balances_by_its_own_loads():
    trainer = trainer_of(tiny(router=ROUTER))
    state = start(trainer)
    loads = jnp.asarray([[5.0, 1.0, 1.0, 1.0], [0.0, 8.0, 0.0, 0.0]])  # of the layer, then of the module
    rest = {
        field.name: loads for field in dataclasses.fields(MoEMetrics) if field.name not in ("by_class", "zero_routed")
    }
    metrics = MoEMetrics(**rest)
    found = leaves(trainer.model(dataclasses.replace(
        state, router_state=trainer._update_routers(state.router_state, metrics))))  # fmt: skip
    bias = np.float32(0.01)
    np.testing.assert_allclose(found["groups/0/blocks/0/moe/router/arrays/bias"], [[-bias, bias, bias, bias]])
    np.testing.assert_allclose(found["mtp/0/block/moe/router/arrays/bias"], [bias, -bias, bias, bias])
    main = trainer._main(metrics)
    assert main is not None and main.routed.shape == (1, 4)


@pytest.mark.parametrize(
    ("modules", "train", "match"),
    [
        (0, {"mtp_weight": 0.3}, r"train\.mtp_weight=0\.3 weighs .* model\.mtp_layers=0"),
        (1, {}, r"train\.mtp_weight=0: training would move their weights by weight decay alone"),
        (128, {"mtp_weight": 0.3}, r"needs data\.seq_len above it, not 128"),
        (-1, {}, r"model\.mtp_layers=-1: must be 0 or more"),
        (1, {"mtp_weight": -0.1}, r"train\.mtp_weight=-0\.1: must be 0 or more"),
    ],
)
def test_settings_that_do_not_go_together(modules: int, train: dict[str, Any], match: str):
    with pytest.raises(ConfigError, match=match):
        validate.check(small_config(with_modules(small_model(), modules), **train))


def test_longcat_blocks_have_none():
    config = ModelConfig(wiring="longcat", mtp_layers=1, attention=AttentionConfig(), moe=MoEConfig())
    with pytest.raises(ConfigError, match=r"LongCat-Flash's own has a dense block"):
        validate.check_model(config)


# --- published folders ------------------------------------------------------------------------------------------------

LAYERS = FAMILIES["deepseek_v3"]["num_hidden_layers"]
FIRST = f"model.layers.{LAYERS}."


@pytest.fixture(scope="module")
def tensors() -> Arrays:
    return published(small_tensors(FAMILIES["deepseek_v3"]), LAYERS, 1)


def write(tmp_path: Path, tensors: Arrays, **changes: Any) -> Path:
    return write_folder(tmp_path / "folder", {**FAMILIES["deepseek_v3"], **changes}, tensors)


def test_read_where_asked_for_and_listed_otherwise(tmp_path: Path, tensors: Arrays, caplog: pytest.LogCaptureFixture):
    folder = write(tmp_path, tensors)
    count_of = sum(name.startswith(FIRST) for name in tensors)
    with caplog.at_level("INFO", logger="absl"):
        plain = importers.load(folder, dtype="float32")
        assert f"{count_of}: multi-token prediction, which is read where model.mtp_layers asks" in caplog.text
        caplog.clear()
        made = importers.load(folder, dtype="float32", mtp_layers=1)
        assert "2: the model's own tensor once more" in caplog.text and "which is read where" not in caplog.text
    found = leaves(made)
    assert leaves(plain).keys() == {name for name in found if not name.startswith("mtp/")}
    np.testing.assert_array_equal(found["mtp/0/proj"], tensors[FIRST + "eh_proj.weight"].T)
    np.testing.assert_array_equal(found["mtp/0/embed_norm/scale"], tensors[FIRST + "enorm.weight"])
    np.testing.assert_array_equal(found["mtp/0/hidden_norm/scale"], tensors[FIRST + "hnorm.weight"])
    np.testing.assert_array_equal(found["mtp/0/final_norm/scale"], tensors[FIRST + "shared_head.norm.weight"])
    gate = found["mtp/0/block/moe/store/gate"]
    np.testing.assert_array_equal(gate[2], tensors[FIRST + "mlp.experts.2.gate_proj.weight"].T)
    without = {
        name: value for name, value in tensors.items() if not name.endswith((".embed_tokens.weight", ".head.weight"))
    }
    without["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"]  # the copies may be left out
    assert_equal(importers.load(write(tmp_path / "two", without), dtype="float32", mtp_layers=1), made)


def test_export_writes_what_was_published(tmp_path: Path, tensors: Arrays):
    folder, out = write(tmp_path, tensors), tmp_path / "out"
    arguments = [f"--checkpoint={folder}", f"--output={out}", "--mtp", "--dtype=float32"]
    assert session.call(export.define_flags, export.command, arguments) == 0
    written = decode(out / "model.safetensors")
    assert written.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(written[name], value, name)
    assert json.loads((out / "config.json").read_text())["num_nextn_predict_layers"] == 1
    made = importers.load(folder, dtype="float32", mtp_layers=1)
    assert_equal(importers.load(out, dtype="float32", mtp_layers=1), made)
    importers.write(made, made.config, tmp_path / "fused", layout="fused")
    assert_equal(importers.load(tmp_path / "fused", dtype="float32", mtp_layers=1), made)


def test_other_families_cannot_hold_modules():
    config = dataclasses.replace(read_config(FAMILIES["mixtral"], Path("config.json")), mtp_layers=1)
    with pytest.raises(ConfigError, match=r"closest is mixtral\).*mtp_layers=1, 0"):
        write_config(config, None, None)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"eh_proj.weight": None}, r"1 tensors are missing: model\.layers\.3\.eh_proj\.weight"),
        ({"eh_proj.weight": "eh_projection.weight"}, r"Likely renamed tensors: model\.layers\.3\.eh_projection"),
        ({"mlp.experts.1.up_proj.weight": None}, r"missing: model\.layers\.3\.mlp\.experts\.1\.up_proj\.weight"),
        ({"extra.weight": np.ones(3, np.float32)}, r"1 are not known: model\.layers\.3\.extra\.weight"),
        ({"enorm.weight": np.ones(3, np.float32)}, r"enorm\.weight has shape \[3\], expected \[8\]"),
        ({"embed_tokens.weight": np.zeros((11, 8), np.float32)}, r"embed_tokens\.weight is another matrix than model"),
        ({"shared_head.head.weight": np.zeros((11, 8), np.float32)}, r"head\.weight is another matrix than lm_head"),
    ],
    ids=["missing", "renamed", "no expert", "unknown", "shape", "other embedding", "other head"],
)  # fmt: skip
def test_a_damaged_module(change: dict[str, Any], match: str, tmp_path: Path, tensors: Arrays):
    changed = dict(tensors)
    for name, value in change.items():
        old = changed.pop(FIRST + name, None)
        if isinstance(value, str):
            changed[FIRST + value] = old
        elif value is not None:
            changed[FIRST + name] = value
    with pytest.raises(ConfigError, match=match) as raised:
        importers.load(write(tmp_path, changed), mtp_layers=1)
    assert "layers, and config.json says" not in str(raised.value)


def test_asked_of_a_folder_without_them(tmp_path: Path, tensors: Arrays):
    plain = {name: value for name, value in tensors.items() if not name.startswith(FIRST)}
    with pytest.raises(ConfigError, match=r"nothing of model\.layers\.3\.\* is there \(transformers leaves it out"):
        importers.load(write(tmp_path / "saved", plain), mtp_layers=1)
    none = write(tmp_path / "none", plain, num_nextn_predict_layers=0)
    with pytest.raises(ConfigError, match="num_nextn_predict_layers=0, so it has none: set it to 0"):
        importers.load(none, mtp_layers=1)
    with pytest.raises(ConfigError, match="num_nextn_predict_layers=0"):
        pretrained.open_model(none, mtp=True)
    with pytest.raises(ConfigError, match="num_nextn_predict_layers=1, so it has 1: set it to 1"):
        importers.load(write(tmp_path / "two", tensors), mtp_layers=2)
    for family, why in (("mixtral", "none of model_type='mixtral' is known"), ("longcat_flash", "has a dense block")):
        with pytest.raises(ConfigError, match=why):
            read_config(FAMILIES[family], Path("config.json"), 1)
    dense = {**FAMILIES["deepseek_v3"], "first_k_dense_replace": LAYERS}
    with pytest.raises(ConfigError, match="its module has experts and its last layer has none"):
        read_config(dense, Path("config.json"), 1)


def test_missing_main_tensors_are_not_blamed_on_modules(tmp_path: Path, tensors: Arrays):
    changed = {name: value for name, value in tensors.items() if "layers.1.self_attn" not in name}
    with pytest.raises(ConfigError, match="Likely an incomplete folder"):
        importers.load(write(tmp_path, changed))


# --- commands ---------------------------------------------------------------------------------------------------------


def command(*arguments: str) -> int:
    return session.call(logits.define_flags, logits.command, list(arguments))


def test_the_command_writes_both(folder: Path, reference: Reference, tmp_path: Path, capfd: pytest.CaptureFixture):
    tokens = golden(CASE).tokens
    np.save(tmp_path / "tokens.npy", tokens)
    base = [f"--checkpoint={folder}", f"--tokens={tmp_path / 'tokens.npy'}", f"--output={tmp_path / 'out.npy'}",
            "--dtype=float32"]  # fmt: skip
    assert command(*base, "--mtp_output=x.npy") == 2 and "add --mtp" in capfd.readouterr().err
    assert command(*base, "--mtp", f"--mtp_output={tmp_path / 'out.npy'}") == 2
    assert "is --output too" in capfd.readouterr().err
    assert command(*base, "--mtp", f"--mtp_output={tmp_path / 'no' / 'x.npy'}") == 2
    assert "--mtp_output" in capfd.readouterr().err and not (tmp_path / "out.npy").exists()
    assert command(*base, "--mtp") == 0
    main, further = np.load(tmp_path / "out.npy"), np.load(tmp_path / "out.mtp.npy")
    assert further.shape == (MODULES, *tokens.shape, 67) and further.dtype == np.float32
    for row in range(len(tokens)):
        expected, *modules = reference.logits(tokens[row])
        assert error(main[row], expected) < TOLERANCE
        for k, of_module in enumerate(modules, start=1):
            assert error(further[k - 1, row, :-k], of_module) < TOLERANCE
            assert np.all(np.isnan(further[k - 1, row, -k:]))
    bare = unpack(CASE, tmp_path / "bare")
    assert command(f"--checkpoint={bare}", *base[1:3], "--mtp") == 2
    assert "num_nextn_predict_layers=0" in capfd.readouterr().err


def test_a_config_asks_by_its_number(tmp_path: Path, tensors: Arrays):
    folder = write(tmp_path, tensors)
    config = dataclasses.replace(
        small_config(ModelConfig(vocab_size=0, mtp_layers=1), mtp_weight=0.1), init_from=str(folder),
        model_from="init_from",
    )  # fmt: skip
    adopted = pretrained.adopt(config)
    assert adopted.model.mtp_layers == 1 and adopted.model.dim == 8
    known = pretrained.origin(folder)
    pretrained.check_fit(known, adopted.model)
    two = dataclasses.replace(config, model=dataclasses.replace(config.model, mtp_layers=2))
    with pytest.raises(ConfigError, match="num_nextn_predict_layers=1, so it has 1"):
        pretrained.adopt(two)
    none = dataclasses.replace(config, model=dataclasses.replace(config.model, mtp_layers=0))
    assert pretrained.adopt(none).model.mtp_layers == 0
