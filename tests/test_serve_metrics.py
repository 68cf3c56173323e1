"""What the service tells of itself: the engine an observer, Ray Prometheus, the log its readers."""

import json
import logging
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import wait
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import ray
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from test_serve_engine import ask, eventually
from test_serve_snapshots import Gate, build_drawer

from pixart_cluster.local import local_ray
from pixart_serve.access import logged, note
from pixart_serve.api import build_api
from pixart_serve.engine import Drawing, DrawingEngine, LoadedVersion
from pixart_serve.keys import ApiKeys, make_key, require_keys
from pixart_serve.metrics import METERS, ReplicaMetrics
from pixart_serve.observer import Observer
from pixart_serve.service import EngineService
from pixart_serve.settings import ServeSettings
from pixart_serve.usage import Accounts

GENERATE = "/v1/images/generations"
BODY = {"prompt": "a red three", "num_inference_steps": 2, "size": "32x32", "seed": 7}
EVENTS = [name for name in vars(Observer) if not name.startswith("_")]


class Notebook(Observer):
    """Writes down all that it is told, as (event, arguments)."""

    def __init__(self) -> None:
        self.notes: list[tuple[str, tuple[Any, ...]]] = []

    def told(self, event: str) -> list[Any]:
        """The arguments of each telling; one alone without its tuple."""
        found = [arguments for name, arguments in self.notes if name == event]
        return [arguments[0] if len(arguments) == 1 else arguments for arguments in found]


def _writer(event: str) -> Any:
    def write(self: Notebook, *arguments: Any, **named: Any) -> None:
        self.notes.append((event, (*arguments, *named.values())))

    return write


for _event in EVENTS:
    setattr(Notebook, _event, _writer(_event))


@pytest.fixture
def notebook() -> Notebook:
    return Notebook()


@pytest.fixture
def engine(notebook: Notebook) -> Iterator[DrawingEngine]:
    made = DrawingEngine(max_rows=4, max_queued=4, observer=notebook)
    made.activate(LoadedVersion(1, build_drawer()))
    yield made
    made.close()


def test_the_engine_tells_what_it_does(engine: DrawingEngine, notebook: Notebook) -> None:
    requests = [ask(num_previews=1), ask(seed=2, guidance=1.0, width=48)]
    shown: list[Drawing] = []
    wait(engine.submit_all(requests, on_preview=shown.append), timeout=10)
    assert all(drawing.version == 1 for drawing in shown)
    engine.activate(LoadedVersion(2, build_drawer(seed=2)))
    engine.submit(ask()).result(timeout=10)
    eventually(lambda: len(notebook.told("drawn")) == 3 and len(notebook.told("decoded")) == 4)
    assert notebook.told("activated") == [(1, False), (2, True)]
    assert len(notebook.told("waited")) == 3
    assert len(notebook.told("encoded_text")) == 1, "the second time it was in memory"
    steps = [told[:3] for told in notebook.told("stepped")]
    assert steps.count((32, 32, 2)) == 6
    assert steps.count((48, 32, 1)) == 3
    assert [kind for kind, _ in notebook.told("decoded")] == ["preview"] + 3 * ["picture"]
    assert len(notebook.told("previewed")) == 1
    assert [version for version, _ in notebook.told("drawn")] == [1, 1, 2]
    assert all(0 <= told[-1] < 60 for told in notebook.told("stepped") + notebook.told("drawn"))


def test_waiting_lasts_from_being_accepted_to_the_first_turn(
    engine: DrawingEngine, notebook: Notebook
) -> None:
    assert engine.live
    gate = Gate(engine.live.drawer.network)
    ahead = [engine.submit(ask(seed=i, steps=1)) for i in range(2)]
    eventually(lambda: gate.num_arrived == 1)
    last = engine.submit(ask(seed=3, steps=1))
    accepted = time.monotonic()
    eventually(lambda: time.monotonic() > accepted + 0.05)
    gate.allow()
    wait([*ahead, last], timeout=10)
    assert notebook.told("waited")[-1] >= 0.05
    eventually(lambda: len(notebook.told("drawn")) == 3)
    assert notebook.told("drawn")[-1][1] >= notebook.told("waited")[-1]


def test_pictures_that_were_not_drawn_are_told_of_once(
    engine: DrawingEngine, notebook: Notebook
) -> None:
    assert engine.live
    gate = Gate(engine.live.drawer.network)
    drawn, dropped = engine.submit(ask()), engine.submit(ask(width=64))
    dropped.cancel()
    [bad] = engine.submit_all([ask(width=13)])  # 13 pixels are no whole number of latents
    gate.allow()
    wait([drawn, dropped, bad], timeout=10)
    eventually(lambda: len(notebook.told("drawn")) == len(notebook.told("failed")) == 1)
    engine.close()
    assert [len(notebook.told(end)) for end in ("drawn", "cancelled", "failed")] == [1, 1, 1]


def test_a_trial_of_a_version_is_no_picture_of_anybodys(
    engine: DrawingEngine, notebook: Notebook
) -> None:
    engine.try_out(LoadedVersion(2, build_drawer(seed=2)), ask()).result(timeout=10)
    engine.close()
    assert notebook.told("stepped")
    assert notebook.told("drawn") == []


# --- Prometheus ------------------------------------------------------------------------------


def tell_everything(metrics: ReplicaMetrics) -> None:
    """Each event, and more sizes, routes, reasons and keys than labels have values for."""
    metrics.waited(0.1)
    metrics.encoded_text(0.1)
    metrics.decoded("preview", 0.1)
    metrics.previewed(0.1)
    metrics.drawn(3, 0.1)
    metrics.cancelled()
    metrics.failed()
    metrics.activated(3, swapped=True)
    metrics.expect(1.5)
    metrics.encoded_picture("png", 0.1)
    metrics.refused_key("key-0")
    for i in range(1000):
        metrics.stepped(8 * i, 32, i % 32 + 1, 0.01)
        metrics.answered(f"/route-{i}", 400, f"reason-{i}", 0.1)
        metrics.charged(f"key-{i}", 2, 64)


@pytest.mark.slow
def test_ray_exports_exactly_what_the_table_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # for the worker
    with local_ray(tmp_path):
        actor: Any = ray.remote(ReplicaMetrics)
        teller = actor.remote()
        ray.get(teller.__ray_call__.remote(tell_everything))
        [node] = ray.nodes()  # type: ignore[no-untyped-call]  # Ray has types in parts
        port = node["MetricsExportPort"]

        def scrape() -> dict[str, Any]:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as reply:
                families = text_string_to_metric_families(reply.read().decode())
            return {f.name: f for f in families if f.name.startswith("ray_pixart_")}

        deadline = time.monotonic() + 60
        while len(scrape()) < len(METERS) and time.monotonic() < deadline:
            time.sleep(1)
        found = scrape()
    exported = {
        (name.removeprefix("ray_") + "_total" * (family.type == "counter"), family.type)
        for name, family in found.items()
    }
    assert exported == {(meter.name, meter.kind) for meter in METERS}
    for meter in METERS:
        family = found["ray_" + meter.name.removesuffix("_total")]
        assert family.documentation == meter.meaning
        labels = [sample.labels for sample in family.samples]
        for label in meter.labels:
            values = {some[label] for some in labels}
            most = {"size": 17, "key": 501}.get(label, 51)
            assert 1 <= len(values) <= most, (meter.name, label)
            assert (len(values) == most) == ("other" in values), (meter.name, label)
        bounds = {float(some["le"]) for some in labels if "le" in some} - {float("inf")}
        assert bounds == set(meter.bounds)
    samples = found["ray_pixart_key_pictures"].samples
    [rest] = [s.value for s in samples if s.labels["key"] == "other"]
    assert rest == 2 * (1000 - 500), "keys without a count of their own are counted all the same"


def test_the_table_names_units_as_prometheus_wants() -> None:
    assert len({meter.name for meter in METERS}) == len(METERS)
    for meter in METERS:
        assert meter.name.startswith("pixart_")
        assert (meter.kind == "counter") == meter.name.endswith("_total")
        assert (meter.kind == "histogram") == bool(meter.bounds)


# --- the access log --------------------------------------------------------------------------


class Served:
    """The API over an engine, its lines and what it tells."""

    def __init__(
        self, engine: DrawingEngine, notebook: Notebook, caplog: Any, **settings: Any
    ) -> None:
        caplog.set_level(logging.INFO, "pixart_serve.access")
        self._caplog = caplog
        self.app = build_api(
            EngineService(engine, "digits", "champion"), ServeSettings(max_queued=4, **settings),
            default_steps=4, default_guidance=2.5, observer=notebook,
        )  # fmt: skip
        self.client = TestClient(self.app)

    def lines(self) -> list[dict[str, Any]]:
        records = [r for r in self._caplog.records if r.name == "pixart_serve.access"]
        return [json.loads(record.getMessage()) for record in records]


def test_each_request_is_a_line_without_its_prompt(
    engine: DrawingEngine, notebook: Notebook, caplog: pytest.LogCaptureFixture
) -> None:
    served = Served(engine, notebook, caplog)
    answer = served.client.post(GENERATE, json=BODY | {"n": 2, "negative_prompt": "a blue two"})
    [line] = served.lines()
    assert 0 < line.pop("seconds") < 60
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "request_id": answer.headers["x-request-id"], "method": "POST", "route": GENERATE,
        "status": 200, "size": "32x32", "steps": 2, "n": 2, "version": 1,
        "units": 2 * 2 * 2 * 16,
    }  # fmt: skip
    assert [told[:3] for told in notebook.told("answered")] == [(GENERATE, 200, "")]
    assert [name for name, _ in notebook.told("encoded_picture")] == ["png", "png"]


def test_prompts_are_logged_where_that_is_wanted(
    engine: DrawingEngine, notebook: Notebook, caplog: pytest.LogCaptureFixture
) -> None:
    served = Served(engine, notebook, caplog, log_prompts=True)
    served.client.post(GENERATE, json=BODY)
    assert served.lines()[0]["prompt"] == "a red three"


@pytest.mark.parametrize(
    ("path", "body", "status", "reason"),
    [
        (GENERATE, BODY | {"steps": 3}, 400, "bad_request"),
        (GENERATE, BODY | {"prompt": "a red three " * 40}, 400, "prompt_too_long"),
        (GENERATE, BODY | {"model": "other"}, 404, "model_not_found"),
        (GENERATE, BODY | {"user": "x" * 100_000}, 413, "too_large"),
        (GENERATE, BODY | {"n": 5}, 400, "bad_request"),
        ("/v1/models", {}, 405, "bad_method"),
        ("/a-secret-somebody-typed", {}, 404, "not_found"),
    ],
)
def test_a_refusal_has_a_reason(
    engine: DrawingEngine, notebook: Notebook, caplog: pytest.LogCaptureFixture,
    path: str, body: dict[str, Any], status: int, reason: str,
) -> None:  # fmt: skip
    served = Served(engine, notebook, caplog)
    assert served.client.post(path, json=body).status_code == status
    [line] = served.lines()
    assert (line["status"], line["reason"]) == (status, reason)
    assert line["route"] == (path if path != "/a-secret-somebody-typed" else "other")
    assert "secret" not in json.dumps(line)
    assert [told[1:3] for told in notebook.told("answered")] == [(status, reason)]


def test_a_full_queue_and_a_lost_stream_have_reasons_too(
    engine: DrawingEngine, notebook: Notebook, caplog: pytest.LogCaptureFixture
) -> None:
    served = Served(engine, notebook, caplog)
    assert engine.live
    gate = Gate(engine.live.drawer.network)
    held = engine.submit(ask())
    eventually(lambda: gate.num_arrived == 1)
    held_too = engine.submit_all([ask(seed=i) for i in range(4)])
    served.client.post(GENERATE, json=BODY)
    gate.allow()
    wait([held, *held_too], timeout=10)

    engine.live.drawer.network.register_forward_pre_hook(lambda *_: 1 / 0)
    answer = served.client.post(GENERATE, json=BODY | {"stream": True})
    assert "drawing_failed" in answer.text
    lines = served.lines()
    assert [(line["status"], line["reason"]) for line in lines] == [
        (429, "queue_full"), (200, "drawing_failed"),
    ]  # fmt: skip


def test_keys_are_named_and_what_they_use_is_told(
    engine: DrawingEngine, notebook: Notebook, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    served = Served(engine, notebook, caplog)
    key, line = make_key("studio")
    (tmp_path / "keys").write_text(line)
    accounts = Accounts(100, lambda: 0.0, notebook)
    require_keys(served.app, ApiKeys(tmp_path / "keys"), accounts)
    headers = {"Authorization": f"Bearer {key}"}
    for _ in range(2):
        served.client.post(GENERATE, json=BODY, headers=headers)
    served.client.post(GENERATE, json=BODY, headers={"Authorization": "Bearer guess"})
    assert [(line.get("key"), line["status"], line.get("reason")) for line in served.lines()] == [
        ("studio", 200, None), ("studio", 429, "rate_limit_exceeded"),
        (None, 401, "invalid_api_key"),
    ]  # fmt: skip
    assert notebook.told("charged") == [("studio", 1, 64)]
    assert notebook.told("refused_key") == ["studio"]
    assert key not in caplog.text
    assert "guess" not in caplog.text


def test_a_request_that_ends_without_an_answer_is_logged(
    caplog: pytest.LogCaptureFixture, notebook: Notebook
) -> None:
    caplog.set_level(logging.INFO, "pixart_serve.access")
    with suppress(KeyboardInterrupt), logged({"type": "http"}, "req_1", notebook):
        note(key="studio")
        raise KeyboardInterrupt
    note(key="nobody's: there is no request")
    assert notebook.told("answered")[0][:3] == ("other", 499, "")
    line = json.loads(caplog.messages[0])
    assert (line["key"], line["status"]) == ("studio", 499)
