"""Evaluation: what counts as right, prompts no training scene has shown, and the job on real Ray:
the same bytes from any number of workers, killed or not."""

import io
import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import write_table
from evaluations import make_recipe, write_clip, write_prompts, write_reference
from mlflow import MlflowClient
from PIL import Image
from processes import run, start, wait_for
from serving_load import Models, register_models
from test_serve_snapshots import build_drawer, write_snapshot
from torch import nn

from pixart_cluster.cli import main
from pixart_cluster.console import ConsoleMonitor
from pixart_cluster.local import local_ray
from pixart_jobs.certainty import Figure, ratio
from pixart_jobs.evaluate import (
    EvaluationError,
    EvaluationPlan,
    _write_sheet,
    load,
    plan,
    record,
    require_suites,
)
from pixart_jobs.geneval import PromptFileError
from pixart_jobs.pipeline import Pipeline
from pixart_jobs.promote import find_version, measured
from pixart_jobs.recipe import SUITE_METRICS
from pixart_jobs.scenes import is_held_out
from pixart_jobs.suites import (
    DigitsSuite,
    collect,
    encode_png,
    held_out_prompts,
    judge_reading,
    parse_reading,
    read_rows,
)
from pixart_jobs.workspace import Workspace
from pixart_models.config import get_preset
from pixart_models.digits import Reading
from pixart_models.dit import DiT
from pixart_platform.errors import RegistryError
from pixart_platform.tables import Table
from pixart_platform.tracking import Tracker

THREE = Reading((3,), ("red",))
PAIR = Reading((3, 5), ("red", "blue"), "left of")  # training shows no blue five


def score(wanted: list[Reading], seen: list[Reading | None]) -> dict[str, float]:
    outcomes = collect(map(judge_reading, wanted, seen))
    return {name: ratio(np.array(pairs, np.float64)) for name, pairs in outcomes.items()}


def test_a_picture_read_as_wanted_scores_one() -> None:
    assert set(score([THREE, PAIR], [THREE, PAIR]).items()) == {
        (metric, 1) for metric in SUITE_METRICS["digits"]
    }


def test_swapped_digits_or_colours_are_wrong_though_both_are_there() -> None:
    found = score([PAIR], [Reading((5, 3), ("red", "blue"), "left of")])
    assert (found["digit_accuracy"], found["color_accuracy"], found["count_accuracy"]) == (0, 1, 1)
    found = score([PAIR], [Reading((3, 5), ("blue", "red"), "left of")])
    assert (found["digit_accuracy"], found["color_accuracy"], found["count_accuracy"]) == (1, 0, 1)


def test_one_of_two_digits_is_half_right() -> None:
    found = score([PAIR], [Reading((3, 8), ("red", "blue"), "above")])
    assert found == {
        "digit_accuracy": 0.5, "color_accuracy": 1, "relation_accuracy": 0, "count_accuracy": 1,
        "seen_pair_accuracy": 1, "unseen_pair_accuracy": 0,
    }  # fmt: skip


def test_a_picture_that_cannot_be_read_is_wrong_in_everything() -> None:
    assert score([THREE, PAIR], [THREE, None]) == {
        "digit_accuracy": pytest.approx(1 / 3), "color_accuracy": pytest.approx(1 / 3),
        "relation_accuracy": 0, "count_accuracy": 0.5,
        "seen_pair_accuracy": 0.5, "unseen_pair_accuracy": 0,
    }  # fmt: skip


def test_another_number_of_digits_is_wrong_in_all() -> None:
    assert set(score([PAIR], [THREE]).values()) == {0}
    assert set(score([THREE], [PAIR]).values()) == {0}


def test_without_pairs_there_is_no_relation_to_score() -> None:
    assert "relation_accuracy" not in score([THREE], [THREE])


def test_prompts_are_those_of_their_seed_and_all_held_out() -> None:
    prompts = held_out_prompts(60, seed=4)
    assert prompts == held_out_prompts(60, seed=4)
    assert prompts[:20] == held_out_prompts(20, seed=4)
    assert prompts != held_out_prompts(60, seed=5)
    assert all(map(is_held_out, prompts))
    assert {len(reading.digits) for reading in prompts} == {1, 2}


def test_a_reading_survives_the_trip_through_a_table() -> None:
    for reading in (THREE, PAIR):
        text = json.dumps([reading.digits, reading.colors, reading.relation])
        assert parse_reading(text) == reading
    assert parse_reading("") is None


def make_png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), (value, 0, 0)).save(buffer, format="png")
    return buffer.getvalue()


@pytest.mark.parametrize(("count", "rows"), [(1, 1), (8, 1), (9, 2), (32, 4)])
def test_a_sheet_shows_the_first_pictures_row_by_row(tmp_path: Path, count: int, rows: int) -> None:
    _write_sheet(tmp_path / "deep" / "sheet.png", [make_png(i) for i in range(count)])
    sheet = np.asarray(Image.open(tmp_path / "deep" / "sheet.png"))
    assert sheet.shape == (4 * rows, 6 * 8, 3)
    shown = sheet[2::4, 3::6, 0].reshape(-1)
    assert shown[:count].tolist() == list(range(count))


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("snapshots")
    return [write_snapshot(root / str(seed), build_drawer(seed)) for seed in (1, 2)]


def make_plan(snapshot: Path, *overrides: str, suite: str = "digits") -> EvaluationPlan:
    return plan(make_recipe(*overrides), suite, snapshot, snapshot.parent / "evaluations", dict)


def test_the_basis_is_all_but_the_snapshot_and_the_folder_all(snapshots: list[Path]) -> None:
    first, second = map(make_plan, snapshots)
    assert first.settings["basis"] == second.settings["basis"]
    assert first.folder != second.folder
    for change in ("draw.num_steps=3", "evaluate.seed=9", "evaluate.num_prompts=9"):
        assert make_plan(snapshots[0], change).settings["basis"] != first.settings["basis"]
    alike = make_plan(snapshots[0], "evaluate.num_workers=1", "data.num_scenes=7")
    assert alike.folder == first.folder


def test_an_unknown_suite_is_told_which_there_are() -> None:
    for name in ("digit", "prompts", "prompts:"):
        with pytest.raises(EvaluationError, match=f"{name!r} is not known; there are digits, cro"):
            require_suites(["digits", name])
    with pytest.raises(EvaluationError, match="names none"):
        require_suites([])


def test_a_pipeline_whose_suites_cannot_be_opened_stops_before_any_work(tmp_path: Path) -> None:
    recipe = make_recipe("evaluate.suites=[digits, 'prompts:/no/such.jsonl']")
    space = Workspace.under(tmp_path, tmp_path / "scratch")
    with pytest.raises(PromptFileError, match=r"prompts:/no/such.jsonl: cannot be read"):
        Pipeline(recipe, space, ConsoleMonitor()).run()
    assert not (tmp_path / "tables").exists()


def test_what_draws_classes_is_refused_before_anything_starts(tmp_path: Path) -> None:
    drawer = build_drawer()
    config = replace(drawer.config, network=get_preset("digits-mini", architecture="dit"))
    network: Any = DiT(config.network)
    folder = write_snapshot(tmp_path / "dit", replace(drawer, config=config, network=network))
    with pytest.raises(EvaluationError, match=r"holds a dit, which draws classes"):
        make_plan(folder)


def test_too_many_pictures_are_refused(snapshots: list[Path], tmp_path: Path) -> None:
    line = json.dumps({"prompt": "x", "include": [{"class": "one"}]})
    (tmp_path / "many.jsonl").write_text(f"{line}\n" * 20_000)
    with pytest.raises(EvaluationError, match="more than 1000000 pictures"):
        make_plan(
            snapshots[0], "evaluate.prompt_images=64", suite=f"prompts:{tmp_path / 'many.jsonl'}"
        )


@pytest.fixture
def models(tmp_path: Path) -> Models:
    return register_models(tmp_path, 2)


def test_a_version_is_found_by_number_alias_or_run(models: Models, tmp_path: Path) -> None:
    registry = models.registry
    run = registry.get("1").run_id
    assert find_version(registry, "1").number == 1
    assert find_version(registry, "champion").number == 1
    assert find_version(registry, run).number == 2, "the newest of its run"
    other = Tracker.start(models.uri, "serving", "o", "o", artifacts=tmp_path).run_id
    with pytest.raises(RegistryError, match=f"run {other} has registered no .*{run} .version 2"):
        find_version(registry, other)
    with pytest.raises(RegistryError, match="no version or alias '99'"):
        find_version(registry, "99")


def test_a_result_goes_into_its_run_and_onto_the_version_once(
    models: Models, tmp_path: Path
) -> None:
    version = models.registry.get("2")
    made = make_plan(version.fetch())
    made = replace(made, folder=tmp_path / "evaluations" / made.folder.name)
    picture = np.full((4, 4, 3), 7, np.uint8)
    row = {"id": f"{1:064x}", "prompt": "p", "seed": 1, "png": encode_png(picture)}
    write_table(tmp_path / "evaluations" / "drawings-1", "drawings/1", [[row] * 20])
    figures = {"digit_accuracy": {"value": 1 / 3, "low": 0.25, "high": 0.5}}
    document = {"suite": "digits/2", "basis": "b", "drawings": "drawings-1", "figures": figures}
    made.folder.mkdir()
    made.result_path.write_text(json.dumps(document))
    tracker = Tracker.start(models.uri, "serving", "e", "e", artifacts=tmp_path)

    record(models.registry, version, made, tracker)
    tagged = models.registry.get("2")
    assert json.loads(tagged.tags["evaluation.digits"]) == {
        "figures": {"digit_accuracy": [0.333333, 0.25, 0.5]}, "basis": "b", "run": tracker.run_id,
    }  # fmt: skip
    assert measured(tagged)["digit_accuracy"].figure == Figure(0.333333, 0.25, 0.5)
    client = MlflowClient(models.uri)
    assert client.get_run(tracker.run_id).data.metrics == {
        "digit_accuracy": 1 / 3, "digit_accuracy_low": 0.25, "digit_accuracy_high": 0.5,
    }  # fmt: skip
    names = {a.path for a in client.list_artifacts(tracker.run_id)}
    assert "evaluation.json" in names

    def list_images() -> list[str]:
        return [a.path for a in client.list_artifacts(tracker.run_id, "images")]

    images = list_images()
    assert sum("prompt_015" in name for name in images) > 0
    assert not [name for name in images if "prompt_016" in name]
    record(models.registry, tagged, made, tracker)
    assert list_images() == images


def evaluate(models: Models, root: Path, *overrides: str, suites: list[str]) -> dict[str, bytes]:
    """The bytes of each suite's result, by name."""
    recipe = make_recipe("name=digits", *overrides)
    space = Workspace.under(root, root / "scratch", models.uri)
    version = models.registry.get("2")
    found = Pipeline(recipe, space, ConsoleMonitor()).evaluate(version, suites)
    assert [e.suite for e in found] == ["prompts-five" if ":" in s else s for s in suites]
    results = (root / "evaluations").glob("*/result.json")
    return {path.parent.name: path.read_bytes() for path in results}


@pytest.mark.slow
def test_one_worker_and_two_find_the_same_and_torchmetrics_too(
    models: Models, tmp_path: Path
) -> None:
    """Pictures, judgements and all figures, to the byte; a killed driver changes nothing."""
    reference = write_reference(tmp_path / "tables")
    clip = write_clip(tmp_path / "clip")
    file = write_prompts(tmp_path / "five.jsonl")
    settings = (
        f"evaluate.reference={reference['captions'].folder.uri}", f"evaluate.clip={clip}",
        "evaluate.num_prompts=14",
    )  # fmt: skip
    suites = ["digits", f"prompts:{file}", "fidelity"]
    one_root, two_root = tmp_path / "one", tmp_path / "two"

    killed = start(
        "evaluate", "2", "--suite", "digits", "--recipe", write_recipe(tmp_path),
        "--registry", models.uri, "--root", two_root, "--set", settings[0],
        "--set", settings[1], "--set", settings[2], "--set", "evaluate.num_workers=1",
        log=tmp_path / "log",
    )  # fmt: skip
    wait_for(lambda: len([*two_root.glob("evaluations/drawings-*/_records/*.json")]) > 0, "a part")
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    (drawings,) = two_root.glob("evaluations/drawings-*")
    kept = {p: p.stat().st_mtime_ns for p in drawings.glob("*.parquet")}
    was_cut = not (drawings / "manifest.json").exists()

    with local_ray(tmp_path / "logs"):
        one = evaluate(models, one_root, *settings, "evaluate.num_workers=1", suites=suites)
        both = [suite for suite in suites if not suite.startswith("prompts:")]
        two = evaluate(models, two_root, *settings, "evaluate.num_workers=2", suites=both)
    assert was_cut, "the driver was killed too late to show anything"
    assert kept.items() <= {p: p.stat().st_mtime_ns for p in drawings.glob("*.parquet")}.items()
    assert len(one) == 3
    assert two == {name: one[name] for name in two}
    assert {name.rpartition("-")[0] for name in two} == {"digits", "fidelity"}
    for root in (one_root, two_root):
        check_against_torchmetrics(root)
    tags = models.registry.get("2").tags
    assert {k for k in tags if k.startswith("evaluation.")} == {
        "evaluation.digits", "evaluation.prompts-five", "evaluation.fidelity",
    }  # fmt: skip
    assert set(measured(models.registry.get("2"))) >= {
        "digit_accuracy", "count_accuracy", "reader_accuracy", "five_counting", "five_overall",
        "fid", "kid", "precision", "recall", "clip_score",
    }  # fmt: skip


def write_recipe(folder: Path) -> Path:
    path = folder / "digits.yaml"
    path.write_text(json.dumps(make_recipe("name=digits").model_dump(mode="json")))
    return path


def check_against_torchmetrics(root: Path) -> None:
    """FID and KID of a result are those of torchmetrics' own classes, given the same features."""
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    (result,) = root.glob("evaluations/fidelity-*/result.json")
    document = json.loads(result.read_text())
    (references,) = root.glob("evaluations/references-*")
    (judged,) = [
        table for place in root.glob("evaluations/judgements-*")
        if (table := Table.open(place)).manifest.settings["judge"] == "fidelity/1"
    ]  # fmt: skip
    given: Any = nn.Identity()
    given.num_features = 11
    fid = FrechetInceptionDistance(feature=given)
    kid = KernelInceptionDistance(feature=given, subset_size=12, subsets=1)
    for table, real in ((Table.open(references), True), (judged, False)):
        rows = [np.frombuffer(row["features"], np.float32) for row in read_rows(table)]
        features = torch.from_numpy(np.stack(rows)).double()
        assert features.shape == (12, 11)
        for batch in features.split(5):  # type: ignore[no-untyped-call]  # torch has no types there
            fid.update(batch, real=real)
            kid.update(batch, real=real)
    assert document["figures"]["fid"]["value"] == pytest.approx(float(fid.compute()), rel=1e-6)
    assert document["figures"]["kid"]["value"] == pytest.approx(float(kid.compute()[0]), rel=1e-6)


def test_an_evaluation_is_finished_when_its_result_is_there(tmp_path: Path) -> None:
    made = EvaluationPlan(tmp_path, tmp_path / "snapshot", {}, DigitsSuite(2, 0))
    finished = [made.is_finished]
    figures = {"digit_accuracy": {"value": 0.5, "low": 0.25, "high": 0.75}}
    result = {"suite": "digits/2", "basis": "b", "figures": figures, "prompts": ["x"], "notes": []}
    made.result_path.write_text(json.dumps(result))
    finished.append(made.is_finished)
    assert finished == [False, True]
    found = load(made)
    assert (found.suite, found.metrics, found.prompts) == (
        "digits",
        {"digit_accuracy": 0.5},
        ("x",),
    )


@pytest.mark.usefixtures("models")
def test_an_evaluation_that_cannot_be_made_is_one_line_and_exit_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, said in (
        (["9", "--suite", "digits"], "no version or alias '9'"),
        (["1", "--suite", "poetry"], "suite 'poetry' is not known; there are digits, crowds, fid"),
    ):
        monkeypatch.setattr("sys.argv", ["pixart", "evaluate", *arguments, "--root", str(tmp_path)])
        with pytest.raises(SystemExit) as caught:
            main()
        told = capsys.readouterr().err
        assert caught.value.code == 2
        assert told.startswith("error: ")
        assert said in told
        assert "Traceback" not in told


@pytest.mark.slow
def test_a_fault_in_a_worker_is_one_line_and_exit_2_too(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a detector answers is known where it is called, in an actor of Ray's."""
    file = write_prompts(tmp_path / "five.jsonl")
    paths = [str(Path(__file__).parent), *os.environ.get("PYTHONPATH", "").split(":")]
    monkeypatch.setenv("PYTHONPATH", ":".join(filter(None, paths)))
    done = run(
        "evaluate", "2", "--suite", f"prompts:{file}", "--recipe", write_recipe(tmp_path),
        "--registry", models.uri, "--root", tmp_path, "--set",
        "evaluate.detector=evaluations:find_nonsense",
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    told = done.stderr.splitlines()[-1]
    assert told.startswith("error: evaluate.detector = 'evaluations:find_nonsense': answered [{")
    assert told.endswith("not enough values to unpack (expected 4, got 2))")
