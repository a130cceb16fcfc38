"""The strategies, drafters and commit policies that come with the package, with a line about each, for `--help`.

They are read from the source instead of being imported: that would import torch, and help should not take seconds.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterable
from pathlib import Path

Lines = list[tuple[str, str]]
"""(name, summary) of each."""


def strategies() -> Lines:
    """What `decoding.strategies` registers."""
    return _named(path for path in _modules("decoding.strategies") if path.stem != "policies")


def policies() -> Lines:
    """The commit policies of block diffusion."""
    return _named(path for path in _modules("decoding.strategies") if path.stem == "policies")


def drafters() -> Lines:
    """What `drafters` registers."""
    return _named(_modules("drafters"))


def _modules(package: str) -> list[Path]:
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations is not None
    return sorted(path for folder in spec.submodule_search_locations for path in Path(folder).glob("*.py"))


def _named(files: Iterable[Path]) -> Lines:
    """Of every class that says its `name`, the name and the `summary`."""
    found = []
    for file in files:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            said = _said(node) if isinstance(node, ast.ClassDef) else {}
            if "name" in said:
                found.append((said["name"], said.get("summary", "")))
    return found


def _said(node: ast.ClassDef) -> dict[str, str]:
    said: dict[str, str] = {}
    for item in node.body:
        match item:
            case ast.AnnAssign(target=ast.Name(id="name" | "summary" as field), value=ast.Constant(value=str(text))):
                said[field] = text
    return said
