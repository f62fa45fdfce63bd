"""The direction of imports, read from the sources: a row may use the rows below it, never its neighbours."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# bottom first; names within a row do not know each other
ROWS = [
    {
        "constellation.errors",
        "constellation.config",
        "constellation.geometry",
        "constellation.atomic",
        "constellation.processor",
    },
    {"constellation.kernel", "constellation.coordizer", "constellation.optim", "constellation.telemetry"},
    {"constellation.data"},
    {"constellation.artifacts", "constellation.presets"},
    {"constellation.train"},
    {"router"},
    {"actors", "tune"},
    {"constellation.experiments"},
    {"constellation.commands"},
    {"constellation.cli"},
    {"constellation.__main__"},
]
WITHIN_FIRST_ROW = {  # the ground floor may lean on errors
    "constellation.config": {"constellation.errors"},
    "constellation.geometry": {"constellation.errors", "constellation.config"},
    "constellation.atomic": {"constellation.errors"},
}
PART_OF = {part: row for row, parts in enumerate(ROWS) for part in parts}


def part(module: str) -> str | None:
    """The part that `module` belongs to, None for what is not ours."""
    pieces = module.split(".")
    for name in (".".join(pieces[:2]), pieces[0]):
        if name in PART_OF:
            return name
    return "constellation" if pieces[0] == "constellation" else None


def sources() -> list[Path]:
    folders = ("constellation", "router", "actors", "tune")
    return sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Every module that a file imports, at the top or inside functions, but for type checking alone."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and "TYPE_CHECKING" in ast.dump(test.test)
        for node in ast.walk(test)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downwards(path: Path) -> None:
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    mine = part(module)
    if mine == "constellation":  # the package's own __init__
        assert not [i for i in imports(path) if part(i)]
        return
    for imported in imports(path):
        theirs = part(imported)
        if theirs in (None, mine, "constellation"):
            continue
        allowed = PART_OF[theirs] < PART_OF[mine] or theirs in WITHIN_FIRST_ROW.get(mine, set())
        assert allowed, f"{module} ({mine}) imports {imported} ({theirs}), which is not below it"


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_only_actors_and_tune_import_ray(path: Path) -> None:
    if path.relative_to(ROOT).parts[0] not in ("actors", "tune"):
        assert not {i for i in imports(path) if i.split(".")[0] == "ray"}


def test_help_imports_neither_torch_nor_ray() -> None:
    code = (
        "import sys; from constellation.cli import run; run(['--help']); run(['train', '--help']);"
        "print(sorted({'torch', 'ray', 'numpy'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"


def test_the_public_names_of_the_package_are_few() -> None:
    import constellation

    public = {n for n in vars(constellation) if not n.startswith("_")} - {p.split(".")[-1] for p in PART_OF}
    assert len(public) <= 12, public


def test_top_level_is_what_the_user_fixed() -> None:
    for name in ("pyproject.toml", "constellation", "actors", "router", "tune", "tests", "cluster.yaml"):
        assert (ROOT / name).exists(), name


def test_http_stays_behind_its_door() -> None:
    """FastAPI in one file; of the router, only that file and its folder know HTTP."""
    for path in sources():
        name, found = str(path.relative_to(ROOT)), imports(path)
        if any(module.split(".")[0] == "fastapi" for module in found):
            assert name == "router/app.py"
        if name.startswith("router/") and not name.startswith("router/http/") and name != "router/app.py":
            assert not {module for module in found if module.startswith("router.http")}, name
