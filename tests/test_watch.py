"""What a run says when its router collapses, when a step is not finite, and when a program is compiled again."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import metrics, watch
from moejax.config import ConfigError, ExperimentConfig, MeshConfig, WatchConfig, config_hash, from_mapping
from moejax.data import Corpus, load_corpus
from moejax.loop import Run, resolve_vocab
from moejax.meter import Broken, Meter, Window
from moejax.recompile import Watched
from moejax.sharding import make_mesh
from moejax.train import StepMetrics, Trainer, gradient_norms
from moejax.types import MoEMetrics
from moejax.validate import check
from tests.small import flat, load_plain, small_config, start, write_workspace

EXPERTS, K, TOKENS = 8, 2, 800


pytestmark = pytest.mark.usefixtures("compiled_once")


# --- router collapse ----------------------------------------------------------------------------------------------


def window(*shares: float, entropy: float = 1.0, layers: int = 1, steps: int = 10, tokens: float = TOKENS) -> Window:
    """Experts that get ``shares`` of the tokens; the others divide what is left of K choices evenly."""
    rest = (K - sum(shares)) / (EXPERTS - len(shares))
    routed = np.array([*shares, *[rest] * (EXPERTS - len(shares))]) * tokens
    return Window(
        steps,
        np.full(layers, tokens),
        np.tile(routed, (layers, 1)),
        np.full(layers, tokens * entropy),
        np.zeros(layers),
    )


def layered(*windows: Window) -> Window:
    leaves = (
        np.concatenate([getattr(w, name) for w in windows]) for name in ("tokens", "routed", "entropy_sum", "overflow")
    )
    return Window(windows[0].steps, *leaves)


EVEN, COLLAPSED = window(), window(1.0, 1.0, entropy=0.01)


def seen(windows: list[Window], layers: int = 1, **config: Any) -> list[tuple[int, str, str]]:
    watched = watch.LoadWatch(WatchConfig(**config), EXPERTS, list(range(layers)))
    return [(i, a.rule, a.state) for i, w in enumerate(windows, 1) for a in watched.look(10 * i, w)]


def test_an_even_router_is_left_alone():
    assert seen([EVEN] * 5) == []
    assert seen([window(0.5)] * 5) == []  # twice its share


def test_a_collapsed_router_is_told_of_once_by_every_rule():
    every = ["dead experts", "load entropy", "busiest expert", "router entropy"]
    assert seen([EVEN, COLLAPSED, COLLAPSED, COLLAPSED]) == [(2, rule, "onset") for rule in every]


def test_worse_and_recovered():
    deaths = [window(*[0.0] * n) for n in (1, 1, 2, 3, 4, 0, 1)]
    assert seen(deaths, min_load_entropy=0, max_busiest=0) == [
        (1, "dead experts", "onset"), (3, "dead experts", "worse"), (5, "dead experts", "worse"),
        (6, "dead experts", "recovered"), (7, "dead experts", "onset"),
    ]  # fmt: skip
    # a share s of all tokens is (s - 1/4) / (3/4) of the way; 0.95 halves what is left between 0.75 and 1
    shares = [window(s) for s in (0.8, 0.9, 0.96, 0.8, 0.9, 0.4)]
    assert seen(shares, dead_experts=0, min_load_entropy=0) == [
        (2, "busiest expert", "onset"), (3, "busiest expert", "worse"), (6, "busiest expert", "recovered"),
    ]  # fmt: skip


def test_a_value_at_the_bound_does_not_flicker():
    at = [window(entropy=f * math.log(EXPERTS)) for f in (0.0199, 0.0201, 0.0199, 0.0215, 0.0199, 0.03)]
    assert [state for _, _, state in seen(at)] == ["onset", "recovered"]


def test_another_layer_is_news():
    two = [layered(EVEN, COLLAPSED), layered(COLLAPSED, COLLAPSED), layered(COLLAPSED, EVEN), layered(EVEN, EVEN)]
    watched = watch.LoadWatch(WatchConfig(), EXPERTS, [1, 3])
    told = [a for i, w in enumerate(two) for a in watched.look(10 * i + 10, w) if a.rule == "dead experts"]
    assert [(a.state, a.layers) for a in told] == [("onset", (3,)), ("worse", (1, 3)), ("recovered", (1,))]
    assert told[0].text == "dead experts: layer 3: up to 6 of 8 experts of a layer got no pair at all (last 10 steps)"
    assert told[-1].text == "dead experts: recovered in layer 1 (since step 10)"
    assert watched.summary()[0] == "dead experts: warned 1 time(s), last since step 10, recovered at step 40"
    row = json.loads(json.dumps(told[0].row()))
    assert (row["kind"], row["step"], row["layers"], row["value"]) == ("warning", 10, [3], 6.0)


def test_few_pairs_prove_nothing():
    """An expert without a pair counts once its even share is min_pairs: 44 tokens x 2 / 8 = 11 a window."""
    short = window(0.0, tokens=44)
    assert seen([short] * 25, min_load_entropy=0, max_busiest=0) == [(10, "dead experts", "onset")]
    alive = [short] * 9 + [window(tokens=44)]
    assert seen(alive) == []


def test_rules_can_be_switched_off_and_wait_for_the_warm_up():
    off = {"dead_experts": 0, "min_load_entropy": 0.0, "max_busiest": 0.0, "min_router_entropy": 0.0}
    assert seen([COLLAPSED], **off) == []
    watched = watch.LoadWatch(WatchConfig(), EXPERTS, [0], begin=15)
    assert watched.look(10, COLLAPSED) == watched.look(20, COLLAPSED) == []  # it holds steps 11 to 14
    assert len(watched.look(30, COLLAPSED)) == 4
    assert watch.LoadWatch(WatchConfig(), 1, [0]).look(10, EVEN) == []  # one expert has all the load
    assert watch.LoadWatch(WatchConfig(), 8, []).look(10, None) == []


def test_settings_are_shares_and_change_no_hash():
    plain = ExperimentConfig()
    loud = dataclasses.replace(plain, watch=WatchConfig(max_busiest=0.1))
    assert config_hash(loud) == config_hash(plain)
    with pytest.raises(ConfigError, match=r"watch\.max_busiest=4\.0: it is a share, at most 1; 0 switches"):
        check(dataclasses.replace(plain, watch=WatchConfig(max_busiest=4.0)))
    with pytest.raises(ConfigError, match=r"watch\.min_pairs=0: must be 1 or more"):
        check(dataclasses.replace(plain, watch=WatchConfig(min_pairs=0)))


# --- where a step broke -------------------------------------------------------------------------------------------


def step_metrics(loss: float = 2.0, grads: tuple = (3.0, 1.0, 2.0), z: tuple = (4.0, 9.0), **more: Any) -> StepMetrics:
    """Three layers, of which 0 and 2 are MoE."""
    ones, table = np.ones(2), np.ones((2, 4))
    moe = MoEMetrics(
        tokens=ones, routed=table, computed=table, dropped=0 * ones, added=0 * ones, overflow=0 * ones,
        lost_tokens=0 * ones, prob_sum=table, gate_sum=table, load_prob_sum=table, z_sum=np.array(z), entropy_sum=ones,
    )  # fmt: skip
    values = {"grad_norm": float(np.linalg.norm(grads)), "param_norm": 1.0, "outer_grad_norm": {"embed": 1.0}, **more}
    scalars = {"ce": loss, "nll": loss, "text_bytes": 1.0, "tokens": 1.0, "aux": {}}
    return StepMetrics(loss=loss, layer_grad_norm=np.array(grads), moe=moe, **scalars, **values)


NAN, INF = math.nan, math.inf
PLACES = [
    (step_metrics(NAN, (NAN,) * 3, (4.0, NAN)), "that of layer 2 (that of layer 0 is finite)"),
    (step_metrics(NAN, (NAN,) * 3, (INF, NAN)), "that of layer 0 (no router stands before it)"),
    (step_metrics(INF, (NAN,) * 3), "every router is finite: it began behind the router of layer 2"),
    (step_metrics(2.0, (NAN, NAN, 1.0), grad_norm=NAN), "backwards, the gradient of layer 1 is the first"),
    (step_metrics(2.0, (NAN,) * 3, outer_grad_norm={"unembed": NAN}), "the gradient of unembed is the first"),
    (step_metrics(2.0, grad_norm=INF), "the gradient of the embedding is not"),
    (step_metrics(2.0, param_norm=NAN), "loss and gradients are finite; the update made parameters that are not"),
]


@pytest.mark.parametrize(("broken", "place"), PLACES)
def test_where_it_began(broken: StepMetrics, place: str):
    assert place in watch.where_it_began(broken, [0, 2])
    json.dumps(watch.failure_row(Broken(7, broken, None), [0, 2]))


def test_the_table_puts_what_broke_first_and_then_the_largest():
    broken = Broken(7, step_metrics(NAN, (5.0, NAN, 8.0)), step_metrics(2.0, (3.0, 4.0, 2.0)))
    title, *lines = watch.statistics_table(broken, [0, 2])
    assert [line.split()[0] for line in lines] == ["1", "2", "0"]
    assert lines[0].split()[1:] == ["nan", "(4)", "-", "-", "-"]  # a dense layer has no router
    assert lines[1].split()[1:] == ["8", "(2)", "3", "(3)", "1", "(1)", "1", "(1)"]
    assert "gradient norm" in title
    text = watch.failure_text(broken, [0, 2], "no checkpoint yet")
    assert text.startswith("loss is nan at step 7 (gradient norm nan") and "step 6 was finite (loss 2" in text


def test_the_meter_finds_the_first_bad_step():
    meter = Meter(1.0, 1.0)
    for bad in ({}, {"param_norm": INF}, {"loss": NAN}):
        meter.add(step_metrics(**bad))
    found = meter.broken(12)
    assert found is not None and found.step == 11 and found.metrics.param_norm == INF and found.before is not None
    sound = Meter(1.0, 1.0)
    sound.add(step_metrics())
    assert sound.broken(1) is None
    sound.row()
    assert sound.broken(1) is None  # nothing since the last row
    sound.add(step_metrics(NAN))
    found = sound.broken(2)
    assert found is not None and found.step == 2 and found.before is not None and found.before.loss == 2.0


def test_gradient_norms_by_layer():
    """Layer 0 is a dense group of its own; layers 1 and 2 are one pattern of a dense and an MoE block."""
    config = small_config()
    trainer = Trainer(config, np.ones(64), make_mesh(MeshConfig(), jax.devices()[:1]))
    grads = start(trainer).params
    layers, outer = jax.device_get(jax.jit(lambda g: gradient_norms(g, config.model))(grads))
    squares = {name: float(np.square(leaf).sum()) for name, leaf in flat(grads).items()}
    places = ("groups/0/blocks/0/", "groups/1/blocks/0/", "groups/1/blocks/1/")
    for norm, place in zip(layers, places, strict=True):
        assert norm**2 == pytest.approx(sum(v for name, v in squares.items() if name.startswith(place)), rel=1e-5)
    assert outer["embed"] ** 2 == pytest.approx(squares["embed"], rel=1e-5) and set(outer) == {"embed", "final_norm"}
    assert sum(np.square([*layers, *outer.values()])) == pytest.approx(sum(squares.values()), rel=1e-5)


# --- programs -----------------------------------------------------------------------------------------------------


def watched() -> Watched:
    def add(state: Any, batch: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf + 1, (state, batch))

    return Watched(jax.jit(add, donate_argnums=0), "the sum", ("state", "batch"))


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        ({"x": np.ones((2, 5), np.float32)}, "batch/x float32[2,3] on the host -> float32[2,5] on the host"),
        ({"x": np.ones((2, 3), np.int32)}, "batch/x float32[2,3] on the host -> int32[2,3] on the host"),
        ({"x": 1.0}, "batch/x float32[2,3] on the host -> float32[], weak type (a Python number)"),
        ({"x": np.ones((2, 3), np.float32), "y": np.ones(1)}, "batch/y absent -> float32[1] on the host"),
    ],
)
def test_a_new_program_names_what_differs(changed: dict, difference: str):
    fn = watched()
    for _ in range(3):
        fn(jnp.float32(0), {"x": np.zeros((2, 3), np.float32)})
    assert fn.take() == []
    fn(jnp.float32(0), changed)
    fn(jnp.float32(0), changed)
    (found,) = fn.take()
    assert str(found).startswith("the sum was compiled again (") and difference in found.differences
    fn(jnp.float32(0), {"x": np.zeros((2, 3), np.float32)})  # the first program is still there
    assert fn.take() == []


def test_a_setting_is_named_and_an_unarmed_function_is_silent():
    fn = watched()
    fn(jnp.float32(0), 0.0)
    with jax.default_matmul_precision("highest"):
        fn(jnp.float32(0), 0.0)
    (found,) = fn.take()
    assert "arguments are the same, but jax_default_matmul_precision None -> 'highest'" in str(found)
    fn.armed = False
    fn(jnp.float32(0), jnp.ones(7))
    assert fn.take() == []
    assert "stablehlo" in fn.lower(jnp.float32(0), 0.0).as_text()  # all else is the jitted function's


# --- in the loop --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ExperimentConfig:
    plain = load_plain(write_workspace(tmp_path_factory.mktemp("texts")))
    plain.model.activation = "relu"  # fewer operations to compile
    return from_mapping(ExperimentConfig, plain)


@pytest.fixture(scope="module")
def corpus(config: ExperimentConfig) -> Corpus:
    return load_corpus(config.data)


@pytest.fixture
def make(config: ExperimentConfig, corpus: Corpus, tmp_path: Path) -> Iterator[Callable[..., Run]]:
    runs = []

    def make(warn: WatchConfig | None = None, **train: Any) -> Run:
        changed = dataclasses.replace(
            config, watch=warn or WatchConfig(), train=dataclasses.replace(config.train, **train)
        )
        runs.append(Run(resolve_vocab(changed, corpus), corpus, make_mesh(config.mesh), tmp_path))
        return runs[-1]

    yield make
    for run in runs:
        run.close()


def rows(run: Run, kind: str) -> list[dict[str, Any]]:
    return [row for row in metrics.read_metrics(run.workdir / "metrics.jsonl") if row["kind"] == kind]


def poisoned(run: Run, at: int) -> None:
    """The parameters of MoE layer 1's router become NaN before step ``at``."""
    step = run.trainer.step

    def poison(state: Any, batch: Any) -> Any:
        if int(state.step) == at - 1:
            router = state.params["groups"][0]["blocks"][0]["moe"]["router"]["arrays"]["kernel"]
            router.set_value(router[...].at[1].set(np.nan))
        return step(state, batch)

    run.trainer.step = poison


def test_the_first_bad_step_is_named_and_nothing_broken_is_saved(make: Callable[..., Run]):
    run = make(log_every=6, eval_every=6, checkpoint_every=3)
    poisoned(run, at=5)
    with pytest.raises(FloatingPointError) as error:
        run.train(say=lambda text: None)
    text = str(error.value)
    assert text.startswith("loss is nan at step 5 (") and "; step 4 was finite (loss " in text
    assert f"the last good checkpoint is step 3 in {run.workdir / 'checkpoints'}" in text
    assert "the first router whose logits are not finite is that of layer 1 (that of layer 0 is finite)" in text
    assert run.checkpoints.steps() == [3]
    (failure,) = rows(run, "failure")
    assert failure["step"] == 5 and math.isnan(failure["layers"][1]["logsumexp"])
    assert math.isfinite(failure["layers"][0]["logsumexp"]) and math.isfinite(failure["before"]["loss"])
    assert rows(run, "train") == []  # a mean over a broken step is no figure


@pytest.mark.slow
def test_other_shapes_in_mid_run_are_reported_and_loads_add_up(make: Callable[..., Run], corpus: Corpus):
    run = make(steps=4, eval_every=2, log_every=4)
    put, validate, calls = run._put, run.validate, []

    def shorter(batch: dict) -> dict:
        calls.append(0)
        return put({k: v[:, :16] if len(calls) == 3 else v for k, v in batch.items() if np.ndim(v) == 2})

    def smaller(state: Any, step: int) -> float:
        if step == 4:
            run.config = dataclasses.replace(run.config, eval=dataclasses.replace(run.config.eval, batch_size=4))
        return validate(state, step)

    run._put, run.validate = shorter, smaller
    heard: list[str] = []
    run.train(say=heard.append)
    step, valid = [text for text in heard if "compiled again" in text]
    assert step.startswith("WARNING at step 3: the training step was compiled again (")
    assert "batch/tokens int32[1,8,32] -> int32[1,8,16]" in step
    assert valid.startswith("WARNING at step 4: validation was compiled again (")
    assert "batch/tokens int32[8,32] -> int32[4,32]" in valid
    assert [(row["rule"], row["step"], len(row["differences"])) for row in rows(run, "warning")] == [
        ("recompilation", 3, 2), ("recompilation", 4, 2),
    ]  # fmt: skip
    _, load = rows(run, "load")
    assert set(load["by_domain"]) == set(corpus.domains)
    for parts in (load["by_domain"], load["by_class"]):  # a part's pairs of an expert are share * utilisation
        total = sum(np.array(part["utilisation"]) * part["share"] for part in parts.values())
        np.testing.assert_allclose(total, load["utilisation"], atol=2e-4)
        assert sum(part["share"] for part in parts.values()) == pytest.approx(1.0)
    assert {"word start", "word continuation", "whitespace"} <= set(load["by_class"])
    table = heard[heard.index("expert load at step 4, validation text (docs/healthy.md):") :]
    assert [text.split()[0] for text in table[2:6]] == ["layer", "layer", "a", "b"]


def test_a_collapsed_router_warns_on_line_in_the_file_and_at_the_end(make: Callable[..., Run]):
    run = make(log_every=2, eval_every=6)
    begin = run.start

    def collapsed() -> Any:
        state, meta = begin()
        state.params["embed"].set_value(state.params["embed"][...] + 5.0)  # all tokens look the same to the routers
        return state, meta

    run.start = collapsed
    heard: list[str] = []
    run.train(say=heard.append)
    (line,) = [text for text in heard if text.startswith("WARNING at step 4: dead experts: ")]
    assert line.endswith("up to 2 of 4 experts of a layer got no pair at all (last 2 steps)")
    told = rows(run, "warning")
    assert {"dead experts", "load entropy", "busiest expert"} == {row["rule"] for row in told if row["step"] == 4}
    assert any(text.startswith("WARNING dead experts: warned 1 time(s), last since step 4, ") for text in heard[-4:])
    train = rows(run, "train")
    assert max(train[1]["layers"]["dead"]) == 2
