"""The TensorRT plugin without TensorRT: what it exports, and its whole life as `abi_host` plays it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from svdit.exporter import op_schema
from svdit.trt_plugins import cuda_library
from tests import reference
from tests.cases import BY_NAME, CASES, op_attributes, op_inputs
from tests.tolerance import check_attention
from tests.trt_plugins import abi_cases

BUILD = Path(os.environ.get("SVDIT_BUILD", Path(__file__).parents[2] / "build"))
PLUGIN = BUILD / "libsvdit_tensorrt.so"
HOST = BUILD / "svdit_abi_host"
pytestmark = pytest.mark.skipif(
    not (PLUGIN.is_file() and HOST.is_file()),
    reason=f"no {PLUGIN.name} in {BUILD}; build it with TENSORRT_ROOT set, see docs/tensorrt.md",
)
FIELD_TYPES = {"FLOAT": (1, 1), "INT": (5, 1), "INTS": (5, 3), "STRINGS": (6, 0)}
"""TensorRT's PluginFieldType and the number of values (0: any) of each kind of attribute."""

SYSTEM_SYMBOL = re.compile(r"\w+@(GLIBC|GLIBCXX|GCC|CXXABI)_[\w.]+|_ITM_(de)?registerTMCloneTable|__gmon_start__")


def play(*arguments: object) -> str:
    """Run the host; its stdout. Fails with its stderr."""
    command = [HOST, PLUGIN, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def dynamic_symbols(*options: str) -> set[str]:
    command = ["nm", "-D", "--format=posix", *options, str(PLUGIN)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return {line.split()[0] for line in lines}


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm on PATH")
def test_it_exports_the_two_functions_and_wants_nothing_of_tensorrt():
    assert dynamic_symbols("--defined-only") == {"getCreators", "setLoggerFinder"}
    wanted = dynamic_symbols("--undefined-only")
    assert any(name.startswith("memcpy@") for name in wanted)
    assert not [name for name in wanted if not SYSTEM_SYMBOL.fullmatch(name)]


@pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf on PATH")
def test_it_needs_system_libraries_only():
    text = subprocess.run(["readelf", "-d", PLUGIN], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", text))
    assert "libc.so.6" in needed
    system = r"(libc|libm|libdl|librt|libpthread|libgcc_s|libstdc\+\+|ld-linux-.*)\.so\.\d+"
    assert not [name for name in needed if not re.fullmatch(system, name)]


def test_a_life_in_tensorrts_order():
    assert play("lifecycle").splitlines()[-1] == "lifecycle: passed"


def test_its_attributes_are_those_of_the_operator():
    printed = re.findall(r"^field (\w+) (\d+) (\d+)$", play("lifecycle"), re.MULTILINE)
    exported = [a for a in op_schema.ATTRIBUTES if a.name != "plugin_namespace"]  # the parser keeps that one
    assert [(name, (int(kind), int(length))) for name, kind, length in printed] == [
        (a.name, FIELD_TYPES[a.kind]) for a in exported
    ]


def test_bad_input_is_refused_with_a_sentence():
    lines = play("refusals").splitlines()
    assert lines[-1] == "refusals: passed"
    sentences = {line.split(": ", 1)[1] for line in lines if line.startswith("refused ")}
    assert len(sentences) >= 40
    for sentence in sentences:
        assert re.match(r"[\w, ]+: got .+", sentence), sentence


def test_its_readme_lists_inputs_and_attributes():
    text = (Path(__file__).parents[2] / "trt_plugins" / "tensorrt" / "README.md").read_text()
    for port in (*op_schema.INPUTS, *op_schema.OUTPUTS, *op_schema.ATTRIBUTES):
        assert f"`{port.name}`" in text


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_files_hold_the_values_of_a_case(dtype, tmp_path):
    case = BY_NAME["text-before-5-len-3-0"]
    abi_cases.write_case(case, dtype, tmp_path / "case")
    got = abi_cases.values((tmp_path / "case" / "K.bin").read_bytes(), dtype)
    assert (got == case.qkv(dtype)[1].ravel()).all()


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


needs_gpu = pytest.mark.skipif(not has_gpu(), reason="no CUDA GPU: the plugin launches nothing here")


@needs_gpu
@pytest.mark.skipif(cuda_library.find() is None, reason="no libsvdit_kernels.so to compare with")
def test_golden_cases_and_graphs_on_a_gpu(tmp_path):
    import torch

    from svdit.trt_plugins import cuda_op

    chosen = {f"{case.name}-{dtype}": (case, dtype) for case in CASES for dtype in ("bfloat16", "float16")}
    for name, (case, dtype) in chosen.items():
        abi_cases.write_case(case, dtype, tmp_path / name)
    assert play("gpu", tmp_path).splitlines()[-1] == f"gpu: {len(chosen)} cases passed"
    for name, (case, dtype) in chosen.items():
        content = (tmp_path / name / "O.bin").read_bytes()
        inputs, attributes = op_inputs(case, dtype), op_attributes(case)
        truth = reference.expected_of(case, *(inputs[x] for x in "qkv"))
        check_attention(abi_cases.values(content, dtype).reshape(case.shape), truth, dtype, name)
        tensors = {x: torch.from_numpy(array).cuda() for x, array in inputs.items()}
        q, k, v = (tensors.pop(x).to(getattr(torch, dtype)) for x in "qkv")
        scalars = [attributes[x] for x in ("scale", "text_tokens", "text_first")]
        out = cuda_op.sparse_attention(q, k, v, *tensors.values(), *scalars)
        same = out.view(torch.int16).cpu().numpy().tobytes() == content
        assert same, f"{name}: the torch operator gives other bits"


@needs_gpu
@pytest.mark.parametrize("name", ["long-text", "stage-1-layer-0"])
def test_eight_contexts_in_as_many_threads_on_a_gpu(name, tmp_path):
    abi_cases.write_case(BY_NAME[name], "bfloat16", tmp_path / name)
    assert play("threads", tmp_path / name).splitlines()[-1] == "threads: passed"
