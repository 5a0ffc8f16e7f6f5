"""``--limit``: the limits that a command puts in force on a checkpoint, as text (``docs/limits.md``)."""

import numpy as np
from absl import flags

from experiments import session
from moejax import limits, routing
from moejax.config import ConfigError, ModelConfig
from moejax.model import moe_layer_ids
from moejax.types import Limit

OWN = "config"


def define_flags(values: flags.FlagValues, name: str = "limit") -> None:
    flags.DEFINE_multi_string(
        name, [], f"Limit of each MoE layer, e.g. token_drop:factor=1.5,order=score; several act in turn; {OWN!r}: "
        f"the checkpoint's own. One of {', '.join(limits.LIMITS)}. None: dropless.", flag_values=values,
    )  # fmt: skip
    flags.DEFINE_bool(
        "limit_decode", False, f"--{name} acts on the tokens of decoding steps too, not on prompts alone.",
        flag_values=values,
    )  # fmt: skip


def given(values: flags.FlagValues, model: ModelConfig, name: str = "limit") -> tuple[Limit, ...]:
    """The limits that the flags ask for, checked against the checkpoint's model.

    Raises:
      ConfigError: a limit that there is not, that does not fit the model, that draws at random, or that would leave
        decoding steps nothing.
    """
    made: list[Limit] = []
    texts: list[str] = values[name].value or []
    if not texts and model.moe.capacity_limits and ("dropless" not in values or values.dropless):
        session.say(
            f"note: the checkpoint's config has limits, which are not in force here: --{name}={OWN} puts them in force"
        )
    if OWN in texts and not limits.of_config(model.moe):
        raise ConfigError(f"--{name}={OWN}: the checkpoint's config has no limit; name one, or leave the flag out")
    for text in texts:
        made += limits.of_config(model.moe) if text == OWN else [limits.parse(text)]
    if values.limit_decode and not made:
        raise ConfigError(f"--limit_decode needs a limit: --{name}=token_drop:factor=1.5,rounding=at_least_one")
    layers = len(moe_layer_ids(model))
    if made and not layers:
        raise ConfigError(f"--{name}={texts[0]}: the checkpoint is of a model without experts")
    limits.check(made, model.moe, layers, causal=routing.FAMILIES[model.moe.router.name].causal)
    for limit in made:
        if getattr(limit, "order", None) == "random":
            raise ConfigError(
                f"--{name}: order=random needs a draw for each call, and there is none here: choose another"
            )
        if values.limit_decode and getattr(limit, "rounding", "ceil") == "floor":
            raise ConfigError(
                "--limit_decode: rounding=floor leaves the few tokens of a decoding step no pair at all (the mean load "
                "of one token is k/E); add rounding=at_least_one or rounding=ceil to the limit"
            )
        if (factor := getattr(limit, "factor", None)) is not None and not np.any(factor):
            session.say(
                f"note: {type(limit).__name__} with a factor of 0 drops every pair: the model runs without its routed "
                "experts. For no limit leave the flag out"
            )
        by_rank = isinstance(limit, limits.ExpandedDrop | limits.DeviceBudget | limits.MeasuredBudget)
        by_rank |= getattr(limit, "load_aware", "none") != "none"
        if by_rank and not getattr(limit, "ranks", 0) and model.moe.virtual_ranks == 1 and model.moe.dispatcher != "ep":
            session.say(
                f"note: {type(limit).__name__} on one rank, which hosts all experts: Expanded Drop is expert choice "
                "then, a budget is that of all experts together, and load_aware spares nobody; moe.virtual_ranks or "
                "ranks= says otherwise"
            )
    return tuple(made)
