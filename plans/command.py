"""What every command line tool shares: how a mistake ends, and `--json`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import click

from svdit.plans.errors import SvditError
from svdit.plans.files import write_atomic

F = TypeVar("F", bound=Callable[..., Any])


def reports_mistakes(command: F) -> F:
    """A user's mistake is one message on stderr and exit code 2, without a trace."""

    @wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except SvditError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(2)

    return guarded  # type: ignore[return-value]


def json_option(command: F) -> F:
    """--json FILE."""
    return click.option(
        "--json",
        "json_file",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Write the figures to FILE as JSON.",
    )(command)


def write_json(path: Path | None, figures: Mapping[str, object]) -> None:
    """Write figures atomically, indented, keys in the given order; nothing when there is no path."""
    if path is not None:
        write_atomic(path, json.dumps(figures, indent=2, allow_nan=False) + "\n")
