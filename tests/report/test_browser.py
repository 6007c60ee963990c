"""The report in a real browser: pages, sorting, searching, two runs, dark, narrow, printed, live; no request leaves.

Screenshots go to runs/report/ of the checkout. Chromium is looked for on the path; .ci/run installs Debian's.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from ups_rm.durable import write_text
from ups_rm.report import write_report
from ups_rm.report.watch import WatchServer
from ups_rm.reward.server import listen

pytestmark = pytest.mark.browser
SHOTS = Path(__file__).resolve().parents[2] / "runs/report"
PAGES = ("answer", "curves", "groups", "pairs", "reward", "data", "recipe")
SCRIPT = "<script>document.title='taken over'</script><img src=x onerror=\"document.title='taken over'\">"


def chromium() -> str | None:
    """Debian's Chromium, or another one on the path."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return os.environ.get("UPS_RM_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = chromium()
    if path is None:
        pytest.skip("no Chromium on the path (apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield started
        started.close()


class Looked:
    """A page that remembers what must not happen: errors on the console, requests."""

    def __init__(self, browser: Any, address: str, **options: Any) -> None:
        self.context = browser.new_context(viewport={"width": 1280, "height": 900}, locale="en-US", **options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(20_000)
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.errors.append(message.text) if message.type != "log" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(address)
        self.page.wait_for_selector("main h2")

    def go(self, name: str) -> None:
        self.page.click(f'nav a[href="#{name}"]')
        self.page.wait_for_selector(f'[data-page="{name}"]')

    def shot(self, name: str) -> None:
        SHOTS.mkdir(parents=True, exist_ok=True)
        self.page.wait_for_timeout(150)  # plots are drawn in the next frame
        self.page.screenshot(path=str(SHOTS / f"{name}.png"))

    def until(self, condition: str) -> None:
        """Waits for a JavaScript expression; Playwright's own way would need eval, which the page forbids."""
        end = monotonic() + 30
        while not self.page.evaluate(condition):
            assert monotonic() < end, condition
            self.page.wait_for_timeout(50)

    def texts(self, selector: str) -> list[str]:
        return self.page.locator(selector).all_inner_texts()  # type: ignore[no-any-return]

    def done(self) -> None:
        assert self.errors == []
        outside = [url for url in self.requests[1:] if not url.startswith("data:")]
        assert outside == []
        self.context.close()


@pytest.fixture(scope="module")
def attacked(first: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first run with replies, a prompt, an alarm and a name that would like to be scripts."""
    folder = shutil.copytree(first, tmp_path_factory.mktemp("runs") / "<img src=x onerror=alert(1)>")
    for file in (folder / "groups").glob("step_*.jsonl"):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        lines[1]["samples"][0]["response"] = SCRIPT
        tokens = len(lines[1]["samples"][0]["token_ends"])
        lines[1]["samples"][0]["token_ends"] = [*[7] * (tokens - 1), len(SCRIPT)] if tokens else []
        lines[1]["messages"][-1]["content"] = f"{SCRIPT} needle"
        write_text(file, "".join(json.dumps(line) + "\n" for line in lines))
    alarm = {"step": 2, "name": "kl_runaway", "value": 3, "threshold": 1, "message": SCRIPT}
    (folder / "alarms.jsonl").write_text(json.dumps(alarm) + "\n")
    return folder


@pytest.fixture(scope="module")
def two(attacked: Path, second: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Address of a page with both runs."""
    return write_report([attacked, second], tmp_path_factory.mktemp("page") / "both.html").as_uri()


@pytest.mark.parametrize("place", ['id="payload">', "<script>"])
def test_a_page_with_one_letter_changed_says_that_it_is_damaged(
    browser: Any, first: Path, tmp_path: Path, place: str
) -> None:
    file = write_report([first], tmp_path / "report.html")
    text = file.read_text(encoding="utf-8")
    at = text.index(place) + len(place) + 200
    file.write_text(text[:at] + ("A" if text[at] != "A" else "B") + text[at + 1 :], encoding="utf-8")
    opened = browser.new_page()
    opened.goto(file.as_uri())
    opened.get_by_text("This page did not open").wait_for(state="visible")
    opened.close()


def test_every_page_opens_without_error_or_request(browser: Any, first: Path) -> None:
    look = Looked(browser, (first / "report.html").as_uri())
    for name in PAGES:
        look.go(name)
        assert look.page.locator('nav a[aria-current="page"]').count() == 1
        look.shot(name)
    look.go("answer")
    assert "95% interval" in look.texts(".sentence")[0]
    assert "safe score" in look.texts("table th")
    look.go("curves")
    look.page.wait_for_selector("canvas")
    assert look.page.locator("figure canvas").count() >= 10
    look.go("reward")
    assert look.page.locator("figure canvas").count() == 2
    assert "pass" in " ".join(look.texts(".tag"))
    look.go("recipe")
    assert look.texts("pre")[0].startswith("ups-rm run --recipe")
    look.done()


def test_groups_are_sorted_filtered_searched_and_followed(browser: Any, two: str) -> None:
    look = Looked(browser, two)
    look.go("groups")
    figures = [float(text.split()[-1]) for text in look.texts(".group header .figure") if text.startswith("spread")]
    assert figures == sorted(figures, reverse=True)
    assert len(figures) == 4
    look.page.get_by_label("Sort by").select_option("step")
    assert look.texts(".group h3") == ["Step 1"] * 4
    look.page.get_by_label("Step", exact=True).select_option("3")
    assert set(look.texts(".group h3")) == {"Step 3"}
    look.page.get_by_label("Kind of prompt").select_option("benign")
    assert set(look.texts(".group header .tag.benign")) == {"harmless"}
    look.page.get_by_label("Kind of prompt").select_option("")
    look.page.get_by_label("Step", exact=True).select_option("")
    look.page.get_by_label("Search").fill("needle")
    look.until("document.querySelector('.pager').innerText.includes(' 4 found')")
    assert "of 1, 4 found" in look.texts(".pager")[0]
    look.page.click("text=this prompt in its 4 steps >> nth=0")
    assert look.texts(".group h3") == ["Step 1", "Step 2", "Step 3", "Step 4"]
    look.page.click("text=Back to all prompts")
    assert look.page.locator(".token").count() > 0
    look.page.get_by_label("KL of each token as colour").uncheck()
    assert look.page.locator(".token").count() == 0
    look.done()


def test_what_models_wrote_is_shown_and_not_run(browser: Any, two: str) -> None:
    look = Looked(browser, two)
    title = look.page.title()
    assert "<img src=x onerror=alert(1)>" in look.texts("h1")[0]
    assert SCRIPT in look.texts(".alarms")[0]
    look.go("groups")
    look.page.get_by_label("Search").fill("needle")
    look.until("document.querySelector('.pager').innerText.includes(' 4 found')")
    assert f"{SCRIPT} needle" in look.texts(".prompt")[0]
    assert SCRIPT in look.texts(".reply .text")[0]
    assert look.page.locator("main img, main script").count() == 0
    # and were a script in the page, the page's own policy would not let it run
    look.page.evaluate("document.body.append(Object.assign(document.createElement('script'), {textContent: 'x = 1'}))")
    assert look.page.evaluate("typeof x") == "undefined"
    assert look.page.title() == title
    assert all("Content Security Policy" in error for error in look.errors)
    look.errors.clear()
    look.done()


def test_pairs_by_flip_and_by_gain(browser: Any, first: Path, two: str) -> None:
    look = Looked(browser, two)
    look.go("pairs")
    gains = [float(text.replace("−", "-").replace("±", "")) for text in look.texts(".group h3")]
    assert gains == sorted(gains, reverse=True)
    look.page.get_by_label("Sort by").select_option("loss")
    losses = [float(text.replace("−", "-").replace("±", "")) for text in look.texts(".group h3")]
    assert losses == sorted(losses)
    lines = [json.loads(line) for line in (first / "eval/pairs.jsonl").read_text().splitlines()]
    flipped = sum(line["before"]["safe_score"] <= 0.5 < line["after"]["safe_score"] for line in lines)
    look.page.get_by_label("What flipped").select_option("unsafe_to_safe")
    assert f"{flipped} found" in look.texts(".pager")[0]
    look.done()


def test_the_judges_disagreement_sorts_pairs_and_groups(browser: Any, first: Path, two: str) -> None:
    look = Looked(browser, two)
    for page, shown in (("pairs", 8), ("groups", 4)):
        look.go(page)
        assert "disagreement" not in " ".join(look.texts(".group header .figure"))  # the first run has one judge
        look.page.get_by_label("Run", exact=True).select_option("1")
        look.page.get_by_label("Sort by").select_option("disagreement")
        found = [text.split()[-1] for text in look.texts(".group header .figure") if text.startswith("disagreement")]
        assert len(found) == shown
        assert found == sorted(found, key=float, reverse=True)
        assert float(found[0]) > 0
        look.shot(f"{page}-judged")
        look.page.get_by_label("Run", exact=True).select_option("0")
    look.page.get_by_label("Run", exact=True).select_option("1")
    assert {"reward model", "second judge"} <= set(look.texts(".reply dt"))
    look.go("curves")
    look.page.wait_for_selector("canvas")
    assert "Reward model and second judge" in look.texts("figure h3")
    look.go("answer")
    look.page.click("text=By further judge and group >> nth=0")
    assert "second-rm: harmful" in look.texts("details h3")
    look.done()


def test_groups_and_pairs_of_one_harm_category(browser: Any, first: Path) -> None:
    look = Looked(browser, (first / "report.html").as_uri())
    for page in ("groups", "pairs"):
        look.go(page)
        names = look.texts('label:has-text("Harm category") option')[1:]
        assert len(names) >= 2
        look.page.get_by_label("Harm category").select_option(names[-1])
        tags = [card.locator("header .tag").all_inner_texts() for card in look.page.locator(".group").all()]
        assert tags
        assert all(names[-1] in of_card for of_card in tags)
    look.done()


def test_a_study_shows_its_tables_picture_and_the_constraint_s_curves(
    browser: Any, first: Path, second: Path, tmp_path: Path
) -> None:
    steered = shutil.copytree(second, tmp_path / "steered")
    lines = [json.loads(line) for line in (steered / "metrics.jsonl").read_text().splitlines()]
    more = {"objective/lambda": 1.5, "objective/cost_mean": -1.0, "objective/cost_limit": -2.0}
    write_text(steered / "metrics.jsonl", "".join(json.dumps(line | more) + "\n" for line in lines))
    dot = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk"
    dot += "+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    tables = [{"heads": ["arm (seeds)", "KL"], "rows": [["safety (3)", "0.2"]]}]
    page = write_report([first, steered], tmp_path / "study.html", study={"tables": tables, "picture": dot})
    look = Looked(browser, page.as_uri())
    assert look.texts("h2")[0] == "The study"
    assert "safety (3)" in look.texts("table th")
    look.until("document.querySelector('img.picture').naturalWidth === 1")
    look.go("curves")
    look.page.wait_for_selector("canvas")
    assert {"Cost and its limit", "Multiplier λ"} <= set(look.texts("figure h3"))
    look.done()


def test_two_runs_in_one_chart_and_zoom_by_keyboard(browser: Any, two: str) -> None:
    look = Looked(browser, two)
    assert len(look.texts(".sentence")) == 2
    assert look.texts("figure h3") == ["Safety against refusals of harmless prompts"]
    look.page.wait_for_selector("canvas")
    look.shot("two-runs-answer")
    look.go("curves")
    look.page.wait_for_selector("canvas")
    legend = look.texts("figure >> nth=0 >> .u-legend .u-label")
    assert sum("second:" in text for text in legend) == 1  # in training; the other one was validated as well
    assert sum("onerror" in text for text in legend) == 2
    look.shot("two-runs")
    figure = look.page.locator("figure").first
    figure.focus()
    read = "charts.open[0].scales.x.max - charts.open[0].scales.x.min"
    whole = look.page.evaluate(read)
    look.page.keyboard.press("ArrowRight")
    look.page.keyboard.press("+")
    assert look.page.evaluate(read) < whole
    look.page.keyboard.press("0")
    assert look.page.evaluate(read) == whole
    look.page.locator(".u-over").first.hover(position={"x": 40, "y": 40})
    assert look.texts("figure >> nth=0 >> .u-legend .u-value")[0] != "--"
    look.page.get_by_role("checkbox", name="second").uncheck()
    # for a moment, while the charts are made anew, there is no legend
    look.until("document.querySelector('.u-legend')?.innerText.includes('second') === false")
    look.go("recipe")
    assert "actor_rollout_ref.actor.optim.lr" in look.texts("table")[1]
    look.go("groups")
    look.page.get_by_label("Run", exact=True).select_option("1")
    assert look.page.locator(".group").count() == 4
    look.done()


def test_chinese_dark_and_narrow(browser: Any, first: Path) -> None:
    look = Looked(browser, (first / "report.html").as_uri(), color_scheme="dark")
    dark = look.page.evaluate("getComputedStyle(document.body).backgroundColor")
    look.page.click("#language")
    assert look.page.locator("html").get_attribute("lang") == "zh-CN"
    assert look.page.evaluate("document.activeElement.id") == "language"
    look.shot("dark-chinese")
    look.page.set_viewport_size({"width": 360, "height": 740})
    for name in PAGES:
        look.go(name)
        look.page.wait_for_timeout(50)
        wide = look.page.evaluate("document.documentElement.scrollWidth - innerWidth")
        assert wide <= 0, f"{name} is {wide} px wider than a phone"
        look.shot(f"phone-{name}")
    look.page.locator(".bar select").select_option("light")
    assert look.page.evaluate("getComputedStyle(document.body).backgroundColor") != dark
    look.done()


def test_keyboard_alone_reaches_the_pages(browser: Any, first: Path) -> None:
    look = Looked(browser, (first / "report.html").as_uri())
    look.page.keyboard.press("Tab")
    assert "Skip" in look.page.evaluate("document.activeElement.innerText")
    for _ in range(12):
        look.page.keyboard.press("Tab")
        if look.page.evaluate("document.activeElement.getAttribute('href')") == "#groups":
            break
    look.page.keyboard.press("Enter")
    look.page.wait_for_selector('[data-page="groups"]')
    look.done()


def test_no_serious_violation_of_accessibility(browser: Any, two: str) -> None:
    """axe-core's rules for WCAG 2 A and AA, on every page; in dark colours on those with most of them."""
    from axe_playwright_python.sync_playwright import Axe

    look = Looked(browser, two, bypass_csp=True)
    options = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"]}
    found: list[str] = []
    for theme, pages in (("light", PAGES), ("dark", ("answer", "groups", "reward"))):
        look.page.locator(".bar select").select_option(theme)
        for name in pages:
            look.go(name)
            look.page.wait_for_timeout(50)
            for violation in Axe().run(look.page, options=options).response["violations"]:
                if violation["impact"] in ("serious", "critical"):
                    nodes = [node["html"][:160] for node in violation["nodes"][:2]]
                    found.append(f"{theme} {name}: {violation['id']}: {nodes}")
    assert not found, "\n".join(found)
    look.context.close()


def test_it_prints_all_pages_in_light_colours(browser: Any, first: Path, tmp_path: Path) -> None:
    look = Looked(browser, (first / "report.html").as_uri(), color_scheme="dark")
    count = "[document.querySelectorAll('.page').length, document.querySelectorAll('canvas').length]"
    look.page.evaluate(f"addEventListener('beforeprint', () => {{ window.sent = {count}; }})")
    file = tmp_path / "report.pdf"
    look.page.pdf(path=str(file))  # the browser's own way: it sends the events, and waits for no frame
    assert file.read_bytes().count(b"/Type /Page\n") >= 12
    pages, drawn = look.page.evaluate("window.sent")
    assert pages == len(PAGES)
    assert drawn >= 14, "charts that are drawn a frame later are not printed"
    assert look.page.locator(".page").count() == 1  # as before
    look.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert [page.get_attribute("data-page") for page in look.page.locator(".page").all()] == list(PAGES)
    assert look.page.evaluate("css('--back')") == "#ffffff"
    assert look.page.locator("canvas").count() >= 14
    look.page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert look.page.locator(".page").count() == 1
    look.done()


def test_a_live_page_follows_the_run_without_reload(browser: Any, first: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(first, tmp_path / "live")
    shutil.rmtree(folder / "policy")
    for name in ("summary.json", "eval/comparison.json"):
        (folder / name).unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join(lines[:3]) + "\n")
    with WatchServer([folder], listener=listen("127.0.0.1", 0, None), token=None) as server:
        look = Looked(browser, server.url)
        look.page.evaluate("stays = 1")
        assert "step 2 of 4" in look.texts("#live")[0]
        look.go("curves")
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        look.until("document.getElementById('live').innerText.includes('step 4')")
        look.until("charts.open.length && charts.open[0].data[0].at(-1) === 4")
        assert look.page.evaluate("stays") == 1
        assert {url.removeprefix(server.url) for url in look.requests} <= {"", "data", "data:,"}
        assert look.errors == []
        look.context.close()
