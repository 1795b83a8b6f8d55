"""The house: what stands at the top, how long a file may be, and which way the imports point."""
import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CONCEPTS = ["tgdt", "user", "unified", "losses", "data", "retrieve", "train"]
ALLOWED = {  # what each room may import of this project, at the top of a file
    "losses": set(),
    "tgdt": set(),
    "user": {"tgdt"},
    "unified": {"tgdt", "user"},
    "data": {"sources"},
    "retrieve": {"losses"},
    "train": {"losses", "tgdt", "user"},
    "sources": {"sources"},
    "harness": {"harness", "sources", "data", "losses", "tgdt", "user", "unified", "retrieve"},
}
FILES = [ROOT / f"{name}.py" for name in CONCEPTS] + sorted([*ROOT.glob("sources/*.py"), *ROOT.glob("harness/*.py")])


def room_of(path: Path) -> str:
    return path.stem if path.parent == ROOT else path.parent.name


def imported(nodes: list[ast.stmt]) -> list[str]:
    """The modules of this project that some statements import, as "sources.files" or "losses"."""
    names = []
    for node in nodes:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" if node.module in ("sources", "harness") else node.module
                      for alias in node.names]
    return [name for name in names if name.split(".")[0] in ALLOWED]


def test_the_concepts_stand_alone_at_the_top():
    assert sorted(path.stem for path in ROOT.glob("*.py")) == sorted(CONCEPTS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_each_file_is_short_and_its_imports_point_down(path):
    text = path.read_text()
    assert len(text.splitlines()) < (280 if path.parent == ROOT else 300)
    tree = ast.parse(text)
    rooms = {name.split(".")[0] for name in imported(tree.body)}
    assert rooms <= ALLOWED[room_of(path)]
    inside = {name.split(".")[0] for function in ast.walk(tree) if isinstance(function, ast.FunctionDef)
              for name in imported(list(ast.walk(function)))}
    if path.stem in ("train", "retrieve") and path.parent == ROOT:
        assert inside == {"harness"}  # the last lines, which hand over to the command line
    else:
        assert inside <= ALLOWED[room_of(path)]


def test_there_is_no_circle():
    """Inside the two folders: follow the imports from any file, and never come back to it."""
    arrows = {}
    for path in FILES:
        if path.parent != ROOT:
            arrows[f"{room_of(path)}.{path.stem}"] = [
                ".".join(name.split(".")[:2]) for name in imported(list(ast.walk(ast.parse(path.read_text()))))]

    def reached(name: str, seen: set[str]) -> set[str]:
        for other in arrows.get(name, []):
            if other not in seen:
                seen.add(other)
                reached(other, seen)
        return seen

    assert [name for name in arrows if name in reached(name, set())] == []
