"""The planner: what it chooses on made-up devices, what every plan must satisfy, and overrides."""

from __future__ import annotations

import dataclasses
import random
import threading

import pytest
import torch

import rnn_cuda
from rnn_cuda import backend
from rnn_cuda.cuda_plan import DEVICES, DeviceFigures, Plan

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, torch.float64, *HALVES)
MAX_THREADS = 256

if backend.requested() == "reference":
    pytest.skip("plans are made by the compiled library", allow_module_level=True)

plan = rnn_cuda.plan


# ---- what is chosen ------------------------------------------------------------------------------

# (T, B, I, H), and the residency on cards with clusters in float32 and in half precision, and on
# cards without clusters that have a large shared memory (A100) or a small one (RTX 4090).
SHAPES = {
    (28, 128, 28, 128): ("one_sm", "one_sm", "one_sm", "one_sm"),
    (784, 64, 1, 128): ("one_sm", "one_sm", "one_sm", "one_sm"),
    (150, 32, 2, 128): ("one_sm", "one_sm", "one_sm", "one_sm"),
    (1000, 20, 10, 128): ("one_sm", "one_sm", "one_sm", "one_sm"),
    (2048, 8, 64, 64): ("one_sm", "one_sm", "one_sm", "one_sm"),
    (512, 1, 64, 256): ("cluster", "one_sm", None, "grid"),
    (512, 64, 256, 256): ("cluster", "one_sm", None, "grid"),
    (512, 32, 512, 512): ("cluster", "cluster", "grid", "grid"),
    (1024, 16, 768, 768): ("cluster", "cluster", "grid", "grid"),
    (512, 64, 1024, 1024): (None, "cluster", None, None),
    (333, 11, 37, 197): ("cluster", "one_sm", None, None),
    (500, 9, 300, 500): ("cluster", "cluster", "grid", "grid"),
    (256, 32, 256, 512): ("cluster", "cluster", "grid", "grid"),
    (256, 32, 2048, 2048): ("streamed", "grid", None, None),
    (256, 64, 4096, 4096): ("streamed", "streamed", "streamed", "streamed"),
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_shapes_of_the_benchmark_get_the_expected_residency(shape):
    on_clusters, halves_on_clusters, large, small = SHAPES[shape]
    expected = {
        ("H100", torch.float32): on_clusters,
        ("H200", torch.float32): on_clusters,
        ("H100", torch.bfloat16): halves_on_clusters,
        ("H100", torch.float16): halves_on_clusters,
        ("A100", torch.float32): large,
        ("RTX 4090", torch.float32): small,
    }
    for (device, dtype), residency in expected.items():
        chosen = plan(*shape, dtype=dtype, device=device, allow_tf32=False).residency
        assert residency in (chosen, None), (device, dtype, chosen)


def test_small_matrices_stay_in_one_multiprocessor_and_huge_ones_nowhere():
    for device in DEVICES:
        for dtype in (torch.float32, *HALVES):
            assert plan(100, 16, 8, 64, dtype=dtype, device=device).residency == "one_sm"
            assert plan(100, 16, 8, 20_000, dtype=dtype, device=device).residency == "streamed"


def test_float64_is_streamed_everywhere():
    for device in DEVICES:
        chosen = plan(10, 4, 3, 32, dtype=torch.float64, device=device)
        assert (chosen.residency, chosen.fuse_input) == ("streamed", False)
        assert "float64 has no persistent kernel" in chosen.explain()


def test_clusters_are_for_devices_that_have_them():
    for name, device in DEVICES.items():
        chosen = plan(512, 32, 512, 512, dtype=torch.bfloat16, device=name)
        assert (chosen.residency == "cluster") == (device.max_cluster_size > 1), name
    without = dataclasses.replace(DEVICES["H100"], max_cluster_size=0)
    assert plan(512, 32, 512, 512, dtype=torch.bfloat16, device=without).residency == "grid"


@pytest.mark.parametrize("device", ["H100", "B200", "RTX 5090"])
@pytest.mark.parametrize("compiled_for", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_clusters_need_kernels_that_were_compiled_for_them(device, compiled_for):
    """The driver runs old PTX on new cards: its kernels for clusters are empty below 9.0."""
    problem = {"dtype": torch.bfloat16, "device": DEVICES[device]}
    usual = plan(512, 32, 512, 512, **problem)
    assert usual.residency == "cluster"
    problem["device"] = dataclasses.replace(DEVICES[device], kernel_capability=compiled_for)
    chosen = plan(512, 32, 512, 512, **problem)
    if compiled_for >= (9, 0):
        assert chosen == usual
    else:
        number = "{}.{}".format(*compiled_for)
        why = f"kernels compiled for 9.0 or newer, those that this device runs are for {number}"
        assert chosen.residency == "grid"
        assert f"Not cluster: clusters need {why}." in chosen.explain()
        with pytest.raises(ValueError, match=f"plan override: residency=cluster: .*{number}"):
            plan(512, 32, 512, 512, **problem, override="residency=cluster")


def test_float32_is_rounded_to_tf32_only_where_that_is_allowed():
    arithmetic = [
        plan(512, 64, 1024, 1024, device="H100", allow_tf32=allowed).arithmetic
        for allowed in (False, True)
    ]
    assert arithmetic == ["fma", "tf32"]
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for setting, expected in (("tf32", "tf32"), ("ieee", "fma")):
            torch.backends.cuda.matmul.fp32_precision = setting
            assert plan(512, 64, 1024, 1024, device="H100").arithmetic == expected
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_a_small_input_is_fused_and_one_that_does_not_fit_is_not():
    assert plan(28, 128, 28, 128, device="H100").fuse_input
    assert not plan(28, 128, 20_000, 128, device="H100").fuse_input
    assert not plan(28, 128, 0, 128, device="H100").fuse_input


# ---- what every plan satisfies -------------------------------------------------------------------


def random_plan(rng: random.Random) -> tuple[Plan, DeviceFigures, dict]:
    def log_uniform(most: int) -> int:
        return round(2 ** rng.uniform(0, most))

    name = rng.choice(sorted(DEVICES))
    problem = {
        "time_steps": log_uniform(12),
        "batch": log_uniform(9),
        "input_size": rng.choice([0, log_uniform(11)]),
        "hidden_size": log_uniform(12),
        "dtype": rng.choice(DTYPES),
        "directions": rng.choice([1, 2]),
        "allow_tf32": rng.random() < 0.5,
    }
    return plan(**problem, device=name), DEVICES[name], problem


@pytest.mark.parametrize("seed", range(10))
def test_every_plan_fits_its_device(seed):
    rng = random.Random(seed)
    for _ in range(40):
        chosen, device, problem = random_plan(rng)
        about = (chosen, problem)
        assert chosen.shared_bytes <= device.shared_bytes_per_block, about
        assert 32 <= chosen.threads <= MAX_THREADS, about
        assert chosen.columns % chosen.engine_columns == 0, about
        assert chosen.blocks == max(1, chosen.geometry["blocks"]), about
        if chosen.residency == "one_sm":
            assert chosen.blocks == 1, about
        if chosen.residency == "cluster":
            assert device.capability >= (9, 0), about
            assert chosen.blocks <= device.max_cluster_size, about
        if chosen.residency == "grid":
            assert chosen.blocks * problem["directions"] <= device.multiprocessors, about
        if problem["dtype"] in HALVES:
            assert chosen.arithmetic == "tensor_core", about
        assert chosen.arithmetic != "tf32" or problem["allow_tf32"], about
        assert not (chosen.fuse_input and problem["input_size"] == 0), about


@pytest.mark.parametrize("seed", range(10))
def test_every_hidden_unit_is_owned_by_one_warp_and_every_term_of_its_sum_by_one_slice(seed):
    rng = random.Random(seed)
    seen = 0
    while seen < 20:
        chosen, _, problem = random_plan(rng)
        if chosen.residency == "streamed":
            continue
        seen += 1
        g, hidden = chosen.geometry, problem["hidden_size"]
        owners = [0] * (g["row_tiles"] * chosen.rows_per_tile)
        for block in range(chosen.blocks):
            first = block * g["block_row_tiles"]
            mine = min(g["block_row_tiles"], g["row_tiles"] - first)
            assert mine > 0, chosen
            for warp in range(chosen.row_warps):
                for turn in range(g["row_rounds"]):
                    tile = turn * chosen.row_warps + warp
                    if tile < mine:
                        begin = (first + tile) * chosen.rows_per_tile
                        for unit in range(begin, begin + chosen.rows_per_tile):
                            owners[unit] += 1
        assert set(owners) == {1}, chosen
        assert hidden <= len(owners) < hidden + chosen.rows_per_tile, chosen
        for depth, part in (("state_depth", "state_slice"), ("input_depth", "input_slice")):
            assert g[part] * chosen.depth_split >= g[depth], chosen
        assert g["batch_tiles"] * chosen.columns >= problem["batch"], chosen
        assert (g["batch_tiles"] - 1) * chosen.columns < problem["batch"], chosen


def test_the_cheapest_candidate_is_chosen():
    rng = random.Random(0)
    for _ in range(50):
        chosen, _, problem = random_plan(rng)
        costs = [c["total_us"] for c in chosen.candidates if "total_us" in c]
        assert chosen.total_us == pytest.approx(min(costs)), problem
        assert chosen.total_us > 0, problem


def test_more_work_is_never_estimated_cheaper():
    base = {"time_steps": 64, "batch": 16, "input_size": 32, "hidden_size": 128}
    for device in DEVICES:
        for dtype in DTYPES:
            small = plan(**base, dtype=dtype, device=device).total_us
            for name in base:
                larger = plan(**(base | {name: 16 * base[name]}), dtype=dtype, device=device)
                assert larger.total_us >= small, (device, dtype, name)


# ---- in words ------------------------------------------------------------------------------------


def test_a_plan_explains_itself_and_why_not_the_others():
    words = plan(512, 32, 512, 512, dtype=torch.bfloat16, device="H100").explain()
    assert words.startswith("U stays in a cluster of ")
    assert "Not one_sm: a block would need " in words
    assert "Not grid: estimated " in words
    assert "it was not measured" in words
    on_a100 = plan(512, 32, 512, 512, dtype=torch.bfloat16, device="A100").explain()
    assert "Not cluster: clusters need compute capability 9.0, the device has 8.0." in on_a100


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"batch": 0}, ValueError, "batch must be greater than zero"),
        ({"hidden_size": 1.5}, TypeError, "hidden_size should be of type int"),
        ({"dtype": torch.int64}, ValueError, "dtype: expected float32.* got 'int64'"),
        ({"dtype": "float32"}, TypeError, "dtype: expected a torch.dtype, got str"),
        ({"directions": 3}, ValueError, "directions: expected 1 or 2, got 3"),
        ({"device": "V100"}, ValueError, "device: expected one of A100, .* got 'V100'"),
        ({"device": None}, ValueError, "device: expected one of"),
    ],
)
def test_a_bad_argument_is_named(change, error, message):
    good = {"time_steps": 4, "batch": 2, "input_size": 3, "hidden_size": 5, "device": "H100"}
    with pytest.raises(error, match=message):
        plan(**(good | change))


def test_a_device_that_cannot_be_asked_is_refused():
    if backend.has_operator("cuda_device_figures"):
        pytest.skip("this library has CUDA kernels")
    with pytest.raises(ValueError, match="no CUDA kernels to ask cuda:0 for its figures"):
        plan(4, 2, 3, 5, device="cuda:0")


# ---- overrides -----------------------------------------------------------------------------------

OVERRIDES = [
    {"residency": "one_sm", "row_warps": 2, "depth_split": 2},
    {"residency": "cluster", "blocks": 4, "columns": 32},
    {"residency": "grid", "blocks": 5, "fuse_input": 0},
    {"residency": "cluster", "blocks": 3, "engine_columns": 32},
    {"residency": "streamed"},
    {"fuse_input": 1},
    {"columns": 8},
]


@pytest.mark.parametrize("fields", OVERRIDES, ids=str)
def test_an_override_decides_its_fields_and_the_rest_is_planned(fields):
    problem = {"time_steps": 64, "batch": 40, "input_size": 16, "hidden_size": 300}
    text = ", ".join(f"{name} = {value}" for name, value in fields.items())
    for dtype in HALVES:
        chosen = plan(**problem, dtype=dtype, device="H100", override=text)
        assert {name: getattr(chosen, name) for name in fields} == fields
        with rnn_cuda.plan_override(**fields):
            assert plan(**problem, dtype=dtype, device="H100") == chosen


def test_the_environment_variable_overrides_and_a_context_overrides_it(monkeypatch):
    def residency() -> str:
        return plan(64, 8, 16, 128, device="H100").residency

    monkeypatch.setenv("RNN_CUDA_PLAN", "residency=grid")
    assert residency() == "grid"
    with rnn_cuda.plan_override(residency="cluster"):
        assert residency() == "cluster"
        with rnn_cuda.plan_override("residency=streamed"):
            assert residency() == "streamed"
        with rnn_cuda.plan_override():
            assert residency() == "one_sm"
        assert residency() == "cluster"
    assert residency() == "grid"


@pytest.mark.parametrize(
    "text", ["nonsense", "residency=fast", "blocks=0", "residency=one_sm,blocks=2", "columns=7"]
)
def test_a_bad_environment_variable_is_named(text, monkeypatch):
    monkeypatch.setenv("RNN_CUDA_PLAN", text)
    with pytest.raises(ValueError, match=r"^RNN_CUDA_PLAN: plan override: "):
        plan(64, 8, 16, 128, dtype=torch.bfloat16, device="H100")
    with rnn_cuda.plan_override(residency="streamed"):
        assert plan(64, 8, 16, 128, device="H100").residency == "streamed"


def test_an_override_reaches_other_threads_and_ends_with_an_error():
    seen = []

    def look() -> None:
        seen.append(plan(64, 8, 16, 128, device="H100").residency)

    def fail() -> None:
        with rnn_cuda.plan_override(residency="grid"):
            thread = threading.Thread(target=look)
            thread.start()
            thread.join()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    look()
    assert seen == ["grid", "one_sm"]


BFLOAT16 = {"dtype": torch.bfloat16}
BAD_OVERRIDES = [
    ("residency=clusters", {}, "residency=clusters: expected one of one_sm, cluster, grid"),
    ("residency", {}, "expected field=value, separated by commas; got 'residency'"),
    ("block=3", {}, "block=3: no such field; expected residency"),
    ("blocks=0", {}, "blocks=0: expected a positive integer"),
    ("blocks=two", {}, "blocks=two: expected a positive integer"),
    ("fuse_input=yes", {}, "fuse_input=yes: expected 0 or 1"),
    ("residency=cluster", {"device": "A100"}, "residency=cluster: clusters need .* has 8.0"),
    ("residency=grid", {"dtype": torch.float64}, "residency=grid: float64 has no persistent"),
    ("columns=8", {"dtype": torch.float64}, "columns: float64 has no persistent kernel"),
    ("residency=streamed,columns=8", {}, "columns: residency=streamed has no persistent kernel"),
    ("arithmetic=tf32", {}, "arithmetic=tf32: torch's settings do not allow TF32"),
    ("arithmetic=fma", BFLOAT16, "arithmetic=fma: not for bfloat16"),
    ("engine_columns=8", {}, "engine_columns=8: FMA has 1 or 4"),
    ("engine_columns=4", BFLOAT16, "engine_columns=4: tensor cores have 8 or 32"),
    ("columns=12", BFLOAT16, "columns=12: expected a multiple of 8"),
    ("columns=6,engine_columns=4", {}, "columns=6: expected a multiple of 4"),
    ("residency=one_sm,blocks=2", {}, "blocks=2: one_sm has 1"),
    ("residency=cluster,blocks=17", {}, "blocks=17: a cluster of this device has at most 16"),
    ("residency=grid,blocks=133", {}, "blocks=133: at most 132 run at once"),
    ("blocks=31", BFLOAT16, r"blocks=31: 16 row tiles \(of 32 hidden units\)"),
    ("row_warps=9", {}, "row_warps=9: a block has at most 8 warps"),
    ("row_warps=4,depth_split=3", {}, "depth_split=3: row_warps times depth_split is at most 8"),
    (
        "residency=one_sm",
        {},
        r"'residency=one_sm' is not possible here \(one_sm: a block would need \d+ KiB of shared "
        "memory and has 227 KiB.*without residency",
    ),
    (
        "residency=cluster,blocks=2",
        {},
        "'residency=cluster,blocks=2' is not possible .*; it would be without blocks",
    ),
]


@pytest.mark.parametrize(
    ("text", "change", "message"), BAD_OVERRIDES, ids=[text for text, _, _ in BAD_OVERRIDES]
)
def test_an_impossible_override_is_refused_by_the_name_of_its_field(text, change, message):
    problem = {"time_steps": 64, "batch": 40, "input_size": 16, "hidden_size": 512}
    problem |= {"device": "H100", "allow_tf32": False}
    with pytest.raises(ValueError, match=f"plan override: {message}"):
        plan(**(problem | change), override=text)


def test_a_field_that_does_not_exist_is_refused_at_once():
    with (
        pytest.raises(ValueError, match="no such field"),
        rnn_cuda.plan_override(warps=3),
    ):
        pytest.fail("the block was entered")


def test_plans_need_the_compiled_library(monkeypatch):
    monkeypatch.setattr(backend, "load_library", lambda **_: "no compiler on the PATH")
    with pytest.raises(backend.NativeBackendError, match="no compiler on the PATH"):
        plan(4, 2, 3, 5, device="H100")
    with pytest.raises(backend.NativeBackendError), rnn_cuda.plan_override(residency="grid"):
        pass
