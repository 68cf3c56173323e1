"""``pixart vote`` as typed, and voted on in a real browser; screenshots are kept in runs/vote.

The command is killed in the middle of it and given again.
"""

import json
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import processes
import pytest
from playwright.sync_api import Page, expect, sync_playwright
from scipy import stats
from serving_load import Models, register_models
from test_cluster_versions import type_in

from pixart_cluster.server import free_port
from pixart_jobs.preference import PreferenceError
from pixart_platform.errors import RegistryError
from pixart_platform.tracking import read_file, read_run
from pixart_serve.ballot import BallotError

SCREENSHOTS = Path(__file__).resolve().parent.parent / "runs/vote"
PROMPTS = [f"a red {n} on a dark picture" for n in ("one", "two", "three", "four", "five", "six")]
PATIENCE = 20_000  # milliseconds, for machines that do much else


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    models: Models = register_models(folder, 2)
    assert models.uri.endswith("mlflow.db")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return folder


@contextmanager
def voting(root: Path, port: int, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The command, once it says where to vote."""
    started = processes.start(
        "vote", "1", "champion-to-be", "--root", root, "--prompts", root / "prompts.txt",
        "--port", str(port), "--voter", "ann", log=log,
    )  # fmt: skip
    try:
        while "ann votes on" not in log.read_text() and started.poll() is None:
            time.sleep(0.2)
        assert "ann votes on" in log.read_text(), log.read_text()
        yield started
    finally:
        if started.poll() is None:
            started.kill()
            started.wait()


@pytest.fixture
def faults() -> list[str]:
    """What a page did that it should not have."""
    return []


@pytest.fixture
def page(faults: list[str]) -> Iterator[Page]:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.fail("the page is tested in a real browser: apt-get install chromium")
    with sync_playwright() as playwright:
        expect.set_options(timeout=PATIENCE)
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]
        )
        made = browser.new_context(viewport={"width": 1100, "height": 860}).new_page()
        made.set_default_timeout(PATIENCE)
        made.on("pageerror", lambda error: faults.append(str(error)))
        made.on(
            "console",
            lambda said: (
                faults.append(said.text)
                if said.type in ("error", "warning") and "Failed to load" not in said.text
                else None
            ),
        )
        yield made
        browser.close()


def shown(page: Page) -> list[str | None]:
    expect(page.locator("#pictures")).not_to_have_class("waiting")
    sources = [page.locator(f"#{side}-picture").get_attribute("src") for side in ("left", "right")]
    return [page.locator("#prompt").text_content(), *sources]


def expect_done(page: Page, count: int) -> None:
    expect(page.locator("#status")).to_have_text(f"{count} of 6")


def keep_screenshot(page: Page, name: str) -> None:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    expect(page.locator("#pictures")).not_to_have_class("waiting")
    page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)


def press(page: Page, key: str, count: int) -> None:
    expect(page.locator("#pictures")).not_to_have_class("waiting")
    page.keyboard.press(key)
    expect_done(page, count)


def test_a_voter_votes_by_key_through_reloads_undos_and_a_killed_server(
    root: Path, tmp_path: Path, page: Page, faults: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as for all tests, see conftest
    registry = register_alias(root)
    port, asked = free_port(), list[str]()
    url = f"http://127.0.0.1:{port}/"
    page.on("request", lambda request: asked.append(request.url))
    with voting(root, port, tmp_path / "first.log") as first:
        page.goto(url)
        expect_done(page, 0)
        keep_screenshot(page, "desk")
        press(page, "ArrowLeft", 1)
        before = shown(page)
        page.reload()
        expect_done(page, 1)
        assert shown(page) == before
        press(page, "Space", 2)
        press(page, "ArrowRight", 3)
        press(page, "u", 2)
        page.locator("#reason").click()
        page.keyboard.type("more like a wo")
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("End")
        page.keyboard.type("rd u")
        page.keyboard.press("Enter")
        expect_done(page, 2)
        press(page, "ArrowRight", 3)
        expect(page.locator("#reason")).to_have_value("")
        shown(page)
        first.send_signal(signal.SIGKILL)
        first.wait()
        page.keyboard.press("ArrowRight")
        expect(page.get_by_role("alert")).to_contain_text("Nobody answers")
        keep_screenshot(page, "ended")
    with voting(root, port, tmp_path / "second.log") as second:
        assert re.search(r"12 pictures +\d\.\d s", (tmp_path / "second.log").read_text())
        lose_a_picture(page)
        expect(page.get_by_role("alert")).to_be_hidden()
        look_on_a_phone(page)
        page.locator("#alike").click()
        expect_done(page, 5)
        press(page, "Space", 6)  # no second press of the button that has been clicked
        expect(page.get_by_text("That was all.")).to_be_visible()
        keep_screenshot(page, "phone-through")
        assert second.wait(120) == 0, "it ends when all is voted on"
    assert faults == []
    assert [u for u in asked if not u.startswith((url, "data:"))] == []
    check_result(root, registry.uri, (tmp_path / "second.log").read_text())


def lose_a_picture(page: Page) -> None:
    """Who has not seen a pair does not vote on it: the key shows it again."""
    page.route("**/pictures/*/right?*", lambda route: route.abort())
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("alert")).to_contain_text("A picture does not arrive")
    expect_done(page, 4)
    page.unroute_all()
    page.keyboard.press("ArrowRight")
    shown(page)
    expect_done(page, 4)


def look_on_a_phone(page: Page) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    keep_screenshot(page, "phone")
    page.emulate_media(color_scheme="dark")
    ground = "getComputedStyle(document.documentElement).backgroundColor"
    assert page.evaluate(ground) == "rgb(21, 21, 20)"
    keep_screenshot(page, "phone-dark")


def register_alias(root: Path) -> Models:
    from pixart_platform.registry import Registry
    from pixart_platform.tracking import sqlite_uri

    registry = Registry(sqlite_uri(root), "digits")
    registry.set_alias("champion-to-be", registry.get("2"))
    return Models(registry.uri, registry, {})


def check_result(root: Path, uri: str, said: str) -> None:
    """The file, the run and the terminal say the same."""
    [path] = (root / "votes").glob("*/votes.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    choices = ["left", "alike", "right", "undo", "right", "right", "alike", "alike"]
    assert [line["choice"] for line in lines] == choices
    assert [line["reason"] for line in lines if line["reason"]] == ["more like a word u"]
    assert lines[3]["pair"] == lines[2]["pair"] == lines[4]["pair"]
    preferred = [line["preferred"] for line in (lines[0], *lines[4:]) if line["preferred"]]
    won = preferred.count("digits@1")
    found = re.search(r"votes: .*, run (\w+)", said)
    assert found
    run = read_run(uri, found[1])
    exact = stats.binomtest(won, 3).proportion_ci(0.95, "exact")
    assert [run.metrics[k] for k in ("votes", "win_rate", "win_rate_low", "win_rate_high")] == (
        pytest.approx([6, won / 3, exact.low, exact.high])
    )
    assert f"digits@1 won {won}, digits@2 won {3 - won}, alike 3: 6 votes, 1 voter" in said
    assert read_file(uri, run.run_id, "votes.jsonl") == path.read_bytes()
    assert run.tags["vote_b"] == "digits@2"
    done = type_in("vote", "1", "2", "--root", root, "--prompts", root / "prompts.txt",
                   "--voter", "ann", "--port", "0")  # fmt: skip
    assert "ann has voted on all pairs; others may: --voter NAME" in done


def test_what_cannot_be_voted_on_is_named(root: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    with pytest.raises(PreferenceError, match="digits@1 and digits@1 hold the same weights"):
        type_in("vote", "1", "champion", "--root", root)
    with pytest.raises(RegistryError, match="no version or alias '99'; it has champion"):
        type_in("vote", "1", "99", "--root", root)
    with pytest.raises(PreferenceError, match=r"empty\.txt: holds no prompt"):
        type_in("vote", "1", "2", "--root", root, "--prompts", empty)
    with pytest.raises(PreferenceError, match="must be a name of 1 to 64"):
        type_in("vote", "1", "2", "--root", root, "--voter", "x" * 65)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(BallotError, match=f"--port {port}: cannot be listened on"):
            type_in("vote", "1", "2", "--root", root, "--port", str(port))
    done = processes.run("vote", "1", "1", "--root", root, timeout=120)
    assert done.returncode == 2
    assert re.fullmatch(r"error: digits@1 and digits@1 hold the same weights: .*\n", done.stderr)
