"""Progress bars: always on stderr, silent when it is not worth one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")


def progress(
    items: Sequence[T] | Iterable[T],
    label: str,
    unit: str,
    *,
    show: bool = True,
    total: int | None = None,
    initial: int = 0,
) -> Any:
    """Iterate with a bar labelled `label`; returns the tqdm object, so set_postfix works on it."""
    return tqdm(
        items, desc=label, unit=unit, disable=not show, total=total, initial=initial, leave=True, dynamic_ncols=True
    )
