"""``pixart doctor``: quiet where all is well, and each fault planted on real servers is named."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from email.utils import formatdate
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from chaos_s3 import ChaosS3, endpoint
from mlflow_server import MlflowServer
from processes import PIXART, kill_family
from serving_load import register_models
from typer.testing import CliRunner

from pixart_cluster import machine_checks as machine
from pixart_cluster import service_checks as services
from pixart_cluster.cli import cli
from pixart_cluster.doctor import gather, make_checks
from pixart_cluster.machine_checks import Finding
from pixart_cluster.recipe import read_recipe
from pixart_cluster.server import free_port
from pixart_jobs.planner import make_plan
from pixart_platform.storage import Folder

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

Found = Iterable[Finding]
RECIPE = read_recipe("digits")


def judge(found: Found, check: str) -> Finding:
    """The worst finding of a check, which says what to do unless all is well."""
    found = [finding for finding in found if finding.check.startswith(check)]
    worst = max(found, key=lambda f: ("ok", "warning", "wrong").index(f.verdict))
    assert bool(worst.remedy) == (worst.verdict != "ok")
    return worst


def test_this_machine_is_well(tmp_path: Path) -> None:
    before = {name for name in os.environ if name.startswith("MLFLOW_")}
    done = CliRunner().invoke(cli, ["doctor", "--root", str(tmp_path), "--json"])
    after = {name for name in os.environ if name.startswith("MLFLOW_")}
    assert after == before, "what runs later in this process has its own patience"
    findings = [Finding(**finding) for finding in json.loads(done.output)]
    assert done.exit_code == 0, findings
    assert {f.check for f in findings if f.verdict == "warning"} <= {
        "shared memory", "port 8265", "port 5000", "port 8000",
    }, findings  # fmt: skip
    assert judge(findings, "gpus").verdict == "ok"
    assert judge(findings, "registry").seen == f"none in {tmp_path} yet; pixart run makes it"
    assert not list(tmp_path.iterdir()), "it leaves nothing"


def test_from_a_terminal_a_fault_is_a_line_with_its_remedy_and_exit_code_2(tmp_path: Path) -> None:
    secret = secrets.token_hex(8)
    command = [*PIXART, "doctor", "--root", str(tmp_path), "--set", "caption.num_gpus=1",
               "--registry", f"http://ada:{secret}@127.0.0.1:{free_port()}"]  # fmt: skip
    done = subprocess.run(
        ["bash", "-c", 'ulimit -n 1000; exec "$@"', "-", *command],
        capture_output=True, text=True, timeout=120, check=False,
        env=os.environ | {"MLFLOW_TRACKING_PASSWORD": secret},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    lines = done.stdout.splitlines()
    for check in ("open files", "gpus", "mlflow"):
        (at,) = (k for k, line in enumerate(lines) if line.startswith(f"wrong    {check} "))
        assert lines[at + 1].strip().startswith("-> ")
    assert "ulimit -n" in done.stdout
    assert "caption.num_gpus = 1" in done.stdout
    assert secret not in done.stdout + done.stderr


def test_a_version_out_of_range_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "ray-2.40.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ray\nVersion: 2.40.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    finding = judge(machine.check_versions(), "package")
    assert (finding.verdict, finding.check) == ("wrong", "package ray")
    assert finding.seen == "2.40.0, wanted is >=2.60"
    assert finding.remedy.startswith("pip install 'ray==2.")


def test_a_version_that_is_not_the_tested_one_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pins = tmp_path / "constraints.txt"
    pins.write_text("# ours\npyarrow==17.0.0\n")
    monkeypatch.setattr(machine, "_PINS", pins)
    finding = judge(machine.check_versions(), "package")
    assert (finding.verdict, finding.check) == ("warning", "package pyarrow")
    assert "tested is 17.0.0" in finding.seen


def test_little_shared_memory_is_named() -> None:
    found = machine.check_memory(RECIPE, make_plan(RECIPE), Path("/proc"))  # which has no bytes
    finding = judge(found, "shared memory")
    assert finding.verdict == "warning"
    assert "/proc has 0.0 GiB" in finding.seen
    assert "--shm-size=" in finding.remedy


def test_workers_that_do_not_fit_into_memory_are_named() -> None:
    many = read_recipe("digits", ["train.num_workers=32"])
    tall = many.model_copy(update={"train": many.train.model_copy(update={"num_workers": 1024})})
    finding = judge(machine.check_memory(tall, make_plan(many)), "memory")
    assert finding.verdict == "wrong"
    assert "1024 workers need" in finding.seen


@pytest.mark.parametrize(
    ("root", "settings", "told"),
    [("", ["plan.num_images=1000000000"], "the plan writes"),
     ("/proc/pixart", [], "/proc cannot be written"),
     ("file/run", [], "file cannot be written (Not a directory)")],
)  # fmt: skip
def test_a_disk_that_will_not_do_is_named(
    tmp_path: Path, root: str, settings: list[str], told: str
) -> None:
    (tmp_path / "file").touch()
    recipe = read_recipe("digits", settings)
    found = list(machine.check_disks(recipe, make_plan(recipe), tmp_path / root))
    finding = judge(found, f"disk {tmp_path / root}")
    assert finding.verdict == "wrong"
    assert told in finding.seen


def test_another_users_cache_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PIXART_CACHE", str(tmp_path / "file"))
    found = machine.check_disks(RECIPE, make_plan(RECIPE), tmp_path)
    assert judge(found, "disk PIXART_CACHE").verdict == "wrong"


def test_a_port_that_is_taken_is_named_with_who_has_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        finding = judge(machine.check_ports({"MLflow": port}), f"port {port}")
    assert finding.verdict == "warning"
    assert f"pid {os.getpid()}" in finding.seen


def test_a_check_that_hangs_or_breaks_hides_no_other() -> None:
    done = threading.Event()

    def hang() -> Iterator[Finding]:
        yield Finding("slow", "ok", "so far")
        done.wait(60)

    def fail() -> Iterator[Finding]:
        yield from dict[str, list[Finding]]()["nodes"]

    found = gather({"slow": hang, "broken": fail, "files": machine.check_files}, seconds=0.3)
    done.set()
    assert [(f.check, f.verdict) for f in found] == [
        ("slow", "ok"), ("slow", "wrong"), ("broken", "wrong"), ("open files", "ok"),
    ]  # fmt: skip
    assert "no end after" in found[1].seen
    assert "KeyError" in found[2].seen


# S3


class OddS3(ChaosS3):
    """Refuses methods, does not know conditions, or has a clock of its own."""

    def __init__(self, *refused: str, deaf: bool = False, late_seconds: float = 0.0) -> None:
        super().__init__()
        self._refused, self._deaf, self._late = refused, deaf, late_seconds

    def __call__(
        self, environ: "WSGIEnvironment", start_response: "StartResponse"
    ) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] in self._refused:
            text = b"<Error><Code>AccessDenied</Code><Message>No.</Message></Error>"
            start_response("403 Forbidden", [("Content-Length", str(len(text)))])
            return [text]
        if self._deaf:
            environ.pop("HTTP_IF_NONE_MATCH", None)

        return super().__call__(environ, start_response)

    def __enter__(self) -> "OddS3":
        super().__enter__()
        late = self._late

        class Late(self._server.RequestHandlerClass):  # type: ignore[misc, name-defined]  # a class that mypy cannot know
            def date_time_string(self, timestamp: float | None = None) -> str:
                return formatdate(time.time() - late, usegmt=True)

        self._server.RequestHandlerClass = Late
        return self


@pytest.mark.parametrize(
    ("server", "told", "remedy"),
    [(partial(OddS3, "PUT"), "put: ", "cluster/policies/pipeline.json"),
     (partial(OddS3, "DELETE"), "delete: ", "cluster/policies/pipeline.json"),
     (partial(OddS3, deaf=True), "in spite of If-None-Match", "upgrade it")],
)  # fmt: skip
def test_a_bucket_that_will_not_do_is_named(
    bucket: Folder, server: "partial[OddS3]", told: str, remedy: str
) -> None:
    with server() as odd, endpoint(odd.uri):
        finding = judge(services.check_s3(f"{bucket.uri}/tables", writes=True), bucket.uri)
    assert finding.verdict == "wrong"
    assert told in finding.seen
    assert remedy in finding.remedy


def test_a_good_bucket_is_left_as_it_was(bucket: Folder) -> None:
    found = list(services.check_s3(bucket.uri, writes=True))
    assert judge(found, "clock").verdict == "ok"
    assert judge(found, bucket.uri).seen == "list, put, get, conditional put, delete"
    assert not list(bucket.walk())


def test_a_source_is_only_read(bucket: Folder) -> None:
    with OddS3("PUT", "DELETE") as odd, endpoint(odd.uri):
        assert judge(services.check_s3(bucket.uri, writes=False), "s3").verdict == "warning"
    bucket.write("a.jpg", b"x")
    with OddS3("PUT", "DELETE") as odd, endpoint(odd.uri):
        assert judge(services.check_s3(bucket.uri, writes=False), "s3").verdict == "ok"


@pytest.mark.usefixtures("s3_endpoint")
def test_a_bucket_that_is_not_there_is_named() -> None:
    finding = judge(services.check_s3("s3://nowhere/x", writes=True), "s3://nowhere")
    assert "there is no bucket 'nowhere'" in finding.seen


def test_an_s3_that_is_away_is_named_at_once(bucket: Folder) -> None:
    with endpoint(f"http://127.0.0.1:{free_port()}"):
        finding = judge(services.check_s3(bucket.uri, writes=True), bucket.uri)
    assert "does not answer" in finding.seen
    assert "AWS_ENDPOINT_URL" in finding.remedy


@pytest.mark.parametrize(("late", "verdict"), [(60, "warning"), (1000, "wrong"), (-1000, "wrong")])
def test_a_skewed_clock_is_named(bucket: Folder, late: float, verdict: str) -> None:
    with OddS3(late_seconds=late) as odd, endpoint(odd.uri):
        finding = judge(services.check_s3(bucket.uri, writes=True), "clock")
    assert finding.verdict == verdict
    assert f" s {'ahead of' if late > 0 else 'behind'} that of {odd.uri}" in finding.seen


def test_every_s3_place_of_a_recipe_is_tried() -> None:
    places = {"data.source": "tar:s3://a/src", "data.store": "s3://b/t", "train.states": "s3://b/s",
              "train.snapshots": "s3://b/v", "serve.jobs": "s3://b/j"}  # fmt: skip
    settings = [f"{name}={place}" for name, place in places.items()]
    checks = make_checks("digits", None, settings, "", "")
    assert {name for name in checks if name.startswith("s3://")} == {
        "s3://a/src", "s3://b/t", "s3://b/s", "s3://b/v", "s3://b/j"
    }  # fmt: skip


# MLflow


def test_an_mlflow_that_is_well_away_or_another_program_is_named(tmp_path: Path) -> None:
    models = register_models(tmp_path, 1)

    def look(uri: str) -> list[Finding]:
        return list(services.check_mlflow(uri, tmp_path, "digits"))

    assert judge(look(""), "registry").seen == "digits: champion -> 1"
    with MlflowServer(tmp_path) as server:
        found = look(server.uri)
        assert "MLflow 3." in judge(found, "mlflow").seen
        assert judge(found, "registry").seen == "digits: champion -> 1"
        server.mood = "page"
        assert "is no MLflow" in judge(look(server.uri), "mlflow").seen
        server.mood = "away"
        assert "does not answer" in judge(look(server.uri), "mlflow").seen
    gone = judge(look(server.uri), "mlflow")
    assert "refused" in gone.seen
    assert "A registry that is away" in gone.remedy

    shutil.rmtree(models.registry.get("1").source)
    finding = judge(look(""), "registry")
    assert finding.verdict == "wrong"
    assert "digits version 1: " in finding.seen


# Ray


@pytest.mark.parametrize(
    ("stranger", "known", "has_token", "local", "verdict", "told"),
    [(401, 200, True, False, "ok", "asked for"),
     (401, 401, False, False, "wrong", "there is none here"),
     (401, 403, True, False, "wrong", "the token is refused"),
     (200, 200, True, False, "wrong", "CVE-2023-48022"),
     (200, 200, False, True, "warning", "CVE-2023-48022"),
     (404, 404, True, True, "wrong", "answers 404")],
)  # fmt: skip
def test_what_the_dashboard_says_to_whom(
    stranger: int, known: int, has_token: bool, local: bool, verdict: str, told: str
) -> None:
    found = services.judge_token(stranger, known, has_token=has_token, local=local)
    assert found.verdict == verdict
    assert told in found.seen


@pytest.fixture(scope="module")
def ray_head() -> Iterator[str]:
    """The dashboard's address of a Ray of one node, whose token is ``RAY_AUTH_TOKEN``."""
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as made:
        port, log = free_port(), Path(made) / "log"  # sockets below must have short paths
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        command = [
            str(Path(sys.executable).parent / "ray"), "start", "--head", "--block",
            f"--port={free_port()}", "--node-ip-address=127.0.0.1", f"--dashboard-port={port}",
            "--dashboard-agent-listen-port=0", f"--ray-client-server-port={free_port()}",
            "--num-cpus=1", "--object-store-memory=100000000", f"--temp-dir={made}",
            "--disable-usage-stats",
        ]  # fmt: skip
        with log.open("wb") as output:
            head = subprocess.Popen(
                command, stdout=output, stderr=output, start_new_session=True,
                cwd=made, env=os.environ | {"RAY_AUTH_MODE": "token", "PATH": path},
            )  # fmt: skip
        try:
            deadline = time.monotonic() + 240
            address = f"http://127.0.0.1:{port}"
            while "1 alive" not in str(list(services.check_ray(address, RECIPE, None))):
                assert head.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.5)
            yield address
        finally:
            kill_family(head.pid)  # it would drain for 30 s
            head.wait(30)


@pytest.fixture
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """How long a job takes to start decides nothing here."""
    monkeypatch.setattr(services, "_JOB_SECONDS", 400.0)


@pytest.mark.slow
@pytest.mark.usefixtures("_patient")
def test_a_cluster_is_known_by_its_token_alone(
    ray_head: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = list(services.check_ray(ray_head, RECIPE, tmp_path))
    assert {f.verdict for f in found} == {"ok"}, found
    assert judge(found, "nodes").seen == "1 alive, with 0 GPUs"
    wanting = read_recipe("digits", ["encode.num_gpus=1"])
    assert "no node has a GPU" in judge(services.check_ray(ray_head, wanting, None), "nodes").seen
    for token in ("", secrets.token_hex(32)):
        monkeypatch.setenv("RAY_AUTH_TOKEN", token)
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
        finding = judge(services.check_ray(ray_head, RECIPE, None), "ray token")
        assert finding.verdict == "wrong"
        assert "RAY_AUTH_TOKEN_PATH" in finding.remedy


@pytest.mark.slow
@pytest.mark.usefixtures("_patient")
def test_a_root_that_a_node_does_not_see_is_named(ray_head: str, tmp_path: Path) -> None:
    """``/proc/self/cwd`` is another folder for whoever works elsewhere, as the node does."""
    signed = {"Authorization": f"Bearer {services.read_token()}"}
    seen, blind = (
        judge(services._check_shared(ray_head, signed, root), "shared root")
        for root in (tmp_path, Path("/proc/self/cwd"))
    )
    assert seen.verdict == "ok", seen
    assert blind.verdict == "wrong"
    assert blind.seen.startswith("/proc/self/cwd is not seen by ")
    assert not list(tmp_path.iterdir())


def test_a_cluster_that_is_away_is_named() -> None:
    finding = judge(services.check_ray(f"127.0.0.1:{free_port()}", RECIPE, None), "ray")
    assert "does not answer" in finding.seen
