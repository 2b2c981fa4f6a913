"""Imports go one way: from programs to nc1 and dib, and from these to layerwise."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {  # a module or package at the top: those that it may import
    "tools": {"train", "training", "nc1", "dib", "relabel", "models", "data", "layerwise", "analysis"},
    "train": {"training", "nc1", "dib", "models", "data", "layerwise"},
    "training": {"models", "data", "layerwise"},
    "dib": {"relabel", "layerwise"},
    "nc1": {"layerwise"},
    "data": {"layerwise"},
    "analysis": {"layerwise.schema", "layerwise.runs"},
    "relabel": set(),
    "models": set(),
    "layerwise": set(),
}
ALSO_INSTALLED = {"torch", "numpy", "tqdm"}  # beside Python, all that the library may import


def find_imports(path: Path) -> set[str]:
    """Return the modules that a file imports, wherever it does: a.b for `from a import b` as well."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found |= {f"{node.module}.{name.name}" for name in node.names}
    return found


def list_files(room: str) -> list[Path]:
    return [ROOT / f"{room}.py"] if (ROOT / f"{room}.py").exists() else sorted((ROOT / room).rglob("*.py"))


def test_every_module_has_a_room():
    found = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert found - {"tests"} == set(MAY_IMPORT)


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_those_behind_it(room):
    for path in list_files(room):
        for name in find_imports(path):
            top = name.split(".")[0]
            if top == room or top not in {*MAY_IMPORT, "tests"}:
                continue
            assert any(name == allowed or name.startswith(f"{allowed}.") for allowed in MAY_IMPORT[room]), (
                f"{path.relative_to(ROOT)} imports {name}"
            )


@pytest.mark.parametrize("room", ["layerwise", "nc1", "dib", "relabel"])
def test_the_library_needs_torch_numpy_and_tqdm_alone(room):
    for path in list_files(room):
        tops = {name.split(".")[0] for name in find_imports(path)}
        others = tops - set(sys.stdlib_module_names) - ALSO_INSTALLED - {"layerwise", "nc1", "dib", "relabel"}
        assert others == set(), path


def test_analysis_and_the_folder_of_a_run_do_without_torch():
    for path in [
        *list_files("analysis"),
        *(ROOT / "layerwise" / f"{name}.py" for name in ("__init__", "schema", "runs")),
    ]:
        assert "torch" not in {name.split(".")[0] for name in find_imports(path)}, path
