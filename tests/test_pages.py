"""Figures on the pages are those of the committed rows."""

import csv
import json
import re
from pathlib import Path

import numpy as np

from kernels_pallas.moe_ffn import specs as layer_specs
from kernels_pallas.rivals import turns
from moejax.dispatch import rows as dispatch_rows
from moejax.report import pareto
from moejax.report.load import Run
from moejax.results import ResultRow, read_rows

ROOT = Path(__file__).parent.parent


def page(name: str) -> str:
    return " ".join((ROOT / "docs" / name).read_text(encoding="utf-8").split())


def results(name: str) -> list[ResultRow]:
    return read_rows(ROOT / "experiments" / "results" / f"{name}.jsonl")


def value(row: ResultRow) -> float:
    assert row.value is not None
    return row.value


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


def test_what_travels():
    text, rows = page("expert_parallelism.md"), results("expert_parallelism_h200x2")
    found = {(row.row, row.metric.partition("/")[2]): row for row in rows}
    nvlink = [row for name, row in found.items() if "MiB" in name[0] and not re.search("NCCL|ragged", name[0])]
    assert {row.commit[:7] for row in nvlink} == {"8ffa1dd"} and "one run of commit `8ffa1dd`" in text
    times = [found[f"padded, {sent}, uniform, fits, 64 MiB", "transfer"].extra["median_ms"]
             for sent in ("tokens", "pairs")]  # fmt: skip
    assert "takes {:.3f} ms instead of {:.3f} ms".format(*times) in text
    skewed = [value(found[f"padded, tokens, dirichlet5, fits, {mib} MiB", "packed"]) for mib in (64, 256)]
    assert "tokens reach {} and {} packed".format(*map(percent, skewed)) in text
    slow = {name: row for name, row in found.items() if "NCCL_P2P_DISABLE=1" in name[0]}
    assert {row.commit[:7] for row in slow.values()} == {"9840eda"} and "of one of `9840eda`" in text
    without = "uniform, fits, 64 MiB, NCCL_P2P_DISABLE=1"
    for sent in ("pairs", "tokens"):
        assert value(slow[f"padded, {sent}, {without}", "transfer"]) > 0.85
        assert value(slow[f"padded, {sent}, {without}", "packed"]) > 0.7
    times = [found[name, "transfer"].extra["median_ms"] for name in
             ("plain, 64 MiB, NCCL_P2P_DISABLE=1", "plain, 64 MiB", f"padded, tokens, {without}")]  # fmt: skip
    shown = "a plain all-to-all takes {:.3f} ms instead of {:.3f} ms. Packing is little beside that, and tokens, which "
    assert (shown + "send a quarter of the rows, take {:.3f} ms").format(*times) in text
    rows_of = [slow[f"padded, {sent}, {without}", "transfer"].extra["sent_rows"] for sent in ("tokens", "pairs")]
    assert 0.24 < rows_of[0] / rows_of[1] < 0.26
    skewed = [percent(value(slow[f"padded, {sent}, dirichlet5, fits, 64 MiB, NCCL_P2P_DISABLE=1", what]))
              for sent in ("pairs", "tokens") for what in ("transfer", "packed")]  # fmt: skip
    assert "pairs reach {} and {} packed there, tokens {} and {}.".format(*skewed) in text
    for mib in (64, 256):
        for sent in ("pairs", "tokens"):
            assert value(found[f"padded, {sent}, uniform, fits, {mib} MiB", "transfer"]) > 0.85
        assert value(found[f"padded, tokens, uniform, fits, {mib} MiB", "packed"]) > 0.7
        assert value(found[f"padded, pairs, uniform, fits, {mib} MiB", "packed"]) < 0.7
    layers = {row.row: row.commit[:7] for row in rows if row.row.startswith("layer, ")}
    assert all(commit == ("870caf4" if "pairs" in name else "8ffa1dd") for name, commit in layers.items())
    lost = {found[f"layer, chunked 2, {sent}, fit", "forward"].extra["overflow"] for sent in ("pairs", "tokens")}
    assert lost == {9.0} and "(9 pairs did not fit there)" in text


def test_what_no_other_limit_beats():
    rows = [*results("capacity_aware_h200x2"), *results("capacity_aware_lab_sweep")]
    best = {}
    for section in pareto.sections([Run(ROOT, "rows", rows=rows)]):
        title = section.title.removeprefix("Quality over time: ")
        best[title] = {(line[0], line[1]): line for line in section.blocks[0].data[1:] if line[5]}
    text = page("limits.md")
    olmoe, mixtral = (best[f"{name}, the paper's skew, an MoE layer"] for name in ("olmoe", "mixtral"))
    whole = best["olmoe, loads of olmoe_like.npz, a prefill"]
    three = [("lower top-k", 0.5), ("lower top-k", 0.75), ("replication", None)]
    assert set(olmoe) == set(whole) == set(three)
    short = lambda point: f"{point[3]:.2f}x"  # noqa: E731
    assert "(4 of 8 {}, 6 of 8 {}) and copies ({})".format(*(short(olmoe[key]) for key in three)) in text
    assert set(mixtral) == {
        *(("token drop", factor) for factor in (0.5, 0.75, 1.0)), ("expanded drop", 0.5), ("measured budget", None),
        ("replication", None),
    }  # fmt: skip
    token, budget, copies = (
        short(mixtral[key]) for key in (("token drop", 1.0), ("measured budget", None), ("replication", None))
    )
    assert f"({token} at 1)" in text and f"`measured_budget` ({budget}) and copies ({copies})" in text
    shares = [percent(share) for share in mixtral["measured budget", None][-2:]]
    assert "drops {} where it was timed and {} where it was scored".format(*shares) in text


def test_grouped_matmul_and_the_whole_layer():
    text, package = page("kernels.md"), ROOT / "kernels_pallas"
    rows, layers = (
        [json.loads(line) for line in (package / name / "measured" / "h100.jsonl").read_text("utf-8").splitlines()]
        for name in ("grouped_matmul", "moe_ffn")
    )
    ours = {
        (row["operation"], row["name"], row.get("projection"), row["commit"], row["alpha"], row["rows"]): row
        for row in rows
        if row.get("role", "ours") == "ours" and ("ceiling" in row or row["operation"] != "forward")
    }
    sizes = {"olmoe": 65536, "mixtral": 16384, "deepseek_v2_lite": 49152, "qwen3_moe": 65536}

    def both(name, operation, show, commit="9435036", alpha=5.0):
        return [show(ours[operation, name, part, commit, alpha, sizes[name]]) for part in ("up", "down")]

    share = lambda row: f"{percent(row['share_of_ceiling'], 0)}, {row['ratio_to_best_rival']:.2f}x"  # noqa: E731
    speed = lambda row: f"{row['tflops_per_s']:.0f}"  # noqa: E731
    half = lambda row: f"{row['ratio_to_full']:.3f}"  # noqa: E731
    same = lambda row: row  # noqa: E731
    labels = {"OLMoE": "olmoe", "Mixtral": "mixtral", "DeepSeek-V2-Lite": "deepseek_v2_lite", "Qwen3-MoE": "qwen3_moe"}
    backward = {}
    for label, name in labels.items():
        last = "fd24223" if name == "qwen3_moe" else "a9c054d"
        backward |= {
            (name, "dlhs"): both(name, "dlhs", same, "2d367af"),
            (name, "drhs"): both(name, "drhs", same, last),
        }
        gradients = [", ".join(map(speed, backward[name, operation])) for operation in ("dlhs", "drhs")]
        halves = both(name, "major", half, "034b47f" if name == "mixtral" else "436200d")
        halves.append(half(ours["major_ffn", name, None, "9435036", 5.0, sizes[name]]))
        assert f"| {' | '.join([label, *both(name, 'forward', share), *gradients, *halves])} |" in text
    slowly = [ours["major_ffn", name, None, "aaf0edc", 5.0, sizes[name]] for name in labels.values()]
    assert "FFN's are {:.3f}, {:.3f}, {:.3f} and {:.3f} in the".format(*(r["ratio_to_full"] for r in slowly)) in text
    spreads = [row["ratio_to_full_p90"] - row["ratio_to_full_p10"] for row in slowly]
    assert f"with {min(spreads):.2f} to {max(spreads):.2f} between" in text
    before = ours["major", "olmoe", "down", "2ce59cf", 5.0, 65536]
    assert before["temporary_bytes"] and f"down projection was {half(before)} with it" in text
    assert not any(row["temporary_bytes"] for row in both("olmoe", "major", same, "034b47f"))
    cublas = {
        (row["name"], row["projection"]): row
        for row in rows
        if row["commit"] == "9435036" and row["implementation"] == "dense_cublas" and row["operation"] == "forward"
    }
    found = [
        100 * np.median(turns.ratios(row, cublas[name, row["projection"]])) / row["tile_share"]
        for name in labels.values()
        for row in both(name, "forward", same)
    ]
    assert f"it is {min(found):.0f} to {max(found):.0f} %" in text
    slow = [
        row["ratio_to_best_rival"]
        for row in rows
        if (row["operation"], row["name"], row.get("projection"), row["alpha"]) == ("forward", "mixtral", "up", 5.0)
        and row["implementation"] == "mosaic_gpu"
        and row["commit"] not in ("a6b5315", "9435036")
    ]
    assert len(slow) == 6 and f"{min(slow):.2f} to {max(slow):.2f}x of torch in the six runs before" in text
    now = [both("mixtral", "forward", same)[0]["ratio_to_best_rival" + at] for at in ("", "_p10", "_p90")]
    assert "now it is at {:.2f}x ({:.2f} to {:.2f}x between".format(*now) in text
    ratios = {
        which: [row["ratio_to_best_rival"] for name in labels.values() for row in backward[name, which]]
        for which in ("dlhs", "drhs")
    }
    near = [row["ratio_to_best_rival_" + at] for row in backward["mixtral", "dlhs"] for at in ("p10", "p90")]
    told = "The rows' gradients are {:.2f} to {:.2f} times as fast as torch's "
    told += "(Mixtral's {:.2f} to {:.2f} and {:.2f} to {:.2f} between those percentiles), ".format(*near)
    told += "those of the matrices {:.2f} to {:.2f} times"
    assert told.format(*(edge(ratios[which]) for which in ("dlhs", "drhs") for edge in (min, max))) in text
    skewed = [both(name, "forward", share, "dc3863c", 0.5) for name in ("olmoe", "qwen3_moe")]
    dense = {
        (row["name"], row["projection"]): row["tflops_per_s"]
        for row in rows
        if row["commit"] == "dc3863c" and row["implementation"] == "dense_cublas"
    }
    found = [
        100 * row["tflops_per_s"] / (dense[name, row["projection"]] * row["tile_share"])
        for name in ("olmoe", "qwen3_moe")
        for row in both(name, "forward", lambda row: row, "dc3863c", 0.5)
    ]
    told = "OLMoE {} and {}; Qwen3-MoE {} and {}; of cuBLAS' {:.0f} to {:.0f} %."
    assert told.format(*skewed[0], *skewed[1], min(found), max(found)) in text

    # Rows of the run with other rivals have no ceiling.
    rivals = {
        (row["implementation"].split("_")[0] + row["implementation"].rpartition("_")[2], row["projection"]): speed(row)
        for row in rows
        if row["commit"] == "e37bdb8" and row["operation"] == "forward" and "ceiling" not in row
        and row["name"] == "olmoe" and row["role"] in ("rival", "ours")
    }  # fmt: skip
    told = [rivals[name, part] for name in ("jaxdot", "tokamaxtriton", "tokamaxmosaic", "mosaicgpu")
            for part in ("up", "down")]  # fmt: skip
    assert (
        "`jax.lax.ragged_dot` {} and {}, tokamax 0.0.14 (Pallas-Triton) {} and {}, "
        "tokamax 0.0.17 (Mosaic GPU) {} and {}".format(*told[:6])
        in text
    )
    assert "ours {} and {}.".format(*told[6:]) in text

    decoding = [
        [ours["decode", "olmoe_decode", part, "4a084b2", 5.0, count] for part in ("up", "down")]
        for count in (512, 64, 8)
    ]
    told = "{:,.0f} and {:,.0f} GB/s, {:.2f}x and {:.2f}x of torch"
    figures = [row[key] for pair in decoding for key in ("gb_per_s", "ratio_to_best_rival") for row in pair]
    assert f"{told}; 64 rows {told}; 8 rows {told}.".format(*figures) in text
    assert all(row["rounds"] == 16 for pair in decoding for row in pair)
    before = [ours["decode", "olmoe_decode", part, "9435036", 5.0, 512] for part in ("up", "down")]
    told = "a copy had {:,.0f} and {:,.0f} GB/s at `9435036`, and 512 rows {:.0f} and {:.0f} % of that"
    copied = [row["ceiling_value"] for row in before]
    assert told.format(*copied, *(100 * row["share_of_ceiling"] for row in before)) in text

    commits = ("dc3863c", "f316322", "2ce59cf", "2d367af")
    of_layer = [r for r in layers if r["commit"] in commits and r["implementation"] == "mosaic_gpu"]
    whole = {(r["name"], r["pass"], r.get("best_rival", "-").split("_")[0]): r for r in of_layer}  # the newest
    forward, trained = (whole["qwen3_30b", p, "transformers"] for p in ("forward", "forward+backward"))
    told = (
        f"{forward['tflops_per_s']:.0f} TFLOP/s, {forward['ratio_to_best_rival']:.2f} times transformers' `grouped_mm`"
    )
    assert told in text
    told = f"{trained['tflops_per_s']:.0f}, {trained['ratio_to_best_rival']:.2f} times"
    assert f"backward {told}, with {trained['saved_bytes'] / 2**30:.2f} GiB saved" in text
    other = whole["qwen3_30b", "forward", "liger"]
    assert f"forward {other['tflops_per_s']:.0f}, {other['ratio_to_best_rival']:.2f} times liger-kernel" in text
    sonic = [shape for shape in layer_specs.SHAPES.values() if shape.sonicmoe]
    assert len(sonic) == 11
    for shape in sonic:
        told = f"{shape.d_expert}, {shape.experts}, {shape.top_k}"
        cells, (forth, back) = [f"{shape.tokens:,}, {shape.d_model}", told], shape.sonicmoe
        cells += [speed(whole[shape.name, "forward", "-"]), str(forth)]
        trained = whole.get((shape.name, "forward+backward", "-"))
        cells += [speed(trained) if trained else "-", f"{3 / (1 / forth + 2 / back):.0f}" if back else "-"]
        assert f"| {' | '.join(cells)} |" in text
    assert all((shape.name, "forward+backward", "-") in whole for shape in sonic)


def test_choices_of_the_tuner():
    folder = ROOT / "kernels_pallas/grouped_matmul/mosaic_gpu/tuned"
    choices = json.loads((folder / "NVIDIA_H100_80GB_HBM3.json").read_text())["choices"]
    assert len(choices) == 7 and all(c["rule"] and c["tried"] == len(c["timed"]) == 8 for c in choices)
    gains = []
    for choice in choices:
        rule = ",".join(f"{name}={value}" for name, value in choice["config"].items())
        gains.append(100 * (1 - min(choice["timed"].values()) / choice["timed"][rule]))
    told = "the rule's was the fastest in {} of them; in Mixtral's down projection and its gate and up others were up "
    assert (told + "to {:.1f} % faster").format(gains.count(0), max(gains)) in page("kernels.md")


def test_half_of_an_expert_in_the_profile():
    text, found = page("kernels_tried.md"), {}
    with open(ROOT / "kernels_pallas" / "grouped_matmul" / "measured" / "h100_ncu.csv", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            key = row["name"], row["projection"], row["operation"], row["Metric Name"]
            if row["Section Name"] == "GPU Speed Of Light Throughput":
                found[key] = float(row["Metric Value"].replace(",", ""))
    metrics = ("Compute (SM) Throughput", "DRAM Throughput", "L2 Cache Throughput")
    for label, name in (("OLMoE", "olmoe"), ("Qwen3-MoE", "qwen3_moe")):
        for part in ("up", "down"):
            times, *shares = (
                [found[name, part, operation, metric] for operation in ("forward", "major")]
                for metric in ("Duration", *metrics)
            )
            cells = ["{:.0f} and {:.0f} us".format(*(t / 1e3 for t in times))]
            cells += ["{:.0f} and {:.0f} %".format(*share) for share in shares]
            clocks = [found[name, part, operation, "SM Frequency"] / 1e9 for operation in ("forward", "major")]
            cells.append("{:.2f} and {:.2f}".format(*clocks))
            assert f"| {label} {part} | {' | '.join(cells)} |" in text


def test_scatter_of_rows():
    file = ROOT / "kernels_pallas" / "gather_rows" / "measured" / "h100.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    ms = {(r["name"], r["operation"], r["implementation"]): r["median_ms"] for r in rows}
    one, two, xla = (
        [ms[name, operation, which] for name in ("olmoe_8k", "mixtral")]
        for operation, which in (("gather_rows", "mosaic_gpu"), ("scatter_rows", "mosaic_gpu"), ("gather_rows", "xla"))
    )
    told = "a gather takes {:.3f} and {:.3f} ms, a scatter of the same rows {:.3f} and {:.3f} ms, "
    told += "XLA's gather {:.3f} and {:.3f} ms"
    assert told.format(*one, *two, *xla) in page("kernels.md")
    assert {r["commit"] for r in rows} == {"dc3863c"}


def test_row_gathers():
    text = page("kernels.md")
    file = ROOT / "kernels_pallas" / "gather_rows" / "measured" / "h200.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    ours = {(row["name"], row["operation"]): row for row in rows if row["implementation"] == "mosaic_gpu"}
    for name, label in (("olmoe_unpack", "(65,536 of 2,048)"), ("mixtral", "2 of each token)"),
                        ("olmoe_8k", "8 of each token)")):  # fmt: skip
        cells = [
            f"{percent(row['share_of_ceiling'], 0)}, {row['ratio_to_best_rival']:.2f}x" if row else "-"
            for row in (ours.get((name, operation)) for operation in ("gather_rows", "combine_rows"))
        ]
        assert f"{label} | {' | '.join(cells)} |" in text
    for row in rows:
        if row["role"] == "ours":
            assert ours[row["name"], row["operation"]]["median_ms"] < 1.01 * row["median_ms"]
    assert {row["commit"][:7] for row in rows} == {"c52abb0"} and "H200 (commit `c52abb0`" in text
    design = page("kernels_design.md")
    assert dispatch_rows.GATHER is None and "`GATHER = None` is" in design
    assert dispatch_rows.COMBINE == "ref" and '`COMBINE = "ref"` leaves the sum to XLA' in design


def test_speed_of_limits_on_two_devices():
    text, rows = page("limits.md"), results("capacity_aware_h200x2")
    at = {(row.metric.removeprefix("speedup/"), row.row): row for row in rows}
    both = lambda row: f"{row.extra['predicted']:.2f}, {row.value:.2f}"  # noqa: E731
    full = lambda row: f"{percent(row.extra['drop_rate'])}: {both(row)}"  # noqa: E731
    paper = lambda model, arm: at["layer", f"{model}, the paper's skew, {arm}"]  # noqa: E731
    trained = lambda model, arm: at["layer", f"{model}, loads of {model}_like.npz, {arm}"]  # noqa: E731
    whole = lambda arm: at["prefill", f"olmoe, loads of olmoe_like.npz, {arm}"]  # noqa: E731
    levels = ("token drop", "expanded drop", "expanded drop, top-k first")
    for factor in ("2", "1.5", "1", "0.5"):
        arms = [f"{level}, factor {factor}" for level in levels]
        assert f"| {factor} | {' | '.join(both(paper(m, arm)) for m in ('olmoe', 'mixtral') for arm in arms)} |" in text
        cells = [both(trained(m, arm)) for m in ("olmoe", "mixtral") for arm in arms[:2]]
        cells += [both(whole(arm)) if factor in ("1.5", "1") else "-" for arm in arms[:2]]
        assert f"| {factor} | {' | '.join(cells)} |" in text
    for label, olmoe, mixtral in (
        *((name, name, name) for name in ("device budget, factor 1", "device budget, factor 1.5", "measured budget")),
        ("top-6 of 8", "top-6 of 8", ""), ("top-4 of 8; top-1 of 2", "top-4 of 8", "top-1 of 2"),
        ("replication, one copy a rank", "replication", "replication"),
    ):  # fmt: skip
        cells = []
        for skew in (paper, trained):
            cells += [full(skew("olmoe", olmoe)), full(skew("mixtral", mixtral)) if mixtral else "-"]
        assert f"| {label} | {' | '.join([*cells, full(whole(olmoe))])} |" in text
    for row in rows:
        old = {"olmoe, the paper's skew": "8ffa1dd", "mixtral, the paper's skew, token drop, factor 0.75": "c52abb0"}
        assert row.commit[:7] == next((to for name, to in old.items() if row.row.startswith(name)), "9840eda")
        assert row.dirty is (True if row.commit[:7] == "9840eda" else None)
    assert "under the paper's skew at commit `8ffa1dd`, all else at `9840eda` with changes of the benchmark" in text


def test_what_the_speed_of_limits_says():
    text, rows = page("limits.md"), results("capacity_aware_h200x2")
    at = {(row.metric.removeprefix("speedup/"), row.row): row for row in rows}
    paper = lambda model, arm: at["layer", f"{model}, the paper's skew, {arm}"]  # noqa: E731
    trained = lambda model, arm: at["layer", f"{model}, loads of {model}_like.npz, {arm}"]  # noqa: E731
    whole = lambda arm: at["prefill", f"olmoe, loads of olmoe_like.npz, {arm}"]  # noqa: E731
    models = ("olmoe", "mixtral")
    skews = [paper(model, "none").extra["max_over_mean"] for model in models]
    assert "is over the two ranks {:.2f} and {:.2f}".format(*skews) in text
    skews = [trained(model, "none").extra[f"max_over_mean{of}"] for of in ("_experts", "") for model in models]
    assert "max/mean is {:.2f} and {:.2f} over experts, and {:.2f} and {:.2f} over two ranks".format(*skews) in text
    none = whole("none").extra
    assert f"{none['layers']} layers, {none['batch']} rows of {none['context']:,} tokens" in text
    assert f"{none['median_ms']:.1f} ms without a limit" in text
    skews = [none[f"max_over_mean{of}"] for of in ("_experts", "")]
    assert "(max/mean {:.2f} over experts, {:.2f} over ranks, mean of the layers)".format(*skews) in text

    none, one = (paper("olmoe", arm).extra for arm in ("none", "expanded drop, factor 1"))
    assert f"without a limit takes {none['median_ms']:.2f} ms" in text
    assert f"at factor 1 {one['median_ms']:.2f} ms" in text
    assert f"computes its experts {one['experts_speedup']:.2f} times as fast" in text
    combine = [arm["split_ms"]["combine"] for arm in (one, none)]
    assert "combine takes {:.2f} ms instead of {:.2f} ms".format(*combine) in text
    limit = sum(one["split_ms"][part] - none["split_ms"][part] for part in ("route", "other"))
    assert f"the limit itself about {limit:.2f} ms" in text

    factors = ("2", "1.5", "1", "0.5")
    shares = [paper("mixtral", f"token drop, factor {f}").extra["share_of_predicted"] for f in factors]
    assert f"comes to {percent(min(shares), 0)[:-2]} to {percent(max(shares), 0)} of what is predicted" in text
    none, one = (paper("mixtral", arm).extra for arm in ("none", "token drop, factor 1"))
    mine, total = none["work_by_rank"][0], sum(none["work_by_rank"])
    assert f"which has {mine:,.0f} of the {total:,.0f} pairs" in text
    parts = [none["median_ms"], none["split_ms"]["experts"], none["split_ms"]["communicate"]]
    assert "of {:.2f} ms its experts take {:.2f} ms, and {:.2f} ms are in the exchange".format(*parts) in text
    parts = [one["median_ms"], one["split_ms"]["experts"], one["split_ms"]["communicate"]]
    assert "takes {:.2f} ms, {:.2f} ms in the experts and {:.2f} ms in the exchange".format(*parts) in text

    for skew in (paper, trained):
        for model in models:
            for factor in factors:
                token, expanded = (skew(model, f"{arm} drop, factor {factor}") for arm in ("token", "expanded"))
                if (skew, model, factor) == (trained, "mixtral", "0.5"):
                    assert token.interval is not None and token.interval[0] < value(expanded) < token.interval[1]
                else:
                    assert value(expanded) < value(token)
                if model == "olmoe":
                    assert (value(expanded) > 1) == (factor == "0.5")
                elif skew is paper:
                    assert (value(expanded) > 1) == (factor != "2")
    assert all(trained(model, "token drop, factor 1.5").extra["drop_rate"] == 0 for model in models)
    costs = [percent(1 - value(trained(model, "token drop, factor 1.5")), 0) for model in models]
    assert "costs {} of OLMoE's layer and {} of Mixtral's".format(*costs) in text
    half = [(trained(m, "token drop, factor 0.5"), trained(m, top)) for m, top in
            (("olmoe", "top-4 of 8"), ("mixtral", "top-1 of 2"))]  # fmt: skip
    assert all(abs(row.extra["drop_rate"] - 0.5) < 1e-3 for pair in half for row in pair)
    shown = [f"{value(row):.2f}" for pair in half for row in pair]
    assert "is {} times as fast and top-4 of 8 {} times (Mixtral, top-1 of 2: {} and {})".format(*shown) in text
    token, top, copies = (paper("mixtral", arm) for arm in ("token drop, factor 1", "top-1 of 2", "replication"))
    assert f"drops {percent(token.extra['drop_rate'])} of the pairs and is {value(token):.2f} times as fast" in text
    assert f"drops {percent(top.extra['drop_rate'])} and is {value(top):.2f} times" in text
    assert f"copies drop nothing and are {value(copies):.2f} times" in text and copies.extra["drop_rate"] == 0
    token, expanded, top, copies = (
        whole(arm) for arm in ("token drop, factor 1", "expanded drop, factor 1", "top-6 of 8", "replication")
    )
    assert f"at 1 is {value(token):.2f} times as fast, where the busiest rank's work predicts" in text
    assert f"work predicts {token.extra['predicted']:.2f}; Expanded Drop gains nothing" in text and value(expanded) < 1
    assert f"top-6 of 8 is {value(top):.2f} times as fast and copies" in text
    assert f"which lose nothing, {value(copies):.2f} times" in text
    # What is not measured.
    assert not [row for (what, name), row in at.items() if what == "prefill" and "loads of olmoe_like" not in name]
    assert {row.extra["ranks"] for row in rows} == {2}


def test_limits_of_the_lab_model():
    text, rows = page("limits.md"), results("capacity_aware_lab_sweep")
    judged = {(row.table, row.row): row for row in rows if row.kind == "contrast"}
    values = {(row.table, row.row): row for row in rows if row.kind == "value"}
    assert {row.table for row in rows} == {"sweep", "2", "latency", "3"}
    assert {len(values[table, "no limit"].values_by_seed) for table in ("sweep", "2", "latency", "3")} == {3}
    assert f"Without a limit the second has {values['sweep', 'no limit'].value:.4f} bits per byte" in text
    for label, table, name, more in (
        ("Token Drop at 1.5 is near the baseline", "sweep", "1.5 is near-baseline (token drop)", ""),
        ("Expanded Drop at 1.5 is near the baseline", "sweep", "1.5 is near-baseline (expanded drop)", ""),
        ("0.5 loses more than 1", "sweep", "steep fall below 1.0", " more"),
        ("Token Drop at 3 is no limit", "sweep", "3 is no limit (token drop)", ""),
        ("factors Expanded Drop beats Token Drop", "2", "expanded drop beats token drop (the paper's factor)", " less"),
        ("Token Drop beats Expert Drop", "2", "token drop beats expert drop (the paper's factor)", " less"),
        ("Expanded Drop loses nothing", "2", "expanded drop loses nothing (the paper's factor)", ""),
        ("dropped Expanded Drop beats Token Drop", "2", "expanded drop beats token drop (12 % dropped)", " less"),
        (
            "latency Expanded Drop beats Token Drop",
            "latency",
            "expanded drop beats token drop at equal latency",
            " more",
        ),
        ("`device_budget` beats Token Drop", "latency", "device budget beats token drop at equal latency", " less"),
        ("expert level at 1.5, Token Drop", "3", "device level 1.0 beats expert level 1.5 (token drop)", " less"),
        ("the same, Expanded Drop", "3", "device level 1.0 beats expert level 1.5 (expanded drop)", " less"),
        ("`measured_budget` loses nothing", "3", "measured budget loses nothing", ""),
    ):
        row = judged.pop((table, name))
        assert row.value is not None and row.interval is not None
        low, high = sorted(map(abs, row.interval))
        assert f"{label} | {abs(row.value):.4f} [{low:.4f}, {high:.4f}]{more} | {row.verdict} |" in text
    first = [row for (_, name), row in judged.items() if "top-k first beats" in name]
    assert len(first) == 3 and all(abs(value(row)) < 1e-4 for row in first)
    drop, wide = (values["sweep", f"{arm} drop, factor 1.5"].value for arm in ("token", "expanded"))
    assert drop is not None and wide is not None and f"gives back only {drop - wide:.4f} of it" in text
    arms = [values["latency", f"{arm}, equal latency"] for arm in ("token drop", "device budget")]
    fewer = values["latency", "top-2 of 4"]
    assert f"({arms[0].extra['latency']:.2f} of the rows on the busiest rank)" in text
    assert f"`device_budget` has {value(arms[1]):.4f} bits per byte, Token Drop {value(arms[0]):.4f}" in text
    assert f"2 experts a token instead of 4 {value(fewer):.4f}." in text
    expert, device = (
        values["3", f"token drop, {level}"] for level in ("expert level, factor 1.5", "device level, factor 1")
    )
    assert all(device.values_by_seed[seed] < expert.values_by_seed[seed] for seed in expert.values_by_seed)


def test_factors_by_layer_at_equal_latency():
    rows = {row.row: row for row in results("capacity_aware_tiny") if (row.kind, row.table) == ("value", "latency")}
    layers, one = rows["token drop, factors 0.875/1/1/1.125"], rows["token drop, equal latency"]
    assert abs(layers.extra["latency"] / one.extra["latency"] - 1) < 0.005
    assert f"(0.875/1/1/1.125), lose {value(layers) - value(one):.4f} bits per byte more" in page("limits.md")


def test_the_simulation_of_eight_ranks():
    text, rows = page("limits.md"), results("capacity_aware_simulated")
    assert all(row.extra["simulation"] and row.verdict is None for row in rows)
    at = {(row.table, row.row): row for row in rows}
    over: dict[str, list[float]] = {}
    for factor in ("2", "1.5", "1"):
        cells = []
        for model in ("olmoe", "mixtral"):
            for arm in ("token drop", "expanded drop"):
                row = at["figure 4, simulation", f"{model}: {arm}, factor {factor}"]
                assert row.published is not None
                cells.append(f"{row.value:.2f}, {row.published:.2f}")
                over.setdefault(f"{model} {factor}", []).append(value(row) / row.published - 1)
        assert f"| {factor} | {' | '.join(cells)} |" in text
    off = {}
    for factor in ("2", "1.5", "1"):
        cells = []
        for model in ("deepseek", "qwen"):
            for arm in ("token drop", "expanded drop"):
                row = at["figure 4, simulation", f"{model}: {arm}, factor {factor}"]
                assert row.published is not None and row.extra["experts_timed"] == "olmoe, by size"
                cells.append(f"{row.value:.2f}, {row.published:.2f}")
                off.setdefault(model, []).append(value(row) / row.published - 1)
        assert f"| {factor} | {' | '.join(cells)} |" in text
    low, high = ([percent(end(off[model]), 0)[:-2] for model in ("deepseek", "qwen")] for end in (min, max))
    assert f"DeepSeek-V2-Lite is {low[0]} to {high[0]} % above" in text
    assert f"Qwen1.5-MoE {low[1].removeprefix('-')} % below to {high[1]} % above" in text
    ends = [percent(share, 0)[:-2] for factor in "21" for share in sorted(over[f"olmoe {factor}"])]
    assert "**OLMoE is overstated**, by {} to {} % at factor 2 and {} to {} % at 1".format(*ends) in text
    near = [percent(share, 0)[:-2] for share in over["mixtral 2"] + over["mixtral 1.5"]]
    assert f"Mixtral is {min(near)} to {max(near)} % above the published figures at 2 and 1.5" in text
    assert "and {} to {} % at 1.".format(*(percent(share, 0)[:-2] for share in sorted(over["mixtral 1"]))) in text
    whole = [
        at["figure 5, simulation", name] for name in ("olmoe: token drop, factor 2", "mixtral: token drop, factor 1.5")
    ]
    assert "at 2 has {0.value:.2f} where {0.published:.2f} is published".format(whole[0]) in text
    assert "at 1.5 {0.value:.2f} where {0.published:.2f} is".format(whole[1]) in text
