"""The official client over a real socket: pictures, streams, every kind of error, and retries."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai
import pytest
import uvicorn
from test_serve_api import GENERATE, SETTINGS, Service, build_service, decode
from test_serve_engine import LONG_PROMPT, eventually
from test_serve_snapshots import Gate
from torch import Tensor

from pixart_serve.engine import DrawRequest

SHORT = DrawRequest("a red three", 1, steps=1, guidance=2.5, width=32, height=32)


@pytest.fixture
def service() -> Iterator[Service]:
    made = build_service()
    yield made
    made.engine.close()


@contextmanager
def listening(service: Service) -> Iterator[uvicorn.Server]:
    """The same application on a loopback port, for clients that need a real socket."""
    server = uvicorn.Server(
        uvicorn.Config(service.client.app, host="127.0.0.1", port=0, log_level="error")
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    eventually(lambda: server.started)
    try:
        yield server
    finally:
        server.should_exit = True
        thread.join(10)


def address_of(server: uvicorn.Server) -> tuple[str, int]:
    address: tuple[str, int] = server.servers[0].sockets[0].getsockname()
    return address


def connect(server: uvicorn.Server, **options: Any) -> openai.OpenAI:
    host, port = address_of(server)
    return openai.OpenAI(base_url=f"http://{host}:{port}/v1", api_key="none", **options)


@pytest.fixture
def server(service: Service) -> Iterator[uvicorn.Server]:
    with listening(service) as made:
        yield made


@pytest.fixture
def client(server: uvicorn.Server) -> Iterator[openai.OpenAI]:
    with connect(server, max_retries=0) as made:
        yield made


class Attempts:
    """Counts the requests that a client sends, and remembers how the last was answered."""

    def __init__(self) -> None:
        self.statuses: list[int] = []
        self.headers: dict[str, str] = {}
        self.http_client = openai.DefaultHttpxClient(event_hooks={"response": [self._note]})

    def _note(self, response: Any) -> None:
        self.statuses.append(response.status_code)
        self.headers = dict(response.headers)


@pytest.fixture
def attempts() -> Attempts:
    return Attempts()


@pytest.fixture
def stubborn(server: uvicorn.Server, attempts: Attempts) -> Iterator[openai.OpenAI]:
    """A client with the official client's own two retries."""
    with connect(server, http_client=attempts.http_client) as made:
        yield made


def break_step(service: Service, number: int) -> None:
    """Let the network fail at its ``number``-th evaluation from now, and at all that follow."""
    evaluations: list[int] = []

    def fail(_: Any, args: tuple[Tensor, ...]) -> None:
        evaluations.append(len(args[0]))
        if len(evaluations) >= number:
            raise RuntimeError("out of memory")

    service.drawer.network.register_forward_pre_hook(fail)


def stream(client: openai.OpenAI, **fields: Any) -> Any:
    """Its events as they come."""
    ours = {"seed", "num_inference_steps", "max_wait_seconds", "guidance_scale"} & fields.keys()
    extra = {"num_inference_steps": 4} | {name: fields.pop(name) for name in ours}
    return client.images.generate(prompt="a red three", stream=True, extra_body=extra, **fields)


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


@pytest.mark.parametrize("file_format", ["png", "jpeg", "webp"])
def test_a_stream_ends_in_the_picture_that_would_be_drawn_without(
    client: openai.OpenAI, file_format: Any
) -> None:
    asked: dict[str, Any] = {"size": "48x32", "quality": "high", "output_format": file_format}
    whole = client.images.generate(
        prompt="a red three", extra_body={"seed": 5, "num_inference_steps": 4}, **asked
    )
    assert whole.data
    for num_partials in range(4):
        *partials, last = stream(client, seed=5, partial_images=num_partials, **asked)
        assert {event.type for event in partials} <= {"image_generation.partial_image"}
        assert [event.partial_image_index for event in partials] == list(range(num_partials))
        assert last.type == "image_generation.completed"
        assert last.b64_json == whole.data[0].b64_json, "bit by bit"
        assert last.usage.to_dict() == whole.to_dict()["usage"]
        pictures = {event.b64_json for event in [*partials, last]}
        assert len(pictures) == num_partials + 1, "they differ"
        for event in [*partials, last]:
            assert (event.size, event.quality, event.background) == ("48x32", "high", "opaque")
            assert event.output_format == file_format
            assert decode(event.to_dict()).format == file_format.upper()
            assert decode(event.to_dict()).size == (48, 32)
            assert abs(event.created_at - whole.created) < 60
            assert (event.to_dict()["seed"], event.to_dict()["model_version"]) == (5, 7)


def test_a_short_drawing_has_fewer_previews(client: openai.OpenAI) -> None:
    events = list(stream(client, num_inference_steps=2, partial_images=3))
    assert [event.type.rpartition(".")[2] for event in events] == ["partial_image", "completed"]
    assert len(list(stream(client, num_inference_steps=1, partial_images=3))) == 1


def test_previews_arrive_while_the_picture_is_drawn(
    client: openai.OpenAI, service: Service
) -> None:
    gate = Gate(service.drawer.network, permits=2)
    events = stream(client, partial_images=1)
    first = next(events)
    assert first.type == "image_generation.partial_image"
    assert len(gate.batches) == 2, "of four steps"
    gate.allow()
    assert next(events).type == "image_generation.completed"


def test_a_failure_in_mid_stream_is_an_error_event_and_drawn_once(
    stubborn: openai.OpenAI, service: Service, attempts: Attempts
) -> None:
    gate = Gate(service.drawer.network, permits=2)
    break_step(service, 3)
    events = stream(stubborn, partial_images=3)
    assert [next(events).partial_image_index for _ in range(2)] == [0, 1]
    gate.allow()
    with pytest.raises(openai.APIError) as failed:
        next(events)
    assert (failed.value.type, failed.value.code) == ("server_error", "drawing_failed")
    assert "out of memory" not in failed.value.message
    assert attempts.statuses == [200]


def test_the_bytes_of_a_stream(service: Service) -> None:
    with service.client.stream(
        "POST", GENERATE, json={"prompt": "a red three", "stream": True, "num_inference_steps": 1}
    ) as response:
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert response.headers["cache-control"] == "no-cache"
        assert "content-length" not in response.headers
        assert response.headers["x-request-id"]
        text = response.read().decode()
    event, data, *rest = text.split("\n")
    assert event == "event: image_generation.completed"
    assert json.loads(data.removeprefix("data: "))["type"] == "image_generation.completed"
    assert rest == ["", ""]


def test_a_silent_stream_says_that_it_lives() -> None:
    service = build_service(settings=SETTINGS.model_copy(update={"heartbeat_seconds": 0.01}))
    gate = Gate(service.drawer.network)
    with listening(service) as server, connect(server) as client:
        with client.images.with_streaming_response.generate(
            prompt="a red three", stream=True, extra_body={"num_inference_steps": 1}
        ) as response:
            lines = response.iter_lines()
            assert [next(lines) for _ in range(4)] == [": still drawing", ""] * 2
            gate.allow()
            assert "event: image_generation.completed" in list(lines)
        assert [event.type for event in stream(client)] == ["image_generation.completed"]
    service.engine.close()


def test_a_client_that_leaves_frees_its_rows(service: Service, server: uvicorn.Server) -> None:
    gate = Gate(service.drawer.network)
    body = json.dumps({"prompt": LONG_PROMPT, "num_inference_steps": 20, "n": 2}).encode()
    with socket.create_connection(address_of(server)) as connection:
        head = f"POST {GENERATE} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        eventually(lambda: gate.num_arrived == 1)
    eventually(lambda: not server.server_state.tasks)
    gate.allow()
    request = DrawRequest("a red three", 1, steps=1, guidance=2.5, width=32, height=32)
    service.engine.submit(request).result(timeout=10)
    assert len(gate.batches) <= 3, "of the 20 steps it had asked for"
    assert gate.batches[-1] == 2, "the new picture's rows alone"


def test_leaving_a_stream_frees_its_row(
    client: openai.OpenAI, service: Service, server: uvicorn.Server
) -> None:
    gate = Gate(service.drawer.network, permits=5)
    events = stream(client, num_inference_steps=20, partial_images=3)
    assert next(events).partial_image_index == 0
    events.close()
    eventually(lambda: not server.server_state.tasks)
    gate.allow()
    service.engine.submit(SHORT).result(timeout=10)
    assert len(gate.batches) <= 7, "five, the one at the gate, and the short picture's"


def test_what_is_refused_is_refused_before_the_stream(
    client: openai.OpenAI, service: Service
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        stream(client, n=2)
    assert refused.value.param == "n"
    with pytest.raises(openai.NotFoundError):
        stream(client, model="gpt-image-2")
    gate = Gate(service.drawer.network)
    first = service.engine.submit(SHORT)
    eventually(lambda: gate.num_arrived == 1)
    waiting = service.engine.submit_all([SHORT] * SETTINGS.max_queued)
    with pytest.raises(openai.RateLimitError) as full:
        stream(client)
    assert full.value.code == "queue_full"
    gate.allow()
    for future in [first, *waiting]:
        future.result(timeout=10)


def test_a_failed_drawing_is_not_tripled(
    stubborn: openai.OpenAI, service: Service, attempts: Attempts
) -> None:
    break_step(service, 1)
    with pytest.raises(openai.InternalServerError) as failed:
        stubborn.images.generate(prompt="a red three")
    assert failed.value.code == "drawing_failed"
    assert attempts.statuses == [500]


def test_a_full_queue_is_tried_again_when_it_says(
    server: uvicorn.Server, service: Service, attempts: Attempts
) -> None:
    gate = Gate(service.drawer.network)
    accepted = [service.engine.submit(SHORT)]
    eventually(lambda: gate.num_arrived == 1)
    accepted += service.engine.submit_all([SHORT] * SETTINGS.max_queued)

    def open_when_refused() -> None:
        eventually(lambda: attempts.statuses == [429])
        gate.allow()

    threading.Thread(target=open_when_refused).start()
    with connect(server, http_client=attempts.http_client, max_retries=20) as client:
        answer = client.images.generate(prompt="a red three", extra_body={"num_inference_steps": 1})
    assert answer.data
    assert attempts.statuses[0] == 429
    assert attempts.statuses[-1] == 200


def test_what_cannot_be_ready_in_time_is_refused_at_once(
    stubborn: openai.OpenAI, service: Service, attempts: Attempts
) -> None:
    stubborn.images.generate(prompt="a red three")  # from which the pace is known
    gate = Gate(service.drawer.network, permits=1000)
    with pytest.raises(openai.RateLimitError) as late:
        stubborn.images.generate(prompt="a red three", extra_body={"max_wait_seconds": 1e-6})
    assert (late.value.code, late.value.param) == ("too_late", "max_wait_seconds")
    assert "ask for fewer steps" in late.value.message
    assert attempts.statuses == [200, 429]
    assert attempts.headers["x-should-retry"] == "false", "later is no better"
    assert gate.num_arrived == 0


@pytest.mark.parametrize("streaming", [False, True])
def test_what_is_not_ready_in_time_is_given_up(
    stubborn: openai.OpenAI, service: Service, server: uvicorn.Server, attempts: Attempts,
    streaming: bool,
) -> None:  # fmt: skip
    gate = Gate(service.drawer.network)

    def draw() -> None:
        extra = {"max_wait_seconds": 0.05, "num_inference_steps": 20}
        if streaming:
            list(stream(stubborn, **extra))
        else:
            stubborn.images.generate(prompt="a red three", extra_body=extra)

    with pytest.raises(openai.APIError) as given_up:
        draw()
    assert given_up.value.code == "timed_out"
    assert attempts.statuses == [200 if streaming else 504]
    eventually(lambda: not server.server_state.tasks)
    gate.allow()
    service.engine.submit(SHORT).result(timeout=10)
    assert len(gate.batches) <= 3
