"""Which module may import which: one direction, no circle, nothing hidden from the interpreter."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "fastif"
# What any room may import; they know the ops alone.
LEAVES = (
    *(
        "_version",
        "correlation",
        "measure",
        "files",
        "fingerprints",
        "folder_lock",
        "journal",
        "loaded_code",
        "meetings",
    ),
    *("ranks", "progress", "renamed", "sharded"),
)
ROOMS = (  # each may import from those before it
    *("ops", "data", "model", "samplers", "curvature", "influence", "index", "replay"),
    *("removal", "evaluation", "report", "integrations", "cli"),
)
MODULES = sorted(PACKAGE.rglob("*.py"))


def imports_of(file: Path) -> set[tuple[str, bool]]:
    """The package's own modules that a module imports, anywhere in it, and whether only a type checker sees it."""
    tree = ast.parse(file.read_text())
    hidden = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for statement in block.body
        for node in ast.walk(statement)
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are written in full"
            own = node.module or ""
            names = [f"{own}.{alias.name}" if is_module(f"{own}.{alias.name}") else own for alias in node.names]
        else:
            continue
        found |= {(name, node in hidden) for name in names if name.partition(".")[0] == "fastif"}
    return found


def is_module(name: str) -> bool:
    path = PACKAGE.parent.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def room_of(name: str) -> str:
    return name.split(".")[1] if "." in name else "fastif"


def module_name(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_every_module_stands_in_a_room():
    rooms = {room_of(module_name(file)) for file in MODULES}
    assert rooms <= {*LEAVES, *ROOMS, "fastif", "__main__", "evaluation_report"}  # the last: an old name of a report


@pytest.mark.parametrize("file", MODULES, ids=module_name)
def test_imports_run_one_way(file):
    own = room_of(module_name(file))
    for name, hidden in imports_of(file):
        room = room_of(name)
        assert not hidden, f"{name} is imported under TYPE_CHECKING: a circle is hidden there"
        if own in LEAVES:
            assert room in (*LEAVES, "ops"), f"a leaf imports {name}"
        elif own in ROOMS and room not in LEAVES:
            assert room in ROOMS, f"{name} stands above all rooms"
            assert ROOMS.index(room) <= ROOMS.index(own), f"{own} imports {name}, which stands above it"


def test_no_circle_among_modules():
    """Also within a room; a package counts as what its __init__ imports."""
    graph = {module_name(file): {name for name, _ in imports_of(file) if name != module_name(file)} for file in MODULES}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " imports ".join((*path[path.index(name) :], name))
        if name in done:
            return
        for other in sorted(graph.get(name, ())):
            visit(other, (*path, name))
        done.add(name)

    for name in graph:
        visit(name, ())


def test_nobody_asks_an_estimator_who_it_is():
    """Estimators answer for themselves: outside of their own room none is recognised by its class."""
    kinds = {"ExactBlock", "KFAC", "EKFAC", "Diagonal", "Identity", "DataInf", "RandomProjection", "CG", "LiSSA"}
    kinds |= {"Arnoldi", "SingleEstimator", "OneBlock", "JoinedBlocks", "JointCurvature"}
    for file in MODULES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance":
                asked = {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)}
                assert not asked & kinds, f"{module_name(file)}: {ast.unparse(node)}"
