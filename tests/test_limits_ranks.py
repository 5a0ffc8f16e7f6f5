"""Every limit keeps and adds the same pairs on real ranks of expert parallelism and on virtual ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import limits
from moejax.types import RouteContext
from tests import moe_fakes as fakes
from tests import test_virtual_ranks as ranks
from tests.small import quick_compilation

LIMITS = {
    "expanded_drop": limits.expanded_drop(1.0, keep_top1=True, renormalise=True),
    "expanded_drop, fair": limits.expanded_drop(1.0, priority="topk", scope="fair"),
    "device_budget": limits.device_budget(0.8, expanded=True),
    "reroute": limits.reroute(0.8, rounds=3),
    "measured_budget": limits.measured_budget(),
    "measured_budget, loads of all": limits.measured_budget(loads="all"),
    "token_drop, by request": limits.token_drop(0.9, scope="request", rounding="ceil"),
    "expert_drop": limits.expert_drop(share=0.25),
}


@pytest.mark.slow  # fast: tests/test_virtual_ranks.py, with a limit that adds pairs of the rank's own experts
@pytest.mark.parametrize("name", LIMITS)
def test_virtual_ranks_decide_as_real_ones_do(name: str, monkeypatch: pytest.MonkeyPatch):
    requests = jnp.broadcast_to(jnp.arange(ranks.B, dtype=jnp.int32)[:, None], (ranks.B, ranks.S))

    def context(mask, **more):
        return RouteContext(mask=jnp.asarray(mask), request_ids=requests, **more)

    monkeypatch.setattr(ranks, "context", context)
    with quick_compilation():
        real = ranks.on((1, 4, 1), fakes.small_layer(dispatcher="ep"), (LIMITS[name],))
        virtual = ranks.on((1, 1, 1), fakes.small_layer(virtual_ranks=4), (LIMITS[name],))
    ranks.assert_same_decisions(virtual, real)
    assert float(real[0][1].dropped) > 0


SUMMED = {
    "measured_budget": limits.measured_budget(loads="all"),
    "paper": limits.threshold_drop(0.3, load_aware="paper"),
    "water": limits.threshold_drop(0.3, load_aware="water"),
}


@pytest.mark.parametrize(
    "name", [*(pytest.param(n, marks=pytest.mark.slow) for n in ("measured_budget", "paper")), "water"]
)
def test_virtual_ranks_of_several_devices_sum_over_ranks_as_real_ones_do(name: str):
    limit = (SUMMED[name],)
    with quick_compilation():
        real = ranks.on((2, 2, 1), fakes.small_layer(dispatcher="ep"), limit)
        virtual = ranks.on((2, 1, 1), fakes.small_layer(virtual_ranks=2), limit)
    ranks.assert_same_decisions(virtual, real)
    assert float(real[0][1].dropped) > 0


def test_zero_computation_experts_compile_on_real_ranks():
    """XLA crashed, and the process with it, where ``limits.apply`` gave their pairs back by setting a slice."""
    limit = (limits.token_drop(0.75),)
    with quick_compilation():
        real = ranks.on((1, 2, 1), fakes.small_layer(dispatcher="ep", zero_experts=2), limit)
        virtual = ranks.on((1, 1, 1), fakes.small_layer(virtual_ranks=2, zero_experts=2), limit)
    ranks.assert_same_decisions(virtual, real)
    assert float(real[0][1].dropped) > 0


@pytest.mark.parametrize("loads", ["rank", "all"])
def test_ranks_may_decide_by_the_loads_of_all(loads: str):
    """Two ranks whose own tokens say otherwise than all tokens do: which device is slowest, which expert is idlest."""
    own = np.asarray([[0, 0, 0, 1, 1, 2, 3, 3], [0, 2, 3, 3, 3, 3, 3, 3]])  # experts 0, 1 and 2, 3 of two devices
    tables = jax.tree.map(
        lambda *leaves: jnp.stack(leaves),
        *[fakes.table(e[:, None], np.ones((8, 1)), np.ones((8, 1)), np.ones((8, 1)), 4) for e in own],
    )
    ctx = RouteContext(axis_name="rank")

    def kept(limit):
        return np.asarray(jax.vmap(lambda table: limit(table, ctx), axis_name="rank")(tables).valid[..., 0])

    sums = [np.bincount(e, minlength=4) for e in own]
    seen = [sum(sums)] * 2 if loads == "all" else sums
    budget, idle = kept(limits.measured_budget(ranks=2, loads=loads)), kept(limits.expert_drop(experts=1, loads=loads))
    for rank, (e, mine) in enumerate(zip(own, seen, strict=True)):
        device = mine.reshape(2, 2).sum(axis=1)
        share = device.min() / device.max()
        for d in range(2):
            pairs = (e // 2 == d).sum()
            want = np.floor(pairs * share + 1e-6) if device[d] > device[1 - d] else pairs
            assert budget[rank][e // 2 == d].sum() == want
        assert not idle[rank][e == mine.argmin()].any() and idle[rank][e != mine.argmin()].all()
    assert budget.sum() < 16 and sums[0].argmin() != sum(sums).argmin()
