"""Sweep files for ``experiments.sweep``, and helpers that they may import (``docs/sweeps.md``)."""
