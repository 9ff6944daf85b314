"""The shape of the source: imports point down, each library has its files, and everything stays small and described."""

import ast
import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest
from structure_tables import FROM_THE_PACKAGE, LAYERS, LIBRARIES, TRAINER_NAMES

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "phi3v"


def module_name(path: Path) -> str:
    """`src/phi3v/data/encode.py` is `data.encode`; `data/__init__.py` is `data`, and the top `__init__.py` is empty."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(SOURCE.rglob("*.py"))}


@functools.cache
def trees() -> dict[str, ast.Module]:
    """Each module's syntax, parsed by the worker that runs these tests."""
    return {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def layer(name: str) -> int:
    return next(number for pattern, number in LAYERS if fnmatch(name, pattern))


def imports(name: str) -> Iterator[tuple[str, str, int]]:
    """Every import of a module, lazy ones included: (module, imported name or "", line).

    Relative imports, which only model/ uses because transformers' own model folders do, are written out:
    `from .register import register` in model/__init__.py is ("phi3v.model.register", "register", line).
    """
    package = ("phi3v." + name if name else "phi3v").split(".")
    if FILES[name].name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(trees()[name]):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, "", node.lineno
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            for alias in node.names:
                yield ".".join([*start, *filter(None, [node.module])]), alias.name, node.lineno


def inner_imports(name: str) -> Iterator[tuple[str, str, int]]:
    """The imports of phi3v itself: (module without the leading `phi3v.`, imported name, line).

    `from phi3v.demo import scenes` imports the module demo.scenes: ("demo.scenes", "", line).
    """
    for module, what, line in imports(name):
        if module == "phi3v" or module.startswith("phi3v."):
            inner = module.removeprefix("phi3v").removeprefix(".")
            below = f"{inner}.{what}".removeprefix(".")
            yield (below, "", line) if below in FILES else (inner, what, line)


def test_every_module_has_a_layer() -> None:
    homeless = [name for name in FILES if name and not any(fnmatch(name, pattern) for pattern, _ in LAYERS)]
    assert not homeless, f"give these a layer in {Path(__file__).name}: {homeless}"


def test_imports_point_down() -> None:
    wrong = []
    for name in filter(None, FILES):
        for target, what, line in inner_imports(name):
            if not target:
                if what not in FROM_THE_PACKAGE:
                    wrong.append(
                        f"{name}:{line} takes {what or 'names'} from the package; import the module that has it"
                    )
            elif target not in FILES:
                wrong.append(f"{name}:{line} imports phi3v.{target}, which is not there")
            elif layer(target) > layer(name):
                wrong.append(f"{name}:{line} (layer {layer(name)}) imports {target} (layer {layer(target)})")
    assert not wrong, "\n".join(wrong)


def test_imports_are_written_in_full() -> None:
    """Except in model/, which has the form that transformers asks for."""
    wrong = [
        f"{name}:{node.lineno}"
        for name, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level and not fnmatch(name, "model*")
    ]
    assert not wrong, f"write `from phi3v.x import y`: {wrong}"


def test_no_cycles() -> None:
    """Lazy imports count: a cycle that is hidden in a function is a cycle."""
    below = {name: {target for target, _, _ in inner_imports(name) if target} for name in FILES if name}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for target in sorted(below.get(name, ())):
                visit(target, (*path, name))
            done.add(name)

    for name in below:
        visit(name, ())


def test_layers_one_to_three_receive_plain_values() -> None:
    wrong = [
        f"{name}:{line}"
        for name in filter(None, FILES)
        if 1 <= layer(name) <= 3
        for target, _, line in inner_imports(name)
        if fnmatch(target, "recipe*")
    ]
    assert not wrong, f"recipes stay above layer 3: {wrong}"


def test_data_never_imports_the_model() -> None:
    wrong = [
        f"{name}:{line}"
        for name in FILES
        if fnmatch(name, "data*")
        for target, _, line in inner_imports(name)
        if target.startswith("model")
    ]
    assert not wrong, f"data receives its processor as an argument: {wrong}"


def test_only_the_command_line_knows_the_demo() -> None:
    wrong = [
        name
        for name, path in FILES.items()
        if layer_or_top(name) < 6 and "phi3v.demo" in path.read_text(encoding="utf-8")
    ]
    assert not wrong, f"the demo's world is special to nobody: {wrong}"


def layer_or_top(name: str) -> int:
    return layer(name) if name else 0


def test_each_library_has_its_files() -> None:
    wrong = []
    for name in FILES:
        for module, what, line in imports(name):
            library = module.split(".")[0]
            if library == "phi3v" or library in sys.stdlib_module_names:
                continue
            if not any(fnmatch(name, pattern) for pattern in LIBRARIES.get(library, ())):
                wrong.append(f"{name}:{line} imports {library}; it belongs to {LIBRARIES.get(library, 'no file yet')}")
            if library == "transformers" and what in TRAINER_NAMES and not fnmatch(name, "training.*"):
                wrong.append(f"{name}:{line} imports {what}; the training loop belongs to training/")
    assert not wrong, "\n".join(wrong)


def test_light_modules_import_neither_torch_nor_transformers() -> None:
    """The package, its public names' list, and everything that needs no model: milliseconds instead of seconds."""
    light = ["phi3v", "phi3v.targets", *(f"phi3v.{name}" for name in FILES if name and layer(name) == 0)]
    heavy = ["torch", "transformers", "datasets", "peft", "numpy", "PIL", "matplotlib"]
    program = f"import sys, {', '.join(light)}\nprint([name for name in {heavy} if name in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(SOURCE.parent)}
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True
    )
    assert answer.stdout.strip() == "[]", answer.stdout


def test_the_model_folder_needs_torch_and_transformers_alone() -> None:
    """What is in model/ could move to transformers as it is: only libraries that model folders use there."""
    outside = {module.split(".")[0] for name in FILES if fnmatch(name, "model*") for module, _, _ in imports(name)}
    outside -= {"phi3v", *sys.stdlib_module_names}
    assert outside <= {"torch", "transformers", "numpy", "PIL", "huggingface_hub", "tokenizers"}, outside


@pytest.mark.parametrize("name", ["utils", "util", "common", "constants", "helpers", "misc", "core"])
def test_no_drawer_for_everything(name: str) -> None:
    assert not [path for path in FILES.values() if path.stem == name or path.parent.name == name]


def every_python_file() -> list[Path]:
    """Source, tests and examples; not what tools and environments put into the folder."""
    return [
        path
        for folder in ("src", "tests", "examples", "scripts", "benchmarks")
        for path in sorted((ROOT / folder).rglob("*.py"))
    ]


def test_files_have_at_most_400_lines() -> None:
    counts = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in every_python_file()
    }
    assert not {path: lines for path, lines in counts.items() if lines > 400}


def test_functions_have_at_most_60_lines() -> None:
    """The docstring aside: a table of arguments does not make a function harder to follow."""
    long = []
    for name, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                words = node.body[0] if ast.get_docstring(node) else None
                lines = node.end_lineno - node.lineno + 1 - (words.end_lineno - words.lineno + 1 if words else 0)
                if lines > 60:
                    long.append(f"{name}.{node.name}: {lines} lines")
    assert not long, long


def test_modules_and_public_names_are_described() -> None:
    bare = [
        str(path) for path in every_python_file() if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    for name, tree in trees().items():
        for node in tree.body:
            if (
                isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
                and not node.name.startswith("_")
                and not ast.get_docstring(node)
            ):
                bare.append(f"{name}.{node.name}")
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                bare += [
                    f"{name}.{node.name}.{inner.name}"
                    for inner in node.body
                    if isinstance(inner, ast.FunctionDef)
                    and not inner.name.startswith("_")
                    and not ast.get_docstring(inner)
                ]
    assert not bare, f"say what these do: {bare}"


def test_public_functions_have_types() -> None:
    untyped = []
    for name, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                missing = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
                if missing or node.returns is None:
                    untyped.append(f"{name}:{node.lineno} {node.name}({', '.join(missing)})")
    assert not untyped, "\n".join(untyped)


def test_the_library_neither_prints_nor_keeps_globals() -> None:
    wrong = []
    for name, tree in trees().items():
        for node in ast.walk(tree):
            called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id
            if called == "print" and not fnmatch(name, "cli*"):
                wrong.append(f"{name}:{node.lineno} prints")
            if isinstance(node, ast.Global):
                wrong.append(f"{name}:{node.lineno} keeps state in a global")
            if isinstance(node, ast.ExceptHandler) and len(node.body) == 1 and isinstance(node.body[0], ast.Pass):
                caught = node.type.id if isinstance(node.type, ast.Name) else None
                if node.type is None or caught in ("Exception", "BaseException"):
                    wrong.append(f"{name}:{node.lineno} swallows every error")
    assert not wrong, "\n".join(wrong)
