"""The documents: links lead somewhere, and what they import or call exists."""

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest

import attnsieve
from attnsieve.cli.app import app

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "benchmarks" / "README.md"])


def anchors(path: Path) -> set[str]:
    """Of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def blocks(path: Path, language: str) -> list[str]:
    """Code of that language."""
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    lost = []
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        if "://" not in link and not (target.exists() and (not anchor or anchor in anchors(target))):
            lost.append(link)
    assert not lost


def test_files_that_are_named_exist():
    """By their last parts. The log tells of files as they were on its days."""
    folders = ("src", "tests", "benchmarks", "examples", "docs")
    files = [*ROOT.glob("*.*"), *(file for folder in folders for file in (ROOT / folder).rglob("*.*"))]
    lost = []
    for path in set(DOCUMENTS) - {ROOT / "docs" / "LOG.md", ROOT / "CHANGELOG.md"}:
        for name in re.findall(r"`([\w./-]+\.(?:py|sh|txt))`", path.read_text(encoding="utf-8")):
            if not any(f"/{file.relative_to(ROOT).as_posix()}".endswith(f"/{name}") for file in files):
                lost.append(f"{path.name}: {name}")
    assert not lost


def test_every_entry_of_the_log_is_in_its_contents():
    text = (ROOT / "docs" / "LOG.md").read_text(encoding="utf-8")
    dated = {anchor for anchor in anchors(ROOT / "docs" / "LOG.md") if anchor.startswith("20")}
    assert dated <= set(re.findall(r"\]\(#([^)]+)\)", text))


def test_python_in_the_readme_imports_what_exists():
    code = blocks(ROOT / "README.md", "python")
    assert code
    for node in (node for block in code for node in ast.walk(ast.parse(block))):
        if isinstance(node, ast.ImportFrom):
            assert all(hasattr(import_module(str(node.module)), alias.name) for alias in node.names), ast.unparse(node)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "attnsieve":
            assert node.attr in attnsieve.__all__, f"{ast.unparse(node)} is there only where something else imported it"


def test_commands_in_the_readme_exist():
    known = {command.name or command.callback.__name__ for command in app.registered_commands}
    named = re.findall(r"^attnsieve (\w+)", "\n".join(blocks(ROOT / "README.md", "bash")), re.MULTILINE)
    assert named
    assert set(named) <= known
