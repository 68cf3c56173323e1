"""The rights on S3 that each role is given are those its code uses, and no more.

boto3's calls are recorded while the code runs against a server; every call must be allowed by the
role's policy, and every action and resource the policy allows must have been used.
"""

import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import botocore.client
import pytest
from builders import make_rows, make_writer, write_table
from chaos_s3 import make_bucket
from processes import REPOSITORY
from small_states import newest, open_store, save
from test_serve_snapshots import build_drawer, write_snapshot

from pixart_cluster.service_checks import check_s3
from pixart_jobs.recipe import DataSettings
from pixart_jobs.sources import open_source
from pixart_platform import copies, object_store
from pixart_platform.errors import ManifestError
from pixart_platform.manifest import load_manifest
from pixart_platform.storage import Folder
from pixart_platform.tables import verify_table
from pixart_serve.contract import JobRequest
from pixart_serve.job_store import Ending, Fault, Job, JobStore, Lease

BUCKET = "models"
ACTIONS = {  # of an operation, as AWS documents them; s3transfer aborts a multipart that fails
    "ListObjectsV2": ("ListBucket",), "ListObjects": ("ListBucket",),
    "HeadObject": ("GetObject",), "GetObject": ("GetObject",), "PutObject": ("PutObject",),
    "CreateMultipartUpload": ("PutObject", "AbortMultipartUpload"), "UploadPart": ("PutObject",),
    "CompleteMultipartUpload": ("PutObject",), "AbortMultipartUpload": ("AbortMultipartUpload",),
    "DeleteObject": ("DeleteObject",), "DeleteObjects": ("DeleteObject",),
}  # fmt: skip
Used = set[tuple[str, str]]  # action, and key or nothing for the bucket


@contextmanager
def recorded(patch: pytest.MonkeyPatch) -> Iterator[Used]:
    """What all clients of this process ask of S3."""
    used: Used = set()
    call = botocore.client.BaseClient._make_api_call

    def note(self: Any, operation: str, params: dict[str, Any]) -> Any:
        keys = [found["Key"] for found in params.get("Delete", {}).get("Objects", [])]
        keys = keys or [params.get("Key", "")]
        used.update((f"s3:{action}", key) for action in ACTIONS[operation] for key in keys)
        return call(self, operation, params)

    patch.setattr(botocore.client.BaseClient, "_make_api_call", note)
    yield used
    patch.setattr(botocore.client.BaseClient, "_make_api_call", call)


def allowed(role: str) -> Used:
    """Action and pattern of keys, of every statement of a role's policy."""
    text = (REPOSITORY / "cluster" / "policies" / f"{role}.json").read_text()
    policy = json.loads(text.replace("BUCKET", BUCKET))
    assert policy["Version"] == "2012-10-17"
    found: Used = set()
    for statement in policy["Statement"]:
        assert statement["Effect"] == "Allow"
        for resource in statement["Resource"]:
            bucket, _, pattern = resource.removeprefix("arn:aws:s3:::").partition("/")
            assert bucket == BUCKET
            found |= {(action, pattern) for action in statement["Action"]}
    return found


def work_as_pipeline(bucket: Folder, folder: Path) -> None:
    """Read a source; write tables, states and snapshots, large files and lost races among them."""
    source = bucket / "source"
    settings = DataSettings(source=f"folder:{source.uri}", num_workers=1)
    open_source(settings, 0, bucket / "tables")
    source.read("a.jpg")
    verify_table(
        write_table(bucket / "tables/captions-1", "captions/2", [[{"captions": ["a"]}]]).folder
    )
    for text in ("won", "lost"):
        rows = make_rows("captions/2", [{"captions": [text]}])
        make_writer(bucket / "tables/captions-2", "captions/2", 1).write(0, rows)
    for place in ("tables", "states", "snapshots"):
        (bucket / place).write("large", random.Random(0).randbytes(11 << 20))
    store = open_store(bucket / "states/align", keep=1)
    for images in (1, 2, 3):
        save(store, images)
    assert newest(store) == 3
    snapshot = write_snapshot(folder / "snapshot", build_drawer(1))
    copies.publish(snapshot, bucket / "snapshots/1")
    for place in ("tables", "states", "snapshots"):
        found = list(check_s3(f"{bucket.uri}/{place}", writes=True))
        assert {finding.verdict for finding in found} == {"ok"}
    list(check_s3(source.uri, writes=False))


def work_as_service(bucket: Folder, folder: Path) -> None:
    """Fetch a version; keep, draw and forget a job."""
    del folder
    place = bucket / "snapshots/1"
    copies.fetch(place, load_manifest(place).digest)
    with suppress(ManifestError):
        load_manifest(bucket / "snapshots/2")
    store = JobStore(bucket / "jobs")
    request = JobRequest(prompt="a red three", n=2)
    job = store.create(Job(id="1", token="t", created=1, account=None, digest="d", version=1,
                           request=request))  # fmt: skip
    lease = Lease(job, 0, 1, "me")
    assert store.take(lease)
    store.renew(lease, 1)
    store.add(job, 0, b"picture")
    store.add(job, 1, Fault(code="x", message="y"))
    assert store.picture(job, 0) == b"picture"
    store.release(lease)
    store.end(job, Ending(status="completed", at=1.0))
    for entry in store.entries():
        store.discard(entry)
    for token in store.trash():
        store.erase(token)
    assert {finding.verdict for finding in check_s3(f"{bucket.uri}/jobs", writes=True)} == {"ok"}


def work_as_mlflow(bucket: Folder, folder: Path) -> None:
    """What its server does with artifacts."""
    from mlflow.store.artifact.s3_artifact_repo import S3ArtifactRepository

    store: Any = S3ArtifactRepository(f"{bucket.uri}/mlflow")
    (folder / "small.txt").write_text("x")
    store.log_artifact(str(folder / "small.txt"))
    assert [found.path for found in store.list_artifacts()] == ["small.txt"]
    (folder / "back").mkdir()
    store.download_artifacts("small.txt", str(folder / "back"))
    (folder / "large").write_bytes(random.Random(0).randbytes(11 << 20))
    store.log_artifact(str(folder / "large"))
    store.delete_artifacts("small.txt")


def work_as_prune(bucket: Folder, folder: Path) -> None:
    """What ``pixart registry prune`` does with a version's bytes."""
    del folder
    place = bucket / "snapshots/1"
    copies.delete(place, load_manifest(place).digest)
    list(place.walk())


ROLES: dict[str, Callable[[Folder, Path], None]] = {
    "pipeline": work_as_pipeline, "service": work_as_service, "mlflow": work_as_mlflow,
    "prune": work_as_prune,
}  # fmt: skip


@pytest.fixture(scope="module")
def models(s3_endpoint: str) -> Folder:  # noqa: ARG001  # the server has to run
    return make_bucket(BUCKET)


@pytest.mark.parametrize("role", ROLES)
def test_a_policy_allows_what_the_code_asks_and_nothing_else(
    models: Folder, role: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Roles follow each other: the service fetches what the pipeline published."""
    monkeypatch.setenv("PIXART_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(object_store, "_PART_BYTES", 5 << 20)
    if role != "pipeline" and not models.find("snapshots/1/manifest.json"):
        copies.publish(write_snapshot(tmp_path / "s", build_drawer(1)), models / "snapshots/1")
    models.write("source/a.jpg", b"picture")
    with recorded(monkeypatch) as used:
        ROLES[role](models, tmp_path)
    given = allowed(role)
    idle = set(given)
    for action, key in used:
        by = {(a, pattern) for a, pattern in given if a == action and fnmatchcase(key, pattern)}
        assert by, f"{role} may not {action} {key or 'the bucket'}"
        idle -= by
    assert not idle, f"{role} needs none of these"


def test_roles_are_kept_apart() -> None:
    assert {path.stem for path in (REPOSITORY / "cluster/policies").iterdir()} == set(ROLES)
    writes = {"s3:PutObject", "s3:DeleteObject"}
    service = {pattern for action, pattern in allowed("service") if action in writes}
    assert service == {"jobs/*"}, "who serves cannot change what is served"
    deletes = {pattern for action, pattern in allowed("pipeline") if action == "s3:DeleteObject"}
    assert "snapshots/*" not in deletes, "who trains cannot delete what was registered"
