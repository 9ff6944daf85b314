"""What reaches users: the wheel holds the code and its data, and the tested versions fit the promised ranges."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Imported by another name than the package's own.
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml", "sklearn": "scikit-learn", "flash_attn": "flash-attn-4"}

ALONE = {"gradio"}
"""Cannot be installed beside the tested set: it holds Pillow below 13."""


def pins() -> dict[str, str]:
    """constraints.txt as {normalised name: version}."""
    lines = [
        line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    ]
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines if line)}


def requirements(extras: set[str]) -> list[Requirement]:
    optional = PROJECT["optional-dependencies"]
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in optional[extra])]
    return [requirement for requirement in map(Requirement, lines) if requirement.name != "phi3v"]


def test_every_tested_version_is_within_its_range() -> None:
    tested = pins()
    asked = requirements(set(PROJECT["optional-dependencies"]))
    asked = [requirement for requirement in asked if requirement.name not in ALONE]
    names = {canonicalize_name(requirement.name) for requirement in asked}
    assert not names - set(tested), f"constraints.txt lacks {sorted(names - set(tested))}"
    assert not set(tested) - names, f"constraints.txt pins what nothing asks for: {sorted(set(tested) - names)}"
    outside = [
        str(requirement)
        for requirement in asked
        if tested[canonicalize_name(requirement.name)] not in requirement.specifier
    ]
    assert not outside, outside


def test_every_library_that_is_imported_is_declared() -> None:
    """Also those that would come along with another one today."""
    imported = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(str(node.module).split(".")[0])
    needed = {
        canonicalize_name(DISTRIBUTIONS.get(name, name)) for name in imported - sys.stdlib_module_names - {"phi3v"}
    }
    declared = {
        canonicalize_name(requirement.name) for requirement in requirements(set(PROJECT["optional-dependencies"]))
    }
    needed -= {"triton"}  # torch brings it where it has GPUs; without it the code says so and goes another way
    assert not needed - declared, f"pyproject.toml does not ask for {sorted(needed - declared)}"


def test_no_address_of_a_package_index() -> None:
    """Where packages come from is each machine's own business."""
    for name in ("pyproject.toml", "constraints.txt", "Makefile", ".ci/run", ".pre-commit-config.yaml"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert not re.search(r"https?://|--(extra-)?index-url|--find-links", text), name


def test_the_version_is_said_once_more_and_is_the_same() -> None:
    source = (ROOT / "src/phi3v/__init__.py").read_text(encoding="utf-8")
    assert re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE).group(1) == PROJECT["version"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built offline with the setuptools that is installed, from a copy: nothing is left in the checkout."""
    copy = tmp_path_factory.mktemp("copy")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "src", copy / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__", ".*_cache"))
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(copy),
        str(copy),
    ]
    subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL)
    (built,) = copy.glob("*.whl")
    return zipfile.ZipFile(built)


def test_the_wheel_holds_the_code_and_its_data(wheel: zipfile.ZipFile) -> None:
    held = set(wheel.namelist())
    source = ROOT / "src"
    wanted = [
        *source.rglob("*.py"),
        *source.rglob("*.j2"),
        *(source / "phi3v/demo/tiny").glob("*"),
    ]
    missing = [
        path.relative_to(source).as_posix() for path in wanted if path.relative_to(source).as_posix() not in held
    ]
    assert not missing, missing
    assert any(name.startswith("phi3v/demo/tiny/") and name.endswith(".safetensors") for name in held)
    assert any(name.endswith("licenses/LICENSE") for name in held)


def test_the_wheel_stays_small(wheel: zipfile.ZipFile) -> None:
    """A few MB: the tiny model is most of it."""
    assert sum(entry.compress_size for entry in wheel.infolist()) < 15e6
