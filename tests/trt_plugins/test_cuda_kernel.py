"""The CUDA kernel against float64 on a GPU. Its error may be 1.25 times that of torch's fused attention, no more."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from svdit.trt_plugins import cuda_library, cuda_op, torch_op  # noqa: E402
from tests import reference  # noqa: E402
from tests.cases import CASES, op_attributes, op_inputs  # noqa: E402
from tests.tolerance import check_attention  # noqa: E402
from tests.trt_plugins import kernel_runs  # noqa: E402
from tests.trt_plugins.kernel_cases import FULL, SKIP, KernelCase, order_of, random_case  # noqa: E402

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
    pytest.mark.skipif(cuda_library.find() is None, reason="no libsvdit_kernels.so; build it with CMake"),
]

RATIO = 1.25
ROUNDING = {"bfloat16": 2.0**-9, "float16": 2.0**-12}
"""Half a unit in the last place: what a single output element may lose by luck when a case has few of them."""
NUM_RANDOM = 200


def assert_accurate(case: KernelCase, errors: kernel_runs.Errors) -> None:
    if errors.truth == 0:
        assert errors.kernel == 0
        return
    kernel, usual = ((x / errors.truth) ** 0.5 for x in (errors.kernel, errors.torch))
    limit = RATIO * usual + (ROUNDING[case.dtype] if case.shape[1] < 64 else 0.0)
    what = f"{case.name} {case.dtype} {case.shape} scale {case.scale:.3g} text {case.text_tokens}"
    assert kernel <= limit, f"{what}: error {kernel:.3e}, torch {usual:.3e}"


def plain_case(
    shape: tuple[int, int, int, int],
    patterns: list[np.ndarray],
    head_pattern: list[list[int]],
    dtype: str = "bfloat16",
    text_tokens: int = 0,
    rows: int = 128,
    **tables: list[int],
) -> KernelCase:
    """Tiles of so many rows; `patterns` are bool [nT, nT] for ids from 2 on."""
    tokens = shape[1]
    num_tiles = -(-tokens // rows)
    lists = [np.zeros((num_tiles, num_tiles), bool)] * 2 + patterns
    counts = np.stack([x.sum(axis=1) for x in lists])
    ends = np.cumsum(counts).reshape(counts.shape)
    index = np.concatenate([np.nonzero(x)[1] for x in lists])
    built = {
        "stage": [0],
        "text_len": [text_tokens] * shape[0],
        "head_pattern": head_pattern,
        "tile_offsets": np.minimum(np.arange(num_tiles + 1) * rows, tokens),
        "row_offsets": np.concatenate([ends[:, :1] - counts[:, :1], ends], axis=1),
        "tile_index": index if len(index) else [0],
        "work_order": order_of(np.array(head_pattern), tokens, num_tiles),
    } | tables
    arrays = {name: np.ascontiguousarray(x, dtype=np.int32) for name, x in built.items()}
    return KernelCase("plain", dtype, shape, shape[3] ** -0.5, text_tokens, False, arrays)


@pytest.mark.parametrize("tokens", [1, 63, 64, 127, 128, 129, 255, 257, 1000])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_one_full_head(tokens, head_dim, dtype):
    case = plain_case((1, tokens, 1, head_dim), [], [[FULL]], dtype)
    inputs = kernel_runs.inputs_of(case, tokens)
    assert_accurate(case, kernel_runs.judge(case, inputs, kernel_runs.run(case, inputs)))


@pytest.mark.parametrize("heads", [1, 2, 3])
@pytest.mark.parametrize("tokens", [384, 1500, 4000])
@pytest.mark.parametrize("rows", [40, 64, 72, 128])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_neighbours_that_share_their_keys(tokens, rows, heads, dtype):
    """Three neighbours with one list are two items at D=64, or one of at most 64 rows each; others stay alone."""
    frame = np.arange(-(-tokens // rows)) // 4
    same_frame, first_frame = frame[:, None] == frame, np.broadcast_to(frame == 0, (len(frame), len(frame)))
    head_pattern = [([2, 3, FULL, SKIP] * 3)[: 4 * heads - 1]]
    case = plain_case((2, tokens, 4 * heads - 1, 64), [same_frame, first_frame], head_pattern, dtype, rows=rows)
    inputs = kernel_runs.inputs_of(case, tokens)
    assert_accurate(case, kernel_runs.judge(case, inputs, kernel_runs.run(case, inputs)))


def test_random_problems():
    sums: dict[tuple[str, int], list[float]] = {}
    failures: list[str] = []
    for seed in range(NUM_RANDOM):
        case = random_case(seed)
        inputs = kernel_runs.inputs_of(case, seed, magnitude=(1.0, 1.0, 3.0)[seed % 3])
        errors = kernel_runs.judge(case, inputs, kernel_runs.run(case, inputs))
        try:
            assert_accurate(case, errors)
        except AssertionError as failure:
            failures.append(str(failure).splitlines()[0])
        total = sums.setdefault((case.dtype, case.shape[3]), [0.0, 0.0])
        if errors.truth > 0:
            total[0] += errors.kernel / errors.truth
            total[1] += errors.torch / errors.truth
    assert len(sums) == 4
    for kind, (kernel, usual) in sums.items():
        print(f"{kind}: error over torch's {(kernel / usual) ** 0.5:.3f}")
        assert kernel <= RATIO**2 * usual, kind
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("golden", CASES, ids=str)
def test_golden_case(golden, dtype):
    arrays, attributes = op_inputs(golden, dtype), op_attributes(golden)
    case = KernelCase(
        golden.name,
        dtype,
        golden.shape,
        attributes["scale"],
        attributes["text_tokens"],
        attributes["text_first"],
        {name: arrays[name] for name in cuda_op.TABLES},
    )
    q, k, v = (torch.from_numpy(arrays[name]).to("cuda", getattr(torch, dtype)) for name in "qkv")
    out = kernel_runs.run(case, kernel_runs.Inputs(q, k, v, kernel_runs.hidden_keys(case)))
    truth = reference.expected_of(golden, arrays["q"], arrays["k"], arrays["v"])
    check_attention(out.float().cpu().numpy(), truth, dtype, golden)


@pytest.mark.parametrize("values", ["constant", "ascending", "descending", "peaky", "huge last", "large", "one row"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_values_that_move_the_maximum(values, head_dim):
    case = plain_case((1, 1024, 2, head_dim), [], [[FULL, FULL]])
    inputs = kernel_runs.inputs_of(case)
    q, k = inputs.q, inputs.k
    ramp = torch.arange(1024, device="cuda")[None, :, None, None] / 1024
    if values == "constant":
        q[:], k[:] = 1.0, 0.5
    elif values in ("ascending", "descending"):
        q[:] = q.abs()
        k[:] = (ramp if values == "ascending" else 1 - ramp) * 40
    elif values == "peaky":
        q *= 30
    elif values == "huge last":
        k[:, -1] *= 1000
    elif values == "one row":  # weights overflow in one warp of a warpgroup
        q[:, 37] *= 200
    else:
        q *= 60
        k *= 60
    assert_accurate(case, kernel_runs.judge(case, inputs, kernel_runs.run(case, inputs)))


def test_nan_stays_in_the_rows_that_attend_to_it():
    band = np.abs(np.arange(8)[:, None] - np.arange(8)) <= 1
    case = plain_case((1, 1000, 1, 128), [band], [[2]])
    inputs = kernel_runs.inputs_of(case)
    inputs.v[0, 130, 0, 5] = float("nan")
    out = kernel_runs.run(case, inputs)[0, :, 0]
    rows = out.isnan().any(dim=1)
    assert rows[: 3 * 128].all() and not rows[3 * 128 :].any()
    assert out[: 3 * 128].isnan().nonzero()[:, 1].unique().tolist() == [5]


def test_the_same_bits_every_time():
    case = random_case(17)
    inputs, tables = kernel_runs.inputs_of(case), kernel_runs.device_tables(case)
    first = kernel_runs.run(case, inputs, tables).view(torch.int16)
    for _ in range(200):
        assert (kernel_runs.run(case, inputs, tables).view(torch.int16) == first).all()


def stages_case() -> KernelCase:
    comb = np.abs(np.arange(9)[:, None] - np.arange(9)) % 3 == 0
    return plain_case((2, 1100, 4, 64), [comb], [[FULL, 2, SKIP, 2], [SKIP, FULL, 2, FULL], [2, 2, 2, SKIP]])


def test_one_captured_graph_serves_every_stage():
    case = stages_case()
    inputs, tables = kernel_runs.inputs_of(case), kernel_runs.device_tables(case)
    out = torch.empty_like(inputs.q)

    def launch():
        cuda_op.launch(inputs.q, inputs.k, inputs.v, out, tables, case.scale, 0, False)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    for stage in (0, 1, 2, 1, 0):
        tables["stage"].fill_(stage)
        out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        staged = KernelCase(**{**case.__dict__, "tables": dict(case.tables, stage=np.array([stage], np.int32))})
        assert_accurate(staged, kernel_runs.judge(staged, inputs, out))


def test_two_streams_do_not_disturb_each_other():
    cases = [random_case(seed) for seed in (5, 6)]
    inputs = [kernel_runs.inputs_of(case) for case in cases]
    expected = [kernel_runs.run(case, x) for case, x in zip(cases, inputs, strict=True)]
    streams, outs = [torch.cuda.Stream() for _ in cases], [[], []]
    tables = [kernel_runs.device_tables(case) for case in cases]
    torch.cuda.synchronize()
    for _ in range(20):
        for i, case in enumerate(cases):
            with torch.cuda.stream(streams[i]):
                out = torch.full_like(inputs[i].q, float("nan"))
                cuda_op.launch(inputs[i].q, inputs[i].k, inputs[i].v, out, tables[i], case.scale,
                               case.text_tokens, case.text_first)
                outs[i].append(out)
    torch.cuda.synchronize()
    for i in range(2):
        assert all(torch.equal(out, expected[i]) for out in outs[i])


def test_the_torch_operator_runs_the_kernel():
    torch_op.load()
    case = random_case(11)
    inputs, tables = kernel_runs.inputs_of(case), kernel_runs.device_tables(case)
    ordered = [tables[name] for name in cuda_op.TABLES]
    out = torch.ops.svdit.sparse_attention(
        inputs.q, inputs.k, inputs.v, *ordered, case.scale, case.text_tokens, case.text_first
    )
    assert torch.equal(out, kernel_runs.run(case, inputs, tables))


def test_offsets_beyond_two_to_the_31():
    """480k tokens x 48 heads: rows sampled from all over the output, first and last heads included."""
    tokens, heads, head_dim = 480_000, 48, 128
    if torch.cuda.mem_get_info()[0] < 30e9:
        pytest.skip("needs 30 GB of free GPU memory")
    num_tiles = tokens // 128
    band = np.zeros((num_tiles, num_tiles), bool)
    for query in range(num_tiles):
        band[query, max(0, query - 1) : query + 2] = True
    pattern = [2] * heads
    pattern[1] = SKIP
    case = plain_case((1, tokens, heads, head_dim), [band], [pattern])
    generator = torch.Generator(device="cuda").manual_seed(1)
    q, k, v = (torch.randn(case.shape, generator=generator, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    out = torch.full_like(q, float("nan"))
    cuda_op.launch(q, k, v, out, kernel_runs.device_tables(case), case.scale, 0, False)
    for head in (0, 1, 24, 47):
        for tile in (0, 1, 1875, num_tiles - 1):
            rows = slice(tile * 128, tile * 128 + 128)
            keys = slice(max(0, tile - 1) * 128, min(num_tiles, tile + 2) * 128)
            got = out[0, rows, head].double()
            if head == 1:
                assert (got == 0).all()
                continue
            scores = q[0, rows, head].double() @ k[0, keys, head].double().T * case.scale
            truth = torch.softmax(scores, dim=-1) @ v[0, keys, head].double()
            assert (got - truth).norm() <= 4e-3 * truth.norm(), (head, tile)
    assert not out.isnan().any()
