#!/bin/sh
# Everything that must be green: style, types, spelling, tests. Arguments go to pytest.
set -eu
cd "$(dirname "$0")/.."
sh .ci/environment.sh dev

bin=.venv/bin
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy"
"$bin/codespell"
# One thread in each of two workers: small tensors gain nothing from more, and timings stay the same everywhere.
OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 exec "$bin/python" -m pytest -n 2 "$@"
