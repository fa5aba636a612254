"""The wheel holds the two packages whole: every module, and what they read beside them."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("raybsa", "dashboards")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    copy = tmp_path_factory.mktemp("copy")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", copy, copy]
    subprocess.run(command, check=True, timeout=100)
    (made,) = copy.glob("raybsa-*.whl")
    return zipfile.ZipFile(made)


def test_the_wheel_has_every_file_of_the_packages_and_no_other(wheel: zipfile.ZipFile) -> None:
    files = {str(file.relative_to(ROOT)) for name in PACKAGES for file in (ROOT / name).rglob("*") if file.is_file()}
    there = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert there == {file for file in files if "__pycache__" not in file}
    assert {"raybsa/py.typed", "raybsa/kernels/auto_table.csv", "dashboards/page.js"} <= there


def test_the_wheel_says_what_it_needs_and_shows_the_readme(wheel: zipfile.ZipFile) -> None:
    (metadata,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    text = wheel.read(metadata).decode("utf-8")
    for extra in ("gpu", "peers", "dashboard", "hf", "dev"):
        assert f"Provides-Extra: {extra}" in text
    assert "Requires-Python: >=3.11" in text
    assert "Description-Content-Type: text/markdown" in text
    assert "# raybsa" in text


@pytest.mark.parametrize("folder", [".venv", "venv", "env", ".conda", "results"])
def test_a_virtual_environment_is_not_uploaded_with_a_job(folder: str) -> None:
    """``ray job submit --working-dir .`` leaves out what .gitignore names, and refuses more than 100 MiB."""
    from ray._private.runtime_env.packaging import get_excludes_from_ignore_files

    left_out = get_excludes_from_ignore_files(ROOT, include_gitignore=True)
    for name, wanted in ((f"{folder}/lib/torch.so", True), ("weights.pt", True), ("raybsa/layout.py", False)):
        assert any(is_left_out(ROOT / name) for is_left_out in left_out) == wanted, name
