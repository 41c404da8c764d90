"""The house: which room may import which, so that a change below is felt above and never the other way round."""

import ast

import pytest
from helpers import ROOT

# from the ground up; each floor imports its own modules and those of the floors before it
FLOORS = ["util", "models", "util/weights", "util/run", "util/data", "util/look", "engine", "main"]
COMMANDS = {"util/export.py", "util/data/pack.py"}  # python -m …: they stand on top, wherever they lie


def floor(path: str) -> str:
    """Path of a module -> its floor."""
    folder, _, name = path.rpartition("/")
    if path in COMMANDS or name.startswith(("submitit_", "hubconf")):
        return "main"
    return folder or name.split("_")[0].removesuffix(".py")


def imports(path: str) -> set[str]:
    """Paths of the project's modules that a module imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        paths = [f"{name.replace('.', '/')}.py" for name in names]
        found |= {other for other in paths if (ROOT / other).is_file()}
    return found


MODULES = sorted(str(path.relative_to(ROOT)) for path in [*ROOT.glob("*.py"), *ROOT.glob("util/**/*.py")])


@pytest.mark.parametrize("path", MODULES)
def test_imports_point_down(path):
    allowed = FLOORS[: FLOORS.index(floor(path)) + 1]
    assert {other for other in imports(path) if floor(other) not in allowed} == set()


def test_the_reader_of_imports_sees_each_kind():
    assert "util/errors.py" in imports("models_mae.py") and "models_mae.py" in imports("main_pretrain.py")
    assert floor("util/run/run.py") == "util/run" and floor("engine_pretrain.py") == "engine"
