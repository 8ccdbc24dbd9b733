"""The house rules that no type checker sees: which way imports point, and what stays cheap to import."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import ace_cli
from ace_cli.core import registry

PACKAGE = Path(ace_cli.__file__).parent
#: The floors of the house, from the ground up. A module imports from its own room and from those below.
FLOORS = [
    "core", "kernels", "methods", "model", "data", "export", "sparse", "recovery", "pruning", "report", "evaluation",
    "run", "cli", "api",
]  # fmt: skip
#: Rooms and files that are imported for --help and for every configuration error.
CONFIGURATION = [
    "cli.prune", "run.config", "core.errors", "core.registry", "core.device", "methods.patterns", "methods.statistics",
    "pruning.recipe", "pruning.diagnostics", "evaluation.gate",
]  # fmt: skip


def room(module: str) -> str:
    """ace_cli.methods.metrics.wanda -> metrics."""
    return [*module.split("."), ""][1]


def name_of(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imported(tree: ast.AST, into_functions: bool) -> set[str]:
    """Module names, with ``from ace_cli import x`` as ace_cli.x."""
    names: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            whole = node.module or ""
            names |= {f"{whole}.{alias.name}" for alias in node.names} if whole == "ace_cli" else {whole}
        elif not for_types_only(node) and (into_functions or not isinstance(node, ast.FunctionDef)):
            names |= imported(node, into_functions)
    return names


FILES = sorted(PACKAGE.rglob("*.py"))


def test_imports_point_one_way() -> None:
    wrong = []
    for file in FILES:
        here = room(name_of(file))
        assert here in [*FLOORS, "", "__main__"], f"{here} is no room of the house"
        floor = FLOORS.index(here) if here in FLOORS else len(FLOORS)
        for name in imported(ast.parse(file.read_text()), into_functions=True):
            if name.split(".")[0] != "ace_cli" or name in ("ace_cli.__version__", "ace_cli.api"):
                continue
            if room(name) not in FLOORS[: floor + 1]:
                wrong.append(f"{name_of(file)} imports {name}")
    assert wrong == []


def is_configuration(file: Path) -> bool:
    name = name_of(file)
    offered = {*registry.PACKAGES.values(), *registry.SHARED.values()}
    return name.removeprefix("ace_cli.") in CONFIGURATION or not offered.isdisjoint({name, name.rpartition(".")[0]})


def test_configuration_modules_do_not_import_torch_at_the_top() -> None:
    heavy = {"torch", "transformers", "datasets", "accelerate", "safetensors", "numpy", "numba"}
    files = [*filter(is_configuration, FILES)]
    assert len(files) > 50
    for file in files:
        top = imported(ast.parse(file.read_text()), into_functions=False)
        assert not {name for name in top if name.split(".")[0] in heavy}, name_of(file)


def test_configuration_itself_loads_no_torch() -> None:
    code = (
        "import sys, ace_cli.cli.prune; from ace_cli.run.config import store_schemas; store_schemas(); "
        "print({'torch', 'transformers', 'datasets', 'numba'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "set()\n"


def test_every_choice_says_what_it_is() -> None:
    for group, name, cls in ((g, *choice) for g in registry.PACKAGES for choice in registry.choices(g).items()):
        text = inspect.getdoc(cls) or ""
        assert text, f"{group}={name}"
        assert not text.startswith(f"{cls.__name__}("), f"dataclass wrote the docstring of {group}={name}, nobody else"


def test_the_engine_knows_no_concrete_choice() -> None:
    names = imported(ast.parse((PACKAGE / "pruning" / "engine.py").read_text()), into_functions=True)
    concrete = {cls.__module__ for group in registry.PACKAGES for cls in registry.choices(group).values()}
    assert not names & concrete


def test_registering_a_name_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="twice"):
        registry.register("metric", "wanda")(type("Other", (), {}))
