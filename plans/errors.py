"""The one exception for user mistakes, and the one way its message is built."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Complaint:
    """The four parts of a message, kept apart so that an outer reader can put its path before the subject."""

    subject: str
    got: str
    expected: str
    hint: str = ""

    def __str__(self) -> str:
        text = f"{self.subject}: got {self.got}; expected {self.expected}"
        return f"{text}; {self.hint}" if self.hint else text


class SvditError(ValueError):
    """A mistake of the user. Command line tools print it without a trace and exit with 2."""

    def __init__(self, message: object) -> None:
        super().__init__(str(message))
        self.complaint = message if isinstance(message, Complaint) else None

    def under(self, prefix: str) -> SvditError:
        """The same mistake seen from outside: `prefix` is put before the subject."""
        if self.complaint is None:
            return SvditError(f"{prefix}{self}")
        part = self.complaint
        return SvditError(Complaint(prefix + part.subject, part.got, part.expected, part.hint))


def complain(subject: str, got: object, expected: object, hint: str = "") -> SvditError:
    """Build `subject: got X; expected Y; next step`. The caller raises what it gets back."""
    return SvditError(Complaint(subject, str(got), str(expected), hint))


@contextmanager
def rooted(prefix: str) -> Iterator[None]:
    """Put `prefix` before the subject of every SvditError that leaves the block."""
    try:
        yield
    except SvditError as error:
        raise error.under(prefix) from None
