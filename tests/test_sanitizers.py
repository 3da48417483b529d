"""The CPU kernel under AddressSanitizer and UBSan, outside PyTorch, against a naive loop."""

import os
import subprocess
from pathlib import Path

import pytest

from rnn_cuda import build
from rnn_cuda._plan import default_source_dir
from rnn_cuda._toolchain import find_cxx, torch_cxx_standard, torch_include_dirs

CHECKER = Path(__file__).parent / "native" / "check_recurrence.cpp"


def compile_checker(folder, kernel):
    binary = folder / "check_recurrence"
    includes = [f"-I{default_source_dir()}", *(f"-isystem{d}" for d in torch_include_dirs())]
    # No SIMD flags: the narrowest vectors have the most tails. -O0 compiles fastest.
    options = ["-O0", "-g1", "-fopenmp", "-fsanitize=address,undefined"]
    options += [f"-std={torch_cxx_standard()}", "-fno-sanitize-recover=undefined", *includes]
    subprocess.run([find_cxx(), *options, CHECKER, kernel, "-o", binary], check=True)
    return binary


def run_checker(binary):
    # libgomp keeps its threads until the process ends, which is no leak of ours.
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run(
        [binary, "300"], env=environment, capture_output=True, text=True, check=False, timeout=300
    )


@pytest.fixture(scope="module")
def compiler():
    try:
        return find_cxx()
    except build.CompilerNotFoundError as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_the_kernel_stays_inside_its_buffers_and_computes_the_contract(compiler, tmp_path):
    done = run_checker(compile_checker(tmp_path, default_source_dir() / "cpu" / "recurrence.cpp"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ok: 300 problems" in done.stdout


PLANTED_DEFECTS = {
    "a tail is stored as a whole vector": (
        "vector.h",
        "std::memcpy(to, &v, count * sizeof(T));",
        "std::memcpy(to, &v, sizeof v);",
    ),
    "a new sample of a packed batch does not get its initial state": (
        "recurrence.cpp",
        "for (int64_t i = rows(start + s - 1); i < rows(start + s); ++i)",
        "for (int64_t i = rows(start + s); i < rows(start + s); ++i)",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("defect", PLANTED_DEFECTS)
def test_the_checker_finds_a_planted_defect(compiler, tmp_path, defect):
    file_name, right, wrong = PLANTED_DEFECTS[defect]
    source = default_source_dir() / "cpu"
    for path in source.iterdir():
        text = path.read_text().replace('"../recurrence.h"', '"recurrence.h"')
        if path.name == file_name:
            assert right in text
            text = text.replace(right, wrong, 1)
        (tmp_path / path.name).write_text(text)
    done = run_checker(compile_checker(tmp_path, tmp_path / "recurrence.cpp"))
    assert done.returncode != 0
