"""The emulator of CUDA kernels finds what is wrong, says so, and leaves what is right alone."""

import re

import pytest

from tests.native_programs import EMULATED_OPTIONS, EMULATOR, NATIVE, SANITIZERS, SCHEDULES, run

pytestmark = pytest.mark.slow

RIGHT = (
    "shuffles",
    "votes",
    "blocks",
    "shared memory is NaN",
    "products of bfloat16",
    "products of float16",
    "products of TF32",
    "clusters",
    "16 bytes to a cluster",
    "grids",
    "write within an array",
    "no race after sync_warp",
    "no race after sync_block",
    "no race after a counter",
    "read before overwritten",
)

# Without any sanitizer, under any schedule.
REFUSED = {
    "shuffle in a branch": "a divergent warp collective: others wait at s",
    "barrier in a branch": "a divergent barrier: others wait at sync_block",
    "barrier for half a warp": "a divergent ",
    "early return": "a thread of the block returned|a thread returns while others wait for it",
    "early return of a lane": "a lane of the warp returned|a thread returns while others wait",
    "shuffle without partner": "a shuffle from lane",
    "waits for ever": "a deadlock: nobody can go on",
    "spins for ever": "a livelock: a spin goes on and on",
    "votes for ever": "a livelock: threads run, but nobody gets to a barrier",
    "no barrier_init": "a memory barrier that is not initialised",
    "too many arrivals": "more arrivals at a memory barrier than it was initialised for",
    "too many bytes": "a memory barrier waits for more bytes than it can count",
    "too few bytes expected": "a deadlock: nobody can go on",
    "too many bytes expected": "a deadlock: nobody can go on",
    "wrong parity": "a deadlock: nobody can go on",
    "two phases late": "a deadlock: nobody can go on",
    "return without cluster_sync": "returns with no cluster_sync after a store into it",
    "expect what never comes": "returns while a memory barrier waits for more",
    "send before cluster_sync": "a block that has not yet carved its shared memory",
    "send to nobody": "a block that the cluster does not have",
    "send to a red zone": "outside of the arrays in shared memory",
    "send 16 misaligned bytes": "not aligned to its size",
    "write past an array": "wrote outside of the arrays it carved",
    "misaligned": "an access that is not aligned",
    "carve more than asked for": "carved 88 bytes, but the launch asked for 87",
    "too many threads": "1025 threads in a block, not 1 to 1024",
    "too much shared memory": "232449 bytes of shared memory .* this device has 232448",
    "too large a cluster": "clusters of 17 blocks, but this device has at most 16",
    "half a cluster": "a grid of 6 blocks in clusters of 4",
    "too large a grid": "a cooperative launch of 133 blocks, .* 132 multiprocessors",
}

RACES = (
    "race in a block",
    "race after a shuffle",
    "race between blocks",
    "race in a grid",
    "read before a store arrives",
    "overwritten before read",
)


@pytest.fixture(scope="module")
def compiled(workshop):
    source = NATIVE / "check_emulator.cpp"
    return {
        sanitizer: workshop.compile(
            source, f"check_emulator-{sanitizer}", [*EMULATED_OPTIONS, *flags]
        )
        for sanitizer, flags in SANITIZERS.items()
    }


@pytest.fixture(scope="module")
def checkers(workshop, compiled):
    return {
        sanitizer: workshop.link_emulated(f"check-{sanitizer}", [program], sanitizer)
        for sanitizer, program in compiled.items()
    }


# What happens before what, as ThreadSanitizer sees it, depends little on the schedule.
@pytest.mark.parametrize(
    ("sanitizer", "schedule"),
    [("none", s) for s in SCHEDULES]
    + [("address", s) for s in SCHEDULES]
    + [("thread", "random:1")],
)
def test_right_kernels_compute_what_they_should(checkers, sanitizer, schedule):
    for case in RIGHT:
        done = run(checkers[sanitizer].result(), case, RNN_CUDA_EMULATOR_SCHEDULE=schedule)
        assert done.stdout == "ok\n", case + done.stdout + done.stderr


@pytest.mark.parametrize("case", ["conversions", "orders", "names of schedules"])
def test_what_is_no_kernel(checkers, case):
    assert run(checkers["none"].result(), case).stdout == "ok\n"


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_kernel_is_refused_with_a_reason(checkers, case):
    for schedule in SCHEDULES:
        done = run(checkers["none"].result(), case, RNN_CUDA_EMULATOR_SCHEDULE=schedule)
        assert done.returncode == 1
        assert re.search(f"launch failed: check::.*{REFUSED[case]}", done.stdout), done.stdout


def test_an_error_names_kernel_thread_block_and_line(checkers):
    done = run(checkers["none"].result(), "waits for ever", RNN_CUDA_EMULATOR_SCHEDULE="ascending")
    lines = (NATIVE / "check_emulator.cpp").read_text().splitlines()
    spin = next(n for n, text in enumerate(lines, 1) if "load_acquire(p.u) == 1);" in text)
    assert done.stdout.startswith(
        "launch failed: check::waits_for_ever(check::Numbers): a deadlock: nobody can go on\n"
    )
    place = re.escape(str(NATIVE / "check_emulator.cpp"))
    assert re.search(
        r"1 thread waits: thread 0 \(warp 0, lane 0\) of block \(0, 0\), "
        rf"at RNN_CUDA_SPIN_UNTIL, {place}:{spin}\n",
        done.stdout,
    )
    assert "63 threads wait, for instance thread 1 (warp 0, lane 1)" in done.stdout


@pytest.mark.parametrize("case", RACES)
def test_threads_that_race_are_reported(checkers, case):
    done = run(checkers["thread"].result(), case)
    assert "WARNING: ThreadSanitizer: data race" in done.stderr
    assert "check_emulator.cpp" in done.stderr


def test_an_overrun_is_reported_where_it_happens(checkers):
    done = run(checkers["address"].result(), "write past an array")
    assert "AddressSanitizer: use-after-poison" in done.stderr
    assert "check::write_past_an_array" in done.stderr


def test_a_store_may_arrive_late(checkers):
    program = checkers["none"].result()
    late = {"RNN_CUDA_EMULATOR_SCHEDULE": "ascending"}
    done = run(program, "read before a store arrives", **late)
    assert done.stdout == "differs: what was read had not arrived\n"
    done = run(program, "return before a store arrives", **late)
    assert "returns while stores are on their way to it" in done.stdout
    at_once = {"RNN_CUDA_EMULATOR_SCHEDULE": "descending"}
    assert run(program, "read before a store arrives", **at_once).stdout == "ok\n"


def test_the_made_up_device_can_be_chosen(checkers):
    program = checkers["none"].result()
    device = "multiprocessors=8,capability=8.6,kernels=8.0"
    done = run(program, "a made-up device", RNN_CUDA_EMULATOR_DEVICE=device)
    assert done.stdout == "ok\n"
    for wrong in ("multiprocessors", "processors=8", "multiprocessors=x", "capability=9.0x"):
        done = run(program, "shuffles", RNN_CUDA_EMULATOR_DEVICE=wrong)
        assert f"RNN_CUDA_EMULATOR_DEVICE: cannot read '{wrong}'" in done.stdout


def test_kernels_compiled_for_an_older_device_run_in_no_cluster(checkers):
    program = checkers["none"].result()
    assert run(program, "clusters", RNN_CUDA_EMULATOR_DEVICE="kernels=9.0").stdout == "ok\n"
    done = run(program, "clusters", RNN_CUDA_EMULATOR_DEVICE="kernels=8.0")
    assert "but the kernels loaded are for compute capability 8.0 and have none" in done.stdout


def test_a_schedule_that_does_not_exist_is_refused(checkers):
    done = run(checkers["none"].result(), "shuffles", RNN_CUDA_EMULATOR_SCHEDULE="random")
    assert "a schedule is ascending, descending, random:SEED or starving:SEED" in done.stdout
    assert "not 'random'" in done.stdout


def test_other_processors_switch_fibers_with_ucontext(workshop, compiled):
    options = ["-std=c++17", "-O1", "-DRNN_CUDA_EMULATED", "-DRNN_CUDA_EMULATOR_UCONTEXT"]
    context = workshop.compile(EMULATOR / "context.cpp", "context-ucontext", options)
    others = [o for o in workshop.emulator if o.result().stem != "emulator-context"]
    objects, emulator = [compiled["none"]], [context, *others]
    program = workshop.link_emulated("check-ucontext", objects, "none", emulator).result()
    for case in RIGHT:
        assert run(program, case).stdout == "ok\n"
