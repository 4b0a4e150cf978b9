# ruff: noqa: E501 (a message stays on one line)
"""Malformed plans: what is wrong, and the field, the value and the expectation that the message must name.

`GOOD` is a valid plan; each entry of `MALFORMED` changes it (or gives the text outright) and holds the
whole message, which follows the name of the file.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable

GOOD: dict = {
    "format": "svdit-plan",
    "version": 1,
    "model": "tiny",
    "geometry": {
        "grid": [3, 4, 6],
        "text_tokens": 5,
        "text_position": "after",
        "layers": 2,
        "heads": 3,
        "head_dim": 64,
    },
    "tile": [1, 2, 3],
    "patterns": {
        "d": {"kind": "diagonal", "frames": 1},
        "m": {"kind": "multi_diagonal", "stride": 2},
        "s": {"kind": "stripe", "columns": [[0, 2]]},
        "u": {"kind": "union", "members": [{"kind": "diagonal"}, {"kind": "stripe", "columns": [[3, 4]]}]},
        "t": {"kind": "tiles", "rows": [[[0, 12]]] * 12},
    },
    "stages": [
        {"until": 0.25, "layers": [["full", "full", "full"], ["d", "m", "s"]]},
        {"until": 1.0, "layers": [["d", "m", "skip"], ["u", "t", "full"]]},
    ],
    "provenance": {"method": "template"},
}

DELETE = object()


def changed(*path, to) -> Callable[[], str]:
    """The text of GOOD with the value at `path` replaced (or deleted)."""

    def text() -> str:
        data = copy.deepcopy(GOOD)
        target = data
        for key in path[:-1]:
            target = target[key]
        if to is DELETE:
            del target[path[-1]]
        else:
            target[path[-1]] = to
        return json.dumps(data)

    return text


def replaced(old: str, new: str) -> Callable[[], str]:
    """The text of GOOD with one piece of it replaced, for what `json` would not write."""

    def text() -> str:
        whole = json.dumps(GOOD)
        assert whole.count(old) == 1, old
        return whole.replace(old, new)

    return text


D, M, S, U, T = (("patterns", name) for name in "dmsut")
GEO = "geometry"

MALFORMED: dict[str, tuple[Callable[[], str], str]] = {
    # the file as a whole
    "empty": (lambda: "", "$: got expecting value (line 1 column 1); expected one JSON object"),
    "cut": (
        lambda: json.dumps(GOOD)[:100],
        "$: got unterminated string starting at (line 1 column 89); expected one JSON object",
    ),
    "not-json": (lambda: "plan: 1", "$: got expecting value (line 1 column 1); expected one JSON object"),
    "list": (lambda: "[1]", "$: got [1]; expected a svdit-plan object"),
    "deep": (lambda: "[" * 200000, "$: got lists or objects nested too deeply; expected one JSON object"),
    "long-number": (
        replaced('"version": 1', '"version": 1' + "0" * 5000),
        "$: got a number with thousands of digits; expected one JSON object",
    ),
    "key-twice": (
        replaced('"version": 1', '"version": 1, "version": 1'),
        '$: got the key "version" twice in one object; expected each key once',
    ),
    "nan": (replaced("0.25", "NaN"), "$: got NaN; expected finite numbers"),
    "infinity": (replaced("0.25", "-Infinity"), "$: got -Infinity; expected finite numbers"),
    "overflow": (replaced("0.25", "1e999"), "$.stages[0].until: got inf; expected a number above 0 and at most 1"),
    # top level
    "format": (changed("format", to="svdit-bundle"), '$.format: got "svdit-bundle"; expected "svdit-plan"'),
    "no-format": (changed("format", to=DELETE), '$.format: got nothing; expected "svdit-plan"'),
    "version-2": (changed("version", to=2), "$.version: got 2; expected 1; use the release that wrote the plan"),
    "version-text": (changed("version", to="1"), '$.version: got "1"; expected 1; use the release that wrote the plan'),
    "version-true": (
        changed("version", to=True),
        "$.version: got true; expected 1; use the release that wrote the plan",
    ),
    "version-float": (
        changed("version", to=1.0),
        "$.version: got 1.0; expected 1; use the release that wrote the plan",
    ),
    "unknown-key": (
        changed("tiles", to=[1, 8, 16]),
        "$.tiles: got an unknown key; expected one of format, version, model, geometry, tile, patterns, stages, provenance",
    ),
    "no-model": (changed("model", to=DELETE), "$.model: got nothing; expected a value; the key is required"),
    "empty-model": (changed("model", to=""), '$.model: got ""; expected a non-empty string'),
    "model-number": (changed("model", to=7), "$.model: got 7; expected a non-empty string"),
    # geometry
    "geometry-list": (
        changed(GEO, to=[3, 4, 6]),
        "$.geometry: got [3, 4, 6]; expected an object with the keys grid, text_tokens, text_position, layers, heads, head_dim",
    ),
    "geometry-key": (
        changed(GEO, "frames", to=3),
        "$.geometry.frames: got an unknown key; expected one of grid, text_tokens, text_position, layers, heads, head_dim",
    ),
    "geometry-missing": (
        changed(GEO, "heads", to=DELETE),
        "$.geometry.heads: got nothing; expected a value; the key is required",
    ),
    "grid-short": (changed(GEO, "grid", to=[3, 4]), "$.geometry.grid: got 2 entries; expected a list of 3 integers"),
    "grid-zero": (changed(GEO, "grid", to=[3, 0, 6]), "$.geometry.grid[1]: got 0; expected an integer of at least 1"),
    "grid-float": (
        changed(GEO, "grid", to=[3, 4.0, 6]),
        "$.geometry.grid[1]: got 4.0; expected an integer of at least 1",
    ),
    "grid-huge": (
        changed(GEO, "grid", to=[60000, 60000, 1]),
        "$.geometry.grid: got 3600000005 tokens; expected at most 2147483647 tokens",
    ),
    "text-negative": (
        changed(GEO, "text_tokens", to=-1),
        "$.geometry.text_tokens: got -1; expected an integer of at least 0",
    ),
    "text-bool": (
        changed(GEO, "text_tokens", to=True),
        "$.geometry.text_tokens: got true; expected an integer of at least 0",
    ),
    "text-place": (
        changed(GEO, "text_position", to="middle"),
        '$.geometry.text_position: got "middle"; expected one of before, after, none',
    ),
    "text-none": (
        changed(GEO, "text_position", to="none"),
        '$.geometry.text_position: got "none" with 5 text tokens; expected "none" with 0 text tokens, "before" or "after" with more',
    ),
    "no-text": (
        changed(GEO, "text_tokens", to=0),
        '$.geometry.text_position: got "after" with 0 text tokens; expected "none" with 0 text tokens, "before" or "after" with more',
    ),
    "heads-zero": (changed(GEO, "heads", to=0), "$.geometry.heads: got 0; expected an integer from 1 to 32767"),
    "heads-many": (changed(GEO, "heads", to=40000), "$.geometry.heads: got 40000; expected an integer from 1 to 32767"),
    "heads-text": (changed(GEO, "heads", to="3"), '$.geometry.heads: got "3"; expected an integer from 1 to 32767'),
    "head-dim": (changed(GEO, "head_dim", to=None), "$.geometry.head_dim: got null; expected an integer of at least 1"),
    # tile
    "tile-large": (changed("tile", to=[2, 8, 9]), "$.tile: got 2 x 8 x 9 = 144 tokens; expected at most 128 tokens"),
    "tile-short": (changed("tile", to=[8, 16]), "$.tile: got 2 entries; expected a list of 3 integers"),
    "tile-zero": (changed("tile", to=[1, 2, 0]), "$.tile[2]: got 0; expected an integer of at least 1"),
    "tile-number": (changed("tile", to=128), "$.tile: got 128; expected a list of 3 integers"),
    "tiles-many": (
        changed(GEO, "grid", to=[1000, 20, 30]),
        "$.tile: got 100001 tiles of 1 x 2 x 3; expected at most 65536; use a larger tile",
    ),
    # patterns
    "patterns-list": (changed("patterns", to=[]), "$.patterns: got []; expected an object of named patterns"),
    "name-empty": (
        changed("patterns", "", to=GOOD["patterns"]["d"]),
        '$.patterns: got the name ""; expected up to 64 of the characters A-Z a-z 0-9 _ . : + -, the first a letter, digit or _',
    ),
    "name-space": (
        changed("patterns", "a b", to={"kind": "diagonal"}),
        '$.patterns: got the name "a b"; expected up to 64 of the characters A-Z a-z 0-9 _ . : + -, the first a letter, digit or _',
    ),
    "name-full": (
        changed("patterns", "full", to={"kind": "diagonal"}),
        "$.patterns.full: got a definition of a built-in name; expected another name",
    ),
    "name-skip": (
        changed("patterns", "skip", to={"kind": "skip"}),
        "$.patterns.skip: got a definition of a built-in name; expected another name",
    ),
    "pattern-text": (changed(*D, to="diagonal"), '$.patterns.d: got "diagonal"; expected an object with a "kind"'),
    "kind-missing": (
        changed(*D, "kind", to=DELETE),
        '$.patterns.d: got {"frames": 1}; expected an object with a "kind"',
    ),
    "kind-unknown": (
        changed(*D, "kind", to="band"),
        '$.patterns.d.kind: got "band"; expected one of full, skip, diagonal, multi_diagonal, stripe, union, tiles',
    ),
    "kind-list": (
        changed(*D, "kind", to=["diagonal"]),
        '$.patterns.d.kind: got ["diagonal"]; expected one of full, skip, diagonal, multi_diagonal, stripe, union, tiles',
    ),
    "key-of-other-kind": (
        changed(*D, "stride", to=2),
        "$.patterns.d.stride: got an unknown key; expected one of kind, frames, rows, cols, offset, cell, clamp",
    ),
    "full-with-key": (
        changed(*D, to={"kind": "full", "rows": 1}),
        "$.patterns.d.rows: got an unknown key; expected one of kind",
    ),
    "frames-bool": (changed(*D, "frames", to=True), "$.patterns.d.frames: got true; expected an integer of at least 0"),
    "frames-all": (changed(*D, "frames", to=None), "$.patterns.d.frames: got null; expected an integer of at least 0"),
    "frames-huge": (
        changed(*D, "frames", to=10**30),
        "$.patterns.d.frames: got a huge integer; expected an integer of at least 0",
    ),
    "rows-word": (
        changed(*D, "rows", to="all"),
        '$.patterns.d.rows: got "all"; expected an integer of at least 0; null keeps the whole axis',
    ),
    "cols-negative": (
        changed(*M, "cols", to=-1),
        "$.patterns.m.cols: got -1; expected an integer of at least 0; null keeps the whole axis",
    ),
    "stride-zero": (changed(*M, "stride", to=0), "$.patterns.m.stride: got 0; expected an integer of at least 1"),
    "offset-negative": (changed(*M, "offset", to=-1), "$.patterns.m.offset: got -1; expected an integer of at least 0"),
    "cell-short": (changed(*M, "cell", to=[1]), "$.patterns.m.cell: got 1 entries; expected a list of 3 integers"),
    "cell-zero": (changed(*M, "cell", to=[1, 0, 1]), "$.patterns.m.cell[1]: got 0; expected an integer of at least 1"),
    "clamp-number": (changed(*D, "clamp", to=1), "$.patterns.d.clamp: got 1; expected true or false"),
    "clamp-stride": (
        changed(*M, "clamp", to=True),
        "$.patterns.m.clamp: got true with stride 2; expected no stride beside clamp; drop one",
    ),
    "clamp-offset": (
        changed(*D, to={"kind": "diagonal", "clamp": True, "offset": 1}),
        "$.patterns.d.clamp: got true with offset 1; expected no offset beside clamp; drop one",
    ),
    "columns-missing": (
        changed(*S, "columns", to=DELETE),
        "$.patterns.s.columns: got nothing; expected a value; the key is required",
    ),
    "columns-flat": (
        changed(*S, "columns", to=[0, 2]),
        "$.patterns.s.columns[0]: got 0; expected a list of 2 integers",
    ),
    "columns-empty-range": (
        changed(*S, "columns", to=[[2, 2]]),
        "$.patterns.s.columns[0]: got [2, 2]; expected start below stop; stop itself is outside",
    ),
    "columns-outside": (
        changed(*S, "columns", to=[[0, 2], [11, 13]]),
        "$.patterns.s.columns[1]: got [11, 13]; expected a range within the 12 video tiles",
    ),
    "columns-text-tile": (
        changed(*S, "columns", to=[[12, 13]]),
        "$.patterns.s.columns[0]: got [12, 13]; expected a range within the 12 video tiles",
    ),
    "members-empty": (
        changed(*U, "members", to=[]),
        "$.patterns.u.members: got an empty list; expected at least one pattern",
    ),
    "members-name": (
        changed(*U, "members", to=["d"]),
        '$.patterns.u.members[0]: got "d"; expected an object with a "kind"',
    ),
    "members-skip": (
        changed(*U, "members", 0, to={"kind": "skip"}),
        "$.patterns.u.members[0]: got skip; expected a pattern other than skip",
    ),
    "member-field": (
        changed(*U, "members", 1, "frames", to=-2),
        "$.patterns.u.members[1].frames: got -2; expected an integer of at least 0",
    ),
    "member-outside": (
        changed(*U, "members", 1, "columns", to=[[0, 99]]),
        "$.patterns.u.members[1].columns[0]: got [0, 99]; expected a range within the 12 video tiles",
    ),
    "rows-count": (
        changed(*T, "rows", to=[[[0, 12]]] * 11),
        "$.patterns.t.rows: got 11 entries; expected a list of 12 range lists, one for each video tile",
    ),
    "rows-flat": (changed(*T, "rows", 3, to=[0, 12]), "$.patterns.t.rows[3][0]: got 0; expected a list of 2 integers"),
    "rows-outside": (
        changed(*T, "rows", 3, to=[[5, 13]]),
        "$.patterns.t.rows[3][0]: got [5, 13]; expected a range within the 12 video tiles",
    ),
    # stages
    "stages-empty": (changed("stages", to=[]), "$.stages: got an empty list; expected at least one stage"),
    "stages-object": (changed("stages", to={}), "$.stages: got {}; expected a list of stages"),
    "stage-key": (
        changed("stages", 0, "from", to=0),
        "$.stages[0].from: got an unknown key; expected one of until, layers",
    ),
    "until-missing": (
        changed("stages", 1, "until", to=DELETE),
        "$.stages[1].until: got nothing; expected a value; the key is required",
    ),
    "until-text": (
        changed("stages", 0, "until", to="20%"),
        '$.stages[0].until: got "20%"; expected a number above 0 and at most 1',
    ),
    "until-bool": (
        changed("stages", 1, "until", to=True),
        "$.stages[1].until: got true; expected a number above 0 and at most 1",
    ),
    "until-zero": (
        changed("stages", 0, "until", to=0),
        "$.stages[0].until: got 0.0; expected a number above 0 and at most 1",
    ),
    "until-over": (
        changed("stages", 1, "until", to=1.5),
        "$.stages[1].until: got 1.5; expected a number above 0 and at most 1",
    ),
    "until-short": (
        changed("stages", 1, "until", to=0.9),
        "$.stages[1].until: got 0.9; expected 1.0 in the last stage",
    ),
    "until-same": (
        changed("stages", 0, "until", to=1.0),
        "$.stages[1].until: got 1.0; expected more than 1.0 of the stage before",
    ),
    "until-percent": (
        changed("stages", 0, "until", to=25),
        "$.stages[0].until: got 25.0; expected a number above 0 and at most 1",
    ),
    "layers-short": (
        changed("stages", 0, "layers", to=[["full"] * 3]),
        "$.stages[0].layers: got 1 entries; expected a list of 2 rows, one for each layer",
    ),
    "layers-object": (
        changed("stages", 0, "layers", to={}),
        "$.stages[0].layers: got {}; expected a list of rows, one for each layer",
    ),
    "heads-short": (
        changed("stages", 1, "layers", 0, to=["d", "m"]),
        "$.stages[1].layers[0]: got 2 entries; expected a list of 3 pattern names, one for each head",
    ),
    "heads-string": (
        changed("stages", 1, "layers", 0, to="dms"),
        '$.stages[1].layers[0]: got "dms"; expected a list of pattern names',
    ),
    "head-unknown": (
        changed("stages", 1, "layers", 1, 2, to="d9"),
        '$.stages[1].layers[1][2]: got "d9"; expected one of full, skip, d, m, s, u, t; define it under patterns',
    ),
    "head-number": (
        changed("stages", 1, "layers", 1, 2, to=0),
        "$.stages[1].layers[1][2]: got 0; expected one of full, skip, d, m, s, u, t; define it under patterns",
    ),
    # provenance
    "provenance-list": (changed("provenance", to=[]), "$.provenance: got []; expected an object"),
    "provenance-overflow": (
        replaced('"method": "template"', '"psnr": 1e999'),
        "$.provenance.'psnr': got Out of range float values are not JSON compliant; expected JSON with finite numbers",
    ),
    "provenance-surrogate": (
        replaced('"method": "template"', '"method": "\\ud800"'),
        "$.provenance.'method': got half of a surrogate pair; expected text that UTF-8 can hold",
    ),
}
