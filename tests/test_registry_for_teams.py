"""The whole way on a team's servers: MLflow as the README starts it, with users, on PostgreSQL, and
everything that counts on S3; then what goes wrong with credentials and folders of one machine."""

import base64
import io
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from chaos_s3 import make_bucket
from mlflow import MlflowClient
from mlflow.entities import Run
from openai import OpenAI
from PIL import Image
from processes import MINI, count_alive, family, run, start, wait_for
from team_server import ADMIN, TeamServer, postgres, team_mlflow

from pixart_cluster.recipe import read_recipe
from pixart_cluster.server import free_port
from pixart_cluster.service_checks import check_mlflow
from pixart_platform.errors import RegistryError
from pixart_platform.manifest import load_manifest
from pixart_platform.recipe import digest_of
from pixart_platform.registry import Registry
from pixart_platform.storage import Folder

pytestmark = pytest.mark.slow

USER, OTHER, PASSWORD = "ada", "bob", secrets.token_hex(16)
SHORT = [
    "data.num_scenes=64", "stages.pixels.images=64", "stages.align.images=128",
    "stages.aesthetics.images=64", "train.preview_every_images=64", "train.evaluate_images=16",
    "train.save_every_images=64", "train.num_workers=1", "evaluate.num_prompts=4",
]  # fmt: skip


@dataclass(frozen=True)
class Team:
    """A server that knows ``USER``, a bucket, and what may be shown to nobody."""

    server: TeamServer
    bucket: Folder
    folder: Path
    hidden: tuple[str, ...]

    @property
    def root(self) -> Path:
        return self.folder / "run"

    @property
    def settings(self) -> list[str]:
        places = {"data.store": "tables", "train.states": "states", "train.snapshots": "snapshots"}
        return [*SHORT, *(f"{key}={self.bucket.uri}/{name}" for key, name in places.items())]

    @property
    def typed(self) -> list[str]:
        return [part for setting in self.settings for part in ("--set", setting)]

    def shows_nothing(self, text: str) -> bool:
        return not any(secret in text for secret in self.hidden)


@pytest.fixture(scope="module")
def team(
    s3_endpoint: str,  # noqa: ARG001  # the server has to run
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Team]:
    """This process and those it starts speak to it as ``USER``."""
    folder, bucket = tmp_path_factory.mktemp("team"), make_bucket(f"team-{secrets.token_hex(4)}")
    with ExitStack() as stack:
        database = stack.enter_context(postgres())
        server = stack.enter_context(team_mlflow(database, f"{bucket.uri}/mlflow", folder))
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("PIXART_CACHE", str(folder / "cache"))
        sign_in(patch, ADMIN, server.admin_password)
        from mlflow.server.auth.client import AuthServiceClient

        for name in (USER, OTHER):
            AuthServiceClient(server.uri).create_user(name, PASSWORD)
        sign_in(patch, USER, PASSWORD)
        hidden = (PASSWORD, server.admin_password, database.split(":")[2].split("@")[0])
        yield Team(server, bucket, folder, hidden)


def sign_in(patch: pytest.MonkeyPatch, user: str, password: str) -> None:
    patch.setenv("MLFLOW_TRACKING_USERNAME", user)
    patch.setenv("MLFLOW_TRACKING_PASSWORD", password)


@pytest.fixture(scope="module")
def registry(team: Team) -> Registry:
    """What ``pixart run`` leaves there; its own folder loses the snapshots afterwards."""
    done = run("run", MINI, "--root", team.root, "--registry", team.server.uri, *team.typed)
    told = done.stdout + done.stderr
    assert done.returncode == 0, told
    assert team.shows_nothing(told)
    for snapshot in team.root.glob("stages/*/snapshot"):
        shutil.rmtree(snapshot)
    return Registry(team.server.uri, "mini")


def test_weights_are_on_s3_and_every_byte_is_the_registered_one(
    team: Team, registry: Registry
) -> None:
    versions = registry.versions()
    assert [v.tags["stage"] for v in versions] == ["pixels", "align", "aesthetics"]
    assert registry.aliases() == {"stage1": 1, "stage2": 2, "stage3": 3, "champion": 3}
    for version in versions:
        assert version.source.startswith(f"{team.bucket.uri}/snapshots/{version.tags['stage']}-")
        version.verify()
    proxied = [entry.name for entry in team.bucket.walk("mlflow/")]
    assert proxied, "previews go where the server keeps artifacts"
    assert not [name for name in proxied if name.endswith(".safetensors")]
    assert [e.name for e in team.bucket.walk("states/") if e.name.endswith("manifest.json")]


def test_each_job_is_a_child_of_one_run_with_the_tables_it_read(
    team: Team, registry: Registry
) -> None:
    client = MlflowClient(team.server.uri)
    experiment = client.get_experiment_by_name("mini")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    (pipeline,) = (r for r in runs if r.info.run_name == "pipeline")
    children = {r.info.run_name: r for r in runs if r is not pipeline}
    assert set(children) == {"pixels", "align", "aesthetics", "evaluate"}
    digests = table_digests(team)
    for name, child in children.items():
        assert child.info.status == "FINISHED"
        assert child.data.tags["mlflow.parentRunId"] == pipeline.info.run_id
        if name != "evaluate":
            assert child.inputs is not None
            read = {i.dataset.digest for i in child.inputs.dataset_inputs}
            assert len(read) == 3
            assert read <= digests
            assert client.get_metric_history(child.info.run_id, "loss")
    assert [v.run_id for v in registry.versions()] == [
        children[v.tags["stage"]].info.run_id for v in registry.versions()
    ]
    assert team.shows_nothing(json.dumps([shown(r) for r in runs]))


def shown(run: Run) -> dict[str, object]:
    found: dict[str, object] = run.to_dictionary()
    return found


def table_digests(team: Team) -> set[str]:
    tables = team.bucket / "tables"
    return {load_manifest(tables / name).digest for name in tables.children()}


def test_a_version_is_promoted_and_told_back_to_its_tables_and_recipe(
    team: Team, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", team.server.uri)
    done = run("promote", "2", "--to", "challenger", "--recipe", MINI, "--why", "a second look")
    assert (done.returncode, done.stdout) == (0, "mini version 2 is challenger\n"), done.stderr
    assert registry.aliases()["challenger"] == 2

    done = run("lineage", "champion", "--recipe", MINI)
    assert done.returncode == 0, done.stderr
    recipe = read_recipe(str(MINI), team.settings)
    digest = digest_of(recipe.model_dump(mode="json", exclude={"plan"}))
    for stage, number in (("aesthetics", 3), ("align", 2), ("pixels", 1)):
        assert f"mini version {number}, stage {stage}\n" in done.stdout
    assert len(re.findall(rf"recipe +{digest}\n", done.stdout)) == 3
    told = {
        line.split()[2] for line in done.stdout.splitlines()
        if line.startswith("  from ") and "parent" not in line
    }  # fmt: skip
    assert len(told) == 4, "images, text, and latents at two resolutions"
    assert told <= table_digests(team)


def test_another_user_may_look_but_not_move_an_alias(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    sign_in(monkeypatch, OTHER, PASSWORD)
    version = registry.get("stage2")
    with pytest.raises(RegistryError, match="this user may not do that"):
        registry.set_alias("champion", version)
    sign_in(monkeypatch, USER, PASSWORD)
    assert registry.aliases()["champion"] == 3


def test_a_stage_alone_starts_from_the_version_on_s3(team: Team, registry: Registry) -> None:
    """On a machine that has nothing of the run but its recipe."""
    done = run(
        "train", "aesthetics", MINI, "--root", team.folder / "elsewhere", "--registry",
        team.server.uri, *team.typed, "--set", "stages.aesthetics.images=32",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "mini version 4, from 2\n" in done.stdout
    assert registry.get("4").tags["input_parent"] == registry.get("2").digest


def test_a_service_fetches_the_version_from_s3_once_and_draws_with_it(
    team: Team, registry: Registry
) -> None:
    log, port = team.folder / "serve.log", free_port()
    server = start(
        "serve", MINI, "--root", team.folder / "service", "--registry", team.server.uri,
        "--set", f"serve.port={port}", log=log,
    )  # fmt: skip
    everyone = []
    try:
        wait_for(lambda: b"Ctrl-C" in log.read_bytes() or server.poll() is not None, "the service")
        assert server.poll() is None, log.read_text()
        everyone = family(server.pid)
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        drawn = client.images.generate(prompt="a red three", model="mini")
        assert drawn.data
        picture = Image.open(io.BytesIO(base64.b64decode(drawn.data[0].b64_json or "")))
        assert picture.size == (40, 40)
    finally:
        server.terminate()
        server.wait(60)
    assert count_alive(everyone) == 0
    champion = registry.get("champion")
    assert load_manifest(team.folder / "cache" / champion.digest).digest == champion.digest
    assert team.shows_nothing(log.read_text())


@pytest.mark.parametrize("command", ["run", "lineage"])
@pytest.mark.parametrize("password", ["", "wrong-" + "x" * 20])
def test_whoever_is_not_known_is_told_in_one_line(
    team: Team, tmp_path: Path, command: str, password: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if password:
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
    else:
        monkeypatch.delenv("MLFLOW_TRACKING_USERNAME")
        monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD")
    what: list[str | Path] = (
        ["lineage", "champion", "--recipe", MINI] if command == "lineage" else ["run", MINI]
    )
    place: list[str | Path] = ["--root", tmp_path / "run", "--registry", team.server.uri]
    done = run(*what, *place, *(team.typed if command == "run" else ()))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: the registry at {team.server.uri}: it does not know who asks; set "
        f"MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment\n"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("known", [True, False])
def test_the_doctor_tells_whether_the_server_lets_us_in(
    team: Team, tmp_path: Path, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not known:
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong-" + "x" * 20)
    found = list(check_mlflow(team.server.uri, tmp_path, "mini"))
    assert team.shows_nothing(str(found))
    verdicts = {finding.check: finding.verdict for finding in found}
    if known:
        assert verdicts == {"clock": "ok", "mlflow": "ok", "registry": "ok"}
    else:
        assert verdicts == {"clock": "ok", "mlflow": "wrong"}
        assert "MLFLOW_TRACKING_PASSWORD" in found[-1].remedy


def test_a_folder_of_one_machine_is_refused_before_any_work(team: Team, tmp_path: Path) -> None:
    done = run("run", MINI, "--root", tmp_path / "run", "--registry", team.server.uri)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "registers no folder of one machine; set train.snapshots = s3://" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("registry")
def test_no_secret_is_left_in_what_was_written(team: Team) -> None:
    for path in team.root.rglob("*"):
        if path.is_file():
            assert team.shows_nothing(path.read_bytes().decode("latin-1")), path
    for entry in team.bucket.walk():
        assert team.shows_nothing(team.bucket.read(entry.name).decode("latin-1")), entry.name
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == PASSWORD
