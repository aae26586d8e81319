"""Docstrings name what is there, and every part of `roentgen` has its layer."""

import ast
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("roentgen", "serve_app", "eval_jobs", "probes", "benchmarks")
NAME = re.compile(r"`((?![a-z_]+\.(?:jsonl?|html)`)[a-z_]+(?:\.[a-z_]+)*)`")


def test_back_ticked_names_are_modules_or_words_of_the_code() -> None:
    unknown = []
    for package in PACKAGES:
        trees = {file.relative_to(ROOT): ast.parse(file.read_text()) for file in sorted((ROOT / package).rglob("*.py"))}
        nodes = [(file, node) for file, tree in trees.items() for node in ast.walk(tree)]
        words = {text for _, node in nodes for text in vars(node).values() if isinstance(text, str)}
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        docstrings = [(file, ast.get_docstring(node) or "") for file, node in nodes if isinstance(node, documented)]
        docstrings += [
            (file, text) for file, node in nodes if isinstance(node, ast.ClassDef) for text in _of_fields(node)
        ]
        for file, docstring in docstrings:
            for name in NAME.findall(docstring):
                head, _, last = name.rpartition(".")
                if not (
                    _is_module(name, file)
                    or (_is_module(head, file) and last in words)
                    or words.issuperset(name.split("."))
                ):
                    unknown.append(f"{file}: `{name}`")
    assert unknown == []


def _of_fields(node: ast.ClassDef) -> list[str]:
    """The docstrings below a class's fields."""
    values = [part.value for part in node.body[1:] if isinstance(part, ast.Expr)]
    return [value.value for value in values if isinstance(value, ast.Constant) and isinstance(value.value, str)]


def _is_module(name: str, file: Path) -> bool:
    """Whether a module of this name is beside the file, or beside one of its packages."""
    path = name.replace(".", "/")
    places = [ROOT / folder / path for folder in file.parents]
    return any(place.with_suffix(".py").is_file() or (place / "__init__.py").is_file() for place in places)


def test_every_part_of_roentgen_has_a_layer() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = {part for line in contracts[0]["layers"] for part in line.split(" | ")}
    there = {f"roentgen.{path.stem}" for path in (ROOT / "roentgen").glob("[!_]*.py")}
    there |= {f"roentgen.{path.parent.name}" for path in (ROOT / "roentgen").glob("*/__init__.py")}
    assert there == {part for part in layers if part.startswith("roentgen.")}
