"""The repository's own files, parsed once for all architecture tests."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SKIPPED = {".git", ".venv", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".hypothesis", "__pycache__", "build", "dist", "media", "clips"}
TEXT_SUFFIXES = {".py", ".toml", ".md", ".json", ".txt", ".cfg", ".yml", ".yaml", ".sh", ".lock", ""}


@dataclass(frozen=True)
class Source:
    """One Python file."""

    path: Path
    text: str
    tree: ast.Module

    @property
    def name(self) -> str:
        """Relative to the repository."""
        return str(self.path.relative_to(ROOT))

    @functools.cached_property
    def nodes(self) -> tuple[ast.AST, ...]:
        """Every node of the syntax tree."""
        return tuple(ast.walk(self.tree))

    def imports(self) -> tuple[tuple[str, int, bool], ...]:
        """Module, line, and whether the import happens only for type checkers."""
        return self._imports

    @functools.cached_property
    def _imports(self) -> tuple[tuple[str, int, bool], ...]:
        return tuple(self._found_imports())

    def _found_imports(self) -> Iterator[tuple[str, int, bool]]:
        guarded = {id(inner) for node in self.nodes if _is_type_checking(node) for inner in ast.walk(node)}
        for node in self.nodes:
            if isinstance(node, ast.Import):
                yield from ((alias.name, node.lineno, id(node) in guarded) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield "." * node.level + (node.module or ""), node.lineno, id(node) in guarded


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


@functools.cache
def python_files(folder: str) -> tuple[Source, ...]:
    """All Python files below a folder of the repository."""
    paths = sorted(path for path in (ROOT / folder).rglob("*.py") if not SKIPPED & set(path.parts))
    texts = [(path, path.read_text(encoding="utf-8")) for path in paths]
    return tuple(Source(path, text, ast.parse(text)) for path, text in texts)


@functools.cache
def plugin_packages() -> tuple[str, ...]:
    """Import names of the plugins in this repository."""
    return tuple(sorted(path.parent.name for path in (ROOT / "plugins").glob("*/src/*/__init__.py")))


@functools.cache
def text_files() -> tuple[tuple[str, str], ...]:
    """Name and content of every text file that may be committed, outside ignored folders."""
    found = []
    for top in sorted(ROOT.iterdir()):
        if top.name in SKIPPED or top.name in ("output", "cache"):
            continue
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.is_file() and path.suffix in TEXT_SUFFIXES and not SKIPPED & set(path.parts) and path.stat().st_size < 1_000_000:
                found.append((str(path.relative_to(ROOT)), path.read_text(encoding="utf-8", errors="replace")))
    return tuple(found)
