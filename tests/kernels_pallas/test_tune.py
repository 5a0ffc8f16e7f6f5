"""The tuner without a GPU: what it takes, what it refuses, what it writes, and that tuned files compile for CUDA."""

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.grouped_matmul import ref, specs
from kernels_pallas.grouped_matmul.ffn import Hidden, activate
from kernels_pallas.grouped_matmul.mosaic_gpu import candidates, launches, outer, rows, trial, tune, tuning
from kernels_pallas.grouped_matmul.mosaic_gpu.trial import Problem, Settings
from kernels_pallas.rivals.case import WrongResult
from kernels_pallas.rivals.timing import Timings

ROOT = Path(__file__).resolve().parents[2]
PROBLEM = Problem("forward", 65536, 64, 2048, 1024)
DEFAULT = PROBLEM.default()
FORWARD = [{"block_m": m, "block_n": n, "split": s} for m, n, s in ((128, 256, "n"), (128, 128, "n"), (64, 256, "n"))]
FORWARD += [{"block_m": 128, "block_n": n, "split": "m"} for n in (256, 192, 128)]
FORWARD = [tile | {"defer": False} for tile in FORWARD]
SMALL = specs.Shape("small", 2, 64, 64, 72, "test")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Nothing tuned, and a place for what will be."""
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    monkeypatch.setenv("MOEJAX_COMMIT", "one")
    tuning.table.cache_clear()
    yield tmp_path
    tuning.table.cache_clear()


@pytest.fixture
def pinned(folder, monkeypatch):
    """The place, and a list of tiles and orders that does not change with what the package declares."""
    monkeypatch.setitem(candidates.TILES, "forward", FORWARD)
    monkeypatch.setattr(candidates, "ORDERS", [{"cluster": c, "band": b} for b in (8, 16, 4) for c in (1, 2)])
    return folder


def chosen_on(device, problem):
    """What the back end would take on that device; the file is read anew."""
    tuning.table.cache_clear()
    with trial.compiled_for(device, 132):
        return tuning.choose(*dataclasses.astuple(problem))


def choice(**changes):
    fields = dataclasses.asdict(PROBLEM) | {"config": dataclasses.asdict(DEFAULT), "seconds": 1, "default_seconds": 1}
    return fields | {"spread": 0, "tried": 1} | changes


def written(path, *choices):
    path.write_text(json.dumps({"choices": choices}))
    return path


# --- the search, with times that the test decides ---------------------------------------------------------------------


class Times:
    """A bench whose configurations take the seconds that `seconds(config)` says."""

    def __init__(self, seconds, noise=0.0):
        self.seconds, self.noise, self.seen, self.finals = seconds, noise, [], []
        self.rng, self.clock = np.random.default_rng(0), 1.0

    def __call__(self, problem, settings):
        return self

    def compile(self, configs):
        return [ValueError("too large") if self.seconds(c) == "too large" else c for c in configs]

    def check(self, config):
        self.seen.append(config)
        result = self.seconds(config)
        if isinstance(result, BaseException):
            raise result

    def time(self, *configs, rounds=1):
        if rounds > 1:
            self.finals.append(configs)
        return [
            Timings(tuple(self.seconds(config) * self.clock * self.rng.uniform(1 - self.noise, 1 + self.noise, 20)), 1)
            for config in configs
        ]


def sweep(path, times, **options):
    said = []
    made = tune.Sweep(path, "Some GPU", Settings(), make=times, say=said.append, **options)
    return made.run([PROBLEM]), said


def stored(path):
    (only,) = json.loads(path.read_text())["choices"]
    return only


def best_in_the_second_round(config):
    """128 x 128 tiles are best, and with a cluster and a band of 16 better still; a larger band alone is worse."""
    good = config.block_n == 128 and config.block_m == 128 and config.split == "n"
    return 1.0 - 0.2 * good - 0.1 * (good and config.cluster == 2 and config.band == 16) + 0.01 * (config.band == 16)


def test_the_fastest_of_both_rounds_is_written_and_looked_up(pinned):
    path = tuning.path_of("Some GPU")
    times = Times(best_in_the_second_round)
    code, said = sweep(path, times)
    best = rows.Config(block_m=128, block_n=128, stages=6, split="n", cluster=2, band=16, divide=True)
    assert code == 0 and times.finals == [(DEFAULT, best)]
    assert len(times.seen) == len(set(times.seen)) == stored(path)["tried"]
    assert len(times.seen) <= candidates.most_candidates(PROBLEM, 2, None)
    assert stored(path)["config"] == dataclasses.asdict(best)
    assert (stored(path)["seconds"], stored(path)["default_seconds"]) == pytest.approx((0.71, 1.0))
    assert stored(path)["complete"] and "takes it" in said[-1]
    table = json.loads(path.read_text())
    assert table["device"] == "Some GPU" and table["commit"] == "one" and table["versions"]["jax"] == jax.__version__
    assert [p.name for p in pinned.iterdir()] == ["Some_GPU.json"]

    assert chosen_on("Some GPU", PROBLEM) == best
    near = dataclasses.replace(PROBLEM, rows=2 * PROBLEM.rows, k=1024)
    assert chosen_on("Some GPU", near) == best
    far = dataclasses.replace(PROBLEM, rows=64 * PROBLEM.rows)
    assert chosen_on("Some GPU", far) == far.default() != best
    other = dataclasses.replace(PROBLEM, operation="transposed")
    assert chosen_on("Some GPU", other) == chosen_on("Another GPU", PROBLEM) == DEFAULT


def test_a_gain_within_the_spread_changes_nothing(pinned):
    path = pinned / "t.json"
    for noise, taken in ((0.9, False), (0.1, True)):  # the gain is 29 %
        code, _ = sweep(path, Times(best_in_the_second_round, noise), again=True)
        assert code == 0 and (stored(path)["config"] != dataclasses.asdict(DEFAULT)) == taken
        gain = stored(path)["default_seconds"] - stored(path)["seconds"]
        assert (gain > stored(path)["spread"] > 0) if taken else gain == 0


def test_a_clock_that_slows_down_changes_no_choice(pinned):
    class Slowing(Times):
        def time(self, *configs, rounds=1):
            self.clock *= 1.05  # so that what comes later looks slower, unless it is held against the default
            return super().time(*configs, rounds=rounds)

    times = Slowing(best_in_the_second_round, noise=0.01)
    sweep(pinned / "t.json", times)
    best = rows.Config(block_m=128, block_n=128, stages=6, split="n", cluster=2, band=16, divide=True)
    assert stored(pinned / "t.json")["config"] == dataclasses.asdict(best)
    assert stored(pinned / "t.json")["timed"][tune.label(best)] == pytest.approx(0.71 * 1.05, rel=0.02)


def test_pairs_are_compared():
    old, new = (Timings(tuple(s * np.array([1.0, 1.3, 0.8, 1.1])), 1) for s in (2.0, 1.9))
    assert trial.compared(old, new) == pytest.approx((0.95, 0))
    rng = np.random.default_rng(0)
    old, new = (Timings(tuple(s * rng.uniform(0.9, 1.1, 50)), 1) for s in (1.0, 1.0))
    ratio, noise = trial.compared(old, new)
    assert abs(ratio - 1) < 2 * noise and 0.01 < noise < 0.05


def test_what_was_timed_is_not_timed_again(pinned, monkeypatch):
    path = pinned / "t.json"
    first, same, again, other = (Times(best_in_the_second_round) for _ in range(4))
    sweep(path, first)
    before = path.read_text()
    code, said = sweep(path, same)
    assert code == 0 and same.seen == same.finals == [] and "done before" in said[-1] and path.read_text() == before
    sweep(path, again, again=True)
    assert set(candidates.first_round(PROBLEM)) < set(again.seen)
    monkeypatch.setenv("MOEJAX_COMMIT", "two")
    sweep(path, other)
    assert set(candidates.first_round(PROBLEM)) < set(other.seen) and stored(path)["commit"] == "two"
    assert other.seen[:2] == [DEFAULT, rows.Config(**stored(path)["config"])]  # the old choice has to stand again
    same = Times(best_in_the_second_round)
    assert sweep(path, same)[0] == 0 and same.seen == []


def test_interrupted_it_keeps_what_is_done_and_goes_on(pinned):
    path = pinned / "t.json"
    stopping = candidates.first_round(PROBLEM)[3]
    first = Times(lambda c: KeyboardInterrupt() if c == stopping else best_in_the_second_round(c))
    code, said = sweep(path, first)
    assert code == 130 and "keeps what is done" in said[-1]
    assert stored(path)["tried"] == 3 and not stored(path)["complete"] and "trying" not in stored(path)
    assert stored(path)["config"] == dataclasses.asdict(DEFAULT)  # nothing is decided yet
    second = Times(best_in_the_second_round)
    assert sweep(path, second)[0] == 0
    assert not set(second.seen) & set(first.seen[:3]) and second.seen[0] == stopping
    assert stored(path)["config"]["band"] == 16 and stored(path)["complete"]


def test_a_candidate_that_killed_the_process_is_passed_over(pinned):
    path = pinned / "t.json"
    deadly = candidates.first_round(PROBLEM)[2]

    class Killed(BaseException):
        pass

    with pytest.raises(Killed):
        sweep(path, Times(lambda c: Killed() if c == deadly else 1.0))
    assert stored(path)["trying"] == tune.label(deadly)
    for _ in range(2):
        times = Times(best_in_the_second_round)
        code, said = sweep(path, times)
        assert code == 0 and deadly not in times.seen and f"passes over {tune.label(deadly)}" in said[0]
        assert stored(path)["deadly"] == [tune.label(deadly)] and "trying" not in stored(path)


def test_time_that_is_over_starts_nothing(pinned, monkeypatch):
    path = pinned / "t.json"
    times = Times(best_in_the_second_round)
    code, said = sweep(path, times, minutes=0)
    assert code == 0 and times.seen == [] and not path.exists() and "stopped before forward" in said[-1]

    ticks = iter(range(1000))  # a second for every look at the clock
    monkeypatch.setattr(tune.time, "monotonic", lambda: next(ticks))
    code, said = sweep(path, times, minutes=6 / 60)
    assert code == 0 and 1 < len(times.seen) < 8 and not stored(path)["complete"]
    assert len(times.finals) == 1  # what there is is decided


def test_limit_bounds_the_candidates(pinned):
    times = Times(best_in_the_second_round)
    sweep(pinned / "t.json", times, limit=3)
    assert len(times.seen) == 3 == candidates.most_candidates(PROBLEM, 2, 3)


def test_wrong_and_refused_candidates_are_told_and_never_written(pinned):
    path = pinned / "t.json"
    tiles = candidates.first_round(PROBLEM)
    wrong, large = tiles[2], tiles[3]
    times = Times(lambda c: WrongResult("off") if c == wrong else "too large" if c == large else 2.0 - (c == DEFAULT))
    for _ in range(2):  # also when it goes on
        code, said = sweep(path, times)
        assert code == 1
        assert (
            sum(line.startswith("WRONG RESULT") and tune.label(wrong) in line for line in said) == 2
        )  # at the end too
        assert any(f"{tune.label(large)} does not compile: ValueError: too large" in line for line in said)
        assert tune.label(wrong) not in path.read_text() and tune.label(large) not in path.read_text()
    assert stored(path)["config"] == dataclasses.asdict(DEFAULT)


def test_without_the_default_nothing_is_decided(pinned):
    path = written(pinned / "t.json", choice(seconds=0.5, commit="zero"))
    before = path.read_text()
    code, said = sweep(path, Times(lambda c: WrongResult("off") if c == DEFAULT else 1.0))
    assert code == 1 and any("nothing is decided" in line for line in said) and path.read_text() == before


def test_a_failed_write_leaves_the_old_file(folder, monkeypatch):
    path = folder / "t.json"
    tune.write(path, {"choices": []})
    before = path.read_text()

    def full(self, text):
        path.with_name(self.name).open("w").write(text[:3])
        raise OSError("disk full")

    monkeypatch.setattr(type(path), "write_text", full)
    with pytest.raises(OSError, match="disk full"):
        tune.write(path, {"choices": [choice()]})
    assert path.read_text() == before and [p.name for p in folder.iterdir()] == ["t.json"]


def test_a_file_of_another_device_is_not_touched(folder):
    path = folder / "t.json"
    path.write_text(json.dumps({"device": "Other", "choices": []}))
    with pytest.raises(ValueError, match="is of Other, this is Some GPU: name another file"):
        tune.Sweep(path, "Some GPU", Settings())


# --- kernels, references and checks -----------------------------------------------------------------------------------


def in_words(problem, lhs, *others, sizes):
    """The results in float32, by the reference back end."""
    lhs, *others = (a.astype(jnp.float32) for a in (lhs, *others))
    if problem.operation == "outer":
        like = jnp.zeros((problem.experts, problem.k, problem.n))
        return jax.vjp(lambda rhs: ref.grouped_matmul(lhs, rhs, sizes), like)[1](others[0])
    made = [ref.grouped_matmul(lhs, m, sizes, transpose_rhs=problem.operation == "transposed") for m in others]
    return [activate("swiglu", Hidden(*made)), *made] if problem.operation == "gated" else made


@pytest.mark.parametrize("operation", list(tuning.CONFIGS))
def test_the_reference_is_that_of_the_reference_back_end(operation):
    problem = Problem(operation, 200, 5, 64, 96)
    sizes = jnp.array([70, 0, 3, 120, 7], jnp.int32)
    arrays = [jax.random.normal(jax.random.key(i), s, jnp.bfloat16) for i, s in enumerate(problem.shapes)]
    found, expected = trial.reference(problem, 120, sizes, *arrays), in_words(problem, *arrays, sizes=sizes)
    for a, b in zip(found, expected, strict=True):
        assert float(trial.worst_row(a, b)) < 1e-5


def test_the_check_sees_one_wrong_element_and_what_was_not_written():
    expected = jax.random.normal(jax.random.key(0), (4096, 2048)).at[7].set(0)
    good = expected.astype(jnp.bfloat16)
    assert float(trial.worst_row(good, expected)) <= 2**-9
    for wrong in (good.at[9, 9].add(2.0), good.at[9, 9].set(jnp.nan), good.at[7, 7].set(1e-9)):
        assert not float(trial.worst_row(wrong, expected)) <= 5e-3


def test_a_bench_times_programs_in_turn_on_several_sets():
    bench = trial.Bench(Problem("forward", 64, 2, 64, 64), Settings(repeats=3, target_ms=0.1))
    sizes = [np.asarray(s[0]) for s in bench.sets]
    assert len(sizes) > 1 and all(s.sum() == 64 for s in sizes) and np.any(sizes[0] != sizes[1])
    order = []

    def program(name, factor=1.0):
        def run(sets):
            order.append(name)
            outs = [trial.reference(bench.problem, 64, *operands) for operands in sets]
            return [[(factor * out).astype(jnp.bfloat16) for out in results] for results in outs]

        return run

    bench.check(program("good"))
    with pytest.raises(WrongResult, match="result 0 of set 0: a row's relative error is 2"):
        bench.check(program("wrong", 1.02))
    order.clear()
    timed = bench.time(program("a"), program("b"), rounds=2)
    assert [len(t.seconds) for t in timed] == [6, 6] and all(s > 0 for t in timed for s in t.seconds)
    a, b = (t.calls // (len(sizes) * bench.rounds) for t in timed)
    assert order[-6 * (a + b) :] == (["a"] * a + ["b"] * b) * 6
    (refused,) = bench.compile([rows.Config(stages=5)])
    assert isinstance(refused, Exception)


@pytest.mark.slow  # its parts are tests above
def test_a_whole_sweep_in_the_interpreter_refuses_a_planted_wrong_kernel(folder, monkeypatch, capsys):
    call, path = trial.call, tuning.path_of("interpreter")

    def planted(problem, config, kernels):
        run = call(problem, config, kernels)
        if config.block_n != 128:
            return run
        return lambda *operands: [out.at[-1, -1].add(1.0) for out in run(*operands)]

    tiles = [{"block_m": 128, "block_n": 128, "split": "n"}]
    monkeypatch.setattr(trial, "call", planted)
    monkeypatch.setitem(specs.SHAPES, "small", SMALL)
    monkeypatch.setitem(candidates.TILES, "forward", tiles)
    monkeypatch.setattr(candidates, "ORDERS", [{"cluster": 1, "band": 4}])
    problem = Problem("forward", SMALL.rows, SMALL.experts, SMALL.d_model, SMALL.d_expert)
    arguments = ["--interpret", "--shape", "small", "--operation", "forward", "--survivors", "1", "--limit", "3"]
    assert tune.main([*arguments, "--output", str(path)]) == 1
    said = capsys.readouterr().out
    assert "WRONG RESULT, not taken" in said and "a row's relative error is" in said
    (found,) = json.loads(path.read_text())["choices"]
    assert Problem(**{name: found[name] for name in dataclasses.asdict(problem)}) == problem
    labels = {tune.label(dataclasses.replace(problem.default(), band=band)) for band in (8, 4)}
    assert set(found["timed"]) == labels and found["tried"] == 2 and found["complete"]
    assert chosen_on("interpreter", problem) == rows.Config(**found["config"])


@pytest.fixture
def command(folder):
    """Starts the script in the interpreter as a user does, without emulated devices."""
    started = []

    def start(*arguments, **settings):
        settings |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "MOEJAX_COMMIT": "one"}
        options = ["--interpret", "--shape", "blocks", "--operation", "forward", "--output", str(folder / "t.json")]
        script = [sys.executable, "-u", str(ROOT / "scripts/tune_kernels.py"), *options, *arguments]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(script, env=os.environ | settings, stdout=pipe, stderr=pipe, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_the_interpreter_has_the_threads_that_it_waits_on(command):
    on_one_core = command("--limit", "1", NPROC="1")  # so many threads has XLA's pool, unless there are more devices
    said, problems = on_one_core.communicate(timeout=120)
    assert not problems and said.count(" of the default's speed") == 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl_c", "sigterm"])
def test_a_signal_ends_the_command_and_leaves_nothing_to_pass_over(command, folder, number, code):
    process = command("--limit", "3")
    while "2 block" not in (line := process.stdout.readline()):
        assert line
    while "trying" not in stored(folder / "t.json"):
        time.sleep(0.01)
    process.send_signal(number)
    _, problems = process.communicate(timeout=20)
    assert process.returncode == code
    assert problems == f"interrupted: {folder / 't.json'} keeps what is done; call again to go on\n"
    assert stored(folder / "t.json")["tried"] == 2
    assert not {"trying", "deadly"} & stored(folder / "t.json").keys()


def test_the_rule_defers_stores_where_tiles_are_short():
    for k, n in ((2048, 1024), (4096, 14336)):
        short = tuning.for_rows(65536, 64, k, n, False)
        assert (short.defer, short.split) == (True, "m")
    long = tuning.for_rows(16384, 8, 14336, 4096, False)
    assert (long.defer, long.split) == (False, "n")
    few, many = tuning.for_outer(65536, 64, 2048, 1024), tuning.for_outer(16384, 8, 4096, 14336)
    assert (few.defer, few.cluster) == (True, 1) and (many.defer, many.cluster) == (False, 2)
    assert tuning.for_gated(65536, 64, 2048, 1024).defer
    assert not tuning.for_rows(512, 64, 2048, 1024, False).defer and not tuning.for_gated(512, 64, 2048, 1024).defer


def test_tiles_divide_half_of_the_columns_where_they_can():
    """Half of 768 is two tiles of 192, not one and a half of 256; half of 1408, 704, is no whole number of either."""
    for columns, width in ((384, 192), (768, 192), (1024, 256), (1408, 256)):
        assert tuning.for_rows(65536, 64, 2048, columns, False, cut_columns=True).block_n == width
        assert tuning.for_rows(65536, 64, 2048, columns, False).block_n == 256


def test_an_override_must_have_an_effect():
    wanted = outer.Config(stages=2)
    with tuning.using("outer", wanted):
        assert tuning.for_outer(64, 1, 64, 64) == wanted
        assert tuning.for_rows(6400, 1, 8192, 64, False) == rows.Config(divide=True)
    assert tuning.for_outer(6400, 1, 64, 64) == outer.Config()
    with pytest.raises(RuntimeError, match=r"operation='outer'.*had no effect"), tuning.using("outer", wanted):
        tuning.for_gated(64, 1, 64, 64)


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_problems_are_the_kernel_calls_of_a_layer():
    found = candidates.problems(["olmoe", "olmoe_decode"], list(tuning.CONFIGS), [8, 512])
    assert len(found) == len(set(found)) == 7 + 2 * 3
    assert Problem("outer", 65536, 64, 1024, 2048) in found and Problem("gated", 8, 64, 2048, 1024) in found
    assert not [p for p in found if p.rows < 1000 and p.operation in ("transposed", "outer")]


def test_stages_are_as_many_as_shared_memory_holds():
    problem = Problem("forward", 256, 2, 128, 256)
    for block_m in (64, 128):
        stages = candidates.stages_that_fit({"block_m": block_m, "block_n": 256})
        trial.lower(problem, rows.Config(block_m=block_m, stages=stages))
        with pytest.raises(ValueError, match="exceeds available shared memory"):
            trial.lower(problem, rows.Config(block_m=block_m, stages=stages + 1))


@pytest.mark.parametrize("kind", candidates.TILES)
def test_a_tile_names_both_of_its_sides(kind):
    """Else the stages that fit are counted without one of them."""
    for tile in candidates.TILES[kind]:
        assert "block_n" in tile
        assert ("block_k" if kind == "outer" else "block_m") in tile


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["olmoe", "olmoe_decode"])
def test_every_candidate_lowers_for_cuda(shape, capsys):
    assert tune.main(["--dry_run", "--lower", "--shape", shape]) == 0
    assert ", 0 refused" in capsys.readouterr().out


def test_a_dry_run_tells_the_plan_and_lowers_it(monkeypatch, capsys):
    monkeypatch.setitem(specs.SHAPES, "small", SMALL)
    monkeypatch.setattr(candidates, "ORDERS", [])
    assert tune.main(["--dry_run", "--shape", "small", "--limit", "4"]) == 0
    said = capsys.readouterr().out
    assert "forward P=72 E=2 K=64 N=64: 4 candidates" in said and "4 problems, 16 candidates" in said
    monkeypatch.setitem(candidates.TILES, "outer", [{"block_k": 64, "block_n": 128}])  # no whole swizzle to clear
    assert tune.main(["--dry_run", "--lower", "--shape", "small", "--operation", "outer"]) == 1
    said = capsys.readouterr().out
    assert "REFUSED outer P=72" in said and "1 problems, 4 candidates; 4 lowered, 2 refused" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--interpret"], "--interpret needs --output"),
        (["--lower"], "--lower belongs to --dry_run"),
        (["--shape", "tiny", "--dry_run"], "K=24 must be a multiple of 64"),
        (["--shape", "olmoes"], "invalid choice: 'olmoes'"),
        (["--limit", "0"], "--limit=0: must be at least 1"),
        (["--rows", "8", "0"], "must be at least 1"),
        ([], "needs a Hopper GPU, the platform is cpu; --dry_run prints the plan"),
    ],
)
def test_what_cannot_run_is_told(arguments, message, capsys):
    try:
        code = tune.main(arguments)
    except SystemExit as end:
        code = end.code
    assert code == 2 and message in capsys.readouterr().err


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "must be an object with a list of choices"),
        ("{}", "must be an object with a list of choices"),
        (json.dumps({"choices": [choice(), choice(operation="backward")]}), r"choices\[1\] must have an operation"),
        (json.dumps({"choices": [choice(rows=0)]}), r"choices\[0\] has rows=0"),
        (json.dumps({"choices": [choice(k="2048")]}), r"choices\[0\] has k='2048'"),
        (json.dumps({"choices": [choice(seconds=None)]}), r"choices\[0\] has seconds=None"),
        (json.dumps({"choices": [choice(config={"block_x": 1})]}), r"has config=\{'block_x': 1\}"),
    ],
)
def test_a_damaged_file_is_named(folder, text, message):
    path = tuning.path_of("Some GPU")
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        chosen_on("Some GPU", PROBLEM)
    assert str(path) in str(error.value)


def check_tuned(path):
    """Every configuration of a file lowers for CUDA."""
    device = json.loads(path.read_text()).get("device", "H100")
    done = set()
    for found in tuning.read(path)["choices"]:
        config = tuning.CONFIGS[found["operation"]](**found["config"])
        if (found["operation"], config) not in done:
            done.add((found["operation"], config))
            problem = Problem(found["operation"], *(found[name] for name in tuning.SIZES))
            assert trial.lower(problem, config, device).count("custom_call @mosaic_gpu") == 1
    return len(done)


def test_where_the_rule_was_fastest_a_later_rule_decides(pinned, monkeypatch):
    path, times = tuning.path_of("Some GPU"), Times(lambda config: 1.0 if config == DEFAULT else 1.2)
    assert sweep(path, times)[0] == 0
    assert stored(path)["rule"] is True and stored(path)["config"] == dataclasses.asdict(DEFAULT)
    later = dataclasses.replace(DEFAULT, band=2)
    monkeypatch.setattr(tuning, "default", lambda *shape: later)
    assert chosen_on("Some GPU", PROBLEM) == later
    assert sweep(path, Times(best_in_the_second_round), again=True)[0] == 0
    assert stored(path)["rule"] is False
    assert chosen_on("Some GPU", PROBLEM) == rows.Config(**stored(path)["config"]) != later


def test_launches_for_a_profiler(tmp_path, capsys):
    assert launches.main(["--shape", "blocks", "tiny"], implementation="padded") == 0
    assert capsys.readouterr().out.split() == ["blocks:", "4", "launches", "tiny:", "4", "launches"]
    assert launches.main([]) == 2
    assert "needs a Hopper GPU" in capsys.readouterr().err
    head = ["ID", "Kernel Name", "Section Name", "Metric Name", "Metric Unit", "Metric Value"]
    rows = [[i, "grouped_matmul" if i % 2 else "broadcast", "s", metric, "us", i]
            for i in range(8) for metric in ("Duration", "")]  # fmt: skip
    lines = [",".join(f'"{cell}"' for cell in row) for row in [head, *rows]]
    file = tmp_path / "ncu.csv"
    file.write_text("\n".join(["==PROF== Connected", *lines]))
    assert launches.main(["--shape", "olmoe", "--label", str(file)]) == 0
    _, *found = capsys.readouterr().out.splitlines()
    launched = itertools.product(("up", "down"), ("forward", "major"))
    assert found == [
        f"olmoe,{part},{operation},grouped_matmul,s,Duration,us,{2 * i + 1}"
        for i, (part, operation) in enumerate(launched)
    ]
    with pytest.raises(ValueError, match="has 4 launches of grouped matmuls, olmoe mixtral are 8"):
        launches.main(["--shape", "olmoe", "mixtral", "--label", str(file)])


TUNED = tuning.FOLDER


def test_what_is_tuned_is_well_formed_and_lowers_for_cuda():
    for path in sorted(TUNED.glob("*")):  # none before the first sweep
        assert path.name == f"{tuning.read(path)['device'].replace(' ', '_')}.json"
        assert check_tuned(path) > 0


def test_the_check_of_tuned_files_lowers_and_refuses(folder):
    good = choice(operation="outer", rows=256, experts=2, k=128, n=128, config={"block_n": 128, "stages": 6})
    assert check_tuned(written(folder / "t.json", good, good, good | {"config": {"cluster": 1}})) == 2
    with pytest.raises(ValueError, match="exceeds available shared memory"):
        check_tuned(written(folder / "t.json", good, good | {"config": {"block_n": 128, "stages": 8}}))
