"""The choice of a back end, on a made-up operation and on the real ones."""

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


def test_explanation_needs_shapes_only():
    told = GROUPED_FFN.explain(*specs.SHAPES["mixtral"].abstract(jnp.bfloat16), "swiglu")
    assert told.chosen == "cpu_tiled"
    assert told.refusals == {}


def test_default_order_follows_the_platform(monkeypatch):
    shapes = (*specs.SHAPES["mixtral"].abstract(jnp.bfloat16), "swiglu")
    chosen = {}
    for platform in ("cpu", "gpu", "tpu"):
        monkeypatch.setattr(jax, "default_backend", lambda platform=platform: platform)
        chosen[platform] = GROUPED_FFN.explain(*shapes).chosen
    assert chosen == {"cpu": "cpu_tiled", "gpu": "padded", "tpu": "padded"}
