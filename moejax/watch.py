"""Watching a run: warnings of a router that collapses, and what to say when a step is not finite any more.

Everything here works on the host, on sums that the training step returns anyway. ``docs/healthy.md`` says in a reader's
words what each warning means and what to do.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from moejax import metrics
from moejax.config import WatchConfig
from moejax.meter import Broken, Window
from moejax.train import StepMetrics

State = Literal["onset", "worse", "recovered"]
HYSTERESIS = 1.1
"""A value must be this factor beyond its bound before a layer counts as recovered, so that none flickers."""
FULL = 8
"""Badness of a complete collapse: what is so bad is not told of again."""
SHOWN = 8
"""Layers that a line or a table names; it counts the others."""


@dataclasses.dataclass(frozen=True)
class Alarm:
    """One line of warning."""

    step: int
    rule: str
    state: State
    layers: tuple[int, ...]
    """Those over the bound now; for "recovered", those that were."""
    value: float
    """Of the worst layer (dead experts: their number; others as in ``WatchConfig``)."""
    bound: float
    text: str

    def row(self) -> dict[str, Any]:
        """The row of ``metrics.jsonl``."""
        return {"kind": "warning", **dataclasses.asdict(self), "layers": list(self.layers)}


@dataclasses.dataclass(frozen=True)
class Rule:
    """``badness`` of each layer is at least 1 over the bound, and doubles as the distance to the worst case halves."""

    name: str
    bound: float
    value: Callable[[dict[str, np.ndarray], int], np.ndarray]
    badness: Callable[[np.ndarray], np.ndarray]
    say: Callable[[float, int], str]
    """``(value of the worst layer, experts) ->`` the fact, as a sentence without its end."""


def rules(config: WatchConfig, choices: int) -> list[Rule]:
    """The rules that ``config`` switches on, for routers that choose among ``choices`` ids."""
    found = []
    if config.dead_experts:
        found.append(Rule(
            "dead experts", config.dead_experts,
            lambda f, experts: f["dead"],
            lambda v: v / config.dead_experts,
            lambda v, experts: f"up to {v:.0f} of {experts} experts of a layer got no pair at all",
        ))  # fmt: skip
    if config.min_load_entropy:
        found.append(Rule(
            "load entropy", config.min_load_entropy,
            lambda f, experts: f["load_entropy"],
            lambda v: config.min_load_entropy / np.maximum(v, config.min_load_entropy / FULL),
            lambda v, experts: f"load entropy down to {v:.2f} (1 is even, 0 is all tokens on the same experts)",
        ))  # fmt: skip
    if config.max_busiest:
        room = max(1 - config.max_busiest, 1e-6)
        found.append(Rule(
            "busiest expert", config.max_busiest,
            lambda f, experts: f["busiest"],
            lambda v: np.where(v < config.max_busiest, v / config.max_busiest, room / np.maximum(1 - v, room / FULL)),
            lambda v, experts: f"the busiest expert is {v:.0%} of the way from its even share to all tokens",
        ))  # fmt: skip
    if config.min_router_entropy:
        found.append(Rule(
            "router entropy", config.min_router_entropy,
            lambda f, experts: f["entropy"] / math.log(choices),
            lambda v: config.min_router_entropy / np.maximum(v, config.min_router_entropy / FULL),
            lambda v, experts: f"router entropy down to {v:.1%} of ln {choices}: its softmax is saturated",
        ))  # fmt: skip
    return found


class LoadWatch:
    """Tells when the router of a layer collapses: once when it begins, again when it worsens, and when it is over.

    Args:
      config: bounds.
      experts: in each layer, that compute; with one expert nothing can be uneven.
      layers: indices of the MoE layers.
      begin: windows that hold an earlier step are not judged.
      zero_experts: zero-computation experts beside them, which the router's entropy is over too.
    """

    def __init__(
        self, config: WatchConfig, experts: int, layers: list[int], begin: int = 0, zero_experts: int = 0
    ) -> None:
        self.config, self.experts, self.layers, self.begin = config, experts, layers, begin
        self.rules = rules(config, experts + zero_experts) if experts > 1 and layers else []
        self._window: Window | None = None
        self._bad: dict[str, dict[int, float]] = {rule.name: {} for rule in self.rules}  # layer -> badness said
        self._since: dict[str, int] = {}
        self._alarms: list[Alarm] = []

    def look(self, step: int, window: Window | None) -> list[Alarm]:
        """What is new at ``step``, whose last steps are ``window``. Short windows are put together first, until an
        expert's even share of them is ``min_pairs``: by chance alone none then stays without a pair (an even router
        leaves one out with probability under exp(-min_pairs))."""
        if window is None or not self.rules or step - window.steps < self.begin:
            return []
        window = window if self._window is None else self._window + window
        if window.routed.sum(axis=1).min() / self.experts < self.config.min_pairs:
            self._window = window
            return []
        self._window = None
        figures = metrics.load_figures(window.routed, window.tokens, window.entropy_sum)
        alarms = [alarm for rule in self.rules if (alarm := self._judge(rule, step, window.steps, figures))]
        self._alarms += alarms
        return alarms

    def summary(self) -> list[str]:
        """What a reader should know at the end of the run, a line for each rule that gave a warning."""
        lines = []
        for rule in self.rules:
            told = [alarm for alarm in self._alarms if alarm.rule == rule.name]
            if not told:
                continue
            bad = self._bad[rule.name]
            times = sum(alarm.state == "onset" for alarm in told)
            now = f"still so in {_names(bad, self.layers)}" if bad else f"recovered at step {told[-1].step}"
            lines.append(f"{rule.name}: warned {times} time(s), last since step {self._since[rule.name]}, {now}")
        return lines

    def _judge(self, rule: Rule, step: int, steps: int, figures: dict[str, np.ndarray]) -> Alarm | None:
        values = np.asarray(rule.value(figures, self.experts), np.float64)
        badness = np.asarray(rule.badness(values), np.float64)
        told = self._bad[rule.name]
        over = {i for i, b in enumerate(badness) if b >= 1 or (i in told and b > 1 / HYSTERESIS)}
        if not over:
            if not told:
                return None
            worst, before = int(np.argmax(badness)), sorted(told)
            self._bad[rule.name] = {}
            text = f"{rule.name}: recovered in {_names(before, self.layers)} (since step {self._since[rule.name]})"
            return self._alarm(rule, step, "recovered", before, values[worst], text)
        new = over - told.keys()
        worse = {i for i in over & told.keys() if badness[i] >= 2 * told[i]}
        self._bad[rule.name] = {i: max(badness[i], 1.0) if i in new | worse else told[i] for i in over}
        if not new and not worse:
            return None
        state: State = "worse" if told else "onset"
        if state == "onset":
            self._since[rule.name] = step
        worst = max(over, key=lambda i: badness[i])
        lead = f"{rule.name}{', worse' if state == 'worse' else ''}: {_names(over, self.layers)}"
        text = f"{lead}: {rule.say(values[worst], self.experts)} (last {steps} steps)"
        return self._alarm(rule, step, state, sorted(over), values[worst], text)

    def _alarm(self, rule: Rule, step: int, state: State, places: list[int], value: float, text: str) -> Alarm:
        return Alarm(step, rule.name, state, tuple(self.layers[i] for i in places), float(value), rule.bound, text)


def _names(places: Any, layers: list[int]) -> str:
    named = [str(layers[i]) for i in sorted(places)]
    more = f" and {len(named) - SHOWN} more" if len(named) > SHOWN else ""
    return f"layer{'s' if len(named) > 1 else ''} {', '.join(named[:SHOWN])}{more}"


# --- a step that is not finite ---------------------------------------------------------------------


def layer_statistics(m: StepMetrics, moe_layers: list[int]) -> list[dict[str, float]]:
    """For each layer, in order: ``layer``, ``grad_norm``; for MoE layers also ``logsumexp`` (root of the mean square of
    logsumexp of the router logits), ``entropy`` (nats) and ``max_over_mean``."""
    found: list[dict[str, float]] = [
        {"layer": i, "grad_norm": float(norm)} for i, norm in enumerate(np.asarray(m.layer_grad_norm))
    ]
    if m.moe is not None:
        tokens = np.maximum(np.asarray(m.moe.tokens, np.float64), 1.0)
        logsumexp = np.sqrt(np.asarray(m.moe.z_sum, np.float64) / tokens)
        entropy = np.asarray(m.moe.entropy_sum, np.float64) / tokens
        routed = np.asarray(m.moe.routed, np.float64)
        load = routed.max(axis=1) / np.maximum(routed.mean(axis=1), 1e-9)
        for place, i in enumerate(moe_layers):
            found[i] |= {"logsumexp": float(logsumexp[place]), "entropy": float(entropy[place]),
                         "max_over_mean": float(load[place])}  # fmt: skip
    return found


def where_it_began(m: StepMetrics, moe_layers: list[int]) -> str:
    """One sentence on the place of the first value that is not finite: forwards first, then backwards, then the
    update."""
    layers = layer_statistics(m, moe_layers)
    routers = [s for s in layers if "logsumexp" in s]
    wrong = [s for s in routers if not (math.isfinite(s["logsumexp"]) and math.isfinite(s["entropy"]))]
    if wrong:
        first = int(wrong[0]["layer"])
        sound = [int(s["layer"]) for s in routers if s["layer"] < first]
        since = f"that of layer {sound[-1]} is finite" if sound else "no router stands before it"
        return f"forwards, the first router whose logits are not finite is that of layer {first} ({since})"
    if not math.isfinite(float(m.loss)):
        behind = f"behind the router of layer {int(routers[-1]['layer'])}" if routers else "in the forward pass"
        return f"every router is finite: it began {behind}, up to the logits"
    outer = [name for name in ("unembed", "final_norm") if not math.isfinite(float(m.outer_grad_norm.get(name, 0.0)))]
    deep = [int(s["layer"]) for s in layers if not math.isfinite(s["grad_norm"])]
    if outer:
        return f"the loss is finite; backwards, the gradient of {outer[0]} is the first that is not"
    if deep:
        return f"the loss is finite; backwards, the gradient of layer {deep[-1]} is the first that is not"
    if not math.isfinite(float(m.grad_norm)):
        return "the loss is finite; the gradient of the embedding is not"
    return "loss and gradients are finite; the update made parameters that are not, or are beyond 1e19"


def statistics_table(broken: Broken, moe_layers: list[int]) -> list[str]:
    """The layers' statistics as lines, worst first: not finite ones in order of depth, then by gradient norm. In
    brackets: the step before."""
    now = layer_statistics(broken.metrics, moe_layers)
    before = layer_statistics(broken.before, moe_layers) if broken.before is not None else [{} for _ in now]
    columns = {"grad_norm": "gradient norm", "logsumexp": "router logsumexp", "entropy": "router entropy",
               "max_over_mean": "load max/mean"}  # fmt: skip

    def rank(pair: tuple[dict, dict]) -> tuple[bool, float, float]:
        stats, old = pair
        broke = not all(math.isfinite(v) for v in stats.values())
        size = old.get("grad_norm", 0.0) if broke else stats["grad_norm"]
        return (not broke, stats["layer"] if broke else 0.0, -size)

    def cell(stats: dict, old: dict, name: str) -> str:
        if name not in stats:
            return "-"
        return f"{stats[name]:.4g}" + (f" ({old[name]:.4g})" if name in old else "")

    pairs = sorted(zip(now, before, strict=True), key=rank)
    lines = ["layer  " + "  ".join(f"{title:>22s}" for title in columns.values())]
    for stats, old in pairs[:SHOWN]:
        lines.append(f"{int(stats['layer']):5d}  " + "  ".join(f"{cell(stats, old, name):>22s}" for name in columns))
    if len(pairs) > SHOWN:
        lines.append(f"  ... and {len(pairs) - SHOWN} more layers (metrics.jsonl has all of them)")
    return lines


def failure_row(broken: Broken, moe_layers: list[int]) -> dict[str, Any]:
    """The row ``kind: "failure"`` of ``metrics.jsonl``; what is not finite is NaN or Infinity there."""
    m = broken.metrics
    row: dict[str, Any] = {
        "kind": "failure", "step": broken.step, "loss": float(m.loss), "grad_norm": float(m.grad_norm),
        "param_norm": float(m.param_norm), "outer_grad_norm": {k: float(v) for k, v in m.outer_grad_norm.items()},
        "layers": layer_statistics(m, moe_layers), "where": where_it_began(m, moe_layers),
    }  # fmt: skip
    if broken.before is not None:
        row["before"] = {"loss": float(broken.before.loss), "grad_norm": float(broken.before.grad_norm),
                         "layers": layer_statistics(broken.before, moe_layers)}  # fmt: skip
    return row


def failure_text(broken: Broken, moe_layers: list[int], good: str) -> str:
    """The message of a run that stops: the step, the layers, the last good checkpoint, and the way out."""
    m, old = broken.metrics, broken.before
    before = "" if old is None else (
        f"; step {broken.step - 1} was finite (loss {float(old.loss):.4g}, gradient norm {float(old.grad_norm):.4g})"
    )  # fmt: skip
    return (
        f"loss is {float(m.loss):.4g} at step {broken.step} (gradient norm {float(m.grad_norm):.4g}, parameter norm "
        f"{float(m.param_norm):.4g}){before}; {good}. Where: {where_it_began(m, moe_layers)}. Lower "
        "train.learning_rate or lengthen train.warmup_steps in a new --workdir, which --config.init_from begins with "
        "the parameters of a checkpoint (docs/healthy.md). Layers, worst first, in brackets the step before:\n"
        + "\n".join(statistics_table(broken, moe_layers))
    )
