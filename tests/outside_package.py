"""Packages as pip would leave them in a folder on the path, made of what stands on a page."""

import re
import tomllib
from collections.abc import Iterable
from pathlib import Path

PLACE = re.compile(r"# ([\w-]+/[\w/.-]+)\n")  # the first line of a file's block: project/path


def install(texts: Iterable[str], folder: Path) -> bool:
    """Puts the packages of a project, whose files are those of `texts` that begin with their place, into `folder`, with
    the metadata that its pyproject.toml says. False if there is none."""
    files = {found[1].partition("/")[2]: text for text in texts if (found := PLACE.match(text))}
    if "pyproject.toml" not in files:
        return False
    project = tomllib.loads(files.pop("pyproject.toml"))["project"]
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    said = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    said.mkdir()
    (said / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = (
        "\n".join([f"[{group}]", *(f"{name} = {value}" for name, value in entries.items()), ""])
        for group, entries in project["entry-points"].items()
    )
    (said / "entry_points.txt").write_text("\n".join(groups))
    return True
