"""An export whose weights would not fit: few layers, but several times as wide as the published model."""

from __future__ import annotations

import subprocess
import sys

from svdit.plans.bundle import read_bundle
from svdit.plans.geometry import Geometry
from svdit.plans.schema import template, write_plan
from tests.exporter.sparse_files import save_sparse

CONFIG = {
    "num_attention_heads": 64,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
}
PEAK = """
import re, sys
from svdit.exporter.cli import main
main(sys.argv[1:], standalone_mode=False)
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""


def test_memory_and_disk_do_not_grow_with_the_weights(tmp_path):
    checkpoint = save_sparse(tmp_path / "transformer", "HunyuanVideoTransformer3DModel", CONFIG)
    plan = template("hunyuan", Geometry((3, 6, 8), 256, "after", 2, 64, 128), (1, 4, 8))
    write_plan(tmp_path / "p.plan.json", plan)
    options = ["--model", "hunyuan", "--plan", str(tmp_path / "p.plan.json"), "--checkpoint", str(checkpoint)]
    options += ["--precision", "bf16", "-o", str(tmp_path / "b")]
    run = subprocess.run([sys.executable, "-c", PEAK, *options], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    bundle = read_bundle(tmp_path / "b")
    total = sum(weight.size for weight in bundle.manifest.weights)
    assert total > 8e9
    assert 1024 * int(run.stdout.split()[-1]) < 2e9
    for weight in bundle.manifest.weights:
        assert (bundle.path / weight.file).samefile(checkpoint / weight.file)
    on_disk = 512 * sum(file.stat().st_blocks for file in checkpoint.iterdir())
    assert on_disk < total / 100
