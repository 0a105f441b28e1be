"""The benchmark's own parts, on a model small enough for a test: it loads, is analysed, and is judged."""

import json
from pathlib import Path

import analysis_at_size
import pytest

TEXT = analysis_at_size.TEXT | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 99,
}
VISION = analysis_at_size.VISION | {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
}


@pytest.mark.parametrize(("bar", "code", "said"), [("100", 0, "met "), ("0.01", 1, "NOT MET")])
def test_judges_the_peak(
    bar: str, code: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(analysis_at_size, "TEXT", TEXT)
    monkeypatch.setattr(analysis_at_size, "VISION", VISION)
    monkeypatch.setattr("sys.argv", ["analysis_at_size.py", "--gib", bar, "--work", str(tmp_path), "--prompts", "1"])
    with pytest.raises(SystemExit) as left:
        analysis_at_size.main()
    assert int(left.value.code or 0) == code
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])
    assert lines[-2].startswith(said) and [line.split()[0] for line in lines[:4]] == [
        "saliency",
        "shares",
        "gradcam",
        "disruption",
    ]
    assert 0.01 < found["loaded_gib"] <= found["saliency_gib"] <= found["disruption_gib"] <= found["peak_gib"] < 100
    assert found["parameters"] > 2 * 99 * 64
