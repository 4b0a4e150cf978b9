"""Reading and writing small files: whole or not at all, and with worded errors."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path

from svdit.plans.errors import SvditError, complain
from svdit.plans.fields import shown


def read_text(path: str | Path, what: str) -> str:
    """The UTF-8 text of a file. Raises SvditError when there is none; `what` says what it should hold."""
    try:
        return Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        raise complain(str(path), "bytes that are not UTF-8", f"{what} as UTF-8 text") from None
    except OSError as error:
        raise unusable(path, error, what) from None


def read_json(path: Path, what: str) -> dict:
    """The JSON object in a file; `what` says what it should hold."""
    value = parse_json(read_text(path, what), str(path))
    if not isinstance(value, dict):
        raise complain(str(path), shown(value), f"{what}: one JSON object")
    return value


def write_atomic(path: str | Path, data: str | bytes) -> None:
    """Write beside the target, then rename: a reader sees the old file or the new one, never a part."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data.encode("utf-8") if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise unusable(path, error, "a place that can be written") from None
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def unusable(path: str | Path, error: OSError, expected: str) -> SvditError:
    """What the operating system said about `path`, as a worded error."""
    return complain(str(path), (error.strerror or str(error)).lower(), expected)


def parse_json(text: str, source: str) -> object:
    """JSON with the two things that Python lets pass refused: repeated keys, NaN and Infinity."""
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except SvditError as error:
        raise error.under(source) from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise complain(source, f"{error.msg.lower()} ({where})", "one JSON object") from None
    except RecursionError:
        raise complain(source, "lists or objects nested too deeply", "one JSON object") from None
    except ValueError:  # Python refuses to convert integers of more than 4300 digits
        raise complain(source, "a number with thousands of digits", "one JSON object") from None


def _unique(pairs: list[tuple[str, object]]) -> dict:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise complain("", f"the key {json.dumps(repeated)} twice in one object", "each key once")
    return result


def _no_constant(name: str) -> object:
    raise complain("", name, "finite numbers")
