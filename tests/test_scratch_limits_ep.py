import jax, jax.numpy as jnp, numpy as np
from moejax import limits
from tests import moe_fakes as fakes
from tests import test_virtual_ranks as tv
from tests.small import quick_compilation

MINE = (limits.expanded_drop(1.0, keep_top1=True, renormalise=True), limits.expanded_drop(1.0, priority="topk", scope="fair"),
        limits.device_budget(0.8, expanded=True), limits.reroute(0.8, rounds=3), limits.measured_budget(),
        limits.token_drop(0.9, scope="request", rounding="ceil"), limits.expert_drop(share=0.25))

import os
MINE = MINE[int(os.environ["LIM"]):int(os.environ["LIM"])+1]
def test_mine(monkeypatch):
    def ctx(mask, **more):
        ids = jnp.broadcast_to(jnp.arange(tv.B, dtype=jnp.int32)[:, None], (tv.B, tv.S))
        from moejax.types import RouteContext
        return RouteContext(mask=jnp.asarray(mask), request_ids=ids if not isinstance(mask, jax.core.Tracer) else ids, **more)
    monkeypatch.setattr(tv, "context", ctx)
    with quick_compilation():
        real = tv.on((1, 4, 1), fakes.small_layer(dispatcher="ep"), MINE)
        virtual = tv.on((1, 1, 1), fakes.small_layer(virtual_ranks=4), MINE)
    tv.assert_same_decisions(virtual, real)
    for l, (r, m) in zip(MINE, real):
        print(type(l).__name__, float(m.dropped), float(m.added), m.exceeded)
    assert all(float(m.dropped) > 0 for _, m in real)
