"""Drawing jobs, on a folder and on S3: they outlive replicas, and nothing is drawn differently."""

import base64
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chaos_s3 import ChaosS3, endpoint
from fastapi.testclient import TestClient
from numpy.typing import NDArray
from processes import REPOSITORY
from test_serve_api import GENERATE, decode, error_of
from test_serve_engine import ask
from test_serve_keys import Ledger
from test_serve_snapshots import Gate, build_drawer

from pixart_models.drawing import Drawer
from pixart_platform.errors import StorageError
from pixart_platform.storage import Folder, LocalFolder
from pixart_serve.api import build_api
from pixart_serve.engine import DrawingEngine, LoadedVersion
from pixart_serve.job_store import PART_PICTURES, Entry, Fault, JobStore, Lease, owner_of
from pixart_serve.jobs import JOBS
from pixart_serve.keys import ApiKeys, make_key, require_keys
from pixart_serve.observer import Observer
from pixart_serve.service import EngineService
from pixart_serve.settings import ServeSettings
from pixart_serve.usage import Accounts

NEVER, SOON = 3600.0, 0.4  # seconds of leases: others go on when it is released, or void
ENDED = {"completed", "failed", "cancelled"}
BODY: dict[str, Any] = {"prompt": "a red three", "num_inference_steps": 1, "seed": 5}


def until(condition: Callable[[], bool]) -> None:
    """Wait for what must come; a bucket on a busy machine takes its time."""
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.1)


class Count(Observer):
    """How many pictures were drawn, and dropped."""

    def __init__(self) -> None:
        self.num_drawn = self.num_cancelled = 0

    def cancelled(self) -> None:
        self.num_cancelled += 1

    def drawn(self, version: int, seconds: float) -> None:
        self.num_drawn += 1


@dataclass
class Replica:
    """A real service, as a replica runs it; it draws jobs between ``open`` and ``close``."""

    place: str
    changes: dict[str, Any] = field(default_factory=dict)
    keys: ApiKeys | None = None
    seconds: float = 0.0
    ledger: Ledger = field(default_factory=Ledger)

    def __post_init__(self) -> None:
        limits = {"max_rows": 4, "max_queued": 8, "max_side": 64, "max_steps": 20}
        settings = ServeSettings(
            **({"jobs": self.place, "job_lease_seconds": NEVER, **limits} | self.changes)
        )
        self.count = Count()
        self.engine = DrawingEngine(
            max_rows=settings.max_rows, max_queued=settings.max_queued, observer=self.count
        )
        self.drawer = build_drawer()
        self.engine.activate(LoadedVersion(7, self.drawer))
        self.accounts = Accounts(settings.key_units_per_minute, lambda: self.seconds, self.ledger)
        app = build_api(
            EngineService(self.engine, "digits", "champion"), settings,
            default_steps=4, default_guidance=2.5,
            accounts=self.accounts, knows_key=self.keys.knows if self.keys else None,
        )  # fmt: skip
        if self.keys:
            require_keys(app, self.keys, self.accounts)
        self.client = TestClient(app)
        self._up = ExitStack()

    def open(self) -> "Replica":
        self._up.enter_context(self.client)
        return self

    def leave(self) -> None:
        """Draw no more jobs."""
        self._up.close()

    def close(self) -> None:
        self.leave()
        self.engine.close()

    def ask(self, method: str, path: str, key: str | None = None, **options: Any) -> Any:
        headers = options.pop("headers", {})
        if key is not None:
            headers |= {"Authorization": f"Bearer {key}"}
        return self.client.request(method, path, headers=headers, **options)

    def create(self, key: str | None = None, name: str | None = None, **fields: Any) -> Any:
        """A job; ``name`` is its Idempotency-Key."""
        headers = {} if name is None else {"Idempotency-Key": name}
        return self.ask("POST", JOBS, key, json=BODY | fields, headers=headers)

    def get(self, job: Any, path: str = "", key: str | None = None) -> Any:
        return self.ask("GET", f"{JOBS}/{job['id']}{path}", key)

    def finish(self, job: Any, key: str | None = None) -> Any:
        """The job once it has ended."""
        until(lambda: self.get(job, key=key).json()["status"] in ENDED)
        return self.get(job, key=key).json()

    def files(self, job: Any, key: str | None = None) -> list[bytes]:
        answers = [self.get(job, f"/images/{k}", key) for k in range(job["num_pictures"])]
        assert {answer.status_code for answer in answers} == {200}
        return [answer.content for answer in answers]


Start = Callable[..., Replica]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    made: list[Replica] = []

    def begin(place: Folder | None = None, **changes: Any) -> Replica:
        keys = changes.pop("keys", None)
        uri = (place or LocalFolder(tmp_path / "jobs")).uri
        made.append(Replica(uri, changes, keys))
        return made[-1].open()

    yield begin
    for replica in made:
        replica.close()


def pixels(file: bytes) -> NDArray[np.uint8]:
    return np.asarray(decode({"b64_json": base64.b64encode(file).decode()}))


def alone(drawer: Drawer, seed: int, steps: int = 1) -> Any:
    return drawer.draw(["a red three"], [seed], steps=steps, guidance=2.5)[0].astype(int)


def test_a_job_draws_what_requests_draw(root: Folder, start: Start) -> None:
    replica = start(root)
    response = replica.create(n=3, output_format="webp", output_compression=80)
    assert response.status_code == 202
    job = response.json()
    assert response.headers["location"] == f"{JOBS}/{job['id']}"
    assert (job["object"], job["status"], job["progress"]) == ("image.job", "queued", 0)
    assert (job["seed"], job["size"], job["model"], job["model_version"]) == (
        5,
        "32x32",
        "digits",
        7,
    )
    done = replica.finish(job)
    assert (done["status"], done["progress"], done["num_done"], done["error"]) == (
        "completed", 100, 3, None,
    )  # fmt: skip
    assert job["created_at"] <= done["started_at"] <= done["completed_at"] < done["expires_at"]
    assert replica.client.get(JOBS).json()["data"] == [done]
    for k, file in enumerate(replica.files(job)):
        asked = BODY | {"seed": 5 + k, "output_format": "webp", "output_compression": 80}
        entry = replica.client.post(GENERATE, json=asked).json()["data"][0]
        assert base64.b64decode(entry["b64_json"]) == file, "bit by bit"
    assert replica.get(job, "/images/0").headers["content-type"] == "image/webp"


def test_more_pictures_than_one_replica_takes(root: Folder, start: Start) -> None:
    replicas = [start(root) for _ in range(2)]
    num_pictures = 2 * PART_PICTURES + 3
    job = replicas[0].create(n=num_pictures).json()
    assert replicas[1].finish(job)["num_done"] == num_pictures
    assert sum(replica.count.num_drawn for replica in replicas) == num_pictures, "each once"
    files = replicas[1].files(job)
    for k in (0, PART_PICTURES, num_pictures - 1):
        assert np.abs(pixels(files[k]) - alone(replicas[0].drawer, 5 + k)).max() <= 1


def test_what_was_left_open_is_decided_once(start: Start) -> None:
    replica = start()
    job = replica.create(seed=None, n=2, quality="low", num_inference_steps=None).json()
    replica.finish(job)
    for k, file in enumerate(replica.files(job)):
        expected = alone(replica.drawer, job["seed"] + k, steps=2)
        assert np.abs(pixels(file) - expected).max() <= 1


def test_one_key_makes_one_job_wherever_it_is_asked(root: Folder, start: Start) -> None:
    replicas = [start(root) for _ in range(2)]
    with ThreadPoolExecutor(8) as pool:
        asking = [pool.submit(replicas[i % 2].create, name="k", seed=None) for i in range(8)]
        answers = [future.result() for future in asking]
    assert {answer.status_code for answer in answers} == {202}
    assert len({(answer.json()["id"], answer.json()["seed"]) for answer in answers}) == 1
    assert sum("idempotent-replayed" not in answer.headers for answer in answers) == 1
    job = answers[0].json()
    assert [found["id"] for found in replicas[0].client.get(JOBS).json()["data"]] == [job["id"]]
    replicas[0].close()
    again = replicas[1].create(name="k", seed=None)
    assert (again.json()["id"], again.headers["idempotent-replayed"]) == (job["id"], "true")
    response = replicas[1].create(name="k", seed=6)
    error = error_of(response, 409)
    assert (error["code"], error["param"]) == ("idempotency_key_reused", "Idempotency-Key")
    assert response.headers["x-should-retry"] == "false", "the official client retries a 409"
    assert replicas[1].create(name="other").json()["id"] != job["id"]


_SERVICE = """
import sys, threading
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from test_serve_jobs import Replica
replica = Replica({place!r}).open()
print("up", flush=True)
threading.Event().wait()
"""


def test_a_killed_replica_loses_nothing(root: Folder, start: Start) -> None:
    """SIGKILL; what it had drawn stays, the rest is drawn by another as it would have been."""
    program = _SERVICE.format(tests=str(REPOSITORY / "tests"), place=root.uri)
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as other:
        assert other.stdout
        try:
            assert other.stdout.readline() == b"up\n"
            replica = Replica(root.uri)  # not open: it answers and does not draw
            job = replica.create(n=20, num_inference_steps=20).json()
            until(lambda: replica.get(job).json()["num_done"] >= 2)
        finally:
            other.kill()
    before = replica.get(job).json()
    assert (before["status"], before["num_done"] < 20) == ("in_progress", True)
    kept = {
        k: answer.content
        for k in range(20)
        if (answer := replica.get(job, f"/images/{k}")).status_code == 200
    }
    heir = start(root, job_lease_seconds=SOON)
    assert heir.finish(job)["status"] == "completed"
    assert heir.count.num_drawn == 20 - len(kept)
    for k, file in enumerate(heir.files(job)):
        assert file == kept.get(k, file)
        assert np.abs(pixels(file) - alone(heir.drawer, 5 + k, steps=20)).max() <= 1
    replica.close()


def test_a_job_is_done_whatever_its_storage_does(bucket: Folder, start: Start) -> None:
    """A quarter of all calls go wrong, in every way S3 knows."""
    with ChaosS3(0.25, 3, stall_seconds=[0.2]) as server, endpoint(server.uri):
        replicas = [start(bucket, job_lease_seconds=5.0) for _ in range(2)]
        job = replicas[0].create(n=PART_PICTURES + 4, name="k").json()
        done = replicas[1].finish(job)
        for replica in replicas:
            replica.leave()
    assert server.faults.total() >= 5
    assert (done["status"], done["num_done"]) == ("completed", PART_PICTURES + 4)
    for k, file in enumerate(replicas[0].files(job)):
        assert np.abs(pixels(file) - alone(replicas[0].drawer, 5 + k)).max() <= 1


def test_a_replica_that_closes_hands_over_at_once(root: Folder, start: Start) -> None:
    leaving = start(root)
    gate = Gate(leaving.drawer.network)
    job = leaving.create(n=3, num_inference_steps=2).json()
    until(lambda: gate.num_arrived == 1)
    staying = start(root)
    assert staying.get(job).json()["status"] == "in_progress"
    leaving.leave()
    staying.create()  # so that it looks at once
    assert staying.finish(job)["status"] == "completed"
    gate.allow()


def test_who_slept_and_draws_on_changes_nothing(root: Folder, start: Start) -> None:
    replica = start(root)
    job = replica.create(n=2).json()
    replica.finish(job)
    files, store = replica.files(job), JobStore(root)
    order = store.find(owner_of(None), job["id"])
    assert order
    late = Lease(order, 0, 1, "late")
    store.add(order, 0, b"another picture")
    store.finish(late)
    assert replica.files(job) == files
    assert replica.get(job).json()["status"] == "completed"
    assert store.missing(late) == []


def test_a_lease_is_taken_once_and_over_when_it_stands_still(root: Folder, start: Start) -> None:
    store, quiet = JobStore(root), Replica(root.uri)
    made = quiet.create(n=2).json()
    job = store.find(owner_of(None), made["id"])
    assert job
    with ThreadPoolExecutor(8) as pool:
        taken = list(pool.map(store.take, [Lease(job, 0, 1, str(i)) for i in range(8)]))
    assert Counter(taken) == {True: 1, False: 7}
    lease = Lease(job, 0, 1, str(taken.index(True)))
    tags = {store.state(job)[lease.name]}
    for beat in range(3):
        store.renew(lease, beat)
        tags.add(store.state(job)[lease.name])
    assert len(tags) == 4, "each beat shows"
    assert start(root, job_lease_seconds=SOON).finish(made)["status"] == "completed"
    quiet.close()


def test_a_job_that_kills_replicas_is_given_up(start: Start, tmp_path: Path) -> None:
    folder = LocalFolder(tmp_path / "jobs")
    store, quiet = JobStore(folder), Replica(folder.uri)
    made = quiet.create().json()
    job = store.find(owner_of(None), made["id"])
    assert job
    for number in range(1, 11):
        assert store.take(Lease(job, 0, number, "dead"))
    ended = start(folder, job_lease_seconds=SOON).finish(made)
    assert (ended["status"], ended["error"]["code"]) == ("failed", "abandoned")
    quiet.close()


@pytest.mark.parametrize("by_another", [False, True])
def test_a_cancelled_job_stops_at_the_next_step(
    root: Folder, start: Start, by_another: bool
) -> None:
    drawing = start(root)
    gate = Gate(drawing.drawer.network)
    job = drawing.create(n=3, num_inference_steps=20).json()
    until(lambda: gate.num_arrived == 1)
    other = start(root) if by_another else drawing
    path = f"{JOBS}/{job['id']}/cancel"
    for _ in range(2):
        answer = other.client.post(path)
        assert (answer.status_code, answer.json()["status"]) == (200, "cancelled")
    until(lambda: drawing.count.num_cancelled == 1)
    gate.allow(2)
    assert drawing.client.post(GENERATE, json=BODY).status_code == 200
    assert gate.num_arrived == 2, "the step that was under way, and the request's"
    assert drawing.finish(job)["num_done"] == 0
    assert drawing.finish(job)["completed_at"] >= job["created_at"]


def test_a_job_that_has_ended_stays_as_it_is(start: Start) -> None:
    replica = start()
    done = replica.finish(replica.create().json())
    answer = replica.client.post(f"{JOBS}/{done['id']}/cancel")
    assert (answer.status_code, answer.json()) == (200, done)


def test_jobs_belong_to_the_key_that_made_them(root: Folder, start: Start, tmp_path: Path) -> None:
    (ours, line), (theirs, other_line) = make_key("studio"), make_key("batch")
    (tmp_path / "keys").write_text(f"{line}\n{other_line}\n")
    replica = start(root, keys=ApiKeys(tmp_path / "keys"), api_keys_file="keys")
    job = replica.create(ours, name="k").json()
    replica.finish(job, ours)
    assert replica.create(theirs, name="k").json()["id"] != job["id"]
    for method, path in (
        ("GET", ""), ("GET", "/images/0"), ("POST", "/cancel"), ("DELETE", ""),
    ):  # fmt: skip
        answer = replica.ask(method, f"{JOBS}/{job['id']}{path}", theirs)
        assert error_of(answer, 404)["code"] == "job_not_found"
        assert replica.ask(method, f"{JOBS}/{job['id']}{path}").status_code == 401
    assert [found["id"] for found in replica.ask("GET", JOBS, ours).json()["data"]] == [job["id"]]
    assert replica.files(job, ours)
    (key, line) = make_key("studio")
    (tmp_path / "keys").write_text(f"{line}\n")
    assert replica.files(job, key), "a new key of the same name has the old one's jobs"


def with_keys(start: Start, tmp_path: Path, place: Folder | None = None, **changes: Any) -> Any:
    """A replica with keys, the key of ``studio``, and the file that has it."""
    key, line = make_key("studio")
    file = tmp_path / "keys"
    file.write_text(f"{line}\n{make_key('other')[1]}\n")
    replica = start(place, keys=ApiKeys(file), api_keys_file=str(file), **changes)
    return replica, key, file


def test_a_key_pays_when_a_picture_is_drawn_and_keeps_half_a_minute(
    start: Start, tmp_path: Path
) -> None:
    """A picture costs 32 units; of 192 a minute, 96 are left to those who wait."""
    replica, key, _ = with_keys(start, tmp_path, key_units_per_minute=192)
    job = replica.create(key, n=7).json()
    account = replica.accounts.of("studio")
    until(lambda: replica.get(job, key=key).json()["num_done"] == 3)
    assert replica.ledger.units == {"studio": 96}
    assert replica.ask("POST", GENERATE, key, json=BODY | {"n": 3}).status_code == 200
    replica.seconds = 60.0
    until(lambda: replica.get(job, key=key).json()["num_done"] == 6)
    assert account.available == 96
    replica.seconds = 120.0
    assert replica.finish(job, key)["status"] == "completed"
    assert replica.ledger.pictures == {"studio": 7 + 3}


def test_the_jobs_of_a_key_that_is_gone_fail(start: Start, tmp_path: Path) -> None:
    replica, key, file = with_keys(start, tmp_path)
    gate = Gate(replica.drawer.network)
    job = replica.create(key, n=2).json()
    until(lambda: gate.num_arrived == 1)
    file.write_text(file.read_text().splitlines()[1])
    store = JobStore(LocalFolder(tmp_path / "jobs"))
    order = store.find(owner_of("studio"), job["id"])
    assert order
    until(lambda: (ending := store.progress(order).ending) is not None and bool(ending.error))
    assert store.ending(order).error == Fault(
        code="key_revoked", message="the key that made it is gone"
    )
    until(lambda: replica.count.num_cancelled == 1)
    gate.allow()


def test_requests_find_room_beside_a_job(start: Start) -> None:
    """Of 8 rows a job takes 4; while others take all, it goes on with one picture."""
    replica = start(max_rows=8)
    gate = Gate(replica.drawer.network)
    job = replica.create(n=4, num_inference_steps=2).json()
    until(lambda: gate.num_arrived == 1)
    until(lambda: replica.engine.num_free_rows() == 4)
    waiting = replica.engine.submit_all([ask(steps=4)] * 3)
    gate.allow(1)
    until(lambda: gate.num_arrived == 2)
    assert replica.engine.num_free_rows() == 0, "two pictures of three are drawn beside it"
    gate.allow()
    assert replica.finish(job)["status"] == "completed"
    assert all(future.result(timeout=60) for future in waiting)
    assert max(gate.batches) <= 8


def test_a_deleted_job_leaves_nothing(root: Folder, start: Start) -> None:
    replica = start(root, job_lease_seconds=SOON)
    gate = Gate(replica.drawer.network)
    job = replica.create(name="k", n=2).json()
    path = f"{JOBS}/{job['id']}"
    assert error_of(replica.client.delete(path), 409)["code"] == "job_not_ended"
    gate.allow()
    replica.finish(job)
    assert replica.client.delete(path).json() == {
        "id": job["id"], "object": "image.job", "deleted": True,
    }  # fmt: skip
    for gone in (path, f"{path}/images/0"):
        assert error_of(replica.client.get(gone), 404)["code"] == "job_not_found"
    assert replica.client.get(JOBS).json()["data"] == []
    again = replica.create(name="k", seed=9, n=3).json()
    assert again["id"] == job["id"], "the key may be used again"
    replica.finish(again)
    assert np.abs(pixels(replica.files(again)[0]) - alone(replica.drawer, 9)).max() <= 1
    replica.client.delete(path)
    until(lambda: list(root.walk()) == [])


def test_jobs_expire(root: Folder, start: Start) -> None:
    """What is not done in time fails, is kept as long once more, and goes."""
    replica = start(root, job_lease_seconds=SOON, job_keep_seconds=3.0)
    gate = Gate(replica.drawer.network)
    job = replica.create().json()
    assert job["expires_at"] - job["created_at"] in (3, 4)
    ended = replica.finish(job)
    assert (ended["status"], ended["error"]["code"]) == ("failed", "expired")
    until(lambda: list(root.walk()) == [])
    gate.allow()


def refuse_odd(picture: NDArray[np.uint8]) -> str | None:
    return "it is odd" if int(picture.sum()) % 2 else None


def refuse_all(picture: NDArray[np.uint8]) -> str:
    return f"none of {picture.shape} is good"


def test_a_picture_that_is_held_back_is_no_fault_of_the_others(start: Start) -> None:
    replica = start(picture_filter="test_serve_jobs:refuse_odd")
    job = replica.create(n=12).json()
    done = replica.finish(job)
    assert (done["status"], done["num_done"] + done["num_failed"]) == ("completed", 12)
    assert done["num_done"]
    assert done["num_failed"]
    answers = [replica.get(job, f"/images/{k}") for k in range(12)]
    for answer in answers:
        if answer.status_code == 200:
            assert refuse_odd(pixels(answer.content)) is None
        else:
            error = error_of(answer, 404)
            assert error["code"] == "moderation_blocked"
            assert "it is odd" in error["message"]
    assert sum(answer.status_code == 200 for answer in answers) == done["num_done"]


def test_a_job_without_a_picture_has_failed(start: Start) -> None:
    replica = start(picture_filter="test_serve_jobs:refuse_all")
    done = replica.finish(replica.create(n=2).json())
    assert (done["status"], done["num_failed"], done["progress"]) == ("failed", 2, 100)
    assert done["error"]["code"] == "moderation_blocked"


def test_a_version_that_is_gone_fails_its_job(start: Start) -> None:
    """Never another one instead."""
    replica = start()
    gate = Gate(replica.drawer.network)
    job = replica.create(n=3).json()
    until(lambda: gate.num_arrived == 1)
    replica.engine.activate(LoadedVersion(8, build_drawer(seed=1)))
    gate.allow()
    done = replica.finish(job)
    assert (done["status"], done["error"]["code"]) == ("failed", "model_not_found")
    assert done["num_done"] <= 1


def test_an_order_of_another_release_keeps_nobody_up(start: Start, tmp_path: Path) -> None:
    replica = start()
    folder = LocalFolder(tmp_path / "jobs")
    strange = Entry(1, owner_of(None), f"imgjob_{'0' * 24}", "1" * 24)
    folder.write(strange._replace(created=int(time.time() * 1000)).file, b"")
    folder.write(f"orders/{strange.owner}/{strange.id}.json", b'{"shape": "new"}')
    assert replica.finish(replica.create().json())["status"] == "completed"
    answer = replica.client.get(f"{JOBS}/{strange.id}")
    assert error_of(answer, 503)["code"] == "storage_unavailable"


BAD_JOBS: list[tuple[dict[str, Any], str, str]] = [
    ({"n": 0}, "n", "greater than or equal to 1"),
    ({"n": 11}, "n", "a job has at most 10"),
    ({"n": "2"}, "n", "valid integer"),
    ({"stream": True}, "stream", "GET /v1/images/jobs/ID"),
    ({"partial_images": 1}, "partial_images", "no previews"),
    ({"max_wait_seconds": 5}, "max_wait_seconds", "can be cancelled"),
    ({"response_format": "url"}, "response_format", "fetched one by one"),
    ({"prompt": ""}, "prompt", "at least 1 character"),
    ({"size": "33x32"}, "size", "multiples of 8"),
    ({"prompts": ["x"]}, "prompts", "did you mean 'prompt'?"),
    ({"num_inference_steps": 21}, "num_inference_steps", "at most 20"),
]


@pytest.mark.parametrize(("fields", "param", "says"), BAD_JOBS)
def test_bad_fields_are_named(
    start: Start, tmp_path: Path, fields: dict[str, Any], param: str, says: str
) -> None:
    error = error_of(start(max_job_pictures=10).create(**fields), 400)
    assert error["param"] == param
    assert says in error["message"]
    assert not (tmp_path / "jobs").exists(), "nothing was stored"


@pytest.mark.parametrize("name", ["", " ", "a b", "x" * 256, "k\u00e9".encode("latin-1"), "a\tb"])
def test_bad_idempotency_keys(start: Start, name: Any) -> None:
    error = error_of(start().create(name=name), 400)
    assert error["param"] == "Idempotency-Key"
    assert "1 to 255 visible ASCII" in error["message"]


def test_limits_are_named(start: Start, tmp_path: Path) -> None:
    replica, key, _ = with_keys(
        start, tmp_path, key_units_per_minute=320, max_job_units=640, max_jobs=2
    )
    assert replica.client.post(JOBS, content=b"x" * 100_000).status_code == 401
    big = {"headers": {"Authorization": f"Bearer {key}"}, "content": b"x" * 100_000}
    error_of(replica.client.post(JOBS, **big), 413)
    for fields, says in (
        ({"n": 21}, "the job costs 672 units"), ({"num_inference_steps": 11}, "each picture costs"),
    ):  # fmt: skip
        error = error_of(replica.create(key, **fields), 400)
        assert error["code"] == "cost_limit_exceeded"
        assert says in error["message"]
    jobs = [replica.create(key).json() for _ in range(2)]
    answer = replica.create(key)
    assert error_of(answer, 429)["code"] == "too_many_jobs"
    assert answer.headers["x-should-retry"] == "false"
    replica.finish(jobs[0], key)
    assert replica.ask("DELETE", f"{JOBS}/{jobs[0]['id']}", key).status_code == 200
    assert replica.create(key).status_code == 202


@pytest.mark.parametrize(
    "id_", ["imgjob_0", f"imgjob_{'0' * 24}", f"imgjob_{'0' * 24}%00", "..%2f..%2fx", "x" * 5000]
)
def test_unknown_jobs_are_404(start: Start, id_: str) -> None:
    replica = start()
    for method, path in (("GET", ""), ("GET", "/images/0"), ("POST", "/cancel"), ("DELETE", "")):
        error_of(replica.client.request(method, f"{JOBS}/{id_}{path}"), 404)


@pytest.mark.parametrize("k", ["2", "-1", "01x", "1" * 30, "\u0661", "0.0", "%00"])
def test_pictures_that_a_job_does_not_have_are_404(start: Start, k: str) -> None:
    replica = start()
    job = replica.create(n=2).json()
    assert "has pictures 0 to 1" in error_of(replica.get(job, f"/images/{k}"), 404)["message"]


def test_pages(start: Start) -> None:
    replica = start()
    ids = [replica.create().json()["id"] for _ in range(3)]
    page = replica.client.get(f"{JOBS}?limit=2").json()
    assert ([job["id"] for job in page["data"]], page["has_more"]) == (ids[:0:-1], True)
    page = replica.client.get(f"{JOBS}?limit=2&after={ids[1]}").json()
    assert ([job["id"] for job in page["data"]], page["has_more"]) == (ids[:1], False)
    long = "0" * 8 + "1" * 5000
    for query in ("limit=0", "limit=101", "limit=x", "limit=", f"limit={long}", "after=x"):
        error = error_of(replica.client.get(f"{JOBS}?{query}"), 400)
        assert error["param"] == query.partition("=")[0]


def test_without_a_place_jobs_are_explained(start: Start) -> None:
    replica = start(jobs="")
    for method, path in (("POST", ""), ("GET", ""), ("GET", "/x"), ("GET", "/x/images/0"),
                         ("POST", "/x/cancel"), ("DELETE", "/x")):  # fmt: skip
        error = error_of(replica.client.request(method, f"{JOBS}{path}", json=BODY), 404)
        assert error["code"] == "jobs_not_kept"
        assert "serve.jobs" in error["message"]


def test_storage_that_fails_is_said_and_drawing_goes_on(
    start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("not a folder")
    replica = start(LocalFolder(tmp_path / "file" / "jobs"))
    answer = replica.create(prompt="a secret three")
    assert error_of(answer, 503)["code"] == "storage_unavailable"
    assert int(answer.headers["retry-after"]) >= 1
    assert replica.client.post(GENERATE, json=BODY).status_code == 200
    assert "storage of jobs failed" in caplog.text
    assert "secret" not in caplog.text


def test_a_place_that_is_none_is_named() -> None:
    with pytest.raises(StorageError, match="gs:// is not supported"):
        Replica("gs://bucket/jobs")
