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
        for file, docstring in ((f, ast.get_docstring(n) or "") for f, n in nodes if isinstance(n, documented)):
            for name in NAME.findall(docstring):
                head, _, last = name.rpartition(".")
                if not (
                    _is_module(name, file)
                    or (_is_module(head, file) and last in words)
                    or words.issuperset(name.split("."))
                ):
                    unknown.append(f"{file}: `{name}`")
    assert unknown == []


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
