"""One of two processes that import a folder together, for ``tests/test_importers_processes.py``.

    python -m tests.importers_process INDEX PORT FOLDER REFERENCE ANSWER

Holds what it loads against the arrays of REFERENCE (.npz), and writes what it read and found to ANSWER (JSON).
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from moejax import importers
from moejax.config import MeshConfig
from moejax.importers.quantised import Plain
from moejax.sharding import make_mesh
from tests.importers_fakes import leaves

PROCESSES, DEVICES = 2, 2


def count_reads() -> dict[str, int]:
    """Bytes that are taken from each tensor of experts from now on."""
    record: dict[str, int] = {}
    plain = Plain.read

    def counted(self: Plain, where: tuple[slice, ...]) -> np.ndarray:
        values = plain(self, where)
        if ".experts." in self.tensor.name:
            record[self.tensor.name] = record.get(self.tensor.name, 0) + values.nbytes
        return values

    Plain.read = counted
    return record


def main(index: int, port: str, folder: Path, reference: Path, answer: Path) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", PROCESSES, index)
    assert (jax.device_count(), jax.local_device_count()) == (PROCESSES * DEVICES, DEVICES)
    with np.load(reference) as file:
        wanted = dict(file)
    tokens, expected = wanted.pop("tokens"), wanted.pop("logits")
    alone = leaves(importers.load(folder, dtype="float32"))  # without a mesh: on a device of its own
    assert {device for leaf in alone.values() for device in leaf.devices()} == {jax.local_devices()[0]}
    told: dict[str, Any] = {"experts": count_reads()}
    mesh = make_mesh(MeshConfig(data=1, expert=PROCESSES * DEVICES))
    model = importers.load(folder, mesh=mesh, dtype="float32")
    found = leaves(model)
    assert found.keys() == wanted.keys()
    for name, leaf in found.items():
        assert leaf.shape == wanted[name].shape
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(shard.data, wanted[name][shard.index], err_msg=name)
    told["spread"] = sorted(name for name, leaf in found.items() if not leaf.is_fully_replicated)
    whole = NamedSharding(mesh, PartitionSpec())
    given = jax.make_array_from_callback(tokens.shape, whole, lambda where: tokens[where])
    with jax.set_mesh(mesh):
        logits = jax.jit(lambda model, tokens: model(tokens).logits, out_shardings=whole)(model, given)
    told["error"] = float(np.abs(np.asarray(logits) - expected).max() / np.abs(expected).max())
    answer.write_text(json.dumps(told))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], *map(Path, sys.argv[3:6]))
