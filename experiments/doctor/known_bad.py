"""Combinations known to fail or to be slow: one row each, with a reason and who says so. Standard library only."""

import dataclasses
import re
from collections.abc import Callable

from experiments.doctor.environment import Environment, Gpu, number
from experiments.doctor.finding import Finding, Level

GPU_MEMORY = "https://docs.jax.dev/en/latest/gpu_memory_allocation.html"
INSTALLATION = "https://docs.jax.dev/en/latest/installation.html"


@dataclasses.dataclass(frozen=True)
class Row:
    """A combination: ``applies`` gives what was found, or None."""

    name: str
    level: Level
    applies: Callable[[Environment], str | None]
    why: str
    fix: str
    source: str


def findings(env: Environment) -> list[Finding]:
    """One finding for each row that applies."""
    found = []
    for row in ROWS:
        what = row.applies(env)
        if what is not None:
            found.append(Finding(row.level, row.name, what, row.why, row.fix, row.source))
    return found


# --- conditions -------------------------------------------------------------------------------------------------------


def _on(env: Environment, variable: str) -> bool:
    """Whether a JAX switch is set, as JAX reads it."""
    return env.variables.get(variable, "").strip().lower() in ("1", "true", "t", "yes", "y", "on")


def _switch(variable: str) -> Callable[[Environment], str | None]:
    return lambda env: f"{variable}={env.variables[variable]}" if _on(env, variable) else None


def _jax_range(env: Environment) -> str | None:
    have = env.number("jax")
    inside = have is None or (0, 11, 2) <= have < (0, 12)
    return None if inside else f"jax {env.versions['jax']}, outside >=0.11.2,<0.12"


def _jaxlib_newer(env: Environment) -> str | None:
    jax, jaxlib = env.number("jax"), env.number("jaxlib")
    if jax is None or jaxlib is None or jaxlib <= jax:
        return None
    return f"jaxlib {env.versions['jaxlib']} is newer than jax {env.versions['jax']}"


def _plugin(env: Environment) -> str | None:
    lib = env.number("jaxlib")
    other = [
        f"{name} {version}"
        for name, version in sorted(env.versions.items())
        if re.fullmatch(r"jax-cuda\d+-(plugin|pjrt)", name) and lib is not None and number(version) != lib
    ]
    return f"{', '.join(other)} beside jaxlib {env.versions['jaxlib']}" if other else None


def _plugins(env: Environment) -> list[str]:
    return sorted(name for name in env.versions if re.fullmatch(r"jax-cuda\d+-plugin", name))


def _no_plugin(env: Environment) -> str | None:
    if not env.gpus or _plugins(env) or env.platform == "gpu":
        return None
    return f"{len(env.gpus)} x {env.gpus[0].name} and no jax-cuda13-plugin"


def _fell_back(env: Environment) -> str | None:
    if not env.gpus or not _plugins(env) or env.platform != "cpu" or _forced_cpu(env) or _hidden(env):
        return None
    return f"JAX runs on the CPU beside {env.gpus[0].name} and {_plugins(env)[0]}"


def _two_plugins(env: Environment) -> str | None:
    plugins = _plugins(env)
    return f"{' and '.join(plugins)} are both installed" if len(plugins) > 1 else None


def _forced_cpu(env: Environment) -> str | None:
    name = next((n for n in ("JAX_PLATFORMS", "JAX_PLATFORM_NAME") if env.variables.get(n)), "")
    asked = env.variables.get(name, "")
    if not env.gpus or asked.split(",")[0].strip().lower() in ("", "cuda", "gpu"):  # the first is the one that runs
        return None
    return f"{name}={asked} while {len(env.gpus)} x {env.gpus[0].name} is there"


def _hidden(env: Environment) -> str | None:
    value = env.variables.get("CUDA_VISIBLE_DEVICES")
    hides = value is not None and value.strip() in ("", "-1", "NoDevFiles")
    return f"CUDA_VISIBLE_DEVICES={value!r} hides every GPU" if env.gpus and hides else None


def _old_driver(env: Environment) -> str | None:
    # NVIDIA's compatibility libraries stand in for a newer driver's.
    if "jax-cuda13-plugin" not in env.versions or "compat" in env.variables.get("LD_LIBRARY_PATH", ""):
        return None
    old = [gpu.driver for gpu in env.gpus if number(gpu.driver) and number(gpu.driver) < (580,)]
    return f"driver {old[0]} for CUDA 13" if old else None


def _cudnn(env: Environment) -> str | None:
    for name in ("nvidia-cudnn-cu13", "nvidia-cudnn-cu12"):
        have = env.number(name)
        if have is not None and have < (9, 22):
            return f"{name} {env.versions[name]}"
    return None


def _library_path(env: Environment) -> str | None:
    value = env.variables.get("LD_LIBRARY_PATH", "")
    # Not where containers mount the driver's own libraries, or those that stand in for them.
    others = [f for f in value.split(":") if not re.match("/usr/local/nvidia/", f) and "compat" not in f]
    folders = [f for f in others if re.search("cuda|cudnn|nvidia", f, re.IGNORECASE)]
    bundled = any(name.startswith("nvidia-cudnn-cu") for name in env.versions)
    return f"LD_LIBRARY_PATH names {folders[0]}" if folders and bundled else None


def _fraction(env: Environment) -> str | None:
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        value = env.variables.get(name)
        if value is None:
            continue
        try:
            share = float(value)
        except ValueError:
            return f"{name}={value} is no number"
        if not 0 < share <= 1:
            return f"{name}={value}: a share of the memory lies above 0 and at most at 1"
    return None


def _fraction_unused(env: Environment) -> str | None:
    names = [n for n in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION") if n in env.variables]
    off = env.variables.get("XLA_PYTHON_CLIENT_PREALLOCATE", "").lower() in ("false", "0")
    return f"{names[0]} beside XLA_PYTHON_CLIENT_PREALLOCATE=false" if names and off else None


def _no_preallocation(env: Environment) -> str | None:
    value = env.variables.get("XLA_PYTHON_CLIENT_PREALLOCATE", "")
    return f"XLA_PYTHON_CLIENT_PREALLOCATE={value}" if env.gpus and value.lower() in ("false", "0") else None


def _platform_allocator(env: Environment) -> str | None:
    value = env.variables.get("XLA_PYTHON_CLIENT_ALLOCATOR", "")
    return f"XLA_PYTHON_CLIENT_ALLOCATOR={value}" if value.lower() == "platform" else None


def _visible(env: Environment) -> list[Gpu]:
    """GPUs that CUDA_VISIBLE_DEVICES leaves; all where it gives no numbers."""
    words = [word.strip() for word in env.variables.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    return [env.gpus[int(word)] for word in words if word.isdigit() and int(word) < len(env.gpus)] or list(env.gpus)


def _occupied(env: Environment) -> str | None:
    off = env.variables.get("XLA_PYTHON_CLIENT_PREALLOCATE", "").lower() in ("false", "0")
    for gpu in _visible(env):
        if gpu.memory_mib and gpu.used_mib > 0.25 * gpu.memory_mib and not off:
            return f"{gpu.name}: {gpu.used_mib:,} of {gpu.memory_mib:,} MiB are taken already"
    return None


def _xla_flag(flag: str, pattern: str) -> Callable[[Environment], str | None]:
    def applies(env: Environment) -> str | None:
        found = re.search(rf"--{flag}={pattern}", env.variables.get("XLA_FLAGS", ""))
        return f"XLA_FLAGS has {found[0]}" if found else None

    return applies


def _precision(env: Environment) -> str | None:
    value = env.variables.get("JAX_DEFAULT_MATMUL_PRECISION", "")
    return f"JAX_DEFAULT_MATMUL_PRECISION={value}" if value else None


ROWS = (
    Row("jax version", "error", _jax_range,
        "the code uses names of JAX 0.11 (jax.lax.pcast, manual axis types) that older ones lack and later ones may "
        "move",
        "bash scripts/setup_env.sh base", "pyproject.toml"),
    Row("jaxlib", "error", _jaxlib_newer, "JAX refuses to be imported", "install both from one lock: "
        "bash scripts/setup_env.sh base", "check_jaxlib_version in jax/_src/lib/__init__.py"),
    Row("CUDA plugin", "error", _plugin, "JAX does not load a plugin of another version than jaxlib's: it runs on the "
        "CPU, or without the plugin's kernels", "bash scripts/setup_env.sh cuda",
        "check_plugin_version in jaxlib/plugin_support.py"),
    Row("CUDA plugin", "warning", _two_plugins, "which of the two is loaded is left to chance",
        "uninstall the one that is not in requirements/cuda.lock", "requirements/cuda.lock"),
    Row("GPU unused", "warning", _no_plugin, "JAX runs on the CPU, orders of magnitude slower",
        "bash scripts/setup_env.sh cuda", INSTALLATION),
    Row("GPU unused", "error", _fell_back, "the plugin did not start, and JAX went on without it; its reason is in the "
        "warnings above", "JAX_PLATFORMS=cuda shows the reason as an error; bash scripts/setup_env.sh cuda",
        INSTALLATION),
    Row("GPU unused", "warning", _forced_cpu, "JAX runs on the CPU although there is a GPU", "unset JAX_PLATFORMS",
        "https://docs.jax.dev/en/latest/config_options.html"),
    Row("GPU unused", "warning", _hidden, "JAX runs on the CPU although there is a GPU", "unset CUDA_VISIBLE_DEVICES",
        "https://docs.nvidia.com/cuda/cuda-c-programming-guide/#env-vars"),
    Row("driver", "error", _old_driver, "CUDA 13 needs a driver of release 580 or later: kernels do not load",
        "update the NVIDIA driver to 580 or later",
        "https://docs.nvidia.com/cuda/cuda-toolkit-release-notes/ (CUDA 13, minimum driver)"),
    Row("cuDNN", "note", _cudnn, "XLA takes cuDNN's grouped matmul for jax.lax.ragged_dot from 9.22 on; below, it "
        "multiplies every expert with every row. Only implementation='lax' uses it, which 'auto' never takes",
        "bash scripts/setup_env.sh cuda", "openxla/xla#40189, openxla/xla#42313"),
    Row("LD_LIBRARY_PATH", "warning", _library_path, "it can put another CUDA before the one that "
        "was installed with JAX",
        "unset LD_LIBRARY_PATH for runs", INSTALLATION),
    Row("GPU memory", "error", _fraction, "JAX cannot start with it",
        "give a number such as XLA_CLIENT_MEM_FRACTION=0.9, or unset it", GPU_MEMORY),
    Row("GPU memory", "warning", _fraction_unused, "without preallocation the fraction does not reserve anything: the "
        "first out-of-memory error comes as late as the memory is full", "keep one of the two", GPU_MEMORY),
    Row("GPU memory", "warning", _no_preallocation, "memory gets fragmented: a run that nearly fills the GPU may fail "
        "that would fit with preallocation", "unset it for training", GPU_MEMORY),
    Row("GPU memory", "warning", _platform_allocator, "every array is allocated and freed by the driver: very slow",
        "unset XLA_PYTHON_CLIENT_ALLOCATOR; it is for debugging", GPU_MEMORY),
    Row("GPU memory", "warning", _occupied, "JAX reserves 75 % of a GPU's memory when it starts, which fails or leaves "
        "too little", "end the other process, choose another GPU by CUDA_VISIBLE_DEVICES, or set "
        "XLA_CLIENT_MEM_FRACTION", GPU_MEMORY),
    Row("JAX_ENABLE_X64", "warning", _switch("JAX_ENABLE_X64"), "numbers without a type become 64 bits wide: slower, "
        "twice the memory, and other results than the published rows", "unset JAX_ENABLE_X64",
        "https://docs.jax.dev/en/latest/default_dtypes.html"),
    Row("JAX_DISABLE_JIT", "warning", _switch("JAX_DISABLE_JIT"), "nothing is compiled: each operation runs alone, "
        "which is for a debugger", "unset JAX_DISABLE_JIT for runs",
        "https://docs.jax.dev/en/latest/debugging/flags.html"),
    Row("JAX_DEBUG_NANS", "warning", _switch("JAX_DEBUG_NANS"), "every result is copied to the host and looked at, and "
        "donated buffers are not reused", "unset JAX_DEBUG_NANS; training stops at a non-finite loss by itself",
        "https://docs.jax.dev/en/latest/debugging/flags.html"),
    Row("JAX_DEBUG_INFS", "warning", _switch("JAX_DEBUG_INFS"), "every result is copied to the host and looked at",
        "unset JAX_DEBUG_INFS", "https://docs.jax.dev/en/latest/debugging/flags.html"),
    Row("matmul precision", "note", _precision, "it holds for every float32 matmul, also where the code would choose: "
        "speed and last digits differ from the published rows", "unset JAX_DEFAULT_MATMUL_PRECISION to compare",
        "kernels_pallas/grouped_matmul/ffn.py (precision)"),
    Row("emulated devices", "note", _xla_flag("xla_force_host_platform_device_count", r"\d+"), "the CPU's cores are "
        "shared out to devices: fine for tests, no measure of speed", "unset XLA_FLAGS for measurements",
        "https://docs.jax.dev/en/latest/sharded-computation.html"),
    Row("XLA_FLAGS", "warning", _xla_flag("xla_backend_optimization_level", "[012]"), "compiled programs are left "
        "unoptimised: quick to compile, slow to run", "unset it for runs", "XLA's debug options"),
)  # fmt: skip
