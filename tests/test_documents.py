"""What the documents say is true: the README's tree, every command line, every link and every path."""

import re
import shlex
from pathlib import Path

import pytest
import typer

import phi3v
from phi3v.cli import app
from phi3v.recipe import Recipe
from phi3v.recipe_yaml import read_yaml

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
RECIPES = sorted([*ROOT.glob("recipes/*.yaml"), *ROOT.glob("examples/*.py")])
# Folders that the tree shows as one line, because their files are listed elsewhere or follow one pattern.
LISTED_IN_FULL = ("src/phi3v", "recipes", "examples", "scripts", "docs", "benchmarks")


def tree_entries() -> dict[str, str]:
    """The README's tree as {path: what it says about it}; two spaces of indentation are one folder.

    Example: the lines `docs/` and `  log.md    what did not work` are {"docs": "", "docs/log.md": "what did not work"}.
    """
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"^## The tree\n.*?^```text\n(.*?)^```", text, re.MULTILINE | re.DOTALL).group(1)
    entries: dict[str, str] = {}
    folders: list[str] = []
    for line in filter(str.strip, block.splitlines()):
        name, _, words = line.strip().partition("  ")
        depth = (len(line) - len(line.lstrip())) // 2
        folders = folders[:depth]
        entries["/".join([*folders, name.rstrip("/")])] = words.strip()
        if name.endswith("/"):
            folders.append(name.rstrip("/"))
    return entries


def test_the_tree_names_what_is_there() -> None:
    missing = [path for path in tree_entries() if not (ROOT / path).exists()]
    assert not missing, f"the README's tree names files that are not there: {missing}"


def test_the_tree_names_everything() -> None:
    entries = tree_entries()
    files = [
        path
        for folder in LISTED_IN_FULL
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".j2", ".js", ".yaml", ".md", ".sh")
    ]
    wanted = {path.relative_to(ROOT).as_posix() for path in files}
    # A package's __init__.py is its folder's line, except the top one.
    wanted = {path for path in wanted if not path.endswith("/__init__.py") or path == "src/phi3v/__init__.py"}
    wanted = {
        path
        for path in wanted
        if not any(part.startswith(".") or part.endswith(".egg-info") for part in path.split("/"))
    }
    assert not wanted - set(entries), (
        f"add to the README's tree, with half a line each: {sorted(wanted - set(entries))}"
    )


def test_every_line_of_the_tree_says_what_it_is() -> None:
    bare = [path for path, words in tree_entries().items() if not words and not (ROOT / path).is_dir()]
    assert not bare, bare


def command_lines() -> list[tuple[str, str]]:
    """Every `phi3v ...` that a document, a recipe or an example tells a reader to type: (file, command line).

    Taken are lines of code blocks and indented lines of comments that begin with `phi3v `, and inline code.
    """
    found = []
    for path in [*DOCUMENTS, *RECIPES]:
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        lines = []
        if path in RECIPES:  # heads of recipes and docstrings of examples set commands off by indentation
            lines = re.findall(r"^(?:#[ \t]{2,}|[ \t]{4})(phi3v [a-z-][^`\n]*)$", text, re.MULTILINE)
        for block in re.findall(r"^```(?:bash|sh|console)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            lines += re.findall(r"^(?:\$ )?(phi3v .*)$", block, re.MULTILINE)
        lines += re.findall(r"`(phi3v [a-z-][^`\n]*)`", text)
        found += [(path.relative_to(ROOT).as_posix(), line.strip()) for line in lines]
    return found


def words_of(line: str) -> list[str]:
    """A command line as the shell would hand it over, comment cut off; `[...]` around what may be left out is dropped.

    Example: `phi3v train RECIPE [key=value ...]  # resumes` is ["train", "RECIPE", "key=value"].
    """
    line = line.replace("[", "").replace("]", "").replace("...", "")
    return shlex.split(line, comments=True)[1:]


@pytest.mark.parametrize(("file", "line"), command_lines())
def test_every_command_line_parses(file: str, line: str) -> None:
    words = words_of(line)
    group = typer.main.get_command(app)
    if len(words) > 1 and words[0] in group.commands and hasattr(group.commands[words[0]], "commands"):
        group, words = group.commands[words[0]], words[1:]
    if words and words[0] not in group.commands:
        assert words[0] in ("--help", "-h", "--version"), f"{file}: there is no `phi3v {words[0]}`"
    elif len(words) > 1:  # a command's bare name, as in this sentence's `phi3v train`, only has to exist
        group.commands[words[0]].make_context(words[0], words[1:], resilient_parsing="--help" in words)


def test_documents_show_every_command() -> None:
    """A command that no document shows is a command that nobody finds."""
    shown = {" ".join(words_of(line)[:count]) for _, line in command_lines() for count in (1, 2)}
    commands = typer.main.get_command(app).commands
    wanted = [f"{name} {inner}" for name, group in commands.items() for inner in getattr(group, "commands", {})]
    assert not {*commands, *wanted} - shown


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_recipes_and_programs_in_documents_are_valid(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for block in re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        Recipe.from_dict(read_yaml(block, path.name))
    for block in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        compile(block, path.name, "exec")
        assert set(re.findall(r"\bphi3v\.(\w+)", block)) <= set(phi3v.__all__)


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    used = {}
    for path in DOCUMENTS:
        for target in re.findall(r"(?:^|`|\$ )make ([a-z][a-z-]*)", path.read_text(encoding="utf-8"), re.MULTILINE):
            used[target] = path.name
    assert not set(used) - targets, {target: used[target] for target in set(used) - targets}


def test_links_and_paths_lead_somewhere() -> None:
    lost = []
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)|<img[^>]+src=\"([^\"]+)\"", text)
        for link in (a or b for a, b in links):
            if not re.match(r"https?:|mailto:", link) and not (path.parent / link).exists():
                lost.append(f"{path.name}: {link}")
        for name in re.findall(r"`((?:src|recipes|examples|docs|tests|benchmarks)/[\w./-]+)`", text):
            if not (ROOT / name).exists():
                lost.append(f"{path.name}: {name}")
    assert not lost, lost


def test_documents_name_files_of_the_package_that_exist() -> None:
    """The README's "open Y" column writes paths below src/phi3v: `data/encode.py`."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = re.search(r"^## I want to change.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL).group(0)
    names = re.findall(r"`([\w/]+\.(?:py|j2|yaml|md))`", table)
    assert names
    lost = [name for name in names if not (ROOT / "src/phi3v" / name).exists() and not (ROOT / name).exists()]
    assert not lost, lost


def test_nothing_is_left_for_later() -> None:
    """A plan is an issue, not a note in the source."""
    marks = ["TO" + "DO", "FIX" + "ME", "X" * 3, "HA" + "CK"]
    folders = ("src", "tests", "examples", "scripts", "benchmarks")
    programs = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    places = [*programs, *DOCUMENTS, *ROOT.glob("recipes/*")]
    found = [
        f"{path.relative_to(ROOT)}: {mark}"
        for path in places
        for mark in marks
        if mark in path.read_text(encoding="utf-8")
    ]
    assert not found, found
