"""The CUDA kernels, executed on the CPU outside PyTorch: they keep their contract under every
schedule and sanitizer, and defects planted in them are found."""

import re
from typing import NamedTuple

import pytest

from rnn_cuda.build import default_source_dir
from tests.native_programs import EMULATED_OPTIONS, NATIVE, SANITIZERS, plant, run, run_with_defect

pytestmark = pytest.mark.slow

KERNELS = ("launch", "walk_float32", "walk_tf32", "walk_bfloat16", "walk_float16")
PLANNER = [default_source_dir() / "plan" / f"{part}.cpp" for part in ("geometry", "override")]
# Of the template that walk_bfloat16 instantiates: AddressSanitizer would see nothing new.
# (ThreadSanitizer has to see every synchronisation, or it takes what follows for a race.)
SAME_TEMPLATE = {"address": ("walk_float16",)}
# ThreadSanitizer's cost grows with the square of the number of threads.
PROBLEMS = {"none": ("--problems", "200"), "address": ("--problems", "100")}
PROBLEMS["thread"] = ("--small", "--problems", "100")


class Defect(NamedTuple):
    """An edit of a kernel's source, see native_programs.py, what finds it, and with what words."""

    file: str
    right: str
    wrong: str
    residency: str
    symptom: str
    sanitizer: str = "address"
    dtype: str = "float32"


WRONG_VALUE = r"output\[\d+, \d+\] is|output differs when"
RACE = "ThreadSanitizer: data race"
OVERRUN = "AddressSanitizer: "

DEFECTS = {
    "a block does not wait for its own states": Defect(
        "exchanges.cuh",
        "next_ = states(step + 1);\n    device::sync_block();",
        "next_ = states(step + 1);",
        "one_sm",
        WRONG_VALUE,
    ),
    "a block's states have one buffer": Defect(
        "exchanges.cuh",
        "uint32_t* states(int step) { «return states_ + (step & 1) * size_;» }",
        "return states_;",
        "one_sm",
        RACE,
        "thread",
    ),
    "a barrier is waited for with the wrong parity": Defect(
        "exchanges.cuh", "((step - 1) >> 1) & 1", "(step >> 1) & 1", "cluster", "a deadlock|output"
    ),
    "a barrier may be armed again before all have seen it": Defect(
        "exchanges.cuh",
        "device::sync_block();  // all threads have seen this phase end before the next one begins",
        "",
        "cluster",
        "a deadlock|output|asynchronous store|memory barrier",
    ),
    "the outbox is sent before it is full": Defect(
        "exchanges.cuh",
        "device::sync_block();  // the outbox is full, and nobody reads this state any more",
        "",
        "cluster",
        WRONG_VALUE,
    ),
    "the outbox is sent after the barrier of its warp alone": Defect(
        "exchanges.cuh",
        "device::sync_block();  // the outbox is full, and nobody reads this state any more",
        "device::sync_warp();",
        "cluster",
        RACE,
        "thread",
    ),
    "blocks do not wait until their cluster is ready": Defect(
        "exchanges.cuh",
        "«device::cluster_sync();»  // every block runs and is ready",
        "device::sync_block();",
        "cluster",
        "not yet carved its shared memory|not initialised",
    ),
    "the barrier of the second state is not armed": Defect(
        "exchanges.cuh",
        "if (steps_ > 2) device::barrier_expect(barriers_, bytes_);",
        "",
        "cluster",
        "a deadlock",
    ),
    "a barrier counts too few bytes": Defect(
        "exchanges.cuh",
        "setup.columns * setup.words * 4",
        "setup.columns * setup.words * 4 - 4",
        "cluster",
        "a deadlock|output|returns while stores are on their way|memory barrier",
    ),
    "a block leaves its cluster without a word": Defect(
        "exchanges.cuh",
        "void end() { «device::cluster_sync();» }",
        "",
        "cluster",
        "returns with no cluster_sync after a store into it",
    ),
    "a state that never comes is announced": Defect(
        "exchanges.cuh",
        "step > 0 && step + 2 < steps_",
        "step > 0 && step + 2 <= steps_",
        "cluster",
        "returns while a memory barrier waits for more",
    ),
    "a block sends to the others alone": Defect(
        "exchanges.cuh",
        "int rank = «first_rank_»; rank < blocks_",
        "first_rank_ + 1",
        "cluster",
        "a deadlock|returns while",
    ),
    "a column's vectors are counted once too few": Defect(
        "exchanges.cuh",
        "«++column;»\n    }",
        "++column; break;",
        "cluster",
        OVERRUN,
    ),
    "a block counts as published before its stores are done": Defect(
        "exchanges.cuh",
        "device::sync_block();  // the block's stores, and its reads of staged_, are done",
        "",
        "grid",
        WRONG_VALUE,
    ),
    "blocks of a grid go on one step too early": Defect(
        "exchanges.cuh",
        "static_cast<uint32_t>(step) * static_cast<uint32_t>(blocks_)",
        "static_cast<uint32_t>(step - 1) * static_cast<uint32_t>(blocks_)",
        "grid",
        WRONG_VALUE,
    ),
    "states are staged before all blocks have published": Defect(
        "exchanges.cuh",
        "«device::sync_block();»\n      stage(",
        "",
        "grid",
        WRONG_VALUE,
    ),
    "counters keep what the launch before left": Defect(
        "launch.cu",
        "device::clear_async(p.counters, bytes, stream)",
        "static_cast<int>(0 * bytes)",
        "grid",
        WRONG_VALUE,
    ),
    "the states of two teams overlap": Defect(
        "exchanges.cuh",
        "place * «Workspace::kStateBuffers» * p.columns * p.state_words",
        "1",
        "grid",
        WRONG_VALUE,
    ),
    "a grid's blocks need not run together": Defect(
        "launch.cu",
        "config.cooperative = plan.residency == Residency::Grid;",
        "config.cooperative = false;",
        "grid",
        "a deadlock",
    ),
    "two directions share a counter": Defect(
        "exchanges.cuh",
        "const int64_t place = «static_cast<int64_t>(blockIdx.y) * p.batch_tiles + tile»;",
        "tile",
        "grid",
        WRONG_VALUE,
    ),
    "later launches begin at the first batch tile too": Defect(
        "launch.cu",
        "p.first_tile = static_cast<int>(tile);",
        "p.first_tile = 0;",
        "grid",
        WRONG_VALUE,
    ),
    "a shuffle in a branch": Defect(
        "share.cuh",
        "sum = Engine::sum_units(sum);",
        "if (sample_[j] < step_.active) sum = Engine::sum_units(sum);",
        "one_sm",
        "a divergent |a deadlock",
    ),
    "samples past the batch are stored": Defect(
        "share.cuh",
        "const bool active = «sample_[j] < step_.active»;",
        "true",
        "one_sm",
        OVERRUN,
    ),
    "one unit too many is stored": Defect(
        "share.cuh",
        "return unit(u) < p_.hidden_size;",
        "return unit(u) <= p_.hidden_size;",
        "cluster",
        OVERRUN,
    ),
    "a packed step is looked for one row late": Defect(
        "parameters.cuh",
        "«row_starts_[t]» :",
        "row_starts_[t] + (t > 0)",
        "one_sm",
        OVERRUN + "|output",
    ),
    "a sample that has not begun, in reverse, forgets its initial state": Defect(
        "share.cuh",
        "const bool keeps = «r_.reverse && r_.initial != nullptr»;",
        "false",
        "cluster",
        WRONG_VALUE,
    ),
    "partial sums are added before they are there": Defect(
        "recurrence.cuh",
        "device::sync_block();\n    if (!has_tile(round)) return;",
        "if (!has_tile(round)) return;",
        "grid",
        WRONG_VALUE,
    ),
    "partial sums have one buffer": Defect(
        "recurrence.cuh", "turn_ ^= 1;", "turn_ ^= 0;", "one_sm", RACE, "thread"
    ),
    "the layout forgets the second buffer of partial sums": Defect(
        "layout.h",
        "int64_t{4} * «kPartialBuffers» * shape.row_warps",
        "1",
        "one_sm",
        "AddressSanitizer: use-after-poison",
    ),
    "the input has one buffer": Defect(
        "input_stage.cuh",
        "words_ + «(step & 1)» * p_.columns",
        "0",
        "one_sm",
        WRONG_VALUE,
    ),
    "the tiles in registers have places in shared memory too": Defect(
        "weights.cuh",
        "round * per_round_ + i - held_places()",
        "round * per_round_ + i",
        "one_sm",
        OVERRUN,
    ),
    "words that nobody publishes are not cleared": Defect(
        "recurrence.cuh",
        "if (exchange_.states(1) != exchange_.states(0)) exchange_.states(1)[item] = 0;",
        "",
        "one_sm",
        WRONG_VALUE,
    ),
    "a zero initial state is multiplied": Defect(
        "share.cuh",
        "r_.initial == nullptr && !r_.multiplies_zero_initial",
        "false",
        "one_sm",
        r"(output|norms)\[\d+, \d+\] is -?nan",
    ),
    "a zero initial state is never multiplied": Defect(
        "share.cuh",
        "r_.initial == nullptr && !r_.multiplies_zero_initial",
        "r_.initial == nullptr",
        "one_sm",
        WRONG_VALUE,
    ),
    "padding is summed into a norm": Defect(
        "share.cuh",
        "«inside(u) ? double(z[j][u]) * double(z[j][u]) : 0.0»;",
        "double(z[j][u]) * double(z[j][u])",
        "one_sm",
        r"norms\[\d+, 0\] is -?nan",
    ),
    "two lanes store one unit": Defect(
        "engines.cuh",
        "return lane % kLanesPerOutput == 0;",
        "return lane >= 0;",
        "one_sm",
        RACE,
        "thread",
    ),
    "tiles that a warp does not have are multiplied": Defect(
        "weights.cuh",
        "if («end <= state_count_») {",
        "first < state_count_",
        "one_sm",
        WRONG_VALUE,
    ),
    "every other product is forgotten": Defect(
        "weights.cuh",
        "if constexpr (Engine::kChains > 1) Engine::add(sum, odd);",
        "",
        "one_sm",
        WRONG_VALUE,
        dtype="bfloat16",
    ),
    "a state is carried on before it is rounded": Defect(
        "share.cuh",
        "z[j][u] = device::to_float(s);",
        "",
        "one_sm",
        WRONG_VALUE,
        dtype="bfloat16",
    ),
    "an input is truncated to TF32, not rounded": Defect(
        "engines.cuh",
        "    return device::round_to_tf32(raw);",
        "    return device::bits_of(raw);",
        "one_sm",
        WRONG_VALUE,
    ),
    "ReLU hides a NaN": Defect(
        "../cells/nonlinearities.h",
        "return z <= typename Math::Number(0) ? typename Math::Value{} : z;",
        "return z > typename Math::Number(0) ? z : typename Math::Value{};",
        "one_sm",
        r"output\[\d+, \d+\] is 0, not -?nan",
    ),
    "a norm is written for the first direction only": Defect(
        "launch.cu",
        "workspace.norm_parts) + «i * norm_parts * total_rows»",
        "0",
        "one_sm",
        r"norms\[",
    ),
    "a single step reads a sample past the batch": Defect(
        "launch.cu",
        "if (sample >= p.step.rows) return;",
        "if (sample > p.step.rows) return;",
        "streamed",
        OVERRUN,
    ),
    "the norms have one row too many": Defect(
        "launch.cu",
        "if (row >= p.rows) return;",
        "if (row > p.rows) return;",
        "one_sm",
        OVERRUN,
    ),
    "a fragment's halves are swapped": Defect(
        "engines.cuh",
        "mine[«n * 8 * pitch»], mine[n * 8 * pitch + 4]};",
        "n * 8 * pitch + 4",
        "one_sm",
        WRONG_VALUE,
        dtype="bfloat16",
    ),
}


@pytest.fixture(scope="module")
def programs(workshop):
    """The checker, plain and under each sanitizer; those under one have all defects."""
    planted, with_defects = plant(DEFECTS, "cuda", workshop.folder / "cuda-csrc")
    checker = [
        workshop.compile(path, f"cuda-{path.stem}", [*EMULATED_OPTIONS, "-O1"])  # the judge's loops
        for path in (NATIVE / "check_cuda.cpp", *PLANNER)
    ]
    compiled, linked = {}, {}
    for sanitizer, flags in SANITIZERS.items():  # "none" first: it lacks nothing
        sources, options = default_source_dir(), EMULATED_OPTIONS
        if sanitizer != "none":
            sources, options = planted, [*EMULATED_OPTIONS, *flags, *with_defects]
        for kernel in KERNELS:
            if kernel not in SAME_TEMPLATE.get(sanitizer, ()):
                path, name = sources / "cuda" / f"{kernel}.cu", f"cuda-{kernel}-{sanitizer}"
                compiled[kernel, sanitizer] = workshop.compile(path, name, options, sources)
        objects = [compiled.get((k, sanitizer), compiled[k, "none"]) for k in KERNELS]
        # The checker last: of inline functions, that of an instrumented object is to be linked.
        objects += checker
        linked[sanitizer] = workshop.link_emulated(f"cuda-{sanitizer}", objects, sanitizer)
    return linked


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_kernels_keep_their_contract(programs, sanitizer):
    done = run(programs[sanitizer].result(), *PROBLEMS[sanitizer])
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"ok: {PROBLEMS[sanitizer][-1]} problems" in done.stdout


def test_clusters_are_no_larger_than_the_device_has_room_for(programs):
    device = "multiprocessors=8,max_cluster_size=16"
    arguments = ["--residency", "cluster", "--problems", "40"]
    program = programs["none"].result()
    done = run(program, *arguments, RNN_CUDA_EMULATOR_DEVICE=device)
    assert done.stdout == "ok: 40 problems\n"
    done = run(program, *arguments, RNN_CUDA_EMULATOR_DEVICE="multiprocessors=1")
    assert done.stdout == "skipped: this device runs no clusters\n"


@pytest.mark.parametrize("name", DEFECTS)
def test_a_planted_defect_is_found(programs, name):
    defect = DEFECTS[name]
    arguments = ["--residency", defect.residency, "--dtype", defect.dtype]
    arguments += PROBLEMS[defect.sanitizer]
    done = run_with_defect(programs[defect.sanitizer].result(), DEFECTS, name, *arguments)
    assert done.returncode != 0
    assert re.search(defect.symptom, done.stdout + done.stderr), done.stdout + done.stderr


def test_a_problem_can_be_run_again(programs):
    program = programs["none"].result()
    done = run(program, "--seed", "3", "--first", "17", "--problems", "1", "--dtype", "float16")
    assert done.stdout == "ok: 1 problems\n"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--residency", "moon"], "no such choice: moon"),
        (["--problems"], "--problems needs a value"),
        (["--what", "1"], "no such option: --what"),
        (["--residency", "grid", "--dtype", "float64"], "float64 has no persistent kernel"),
    ],
)
def test_a_bad_command_line_is_refused(programs, arguments, complaint):
    done = run(programs["none"].result(), *arguments)
    assert done.returncode == 1
    assert complaint in done.stdout
