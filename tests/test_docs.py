"""What the README and the documentation tell a reader to type works: it is run, or at least read by what it is for.

On the pages in RUN, commands on the shipped model are run in order, in one folder, and print what the page says. All
other commands are parsed by the command's own parser; exports of published models are planned with --dry-run as well.
"""

import contextlib
import io
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from textwrap import dedent

import pytest
from commands import MAIN, call
from outside_package import install

from himap_export.exporter.aliases import ALIASES
from himap_export.graphs.errors import MEANINGS

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    ROOT / name
    for name in (
        *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "examples/shapes/README.md"),
        *("tests/fixtures/README.md", *(str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md"))),
    )
)
RUN = ("README.md", "docs/index.md", "docs/api.md")
LANGUAGES = ("sh", "python", "text", "toml", "json", "yaml")
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
TARGETS = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.M))
SERVED = "http://127.0.0.1:8000/v1"
SHIPPED = re.compile(r"shapes|engines-shapes/?")
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, and the output that the page shows behind it."""

    language: str
    text: str
    shown: str


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of `page`, in order; what stands in a `text` block right behind one is its output."""
    text = re.sub(
        r"^    ```.*?^    ```$", lambda item: dedent(item[0]), page.read_text(), flags=re.S | re.M
    )  # in lists
    found = re.findall(r"^```([^\n]*)\n(.*?)^```\n(?=\n?(?:```text\n(.*?)^```)?)", text, re.S | re.M)
    return [Block(head.split()[0] if head.split() else "", text, shown) for head, text, shown in found]


def commands(script: str) -> Iterator[list[str]]:
    """The words of each command of a shell script, without variables set in front of it and without redirections."""
    for line in script.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z0-9_]+=.*", words[0], re.S):
            del words[0]
        if words:
            yield words[: words.index(">")] if ">" in words else words


def parsed(command: str, words: list[str]) -> None:
    """Has the command's own parser read `words`, and plans an export that needs nothing but them."""
    module = import_module(MAIN[command])
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            module._parser().parse_args(words)
        except SystemExit as left:
            assert left.code == 0, words  # --print-completion
        files = [word for word in words if word.endswith(".toml")]
        if command == "himap-export" and words[0] in ALIASES and all(Path(file).exists() for file in files):
            assert call(module.main, *words, "--dry-run") == 0, words


def checked(words: list[str]) -> None:
    """Looks at a command that is none of ours: what it names has to be there."""
    command, rest = words[0].rpartition("/")[2], words[1:]
    files = [word.partition("::")[0] for word in rest if word.endswith(".py") or word.startswith("tests/")]
    assert all((ROOT / file).exists() for file in files), words
    if command == "make":
        assert rest and set(rest) <= TARGETS, words
    elif command == "pip":
        extras = [extra for word in rest for found in re.findall(r"\[(.*)\]", word) for extra in found.split(",")]
        assert rest[0] == "install" and set(extras) <= set(EXTRAS), words
    elif command == "optimum-cli":
        assert rest[:3] == ["export", "himap", "--model"], words
        parsed("himap-export", [*rest[3:-1], "--out", rest[-1]])
    else:  # tests/validate/test_polygraphy.py runs the commands of polygraphy's page
        known = ("git", "cd", ".", "python", "python3.11", "pytest", "polygraphy", "export", "serve", "ray")
        assert command in known, words


def run(block: Block, names: dict[str, object]) -> str:
    """Runs what can be run of a block of RUN's pages, in Python over the page's `names`; returns what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.ExitStack() as until:
        if block.language == "python":
            text = block.text
            if SERVED in text:
                text = text.replace(SERVED, until.enter_context(served(Path("engines-shapes"))))
            exec(compile(text, "a block of the documentation", "exec"), names)
        for command, *words in commands(block.text) if block.language == "sh" else ():
            if command not in MAIN:
                checked([command, *words])
            elif SHIPPED.fullmatch(words[0]) and "--dry-run" not in words:
                assert call(import_module(MAIN[command]).main, *words) == 0, words
            else:
                parsed(command, words)
    return printed.getvalue()


@contextlib.contextmanager
def served(bundle: Path) -> Iterator[str]:
    """The address of a server of `bundle`, as `make serve` would have it, where the page says SERVED."""
    script = Path(sys.executable).with_name("himap-serve")
    words = [script, bundle, "--model-name", "shapes", "--port", "0"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout is not None
        line = server.stdout.readline()
        assert " serves shapes" in line
        yield line.split()[0]
        server.terminate()
    assert server.returncode == 0


@pytest.mark.parametrize("name", RUN)
def test_the_pages_for_a_newcomer_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(ROOT / name):
        said = run(block, names) if block.language in ("sh", "python") else ""
        for line in block.shown.splitlines():  # times in brackets are the machine's
            assert line.startswith("[") or line in said.splitlines(), (line, said)


@pages
def test_every_command_is_one_that_there_is(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = blocks(page)
    assert {block.language for block in found} <= set(LANGUAGES), "say what language each block is in"
    for block in found:
        if block.language == "toml":
            Path("plans.toml").write_text(block.text)
    if install((block.text for block in found), tmp_path):
        monkeypatch.syspath_prepend(tmp_path)
    for block in found if str(page.relative_to(ROOT)) not in RUN else ():
        for command, *words in commands(block.text) if block.language == "sh" else ():
            parsed(command, words) if command in MAIN else checked([command, *words])
        if block.language == "python":
            compile(block.text, str(page), "exec")


def test_the_plan_on_the_page_is_the_one_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """In docs/export.md, to the last digit."""
    block = blocks(ROOT / "docs" / "export.md")[0]
    ((command, *words),) = commands(block.text)
    assert call(import_module(MAIN[command]).main, *words) == 0
    assert capsys.readouterr().out == block.shown


@pages
def test_every_link_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M))
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


@pages
def test_every_file_named_is_there(page: Path) -> None:
    """But in the log, which tells of its day."""
    named = re.findall(
        r"`((?:graphs|engines|serve|exporter|validate|tests|benchmarks|examples|docs)/[\w./*-]+)`", page.read_text()
    )
    gone = [name for name in named if "NAME" not in name and not list(ROOT.glob(name.rstrip("/")))]
    assert gone == [] or page.name == "log.md"


def test_the_exit_codes_on_the_page() -> None:
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", (ROOT / "docs" / "index.md").read_text(), re.M)
    assert {int(code): meaning for code, meaning in rows} == {int(code): meaning for code, meaning in MEANINGS.items()}


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """Strict: no broken link or anchor, no page that is in no menu."""
    script = Path(sys.executable).with_name("mkdocs")
    words = [script, "build", "--strict", "--site-dir", tmp_path / "site"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "site" / "index.html").exists()
