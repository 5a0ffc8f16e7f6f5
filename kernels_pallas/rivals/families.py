"""The families by name: which module measures, and what its process needs."""

import dataclasses
import importlib
from types import ModuleType


@dataclasses.dataclass(frozen=True)
class Family:
    """What a family needs.

    Attributes:
        module: has `measurements(case, settings)`.
        path: name of the environment variable with the folders (separated as in PYTHONPATH) to import from first.
        patience: how much longer than other families it may take for one row, because it tunes itself.
        environment: variables of its process.
        team: whether several processes may take its cases in turn, so that they compile ahead.
    """

    module: str
    path: str | None = None
    patience: float = 1.0
    environment: tuple[tuple[str, str], ...] = ()
    team: bool = False

    def load(self) -> ModuleType:
        """The module; raises what its import raises."""
        return importlib.import_module(f"kernels_pallas.rivals.{self.module}")


NO_JAX = (("JAX_PLATFORMS", "cpu"),)  # torch's device memory is not shared with JAX in the same process

# In the order of a case's rows: ceilings, rivals, ours.
GROUPED = {
    "dense": Family("dense", patience=2.0),
    "torch": Family("torch_rivals", environment=NO_JAX),
    # Its temporaries are E times the operands: it must leave the others room.
    "lax": Family("jax_rivals", environment=(("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.45"),)),
    "example": Family("jax_example", patience=2.0),
    "tokamax": Family("tokamax_rivals", "MOEJAX_TOKAMAX", patience=4.0),
    "tokamax-triton": Family("tokamax_rivals", "MOEJAX_TOKAMAX_TRITON", patience=4.0),
    "ours": Family("ours", team=True),
}
LAYER = {
    "dense": Family("dense", patience=2.0),
    "transformers": Family("transformers_rivals", environment=NO_JAX),
    "liger": Family("liger_rivals", "MOEJAX_LIGER", patience=4.0, environment=NO_JAX),
    "ours": Family("layer", team=True),
}
