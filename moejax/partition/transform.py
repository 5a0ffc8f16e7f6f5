"""ExpertTransform (seam 3): rewrites a layer's experts, and remaps the Routing onto the rewritten ones.

The default list is empty. :class:`Identity` is the neutral element that the law "transforming by nothing changes
nothing" is tested with.
"""

from typing import Protocol

from moejax.types import ExpertWeights, Routing, pytree


class ExpertTransform(Protocol):
    """A pure pair of functions; ``remap`` must point every pair at the experts that ``weights`` made of its own."""

    def weights(self, weights: ExpertWeights) -> ExpertWeights: ...

    def remap(self, routing: Routing) -> Routing: ...


@pytree
class Identity:
    """Leaves experts and routing as they are."""

    def weights(self, weights: ExpertWeights) -> ExpertWeights:
        return weights

    def remap(self, routing: Routing) -> Routing:
        return routing
