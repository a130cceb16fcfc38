"""What the package says about itself is true: what it imports it declares, and what it declares it pins."""

from __future__ import annotations

import ast
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PACKAGES = ("decoding", "drafters", "prompts", "experiments")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def pinned() -> dict[str, Requirement]:
    """Distribution → its line in constraints.txt for this Python."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    requirements = [requirement for line in lines if applies(requirement := Requirement(line))]
    names = [canonicalize_name(requirement.name) for requirement in requirements]
    assert len(set(names)) == len(names), "two lines for one distribution"
    return dict(zip(names, requirements, strict=True))


def applies(requirement: Requirement) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})


def declared(project: dict[str, Any]) -> list[Requirement]:
    extras = project["project"]["optional-dependencies"].values()
    return [Requirement(line) for group in (project["project"]["dependencies"], *extras) for line in group]


def test_every_import_is_declared(project: dict[str, Any]) -> None:
    providers = metadata.packages_distributions()
    ours = {*PACKAGES, "tests", "tomllib", *sys.stdlib_module_names}  # tomllib: since Python 3.11, tomli before
    names = {canonicalize_name(requirement.name) for requirement in declared(project)}
    files = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py") if "elsewhere" not in file.parts]
    assert len(files) > 10
    for file in files:
        for module in imports(file):
            provided = {canonicalize_name(name) for name in providers.get(module, [module])}
            assert module in ours or names & provided, (
                f"{file.relative_to(ROOT)} imports {module}, which pyproject.toml does not declare"
            )


def imports(file: Path) -> set[str]:
    """Top-level names of the modules that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def test_everything_declared_is_pinned_to_a_version_it_allows(project: dict[str, Any]) -> None:
    pins = pinned()
    for requirement in filter(applies, declared(project)):
        pin = pins[canonicalize_name(requirement.name)]
        (exactly,) = pin.specifier
        assert exactly.operator == "=="
        assert exactly.version in requirement.specifier


def test_whatever_the_declared_packages_need_is_pinned_too(project: dict[str, Any]) -> None:
    pins, seen = pinned(), set()
    todo = [requirement.name for requirement in declared(project) if applies(requirement)]
    while todo:
        name = canonicalize_name(todo.pop())
        if name in seen or re.match("nvidia|cuda|triton", name):  # a CUDA build of torch pins those itself
            continue
        seen.add(name)
        assert name in pins, f"{name} has no line in constraints.txt"
        try:
            needs = [Requirement(line) for line in metadata.requires(name) or []]
        except metadata.PackageNotFoundError:  # an extra that is not installed here
            continue
        todo += [need.name for need in needs if applies(need)]


def test_every_file_that_is_not_code_is_shipped(project: dict[str, Any]) -> None:
    patterns = project["tool"]["setuptools"]["package-data"]
    for package in PACKAGES:
        shipped = {
            file for key in (package, "*") for glob in patterns.get(key, []) for file in (ROOT / package).rglob(glob)
        }
        data = {file for file in (ROOT / package).rglob("*") if file.is_file() and file.suffix not in (".py", ".pyc")}
        assert data <= shipped, sorted(map(str, data - shipped))
