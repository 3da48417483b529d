"""Installing needs neither torch nor a compiler, and installs ``rnn_cuda`` alone.

Each test copies the clone to a folder with a space in its name and installs it into an empty
virtual environment. The clone and this environment stay as they are.
"""

from __future__ import annotations

import ast
import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path
from subprocess import CompletedProcess

import pytest

ROOT = Path(__file__).resolve().parent.parent
COPIED = ["pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "constraints.txt"]
COPIED += ["rnn_cuda", "csrc", "experiments", "hydra_conf", "tests"]
NOT_IN_THE_SDIST = {"constraints.txt", "experiments", "hydra_conf", "tests"}
MINIMUM_SETUPTOOLS = (77, 0, 3)  # the first that reads our licence's SPDX expression


def pip_is_installed() -> bool:
    # Not find_spec("pip"): setuptools' import hook takes that for pip at work, and from then on
    # refuses to be imported in this process.
    try:
        importlib.metadata.version("pip")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


needs_pip = pytest.mark.skipif(not pip_is_installed(), reason="pip is not installed here")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    copy = tmp_path / "a clone"
    copy.mkdir()
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
            )
        else:
            shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """The interpreter of an environment that holds nothing, not even pip."""
    venv.create(tmp_path / "environment")
    return tmp_path / "environment" / "bin" / "python"


def pip(python: Path, command: str, *options: str, **environment: str) -> CompletedProcess:
    command = [sys.executable, "-m", "pip", "--python", str(python), command, "--no-deps"]
    command += ["--disable-pip-version-check", "--timeout", "5", "--retries", "0", *options]
    return subprocess.run(
        command,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )


def location_of(module: str, python: Path, cwd: Path) -> str:
    code = (
        f"import importlib.util as u; s = u.find_spec({module!r}); print(s.origin if s else 'none')"
    )
    return subprocess.run(
        [str(python), "-c", code], cwd=cwd, capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.fixture
def setuptools_alone(tmp_path: Path) -> Path:
    """A folder for PYTHONPATH through which a build sees setuptools and no torch."""
    version = importlib.metadata.version("setuptools")
    if tuple(int(part) for part in version.split(".")[:3]) < MINIMUM_SETUPTOOLS:
        pytest.skip(f"setuptools {version} is older than pyproject.toml asks for")
    folder = tmp_path / "backend"
    folder.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if path.name.partition("-")[0] in ("setuptools", "_distutils_hack", "pkg_resources"):
            (folder / path.name).symlink_to(path)
    return folder


def test_setup_imports_setuptools_alone():
    tree = ast.parse((ROOT / "setup.py").read_text())
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    assert imported == {"setuptools"}


@needs_pip
def test_an_editable_install_without_build_isolation(clone, python, setuptools_alone, tmp_path):
    options = ["--no-build-isolation", "-e", str(clone)]
    done = pip(python, "install", *options, PYTHONPATH=str(setuptools_alone))
    assert done.returncode == 0, done.stdout
    assert location_of("torch", python, tmp_path) == "none"
    assert location_of("rnn_cuda", python, tmp_path) == str(clone / "rnn_cuda" / "__init__.py")
    assert location_of("experiments", python, tmp_path) == "none"
    assert location_of("experiments", python, clone) == str(clone / "experiments" / "__init__.py")


@needs_pip
def test_a_plain_install_with_build_isolation_carries_the_sources(clone, python, tmp_path):
    done = pip(python, "install", str(clone))
    if done.returncode != 0 and "requirement setuptools" in done.stdout:
        pytest.skip("no package index can be reached, and build isolation fetches setuptools")
    assert done.returncode == 0, done.stdout
    package = Path(location_of("rnn_cuda", python, tmp_path)).parent
    assert "site-packages" in package.parts
    assert files_below(package / "_csrc") == files_below(clone / "csrc")
    assert location_of("experiments", python, tmp_path) == "none"


@needs_pip
def test_a_wheel_made_from_the_sdist_holds_the_package_alone(
    clone, python, setuptools_alone, tmp_path
):
    backend = {"PYTHONPATH": str(setuptools_alone)}
    make_sdist = "from setuptools import build_meta; build_meta.build_sdist('../made')"
    subprocess.run(
        [str(python), "-c", make_sdist],
        cwd=clone,
        env=os.environ | backend,
        check=True,
        capture_output=True,
        timeout=120,
    )
    (sdist,) = (tmp_path / "made").iterdir()
    with tarfile.open(sdist) as archive:
        top = {Path(name).parts[1] for name in archive.getnames() if "/" in name}
    assert top == {*COPIED, "PKG-INFO", "setup.cfg", "rnn_cuda.egg-info"} - NOT_IN_THE_SDIST

    options = ["--no-build-isolation", "-w", str(tmp_path), str(sdist)]
    done = pip(python, "wheel", *options, **backend)
    assert done.returncode == 0, done.stdout
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    package = {f"rnn_cuda/{path}" for path in files_below(clone / "rnn_cuda")}
    sources = {f"rnn_cuda/_csrc/{path}" for path in files_below(clone / "csrc")}
    assert names == package | sources


def files_below(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
