"""`optimum-cli export himap`: the same bundle, the same refusals and the same options as himap-export."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import ORT, Workshop, call, spawn
from optimum.commands import optimum_cli

from himap_export.exporter import optimum_command
from himap_export.exporter.cli import _parser
from himap_export.exporter.cli import main as himap_export


def substance(bundle: Path) -> dict[str, Any]:
    """The manifest, without what differs from one export to the next: its command line and how long builds took."""
    manifest: dict[str, Any] = json.loads((bundle / "manifest.json").read_text())
    del manifest["command"], manifest["digest"]
    for engines in manifest["engines"].values():
        for record in engines.values():
            del record["seconds"]
    return manifest


def test_the_bundle_is_himap_exports(work: Workshop, tmp_path: Path) -> None:
    model, out = work.checkpoint("golden"), tmp_path / "bundle"
    words = ("--model", model, "--text-budget", 24, "--max-new-tokens", 8, *ORT, out)
    done = spawn("optimum-cli", "export", "himap", *words)
    assert done.returncode == 0, done.stderr
    assert f"bundle: {out}" in done.stdout
    expected = work.bundle("golden", "--text-budget", 24, "--max-new-tokens", 8)
    assert substance(out) == substance(expected)
    command = json.loads((out / "manifest.json").read_text())["command"]
    again = tmp_path / "again"
    assert command[0] == "himap-export" and str(out) in command
    assert call(himap_export, *(again if word == str(out) else word for word in command[1:])) == 0
    assert substance(again) == substance(out)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--model", "no-such-model", "OUT"), 2, "himap-export: error: unknown model no-such-model"),
        (("--model", "shapes", "--r1", "1.5", "OUT"), 2, "argument --r1: '1.5' is not a number from -1 to 1"),
        (("--model", "shapes", "--r1", "half", "OUT"), 2, "argument --r1: 'half' is not a number from -1 to 1"),
        (("--model", "shapes", "--no-such-flag", "OUT"), 2, "unrecognized arguments: --no-such-flag"),
        (("--model", "shapes"), 2, "OUTPUT is needed (or --dry-run)"),
        (("OUT",), 2, "the following arguments are required: --model"),
        (("--model", "shapes", "--dtype", "bf16", *ORT, "OUT"), 2, "himap-export: error: onnxruntime's CPU kernels"),
    ],
)
def test_a_mistake_is_one_line_and_an_exit_code(words: tuple[str, ...], code: int, said: str, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    done = spawn("optimum-cli", "export", "himap", *(out if word == "OUT" else word for word in words))
    assert done.returncode == code and not out.exists()
    assert said in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_every_option_is_offered() -> None:
    done = spawn("optimum-cli", "export", "himap", "--help")
    assert done.returncode == 0, done.stderr
    offered = {word.strip(",") for word in done.stdout.split()}
    own = [action for action in _parser()._actions if action.dest not in optimum_command.OWN]
    flags = {flag for action in own for flag in action.option_strings}
    assert {"--r1", "--text-budget", "--dry-run"} < flags <= offered
    assert "[OUTPUT]" in offered and "--out DIR" not in done.stdout


@pytest.mark.parametrize(
    "options",
    [
        "",
        "--r1 .50 --r2 1e-1 --k1 2 --k2 007",
        "--text-budget 24 48 96 --align 64 --batch 2",
        "--plan qa --plan caption --backend onnxruntime --backend tensorrt-rtx --gather plugin",
        "--weight-form embedded --dtype fp16 --overwrite --json",
        "--engines-only --revision main --task caption",
        "--hard-link --max-new-tokens 8",
    ],
)
def test_every_word_arrives(options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through optimum's genuine registration and parser; himap-export's own parser says what was meant."""
    arrived: list[str] = []
    monkeypatch.setattr(optimum_command, "main", arrived.extend)
    monkeypatch.setattr(sys, "argv", ["optimum-cli", "export", "himap", "out", "--model", "llava-7b", *options.split()])
    optimum_cli.main()
    expected = _parser().parse_args(["llava-7b", *options.split(), "--out", "out"])
    assert _parser().parse_args(arrived) == expected


def test_a_dry_run_needs_no_output(capsys: pytest.CaptureFixture[str]) -> None:
    done = spawn("optimum-cli", "export", "himap", "--model", "shapes", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    assert call(himap_export, "shapes", "--dry-run", "--json") == 0
    assert json.loads(done.stdout) == json.loads(capsys.readouterr().out)
