"""What the commands of this package share: exit codes, options, prompts, JSON files."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import click

from svdit.plans.errors import SvditError, complain
from svdit.plans.files import read_text, write_atomic

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


def prompt_options(command: F) -> F:
    """--prompt (repeatable) and --prompts FILE."""
    command = click.option(
        "--prompts",
        "prompts_file",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Text file with one prompt a line; empty lines and lines that start with # are skipped.",
    )(command)
    return click.option("--prompt", "prompt", multiple=True, metavar="TEXT", help="A prompt; may be repeated.")(command)


def collect_prompts(prompt: tuple[str, ...], prompts_file: Path | None) -> tuple[str, ...]:
    """Prompts of both options, those of the command line first. May be empty; an empty file is an error."""
    if prompts_file is None:
        return prompt
    lines = [line.strip() for line in read_text(prompts_file, "a text file of prompts").splitlines()]
    found = tuple(line for line in lines if line and not line.startswith("#"))
    if not found:
        raise complain(f"{prompts_file}", "no prompts", "one prompt a line")
    return (*prompt, *found)


def json_option(command: F) -> F:
    """--json FILE."""
    return click.option(
        "--json",
        "json_file",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Write the figures to FILE as JSON.",
    )(command)


def write_json(path: Path, figures: dict[str, object]) -> None:
    """Write figures atomically, indented, keys in the given order."""
    write_atomic(path, json.dumps(figures, indent=2, allow_nan=False) + "\n")
