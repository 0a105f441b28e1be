"""The page at `/` in headless Chromium, over a real server; where none can be had on demand, its answers are ours."""

import json
import os
import re
import shutil
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright
from served import KEY, LETTER, QUESTION, Served, question

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHAT, MODELS = "**/v1/chat/completions", "**/v1/models"
SHIFTS = """window.shifted = 0
new PerformanceObserver(list => list.getEntries().forEach(shift => { shifted += shift.value }))
    .observe({type: "layout-shift", buffered: true})"""
PLACES = """() => [...document.querySelectorAll("main .card, canvas")].map(part => {
    const {x, y, width, height} = part.getBoundingClientRect()
    return [x, y + scrollY, width, height].map(Math.round)
})"""
FILE = """([name, kind, content]) => {
    const data = new DataTransfer()
    data.items.add(new File([Uint8Array.from(atob(content), c => c.charCodeAt(0))], name, {type: kind}))
    return data
}"""
PIXELS = """([stage, places]) => {
    const canvas = document.querySelector(`canvas[data-stage=${stage}]`), pen = canvas.getContext("2d")
    return places.map(([x, y]) => [...pen.getImageData(x * canvas.width, y * canvas.height, 1, 1).data.slice(0, 3)])
}"""
RED, PAPERS = [214, 40, 57], {"light": (255, 255, 255), "dark": (27, 32, 39)}
NOTHING = "\u2013"
INSIDE = [(x, y) for x in (0.2, 0.5, 0.8) for y in (0.2, 0.5, 0.8)]  # of a patch, away from lines
TWO = {"prefix": 4, "k1": 2}


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        missing = f"the page is tested in a browser of this machine: none of {', '.join(NAMES)} is on PATH"
        pytest.fail(missing) if os.environ.get("HIMAP_NEED_BROWSER") else pytest.skip(missing)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@dataclass
class Visit:
    """A visitor's page, and what happened on it: each question, sent or ended, and its model, what went elsewhere,
    what went wrong."""

    page: Page
    url: str
    asked: list[tuple[str, str]] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def watch(self) -> None:
        def noted(what: str) -> Any:
            return lambda r: r.method == "POST" and self.asked.append((what, json.loads(r.post_data)["model"]))

        self.page.on("request", noted("sent"))
        for event in ("requestfinished", "requestfailed"):  # Chromium says either of a stream that was read to its end
            self.page.on(event, noted("ended"))
        self.page.on("console", lambda said: said.type == "error" and self.errors.append(said.text))
        self.page.on("pageerror", lambda problem: self.errors.append(str(problem)))
        self.page.route(lambda url: not url.startswith((self.url, "blob:", "data:")), self._refused)

    def _refused(self, route: Route) -> None:
        self.elsewhere.append(route.request.url)
        route.abort()

    def open(self, key: str = "") -> None:
        self.page.goto(self.url)
        if key:
            self.page.fill("#secret", key)
            self.page.keyboard.press("Enter")
        self.page.wait_for_selector("body.known")

    def give(self, event: str, content: bytes = b"", name: str = "letter.png", kind: str = "image/png") -> None:
        """Drops, pastes or chooses a file, the letter's picture if none is given."""
        content = content or LETTER.read_bytes()
        if event == "choose":
            self.page.set_input_files("#file", {"name": name, "mimeType": kind, "buffer": content})
            return
        data = self.page.evaluate_handle(FILE, [name, kind, b64encode(content).decode()])
        field = "clipboardData" if event == "paste" else "dataTransfer"
        kinds = {"paste": "ClipboardEvent", "drop": "DragEvent"}
        script = f"(spot, data) => spot.dispatchEvent(new {kinds[event]}('{event}', {{{field}: data, bubbles: true}}))"
        self.page.locator("#question").evaluate(script, data)

    def ask(self, text: str = QUESTION) -> None:
        """Asks about the letter's picture, by the keyboard alone once it is there."""
        self.give("drop")
        self.page.wait_for_selector("#question:focus")
        self.page.keyboard.insert_text(text)
        self.page.keyboard.press("Enter")

    def ended(self) -> None:
        self.page.wait_for_selector("#go:enabled")
        assert self.page.is_disabled("#stop")

    def texts(self, selector: str) -> list[str]:
        return self.page.locator(selector).all_text_contents()


@pytest.fixture
def visit(chromium: Browser, door: Served, request: pytest.FixtureRequest) -> Iterator[Visit]:
    """A page that is not open yet, 1280 wide and light if the test does not say."""
    width, scheme = getattr(request, "param", (1280, "light"))
    size = {"width": width, "height": 800}
    context = chromium.new_context(viewport=size, color_scheme=scheme, reduced_motion="reduce")
    context.set_default_timeout(10_000)
    found = Visit(context.new_page(), door.url)
    found.page.add_init_script(SHIFTS)
    found.watch()
    yield found
    context.close()
    assert found.elsewhere == []


def models(**plans: dict[str, int]) -> dict[str, Any]:
    """What /v1/models says of `plans`, each with the image tokens of its stages."""
    data = [
        {"id": f"m:{plan}", "himap": {
            "plan": plan, "cuts": [{"layer": 2, "criterion": "himap"}] * (len(tokens) - 1), "image_tokens": tokens,
            "picture": [48, 96], "max_new_tokens": 4,
        }} for plan, tokens in plans.items()
    ]  # fmt: skip
    return {"object": "list", "data": data}


def sse(*chunks: dict[str, Any], done: bool = True) -> dict[str, Any]:
    lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks] + ["data: [DONE]\n\n"] * done
    return {"status": 200, "content_type": "text/event-stream", "body": "".join(lines)}


def said(text: str, **himap: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}}], "himap": himap}


@pytest.mark.parametrize("visit", [(1280, "light"), (400, "dark")], indirect=True)
def test_a_dropped_picture_is_asked_about_pruned_and_unpruned_one_after_the_other(visit: Visit, door: Served) -> None:
    page = visit.page
    visit.open(KEY)
    assert page.evaluate("shifted") == 0  # nothing that was seen has moved
    visit.give("drop")
    page.wait_for_selector("#picture")
    before = page.evaluate(PLACES)
    visit.ask()
    visit.ended()
    assert visit.texts(".answer h2") == ["Pruned", "Unpruned"] and visit.texts(".answer .text") == ["C", "C"]
    assert visit.asked == [("sent", "shapes"), ("ended", "shapes"), ("sent", "shapes:none"), ("ended", "shapes:none")]
    assert visit.texts(".kept") == ["8", "64"] and visit.texts(".count") == ["2 tokens", "2 tokens"]
    assert all(re.fullmatch(r"[\d.]+ m?s", time) for time in visit.texts(".first"))
    assert all(re.fullmatch(r"server [\d.]+ m?s", time) for time in visit.texts(".server"))
    assert all(float(speed) > 0 for speed in visit.texts(".speed"))
    assert re.fullmatch(r"\d+\.\d\d\u00d7", visit.texts("#ratio")[0])
    assert re.search(r"; \d+\.\d\d\u00d7 by the server's clock", visit.texts("#verdict")[0])
    widths = page.locator(".track i").evaluate_all("bars => bars.map(bar => bar.offsetWidth)")
    assert max(widths[0], widths[2]) == page.locator(".track").first.evaluate("track => track.offsetWidth")
    assert widths[0] >= widths[1] > 0 and widths[2] >= widths[3] > 0  # of each time, what the server took
    assert page.evaluate(PLACES) == before
    assert page.evaluate("document.documentElement.scrollWidth") == page.viewport_size["width"]  # type: ignore[index]
    check_patches(page, door.chat(question(himap={"return_kept": True}))[2]["himap"])
    assert [error for error in visit.errors if "401" not in error] == []


def check_patches(page: Page, himap: dict[str, Any]) -> None:
    """Of each cut: what is kept is as the picture, what is dropped a pale grey of it, a red line between them."""
    rows, columns, whole = himap["rows"], himap["columns"], range(himap["rows"] * himap["columns"])
    places = [(n, (n % columns + dx) / columns, (n // columns + dy) / rows) for n in whole for dx, dy in INSIDE]
    points = [place[1:] for place in places]
    seen = page.evaluate(PIXELS, ["prefix", points])
    dark = page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    stages = page.locator("canvas").evaluate_all("all => all.map(canvas => canvas.dataset.stage)")
    assert stages == ["prefix", "k1", "k2"] and len({tuple(colour) for colour in seen}) > 4
    for stage in stages[1:]:
        kept = set(himap["kept"][stage])
        assert 0 < len(kept) < len(whole)
        for (n, *_), before, after in zip(places, seen, page.evaluate(PIXELS, [stage, points]), strict=True):
            grey = 0.28 * np.dot((0.3, 0.59, 0.11), before)
            faded = [grey + 0.72 * channel for channel in PAPERS["dark" if dark else "light"]]
            assert np.allclose(after, before if n in kept else faded, atol=0 if n in kept else 2)
        steps = [n for n in whole if n % columns and (n in kept) != (n - 1 in kept)]
        line = [(n % columns / columns, (n // columns + 0.5) / rows) for n in steps]
        assert page.evaluate(PIXELS, [stage, line]) == [RED] * len(line)


def test_the_grid_may_reach_outside_the_picture(visit: Visit) -> None:
    """As of a letterboxed one: what lies there is grey, the picture is in the middle."""
    found = {"rows": 1, "columns": 4, "box": [-0.5, 0, 1.5, 1], "kept": {"k1": [0, 1]}}
    timing, usage = {"first_token_s": 0.01, "decode_s": 0}, {"completion_tokens": 1}
    whole = {"choices": [], "usage": usage | {"image_tokens_kept": {"prefix": 4, "k1": 2}}, "himap": {"timing": timing}}
    visit.page.route(MODELS, lambda route: route.fulfill(json=models(half=TWO)))
    visit.page.route(CHAT, lambda route: route.fulfill(**sse(said("<b>yes", **found), whole)))
    visit.open()
    visit.ask()
    visit.ended()
    assert visit.texts(".text") == ["<b>yes"] and visit.texts(".count") == ["1 token"]
    assert visit.texts(".speed") == [NOTHING] and visit.texts("figcaption span")[1] == "2 of 4 patches (50 %)"
    assert visit.page.locator("canvas").last.evaluate("canvas => canvas.width / canvas.height") == 2
    outside, left, right, beyond = visit.page.evaluate(PIXELS, ["k1", [[0.1, 0.5], [0.4, 0.5], [0.6, 0.5], [0.9, 0.5]]])
    assert outside == [128] * 3 and left != outside  # kept: as they are
    assert len(set(beyond)) == 1 and max(right) - min(right) < 12 and min(right) > 150  # dropped: pale
    assert not visit.page.is_visible("#compare")  # there is nothing to compare with
    assert visit.errors == []


def test_a_key_is_asked_for_and_kept_by_this_page_alone(visit: Visit) -> None:
    visit.page.goto(visit.url)
    visit.page.fill("#secret", "sk-wrong")
    visit.page.keyboard.press("Enter")
    expect(visit.page.locator("#refused")).to_contain_text(re.compile("key", re.IGNORECASE))
    visit.page.fill("#secret", KEY)
    visit.page.keyboard.press("Enter")
    visit.page.wait_for_selector("body.known")
    assert visit.texts("#state") == ["ready"] and visit.page.input_value("#secret") == ""
    assert visit.page.evaluate("localStorage.length + sessionStorage.length") == 0
    assert visit.page.context.cookies() == [] and KEY not in visit.page.content()
    visit.page.goto(visit.url)
    visit.page.click("#without")
    expect(visit.page.locator("#unreachable")).to_contain_text(re.compile("key", re.IGNORECASE))
    assert visit.texts("#state") == ["not connected"] and not visit.page.is_visible("#ask")


def test_what_the_server_refuses_is_told_in_its_words(visit: Visit, door: Served) -> None:
    visit.open(KEY)
    with visit.page.expect_response(CHAT) as refused:
        visit.ask("why? " * 60)
    visit.ended()
    assert refused.value.status == 400
    assert visit.texts("#problem") == [f"{door.service.models['shapes']}: {refused.value.json()['error']['message']}"]
    assert "text tokens" in visit.texts("#problem")[0] and visit.texts(".text") == ["", ""]
    assert visit.asked == [("sent", "shapes"), ("ended", "shapes")]  # the other would be refused as well


def test_answers_that_break_off_say_so(visit: Visit) -> None:
    plans, page, answer = models(half=TWO, third={"prefix": 4, "k1": 1}, all={"prefix": 4}), visit.page, {}
    page.route(MODELS, lambda route: route.fulfill(json=plans))
    page.route(CHAT, lambda route: route.fulfill(**answer))
    visit.open()
    page.select_option("#plan", "third")
    visit.give("drop")
    for answer, told in (
        (sse(said("a c"), {"error": {"message": "the engines failed"}}, done=False), "the engines failed"),
        (sse(said("a c"), done=False), "the answer was cut off: the connection ended before it did"),
        ({"status": 502, "body": "<p>Bad gateway"}, "the server answers 502 Bad Gateway"),
    ):
        visit.ask()
        visit.ended()
        assert visit.texts("#problem") == [f"third: {told}"] and visit.texts("#ratio") == [NOTHING]
        assert visit.texts(".text") == ["a c" if answer["status"] == 200 else "", ""]
    assert {model for _, model in visit.asked} == {"m:third"}


def test_stop_ends_the_answer_and_asks_no_more(visit: Visit) -> None:
    page, held = visit.page, list[Route]()
    page.route(MODELS, lambda route: route.fulfill(json=models(half=TWO, all={"prefix": 4})))
    page.route(CHAT, lambda route: held.append(route))
    visit.open()
    for key in ("Escape", "Enter"):  # Enter presses the button: it has the focus
        with page.expect_request(CHAT):
            visit.ask()
        page.wait_for_selector("#stop:focus")
        assert all(page.is_disabled(part) for part in ("#go", "#question", "#file"))
        assert page.locator(".answer").evaluate_all("all => all.map(a => a.ariaBusy)") == ["true", "false"]
        visit.give("paste", name="late.png")  # is not taken meanwhile
        page.keyboard.press(key)
        visit.ended()
        assert page.evaluate("document.activeElement.id") == "go" and visit.texts("#problem") == [""]
    assert visit.asked == [("sent", "m:half"), ("ended", "m:half")] * 2 and len(held) == 2
    assert page.locator("[aria-busy=true]").count() == 0
    assert page.get_attribute("#picture", "alt") == "letter.png"


def test_pictures_are_dropped_pasted_or_chosen_and_nothing_else_is_taken(visit: Visit) -> None:
    page, problem = visit.page, visit.page.locator("#problem")
    page.route(MODELS, lambda route: route.fulfill(json=models(all={"prefix": 4})))
    visit.open()
    page.click("#go")
    expect(problem).to_have_text("Choose a picture first.")
    for event in ("drop", "paste", "choose"):
        visit.give(event, b"no picture", "words.txt", "text/plain")
        expect(problem).to_have_text("words.txt is not a picture that this browser can show.")
        visit.give(event, name=f"{event}.png")
        expect(page.locator("#picture")).to_have_attribute("alt", f"{event}.png")
        assert visit.texts("#problem") == [""]
    page.click("#go")
    expect(problem).to_have_text("Type a question first.")
    assert visit.texts(".answer h2") == ["Unpruned"] and not page.is_visible("#patches") and visit.asked == []
    page.locator("#question").focus()
    for place in ("file", "question", "go"):  # all is reached by the keyboard
        page.keyboard.press("Shift+Tab" if place == "file" else "Tab")
        expect(page.locator(f"#{place}")).to_be_focused()
