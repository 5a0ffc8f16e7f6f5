"""Configs: mapping to dataclass and back, every check with its message, and every config file that there is."""

import dataclasses
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
from ml_collections import ConfigDict

from configs import base
from configs.papers import capacity_aware
from moejax import count, routing, validate
from moejax.config import (
    AttentionConfig,
    ConfigError,
    DomainConfig,
    ExperimentConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    RouterConfig,
    TrainConfig,
    config_hash,
    from_mapping,
    to_dict,
)
from tests.small import FILES, LAB, VARIANTS, load, with_vocab

ROOT = Path(__file__).resolve().parent.parent
# --- mapping <-> dataclass ----------------------------------------------------------------------------------------


def test_round_trip():
    config = ExperimentConfig(
        name="x",
        model=ModelConfig(moe=MoEConfig(losses=(("balance", 0.5), ("z", 0.25)), router=RouterConfig(k=1))),
        mesh=MeshConfig(expert=4),
    )
    domain = DomainConfig(train="a.txt", weight=0.25)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, domains=(("a", domain),)))
    plain = to_dict(config)
    assert plain["model"]["moe"]["losses"] == {"balance": 0.5, "z": 0.25}
    assert plain["data"]["domains"]["a"]["weight"] == 0.25
    assert from_mapping(ExperimentConfig, plain) == config
    assert from_mapping(ExperimentConfig, ConfigDict(plain)) == config
    assert from_mapping(ExperimentConfig, to_dict(ExperimentConfig())) == ExperimentConfig()


def test_hash_is_of_the_values():
    config = ExperimentConfig()
    assert config_hash(config) == config_hash(from_mapping(ExperimentConfig, to_dict(config)))
    assert re.fullmatch(r"[0-9a-f]{12}", config_hash(config))
    assert config_hash(dataclasses.replace(config, train=TrainConfig(steps=101))) != config_hash(config)
    elsewhere = dataclasses.replace(config, data=dataclasses.replace(config.data, root="elsewhere", cache_dir="here"))
    assert config_hash(elsewhere) == config_hash(config)


def test_a_whole_number_is_a_float_and_not_the_reverse():
    rate = from_mapping(TrainConfig, {"learning_rate": 1}).learning_rate
    assert rate == 1.0 and isinstance(rate, float)
    with pytest.raises(ConfigError, match=r"config\.steps=1\.0: expected int, got float"):
        from_mapping(TrainConfig, {"steps": 1.0})


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"modle": {}}, r"config\.modle: unknown field; did you mean 'model'\?"),
        ({"qqq": 1}, r"config\.qqq: unknown field; known fields: .*train"),
        ({"model": {"moe": {"router": {"kk": 1}}}}, r"config\.model\.moe\.router\.kk: unknown field"),
        ({"model": 3}, r"config\.model=3: expected a group of fields, not a int"),
        ({"name": 3}, r"config\.name=3: expected str, got int"),
        ({"name": None}, r"config\.name=None: expected str"),
        ({"train": {"steps": True}}, r"config\.train\.steps=True: expected int, got bool"),
        ({"train": {"learning_rate": "1e-3"}}, r"config\.train\.learning_rate='1e-3': expected float, got str"),
        ({"model": {"activation": "relux"}}, r"activation='relux': choose one of .*did you mean 'relu'\?"),
        ({"model": {"remat": "zzz"}}, r"remat='zzz': choose one of 'none', 'block', 'dots'$"),
        ({"table": {"arms": "score"}}, r"config\.table\.arms='score': expected a tuple, e\.g\. \('score',\)"),
        ({"table": {"seeds": ("a",)}}, r"config\.table\.seeds\[0\]='a': expected int, got str"),
        ({"data": {"domains": {"a": {"trian": "x"}}}}, r"domains\.a\.trian: unknown field; did you mean 'train'\?"),
        ({"model": {"moe": {"losses": {"z": "much"}}}}, r"config\.model\.moe\.losses\.z='much': expected float"),
    ],
)
def test_from_mapping_names_field_value_and_way_out(mapping: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        from_mapping(ExperimentConfig, mapping)


# --- checks across fields -----------------------------------------------------------------------------------------


def changed(path: str, value: Any) -> ExperimentConfig:
    """The default config with one field set."""
    plain = to_dict(ExperimentConfig())
    *groups, name = path.split(".")
    place = plain
    for group in groups:
        place = place[group]
    place[name] = value
    return from_mapping(ExperimentConfig, plain)


def test_the_default_config_is_valid():
    validate.check(ExperimentConfig())


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        *((path, low - 1, f"{path}={low - 1}.*: must be {low} or more") for path, low in validate.AT_LEAST.items()),
        *(
            (f"model.{path}", low - 1, f"{path}={low - 1}.*: must be {low} or more")
            for path, low in validate.MODEL_AT_LEAST.items()
        ),
        ("train.weight_decay", float("nan"), "train.weight_decay=nan: must be 0 or more"),
        ("train.weight_decay", float("inf"), "train.weight_decay=inf: must be a finite number, 0 or more"),
        *((f"train.{b}", 1.0, rf"train.{b}=1.0: must be 0 or more, and below 1") for b in ("b1", "b2")),
        ("train.b2", float("nan"), "train.b2=nan: must be 0 or more"),
        *(
            (f"model.moe.router.{name}", value, rf"model.moe.router.{name}={value}: must be {rule}")
            for name, value, rule in (
                ("scale", float("nan"), "a finite number above 0"),
                ("scale", float("inf"), "a finite number above 0"),
                ("scale", 0.0, "a finite number above 0"),
                ("jitter", float("nan"), "0 or more"),
                ("jitter", 1.0, "0 or more, and below 1"),
                ("bias_update_rate", float("nan"), "0 or more"),
                ("bias_update_rate", float("inf"), "a finite number, 0 or more"),
            )
        ),
        *(
            ("model.moe.losses", {name: value}, f"moe.losses.{name}={value}: must be a finite number, 0 or more")
            for name, value in (("balance", -0.01), ("balance", float("nan")), ("z", float("inf")))
        ),
        ("train.learning_rate", 0.0, "train.learning_rate=0.0: must be a finite number above 0"),
        ("train.learning_rate", float("nan"), "train.learning_rate=nan"),
        ("train.clip_norm", 0.0, "train.clip_norm=0.0: must be above 0"),
        ("train.accumulate", 3, "train.batch_size=16 is not divisible by train.accumulate=3"),
        ("train.warmup_steps", 100, r"train.warmup_steps=100 must lie in \[0, train.steps=100\)"),
        ("data.source", "files", "data.source='files' needs data.domains"),
        ("data.seq_len", 1, "data.seq_len=1: must be 2 or more"),
        ("mesh.expert", 3, r"moe.num_experts=8 not divisible by mesh axis 'expert'=3: choose one of \[1, 2, 4, 8\]"),
        ("mesh.data", 0, "mesh.data=0: must be 1 or more, or -1"),
        ("model.norm_eps", float("nan"), "model.norm_eps=nan: must be 0 or more"),
        *(
            (f"model.attention.{name}", float("inf"), f"attention.{name}=inf: must be a finite number, 0 or more")
            for name in ("softmax_scale", "clip_qkv", "score_softcap", "temperature")
        ),
        *(
            (
                "model.attention.rope",
                {"scaling": "yarn", "factor": 2.0, "original_length": 8, name: float("inf")},
                f"attention.rope.{name}=inf with scaling='yarn': must be a finite number",
            )
            for name in ("beta_fast", "attention_factor")
        ),
        ("model.attention.num_kv_heads", 3, "num_heads=4 is not a multiple of num_kv_heads=3"),
        ("model.attention.head_dim", 31, "attention.head_dim=31 is odd"),
        ("model.moe.num_experts", 0, "moe.num_experts=0: must be 1 or more"),
        ("model.moe.expert_dim", 0, "moe.expert_dim=0: must be 1 or more"),
        ("model.moe.router.name", "topk", "router.name='topk': choose one of .*topk_of_softmax"),
        ("model.moe.router.k", 9, r"router.k=9 must lie in \[1, num_experts=8\]"),
        ("model.moe.router.k", 0, r"router.k=0 must lie in \[1, num_experts=8\]"),
        ("model.moe.router.name", "switch", "router.k=2 does not fit router.name='switch'"),
        ("model.moe.router.name", "expert_choice", "leaks the future .*noncausal='allow'"),
        (
            "model.moe.virtual_ranks",
            3,
            r"num_experts=8 not divisible by moe.virtual_ranks=3: choose one of \[1, 2, 4, 8\]",
        ),
        (
            "model.moe.ep_exchange",
            "chunked",
            "ep_exchange='chunked' is a setting of moe.dispatcher='ep', and that is 'local'",
        ),
        ("model.moe.ep_buffer_factor", 1.5, "ep_buffer_factor=1.5 is a setting of moe.dispatcher='ep'"),
        ("model.moe", {"dispatcher": "ep", "ep_buffer_factor": float("inf")}, "ep_buffer_factor=inf: must be a finite"),
        ("model.moe.ep_chunks", 3, "ep_chunks=3 is a setting of moe.ep_exchange='chunked', and that is 'auto'"),
        (
            "model.moe",
            {"dispatcher": "ep", "ep_exchange": "padded", "ep_chunks": 3},
            "ep_chunks=3 is a setting of moe.ep_exchange='chunked', and that is 'padded': set it to 'chunked', or",
        ),
        (
            "model.moe",
            {"dispatcher": "ep", "ep_exchange": "chunked", "router": {"name": "expert_choice", "noncausal": "allow"}},
            "ep_exchange='chunked' cuts tokens .* router.name='expert_choice'",
        ),
        ("model.moe.losses", {"balanc": 1.0}, "moe.losses.balanc: unknown loss"),
        ("model.moe.losses", {"load": 1.0}, "moe.losses.load=1.0 has no gradient with router.name='topk_of_softmax'"),
    ],
)
def test_check_names_field_value_and_rule(path: str, value: Any, message: str):
    with pytest.raises(ConfigError, match=message):
        validate.check(changed(path, value))


def expert_parallel(ranks: int, **moe: Any) -> ExperimentConfig:
    return from_mapping(
        ExperimentConfig, {"model": {"moe": {"dispatcher": "ep", **moe}}, "mesh": {"data": 1, "expert": ranks}}
    )


def test_expert_parallelism_is_checked_against_mesh_and_platform():
    validate.check(expert_parallel(4))
    one = expert_parallel(1, virtual_ranks=4, ep_exchange="ragged")  # one rank is local: nothing is exchanged
    validate.check(one)
    validate.check_devices(one, 1)
    with pytest.raises(
        ConfigError, match=r"virtual_ranks=2 with moe\.dispatcher='ep' on mesh\.expert=4: .* virtual_ranks=1"
    ):
        validate.check(expert_parallel(4, virtual_ranks=2))
    with pytest.raises(ConfigError, match=r"num_experts=8 not divisible by mesh axis 'expert'=3"):
        validate.check(expert_parallel(3))
    validate.check_devices(expert_parallel(4), 4)
    with pytest.raises(ConfigError, match=r"ep_exchange='ragged' cannot run on a CPU"):
        validate.check_devices(expert_parallel(4, ep_exchange="ragged"), 4)


def test_a_model_without_experts_needs_no_valid_router():
    config = changed("model.moe.first_dense", 2)
    assert not validate.has_experts(config.model)
    validate.check(config)
    assert validate.has_experts(changed("model.moe.first_dense", 1).model)


def test_check_devices():
    config = changed("train.accumulate", 2)
    validate.check_devices(config, 8)
    with pytest.raises(
        ConfigError,
        match=r"train\.batch_size=16 not divisible by train\.accumulate=2 x 3 devices .*multiple of 6; eval",
    ):
        validate.check_devices(config, 3)
    with pytest.raises(ConfigError, match=r"^eval\.batch_size=12 not divisible by 8 devices"):
        validate.check_devices(changed("eval.batch_size", 12), 8)
    with pytest.raises(ConfigError, match=r"^table\.batch_size=12 not divisible by 8 devices"):
        validate.check_devices(changed("table.batch_size", 12), 8)
    with pytest.raises(ConfigError, match=r"^model\.attention\.num_heads=4 not divisible by mesh axis 'model'=8"):
        validate.check_devices(changed("mesh.model", 8), 1)


VIRTUAL = {"model": {"moe": {"virtual_ranks": 8}}, "train": {"batch_size": 16}, "data": {"seq_len": 30}}


@pytest.mark.parametrize(
    ("changes", "shards", "message"),
    [
        ({}, 4, ""),  # 120 tokens in all batches on a device
        ({}, 8, r"=8 does not divide the 60 tokens of a training micro-batch on a device, 2 x 30 .* a multiple of 32"),
        (
            {"train": {"batch_size": 48, "accumulate": 4}},
            2,
            r"the 180 tokens of a training micro-batch on a device, 6 x 30 with train\.batch_size=48 and "
            r"data\.seq_len=30: choose a divisor of 180, or train\.batch_size as a multiple of 32",
        ),
        (
            {"eval": {"batch_size": 5}},
            1,
            r"^model\.moe\.virtual_ranks=8 does not divide the 150 tokens of an evaluation batch on a device, 5 x 30 "
            r"with eval\.batch_size=5 and data\.seq_len=30: choose a divisor of 150, or eval\.batch_size as a "
            r"multiple of 4$",
        ),
        ({"table": {"batch_size": 5}}, 1, ""),  # there is no table
        ({"table": {"batch_size": 5, "name": "dualsparse"}}, 1, r"the 150 tokens of a table's batch on a device"),
        ({"train": {"batch_size": 5, "steps": 0}, "init_from": "there"}, 1, ""),  # nothing is trained
        ({"model": {"moe": {"virtual_ranks": 8, "first_dense": 2}}, "eval": {"batch_size": 5}}, 1, ""),  # no experts
    ],
)
def test_virtual_ranks_divide_the_tokens_of_every_batch(changes: dict[str, Any], shards: int, message: str):
    config = from_mapping(ExperimentConfig, {**VIRTUAL, **changes})
    validate.check(config)
    if not message:
        return validate.check_devices(config, shards)
    with pytest.raises(ConfigError, match=message):
        validate.check_devices(config, shards)


# --- config files -------------------------------------------------------------------------------------------------


def test_base_has_every_field_with_its_default():
    expected = to_dict(ExperimentConfig())
    expected["model"]["vocab_size"] = 0  # the tokenizer's
    found = base.get_config().to_dict()
    found["data"]["domains"] = found["data"]["domains"] or []  # no pairs
    assert found == from_tuples(expected, found)


def from_tuples(expected: Any, found: Any) -> Any:
    """``expected`` with lists as tuples where ``found`` has tuples."""
    if isinstance(expected, dict):
        return {k: from_tuples(v, found[k]) if k in found else v for k, v in expected.items()}
    return tuple(expected) if isinstance(found, tuple) else expected


def test_all_config_files_are_tested():
    names = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in (ROOT / "configs").rglob("*.py")
        if "def get_config" in path.read_text(encoding="utf-8")
    }
    # configs.pretrained takes a folder: tests/test_pretrained.py
    assert names == {"configs.base", "configs.pretrained", *FILES}


@pytest.mark.parametrize(("module", "variant"), VARIANTS)
def test_config_files_build_validate_and_count(module: str, variant: str):
    config = load(module, variant)
    validate.check(config)
    assert from_mapping(ExperimentConfig, to_dict(config)) == config
    assert config.name.endswith(f":{variant}")
    assert config.model.moe.router.name in routing.FAMILIES
    counted = count.parameters(config.model)
    assert 0 < counted.active <= counted.total
    for shards in (1, 2, 4):
        validate.check_devices(config, shards)


@pytest.mark.parametrize("module", FILES)
def test_an_unknown_variant_is_refused_by_name(module: str):
    with pytest.raises(ValueError, match=r"variant 'huge'.*choose .*(tiny|full)"):
        importlib.import_module(module).get_config("huge")


@pytest.mark.parametrize("name", LAB)
def test_lab_models_have_at_most_25_million_parameters(name: str):
    config = load(f"configs.lab.{name}", "h100").model
    total = count.parameters(with_vocab(config, 4160)).total
    assert 15e6 < total <= 25e6


def test_capacity_aware_h100_has_about_100_million_parameters():
    config = load("configs.papers.capacity_aware", "h100").model
    assert 90e6 <= count.parameters(with_vocab(config, 8256)).total <= 120e6
    assert (config.moe.num_experts, config.moe.router.k) == (64, 8)


def test_capacity_aware_table_is_the_papers():
    config = load("configs.papers.capacity_aware", "tiny")
    assert config.table.arms == capacity_aware.ARMS == ("order", "reverse", "random", "score")
    assert config.table.factors == (2.0, 1.5, 1.0, 0.75, 0.5)
    assert config.table.margin == 0.005


def test_attention_defaults_are_consistent():
    a = AttentionConfig()
    assert a.num_heads * a.head_dim == ModelConfig().dim
