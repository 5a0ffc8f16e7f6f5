"""One kernel call of the tuner: its operands, its float32 reference, and configurations compiled, checked and timed.

What is called is the back end as users have it; a configuration is put in its way by `tuning.using`.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Generator, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from kernels_pallas.grouped_matmul import specs
from kernels_pallas.grouped_matmul.ffn import Hidden, Weights, activate
from kernels_pallas.grouped_matmul.mosaic_gpu import backend, tuning
from kernels_pallas.grouped_matmul.mosaic_gpu.block import CONSUMERS
from kernels_pallas.rivals import timing
from kernels_pallas.rivals.case import BETWEEN_USES, MANY, TOLERANCE, WrongResult
from kernels_pallas.rivals.jax_run import over_sets

DTYPE = jnp.bfloat16
ALPHA = 5.0  # of the Dirichlet distribution of the groups
THREADS = 2 * (CONSUMERS + 1) + 2  # the warpgroups of a cluster, the program that they are part of, and one to spare


@dataclasses.dataclass(frozen=True, order=True)
class Problem:
    """One kernel call: P rows of E groups; K x N is one expert's matrix as it multiplies (`tuning.CONFIGS`)."""

    operation: str
    rows: int
    experts: int
    k: int
    n: int

    def __str__(self) -> str:
        return f"{self.operation} P={self.rows} E={self.experts} K={self.k} N={self.n}"

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of the operands beside the group sizes."""
        p, e, k, n = self.rows, self.experts, self.k, self.n
        return {
            "forward": ((p, k), (e, k, n)),
            "transposed": ((p, k), (e, n, k)),
            "gated": ((p, k), (e, k, n), (e, k, n)),
            "outer": ((p, k), (p, n)),
        }[self.operation]

    @property
    def bytes(self) -> int:
        """What a call reads, with matrices of experts that can have rows only."""
        used = min(1.0, self.rows / self.experts)
        return round(sum(np.prod(s) * (used if len(s) == 3 else 1) for s in self.shapes)) * jnp.dtype(DTYPE).itemsize

    @property
    def saves(self) -> bool:
        """Whether `gated` writes the pre-activations too, as training does and decoding does not."""
        return not tuning.decodes(self.rows, self.experts)

    def default(self) -> tuning.Config:
        """The configuration that the rule of `tuning` gives."""
        return tuning.default(self.operation, self.rows, self.experts, self.k)

    def abstract(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Group sizes and operands without data."""
        sizes = jax.ShapeDtypeStruct((self.experts,), jnp.dtype("int32"))
        return sizes, *(jax.ShapeDtypeStruct(shape, DTYPE) for shape in self.shapes)


def call(problem: Problem, config: tuning.Config, kernels: backend.Kernels) -> Callable[..., list[Array]]:
    """(group sizes, operands) -> results, by the back end's kernels."""

    def run(sizes: Array, *arrays: Array) -> list[Array]:
        with tuning.using(problem.operation, config):
            if problem.operation == "outer":
                return [kernels.outer(*arrays, sizes)]
            if problem.operation == "gated":
                xs, gate, up = arrays
                weights = Weights(gate, up, jnp.zeros((problem.experts, problem.n, problem.k), DTYPE))  # not used
                return jax.tree.leaves(kernels.up(xs, weights, sizes, activation="swiglu", save=problem.saves))
            transpose = problem.operation == "transposed"
            options: Any = {"transpose_rhs": transpose, "extent_axis": "n", "dtype": DTYPE}
            return [kernels.product(*arrays, sizes, None, **options)]

    return run


@contextlib.contextmanager
def compiled_for(device_kind: str, cores: int) -> Generator[None]:
    """What is traced within is for a GPU of so many multiprocessors, whether there is one or not."""
    device = jax.sharding.AbstractDevice(device_kind=device_kind, platform="gpu", num_cores=cores)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        yield


@contextlib.contextmanager
def interpreted(cores: int = 2) -> Generator[None]:
    """Kernels run in Pallas' interpreter, on a CPU."""
    with compiled_for("interpreter", cores), plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        yield


def make_threads() -> None:
    """Lets the interpreter run on a machine of few cores. To be called before JAX is first used.

    Each warpgroup is a program of its own, and waits for others within callbacks, on threads of XLA's pool. These are
    as many as cores, or as devices if there are more: where all of them wait, what they wait for never runs.

    Raises:
        RuntimeError: JAX is in use, with fewer CPU devices.
    """
    try:
        jax.config.update("jax_num_cpu_devices", THREADS)
    except RuntimeError:
        if jax.local_device_count(backend="cpu") < THREADS:
            raise


def lower(problem: Problem, config: tuning.Config, device_kind: str = "H100", cores: int = 132) -> str:
    """The program for CUDA, without a GPU. Raises what the compiler raises for a configuration that it refuses."""
    with compiled_for(device_kind, cores):
        traced = jax.jit(call(problem, config, backend.KERNELS)).trace(*problem.abstract())
        return traced.lower(lowering_platforms=("cuda",)).as_text()


@functools.partial(jax.jit, static_argnums=(0, 1))
def reference(problem: Problem, most: int, sizes: Int[Array, "E"], *arrays: Array) -> list[Array]:
    """Float32 results of one expert after the other; `most`: rows of the largest group."""
    start = jnp.cumsum(sizes) - sizes
    dot = functools.partial(jnp.matmul, precision="highest")

    def rows_of(e: Array) -> Array:
        within = jnp.arange(most)
        return jnp.where(within < sizes[e], start[e] + within, problem.rows)

    def take(x: Array, at: Array) -> Float[Array, "R _"]:
        return x.at[at].get(mode="fill", fill_value=0).astype(jnp.float32)

    if problem.operation == "outer":
        lhs, grad = arrays
        return [lax.map(lambda e: dot(take(lhs, rows_of(e)).T, take(grad, rows_of(e))), jnp.arange(problem.experts))]

    def add(e: Array, outs: list[Array]) -> list[Array]:
        at = rows_of(e)
        matrices = [m[e].astype(jnp.float32) for m in arrays[1:]]
        made = [dot(take(arrays[0], at), m.T if problem.operation == "transposed" else m) for m in matrices]
        if problem.operation == "gated":
            made = [activate("swiglu", Hidden(*made)), *made][: len(outs)]
        return [out.at[at].set(y, mode="drop") for out, y in zip(outs, made, strict=True)]

    count = 3 if problem.operation == "gated" and problem.saves else 1
    return lax.fori_loop(0, problem.experts, add, [jnp.zeros((problem.rows, problem.n), jnp.float32)] * count)


@jax.jit
def worst_row(out: Array, expected: Array) -> Float[Array, ""]:
    """The largest relative norm of the error over rows; infinite for NaN and for a row that must be zero and is not.

    Rows, since a few wrong elements are lost in the norm of a large array. Rounding to bfloat16 gives 2^-9 at most.
    """
    off = jnp.linalg.norm(out.astype(jnp.float32) - expected, axis=-1)
    size = jnp.linalg.norm(expected, axis=-1)
    ratio = jnp.where(size > 0, off / jnp.where(size > 0, size, 1), jnp.where(off == 0, 0, jnp.inf))
    return jnp.max(jnp.where(jnp.isnan(ratio), jnp.inf, ratio))  # on a CPU the maximum of a long array drops NaN


@dataclasses.dataclass(frozen=True)
class Settings:
    """How candidates are timed.

    Attributes:
        repeats: timings of each.
        target_ms: back-to-back calls are repeated until one timing lasts about this long.
        interpret: in Pallas' interpreter, where times mean nothing: one run each.
    """

    repeats: int = 10
    target_ms: float = 10.0
    interpret: bool = False


class Bench:
    """A problem on the device: operands and references of two sets of random normal data, more where caches are large.

    Each set has groups of its own.
    """

    def __init__(self, problem: Problem, settings: Settings) -> None:
        self.problem, self.settings = problem, settings
        self.kernels = backend.Kernels(interpret=settings.interpret)
        decodes = tuning.decodes(problem.rows, problem.experts)
        self.rounds = MANY if decodes and not settings.interpret else 1
        count = 1 if settings.interpret else max(2, timing.copies(problem.bytes, BETWEEN_USES))
        made = [self._operands(seed) for seed in range(count)]
        self.sets = jax.block_until_ready([operands for operands, _ in made])
        # The first two are checked, as more references of large results would not fit.
        self.expected = [reference(problem, most, *operands) for operands, most in made[:2]]

    def _operands(self, seed: int) -> tuple[tuple[Array, ...], int]:
        sizes = specs.dirichlet(self.problem.experts, self.problem.rows, ALPHA, seed)
        keys = jax.random.split(jax.random.key(seed), len(self.problem.shapes))
        arrays = [_normal(key, shape) for key, shape in zip(keys, self.problem.shapes, strict=True)]
        return (jnp.asarray(sizes), *arrays), int(sizes.max())

    def compile(self, configs: Iterable[tuning.Config]) -> list[Callable[..., Any] | Exception]:
        """For each its program, which calls the kernel on every set, or why there is none."""

        def one(config: tuning.Config) -> Callable[..., Any] | Exception:
            run = jax.jit(call(self.problem, config, self.kernels))
            try:
                return jax.jit(lambda sets: over_sets(run, self.rounds)(*sets)).lower(self.sets).compile()
            except Exception as error:  # whatever the compiler has to say about a configuration
                return error

        if self.settings.interpret:  # its mode belongs to this thread
            return [one(config) for config in configs]
        with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            return list(pool.map(one, configs))

    def check(self, run: Callable[..., Any]) -> None:
        """Raises WrongResult unless every row is within TOLERANCE of the reference."""
        # What a kernel leaves unwritten must not be the last one's result: fill the memory that it will get with NaN.
        jax.block_until_ready([jnp.full(a.shape, jnp.nan, DTYPE) for _ in self.sets for a in self.expected[0]])
        outs = run(self.sets)
        for i, (out, expected) in enumerate(zip(outs, self.expected, strict=False)):
            for j, (a, b) in enumerate(zip(out, expected, strict=True)):
                error, most = float(worst_row(a, b)), TOLERANCE[jnp.dtype(DTYPE).name]
                if error > most:
                    raise WrongResult(f"result {j} of set {i}: a row's relative error is {error:.2e}, above {most:g}")

    def time(self, *runs: Callable[..., Any], rounds: int = 1) -> list[timing.Timings]:
        """Of one kernel call, for each of the programs; the sets take turns.

        The programs take turns too, timing by timing: a card at its power limit changes its clock by more than
        configurations differ, but for both of two timings in a row. Compare the pairs: see `compared`.
        """
        batches = [timing.wall_clock(lambda run=run: run(self.sets), jax.block_until_ready) for run in runs]
        if self.settings.interpret:
            return [timing.Timings((batch(1),), 1) for batch in batches]
        each, target = len(self.sets) * self.rounds, self.settings.target_ms
        calls = [timing.repeat(batch, 1, target, per_call=each).calls // each for batch in batches]
        seconds = [
            [batch(k) / (k * each) for batch, k in zip(batches, calls, strict=True)]
            for _ in range(self.settings.repeats * rounds)
        ]
        return [timing.Timings(mine, k * each) for mine, k in zip(zip(*seconds, strict=True), calls, strict=True)]


def compared(old: timing.Timings, new: timing.Timings) -> tuple[float, float]:
    """(median of new / old over pairs of timings, half of the 90 % interval of this median, by bootstrap)."""
    ratios = np.divide(new.seconds, old.seconds)
    drawn = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    low, high = np.percentile(np.median(drawn, axis=1), [5, 95])
    return float(np.median(ratios)), float(high - low) / 2


@functools.partial(jax.jit, static_argnums=(1,))
def _normal(key: Array, shape: tuple[int, ...]) -> Array:
    scale = shape[-2] ** -0.5 if len(shape) == 3 else 1.0
    return (scale * jax.random.normal(key, shape, jnp.float32)).astype(DTYPE)
