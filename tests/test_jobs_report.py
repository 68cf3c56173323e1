"""The report: a flat summary for machines, and one safe, self-contained page for people."""

import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from builders import Row, write_table
from PIL import Image

from pixart_cluster.recipe import read_recipe
from pixart_jobs import report
from pixart_jobs.certainty import Figure
from pixart_jobs.evaluate import Evaluation
from pixart_jobs.pipeline import Result, StageResult
from pixart_jobs.stage import StageInputs, StagePlan
from pixart_models.config import get_preset
from pixart_models.snapshot import SnapshotConfig
from pixart_platform.accounting import Cost
from pixart_platform.registry import Version
from pixart_platform.tables import find_rejects

ATTACK = "<script>alert('x')</script>"


def make_png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 12), "red").save(buffer, format="png")
    return buffer.getvalue()


def make_result(root: Path) -> Result:
    """A pipeline of one stage whose texts come from the outside world, and are hostile."""
    images: list[Row] = [
        {"bytes": make_png(), "raw_caption": ATTACK},
        {"bytes": b"", "status": "rejected: empty file", "source": ATTACK},
    ]
    for i, row in enumerate(images):
        row |= {"id": f"{i:064x}", "uri": "", "width": 20, "height": 12}
    captions: list[Row] = [
        {"id": images[0]["id"], "captions": [f"a caption {ATTACK}"]},
        {"id": images[1]["id"], "status": images[1]["status"], "captions": []},
    ]
    tables = {
        "images": write_table(root / "images", "images/2", [images]),
        "captions": write_table(root / "captions", "captions/2", [captions]),
        "text": write_table(root / "text", "text/2", [[]]),
        "latents": write_table(root / "latents", "latents/1", [[]]),
    }
    recipe = read_recipe("digits")
    inputs = StageInputs(tables["images"], tables["text"], tables["latents"], None)
    snapshot = SnapshotConfig(get_preset("digits"), "flow", 32, "a", "b", "c", "d")
    plan = StagePlan("align", recipe, recipe.stages["align"], inputs, snapshot, root / "s", {})
    plan.preview_folder.mkdir(parents=True)
    (plan.preview_folder / "000012800.png").write_bytes(make_png())
    (root / "sheet.png").write_bytes(make_png())
    version = Version("digits", 7, str(root / "snapshot"), {})
    values = {"digit_accuracy": 0.5, "color_accuracy": 0.875, "reader_accuracy": 0.99}
    figures = {name: Figure(value, value - 0.1, 1.0) for name, value in values.items()}
    return Result(
        recipe, tables, 0.96, [StageResult(plan, version, [(640, 2.0), (1280, 1.0)])],
        [Evaluation("digits", "b", figures, ("a red three",), root / "sheet.png")],
        Cost(100.0, 0.01, 0.004, 1.5),
        "sqlite://", list(find_rejects(tables["images"], tables["images"])), 1,
    )  # fmt: skip


class Page(HTMLParser):
    """The tags of a page, and what they refer to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [v or "" for k, v in attrs if k in ("src", "href")]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return make_result(tmp_path_factory.mktemp("run"))


def write(folder: Path, result: Result, **changes: object) -> Page:
    image, baseline = changes.get("image"), changes.get("baseline")
    assert image is None or isinstance(image, Path)
    assert baseline is None or isinstance(baseline, Result)
    report.write(folder, result, image=image, baseline=baseline, next_steps=f"pixart {ATTACK}")
    return Page((folder / "report.html").read_text())


def test_the_summary_is_flat_and_survives_json(tmp_path: Path, result: Result) -> None:
    write(tmp_path, result)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary == report.summarize(result, None, None)
    assert all(value is None or isinstance(value, str | int | float) for value in summary.values())
    assert summary == {
        "captioner_accuracy": 0.96, "digit_accuracy": 0.5, "color_accuracy": 0.875,
        "reader_accuracy": 0.99, "seconds": 100.0, "kwh": 0.01, "co2_kg": 0.004, "usd": 1.5,
        "gpu_hours": 0.0, "model": "digits", "model_version": 7, "image": None,
        "rejected_images": 1,
    }  # fmt: skip


def test_a_baseline_is_told_apart_by_its_prefix(result: Result) -> None:
    (evaluation,) = result.evaluations
    train = result.recipe.train.model_copy(update={"objective": "iddpm"})
    baseline = replace(
        result,
        recipe=result.recipe.model_copy(update={"train": train}),
        evaluations=[replace(evaluation, figures={"digit_accuracy": Figure(0.25, 0.2, 0.3)})],
    )
    summary = report.summarize(result, Path("/runs/picture.png"), baseline)
    assert summary["digit_accuracy"] == 0.5
    assert summary["baseline_digit_accuracy"] == 0.25
    assert summary["baseline_objective"] == "iddpm"
    assert summary["image"] == "/runs/picture.png"


def test_the_page_needs_nothing_beside_it(tmp_path: Path, result: Result) -> None:
    picture = tmp_path / "picture.png"
    picture.write_bytes(make_png())
    page = write(tmp_path, result, image=picture, baseline=result)
    assert len(page.references) == 4, "served picture, caption's image, preview, sheet"
    assert all(reference.startswith("data:image/") for reference in page.references)
    assert not {"script", "link", "iframe"} & set(page.tags)


def test_captions_and_file_names_cannot_inject_markup(tmp_path: Path, result: Result) -> None:
    page = write(tmp_path, result)
    text = (tmp_path / "report.html").read_text()
    assert "script" not in page.tags
    assert ATTACK not in text
    assert text.count("&lt;script&gt;") == 4, "two captions, a source, a next step"


def test_the_page_shows_figures_curves_and_rejects(tmp_path: Path, result: Result) -> None:
    write(tmp_path, result)
    text = (tmp_path / "report.html").read_text()
    for said in (
        "<b>96.0%</b>captioner",
        "<b>50.0%</b>digit",
        "50.0% (40.0% to 100.0%)",
        "100 s",
        "1 in all",
        "empty file",
    ):
        assert said in text
    (points,) = re.findall(r"points='([^']*)'", text)
    places = [tuple(map(float, point.split(","))) for point in points.split()]
    assert len(places) == 2
    assert places[0][0] < places[1][0]
    assert places[0][1] < places[1][1], "a falling loss falls on the screen"


def test_a_run_without_curve_evaluation_or_rejects_still_has_a_report(
    tmp_path: Path, result: Result
) -> None:
    stages = [replace(result.stages[0], losses=[])]
    bare = replace(result, evaluations=[], caption_accuracy=None, rejects=[], stages=stages)
    page = write(tmp_path, bare)
    assert "svg" not in page.tags
    assert "<h2>Rejected</h2><p>None.</p>" in (tmp_path / "report.html").read_text()
    assert json.loads((tmp_path / "summary.json").read_text())["captioner_accuracy"] is None
