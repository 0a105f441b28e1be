"""The sdist and the wheel, as somebody who has no checkout gets them: built, installed, used from another folder."""

import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PLACES = {name: Path(folder) for name, folder in PROJECT["tool"]["setuptools"]["package-dir"].items()}
BUILD = "import sys\nfrom setuptools import build_meta\nprint(getattr(build_meta, f'build_{sys.argv[1]}')(sys.argv[2]))"
# What is for people who work on the project; a user of the wheel does not need it, one of the sdist does.
SOURCE_ONLY = (
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
    "Makefile",
    "constraints.txt",
    "tests/test_packaging.py",
    "docs/api.md",
)


def tracked(*folders: Path) -> list[Path]:
    """The repository's files under `folders` that git does not ignore, relative to its root."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *map(str, folders)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [path for line in done.stdout.splitlines() if (ROOT / (path := Path(line))).is_file()]


def built(kind: str, source: Path, out: Path) -> Path:
    """The archive that setuptools makes of `source`, by the same call as pip's."""
    done = subprocess.run(
        [sys.executable, "-c", BUILD, kind, out], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


@dataclass(frozen=True)
class Installed:
    """The two archives, and a fresh environment that holds the wheel; heavy packages are lent by this one."""

    sdist: Path
    wheel: Path
    bin: Path

    def call(self, folder: Path, command: str, *words: object) -> subprocess.CompletedProcess[str]:
        """One of the environment's programs, run in `folder`."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST"))}
        line = [self.bin / command, *map(str, words)]
        return subprocess.run(line, cwd=folder, env=clean, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The wheel is built from the sdist, and the sdist from a copy of the repository."""
    place = tmp_path_factory.mktemp("packaging")
    for path in tracked(Path()):
        (place / "checkout" / path).parent.mkdir(parents=True, exist_ok=True)
        (place / "checkout" / path).write_bytes((ROOT / path).read_bytes())
    sdist = built("sdist", place / "checkout", place)
    with tarfile.open(sdist) as archive:
        archive.extractall(place, filter="data")
    wheel = built("wheel", place / sdist.name.removesuffix(".tar.gz"), place)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place / "venv"], check=True)
    python = place / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run(pip, check=True)
    (packages,) = (place / "venv" / "lib").glob("python*/site-packages")
    (packages / "lent.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")) + "\n")
    return Installed(sdist, wheel, python.parent)


def test_the_wheel_holds_every_file_of_every_room(installed: Installed) -> None:
    held = set(zipfile.ZipFile(installed.wheel).namelist())
    homes = sorted(PLACES.items(), key=lambda item: len(item[1].parts), reverse=True)  # the innermost folder first
    wanted = set()
    for path in tracked(*PLACES.values()):
        package, folder = next((name, home) for name, home in homes if path.is_relative_to(home))
        wanted.add("/".join((*package.split("."), *path.relative_to(folder).parts)))
    assert len(wanted) > 100 and wanted - held == set()
    assert {name for name in held if ".dist-info/" not in name} - wanted == set()
    assert any(name.endswith("dist-info/licenses/LICENSE") for name in held)


def test_the_sdist_holds_the_whole_repository(installed: Installed) -> None:
    with tarfile.open(installed.sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert set(SOURCE_ONLY) <= held
    assert {str(path) for path in tracked(Path())} - held <= {".gitignore", ".ci/run"}


def test_the_metadata(installed: Installed) -> None:
    archive = zipfile.ZipFile(installed.wheel)
    (name,) = (name for name in archive.namelist() if name.endswith("dist-info/METADATA"))
    said = archive.read(name).decode().splitlines()
    assert {"Name: himap-export", f"Version: {PROJECT['project']['version']}", "License-Expression: Apache-2.0"} <= set(
        said
    )
    extras = {line.removeprefix("Provides-Extra: ") for line in said if line.startswith("Provides-Extra: ")}
    assert extras == set(PROJECT["project"]["optional-dependencies"])


def test_the_wheel_exports_and_answers_outside_the_checkout(installed: Installed, tmp_path: Path) -> None:
    where = installed.call(tmp_path, "python", "-c", "import himap_export.engines as e; print(e.__file__)")
    assert where.stdout.startswith(str(installed.bin.parent)), where.stderr
    words = ("shapes", "--out", "engines-shapes", "--text-budget", "32", "--max-new-tokens", "8")
    exported = installed.call(tmp_path, "himap-export", *words)
    assert exported.returncode == 0, exported.stderr
    image = ROOT / "examples" / "shapes" / "images" / "letter.png"
    question = ("--image", image, "--prompt", "which letter is in the yellow box?")
    answered = installed.call(tmp_path, "himap-run", "engines-shapes", *question)
    assert answered.returncode == 0 and answered.stdout.splitlines()[0] == "C", answered.stderr


@pytest.mark.parametrize("command", sorted(PROJECT["project"]["scripts"]))
def test_every_command_of_the_wheel_says_its_version(installed: Installed, command: str, tmp_path: Path) -> None:
    done = installed.call(tmp_path, command, "--version")
    assert (done.returncode, done.stdout) == (0, f"{command} {PROJECT['project']['version']}\n"), done.stderr
