"""Chat templates are rendered in a child process that ends soon, whatever they do."""

import atexit
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from himap_export.exporter import template
from himap_export.exporter.template import Chat, render
from himap_export.graphs.errors import HimapError

TEXT = "{{ messages[0]['content'][1]['text'] }}"


def chat(question: str) -> Chat:
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]


def test_each_question_is_rendered() -> None:
    questions = ("a", "  größer\n<b> {x} ", "")
    made = render(
        "{{ bos_token }}[" + TEXT + "]{% if add_generation_prompt %}>{% endif %}", [chat(each) for each in questions],
        {"bos_token": "<s>"},
    )  # fmt: skip
    assert made == tuple(f"<s>[{question}]>" for question in questions)


PICKY = "{% if 'no' in messages[0]['content'][1]['text'] %}{{ raise_exception('no') }}{% endif %}" + TEXT


def test_a_chat_that_the_template_does_not_take_is_none() -> None:
    """As long as it is not the first, one picture and a question: without that there is no prompt."""
    assert render(PICKY, [chat("a"), chat("no"), chat("b"), [], chat("c")], {}) == ("a", None, "b", None, "c")
    with pytest.raises(HimapError, match=r"chat template cannot be rendered.*no"):
        render(PICKY, [chat("no"), chat("a")], {})


def test_a_later_chat_costs_no_more_than_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loops, memory and length are bounded whichever chat they come of."""
    monkeypatch.setattr(template, "MOST_SECONDS", 1)
    for costs in (LOOP, "{{ 'x' * 10**12 }}", "{{ 'x' * 5000000 }}"):
        text = "{% if 'no' in messages[0]['content'][1]['text'] %}" + costs + "{% endif %}" + TEXT
        with pytest.raises(HimapError, match=r"it (takes|makes) more than"):
            render(text, [chat("a"), chat("no")], {})


LOOP = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
DOUBLED = "{% set n = namespace(s='xxxxxxxx') %}{% for a in range(999) %}{% set n.s = n.s ~ n.s %}{% endfor %}"
HOSTILE = {
    "loops": (LOOP, "it takes more than"),
    "a string of a terabyte": ("{{ 'x' * 10**12 }}", "it takes more than 256 MB"),
    "a string that doubles": (DOUBLED, "it takes more than"),
    "a long text": ("{{ 'x' * 5000000 }}", "it makes more than 1000000 bytes"),
    "a long text of many letters": ("{{ 'é' * 600000 }}", "it makes more than"),
    "a long template": ("x" * 1_000_001, "it is longer than 1000000 bytes"),
    "parentheses": ("{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}", "recursion"),
    "blocks": ("{% if 1 %}" * 3000 + "{% endif %}" * 3000, "recursion"),
    "raises": ("{{ raise_exception('two\nlines') }}", "two lines"),
    "another file": ("{% include '/etc/passwd' %}", "no loader"),
    "attributes": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "half a character": (r"{{ '\ud800' }}", "surrogates"),
    "syntax": ("{% for %}", "rendered"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_templates_end_in_a_line(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template, "MOST_SECONDS", 1)
    text, words = HOSTILE[case]
    start = time.monotonic()
    with pytest.raises(HimapError, match="chat template cannot be rendered") as caught:
        render(text, [chat("a"), chat("b")], {})
    assert words in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 1500
    assert time.monotonic() - start < 60


def children() -> set[str]:
    """Of this process, of which other tests may have left some."""
    return {child for task in Path("/proc/self/task").iterdir() for child in (task / "children").read_text().split()}


def test_a_child_that_waits_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes no processor's time, so only the clock ends it."""
    monkeypatch.setattr(template, "MOST_WAIT", 0.5)
    monkeypatch.setattr(template, "_said", lambda texts: time.sleep(1000))
    before = children()
    with pytest.raises(HimapError, match="it takes more than"):
        render(TEXT, [chat("a")], {})
    assert children() == before


def test_nothing_of_the_parent_runs_in_the_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither what it does at its end, nor what it has not yet written."""
    monkeypatch.chdir(tmp_path)
    at_end = (tmp_path / "ended").touch
    atexit.register(at_end)
    with (tmp_path / "said").open("w") as said:
        monkeypatch.setattr(sys, "stdout", said)
        print("once", end=" ")
        render(TEXT, [chat("a")], {})
        monkeypatch.setattr(template, "MOST_SECONDS", 1)
        with pytest.raises(HimapError):
            render(LOOP, [chat("a")], {})
    atexit.unregister(at_end)
    assert [file.name for file in tmp_path.iterdir()] == ["said"] and (tmp_path / "said").read_text() == "once "


def test_the_child_dies_with_its_parent(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
import os
from himap_export.exporter import template
fork = os.fork
def told():
    child = fork()
    if child:
        Path({str(tmp_path / "child")!r}).write_text(str(child))
    return child
os.fork = told
template.MOST_SECONDS = 100
template.render({LOOP!r}, [[]], {{}})
"""
    parent = subprocess.Popen([sys.executable, "-c", code])
    while not (tmp_path / "child").exists() or not (tmp_path / "child").read_text():
        assert parent.poll() is None
        time.sleep(0.05)
    child = int((tmp_path / "child").read_text())
    time.sleep(0.2)  # it asks to be killed before it begins
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    for _ in range(100):
        if not Path(f"/proc/{child}").exists() or ") Z " in Path(f"/proc/{child}/stat").read_text():
            return
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the child outlived its parent")
