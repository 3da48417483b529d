"""The CPU kernels outside PyTorch: a naive loop as judge, sanitizers, and defects to be found."""

import shutil
import subprocess
from typing import NamedTuple

import pytest

from rnn_cuda.build import Toolchain, default_source_dir, find_cxx, torch_cxx_standard
from rnn_cuda.build import torch_include_dirs as torch_includes
from tests.native_programs import NATIVE, SANITIZERS, plant, run, run_with_defect

pytestmark = pytest.mark.slow

KERNELS = ("recurrence", "gradients")
PROBLEMS, VECTORISED_PROBLEMS, ARM_PROBLEMS = "300", "900", "30"
OPTIONS = [f"-std={torch_cxx_standard()}", "-fopenmp"]
OPTIONS += [f"-isystem{folder}" for folder in torch_includes()]


class Defect(NamedTuple):
    """An edit of a kernel's source, see native_programs.py, and what has to come of it."""

    kernel: str
    file: str
    right: str
    wrong: str
    symptom: str


DEFECTS = {
    "a tail is stored as a whole vector": Defect(
        "recurrence",
        "vector.h",
        "std::memcpy(to, &v, «count * sizeof(float)»);",
        "sizeof v",
        "AddressSanitizer",
    ),
    "a new sample of a packed batch does not get its initial state": Defect(
        "recurrence",
        "walker.h",
        "for (int64_t i = «rows(s - 1)»; i < rows(s); ++i)",
        "rows(s)",
        "output[",
    ),
    "a chunk does not begin with the last states of the one before": Defect(
        "gradients",
        "walker.h",
        "if («start > 0»)",
        "start < 0",
        ", not ",  # whichever result is looked at first
    ),
    "the last inputs of a chunk are not projected": Defect(
        "recurrence",
        "walker.h",
        "const int64_t chunk_rows = input_row_[«steps»];",
        "steps - 1",
        "output[",
    ),
    "a team smaller than asked for is not noticed": Defect(
        "recurrence",
        "recurrence.cpp",
        "if («threads == division.threads») {",
        "true",
        "output[",
    ),
    "the empty rows of a chunk's last slot are counted": Defect(
        "gradients",
        "gradients.cpp",
        "s + 1 == steps ? filled : walker_.slot_row(s + 2) - walker_.slot_row(s + 1)",
        "walker_.slot_row(s + 2) - walker_.slot_row(s + 1)",
        "grad_",
    ),
    "h_{t-1} is taken from the wrong side": Defect(
        "gradients",
        "gradients.cpp",
        "r_.reverse ? place.time - 1 : place.time + 1",
        "r_.reverse ? place.time + 1 : place.time - 1",
        "grad_weight_hidden[",
    ),
    "h_0 is left out of the recurrent weight's gradient": Defect(
        "gradients",
        "gradients.cpp",
        "if (g_.initial == nullptr) return nullptr;",
        "return nullptr;",
        "grad_weight_hidden[",
    ),
    "a tail of a gradient's row is stored as a whole vector": Defect(
        "gradients",
        "gradients.cpp",
        "store_converted(row + first + n, sum, «columns - first - n»);",
        "kLanes<T>",
        "AddressSanitizer",
    ),
    "samples that end before the sequence get no initial gradient": Defect(
        "gradients",
        "gradients.cpp",
        "for (int64_t s = «0»; s < steps; ++s)\n        if (walker_.rows(s + 1)",
        "steps - 1",
        "grad_initial[",
    ),
    "the adjoints of a tile's rows are all kept as its first row's": Defect(
        "gradients",
        "walker.h",
        "keep_adjoints(step, «region.first + i», n,",
        "region.first",
        "adjoint",
    ),
    "what a unit carries is left out of the initial gradient": Defect(
        "gradients",
        "gradients.cpp",
        "if («added != nullptr») sum",
        "false",
        "grad_initial[",
    ),
    "all blocks of a panel are multiplied with a row's first states": Defect(
        "recurrence",
        "walker.h",
        "«k / kLanes<E>» * buffers_.states.stride",
        "0",
        "output[",
    ),
    "an initial state that was given is not multiplied": Defect(
        "recurrence",
        "call.h",
        "r_.initial != nullptr || (looks_first_ && found_infinite_)",
        "looks_first_ && found_infinite_",
        "output[",
    ),
    "the output of a thread's own columns begins with the first ones": Defect(
        "recurrence",
        "walker.h",
        "states.at(step.row + i, p * padded_units_ + «first_unit_»);",
        "0",
        "output[",
    ),
    "threads that share all samples each leave a row out": Defect(
        "gradients",
        "gradients.cpp",
        "«count * (share_.part + 1) / share_.parts»}",
        "count * (share_.part + 1) / share_.parts - (share_.parts > 1)",
        "grad_input[",
    ),
    "threads that share all samples each leave an input out": Defect(
        "recurrence",
        "walker.h",
        "const int64_t end = «count * (share_.part + 1) / share_.parts»;",
        "count * (share_.part + 1) / share_.parts - (share_.parts > 1)",
        "output[",
    ),
    "a matrix used where it lies is read from its first block only": Defect(
        "recurrence",
        "streamed.h",
        "«k» * (matrix.transposed ? matrix.stride : 1)",
        "0",
        "output[",
    ),
    "all squares of a streamed matrix are multiplied with a row's first values": Defect(
        "recurrence",
        "streamed.h",
        "const T* const values = left.at(0, «k»);",
        "0",
        ", not ",  # whichever result is looked at first
    ),
    "a streamed product of a unit's second sum is added to its first": Defect(
        "recurrence",
        "unpacked_steps.h",
        "sums + «vector * kLanes<T>», sums_stride",
        "0",
        "output[",
    ),
    "a streamed matrix's last row is read beyond its end": Defect(
        "gradients",
        "streamed.h",
        "load_converted(from[j] + n, «columns - n»)",
        "kLanes<T>",
        "AddressSanitizer",
    ),
    "the gradient of a flat W is cut as that of a wide one": Defect(
        "gradients",
        "gradient_scratch.h",
        "input_is_left(«!uses_input_in_place» &&",
        "true",
        "grad_weight_input[",
    ),
    "an empty row of a chunk is taken for the next one": Defect(
        "gradients",
        "gradients.cpp",
        "return x == nullptr ? reinterpret_cast<const Storage*>(at(extra_.zeros)) : x;",
        "return x;",
        "AddressSanitizer",
    ),
    "threads that share columns of the input's gradient each leave a line out": Defect(
        "gradients",
        "gradients.cpp",
        "std::min(columns, «lines.end * kLine»)};",
        "(lines.end - 1) * kLine",
        "grad_input[",
    ),
    "of two outer products one is written": Defect(
        "gradients",
        "outer_product.h",
        "if (rows > 1) sum = multiply_add(sum, second, load(from + kLanes<T>));",
        "",
        "grad_weight_",
    ),
}


@pytest.fixture(scope="module")
def programs(workshop):
    """Of each kernel, one under sanitizers with all defects, and one in this machine's vectors.

    The former has no SIMD flags: the narrowest vectors have the most tails. -O0 compiles fastest.
    ThreadSanitizer would take minutes.
    """
    version = subprocess.run([find_cxx(), "--version"], capture_output=True, text=True, check=True)
    if "clang" in version.stdout:
        pytest.skip("threads.cpp stands in for g++'s OpenMP runtime, not for clang's")
    planted, with_defects = plant(DEFECTS, "cpu", workshop.folder / "cpu-csrc")
    variants = {
        "sanitized": (planted, ["-g1", *SANITIZERS["address"], *with_defects]),
        "vectorised": (
            default_source_dir(),
            ["-ffp-contract=fast", *Toolchain.discover().simd_flags],
        ),
    }
    threads = workshop.compile(NATIVE / "threads.cpp", "threads", [*OPTIONS, "-O1"])
    linked = {}
    for kernel in KERNELS:
        name = f"check_{kernel}"
        judge = workshop.compile(NATIVE / f"{name}.cpp", name, [*OPTIONS, "-O1"])
        for variant, (sources, options) in variants.items():
            source, name = sources / "cpu" / f"{kernel}.cpp", f"{kernel}-{variant}"
            compiled = workshop.compile(source, name, [*OPTIONS, "-O0", *options], sources)
            flags = SANITIZERS["address"] if variant == "sanitized" else []
            linked[kernel, variant] = workshop.link(name, [compiled, judge, threads], flags)
    return linked


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_keeps_its_contract(programs, kernel):
    done = run(programs[kernel, "sanitized"].result(), PROBLEMS)
    assert done.stdout == f"ok: {PROBLEMS} problems\n", done.stdout + done.stderr


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_keeps_its_contract_in_the_vectors_of_this_machine(programs, kernel):
    options = ["pairs"] if "-mavx512bf16" in Toolchain.discover().simd_flags else []
    done = run(programs[kernel, "vectorised"].result(), VECTORISED_PROBLEMS, *options)
    assert done.stdout == f"ok: {VECTORISED_PROBLEMS} problems\n", done.stdout + done.stderr


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_keeps_its_contract_on_arm64(kernel, tmp_path):
    """Compiled for it and emulated, which shows what is computed, not how Arm orders memory."""
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("needs aarch64-linux-gnu-g++ and qemu-aarch64")
    sources = [NATIVE / f"check_{kernel}.cpp", NATIVE / "threads.cpp"]
    sources.append(default_source_dir() / "cpu" / f"{kernel}.cpp")
    options = [*OPTIONS, f"-I{default_source_dir()}", "-O1", "-ffp-contract=fast", "-static"]
    binary = tmp_path / kernel
    subprocess.run([compiler, *options, "-pthread", *sources, "-o", binary], check=True)
    done = run(binary, ARM_PROBLEMS, under=[emulator])
    assert done.stdout == f"ok: {ARM_PROBLEMS} problems\n", done.stdout + done.stderr


@pytest.mark.parametrize("name", DEFECTS)
def test_a_planted_defect_is_found(programs, name):
    defect = DEFECTS[name]
    program = programs[defect.kernel, "sanitized"].result()
    done = run_with_defect(program, DEFECTS, name, PROBLEMS, "float32")
    assert done.returncode != 0
    assert defect.symptom in done.stdout + done.stderr
