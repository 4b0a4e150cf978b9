"""scripts/check_tensorrt.sh without TensorRT: its arguments, its refusals, and the verdict on played commands."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "check_tensorrt.sh"
STEPS = {
    "export-plugin",
    *("build", "compare", "build-stripped", "compare-stripped", "build-streaming", "compare-streaming"),
    *("build-again", "trtexec-dynamic", "trtexec-static", "trtexec-embedded"),
    *("export-portable", "build-portable", "compare-portable"),
}
PYTHON = """#!/bin/sh
if [ $# -eq 1 ]; then
    cat > /dev/null
    printf 'TensorRT 10.14.1.48, H100 (compute capability 9.0)\\ncpu\\n/lib/libsvdit_tensorrt.so\\n'
else
    exec {python} "$@"
fi
"""
COMPARE = """#!/bin/sh
echo "$0 $@" >> "$CALLS"
while [ "$1" != --json ]; do shift; done
echo '{{"rel_l2_error": {error}}}' > "$2"
"""
ECHO = '#!/bin/sh\necho "$0 $@" >> "$CALLS"\necho engines are up to date\n'


def check(*arguments: object, path: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    here = Path(sys.executable).parent
    return subprocess.run(
        ["bash", str(SCRIPT), *map(str, arguments)],
        env={**os.environ, "PATH": f"{path or here}:{os.environ['PATH']}", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("arguments", [("a", "b"), ("--help",), ("-x",)])
def test_usage(arguments):
    done = check(*arguments)
    assert done.returncode == 2 and done.stderr == "usage: scripts/check_tensorrt.sh [FOLDER]\n"


def test_a_folder_with_things_in_it_is_left_alone(tmp_path):
    (tmp_path / "mine").touch()
    done = check(tmp_path)
    assert done.returncode == 2 and "got something that is there; expected a new or empty folder" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is installed")
def test_without_tensorrt_it_says_so():
    done = check()
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("python package: got no tensorrt (") and "nothing was checked" in done.stderr


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="no TensorRT-RTX")
def test_tensorrt_rtx_is_not_what_it_checks():
    done = check(POLYGRAPHY_USE_TENSORRT_RTX="1")
    assert done.returncode == 2 and done.stderr.startswith("POLYGRAPHY_USE_TENSORRT_RTX: got 1; expected TensorRT")


def played(folder: Path, error: object) -> dict[str, str]:
    """Commands that succeed, and a comparison that finds `error`."""
    folder.mkdir()
    scripts = {
        "python3": PYTHON.format(python=sys.executable),
        "svdit-compare": COMPARE.format(error=error),
        **dict.fromkeys(("svdit-export", "svdit-build", "trtexec"), ECHO),
    }
    for name, text in scripts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return {"path": str(folder), "CALLS": str(folder / "calls")}


def test_a_verdict_when_all_is_well(tmp_path):
    done = check(tmp_path / "out", **played(tmp_path / "bin", 0.004))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert {line.split()[1] for line in lines if line.startswith("passed")} == STEPS
    assert lines[-1].startswith(f"verdict: TensorRT works here, {len(STEPS)} steps passed (TensorRT 10.14")
    calls = (tmp_path / "bin" / "calls").read_text()
    assert "--variant plugin --precision bf16" in calls and "--backend tensorrt --against torch --device cpu" in calls
    assert "--strip-weights" in calls and "--weight-streaming 0" in calls
    assert "--stronglyTyped --staticPlugins=/lib/libsvdit_tensorrt_register.so --skipInference" in calls
    assert "--setPluginsToSerialize=/lib/libsvdit_tensorrt.so" in calls
    assert f"trtexec --loadEngine={tmp_path}/out/embedded.engine --useCudaGraph" in calls, "no plugin beside it"


@pytest.mark.parametrize(("error", "bad"), [(0.02, {"compare-portable"}), (0.3, None), ("null", None)])
def test_a_verdict_when_outputs_differ(tmp_path, error, bad):
    done = check(tmp_path / "out", **played(tmp_path / "bin", error))
    bad = bad or {name for name in STEPS if name.startswith("compare")}
    assert done.returncode == 1
    assert {line.split()[1].rstrip(";") for line in done.stdout.splitlines() if line.startswith("FAILED")} == bad
    assert f"verdict: {len(bad)} failed" in done.stderr


def test_a_step_that_fails_ends_what_depends_on_it(tmp_path):
    environment = played(tmp_path / "bin", 0.004)
    (tmp_path / "bin" / "svdit-build").write_text("#!/bin/sh\necho 'error: GPU: got none' >&2\nexit 2\n")
    done = check(tmp_path / "out", **environment)
    assert done.returncode == 1 and "error: GPU: got none" in done.stdout
    assert not [line for line in done.stdout.splitlines() if "compare" in line or "trtexec" in line]
