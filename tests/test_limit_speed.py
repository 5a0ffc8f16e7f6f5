"""experiments.limit_speed and experiments.expert_times: what they count, how popular experts are, both commands at a
tiny size on emulated devices."""

import dataclasses
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import (
    capacity_settings,
    drop_scores,
    ep_simulation,
    expert_times,
    limit_layers,
    limit_models,
    limit_speed,
    rank_layers,
    session,
)
from experiments.drop_layers import with_config
from moejax import limits, trace
from moejax.config import ConfigError, RouterConfig
from moejax.replication import rank_loads, replicate
from moejax.results import read_rows
from moejax.types import RouteContext
from tests import moe_fakes as fakes
from tests.small import quick_compilation, small_config, small_model

TINY = ["--tiny", "--devices=2", "--repeats=1", "--target_ms=0"]


def run(output: Path, *arguments: str) -> int:
    with quick_compilation():
        return session.call(limit_speed.define_flags, limit_speed.command, [f"--output={output}", *TINY, *arguments])


# --- counts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [False, True])
def test_counts_are_those_of_a_loop(copied: bool):
    """Two ranks of four experts; a third column holds pairs that a limit added."""
    rng = np.random.default_rng(0)
    expert = rng.permuted(np.broadcast_to(np.arange(8), (2, 20, 8)), axis=2)[..., :3]
    valid = rng.random((2, 20, 3)) < 0.7
    copies = replicate(np.asarray([50, 1, 1, 1, 30, 1, 1, 1]), 2, 1) if copied else None
    found = rank_layers.counted(expert[..., :2], expert, valid, None, experts=8, copies=copies)
    work, to, kept = np.zeros(2), np.zeros((2, 2)), 0
    for source, token, k in np.argwhere(valid):
        e = int(expert[source, token, k])
        rank = e // 4
        if copies is not None:
            rank = int(copies.slots_of_expert[e, token % int(copies.copies[e])]) // 5
        work[rank] += 1
        to[source, rank] += 1
        kept += k < 2
    np.testing.assert_array_equal(found.work, work)
    np.testing.assert_array_equal(found.before, np.bincount(expert[..., :2].ravel(), minlength=8))
    share = to.max() / (20 * 2 / 2)
    assert found.kept == kept and share <= found.factor < share + 1 / 64


def test_arms_are_those_of_the_tables_at_the_factors():
    arms = [arm for family in limit_layers.families(8, [1.5, 0.5]).values() for arm in family]
    assert len({arm.label for arm in arms}) == len(arms)
    for name in limit_layers.EXPERT_LEVEL:
        mine = [arm for arm in arms if arm.facts["arm"] == name]
        assert [arm.label for arm in mine] == [capacity_settings.row_name(name, f) for f in (1.5, 0.5)]
        assert len({arm.kind for arm in mine}) == 1  # one program on one device
    assert [arm.k for arm in arms if arm.k] == [6, 4] and limit_layers.lower_ks(2) == [1]
    assert [arm.label for arm in arms if arm.copies] == ["replication"]


# --- popularity -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "most"), [("olmoe", 7), ("mixtral", 3)])
def test_the_papers_skew_is_met(name: str, most: float):
    setting = drop_scores.setting_of(name)
    loads, k, experts = limit_layers.loads_of(setting, "paper", 2), setting.moe.router.k, setting.moe.num_experts
    noise = np.random.default_rng(3).standard_normal((8192, experts))  # other draws than it was solved on
    for layer in (0, 1):
        chosen = np.argsort(-(setting.shape.scale * noise + loads.means(layer)), axis=1)[:, :k]
        share = np.bincount(chosen.ravel(), minlength=experts) * experts / chosen.size
        even = ep_simulation.loads_of(experts, most)
        assert share.max() == pytest.approx(most, rel=0.03)
        np.testing.assert_allclose(share, np.random.default_rng(layer).permutation(even), atol=0.25)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace of two layers of 4 experts, the first ones busy."""
    config = small_config(dataclasses.replace(small_model(RouterConfig(k=2), first_dense=1, every=1), num_layers=3))
    path = tmp_path_factory.mktemp("trace") / "trace.npz"
    with trace.writing(path, trace.header(config, (), ranks=1, batch_shape=(4, 10), logits=False)) as writer:
        tables = [fakes.random_table(np.random.default_rng(i), 40, 2, 4, skew=0.3 + 0.3 * i) for i in range(2)]
        made = jax.tree.map(lambda *leaves: np.stack(leaves)[:, None], *tables)
        ids = np.arange(40, dtype=np.int32).reshape(1, 40)
        tokens = dict.fromkeys(trace.TOKEN_ARRAYS, ids) | {"mask": np.ones((1, 40), bool), "domain": np.zeros_like(ids)}
        writer.add(trace.Chunk(made=made, kept=made, tokens=tokens, key=None))
    return path


def test_loads_of_a_trace(recorded: Path):
    table, layer, said = limit_layers.from_trace(recorded, 8, 2)
    with trace.read(recorded) as source:
        expert = source.chunk(0).made.expert[:, 0]
    counts = np.stack([np.bincount(one.ravel(), minlength=4) for one in expert])
    np.testing.assert_allclose(table, np.repeat(counts / 20, 2, axis=1))  # 80 pairs on 4 experts
    skews = [rank_loads(one, 2).max() for one in counts]
    assert layer == int(np.argmax(skews)) and "each standing for 2" in said
    with pytest.raises(ConfigError, match="a trace of 4 experts, which do not divide the 6 here"):
        limit_layers.from_trace(recorded, 6, 2)
    loads = limit_layers.loads_of(drop_scores.setting_of("olmoe", tiny=True), str(recorded), 2)
    np.testing.assert_array_equal(loads.means(0), loads.means(2))  # a model's layers take turns
    assert (loads.means(0) != loads.means(1)).any()


# --- the commands -----------------------------------------------------------------------------------


def test_rows_of_a_layer_and_of_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded: Path):
    families = limit_layers.families

    def few(k: int, factors: list[float]) -> dict[str, list[rank_layers.Arm]]:
        made = families(k, factors)
        return made | {"others": made["others"][-2:]}

    monkeypatch.setattr(limit_layers, "families", few)
    monkeypatch.setattr(limit_models, "families", few)
    output = tmp_path / "rows.jsonl"
    some = ["--families=token_drop,expanded_drop,others", "--factors=1", "--model_factors=1", "--layers=2"]
    assert run(output, *some, f"--loads={recorded}") == 0
    rows = {(row.metric, row.extra["method"]): row for row in read_rows(output)}
    for metric in ("speedup/layer", "speedup/prefill"):
        none, token, expanded, lower, copies = (
            rows[metric, name] for name in ("no limit", "token drop", "expanded drop", "lower top-k", "replication")
        )
        assert none.value == 1 and none.extra["drop_rate"] == none.extra["added_share"] == 0
        assert token.extra["factor"] == 1 and token.extra["drop_rate"] > 0 == token.extra["added_share"]
        assert expanded.extra["added_share"] > 0 and lower.extra["drop_rate"] == 0.5
        assert copies.extra["drop_rate"] == copies.extra["added_share"] == 0
        for row in (token, lower, copies):
            assert row.extra["predicted"] == row.extra["busiest_before"] / row.extra["busiest_after"] > 1
        assert all(row.published is None and "trace.npz" in row.row for row in (none, token, expanded))
        assert {row.extra["sent"] for row in (none, token, copies)} == {"tokens"}
    assert len(rows) == 10 and rows["speedup/prefill", "replication"].extra["layers"] == 2


@pytest.mark.slow  # the same comparison: the test before
def test_counts_of_real_ranks_are_those_of_virtual_ones():
    """What a limit keeps on 2 devices, by the layer's own metrics."""
    setting = drop_scores.setting_of("mixtral", tiny=True)
    mesh = rank_layers.mesh_of(2, [setting])
    in_force = (limits.expanded_drop(1.0, added_weight="like_own"),)
    with quick_compilation():
        layer = drop_scores.make_layer(setting)
        x = drop_scores.make_tokens(setting, 128).reshape(2, 64, -1)
        virtual = with_config(layer, virtual_ranks=2)
        decided = jax.device_get(jax.jit(rank_layers.observed)(virtual, x, in_force))[1]
        found = rank_layers.counted(*decided, experts=setting.moe.num_experts)
        real = rank_layers.placed(with_config(layer, dispatcher="ep", ep_buffer_factor=found.factor), mesh)
        with jax.set_mesh(mesh):
            metrics = jax.device_get(jax.jit(lambda m, x: m(x, RouteContext(), in_force)[1])(real, x))
    assert metrics.overflow == 0
    np.testing.assert_array_equal(metrics.computed.reshape(2, -1).sum(1), found.work)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape=gpt"], "--shape=gpt: choose of olmoe"),
        (["--parts=layers"], "--parts=layers: choose of layer, model"),
        (["--families=drops"], "--families=drops: choose of token_drop, expanded_drop, others, topk_first"),
        (["--factors=0"], "--factors=0: capacity factors, above 0"),
        (["--model_factors=1,much"], "--model_factors=1,much: capacity factors, above 0"),
        (["--devices=1"], "1 devices: olmoe needs two or more"),
        (["--shape=qwen3", "--loads=paper"], "no skew was observed that qwen3 with"),
        (["--loads=none.npz"], "none.npz"),
    ],
)
def test_what_cannot_be_measured_is_refused(tmp_path: Path, capsys, arguments: list[str], message: str):
    assert run(tmp_path / "rows.jsonl", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "rows.jsonl").exists()


# --- times of one device ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["olmoe", "mixtral"])
def test_points_reach_from_an_eighth_of_an_even_share_to_the_busiest_rank(name: str):
    model = ep_simulation.MODELS[name]
    every = [int(sizes.sum()) for sizes in expert_times.points(model, tiny=False)]
    even = expert_times.even_rows(model, tiny=False)
    assert even == ep_simulation.TOKENS * model.k  # of a rank's own tokens, where all ranks have as many
    assert every == sorted(every) and every[0] == round(even / 8)
    most = max(rank_loads(loads, model.ranks).max() for loads in ep_simulation.placements(model, 200))
    assert every[-1] == pytest.approx(most * ep_simulation.rows_of_mean(model), abs=1) and every[-1] > 1.5 * even
    assert all(len(sizes) == model.experts // model.ranks for sizes in expert_times.points(model, tiny=False))


@pytest.mark.slow  # the simulation reads such files: tests/test_limits_table.py
def test_times_of_one_device_feed_the_simulation(tmp_path: Path, capsys: pytest.CaptureFixture):
    output, tiny = tmp_path / "rows.jsonl", ["--tiny", "--repeats=1", "--target_ms=0"]
    with quick_compilation():
        assert session.call(expert_times.define_flags, expert_times.command, [
            *tiny, "--models=mixtral", f"--folder={tmp_path}", f"--output={output}"]) == 0  # fmt: skip
    rows = [row for row in read_rows(output) if row.metric == "milliseconds/experts"]
    assert len(rows) == len(expert_times.points(ep_simulation.MODELS["mixtral"], tiny=True))
    said = capsys.readouterr().err.split("python -m experiments.ep_simulation ")[1].split()
    assert session.call(ep_simulation.define_flags, ep_simulation.command, said) == 0
    times = ep_simulation.read_times(tmp_path / "mixtral.csv")
    for row in rows:
        assert times(row.extra["rows"]) == pytest.approx(row.extra["seconds"]) and math.isfinite(row.value)
