"""Installing needs neither torch nor a compiler, with build isolation and without.

Each test copies the checkout to a folder with a space in its name and installs it into an empty
virtual environment, leaving the checkout and this environment alone.
"""

from __future__ import annotations

import ast
import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGED = ["pyproject.toml", "setup.py", "README.md", "LICENSE", "rnn_cuda", "csrc"]
PACKAGED += ["experiments", "hydra_conf"]
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
def checkout(tmp_path: Path) -> Path:
    copy = tmp_path / "a checkout"
    copy.mkdir()
    for name in PACKAGED:
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


def pip_install(python: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps"]
    command += ["--disable-pip-version-check", "--timeout", "5", "--retries", "0", *arguments]
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


def folder_with_setuptools_alone(folder: Path) -> Path:
    """Make a folder for PYTHONPATH through which a build sees setuptools and no torch."""
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
def test_an_editable_install_without_build_isolation(checkout, python, tmp_path):
    version = importlib.metadata.version("setuptools")
    if tuple(int(part) for part in version.split(".")[:3]) < MINIMUM_SETUPTOOLS:
        pytest.skip(f"setuptools {version} is older than pyproject.toml asks for")
    backend = folder_with_setuptools_alone(tmp_path / "backend")
    done = pip_install(python, "--no-build-isolation", "-e", str(checkout), PYTHONPATH=str(backend))
    assert done.returncode == 0, done.stdout
    assert location_of("torch", python, tmp_path) == "none"
    assert location_of("rnn_cuda", python, tmp_path) == str(checkout / "rnn_cuda" / "__init__.py")
    assert location_of("experiments", python, tmp_path) != "none"


@needs_pip
def test_a_plain_install_with_build_isolation_carries_the_sources(checkout, python, tmp_path):
    done = pip_install(python, str(checkout))
    if done.returncode != 0 and "requirement setuptools" in done.stdout:
        pytest.skip("no package index can be reached, and build isolation fetches setuptools")
    assert done.returncode == 0, done.stdout
    package = Path(location_of("rnn_cuda", python, tmp_path)).parent
    assert "site-packages" in package.parts

    def sources(folder: Path) -> set[Path]:
        return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}

    assert sources(package / "_csrc") == sources(checkout / "csrc")
