"""TensorRT's progress monitor as progress bars."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from tqdm import tqdm


def progress_monitor(trt: ModuleType, label: str, show: bool = True) -> Any:
    """An `IProgressMonitor` of the module `trt`: a bar for each phase that is under way, the outer ones above.

    Ctrl-C ends the build at the next step: TensorRT then returns no engine, and `cancelled` is True.
    """

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.cancelled = False
            self.phases: list[str] = []
            self._bars: dict[str, tqdm] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            try:
                self.phases.append(phase_name)
                self._bars[phase_name] = tqdm(
                    total=num_steps,
                    desc=f"{label}: {phase_name}",
                    unit="step",
                    position=len(self._bars),
                    leave=False,
                    dynamic_ncols=True,
                    disable=not show,
                )
            except KeyboardInterrupt:
                self.cancelled = True

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:
                bar = self._bars.get(phase_name)
                if bar is not None:
                    bar.update(step + 1 - bar.n)
            except KeyboardInterrupt:
                self.cancelled = True
            return not self.cancelled

        def phase_finish(self, phase_name: str) -> None:
            try:
                bar = self._bars.pop(phase_name, None)
                if bar is not None:
                    bar.close()
            except KeyboardInterrupt:
                self.cancelled = True

    return Monitor()
