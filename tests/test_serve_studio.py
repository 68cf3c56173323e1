"""The Studio in a real browser, over a socket, before a real engine that follows a real registry.

Every page is watched: whatever a test does, nothing may be asked of another origin and nothing may
go wrong in the console. Screenshots are kept in runs/studio.
"""

import base64
import io
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from fastapi.testclient import TestClient
from PIL import Image
from playwright.sync_api import (
    Browser,
    ConsoleMessage,
    Locator,
    Page,
    ViewportSize,
    expect,
    sync_playwright,
)
from test_serve_api import Service
from test_serve_engine import ask, assert_drawn_as_alone, eventually
from test_serve_snapshots import Gate, build_drawer, write_snapshot
from test_serve_stream import address_of, listening

from pixart_models.drawing import Drawer
from pixart_platform.registry import Registry
from pixart_platform.tracking import Tracker, sqlite_uri
from pixart_serve.api import build_api
from pixart_serve.engine import Drawing, DrawingEngine
from pixart_serve.follower import Follower
from pixart_serve.keys import ApiKeys, make_key, require_keys
from pixart_serve.service import EngineService
from pixart_serve.settings import ServeSettings
from pixart_serve.usage import Accounts

SCREENSHOTS = Path(__file__).resolve().parent.parent / "runs/studio"
NO_BROWSER = (
    "the Studio is tested in a real browser and there is none here: apt-get install chromium"
)
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]  # fmt: skip
SETTINGS = ServeSettings(
    max_rows=4, max_queued=8, max_side=64, max_steps=20, max_prompt_bytes=500, max_versions=3
)
PATIENCE = 20_000  # milliseconds, for machines that do much else
DESK, PHONE = ViewportSize(width=1280, height=860), ViewportSize(width=390, height=844)
PROMPT = "a red three above a blue two on a dark picture"
FOCUSED = "(document.activeElement.id || document.activeElement.value) ?? 'summary'"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.fail(NO_BROWSER)
    with sync_playwright() as playwright:
        expect.set_options(timeout=PATIENCE)
        launched = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """Versions 1 and 2, drawers of these seeds; making the store takes MLflow seconds."""
    folder = tmp_path_factory.mktemp("registry")
    tracker = Tracker.start(sqlite_uri(folder), "serve", "tests", "tests", artifacts=folder)
    made = Registry(tracker.uri, "digits")
    for seed in (1, 2):
        snapshot = write_snapshot(folder / f"snapshot-{seed}", build_drawer(seed))
        made.register(snapshot, tracker.run_id, {})
    return made


@dataclass
class Studio:
    """A service on a loopback port. Version 1 is live, 2 is ``next``, a drawing takes 4 steps."""

    registry: Registry
    service: Service
    follower: Follower
    server: uvicorn.Server | None = None

    @property
    def url(self) -> str:
        assert self.server
        host, port = address_of(self.server)
        return f"http://{host}:{port}/"

    @property
    def drawer(self) -> Drawer:
        live = self.service.engine.live
        assert live
        return live.drawer

    def promote(self, number: int) -> None:
        self.registry.set_alias("champion", self.registry.get(str(number)))


def build_studio(registry: Registry) -> Studio:
    engine = DrawingEngine(max_rows=SETTINGS.max_rows, max_queued=SETTINGS.max_queued)
    follower = Follower(registry, "champion", engine, max_versions=SETTINGS.max_versions)
    registry.set_alias("next", registry.get("2"))
    registry.set_alias("champion", registry.get("1"))
    follower.load_first()
    follower.poll()
    api = build_api(
        EngineService(engine, registry.name, "champion", follower), SETTINGS,
        default_steps=4, default_guidance=2.5,
    )  # fmt: skip
    live = engine.live
    assert live
    return Studio(registry, Service(live.drawer, engine, TestClient(api)), follower)


@pytest.fixture
def studio(registry: Registry) -> Iterator[Studio]:
    made = build_studio(registry)
    with listening(made.service) as server:
        made.server = server
        yield made
    made.follower.close()
    made.service.engine.close()


@dataclass
class Watched:
    """A page, and what it did that it should not have."""

    page: Page
    origin: str
    faults: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.on("request", lambda request: self._note_address(request.url))
        self.page.on("console", self._note_message)
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))

    def _note_address(self, address: str) -> None:
        if not address.startswith((self.origin, "data:")):
            self.faults.append(f"asked for {address}")

    def _note_message(self, message: ConsoleMessage) -> None:
        # Chromium's own word for every answer that is a refusal; the page says the rest.
        if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
            self.faults.append(message.text)

    def open(self) -> Page:
        self.page.goto(self.origin)
        return self.page


@pytest.fixture
def watched(browser: Browser, studio: Studio) -> Iterator[Watched]:
    context = browser.new_context(viewport=DESK)
    context.set_default_timeout(PATIENCE)
    made = Watched(context.new_page(), studio.url)
    yield made
    context.close()
    assert made.faults == []


@pytest.fixture
def page(watched: Watched) -> Page:
    """The page, opened, and the service's offer on it."""
    page = watched.open()
    expect(page.locator("#model")).to_have_text("digits \u00b7 version 1")
    return page


def keep_screenshot(page: Page, name: str) -> None:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)


def draw(page: Page, prompt: str = PROMPT) -> None:
    expect(page.locator("#cancel")).to_be_hidden()  # what was drawn before is finished
    label(page, "Prompt").fill(prompt)
    page.keyboard.press("Control+Enter")


def label(page: Page, name: str) -> Locator:
    return page.get_by_label(name, exact=True)


def finished(page: Page) -> Locator:
    return page.locator("#stage img[data-preview='']")


def pixels_of(picture: Locator) -> Any:
    source = picture.get_attribute("src") or ""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))))


def assert_drawn_by(drawer: Drawer, picture: Locator, seed: int, prompt: str = PROMPT) -> None:
    request = ask(prompt, seed=seed, steps=4)
    assert_drawn_as_alone(Drawing(pixels_of(picture), seed, 0), drawer, request)


def test_previews_arrive_before_the_picture(page: Page, studio: Studio) -> None:
    keep_screenshot(page, "desk-empty")
    gate = Gate(studio.drawer.network, permits=2)
    draw(page)
    expect(page.locator("#stage img")).to_have_attribute("data-preview", "2")
    expect(page.get_by_role("status")).to_have_text("Drawing: preview 2")
    preview = pixels_of(page.locator("#stage img"))
    assert len(gate.batches) == 2, "of four steps"
    keep_screenshot(page, "desk-preview")
    gate.allow()
    expect(finished(page)).to_have_count(1)
    expect(page.get_by_role("status")).to_contain_text("Drawn by version 1")
    expect(page.locator("figcaption")).to_contain_text("Version 1")
    seed = int(label(page, "Seed").input_value())
    expect(page.locator("figcaption")).to_contain_text(f"seed {seed}")
    assert_drawn_by(studio.drawer, finished(page), seed)
    assert (preview != pixels_of(finished(page))).any()
    assert "small-picture" in (finished(page).get_attribute("class") or "")
    keep_screenshot(page, "desk-drawn")


def test_two_versions_side_by_side(page: Page) -> None:
    label(page, "Version").select_option("1 \u00b7 champion")
    label(page, "Side by side with").select_option("2 \u00b7 next")
    label(page, "Number").fill("2")
    label(page, "Seed").fill("40")
    draw(page)
    expect(finished(page)).to_have_count(4)
    captions = page.locator("figcaption").all_text_contents()
    said = [(f"Version {version}", f"seed {seed}") for seed in (40, 41) for version in (1, 2)]
    assert all(v in c and s in c for (v, s), c in zip(said, captions, strict=True))
    for i, picture in enumerate(finished(page).all()):
        assert_drawn_by(build_drawer(seed=1 + i % 2), picture, 40 + i // 2)
    left, right = (finished(page).nth(i).bounding_box() for i in (0, 1))
    assert left
    assert right
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] < right["x"]
    keep_screenshot(page, "desk-side-by-side")


def test_the_version_that_is_live_draws_and_is_named(page: Page, studio: Studio) -> None:
    studio.promote(2)
    studio.follower.poll()
    draw(page)
    expect(page.locator("figcaption")).to_contain_text("Version 2")
    expect(page.locator("#model")).to_have_text("digits \u00b7 version 2")
    label(page, "Version").select_option("Another\u2026")
    label(page, "Version by number or alias").fill("1")
    draw(page)
    expect(page.locator("figcaption")).to_contain_text("Version 1")
    expect(page.get_by_role("status")).to_contain_text("Drawn by version 1")


@pytest.mark.parametrize("way", ["Escape", "button"])
def test_cancelling_frees_the_rows(page: Page, studio: Studio, way: str) -> None:
    gate = Gate(studio.drawer.network, permits=1)
    label(page, "Number").fill("2")
    label(page, "Steps").fill("20")
    draw(page)
    expect(page.locator("progress")).to_have_count(2)
    eventually(lambda: gate.num_arrived == 2)
    if way == "button":
        page.get_by_role("button", name="Cancel").click()
        expect(page.get_by_role("button", name="Draw")).to_be_focused()
    else:
        page.keyboard.press("Escape")
    expect(page.get_by_role("status")).to_have_text("Cancelled")
    expect(page.get_by_role("button", name="Cancel")).to_be_hidden()
    server = studio.server
    assert server
    eventually(lambda: not server.server_state.tasks)
    gate.allow()
    studio.service.engine.submit(ask(steps=1)).result(timeout=10)
    assert len(gate.batches) <= 4, "of the 40 they had asked for"
    label(page, "Number").fill("1")
    draw(page)
    expect(finished(page)).to_have_count(1)


def test_a_full_queue_says_when_to_come_back(page: Page, studio: Studio) -> None:
    gate = Gate(studio.drawer.network)
    held = [studio.service.engine.submit(ask(steps=1))]
    eventually(lambda: gate.num_arrived == 1)
    held += studio.service.engine.submit_all([ask(steps=1)] * SETTINGS.max_queued)
    page.clock.set_fixed_time(1_000_000)
    draw(page)
    expect(page.get_by_role("alert")).to_contain_text("8 pictures already wait; try again in")
    again = page.locator("#again")
    expect(again).to_be_disabled()
    expect(again).to_have_text("Try again in 1 s")
    keep_screenshot(page, "desk-full-queue")
    gate.allow()
    for future in held:
        future.result(timeout=10)
    page.clock.set_fixed_time(1_001_000)
    again.click()  # when it has become possible
    expect(finished(page)).to_have_count(1)
    expect(page.locator("#notice")).to_be_hidden()


def test_what_was_wrong_is_said_at_the_field(page: Page) -> None:
    label(page, "Negative prompt").fill("three " * 60)
    page.locator("summary").click()
    draw(page)
    expect(page.get_by_role("alert")).to_contain_text("Negative_prompt has 62 tokens; the maximum")
    expect(label(page, "Negative prompt")).to_be_focused()
    expect(label(page, "Negative prompt")).to_have_attribute("aria-invalid", "true")
    expect(page.locator("#again")).to_be_hidden()
    label(page, "Negative prompt").fill("")
    label(page, "Version").select_option("Another\u2026")
    label(page, "Version by number or alias").fill("99")
    draw(page)
    expect(page.get_by_role("alert")).to_contain_text("'99'; it has champion (version 1)")
    label(page, "Version").select_option("Live (1)")
    label(page, "Number").fill("99")
    page.locator("summary").click()
    draw(page)
    expect(label(page, "Number")).to_be_focused()  # the browser's own word, settings open
    label(page, "Number").fill("1")
    label(page, "Size").select_option("Landscape 40 \u00d7 24")
    draw(page)
    expect(page.locator("#notice")).to_be_hidden()
    expect(finished(page)).to_have_count(1)
    assert pixels_of(finished(page)).shape == (24, 40, 3)
    label(page, "Size").select_option("Another\u2026")
    label(page, "Width").fill("64")
    draw(page)
    expect(page.locator(".facts").first).to_contain_text("64 \u00d7 32")
    expect(finished(page)).to_have_count(1)
    assert pixels_of(finished(page)).shape == (32, 64, 3)


def test_a_failure_in_mid_stream_and_a_service_that_is_gone(page: Page, studio: Studio) -> None:
    gate = Gate(studio.drawer.network, permits=2)
    draw(page)
    expect(page.locator("#stage img")).to_have_attribute("data-preview", "2")
    studio.drawer.network.register_forward_pre_hook(_fail)
    gate.allow()
    expect(page.get_by_role("alert")).to_have_text("The drawing failed (DrawingFailed).")
    expect(page.locator("figure")).to_contain_text("not finished")
    expect(page.locator("#again")).to_have_text("Try again")
    assert studio.server
    studio.server.should_exit = True
    eventually(lambda: not studio.server or not studio.server.servers[0].is_serving())
    draw(page)
    expect(page.get_by_role("alert")).to_have_text("The service cannot be reached. Is it running?")


def _fail(*_: Any) -> None:
    raise RuntimeError("out of memory")


def test_a_key_is_asked_for_and_kept_in_the_tab_alone(
    browser: Browser, registry: Registry, tmp_path: Path
) -> None:
    studio, (key, line) = build_studio(registry), make_key("studio")
    (tmp_path / "keys").write_text(line)
    require_keys(studio.service.client.app, ApiKeys(tmp_path / "keys"), Accounts(0))  # type: ignore[arg-type]
    context = browser.new_context(viewport=DESK)
    context.set_default_timeout(PATIENCE)
    with listening(studio.service) as studio.server:
        watched = Watched(context.new_page(), studio.url)
        page = watched.open()
        dialog = page.get_by_role("dialog", name="API key")
        expect(dialog).to_contain_text("This service wants a key")
        keep_screenshot(page, "desk-key")
        page.keyboard.type("pk-wrong")
        page.keyboard.press("Enter")
        expect(dialog).to_contain_text("That key is not known here.")
        page.keyboard.press("Escape")
        expect(page.get_by_role("alert")).to_contain_text("This service wants an API key")
        draw(page)
        expect(dialog).to_be_visible()
        label(page, "Key").fill(key)
        page.get_by_role("button", name="Use this key").click()
        expect(finished(page)).to_have_count(1)
        expect(page.locator("#notice")).to_be_hidden()
        page.reload()
        expect(page.locator("#model")).to_have_text("digits \u00b7 version 1")
        kept = page.evaluate("[JSON.stringify(localStorage), document.cookie, location.href]")
        assert key not in "".join(kept)
        assert page.evaluate("sessionStorage.getItem('studio.key')") == key
        page.get_by_role("button", name="API key").click()
        expect(dialog).to_be_visible()
        assert watched.faults == []
        context.close()
    studio.follower.close()
    studio.service.engine.close()


def test_earlier_pictures_stay_within_reach(page: Page, studio: Studio) -> None:
    label(page, "Seed").fill("7")
    draw(page, "a green one")
    expect(finished(page)).to_have_attribute("alt", "a green one")
    draw(page, "a blue two")
    expect(finished(page)).to_have_attribute("alt", "a blue two")
    assert_drawn_by(studio.drawer, finished(page), 7, "a blue two")  # the seed was kept
    page.reload()
    expect(finished(page)).to_have_attribute("alt", "a blue two")
    page.locator("#runs button", has_text="a green one").click()
    expect(finished(page)).to_have_attribute("alt", "a green one")
    assert_drawn_by(studio.drawer, finished(page), 7, "a green one")
    expect(page.locator("#runs [aria-current=true]")).to_contain_text("a green one")
    keep_screenshot(page, "desk-earlier")
    page.get_by_role("button", name="Use these settings").click()
    expect(label(page, "Prompt")).to_have_value("a green one")
    label(page, "Random").check()
    page.keyboard.press("Control+Enter")
    expect(page.locator("#runs li")).to_have_count(3)
    expect(page.get_by_role("status")).to_contain_text("Drawn by version 1")
    assert label(page, "Seed").input_value() != "7"
    with page.expect_download() as download:
        page.get_by_role("link", name="Save").click()
    seed = label(page, "Seed").input_value()
    assert download.value.suggested_filename == f"digits-v1-seed{seed}.png"
    page.get_by_role("button", name="Keep seed").click()
    expect(label(page, "Keep")).to_be_checked()
    page.get_by_role("button", name="Clear").click()
    expect(page.locator("#earlier")).to_be_hidden()
    page.reload()
    expect(page.get_by_text("It appears here while it is being drawn.")).to_be_visible()


def test_the_keyboard_goes_through_the_page_in_its_order(page: Page) -> None:
    expect(label(page, "Prompt")).to_be_focused()
    page.keyboard.type("a red three")
    passed = []
    for _ in range(11):
        page.keyboard.press("Tab")
        passed.append(page.evaluate(FOCUSED))
    assert passed == [
        "draw", "summary", "negative", "size", "number", "steps", "guidance", "seed", "random",
        "version", "beside",
    ]  # fmt: skip
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("ArrowRight")
    expect(label(page, "Keep")).to_be_checked()
    page.keyboard.press("Enter")
    expect(finished(page)).to_have_count(1)


def test_the_page_fits_a_phone(page: Page) -> None:
    page.set_viewport_size(PHONE)
    page.reload()
    expect(page.locator("#model")).to_have_text("digits \u00b7 version 1")
    assert_no_sideways(page)
    expect(label(page, "Steps")).to_be_hidden()
    keep_screenshot(page, "phone-empty")
    draw(page, "a-word-without-an-end-" * 2)
    expect(finished(page)).to_have_count(1)
    assert_no_sideways(page)
    draw(page)
    expect(page.get_by_role("status")).to_contain_text("Drawn by version 1")
    keep_screenshot(page, "phone-drawn")
    page.locator("summary").click()
    label(page, "Side by side with").select_option("2 \u00b7 next")
    label(page, "Number").fill("3")
    assert_no_sideways(page)
    draw(page)
    expect(finished(page)).to_have_count(6)
    expect(page.get_by_role("status")).to_contain_text("Drawn by versions 1 and 2")
    expect(finished(page).first).to_be_in_viewport()
    assert_no_sideways(page)
    page.emulate_media(color_scheme="dark")
    keep_screenshot(page, "phone-dark")


def assert_no_sideways(page: Page) -> None:
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_dark_is_dark(page: Page) -> None:
    page.emulate_media(color_scheme="dark")
    draw(page)
    expect(page.get_by_role("status")).to_contain_text("Drawn by version 1")
    ground = "getComputedStyle(document.documentElement).backgroundColor"
    assert page.evaluate(ground) == "rgb(21, 21, 20)"
    keep_screenshot(page, "desk-dark")


def test_the_page_may_do_little(studio: Studio) -> None:
    client = studio.service.client
    for path, media_type in (("/", "html"), ("/studio.js", "javascript"), ("/studio.css", "css")):
        response = client.get(path)
        assert response.headers["content-type"] == f"text/{media_type}; charset=utf-8"
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert client.post(path).status_code == 405
    offered = client.get("/v1/models").json()["data"][0]
    assert offered["versions"] == [
        {"version": 2, "aliases": ["next"]}, {"version": 1, "aliases": ["champion"]},
    ]  # fmt: skip
    assert (offered["side"], offered["grid"], offered["max_side"]) == (32, 8, 64)
    assert (offered["max_pictures"], offered["max_steps"]) == (8, 20)
    assert (offered["default_steps"], offered["default_guidance"]) == (4, 2.5)
