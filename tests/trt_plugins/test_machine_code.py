"""The SASS check finds what it is there to find, and finds nothing in the built library."""

from __future__ import annotations

import importlib.util
import shutil
from collections import Counter
from pathlib import Path

import pytest

from svdit.trt_plugins import cuda_library

SCRIPT = Path(__file__).parents[2] / "scripts" / "check_sass.py"
spec = importlib.util.spec_from_file_location("check_sass", SCRIPT)
check_sass = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check_sass)


def step() -> list[str]:
    """A healthy step at D=128: two groups of products, half of the exponentials between the waits."""
    products = ["WARPGROUP.ARRIVE", *["HGMMA.64x128x16"] * 8, "WARPGROUP.ARRIVE", *["HGMMA.64x128x16"] * 8]
    half = ["MUFU.EX2 R2, R2"] * 32
    waits = ["BAR.ARV R1, 0x100", "WARPGROUP.DEPBAR.LE gsb0, 0x1", *half, "WARPGROUP.DEPBAR.LE gsb0, 0x0"]
    return [*products, *waits, *half]


def first() -> list[str]:
    return ["BAR.ARV R1, 0x100", "WARPGROUP.ARRIVE", *["HGMMA.64x128x16"] * 8, "WARPGROUP.DEPBAR.LE gsb0, 0x0"]


def test_a_healthy_kernel_has_no_defects():
    assert check_sass.defects("Li128", [*first(), *step(), *step()]) == []


def test_three_warpgroups_hand_over_on_two_ways():
    first = ["BAR.ARV R1, 0x100", "WARPGROUP.ARRIVE", *["HGMMA.64x128x16"] * 4]
    products = ["WARPGROUP.ARRIVE", *["HGMMA.64x128x16"] * 4, "WARPGROUP.ARRIVE", *["HGMMA.64x64x16"] * 8]
    step = ["BAR.ARV R1, 0x100", *products, "BAR.ARV R1, 0x100", "WARPGROUP.DEPBAR.LE gsb0, 0x0"]
    assert check_sass.defects("Li64", [*first, *step, *step]) == []
    assert "HGMMA for" in check_sass.defects("Li64", [*first, *step, *step[1:]])[0]


def test_the_kernel_for_older_gpus_is_checked_for_tensor_cores_and_local_memory():
    assert check_sass.defects("sm80_sparse_attention", ["HMMA.16816.F32.BF16", "LDSM.16.M88.4"]) == []
    assert check_sass.defects("sm80_sparse_attention", ["FFMA R1"]) == ["no HMMA"]
    assert "local memory" in check_sass.defects("sm80_sparse_attention", ["HMMA.16816.F32", "STL [R1], R2"])[0]
    assert check_sass.defects("sm80_sparse_attention", ["BPT.TRAP 0x1"]) == []  # not launched on this architecture


def test_defects_are_named():
    code = [*first(), *step(), *step()]
    assert "local memory" in check_sass.defects("Li128", [*code, "LDL R1, [R1]"])[0]
    assert "products are serialised" in check_sass.defects("Li128", [*code, "WARPGROUP.ARRIVE"])[0]
    assert any("HGMMA" in defect for defect in check_sass.defects("Li128", [*code, "HGMMA.64x64x16"]))
    late = [*first(), *sorted(step(), key=lambda text: "EX2" in text), *step()]
    assert check_sass.defects("Li128", late) == ["0 exponentials before the wait for the output; 32 expected"]


@pytest.mark.skipif(shutil.which("cuobjdump") is None, reason="no cuobjdump on PATH")
@pytest.mark.skipif(cuda_library.find() is None, reason="no libsvdit_kernels.so; build it with CMake")
def test_the_built_library_is_clean():
    kernels = check_sass.functions(cuda_library.find())
    assert len([name for name in kernels if "sm90" in name]) == 4
    launched = [name for name, code in kernels.items() if "sm80" in name and any("HMMA" in text for text in code)]
    architectures = Counter(name.split()[-1] for name in launched)
    assert architectures and set(architectures.values()) == {4}  # two types, two head sizes; one number of keys each
    assert {name: check_sass.defects(name, code) for name, code in kernels.items()} == {name: [] for name in kernels}
