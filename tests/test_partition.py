"""Expert partition (``moejax.partition.complete``): splitting is exact for every router family, merging inverts it bit
for bit, and copies of an expert are always chosen together."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax import checkpoint, losses, routing
from moejax.config import ConfigError, MoEConfig, RouterConfig
from moejax.moe import MoELayer
from moejax.partition import complete, spread
from moejax.types import MoEMetrics, RouteContext, Routing
from tests.moe_fakes import f64, gelu, sigmoid

D, F, E, T = 8, 16, 4, 19
FAMILIES = sorted(routing.FAMILIES)
ABLE = [name for name in FAMILIES if routing.FAMILIES[name].copied != "no"]


def smallest_k(name: str) -> int:
    family = routing.FAMILIES[name]
    return max(family.min_k, min(2, family.max_k or 2))


def config_of(name: str, **changes: Any) -> MoEConfig:
    """A layer with biases wherever there can be some, a scale, and shared experts; changes of its router too."""
    settings = routing.FAMILIES[name].settings
    router: dict[str, Any] = {"k": smallest_k(name), "noncausal": "allow", "scale": 1.7, "bias": "bias" in settings}
    moe: dict[str, Any] = {"num_experts": E, "expert_dim": F, "shared_experts": 1, "expert_bias": True}
    router |= {key: changes.pop(key) for key in list(changes) if key in RouterConfig.__dataclass_fields__}
    moe |= {"implementation": "ref", **changes}
    return MoEConfig(router=RouterConfig(name=name, **router), **moe)


def states_of(moe: MoEConfig, activation: str) -> tuple[Any, list]:
    layer = jax.eval_shape(lambda: MoELayer(moe, D, activation, jax.random.key(0)))  # ty: ignore[invalid-argument-type]
    graph, *states = nnx.split(layer, nnx.Param, ...)
    return graph, states


@functools.cache
def arrays_of(moe: MoEConfig, activation: str = "swiglu") -> dict[str, np.ndarray]:
    """The arrays of a layer by name, with random numbers in each."""
    rng = np.random.default_rng(0)
    shapes = {
        name: leaf.shape for state in states_of(moe, activation)[1] for name, leaf in checkpoint.flatten(state).items()
    }
    return {name: rng.normal(0, 0.7, shape).astype(np.float32) for name, shape in sorted(shapes.items())}


def made(moe: MoEConfig, arrays: dict[str, Any], activation: str = "swiglu") -> MoELayer:
    """The layer of ``moe`` with these arrays, all of them and no other."""
    graph, states = states_of(moe, activation)
    shapes = {name: leaf.shape for state in states for name, leaf in checkpoint.flatten(state).items()}
    assert {name: array.shape for name, array in arrays.items()} == shapes
    filled = [
        jax.tree.unflatten(jax.tree.structure(s), [jnp.asarray(arrays[n]) for n in checkpoint.flatten(s)])
        for s in states
    ]
    return nnx.merge(graph, *filled)


X = np.random.default_rng(1).normal(0, 1, (T, D)).astype(np.float32)


def route(x: Any, weights: dict[str, Any], router: RouterConfig, train: bool = False) -> Routing:
    """Operation by operation: those of one family are compiled for the next one too."""
    ctx = RouteContext(key=jax.random.key(3), train=train)
    return routing.FAMILIES[router.name].route(jnp.asarray(x), weights, ctx, router)


def router_weights(arrays: dict[str, Any]) -> dict[str, Any]:
    return {name.rpartition("/")[2]: array for name, array in arrays.items() if name.startswith("router/")}


def ffn(x: np.ndarray, arrays: dict[str, np.ndarray], e: int, activation: str) -> np.ndarray:
    up = x @ f64(arrays["store/up"][e]) + (f64(arrays["store/up_bias"][e]) if "store/up_bias" in arrays else 0)
    hidden = gelu(up)
    if "store/gate" in arrays:
        gate = x @ f64(arrays["store/gate"][e]) + (
            f64(arrays["store/gate_bias"][e]) if "store/gate_bias" in arrays else 0
        )
        hidden = (gate * sigmoid(gate) if activation == "swiglu" else gelu(gate)) * up
    bias = f64(arrays["store/down_bias"][e]) if "store/down_bias" in arrays else 0
    return hidden @ f64(arrays["store/down"][e]) + bias


def by_hand(
    moe: MoEConfig, arrays: dict[str, np.ndarray], activation: str = "swiglu", train: bool = False
) -> np.ndarray:
    """The routed experts' output, pair by pair in float64, with the pairs of the router family."""
    table = route(X, router_weights(arrays), moe.router, train)
    table = dataclasses.replace(table, zero_experts=moe.zero_experts)
    table = spread(table, moe.parts, apart=moe.parts_apart) if moe.parts > 1 else table
    expert, weight, valid = (np.asarray(leaf) for leaf in (table.expert, table.weight, table.valid))
    token = np.arange(T) if table.token is None else np.asarray(table.token)
    y = np.zeros((T, D))
    for row, column in zip(*np.nonzero(valid), strict=True):
        x, w, e = f64(X[token[row]]), float(weight[row, column]), expert[row, column]
        if e >= moe.stored_experts:
            y[token[row]] += w * x
        elif moe.weigh == "input":
            y[token[row]] += ffn(w * x, arrays, e, activation)
        else:
            y[token[row]] += w * ffn(x, arrays, e, activation)
    return y


def close(got: np.ndarray, wanted: np.ndarray) -> None:
    scale = np.abs(wanted).max()
    assert scale > 0.1
    np.testing.assert_allclose(got, wanted, atol=1e-6 * scale, rtol=0)


def check_law(
    moe: MoEConfig,
    parts: int,
    form: complete.Form,
    activation: str = "swiglu",
    order: complete.PartOrder | None = None,
) -> MoEConfig:
    """The split layer computes the same; merging gives the same bits, of parameters and of both moments."""
    arrays = arrays_of(moe, activation)
    split = complete.split_moe(moe, parts, form, order)
    cut = complete.split_arrays(arrays, moe, parts, form, part_order=order)
    assert form == "complete" or complete.merge_moe(split, parts)[0] == moe
    close(by_hand(split, cut, activation), by_hand(moe, arrays, activation))
    for name in arrays:
        if name.startswith("shared"):
            assert cut[name] is arrays[name]
    for moment in (0, 1, 2):
        there = complete.split_arrays(arrays, moe, parts, form, moment, order)
        back = complete.merge_arrays(there, split, parts, moment)
        assert back.keys() == arrays.keys()
        for name, array in arrays.items():
            assert back[name].dtype == array.dtype
            np.testing.assert_array_equal(back[name], array)
    return split


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_complete_form_computes_the_same(name: str, parts: int):
    moe = config_of(name)
    if name not in ABLE:
        with pytest.raises(ConfigError, match=r"has no complete form .*--form=partial"):
            complete.split_moe(moe, parts, "complete")
        return
    split = check_law(moe, parts, "complete")
    assert (split.num_experts, split.router.k, split.router.copies) == (E * parts, moe.router.k * parts, parts)
    assert split.expert_dim * parts == F


@pytest.mark.parametrize("name", FAMILIES)
def test_the_partial_form_computes_the_same(name: str):
    moe = config_of(name)
    split = check_law(moe, 2, "partial")
    assert dataclasses.replace(split, parts=1) == moe and (split.stored_experts, split.stored_dim) == (E * 2, F // 2)


@pytest.mark.parametrize("form", ["complete", "partial"])
def test_eight_parts(form: complete.Form):
    """Where weights are divided, and where they are kept."""
    for moe in (config_of("softmax_of_topk"), config_of("sigmoid_bias", renormalise=False)):
        assert check_law(moe, 8, form).stored_dim == 2


def test_parts_may_stand_apart():
    """Part p of all experts together: a whole layer's arrays by hand, zero-computation experts, parts of parts."""
    moe = config_of("softmax_bias", renormalise=False, zero_experts=2, k=3)
    for parts in (2, 8):
        split = check_law(moe, parts, "partial", order="part")
        assert (split.parts, split.part_order, split.router) == (parts, "part", moe.router)
    arrays, four = arrays_of(moe), complete.split_moe(moe, 4, "partial", "part")
    cut = complete.split_arrays(arrays, moe, 4, "partial", part_order="part")
    for e, part in np.ndindex(E, 4):
        neurons = slice(part * F // 4, (part + 1) * F // 4)
        np.testing.assert_array_equal(cut["store/up"][part * E + e], arrays["store/up"][e][:, neurons])
        np.testing.assert_array_equal(cut["store/down"][part * E + e], arrays["store/down"][e][neurons])
    two, parts, form = complete.merge_moe(four, 2)
    assert (two, form) == (complete.split_moe(moe, 2, "partial", "part"), "partial")
    halves = complete.merge_arrays(cut, four, 2)
    again = complete.split_arrays(halves, two, 2, "partial")
    for name in arrays:
        np.testing.assert_array_equal(again[name], cut[name])
        wanted = complete.split_arrays(arrays, moe, 2, "partial", part_order="part")[name]
        np.testing.assert_array_equal(halves[name], wanted)
    cut["store/down_bias"][E + 2] += 1  # part 1 of expert 2
    with pytest.raises(ConfigError, match="store/down_bias: the 4 copies of 1 of 4 experts are no longer equal"):
        complete.merge_arrays(cut, four)


# The weights of a family are divided or kept, by what it does with them: each way once more, with what else they meet.
SETTINGS = {
    "softmax, not renormalised": config_of("topk_of_softmax", renormalise=False),
    "softmax, one expert": config_of("topk_of_softmax", k=1),
    "sigmoid, not renormalised": config_of("sigmoid_bias", renormalise=False),
    "sigmoid, one expert": config_of("sigmoid_bias", k=1),
    "softmax bias, not renormalised": config_of("softmax_bias", renormalise=False),
    "softmax bias, zero experts": config_of("softmax_bias", renormalise=False, zero_experts=2, k=3),
    "sigmoid bias, zero experts": config_of("sigmoid_bias", zero_experts=2, k=3),
    "Llama 4": config_of("topk_of_sigmoid", k=1, renormalise=False, weigh="input"),
    "divided, input weighed": config_of("softmax_of_topk", weigh="input"),
    "groups by their best": config_of("topk_of_softmax", num_experts=8, groups=4, groups_kept=1, renormalise=False),
    "groups by their two best": config_of(
        "sigmoid_bias", num_experts=8, groups=4, groups_kept=2, group_score="top2_sum"
    ),
    "groups by their two best, softmax": config_of(
        "topk_of_softmax", num_experts=8, groups=4, groups_kept=2, group_score="top2_sum"
    ),
}


@pytest.mark.parametrize("moe", SETTINGS.values(), ids=SETTINGS)
def test_settings_of_routers(moe: MoEConfig):
    split = check_law(moe, 2, "complete")
    assert complete.split_moe(split, 2, "complete") == complete.split_moe(moe, 4, "complete")


def test_what_is_split_may_be_split_again():
    check_law(complete.split_moe(SETTINGS["groups by their two best, softmax"], 2, "complete"), 4, "complete")


@pytest.mark.parametrize("activation", ["geglu", "gelu"])
def test_activations(activation: str):
    for bias in (False, True):
        moe = config_of("softmax_of_topk", expert_bias=bias)
        check_law(moe, 4, "complete", activation)
        check_law(moe, 4, "partial", activation)


def test_the_layer_itself():
    """Router, dispatch and kernel together, in float32, with shared experts. Balance and importance losses are
    scale-free and keep their values. (The partial form: in a whole model, ``test_partition_command.py``.)"""
    moe = config_of("topk_of_softmax", renormalise=False)
    arrays = arrays_of(moe)
    split = complete.split_moe(moe, 2, "complete")

    @jax.jit
    def run(layer: MoELayer) -> tuple[jax.Array, MoEMetrics]:
        return layer(jnp.asarray(X)[None], RouteContext())

    got, wanted = run(made(split, complete.split_arrays(arrays, moe, 2, "complete"))), run(made(moe, arrays))
    close(np.asarray(got[0]), np.asarray(wanted[0]))
    for name in ("balance", "importance"):
        np.testing.assert_allclose(losses.LOSSES[name](got[1]), losses.LOSSES[name](wanted[1]), rtol=1e-5)
    np.testing.assert_array_equal(np.asarray(got[1].routed), np.asarray(wanted[1].routed).repeat(2))


def test_training_noise_is_that_of_the_original():
    """noisy_topk draws once for all copies; the load loss and the balance loss keep their values."""
    moe = config_of("noisy_topk")
    arrays = arrays_of(moe)
    split = complete.split_moe(moe, 2, "complete")
    cut = complete.split_arrays(arrays, moe, 2, "complete")
    close(by_hand(split, cut, train=True), by_hand(moe, arrays, train=True))
    one, two = (route(X, router_weights(a), m.router, True) for a, m in ((arrays, moe), (cut, split)))
    assert one.load_prob is not None and two.load_prob is not None
    np.testing.assert_allclose(np.asarray(two.load_prob), np.asarray(one.load_prob).repeat(2, axis=1), atol=2e-6)


def test_switch_becomes_the_family_that_goes_on():
    split = complete.split_moe(config_of("switch"), 2, "complete")
    assert (split.router.name, split.router.k, split.router.renormalise) == ("topk_of_softmax", 2, False)


@pytest.mark.parametrize(
    ("moe", "parts", "form", "reason"),
    [
        (config_of("sparsemixer"), 2, "complete", "has no complete form"),
        (config_of("noisy_topk", k=1), 2, "complete", "with k=1 its weight is a softmax"),
        (config_of("sigmoid_bias", renormalise=False, zero_experts=2), 2, "complete", "zero_experts=2 would be kept"),
        (config_of("softmax_of_topk"), 3, "partial", r"parts=3: must be 2 or more and divide moe.expert_dim=16"),
        (config_of("softmax_of_topk"), 1, "complete", "parts=1: must be 2 or more"),
        (config_of("softmax_of_topk", parts=2), 2, "complete", "merge them first"),
        (config_of("softmax_of_topk", parts=8), 4, "partial", r"expert_dim=16 / moe.parts=8 = 2: choose one of \[2\]"),
    ],
)
def test_what_is_refused(moe: MoEConfig, parts: int, form: complete.Form, reason: str):
    with pytest.raises(ConfigError, match=reason):
        complete.split_moe(moe, parts, form)


def test_parts_have_one_order():
    moe = config_of("softmax_of_topk", parts=2, part_order="part")
    with pytest.raises(ConfigError, match=r"moe\.part_order='part'; merge them first .* split them into 4 then"):
        complete.split_moe(moe, 2, "partial", "expert")
    with pytest.raises(ConfigError, match="part_order='part' is of --form=partial"):
        complete.split_moe(config_of("softmax_of_topk"), 2, "complete", "part")


def test_merging_in_steps_and_of_both_forms():
    moe = config_of("softmax_of_topk")
    arrays = arrays_of(moe)
    four = complete.split_moe(moe, 4, "complete")
    cut = complete.split_arrays(arrays, moe, 4, "complete")
    two, parts, form = complete.merge_moe(four, 2)
    assert (two, parts, form) == (complete.split_moe(moe, 2, "complete"), 2, "complete")
    both = complete.split_moe(four, 2, "partial")
    assert complete.merge_moe(both) == (four, 2, "partial")  # parts go before copies
    back = complete.merge_arrays(complete.split_arrays(cut, four, 2, "partial"), both)
    back = complete.merge_arrays(complete.merge_arrays(back, four, 2), two)
    for name, array in arrays.items():
        np.testing.assert_array_equal(back[name], array)
    for parts, reason in ((3, "parts=3: must be 2 or more and divide router.copies=4"), (8, "parts=8")):
        with pytest.raises(ConfigError, match=reason):
            complete.merge_moe(four, parts)
    with pytest.raises(ConfigError, match="nothing to merge"):
        complete.merge_moe(moe)


def test_copies_that_moved_apart_are_not_merged():
    moe = config_of("softmax_of_topk")
    split = complete.split_moe(moe, 2, "complete")
    cut = complete.split_arrays(arrays_of(moe), moe, 2, "complete")
    cut["router/arrays/kernel"] = cut["router/arrays/kernel"].copy()
    cut["router/arrays/kernel"][0, 3] *= 1.0000001
    with pytest.raises(ConfigError, match="router/arrays/kernel: the 2 copies of 1 of 4 experts are no longer equal"):
        complete.merge_arrays(cut, split)


def test_stacked_layers_are_layers():
    moe = config_of("softmax_bias")
    arrays = {n: a for n, a in arrays_of(moe).items() if not n.startswith("shared")}
    stacked = {name: np.stack([array, 2 * array]) for name, array in arrays.items()}
    for form in ("complete", "partial"):
        one = complete.split_arrays(arrays, moe, 2, form)
        two = complete.split_arrays(stacked, moe, 2, form)
        for name in arrays:
            np.testing.assert_array_equal(two[name], np.stack([one[name], 2 * one[name]]))


def test_pruning_keeps_the_experts_that_are_named():
    moe = config_of("softmax_of_topk", zero_experts=2)
    arrays = arrays_of(moe)
    left, pruned = complete.prune(arrays, moe, [3, 0])
    assert (pruned.num_experts, pruned.router.k) == (2, 2)
    np.testing.assert_array_equal(left["store/down"], arrays["store/down"][[3, 0]])
    np.testing.assert_array_equal(left["router/arrays/kernel"], arrays["router/arrays/kernel"][:, [3, 0, 4, 5]])
    np.testing.assert_array_equal(left["router/arrays/logit_bias"], arrays["router/arrays/logit_bias"][[3, 0, 4, 5]])
    made(pruned, left | {n: a for n, a in arrays.items() if n.startswith("shared")})
    for kept in ([0, 0], [4], []):
        with pytest.raises(ConfigError, match="must name experts once each"):
            complete.prune(arrays, moe, kept)
    with pytest.raises(ConfigError, match="merge parts first"):
        complete.prune(arrays, dataclasses.replace(moe, parts=2), [0])


# --- ties -----------------------------------------------------------------------------------------


def wholly(table: Routing, copies: int, k: int) -> np.ndarray:
    """Whether each row's chosen experts are ``k / copies`` whole runs of copies."""
    chosen = np.sort(np.asarray(table.expert), axis=1).reshape(-1, k // copies, copies)
    runs = np.all(chosen // copies == chosen[..., :1] // copies, axis=(1, 2))
    return runs & np.all(chosen[..., 0] % copies == 0, axis=1)


CAUSAL = [name for name in ABLE if routing.FAMILIES[name].causal]


@pytest.mark.parametrize("name", CAUSAL)
def test_equal_experts_at_the_boundary_stay_whole(name: str):
    """All experts alike: every score ties, and still whole runs are chosen, for token counts of every remainder."""
    moe = config_of(name, bias=False)
    split = complete.split_moe(moe, 4, "complete")
    cut = router_weights(complete.split_arrays(arrays_of(moe), moe, 4, "complete"))
    cut: dict[str, Any] = {n: np.broadcast_to(a[..., :1], a.shape) for n, a in cut.items()}
    for count in (1, 7):
        table = route(X[:count], cut, split.router)
        assert wholly(table, 4, split.router.k).all()


def perturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A matmul whose columns differ in their last bits, as those of different tiles may."""
    exact = jnp.dot

    def dot(a: jax.Array, b: jax.Array, **settings: Any) -> jax.Array:
        column = jnp.arange(b.shape[-1])
        return exact(a, b, **settings) * (1 + 2e-7 * (column % 3 - 1)) + 1e-7 * (column % 2)

    monkeypatch.setattr(routing.pieces.jnp, "dot", dot)


@pytest.mark.parametrize("name", CAUSAL)
def test_a_matmul_that_sums_in_another_order_splits_no_expert(name: str, monkeypatch: pytest.MonkeyPatch):
    """Near-ties between experts, where the last bits decide: without the rule groups are split, with it none is."""
    moe = config_of(name, bias=False)
    split = complete.split_moe(moe, 2, "complete")
    cut = router_weights(complete.split_arrays(arrays_of(moe), moe, 2, "complete"))
    cut: dict[str, Any] = {n: np.broadcast_to(a[..., :1], a.shape) for n, a in cut.items()}
    perturbed(monkeypatch)
    ctx, x = RouteContext(), jnp.asarray(X)
    family = routing.FAMILIES[split.router.name]
    assert wholly(family.route(x, cut, ctx, split.router), 2, split.router.k).all()
    plain = dataclasses.replace(split.router, copies=1)
    assert not wholly(family.route(x, cut, ctx, plain), 2, split.router.k).all()


def test_each_copy_has_its_own_gradient_and_may_move(monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(2)
    kernel = np.asarray(rng.normal(0, 1, (D, 3)), np.float32).repeat(2, axis=1)
    cotangent = jnp.asarray(rng.normal(0, 1, (T, 6)), jnp.float32)
    tied, plain = RouterConfig(copies=2), RouterConfig()

    def pull(config: RouterConfig) -> tuple[jax.Array, jax.Array]:
        return jax.vjp(lambda x, k: routing.pieces.project(x, k, config), jnp.asarray(X), jnp.asarray(kernel))[1](
            cotangent
        )

    for with_ties, without in zip(pull(tied), pull(plain), strict=True):
        np.testing.assert_array_equal(with_ties, without)
    kernel[0, 1] += 0.5  # one copy has moved: from now on it has its own logit
    perturbed(monkeypatch)
    made = np.asarray(routing.pieces.project(jnp.asarray(X), jnp.asarray(kernel), tied))
    own = np.asarray(routing.pieces.project(jnp.asarray(X), jnp.asarray(kernel), plain))
    np.testing.assert_array_equal(made[:, 1], own[:, 1])
    np.testing.assert_array_equal(made[:, 3], own[:, 2])
    assert (made[:, 3] != own[:, 3]).any()


@pytest.mark.parametrize("name", ["topk_of_softmax", "noisy_topk"])
def test_without_copies_the_program_has_no_trace_of_them(name: str):
    moe = config_of(name)
    weights = router_weights(arrays_of(moe))
    for train in (False, True):
        assert "_as_first" not in str(jax.make_jaxpr(lambda x, train=train: route(x, weights, moe.router, train))(X))
    tied = dataclasses.replace(moe.router, copies=2)
    assert "_as_first" in str(jax.make_jaxpr(lambda x: route(x, weights, tied, False))(X))


# --- what training sees ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sigmoid_bias", "softmax_bias"])
def test_the_selection_bias_moves_as_before(name: str):
    """The even-share rule's steps shrink by P by themselves, as the bias that they move has; a sign has no size."""
    moe = config_of(name, zero_experts=2, renormalise=True)
    split = complete.split_moe(moe, 2, "complete")
    counts = jnp.asarray([5.0, 1.0, 0.0, 8.0, 2.0, 2.0])
    bias = jnp.linspace(-1, 1, 6)
    update = routing.FAMILIES[name].update
    assert update is not None
    one = update({"bias": bias}, counts, moe.router, E)["bias"]
    cut = complete.split_arrays({"router/arrays/bias": bias}, moe, 2, "complete")["router/arrays/bias"]
    two = update({"bias": cut}, jnp.repeat(counts, 2), split.router, split.num_experts)["bias"]
    wanted = complete.split_arrays({"router/arrays/bias": one}, moe, 2, "complete")["router/arrays/bias"]
    np.testing.assert_allclose(two, wanted, atol=1e-7)
    assert (np.asarray(one) != np.asarray(bias)).any()
