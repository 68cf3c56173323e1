"""``pixart up``: a real MLflow on a run's folder, for this machine alone, gone with its command."""

import json
import signal
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from processes import count_alive, family, run, start, wait_for
from serving_load import register_models

from pixart_cluster.server import free_port

pytestmark = pytest.mark.slow


def ask(port: int, path: str, host: str = "") -> tuple[int, bytes]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}")
    if host:
        request.add_header("Host", host)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, b""


def test_a_run_is_shown_to_this_machine_until_ctrl_c(tmp_path: Path) -> None:
    register_models(tmp_path, 1)
    log, port = tmp_path / "log", free_port()
    up = start("up", "--no-ray", "--root", tmp_path, "--port", str(port), log=log)
    try:
        wait_for(lambda: b"Ctrl-C" in log.read_bytes() or up.poll() is not None, "MLflow")
        assert log.read_text() == f"MLflow on http://127.0.0.1:{port} - Ctrl-C to stop\n"
        everyone = family(up.pid)
        assert ask(port, "/")[0] == 200
        models = ask(port, "/api/2.0/mlflow/registered-models/get?name=digits")
        assert json.loads(models[1])["registered_model"]["name"] == "digits"
        assert ask(port, "/", host="evil.example.com")[0] == 403
        listening = {c.laddr.ip for p in everyone for c in p.net_connections() if not c.raddr}
        assert listening == {"127.0.0.1"}

        busy = run("up", "--no-ray", "--root", tmp_path, "--port", str(port))
        assert busy.returncode == 2
        assert busy.stderr.startswith(f"error: --port {port}: cannot listen on 127.0.0.1:{port} (")
        assert len(busy.stderr.splitlines()) == 1
    finally:
        up.send_signal(signal.SIGINT)
        assert up.wait(60) == 0
    assert count_alive(everyone) == 0
    with pytest.raises(urllib.error.URLError, match="refused"):
        ask(port, "/")


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    done = run("up", "--no-ray", "--root", tmp_path / "nowhere")
    assert done.returncode == 2
    assert "no run here (no mlflow.db)" in done.stderr
    assert not (tmp_path / "nowhere").exists()
