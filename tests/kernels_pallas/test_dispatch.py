"""The choice of a back end, on a made-up operation and on the real ones."""

import types

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas import GROUPED_FFN, BackendRefused
from kernels_pallas.dispatch import Backend, Operation
from kernels_pallas.grouped_matmul import specs


def operation(order=("fast", "small", "slow")):
    backends = {
        "fast": Backend.missing("fast", "not installed"),
        "small": Backend("small", lambda x: "small", lambda x: f"x={x} is above 10" if x > 10 else None),
        "slow": Backend("slow", lambda x: "slow"),
        "spare": Backend("spare", lambda x: "spare"),
    }
    return Operation("double", backends, {"*": order})


@pytest.mark.parametrize(
    ("implementation", "x", "expected"),
    [
        (None, 1, "small"),
        (None, 11, "slow"),
        ("spare", 1, "spare"),
        (("fast", "spare"), 1, "spare"),
        (["slow", "small"], 1, "slow"),
    ],
)
def test_the_first_that_does_not_refuse_runs(implementation, x, expected):
    assert operation().select(implementation, x).run(x) == expected


def test_a_named_backend_that_cannot_run_is_an_error_and_not_a_fallback():
    with pytest.raises(BackendRefused, match=r"double: .*small: x=11 is above 10") as caught:
        operation().select("small", 11)
    assert caught.value.refusals == {"small": "x=11 is above 10"}


def test_if_all_refuse_every_reason_is_given():
    with pytest.raises(BackendRefused) as caught:
        operation().select(("fast", "small"), 11)
    assert caught.value.refusals == {"fast": "not installed", "small": "x=11 is above 10"}


@pytest.mark.parametrize("implementation", ["quick", ("slow", "quick"), ()])
def test_an_unknown_name_is_an_error_even_behind_one_that_runs(implementation):
    with pytest.raises(ValueError, match="must name one or more of"):
        operation().select(implementation, 1)


def test_explanation_names_the_choice_and_every_refusal():
    told = operation().explain(11)
    assert told.chosen == "slow"
    assert told.refusals == {"fast": "not installed", "small": "x=11 is above 10"}
    assert str(told).splitlines() == [
        f"double on {told.platform}: slow",
        "  fast: not installed",
        "  small: x=11 is above 10",
        "  spare: could run, by name only",
    ]
    assert operation().explain(11, implementation="small").chosen is None


MIXTRAL = (*specs.SHAPES["mixtral"].abstract(jnp.bfloat16), "swiglu")


def test_explanation_needs_shapes_only(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    told = GROUPED_FFN.explain(*MIXTRAL)
    assert told.chosen == "cpu_tiled"
    refusals = {name: reason for name, reason in told.refusals.items() if name != "tokamax"}  # it may be installed
    assert set(refusals) == {"mosaic_gpu", "mosaic_tpu"}
    assert refusals["mosaic_gpu"] == "needs a Hopper GPU, the platform is cpu"
    assert "cpu" in refusals["mosaic_tpu"]


@pytest.mark.parametrize(
    ("platform", "order"),
    [
        ("cpu", ("cpu_tiled", "ref")),
        ("gpu", ("mosaic_gpu", "padded", "ref")),
        ("tpu", ("mosaic_tpu", "padded", "ref")),
        ("abacus", ("padded", "ref")),
    ],
)
def test_default_order_follows_the_platform(monkeypatch, platform, order):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    told = GROUPED_FFN.explain(*MIXTRAL)
    assert told.order == order
    assert told.chosen == next(name for name in order if name not in told.refusals)


def no_gpu(platform):
    raise RuntimeError(f"Unknown backend: {platform!r}")


@pytest.mark.parametrize(
    ("devices", "chosen", "reason"),
    [
        (no_gpu, "padded", "no GPU is visible"),
        (lambda _: [types.SimpleNamespace(compute_capability="8.0")], "padded", "the device has 8.0"),
        (lambda _: [types.SimpleNamespace(compute_capability="9.0")], "mosaic_gpu", None),
    ],
)
def test_the_first_on_gpu_is_for_hopper(monkeypatch, devices, chosen, reason):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", devices)
    told = GROUPED_FFN.explain(*MIXTRAL)
    assert told.chosen == chosen
    if reason is None:
        assert "mosaic_gpu" not in told.refusals
    else:
        assert reason in told.refusals["mosaic_gpu"]
