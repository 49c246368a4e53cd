"""The program's shape: what may import what, and how long files, functions and lines may be."""
import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
LINES = {"precision.py": 400, "model.py": 350, "sample.py": 350, "algorithms.py": 260, "train_rl.py": 450}
COLUMNS, FUNCTION, TRAIN = 100, 60, 80                    # of these files; lines of a function, and of `train`
ALL, WORKSHOP = 10_560, 2_050                             # all but the workshop, and that without stubs and solutions
FOLDERS = [p.parent for p in ROOT.glob("*/__init__.py") if p.parent.name != "tests"]
FILES = {p.relative_to(ROOT).as_posix(): p for folder in (ROOT, *FOLDERS)
         for p in (folder.glob("*.py") if folder == ROOT else folder.rglob("*.py")) if "mine" not in p.parts}


def file_of(module):
    """`data.guard` -> data/guard.py, `data` -> data/__init__.py; None for what is not the project's own."""
    path = module.replace(".", "/")
    return next((f for f in (f"{path}.py", f"{path}/__init__.py") if f in FILES), None)


def imported(source, package=""):
    """The project's own files that a source imports, also inside of functions. package: for `from . import x`."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {file_of(alias.name) for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            parts = package.split("/")[:-node.level + 1 or None] if node.level else []
            module = ".".join([*filter(None, parts), *filter(None, [node.module])])
            found |= {file_of(f"{module}.{alias.name}") or file_of(module) for alias in node.names}
    return found - {None}


IMPORTS = {name: imported(path.read_text(encoding="utf-8"), str(pathlib.PurePosixPath(name).parent).strip("."))
           for name, path in FILES.items()}


def circle(imports):
    """Files that import each other in a circle, the first one once more at the end; or an empty list."""
    done = set()

    def walk(file, path):
        if file in path:
            return [*path[path.index(file):], file]
        if file in done:
            return []
        for other in sorted(imports[file]):
            if found := walk(other, [*path, file]):
                return found
        done.add(file)
        return []
    return next((found for file in sorted(imports) if (found := walk(file, []))), [])


def test_the_test_itself():
    assert imported("import data.guard\nfrom data import Problem\ndef f():\n    from run import base, flags") == {
        "data/guard.py", "data/__init__.py", "run/base.py", "run/flags.py"}
    assert imported("from . import guard\nfrom .own import load_own\nimport torch, json", "data") == {
        "data/guard.py", "data/own.py"}
    assert circle(dict(a={"b"}, b={"c"}, c={"b"}, d=set())) == ["b", "c", "b"]
    assert not circle(dict(a={"b", "c"}, b={"c"}, c=set()))
    assert set(LINES) < set(FILES) and not any(f.startswith("tests/") for f in FILES) and len(FILES) > 40


def test_no_circle_of_imports():
    assert not circle(IMPORTS), " -> ".join(circle(IMPORTS))


def folder(file):
    """The part of the project that a file belongs to: its folder, or itself."""
    return file.partition("/")[0]


MAY = {"operators": {"precision.py", "model.py", "operators", "hf", "data/tokenizer.py"},
       "hf": {"precision.py", "model.py", "operators", "hf", "data/tokenizer.py", "data/__init__.py"},
       "data": {"data", "precision.py"}, "precision.py": set(), "model.py": {"precision.py"}, "algorithms.py": set()}


@pytest.mark.parametrize("part", MAY)
def test_what_may_import_what(part):
    found = {(file, other) for file, others in IMPORTS.items() if folder(file) == part for other in others}
    assert not {(a, b) for a, b in found if not {b, folder(b)} & MAY[part]}


def test_nothing_depends_on_an_experiment():
    assert not {(a, b) for a, others in IMPORTS.items() for b in others
                if folder(b) in ("experiments", "workshop") and folder(a) not in (folder(b), "workshop")}


@pytest.mark.parametrize("file", LINES)
def test_lines_and_functions_are_short(file):
    source = FILES[file].read_text(encoding="utf-8")
    assert not [i for i, line in enumerate(source.splitlines(), 1) if len(line) > COLUMNS]
    kinds = ast.FunctionDef, ast.AsyncFunctionDef
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    limit = {node: TRAIN if (file, node.name) == ("train_rl.py", "train") else FUNCTION for node in functions}
    length = {node: node.end_lineno - node.lineno + 1 for node in functions}                  # its docstring included
    assert not {node.name: length[node] for node in functions if length[node] > limit[node]}


@pytest.mark.parametrize("file", LINES)
def test_files_can_be_read_at_one_sitting(file):
    lines = len(FILES[file].read_text(encoding="utf-8").splitlines())
    assert lines <= LINES[file], f"{file} has {lines} lines"


def test_all_of_it():
    paths = {*FILES.values(), *(p for d in FOLDERS for p in d.rglob("*.c"))}
    course = {p for p in paths if p.is_relative_to(ROOT / "workshop")}
    written = {p for p in course if p.parent.name not in ("stubs", "solutions")}
    for some, limit in ((paths - course, ALL), (written, WORKSHOP)):
        total = sum(len(p.read_text(encoding="utf-8").splitlines()) for p in some)
        assert total <= limit, f"{total} lines of Python and C outside of tests/, in {len(some)} files"
