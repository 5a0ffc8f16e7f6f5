"""Two processes, each with devices of its own, import one folder: each reads what its devices hold, and no more."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from moejax import importers
from moejax.config import MeshConfig
from moejax.importers import files
from moejax.importers.quantised import Plain
from moejax.sharding import make_mesh
from tests.goldens import run
from tests.importers_fakes import arrays, leaves, small_folder
from tests.importers_process import DEVICES, PROCESSES, count_reads

ROOT = Path(__file__).resolve().parent.parent


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a process has of an array."""

    sharding: jax.sharding.Sharding
    arrays: list[jax.Array]


@pytest.mark.parametrize("layout", ["per_expert", "fused"])
def test_a_process_reads_what_its_devices_hold(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice in this process, each time as one of two that have two of four devices each."""
    folder = small_folder(tmp_path, layout=layout, files=2)
    wanted = arrays(importers.load(folder, dtype="float32"))
    mesh = make_mesh(MeshConfig(data=1, expert=4))
    everyone = jax.sharding.Sharding.addressable_devices_indices_map
    taken = []
    for mine in (mesh.devices.flat[:2], mesh.devices.flat[2:]):
        with monkeypatch.context() as patch:
            patch.setattr(
                jax.sharding.Sharding,
                "addressable_devices_indices_map",
                lambda self, shape, mine=mine: {d: i for d, i in everyone(self, shape).items() if d in mine},
            )
            patch.setattr(
                jax, "make_array_from_single_device_arrays", lambda shape, where, made, **_: Parts(where, made)
            )
            patch.setattr(Plain, "read", Plain.read)  # put back at the end of the block
            taken.append(count_reads())
            found = leaves(importers.load(folder, mesh=mesh, dtype="float32"))
        assert found.keys() == wanted.keys()
        for name, parts in found.items():
            places = everyone(parts.sharding, wanted[name].shape)
            assert [{device} for device in mine] == [part.devices() for part in parts.arrays]
            for device, part in zip(mine, parts.arrays, strict=True):
                np.testing.assert_array_equal(part, wanted[name][places[device]], err_msg=name)
    check_halves(folder, taken)


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_once")
def test_two_processes(tmp_path: Path) -> None:
    """Values of every shard, logits of the model over both, and the bytes that each took from experts' tensors."""
    folder, reference = small_folder(tmp_path / "folder", files=2), tmp_path / "reference.npz"
    model = importers.load(folder, dtype="float32")
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (4, 6)).astype(np.int32)
    told: dict[str, Any] = {**arrays(model), "tokens": tokens, "logits": np.asarray(run(model, tokens).logits)}
    np.savez(reference, **told)
    environment = {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES} --xla_backend_optimization_level=0",
        "JAX_PLATFORMS": "cpu",
    }
    port, answers = str(free_port()), [tmp_path / f"{i}.json" for i in range(PROCESSES)]
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.importers_process", str(i), port, folder, reference, answers[i]],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for i in range(PROCESSES)
    ]  # fmt: skip
    try:
        outputs = [child.communicate(timeout=120)[0] for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    assert [child.returncode for child in children] == [0, 0], "\n".join(outputs)
    found = [json.loads(path.read_text()) for path in answers]
    for one in found:
        assert any(name.endswith("moe/store/up") for name in one["spread"])
        assert one["error"] < 1e-6
    check_halves(folder, [one["experts"] for one in found])


def check_halves(folder: Path, taken: list[dict[str, int]]) -> None:
    """Of each tensor of experts the bytes were taken once: one half by each, and by each another."""
    sizes = {name: t.nbytes for name, t in files.open_folder(folder).items() if ".experts." in name}
    assert [sum(one.values()) for one in taken] == [sum(sizes.values()) // 2] * 2
    assert {name: sum(one.get(name, 0) for one in taken) for name in sizes} == sizes
