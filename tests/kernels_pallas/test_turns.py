"""Implementations of several families timed in turn: the order, pairs of timings, and what fails on the way."""

import dataclasses
import sys
import textwrap
import threading
import weakref

import numpy as np
import pytest

from kernels_pallas.grouped_matmul import bench, specs
from kernels_pallas.rivals import child, jax_run, rows, timing, turns, worker
from kernels_pallas.rivals.case import Case, Settings, WrongResult

SETTINGS = Settings(repeats=3, target_ms=0.1, tune="none", in_turn=True)


def case(alpha=5.0):
    sizes = tuple(int(n) for n in specs.dirichlet(4, 256, alpha))
    return Case("forward", "up", "here", 4, 64, 128, 256, alpha, "float32", sizes)


def module(log, **batches):
    """A family whose implementations take as many seconds as they are told, timing by timing."""

    def implementation(name, seconds):
        left = iter(seconds)

        def batch(k):
            log.append(name)
            return k * next(left)

        def run():
            return timing.repeat(batch, SETTINGS.repeats, SETTINGS.target_ms).fields()

        return run

    class Module:
        def measurements(self, case, settings):
            yield from ((name, implementation(name, seconds)) for name, seconds in batches.items())

    return Module()


def inline(monkeypatch, **modules):
    """Families that run in this process."""

    class Family:
        def __init__(self, made):
            self.load = lambda: made

    families = {name: Family(made) for name, made in modules.items()}
    monkeypatch.setattr(worker, "families_of", lambda kind: families)
    return {name: worker.Inline("GROUPED", name) for name in families}


def timings(*seconds):
    """What `repeat` asks for: five batches to warm up, and before each timing one more."""
    return [1.0] * 4 + [s for second in seconds for s in (1.0, second)]


def test_every_round_times_each_once_from_another_one_on(monkeypatch):
    log: list[str] = []
    one = module(log, a=timings(1.0, 1.1, 0.9), b=timings(2.0, 2.2, 1.8))
    processes = inline(monkeypatch, torch=one, ours=module(log, c=timings(0.5, 0.5, 0.5)))
    made = list(turns.measure(processes, case(), SETTINGS))
    assert [(family, row["implementation"]) for family, row in made] == [("torch", "a"), ("torch", "b"), ("ours", "c")]
    warm, rounds = log[:12], log[12:]
    assert warm == ["a"] * 4 + ["b"] * 4 + ["c"] * 4
    assert rounds == [name for order in ("bca", "cab", "abc") for name in order for _ in range(2)]
    assert made[1][1]["timings_ms"] == [2000.0, 2200.0, 1800.0] and made[1][1]["median_ms"] == 2000.0


def test_ratios_are_medians_of_those_of_one_round(monkeypatch):
    """The clock halves in the last round: medians of each by itself would tell 2.0 or 4.0, depending on the round."""
    rival, mine = timings(2.0, 6.0, 8.0), timings(1.0, 2.0, 4.0)
    dense = module([], dense_mosaic=timings(0.5, 1.0, 1.0))
    processes = inline(monkeypatch, dense=dense, torch=module([], quick=rival), ours=module([], mine=mine))
    real = {"dense_mosaic": {"tflops_per_s": case().flops / 1.0 / 1e12}}
    made = rows.run_case(_with(processes, real), case(), SETTINGS, {})
    (found,) = (row for row in made if row["implementation"] == "mine")
    assert found["best_rival"] == "quick"
    assert found["ratio_to_best_rival"] == pytest.approx(np.median([2.0, 3.0, 2.0]))
    assert found["ratio_to_best_rival_p10"] == pytest.approx(2.0) and 2.0 < found["ratio_to_best_rival_p90"] < 3.0
    assert found["share_of_ceiling"] == pytest.approx(np.median([0.5, 0.5, 0.25]) / case().tile_share)


def _with(processes, more):
    """Rows with further columns, as a family would give them."""

    class Changed:
        def __init__(self, process):
            self.begin, self._advance = process.begin, process.advance

        def advance(self, name):
            row = self._advance(name)
            return row if row is None else row | more.get(name, {})

    return {name: Changed(process) for name, process in processes.items()}


def test_what_has_no_timing_does_not_hold_up_the_others(monkeypatch):
    class Module:
        def measurements(self, case, settings):
            def wrong():
                raise WrongResult("off by one")

            def late():
                timing.repeat(lambda k: 1.0, 1, 0.1)
                raise MemoryError("at the end")

            yield "wrong", wrong
            yield "shy", lambda: {"refused": "not mine"}
            yield "late", late

    class Missing:
        def measurements(self, case, settings):
            raise ModuleNotFoundError("torch not installed")

    processes = inline(monkeypatch, torch=Missing(), ours=Module(), dense=module([], a=timings(1.0, 1.0, 1.0)))
    made = {row["implementation"]: row for _, row in turns.measure(processes, case(), SETTINGS)}
    assert made["torch"]["error"] == "ModuleNotFoundError: torch not installed"
    assert made["wrong"]["error"] == "WrongResult: off by one" and made["shy"]["refused"] == "not mine"
    assert made["late"]["error"] == "MemoryError: at the end" and made["a"]["median_ms"] == 1000.0
    assert not processes["ours"].turns.clean  # a process of its own would end now


def test_a_search_does_not_stop_for_others():
    stops: list[int] = []
    with timing.stopping(lambda: stops.append(1)):
        timing.repeat(lambda k: 1.0, 3, 0.1, alone=True)
        timing.in_turns({"a": lambda: None}, lambda x: None, 2, 0.001)
        assert not stops
        made = timing.repeat(lambda k: 1.0, 3, 0.1)
        assert len(stops) == 4 and made.fields()["timings_ms"] == [1000.0] * 3
    assert "timings_ms" not in timing.repeat(lambda k: 1.0, 3, 0.1).fields()


def test_what_was_timed_beside_its_own_whole_has_no_rounds_with_others(monkeypatch):
    """`major`: the timings of another family at the same place are of another minute."""

    class Module:
        def measurements(self, case, settings):
            run = lambda: timing.in_turns({"": lambda: None}, lambda x: None, 3, 0.001)[""].fields()  # noqa: E731
            yield "half", run

    processes = inline(monkeypatch, torch=module([], quick=timings(2.0, 6.0, 8.0)), ours=Module())
    quick, half = rows.run_case(processes, case(), SETTINGS, {})
    assert "timings_ms" in quick and "timings_ms" not in half
    assert half["best_rival"] == "quick" and "ratio_to_best_rival_p10" not in half


def test_an_implementation_that_asks_python_to_end_gives_a_row():
    def ends():
        raise SystemExit("no device")

    runner = turns.Runner("library", ends)
    asks = threading.Thread(target=runner.advance, daemon=True)
    asks.start()
    asks.join(20)
    assert not asks.is_alive() and isinstance(runner.problem, SystemExit)


def test_what_a_failed_implementation_held_is_free_for_the_next():
    held = []

    def wrong():
        operands = np.zeros(8).view(type("Held", (np.ndarray,), {}))
        held.append(weakref.ref(operands))
        raise WrongResult("off by one")

    made = child.Turns([("wrong", wrong), ("next", lambda: {"free": held[0]() is None})], lambda message: None)
    assert list(made.begin())[1]["free"]


def test_what_spoils_the_process_before_the_first_timing_does_not_reach_the_next():
    spoiled, sent = [], []

    class Module:
        def measurements(self, case, settings):
            yield "bad", lambda: spoiled.append(1) or {}["illegal address"]
            yield "good", lambda: {"spoiled": bool(spoiled)}

    assert not child.serve_in_turn(Module(), case(), SETTINGS, [], sent.append, lambda: None)
    assert [message["row"]["implementation"] for message in sent if "row" in message] == ["bad"]
    spoiled.clear()  # the fresh process that the parent starts
    assert child.serve_in_turn(Module(), case(), SETTINGS, ["bad"], sent.append, lambda: None)
    assert sent[-2:] == [{"row": {"implementation": "good", "spoiled": False}}, {"at_turn": []}]


def test_a_case_that_is_cut_off_leaves_no_thread(monkeypatch):
    before = threading.active_count()
    processes = inline(monkeypatch, ours=module([], a=timings(1.0, 1.0, 1.0), b=timings(1.0, 1.0, 1.0)))
    assert processes["ours"].begin(case(), SETTINGS)[0] == ["a", "b"]
    assert threading.active_count() == before + 2
    processes["ours"].close()
    assert threading.active_count() == before


def scripted(body):
    """A worker whose child runs `body` for each line that it gets."""
    process = worker.Worker("GROUPED", "ours", 20.0)
    start = """
        import json, os, sys
        def send(**message): print(json.dumps(message), flush=True)
        send(ready=True)
        for line in sys.stdin:
            request = json.loads(line)
            name, done = request.get("turn"), request.get("done")
    """
    process.command = [
        sys.executable,
        "-S",
        "-c",
        textwrap.dedent(start) + textwrap.indent(textwrap.dedent(body), "    "),
    ]
    return process


def test_a_crash_at_a_timing_costs_what_the_process_had_and_the_next_case_gets_a_new_one():
    process = scripted("""
        if name is None:
            send(start="a"), send(start="b"), send(at_turn=["a", "b"])
        else:
            print("illegal address", file=sys.stderr, flush=True)
            os._exit(7)
    """)
    try:
        made = [row for _, row in turns.measure({"ours": process}, case(), SETTINGS)]
        assert [row["implementation"] for row in made] == ["a", "b"]
        assert "status 7" in made[0]["error"] and "illegal address" in made[0]["error"]
        assert "another implementation" in made[1]["error"]
        assert process.begin(case(), SETTINGS) == (["a", "b"], [])
    finally:
        process.close()


def test_a_crash_before_the_first_timing_costs_one_row():
    process = scripted("""
        if name is not None:
            send(row={"implementation": name, "median_ms": 1.0})
            continue
        send(start="a")
        if "a" not in done:
            os._exit(7)
        send(at_turn=["b"])
    """)
    try:
        made = {row["implementation"]: row for _, row in turns.measure({"ours": process}, case(), SETTINGS)}
    finally:
        process.close()
    assert "status 7" in made["a"]["error"] and made["b"]["median_ms"] == 1.0


def test_processes_of_their_own_take_turns():
    todo = [case(), case(0.5)]
    settings = dataclasses.replace(SETTINGS, implementations=("cpu_tiled", "padded"))
    team = worker.Team([worker.Worker("GROUPED", "ours", 100) for _ in range(2)], todo, settings)
    rival = worker.Worker("GROUPED", "lax", 100)
    try:
        team.start()
        rival.start()
        for one in todo:
            made = list(rows.run_case({"lax": rival, "ours": team}, one, settings, {}))
            assert [row["implementation"] for row in made] == ["jax_ragged_dot", "cpu_tiled", "padded"]
            assert all(len(row["timings_ms"]) == 3 and row["relative_error"] < 1e-5 for row in made)
            for row in made[1:]:
                pairs = np.asarray(made[0]["timings_ms"]) / np.asarray(row["timings_ms"])
                assert row["best_rival"] == "jax_ragged_dot" and row["ratio_to_best_rival"] == pytest.approx(
                    np.median(pairs)
                )
    finally:
        team.close()
        rival.close()


def test_the_flag_of_the_command(tmp_path, monkeypatch, capsys):
    output = tmp_path / "rows.jsonl"
    quick = ["--repeats", "2", "--target-ms", "0.1", "--implementation", "cpu_tiled", "--output", str(output)]
    flags = ["--operation", "forward", "--shape", "tiny", "--families", "lax", "ours", "--in-turn"]
    assert bench.main([*flags, *quick]) == 0
    made = rows.read(output)
    assert [row["implementation"] for row in made] == ["jax_ragged_dot", "cpu_tiled"] * 2
    assert all("ratio_to_best_rival_p90" in row for row in made[1::2])
    assert jax_run.on_gpu() or "0 rows with an error" in capsys.readouterr().out
