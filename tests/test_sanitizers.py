"""The CPU kernels outside PyTorch: sanitizers, naive loops as judges, and defects to be found."""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest

from rnn_cuda.build import (
    CompilerNotFoundError,
    Toolchain,
    default_source_dir,
    find_cxx,
    torch_cxx_standard,
)
from rnn_cuda.build import torch_include_dirs as torch_includes
from tests.emulated_programs import NATIVE, RUN_ENVIRONMENT
from tests.emulated_programs import SANITIZERS as ALL_SANITIZERS
from tests.planted_defects import plant

pytestmark = pytest.mark.slow

KERNELS = ("recurrence", "gradients")
PROBLEMS = 300
ARM_PROBLEMS = 30

# ThreadSanitizer would take minutes.
SANITIZERS = {"address": ALL_SANITIZERS["address"]}


class Defect(NamedTuple):
    """An edit of the kernels' source, see planted_defects.py, and what has to come of it.

    One that shows in the results is compiled without sanitizers, in a fraction of the time.
    """

    kernel: str
    sanitizer: str
    file: str
    right: str
    wrong: str
    symptom: str


DEFECTS = {
    "a tail is stored as a whole vector": Defect(
        "recurrence",
        "address",
        "vector.h",
        "std::memcpy(to, &v, «count * sizeof(float)»);",
        "sizeof v",
        "AddressSanitizer",
    ),
    "a new sample of a packed batch does not get its initial state": Defect(
        "recurrence",
        "none",
        "walker.h",
        "for (int64_t i = «rows(s - 1)»; i < rows(s); ++i)",
        "rows(s)",
        "output[",
    ),
    "a chunk does not begin with the last states of the one before": Defect(
        "gradients",
        "none",
        "walker.h",
        "if («start > 0»)",
        "start < 0",
        ", not ",  # whichever result is looked at first
    ),
    "the last inputs of a chunk are not projected": Defect(
        "recurrence",
        "none",
        "walker.h",
        "const int64_t chunk_rows = input_row_[«steps»];",
        "steps - 1",
        "output[",
    ),
    "a team smaller than asked for is not noticed": Defect(
        "recurrence",
        "none",
        "recurrence.cpp",
        "if («threads == division.threads») {",
        "true",
        "output[",
    ),
    "the empty rows of a chunk's last slot are counted": Defect(
        "gradients",
        "none",
        "gradients.cpp",
        "s + 1 == steps ? filled : walker_.slot_row(s + 2) - walker_.slot_row(s + 1)",
        "walker_.slot_row(s + 2) - walker_.slot_row(s + 1)",
        "grad_",
    ),
    "h_{t-1} is taken from the wrong side": Defect(
        "gradients",
        "none",
        "gradients.cpp",
        "r_.reverse ? place.time - 1 : place.time + 1",
        "r_.reverse ? place.time + 1 : place.time - 1",
        "grad_weight_hidden[",
    ),
    "h_0 is left out of the recurrent weight's gradient": Defect(
        "gradients",
        "none",
        "gradients.cpp",
        "if (g_.initial == nullptr) return nullptr;",
        "return nullptr;",
        "grad_weight_hidden[",
    ),
    "a tail of a gradient's row is stored as a whole vector": Defect(
        "gradients",
        "address",
        "gradients.cpp",
        "load(sums + n), «columns - first - n»);",
        "kLanes<T>",
        "AddressSanitizer",
    ),
    "samples that end before the sequence get no initial gradient": Defect(
        "gradients",
        "none",
        "gradients.cpp",
        "for (int64_t s = «0»; s < steps; ++s)\n        if (walker_.rows(s + 1)",
        "steps - 1",
        "grad_initial[",
    ),
    "the adjoints of a tile's rows are all kept as its first row's": Defect(
        "gradients",
        "none",
        "walker.h",
        "step.z.row(«region.first + i», region.column)",
        "region.first",
        "adjoint_norm[",
    ),
    "all blocks of a panel are multiplied with a row's first states": Defect(
        "recurrence",
        "none",
        "walker.h",
        "«k / kLanes<E>» * buffers_.states.stride",
        "0",
        "output[",
    ),
    "an initial state that was given is not multiplied": Defect(
        "recurrence",
        "none",
        "call.h",
        "r_.initial != nullptr || (looks_first_ && found_infinite_)",
        "looks_first_ && found_infinite_",
        "output[",
    ),
    "the output of a thread's own columns begins with the first ones": Defect(
        "recurrence",
        "none",
        "walker.h",
        "states.at(step.row + i, p * padded_units_ + «first_unit_»);",
        "0",
        "output[",
    ),
    "threads that share all samples each leave a row out": Defect(
        "gradients",
        "none",
        "gradients.cpp",
        "«count * (share_.part + 1) / share_.parts»}",
        "count * (share_.part + 1) / share_.parts - (share_.parts > 1)",
        ", not ",  # a norm, or a row of the input's gradient
    ),
    "threads that share all samples each leave an input out": Defect(
        "recurrence",
        "none",
        "walker.h",
        "const int64_t end = «count * (share_.part + 1) / share_.parts»;",
        "count * (share_.part + 1) / share_.parts - (share_.parts > 1)",
        "output[",
    ),
    "a matrix used where it lies is read from its first block only": Defect(
        "recurrence",
        "none",
        "streamed.h",
        "«k» * (matrix.transposed ? matrix.stride : 1)",
        "0",
        "output[",
    ),
    "all squares of a streamed matrix are multiplied with a row's first values": Defect(
        "recurrence",
        "none",
        "streamed.h",
        "const T* const values = left.at(0, «k»);",
        "0",
        "output[",
    ),
    "a streamed matrix's last row is read beyond its end": Defect(
        "gradients",
        "address",
        "streamed.h",
        "load_converted(from[j] + n, «columns - n»)",
        "kLanes<T>",
        "AddressSanitizer",
    ),
    "the gradient of a flat W is cut as that of a wide one": Defect(
        "gradients",
        "none",
        "gradient_scratch.h",
        "input_is_left(«!uses_input_in_place» &&",
        "true",
        "grad_weight_input[",
    ),
    "an empty row of a chunk is taken for the next one": Defect(
        "gradients",
        "address",
        "gradients.cpp",
        "return x == nullptr ? reinterpret_cast<const Storage*>(at(extra_.zeros)) : x;",
        "return x;",
        "AddressSanitizer",
    ),
    "threads that share columns of the input's gradient each leave a line out": Defect(
        "gradients",
        "none",
        "gradients.cpp",
        "std::min(columns, «lines.end * kLine»)};",
        "(lines.end - 1) * kLine",
        "grad_input[",
    ),
    "of two outer products one is written": Defect(
        "gradients",
        "none",
        "outer_product.h",
        "if (rows > 1) sum = multiply_add(sum, second, load(from + kLanes<T>));",
        "",
        "grad_weight_",
    ),
}


class Workshop:
    """Compiles and links checkers, as many at a time as there are cores."""

    def __init__(self, folder, pool):
        self.folder = folder
        self.pool = pool
        self.simd_flags = Toolchain.discover().simd_flags
        sources = [*(f"check_{kernel}" for kernel in KERNELS), "threads"]
        self.judges = {
            source: pool.submit(self._compile, NATIVE / f"{source}.cpp", source, ["-O1"])
            for source in sources
        }
        self.checkers = {
            (kernel, sanitizer): pool.submit(self._checker, kernel, sanitizer)
            for kernel in KERNELS
            for sanitizer in SANITIZERS
        }
        self.vectorised = {
            kernel: pool.submit(self._vectorised_checker, kernel) for kernel in KERNELS
        }
        self.defective = {
            (kernel, sanitizer): pool.submit(self._defective_checker, kernel, sanitizer)
            for kernel in KERNELS
            for sanitizer in ("none", "address")
        }

    def _compile(self, source, name, options, headers=None):
        target = self.folder / f"{name}.o"
        includes = [f"-I{headers or default_source_dir()}"]
        includes += [f"-isystem{folder}" for folder in torch_includes()]
        standard = f"-std={torch_cxx_standard()}"
        subprocess.run(
            [find_cxx(), standard, *options, *includes, "-c", source, "-o", target], check=True
        )
        return target

    def _checker(self, kernel, sanitizer, *, sources=None, name=None, planted=()):
        sources = sources or default_source_dir()
        name = name or f"{kernel}-{sanitizer}"
        flags = ALL_SANITIZERS[sanitizer]
        # No SIMD flags: the narrowest vectors have the most tails. -O0 compiles fastest.
        options = ["-O0", "-g1", "-fopenmp", *flags, *planted]
        compiled = self._compile(sources / "cpu" / f"{kernel}.cpp", name, options, sources)
        return self._linked(kernel, compiled, name, flags)

    def _vectorised_checker(self, kernel):
        name = f"{kernel}-vectorised"
        options = ["-O0", "-ffp-contract=fast", "-fopenmp", *self.simd_flags]
        compiled = self._compile(default_source_dir() / "cpu" / f"{kernel}.cpp", name, options)
        return self._linked(kernel, compiled, name, [])

    def _linked(self, kernel, compiled, name, flags):
        judges = [self.judges[source].result() for source in (f"check_{kernel}", "threads")]
        binary = self.folder / name
        subprocess.run(
            [find_cxx(), *flags, "-pthread", *judges, compiled, "-o", binary], check=True
        )
        return binary

    def _defective_checker(self, kernel, sanitizer):
        """Compile a kernel with all defects that this sanitizer finds in it."""
        name = f"{kernel}-{sanitizer}-defects"
        sources = self.folder / f"{name}-csrc"
        shutil.copytree(default_source_dir(), sources)
        edits = {
            number: defect
            for number, defect in enumerate(DEFECTS.values())
            if (defect.kernel, defect.sanitizer) == (kernel, sanitizer)
        }
        planted = plant(sources / "cpu", edits)
        # Of one type: compiles in half the time.
        file = sources / "cpu" / f"{kernel}.cpp"
        other_types = r" +case ScalarType::(?!Float32).*\n"
        text, removed = re.subn(other_types, "", file.read_text())
        assert removed == 3
        file.write_text(text)
        return self._checker(kernel, sanitizer, sources=sources, name=name, planted=planted)


def run(*command, problems=PROBLEMS, options=(), **environment):
    return subprocess.run(
        [*command, str(problems), *options],
        env=os.environ | RUN_ENVIRONMENT | environment,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        timeout=300,
    )


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    try:
        compiler = find_cxx()
    except CompilerNotFoundError as error:
        pytest.skip(str(error))
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
    if "clang" in version.stdout:
        pytest.skip("threads.cpp stands in for g++'s OpenMP runtime, not for clang's")
    pool = ThreadPoolExecutor(os.cpu_count())
    yield Workshop(tmp_path_factory.mktemp("native"), pool)
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_keeps_its_contract(workshop, kernel, sanitizer):
    done = run(workshop.checkers[kernel, sanitizer].result())
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"ok: {PROBLEMS} problems" in done.stdout


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_keeps_its_contract_in_the_vectors_of_this_machine(workshop, kernel):
    options = ["pairs"] if "-mavx512bf16" in workshop.simd_flags else []
    done = run(workshop.vectorised[kernel].result(), options=options, problems=3 * PROBLEMS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"ok: {3 * PROBLEMS} problems" in done.stdout


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_keeps_its_contract_on_arm64(kernel, tmp_path):
    """Compiled for it and emulated, which shows what is computed, not how Arm orders memory."""
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("needs aarch64-linux-gnu-g++ and qemu-aarch64")
    sources = [NATIVE / f"check_{kernel}.cpp", NATIVE / "threads.cpp"]
    sources.append(default_source_dir() / "cpu" / f"{kernel}.cpp")
    options = ["-O1", "-ffp-contract=fast", "-fopenmp", "-static", "-pthread"]
    includes = [f"-I{default_source_dir()}", *(f"-isystem{folder}" for folder in torch_includes())]
    standard, binary = f"-std={torch_cxx_standard()}", tmp_path / kernel
    command = [compiler, standard, *options, *includes, *sources, "-o", binary]
    subprocess.run(command, check=True)
    done = run(emulator, binary, problems=ARM_PROBLEMS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"ok: {ARM_PROBLEMS} problems" in done.stdout


@pytest.mark.parametrize("name", DEFECTS)
def test_a_planted_defect_is_found(workshop, name):
    defect = DEFECTS[name]
    number = str(list(DEFECTS).index(name))
    program = workshop.defective[defect.kernel, defect.sanitizer].result()
    done = run(program, options=["float32"], RNN_CUDA_PLANTED=number)
    assert done.returncode != 0
    assert defect.symptom in done.stdout + done.stderr


@pytest.mark.parametrize("sanitizer", ["none", "address"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_nothing_is_found_where_no_defect_is_chosen(workshop, kernel, sanitizer):
    program = workshop.defective[kernel, sanitizer].result()
    done = run(program, options=["float32"], problems=PROBLEMS // 10, RNN_CUDA_PLANTED="-1")
    assert done.returncode == 0, done.stdout + done.stderr
