"""Small files: whole or not at all, and worded errors."""

from __future__ import annotations

import os

import pytest

from svdit.plans.errors import SvditError
from svdit.plans.files import parse_json, read_text, write_atomic


def test_writing_replaces_the_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    write_atomic(path, "one")
    write_atomic(path, b"two\r\n")
    assert path.read_bytes() == b"two\r\n"
    assert read_text(path, "text") == "two\r\n"  # line ends are kept: files are hashed
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_atomic(path, "old")

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(SvditError, match=r"a.json: got no space left on device; expected a place that can be written"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_an_interrupted_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_atomic(path, "old")

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_places_that_cannot_be_written_are_named(tmp_path):
    with pytest.raises(SvditError, match=r"none/a.json: got no such file or directory; expected a place"):
        write_atomic(tmp_path / "none" / "a.json", "x")
    with pytest.raises(SvditError, match=r"got is a directory; expected a place that can be written"):
        write_atomic(tmp_path, "x")
    assert os.listdir(tmp_path) == []


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(SvditError, match=r"a.json: got no such file or directory; expected a plan"):
        read_text(tmp_path / "a.json", "a plan")
    (tmp_path / "b.json").write_bytes(b"\xff\xfe")
    with pytest.raises(SvditError, match=r"b.json: got bytes that are not UTF-8; expected a plan as UTF-8 text"):
        read_text(tmp_path / "b.json", "a plan")


def test_ordinary_json_is_json():
    assert parse_json('{"a": [1, 2.5, null, "x"]}', "here") == {"a": [1, 2.5, None, "x"]}
