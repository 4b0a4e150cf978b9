"""Weight files beside a graph without copying them.

ONNX external data must lie in the graph's own folder. A hard link does that for ONNX Runtime; where the file
system refuses one (another device, a file of another owner), a symbolic link is made, which ONNX Runtime reads
when it is told the folder of the weights. Libraries that refuse links altogether need a copy.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from svdit.plans.errors import complain
from svdit.plans.files import unusable

COPY_HINT = "--copy-weights copies instead"


def place_weights(files: Sequence[Path], folder: Path, copy: bool, note: Callable[[str], None]) -> list[str]:
    """Put each weight file into `folder` under its own name and return the names. Raises SvditError."""
    names: list[str] = []
    for file in files:
        if file.name in names:
            raise complain(f"weights {file}", "two files of one name", "a name for each")
        target = folder / file.name
        real = Path(os.path.realpath(file))  # hubs keep links to blobs: the blob itself is what to link to
        try:
            if copy:
                shutil.copyfile(real, target)
            else:
                _link(real, target, note)
        except OSError as error:
            raise unusable(target, error, "a place for the weights") from None
        names.append(file.name)
    return names


def _link(real: Path, target: Path, note: Callable[[str], None]) -> None:
    try:
        os.link(real, target)
        return
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
    try:
        target.symlink_to(real)
        note(f"{target.name}: no hard link ({reason}), so it is a symbolic link; {COPY_HINT}")
    except OSError:
        shutil.copyfile(real, target)
        note(f"{target.name}: no link ({reason}), so it is a copy of {real.stat().st_size} bytes")
