"""Damaged and incomplete folders: a clear error before anything is read, and nothing executed. Quantised values."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from moejax import importers
from moejax.config import ConfigError
from moejax.importers import files
from moejax.importers.quantised import BlockScaled, Mxfp4
from tests.importers_fakes import SMALL, assert_equal, decode, encode, small_folder, small_tensors, write_folder


def header(**entries: Any) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
TWICE = b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": {"dtype": "F32", "shape": [1], '
TWICE += b'"data_offsets": [4, 8]}}'


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "0 bytes, too few"),
        (b"\x80" * 40, "header would have"),
        ((10**9).to_bytes(8, "little") + b"{}", "header would have 1000000000 bytes"),
        ((4).to_bytes(8, "little") + b"\xff{}!", "no JSON"),
        ((2).to_bytes(8, "little") + b"[]", "no JSON object"),
        (len(TWICE).to_bytes(8, "little") + TWICE + b"\0" * 8, "stands there twice"),
        (header(a=F32) + b"\0" * 7, "the file was cut short or grew"),
        (header(a=F32) + b"\0" * 9, "the file was cut short or grew"),
        (header(a={**F32, "shape": [3]}) + b"\0" * 8, "a has shape [3] of F32 and 8 bytes"),
        (header(a={**F32, "shape": [-2]}) + b"\0" * 8, "entry of a"),
        (header(a={**F32, "data_offsets": [8, 0]}) + b"\0" * 8, "a has shape"),
        (header(a={"dtype": "F32"}) + b"\0" * 8, "entry of a"),
        (header(a=F32, b=F32) + b"\0" * 8, "overlap or leave a gap"),
        (header(a={**F32, "data_offsets": [8, 16]}) + b"\0" * 16, "overlap or leave a gap"),
        (header(a={**F32, "dtype": "F4"}) + b"\0" * 8, "type F4"),
    ],
)
def test_damaged_files(data: bytes, word: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"model\.safetensors") as error:
        files.open_file(path)
    assert word in str(error.value)


def test_every_truncation_is_seen(tmp_path: Path) -> None:
    whole = encode({"a": np.arange(6, dtype=np.float32), "b": np.ones((2, 2), ml_dtypes.bfloat16)})
    path = tmp_path / "model.safetensors"
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ConfigError, match="is damaged"):
            files.open_file(path)
    path.write_bytes(whole)
    assert {tensor.name: tensor.view().tolist() for tensor in files.open_file(path)} == {
        "a": [0, 1, 2, 3, 4, 5],
        "b": [[1, 1], [1, 1]],
    }


SHARD = "model-00002-of-00002.safetensors"


def edit_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / files.INDEX
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def only_pickles(folder: Path) -> None:
    for path in [*folder.glob("*.safetensors"), folder / files.INDEX]:
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch executed'\ntR.")


def edit_config(folder: Path, **changes: Any) -> None:
    raw = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(raw))


def add_stale_single(folder: Path) -> None:
    (folder / files.SINGLE).write_bytes(encode({"a": np.zeros(2, np.float32)}))


def write_twice(folder: Path) -> None:
    (folder / SHARD).write_bytes((folder / SHARD.replace("00002-of", "00001-of")).read_bytes())


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / SHARD).unlink(), ("lacks 1 of the 2 files", SHARD)),
        (lambda f: (f / files.INDEX).unlink(), ("2 safetensors files and no model.safetensors.index.json",)),
        (lambda f: (f / files.INDEX).write_text("{"), ("index.json", "JSON")),
        (lambda f: edit_index(f, lambda i: i.pop("weight_map")), ("no weight_map",)),
        (lambda f: edit_index(f, lambda i: i["weight_map"].update(extra=SHARD)), ("1 tensors that are not", "extra")),
        (lambda f: edit_index(f, lambda i: i["weight_map"].update(extra="gone.safetensors")), ("gone.safetensors",)),
        (lambda f: edit_index(f, lambda i: i["weight_map"].update(x="../a.safetensors")), ("../a.safetensors",)),
        (lambda f: edit_index(f, lambda i: i["weight_map"].update(x="model.bin")), ("model.bin", "only safetensors")),
        (add_stale_single, ("model.safetensors and an index",)),
        (write_twice, ("two different checkpoints",)),
        (only_pickles, ("pytorch_model.bin", "pickles", "refused")),
        (lambda f: [p.unlink() for p in f.glob("model*")], ("weights are missing",)),
        (lambda f: (f / "config.json").write_text("[1]"), ("config.json", "no JSON object")),
        (lambda f: (f / "config.json").write_text("{'a'}"), ("config.json", "cannot be read as JSON")),
        (lambda f: (f / "config.json").unlink(), ("config.json", "cannot be read")),
        (lambda f: edit_config(f, rms_norm_eps=float("nan")), ("config.json", "NaN is no number in JSON")),
        (lambda f: edit_config(f, rms_norm_eps=float("-inf")), ("config.json", "-Infinity is no number in JSON")),
        (lambda f: edit_config(f, rms_norm_eps=-1e-5), ("config.json", "model.norm_eps=-1e-05: must be 0 or more")),
    ],
)
def test_incomplete_folders(damage: Callable[[Path], Any], words: tuple[str, ...], tmp_path: Path) -> None:
    folder = small_folder(tmp_path / "model", files=2)
    damage(folder)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError) as error:
        importers.load(folder)
    for word in words:
        assert word in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("family", SMALL)
def test_a_number_beyond_any_model_is_refused_before_anything_is_made_of_it(family: str, tmp_path: Path) -> None:
    """Lists of layers or experts would fill the memory; sizes of more than 64 bits overflow."""
    for key, value in SMALL[family].items():
        for huge in (10**9, 10**12, 10**30) if type(value) is int else ():
            (tmp_path / "config.json").write_text(json.dumps(SMALL[family] | {key: huge}))
            if huge > 10**9 or "layers" in key or key in ("num_experts", "num_local_experts", "n_routed_experts"):
                with pytest.raises(ConfigError, match=f"config.json: .*({huge}|{huge:,})"):
                    importers.read_config(tmp_path, mtp_layers=int(family == "deepseek_v3"))


def test_which_folders_are_taken_for_hugging_face(tmp_path: Path) -> None:
    folder = small_folder(tmp_path / "model")
    assert importers.is_hugging_face(folder)
    for text in ("{", "{}"):  # damaged: the error is to be about that
        (folder / "config.json").write_text(text)
        assert importers.is_hugging_face(folder)
    assert not importers.is_hugging_face(tmp_path)
    for i, text in enumerate(("{", "[]", "{}", '{"model": {}}', '{"model_type": 3}')):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "config.json").write_text(text)
        assert not importers.is_hugging_face(tmp_path / str(i))


def test_written_files_are_read_by_the_format(tmp_path: Path) -> None:
    """Several files of a limited size; a tensor that is larger than the limit has one of its own."""
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.arange(8).astype(ml_dtypes.bfloat16),
        "c": np.arange(100, dtype=np.float32),
        "d": np.float32([[3]]),
    }
    names = {np.dtype(np.float32): "F32", np.dtype(ml_dtypes.bfloat16): "BF16"}
    specs = {name: (names[array.dtype], array.shape) for name, array in arrays.items()}
    files.write_files(tmp_path, specs, arrays.__getitem__, 40)
    written = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert written == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    found = {name: array for path in tmp_path.glob("*.safetensors") for name, array in decode(path).items()}
    index = json.loads((tmp_path / files.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in arrays.values())
    assert set(index["weight_map"]) == set(found) == set(arrays)
    for name, tensor in files.open_folder(tmp_path).items():
        np.testing.assert_array_equal(found[name], arrays[name])
        np.testing.assert_array_equal(tensor.view(), arrays[name])
        assert tensor.start % np.dtype(np.float32).itemsize == 0
    one = tmp_path / "one"
    one.mkdir()
    files.write_files(one, specs, arrays.__getitem__, 10**9)
    assert [path.name for path in one.iterdir()] == ["model.safetensors"]


# --- quantised values -----------------------------------------------------------------------------------------------


def opened(tmp_path: Path, **arrays: np.ndarray) -> dict[str, files.Tensor]:
    (tmp_path / "q.safetensors").write_bytes(encode(arrays))
    return {tensor.name: tensor for tensor in files.open_file(tmp_path / "q.safetensors")}


def rectangles(shape: tuple[int, ...]) -> list[tuple[slice, ...]]:
    """The whole, single values at the corners, and some within."""
    rng = np.random.default_rng(0)
    made = [tuple(slice(0, n) for n in shape), tuple(slice(n - 1, n) for n in shape)]
    for _ in range(40):
        ends = [sorted(rng.choice(n + 1, 2, replace=False).tolist()) for n in shape]
        made.append(tuple(slice(a, b) for a, b in ends))
    return made


@pytest.mark.parametrize("kind", ["F8_E4M3", "F8_E5M2"])
@pytest.mark.parametrize("shape", [(5, 11), (8, 12), (2, 3, 7)])
def test_float8_blocks(kind: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    """``w[i, j] = q[i, j] * scale[i // 4, j // 3]``, with blocks that are cut off at the edges."""
    rng = np.random.default_rng(1)
    dtype = ml_dtypes.float8_e4m3fn if kind == "F8_E4M3" else ml_dtypes.float8_e5m2
    values = rng.normal(0, 20, shape).astype(dtype)
    scale = rng.uniform(0.1, 3, (*shape[:-2], -(-shape[-2] // 4), -(-shape[-1] // 3))).astype(np.float32)
    slow = np.zeros(shape, np.float32)
    for index in np.ndindex(shape):
        slow[index] = np.float32(values[index]) * scale[(*index[:-2], index[-2] // 4, index[-1] // 3)]
    found = opened(tmp_path, q=values, s=scale)
    source = BlockScaled(found["q"], found["s"], (4, 3))
    for where in rectangles(shape):
        np.testing.assert_array_equal(source.read(where), slow[where])


def test_float8_as_transformers_dequantises(tmp_path: Path) -> None:
    """Its output (5.17) for bytes 3 + 29 n mod 120 and these scales."""
    values = ((np.arange(24) * 29 + 3) % 120).astype(np.uint8).reshape(4, 6).view(ml_dtypes.float8_e4m3fn)
    scale = np.array([[0.5, 2.0, 0.25], [1.5, 0.75, 4.0]], np.float32)
    found = opened(tmp_path, q=values, s=scale)
    expected = [
        [0.0029296875, 0.0625, 3.25, 40.0, 60.0, 0.0234375],
        [0.5625, 7.0, 352.0, 0.125, 0.203125, 2.5],
        [180.0, 0.0703125, 0.421875, 5.25, 352.0, 0.125],
        [0.609375, 7.5, 45.0, 0.017578125, 1.125, 14.0],
    ]
    whole = (slice(0, 4), slice(0, 6))
    np.testing.assert_array_equal(BlockScaled(found["q"], found["s"], (2, 2)).read(whole), np.float32(expected))


def slow_mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """OCP Microscaling Formats 1.0: e2m1 is a sign, an exponent of two bits with bias 1, a mantissa of one; e8m0 is
    2^(s - 127)."""
    out = np.zeros((*blocks.shape[:-1], 32), np.float64)
    for index in np.ndindex(blocks.shape):
        for half in range(2):
            code = (int(blocks[index]) >> (4 * half)) & 15
            sign, exponent, mantissa = code >> 3, (code >> 1) & 3, code & 1
            size = (1 + mantissa / 2) * 2.0 ** (exponent - 1) if exponent else mantissa / 2
            out[(*index[:-1], 2 * index[-1] + half)] = (-1) ** sign * size * 2.0 ** (int(scales[index[:-1]]) - 127)
    return out.reshape(*blocks.shape[:-2], -1)


def test_mxfp4(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    blocks = rng.integers(0, 256, (2, 3, 2, 16)).astype(np.uint8)
    blocks[0, 0, 0] = np.arange(16) * 17  # every code in both halves
    scales = rng.integers(110, 140, (2, 3, 2)).astype(np.uint8)
    found = opened(tmp_path, b=blocks, s=scales)
    source, slow = Mxfp4(found["b"], found["s"]), slow_mxfp4(blocks, scales)
    assert source.shape == slow.shape == (2, 3, 64)
    for where in rectangles(source.shape):
        np.testing.assert_array_equal(source.read(where), slow[where])


def test_mxfp4_scale_that_is_no_number(tmp_path: Path) -> None:
    found = opened(tmp_path, b=np.full((1, 1, 16), 0x22, np.uint8), s=np.array([[255]], np.uint8))
    assert np.isnan(Mxfp4(found["b"], found["s"]).read((slice(0, 1), slice(0, 32)))).all()


def test_mxfp4_as_transformers_dequantises(tmp_path: Path) -> None:
    """Its output (5.17, transposed back) for bytes 11 + 37 n mod 256 and these scales: the first 8 of each block."""
    blocks = ((np.arange(64) * 37 + 11) % 256).astype(np.uint8).reshape(1, 2, 2, 16)
    found = opened(tmp_path, b=blocks, s=np.array([[[127, 120], [131, 126]]], np.uint8))
    values = Mxfp4(found["b"], found["s"]).read((slice(0, 1), slice(0, 2), slice(0, 64)))
    expected = [
        [-1.5, 0.0, 0.0, 1.5, 3.0, 3.0, -1.0, 6.0],
        [-0.01171875, 0.0234375, 0.0, -0.0, 0.0234375, -0.0078125, -0.0078125, -0.015625],
        [-24.0, -16.0, 0.0, -48.0, 48.0, -96.0, -16.0, 8.0],
        [-0.75, -3.0, 0.0, 0.5, 1.5, 1.0, -0.5, 2.0],
    ]
    np.testing.assert_array_equal(values.reshape(4, 32)[:, :8], np.float32(expected))


def quantised_deepseek() -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A small DeepSeek-V3 with float8 matrices in blocks of 4 x 3: its config, its tensors, and what they stand for."""
    raw = {**SMALL["deepseek_v3"], "quantization_config": {"quant_method": "fp8", "weight_block_size": [4, 3]}}
    plain = small_tensors(raw)
    stored: dict[str, np.ndarray] = {}
    for name, value in plain.items():
        if not name.endswith("_proj.weight"):
            stored[name] = value
            continue
        rows, columns = value.shape
        scale = np.random.default_rng(len(name)).uniform(0.01, 0.1, (-(-rows // 4), -(-columns // 3)))
        wide = np.repeat(np.repeat(scale.astype(np.float32), 4, 0), 3, 1)[:rows, :columns]
        stored[name] = (value / wide).astype(ml_dtypes.float8_e4m3fn)
        stored[name + "_scale_inv"] = scale.astype(np.float32)
        plain[name] = stored[name].astype(np.float32) * wide
    return raw, stored, plain


def test_a_float8_checkpoint(tmp_path: Path) -> None:
    raw, stored, plain = quantised_deepseek()
    model = importers.load(write_folder(tmp_path / "q", raw, stored), dtype="float32")
    same = importers.load(write_folder(tmp_path / "p", raw, plain), dtype="float32")
    assert_equal(model, same)
    name = next(name for name in stored if name.endswith("_scale_inv"))
    without = {n: v for n, v in stored.items() if n != name}
    with pytest.raises(ConfigError, match="1 tensors are missing") as error:
        importers.load(write_folder(tmp_path / "q", raw, without))
    assert name in str(error.value)
    stored[name] = stored[name][:1]
    with pytest.raises(ConfigError, match="has shape") as error:
        importers.load(write_folder(tmp_path / "q", raw, stored))
    assert name in str(error.value)


def test_an_mxfp4_checkpoint(tmp_path: Path) -> None:
    """gpt-oss: packed tensors are [E, 2F, D/32, 16], plain ones [E, D, 2F]."""
    raw = SMALL["gpt_oss"]
    plain = small_tensors(raw)
    stored = dict(plain)
    rng = np.random.default_rng(3)
    for name in [name for name in plain if name.endswith(("gate_up_proj", "down_proj"))]:
        del stored[name]
        experts, inner, outer = plain[name].shape
        blocks = rng.integers(0, 256, (experts, outer, inner // 32, 16)).astype(np.uint8)
        scales = rng.integers(118, 124, (experts, outer, inner // 32)).astype(np.uint8)
        stored |= {name + "_blocks": blocks, name + "_scales": scales}
        plain[name] = slow_mxfp4(blocks, scales).swapaxes(1, 2).astype(np.float32)
    model = importers.load(write_folder(tmp_path / "q", raw, stored), dtype="float32")
    assert_equal(model, importers.load(write_folder(tmp_path / "p", raw, plain), dtype="float32"))
    name = next(name for name in stored if name.endswith("_scales"))
    with pytest.raises(ConfigError, match="has type F32"):
        importers.load(write_folder(tmp_path / "q", raw, stored | {name: stored[name].astype(np.float32)}))
