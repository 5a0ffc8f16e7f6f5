"""The benchmarks: what they count, that wrong results get no time, and that no rival can stop a run."""

import dataclasses
import functools
import json
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas
from kernels_pallas.gather_rows import bench as gather_bench
from kernels_pallas.grouped_matmul import bench, ffn_bench, groups, major_bench, specs
from kernels_pallas.moe_ffn import bench as layer_bench
from kernels_pallas.moe_ffn import specs as layer_specs
from kernels_pallas.rivals import case as cases
from kernels_pallas.rivals import child, command, dense, families, jax_run, layer, ours, rows, timing, worker
from kernels_pallas.rivals.case import Case, LayerCase, Settings

QUICK = Settings(repeats=2, target_ms=0.1)
SIZES = (40, 0, 8, 80)
ROWS = Path(kernels_pallas.__file__).parent / "grouped_matmul" / "measured" / "cpu.jsonl"
gpu = pytest.mark.gpu


def grouped(operation="forward", projection="up", sizes=SIZES, **changes):
    case = Case(operation, projection, "here", len(sizes), 24, 16, sum(sizes), 5.0, "float32", tuple(sizes))
    return dataclasses.replace(case, **changes)


LAYER = LayerCase("forward+backward", "experts", "here", 96, 24, 16, 4, 2, 5.0, "float32")


# --- what is counted --------------------------------------------------------------------------------------------------


def test_a_case_counts_valid_work_and_bytes_that_must_move():
    case = grouped(d_model=300, d_expert=400)
    assert (case.k, case.n, grouped(projection="down").k) == (300, 400, 16)
    assert case.flops == 2 * 128 * 300 * 400
    assert case.bytes == 4 * (3 * 300 * 400 + 128 * (300 + 400))  # the empty expert's weights need not move
    assert case.tile_share == 128 / (128 + 0 + 128 + 128)
    major = dataclasses.replace(case, operation="major")
    assert major.extent == 256 and cases.EXTENT_BLOCK == groups.EXTENT_BLOCK  # half of 400, up to the next multiple
    assert [dataclasses.replace(major, d_expert=f).extent for f in (24, 1024, 1408)] == [24, 512, 704]
    assert major.flops == 2 * 128 * 300 * 256
    assert case.fields()["empty_groups"] == 1 and case.fields()["largest_group"] == 80


def test_a_layer_counts_three_matmuls_and_draws_different_experts():
    assert LAYER.flops == 3 * dataclasses.replace(LAYER, passes="forward").flops == 3 * 2 * 3 * 192 * 24 * 16
    even = LayerCase("forward", "experts", "here", 4096, 8, 8, 64, 8, float("inf"), "float32")
    skewed = dataclasses.replace(even, alpha=0.3)
    for case in (even, skewed):
        expert, weight = case.routing()
        assert all(len(set(row)) == 8 for row in expert.tolist()) and expert.max() < 64
        np.testing.assert_allclose(weight.sum(axis=1), 1, rtol=1e-5)
    loads = [np.bincount(case.routing()[0].ravel(), minlength=64).max() for case in (even, skewed)]
    assert loads[0] < 1.3 * 512 < 3 * 512 < loads[1]
    assert dataclasses.replace(even, scope="layer").fields()["alpha"] is None


def test_samples_hold_the_largest_and_smallest_group_and_their_edges():
    groups, picked = cases.sampled_rows(grouped())
    assert {2, 3} <= set(groups.tolist()) and 1 not in groups
    for group, row in zip(groups, picked, strict=True):
        start = sum(SIZES[:group])
        assert {start, start + SIZES[group] - 1} <= set(row.tolist())
        assert row.min() >= start and row.max() < start + SIZES[group]
    assert cases.sampled_experts(grouped()).tolist() == [0, 2, 3]


def test_decode_shapes_are_for_decode_and_others_are_not():
    made = list(
        bench.grouped_cases(["forward", "decode"], ["olmoe", "olmoe_decode"], ["up"], [5.0, 0.5], [], "bfloat16")
    )
    assert {(c.operation, c.name) for c in made} == {("forward", "olmoe"), ("decode", "olmoe_decode")}
    assert sorted({c.rows for c in made if c.operation == "decode"}) == sorted(bench.DECODE_ROWS)
    assert all(sum(c.group_sizes) == c.rows for c in made)
    shares = [max(c.group_sizes) for c in made if c.name == "olmoe"]
    assert shares[0] < shares[1]  # 0.5 is the harsher skew


def test_layer_shapes_are_those_of_the_published_table():
    main = layer_specs.SHAPES["qwen3_30b"]
    assert (main.tokens, main.d_model, main.d_expert, main.experts, main.top_k) == (32768, 2048, 768, 128, 8)
    table = [shape for shape in layer_specs.SHAPES.values() if shape.kind == "sonic"]
    assert len(table) == 11 and all(shape.sonicmoe for shape in table)
    assert set(layer_specs.DEFAULT) <= set(layer_specs.SHAPES)
    args = layer_bench.parse(["--shape", "sonic", "olmoe"])
    assert args.shape == [shape.name for shape in table] + ["olmoe"]


# --- timing -----------------------------------------------------------------------------------------------------------


def test_timing_repeats_calls_until_one_timing_is_long_enough():
    asked = []

    def batch(k):
        asked.append(k)
        return 1e-3 * k

    found = timing.repeat(batch, repeats=20, target_ms=15)
    assert found.calls == 15 and asked[-20:] == [15] * 20 and len(asked) > 20  # and warm-ups before
    fields = timing.repeat(batch, 20, 15, per_call=5).fields()
    assert fields["median_ms"] == pytest.approx(0.2) and fields["repeats"] == 20 and fields["calls_per_timing"] == 75


def test_timing_tells_median_and_spread():
    fields = timing.Timings(tuple(1e-3 * n for n in range(1, 12)), 1).fields()
    assert [fields[f"{name}_ms"] for name in ("median", "min", "max", "p10", "p90")] == pytest.approx([6, 1, 11, 2, 10])


def test_copies_cover_the_distance_between_two_uses():
    assert timing.copies(100, 450) == 5
    assert timing.copies(10**9, 450) == 1
    assert timing.copies(1, 450) == 8


# --- wrong results get no time ----------------------------------------------------------------------------------------


def product(case):
    return ours.product(case, "cpu_tiled", "EKN")


@pytest.mark.parametrize(
    ("operation", "projection"),
    [
        *((operation, "up") for operation in ("forward", "dlhs", "drhs", "decode", "major")),
        ("major", "down"),  # the other extent; the rest differ by two sizes only
        *(pytest.param(of, "down", marks=pytest.mark.slow) for of in ("forward", "dlhs", "drhs", "decode")),
    ],
)
def test_a_right_result_passes_the_check(operation, projection):
    case = grouped(operation, projection, d_expert=384)
    (operands,) = jax_run.operands(case)
    out = jax.jit(product(case))(*operands)
    assert jax_run.check(case, out, operands) < 1e-6
    assert jax_run.finite(case, out)
    if operation == "major" and projection == "down":
        assert bool(jnp.isnan(operands[0][:, case.extent :]).all())  # what is ignored is poisoned
    # XLA makes a constant array anew in each call, by a kernel that would be timed too.
    assert not jax.make_jaxpr(product(case))(*operands).consts


def last_row_of_a_group(out):
    return out.at[sum(SIZES[:3]) - 1].set(out[0])


def shifted(out):
    return jnp.roll(out, 1, axis=-1)


def one_nan(out):
    return out.at[0].set(jnp.nan)


@pytest.mark.parametrize("damage", [last_row_of_a_group, shifted, one_nan, jnp.zeros_like, lambda out: 1.01 * out])
def test_a_wrong_product_is_caught(damage):
    case = grouped()
    (operands,) = jax_run.operands(case)
    out = jax.jit(product(case))(*operands)
    with pytest.raises(jax_run.WrongResult, match="relative error"):
        jax_run.check(case, damage(out), operands)


def test_a_program_of_several_rounds_calls_again_and_keeps_the_last_results():
    sets = [(jnp.full((2, 3), float(i)), jnp.ones((3, 4))) for i in range(2)]
    calls = []

    def product(a, b):
        jax.debug.callback(lambda: calls.append(1))
        return a @ b

    for rounds in (1, 3):
        calls.clear()
        outs = jax.block_until_ready(jax.jit(jax_run.over_sets(product, rounds))(*sets))
        jax.effects_barrier()
        assert len(calls) == 2 * rounds
        assert [float(out[0, 0]) for out in outs] == [0, 3]
    # and without anything that must happen in each round: XLA does not take the products out of the loop
    text = jax.jit(jax_run.over_sets(lambda a, b: a @ b, 3)).lower(*sets).compile().as_text()
    inside, entry = text.split("ENTRY")
    assert " while(" in text
    assert " dot(" not in entry
    assert inside.count(" dot(") == 2


def test_a_wrong_weight_gradient_is_caught_also_for_an_expert_without_rows():
    case = grouped("drhs")
    (operands,) = jax_run.operands(case)
    out = jax.jit(product(case))(*operands)
    for expert in (0, 2, 3):
        with pytest.raises(jax_run.WrongResult, match="relative error"):
            jax_run.check(case, out.at[expert].multiply(1.01), operands)
    with pytest.raises(jax_run.WrongResult, match="1 experts without rows are not zero"):
        jax_run.check(case, out.at[1, 0, 0].set(jnp.nan), operands)


def test_a_row_that_is_not_finite_gets_no_time_though_no_sample_has_it():
    case = grouped(sizes=(900, 0, 8, 3000))
    unseen = next(row for row in range(case.rows) if row not in cases.sampled_rows(case)[1])

    def forgetful(a, b, sizes):
        return product(case)(a, b, sizes).at[unseen].set(jnp.nan)

    with pytest.raises(jax_run.WrongResult, match="not finite after the timings"):
        jax_run.time_product(case, QUICK, forgetful)


def layer_result(case=LAYER):
    given = layer.operands(case)
    return given, jax.jit(layer.functions(case, "cpu_tiled")[0])(given)


@pytest.mark.parametrize("scope", ["experts", "layer"])
def test_a_right_layer_passes_the_check(scope):
    case = dataclasses.replace(LAYER, scope=scope)
    assert layer.check(case, *layer_result(case)) < 1e-5


@pytest.mark.parametrize("what", ["y", "x", "weight", "gate", "up", "down"])
def test_a_wrong_layer_is_caught(what):
    given, got = layer_result()
    if what == "y":
        got = got | {"y": 1.01 * got["y"]}
    else:
        got = got | {"gradients": got["gradients"] | {what: jnp.roll(got["gradients"][what], 1, axis=-1)}}
    with pytest.raises(jax_run.WrongResult, match=f"relative error of d?{what}"):
        layer.check(LAYER, given, got)


def test_what_a_layer_saves_is_counted_without_the_weights():
    (row,) = worker.Inline("LAYER", "ours").rows(LAYER, dataclasses.replace(QUICK, implementations=("cpu_tiled",)))
    pairs, big = LAYER.rows, [what for what in row["saved"] if what.startswith("float32") and "2]" not in what]
    assert sorted(big) == sorted(["float32[96, 24]", f"float32[{pairs}, 16]", f"float32[{pairs}, 16]"])
    assert row["saved_bytes"] < 4 * (96 * 24 + 2 * pairs * 16 + 6 * pairs)
    weights = 4 * 3 * 4 * 24 * 16
    assert row["peak_bytes"] > 2 * weights  # them and their gradients


# --- rows -------------------------------------------------------------------------------------------------------------


def fake(measured):
    """A family that measures nothing."""

    class Fake:
        def rows(self, case, settings):
            yield from (dict(row) for row in measured)

    return Fake()


def test_rows_hold_share_of_the_ceiling_and_ratio_to_the_best_rival():
    case = grouped(sizes=(64, 64))
    processes = {
        "dense": fake([{"implementation": "dense_mosaic", "median_ms": 1.0, "tflops_per_s": 1e-9 * case.flops}]),
        "torch": fake(
            [
                {"implementation": "slow", "median_ms": 8.0},
                {"implementation": "quick", "median_ms": 4.0},
                {"implementation": "broken", "error": "RuntimeError: no"},
            ]
        ),
        "ours": fake([{"implementation": "mine", "median_ms": 2.0}, {"implementation": "shy", "refused": "no"}]),
    }
    made = {row["implementation"]: row for row in rows.run_case(processes, case, QUICK, {"commit": "abc"})}
    assert list(made) == ["dense_mosaic", "slow", "quick", "broken", "mine"]  # who refuses unasked is no row
    mine = made["mine"]
    assert mine["tflops_per_s"] == pytest.approx(case.flops / 2e-3 / 1e12)
    assert mine["ceiling_value"] == pytest.approx(1e-9 * case.flops * 0.5)  # groups of 64 rows fill half a tile
    assert mine["share_of_ceiling"] == pytest.approx(1.0)
    assert (mine["best_rival"], mine["ratio_to_best_rival"]) == ("quick", pytest.approx(2.0))
    assert made["broken"]["error"] and "median_ms" not in made["broken"] and "tflops_per_s" not in made["broken"]
    assert all(row["commit"] == "abc" and row["name"] == "here" for row in made.values())
    named = dataclasses.replace(QUICK, implementations=("shy",))
    assert next(r for r in rows.run_case(processes, case, named, {}) if "refused" in r)["implementation"] == "shy"


def test_decode_is_held_against_the_copy_bandwidth():
    case = grouped("decode")
    processes = {
        "dense": fake([{"implementation": "copy", "median_ms": 1.0, "gb_per_s": 3000.0}]),
        "ours": fake([{"implementation": "mine", "median_ms": 1e-3}]),
    }
    copy, mine = rows.run_case(processes, case, QUICK, {})
    assert copy["role"] == "ceiling" and "tflops_per_s" not in copy
    assert mine["gb_per_s"] == pytest.approx(case.bytes / 1e-6 / 1e9)
    assert mine["share_of_ceiling"] == pytest.approx(mine["gb_per_s"] / 3000)


def test_a_layer_is_held_against_two_dense_matmuls():
    dense = [{"implementation": f"dense_mosaic/{name}", "median_ms": ms} for name, ms in (("up", 2.0), ("down", 1.0))]
    for passes, times in (("forward", 1), ("forward+backward", 3)):
        case = dataclasses.replace(LAYER, passes=passes)
        processes = {"dense": fake(dense), "ours": fake([{"implementation": "mine", "median_ms": 6.0 * times}])}
        mine = list(rows.run_case(processes, case, QUICK, {}))[-1]
        assert mine["share_of_ceiling"] == pytest.approx(0.5)


def test_a_configuration_found_once_is_found_again():
    case = grouped()
    row = case.fields() | {"implementation": "rival", "config": "fast", "device": "H100"}
    dense = {"implementation": "dense_mosaic", "config": "wide", "device": "H100", "dense_shape": "1 2 3 bfloat16"}
    broken = row | {"implementation": "other", "error": "no"}
    known = rows.known_configurations([row, dense, broken, row | {"device": "H200", "config": "slow"}], "H100")
    assert known == {cases.key("rival", case): "fast", "dense_mosaic 1 2 3 bfloat16": "wide"}
    timed = [row | {"config": config, "median_ms": ms} for config, ms in (("a", 2.0), ("b", 1.0), ("c", 3.0))]
    assert rows.known_configurations(timed, "H100") == {cases.key("rival", case): "b"}  # the fastest, not the last


def test_a_known_configuration_saves_the_sweep_and_a_wrong_one_loses_it():
    case, tried = grouped(), []

    def candidate(name, damage, a, b, sizes):
        tried.append(name)
        return damage(product(case)(a, b, sizes))

    def right(out):
        return out

    found = {name: functools.partial(candidate, name, how) for name, how in (("good", right), ("bad", shifted))}
    known = dataclasses.replace(QUICK, known={cases.key("rival", case): "good"})
    row = jax_run.time_best(case, known, "rival", found)
    assert row["config"] == "good" and set(tried) == {"good"}
    row = jax_run.time_best(case, QUICK, "rival", found)
    assert (row["config"], row["configs_tried"], row["configs_failed"]) == ("good", 2, 1) and "bad" in tried
    with pytest.raises(RuntimeError, match=r"none of 1 configurations ran \(bad: WrongResult"):
        jax_run.time_best(case, QUICK, "rival", {"bad": found["bad"]})


def counting(monkeypatch):
    """How often a program is compiled, and the prepared ones put away for the test."""
    made = []
    compiled = jax_run.compiled
    monkeypatch.setattr(jax_run, "_PREPARED", {})
    monkeypatch.setattr(jax_run, "compiled", lambda *args: made.append(args) or compiled(*args))
    return made


@pytest.mark.parametrize(("operation", "layout"), [("forward", "EKN"), ("drhs", "ENK"), ("major", "ENK")])
def test_what_was_prepared_is_what_is_measured(monkeypatch, operation, layout):
    made = counting(monkeypatch)
    settings = dataclasses.replace(QUICK, implementations=("cpu_tiled",), layouts=(layout,))
    other = grouped(operation, sizes=(0, 120, 8, 0), d_expert=384, alpha=0.5)  # group sizes are no part of a program
    ours.prepare(other, settings)
    programs = 2 if operation == "major" else 1  # and the same without extents
    assert len(made) == programs
    (row,) = worker.Inline("GROUPED", "ours").rows(grouped(operation, d_expert=384), settings)
    assert row["median_ms"] > 0 and len(made) == programs and not jax_run._PREPARED
    list(worker.Inline("GROUPED", "ours").rows(grouped(operation, d_expert=384), settings))
    assert len(made) == 2 * programs  # a prepared program is used once


def test_a_prepared_layer_is_what_is_measured(monkeypatch):
    made = counting(monkeypatch)
    settings = dataclasses.replace(QUICK, implementations=("cpu_tiled",))
    # Not through its cache, which would keep the tracers.
    assert jax.eval_shape(lambda: layer.operands.__wrapped__(LAYER)) == layer.abstract(LAYER)
    layer.prepare(LAYER, settings)
    (row,) = worker.Inline("LAYER", "ours").rows(LAYER, settings)
    assert row["median_ms"] > 0 and len(made) == 1


@pytest.mark.parametrize("known", [{}, {cases.key("rival", grouped()): "good"}])
def test_candidates_of_a_sweep_are_prepared_or_the_known_one_alone(monkeypatch, known):
    made = counting(monkeypatch)
    case, found = grouped(), {"good": product(grouped()), "same": product(grouped())}
    settings = dataclasses.replace(QUICK, known=known)
    jax_run.prepare_tuned(case, settings, "rival", found)
    assert len(made) == (1 if known else 2)
    row = jax_run.time_best(case, settings, "rival", found)
    assert len(made) == (1 if known else 3) and row["configs_tried"] == (1 if known else 2)


def test_ceilings_of_one_shape_are_measured_once_for_all_skews(monkeypatch):
    made = counting(monkeypatch)
    monkeypatch.setattr(dense, "_MEASURED", {})
    settings = dataclasses.replace(QUICK, ceilings=("dense_cublas", "batched_cublas"))
    run = [list(worker.Inline("GROUPED", "dense").rows(grouped(alpha=alpha), settings)) for alpha in (5.0, 0.5)]
    assert [row["implementation"] for row in run[0]] == ["dense_cublas", "batched_cublas"]
    assert run[0] == run[1] and len(made) == 2


def test_configurations_of_other_files_are_known(tmp_path):
    case = grouped()
    device = jax.devices()[0].device_kind
    old, new = tmp_path / "old.jsonl", tmp_path / "new.jsonl"
    rows.append(old, case.fields() | {"implementation": "rival", "config": "slow", "device": device})
    rows.append(new, case.fields() | {"implementation": "rival", "config": "fast", "device": device})
    for flags, config in ((["--known", str(old)], "slow"), (["--known", str(old), "--output", str(new)], "fast")):
        found = command.settings(bench.parse(flags), ["EKN", "ENK"])
        assert found.known == {cases.key("rival", case): config} and found.layouts == ("EKN", "ENK")


def test_the_table_prints_every_kind_of_row():
    committed = rows.read(ROWS)
    assert len(committed) == 12
    text = rows.table([*committed, grouped().fields() | {"implementation": "rival", "error": "x" * 500}])
    assert len(text.splitlines()) == 14 and max(map(len, text.splitlines())) < 170
    assert "cpu_tiled" in text and "x..." in text


# --- no rival can stop a run ------------------------------------------------------------------------------------------


def test_rivals_that_are_not_installed_are_rows():
    if any(map(sys.modules.get, ("torch", "tokamax"))):
        pytest.fail("this process has imported a rival")
    for kind, family, case in (
        ("GROUPED", "torch", grouped()),
        ("GROUPED", "tokamax", grouped()),
        ("LAYER", "transformers", LAYER),
        ("LAYER", "liger", LAYER),
    ):
        made = list(worker.Inline(kind, family).rows(case, QUICK))
        assert made and all("median_ms" not in row for row in made)
        assert all("not installed" in r["error"] or "No module" in r["error"] or "GPU" in r["error"] for r in made)


def scripted(body, seconds=20.0):
    """A worker whose child runs `body` once it has got a request; `done` is what the parent says is done."""
    process = worker.Worker("GROUPED", "ours", seconds)
    start = """
        import json, os, sys, time
        def send(**message): print(json.dumps(message), flush=True)
        send(ready=True)
        for line in sys.stdin:
            done = json.loads(line)["done"]
    """
    script = textwrap.dedent(start) + textwrap.indent(textwrap.dedent(body), "    ")
    process.command = [sys.executable, "-S", "-c", script]
    return process


def answers(process, case=None):
    try:
        return list(process.rows(case or grouped(), QUICK))
    finally:
        process.close()


def test_a_crash_costs_one_row_and_the_rest_is_run_by_a_new_process():
    made = answers(
        scripted("""
        for name in ("first", "second", "third"):
            if name not in done:
                send(start=name)
                if name == "second":
                    print("illegal address", file=sys.stderr, flush=True)
                    os._exit(7)
                send(row={"implementation": name, "median_ms": 1.0, "process": os.getpid()})
        send(end=True)
        """)
    )
    assert [row["implementation"] for row in made] == ["first", "second", "third"]
    assert "status 7" in made[1]["error"] and "illegal address" in made[1]["error"]
    assert made[0]["process"] != made[2]["process"]


def test_a_hang_costs_one_row():
    begun = time.monotonic()
    made = answers(
        scripted(
            """
            if "stuck" not in done:
                send(start="stuck")
                time.sleep(60)
            send(row={"implementation": "next"})
            send(end=True)
            """,
            seconds=0.5,
        )
    )
    assert [row["implementation"] for row in made] == ["stuck", "next"] and "no result in" in made[0]["error"]
    assert time.monotonic() - begun < 30


def test_a_family_that_never_answers_is_one_row():
    made = answers(scripted("os._exit(3)"))
    assert [row["implementation"] for row in made] == ["ours"] and "status 3" in made[0]["error"]


def test_a_family_that_is_not_installed_is_one_row_and_its_process_stays():
    process = worker.Worker("GROUPED", "tokamax", 100)
    try:
        made = [row for _ in range(2) for row in process.rows(grouped(), QUICK)]
        assert process.process is not None and process.process.poll() is None
    finally:
        process.close()
    assert [row["implementation"] for row in made] == ["tokamax"] * 2
    assert all("No module named 'tokamax'" in row["error"] for row in made)


def test_families_have_loaded_before_anything_is_timed():
    ready = scripted("""
        send(row={"implementation": "one"})
        send(end=True)
    """)
    failing, ending = scripted(""), scripted("")
    said = json.dumps({"failed": "no device"})
    failing.command = [sys.executable, "-S", "-c", f"print({said!r}, flush=True); input()"]
    ending.command = [sys.executable, "-S", "-c", "raise SystemExit(5)"]
    for process, greeted, row in (
        (ready, True, {"implementation": "one"}),
        (failing, False, {"implementation": "ours", "error": "no device"}),
    ):
        process.start()
        process.greet()
        assert process.greeted is greeted
        process.greet()  # once more: what the child said is still there
        assert answers(process) == [row]
    ending.start()
    ending.greet()
    (lost,) = answers(ending)
    assert "ended with status 5" in lost["error"]


def test_rows_of_a_run_name_its_command_but_no_folder(monkeypatch):
    given = ["/some/where/bench.py", "--known", "/other/place/h100.jsonl", "--output=/x/rows.jsonl", "--alpha", "5"]
    monkeypatch.setattr(sys, "argv", given)
    facts = rows.run_facts()
    assert facts["command"].endswith("--known h100.jsonl --output=rows.jsonl --alpha 5")
    assert "/" not in facts["command"] and facts["run"].endswith("+00:00")


def test_unsteady_timings_are_marked():
    row = {"implementation": "one", "median_ms": 1.0, "tflops_per_s": 1.0, "p10_ms": 1.0, "p90_ms": 1.19}
    assert "unsteady" not in rows.line(row)
    assert "unsteady: p90/p10 1.21" in rows.line(row | {"p90_ms": 1.21})


def test_a_process_that_ended_after_a_case_is_replaced_at_the_next():
    process = scripted("""
        send(start="one")
        send(row={"implementation": "one", "process": os.getpid()})
        send(end=True)
        os._exit(0)
    """)
    try:
        made = [row for _ in range(3) for row in process.rows(grouped(), QUICK)]
    finally:
        process.close()
    assert [row["implementation"] for row in made] == ["one"] * 3 and "error" not in str(made)
    assert len({row["process"] for row in made}) == 3


class Module:
    """A family in memory: one implementation that fails as told, and one after it."""

    def __init__(self, problem):
        self.problem = problem

    def measurements(self, case, settings):
        def fail():
            raise self.problem

        yield "failing", fail
        yield "next", lambda: {"median_ms": 1.0}


@pytest.mark.parametrize(("problem", "clean"), [(ValueError("no"), True), (MemoryError("out of memory"), False)])
def test_after_an_error_that_may_have_spoiled_it_a_process_ends(problem, clean):
    sent = []
    assert child.serve(Module(problem), grouped(), QUICK, [], sent.append) is clean
    assert sent[1]["row"]["error"] == f"{type(problem).__name__}: {problem}"
    assert ("end" in sent[-1]) is clean
    sent.clear()
    assert child.serve(Module(problem), grouped(), QUICK, ["failing"], sent.append)
    assert [message.get("start") for message in sent] == ["next", None, None]


def test_a_request_survives_json():
    for case in (grouped(), LAYER):
        settings = Settings(implementations=("a",), known={"x": "y"})
        request = {"case": dataclasses.asdict(case), "settings": dataclasses.asdict(settings), "done": ["b"]}
        assert child.decode_request(json.loads(json.dumps(request))) == (case, settings, ["b"])


def test_processes_of_a_team_take_cases_in_turn_and_prepare_their_next():
    body = """
        request = json.loads(line)
        kept = globals().setdefault("kept", [])
        if request.get("prepare"):
            kept.append(request["case"]["name"])
        else:
            send(row={"implementation": "one", "process": os.getpid(), "prepared": kept})
            send(end=True)
    """
    todo = [grouped(name=name) for name in "abcde"]
    team = worker.Team([scripted(body) for _ in range(2)], todo, QUICK)
    try:
        team.start()
        made = [row for case in todo for row in team.rows(case, QUICK)]
    finally:
        team.close()
    assert [row["prepared"] for row in made] == [["a"], ["b"], ["a", "c"], ["b", "d"], ["a", "c", "e"]]
    assert len({row["process"] for row in made}) == 2


def test_a_family_that_cannot_prepare_is_not_stopped_by_it():
    class Failing(Module):
        def prepare(self, case, settings):
            raise self.problem

    for family in (Module(None), Failing(MemoryError("no"))):
        child.prepare(family, grouped(), QUICK)


def test_a_family_runs_in_a_process_of_its_own():
    settings = dataclasses.replace(QUICK, implementations=("cpu_tiled",))
    todo = [grouped(), grouped("drhs"), grouped(projection="down")]
    process = worker.Team([worker.Worker("GROUPED", "ours", 100) for _ in range(2)], todo, settings)
    try:
        process.start()
        made = [row for case in todo for row in process.rows(case, settings)]
    finally:
        process.close()
    assert [row["implementation"] for row in made] == ["cpu_tiled"] * 3
    assert all(row["median_ms"] > 0 and row["relative_error"] < 1e-5 for row in made)


def test_paths_of_rivals_go_to_their_own_process_only(monkeypatch):
    monkeypatch.setenv("MOEJAX_TOKAMAX", "/new")
    monkeypatch.setenv("MOEJAX_TOKAMAX_TRITON", "/old:/new")
    paths = {name: worker.Worker("GROUPED", name, 1).environment()["PYTHONPATH"] for name in families.GROUPED}
    assert paths["tokamax"].startswith("/new:") and paths["tokamax-triton"].startswith("/old:/new:")
    assert "/new" not in paths["ours"] and "/new" not in paths["torch"]
    assert worker.Worker("GROUPED", "torch", 1).environment()["JAX_PLATFORMS"] == "cpu"


# --- the commands -----------------------------------------------------------------------------------------------------


def test_the_benchmark_of_grouped_matmuls_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MOEJAX_COMMIT", "c0ffee")
    output = tmp_path / "rows.jsonl"
    quick = ["--repeats", "2", "--target-ms", "0.1", "--implementation", "cpu_tiled", "--output", str(output)]
    assert bench.main(["--operation", "major", "--shape", "tiny", "--projection", "down", *quick]) == 0
    assert bench.main(["--operation", "drhs", "--shape", "tiny", "--projection", "up", "--layout", "ENK", *quick]) == 0
    major, drhs = rows.read(output)
    assert major["operation"] == "major" and major["ratio_to_full"] > 0 and major["commit"] == "c0ffee"
    assert (drhs["implementation"], drhs["layout"], drhs["role"]) == ("cpu_tiled/ENK", "ENK", "ours")
    shape = specs.SHAPES["tiny"]
    assert (drhs["rows"], drhs["experts"], drhs["repeats"], drhs["dtype"]) == (shape.rows, shape.experts, 2, "float32")
    capsys.readouterr()
    assert bench.main(["--summary", str(output)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_an_error_of_ours_is_the_status_of_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(ours, "measurements", Module(RuntimeError("broken")).measurements)
    output = tmp_path / "rows.jsonl"
    assert bench.main(["--operation", "forward", "--shape", "tiny", "--projection", "up", "--output", str(output)]) == 1
    assert rows.read(output)[0]["error"] == "RuntimeError: broken"


def test_a_row_follows_a_line_that_an_ended_run_left_unfinished(tmp_path):
    output = tmp_path / "rows.jsonl"
    rows.append(output, {"first": 1})
    output.write_text(output.read_text() + '{"cut')
    rows.append(output, {"second": "é"})
    rows.append(output, {"third": 3})
    lines = output.read_text().splitlines()
    assert [lines[1], *map(json.loads, lines[:1] + lines[2:])] == ['{"cut', {"first": 1}, {"second": "é"}, {"third": 3}]


@pytest.mark.parametrize("main", [bench.main, layer_bench.main, gather_bench.main])
def test_a_folder_that_is_not_there_is_told_before_anything_is_measured(tmp_path, monkeypatch, main):
    def measure(*args, **options):
        raise AssertionError("measured")

    monkeypatch.setattr(ffn_bench, "measure", measure)
    monkeypatch.setattr(gather_bench, "measure", measure)
    with pytest.raises(SystemExit, match="there is no such folder"):
        main(["--output", str(tmp_path / "none" / "rows.jsonl")])


@pytest.mark.parametrize("alpha", ["nan", "0", "-1", "inf"])
@pytest.mark.parametrize("parse", [bench.parse, layer_bench.parse])
def test_a_concentration_that_is_none_is_an_error_of_the_flag(parse, alpha, capsys):
    with pytest.raises(SystemExit):
        parse([f"--alpha={alpha}"])
    assert "--alpha: must be finite and above 0" in capsys.readouterr().err


def test_fewer_rows_than_one_are_an_error_of_the_flag(capsys):
    with pytest.raises(SystemExit):
        bench.parse(["--rows=-5"])
    assert "--rows: must be at least 1" in capsys.readouterr().err


def test_no_case_starts_after_its_minutes(tmp_path, capsys):
    output = tmp_path / "rows.jsonl"
    args = ["--operation", "forward", "--shape", "tiny", "--minutes", "0", "--output", str(output)]
    assert bench.main(args) == 0 and not output.exists()
    assert "stopped before tiny forward" in capsys.readouterr().out


def test_the_benchmark_of_layers_runs(tmp_path):
    output = tmp_path / "rows.jsonl"
    shape = ["--shape", "tiny", "--scope", "layer", "--implementation", "cpu_tiled", "--pass", "forward"]
    assert layer_bench.main([*shape, "--repeats", "2", "--target-ms", "0.1", "--output", str(output)]) == 0
    (row,) = rows.read(output)
    assert (row["operation"], row["pass"], row["scope"], row["alpha"]) == ("layer", "forward", "layer", None)
    assert row["median_ms"] > 0 and "saved_bytes" not in row


def test_the_benchmark_of_the_ffn_runs_as_before(tmp_path, capsys):
    output = tmp_path / "rows.jsonl"
    args = ["--operation", "ffn", "--shape", "odd", "--repeats", "2", "--implementation", "cpu_tiled"]
    assert bench.main([*args, "--output", str(output)]) == 0
    made, committed = rows.read(output), rows.read(ROWS)
    assert len(made) == 4 and set(committed[0]) <= set(made[0])
    assert "x bound" in capsys.readouterr().out


def test_the_ffn_of_major_groups_is_timed_beside_the_whole_one(tmp_path, monkeypatch, capsys):
    output = tmp_path / "rows.jsonl"
    args = ["--operation", "major_ffn", "--shape", "blocks", "--repeats", "2", "--target-ms", "0.1"]
    args += ["--implementation", "cpu_tiled", "lax", "--output", str(output)]
    assert bench.main(args) == 0
    made = rows.read(output)
    assert [(row["implementation"], row["extent"], row["d_expert"]) for row in made] == [
        (name, major_bench.groups.EXTENT_BLOCK * -(-192 // major_bench.groups.EXTENT_BLOCK), 384)
        for name in ("cpu_tiled", "lax")
    ]
    for row in made:
        assert row["tflops_per_s"] * row["median_ms"] == pytest.approx(6e-9 * 160 * 128 * row["extent"])
        assert row["relative_error"] < 1e-5 and row["command"]
    assert "of full" in capsys.readouterr().out
    # A back end that forgets the extents, or the rest of F, is found out.
    whole = major_bench.program
    monkeypatch.setattr(major_bench, "program", lambda name, half: whole(name, False))
    with pytest.raises(cases.WrongResult, match="of 384: error"):
        bench.main(args)


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@gpu
@pytest.mark.parametrize("family", [name for name in families.GROUPED if not name.startswith("tokamax")])
@pytest.mark.parametrize("operation", ["forward", "dlhs", "drhs"])
def test_rivals_are_right_on_the_device(family, operation):
    case = Case(operation, "up", "here", 4, 512, 256, 4096, 5.0, "bfloat16", (1000, 1, 1047, 2048))
    process = worker.Worker("GROUPED", family, 120)
    try:
        made = list(process.rows(case, QUICK))
    finally:
        process.close()
    assert made and all("median_ms" in row for row in made), made


@gpu
@pytest.mark.parametrize("scope", ["experts", "layer"])
@pytest.mark.parametrize("family", ["transformers", "ours"])
def test_layers_are_right_on_the_device(family, scope):
    case = LayerCase("forward+backward", scope, "here", 1024, 512, 256, 8, 2, 5.0, "bfloat16")
    process = worker.Worker("LAYER", family, 120)
    try:
        made = list(process.rows(case, QUICK))
    finally:
        process.close()
    assert made and all("median_ms" in row for row in made if "refused" not in row), made


def test_a_wrong_product_gets_no_time():
    case = grouped()
    with pytest.raises(jax_run.WrongResult, match="is above"):
        jax_run.time_product(case, QUICK, lambda *operands: 2 * product(case)(*operands))


def test_the_ratio_to_the_whole_is_that_of_the_half(monkeypatch):
    half, whole = timing.Timings((1.0, 1.0), 1), timing.Timings((4.0, 4.0), 1)
    monkeypatch.setattr(timing, "in_turns", lambda *args, **kwargs: {"": half, "full_": whole})
    row = jax_run.time_beside_full(grouped("major"), QUICK, lambda case: ours.product(case, "cpu_tiled", "EKN"))
    assert row["ratio_to_full"] == 0.25 and row["full_median_ms"] == 4 * row["median_ms"]


def test_a_whole_that_is_wrong_gives_no_ratio():
    case = grouped("major")

    def of(one):
        right = ours.product(one, "cpu_tiled", "EKN")
        return right if one.operation == "major" else lambda *operands: 2 * right(*operands)

    with pytest.raises(jax_run.WrongResult, match="is above"):
        jax_run.time_beside_full(case, QUICK, of)
