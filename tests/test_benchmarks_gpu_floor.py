"""The floor under a GPU's times, and the programs that are compiled around the kernels."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.cases import Case
from benchmarks.gpu import build, floor, native, plans
from benchmarks.gpu.cases import GpuCase
from benchmarks.gpu.context import Context, StageError
from benchmarks.machine import REPOSITORY
from rnn_cuda.build import find_cuda, find_cxx
from tests.emulated_programs import EMULATOR
from tests.gpu_stand_ins import stand_in, timing_of

needs_nvcc = pytest.mark.skipif(find_cuda()[0] is None, reason="needs nvcc")

CASE = GpuCase(Case("middle", 10, 4, 3, 8, "forward"))
PLAN = {
    "residency": "cluster",
    "arithmetic": "fma",
    "fuse_input": True,
    "blocks": 2,
    "columns": 4,
    "engine_columns": 4,
    "row_warps": 2,
    "depth_split": 1,
    "batch_tiles": 1,
}


def timed(case: GpuCase) -> dict:
    passes = ("forward", "backward") if case.case.mode == "train" else ("forward",)
    return {**timing_of(case), "plans": dict.fromkeys(passes, PLAN)}


# ---- arithmetic ----------------------------------------------------------------------------------


def test_operations_and_bytes_are_those_of_the_definition():
    tokens = 40
    assert floor.operations_of(CASE, tokens) == (2 * 40 * 8 * 8, 2 * 40 * 3 * 8)
    assert floor.bytes_of(CASE, tokens) == 4 * 40 * (3 + 8)
    train = replace(CASE, case=replace(CASE.case, mode="train"))
    # U h and U' delta wait for each other; W x, dU and dW do not. No dx: I < 64.
    assert floor.operations_of(train, tokens) == (
        2 * 2 * 40 * 8 * 8,
        2 * 40 * 3 * 8 + 2 * 40 * 8 * 8 + 2 * 40 * 3 * 8,
    )
    assert floor.bytes_of(train, tokens) == 4 * 40 * (3 + 8 + 8 + 8 + 3)
    wide = replace(train, case=replace(train.case, I=64, dtype="bfloat16"))
    assert floor.bytes_of(wide, tokens) == 2 * 40 * (64 + 8 + 8 + 8 + 64 + 64)


def test_two_layers_in_two_directions_are_four_recurrences():
    stacked = replace(CASE, case=replace(CASE.case, num_layers=2, bidirectional=True))
    recurrent, others = floor.operations_of(stacked, 40)
    assert recurrent == 4 * 2 * 40 * 8 * 8
    assert others == 2 * 2 * 40 * 8 * (3 + 16)


def test_products_that_wait_get_the_share_of_the_card_that_the_plan_uses():
    rates = {"float32": 1e9, "tf32": 8e9, "copy": 1e9}
    found = floor.floor_of(timed(CASE), 1e-3, rates, multiprocessors=8)
    assert found["recurrent"] == pytest.approx(2 * 40 * 8 * 8 / (1e9 * 2 / 8))
    assert found["products"] == pytest.approx(2 * 40 * 3 * 8 / 1e9)
    larger = max(found["products"], found["bytes"])
    assert found["seconds"] == pytest.approx(1e-3 + found["recurrent"] + larger)
    few = floor.floor_of(timed(CASE), 1e-3, rates, multiprocessors=1)  # not more than all of it
    assert few["recurrent"] == pytest.approx(2 * 40 * 8 * 8 / 1e9)
    tf32 = floor.floor_of(timed(replace(CASE, tf32=True)), 1e-3, rates, multiprocessors=2)
    assert tf32["recurrent"] == pytest.approx(2 * 40 * 8 * 8 / 8e9)


def test_a_graphs_time_is_what_is_compared_with_the_floor():
    timing = timed(CASE)
    timing["graphed"] = timing_of(CASE, ours=4e-4)["graphed"]
    floors = {"cases": {CASE.label: {"seconds": 2e-4}}}
    assert floor.over_floor(timing, floors) == pytest.approx(2.0)
    timing["graphed"] = {"fused_rnn": {"skipped": "failed"}}
    assert floor.over_floor(timing, floors) == pytest.approx(5.0)
    assert floor.over_floor(timing, None) is None


def test_rates_come_from_the_median_of_several_samples(monkeypatch):
    import torch

    monkeypatch.setattr(floor, "_LARGE", {})
    monkeypatch.setattr(floor, "_LARGE_OTHERS", 4)
    monkeypatch.setattr(floor, "_COPIED", 64)
    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *shape, device: randn(*shape))
    seconds = iter([1.0, 9.0, 2.0, 2.0, 3.0] * 6)
    rates = floor.measured_rates(lambda run, repeats: next(seconds))
    assert rates["float32"] == 2 * 4**3 / 2.0
    assert rates["copy"] == 2 * 64 / 2.0


# ---- the empty kernel ----------------------------------------------------------------------------


def enumerators(file: str, name: str) -> list[str]:
    text = (REPOSITORY / "csrc" / file).read_text()
    body = re.search(rf"enum class {name} {{(.*?)}}", text, re.DOTALL)
    assert body is not None
    names = re.sub(r"//[^\n]*", "", body[1]).split(",")
    return [n.strip().lower() for n in names if n.strip()]


def test_the_programs_input_numbers_the_enumerations_as_the_headers_do():
    for names, file, enumeration in [
        (floor._DTYPES, "recurrence.h", "ScalarType"),
        (floor._RESIDENCIES, "cuda/plan.h", "Residency"),
        (floor._ARITHMETICS, "cuda/plan.h", "Arithmetic"),
    ]:
        ours = [name.replace("_", "") for name in sorted(names, key=lambda n: names[n])]
        theirs = [n.replace("tensorcoretf32", "tf32") for n in enumerators(file, enumeration)]
        assert ours == theirs


def test_a_backward_pass_has_no_input_product():
    train = replace(CASE, case=replace(CASE.case, mode="train"))
    lines = floor.pass_lines(timed(train))
    assert lines["forward"] == "10 4 3 8 1 0 1 0 1 2 4 4 2 1"
    assert lines["backward"] == "10 4 0 8 1 0 1 0 1 2 4 4 2 1"


def test_the_programs_answers_are_seconds_or_reasons(tmp_path):
    program = stand_in(
        tmp_path,
        "floor",
        "for line in __import__('sys').stdin:\n"
        "    if line.startswith('3'): raise SystemExit(7)\n"
        "    print('error: no kernel' if line.startswith('2') else 0.5, flush=True)",
    )
    answers = floor.run_program([program], ["1 a", "2 b", "3 c", "4 d"], 20.0)
    how = "the program ended with 7"
    assert answers == {"1 a": 0.5, "2 b": "no kernel", "3 c": how, "4 d": how}
    slow = stand_in(tmp_path, "slow", "import time; print(0.25, flush=True); time.sleep(60)")
    answers = floor.run_program([slow], ["1 a", "2 b"], 1.0)
    assert answers == {"1 a": 0.25, "2 b": "the program did not end in time"}


def test_layers_add_up_and_a_pass_without_a_kernel_has_no_floor():
    train = timed(replace(CASE, case=replace(CASE.case, mode="train", num_layers=2)))
    lines = floor.pass_lines(train)
    assert floor.exchange_seconds(train, {lines["forward"]: 1.0, lines["backward"]: 2.0}) == (
        6.0,
        "",
    )
    answers = {lines["forward"]: 1.0, lines["backward"]: "no persistent kernel"}
    assert floor.exchange_seconds(train, answers) == (None, "backward: no persistent kernel")


def test_plans_in_words():
    assert plans.words({"forward": PLAN}) == "cluster 2"
    backward = {**PLAN, "residency": "one_sm"}
    assert plans.words({"forward": PLAN, "backward": backward}) == "cluster 2 / one_sm"
    assert plans.words("no plan: not on a GPU") == "-"


# ---- compiling -----------------------------------------------------------------------------------


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_the_floor_compiles_and_links(tmp_path, arch):
    program = native.build_program(native.FLOOR, tmp_path, [arch])
    assert program.is_file()
    assert [path.name for path in tmp_path.iterdir()] == [program.name]
    again = native.build_program(native.FLOOR, tmp_path, [arch])
    assert again == program
    # Without a card it says so and does not crash; with one there is a time.
    answers = floor.run_program([str(program)], ["10 4 3 40 1 0 0 0 1 1 4 4 2 1"], 60.0)
    assert len(answers) == 1


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["ascending", "descending", "random:3", "starving:5"])
def test_the_empty_kernel_exchanges_every_word_on_the_emulator(emulated_floor, schedule):
    # T B I H directions dtype residency arithmetic fuse_input blocks columns engine_columns
    # row_warps depth_split: each exchange, odd sizes, several batch tiles, both directions.
    lines = [
        "6 5 3 40 1 0 0 0 1 1 4 4 2 2",
        "6 9 3 70 2 0 1 0 0 3 4 4 2 2",
        "7 9 3 100 2 2 2 1 0 2 8 8 2 1",
        "5 9 0 64 1 0 2 0 0 4 4 4 1 4",
        "1 9 3 64 1 0 1 0 0 4 4 4 1 4",
    ]
    streamed = "5 9 3 64 1 0 3 0 0 4 4 4 1 4"
    command = ["env", f"RNN_CUDA_EMULATOR_SCHEDULE={schedule}", str(emulated_floor)]
    answers = floor.run_program(command, [*lines, streamed, "hello"], 60.0)
    assert all(isinstance(answers[line], float) for line in lines), answers
    assert answers[streamed] == "no persistent kernel"
    assert answers["hello"] == "expected 14 numbers"


@pytest.fixture(scope="module")
def emulated_floor(tmp_path_factory) -> Path:
    """The same program, its kernels on the CPU."""
    program = tmp_path_factory.mktemp("floor") / "floor"
    sources = [*native.sources_of(native.FLOOR), *sorted(EMULATOR.glob("*.cpp"))]
    flags = ["-std=c++17", "-O1", "-DRNN_CUDA_EMULATED", "-Wno-unknown-pragmas"]
    flags += [f"-I{folder}" for folder in (REPOSITORY / "csrc", EMULATOR.parent)]
    command = [str(find_cxx()), "-x", "c++", *flags, *map(str, sources), "-o", str(program)]
    subprocess.run([*command, "-rdynamic", "-pthread", "-ldl"], check=True)
    return program


def test_a_source_that_is_missing_is_named(tmp_path):
    with pytest.raises(StageError, match=r"there is no tests/native/nothing\.cpp"):
        native.sources_of(native.Program("x", ("tests/native/nothing.cpp",)))


@needs_nvcc
def test_a_source_that_does_not_compile_is_named_with_the_compilers_words(tmp_path, monkeypatch):
    (tmp_path / "broken.cu").write_text("int main() { return nothing; }")
    monkeypatch.setattr(native, "REPOSITORY", tmp_path)
    with pytest.raises(StageError, match=r"broken\.cu does not compile:(.|\n)*nothing"):
        native.build_program(native.Program("x", ("broken.cu",)), tmp_path / "out", ["sm_90"])
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_file()]


def test_a_changed_source_or_flag_makes_another_program(tmp_path):
    source = tmp_path / "a.cu"
    source.write_text("1")
    first = native._key([source], ["-O3"])
    assert native._key([source], ["-O2"]) != first
    source.write_text("2")
    assert native._key([source], ["-O3"]) != first


def test_the_build_fails_with_what_must_be_built_and_not_with_the_rest(
    tmp_path, monkeypatch, capsys
):
    built = []

    def build_program(program, folder):
        built.append(program.name)
        if program.name in broken:
            raise StageError(f"{program.name} does not compile")

    monkeypatch.setattr(build, "build_program", build_program)
    monkeypatch.setattr(build, "_python", lambda program, seconds: None)
    broken = ("floor",)
    build.build(Context(tmp_path, 60.0))
    assert sorted(built) == ["checker", "floor"]
    assert capsys.readouterr().out.splitlines()[-1] == "built: extension, checker; failed: floor"
    broken = ("floor", "checker")
    with pytest.raises(StageError, match="failed: checker"):
        build.build(Context(tmp_path, 60.0))


def test_a_tool_beside_nvcc_is_found(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name, path=None: f"{path}/{name}" if path else None)
    cuda, _ = find_cuda()
    monkeypatch.setattr(native, "find_cuda", lambda: (cuda, ""))
    if cuda is not None:
        assert native.find_tool("ncu") == f"{cuda.nvcc.resolve().parent}/ncu"
    monkeypatch.setattr(native, "find_cuda", lambda: (None, "none"))
    assert native.find_tool("ncu") is None
