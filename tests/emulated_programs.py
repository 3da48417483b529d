"""Programs that run CUDA kernels on the CPU, plain and under sanitizers."""

import os
import subprocess
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from rnn_cuda.build import default_source_dir, find_cxx

TESTS = Path(__file__).parent
NATIVE, EMULATOR = TESTS / "native", TESTS / "emulator"

# Left out is what AddressSanitizer or the results show anyway; and its checks are calls: half the
# time to compile.
UNDEFINED = ["-fsanitize=undefined", "-fno-sanitize=null,pointer-overflow"]
UNDEFINED += ["-fno-sanitize-recover=undefined"]
ADDRESS = ["-fsanitize=address", "--param", "asan-instrumentation-with-call-threshold=0"]
SANITIZERS = {
    "none": [],
    "address": [*ADDRESS, *UNDEFINED],
    "thread": ["-fsanitize=thread"],
}
SCHEDULES = ("ascending", "descending", "random:1", "starving:1")

# Kernels are compiled as C++; -g1 names the lines in what sanitizers report.
KERNEL_OPTIONS = ["-x", "c++", "-std=c++17", "-O1", "-g1", "-DRNN_CUDA_EMULATED"]
KERNEL_OPTIONS += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]

# Fresh memory is NaN, so that what is read before it is written shows in the results.
RUN_ENVIRONMENT = {
    "ASAN_OPTIONS": f"malloc_fill_byte=255:max_malloc_fill_size={1 << 30}",
    "TSAN_OPTIONS": "halt_on_error=1",
}


class Workshop:
    """Compiles and links, as many programs at a time as there are cores.

    Tasks wait for those they need, which must have been submitted before them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pool = ThreadPoolExecutor(os.cpu_count())
        # Without sanitizers: the emulator talks to them itself, if the program has one.
        self.emulator = [
            self.compile(source, f"emulator-{source.stem}", ["-std=c++17", "-O2", "-g1"])
            for source in sorted(EMULATOR.glob("*.cpp"))
        ]

    def compile(
        self, source: Path, name: str, options: list[str], headers: Path | None = None
    ) -> Future[Path]:
        def task() -> Path:
            target = self.folder / f"{name}.o"
            include = [f"-I{headers or default_source_dir()}", f"-I{TESTS}"]
            command = [find_cxx(), "-DRNN_CUDA_EMULATED", *options, *include, "-c", source]
            subprocess.run([*command, "-o", target], check=True)
            return target

        return self.pool.submit(task)

    def link(
        self,
        name: str,
        objects: list[Future[Path]],
        sanitizer: str,
        emulator: list[Future[Path]] | None = None,
    ) -> Future[Path]:
        """Link with the emulator. With -rdynamic its errors can name kernels."""

        def task() -> Path:
            target = self.folder / name
            files = [object_.result() for object_ in (*objects, *(emulator or self.emulator))]
            flags = [*SANITIZERS[sanitizer], "-rdynamic", "-pthread"]
            subprocess.run([find_cxx(), *flags, *files, "-o", target, "-ldl"], check=True)
            return target

        return self.pool.submit(task)


def run(program: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [program, *arguments],
        env=os.environ | RUN_ENVIRONMENT | environment,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        timeout=300,
    )
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("ThreadSanitizer cannot run where addresses are this random")
    return done
