"""The page at / in headless Chromium, against the real gateway, engine and index."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from labs.picture import chromium_options
from pipelines.errors import EngineError
from pipelines.rag.answer import ABSTENTION
from serving.launch import Running
from tests.serving.conftest import MODEL, TUNED, descendants, metric, wait_until

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed (requirements/dev.lock)")
pytestmark = pytest.mark.slow

DESKTOP, PHONE = {"width": 1200, "height": 800}, {"width": 360, "height": 700}
ADMIN_KEY = "a-key-of-the-admin"
HOSTILE = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>'
TOLD_ON_PURPOSE = ("the server responded with a status of", "requires 'TrustedHTML' assignment")
VISIBLE_CONTROLS = """() => [...document.querySelectorAll('button,input,select,textarea,a[href],summary')]
  .filter(e => e.checkVisibility({visibilityProperty: true}) && !e.disabled && !e.closest('.skip'))"""
NAMES = f"""() => ({VISIBLE_CONTROLS})().map(e => (e.getAttribute('aria-label') || [...(e.labels ?? [])].map(l => l.textContent)
  .join(' ') || (e.matches('input,select,textarea') ? '' : e.textContent)).trim())"""
CONTRASTS = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
  const rgba = colour => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data]; };
  const luminance = c => c.slice(0, 3).map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const behind = e => { for (; e; e = e.parentElement) {
    const colour = rgba(getComputedStyle(e).backgroundColor); if (colour[3] === 255) return colour; } };
  const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const e = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !e.checkVisibility() || e.closest('.hidden, .skip, option')) continue;
    const [a, b] = [luminance(rgba(getComputedStyle(e).color)), luminance(behind(e))];
    found.push([(Math.max(a, b) + .05) / (Math.min(a, b) + .05), walker.currentNode.data.trim().slice(0, 40)]);
  }
  return found; }"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    try:
        options = chromium_options()
    except EngineError as missing:
        pytest.skip(missing.came)
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(**options)
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium: Any, lab: Running) -> Iterator[Callable[..., Any]]:
    """Open the page; at the end nothing was on the console that nobody expected, and no other host was asked."""
    contexts, complaints, asked = [], [], []

    def open_(viewport: dict[str, int] = DESKTOP, **options: Any) -> Any:
        context = chromium.new_context(viewport=viewport, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
        page.on("request", lambda request: asked.append(request.url))
        page.goto(lab.url)
        page.locator("#examples button").first.wait_for()
        return page

    yield open_
    for context in contexts:
        context.close()
    assert [c for c in complaints if not any(expected in c for expected in TOLD_ON_PURPOSE)] == []
    assert asked and all(url.startswith(lab.url + "/") for url in asked)


def say(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Put a text in the place of what the engine writes: a model of this size does not say what a test needs."""
    from serving import rag_api

    monkeypatch.setattr(rag_api, "text_of", lambda _, replies=[text]: replies.pop() if replies else "")  # noqa: B006


def ask(page: Any, question: str, tokens: int = 16, just_before: Callable[[], None] = lambda: None) -> Any:
    """Ask, wait for the end, and return the turn."""
    page.locator("#max-tokens").evaluate("(e, value) => e.value = value", str(tokens))
    before = page.locator(".turn").count()
    page.get_by_label("Question", exact=True).fill(question)
    just_before()
    page.keyboard.press("Enter")
    page.locator(".turn[aria-busy=false]").nth(before).wait_for()
    return page.locator(".turn").nth(before)


def test_an_example_is_answered_with_sources_and_figures(open_page: Callable[..., Any]) -> None:
    page = open_page()
    assert page.locator("#empty-text").text_content().startswith("4 documents in 4 passages.")
    page.locator("#options-toggle").click()
    page.get_by_label("Passages", exact=True).fill("2")
    page.get_by_label("Longest answer, tokens").fill("12")
    page.get_by_label("Only passages where").fill('source like "v*" or source like "k*"')
    page.get_by_role("button", name="What is Vela?").click()
    page.locator(".figures").wait_for()
    assert page.locator(".answer").text_content().strip() and page.locator("#empty").is_hidden()
    assert {"Vela", "Kite"} == set(page.locator(".passages .title").all_text_contents())
    figures = dict(zip(*(page.locator(f".figures {part}").all_text_contents() for part in ("dt", "dd")), strict=True))
    assert figures["Model"] == TUNED and figures["Tokens"].endswith(" 12 out") and figures["Speed"].endswith("tokens/s")
    assert figures["First token"] and figures["Total"]


def test_citations_lead_to_their_passage_and_doubts_are_marked(
    open_page: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    say(monkeypatch, "Vela was made by Orion Labs [1].\nIt has 80 billion parameters [1]. Yes [7].")
    page = open_page()
    turn = ask(page, "Who made Vela?")
    assert turn.locator(".answer").evaluate("e => e.innerText.includes('Labs 1.\\nIt has')") is True
    assert turn.locator("mark.unsupported").text_content().strip() == "It has 80 billion parameters 1. (not found in the sources)"
    notes = turn.locator(".note").all_text_contents()
    assert "Cites 7, which no passage has" in notes and any(note.startswith("1 sentence not found") for note in notes)
    assert any("crow.md): tells to ignore instructions" in note for note in notes)
    passage = turn.locator("details.cited")
    passage.evaluate("e => e.open = false")
    turn.get_by_role("link", name="Source 1: Vela").first.click()
    assert passage.get_by_text("Orion Labs").is_visible()
    assert passage.locator("summary").evaluate("e => e === document.activeElement")


def test_an_abstention_looks_like_one(open_page: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, ABSTENTION)
    turn = ask(open_page(), "How do whales sleep?")
    assert turn.locator(".abstention strong").text_content() == ABSTENTION
    assert turn.locator("h3").text_content() == "Nearest passages" and turn.locator(".passages li").count() == 3


def test_html_of_answers_and_documents_stays_text(
    open_page: Callable[..., Any], http: httpx.Client, index_root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Through the whole way: uploaded on the page with the admin key, indexed, found, shown, removed on the page."""
    monkeypatch.setenv("LLMLAB_ADMIN_KEY", ADMIN_KEY)
    monkeypatch.setenv("LLMLAB_INDEX", str(index_root))
    page = open_page()
    page.locator("#library-open").click()
    assert page.locator("#library .note.bad").text_content().startswith("A key is needed (401)")
    page.locator("#library").get_by_role("button", name="Close").click()
    page.locator("#key-open").click()
    page.get_by_label("API key or admin key").fill(ADMIN_KEY)
    page.get_by_role("button", name="Use it").click()
    assert page.evaluate("sessionStorage.length") == 0 and ADMIN_KEY not in page.evaluate("JSON.stringify(localStorage)")
    page.locator("#library-open").click()
    document = tmp_path / "wren.txt"
    document.write_text(f"Wren is a browser of {HOSTILE} pages.", encoding="utf-8")
    page.get_by_label("Add a document").set_input_files(document)
    page.get_by_label("Its name").fill(f"{HOSTILE[:8]}.txt".replace("<", "(").replace(" ", "_"))
    page.locator("#upload").get_by_role("button", name="Add", exact=True).click()
    page.locator(".library .indexed").wait_for()
    page.locator("#library").get_by_role("button", name="Close").click()
    say(monkeypatch, f"Wren is {HOSTILE} [1].")
    wait_until(lambda: http.get("/v1/playground").json()["index"]["documents"] == 5)
    turn = ask(page, "What is Wren?")
    assert HOSTILE in turn.locator(".answer").text_content() and HOSTILE in turn.locator(".passages").text_content()
    assert page.locator("#turns img, #turns script").count() == 0 and page.evaluate("window.hacked") is None
    refused = page.evaluate("() => { try { document.body.innerHTML = '<b>x</b>'; } catch (e) { return e.name; } }")
    assert refused == "TypeError"  # the policy: a mistake in a script would not turn text into HTML either
    page.locator("#library-open").click()
    page.locator(".library").get_by_role("button", name="Remove").click()
    wait_until(lambda: http.get("/v1/playground").json()["index"]["documents"] == 4)


def test_escape_stops_a_chat_and_the_passport_is_shown(open_page: Callable[..., Any], http: httpx.Client, lab: Running) -> None:
    page = open_page()
    page.get_by_label("Chat").check(force=True)
    page.get_by_label("Model or adapter").select_option(MODEL)
    turn = ask(page, "Say hello.", tokens=4)
    assert turn.locator(".answer").text_content() and turn.locator(".sources").is_hidden()
    assert "Cut at the longest answer" in turn.locator(".note").text_content()
    before = metric(http, "llmlab_generation_requests_total", model=MODEL, outcome="cancelled")
    page.locator("#max-tokens").evaluate("e => e.value = 900")
    page.get_by_label("Question", exact=True).fill("Count from one to one thousand.")
    page.keyboard.press("Shift+Enter")
    assert page.locator(".turn").count() == 1
    page.keyboard.press("Enter")
    page.locator(".turn").nth(1).locator(".answer span").first.wait_for()
    page.keyboard.press("Escape")
    page.get_by_text("Stopped.").wait_for()
    wait_until(lambda: metric(http, "llmlab_generation_requests_total", model=MODEL, outcome="cancelled") == before + 1)
    assert page.get_by_role("button", name="Ask", exact=True).is_visible()
    page.get_by_label("Model or adapter").select_option(TUNED)
    page.locator("#passport-open").click()
    passport = page.locator("#passport").text_content()
    run = lab.service.run_of(TUNED)
    assert run and run.id in passport and run.fingerprint in passport


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_and_a_keyboard_reach_everything(
    open_page: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    say(monkeypatch, f"Vela was made by Orion Labs [1]. It has 80 billion parameters [1]. {'W' * 90} [7].")
    page = open_page(PHONE, color_scheme=scheme)
    page.locator("#options-toggle").click()
    looked_at = [page.evaluate(CONTRASTS)]
    ask(page, "Who made Vela?")
    looked_at.append(page.evaluate(CONTRASTS))
    names = page.evaluate(NAMES)
    assert len(names) > 15 and all(names), names
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    assert tab_order(page) == list(range(len(names) - 1)), names  # two radio buttons are one stop
    for opener in ("passport", "key", "library"):
        page.locator(f"#{opener}-open").click()
        page.locator(f"#{opener}[open]").wait_for()
        looked_at.append(page.evaluate(CONTRASTS))
        assert all(page.evaluate(NAMES)) and page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        page.keyboard.press("Escape")
    worst = min(ratio for ratios in looked_at for ratio in ratios)
    assert worst[0] >= 4.5, worst


def tab_order(page: Any) -> list[int]:
    """Return the places, among the visible controls, where the focus goes by Tab, once around."""
    places = f"({VISIBLE_CONTROLS})().filter(e => !(e.type === 'radio' && !e.checked)).indexOf(document.activeElement)"
    page.evaluate("document.querySelector('.skip').focus()")
    reached: list[int] = []
    while len(reached) < 60:
        page.keyboard.press("Tab")
        place = page.evaluate(places)
        if place < 0:
            break
        reached.append(place)
    return reached


def test_an_engine_that_is_down_is_told_and_asked_again(
    open_page: Callable[..., Any], lab: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    page, supervisor = open_page(), lab.service.supervisor
    slowly = supervisor.restart.model_copy(update={"first_delay_seconds": 5.0})  # a slow browser would ask the next engine
    monkeypatch.setattr(supervisor, "restart", slowly)
    engine = supervisor._process
    assert engine
    turn = ask(page, "Who made Vela?", tokens=4, just_before=descendants(engine.pid)[0].kill)
    told = turn.locator(".note.bad").text_content()
    assert told.startswith("Not available now (503)") and "ask again in" in told
    assert page.locator("#state").is_visible()
    wait_until(lambda: httpx.get(f"{lab.url}/readyz", trust_env=False).status_code == 200)
    turn.get_by_role("button", name="Ask again").click()
    page.locator(".turn").nth(1).locator(".figures").wait_for()
    page.locator("#state").wait_for(state="hidden")
