"""Our runners as Polygraphy runners, so that its Comparator judges the outputs."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.comparator import Comparator
from polygraphy.logger import G_LOGGER

from svdit.plans.bundle import read_bundle
from svdit.plans.errors import complain
from svdit.runtime.metrics import max_abs_error, rel_l2_error
from svdit.runtime.runner import Runner, make_runner


@dataclass(frozen=True)
class OutputError:
    """Errors of one output tensor at one compared step."""

    output: str
    step: int
    stage: int
    max_abs_error: float
    rel_l2_error: float


class BridgedRunner(BaseRunner):
    """Polygraphy's interface over an active `Runner`, which stays active and owned by the caller.

    The feed has one more input than the runner: `stage` int32 [1].
    """

    def __init__(self, runner: Runner, name: str) -> None:
        super().__init__(name=name)
        self.runner = runner

    def activate_impl(self) -> None:
        assert self.runner.active

    def get_input_metadata_impl(self) -> TensorMetadata:
        metadata = TensorMetadata()
        for spec in self.runner.inputs:
            shape = [None if isinstance(size, str) else size for size in spec.shape]
            metadata.add(spec.name, np.dtype(spec.dtype), shape)
        return metadata.add("stage", np.dtype(np.int32), [1])

    def infer_impl(self, feed_dict: dict[str, np.ndarray]) -> OrderedDict[str, np.ndarray]:
        feed = {name: array for name, array in feed_dict.items() if name != "stage"}
        stage = int(feed_dict["stage"][0]) if self.runner.num_stages > 1 else 0
        began = time.perf_counter()
        outputs = self.runner.infer(feed, stage)
        self.inference_time = time.perf_counter() - began
        return OrderedDict(outputs)


class BundleRunner(BridgedRunner):
    """A bundle on one of our backends, loaded and freed by Polygraphy: what `polygraphy run --svdit-BACKEND` makes."""

    is_active = False
    """What the base class asks for when the object goes, even when its constructor did not end."""

    def __init__(self, folder: str, backend: str) -> None:
        bundle = read_bundle(folder)
        if len(bundle.manifest.graphs) > 1:
            raise complain(str(folder), "a bundle with a graph a stage", "one graph", "export with --variant plugin")
        super().__init__(make_runner(bundle, backend), f"svdit-{backend}")

    def activate_impl(self) -> None:
        self.runner.activate()

    def deactivate_impl(self) -> None:
        self.runner.close()


def compare_outputs(
    reference: Runner, runner: Runner, feeds: Sequence[tuple[int, int, dict[str, np.ndarray]]]
) -> list[OutputError]:
    """Errors of every output of `runner` against `reference` on recorded inputs (step, stage, feed)."""
    data: list[Any] = [OrderedDict([*feed.items(), ("stage", np.array([stage], np.int32))]) for _, stage, feed in feeds]
    found: list[OutputError] = []

    def measure(expected: Any, got: Any) -> OrderedDict[str, bool]:
        step, stage, _ = feeds[len({(e.step, e.stage) for e in found})]
        passed: OrderedDict[str, bool] = OrderedDict()
        for name in expected:
            want, have = np.asarray(expected[name]), np.asarray(got[name])
            found.append(OutputError(name, step, stage, max_abs_error(want, have), rel_l2_error(want, have)))
            passed[name] = bool(np.isfinite(have).all())
        return passed

    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        results = Comparator.run([BridgedRunner(reference, "reference"), BridgedRunner(runner, "compared")], data)
        Comparator.compare_accuracy(results, compare_func=measure)
    return found
