"""The optional back end `tokamax`: its refusals, and its values where the package is installed."""

import importlib.util
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import BackendRefused
from kernels_pallas.grouped_matmul import GROUPED_FFN, GROUPED_MATMUL, grouped_matmul, specs, tokamax_backend
from tests.kernels_pallas.backends import check_ffn, check_matmul

ARGUMENTS = (jnp.ones((4, 8)), jnp.ones((2, 8, 4)), jnp.array([2, 2]))


@pytest.fixture
def fresh():
    tokamax_backend.load.cache_clear()
    yield
    tokamax_backend.load.cache_clear()


@pytest.mark.usefixtures("fresh")
class TestRefusals:
    def test_not_installed(self, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(BackendRefused, match="tokamax: tokamax is not installed: pip install tokamax"):
            grouped_matmul(*ARGUMENTS, implementation="tokamax")
        shape = specs.SHAPES["tiny"].abstract(jnp.float32)
        assert "is not installed" in GROUPED_FFN.explain(*shape, "swiglu").refusals["tokamax"]

    def test_broken_installation(self, monkeypatch, tmp_path):
        (tmp_path / "tokamax.py").write_text("raise AttributeError('jax has no attribute of that name')")
        monkeypatch.delitem(sys.modules, "tokamax", raising=False)
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(BackendRefused, match=r"cannot be imported \(AttributeError: jax has no attribute"):
            grouped_matmul(*ARGUMENTS, implementation="tokamax")

    def test_extents(self):
        with pytest.raises(BackendRefused, match="tokamax: extents are given and tokamax computes all columns"):
            grouped_matmul(*ARGUMENTS, extents=jnp.array([4, 4]), implementation="tokamax")

    def test_never_chosen_unless_named(self):
        for operation in (GROUPED_MATMUL, GROUPED_FFN):
            assert not any("tokamax" in names for names in operation.order.values())


@pytest.mark.skipif(importlib.util.find_spec("tokamax") is None, reason="tokamax is not installed")
class TestValues:
    @pytest.mark.parametrize("transpose_rhs", [False, True])
    def test_matmul(self, transpose_rhs):
        shape = specs.SHAPES["tiny"]
        for sizes in (np.array([90, 0, 120, 50], np.int32), np.array([90, 0, 120, 200], np.int32)):
            check_matmul("tokamax", shape, sizes, transpose_rhs=transpose_rhs)

    def test_ffn(self):
        shape = specs.SHAPES["tiny"]
        check_ffn("tokamax", shape, specs.dirichlet(4, 280), bias=True, row_weights="float32")
