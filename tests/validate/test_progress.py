"""What a log says of a count: no line twice, few lines of a run that is short."""

import pytest

from himap_export.validate import progress
from himap_export.validate.progress import counted


@pytest.mark.parametrize(("seconds", "tenths"), [(0.0, range(11)), (60.0, range(10, 11))])
def test_a_log_has_a_line_at_most_every_so_often_and_the_last_one(
    seconds: float, tenths: range, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SECONDS", seconds)
    with counted("answers") as count:
        for done in (0, 0, *range(161), 160):
            count(done, 160)
    assert capsys.readouterr().err == "".join(f"answers: {16 * n} of 160\n" for n in tenths)
