"""The direction of imports, and that importing a package stays light."""
from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {"plans": {"plans"}, "trt_plugins": {"trt_plugins", "plans"},
           "exporter": {"exporter", "plans", "trt_plugins"}, "runtime": {"runtime", "plans", "trt_plugins"}}
HEAVY = ("torch", "onnx", "onnxruntime", "diffusers", "transformers", "tensorrt", "polygraphy", "matplotlib")


def imported(path: Path) -> set[str]:
    """Every svdit package that a file imports, at top level or inside a function."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            modules = [node.module or ""] + [f"{node.module}.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            modules = [a.name for a in node.names]
        else:
            continue
        names |= {m.split(".")[1] for m in modules if m.startswith("svdit.")}
    return names


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_imports_flow_one_way(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    wrong = {str(f.relative_to(ROOT)): imported(f) - ALLOWED[package] for f in files}
    assert not {f: w for f, w in wrong.items() if w}


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_importing_a_package_loads_nothing_heavy(package):
    code = f"import sys, svdit.{package}; print([m for m in {HEAVY!r} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert found.stdout.strip() == "[]"


def test_every_plans_module_but_the_drawings_needs_numpy_only():
    files = [f.relative_to(ROOT).with_suffix("") for f in sorted((ROOT / "plans").rglob("*.py"))]
    modules = ["svdit." + ".".join(f.parts) for f in files if f.stem != "__init__"]
    code = (f"import sys, importlib\nfor m in {modules!r}: importlib.import_module(m)\n"
            f"print([m for m in {HEAVY!r} if m in sys.modules])")
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert found.stdout.strip() == "[]"


def test_every_folder_of_the_tree_is_installed():
    tomllib = pytest.importorskip("tomllib", reason="reading pyproject.toml needs Python 3.11")
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {"svdit." + ".".join(f.parent.relative_to(ROOT).parts)
             for package in ALLOWED for f in (ROOT / package).rglob("__init__.py")}
    assert listed == found
