"""``--replicate``: copies of busy experts on other devices (``docs/expert_parallelism.md``)."""

from collections.abc import Iterable

import numpy as np
from absl import flags
from jax.sharding import Mesh

from experiments import session
from moejax import replicas, trace
from moejax.config import ConfigError
from moejax.model import Decoder
from moejax.replication import max_over_mean, rank_loads, replicate
from moejax.types import Limit


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "replicate", None, "Trace (experiments.trace) whose busiest experts get copies on other devices of --mesh: the "
        "same outputs, evener loads.", flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer("replicas", 1, "Copies on each device, with --replicate.", 1, flag_values=values)


def check(values: flags.FlagValues) -> None:
    """Raises ConfigError for flags that do not go together, before anything is read."""
    if values.replicate is None and values["replicas"].present:
        raise ConfigError(f"--replicas={values.replicas} goes with --replicate=TRACE, which says what experts are busy")
    if values.replicate is not None and values.mesh is None:
        raise ConfigError("--replicate needs devices to put copies on: --mesh=data=1,expert=4, or how many there are")


def applied(values: flags.FlagValues, model: Decoder, mesh: Mesh | None, limits: Iterable[Limit] = ()) -> Decoder:
    """The model with the copies that the flags ask for; without them as it is. ``limits``: those in force.

    Raises:
      ConfigError: as :func:`moejax.trace.read`, :func:`moejax.replicas.check_limits` and
        :func:`moejax.replicas.with_copies`.
    """
    if values.replicate is None or mesh is None:
        return model
    replicas.check_limits(limits)
    with trace.read(values.replicate) as source:
        loads = replicas.recorded_loads(source)
    ranks, extra = mesh.shape["expert"], values.replicas
    model = replicas.with_copies(model, loads, mesh, extra)
    before = np.mean([max_over_mean(rank_loads(layer, ranks)) for layer in loads])
    after = np.mean([max_over_mean(rank_loads(layer, ranks, replicate(layer, ranks, extra))) for layer in loads])
    session.say(
        f"copies: {extra} more experts on each of {ranks} devices; the busiest has {after:.2f} times the mean load of "
        f"the trace instead of {before:.2f}, mean of {len(loads)} layers"
    )
    return model
