"""The dispatchers that keep a token on its device: "local", and "dense", the slow reference."""

import dataclasses

from jaxtyping import Array, Float, Int

from moejax.dispatch import rows
from moejax.dispatch.plans import PLANS
from moejax.types import DispatchPlan, Routing


@dataclasses.dataclass(frozen=True)
class OneRank:
    """Each device computes its own tokens with the weights of all experts: a layer gathers those that lie elsewhere."""

    backend: str
    """A name in :data:`PLANS`."""
    split_experts: bool = False

    def send(
        self, x: Float[Array, "T D"], routing: Routing, *, weigh: bool = False
    ) -> tuple[Float[Array, "P D"], DispatchPlan]:
        """Rows in order of expert, and the plan. ``weigh``: rows times their gate weight."""
        plan = PLANS[self.backend](routing, x.shape[0])
        xs = rows.dispatch(x, plan, backend=self.backend, to_experts=True, from_tokens=True)
        return rows.weighted_rows(xs, routing.weight, plan, backend=self.backend) if weigh else xs, plan

    def group_sizes(self, plan: DispatchPlan) -> Int[Array, "... E"]:
        return plan.group_sizes

    def give_back(
        self, ys: Float[Array, "P D"], weight: Float[Array, "R K"], plan: DispatchPlan, num_tokens: int
    ) -> Float[Array, "T D"]:
        """The experts' rows, summed by token. Rows past the groups may hold anything."""
        return rows.combine(ys, weight, plan, num_tokens, backend=self.backend)

    def overflow(self, plan: DispatchPlan) -> Array:
        return plan.overflow

    def sent(self, routing: Routing, plan: DispatchPlan) -> Routing:
        """All of ``routing``: nothing is lost."""
        del plan
        return routing
