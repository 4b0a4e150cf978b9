"""Order between torch's streams, on stand-ins that write down who waits for whom."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from svdit.runtime import cuda


class Stream:
    device = "cuda:1"

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def log(monkeypatch) -> list[str]:
    lines: list[str] = []

    @contextmanager
    def current(stream):
        lines.append(f"{stream.name} is torch's")
        yield
        lines.append("as before")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(f"the caller of {device}", lines))
    monkeypatch.setattr(torch.cuda, "stream", current)
    return lines


def test_a_stream_follows_the_caller_and_the_caller_follows_it(log):
    with cuda.in_order(Stream("own", log)):
        log.append("work")
    assert log == [
        "own waits for the caller of cuda:1",
        *["own is torch's", "work", "as before"],
        "the caller of cuda:1 waits for own",
    ]


def test_the_caller_follows_what_was_begun_before_a_failure(log):
    with pytest.raises(RuntimeError, match="launch"), cuda.in_order(Stream("own", log)):
        raise RuntimeError("launch")
    assert log[-1] == "the caller of cuda:1 waits for own"
