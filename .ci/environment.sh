#!/bin/sh
# Make or refresh the environment .venv and install the project into it.
#
#   sh .ci/environment.sh plots     what training needs
#   sh .ci/environment.sh dev       what the tests need (training included)
#
# A second call with nothing changed returns at once. Variables that are honoured:
#   PYTHON            the interpreter to build on (otherwise the first of 3.10 to 3.13 found on PATH)
#   TORCH_VERSION     the torch release to install
#   TORCH_INDEX_URL   where to take torch from, for example the index of a CUDA or CPU build
set -eu

extras=${1:?usage: environment.sh plots|dev}
venv=.venv
torch_version=${TORCH_VERSION:-2.13.0}
cd "$(dirname "$0")/.."

say() { printf '%s\n' "==> $*"; }

wanted="$(cksum pyproject.toml) torch $torch_version"

# Scripts inside an environment hold absolute paths, so one that was moved is made anew.
is_at_home() { [ -x "$venv/bin/python" ] && [ "$(cat "$venv/.made-in" 2>/dev/null)" = "$PWD" ]; }

is_current() { is_at_home && [ "$(cat "$venv/.installed-$1" 2>/dev/null)" = "$wanted" ]; }

if is_current dev || is_current "$extras"; then
    exit 0
fi

# Version managers leave commands on PATH that only print an error, so every candidate is tried.
is_supported() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; }

find_python() {
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.12 python3.11 python3.13 python3.10 python; do
        if is_supported "$candidate"; then
            command -v "$candidate"
            return 0
        fi
    done
    return 1
}

make_environment() {
    if python=$(find_python); then
        say "making $venv with $("$python" --version)"
        "$python" -m venv --clear "$venv" && return 0
        # Debian splits venv's pip off into a package of its own.
        if command -v uv >/dev/null; then
            uv venv --clear --seed --python "$python" "$venv" && return 0
        fi
        "$python" -m virtualenv --clear "$venv" 2>/dev/null && return 0
        "$python" -m venv --clear --without-pip "$venv" &&
            "$python" -m pip --python "$venv/bin/python" install pip && return 0
        say "cannot make an environment: on Debian or Ubuntu run 'apt-get install python3-venv' first"
    elif command -v uv >/dev/null; then
        say "no Python 3.10 to 3.13 on PATH, letting uv find one"
        uv venv --clear --seed --python 3.11 "$venv" && return 0
    else
        say "no Python 3.10 to 3.13 found on PATH: install one, or set PYTHON=/path/to/python"
    fi
    return 1
}

pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

has_torch() {
    "$venv/bin/python" - "$torch_version" >/dev/null 2>&1 <<'CHECK'
import sys
from importlib.metadata import version
sys.exit(version("torch").partition("+")[0] != sys.argv[1])
CHECK
}

has_gpu() { nvidia-smi -L 2>/dev/null | grep -q GPU; }

# On Linux the standard build carries gigabytes of CUDA. Without a GPU the small CPU build is asked for first, in
# whatever way this machine's installers offer it; the standard build is the last resort.
install_torch() {
    if [ -n "${TORCH_INDEX_URL:-}" ]; then
        pip install --index-url "$TORCH_INDEX_URL" "torch==$torch_version"
    elif [ "$(uname -s)" != Linux ] || has_gpu; then
        pip install "torch==$torch_version"
    elif pip install "torch==$torch_version+cpu" 2>/dev/null; then
        :
    elif command -v uv >/dev/null &&
        uv pip install --python "$venv/bin/python" --torch-backend=cpu "torch==$torch_version"; then
        :
    else
        say "no CPU build of torch on offer: installing the standard one, which is large (TORCH_INDEX_URL avoids it)"
        pip install "torch==$torch_version"
    fi
}

if ! is_at_home || ! is_supported "$venv/bin/python"; then
    make_environment
    printf '%s\n' "$PWD" >"$venv/.made-in"
fi
has_torch || install_torch
say "installing the project with [$extras]"
pip install --editable ".[$extras]"
printf '%s\n' "$wanted" >"$venv/.installed-$extras"
