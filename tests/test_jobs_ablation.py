"""Studies: what is run, to what compute, and what follows from it over seeds."""

import json
import math
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from processes import MINI, run

from pixart_cluster.cli import main
from pixart_cluster.recipe import read_recipe
from pixart_jobs.ablation import STUDIES, Outcome, Point, Study, StudyError, read_study
from pixart_jobs.planner import stage_flops
from pixart_jobs.scenes import compose_scene
from pixart_jobs.study_report import (
    as_document,
    interval,
    print_rows,
    reach,
    render,
    summarize,
)
from pixart_models.digits import describe
from pixart_platform.errors import RecipeError

TARGET = {"digit_accuracy": 0.9}


def write_study(folder: Path, **changes: Any) -> Path:
    asked = {
        "name": "small", "recipe": str(MINI), "seeds": [0, 1], "points": 3, "target": TARGET,
        "set": {"evaluate.num_prompts": 8, "evaluate.batch_images": 8, "draw.num_steps": 2,
                "train.num_workers": 1, "train.zero_stage": 0},
        "variants": {"flow": {}, "paper": {"train.objective": "iddpm"}},
    }  # fmt: skip
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(asked | changes))
    return path


def test_every_variant_has_every_seed_and_its_settings(tmp_path: Path) -> None:
    study, runs = read_study(str(write_study(tmp_path)), read_recipe)
    assert [r.name for r in runs] == ["flow-0", "paper-0", "flow-1", "paper-1"]
    assert [r.recipe.train.objective for r in runs] == ["flow", "iddpm"] * 2
    assert {r.recipe.name for r in runs} == {"small"}
    assert study.reference == "flow"
    assert {r.suite for r in runs} == {"digits"}
    assert all(r.recipe.suites == () for r in runs), "nothing is evaluated twice"
    assert {r.recipe.train.keep_every_images for r in runs} == {(640 + 320) // 3}


def test_what_is_set_for_all_is_part_of_the_study(tmp_path: Path) -> None:
    path = str(write_study(tmp_path, set={"draw.num_steps": 2}))
    studies = [read_study(path, read_recipe, [f"data.num_scenes={n}"])[0] for n in (64, 128)]
    assert [s.set["data.num_scenes"] for s in studies] == ["64", "128"]
    assert studies[0].set["draw.num_steps"] == "2"


def test_stages_can_be_replaced_whole(tmp_path: Path) -> None:
    align = read_recipe(str(MINI)).stages["align"].model_dump(mode="json")
    joint = {"stages": {"joint": align | {"start_from": "scratch"}}}
    _, runs = read_study(str(write_study(tmp_path, variants={"joint": joint})), read_recipe)
    assert list(runs[0].recipe.stages) == ["joint"]


@pytest.mark.parametrize("tflops", [0.2, 3.0])
def test_all_variants_come_to_the_same_compute(tmp_path: Path, tflops: float) -> None:
    drop = {"mode": "mask", "share": 0.5, "start": 1}
    wide = {"train.network": "digits"}
    variants = {"as-is": {}, "wide": wide, "drop": wide | {"stages.align.token_drop": drop}}
    _, runs = read_study(str(write_study(tmp_path, variants=variants, tflops=tflops)), read_recipe)
    for one in runs:
        flops = sum(stage_flops(one.recipe, name) for name in one.recipe.stages)
        batch = sum(stage_flops(one.recipe, n, 16) for n in one.recipe.stages)
        assert abs(flops - tflops * 1e12) <= batch, one.name


def test_a_variant_may_have_a_compute_of_its_own(tmp_path: Path) -> None:
    _, runs = read_study(str(write_study(tmp_path, tflops={"paper": 3.0})), read_recipe)
    lengths = {r.variant: [s.images for s in r.recipe.stages.values()] for r in runs}
    assert lengths["flow"] == [s.images for s in read_recipe(str(MINI)).stages.values()]
    paper = next(r.recipe for r in runs if r.variant == "paper")
    flops = sum(stage_flops(paper, name) for name in paper.stages)
    assert flops == pytest.approx(3e12, rel=0.01)


def test_flops_of_a_part_of_a_stage_add_up() -> None:
    drop = {"mode": "mask", "share": 0.5, "start": 1, "finish_share": 0.25}
    recipe = read_recipe(str(MINI), ["train.network=digits",
                                     f"stages.align.token_drop={json.dumps(drop)}"])  # fmt: skip
    first, half, whole = (stage_flops(recipe, "align", n) for n in (1, 320, 640))
    assert half == pytest.approx(320 * first)
    assert whole == pytest.approx(stage_flops(recipe, "align"))
    assert whole > 640 * first, "those that finish the stage see all tokens"


@pytest.mark.parametrize(
    ("changes", "kind", "told"),
    [({"variants": {"a": {"train.objectiv": "flow"}}}, StudyError, "variant a: .*objectiv"),
     ({"variants": {}}, RecipeError, "variants"),
     ({"baseline": "b"}, RecipeError, "baseline = b: is no variant; there are flow, paper"),
     ({"seeds": [1, 1]}, RecipeError, "twice"),
     ({"target": {"digit_acuracy": 0.9}}, RecipeError, "did you mean 'digit_accuracy'"),
     ({"set": {"evaluate.suites": []}}, StudyError, "evaluate.suites is empty: a study needs one"),
     ({"set": {"evaluate.suites": ["fidelity"]}}, StudyError, "target = digit_accuracy: .* kid"),
     ({"set": {"evaluate.suites": ["fidelity"]}, "target": {"clip_score": 20}}, StudyError,
      "target = clip_score: is nothing that the suite fidelity measures; it has fid, kid"),
     ({"target": {"fid": 9}}, StudyError, "target = fid: .* the suite digits measures; it has"),
     ({"target": {"five_overall": 0.5}}, StudyError, "target = five_overall"),
     ({"tflops": {"papper": 1}}, RecipeError, "tflops of papper: is no variant"),
     ({"tflops": 0}, RecipeError, "tflops.*0"),
     ({"tflops": math.inf}, RecipeError, "tflops.*inf"),
     ({"variants": {"a": {"evaluate.seed": 1}}}, RecipeError, "evaluate.seed must be the same"),
     ({"variants": {"a": {"seed": 1}}}, RecipeError, "variants: seed .* 'seeds'"),
     ({"set": {"seed": 1}}, StudyError, "seed: is told by the study's file"),
     ({"variants": {"a": {}, "b": {"data.source": "crowds"}}, "target": {"color_accuracy": 1}},
      StudyError, "asked .* 'set' one evaluate.suites"),
     ({"set": {"train.num_workers": date(2026, 1, 1)}}, StudyError, "num_workers.*2026-01-01")],
)  # fmt: skip
def test_what_cannot_be_studied_is_told_at_once(
    tmp_path: Path, changes: dict[str, Any], kind: type[Exception], told: str
) -> None:
    with pytest.raises(kind, match=told):
        read_study(str(write_study(tmp_path, **changes)), read_recipe)


def test_an_unknown_study_is_told_which_there_are() -> None:
    with pytest.raises(RecipeError, match=r"no-such.*decomposition"):
        read_study("no-such", read_recipe)


@pytest.mark.parametrize("name", sorted(path.stem for path in STUDIES.glob("*.yaml")))
def test_built_in_studies_can_be_run(name: str) -> None:
    study, runs = read_study(name, read_recipe)
    assert len(runs) == len(study.variants) * len(study.seeds)


def points(values: list[float], scale: float = 1.0, metric: str = "digit_accuracy") -> list[Point]:
    """At 1, 10, 100, ... TFLOPs."""
    return [
        Point("align", 10 * (i + 1), scale * 10.0**i * 1e12, scale * 10.0**i,
              {metric: value})
        for i, value in enumerate(values)
    ]  # fmt: skip


def outcome(variant: str, seed: int, values: list[float], scale: float = 1.0) -> Outcome:
    made = points(values, scale)
    return Outcome(variant, seed, 10**6, made[-1].flops, made[-1].seconds, {"nouns": 2.0}, made)


def test_a_target_is_reached_between_points_on_a_logarithmic_scale() -> None:
    found = reach(points([0.1, 0.8, 1.0]), "digit_accuracy", 0.9)
    assert found is not None
    assert found.flops == pytest.approx(10**1.5 * 1e12)
    first = reach(points([0.95, 1.0]), "digit_accuracy", 0.9)
    assert first is not None
    assert first.flops == 1e12
    assert reach(points([0.1, 0.8, 0.89]), "digit_accuracy", 0.9) is None
    lower = reach(points([90, 20, 10], metric="fid"), "fid", 15)
    assert lower is not None, "a distance is to be small"
    assert lower.flops == pytest.approx(10**1.5 * 1e12)
    assert reach(points([90, 20, 16], metric="fid"), "fid", 15) is None


def test_intervals_are_students() -> None:
    found = interval([0.8, 0.9, 1.0])
    assert found.value == pytest.approx(0.9)
    assert found.high - found.value == pytest.approx(4.3027 * 0.1 / math.sqrt(3), rel=1e-4)
    assert math.isnan(interval([0.5]).low)


def make_study(*variants: str, seeds: tuple[int, ...] = (0, 1, 2)) -> Study:
    return Study(name="s", recipe="digits", variants={v: {} for v in variants}, seeds=seeds,
                 target=TARGET)  # fmt: skip


def test_ratios_are_those_of_the_same_seeds() -> None:
    slow = [outcome("slow", s, [0.1, 0.8, 1.0], 10.0**s) for s in range(3)]
    quick = [outcome("quick", s, [0.8, 1.0, 1.0], 10.0**s) for s in range(3)]
    study = make_study("slow", "quick")
    base, row = summarize(study, [*quick, *slow])
    assert base.variant == "slow"
    assert not base.ratios
    ratio = row.ratios["digit_accuracy"]
    assert ratio.figure.value == pytest.approx(0.1)
    assert ratio.figure.high == pytest.approx(0.1), "seeds differ a hundredfold, their ratios not"
    assert not ratio.is_at_most
    assert "0.1 (0.1 to 0.1) of slow's" in print_rows(study, [base, row])


def test_a_baseline_that_never_gets_there_makes_a_bound() -> None:
    study = make_study("never", "ours", seeds=(0, 1))
    never = [outcome("never", s, [0.1, 0.2, 0.3]) for s in (0, 1)]
    ours = [outcome("ours", s, [0.1, 0.95, 1.0]) for s in (0, 1)]
    rows = summarize(study, [*never, *ours])
    assert rows[0].reached["digit_accuracy"].flops is None
    assert rows[1].ratios["digit_accuracy"].is_at_most
    told = print_rows(study, rows)
    assert "reached by 0 of 2 seeds" in told
    assert "at most" in told
    ours[1] = replace(ours[1], points=points([0.1, 0.2, 0.3]))
    rows = summarize(study, [*never, *ours])
    assert rows[1].reached["digit_accuracy"].count == 1
    assert not rows[1].ratios, "a seed of ours that fails may not be left out of the mean"
    at_once = [outcome("never", s, [0.95, 1.0, 1.0]) for s in (0, 1)]
    rows = summarize(study, [*at_once, *(outcome("ours", s, [0.1, 0.95, 1.0]) for s in (0, 1))])
    assert not rows[1].ratios, "it may have needed any part of what its first point took"


def test_differences_at_the_end_are_tested_seed_by_seed() -> None:
    ends = [0.5, 0.6, 0.7]
    a = [outcome("a", s, [0.1, e]) for s, e in enumerate(ends)]
    b = [outcome("b", s, [0.1, e + 0.1 + 0.01 * s]) for s, e in enumerate(ends)]
    c = [outcome("c", s, [0.1, e]) for s, e in enumerate([0.7, 0.5, 0.6])]
    _, better, same = summarize(make_study("a", "b", "c"), [*a, *b, *c])
    assert better.differences["digit_accuracy"].value == pytest.approx(0.11)
    assert better.differences["digit_accuracy"].p < 0.05
    assert same.differences["digit_accuracy"].p > 0.5


def test_the_page_shows_everything_and_needs_nothing() -> None:
    study = make_study("a", "c", seeds=(0,))
    found = [outcome("a", 0, [0.1, 0.5]), outcome("c", 0, [0.1, 0.95])]
    rows = summarize(study, found)
    page = render(study, rows, found)
    assert page.count("<polyline") == 2
    assert "src='http" not in page
    assert "digit_accuracy &gt;= 0.9" in page
    assert "nan" not in page
    document = json.loads(json.dumps(as_document(study, rows, found), allow_nan=False))
    assert document["runs"][1]["points"][1]["digit_accuracy"] == 0.95
    assert document["rows"][0]["final"]["digit_accuracy"]["low"] is None


def test_a_typo_in_a_study_is_one_line_and_exit_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_study(tmp_path, set={"train.networks": "digits"})
    monkeypatch.setattr("sys.argv", ["pixart", "ablate", str(path)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("error: variant flow: ")


@pytest.mark.slow
def test_a_study_of_any_folder_is_run_once_and_compared(tmp_path: Path) -> None:
    """The recipe for photos, small, on a folder of pictures with their captions beside them."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(64):
        scene = compose_scene(i, seed=5)
        Image.fromarray(scene.image).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(describe(scene.reading))
    align = read_recipe(str(MINI)).stages["align"].model_dump(mode="json")
    settings = {
        "stages": {"align": align | {"start_from": "scratch", "images": 96}},
        "data.partition_rows": 32, "encode.resolutions": [32], "encode.max_tokens": 48,
        "encode.autoencoder": "builtin:digits", "encode.text_encoder": "builtin:t5-tiny",
        "train.network": "digits-mini", "train.num_workers": 1, "train.use_gpu": False,
        "train.zero_stage": 0, "evaluate.num_references": 16, "draw.num_steps": 2,
    }  # fmt: skip
    path = write_study(
        tmp_path, recipe="photos", seeds=[0], set=settings, target={"kid": 1e9}, points=2
    )
    asked = ("ablate", path, "--root", tmp_path / "study", "--set", f"data.source=folder:{folder}")
    done = run(*asked, "--parallel", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads((tmp_path / "study" / "study.json").read_text())
    flow, paper = told["runs"]
    assert (flow["variant"], paper["variant"]) == ("flow", "paper")
    for made in (flow, paper):
        flops = [point["flops"] for point in made["points"]]
        assert len(flops) >= 2
        assert flops == sorted(flops)
        assert flops[-1] == pytest.approx(made["flops"])
    tables = list((tmp_path / "study" / "tables").iterdir())
    assert len(tables) == 6, "both read the same"
    assert flow["points"][0].keys() > {"fid", "kid", "precision", "recall"}
    assert told["rows"][0]["reached"]["kid"]["count"] == 1
    again = run(*asked, "--set", "draw.num_steps=3")
    assert again.returncode == 0, again.stdout + again.stderr
    redrawn = json.loads((tmp_path / "study" / "study.json").read_text())
    for before, after in zip(told["runs"], redrawn["runs"], strict=True):
        assert (after["flops"], after["seconds"]) == (before["flops"], before["seconds"])
        assert [p["kid"] for p in after["points"]] != [p["kid"] for p in before["points"]]
