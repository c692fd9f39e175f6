"""_core.pyi names what the extension has, no more and no less."""

import ast
from pathlib import Path

import nvpflow
from nvpflow import _core

STUB = ast.parse((Path(nvpflow.__file__).parent / "_core.pyi").read_text(encoding="utf-8"))
# Shapes of dictionaries, protocols and an alias: not objects of the module.
TYPES_ONLY = {"DensityRecord", "DensitySummary", "EpochRecord", "FitSummary", "Array", "OnDevice", "CudaArray"}


def names_in(body: list[ast.stmt]) -> set[str]:
    names = set()
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return names


def public(names: set[str]) -> set[str]:
    return {name for name in names if not (name.startswith("__") and name.endswith("__"))}


def test_module_names() -> None:
    assert public(names_in(STUB.body)) - TYPES_ONLY == public(set(vars(_core)))


def test_members_of_classes() -> None:
    for node in STUB.body:
        if isinstance(node, ast.ClassDef) and node.name not in TYPES_ONLY:
            members = {name for name in vars(getattr(_core, node.name)) if not name.startswith("_pybind11")}
            assert public(names_in(node.body)) == public(members), node.name
