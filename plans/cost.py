"""What a denoiser pass with a plan costs, from the latency table of a GPU or CPU (docs/search.md).

The time of an attention layer is a launch and a sum over heads; a head that skips costs nothing. Terms of a head are
its query blocks and kept pairs, for the portable graphs the lists of key tiles and the keys fetched for them, for the
CUDA kernel its items, steps, slices and listed slices (`plans.kernel_work`) in place of blocks and pairs.
The terms are fitted to the rows of the table that have the model's head size. Where there is none, a share of the peak
rate takes their place, and the result says that it is an estimate. Times are milliseconds of one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np

from svdit.plans.errors import complain
from svdit.plans.fields import array, header, integer, number, record, shown, string
from svdit.plans.files import parse_json, read_text
from svdit.plans.flops import MATRIX_WEIGHTS
from svdit.plans.geometry import Geometry
from svdit.plans.kernel_work import kernel_work
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
APART = 1.25
"""How far steps and slices must differ among the rows for both to have a price."""
TILE = 128
ROW_KEYS = ("case", "batch", "tokens", "heads", "head_dim", "density", "latency_ms")
COUNTS = ("items", "steps", "slices", "listed")
"""What `plans.kernel_work` counts."""
ROW_OPTIONAL = ("gathered", "lists", *COUNTS)


@dataclass(frozen=True, eq=False)
class HeadWork:
    """What heads ask of a machine: numbers or arrays of one shape.

    density   kept share of the query-key pairs; 0: the head skips
    gathered  keys fetched, over the N tokens, and
    lists     for how many lists of key tiles (`key_lists`)
    items, steps, slices, listed  of the kernel, as `plans.kernel_work` counts them; None: as density
    """

    density: np.ndarray | float
    gathered: np.ndarray | float = 1.0
    items: np.ndarray | float = 1.0
    steps: np.ndarray | float | None = None
    slices: np.ndarray | float | None = None
    listed: np.ndarray | float | None = None
    lists: np.ndarray | float = 1.0


@dataclass(frozen=True)
class Row:
    """One timed attention layer: `density` kept of all batch * heads * tokens^2 pairs.

    gathered, items to listed, and lists, as in HeadWork, are means over its heads; None where the table does not say.
    """

    batch: int
    tokens: int
    heads: int
    head_dim: int
    density: float
    latency_ms: float
    gathered: float | None = None
    items: float | None = None
    steps: float | None = None
    slices: float | None = None
    listed: float | None = None
    lists: float | None = None

    @property
    def blocks(self) -> float:
        """Query blocks of 128 rows over all heads."""
        return self.batch * self.heads * self.tokens / TILE

    def pairs(self, share: float) -> float:
        """Floating point operations of a share of all pairs."""
        return 4.0 * self.batch * self.heads * self.head_dim * self.tokens**2 * share

    @property
    def fetched(self) -> float:
        """Numbers gathered from keys and values."""
        return 2.0 * self.batch * self.heads * self.head_dim * self.tokens * (self.gathered or 0.0)

    @property
    def key_lists(self) -> float:
        """Lists of key tiles over all heads."""
        return self.batch * self.heads * (self.lists or 0.0)


@dataclass(frozen=True)
class Hardware:
    """A latency table. `peak_tflops` is quoted from the maker (None: not known); `rest` is measured or empty.

    rest   ms of one pass at batch 1 outside attention, by (model, tokens)
    dense  ms of one such pass with the dense attention that plans are compared with, where it is another
           implementation than that of a plan's full heads
    """

    name: str
    rows: tuple[Row, ...]
    peak_tflops: float | None
    rest: dict[tuple[str, int], float]
    dense: dict[tuple[str, int], float]


@dataclass(frozen=True)
class CostModel:
    """Terms of one geometry on one machine, and where they come from: "measured", "extrapolated" or "roofline".

    batch      rows of a pass; all times are those of a pass, of a head or layer in all its rows
    launch_ms  once a layer
    item_ms    a head's query blocks;  pair_ms: its pairs if it is full
    gather_ms  a head gathers each key once;  list_ms: for one list
    step_ms, slice_ms, listed_ms  a head of N / 128 items in 1 as many steps, of 2 slices each
    rest_ms    everything outside attention, one pass; None where the model's products are not known
    residual   largest relative difference between the fit and its own rows
    dense_pass_ms  one pass with dense attention, as measured; None: as modelled
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
    step_ms: float = 0.0
    slice_ms: float = 0.0
    listed_ms: float = 0.0
    list_ms: float = 0.0
    batch: int = 1
    full: HeadWork = HeadWork(1.0)
    dense_pass_ms: float | None = None

    @property
    def estimated(self) -> bool:
        """Whether anything but measurements of this size went into it."""
        return {self.attention_basis, self.rest_basis} - {"none"} != {"measured"}

    @property
    def counts_kernel_work(self) -> bool:
        """Whether times depend on `plans.kernel_work`."""
        return bool(self.step_ms or self.slice_ms or self.listed_ms)

    @property
    def counts_density_alone(self) -> bool:
        """Whether two heads of one density always take the same time."""
        return not (self.gather_ms or self.list_ms or self.counts_kernel_work)

    def heads_ms(self, work: HeadWork) -> np.ndarray:
        """Time of heads, the layer's launch left out."""
        density = np.asarray(work.density, dtype=np.float64)
        time = self.item_ms * work.items + self.pair_ms * density
        time = time + self.gather_ms * work.gathered + self.list_ms * work.lists
        for price, count in (
            (self.step_ms, work.steps), (self.slice_ms, work.slices), (self.listed_ms, work.listed),
        ):  # fmt: skip
            time = time + price * (density if count is None else count)
        return np.where(density > 0, time, 0.0)

    @property
    def fixed_ms(self) -> float:
        """What no plan changes: launches and everything outside attention."""
        return self.layers * self.launch_ms + (self.rest_ms or 0.0)

    @property
    def dense_ms(self) -> float:
        """One pass with dense attention."""
        if self.dense_pass_ms is not None:
            return self.dense_pass_ms
        return self.fixed_ms + self.layers * self.heads * float(self.heads_ms(self.full))

    def record(self) -> dict[str, object]:
        """What a plan's provenance says about the model."""
        return {
            "hardware": self.hardware,
            "batch": self.batch,
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
    rest, dense = {}, {}
    for i, entry in enumerate(_objects(data, "rest", path)):
        where = f"{path}: $.rest[{i}]"
        found = record(entry, where, ["model", "tokens", "rest_ms"], ["dense_ms"])
        key = (string(found["model"], f"{where}.model"), integer(found["tokens"], f"{where}.tokens", 1))
        rest[key] = _positive(found["rest_ms"], f"{where}.rest_ms")
        if "dense_ms" in found:
            dense[key] = _positive(found["dense_ms"], f"{where}.dense_ms")
    return Hardware(string(data["gpu"], f"{path}: $.gpu"), rows, peak, rest, dense)


def cost_model(hardware: Hardware, model: str, geometry: Geometry, batch: int = 1) -> CostModel:
    """Fit the terms for one geometry and passes of `batch` rows.

    Raises SvditError where the table has neither rows nor a peak rate for it, or for a batch below 1.
    """
    integer(batch, "batch", 1)
    rows = [row for row in hardware.rows if row.head_dim == geometry.head_dim]
    one = Row(batch, geometry.tokens, 1, geometry.head_dim, 1.0, 1.0, gathered=1.0, lists=1.0)
    residual = 0.0
    if rows:
        prices, residual = _fit(rows)
        tokens = [row.tokens for row in rows]
        near = min(tokens) / REACH <= geometry.tokens <= max(tokens) * REACH
        basis = "measured" if near else "extrapolated"
    elif hardware.peak_tflops is not None:
        prices, basis = {"pairs": 1.0 / (hardware.peak_tflops * 1e9 * ATTENTION_SHARE)}, "roofline"
    else:
        known = ", ".join(sorted({str(row.head_dim) for row in hardware.rows})) or "none"
        raise complain("hardware", f"{hardware.name} with rows for head_dim {known}", f"{geometry.head_dim}, or a peak")
    rest, rest_basis = _rest(hardware, model, geometry)
    dense = hardware.dense.get((model, geometry.tokens))

    def price(name: str, amount: float) -> float:
        return amount * prices.get(name, 0.0)

    return CostModel(
        hardware=hardware.name,
        layers=geometry.layers,
        heads=geometry.heads,
        batch=batch,
        launch_ms=price("launch", 1.0),
        item_ms=price("items", one.blocks),
        pair_ms=price("pairs", one.pairs(1.0)),
        rest_ms=None if rest is None else batch * rest,
        attention_basis=basis,
        rest_basis=rest_basis,
        residual=residual,
        gather_ms=price("gather", one.fetched),
        list_ms=price("lists", one.key_lists),
        step_ms=price("steps", one.pairs(1.0)),
        slice_ms=price("slices", one.pairs(1.0)),
        listed_ms=price("listed", one.pairs(1.0)),
        full=full_head(geometry),
        dense_pass_ms=None if dense is None else batch * dense,
    )


def full_head(geometry: Geometry) -> HeadWork:
    """Of dense attention, in any tiles."""
    work = kernel_work(Tiling(geometry, (1, 1, 1)), np.ones((1, 1), dtype=bool))
    return HeadWork(1.0, 1.0, *(getattr(work, name) for name in COUNTS))


def head_work(tiling: Tiling, masks: Sequence[np.ndarray]) -> HeadWork:
    """Of bool [nT, nT] masks: arrays with an entry for each."""
    kernel = [kernel_work(tiling, mask) for mask in masks]
    lists, gathered = zip(*(key_lists(tiling, mask) for mask in masks), strict=True)
    return HeadWork(
        np.array([tiling.density(mask) for mask in masks]),
        np.array(gathered),
        *(np.array([getattr(work, name) for work in kernel]) for name in COUNTS),
        lists=np.array(lists),
    )


def key_lists(tiling: Tiling, mask: np.ndarray) -> tuple[int, float]:
    """Lists of key tiles in a bool [nT, nT] mask, and the keys fetched for them over the N tokens.

    Query tiles with equal lists share one; an empty list is none.
    """
    lists = np.unique(np.packbits(mask, axis=1), axis=0)
    kept = np.unpackbits(lists, axis=1, count=mask.shape[1])
    keys = (kept * tiling.sizes.astype(np.int64)).sum(1)
    return int((keys > 0).sum()), float(keys.sum()) / tiling.geometry.tokens


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


def _fit(rows: list[Row]) -> tuple[dict[str, float], float]:
    """(ms of a unit of each term, largest relative residual); units: a launch, a query block or item, a floating point
    operation of kept pairs, or of steps, slices and listed slices, a number gathered, a list of key tiles.

    Least squares of relative errors, no term negative. A constant term needs rows whose work differs fourfold, and
    more rows than terms; the terms by items, numbers gathered and lists need the same of those. Slices take the place
    of pairs where the rows say them; steps count beside them where the two are not nearly proportional, listed slices
    where some rows have full heads.
    """
    from scipy.optimize import nnls

    time = np.array([row.latency_ms for row in rows])
    counted = all(row.slices is not None and row.steps is not None and row.items is not None for row in rows)
    blocks = np.array([row.blocks * (row.items if counted else 1.0) for row in rows])
    if counted:
        columns = {"slices": np.array([row.pairs(row.slices) for row in rows])}
        steps = np.array([row.pairs(row.steps) for row in rows])
        ratio = steps / columns["slices"]
        if ratio.max() >= APART * ratio.min():
            columns["steps"] = steps
        if all(row.listed is not None for row in rows) and len(rows) > len(columns) + 1:
            listed = np.array([row.pairs(row.listed) for row in rows])
            if (listed < columns["slices"]).any() and (listed > 0).any():
                columns["listed"] = listed
    else:
        columns = {"pairs": np.array([row.pairs(row.density) for row in rows])}
    first = next(iter(columns.values()))
    more = {
        "launch": np.ones(len(rows)),
        "items": blocks,
        "gather": np.array([row.fetched for row in rows]),
        "lists": np.array([row.key_lists for row in rows]),
    }
    for name, values in more.items():
        spread = first if name == "launch" else values
        if len(rows) > len(columns) + 1 and spread.max() >= 4 * spread.min() > 0:
            columns[name] = values
    scale = {name: values.max() for name, values in columns.items()}
    matrix = np.stack([values / scale[name] / time for name, values in columns.items()], axis=1)
    found = nnls(matrix, np.ones(len(rows)))[0]
    prices = {name: float(x / scale[name]) for name, x in zip(columns, found, strict=True)}
    return prices, float(np.abs(matrix @ found - 1).max())


def _row(value: object, where: str) -> Row:
    if not isinstance(value, dict):
        raise complain(where, shown(value), "an object with the keys " + ", ".join(ROW_KEYS))
    for key in ROW_KEYS:
        if key not in value:
            raise complain(f"{where}.{key}", "nothing", "a value", "the key is required")
    counts = [integer(value[key], f"{where}.{key}", 1) for key in ("batch", "tokens", "heads", "head_dim")]
    density = _positive(value["density"], f"{where}.density")
    latency = _positive(value["latency_ms"], f"{where}.latency_ms")
    more = {name: _positive(value[name], f"{where}.{name}", name == "listed") for name in ROW_OPTIONAL if name in value}
    return Row(*counts, density, latency, **more)


def _objects(data: dict, key: str, path: Path) -> list[dict]:
    return list(array(data.get(key, []), f"{path}: $.{key}", "objects"))


def _positive(value: object, where: str, or_zero: bool = False) -> float:
    expected = "a number of at least 0" if or_zero else "a number above 0"
    found = number(value, where, expected)
    if found < 0 or (found == 0 and not or_zero):
        raise complain(where, found, expected)
    return found
