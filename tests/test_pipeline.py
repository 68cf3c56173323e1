"""The whole way in miniature, with real Ray, DeepSpeed, MLflow and Serve, and real kills."""

import base64
import io
import json
import re
import shutil
import signal
import socket
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient
from PIL import Image
from processes import (
    MINI,
    REPOSITORY,
    count_alive,
    family,
    is_orphan_of_ray,
    kill,
    run,
    start,
    train_workers,
    wait_for,
)

from pixart_cluster.recipe import read_recipe
from pixart_jobs.promote import measured
from pixart_jobs.scenes import compose_scene
from pixart_platform.manifest import verify_folder
from pixart_platform.registry import Registry
from pixart_platform.tracking import sqlite_uri

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One ``pixart demo`` in miniature, which most tests here look at."""
    root = tmp_path_factory.mktemp("demo")
    before = {p.pid for p in psutil.process_iter()}
    done = run("demo", MINI, "--root", root)
    assert done.returncode == 0, done.stdout + done.stderr
    left = [p for p in psutil.process_iter() if p.pid not in before and is_orphan_of_ray(p)]
    assert left == [], "processes were left behind"
    return root


def snapshot_of(root: Path, stage: str) -> Path:
    (folder,) = (root / "stages").glob(f"{stage}-*/snapshot")
    return folder


def states_of(root: Path, stage: str) -> list[int]:
    """Images seen of every complete state of a stage."""
    return sorted(int(p.parent.name) for p in root.glob(f"stages/{stage}-*/state/*/manifest.json"))


def logged_steps(root: Path, stage: str) -> list[int]:
    """Images seen at every logged loss of a stage, in all its attempts."""
    client = MlflowClient(sqlite_uri(root))
    experiment = client.get_experiment_by_name("mini")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id], f"tags.`mlflow.runName` = '{stage}'")
    return [m.step for m in client.get_metric_history(found.info.run_id, "loss")]


def test_demo_leaves_summary_report_and_picture(demo_root: Path) -> None:
    summary = json.loads((demo_root / "summary.json").read_text())
    assert summary["captioner_accuracy"] >= 0.95
    for key in ("digit_accuracy", "color_accuracy", "relation_accuracy"):
        assert 0 <= summary[key] <= 1
    assert summary["seconds"] > 0
    assert summary["kwh"] > 0
    assert summary["co2_kg"] > 0
    assert Image.open(summary["image"]).size == (40, 40)
    page = (demo_root / "report.html").read_text()
    links = re.findall(r"(?:src|href)='([^']*)'", page)
    assert links
    assert all(link.startswith("data:") for link in links), "the report must be self-contained"
    assert page.count("data:image/") > 10
    assert "<polyline" in page


def test_every_stage_is_registered_with_its_lineage(demo_root: Path) -> None:
    registry = Registry(sqlite_uri(demo_root), "mini")
    versions = registry.versions()
    assert [v.tags["stage"] for v in versions] == ["pixels", "align", "aesthetics"]
    assert [v.tags["parent_version"] for v in versions] == ["", "1", "2"]
    assert registry.aliases() == {"stage1": 1, "stage2": 2, "stage3": 3, "champion": 3}
    for version in versions:
        version.verify()
    assert 0 <= measured(versions[-1])["digit_accuracy"].figure.value <= 1


def test_tables_verify_and_line_up(demo_root: Path) -> None:
    ids = []
    for folder in sorted((demo_root / "tables").iterdir()):
        manifest = verify_folder(folder)
        assert manifest.counts == {"ok": 96}
        ids.append(folder)
    assert len(ids) == 6


def test_second_run_skips_everything_done(demo_root: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in demo_root.glob("[tse]*/**/*") if p.is_file()}
    done = run("run", MINI, "--root", demo_root)
    assert done.returncode == 0, done.stdout + done.stderr
    after = {p: p.stat().st_mtime_ns for p in demo_root.glob("[tse]*/**/*") if p.is_file()}
    assert after == before
    assert "done" not in done.stdout
    assert len(Registry(sqlite_uri(demo_root), "mini").versions()) == 3


def test_killed_worker_and_killed_driver_change_nothing(demo_root: Path, tmp_path: Path) -> None:
    root, log = tmp_path / "run", tmp_path / "log"
    (pixels,) = (demo_root / "stages").glob("pixels-*")  # what is done is not made again
    for made in (demo_root / "tables", pixels):
        shutil.copytree(made, root / made.relative_to(demo_root))
    written = {p: p.stat().st_mtime_ns for p in (root / "tables").rglob("*.parquet")}

    driver = start("run", MINI, "--root", root, log=log)
    wait_for(lambda: bool(states_of(root, "align")), "a state of stage 2")
    kill(train_workers(driver.pid)[0])
    assert snapshot_is_missing(root, "align"), "the kill came too late to mean anything"

    wait_for(lambda: bool(states_of(root, "aesthetics")), "a state of stage 3")
    everyone, saved = family(driver.pid), states_of(root, "aesthetics")[-1]
    kill(driver)
    assert snapshot_is_missing(root, "aesthetics"), "the kill came too late to mean anything"
    driver.wait()
    wait_for(lambda: count_alive(everyone) == 0, "Ray to follow its killed driver", timeout=120)

    done = run("run", MINI, "--root", root)
    assert done.returncode == 0, done.stdout + done.stderr + log.read_text()
    assert {p: p.stat().st_mtime_ns for p in (root / "tables").rglob("*.parquet")} == written
    steps = logged_steps(root, "aesthetics")
    assert all(steps.count(n) == 1 for n in range(32, saved + 1, 32)), "a saved step was repeated"
    for stage in ("pixels", "align", "aesthetics"):
        ours, theirs = (snapshot_of(r, stage) / "model.safetensors" for r in (root, demo_root))
        assert ours.read_bytes() == theirs.read_bytes(), f"{stage} differs"


def test_any_folder_of_images_works_and_broken_ones_are_listed(tmp_path: Path) -> None:
    folder, root = tmp_path / "pictures", tmp_path / "run"
    folder.mkdir()
    for i in range(24):
        (folder / f"a_small_scene_{i}.png").write_bytes(compose_scene(i, seed=5).png())
    whole = (folder / "a_small_scene_0.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "words.jpg").write_text("this is not an image")

    align = read_recipe(str(MINI)).stages["align"].model_dump(mode="json")
    one = json.dumps({"align": align | {"start_from": "scratch", "images": 16}})
    settings = [f"data.source=folder:{folder}", "name=mine", "train.num_workers=1"]
    asked = [*settings, f"stages={one}"]
    done = run("run", MINI, "--root", root, *(x for s in asked for x in ("--set", s)))

    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 26 rows rejected" in done.stdout
    page = (root / "report.html").read_text()
    assert "cut.png" in page
    assert "words.jpg" in page
    assert json.loads((root / "summary.json").read_text())["rejected_images"] == 2
    assert Registry(sqlite_uri(root), "mine").aliases() == {"stage1": 1}


def test_busy_port_is_one_line_before_any_work(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run("demo", MINI, "--root", tmp_path / "run", "--set", f"serve.port={port}")
    assert done.returncode == 2
    assert re.fullmatch(rf"error: port {port} .*--set serve.port=\d+\n", done.stderr)
    assert not (tmp_path / "run").exists()


def test_serving_an_unknown_alias_names_what_there_is(demo_root: Path) -> None:
    done = run("serve", MINI, "--root", demo_root, "--set", "serve.alias=nobody")
    assert done.returncode == 2
    assert "no version or alias 'nobody'" in done.stderr
    assert "champion (version 3)" in done.stderr
    assert "Traceback" not in done.stderr


def test_requests_of_the_readme_are_answered_until_a_signal(
    demo_root: Path, tmp_path: Path
) -> None:
    readme = (REPOSITORY / "README.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", readme, re.S)
    server = start("serve", MINI, "--root", demo_root, log=tmp_path / "log")
    wait_for(lambda: b"Ctrl-C" in (tmp_path / "log").read_bytes(), "the service")
    everyone = family(server.pid)

    names: dict[str, Any] = {}
    exec(block.replace("127.0.0.1:8000", "127.0.0.1:8799"), names)
    for drawn in names["picture"].data:
        picture = Image.open(io.BytesIO(base64.b64decode(drawn.b64_json)))
        assert picture.size == (40, 40)

    server.send_signal(signal.SIGTERM)
    assert server.wait(timeout=60) == 0
    assert count_alive(everyone) == 0


def snapshot_is_missing(root: Path, stage: str) -> bool:
    return not list((root / "stages").glob(f"{stage}-*/snapshot/manifest.json"))
