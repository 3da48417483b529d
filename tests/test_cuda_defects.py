"""The CUDA kernels, executed on the CPU outside PyTorch: they keep their contract under every
schedule and sanitizer, and defects planted in them are found."""

import re
import shutil
from typing import NamedTuple

import pytest

from rnn_cuda.build import default_source_dir
from tests.emulated_programs import KERNEL_OPTIONS, NATIVE, SANITIZERS, run
from tests.planted_defects import plant

pytestmark = pytest.mark.slow

KERNELS = ("launch", "walk_float32", "walk_tf32", "walk_bfloat16", "walk_float16")
PLANNER = ("geometry", "override")
# Of the template that walk_bfloat16 instantiates: AddressSanitizer would see nothing new.
# (ThreadSanitizer has to see every synchronisation, or it takes what follows for a race.)
SAME_TEMPLATE = {"address": ("walk_float16",)}
# g++ does not see that what a kernel reads in one loop it has written in the one before.
OPTIONS = [*KERNEL_OPTIONS, "-Wno-maybe-uninitialized"]

# ThreadSanitizer's cost grows with the square of the number of threads.
PROBLEMS = {"none": ("--problems", "200"), "address": ("--problems", "100")}
PROBLEMS["thread"] = ("--small", "--problems", "100")


class Defect(NamedTuple):
    """An edit of a kernel's source, see planted_defects.py, what finds it, and with what words."""

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
        "a deadlock|output|asynchronous store",
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
        kernel="launch",
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
        kernel="launch",
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
        kernel="launch",
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
        "«row_starts_[t]» :",
        "row_starts_[t] + (t > 0)",
        "one_sm",
        OVERRUN + "|output",
        "address",
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
        "address",
        kernel="launch",
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
        "wrote outside of the arrays|output",
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
        r"output\[\d+, \d+\] is -?nan",
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
        kernel="walk_bfloat16",
        dtype="bfloat16",
    ),
    "a state is carried on before it is rounded": Defect(
        "share.cuh",
        "z[j][u] = device::to_float(s);",
        "",
        "one_sm",
        WRONG_VALUE,
        kernel="walk_bfloat16",
        dtype="bfloat16",
    ),
    "an input is truncated to TF32, not rounded": Defect(
        "engines.cuh",
        "    return device::round_to_tf32(raw);",
        "    return device::bits_of(raw);",
        "one_sm",
        WRONG_VALUE,
        kernel="walk_tf32",
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
        kernel="launch",
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
        "mine[«n * 8 * pitch»], mine[n * 8 * pitch + 4]};",
        "n * 8 * pitch + 4",
        "one_sm",
        WRONG_VALUE,
        kernel="walk_bfloat16",
        dtype="bfloat16",
    ),
}


class CudaPrograms:
    """Checkers of the kernels as they are, and with one defect each.

    Defects are compiled for one kernel; the others are taken as they are.
    """

    def __init__(self, workshop):
        self.workshop = workshop
        self.right = {}
        for sanitizer in SANITIZERS:  # "none" first
            self.right[sanitizer] = self._objects(sanitizer)
        self.checkers = {
            sanitizer: workshop.link(f"cuda-{sanitizer}", list(objects.values()), sanitizer)
            for sanitizer, objects in self.right.items()
        }
        self.defective = {
            program: self._defective(*program)
            for program in {(d.kernel, d.sanitizer): None for d in DEFECTS.values()}
        }

    def _compile(self, path, sanitizer, name, *options, sources=None):
        options = [*OPTIONS, *SANITIZERS[sanitizer], *options]
        return self.workshop.compile(path, name, options, sources)

    def _objects(self, sanitizer):
        csrc = default_source_dir()
        paths = [NATIVE / "check_cuda.cpp"]
        paths += [csrc / "cuda" / f"{kernel}.cu" for kernel in KERNELS]
        paths += [csrc / "plan" / f"{part}.cpp" for part in PLANNER]
        objects = {
            p.stem: self._compile(p, sanitizer, f"cuda-{p.stem}-{sanitizer}")
            for p in paths
            if p.stem not in SAME_TEMPLATE.get(sanitizer, ())
        }
        return objects if sanitizer == "none" else {**self.right["none"], **objects}

    def _defective(self, kernel, sanitizer):
        """Compile a kernel with all defects that this sanitizer finds in it."""
        name = f"{kernel}-{sanitizer}-defects"
        sources = self.workshop.folder / f"{name}-csrc"
        unused = shutil.ignore_patterns("cpu", "*.cpp")
        shutil.copytree(default_source_dir(), sources, ignore=unused)
        edits = {
            number: defect
            for number, defect in enumerate(DEFECTS.values())
            if (defect.kernel, defect.sanitizer) == (kernel, sanitizer)
        }
        options = plant(sources / "cuda", edits)
        # A defect that shows without a sanitizer shows in the first problems: not worth optimising.
        options += ["-O0"] if sanitizer == "none" else []
        objects = dict(self.right[sanitizer])
        path = sources / "cuda" / f"{kernel}.cu"
        objects[kernel] = self._compile(path, sanitizer, name, *options, sources=sources)
        return self.workshop.link(name, list(objects.values()), sanitizer)


@pytest.fixture(scope="module")
def programs(emulator_workshop):
    return CudaPrograms(emulator_workshop)


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_kernels_keep_their_contract(programs, sanitizer):
    done = run(programs.checkers[sanitizer].result(), *PROBLEMS[sanitizer])
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"ok: {PROBLEMS[sanitizer][-1]} problems" in done.stdout


def test_clusters_are_no_larger_than_the_device_has_room_for(programs):
    device = "multiprocessors=8,max_cluster_size=16"
    arguments = ["--residency", "cluster", "--problems", "40"]
    program = programs.checkers["none"].result()
    done = run(program, *arguments, RNN_CUDA_EMULATOR_DEVICE=device)
    assert done.stdout == "ok: 40 problems\n"
    done = run(program, *arguments, RNN_CUDA_EMULATOR_DEVICE="multiprocessors=1")
    assert done.stdout == "skipped: this device runs no clusters\n"


@pytest.mark.parametrize("name", DEFECTS)
def test_a_planted_defect_is_found(programs, name):
    defect = DEFECTS[name]
    arguments = ["--residency", defect.residency, "--dtype", defect.dtype]
    program = programs.defective[defect.kernel, defect.sanitizer].result()
    number = str(list(DEFECTS).index(name))
    done = run(program, *arguments, *PROBLEMS[defect.sanitizer], RNN_CUDA_PLANTED=number)
    assert done.returncode != 0
    assert re.search(defect.symptom, done.stdout + done.stderr), done.stdout + done.stderr


def test_nothing_is_found_where_no_defect_is_chosen(programs):
    for (kernel, sanitizer), program in programs.defective.items():
        problems = [*PROBLEMS[sanitizer][:-1], "3"]
        done = run(program.result(), *problems, RNN_CUDA_PLANTED="-1")
        assert done.stdout == "ok: 3 problems\n", (kernel, sanitizer, done.stdout + done.stderr)


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
