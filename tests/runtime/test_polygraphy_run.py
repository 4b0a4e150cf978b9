"""Our backends in `polygraphy run`: the line of docs/run.md as printed, and the data-loader script."""

from __future__ import annotations

import gc
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from svdit.plans.bundle import read_bundle
from svdit.plans.errors import SvditError
from svdit.runtime.denoise import noise_for
from svdit.runtime.polygraphy_bridge import BundleRunner
from svdit.runtime.polygraphy_data import load_data
from svdit.trt_plugins import onnxruntime_library

ROOT = Path(__file__).parents[2]
built = pytest.mark.skipif(
    onnxruntime_library.find() is None,
    reason=f"no {onnxruntime_library.FILE_NAME}; build it: {onnxruntime_library.BUILD}",
)


@built
def test_the_line_of_the_docs(bundles):
    text = (ROOT / "docs" / "run.md").read_text()
    (line,) = (x for x in text.splitlines() if "polygraphy run" in x and "--svdit-onnxrt " in x)
    variable, command, *arguments = shlex.split(line.replace("DIR", str(bundles / "plugin")))
    name, _, value = variable.partition("=")
    program = Path(sys.executable).with_name(command)
    environment = {**os.environ, name: value}
    done = subprocess.run(
        [program, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "svdit-onnxrt vs. svdit-torch | Passed: 3/3 iterations" in done.stdout


def test_data_of_every_stage(bundles, monkeypatch):
    bundle = read_bundle(bundles / "plugin")
    monkeypatch.setenv("SVDIT_BUNDLE", str(bundles / "plugin"))
    data = list(load_data())
    assert [int(feed["stage"][0]) for feed in data] == [0, 1, 2]
    assert [feed["timestep"].tolist() for feed in data] == sorted(
        (feed["timestep"].tolist() for feed in data), reverse=True
    )
    for feed in data:
        assert {name: (str(x.dtype), x.shape) for name, x in feed.items()} == {
            spec.name: (spec.dtype, spec.shape) for spec in bundle.manifest.inputs
        }
        noise = noise_for([0], bundle.manifest.latent_shape).numpy()
        np.testing.assert_array_equal(feed["hidden_states"], np.concatenate([noise, noise]))
        assert not feed["encoder_hidden_states"][0].any() and feed["encoder_hidden_states"][1].any()


def test_no_bundle_named(monkeypatch):
    monkeypatch.delenv("SVDIT_BUNDLE", raising=False)
    with pytest.raises(SvditError, match="SVDIT_BUNDLE: got nothing; expected the folder of a bundle"):
        next(load_data())


def test_one_graph_only(bundles, monkeypatch):
    """The refusal is all that is heard: nothing is said when the half-made runner goes."""
    said = []
    monkeypatch.setattr(sys, "unraisablehook", said.append)
    with pytest.raises(SvditError, match="got a bundle with a graph a stage; expected one graph"):
        BundleRunner(str(bundles / "portable"), "onnxrt")
    gc.collect()
    assert not said
