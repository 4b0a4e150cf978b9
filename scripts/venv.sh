# Sourced by demo.sh and test.sh: makes .venv with CPU PyTorch and svdit, and puts it on the PATH.
#
#   SVDIT_PYTHON     the interpreter to build the environment with (default python3, 3.10 or newer)
#   SVDIT_VENV       where it lives (default .venv in the repository)
#   SVDIT_TORCH      what pip installs as PyTorch (default torch==2.13.0); to get the smaller CPU-only build from
#                    PyTorch's own index, set SVDIT_TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${SVDIT_PYTHON:-python3}
venv=${SVDIT_VENV:-$repo/.venv}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    echo "python: got $("$python" --version 2>&1 || echo none); expected 3.10 or newer; set SVDIT_PYTHON" >&2
    exit 2
fi
if [ ! -x "$venv/bin/python" ]; then
    echo "[svdit] creating $venv" >&2
    "$python" -m venv "$venv"
fi
stamp="$venv/.svdit-$(cat "$repo/pyproject.toml" "$repo/scripts/venv.sh" | cksum | cut -d' ' -f1)"
if [ ! -e "$stamp" ]; then
    echo "[svdit] installing PyTorch and svdit (a few minutes the first time)" >&2
    # shellcheck disable=SC2086  # SVDIT_TORCH may hold options
    "$venv/bin/python" -m pip install -q ${SVDIT_TORCH:-torch==2.13.0}
    "$venv/bin/python" -m pip install -q -e "$repo[test]"
    touch "$stamp"
fi
export PATH="$venv/bin:$PATH"
export PYTHONWARNINGS="${PYTHONWARNINGS:-ignore::DeprecationWarning}"
