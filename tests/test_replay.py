"""Replays: what was in force gives what the model kept, pair for pair; and what else a trace can be asked."""

import collections
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import replay as command
from experiments import session
from moejax import limits, replay, routing, trace
from moejax.config import ConfigError, MoEConfig, RouterConfig
from moejax.limits import DropOrder, token_drop
from moejax.sharding import ArraySpec, put_batch
from moejax.types import MoEMetrics, Routing
from tests import moe_fakes as fakes
from tests.small import quick_compilation, small_config
from tests.trace_fakes import LAYERS, SHAPE, batches, mesh_of, model_of, record

ORDERS = get_args(DropOrder)
FACTOR = 0.75  # on 8 devices, for top-1, just over one pair of each expert


@pytest.fixture(scope="module", autouse=True)
def quickly() -> Iterator[None]:
    with quick_compilation():
        yield


def moe_of(chunk_trace: trace.Trace, **changes: Any) -> MoEConfig:
    return dataclasses.replace(chunk_trace.config.model.moe, **changes)


def replayed(read: trace.Trace, moe: MoEConfig, ranks: int = 0) -> tuple[list[trace.Chunk], list[MoEMetrics]]:
    setting = replay.setting_of(moe, read, ranks)
    made = [replay.decide(chunk, setting, read.state) for chunk in read]
    return [chunk for chunk, _ in made], [sums for _, sums in made]


# --- equal to what the model did ----------------------------------------------------------------------------------


def layer_traces(name: str, orders: tuple, folder: Path, devices: int) -> dict[str, MoEMetrics]:
    """A trace of one layer of router ``name`` for each order, in ``folder/<order>.npz``, from one compilation; returns
    what the layer said of itself."""
    router = fakes.router_config(name)
    layer = fakes.small_layer(router)
    batch, mesh = batches(1)[0], mesh_of(devices)
    batch["mask"][-1] = False  # on 8 devices one has padding only
    x = np.random.default_rng(0).normal(size=(*SHAPE, fakes.DIM)).astype(np.float32)

    @jax.jit
    def run(layer, x: jax.Array, mask: jax.Array, in_force: dict, key: jax.Array) -> dict:
        ctx = fakes.context(mask, key=key, record=True)
        flights = {order: layer.begin(x, ctx, limit) for order, limit in in_force.items()}
        return {order: (flight.record, flight.metrics) for order, flight in flights.items()}

    in_force = {order: (token_drop(FACTOR, order),) for order in orders}
    with jax.set_mesh(mesh):
        put = put_batch({"x": x, "mask": batch["mask"]}, mesh if devices > 1 else None)
        made = run(layer, put["x"], put["mask"], in_force, jax.random.key(3))
    said = {}
    for order, (routed, metrics) in made.items():
        moe = {"router": router, "num_experts": fakes.EXPERTS, "capacity_factor": FACTOR, "capacity_order": order}
        config = small_config(fakes.model_config(num_layers=1, moe=moe))
        meta = trace.header(config, in_force[order], ranks=devices, batch_shape=SHAPE)
        state = {n: np.asarray(v[...])[None] for n, v in layer.router.arrays.items() if n == "bias"}
        with trace.writing(folder / f"{order}.npz", meta, state) as writer:
            writer.add(trace.chunk_of(jax.tree.map(lambda leaf: leaf[None], routed), batch))
        said[order] = jax.tree.map(lambda leaf: np.asarray(leaf).sum(axis=0), metrics)
    return said


def hold_the_law(name: str, orders: tuple, folder: Path, devices: int) -> None:
    """Replaying the limit that was in force keeps exactly the pairs that the layer kept, and counts what it counted;
    also where the run's own router routes anew, from its logits."""
    said = layer_traces(name, orders, folder, devices)
    for order in orders:
        with trace.read(folder / f"{order}.npz") as read:
            (chunk,), (sums,) = replayed(read, moe_of(read))
            online = read.chunk(0)
            fakes.assert_same((chunk.made, chunk.kept), (online.made, online.kept))
            for field in ("tokens", "routed", "computed", "dropped", "added", "lost_tokens"):
                np.testing.assert_array_equal(getattr(sums, field)[0], getattr(said[order], field), err_msg=field)
            assert sums.dropped[0] > 0
            setting = replay.Setting((token_drop(FACTOR, order),), read.router, devices)
            anew, _ = replay.decide(online, setting, read.state)
            fakes.assert_same((anew.kept.expert, anew.kept.valid), (online.kept.expert, online.kept.valid))
            np.testing.assert_allclose(anew.kept.weight, online.kept.weight, rtol=1e-5)


# Orders take turns, and routers that differ in what a replay needs: rows of their own, a state, their scores alone. All
# of the registry are slow, below.
LAW = [("expert_choice", "score", 1), ("sigmoid_bias", "reverse", 1), ("softmax_of_topk", "order", 1),
       ("topk_of_softmax", "random", 8)]  # fmt: skip


@pytest.mark.parametrize(("name", "order", "devices"), LAW)
def test_the_limit_in_force_keeps_exactly_what_the_layer_kept(name: str, order: str, devices: int, tmp_path: Path):
    """With padding; on 8 devices limits act on each device's own tokens."""
    hold_the_law(name, (order,), tmp_path, devices)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("name", fakes.FAMILIES)
def test_every_limit_in_force_keeps_exactly_what_the_layer_kept(name: str, devices: int, tmp_path: Path):
    hold_the_law(name, ORDERS, tmp_path, devices)
    with trace.read(tmp_path / "score.npz") as a, trace.read(tmp_path / "order.npz") as b:
        assert not np.array_equal(a.chunk(0).kept.valid, b.chunk(0).kept.valid)


@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.slow), 8])
def test_a_dropless_trace_under_a_limit_is_the_model_under_it_in_its_first_layer(devices: int, tmp_path: Path):
    """From a trace of one device, whose batches are split over the ranks. Later layers saw other inputs."""
    model = model_of(fakes.router_config())
    record(tmp_path / "free.npz", model, limits=())
    record(tmp_path / "limited.npz", model, limits=(token_drop(0.75),), devices=devices)
    with trace.read(tmp_path / "free.npz") as free, trace.read(tmp_path / "limited.npz") as limited:
        assert (free.ranks, limited.ranks) == (1, devices)
        offline, _ = replayed(free, moe_of(free, capacity_factor=0.75), devices)
        for a, b in zip(offline, limited, strict=True):
            np.testing.assert_array_equal(a.kept.expert[0], b.kept.expert[0])
            np.testing.assert_array_equal(a.kept.valid[0], b.kept.valid[0])
            fakes.assert_same(a.tokens, b.tokens)
            assert a.made.valid[0].sum() > a.kept.valid[0].sum()
            assert np.abs(a.made.logits[1] - b.made.logits[1]).max() > 1e-3


# --- routers ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("replay") / "trace.npz"
    record(path, model_of(fakes.router_config()), limits=())
    return path


def test_another_router_is_run_on_the_recorded_logits(file: Path):
    with trace.read(file) as read:
        router = RouterConfig(name="topk_of_softmax", k=3, renormalise=False, scale=2.0)
        for chunk, sums, original in zip(*replayed(read, moe_of(read, router=router)), read, strict=True):
            probs = fakes.softmax(fakes.f64(original.made.logits))
            best = np.argsort(-probs, axis=-1, kind="stable")[..., :3]
            np.testing.assert_array_equal(chunk.kept.expert, best)
            np.testing.assert_allclose(chunk.kept.weight, 2 * np.take_along_axis(probs, best, -1), rtol=1e-5)
            mask = chunk.tokens["mask"]
            np.testing.assert_array_equal(chunk.kept.valid, np.broadcast_to(mask[None, ..., None], best.shape))
            assert (sums.routed.sum(axis=1) == 3 * mask.sum()).all()
        router = RouterConfig(name="expert_choice", k=1, noncausal="allow")
        for chunk in replayed(read, moe_of(read, router=router))[0]:
            real = int(chunk.tokens["mask"].sum())
            per_expert = [(chunk.kept.valid & (chunk.kept.expert == e)).sum() for e in range(4)]
            assert per_expert == [LAYERS * -(-real // 4)] * 4


def routed_by(name: str, route: Any, arrays: Any, monkeypatch: pytest.MonkeyPatch) -> RouterConfig:
    registry = dict(routing.FAMILIES)
    for module in (routing, routing.registry):
        monkeypatch.setattr(module, "FAMILIES", registry)
    routing.register(name, arrays=arrays)(route)
    return RouterConfig(name=name, k=2)


def test_routers_that_need_more_than_a_trace_holds_are_refused_by_name(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def two_layers(dim: int, experts: int) -> dict[str, ArraySpec]:
        return routing.linear_router(dim, experts) | {"hidden": ArraySpec((dim, dim), ("embed", "embed"), fan_in=dim)}

    def deep(x: Any, w: Any, ctx: Any, config: RouterConfig) -> Any:
        return routing.topk_of_softmax(jnp.tanh(x @ w["hidden"]), w, ctx, config)

    def cosine(x: Any, w: Any, ctx: Any, config: RouterConfig) -> Any:
        return routing.topk_of_softmax(x / jnp.linalg.norm(x, axis=-1, keepdims=True), w, ctx, config)

    with trace.read(file) as read:
        with pytest.raises(ConfigError, match=r"'sigmoid_bias' cannot be replayed .* array 'bias', .* no state"):
            replay.setting_of(moe_of(read, router=fakes.router_config("sigmoid_bias")), read)
        router = routed_by("deep", deep, two_layers, monkeypatch)
        with pytest.raises(ConfigError, match=r"router.name='deep' cannot be replayed .* its array 'hidden'"):
            replay.setting_of(moe_of(read, router=router), read)
        router = routed_by("cosine", cosine, routing.linear_router, monkeypatch)
        with pytest.raises(ConfigError, match=r"router.name='cosine' .* changes its input before its matrix"):
            replayed(read, moe_of(read, router=router))
        with pytest.raises(ConfigError, match=r"num_experts=8, but .*trace.npz was recorded with 4"):
            replay.setting_of(moe_of(read, num_experts=8), read)
        with pytest.raises(ConfigError, match="k=5 must lie in"):
            replay.setting_of(moe_of(read, router=RouterConfig(k=5)), read)
        with pytest.raises(ConfigError, match="ranks=3 does not divide the 8 sequences"):
            replay.setting_of(moe_of(read), read, 3)
        with pytest.raises(ConfigError, match="ranks=2: a limit at random draws from the keys of the 1 ranks"):
            replay.setting_of(moe_of(read, capacity_factor=1.0, capacity_order="random"), read, 2)
        meta = {k: v for k, v in read.meta.items() if k not in ("chunks", "tokens", "ended")} | {"logits": False}
        with trace.writing(tmp_path / "bare.npz", meta) as writer:
            writer.add(read.chunk(0))
    with trace.read(tmp_path / "bare.npz") as bare:
        with pytest.raises(ConfigError, match=r"bare.npz holds no logits to route anew from: record it with --logits"):
            replay.setting_of(moe_of(bare, router=RouterConfig(k=1)), bare)
        assert replayed(bare, moe_of(bare, capacity_factor=1.0))[1][0].dropped.sum() > 0  # limits need none


# --- sweeps and figures -------------------------------------------------------------------------------------------


def test_a_sweep_over_factors_compiles_once(file: Path, monkeypatch: pytest.MonkeyPatch):
    traced = []
    apply = limits.apply
    monkeypatch.setattr(limits, "apply", lambda *args: traced.append(None) or apply(*args))
    with trace.read(file) as read:
        kept = []
        for factor in (0.2, 0.45, 0.7, 4.0):
            _, sums = replayed(read, moe_of(read, capacity_factor=factor, capacity_order="reverse"), 4)
            kept.append(sum(float(s.computed.sum()) for s in sums))
    assert len(traced) == 1
    assert sorted(kept) == kept and len(set(kept)) == 4


def test_rows_count_pairs_tokens_and_load_by_hand():
    def sums(routed: Any, computed: Any, dropped: Any, added: Any, lost: Any) -> MoEMetrics:
        zero = np.zeros((2, 2), np.float32)
        per_layer = {name: np.asarray(v, np.float32) for name, v in
                     {"dropped": dropped, "added": added, "lost_tokens": lost, "tokens": [5, 5]}.items()}  # fmt: skip
        nothing = {name: np.zeros(2, np.float32) for name in ("overflow", "z_sum", "entropy_sum")}
        return MoEMetrics(
            routed=np.asarray(routed, np.float32), computed=np.asarray(computed, np.float32), prob_sum=zero,
            gate_sum=zero, load_prob_sum=zero, **per_layer, **nothing,
        )  # fmt: skip

    tally = replay.Tally()
    tally.add(sums([[6, 2], [8, 0]], [[4, 2], [4, 1]], [2, 4], [0, 1], [1, 2]))
    tally.add(sums([[6, 2], [8, 0]], [[4, 2], [4, 1]], [2, 4], [0, 1], [1, 2]))
    first, second, total = tally.rows([1, 3])
    assert first == {"layer": 1, "routed": 16, "kept": 12, "dropped": 4, "added": 0, "skipped": 0, "tokens": 10,
                     "lost": 2, "max_over_mean": (1.5, pytest.approx(4 / 3)), "cv": (0.5, pytest.approx(1 / 3)),
                     "dead": (0, 0)}  # fmt: skip
    assert (second["layer"], second["kept"], second["dropped"], second["added"], second["lost"]) == (3, 8, 8, 2, 4)
    assert second["dead"] == (1, 0) and second["max_over_mean"] == (2.0, 1.6)
    assert (total["routed"], total["kept"], total["dropped"], total["added"]) == (32, 20, 12, 2)
    assert (total["tokens"], total["lost"], total["dead"], total["max_over_mean"]) == (20, 6, (1, 0), (2.0, 1.6))


# --- policies -----------------------------------------------------------------------------------------------------


def brute_force_lru(chunks: list[trace.Chunk], size: int) -> np.ndarray:
    """An OrderedDict for each layer and rank, access by access, a token's pairs in order."""
    layers, ranks = chunks[0].kept.expert.shape[:2]
    caches = [[collections.OrderedDict() for _ in range(ranks)] for _ in range(layers)]
    hits, accesses = np.zeros(layers), np.zeros(layers)
    for chunk in chunks:
        kept = chunk.kept
        for layer, rank in np.ndindex(layers, ranks):
            rows = range(kept.expert.shape[2])
            if kept.token is not None:
                rows = sorted(rows, key=lambda r, where=kept.token[layer, rank]: where[r])
            cache = caches[layer][rank]
            for r in rows:
                for expert, valid in zip(kept.expert[layer, rank, r], kept.valid[layer, rank, r], strict=True):
                    if not valid:
                        continue
                    accesses[layer] += 1
                    if int(expert) in cache:
                        hits[layer] += 1
                        cache.move_to_end(int(expert))
                    else:
                        cache[int(expert)] = True
                        if len(cache) > size:
                            cache.popitem(last=False)
    return hits / accesses


def random_chunk(rng: np.random.Generator, experts: int, token_choice: bool) -> trace.Chunk:
    shape = (2, 3, 20, 2 if token_choice else 1)
    skewed = (experts * rng.random(shape) ** 2).astype(np.int32)
    zeros = np.zeros(shape, np.float32)
    probs = np.zeros((2, 3, 20, experts), np.float32)
    token = None if token_choice else rng.integers(0, 20, shape[:3]).astype(np.int32)
    fields: Any = {"expert": skewed, "valid": rng.random(shape) < 0.8, "weight": zeros, "score": zeros}
    table = Routing(**fields, probs=probs, logits=probs, token=token)  # ty: ignore[invalid-argument-type]
    return trace.Chunk(table, table, {}, None)


@pytest.mark.parametrize("token_choice", [True, False])
def test_lru_is_the_brute_force_cache(token_choice: bool):
    rng, experts, sizes = np.random.default_rng(0), 7, (1, 2, 3, 5, 7, 20)
    chunks = [random_chunk(rng, experts, token_choice) for _ in range(3)]
    rates = replay.POLICIES["lru"](iter(chunks), experts, sizes)
    assert list(rates) == list(sizes)
    for size in sizes:
        np.testing.assert_allclose(rates[size], brute_force_lru(chunks, size), rtol=1e-12)
    assert (rates[1] < rates[3]).all() and (rates[3] < rates[7]).all()
    np.testing.assert_array_equal(rates[7], rates[20])


# --- the command --------------------------------------------------------------------------------------------------


def run(*arguments: str) -> int:
    return session.call(command.define_flags, command.command, arguments)


def test_the_command_prints_and_writes_what_it_decided(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "out.npz"
    assert run(f"--trace={file}", "--factors=0,0.5", "--orders=score,order", f"--output={out}", "--policy=lru",
               "--cached=1,2") == 0  # fmt: skip
    printed = capsys.readouterr().out
    names = re.findall(r"^router .*$", printed, re.M)
    assert names == [
        "router topk_of_softmax k=2, no limit",
        "router topk_of_softmax k=2, TokenDrop factor=0.5 order=score",
        "router topk_of_softmax k=2, TokenDrop factor=0.5 order=order",
    ]
    assert printed.count("the recorded setting: 0 pairs differ from what the run kept") == 1
    assert printed.count("2 of 4 held") == 3 and printed.count("lru hit rate") == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "out-order-0.5.npz",
        "out-score-0.5.npz",
        "out-score-0.npz",
    ]
    with trace.read(file) as read, trace.read(tmp_path / "out-order-0.5.npz") as made:
        expected, sums = replayed(read, moe_of(read, capacity_factor=0.5, capacity_order="order"))
        for a, b in zip(expected, made, strict=True):
            fakes.assert_same((a.made, a.kept, a.tokens), (b.made, b.kept, b.tokens))
        assert made.meta["limits"] == [{"name": "TokenDrop", "factor": 0.5, "order": "order"}]
        assert made.meta["replay_of"]["limits"] == [] and made.meta["tokens"] == read.meta["tokens"]
    routed, dropped = (sum(float(getattr(s, n).sum()) for s in sums) for n in ("routed", "dropped"))
    total = [line.split() for line in printed.splitlines() if line.startswith(" total")][2]
    assert total[1:4] == [f"{routed:,.0f}", f"{routed - dropped:,.0f}", f"{dropped:,.0f}"]
    # a written replay is a trace: replaying its own setting changes nothing
    assert run(f"--trace={tmp_path / 'out-order-0.5.npz'}") == 0
    said = capsys.readouterr()
    assert "the recorded setting: 0 pairs differ" in said.out and "note: recorded with" in said.err


def test_a_pair_that_differs_from_the_record_is_told(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with trace.read(file) as read:
        keep = {k: v for k, v in read.meta.items() if k not in ("chunks", "tokens", "ended")}
        chunk = read.chunk(0)
    wrong = chunk.kept.valid.copy()
    wrong[0, 0, 0, 0] = False
    with trace.writing(tmp_path / "wrong.npz", keep) as writer:
        writer.add(dataclasses.replace(chunk, kept=dataclasses.replace(chunk.kept, valid=wrong)))
    assert run(f"--trace={tmp_path / 'wrong.npz'}") == 1
    assert "the recorded setting: 1 pairs differ from what the run kept" in capsys.readouterr().out


def test_another_config_says_router_and_limits(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = tmp_path / "config.py"
    config.write_text(
        "from configs import base\n\ndef get_config():\n    config = base.get_config()\n"
        "    config.model.moe.num_experts = 4\n    return config\n"
    )
    call = [f"--trace={file}", f"--config={config}"]
    assert run(*call, "--config.model.moe.router.k=1", "--config.model.moe.capacity_factor=1.25") == 0
    assert "router topk_of_softmax k=1, TokenDrop factor=1.25 order=score" in capsys.readouterr().out
    assert run(*call, "--config.model.moe.num_experts=8") == 2
    assert "num_experts=8, but" in capsys.readouterr().err
    assert run(*call, "--config.model.moe.router.name=sigmoid_bias") == 2
    assert "router.name='sigmoid_bias' cannot be replayed" in capsys.readouterr().err


def test_what_cannot_work_is_one_sentence_and_no_file(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    cut = tmp_path / "cut.npz"
    cut.write_bytes(file.read_bytes()[:5000])
    good = {"trace": str(file), "output": str(tmp_path / "out.npz"), "factors": "1"}
    bad = {
        ("trace", ""): "--trace is missing",
        ("trace", str(cut)): "cut.npz cannot be read as a trace: it is cut short",
        ("output", str(tmp_path / "no" / "t.npz")): "there is no folder",
        ("output", str(file)): "is the trace itself",
        ("factors", "1,x"): "--factors=1,x: 'x' is no float",
        ("factors", "-1"): "--factors: -1 must be 0 or more",
        ("factors", "nan"): "--factors: nan must be 0 or more",
        ("orders", "last"): "order='last': choose one of",
        ("policy", "fifo"): "--policy=fifo: choose one of lru",
        ("cached", "2"): "--cached=2 is for a policy: add --policy=lru",
        ("ranks", "3"): "ranks=3 does not divide",
        ("ranks", "-1"): "ranks=-1",
        ("factor", "1"): "factor",
    }
    for (name, value), message in bad.items():
        assert run(*(f"--{k}={v}" for k, v in {**good, name: value}.items())) == 2, name
        said = capsys.readouterr()
        assert message in said.err and "Traceback" not in said.err and said.out == "", (name, said)
    assert run(f"--trace={file}", "--orders=score") == 2
    assert "--orders=score order nothing: add --factors" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["cut.npz"]


@pytest.mark.slow  # the parts are quick tests: zero experts in test_moe_zero_experts.py, replay above
@pytest.mark.parametrize("wiring", ["standard", "longcat"])
def test_a_trace_with_zero_experts_is_replayed_as_the_model_ran(wiring: str, tmp_path: Path):
    """Also with a dense layer among the others, or two attentions in a block, and a limit in force."""
    k = 3
    moe = {"router": fakes.router_config("softmax_bias", k=k), "zero_experts": 3, "capacity_factor": 0.75}
    more = {"num_layers": 3} if wiring == "standard" else {}
    if wiring == "standard":
        moe["dense_layers"] = (1,)
    said = record(tmp_path / "t.npz", fakes.small_model(moe=moe, wiring=wiring, **more))
    counts = ("tokens", "routed", "computed", "dropped", "added", "lost_tokens", "zero_routed")
    with trace.read(tmp_path / "t.npz") as read:
        setting = replay.setting_of(read.config.model.moe, read)
        for chunk, online in zip(read, said, strict=True):
            again, sums = replay.decide(chunk, setting, read.state)
            for name in counts:
                np.testing.assert_array_equal(getattr(sums, name), getattr(online, name), err_msg=name)
            np.testing.assert_array_equal(again.kept.valid, chunk.kept.valid)
            zero = np.asarray(online.zero_routed).sum(axis=-1)
            assert (zero > 0).all()
            pairs = np.asarray(online.routed).sum(axis=-1) + zero
            np.testing.assert_array_equal(pairs, np.asarray(online.tokens) * k)
