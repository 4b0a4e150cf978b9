#!/usr/bin/env bash
# Lint and tests, in that order, in an environment of their own. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh
ruff check .
python -m pytest -n "${SVDIT_TEST_JOBS:-2}" "$@"
