#!/usr/bin/env bash
# From a fresh clone to a trained MoE, a table and a report, on a CPU. Run it again to resume, or to see the result.
#
#   bash scripts/quickstart.sh [--short] [--workdir=DIR] [flags of experiments.run]
#
# --short is the smallest run that passes through every stage. Works from any folder; paths in further flags are
# relative to the checkout.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

config=configs/quickstart.py
workdir=runs/quickstart
flags=()
while [[ $# -gt 0 ]]; do
    case "$1" in
        --short) config=configs/quickstart.py:short ;;
        --workdir | --workdir=*)
            if [[ "$1" == --workdir ]]; then
                [[ $# -gt 1 ]] || { echo "quickstart: --workdir needs a folder: --workdir=DIR" >&2 && exit 2; }
                shift
            fi
            workdir="${1#--workdir=}"
            [[ "$workdir" == /* ]] || workdir="$PWD/$workdir"
            ;;
        *) flags+=("$1") ;;
    esac
    shift
done

bash "$ROOT/scripts/setup_env.sh" base
cd "$ROOT"
.venv/bin/python -m experiments.run --config="$config" --workdir="$workdir" ${flags[@]+"${flags[@]}"}
.venv/bin/python -m experiments.report --workdir="$workdir"

absolute="$workdir"
[[ "$absolute" == /* ]] || absolute="$ROOT/$workdir"
for file in report.html results.jsonl; do
    [[ -s "$absolute/$file" ]] || { echo "quickstart: $absolute/$file is missing or empty" >&2 && exit 1; }
done
printf '\nreport   %s\nresults  %s\n' "$absolute/report.html" "$absolute/results.jsonl"
