"""The report's page judged as a browser and a reader would: by its tags, its texts, its identifiers, its files."""

import io
import json
import math
import re
from base64 import b64encode
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from commands import Workshop, blocked_python
from pages import Seen, bar_plot, line_plot, linked, page, pareto_plot, picture, whole_page
from PIL import Image

from himap_export.graphs.errors import Exit, HimapError
from himap_export.validate.report.charts import Datum, Point, bars, lines, pareto
from himap_export.validate.report.machine import cpu_and_features, provenance
from himap_export.validate.report.page import (
    Command,
    Facts,
    Gallery,
    Page,
    Section,
    Table,
    png,
    render,
    write_report,
)

NASTY = "<script>alert(\"1\")</script> & 'so' </script> `<b>`"


def test_tags_balance_and_nothing_is_left_out() -> None:
    seen = Seen(render(whole_page()))
    text = " ".join(" ".join(seen.texts).split())
    for words in (
        "A report",
        "of tests",
        "Part 3",
        "1.92x",
        "of 2.01x",
        "One.",
        "code",
        "78 %",
        "Both.",
        "Six of them.",
    ):
        assert words in text
    assert "himap-run a --b 'c'" in text  # as it is copied
    for words in ("How to read this: up is better.", "tall is better.", "left is better."):
        assert words in text
    tags = [tag for tag, _ in seen.tags]
    assert tags.count("h1") == 1 and tags.count("h2") == 4 and tags.count("p") > 3 and tags.count("code") == 2
    assert seen.values("class").count("chart") == 3
    assert ("tr", {"class": "strong"}) in seen.tags


def test_contents_lead_to_every_section_of_a_long_page() -> None:
    seen = Seen(render(whole_page()))
    targets = [link[1:] for tag, a in seen.tags if tag == "a" and (link := a["href"] or "").startswith("#")]
    assert len(targets) == 4 and set(targets) <= set(seen.values("id"))
    short = whole_page()
    assert "nav" not in [tag for tag, _ in Seen(render(replace(short, sections=short.sections[:3]))).tags]


def test_nothing_outside_the_file_is_referred_to() -> None:
    """Of the libraries' script, which names addresses in what it never calls, the policy lets none be reached."""
    text = render(whole_page())
    seen = Seen(text)
    links = [*seen.values("href"), *seen.values("src"), *seen.values("xlink:href")]
    kinds = ("#", "data:image/png;base64,", "data:text/csv;base64,", "data:application/json;base64,")
    assert links and all(link.startswith(kinds) for link in links)
    assert not {"link", "iframe", "object", "base", "form"} & {tag for tag, _ in seen.tags}
    (script,) = [s for s in seen.scripts if not s.startswith("{")]
    assert "figure.chart" in script
    for spec in seen.scripts:
        assert spec == script or not {"url", "loader", "href"} & set(re.findall(r'"(\w+)":', spec))
    rest = text.replace(script, "").replace("http-equiv", "").replace("https://vega.github.io/schema", "")
    assert "http" not in rest and "@import" not in rest and "url(" not in rest
    rules = dict(rule.strip().split(" ", 1) for rule in seen.policy().split(";"))
    allowed = f"'sha256-{b64encode(sha256(script.encode()).digest()).decode()}' 'unsafe-eval'"
    assert rules == {
        "default-src": "'none'", "style-src": "'unsafe-inline'", "img-src": "data:", "script-src": allowed,
    }  # fmt: skip


def test_a_page_without_charts_runs_no_script() -> None:
    seen = Seen(render(page("x")))
    assert "script" not in [tag for tag, _ in seen.tags] and "script-src" not in seen.policy()


def test_what_users_write_is_text_not_markup() -> None:
    def written(word: str) -> Seen:
        charts = (
            lines("a", word, word, [Datum(word, 1, 1.0)], word, word),
            bars("b", word, word, [Datum(word, word, 1.0)], word, word),
            pareto("c", word, word, [Point(word, 1, 1, None, None, word, True)], word, word),
        )
        words = (word, Facts(((word, word, word),)), Command(word), Table(word, (word,), ((word,),), word))
        blocks = (*words, *charts, Gallery((picture(caption=word),), word))
        return Seen(render(Page(word, word, (Section(word, blocks),) * 4), json.dumps({word: word})))

    seen, harmless = written(NASTY), written("a b c d `e`")
    assert [tag for tag, _ in seen.tags] == [tag for tag, _ in harmless.tags]
    assert "b" not in [tag for tag, _ in seen.tags] and "<script>alert" not in "".join(seen.scripts)
    assert NASTY in seen.values("alt") and NASTY in seen.values("aria-label")
    assert sum("<script>alert" in text for text in seen.texts) > 20
    specs = [json.loads(s) for s in seen.scripts if s.startswith("{")]
    assert [spec["description"] for spec in specs if "$schema" in spec] == [NASTY] * 12


def test_every_image_is_described() -> None:
    seen = Seen(render(whole_page()))
    described = [attributes["alt"] for tag, attributes in seen.tags if tag == "img"]
    assert described == ["Accuracy rises.", "Bars.", "The front.", "What colour?"]
    specs = [json.loads(s) for s in seen.scripts if s.startswith("{")]
    assert [spec["description"] for spec in specs if "$schema" in spec] == described[:3]


def test_identifiers_are_unique_in_a_page_of_equal_plots() -> None:
    seen = Seen(render(page(line_plot("one"), line_plot("two"), bar_plot(), pareto_plot())))
    identifiers = seen.values("id")
    assert len(identifiers) == len(set(identifiers)) == 2 + 4 + 1  # section and title, figures, configuration


def test_tables_and_the_report_are_data_too() -> None:
    table = Table("t", ("a", "b, c"), (("x", 'y "z"'),))
    found = linked(Seen(render(page(table), '{"a": 1}\n')))
    assert found == {"report.json": '{"a": 1}\n', "t.csv": 'a,"b, c"\nx,"y ""z"""\n'}


def test_a_table_without_caption_or_head_is_named_by_its_section() -> None:
    bare, headed = Table("t", ("", ""), (("date", "today"),)), Table("u", ("a", "b"), (("x", "y"),))
    assert Seen(render(page(bare, headed))).values("aria-label") == ["Found", "a, b"]


def test_wrong_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="row 0 has 1 cells, the head has 2"):
        Table("t", ("a", "b"), (("c",),))


def test_wide_tables_show_that_they_go_on_and_narrow_windows_stack_them() -> None:
    head = ("", *(f"column {n}" for n in range(12)))
    text = render(page(Table("wide", head, (("row", *map(str, range(12))),))))
    seen = Seen(text)
    assert [a["data-label"] for tag, a in seen.tags if tag == "td"] == list(head[1:])
    assert "content: attr(data-label)" in text and "max-width: 40rem" in text
    scroll = re.search(r"\.scroll \{(.*?)\}", text, re.DOTALL)
    assert scroll and "overflow-x: auto" in scroll[1] and scroll[1].count("linear-gradient") == 4  # the shadows


def test_report_is_written_with_its_parts(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "report"
    data = {
        "a": math.nan,
        "b": [1.5, -math.inf, (2, None)],
        "c": {"d": np.float32(np.nan), "e": np.array([1, 2])},
        "f": "é",
    }
    file = write_report(folder, whole_page(), data)
    expected = {"a": None, "b": [1.5, None, [2, None]], "c": {"d": None, "e": [1, 2]}, "f": "é"}
    text = (folder / "report.json").read_text()
    assert file == folder / "report.html" and file.read_text() == render(whole_page(), text)
    assert json.loads(text) == expected and text.startswith('{\n "a": null,')
    assert (folder / "flow.png").read_bytes() == line_plot().png
    names = {"flow.png", "budgets.png", "front.png", "example.png", "report.html", "report.json"}
    assert {path.name for path in folder.iterdir()} == names


def test_where_charts_cannot_be_drawn_the_numbers_are_kept(tmp_path: Path) -> None:
    """The engine of Vega ends a process that may not reserve its addresses, so it is not asked to."""
    code = f"""
import resource
from pathlib import Path
from himap_export.graphs.errors import HimapError
from himap_export.validate.report import charts, page
resource.setrlimit(resource.RLIMIT_AS, (16 * 10**9, 16 * 10**9))
bars = charts.bars("a", "t", "", [charts.Datum("s", "x", 1.0)], "x", "y")
try:
    page.write_report(Path({str(tmp_path)!r}), page.Page("t", "s", (page.Section("f", (bars,)),)), {{"a": 1}})
except HimapError as problem:
    print(problem, int(problem.code))
"""
    done = blocked_python(code, [])
    assert done.returncode == 0 and "(lift the limit: ulimit -v unlimited) 4\n" in done.stdout, done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


def test_report_overwrites_its_own_files_only(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "flow.png").write_text("old")
    write_report(tmp_path, page(line_plot()), {}, "first")
    write_report(tmp_path, page("again"), {}, "first")
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "flow.png").read_bytes() == line_plot().png
    assert "again" in (tmp_path / "first.html").read_text()


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("flow", "flow"), "a figure cannot be named 'flow': figures are files: letters, digits, . _ -, each once"),
        (("../flow", "other"), "a figure cannot be named '../flow'"),
        (("", "other"), "a figure cannot be named ''"),
    ],
)
def test_names_that_are_no_files_of_their_own_are_refused(tmp_path: Path, names: tuple[str, str], words: str) -> None:
    figure = replace(line_plot(), name=names[0])
    with pytest.raises(HimapError, match=re.escape(words)) as refused:
        write_report(tmp_path / "r", page(figure, Gallery((picture(names[1]),))), {})
    assert refused.value.code is Exit.USAGE and not (tmp_path / "r").exists()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(HimapError, match="cannot write to") as refused:
        write_report(tmp_path / "taken", page("x"), {})
    assert refused.value.code is Exit.USAGE


def test_a_report_goes_into_no_bundle_and_over_no_link(work: Workshop, tmp_path: Path) -> None:
    bundle, mine = work.bundle("golden"), tmp_path / "mine"
    before = sorted(bundle.rglob("*"))
    for folder in (bundle, bundle / "weights", bundle / "new" / "report"):
        with pytest.raises(HimapError, match="is a bundle"):
            write_report(folder, page("x"), {})
    assert sorted(bundle.rglob("*")) == before
    mine.write_text("mine")
    (tmp_path / "flow.png").symlink_to(mine)
    with pytest.raises(HimapError, match=r"flow\.png is there and is not a plain file"):
        write_report(tmp_path, page(line_plot()), {})
    assert mine.read_text() == "mine" and not (tmp_path / "report.html").exists()


def test_png_shrinks_and_never_grows() -> None:
    for size, expected in (((1280, 320), (640, 160)), ((100, 50), (100, 50))):
        with Image.open(io.BytesIO(png(Image.new("RGB", size)))) as image:
            assert image.format == "PNG" and image.size == expected


def test_a_report_says_what_made_it() -> None:
    command, table = provenance(["himap-validate", "b/", "--prompt", "what's in it?"], {"bundle's digest": "3f0c"})
    assert command == Command("""himap-validate b/ --prompt 'what'"'"'s in it?'""")  # as a shell takes it
    assert isinstance(table, Table)
    rows = dict(table.rows)
    assert list(rows) == ["bundle's digest", "date", "machine", "CPU features", "versions"]
    assert rows["bundle's digest"] == "3f0c" and re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", rows["date"])
    for package in ("Python 3", "himap-export ", "numpy ", "torch ", "onnxruntime "):
        assert package in rows["versions"]


def test_what_a_cpu_can_do_is_read_from_linux(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: A Xeon\nflags\t\t: fpu avx2 amx_tile avx512f\n\nflags\t: fpu\n")
    assert cpu_and_features(info) == ("A Xeon", "avx2, avx512f, amx_tile")
    info.write_text("processor\t: 0\nFeatures\t: fp asimd sve2 i8mm\n")
    assert cpu_and_features(info)[1] == "asimd, i8mm, sve2"
    info.write_text("model name\t: Old\nflags\t: fpu\n")
    assert cpu_and_features(info) == ("Old", "none of note")
    assert cpu_and_features(tmp_path / "none")[1].startswith("unknown: ")


@pytest.mark.parametrize("library", ["altair", "jinja2", "vl_convert"])
def test_without_a_library_the_hint_says_what_to_install(library: str) -> None:
    code = """
from himap_export.graphs.errors import HimapError
from himap_export.validate.report import charts, machine, page
try:
    page.check_libraries()
except HimapError as problem:
    print(problem, int(problem.code))
"""
    done = blocked_python(code, [library])
    assert done.returncode == 0, done.stderr
    hint = "pip install 'himap-export[report]'; in a checkout: pip install -e '.[report]'"
    assert done.stdout == f"a report needs {library} ({hint}) 4\n"
