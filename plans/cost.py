"""What a denoiser pass with a plan costs, from the latency table of a GPU or CPU (docs/search.md).

The time of an attention layer is `launch + sum over heads (item + pair * density + gather * gathered)`; a head that
skips costs nothing. `gathered` counts the keys that are fetched for each list of key tiles, as the portable graphs do.
The terms are fitted to the rows of the table that have the model's head size. Where there is none, a share of the peak
rate takes their place, and the result says that it is an estimate. Times are milliseconds of one pass at batch 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np

from svdit.plans.errors import complain
from svdit.plans.fields import array, header, integer, number, record, shown, string
from svdit.plans.files import parse_json, read_text
from svdit.plans.flops import MATRIX_WEIGHTS
from svdit.plans.geometry import Geometry
from svdit.plans.numbers import significant
from svdit.plans.tiles import Tiling

FORMAT = "svdit-hardware"
VERSION = 1
ATTENTION_SHARE = 0.6
"""Part of the peak rate that an attention head size without measurements is assumed to reach."""
MATRIX_SHARE = 0.7
"""Part of the peak rate that the matrix products outside attention are assumed to reach."""
REACH = 2.0
"""How far beyond the measured token counts a fit still counts as measured."""
TILE = 128
ROW_KEYS = ("case", "batch", "tokens", "heads", "head_dim", "density", "latency_ms")


@dataclass(frozen=True)
class Row:
    """One timed attention layer: `density` kept of all batch * heads * tokens^2 pairs.

    `gathered` (see `gathered_keys`) is the mean over its heads; None where the table does not say.
    """

    batch: int
    tokens: int
    heads: int
    head_dim: int
    density: float
    latency_ms: float
    gathered: float | None = None

    @property
    def work(self) -> float:
        """Floating point operations of the kept pairs."""
        return 4.0 * self.batch * self.heads * self.head_dim * self.tokens**2 * self.density

    @property
    def items(self) -> int:
        """Query blocks of 128 rows over all heads."""
        return self.batch * self.heads * -(-self.tokens // TILE)

    @property
    def fetched(self) -> float:
        """Numbers gathered from keys and values."""
        return 2.0 * self.batch * self.heads * self.head_dim * self.tokens * (self.gathered or 0.0)


@dataclass(frozen=True)
class Hardware:
    """A latency table. `peak_tflops` is quoted from the maker (None: not known); `rest` is measured or empty.

    rest   ms of one pass at batch 1 outside attention, by (model, tokens)
    """

    name: str
    rows: tuple[Row, ...]
    peak_tflops: float | None
    rest: dict[tuple[str, int], float]


@dataclass(frozen=True)
class CostModel:
    """Terms of one geometry on one machine, and where they come from: "measured", "extrapolated" or "roofline".

    launch_ms  once a layer;  item_ms: a head that does not skip;  pair_ms: a full head's pairs
    gather_ms  a head that gathers each key once
    rest_ms    everything outside attention, one pass; None where the model's products are not known
    residual   largest relative difference between the fit and its own rows
    """

    hardware: str
    layers: int
    heads: int
    launch_ms: float
    item_ms: float
    pair_ms: float
    rest_ms: float | None
    attention_basis: str
    rest_basis: str
    residual: float
    gather_ms: float = 0.0

    @property
    def estimated(self) -> bool:
        """Whether anything but measurements of this size went into it."""
        return {self.attention_basis, self.rest_basis} - {"none"} != {"measured"}

    def heads_ms(self, density: np.ndarray, gathered: np.ndarray | float = 1.0) -> np.ndarray:
        """Time of heads of these densities and gathered keys (any shape), the layer's launch left out."""
        density = np.asarray(density, dtype=np.float64)
        return np.where(density > 0, self.item_ms + self.pair_ms * density + self.gather_ms * gathered, 0.0)

    @property
    def fixed_ms(self) -> float:
        """What no plan changes: launches and everything outside attention."""
        return self.layers * self.launch_ms + (self.rest_ms or 0.0)

    @property
    def dense_ms(self) -> float:
        """One pass with dense attention."""
        return self.fixed_ms + self.layers * self.heads * (self.item_ms + self.pair_ms + self.gather_ms)

    def record(self) -> dict[str, object]:
        """What a plan's provenance says about the model."""
        return {
            "hardware": self.hardware,
            "estimated": self.estimated,
            "attention": self.attention_basis,
            "outside_attention": self.rest_basis,
            "fit_residual": significant(self.residual, 3),
        }


def hardware_names() -> list[str]:
    """Tables that are shipped: names that `read_hardware` takes."""
    return sorted(f.name.removesuffix(".json") for f in files("svdit.plans").joinpath("hardware").iterdir())


def read_hardware(name: str | Path) -> Hardware:
    """A shipped table by name ("h100") or any file. Raises SvditError naming the field that is wrong."""
    path = Path(name)
    if str(name) in hardware_names():
        path = Path(str(files("svdit.plans").joinpath("hardware", f"{name}.json")))
    elif not path.exists():
        raise complain("hardware", repr(str(name)), f"{', '.join(hardware_names())} or a file", "see docs/search.md")
    data = parse_json(read_text(path, "a latency table"), str(path))
    header(data, f"{path}: $", FORMAT, VERSION, "measure again with this release")
    data = record(data, f"{path}: $", ["format", "version", "gpu", "status", "how", "attention"], ["peak", "rest"])
    rows = tuple(_row(row, f"{path}: $.attention[{i}]") for i, row in enumerate(_objects(data, "attention", path)))
    peak = None
    if "peak" in data:
        found = record(data["peak"], f"{path}: $.peak", ["tflops", "source"])
        peak = _positive(found["tflops"], f"{path}: $.peak.tflops")
    rest = {}
    for i, entry in enumerate(_objects(data, "rest", path)):
        where = f"{path}: $.rest[{i}]"
        found = record(entry, where, ["model", "tokens", "rest_ms"])
        key = (string(found["model"], f"{where}.model"), integer(found["tokens"], f"{where}.tokens", 1))
        rest[key] = _positive(found["rest_ms"], f"{where}.rest_ms")
    return Hardware(string(data["gpu"], f"{path}: $.gpu"), rows, peak, rest)


def cost_model(hardware: Hardware, model: str, geometry: Geometry) -> CostModel:
    """Fit the terms for one geometry. Raises SvditError where the table has neither rows nor a peak rate for it."""
    rows = [row for row in hardware.rows if row.head_dim == geometry.head_dim]
    work = 4.0 * geometry.tokens**2 * geometry.head_dim
    if rows:
        launch, item, rate, gather, residual = _fit(rows)
        tokens = [row.tokens for row in rows]
        near = min(tokens) / REACH <= geometry.tokens <= max(tokens) * REACH
        basis = "measured" if near else "extrapolated"
    elif hardware.peak_tflops is not None:
        launch, item, rate, gather, residual = 0.0, 0.0, 1.0 / (hardware.peak_tflops * 1e9 * ATTENTION_SHARE), 0.0, 0.0
        basis = "roofline"
    else:
        known = ", ".join(sorted({str(row.head_dim) for row in hardware.rows})) or "none"
        raise complain("hardware", f"{hardware.name} with rows for head_dim {known}", f"{geometry.head_dim}, or a peak")
    rest, rest_basis = _rest(hardware, model, geometry)
    return CostModel(
        hardware=hardware.name,
        layers=geometry.layers,
        heads=geometry.heads,
        launch_ms=launch,
        item_ms=item * -(-geometry.tokens // TILE),
        pair_ms=work * rate,
        rest_ms=rest,
        attention_basis=basis,
        rest_basis=rest_basis,
        residual=residual,
        gather_ms=2.0 * geometry.tokens * geometry.head_dim * gather,
    )


def gathered_keys(tiling: Tiling, mask: np.ndarray) -> float:
    """Keys fetched by a bool [nT, nT] mask when query tiles with equal lists share theirs, over the N tokens."""
    lists = np.unique(np.packbits(mask, axis=1), axis=0)
    kept = np.unpackbits(lists, axis=1, count=mask.shape[1])
    return float((kept * tiling.sizes.astype(np.int64)).sum()) / tiling.geometry.tokens


def _rest(hardware: Hardware, model: str, geometry: Geometry) -> tuple[float | None, str]:
    """Milliseconds outside attention and where they come from; (None, "none") where nothing is known."""
    measured = hardware.rest.get((model, geometry.tokens))
    if measured is not None:
        return measured, "measured"
    weights = MATRIX_WEIGHTS.get(model)
    if weights is None or hardware.peak_tflops is None:
        return None, "none"
    operations = 2.0 * geometry.tokens * weights * (geometry.heads * geometry.head_dim) ** 2 * geometry.layers
    return operations / (hardware.peak_tflops * 1e9 * MATRIX_SHARE), "roofline"


def _fit(rows: list[Row]) -> tuple[float, float, float, float, float]:
    """(ms a launch, a query block, a floating point operation, a number gathered; largest relative residual).

    Least squares of relative errors, no term negative. A constant term needs rows whose work differs fourfold, and
    more rows than terms; the terms by query blocks and by numbers gathered need the same of those.
    """
    from scipy.optimize import nnls

    time = np.array([row.latency_ms for row in rows])
    columns = {"work": np.array([row.work for row in rows])}
    more = {
        "launch": np.ones(len(rows)),
        "items": np.array([float(row.items) for row in rows]),
        "gather": np.array([row.fetched for row in rows]),
    }
    for name, values in more.items():
        spread = columns["work"] if name == "launch" else values
        if len(rows) > len(columns) + 1 and spread.max() >= 4 * spread.min() > 0:
            columns[name] = values
    scale = {name: values.max() for name, values in columns.items()}
    matrix = np.stack([values / scale[name] / time for name, values in columns.items()], axis=1)
    found = nnls(matrix, np.ones(len(rows)))[0]
    terms = {name: x / scale[name] for name, x in zip(columns, found, strict=True)}
    residual = float(np.abs(matrix @ found - 1).max())
    return *(float(terms.get(name, 0.0)) for name in ("launch", "items", "work", "gather")), residual


def _row(value: object, where: str) -> Row:
    if not isinstance(value, dict):
        raise complain(where, shown(value), "an object with the keys " + ", ".join(ROW_KEYS))
    for key in ROW_KEYS:
        if key not in value:
            raise complain(f"{where}.{key}", "nothing", "a value", "the key is required")
    counts = [integer(value[key], f"{where}.{key}", 1) for key in ("batch", "tokens", "heads", "head_dim")]
    density = _positive(value["density"], f"{where}.density")
    latency = _positive(value["latency_ms"], f"{where}.latency_ms")
    gathered = _positive(value["gathered"], f"{where}.gathered") if "gathered" in value else None
    return Row(*counts, density, latency, gathered)


def _objects(data: dict, key: str, path: Path) -> list[dict]:
    return list(array(data.get(key, []), f"{path}: $.{key}", "objects"))


def _positive(value: object, where: str) -> float:
    found = number(value, where, "a number above 0")
    if found <= 0:
        raise complain(where, found, "a number above 0")
    return found
