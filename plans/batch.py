"""How many rows one call of a denoiser takes: a number, or a range that one graph or engine serves."""

from __future__ import annotations

from typing import NamedTuple

from svdit.plans.errors import complain
from svdit.plans.fields import integer, integers, shown

BATCH = "batch"
"""What the first dimension of a graph's tensors is called where it is free."""


class Batch(NamedTuple):
    """Rows of a call, from `least` to `most`. As text: 2, or 1-2."""

    least: int
    most: int

    @property
    def dim(self) -> int | str:
        """The first dimension of inputs and outputs: the number, or BATCH where there is a choice."""
        return self.least if self.least == self.most else BATCH

    def cut(self, rows: int) -> list[slice]:
        """Rows as calls of at most `most`; the last one may have fewer than `least`."""
        return [slice(start, min(start + self.most, rows)) for start in range(0, rows, self.most)]

    def __str__(self) -> str:
        return str(self.least) if self.least == self.most else f"{self.least}-{self.most}"

    def to_json(self) -> int | list[int]:
        return self.least if self.least == self.most else list(self)


def batch_of(value: object, subject: str = "batch") -> Batch:
    """A number, a pair, or text such as 2 or 1-2. Raises SvditError for anything else and for an empty range."""
    if isinstance(value, str):
        parts = value.split("-")
        if len(parts) > 2 or not all(part.isdecimal() for part in parts):
            raise complain(subject, shown(value), "a number such as 2, or a range such as 1-2")
        value = [int(part) for part in parts] if len(parts) == 2 else int(parts[0])
    if not isinstance(value, (list, tuple)):
        number = integer(value, subject, low=1)
        return Batch(number, number)
    least, most = integers(value, subject, 2, low=1)
    if least > most:
        raise complain(subject, f"{least}-{most}", "a range from the smaller to the larger number")
    return Batch(least, most)
