"""What ``pixart doctor`` finds at the servers a recipe uses: S3, MLflow, Ray.

Everything is asked as the pipeline will ask it, with a patience of seconds. Nothing stays: what is
written to try a right is deleted again.
"""

import base64
import http.client
import ipaddress
import json
import os
import shlex
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from packaging.version import InvalidVersion, Version

from pixart_cluster.machine_checks import Finding, gpu_settings
from pixart_cluster.recipe import FullRecipe
from pixart_cluster.submit import submit_when_ready
from pixart_platform.errors import ManifestError, PixartError, RegistryError, StorageError
from pixart_platform.manifest import load_manifest
from pixart_platform.object_store import S3Folder
from pixart_platform.registry import Registry
from pixart_platform.storage import open_folder
from pixart_platform.tracking import hide_password, sqlite_uri

PATIENCE_SECONDS = 5.0
_JOB_SECONDS = 60.0
_CLOCK_WARNING, _CLOCK_WRONG = 5.0, 300.0  # AWS refuses what was signed 5 minutes ago, S3 15
_OLDEST_MLFLOW = Version("3.11")  # before, CVE-2026-0545 and others; see security.md
_RIGHTS = "grant it: cluster/policies/pipeline.json"


@dataclass(frozen=True)
class Reply:
    """What a server answered; ``ahead`` is by how many seconds its clock is before ours."""

    status: int
    body: bytes
    ahead: float | None


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows nobody: passwords and tokens go where they were meant to."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_Stay)


def ask(url: str, headers: Mapping[str, str] | None = None) -> Reply:
    """GET, whatever the status. Raises OSError if nobody answers in time."""
    request = urllib.request.Request(url, headers=dict(headers or {}))
    began = time.time()
    try:
        try:
            answer: Any = _OPENER.open(request, timeout=PATIENCE_SECONDS)
        except urllib.error.HTTPError as error:
            answer = error
        with answer:
            now = (began + time.time()) / 2
            stamp, body = answer.headers.get("Date"), answer.read(1 << 20)
    except http.client.HTTPException as error:
        raise OSError(f"no HTTP is spoken there ({type(error).__name__})") from error
    ahead = parsedate_to_datetime(stamp).timestamp() - now if stamp else None
    return Reply(answer.status, body, ahead)


def _reason(error: OSError) -> str:
    return str(getattr(error, "reason", "") or error)


def _check_clock(who: str, ahead: float | None) -> Iterator[Finding]:
    if ahead is None:
        return
    told = f"{abs(ahead):.0f} s {'behind' if ahead > 0 else 'ahead of'} that of {who}"
    remedy = "timedatectl set-ntp true, here or there"
    if abs(ahead) > _CLOCK_WRONG:
        yield Finding("clock", "wrong", told, remedy)
    elif abs(ahead) > _CLOCK_WARNING:
        yield Finding("clock", "warning", told, remedy)
    else:
        yield Finding("clock", "ok", f"within {_CLOCK_WARNING:g} s of that of {who}")


def places_of(recipe: FullRecipe) -> dict[str, bool]:
    """Each ``s3://`` place of the recipe, and whether we write there."""
    source = recipe.data.source.partition(":")[2]
    read = (source, recipe.evaluate.reference)
    written = (
        recipe.data.store, recipe.train.states, recipe.train.snapshots, recipe.serve.jobs,
    )  # fmt: skip
    found = dict.fromkeys(read, False) | dict.fromkeys(written, True)
    return {place: writes for place, writes in found.items() if place.startswith("s3://")}


def check_s3(place: str, *, writes: bool) -> Iterator[Finding]:
    """Rights in ``place``, whether puts may be conditional, and the server's clock."""
    folder = open_folder(place)
    assert isinstance(folder, S3Folder)
    try:
        reply = ask(folder.endpoint)
    except OSError as error:
        told = f"{folder.endpoint} does not answer: {_reason(error)}"
        yield Finding(place, "wrong", told, "start it, or export AWS_ENDPOINT_URL=http://HOST:9000")
        return
    yield from _check_clock(folder.endpoint, reply.ahead)
    yield from _check_writing(folder) if writes else _check_reading(folder)


def _check_reading(folder: S3Folder) -> Iterator[Finding]:
    try:
        first = next(folder.walk(), None)
        if first:
            folder.open(first.name).read(1)
    except StorageError as error:
        yield Finding(folder.uri, "wrong", str(error), _RIGHTS)
        return
    seen = f"list, get (tried {first.name})" if first else "list; there is nothing in it"
    yield Finding(
        folder.uri, "ok" if first else "warning", seen, "" if first else "mend data.source"
    )


def _check_writing(folder: S3Folder) -> Iterator[Finding]:
    name = f".pixart-doctor-{uuid.uuid4().hex[:12]}"
    steps: dict[str, Callable[[], object]] = {
        "list": lambda: next(folder.walk(), None),
        "put": lambda: folder.write(name, b"first"),
        "get": lambda: folder.read(name),
        "conditional put": lambda: folder.create_once(name, b"second"),
        "delete": lambda: folder.delete(name),
    }
    seen, refused = dict[str, object](), list[str]()
    for right, step in steps.items():
        if right in ("get", "conditional put") and "put" not in seen:
            continue  # there is nothing to get
        try:
            seen[right] = step()
        except StorageError as error:
            refused.append(right)
            yield Finding(folder.uri, "wrong", f"{right}: {error}", _RIGHTS)
    if seen.get("conditional put"):
        told = "it overwrites in spite of If-None-Match, so two writers can both win"
        remedy = "upgrade it: S3 itself, MinIO, Ceph 19.2, SeaweedFS and others honour it"
        yield Finding(f"{folder.uri} conditional put", "wrong", told, remedy)
        del seen["conditional put"]
    if seen and not refused:
        yield Finding(folder.uri, "ok", ", ".join(seen))


def check_mlflow(registry: str, root: Path, model: str) -> Iterator[Finding]:
    """Reachable, of which version, whether it knows us, and whether aliases name what is there."""
    if not registry and not (root / "mlflow.db").is_file():
        yield Finding("registry", "ok", f"none in {root} yet; pixart run makes it")
        return
    if registry.startswith(("http://", "https://")):
        faults = list(_check_mlflow_server(registry.rstrip("/")))
        yield from faults
        if any(finding.verdict == "wrong" for finding in faults if finding.check == "mlflow"):
            return
    try:
        models = Registry(registry or sqlite_uri(root), model)
        aliases = models.aliases()
    except RegistryError as error:
        yield Finding("registry", "wrong", str(error), _sign_in())
        return
    told = ", ".join(f"{alias} -> {number}" for alias, number in sorted(aliases.items()))
    yield Finding("registry", "ok", f"{model}: {told or 'no alias yet'}")
    for number in sorted(set(aliases.values())):
        found = models.get(str(number))
        try:
            if load_manifest(found.folder).digest != found.digest:
                raise ManifestError(f"{found.source} is not what was registered")
        except PixartError as error:
            told = f"{model} version {number}: {error}"
            yield Finding(
                "registry", "wrong", told, "restore it, or pixart rollback; see the runbook"
            )


def _sign_in() -> str:
    return "export MLFLOW_TRACKING_USERNAME=... MLFLOW_TRACKING_PASSWORD=..."


def _check_mlflow_server(uri: str) -> Iterator[Finding]:
    address = urlsplit(uri)
    shown, plain = hide_password(uri), uri.replace(f"{address.netloc.rpartition('@')[0]}@", "")
    try:
        health = ask(f"{plain}/health")
        known = ask(f"{plain}/version", _basic(address.username, address.password))
        stranger = ask(f"{plain}/version")
    except OSError as error:
        told = f"{shown} does not answer: {_reason(error)}"
        yield Finding("mlflow", "wrong", told, "start it; see the runbook, A registry that is away")
        return
    yield from _check_clock("MLflow", health.ahead)
    if health.status != 200 or known.status not in (200, 401, 403):
        told = f"{shown} answers {health.status}, its /version {known.status}"
        yield Finding("mlflow", "wrong", told, "look at its log, or what is in front of it")
    elif known.status != 200:
        told = f"{shown} answers {known.status}: it does not know who asks"
        yield Finding("mlflow", "wrong", told, _sign_in())
    else:
        yield _judge_mlflow(shown, known.body.decode(errors="replace").strip()[:40])
        if stranger.status == 200 and not _is_local(address.hostname or ""):
            told = f"{shown} asks nobody who they are, and is not on this machine"
            yield Finding("mlflow users", "warning", told, "mlflow server --app-name basic-auth")


def _judge_mlflow(uri: str, told: str) -> Finding:
    try:
        theirs = Version(told)
    except InvalidVersion:
        return Finding(
            "mlflow", "wrong", f"{uri} is no MLflow: it says {told!r}", "mend --registry"
        )
    ours, seen = Version(version("mlflow")), f"{uri}, MLflow {theirs}"
    if theirs < _OLDEST_MLFLOW:
        remedy = f"pip install mlflow=={ours} there"
        return Finding("mlflow", "wrong", f"{seen}: older than {_OLDEST_MLFLOW}, unsafe", remedy)
    if theirs.release[:2] != ours.release[:2]:
        remedy = f"pip install mlflow=={ours} there, or mlflow=={theirs} here"
        return Finding("mlflow", "warning", f"{seen}, ours is {ours}", remedy)
    return Finding("mlflow", "ok", seen)


def _basic(user: str | None, password: str | None) -> dict[str, str]:
    user = unquote(user or "") or os.environ.get("MLFLOW_TRACKING_USERNAME", "")
    password = unquote(password or "") or os.environ.get("MLFLOW_TRACKING_PASSWORD", "")
    code = base64.b64encode(f"{user}:{password}".encode()).decode()
    return {"Authorization": f"Basic {code}"} if user else {}


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_token() -> str:
    """Ray's token from where Ray looks for it; empty if there is none."""
    if found := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return found
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def check_ray(address: str, recipe: FullRecipe, root: Path | None) -> Iterator[Finding]:
    """The dashboard at ``address``: token, version, nodes; with ``root``, that all nodes see it."""
    if not address:
        yield Finding("ray", "ok", "no --address: a Ray of our own, with a token of its own")
        return
    address = (address if "://" in address else f"http://{address}").rstrip("/")
    token = read_token()
    signed = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        stranger, known = (ask(f"{address}/api/version", who) for who in ({}, signed))
    except OSError as error:
        told = f"{hide_password(address)} does not answer: {_reason(error)}"
        remedy = f"ray start --head there; ssh -N -L 8265:localhost:8265 {_host(address)}"
        yield Finding("ray", "wrong", told, remedy)
        return
    yield judge_token(
        stranger.status, known.status, has_token=bool(token), local=_is_local(_host(address))
    )
    if known.status == 200:
        yield _judge_ray(str(json.loads(known.body)["ray_version"]))
        yield from _check_nodes(address, signed, recipe, root)


def judge_token(stranger: int, known: int, *, has_token: bool, local: bool) -> Finding:
    """From the HTTP status a caller without token gets, and the one we get."""
    remedy = "export RAY_AUTH_TOKEN_PATH=FILE, with the head's: ray get-auth-token"
    if known in (401, 403):
        told = "the token is refused" if has_token else "it asks for a token; there is none here"
        return Finding("ray token", "wrong", told, remedy)
    if known != 200:
        told, remedy = f"its dashboard answers {known}", "give --address as http://HEAD:8265"
        return Finding("ray", "wrong", told, remedy)
    if stranger == 200:
        told = "it asks for no token: whoever reaches it runs code there (CVE-2023-48022)"
        remedy = "export RAY_AUTH_MODE=token before ray start, on every node"
        return Finding("ray token", "warning" if local else "wrong", told, remedy)
    return Finding("ray token", "ok", "asked for, and ours is accepted")


def _host(address: str) -> str:
    return urlsplit(address).hostname or ""


def _judge_ray(theirs: str) -> Finding:
    if theirs == (ours := version("ray")):
        return Finding("ray", "ok", theirs)
    told = f"{theirs}, ours is {ours}; drivers and nodes must have the same"
    return Finding("ray", "wrong", told, f"pip install 'ray[default]=={ours}' on every node")


def _check_nodes(
    address: str, signed: Mapping[str, str], recipe: FullRecipe, root: Path | None
) -> Iterator[Finding]:
    reply = json.loads(ask(f"{address}/api/v0/nodes?limit=10000&detail=1", signed).body)
    nodes = reply["data"]["result"]["result"]
    alive = [node for node in nodes if node["state"] == "ALIVE"]
    dead = [node for node in nodes if node["state"] != "ALIVE"]
    gpus = sum(node["resources_total"].get("GPU", 0) for node in alive)
    told = f"{len(alive)} alive, with {gpus:g} GPUs"
    if alive:
        yield Finding("nodes", "ok", told)
    else:
        yield Finding("nodes", "wrong", told, "see the runbook, A lost head node")
    for node in dead:
        told = f"{node['node_ip']} is dead: {node.get('state_message') or 'nobody said why'}"
        yield Finding("nodes", "warning", told, "see the runbook, A node that keeps dying")
    if (asked := gpu_settings(recipe)) and not gpus:
        told = f"no node has a GPU, and the recipe asks: {', '.join(asked)}"
        yield Finding("nodes", "wrong", told, "add nodes with GPUs, or set these to 0")
    if root and len(alive) > 1:
        yield from _check_shared(address, signed, root)


_LOOK = """
import os, ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On
ray.init(log_to_driver=False)
look = ray.remote(num_cpus=0)(lambda: os.path.exists(os.environ["PIXART_PROBE"]))
nodes = [n for n in ray.nodes() if n["Alive"]]
on = [On(n["NodeID"], soft=False) for n in nodes]
seen = ray.get([look.options(scheduling_strategy=one).remote() for one in on])
blind = [n["NodeManagerAddress"] for n, there in zip(nodes, seen) if not there]
print("PIXART-BLIND", *blind)
"""


def _check_shared(address: str, signed: Mapping[str, str], root: Path) -> Iterator[Finding]:
    """A file of ours in ``root``, looked for by a task on every node."""
    there = next(path for path in (root, *root.parents) if path.exists())
    probe = there / f".pixart-doctor-{uuid.uuid4().hex[:12]}"
    try:
        probe.touch()
    except OSError as error:
        yield Finding("shared root", "wrong", f"{there}: {error.strerror}", "mend --root")
        return
    try:
        blind = _find_blind(address, signed, probe)
    except (RuntimeError, ConnectionError, TimeoutError) as error:  # what the Jobs SDK raises
        told = f"whether all nodes see {there} is not known: {str(error).splitlines()[0]}"
        yield Finding("shared root", "warning", told, f"ray job list --address {address}")
        return
    finally:
        probe.unlink()
    if blind:
        told = f"{there} is not seen by {', '.join(blind)}"
        remedy = "mount it on every node, or set data.store, train.states, train.snapshots to s3://"
        yield Finding("shared root", "wrong", told, remedy)
    else:
        yield Finding("shared root", "ok", f"{there} is seen by all nodes")


def _find_blind(address: str, signed: Mapping[str, str], probe: Path) -> list[str]:
    """Nodes that do not see the file. Raises what the Jobs SDK does, and TimeoutError."""
    from ray.job_submission import JobStatus, JobSubmissionClient

    client = JobSubmissionClient(address, headers=dict(signed))
    job = submit_when_ready(
        client,
        entrypoint=f"python -c {shlex.quote(_LOOK)}",
        runtime_env={"env_vars": {"PIXART_PROBE": str(probe)}},
    )
    deadline = time.monotonic() + _JOB_SECONDS
    while not (status := client.get_job_status(job)).is_terminal():
        if time.monotonic() > deadline:
            client.stop_job(job)
            raise TimeoutError(f"job {job} took more than {_JOB_SECONDS:.0f} s")
        time.sleep(0.3)
    lines = client.get_job_logs(job).splitlines() or ["it said nothing"]
    told = [line for line in lines if line.startswith("PIXART-BLIND")]
    if status != JobStatus.SUCCEEDED or not told:
        raise RuntimeError(f"job {job} ended as {status}: {lines[-1]}")
    return told[-1].split()[1:]
