"""The HTTP contract: the official client's words, and an answer in OpenAI's shape to everything."""

import base64
import io
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import openai
import pytest
import uvicorn
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_serve_engine import LONG_PROMPT, eventually
from test_serve_snapshots import Gate, build_drawer
from torch import Tensor

from pixart_models.drawing import Drawer
from pixart_serve.api import build_api
from pixart_serve.engine import DrawingEngine, DrawRequest, LoadedVersion
from pixart_serve.service import EngineService
from pixart_serve.settings import ServeSettings

GENERATE = "/v1/images/generations"
SETTINGS = ServeSettings(max_rows=4, max_queued=4, max_side=64, max_steps=20, max_prompt_bytes=500)


@dataclass
class Service:
    """A real engine behind a real application, without Ray."""

    drawer: Drawer
    engine: DrawingEngine
    client: TestClient

    def generate(self, **fields: Any) -> Any:
        body = {"prompt": "a red three", "num_inference_steps": 1} | fields
        return self.client.post(GENERATE, json=body)


def build_service(live: bool = True) -> Service:
    engine = DrawingEngine(max_rows=SETTINGS.max_rows, max_queued=SETTINGS.max_queued)
    drawer = build_drawer()
    if live:
        engine.activate(LoadedVersion(7, drawer))
    api = build_api(
        EngineService(engine, "digits", "champion"), SETTINGS, default_steps=4, default_guidance=2.5
    )
    return Service(drawer, engine, TestClient(api))


@pytest.fixture
def service() -> Iterator[Service]:
    made = build_service()
    yield made
    made.engine.close()


@pytest.fixture(scope="module")
def shared() -> Iterator[Service]:
    """For tests that leave it as it was."""
    made = build_service()
    yield made
    made.engine.close()


@pytest.fixture
def address(service: Service) -> Iterator[tuple[str, int]]:
    """The same application on a loopback port, for clients that need a real socket."""
    server = uvicorn.Server(
        uvicorn.Config(service.client.app, host="127.0.0.1", port=0, log_level="error")
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    eventually(lambda: server.started)
    yield server.servers[0].sockets[0].getsockname()
    server.should_exit = True
    thread.join(10)


@pytest.fixture
def client(address: tuple[str, int]) -> Iterator[openai.OpenAI]:
    url = f"http://{address[0]}:{address[1]}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as made:
        yield made


def decode(entry: Any) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(entry["b64_json"])))


def error_of(response: Any, status: int) -> dict[str, Any]:
    """The error object, after checking all that every error has."""
    assert response.status_code == status, response.text
    assert response.headers["x-request-id"]
    assert response.json().keys() == {"error"}
    error: dict[str, Any] = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]
    return error


def test_a_picture_is_the_one_its_seed_names(shared: Service) -> None:
    response = shared.generate(seed=5, num_inference_steps=3, guidance_scale=3.0, n=2)
    assert response.status_code == 200
    answer = response.json()
    assert abs(answer["created"] - time.time()) < 60
    assert (answer["size"], answer["quality"], answer["output_format"]) == (
        "32x32",
        "medium",
        "png",
    )
    assert answer["usage"]["input_tokens"] == shared.drawer.text_encoder.count_tokens("a red three")
    assert answer["usage"]["output_tokens"] == 2 * 4 * 4
    assert [entry["seed"] for entry in answer["data"]] == [5, 6]
    for entry in answer["data"]:
        expected = shared.drawer.draw(["a red three"], [entry["seed"]], steps=3, guidance=3.0)[0]
        assert np.abs(np.asarray(decode(entry)).astype(int) - expected).max() <= 1


def test_pictures_say_what_drew_them(shared: Service) -> None:
    entry = shared.generate(seed=5).json()["data"][0]
    marks = decode(entry).text  # type: ignore[attr-defined]
    assert marks["Model"] == "digits"
    assert marks["Model-Version"] == "7"
    assert marks["Seed"] == "5"
    assert marks["Source"] == "AI-generated"
    assert entry["model_version"] == 7
    jpeg = decode(shared.generate(seed=5, output_format="jpeg").json()["data"][0])
    assert "Model-Version: 7; Seed: 5" in str(jpeg.getexif()[0x010E])


@pytest.mark.parametrize("file_format", ["png", "jpeg", "webp"])
def test_formats(shared: Service, file_format: str) -> None:
    response = shared.generate(output_format=file_format, size="48x32")
    assert response.json()["output_format"] == file_format
    picture = decode(response.json()["data"][0])
    assert picture.format == file_format.upper()
    assert picture.size == (48, 32)


def test_compression_makes_smaller_files(shared: Service) -> None:
    def num_bytes(compression: int) -> int:
        answer = shared.generate(seed=1, output_format="jpeg", output_compression=compression)
        return len(answer.json()["data"][0]["b64_json"])

    assert num_bytes(0) < num_bytes(100)


@pytest.mark.parametrize(
    ("quality", "steps", "reported"),
    [
        ("low", 2, "low"), ("auto", 4, "medium"), ("medium", 4, "medium"), (None, 4, "medium"),
        ("standard", 4, "medium"), ("high", 8, "high"), ("hd", 8, "high"),
    ],
)  # fmt: skip
def test_quality_decides_the_steps(
    service: Service, quality: str | None, steps: int, reported: str
) -> None:
    gate = Gate(service.drawer.network, permits=100)
    answer = service.generate(quality=quality, num_inference_steps=None).json()
    assert (len(gate.batches), answer["quality"]) == (steps, reported)


def test_null_means_unset(shared: Service) -> None:
    fields = ["model", "n", "size", "quality", "response_format", "output_format", "stream", "user",
              "output_compression", "seed", "negative_prompt", "guidance_scale"]  # fmt: skip
    assert shared.generate(**dict.fromkeys(fields)).status_code == 200


def test_what_the_client_always_may_send_is_accepted(shared: Service) -> None:
    response = shared.generate(
        model="digits@champion", response_format="b64_json", user="u", safety_identifier="s",
        background="opaque", moderation="low", stream=False, negative_prompt="a blue two",
    )  # fmt: skip
    assert response.status_code == 200


BAD_FIELDS: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": ""}, "prompt", "at least 1 character"),
    ({"prompt": None}, "prompt", "valid string"),
    ({"prompt": "a" * 501}, "prompt", "501 bytes; the maximum is 500"),
    ({"prompt": "three " * 60}, "prompt", "tokens; the maximum is 48"),
    ({"negative_prompt": "three " * 60}, "negative_prompt", "tokens; the maximum is 48"),
    ({"n": 0}, "n", "greater than or equal to 1"),
    ({"n": 11}, "n", "less than or equal to 10"),
    ({"n": 5}, "n", "at most 4"),
    ({"n": "2"}, "n", "valid integer"),
    ({"size": "33x32"}, "size", "multiples of 8 from 8 to 64"),
    ({"size": "72x32"}, "size", "multiples of 8 from 8 to 64"),
    ({"size": "0x32"}, "size", "'32x32'"),
    ({"size": "big"}, "size", "'auto' or WIDTHxHEIGHT"),
    ({"size": "-8x32"}, "size", "'auto' or WIDTHxHEIGHT"),
    ({"size": "\u0663\u0662x32"}, "size", "'auto' or WIDTHxHEIGHT"),
    ({"quality": "best"}, "quality", "'low', 'medium'"),
    ({"response_format": "url"}, "response_format", "'b64_json'"),
    ({"output_format": "gif"}, "output_format", "'png', 'jpeg' or 'webp'"),
    ({"output_compression": 101}, "output_compression", "less than or equal to 100"),
    ({"output_compression": 50}, "output_compression", "PNG is lossless"),
    ({"background": "transparent"}, "background", "'opaque'"),
    ({"stream": True}, "stream", "streaming is not available"),
    ({"seed": -1}, "seed", "greater than or equal to 0"),
    ({"seed": 2**63}, "seed", "less than or equal to"),
    ({"seed": 1.5}, "seed", "valid integer"),
    ({"num_inference_steps": 0}, "num_inference_steps", "greater than or equal to 1"),
    ({"num_inference_steps": 21}, "num_inference_steps", "at most 20"),
    ({"guidance_scale": -1}, "guidance_scale", "greater than or equal to 0"),
    ({"guidance_scale": 1e9}, "guidance_scale", "less than or equal to 20"),
    ({"guidance": 3}, "guidance", "did you mean 'guidance_scale'?"),
    ({"loras": []}, "loras", "known are background"),
]


@pytest.mark.parametrize(("fields", "param", "says"), BAD_FIELDS)
def test_bad_fields_are_named(
    shared: Service, fields: dict[str, Any], param: str, says: str
) -> None:
    error = error_of(shared.generate(**fields), 400)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert param in error["message"]
    assert says in error["message"]


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b'{"prompt": "\\ud800"}', b"[" * 5000,
     b'{"prompt": "x", "guidance_scale": NaN}', b'{"prompt": "x", "seed": 1' + b"0" * 5000 + b"}"],
)  # fmt: skip
def test_bad_bodies_are_refused(shared: Service, body: bytes) -> None:
    error_of(shared.client.post(GENERATE, content=body), 400)


_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30)
_VALUES = _SCALARS | st.lists(_SCALARS, max_size=3) | st.dictionaries(st.text(max_size=5), _SCALARS)
_FIELDS = ["prompt", "model", "n", "size", "quality", "response_format", "output_format", "stream",
           "output_compression", "seed", "negative_prompt", "num_inference_steps",
           "guidance_scale", "user", "background", "nonsense"]  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(fields=st.dictionaries(st.sampled_from(_FIELDS), _VALUES, min_size=1, max_size=3))
def test_no_body_makes_a_500(shared: Service, fields: dict[str, Any]) -> None:
    body = json.dumps({"prompt": "a red three", "num_inference_steps": 1} | fields)
    response = shared.client.post(GENERATE, content=body.encode())
    assert response.status_code in (200, 400, 404)
    if response.status_code != 200:
        error_of(response, response.status_code)


def test_a_large_body_is_refused_while_it_arrives(shared: Service) -> None:
    error = error_of(shared.generate(prompt="a" * 100_000), 413)
    assert "larger than 22384 bytes" in error["message"]


def test_models(shared: Service) -> None:
    listed = shared.client.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [(m["id"], m["version"], m["alias"]) for m in listed["data"]] == [
        ("digits", 7, "champion")
    ]
    for reference in ("digits", "digits@champion", "digits@7"):
        assert shared.client.get(f"/v1/models/{reference}").json() == listed["data"][0]
        assert shared.generate(model=reference).status_code == 200
    for reference in ("dall-e-3", "digits@8", "digits@", "", "Digits"):
        error = error_of(shared.generate(model=reference), 404)
        assert (error["code"], error["param"]) == ("model_not_found", "model")
        assert "digits@champion" in error["message"]
    error_of(shared.client.get("/v1/models/other/model"), 404)


def test_unknown_paths_and_methods(shared: Service) -> None:
    assert "/v1/nothing" in error_of(shared.client.get("/v1/nothing"), 404)["message"]
    response = shared.client.get(GENERATE)
    error_of(response, 405)
    assert response.headers["allow"] == "POST"


def test_a_full_queue_is_429_with_a_time_to_come_back(service: Service) -> None:
    gate = Gate(service.drawer.network)
    request = DrawRequest("a red three", 1, steps=1, guidance=2.5, width=32, height=32)
    accepted = [service.engine.submit(request)]
    eventually(lambda: gate.num_arrived == 1)
    accepted += service.engine.submit_all([request] * SETTINGS.max_queued)
    response = service.generate()
    assert error_of(response, 429)["code"] == "queue_full"
    assert 1 <= int(response.headers["retry-after"]) <= 60
    gate.allow()
    for future in accepted:
        future.result(timeout=10)
    assert service.generate().status_code == 200


def test_before_a_version_is_live_it_is_503() -> None:
    service = build_service(live=False)
    for response in (
        service.generate(),
        service.client.get("/healthz"),
        service.client.get("/v1/models"),
    ):
        assert error_of(response, 503)["code"] == "not_ready"
        assert int(response.headers["retry-after"]) >= 1
    service.engine.close()


def test_health_follows_the_engine(service: Service) -> None:
    assert service.client.get("/healthz").json() == {
        "status": "ok",
        "model": "digits",
        "version": 7,
    }
    service.engine.close()
    assert error_of(service.client.get("/healthz"), 503)["code"] == "unhealthy"


def test_a_failed_drawing_is_500_and_not_to_be_retried(service: Service) -> None:
    def fail(_: Any, args: tuple[Tensor, ...]) -> None:
        raise RuntimeError(f"secret {len(args)}")

    service.drawer.network.register_forward_pre_hook(fail)
    response = service.generate()
    error = error_of(response, 500)
    assert (error["type"], error["code"]) == ("server_error", "drawing_failed")
    assert "secret" not in error["message"]
    assert response.headers["x-should-retry"] == "false"


def test_a_fault_of_ours_is_still_answered_in_shape(service: Service) -> None:
    del service.drawer.autoencoder
    response = service.generate()
    error_of(response, 500)
    assert response.headers["x-should-retry"] == "false"


def test_request_ids_are_kept_or_made(shared: Service) -> None:
    kept = shared.client.get("/v1/models", headers={"x-request-id": "mine-1"})
    assert kept.headers["x-request-id"] == "mine-1"
    for bad in ("x" * 129, "\x80"):
        made = shared.client.get("/v1/models", headers=[(b"x-request-id", bad.encode("latin-1"))])
        assert made.headers["x-request-id"].startswith("req_")


def test_a_client_that_leaves_frees_its_rows(service: Service, address: tuple[str, int]) -> None:
    gate = Gate(service.drawer.network)
    body = json.dumps({"prompt": LONG_PROMPT, "num_inference_steps": 20, "n": 2}).encode()
    with socket.create_connection(address) as connection:
        head = f"POST {GENERATE} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        eventually(lambda: gate.num_arrived == 1)
    time.sleep(0.2)  # for the server to notice
    gate.allow()
    request = DrawRequest("a red three", 1, steps=1, guidance=2.5, width=32, height=32)
    service.engine.submit(request).result(timeout=10)
    assert len(gate.batches) <= 3, "of the 20 steps it had asked for"
    assert gate.batches[-1] == 2, "the new picture's rows alone"


def test_the_official_client_draws(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["digits"]
    answer = client.images.generate(
        prompt="a red three", model="digits", n=2, size="48x32", quality="low",
        output_format="webp", extra_body={"seed": 9, "guidance_scale": 2.0, "negative_prompt": "x"},
    )  # fmt: skip
    assert answer.usage
    assert answer.usage.total_tokens > answer.usage.output_tokens == 2 * 6 * 4
    entries = [entry.to_dict() for entry in answer.data or []]
    assert [(entry["seed"], entry["model_version"]) for entry in entries] == [(9, 7), (10, 7)]
    assert decode(entries[0]).size == (48, 32)
    assert answer._request_id


def test_the_official_client_understands_every_error(
    client: openai.OpenAI, service: Service
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.generate(prompt="a red three", size="33x33")
    assert refused.value.param == "size"
    with pytest.raises(openai.NotFoundError) as unknown:
        client.images.generate(prompt="a red three", model="gpt-image-1")
    assert unknown.value.code == "model_not_found"
    service.engine.close()
    with pytest.raises(openai.InternalServerError) as stopped:
        client.images.generate(prompt="a red three")
    assert stopped.value.status_code == 503
    assert stopped.value.request_id
