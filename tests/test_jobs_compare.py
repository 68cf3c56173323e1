"""Comparisons: what differs is told with its size, what does not is not, and the page says so."""

import io
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_cluster_versions import type_in
from test_serve_snapshots import build_drawer, write_snapshot

from pixart_jobs.certainty import Outcomes, measure
from pixart_jobs.compare import Comparison, compare
from pixart_jobs.compare_page import render
from pixart_jobs.promote import RESULT_FILE, evaluation_tag
from pixart_platform.errors import PixartError, RegistryError
from pixart_platform.registry import Registry
from pixart_platform.tracking import Tracker, sqlite_uri

PROMPTS = [f"a red {n} <b>" for n in range(160)]
SCREENSHOTS = Path(__file__).resolve().parent.parent / "runs/compare"


def answers(chance: float, seed: int, hard: int = 0) -> Outcomes:
    """160 prompts with one or two digits; the same ones are hard for everybody."""
    difficulty = np.random.default_rng(hard).normal(0, 0.1, 160)
    rng = np.random.default_rng(seed)
    total = 1 + np.arange(160) % 2
    right = rng.binomial(total, np.clip(chance + difficulty, 0, 1))
    return np.stack([right, total], axis=1).astype(float)


@dataclass
class Registered:
    """A real registry, to which finished pipelines of two stages are added."""

    root: Path
    registry: Registry
    runs: list[str] = field(default_factory=list)

    def add(self, chance: float, seed: int, basis: str = "b", **params: Any) -> int:
        pipeline = self.start(f"pipeline{len(self.runs)}", None, {"seed": seed, **params})
        parent: dict[str, str] = {}
        for k, stage in enumerate(("align", "aesthetics")):
            tracker = self.start(f"{stage}{len(self.runs)}", pipeline, {"images": 640})
            for images in (320, 640):
                tracker.log_metrics({"loss": 1 / (images + 640 * k)}, images)
            tracker.log_metrics({"cost_seconds": 60.0, "cost_usd": 0.5}, 640)
            tracker.log_image(np.full((8, 8, 3), 40 * k + seed, np.uint8), "preview", 640)
            folder = self.root / "snapshots" / f"{seed}-{chance}-{stage}"
            version = self.registry.register(
                write_snapshot(folder, build_drawer(seed + k)), tracker.run_id,
                {"stage": stage, **parent},
            )  # fmt: skip
            tracker.finish()
            parent = {
                "parent_version": str(version.number), "input_parent": version.tags["digest"],
            }  # fmt: skip
        self.evaluate(version.number, answers(chance, seed), basis, pipeline)
        self.runs.append(pipeline.run_id)
        return version.number

    def start(self, name: str, parent: Tracker | None, params: dict[str, Any]) -> Tracker:
        return Tracker.start(
            self.registry.uri, "digits", name, name, artifacts=self.root, parent=parent,
            params=params,
        )  # fmt: skip

    def evaluate(self, number: int, outcomes: Outcomes, basis: str, pipeline: Tracker) -> None:
        tracker = self.start(f"evaluate{number}", pipeline, {})
        path = self.root / RESULT_FILE
        told = {"prompts": PROMPTS, "outcomes": {"digit_accuracy": outcomes.tolist()}}
        path.write_text(json.dumps(told))
        tracker.log_file(path)
        for k in range(3):
            tracker.log_image(np.full((8, 8, 3), 60 * k, np.uint8), f"prompt_{k:03d}", 1280)
        figures = {"digit_accuracy": measure(outcomes), "fid": measure(outcomes)}
        tag = evaluation_tag("digits", basis, tracker.run_id, figures)
        self.registry.tag(self.registry.get(str(number)), tag)
        tracker.finish()


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> Registered:
    """Versions 2 and 4 differ in their seed, 6 in its captions, 8 was asked other prompts."""
    root = tmp_path_factory.mktemp("compare")
    made = Registered(root, Registry(sqlite_uri(root), "digits"))
    made.add(0.9, 1, captioner="digits")
    made.add(0.9, 2, captioner="digits")
    made.add(0.6, 3, captioner="raw")
    made.add(0.9, 4, basis="c", captioner="digits")
    return made


Ask = Callable[..., Comparison]


@pytest.fixture
def ask(registered: Registered) -> Ask:
    return lambda *references: compare(registered.registry.uri, "digits", references)


def test_another_seed_is_no_significant_difference(ask: Ask) -> None:
    found = ask("2", "4")
    [digits, fid] = found.findings
    assert digits.metric == "digit_accuracy"
    assert not digits.is_significant
    assert "not significant" in str(digits)
    assert np.isnan(fid.p), "of FID no outcomes are known"
    assert "not tested" in str(fid)
    assert found.recipe_differences == {"seed": ["1", "2"]}


def test_other_captions_are_a_significant_difference_with_its_size(ask: Ask) -> None:
    found = ask("2", "4", "6")
    [digits] = [f for f in found.findings if f.side == 2 and f.metric == "digit_accuracy"]
    assert digits.is_significant
    assert not digits.is_better
    assert -0.4 < digits.difference.low < digits.difference.value < digits.difference.high < -0.2
    assert found.recipe_differences["captioner"] == ["digits", "digits", "raw"]


def test_other_prompts_are_not_paired_and_told(ask: Ask) -> None:
    found = ask("2", "8")
    assert not any(f.paired for f in found.findings)
    assert "Other prompts: digits@8" in render(found)


def test_a_side_is_all_of_its_stages(ask: Ask) -> None:
    first = ask("2", "4").sides[0]
    assert [x for x, _ in first.curve] == [320, 640, 960, 1280]
    assert first.images == 1280
    assert (first.cost["seconds"], first.cost["usd"]) == (120.0, 1.0)
    assert sorted(first.suites["digits"].pictures) == ["prompt_000", "prompt_001", "prompt_002"]
    picture = Image.open(io.BytesIO(first.suites["digits"].pictures["prompt_002"]))
    assert picture.getpixel((0, 0)) == (120, 120, 120)


def test_a_run_stands_for_the_last_version_it_registered(registered: Registered, ask: Ask) -> None:
    found = ask(registered.runs[0], "digits@4")
    assert [side.label for side in found.sides] == ["digits@2", "digits@4"]
    with pytest.raises(PixartError, match=r"digits@2, digits@2: give two versions or more"):
        ask(registered.runs[0], "2")
    evaluation = registered.start("evaluate2", None, {})
    with pytest.raises(RegistryError, match="has registered no version of model 'digits'"):
        ask(evaluation.run_id, "2")


def test_the_command_writes_the_page_and_mlflow_keeps_a_copy(
    registered: Registered, tmp_path: Path
) -> None:
    said = type_in("compare", "2", "6", "--registry", registered.registry.uri, "--out", tmp_path)
    assert re.search(r"digits@6 against digits@2: digit_accuracy -0\.\d+ .*: significant", said)
    told = json.loads((tmp_path / "comparison.json").read_text())
    assert [f["significant"] for f in told["findings"]] == [True, False]
    assert "<b>" not in (tmp_path / "comparison.html").read_text().split("The same prompts")[1]
    again = registered.start("compare:digits@2,digits@6", None, {})
    kept = again._client.list_artifacts(again.run_id)
    assert {entry.path for entry in kept} == {"comparison.html", "comparison.json"}


def test_the_page_in_a_browser_needs_no_network(registered: Registered, tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.fail("the page is tested in a real browser: apt-get install chromium")
    page_file = tmp_path / "comparison.html"
    page_file.write_text(render(compare(registered.registry.uri, "digits", ["2", "4", "6"])))
    asked: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_context(offline=True).new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.goto(page_file.as_uri())
        assert page.title() == "digits@2 against digits@4 against digits@6"
        broken = "[...document.images].filter(i => !i.complete || !i.naturalWidth).length"
        assert page.evaluate(broken) == 0
        assert page.evaluate("document.images.length") >= 12
        assert page.locator("polyline[stroke-width='2']").count() == 3
        assert page.locator(".worse").count() == 1
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=SCREENSHOTS / "comparison.png", full_page=True)
        page.set_viewport_size({"width": 390, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        browser.close()
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
