"""Limits as text: in configs, flags and traces; in a model, layer by layer; on prompts and decoding steps."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

from experiments import limit_flags, session
from moejax import decode, limits, model, replay, validate
from moejax.config import ConfigError, ExperimentConfig, MoEConfig, RouterConfig, config_hash
from moejax.trace import Chunk, describe_limits
from tests import limits_fakes as ref
from tests import moe_fakes as fakes
from tests.small import small_model

EXAMPLES = {
    "token_drop": "token_drop:factor=1.5,order=reverse,rounding=ceil,scope=fair,keep_top1=true,renormalise=1",
    "expanded_drop": "expanded_drop:factor=1,priority=topk,floor=0.05,added_weight=like_own",
    "reroute": "reroute:factor=1.25,rounds=3",
    "expert_drop": "expert_drop:share=0.1",
    "device_budget": "device_budget:factor=1,ranks=4,expanded=true",
    "measured_budget": "measured_budget:ranks=2,seconds_per_row=1e-6/2e-6",
    "skip_second": "skip_second:beta=0.25/0.5,renormalise=false",
    "threshold_drop": "threshold_drop:threshold=0.08/0.1,gap=0.01,major=64,load_aware=water,ranks=2",
    "opportunistic_drop": "opportunistic_drop:keep=2",
}


def test_every_limit_has_a_name_and_its_options_are_read():
    assert EXAMPLES.keys() == limits.LIMITS.keys()
    for text in EXAMPLES.values():
        (described,) = json.loads(json.dumps(limits.describe((limits.parse(text),))))
        for part in text.partition(":")[2].split(","):
            key, _, value = part.partition("=")
            found = described["amount" if key == "share" else key]
            if isinstance(found, bool):
                assert found == (value in ("true", "1"))
            elif isinstance(found, list):
                assert found == [float(np.float32(v)) for v in value.split("/")]
            else:
                assert found == (value if isinstance(found, str) else float(value)), (text, key)
    # at its defaults a limit says what it did before there were options: traces of then compare equal
    assert describe_limits((limits.token_drop(0.3),)) == [{"name": "TokenDrop", "factor": 0.3, "order": "score"}]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("tokendrop:factor=1", "there is no limit 'tokendrop'; did you mean 'token_drop'"),
        ("drop", "there is no limit 'drop'"),
        ("token_drop", "token_drop needs factor, e.g. token_drop:factor=1.5"),
        ("token_drop:facter=1", "'facter=1' is no option of token_drop"),
        ("token_drop:factor=1,factor=2", "'factor=2' is no option of token_drop, or stands twice"),
        ("token_drop:factor=high", "factor=high: must be a number"),
        ("token_drop:factor=1_5", "factor=1_5: must be a number"),
        ("token_drop:factor=-1", "factor=-1.0: a capacity factor is a multiple"),
        ("token_drop:factor=1/-1", "factor=-1.0"),
        ("token_drop:factor=1,order=last", "order=last: must be one of score, order, reverse, random"),
        ("token_drop:factor=1,rounding=up", "must be one of floor, ceil, at_least_one"),
        ("token_drop:factor=1,keep_top1=yes", "must be true or false"),
        ("token_drop:factor=1,order=random,scope=request", "nothing would be batch-invariant"),
        ("expanded_drop:factor=1,floor=nan", "floor=nan"),
        ("reroute:factor=1,rounds=0", "rounds=0: 1 or more"),
        ("reroute:factor=1,rounds=1.5", "must be a whole number"),
        ("expert_drop", "give a number of experts to skip, or a share"),
        ("expert_drop:experts=1,share=0.1", "give a number of experts to skip, or a share"),
        ("device_budget:factor=1,ranks=-1", "ranks=-1: a number of devices"),
        ("measured_budget:ranks=2,seconds_per_row=1", "give one time above 0 for each"),
    ],
)
def test_a_text_that_says_no_limit_is_refused(text: str, why: str):
    with pytest.raises(ConfigError) as error:
        limits.parse(text)
    assert why in str(error.value) and f"limit '{text}'" in str(error.value)


@pytest.mark.parametrize(
    ("moe", "why"),
    [
        ({"capacity_limits": ("token_drop",)}, "token_drop needs factor"),
        ({"capacity_limits": ("token_drop:factor=1",), "capacity_factor": 1.0}, "set the factor to 0"),
        ({"capacity_limits": ("token_drop:factor=1/2",)}, "2 factors for 1 MoE layers"),
        ({"capacity_limits": ("device_budget:factor=1,ranks=3",)}, "choose one of [1, 2, 4]"),
        ({"capacity_limits": ("expert_drop:experts=4",)}, "leaves none"),
        ({"capacity_limits": ("token_drop:factor=1,drop_first=1",)}, "needs a modality"),
        *(
            ({"capacity_limits": (text,), "router": RouterConfig("expert_choice", noncausal="allow")}, "rows of router")
            for text in ("expanded_drop:factor=1", "reroute:factor=1", "device_budget:factor=1,ranks=2,expanded=true")
        ),
    ],
)
def test_limits_that_do_not_fit_the_model_are_refused_before_anything_compiles(moe: dict, why: str):
    router = moe.pop("router", None)
    with pytest.raises(ConfigError) as error:
        validate.check_model(small_model(router, **moe))
    assert why in str(error.value)


def test_the_configs_limits_are_those_of_its_text_and_leave_the_hash_alone():
    assert limits.of_config(MoEConfig()) == ()
    found = limits.of_config(MoEConfig(capacity_limits=("reroute:factor=1", "expert_drop:experts=1")))
    assert [type(limit) for limit in found] == [limits.Reroute, limits.ExpertDrop]
    (old,) = limits.of_config(MoEConfig(capacity_factor=1.5, capacity_order="order"))
    assert limits.describe((old,)) == [{"name": "TokenDrop", "factor": 1.5, "order": "order"}]
    config = ExperimentConfig()
    tables = dataclasses.replace(config, table=dataclasses.replace(config.table, tables=("1", "sweep")))
    assert config_hash(tables) == config_hash(config)
    limited = dataclasses.replace(config.model, moe=MoEConfig(capacity_limits=("reroute:factor=1",)))
    assert config_hash(dataclasses.replace(config, model=limited)) != config_hash(config)


# --- in a model ---------------------------------------------------------------------------------------------


def test_a_factor_for_each_layer_of_a_model(compiled_once):
    """Layers are scanned; the first drops everything and the third nothing. Requests are numbered over the batch."""
    built = fakes.small_model(num_layers=3, moe={"capacity_limits": ("token_drop:factor=0/1/9,scope=request",)})
    tokens, documents = fakes.tokens(2, 8), np.repeat([[1, 2], [1, 3]], 4, axis=1)

    @jax.jit
    def run(built, tokens, limit):
        out = built(tokens, segment_ids=jnp.asarray(documents), limits=limit)
        return out.metrics.dropped, out.metrics.routed

    dropped, routed = map(np.asarray, run(built, tokens, None))
    assert dropped[0] == routed[0].sum() == 32 and 0 < dropped[1] < 32 and dropped[2] == 0
    even = limits.token_drop((0.0, 1.0, 9.0), scope="request")
    np.testing.assert_array_equal(run(built, tokens, (even,))[0], dropped)
    ids = np.asarray(model.requests(jnp.asarray(documents), jnp.asarray(tokens)))
    assert len(np.unique(ids)) == 4 and [len(np.unique(row)) for row in ids] == [2, 2]
    assert np.unique(np.asarray(model.requests(None, jnp.asarray(tokens)))).size == 2


def test_generation_limits_prompts_and_steps_only_where_asked(monkeypatch: pytest.MonkeyPatch):
    """Trap 1: the published models never limit a single token, so that scores of generation are of the prompt alone."""
    calls = []

    def prefill(model, tokens, lengths, places, limits=()):
        calls.append(("prompt", limits))
        return jnp.zeros((1, 4)), None

    def extend(model, token, cache, key, begin, ended, stops, sampler, steps, limits=()):
        calls.append(("steps", limits))
        return jnp.zeros((steps, 1), jnp.int32), None

    monkeypatch.setattr(decode, "prefill", prefill)
    monkeypatch.setattr(decode, "extend", extend)
    some, built = (limits.token_drop(1.0, rounding="at_least_one"),), fakes.small_model(num_layers=1)
    for given, steps, expected in (((), False, ()), (some, False, ()), (some, True, some)):
        calls.clear()
        assert len(list(decode.generate(built, [np.asarray([1])], 3, limits=given, limit_steps=steps))) == 3
        assert calls == [("prompt", given), ("steps", expected)]


def flags_of(*arguments: str) -> tuple | str:
    """The limits that these flags give on a small model, or the error."""
    found = []

    def command(values):
        found.append(limit_flags.given(values, small_model(capacity_limits=("reroute:factor=1",))))
        return 0

    assert session.call(lambda values, argv: limit_flags.define_flags(values), command, arguments) in (0, 2)
    return found[0] if found else ""


def test_flags_of_a_command(capsys: pytest.CaptureFixture[str]):
    assert flags_of() == ()
    assert (
        "--limit=config puts them in force" in capsys.readouterr().err
    )  # else a checkpoint of thresholds seems to drop
    found = flags_of("--limit=config", "--limit=token_drop:factor=1.5,rounding=ceil", "--limit_decode") or ()
    assert not found and "rounding=floor leaves the few tokens" in capsys.readouterr().err  # of the config's reroute
    found = flags_of("--limit=config", "--limit=token_drop:factor=1.5")
    assert [type(limit) for limit in found] == [limits.Reroute, limits.TokenDrop]
    assert "puts them in force" not in capsys.readouterr().err
    for arguments, why in (
        (("--limit=token_drop:factor=1,order=random",), "order=random needs a draw"),
        (("--limit_decode",), "--limit_decode needs a limit"),
        (("--limit=expert_drop:experts=9",), "leaves none"),
        (("--limit=nothing",), "there is no limit 'nothing'"),
    ):
        assert flags_of(*arguments) == "" and why in capsys.readouterr().err
    assert flags_of("--limit=token_drop:factor=0") and "drops every pair" in capsys.readouterr().err
    assert flags_of("--limit=token_drop:factor=0.5") and "drops every pair" not in capsys.readouterr().err
    flags_of("--limit=expanded_drop:factor=1")
    assert "Expanded Drop is expert choice then" in capsys.readouterr().err


def test_the_limit_of_a_config_that_has_none_is_refused():
    """Else a dropless model would be taken for a limited one."""
    values = flags.FlagValues()
    limit_flags.define_flags(values)
    values(["command", "--limit=config"])
    with pytest.raises(ConfigError, match="--limit=config: the checkpoint's config has no limit"):
        limit_flags.given(values, small_model())
    assert limit_flags.given(values, small_model(capacity_limits=("reroute:factor=1",)))


# --- on a trace ---------------------------------------------------------------------------------------------


def test_factors_of_layers_are_fitted_with_a_fixed_mean(monkeypatch: pytest.MonkeyPatch):
    """Two layers, one even and one skewed: capacity goes where dropping would cost more gate weight."""
    rng = np.random.default_rng(0)
    tables = [ref.routed(rng), ref.routed(rng, skew=1.0)]
    made = jax.tree.map(lambda *leaves: np.stack(leaves)[:, None], *tables)
    tokens = {name: np.zeros((1, ref.TOKENS), np.int32) for name in ("token_ids", "positions", "requests")}
    chunk = Chunk(made, made, tokens | {"mask": np.ones((1, ref.TOKENS), bool)}, None)

    class Source(types.SimpleNamespace):
        def __iter__(self):
            return iter([chunk])

    source = Source(layers=[0, 1], state={})
    monkeypatch.setattr(replay, "setting_of", lambda *_: replay.Setting((), None, 1))
    chosen, (fitted, even) = replay.fit_layer_factors(source, MoEConfig(), 1.5)  # ty: ignore[invalid-argument-type]
    assert chosen[1] > chosen[0] and np.mean(chosen) == pytest.approx(1.5)
    lost = sum(
        weight
        for table, factor in zip(tables, chosen, strict=True)
        for weight in [
            sum(float(table.weight[r, c]) for r, c in ref.pairs_of(table)
                if (r, int(table.expert[r, c])) not in ref.token_drop(table, factor))
        ]
    )  # fmt: skip
    whole = sum(float(table.weight.sum()) for table in tables)
    assert fitted == pytest.approx(lost / whole, rel=1e-5) and fitted < even
    with pytest.raises(ConfigError, match=r"mean=9\.0"):
        replay.fit_layer_factors(source, MoEConfig(), 9.0)  # ty: ignore[invalid-argument-type]
