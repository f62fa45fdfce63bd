"""The direction of imports, read from the sources: a part may use those above it in `ROWS`, and no file a circle."""

import ast
import functools
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# bottom first; parts of one row do not know each other
ROWS = [
    {"constellation.errors"},
    {
        "constellation.settings",
        "constellation.storage",
        "constellation.processor",
        "constellation.roster",
        "constellation.experiments.statistics",
    },
    {"constellation.optim.registry", "constellation.topo.settings"},
    {"constellation.config"},
    {"constellation.geometry"},
    {"constellation.kernel", "constellation.optim", "constellation.telemetry", "constellation.control"},
    {"constellation.decoding", "constellation.data", "constellation.regime"},
    {"constellation.coordizer"},
    {"constellation.artifacts", "constellation.presets", "constellation.trackers"},
    {"constellation.plots"},
    {"constellation.train"},
    {"constellation.topo"},
    {"router.decide"},
    {"router.answer"},
    {"router.http"},
    {"router.app"},
    {"constellation.pipeline"},
    {"actors"},
    {"tune"},
    {"constellation.api"},
    {"constellation.experiments"},
    {"constellation.commands"},
    {"constellation.cli"},
    {"constellation.__main__"},
]
ROW_OF = {part: row for row, parts in enumerate(ROWS) for part in parts}
HEAVY = ("torch", "ray", "fastapi")
FREE_OF = {  # what a folder says of itself: none of its files imports it, nor anything that imports it when imported
    "constellation/geometry": ("ray", "fastapi"),
    "constellation/kernel": ("ray", "fastapi"),
    "constellation/decoding": ("ray", "fastapi"),
    "constellation/storage": HEAVY,
    "constellation/trackers": HEAVY,
    "constellation/plots": HEAVY,
    "constellation/artifacts": HEAVY,
    "constellation/settings.py": HEAVY,
    "constellation/optim/registry.py": HEAVY,
    "constellation/config.py": HEAVY,
    "constellation/pipeline": ("ray", "fastapi"),
    "router": ("ray",),
    "router/answer": ("ray", "fastapi"),
    "router/decide/fisher_rao.py": HEAVY,
    "constellation/__init__.py": (*HEAVY, "numpy"),
    "constellation/api.py": (*HEAVY, "numpy"),
    "constellation/pipeline/status.py": HEAVY,
    "constellation/pipeline/request.py": HEAVY,
}


def sources() -> list[Path]:
    folders = ("constellation", "router", "actors", "tune")
    return sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in sources()}


def part_of(module: str) -> str | None:
    """The part that `module` belongs to, None for what is in none."""
    pieces = module.split(".")
    return next((name for n in (3, 2, 1) if (name := ".".join(pieces[:n])) in ROW_OF), None)


@functools.cache
def imports(path: Path, types: bool = True, functions: bool = True) -> frozenset[str]:
    """Modules that a file imports: also for type checking alone, also when a function is called."""
    found, left = set[str](), list[ast.AST]([ast.parse(path.read_text())])
    while left:
        node = left.pop()
        if not functions and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if not types and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in MODULES else node.module)
        left += ast.iter_child_nodes(node)
    return frozenset(found)


def loaded(path: Path) -> set[str]:
    """Top names of all that is imported when `path` is imported."""
    seen, left, found = set[Path](), [path], set[str]()
    while left:
        file = left.pop()
        if file in seen:
            continue
        seen.add(file)
        for module in imports(file, types=False, functions=False):
            found.add(module.split(".")[0])
            if module in MODULES:
                packages = [module.rsplit(".", n)[0] for n in range(module.count(".") + 1)]
                left += [MODULES[name] for name in packages if name in MODULES]
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downwards(path: Path) -> None:
    mine = part_of(name_of(path))
    if name_of(path) == "constellation":
        assert not {module for module in imports(path, types=False) if part_of(module)}
        return  # it names things of every part for whoever reads types
    for module in imports(path):
        theirs = part_of(module)
        if theirs is None or theirs == mine:
            continue
        assert mine is not None and ROW_OF[theirs] < ROW_OF[mine], f"{name_of(path)} imports {module}, not below it"


def test_no_import_goes_round_in_a_circle() -> None:
    # what the package itself names, it imports when it is used (test_api.py)
    found = {name: imports(path, types=name != "constellation") for name, path in MODULES.items()}
    graph = {name: {m for m in modules if m in MODULES and m != name} for name, modules in found.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_only_actors_and_tune_import_ray(path: Path) -> None:
    if path.relative_to(ROOT).parts[0] not in ("actors", "tune"):
        assert not {i for i in imports(path) if i.split(".")[0] == "ray"}


@pytest.mark.parametrize("place", FREE_OF)
def test_what_is_said_to_be_absent_is(place: str) -> None:
    for path in sources():
        if str(path.relative_to(ROOT)).startswith(place):
            assert not loaded(path) & set(FREE_OF[place]), path


def test_no_ray_here_is_true_where_it_is_said() -> None:
    said = [path for path in sources() if "No Ray" in (ast.get_docstring(ast.parse(path.read_text())) or "")]
    assert said
    for path in said:
        files = path.parent.rglob("*.py") if path.name == "__init__.py" else [path]
        for file in files:
            mailboxes = {m for m in imports(file) if m.split(".")[0] in ("ray", "actors")}
            assert not mailboxes, f"{file} imports {mailboxes}"


def test_help_imports_neither_torch_nor_ray() -> None:
    code = (
        "import sys; from constellation.cli import run; run(['--help']); run(['train', '--help']);"
        "print(sorted({'torch', 'ray', 'numpy'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"


def test_top_level_is_what_the_user_fixed() -> None:
    for name in ("pyproject.toml", "constellation", "actors", "router", "tune", "tests", "cluster.yaml"):
        assert (ROOT / name).exists(), name


def test_http_stays_behind_its_door() -> None:
    """FastAPI in one file; of the router, only that file and its folder know HTTP."""
    for path in sources():
        name, found = str(path.relative_to(ROOT)), imports(path)
        if any(module.split(".")[0] == "fastapi" for module in imports(path, types=False)):
            assert name == "router/app.py"
        if name.startswith("router/") and not name.startswith("router/http/") and name != "router/app.py":
            assert not {module for module in found if module.startswith("router.http")}, name
