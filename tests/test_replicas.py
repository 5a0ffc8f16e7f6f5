"""Copies of a whole model's busiest experts: --replicate, and that it changes nothing but where things are computed."""

from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import generate, session
from moejax import limits, replicas, sharding, trace
from moejax.config import ConfigError, MeshConfig
from moejax.replication import Replicated
from tests import moe_fakes as fakes
from tests.small import quick_compilation, small_config

LOADS = np.asarray([[9.0, 1, 1, 1], [2, 2, 2, 8]])


def mesh_of(data: int, expert: int) -> jax.sharding.Mesh:
    return sharding.make_mesh(MeshConfig(data=data, expert=expert), jax.devices()[: data * expert])


@pytest.mark.slow  # one layer: tests/test_replication.py
@pytest.mark.parametrize("dispatcher", ["local", "ep"])
def test_logits_are_those_of_the_model_bit_for_bit(dispatcher: str):
    """On 8 devices, whatever the model's own dispatcher; layers of one group that stand stacked have copies of their
    own. Pairs travel: sums of ranks would depend on which rank has the copy that a pair goes to."""
    model, mesh = fakes.small_model(moe={"dispatcher": dispatcher, "ep_send": "pairs"}), mesh_of(2, 4)
    tokens = fakes.tokens(8, 6)
    run = jax.jit(lambda model, tokens: (lambda out: (out.logits, out.metrics.computed))(model(tokens)))
    with quick_compilation(), jax.set_mesh(mesh):
        copied = replicas.with_copies(model, LOADS, mesh, extra=2)
        (layer, numbers), *_ = replicas.moe_layers(copied)
        (placement,) = layer.transforms
        plain = fakes.small_model(moe={"dispatcher": "ep", "ep_send": "pairs"})
        expected, loads = jax.device_get(run(plain, tokens))
        got, by_slot = jax.device_get(run(copied, tokens))
    np.testing.assert_array_equal(got, expected)
    assert isinstance(placement, Replicated) and numbers.tolist() == [0, 1]
    assert layer.store.up[...].sharding.spec[1] == "expert" and layer.store.up[...].shape[:2] == (2, 4 + 4 * 2)
    for i in range(2):
        slots = np.asarray(placement.expert_of_slot[i])
        np.testing.assert_array_equal(np.bincount(slots, by_slot[i], 4), loads[i])
        assert (np.bincount(slots, by_slot[i] > 0, 4) > 1).any()  # some expert's pairs are shared by its copies
    assert model.config.moe.dispatcher == dispatcher  # the model that was given is as it was


@pytest.mark.parametrize(
    ("loads", "expert", "extra", "message"),
    [
        (LOADS, 1, 1, "mesh.expert is 1: set it to a divisor"),
        (LOADS[:1], 2, 1, "loads of 1 layers with 4 experts are not of this model, which has 2"),
        (np.ones((2, 8)), 2, 1, "loads of 2 layers with 8 experts are not of this model"),
        (LOADS, 2, 3, "3 copies on each device: 2 devices with 4 experts have use for 1 to 2"),
    ],
)
def test_copies_that_there_cannot_be_are_refused(loads, expert: int, extra: int, message: str):
    with pytest.raises(ConfigError, match=message):
        replicas.with_copies(fakes.small_model(), loads, mesh_of(1, expert), extra)


def test_experts_in_parts_and_virtual_ranks_are_refused():
    with pytest.raises(ConfigError, match=r"moe\.virtual_ranks=2: copies need real ranks"):
        replicas.with_copies(fakes.small_model(moe={"virtual_ranks": 2}), LOADS, mesh_of(1, 2))
    with pytest.raises(ConfigError, match=r"moe\.parts=2: experts that are stored in parts cannot be copied"):
        replicas.with_copies(fakes.small_model(moe={"parts": 2}), LOADS, mesh_of(1, 2))


@pytest.mark.parametrize(
    "text",
    [
        "device_budget:factor=1", "measured_budget", "expanded_drop:factor=1",
        "threshold_drop:threshold=0.2,load_aware=water,ranks=2",
    ],
)  # fmt: skip
def test_limits_that_go_by_where_experts_are_do_not_go_with_copies(text: str):
    others = [limits.parse(text) for text in ("token_drop:factor=1", "threshold_drop:threshold=0.2,gap=0.1")]
    replicas.check_limits(others)
    with pytest.raises(ConfigError, match="copies lie elsewhere and take over load"):
        replicas.check_limits([*others, limits.parse(text)])


def test_recorded_loads_are_the_routers_pairs(tmp_path: Path):
    tables = [fakes.random_table(np.random.default_rng(i), 20, 2, 4, drop=0.3) for i in range(2)]
    made = jax.tree.map(lambda *leaves: np.stack(leaves)[:, None], *tables)
    ids = np.arange(20, dtype=np.int32).reshape(1, 20)
    tokens = dict.fromkeys(trace.TOKEN_ARRAYS, ids) | {"mask": np.ones((1, 20), bool), "domain": np.zeros_like(ids)}
    config = small_config(fakes.model_config())
    path = tmp_path / "trace.npz"
    with trace.writing(path, trace.header(config, (), ranks=1, batch_shape=(4, 5), logits=False)) as writer:
        for _ in range(2):
            writer.add(trace.Chunk(made=made, kept=made, tokens=tokens, key=None))
    with trace.read(path) as source:
        found = replicas.recorded_loads(source)
    for table, loads in zip(tables, found, strict=True):
        expert, valid = np.asarray(table.expert), np.asarray(table.valid)
        assert not valid.all()
        np.testing.assert_array_equal(loads, 2 * np.bincount(expert[valid], minlength=4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--replicas=2"], "--replicas=2 goes with --replicate=TRACE"),
        (["--replicate=trace.npz"], "--replicate needs devices to put copies on: --mesh=data=1,expert=4"),
    ],
)
def test_flags_that_do_not_go_together(capsys, arguments: list[str], message: str):
    given = ["--checkpoint=nowhere", "--prompt=a", *arguments]
    assert session.call(generate.define_flags, generate.command, given) == 2
    assert message in capsys.readouterr().err
