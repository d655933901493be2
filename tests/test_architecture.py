"""The dependency arrows of DESIGN.md, import hygiene, and the size limits that keep files readable."""

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "attnsieve"
FILES = sorted(PACKAGE.rglob("*.py"))
HEAVY = {
    "transformers": {"hf", "nn", "evaluation", "cli"},
    "triton": {"backends", "launching", "nn", "replay", "selection"},
    "matplotlib": {"show"},
    "lm_eval": {"evaluation"},
}
MOST_LINES = 500


def room_of(module: str) -> str:
    """attnsieve.backends.portable.parts -> backends."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def design_table() -> dict[str, set[str]]:
    """room -> rooms it may import, from the table under "Rooms" in DESIGN.md."""
    table = {}
    section = (ROOT / "DESIGN.md").read_text().split("## Rooms")[1].split("\n## ")[0]
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 3 and cells[0].startswith("`"):
            allowed = set(re.findall(r"\w+", cells[2])) - {"and", "the"}
            for room in re.findall(r"`(\w+)[/.\w]*`", cells[0]):
                table[room] = allowed
    return table


def imports_of(path: Path) -> set[str]:
    """Modules that a file names in import statements, lazy ones included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def test_every_room_is_in_the_design():
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES} - {"__init__", "__main__", "py"}
    assert rooms <= set(design_table()), f"DESIGN.md has no row for {rooms - set(design_table())}"


def test_arrows_are_those_of_the_design():
    table, wrong = design_table(), []
    for path in FILES:
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room.startswith("__"):
            continue
        for module in imports_of(path):
            target = room_of(module) if module.startswith("attnsieve") else ""
            if target and target != room and target not in table[room] and "all" not in table[room]:
                wrong.append(f"{path.relative_to(ROOT)} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_heavy_libraries_stay_in_their_rooms():
    for path in FILES:
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for module in imports_of(path):
            allowed = HEAVY.get(module.split(".")[0])
            assert allowed is None or room in allowed, f"{path.relative_to(ROOT)} imports {module}"


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, attnsieve; print([m for m in ('transformers', 'triton', 'matplotlib', 'scipy') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert found == "[]"


def test_no_pickle():
    for path in FILES:
        text = path.read_text()
        assert not imports_of(path) & {"pickle", "dill", "cloudpickle", "joblib"}, path
        assert "torch.load(" not in text, path


def test_files_stay_readable():
    lengths = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in FILES}
    long = {path: lines for path, lines in lengths.items() if lines > MOST_LINES}
    assert not long, f"split these files: {long}"
