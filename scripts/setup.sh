#!/usr/bin/env bash
# Makes .venv hold exactly requirements/dev.txt and, editable, this repository's two distributions.
# `make setup` runs it when one of its inputs has changed.
set -euo pipefail
cd "$(dirname "$0")/.."

# Over an existing .venv this only completes what an interrupted run left out.
python3.12 -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check "$(grep '^uv==' requirements/dev.txt)"
.venv/bin/uv pip sync --compile-bytecode --python .venv/bin/python requirements/dev.txt
# Not isolated: the lock's setuptools builds them, so nothing unpinned gets in.
.venv/bin/uv pip install --python .venv/bin/python --no-deps --no-build-isolation --editable client --editable .
touch .venv/.stamp
