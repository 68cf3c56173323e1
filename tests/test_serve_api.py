"""The HTTP contract: the official client's words, and an answer in OpenAI's shape to everything."""

import base64
import io
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_serve_engine import eventually
from test_serve_snapshots import Gate, build_drawer
from torch import Tensor

from pixart_models.drawing import Drawer
from pixart_serve.api import build_api
from pixart_serve.contract import encode_picture
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


def build_service(live: bool = True, settings: ServeSettings = SETTINGS) -> Service:
    engine = DrawingEngine(max_rows=settings.max_rows, max_queued=settings.max_queued)
    drawer = build_drawer()
    if live:
        engine.activate(LoadedVersion(7, drawer))
    api = build_api(
        EngineService(engine, "digits", "champion"), settings, default_steps=4, default_guidance=2.5
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


def test_guidance_keeps_to_its_interval(shared: Service) -> None:
    fields = {"seed": 5, "num_inference_steps": 4, "guidance_scale": 7.0}
    drawn = {}
    for interval in ((0.0, 1000.0), (300.0, 800.0)):
        answer = shared.generate(**fields, guidance_interval=interval).json()
        drawn[interval] = np.asarray(decode(answer["data"][0])).astype(int)
        expected = shared.drawer.draw(
            ["a red three"], [5], steps=4, guidance=7.0, guidance_interval=interval
        )[0]
        assert np.abs(drawn[interval] - expected).max() <= 1
    assert np.abs(drawn[0.0, 1000.0] - drawn[300.0, 800.0]).max() > 1


def test_guidance_is_rescaled_as_asked_or_as_is_usual_here() -> None:
    engine, drawer = DrawingEngine(max_rows=8, max_queued=16), build_drawer()
    engine.activate(LoadedVersion(7, drawer))
    app = build_api(
        EngineService(engine, "digits", "champion"), SETTINGS, default_steps=4,
        default_guidance=7.0, default_guidance_rescale=0.7,
    )  # fmt: skip
    with TestClient(app) as client:
        for asked, share in (({}, 0.7), ({"guidance_rescale": 0}, 0.0)):
            body = {"prompt": "a red three", "seed": 5} | asked
            entry = client.post(GENERATE, json=body).json()["data"][0]
            expected = drawer.draw(
                ["a red three"], [5], steps=4, guidance=7.0, guidance_rescale=share
            )[0]
            assert np.abs(np.asarray(decode(entry)).astype(int) - expected).max() <= 1
    engine.close()


def test_pictures_say_what_drew_them(shared: Service) -> None:
    entry = shared.generate(seed=5).json()["data"][0]
    marks = decode(entry).text  # type: ignore[attr-defined]
    assert marks["Model"] == "digits"
    assert marks["Model-Version"] == "7"
    assert marks["Seed"] == "5"
    assert marks["Source"] == "AI-generated"
    assert entry["model_version"] == 7
    packet = marks.pop("XML:com.adobe.xmp")
    for file_format in ("jpeg", "webp"):
        other = decode(shared.generate(seed=5, output_format=file_format).json()["data"][0])
        exif = other.getexif()
        assert exif[0x0131] == marks["Software"] == "pixart-ray"
        assert dict(line.split(": ", 1) for line in str(exif[0x010E]).split("; ")) == marks
        assert other.info["xmp"].decode() == packet


@pytest.mark.parametrize("file_format", ["png", "jpeg", "webp"])
def test_machines_read_that_a_model_drew_it(shared: Service, file_format: str) -> None:
    entry = shared.generate(output_format=file_format).json()["data"][0]
    described = ElementTree.fromstring(decode(entry).info["xmp"])[0][0]
    assert described.tag == "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description"
    iptc = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}"
    assert described.attrib[f"{iptc}DigitalSourceType"] == (
        "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
    )
    assert described.attrib[f"{iptc}AISystemUsed"] == "digits"
    assert described.attrib[f"{iptc}AISystemVersionUsed"] == "7"


def test_a_name_of_any_kind_is_a_name_in_the_marks() -> None:
    marks = {"Software": "pixart-ray", "Model": "d<i>&\"'s", "Model-Version": "7", "Seed": "5"}
    file = encode_picture(np.zeros((8, 8, 3), np.uint8), "webp", 90, marks)
    described = ElementTree.fromstring(Image.open(io.BytesIO(file)).info["xmp"])[0][0]
    assert marks["Model"] in described.attrib.values()


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
        ("standard", 4, "medium"), ("high", 8, "high"), ("hd", 8, "high"), ("xhigh", 12, "xhigh"),
        ("max", 16, "max"),
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
              "output_compression", "seed", "negative_prompt", "guidance_scale", "partial_images",
              "guidance_interval", "guidance_rescale", "max_wait_seconds"]  # fmt: skip
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
    ({"stream": "yes"}, "stream", "valid boolean"),
    ({"stream": True, "n": 2}, "n", "a stream is of one picture"),
    ({"stream": True, "partial_images": 4}, "partial_images", "less than or equal to 3"),
    ({"partial_images": 2}, "partial_images", "previews need stream = true"),
    ({"guidance_interval": [0.7, 0.2]}, "guidance_interval", "low <= high"),
    ({"guidance_interval": [0, 1001]}, "guidance_interval", "less than or equal to 1000"),
    ({"guidance_interval": [-1, 5]}, "guidance_interval", "greater than or equal to 0"),
    ({"guidance_interval": [1]}, "guidance_interval", "required"),
    ({"guidance_rescale": 1.1}, "guidance_rescale", "less than or equal to 1"),
    ({"max_wait_seconds": 0}, "max_wait_seconds", "greater than 0"),
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
           "guidance_scale", "user", "background", "partial_images", "guidance_interval",
           "guidance_rescale", "max_wait_seconds", "nonsense"]  # fmt: skip


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
