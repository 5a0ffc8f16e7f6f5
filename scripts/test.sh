#!/usr/bin/env bash
# Set up (once) and run the tests on the CPU, as 8 emulated devices.
#
#   bash scripts/test.sh [pytest arguments]         bash scripts/test.sh tests/test_routing.py -k top_k
#   bash scripts/test.sh -m slow                    the long ones
#   bash scripts/test.sh -m gpu -n 0                those for a GPU, after: bash scripts/setup_env.sh cuda
#   bash scripts/test.sh -m hf                      live against transformers, where it and torch are installed
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$ROOT/scripts/setup_env.sh" dev
cd "$ROOT"

# Compiled programs are kept between runs. A size limit makes JAX lock the folder, which two workers write to.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$ROOT/.cache/jax}"
export JAX_COMPILATION_CACHE_MAX_SIZE="${JAX_COMPILATION_CACHE_MAX_SIZE:-1073741824}" # bytes
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="${JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS:-0.2}"

# Tests start processes of the commands. Without kept bytecode (containers often ask for none, and the set-up compiles
# none ahead) each of them compiles its packages' modules anew, which takes longer than all else that an import does.
unset PYTHONDONTWRITEBYTECODE

workers="$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)"
[[ "$workers" -le 8 ]] || workers=8

exec .venv/bin/python -m pytest -q -n "$workers" --dist loadfile --no-loadscope-reorder "$@"
