"""Models as Hugging Face folders: what is written is read back bit for bit, or nothing is written."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from experiments import export, session
from moejax import importers
from moejax.config import ConfigError, MeshConfig
from moejax.importers import files, writing
from moejax.model import build
from moejax.sharding import make_mesh
from tests.importers_fakes import SMALL, arrays, assert_equal, decode, leaves, small_folder, small_tensors, write_folder
from tests.small import quick_compilation, small_model

TOKENIZER = ("tokenizer.json", "generation_config.json")


def execute(*arguments: str) -> int:
    return session.call(export.define_flags, export.command, arguments)


@pytest.mark.parametrize("family", SMALL)
def test_import_after_export_is_equal(family: str, tmp_path: Path) -> None:
    """In both layouts, in several files; and what came in per expert goes out under the names it had."""
    source = small_folder(tmp_path / "source", family)
    model = importers.load(source, dtype="float32")
    for layout in ("per_expert", "fused"):
        path = tmp_path / layout
        assert importers.write(model, model.config, path, layout=layout) == family
        again = importers.load(path, dtype="float32")
        assert_equal(again, model)
        assert dataclasses.replace(again.config, layer_loop="unroll") == dataclasses.replace(
            model.config, layer_loop="unroll"
        )
    given, written = decode(source / "model.safetensors"), decode(tmp_path / "per_expert" / "model.safetensors")
    assert given.keys() == written.keys()
    for name, value in given.items():
        np.testing.assert_array_equal(written[name], value, err_msg=name)
    fused = decode(tmp_path / "fused" / "model.safetensors")
    assert (fused.keys() == written.keys()) == (family == "gpt_oss")  # it has one layout


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
def test_bfloat16(family: str, tmp_path: Path) -> None:
    """A bfloat16 model comes back as it was; what is float32 in it is rounded only where that loses nothing."""
    model = importers.load(small_folder(tmp_path / "source", family))
    importers.write(model, model.config, tmp_path / "one")
    assert_equal(importers.load(tmp_path / "one"), model)
    written = decode(tmp_path / "one" / "model.safetensors")
    assert written["model.norm.weight"].dtype == np.float32
    assert written["model.embed_tokens.weight"].dtype == ml_dtypes.bfloat16
    assert json.loads((tmp_path / "one" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    rounded = {name: value.astype(ml_dtypes.bfloat16).astype(value.dtype) for name, value in arrays(model).items()}
    importers.write(rounded, model.config, tmp_path / "two")
    assert {value.dtype for value in decode(tmp_path / "two" / "model.safetensors").values()} == {
        np.dtype(ml_dtypes.bfloat16)
    }
    exact = importers.load(tmp_path / "source", dtype="float32")
    importers.write(exact, exact.config, tmp_path / "three", dtype="bfloat16")
    assert_equal(importers.load(tmp_path / "three"), model)


def test_scaled_and_tied_embeddings_are_written_apart(tmp_path: Path) -> None:
    """As our own models have them: the same logits from the folder."""
    config = dataclasses.replace(
        small_model(first_dense=0, every=1),
        num_layers=1,
        attention=dataclasses.replace(small_model().attention, output_bias=True),
    )
    assert config.scale_embeddings and config.tie_embeddings
    graph, params = nnx.split(jax.eval_shape(lambda: build(config)), nnx.Param)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(1, 0.2, leaf.shape).astype(leaf.dtype), params)
    model = nnx.merge(graph, params)
    assert importers.write(model, config, tmp_path / "out") == "qwen3_moe"
    again = importers.load(tmp_path / "out", dtype="float32")
    assert not again.config.scale_embeddings and not again.config.tie_embeddings
    tokens = np.arange(12, dtype=np.int32).reshape(2, 6)
    with quick_compilation():
        logits = [jax.jit(lambda m: m(tokens).logits)(m) for m in (model, again)]
    np.testing.assert_array_equal(*logits)


def test_several_files_with_an_index(tmp_path: Path) -> None:
    model = importers.load(small_folder(tmp_path / "source", "mixtral"), dtype="float32")
    writing.write(
        leaves(model), model.config, tmp_path / "out", family=None, layout="fused", dtype=None, source=None,
        context=None, file_bytes=2000,
    )  # fmt: skip
    assert (tmp_path / "out" / files.INDEX).is_file() and len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    assert_equal(importers.load(tmp_path / "out", dtype="float32"), model)


def test_from_a_mesh(tmp_path: Path) -> None:
    source = small_folder(tmp_path / "source")
    model = importers.load(source, dtype="float32", mesh=make_mesh(MeshConfig(data=2, expert=4)))
    importers.write(model, model.config, tmp_path / "out")
    assert_equal(importers.load(tmp_path / "out", dtype="float32"), importers.load(source, dtype="float32"))


def test_the_command(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    source = small_folder(tmp_path / "source", vocab_size=11, eos_token_id=7, max_position_embeddings=99)
    for name in TOKENIZER:
        (source / name).write_text(name)
    out = tmp_path / "out"
    assert execute(f"--checkpoint={source}", f"--output={out}", "--format=fused", "--dtype=float32") == 0
    said = capfd.readouterr().err
    assert "olmoe" in said and f"tokenizer of {source}" in said
    assert [(out / name).read_text() for name in TOKENIZER] == list(TOKENIZER)
    raw = json.loads((out / "config.json").read_text())
    assert (raw["eos_token_id"], raw["max_position_embeddings"], raw["torch_dtype"]) == (7, 99, "float32")
    assert_equal(importers.load(out, dtype="float32"), importers.load(source, dtype="float32"))
    assert os.stat(out).st_mode & 0o777 == os.stat(source).st_mode & 0o777
    for arguments, word in (
        ([f"--checkpoint={source}", f"--output={out}"], "not empty"),
        ([f"--checkpoint={source}", f"--output={tmp_path}/no/out"], "make it first"),
        ([f"--checkpoint={source}", f"--output={tmp_path}/new", "--family=mixtral"], "mixtral cannot express"),
        ([f"--checkpoint={source}", f"--output={tmp_path}/new", "--family=llama"], "family='llama'"),
        ([f"--checkpoint={source}", f"--output={tmp_path}/new", "--format=flat"], "per_expert|fused"),
        ([f"--checkpoint={source}"], "--output is missing"),
        ([f"--output={tmp_path}/new"], "--checkpoint is missing"),
        ([f"--checkpoint={tmp_path}/nothing", f"--output={tmp_path}/new"], "nothing"),
    ):
        assert execute(*arguments) == 2
        assert word in capfd.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    (source / "tokenizer.json").unlink()
    assert execute(f"--checkpoint={source}", f"--output={tmp_path}/bare") == 0
    assert f"no tokenizer files: {source} has none" in capfd.readouterr().err


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_what_fails_leaves_nothing(error: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C, a full disk, after the first tensors."""
    model = importers.load(small_folder(tmp_path / "source"), dtype="float32")
    made, assemble = [], writing._assembled

    def failing(*arguments: Any) -> np.ndarray:
        made.append(len(list(tmp_path.iterdir())))
        if len(made) == 5:
            raise error
        return assemble(*arguments)

    monkeypatch.setattr(writing, "_assembled", failing)
    with pytest.raises(error if isinstance(error, type) else type(error)):
        importers.write(model, model.config, tmp_path / "out")
    assert made == [2] * 5 and [path.name for path in tmp_path.iterdir()] == ["source"]
    monkeypatch.setattr(writing, "_assembled", assemble)
    (tmp_path / "out").mkdir()  # empty: may be used
    importers.write(model, model.config, tmp_path / "out")
    with pytest.raises(ConfigError, match="not empty"):
        importers.write(model, model.config, tmp_path / "out")


def test_a_capacity_is_left_out_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = small_folder(tmp_path / "source")
    limited = export.pretrained.open_model(source)
    model, config, meta = limited
    moe = dataclasses.replace(model.config.moe, capacity_factor=1.0)
    model = export.pretrained._with_config(model, dataclasses.replace(model.config, moe=moe))
    monkeypatch.setattr(export.pretrained, "open_model", lambda *a, **k: (model, config, meta))
    flags = (f"--checkpoint={source}", f"--output={tmp_path / 'out'}")
    assert execute(*flags) == 2
    assert execute(*flags, "--dropless") == 0
    assert importers.read_config(tmp_path / "out").moe.capacity_factor == 0


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({"virtual_ranks": 2}, ""),
        ({"dispatcher": "ep", "ep_exchange": "padded", "ep_send": "pairs", "ep_chunks": 3}, ""),
        ({"dispatcher": "ep", "ep_buffer_factor": 1.5}, "moe.ep_buffer_factor=1.5 drops pairs"),
        (
            {"capacity_limits": ("token_drop:factor=1",), "virtual_ranks": 2},
            "moe.capacity_limits=('token_drop:factor=1',)",
        ),
    ],
    ids=["virtual ranks", "expert parallelism", "buffers", "limits"],
)
def test_what_changes_no_logit_is_exported(
    changes: dict, refused: str, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = small_folder(tmp_path / "source")
    model, config, meta = export.pretrained.open_model(source, compute_dtype="float32")
    moe = dataclasses.replace(model.config.moe, **changes)
    model = export.pretrained._with_config(model, dataclasses.replace(model.config, moe=moe))
    monkeypatch.setattr(export.pretrained, "open_model", lambda *a, **k: (model, config, meta))
    flags = [f"--checkpoint={source}", f"--output={tmp_path / 'out'}", "--dtype=float32"]
    if refused:
        assert execute(*flags) == 2 and refused in capfd.readouterr().err
        flags.append("--dropless")
    assert execute(*flags) == 0
    tokens = np.arange(12, dtype=np.int32).reshape(2, 6) % 11
    with quick_compilation():
        again = importers.load(tmp_path / "out", dtype="float32")
        logits = [jax.jit(lambda m: m(tokens, limits=()).logits)(m) for m in (model, again)]
    np.testing.assert_allclose(*logits, rtol=1e-5, atol=1e-6)


PEAK = """
import resource, sys
import jax
from moejax import importers

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

jax.numpy.zeros(1).block_until_ready()
before = peak()
model = importers.load(sys.argv[1])
leaves = [leaf.nbytes for leaf in jax.tree.leaves(model)]
print(before, peak(), sum(leaves), max(leaves))
"""


@pytest.mark.slow
def test_peak_memory(tmp_path: Path) -> None:
    """A model of 0.3 GB in 6 files: beside it, the host holds one parameter (one shard here) and the interpreter."""
    sizes = {
        "hidden_size": 512, "intermediate_size": 512, "num_experts": 16, "num_hidden_layers": 12, "vocab_size": 20000,
    }  # fmt: skip
    raw = {**SMALL["olmoe"], **sizes}
    folder = write_folder(tmp_path / "source", raw, small_tensors(raw, dtype=ml_dtypes.bfloat16), files=6)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [sys.executable, "-c", PEAK, str(folder)]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    before, peak, model, largest = map(int, out.split())
    assert model > 3.5 * largest > 2e8
    # 100 MB: modules that are imported on the way, and pages of the pieces that 16 threads have in work
    assert peak - before < model + 1.2 * largest + 1e8
