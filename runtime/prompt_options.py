"""--prompt and --prompts, as the commands of this package share them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from svdit.plans.errors import complain
from svdit.plans.files import read_text

F = TypeVar("F", bound=Callable[..., Any])


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
