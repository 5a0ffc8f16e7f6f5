"""Where the tests run: 8 emulated CPU devices, unless an accelerator is asked for.

``-m gpu`` and ``-m tpu`` leave the choice to JAX; ``MOEJAX_TEST_PLATFORM=cuda`` (or tpu, or cpu) makes it.
JAX reads these variables when it is imported, so they are set before the first test module is.
"""

import gc
import os
import re
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

EMULATED_DEVICES = 8


def platform_settings(mark_expression: str, environ: Mapping[str, str]) -> dict[str, str]:
    """Environment variables for a test run that selects ``mark_expression`` (pytest's ``-m``)."""
    platform = environ.get("MOEJAX_TEST_PLATFORM", "")
    if not platform and re.search(r"(?<!not )\b(gpu|tpu)\b", mark_expression):
        return {}
    settings = {"JAX_PLATFORMS": platform or "cpu"}
    flags = environ.get("XLA_FLAGS", "")
    if settings["JAX_PLATFORMS"] == "cpu" and "xla_force_host_platform_device_count" not in flags:
        # Nearly all of a test's time is compilation. These leave out LLVM's optimisations (XLA's own stay) and the MLIR
        # passes through which XLA emits each loop, half of the time of a small program. What holds bit for bit only
        # with those passes, as users have them, is compiled with them: tests/test_threshold.py.
        cheap = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
        cheap += " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
        devices = f"--xla_force_host_platform_device_count={EMULATED_DEVICES}"
        settings["XLA_FLAGS"] = f"{flags} {devices} {cheap}".strip()
    return settings


def pytest_configure(config: pytest.Config) -> None:
    settings = platform_settings(config.option.markexpr, os.environ)
    late = "jax" in sys.modules and any(os.environ.get(name) != value for name, value in settings.items())
    if late:
        raise pytest.UsageError(
            f"jax was imported before tests/conftest.py could set {settings}: "
            "a pytest plugin does so; disable it with -p no:NAME, or set these variables yourself"
        )
    os.environ.update(settings)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background: what is started would ignore it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Not after every 700 of the many small objects of a syntax tree or of a traced program.
    gc.set_threshold(20_000, 20, 20)


def pytest_collection_finish() -> None:
    """What all test modules imported stays: the collector need not look through it again and again."""
    gc.collect()
    gc.freeze()


LONGEST = (
    "test_soak.py", "test_mosaic_gpu.py", "test_mtp.py", "test_parity.py", "test_extents.py", "test_train.py",
    "test_limits_reference.py", "test_composition.py", "test_model.py", "test_zoo_training.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files go first: a worker that met one last would work on while the others are done. Workers keep this
    order with ``--no-loadscope-reorder``; else xdist sorts files by their number of tests, and the soak is one."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONGEST)))


MOST_MAPPED = 20_000
"""Memory maps of a process with which the next test module does not begin: Linux allows 65,530, each compiled program
has some, and where no more can be had XLA ends the process with a segmentation fault."""


@pytest.fixture(scope="module", autouse=True)
def few_programs() -> Iterator[None]:
    """Forgets compiled programs after a module when the process has many."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPPED:
        import jax  # after its variables are set

        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compiles quickly, and keeps programs for the other tests of the module."""
    from tests.small import quick_compilation  # after JAX's variables are set

    with quick_compilation(tmp_path_factory.mktemp("programs")):
        yield


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small texts and ``small_config.py``, which reads them."""
    from tests.small import write_workspace

    folder = tmp_path_factory.mktemp("workspace")
    write_workspace(folder)
    return folder
