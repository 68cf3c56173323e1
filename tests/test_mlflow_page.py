"""What a researcher sees in MLflow's own pages, in a real browser."""

import shutil
from pathlib import Path

import pytest
from mlflow_server import ServerProcess
from playwright.sync_api import expect, sync_playwright
from test_jobs_compare import SCREENSHOTS, Registered

from pixart_platform.registry import Registry
from pixart_platform.tracking import sqlite_uri

UNFOLD = "button[data-component-id*='runnamecellrenderer']"  # a pipeline, to see its jobs


def test_mlflow_shows_runs_curves_and_the_same_prompts_in_a_grid(tmp_path: Path) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.fail("MLflow's page is tested in a real browser: apt-get install chromium")
    made = Registered(tmp_path, Registry(sqlite_uri(tmp_path), "digits"))
    made.add(0.9, 1)
    made.add(0.6, 2)
    server = ServerProcess(tmp_path, sqlite_uri(tmp_path))
    server.start()
    try:
        with sync_playwright() as playwright:
            expect.set_options(timeout=60_000)
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1400, "height": 1000})
            page.goto(f"{server.uri}/#/experiments/1/runs?compareRunsMode=CHART")
            expect(page.locator(UNFOLD)).to_have_count(2)
            for k in range(2):
                page.locator(UNFOLD).nth(k).click()
            for name in ("pipeline0", "align0", "aesthetics0", "evaluate2", "aesthetics1"):
                expect(page.get_by_text(name, exact=True).first).to_be_visible()
            for chart in ("loss", "preview", "prompt_000", "prompt_002"):
                expect(page.get_by_text(chart, exact=True).first).to_be_visible()
            pictures = page.locator("img[src*='prompt_000']")
            expect(pictures).to_have_count(2)  # of both pipelines, side by side
            drawn = "i => i.complete && i.naturalWidth > 0"
            page.wait_for_function(f"[...document.images].every({drawn})")
            SCREENSHOTS.mkdir(parents=True, exist_ok=True)
            page.screenshot(path=SCREENSHOTS / "mlflow.png")
            page.goto(f"{server.uri}/#/models/digits")
            expect(page.get_by_text("Version 4")).to_be_visible()
            browser.close()
    finally:
        server.kill()
