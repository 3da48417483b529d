"""The CUDA kernels, executed on the CPU outside PyTorch: they keep their contract under every
schedule and sanitizer, and defects planted in them are found."""

import re
import shutil
from typing import NamedTuple

import pytest

from rnn_cuda._plan import default_source_dir
from tests.emulated_programs import KERNEL_OPTIONS, NATIVE, SANITIZERS, run

pytestmark = pytest.mark.slow

KERNELS = ("launch", "walk_float32", "walk_tf32", "walk_bfloat16", "walk_float16")
PLANNER = ("geometry", "override")
# g++ does not see that what a kernel reads in one loop it has written in the one before.
OPTIONS = [*KERNEL_OPTIONS, "-Wno-maybe-uninitialized"]

# ThreadSanitizer's cost grows with the square of the number of threads.
PROBLEMS = {"none": ("--problems", "200"), "address": ("--problems", "100")}
PROBLEMS["thread"] = ("--small", "--problems", "100")


class Defect(NamedTuple):
    """An edit of a kernel's source, what finds it, and with what words."""

    file: str
    right: str
    wrong: str
    residency: str
    symptom: str
    sanitizer: str = "none"
    kernel: str = "walk_float32"
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
        "uint32_t* states(int step) { return states_ + (step & 1) * size_; }",
        "uint32_t* states(int) { return states_; }",
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
        "device::cluster_sync();  // every block runs and is ready",
        "device::sync_block();  // every block runs and is ready",
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
        "device::sync_block();\n      stage(",
        "stage(",
        "grid",
        WRONG_VALUE,
    ),
    "counters keep what the launch before left": Defect(
        "launch.cu",
        "device::clear_async(p.counters, bytes, stream)",
        "static_cast<int>(0 * bytes)",
        "grid",
        WRONG_VALUE,
        kernel="launch",
    ),
    "two directions share a counter": Defect(
        "exchanges.cuh",
        "const int64_t place = static_cast<int64_t>(blockIdx.y) * p.batch_tiles + tile;",
        "const int64_t place = tile;",
        "grid",
        WRONG_VALUE,
    ),
    "later launches begin at the first batch tile too": Defect(
        "launch.cu",
        "p.first_tile = static_cast<int>(tile);",
        "p.first_tile = 0;",
        "grid",
        WRONG_VALUE,
        kernel="launch",
    ),
    "a shuffle in a branch": Defect(
        "share.cuh",
        "sum = Engine::sum_units(sum);",
        "if (sample_[j] < moment_.active) sum = Engine::sum_units(sum);",
        "one_sm",
        "a divergent |a deadlock",
    ),
    "samples past the batch are stored": Defect(
        "share.cuh",
        "const bool active = sample_[j] < moment_.active;",
        "const bool active = true;",
        "one_sm",
        OVERRUN,
        "address",
    ),
    "one unit too many is stored": Defect(
        "share.cuh",
        "return unit(u) < p_.hidden_size;",
        "return unit(u) <= p_.hidden_size;",
        "cluster",
        OVERRUN,
        "address",
    ),
    "a packed step is looked for one row late": Defect(
        "parameters.cuh",
        "row_starts_[t] :",
        "row_starts_[t] + (t > 0) :",
        "one_sm",
        OVERRUN + "|output",
        "address",
    ),
    "a sample that has not begun, in reverse, forgets its initial state": Defect(
        "share.cuh",
        "const bool keeps = r_.reverse && r_.initial != nullptr;",
        "const bool keeps = false;",
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
        "int64_t{4} * kPartialBuffers * shape.row_warps",
        "int64_t{4} * shape.row_warps",
        "one_sm",
        "AddressSanitizer: use-after-poison",
        "address",
        kernel="launch",
    ),
    "the input has one buffer": Defect(
        "input_stage.cuh",
        "words_ + (step & 1) * p_.columns",
        "words_ + (step & 0) * p_.columns",
        "one_sm",
        WRONG_VALUE,
    ),
    "the tiles in registers have places in shared memory too": Defect(
        "weights.cuh",
        "round * per_round_ + i - held_places()",
        "round * per_round_ + i",
        "one_sm",
        "wrote outside of the arrays|output",
    ),
    "words that nobody publishes are not cleared": Defect(
        "recurrence.cuh",
        "if (exchange_.states(1) != exchange_.states(0)) exchange_.states(1)[item] = 0;",
        "",
        "one_sm",
        WRONG_VALUE,
    ),
    "a single step reads a sample past the batch": Defect(
        "launch.cu",
        "if (sample >= p.step.rows) return;",
        "if (sample > p.step.rows) return;",
        "streamed",
        OVERRUN,
        "address",
        kernel="launch",
    ),
    "the norms have one row too many": Defect(
        "launch.cu",
        "if (row >= p.rows) return;",
        "if (row > p.rows) return;",
        "one_sm",
        OVERRUN,
        "address",
        kernel="launch",
    ),
    "a fragment's halves are swapped": Defect(
        "engines.cuh",
        "mine[n * 8 * pitch], mine[n * 8 * pitch + 4]};",
        "mine[n * 8 * pitch + 4], mine[n * 8 * pitch]};",
        "one_sm",
        WRONG_VALUE,
        kernel="walk_bfloat16",
        dtype="bfloat16",
    ),
}


class CudaPrograms:
    """Checkers of the kernels as they are, and with one defect each.

    A defect is compiled for one kernel; the others are taken as they are.
    """

    def __init__(self, workshop):
        self.workshop = workshop
        self.right = {sanitizer: self._objects(sanitizer) for sanitizer in SANITIZERS}
        self.checkers = {
            sanitizer: workshop.link(f"cuda-{sanitizer}", list(objects.values()), sanitizer)
            for sanitizer, objects in self.right.items()
        }
        self.defective = {
            name: self._defective(f"defect{i}", defect)
            for i, (name, defect) in enumerate(DEFECTS.items())
        }

    def _compile(self, path, sanitizer, name, sources=None):
        options = [*OPTIONS, *SANITIZERS[sanitizer]]
        return self.workshop.compile(path, name, options, sources)

    def _objects(self, sanitizer):
        csrc = default_source_dir()
        paths = [NATIVE / "check_cuda.cpp"]
        paths += [csrc / "cuda" / f"{kernel}.cu" for kernel in KERNELS]
        paths += [csrc / "plan" / f"{part}.cpp" for part in PLANNER]
        return {p.stem: self._compile(p, sanitizer, f"cuda-{p.stem}-{sanitizer}") for p in paths}

    def _defective(self, name, defect):
        sources = self.workshop.folder / f"{name}-csrc"
        unused = shutil.ignore_patterns("cpu", "*.cpp")
        shutil.copytree(default_source_dir(), sources, ignore=unused)
        edited = sources / "cuda" / defect.file
        text = edited.read_text()
        assert text.count(defect.right) == 1, defect
        edited.write_text(text.replace(defect.right, defect.wrong))
        kernel = sources / "cuda" / f"{defect.kernel}.cu"
        objects = dict(self.right[defect.sanitizer])
        objects[defect.kernel] = self._compile(kernel, defect.sanitizer, name, sources)
        return self.workshop.link(name, list(objects.values()), defect.sanitizer)


@pytest.fixture(scope="module")
def programs(emulator_workshop):
    return CudaPrograms(emulator_workshop)


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_kernels_keep_their_contract(programs, sanitizer):
    done = run(programs.checkers[sanitizer].result(), *PROBLEMS[sanitizer])
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"ok: {PROBLEMS[sanitizer][-1]} problems" in done.stdout


@pytest.mark.parametrize("name", DEFECTS)
def test_a_planted_defect_is_found(programs, name):
    defect = DEFECTS[name]
    arguments = ["--residency", defect.residency, "--dtype", defect.dtype]
    program = programs.defective[name].result()
    done = run(program, *arguments, *PROBLEMS[defect.sanitizer])
    assert done.returncode != 0
    assert re.search(defect.symptom, done.stdout + done.stderr), done.stdout + done.stderr


def test_a_problem_can_be_run_again(programs):
    program = programs.checkers["none"].result()
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
    done = run(programs.checkers["none"].result(), *arguments)
    assert done.returncode == 1
    assert complaint in done.stdout
