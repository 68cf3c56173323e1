"""``pixart up`` with a real Ray, and pipelines submitted to it: by name, once, gone on with."""

import json
import os
import signal
import socket
import stat
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import pytest
import yaml
from processes import MINI, PIXART, REPOSITORY, count_alive, family, start, wait_for

from pixart_cluster import stack as stacks
from pixart_cluster.server import ServerError, free_port

pytestmark = pytest.mark.slow


class Stack:
    """Everything up in a folder, and the shell of whoever sourced its environment."""

    def __init__(self, root: Path, *more: str) -> None:
        self.root = root
        self.dashboard, self.mlflow = free_port(), free_port()
        self.log = root.with_suffix(".log")
        ports = ["--port", self.mlflow, "--ray-port", free_port(), "--dashboard-port"]
        self.process = start("up", "--root", root, *map(str, ports), str(self.dashboard), *more,
                             log=self.log)  # fmt: skip
        wait_for(lambda: "Ctrl-C" in self.log.read_text() or self.process.poll() is not None, "up")
        assert self.process.poll() is None, self.log.read_text()
        lines = (root / "environment.sh").read_text().splitlines()
        pairs = (line.removeprefix("export ").partition("=") for line in lines)
        self.environment = os.environ | {name: value for name, _, value in pairs}
        rooms = ("platform", "models", "jobs", "serve", "cluster")
        self.environment["PYTHONPATH"] = ":".join(str(REPOSITORY / room) for room in rooms)
        self.environment.pop("RAY_AUTH_TOKEN", None)

    def pixart(self, *words: object, **environment: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [*PIXART, *map(str, words)], capture_output=True, text=True, timeout=300, check=False,
            env=self.environment | environment,
        )  # fmt: skip

    def status(self) -> dict[str, object]:
        told: dict[str, object] = json.loads(self.pixart("status", "mini", "--json").stdout)
        return told


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The miniature recipe with one stage of two batches, and nothing to evaluate."""
    recipe = yaml.safe_load(MINI.read_text())
    recipe["stages"] = {"pixels": recipe["stages"]["pixels"] | {"images": 32}}
    recipe["data"]["num_scenes"] = 64
    recipe["train"] |= {"num_workers": 1, "preview_prompts": []}
    recipe["evaluate"] = {"suites": []}
    path = tmp_path_factory.mktemp("recipe") / "mini.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Beside another Ray: the ports that each would choose by itself are taken."""
    with ExitStack() as others:
        for port in (10001, 52365):
            with suppress(OSError):  # then it is taken indeed
                others.enter_context(socket.create_server(("127.0.0.1", port)))
        made = Stack(tmp_path_factory.mktemp("stack") / "run")
        yield made
        if made.process.poll() is None:
            made.process.send_signal(signal.SIGTERM)
            made.process.wait(60)


def listens(stack: Stack, port: int) -> set[str]:
    """The addresses on which somebody of the stack listens at a port."""
    sockets = [c for p in family(stack.process.pid) for c in p.net_connections()]
    return {c.laddr.ip for c in sockets if c.status == psutil.CONN_LISTEN and c.laddr.port == port}


def test_only_the_owner_of_the_token_gets_in(stack: Stack) -> None:
    assert stat.S_IMODE((stack.root / "ray.token").stat().st_mode) == 0o600
    for path in ("/api/jobs/", "/nodes?view=summary"):
        with pytest.raises(urllib.error.HTTPError, match=r"40[13]"):
            urllib.request.urlopen(f"http://127.0.0.1:{stack.dashboard}{path}", timeout=20)
    for port in (stack.dashboard, stack.mlflow):  # Ray's own, between nodes, ask for the token
        assert listens(stack, port) == {"127.0.0.1"}
    wrong = stack.root / "wrong"
    wrong.write_text("0" * 64)
    done = stack.pixart("list", RAY_AUTH_TOKEN_PATH=str(wrong))
    assert (done.returncode, "refuses" in done.stderr) == (2, True), done.stderr
    assert stack.pixart("list").returncode == 0


def test_what_cannot_be_is_one_line(stack: Stack) -> None:
    for words, told in (
        (["status", "mine"], "'mine' was never submitted"),
        (["stop", "mine"], "'mine' was never submitted"),
        (["list", "--address", f"http://127.0.0.1:{free_port()}"], "cannot be asked"),
        (["list", "--address", "there"], "no cluster is named"),
        (["submit", MINI, "--runs", "here"], "not absolute"),
        (["submit", MINI, "--registry", "http://me:secret@host"], "the password would be seen"),
        (["submit", MINI, "--set", "train.nodes.role=a|b"], "is not a label"),
        (["run", MINI, "--root", stack.root / "x"], "RAY_ADDRESS=http://a"),
    ):
        done = stack.pixart(*words, **({"RAY_ADDRESS": "http://a"} if words[0] == "run" else {}))
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert told in done.stderr
        assert "secret" not in done.stderr


def test_a_run_is_submitted_once_stopped_and_gone_on_with(stack: Stack, small: Path) -> None:
    first = stack.pixart("submit", small, "--no-follow", "--ship-code")
    assert first.stdout == "pixart-mini-1: submitted\n", first.stderr
    again = stack.pixart("submit", small, "--no-follow")
    assert again.stdout == "pixart-mini-1: is under way already\n"
    other = stack.pixart("submit", small, "--set", "seed=4", "--no-follow")
    assert other.returncode == 2
    assert "under way with another recipe (pixart-mini-1)" in other.stderr
    wait_for(lambda: "ingest " in str(stack.pixart("logs", "mini").stdout), "the first job")
    stopped = stack.pixart("stop", "mini")
    assert stopped.stdout.startswith("mini: stopped after"), stopped.stderr
    assert stack.status()["state"] == "STOPPED"

    done = stack.pixart("submit", small)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "pixart-mini-2: submitted" in done.stdout
    assert "done pixels" in done.stdout
    told = stack.status()
    assert (told["state"], told["number"], told["exit_code"]) == ("SUCCEEDED", 2, 0)
    listed = stack.pixart("list")
    assert listed.stdout.startswith("mini: done after")


def test_a_typo_in_what_only_the_cluster_sees_ends_as_here(stack: Stack, small: Path) -> None:
    done = stack.pixart("submit", small, "--set", "name=lost",
                        "--set", "data.source=folder:/no/such/folder")  # fmt: skip
    assert done.returncode == 2
    assert "Traceback" not in done.stdout + done.stderr
    assert "/no/such/folder" in done.stdout
    assert "failed after" in done.stderr
    assert "exit code 2" in done.stderr


def test_down_leaves_nothing_even_if_up_was_killed(stack: Stack) -> None:
    everyone = family(stack.process.pid)
    scratch = Path(json.loads((stack.root / "up.json").read_text())["scratch"])
    assert scratch.exists()
    twice = stack.pixart("up", "--root", stack.root, "--port", str(free_port()))
    assert (twice.returncode, "is up already" in twice.stderr) == (2, True)
    os.kill(stack.process.pid, signal.SIGKILL)
    stack.process.wait()
    done = stack.pixart("down", "--root", stack.root)
    assert done.stdout == f"{stack.root}: down\n", done.stderr
    assert count_alive(everyone) == 0
    assert not scratch.exists()
    left = {path.name for path in stack.root.iterdir()}
    assert not left & {"up.json", "ray.token", "environment.sh"}
    assert {"mlflow.db", "mini"} <= left
    assert stack.pixart("down", "--root", stack.root).stdout == f"{stack.root}: nothing is up\n"


def test_down_ends_an_up_that_runs(tmp_path: Path) -> None:
    made = Stack(tmp_path / "run", "--s3", "--s3-port", str(free_port()))
    with urllib.request.urlopen(made.environment["AWS_ENDPOINT_URL"], timeout=20) as answer:
        assert b"ListAllMyBucketsResult" in answer.read()
    everyone = family(made.process.pid)
    done = made.pixart("down", "--root", made.root)
    assert done.returncode == 0, done.stderr
    assert made.process.wait(60) == 0
    assert count_alive(everyone) == 0


def test_a_ray_that_ends_is_started_again_and_told_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stacks, "_STARTS", 2)
    log = tmp_path / "ray.log"
    with (
        TemporaryDirectory() as folder,  # a socket's path is limited to 107 bytes
        socket.create_server(("127.0.0.1", 0)) as other,  # took the port after it was looked at
    ):
        ports = stacks.Ports(ray=free_port(), dashboard=other.getsockname()[1])
        with pytest.raises(ServerError, match=r"did not start .*already occupied.*ray\.log"):
            stacks._start_ray(log, ports, folder, {})
    assert log.read_text().count("Traceback") == 2
