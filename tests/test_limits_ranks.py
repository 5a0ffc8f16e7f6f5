"""Every limit keeps and adds the same pairs on real ranks of expert parallelism and on virtual ones."""

import jax.numpy as jnp
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


def test_zero_computation_experts_compile_on_real_ranks():
    """XLA crashed, and the process with it, where ``limits.apply`` gave their pairs back by setting a slice."""
    limit = (limits.token_drop(0.75),)
    with quick_compilation():
        real = ranks.on((1, 2, 1), fakes.small_layer(dispatcher="ep", zero_experts=2), limit)
        virtual = ranks.on((1, 1, 1), fakes.small_layer(virtual_ranks=2, zero_experts=2), limit)
    ranks.assert_same_decisions(virtual, real)
    assert float(real[0][1].dropped) > 0
