#!/usr/bin/env bash
# Write requirements/*.lock from pyproject.toml: exact versions with hashes, for Linux, macOS and Windows alike.
#
#   bash scripts/lock.sh [--upgrade] [uv flags]     without --upgrade, pins that still fit are kept
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

UV=""
for candidate in uv .venv/bin/uv .cache/uv/bin/uv; do
    if "$candidate" --version >/dev/null 2>&1; then
        UV="$candidate"
        break
    fi
done
if [[ -z "$UV" ]]; then
    python="$(bash scripts/setup_env.sh --find-python)"
    "$python" -m venv .cache/uv
    .cache/uv/bin/python -m pip install --quiet --disable-pip-version-check uv
    UV=.cache/uv/bin/uv
fi

compile() { # name of the lock, then uv's flags
    local name="$1"
    shift
    echo "[lock] requirements/$name.lock"
    "$UV" pip compile pyproject.toml --output-file "requirements/$name.lock" --quiet --no-config --generate-hashes \
        --no-emit-index-url --no-emit-find-links --python-version 3.12 --universal \
        --custom-compile-command "bash scripts/lock.sh" "$@"
}

mkdir -p requirements
# Each is held to those before it, so that any two can be installed into one environment.
compile base "$@"
compile dev --extra dev --constraint requirements/base.lock "$@"
compile cuda --extra cuda --constraint requirements/dev.lock "$@"
compile tpu --extra tpu --constraint requirements/dev.lock "$@"
