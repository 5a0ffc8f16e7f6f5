#!/usr/bin/env bash
# Make .venv in the checkout and install a lock into it. Idempotent: with nothing to do it ends at once.
#
#   bash scripts/setup_env.sh [base|dev|cuda|tpu ...]     default: base
#   bash scripts/setup_env.sh --find-python               only print which Python 3.12 would be used
#
# MOEJAX_PYTHON=/path/to/python3.12 names the interpreter instead of the search. Packages come from wherever pip is
# set up to look; the locks hold their hashes. Nothing outside the checkout is written but pip's own cache.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"
STAMPS="$VENV/.moejax" # a copy of each lock that is installed completely
TRIED=""
PYTHON=""

say() { printf '[setup] %s\n' "$*"; }
fail() {
    printf '[setup] error: %s\n' "$*" >&2
    exit 1
}

# Sets PYTHON (to the program itself, not a shim) and returns 0 if $1 is a usable Python 3.12; else notes why in TRIED.
# The command is run, not only looked up: a pyenv shim exists for versions that are not selected, and fails.
try_python() {
    local found executable
    found="$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null </dev/null)" || found="does not run"
    if [[ "$found" == 3.12 ]]; then
        if executable="$("$1" -c 'import ensurepip, sys, venv; print(sys.executable)' 2>/dev/null </dev/null)"; then
            PYTHON="$executable"
            return 0
        fi
        found="3.12 without venv and ensurepip; on Debian and Ubuntu: apt install python3.12-venv"
    fi
    TRIED+="    $1 ($found)"$'\n'
    return 1
}

find_python() {
    local name path root
    if [[ -n "${MOEJAX_PYTHON:-}" ]]; then
        try_python "$MOEJAX_PYTHON" && return
        fail "MOEJAX_PYTHON must name a Python 3.12 with venv and ensurepip, and does not:"$'\n'"${TRIED}" \
            "   Correct it, or unset it to have one searched for. Nothing was changed."
    fi
    while IFS= read -r path; do try_python "$path" && return; done < <(type -aP python3.12 | awk '!seen[$0]++' || true)
    for root in "${PYENV_ROOT:-}" "$(pyenv root 2>/dev/null </dev/null || true)" "${HOME:-}/.pyenv"; do
        [[ -d "$root/versions" ]] || continue
        while IFS= read -r path; do try_python "$path" && return; done \
            < <(printf '%s\n' "$root"/versions/3.12*/bin/python3.12 | sort -rV)
    done
    for name in python3 python; do
        while IFS= read -r path; do try_python "$path" && return; done < <(type -aP "$name" | awk '!seen[$0]++' || true)
    done
    if path="$(uv python find --system 3.12 2>/dev/null </dev/null)"; then try_python "$path" && return; fi
    fail "no Python 3.12 found. Tried python3.12, python3 and python on PATH, pyenv's versions and uv's:"$'\n'"${TRIED}" \
        "   Install one, for example with 'pyenv install 3.12', 'uv python install 3.12', 'apt install python3.12" \
        "python3.12-venv' or 'brew install python@3.12', and run this again; or set MOEJAX_PYTHON to one." \
        "Nothing was changed."
}

is_installed() { # $1: a lock's name. The other locks hold all of base at the same versions (tests/test_setup.py).
    local name
    for name in "$1" $([[ "$1" == base ]] && echo dev cuda tpu); do
        cmp -s "$ROOT/requirements/$name.lock" "$STAMPS/$name.lock" && return 0
    done
    return 1
}

make_venv() {
    if [[ -e "$VENV" || -L "$VENV" ]]; then
        local found
        found="$("$VENV/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" || found=""
        [[ -n "$found" ]] || fail ".venv is there, but .venv/bin/python does not run (was its Python removed?)." \
            "Move it away and run this again: mv '$VENV' '$VENV.old'"
        [[ "$found" == 3.12 ]] || fail ".venv was made by Python $found; moejax is locked for 3.12." \
            "Move it away and run this again: mv '$VENV' '$VENV.old'"
        "$VENV/bin/python" -m pip --version >/dev/null 2>&1 || "$VENV/bin/python" -m ensurepip >/dev/null ||
            fail ".venv has no pip and cannot get it. Move it away and run this again: mv '$VENV' '$VENV.old'"
        return
    fi
    find_python
    say "making .venv with $PYTHON"
    trap 'rm -rf "$VENV"' EXIT # only while it is ours and has nothing in it
    "$PYTHON" -m venv "$VENV" || fail "'$PYTHON -m venv' failed; nothing is left behind."
    trap - EXIT
}

install_lock() {
    local lock="$ROOT/requirements/$1.lock" stamp started=$SECONDS redo=""
    # A stamp that equals no present lock would, after this, speak for a mixture of versions.
    mkdir -p "$STAMPS"
    rm -f "$STAMPS/$1.lock"
    for stamp in "$STAMPS"/*.lock; do
        [[ -e "$stamp" ]] || continue
        cmp -s "$stamp" "$ROOT/requirements/${stamp##*/}" || rm -f "$stamp"
    done
    # pip takes a package that was cut off while it was written for installed, so an unfinished run is redone in full.
    if [[ -e "$STAMPS/unfinished" ]]; then
        redo="--force-reinstall"
        rm -f "$STAMPS"/*.lock
    fi
    touch "$STAMPS/unfinished"
    say "installing requirements/$1.lock ($(grep -c '^[a-z0-9].*==' "$lock") pinned packages; minutes on the first run)"
    # --no-deps: a lock is complete. Wheels only: building a source package would fetch unpinned build tools.
    # --no-compile: Python compiles what is imported, when it is; compiling all takes half the time of the set-up.
    "$VENV/bin/python" -m pip install -qq --no-compile --no-input --disable-pip-version-check --no-deps --only-binary :all: \
        --require-hashes ${redo:+"$redo"} --requirement "$lock" </dev/null ||
        fail "pip could not install requirements/$1.lock (its reason is above). Run this again to go on;" \
            "where that does not help, start afresh: mv '$VENV' '$VENV.old'"
    # Puts the checkout on sys.path; relative to site-packages, so that it moves with the folder.
    printf '../../../..\n' >"$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/moejax.pth"
    "$VENV/bin/python" -c 'import flax, grain, jax, tokenizers' >/dev/null ||
        fail "the packages of requirements/$1.lock are installed, but cannot be imported (see above)."
    cp "$lock" "$STAMPS/$1.lock.new"
    mv "$STAMPS/$1.lock.new" "$STAMPS/$1.lock"
    rm "$STAMPS/unfinished"
    say "ready: .venv holds requirements/$1.lock ($((SECONDS - started)) s)"
}

main() {
    local name
    if [[ "${1:-}" == --find-python ]]; then
        find_python
        printf '%s\n' "$PYTHON"
        return
    fi
    [[ $# -gt 0 ]] || set -- base
    for name in "$@"; do
        case "$name" in
            base | dev | cuda | tpu) ;;
            *) fail "unknown environment '$name': choose base, dev, cuda or tpu" ;;
        esac
    done
    for name in "$@"; do
        if [[ -x "$VENV/bin/python" ]] && is_installed "$name"; then continue; fi
        make_venv
        install_lock "$name"
    done
}

main "$@"
