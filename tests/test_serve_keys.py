"""API keys over real HTTP: nobody draws without one, or more than its share, and none is told."""

import logging
import secrets
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient
from starlette.websockets import WebSocketDisconnect
from test_serve_engine import ask, eventually
from test_serve_snapshots import Gate, build_drawer

from pixart_serve.api import build_api
from pixart_serve.engine import DrawingEngine, LoadedVersion
from pixart_serve.keys import ApiKeys, KeysError, make_key, require_keys
from pixart_serve.observer import Observer
from pixart_serve.service import EngineService
from pixart_serve.settings import ServeSettings
from pixart_serve.usage import Accounts, cost_of

GENERATE = "/v1/images/generations"
SETTINGS = ServeSettings(max_rows=4, max_queued=4, max_side=64, max_steps=20, max_prompt_bytes=500)
UNITS_PER_MINUTE = 600  # a guided picture of one step and 4 x 4 image tokens costs 32
BODY = {"prompt": "a red three", "num_inference_steps": 1}


class Ledger(Observer):
    """Pictures, units and refusals by key."""

    def __init__(self) -> None:
        self.pictures, self.units, self.refusals = Counter[str](), Counter[str](), Counter[str]()

    def charged(self, key: str, num_pictures: int, num_units: int) -> None:
        self.pictures[key] += num_pictures
        self.units[key] += num_units

    def refused_key(self, key: str) -> None:
        self.refusals[key] += 1


@dataclass
class Guarded:
    """A real service behind keys, with a clock that moves when told to."""

    folder: Path
    seconds: float = 0.0
    engine: DrawingEngine = field(default_factory=lambda: DrawingEngine(max_rows=4, max_queued=4))
    ledger: Ledger = field(default_factory=Ledger)

    def __post_init__(self) -> None:
        self.key, self.line = make_key("studio")
        self.other, self.other_line = make_key("batch")
        self.file.write_text(f"# who may ask\n{self.line}\n\n{self.other_line}\n")
        self.drawer = build_drawer()
        self.engine.activate(LoadedVersion(7, self.drawer))
        accounts = Accounts(UNITS_PER_MINUTE, lambda: self.seconds, self.ledger)
        service = EngineService(self.engine, "digits", "champion")
        self.app: FastAPI = build_api(service, SETTINGS, default_steps=4, default_guidance=2.5)
        require_keys(self.app, ApiKeys(self.file), accounts)
        self.client = TestClient(self.app)

    @property
    def file(self) -> Path:
        return self.folder / "keys"

    def generate(self, key: str | None = None, **fields: Any) -> Any:
        headers = {"Authorization": f"Bearer {key or self.key}"}
        return self.client.post(GENERATE, json=BODY | fields, headers=headers)


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Guarded]:
    made = Guarded(tmp_path)
    yield made
    made.engine.close()


@pytest.fixture
def base_url(guarded: Guarded) -> Iterator[str]:
    server = uvicorn.Server(uvicorn.Config(guarded.app, port=0, log_level="trace"))
    thread = threading.Thread(target=server.run)
    thread.start()
    eventually(lambda: server.started)
    host, port = server.servers[0].sockets[0].getsockname()
    yield f"http://{host}:{port}/v1"
    server.should_exit = True
    thread.join(10)


def connect(base_url: str, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=base_url, api_key=key, max_retries=0)


def test_the_official_client_draws_with_a_key_and_not_without(
    guarded: Guarded, base_url: str
) -> None:
    fields: dict[str, Any] = {"prompt": "a red three", "extra_body": {"num_inference_steps": 1}}
    with connect(base_url, guarded.key) as client:
        assert client.images.generate(**fields).data
        assert [model.id for model in client.models.list()] == ["digits"]
    with connect(base_url, make_key("studio")[0]) as client:
        with pytest.raises(openai.AuthenticationError) as refused:
            client.images.generate(**fields)
        assert refused.value.code == "invalid_api_key"
        assert refused.value.request_id
        with pytest.raises(openai.AuthenticationError):
            client.models.list()


BAD_HEADERS = [
    {}, {"Authorization": ""}, {"Authorization": "Bearer"}, {"Authorization": "Bearer "},
    {"Authorization": "Bearer nope"}, {"Authorization": "Bearer " + "k" * 5000},
    {"Authorization": "Bearer \xff"}, {"x-api-key": "KEY"}, {"Authorization": "KEY"},
    {"Authorization": "Basic KEY"}, {"Authorization": "Bearer KEYx"},
    {"Authorization": "Bearer LINE"}, {"Authorization": "Bearer HASH"},
]  # fmt: skip


@pytest.mark.parametrize("headers", BAD_HEADERS)
def test_no_route_but_liveness_and_the_page_answers_without_a_key(
    guarded: Guarded, headers: dict[str, str]
) -> None:
    told = {"KEY": guarded.key, "LINE": guarded.line, "HASH": guarded.line.split(":")[2]}
    sent = []
    for name, value in headers.items():
        for word, secret in told.items():
            value = value.replace(word, secret)  # noqa: PLW2901
        sent.append((name.encode(), value.encode("latin-1")))
    routes = [(method, getattr(route, "path", "")) for route in guarded.app.routes
              for method in getattr(route, "methods", ["GET"])]  # fmt: skip
    assert ("POST", GENERATE) in routes
    near = [("GET", path) for path in ("/nothing", "/healthz/", "//healthz", "//", "/studio")]
    for method, path in [*routes, *near]:
        response = guarded.client.request(
            method, f"http://testserver{path}", headers=sent, json=BODY
        )
        if path in ("/healthz", "/", "/studio.js", "/studio.css"):
            assert response.status_code == 200
            continue
        assert response.status_code == 401, path
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.headers["x-request-id"]
        assert method == "HEAD" or response.json()["error"].keys() == {
            "message", "type", "param", "code",
        }  # fmt: skip
    assert not guarded.ledger.units


def test_a_websocket_is_closed(guarded: Guarded) -> None:
    connecting = guarded.client.websocket_connect("/v1/models")
    with pytest.raises(WebSocketDisconnect) as closed, connecting:
        pass
    assert closed.value.code == 1008, "policy, before any route is looked for"


@pytest.mark.parametrize("scheme", ["bearer", "BEARER"])
def test_the_scheme_has_no_case(guarded: Guarded, scheme: str) -> None:
    headers = {"Authorization": f"{scheme} {guarded.key}"}
    assert guarded.client.get("/v1/models", headers=headers).status_code == 200


def test_a_deleted_line_takes_its_key_back_and_a_new_one_counts_at_once(guarded: Guarded) -> None:
    key, line = make_key("late")
    guarded.file.write_text(f"{line}\n{guarded.other_line}\n")
    assert guarded.generate(guarded.key).status_code == 401
    assert guarded.generate(key).status_code == 200
    guarded.file.write_text("# nobody any more\n")
    assert guarded.generate(key).status_code == 401


def test_a_file_that_breaks_takes_nobody_back(
    guarded: Guarded, caplog: pytest.LogCaptureFixture
) -> None:
    guarded.file.write_text(f"{guarded.other_line}\n{guarded.key}\n")
    for _ in range(2):
        assert guarded.generate().status_code == 200
    guarded.file.unlink()
    assert guarded.generate().status_code == 200
    logged = [r.message for r in caplog.records if "stay good" in r.message]
    assert len(logged) == 2
    assert "line 2 is not NAME:SALT:HASH" in logged[0]
    assert guarded.key not in logged[0]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"# none\n", "no key in it"),
        (b"studio:abc:def\n", "line 1 is not NAME:SALT:HASH"),
        (b"\n\npk-plain-key\n", "line 3 is not NAME:SALT:HASH"),
        (b"\xff\xfe", "not a text file"),
    ],
)
def test_a_file_that_cannot_be_used_stops_the_start(tmp_path: Path, text: bytes, says: str) -> None:
    (tmp_path / "keys").write_bytes(text)
    with pytest.raises(KeysError, match=says) as refused:
        ApiKeys(tmp_path / "keys")
    assert "pk-plain-key" not in str(refused.value)


def test_one_key_a_name(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"{make_key('a')[1]}\n{make_key('a')[1]}\n")
    with pytest.raises(KeysError, match="line 2 names 'a' again"):
        ApiKeys(tmp_path / "keys")


def test_made_keys_are_new_and_their_lines_do_not_hold_them() -> None:
    (key, line), (other, other_line) = make_key("a"), make_key("a")
    assert key != other
    assert not {key, key.removeprefix("pk-")} & set(line.split(":"))
    assert line.split(":")[1:] != other_line.split(":")[1:]
    with pytest.raises(KeysError, match="name = 'a:b'"):
        make_key("a:b")


def test_a_key_spends_rows_times_steps_times_tokens(guarded: Guarded) -> None:
    """600 units a minute: 512 for a picture of 16 guided steps, so 88 are left."""
    assert guarded.generate(num_inference_steps=16).status_code == 200
    assert guarded.generate(guidance_scale=1.0).status_code == 200  # 16: one row is enough
    response = guarded.generate(n=3)  # 96, and 72 are left
    assert response.status_code == 429
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert "costs 96 units" in error["message"]
    assert "72 left of 600" in error["message"]
    assert response.headers["retry-after"] == "3", "10 units flow in a second"
    refused = guarded.generate(num_inference_steps=3, stream=True)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert guarded.generate(guarded.other, n=3).status_code == 200, "another key has its own"
    guarded.seconds = 2.3
    assert guarded.generate(n=3).status_code == 429
    guarded.seconds = 2.5
    assert guarded.generate(n=3).status_code == 200
    assert guarded.generate(guidance_scale=1.0).status_code == 429, "1 unit is left"
    assert guarded.ledger.refusals == {"studio": 4}
    assert guarded.ledger.pictures == {"studio": 5, "batch": 3}
    assert guarded.ledger.units == {"studio": 512 + 16 + 96, "batch": 96}


def test_a_bucket_holds_a_minute_and_no_more(guarded: Guarded) -> None:
    assert guarded.generate().status_code == 200
    guarded.seconds = 1e6
    assert guarded.generate(num_inference_steps=18).status_code == 200  # 576
    assert guarded.generate().status_code == 429


def test_what_no_minute_pays_for_is_a_bad_request(guarded: Guarded) -> None:
    response = guarded.generate(num_inference_steps=20)  # 640
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "cost_limit_exceeded"
    assert guarded.generate(num_inference_steps=18).status_code == 200, "nothing was taken"


def test_what_the_engine_refuses_costs_nothing(guarded: Guarded) -> None:
    gate = Gate(guarded.drawer.network)
    held = [guarded.engine.submit(ask(steps=1))]
    eventually(lambda: gate.num_arrived == 1)
    held += guarded.engine.submit_all([ask(steps=1)] * 4)
    assert guarded.generate(num_inference_steps=18).json()["error"]["code"] == "queue_full"
    gate.allow()
    for future in held:
        future.result(timeout=10)
    assert not guarded.ledger.units
    assert guarded.generate(num_inference_steps=18).status_code == 200


def test_the_official_client_understands_the_limit(guarded: Guarded, base_url: str) -> None:
    fields: dict[str, Any] = {"prompt": "x", "extra_body": {"num_inference_steps": 18}}
    with connect(base_url, guarded.key) as client:
        assert client.images.generate(**fields).data
        with pytest.raises(openai.RateLimitError) as refused:
            client.images.generate(**fields)
    assert refused.value.response.headers["retry-after"] == "56"


def test_cost_counts_what_the_network_computes() -> None:
    small, wide = ask(steps=3), ask(steps=3, width=64, guidance=1.0)
    assert cost_of([small, wide], grid=8) == 2 * 3 * 16 + 1 * 3 * 32


def test_no_secret_is_in_a_log_or_an_answer(
    guarded: Guarded, base_url: str, caplog: pytest.LogCaptureFixture, capfd: Any
) -> None:
    """Good keys, bad ones, and a fault of ours while a good one is being used."""
    caplog.set_level(logging.DEBUG)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi"):
        logging.getLogger(name).addHandler(caplog.handler)
    bad, answers = f"pk-{secrets.token_urlsafe(32)}", []
    for key in (guarded.key, bad):
        headers = {"Authorization": f"Bearer {key}"}
        answers += [guarded.client.get("/v1/models", headers=headers).text]
        answers += [guarded.client.post(GENERATE, json={"prompt": 5}, headers=headers).text]
        with connect(base_url, key) as official:
            try:
                official.images.generate(prompt="x", size="33x33")
            except openai.APIStatusError as error:
                answers += [str(error), error.response.text]
    del guarded.drawer.autoencoder
    answers += [guarded.generate().text]
    printed = capfd.readouterr()
    told = "\n".join([caplog.text, printed.out, printed.err, *answers])
    assert "invalid_api_key" in told
    assert "internal error" in told
    salt, digest = guarded.line.split(":")[1:]
    for secret in (guarded.key, bad, salt, digest):
        assert secret not in told
        assert secret[3:20] not in told
