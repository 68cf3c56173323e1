"""Versions asked for by name: any registered one draws, few are in memory."""

import asyncio
import gc
import io
import shutil
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import uvicorn
from fastapi.testclient import TestClient
from PIL import Image
from test_serve_engine import ask, assert_drawn_as_alone, eventually
from test_serve_follower import Family, flip_one_bit
from test_serve_snapshots import Gate, build_drawer, write_snapshot

from pixart_models.snapshot import WEIGHTS_FILE
from pixart_platform.registry import Registry
from pixart_platform.tracking import Tracker, sqlite_uri
from pixart_serve.api import build_api
from pixart_serve.contract import ApiError
from pixart_serve.engine import DrawingEngine
from pixart_serve.follower import Follower
from pixart_serve.keys import make_key
from pixart_serve.replica import Replica
from pixart_serve.service import EngineService, ServedModel
from pixart_serve.settings import ServeSettings


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tracker, Registry]:
    """Versions 1 to 4, drawers of these seeds; MLflow takes seconds, so all tests share them."""
    folder = tmp_path_factory.mktemp("registry")
    tracker = Tracker.start(sqlite_uri(folder), "serve", "tests", "tests", artifacts=folder)
    registry = Registry(tracker.uri, "digits")
    for seed in (1, 2, 3, 4):
        snapshot = write_snapshot(folder / f"snapshot-{seed}", build_drawer(seed))
        registry.register(snapshot, tracker.run_id, {})
    return tracker, registry


@pytest.fixture
def family(registered: tuple[Tracker, Registry], tmp_path: Path) -> Iterator[Family]:
    """The first version is live; three fit into memory."""
    tracker, registry = registered
    engine = DrawingEngine(max_rows=4, max_queued=8)
    follower = Follower(registry, "champion", engine, max_versions=3)
    made = Family(tmp_path, tracker, registry, engine, follower)
    made.promote(registry.get("1"))
    follower.load_first()
    yield made
    follower.close()
    engine.close()


def service_of(family: Family) -> EngineService:
    return EngineService(family.engine, family.registry.name, "champion", family.follower)


def find(family: Family, tail: str) -> ServedModel:
    return asyncio.run(service_of(family).find(family.registry.name + tail))


def refusal(family: Family, tail: str) -> ApiError:
    with pytest.raises(ApiError) as refused:
        find(family, tail)
    return refused.value


@pytest.fixture
def client(family: Family) -> Iterator[openai.OpenAI]:
    """The official client of the service over HTTP."""
    settings = ServeSettings(max_rows=4, max_queued=8)
    app = build_api(service_of(family), settings, default_steps=2, default_guidance=2.5)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    eventually(lambda: server.started)
    host, port = server.servers[0].sockets[0].getsockname()
    with openai.OpenAI(base_url=f"http://{host}:{port}/v1", api_key="x", max_retries=0) as made:
        yield made
    server.should_exit = True
    thread.join(10)


def versions_drawn(client: openai.OpenAI, model: str, **extra: Any) -> list[int]:
    answer = client.images.generate(prompt="a red three", model=model, n=2, extra_body=extra)
    return [entry.to_dict()["model_version"] for entry in answer.data or []]  # type: ignore[misc]


def test_the_official_client_pins(client: openai.OpenAI) -> None:
    for model, version in (("digits@3", 3), ("digits", 1), ("digits@1", 1), ("digits@champion", 1)):
        assert versions_drawn(client, model) == [version, version]
    assert client.models.retrieve("digits@3").to_dict()["version"] == 3
    with pytest.raises(
        openai.NotFoundError, match=r"'99'; it has champion \(version 1\)"
    ) as unknown:
        versions_drawn(client, "digits@99")
    assert (unknown.value.param, unknown.value.code) == ("model", "model_not_found")


def test_a_challenger_draws_its_seeds_and_answers_say_so(family: Family) -> None:
    family.registry.set_alias("next", family.registry.get("2"))
    trial = Follower(
        family.registry, "champion", family.engine, challenger="next", challenger_share=0.5
    )
    trial.poll()
    by_challenger = [seed for seed in range(20) if trial.choose(seed)]
    assert 0 < len(by_challenger) < 20
    service = EngineService(family.engine, "digits", "champion", trial)
    app = build_api(service, ServeSettings(), default_steps=2, default_guidance=2.5)
    for seed in range(20):
        body = {"prompt": "a red three", "num_inference_steps": 1, "seed": seed}
        for model in ("digits", "digits@champion"):
            answer = TestClient(app).post("/v1/images/generations", json=body | {"model": model})
            challenged = model == "digits" and seed in by_challenger
            assert answer.json()["data"][0]["model_version"] == (2 if challenged else 1)
    trial.close()


@pytest.mark.parametrize("tail", ["@3", "@trial"])
def test_a_number_or_an_alias_draws_with_that_version(family: Family, tail: str) -> None:
    family.registry.set_alias("trial", family.registry.get("3"))
    service, request = service_of(family), ask(seed=8)
    served = find(family, tail)
    assert (served.version, served.alias, family.live) == (3, "", 1)
    [drawing] = asyncio.run(service.draw([request], served))
    assert drawing.version == 3
    assert_drawn_as_alone(drawing, build_drawer(seed=3), request)
    [drawing] = asyncio.run(service.draw([request]))
    assert drawing.version == 1
    assert_drawn_as_alone(drawing, build_drawer(seed=1), request)


def test_a_pinned_number_holds_when_the_alias_moves(family: Family) -> None:
    pinned, named = find(family, "@1"), find(family, "@champion")
    family.promote(family.registry.get("2"))
    family.follower.poll()
    service = service_of(family)
    assert [d.version for d in asyncio.run(service.draw([ask()], pinned))] == [1]
    assert [d.version for d in asyncio.run(service.draw([ask()], named))] == [2]


def test_an_alias_moved_in_the_registry_is_seen_by_the_next_poll(family: Family) -> None:
    for number in (2, 3):
        family.registry.set_alias("trial", family.registry.get(str(number)))
        family.follower.poll()
        assert find(family, "@trial").version == number


@pytest.mark.parametrize("tail", ["@99", "@nobody", "@" + "9" * 9])
def test_unknown_versions_are_404_and_say_what_there_is(family: Family, tail: str) -> None:
    error = refusal(family, tail)
    assert (error.status, error.body["error"]["code"]) == (404, "model_not_found")
    assert all(part in str(error) for part in (tail[1:], "champion (version 1)", "version 4"))


@pytest.mark.parametrize(
    "tail", ["@", "@@1", "@1@1", "@-1", "@1.0", "@\u0663", "@" + "9" * 40, "@" + "a" * 300, "x@1"]
)
def test_what_cannot_be_a_version_never_reaches_the_registry(family: Family, tail: str) -> None:
    error = refusal(family, tail)
    assert error.status == 404
    assert "champion'" in str(error)


def test_the_least_recently_used_makes_room(family: Family) -> None:
    numbers = []
    for tail in ("@2", "@3", "@2", "@4"):
        find(family, tail)
        numbers.append(family.follower.versions.numbers)
    assert numbers == [[1, 2], [1, 2, 3], [1, 3, 2], [1, 2, 4]]
    assert find(family, "@3").version == 3, "what was dropped is loaded again"


def test_what_was_dropped_leaves_memory(family: Family) -> None:
    service, served = service_of(family), find(family, "@2")
    assert served.pinned
    network = weakref.ref(served.pinned.drawer.network)
    asyncio.run(service.draw([ask()], served))
    del served
    for tail in ("@3", "@4"):
        asyncio.run(service.draw([ask()], find(family, tail)))
    gc.collect()
    assert network() is None


def test_the_version_to_go_back_to_is_never_dropped_for_a_pinned_one(family: Family) -> None:
    family.promote(family.registry.get("2"))
    family.follower.poll()
    for tail in ("@3", "@4", "@3"):
        find(family, tail)
    assert set(family.follower.versions.numbers) == {1, 2, 3}


def test_nor_for_a_new_version_that_turns_out_bad(family: Family) -> None:
    family.promote(family.registry.get("2"))
    family.follower.poll()
    find(family, "@3")
    weights = family.registry.get("4").fetch() / WEIGHTS_FILE
    flip_one_bit(weights)
    family.promote(family.registry.get("4"))
    family.follower.poll()
    flip_one_bit(weights)
    assert (family.live, family.follower.refused) == (2, 4)
    assert set(family.follower.versions.numbers) == {1, 2}


def test_a_version_that_draws_is_not_dropped(family: Family) -> None:
    async def main() -> None:
        service, name = service_of(family), family.registry.name
        served = [await service.find(f"{name}@{number}") for number in (2, 3)]
        assert served[0].pinned
        gate = Gate(served[0].pinned.drawer.network)
        drawing = [asyncio.create_task(service.draw([ask()], model)) for model in served]
        await asyncio.to_thread(eventually, lambda: gate.num_arrived == 1)
        with pytest.raises(ApiError, match=r"no room.*all 3.*serve\.max_versions") as refused:
            await service.find(f"{name}@4")
        assert refused.value.status == 503
        assert int(refused.value.headers["Retry-After"]) >= 1
        gate.allow()
        assert [[d.version for d in await task] for task in drawing] == [[2], [3]]
        assert (await service.find(f"{name}@4")).version == 4

    asyncio.run(main())


def test_many_who_ask_for_one_version_wait_for_one_load(family: Family) -> None:
    """The first of them leaves while they wait, which the others must not notice."""

    async def main() -> None:
        service, name = service_of(family), family.registry.name
        live = family.engine.live
        assert live
        gate = Gate(live.drawer.network)
        held = family.engine.submit(ask())  # the loaded version is tried out after this step
        await asyncio.to_thread(eventually, lambda: gate.num_arrived == 1)
        other = family.follower.fetch("3")  # keeps the loading thread busy
        tasks = [asyncio.create_task(service.find(f"{name}@2")) for _ in range(4)]
        await asyncio.sleep(0)
        tasks[0].cancel()
        await asyncio.sleep(0)
        gate.allow()
        found = [(await task).pinned for task in tasks[1:]]
        assert found[0] is family.follower.versions.get(2)
        assert found[0] is found[1] is found[2]
        assert (await asyncio.wrap_future(held)).version == 1
        assert other.done()

    asyncio.run(main())


def test_going_back_waits_for_nobodys_load(family: Family) -> None:
    family.promote(family.registry.get("2"))
    family.follower.poll()
    live = family.engine.live
    assert live
    gate = Gate(live.drawer.network)
    held = family.engine.submit(ask())
    eventually(lambda: gate.num_arrived == 1)
    loading = family.follower.fetch("3")  # its trial picture waits behind the gate
    eventually(family.follower._changing.locked)
    family.promote(family.registry.get("1"))
    family.follower.poll()
    assert (family.live, loading.done()) == (1, False)
    gate.allow()
    assert loading.result(timeout=10).number == 3
    assert held.result(timeout=10).version == 2


def test_a_damaged_version_is_refused_and_not_read_by_every_request(
    family: Family, caplog: pytest.LogCaptureFixture
) -> None:
    weights = family.registry.get("2").fetch() / WEIGHTS_FILE
    flip_one_bit(weights)
    for _ in range(3):
        error = refusal(family, "@2")
        assert (error.status, error.body["error"]["code"]) == (503, "version_refused")
        assert error.headers == {"x-should-retry": "false"}
        assert str(weights.parent) not in str(error)
    flip_one_bit(weights)
    assert len([r for r in caplog.records if "not the ones the manifest lists" in r.message]) == 1
    assert (family.live, family.follower.refused) == (1, None)
    assert find(family, "@3").version == 3


def lose_registry(family: Family) -> Family:
    """The same family on a copy of its registry, and a follower that knows it; then it breaks."""
    store = family.folder / "mlflow.db"
    shutil.copy(family.tracker.uri.removeprefix("sqlite:///"), store)
    registry = Registry(sqlite_uri(family.folder), family.registry.name)
    registry.set_alias("trial", registry.get("2"))
    family.follower = Follower(registry, "champion", family.engine, max_versions=3)
    family.follower.load_first()
    family.follower.poll()
    find(family, "@2")
    store.write_bytes(b"not a database " * 1000)
    return family


def test_without_a_registry_what_is_in_memory_answers(family: Family) -> None:
    lost = lose_registry(family)
    for tail, number in (("@2", 2), ("@trial", 2), ("@champion", 1), ("", 1)):
        served = find(lost, tail)
        [drawing] = asyncio.run(service_of(lost).draw([ask()], served))
        assert drawing.version == number
    for tail in ("@3", "@nobody"):
        error = refusal(lost, tail)
        assert (error.status, error.body["error"]["code"]) == (503, "version_unavailable")
        assert "the registry does not answer" in str(error)
        assert "mlflow.db" not in str(error)
        assert int(error.headers["Retry-After"]) >= 1
    lost.follower.close()


def test_too_many_unknown_names_at_once_are_asked_to_come_back(family: Family) -> None:
    live = family.engine.live
    assert live
    gate = Gate(live.drawer.network)
    held = family.engine.submit(ask())
    eventually(lambda: gate.num_arrived == 1)
    loading = family.follower.fetch("2")
    names = [family.follower.fetch(f"name-{i}") for i in range(7)]
    assert refusal(family, "@one-more").status == 503
    gate.allow()
    assert loading.result(timeout=10).number == 2
    for name in names:
        assert name.exception(timeout=10) is not None
    assert refusal(family, "@one-more").status == 404
    held.result(timeout=10)


def test_a_replica_does_what_its_settings_say(family: Family) -> None:
    """Keys, a challenger for everybody, and versions besides: all wired, without Ray."""
    key, line = make_key("studio")
    (family.folder / "keys").write_text(line)
    settings = ServeSettings(
        api_keys_file=str(family.folder / "keys"), key_units_per_minute=1_000_000,
        poll_seconds=0.05, challenger="next", challenger_share=1.0, max_rows=4, max_queued=8,
    )  # fmt: skip
    family.registry.set_alias("next", family.registry.get("2"))
    replica = Replica(settings, family.registry.uri, "digits", 2, 2.5)
    client = TestClient(replica.__serve_build_asgi_app__())

    def version_of(model: str) -> int:
        response = client.post(
            "/v1/images/generations",
            json={"prompt": "a red three", "model": model},
            headers={"Authorization": f"Bearer {key}"},
        )
        return int(response.json()["data"][0]["model_version"])

    assert client.get("/healthz").status_code == 200
    assert client.get("/v1/models").status_code == 401
    eventually(lambda: version_of("digits") == 2)
    assert [version_of(f"digits@{tail}") for tail in ("champion", "3", "next")] == [1, 3, 2]


def test_a_job_keeps_the_version_it_was_ordered_from(family: Family, tmp_path: Path) -> None:
    """Ordered while 1 was live, drawn when 2 is."""
    settings = ServeSettings(max_rows=4, max_queued=8, jobs=str(tmp_path / "jobs"))

    def build() -> TestClient:
        app = build_api(service_of(family), settings, default_steps=2, default_guidance=2.5)
        return TestClient(app)

    body = {"prompt": "a red three", "n": 3, "seed": 5}
    job = build().post("/v1/images/jobs", json=body).json()
    family.promote(family.registry.get("2"))
    family.follower.poll()
    live = family.engine.live
    assert live is not None
    assert live.number == 2
    with build() as client:
        path = f"/v1/images/jobs/{job['id']}"
        eventually(lambda: client.get(path).json()["status"] == "completed")
        assert client.get(path).json()["model_version"] == 1
        for k in range(3):
            picture: Any = Image.open(io.BytesIO(client.get(f"{path}/images/{k}").content))
            assert picture.text["Model-Version"] == "1"
            expected = build_drawer(1).draw(["a red three"], [5 + k], steps=2, guidance=2.5)[0]
            assert np.abs(np.asarray(picture).astype(int) - expected).max() <= 1
