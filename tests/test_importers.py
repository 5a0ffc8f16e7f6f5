"""Hugging Face folders: which tensor becomes which parameter, strictly, in any layout and sharding."""

import logging
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from moejax import importers
from moejax.config import ConfigError, MeshConfig
from moejax.importers import configs, files, loading, tables, tiles
from moejax.importers.matching import blocks, match
from moejax.importers.quantised import Plain
from moejax.sharding import Rules, make_mesh
from tests.importers_fakes import SMALL, Arrays, arrays, leaves, small_folder, small_tensors, write_folder

FAMILIES = list(SMALL)


def same(one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> bool:
    return one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)


def test_where_each_tensor_goes(tmp_path: Path) -> None:
    """By hand, for a family with all of it: heads, stacks of two groups, experts, a shared one, biases."""
    raw = SMALL["qwen2_moe"]  # layers 0 and 2 are MoE, 1 is dense
    t = small_tensors(raw)
    model = arrays(importers.load(write_folder(tmp_path, raw, t), dtype="float32"))
    places = {layer: path for layer, path, _, _ in blocks_of(raw)}
    repeats = {layer: repeat for layer, _, repeat, _ in blocks_of(raw)}

    def parameter(layer: int, name: str) -> np.ndarray:
        return model[places[layer] + name][repeats[layer]]

    for layer in range(3):
        p = f"model.layers.{layer}.self_attn."
        q = t[p + "q_proj.weight"]  # [H N, D]
        for head in range(4):
            np.testing.assert_array_equal(parameter(layer, "attention/q")[:, head], q[2 * head : 2 * head + 2].T)
            o = t[p + "o_proj.weight"][:, 2 * head : 2 * head + 2]
            np.testing.assert_array_equal(parameter(layer, "attention/o")[head], o.T)
        np.testing.assert_array_equal(parameter(layer, "attention/k_bias"), t[p + "k_proj.bias"].reshape(2, 2))
        np.testing.assert_array_equal(
            parameter(layer, "ffn_norm/scale"), t[f"model.layers.{layer}.post_attention_layernorm.weight"]
        )
    np.testing.assert_array_equal(parameter(1, "ffn/gate"), t["model.layers.1.mlp.gate_proj.weight"].T)
    for layer in (0, 2):
        p = f"model.layers.{layer}.mlp."
        for e in range(4):
            for name in ("gate", "up", "down"):
                expected = t[f"{p}experts.{e}.{name}_proj.weight"].T
                np.testing.assert_array_equal(parameter(layer, f"moe/store/{name}")[e], expected)
        np.testing.assert_array_equal(parameter(layer, "moe/router/arrays/kernel"), t[p + "gate.weight"].T)
        np.testing.assert_array_equal(parameter(layer, "moe/shared/down"), t[p + "shared_expert.down_proj.weight"].T)
        np.testing.assert_array_equal(parameter(layer, "moe/shared_gate"), t[p + "shared_expert_gate.weight"].T)
    np.testing.assert_array_equal(model["unembed"], t["lm_head.weight"])


def blocks_of(raw: dict[str, Any]) -> list[tuple[int, str, int, bool]]:
    return list(blocks(configs.read_config(raw, Path("config.json"))))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_value_of_every_tensor_is_somewhere(family: str, tmp_path: Path) -> None:
    """Sorted, the values of the folder are those of the model: none lost, none twice."""
    tensors = small_tensors(SMALL[family])
    model = arrays(importers.load(small_folder(tmp_path, family), dtype="float32"))
    read, given = (np.sort(np.concatenate([a.ravel() for a in x.values()])) for x in (model, tensors))
    np.testing.assert_array_equal(read, given)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "gpt_oss"])
def test_layouts_of_experts(family: str, tmp_path: Path) -> None:
    """For each expert, fused, and both in one checkpoint: fused in the first MoE layer only; several files."""
    raw = SMALL[family]
    each = small_tensors(raw)
    fused = fuse(family, each)
    wanted = arrays(importers.load(write_folder(tmp_path / "each", raw, each, files=3), dtype="float32"))
    assert same(arrays(importers.load(write_folder(tmp_path / "fused", raw, fused), dtype="float32")), wanted)
    first = min(int(name.split(".")[2]) for name in fused if name.endswith("experts.down_proj"))
    prefix = f"model.layers.{first}."
    mixed = {n: v for n, v in each.items() if not n.startswith(prefix)}
    mixed |= {n: v for n, v in fused.items() if n.startswith(prefix)}
    assert any(".experts.down_proj" in n for n in mixed) and any(".experts.0." in n for n in mixed)
    assert same(arrays(importers.load(write_folder(tmp_path / "mixed", raw, mixed), dtype="float32")), wanted)


def fuse(family: str, each: Arrays) -> Arrays:
    """The layout of transformers 5, with rows for LongCat's zero-computation experts."""
    out: Arrays = {}
    parts: dict[str, dict[str, np.ndarray]] = {}
    for name, value in each.items():
        if ".experts." not in name:
            out[name.replace("block_sparse_moe", "mlp")] = value
        else:
            layer, _, rest = name.partition(".experts.")
            parts.setdefault(layer.replace("block_sparse_moe", "mlp"), {})[rest] = value
    gate, up, down = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    for layer, part in parts.items():
        both = [np.concatenate([part[f"{e}.{gate}.weight"], part[f"{e}.{up}.weight"]]) for e in range(4)]
        unused = [np.ones_like(both[0])] * SMALL[family].get("zero_expert_num", 0)
        out[f"{layer}.experts.gate_up_proj"] = np.stack(both + unused)
        out[f"{layer}.experts.down_proj"] = np.stack([part[f"{e}.{down}.weight"] for e in range(4)])
    return out


def test_types(tmp_path: Path) -> None:
    """Matrices in the type that was asked for; norms, routers, selection bias and sinks in float32."""
    for family in ("deepseek_v3", "gpt_oss"):
        folder = small_folder(tmp_path / family, family)
        exact = arrays(importers.load(folder, dtype="float32"))
        model = importers.load(folder)  # bfloat16
        assert model.config.compute_dtype == "bfloat16"
        for name, value in arrays(model).items():
            small = name.endswith(("/scale", "/sinks")) or "router/arrays" in name
            assert value.dtype == (np.float32 if small else ml_dtypes.bfloat16), name
            np.testing.assert_array_equal(value, exact[name].astype(value.dtype))
        assert all(value.dtype == np.float32 for value in exact.values())


def test_float16_and_bfloat16_sources(tmp_path: Path) -> None:
    for dtype in (np.float16, ml_dtypes.bfloat16):
        tensors = small_tensors(SMALL["olmoe"], dtype=dtype)
        folder = write_folder(tmp_path / np.dtype(dtype).name, SMALL["olmoe"], tensors)
        found = arrays(importers.load(folder, dtype="float32"))["embed"]
        np.testing.assert_array_equal(found, tensors["model.embed_tokens.weight"].astype(np.float32))


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "mixtral"])
def test_any_sharding(family: str, tmp_path: Path) -> None:
    """Split over experts, heads and FFNs, and by rules of one's own: the same arrays, each where the rules say."""
    folder = small_folder(tmp_path, family)
    wanted = arrays(importers.load(folder, dtype="float32"))
    mesh = make_mesh(MeshConfig(data=2, expert=2, model=2))
    odd = Rules(embed="data", heads=None, kv_heads=None, ffn=None, expert_ffn=None, head_dim="model")
    for rules in (None, odd) if family == "mixtral" else (None,):
        model = importers.load(folder, mesh=mesh, dtype="float32", rules=rules)
        assert same(arrays(model), wanted)
        store = next(v for n, v in leaves(model).items() if n.endswith("store/up"))
        assert store.sharding.spec[1] == "expert"
        assert len({shard.index for shard in store.addressable_shards}) == 4
    assert all(leaf.sharding.mesh == mesh for leaf in leaves(model).values())


def test_a_shard_reads_its_own_bytes_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is copied out of the files for 4-fold expert parallelism, by tensor: each value once."""
    read: dict[str, int] = {}
    copy, view = tiles.copy, Plain.read
    monkeypatch.setattr(
        tiles, "copy", lambda out, values: (read.update(last=read.get("last", 0) + values.size), copy(out, values))
    )
    touched: list[tuple[str, tuple[slice, ...]]] = []
    monkeypatch.setattr(
        Plain, "read", lambda self, where: (touched.append((self.tensor.name, where)), view(self, where))[1]
    )
    raw = SMALL["olmoe"]
    folder = write_folder(tmp_path, raw, fuse("olmoe", small_tensors(raw)))
    importers.load(folder, mesh=make_mesh(MeshConfig(data=2, expert=4)), dtype="float32")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    parts = [tuple((s.start, s.stop) for s in where) for n, where in touched if n == name]
    halves = [(0, 6), (6, 12)]  # gate, up
    assert sorted(parts) == sorted(((e, e + 1), half, (0, 8)) for e in range(4) for half in halves)
    assert read["last"] == sum(value.size for value in small_tensors(raw).values())


def test_no_random_weights_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    normal = jax.random.truncated_normal

    def watched(*args: Any, **keywords: Any) -> Any:
        drawn.append(normal(*args, **keywords))
        return drawn[-1]

    monkeypatch.setattr(jax.random, "truncated_normal", watched)
    importers.load(small_folder(tmp_path))
    assert drawn and all(isinstance(value, jax.core.Tracer) for value in drawn)


# --- strictness -----------------------------------------------------------------------------------------------------


def renamed(tensors: Arrays, old: str, new: str) -> Arrays:
    return {name.replace(old, new): value for name, value in tensors.items()}


def without(tensors: Arrays, *parts: str) -> Arrays:
    return {name: value for name, value in tensors.items() if not any(part in name for part in parts)}


ONE = np.ones((2, 2), np.float32)
GATE = "model.layers.1.mlp.gate.weight"


@pytest.mark.parametrize(
    ("family", "change", "config", "words"),
    [
        ("olmoe", lambda t: without(t, GATE), {}, ("1 tensors are missing", GATE, "incomplete folder")),
        ("olmoe", lambda t: t | {"model.extra.weight": ONE}, {}, ("1 are not known: model.extra.weight",)),
        (
            "olmoe", lambda t: renamed(t, GATE, "model.layers.1.mlp.router.weight"), {},
            ("1 tensors are missing", "1 are not known", "renamed tensors", GATE),
        ),
        ("olmoe", lambda t: renamed(t, "model.", "transformer."), {}, ("renamed prefix", "'transformer.'", "'model.'")),
        ("olmoe", lambda t: renamed(t, "model.", ""), {}, ("renamed prefix", "''", "'model.'")),
        ("olmoe", lambda t: t, {"num_hidden_layers": 3}, ("2 layers", "config.json says 3", "num_hidden_layers")),
        ("olmoe", lambda t: t, {"num_hidden_layers": 1}, ("2 layers", "config.json says 1")),
        ("olmoe", lambda t: t, {"num_experts": 5}, ("do not fit", "expected [5, 8]", "4 experts", "says 5")),
        ("olmoe", lambda t: t, {"intermediate_size": 7}, ("24 do not fit", "has shape [6, 8], expected [7, 8]")),
        ("olmoe", lambda t: t, {"attention_bias": True}, ("missing", "q_proj.bias")),
        ("olmoe", lambda t: t | {GATE: t[GATE].T}, {}, (GATE, "has shape [8, 4], expected [4, 8]")),
        ("olmoe", lambda t: t | {GATE: t[GATE].astype(np.int64)}, {}, (GATE, "has type I64")),
        ("olmoe", lambda t: t | {GATE: t[GATE].astype(ml_dtypes.float8_e4m3fn)}, {}, (GATE + "_scale_inv",)),
        ("olmoe", lambda t: without(t, "lm_head"), {}, ("lm_head.weight", "tie_word_embeddings")),
        ("olmoe", lambda t: t | {"base.lora_A.weight": ONE}, {}, ("adapter", "merge")),
        ("olmoe", lambda t: t | {"model.layers.0.mlp.gate.qweight": ONE}, {}, ("quantised in a form",)),
        (
            "olmoe", lambda t: t | {"model.layers.0.mlp.experts.gate_up_proj": np.zeros((4, 12, 8), np.float32)}, {},
            ("1 are not known", "experts.gate_up_proj"),
        ),
        (
            "olmoe",
            lambda t: without(t, "layers.0.mlp.experts.0.gate_proj")
            | {"model.layers.0.mlp.experts.gate_up_proj": np.zeros((4, 12, 8), np.float32)}, {},
            ("experts.gate_up_proj also holds moe/store/up",),
        ),
        ("qwen2_moe", lambda t: without(t, "shared_expert_gate"), {}, ("mlp.shared_expert_gate.weight",)),
        ("qwen2_moe", lambda t: t, {"mlp_only_layers": []}, ("missing", "layers.1.mlp.experts.0.gate_proj.weight")),
        ("deepseek_v3", lambda t: t | {"model.layers.3.mlp.gate.weight": ONE}, {}, ("model.layers.3.mlp.gate.weight",)),
        ("deepseek_v3", lambda t: without(t, "e_score"), {}, ("e_score_correction_bias",)),
        ("gpt_oss", lambda t: without(t, "sinks"), {}, ("2 tensors are missing", "self_attn.sinks")),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(
    family: str, change: Any, config: dict[str, Any], words: tuple[str, ...], tmp_path: Path
) -> None:
    tensors = change(small_tensors(SMALL[family]))
    folder = write_folder(tmp_path, SMALL[family] | config, tensors)
    with pytest.raises(ConfigError) as error:
        importers.load(folder)
    for word in (str(folder), *words):
        assert word in str(error.value)
    assert len(str(error.value)) < 1500


def test_what_is_ignored_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("absl").propagate = True
    inv_freq = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32) for i in range(2)}
    prediction = {"model.layers.3.eh_proj.weight": ONE, "model.layers.3.mlp.experts.0.up_proj.weight": ONE}
    cases = {
        "olmoe": (inv_freq, "2: frequencies"),
        "deepseek_v3": (prediction, "2: multi-token prediction"),
        "longcat_flash": ({"model.mtp.layers.0.x": ONE, "model.mtp.norm": ONE}, "2: multi-token prediction"),
        "longcat_flash ": ({"model.layers.1.mlp.experts.5.up_proj.weight": ONE}, "1: weights of zero-computation"),
    }
    for family, (extra, words) in cases.items():
        raw = SMALL[family.strip()]
        folder = write_folder(tmp_path / family, raw, small_tensors(raw) | extra)
        with caplog.at_level(logging.INFO, logger="absl"):
            importers.load(folder, dtype="float32")
        assert words in caplog.text and "experts: per_expert in" in caplog.text
        caplog.clear()


def test_tied_embeddings(tmp_path: Path) -> None:
    """A matrix of logits beside tied embeddings is ignored where it is the embeddings, else refused."""
    raw = SMALL["qwen3_moe"]
    tensors = small_tensors(raw)
    embed = tensors["model.embed_tokens.weight"]
    wanted = arrays(importers.load(write_folder(tmp_path, raw, tensors), dtype="float32"))
    twice = write_folder(tmp_path, raw, tensors | {"lm_head.weight": embed})
    assert "unembed" not in wanted and same(arrays(importers.load(twice, dtype="float32")), wanted)
    with pytest.raises(ConfigError, match="another matrix than"):
        importers.load(write_folder(tmp_path, raw, tensors | {"lm_head.weight": embed + 1}))


def test_tables_name_no_tensor_twice() -> None:
    """Within a layout each parameter has one row but Mixtral's router, which has two names; takes do not overlap."""
    for family, raw in SMALL.items():
        config = configs.read_config(raw, Path("config.json"))
        for is_moe in (False, True):
            rows = tables.TABLES[family](config).block(is_moe)
            for layout in ("per_expert", "fused", "mxfp4"):
                chosen = [row for row in rows if row.layout in ("", layout)]
                names = [row.target for row in chosen]
                assert len(names) - len(set(names)) == (family == "mixtral")
                shares: dict[str, np.ndarray] = {}
                for row in chosen:
                    count = shares.setdefault(row.source, np.zeros(row.factored, int))
                    count.reshape(row.factored)[np.ix_(*row.taken)] += 1
                assert all(count.max() == 1 for count in shares.values())


def test_tiles_copy_any_order_and_type() -> None:
    rng = np.random.default_rng(0)
    for shape in ((), (3,), (300, 5), (130, 257), (2, 129, 140)):
        for source in (np.float32, ml_dtypes.bfloat16, np.float16):
            for target in (np.float32, ml_dtypes.bfloat16):
                value = np.asarray(rng.normal(size=shape)).astype(source)
                order = tuple(reversed(range(len(shape))))
                out = np.empty([shape[i] for i in order], target)
                tiles.copy(out, value.transpose(order))
                np.testing.assert_array_equal(out, value.transpose(order).astype(target))
                wide = np.zeros((*out.shape, 2), target)[..., 0]
                tiles.copy(wide, value.transpose(order))
                np.testing.assert_array_equal(wide, out)


def test_rectangles_of_a_parameter(tmp_path: Path) -> None:
    """Any rectangle of a factored, cut, permuted and stacked parameter is that part of the whole."""
    rng = np.random.default_rng(0)
    for family in ("deepseek_v3", "gpt_oss"):
        raw = SMALL[family]
        folder = small_folder(tmp_path / family, family)
        whole = arrays(importers.load(folder, dtype="float32"))
        config = configs.read_config(raw, folder)
        shapes = {name: value.shape for name, value in whole.items()}
        found = match(folder, family, config, raw, files.open_folder(folder), shapes)
        for name, value in whole.items():
            for _ in range(4):
                ends = [sorted(rng.choice(n + 1, 2, replace=False).tolist()) for n in value.shape]
                where = tuple(slice(a, b) for a, b in ends)
                np.testing.assert_array_equal(loading.read(found.pieces[name], where, np.float32), value[where])
