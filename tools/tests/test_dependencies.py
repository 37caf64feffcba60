"""What a package imports it declares, and its README says why. Installing what is declared brings more than that along."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

PACKAGES = sorted(path.parent for path in (Path(__file__).parents[2] / "packages").glob("*/pyproject.toml"))
IMPORTED_AS = {"google-re2": "re2"}


def declared(package: Path) -> set[str]:
    """The distributions that a package needs, or can use."""
    project = tomllib.loads((package / "pyproject.toml").read_text())["project"]
    words = [*project["dependencies"], *(word for extra in project.get("optional-dependencies", {}).values() for word in extra)]
    return {re.split(r"[^\w-]", word)[0] for word in words} - {project["name"]}


def imported(package: Path) -> set[str]:
    """The top-level modules that a package imports anywhere, less its own and Python's."""
    found = set()
    for file in (package / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(node.module or "")
    own = {path.name for path in (package / "src").iterdir()}
    return {name.partition(".")[0] for name in found} - own - sys.stdlib_module_names


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_a_package_declares_what_it_imports(package: Path) -> None:
    names = {IMPORTED_AS.get(name, name.replace("-", "_")) for name in declared(package)}
    assert imported(package) <= names


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_a_readme_says_what_each_dependency_is_for(package: Path) -> None:
    text = (package / "README.md").read_text()
    assert [name for name in sorted(declared(package)) if not re.search(rf"\b{name}\b", text)] == []
