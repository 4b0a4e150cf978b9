"""Where compiled libraries of this package are looked for."""

from __future__ import annotations

import os
from pathlib import Path

from svdit.plans.errors import complain


def find(file_name: str, variable: str) -> Path | None:
    """The library that the environment variable names, or where CMake installs or builds it; None without one.

    Raises SvditError when the variable names no file.
    """
    named = os.environ.get(variable)
    if named:
        if not Path(named).is_file():
            raise complain(variable, named, f"the path of a built {file_name}", "or unset it")
        return Path(named)
    here = Path(__file__).resolve().parent
    places = (here / "lib" / file_name, here.parent / "build" / file_name)
    return next((place for place in places if place.is_file()), None)
