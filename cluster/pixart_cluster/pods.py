"""Pods of Ray nodes: what all of them have, on KubeRay as of 1.6.

Nobody is root, nothing is privileged, and secrets are named, never written: ``pixart-mlflow`` (uri,
and if it asks for them username and password), ``pixart-s3`` (access_key, secret_key; without it
the pod's own role), ``pixart-hub`` (token, where a model hub wants one) and ``pixart-api-keys``
(the file of keys). Ray's token is made by KubeRay. The claim ``pixart-shared`` (ReadWriteMany) is
the team's own. Nodes with GPUs are labelled ``pixart-role`` as the groups are, so that nothing
small takes a place of training's; nodes that may be taken away have the taint ``pixart-spot``.
"""

from typing import Any

from pixart_cluster.groups import ROLE, SHARED, Group

Document = dict[str, Any]
PORTS = {"gcs-server": 6379, "dashboard": 8265, "client": 10001}
METRICS_PORTS = {"metrics": 8080, "autoscaler": 44217}  # KubeRay's choice, and Ray's own
USER = 1000  # of the Dockerfile
HEAD = Group("head", 1, cpus=4, memory_gib=16)
_AGENT_PORT = 52365
_ENVIRONMENT = {  # variable: secret, key, whether pods start without it
    "MLFLOW_TRACKING_URI": ("pixart-mlflow", "uri", False),
    "MLFLOW_TRACKING_USERNAME": ("pixart-mlflow", "username", True),
    "MLFLOW_TRACKING_PASSWORD": ("pixart-mlflow", "password", True),
    "AWS_ACCESS_KEY_ID": ("pixart-s3", "access_key", True),
    "AWS_SECRET_ACCESS_KEY": ("pixart-s3", "secret_key", True),
    "HF_TOKEN": ("pixart-hub", "token", True),
}
_CACHE = "/cache"
_DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
_SHARE_OF_MEMORY = 0.4  # for /dev/shm: Ray's object store takes 0.3, NCCL and torch the rest
_NOTICE_SECONDS = 90  # of the two minutes that clouds give
_GRACE = 30  # seconds to end processes in, after that
SECURITY: Document = {
    "allowPrivilegeEscalation": False, "runAsNonRoot": True, "runAsUser": USER,
    "capabilities": {"drop": ["ALL"]}, "seccompProfile": {"type": "RuntimeDefault"},
}  # fmt: skip


def pod(instance: str, group: Group, image: str, *, is_shared: bool = True) -> Document:
    """The template of a group's pods, which belong to the cluster ``instance``.

    ``is_shared``: whether they mount the shared folder.
    """
    role, gib = group.role, group.memory_gib
    limits: Document = {"cpu": str(group.cpus), "memory": f"{gib}Gi"}
    if group.gpus:
        limits["nvidia.com/gpu"] = str(group.gpus)
    container: Document = {
        "name": f"ray-{role}",
        "image": image,
        "env": [*secret_environment(_ENVIRONMENT), *_plain_environment(is_shared)],
        "resources": {"limits": limits, "requests": dict(limits)},
        "securityContext": dict(SECURITY),
        "volumeMounts": [
            {"name": "shm", "mountPath": "/dev/shm"},
            {"name": "cache", "mountPath": _CACHE},
        ],
        "livenessProbe": _probe("/api/local_raylet_healthz", _AGENT_PORT, failures=24),
        "readinessProbe": _probe("/api/local_raylet_healthz", _AGENT_PORT, failures=3),
    }
    shm = {"medium": "Memory", "sizeLimit": f"{int(gib * _SHARE_OF_MEMORY)}Gi"}
    spec: Document = {
        "automountServiceAccountToken": role == "head",
        "securityContext": {"fsGroup": USER},
        "containers": [container],
        "volumes": [{"name": "shm", "emptyDir": shm}, {"name": "cache", "emptyDir": {}}],
    }
    if is_shared:
        container["volumeMounts"].append({"name": "shared", "mountPath": str(SHARED)})
        claim = {"claimName": "pixart-shared"}
        spec["volumes"].append({"name": "shared", "persistentVolumeClaim": claim})
    if group.gpus:
        spec["nodeSelector"] = {ROLE: role}
    if taints := ["nvidia.com/gpu"] * bool(group.gpus) + ["pixart-spot"] * group.is_spot:
        spec["tolerations"] = [_toleration(key) for key in taints]
    leave_in_order(spec, _NOTICE_SECONDS)
    return {"metadata": {"labels": labels_of(instance, role)}, "spec": spec}


def head(instance: str, image: str, *, is_shared: bool = True) -> Document:
    """Ray's own processes and the driver; tasks go elsewhere (``num-cpus: 0``)."""
    template = pod(instance, HEAD, image, is_shared=is_shared)
    [container] = template["spec"]["containers"]
    container["ports"] = [{"name": n, "containerPort": p} for n, p in PORTS.items()]
    container["readinessProbe"] = _probe("/api/gcs_healthz", PORTS["dashboard"], failures=3)
    return template


def ready_when_serving(template: Document, port: int) -> None:
    """Requests are sent to a pod while its Serve proxy says that it can take them."""
    [container] = template["spec"]["containers"]
    container["ports"] = [{"name": "serve", "containerPort": port}]
    container["readinessProbe"] = _probe("/-/healthz", port, failures=1)


def labels_of(instance: str, role: str) -> dict[str, str]:
    """What policies and budgets select by; ``app.kubernetes.io/name`` is KubeRay's own."""
    return {"app.kubernetes.io/instance": instance, ROLE: role}


def secret_environment(variables: dict[str, tuple[str, str, bool]]) -> list[Document]:
    """Environment variables from (secret, key, whether pods start without it)."""
    return [
        {
            "name": variable,
            "valueFrom": {"secretKeyRef": {"name": secret, "key": key, "optional": optional}},
        }
        for variable, (secret, key, optional) in variables.items()
    ]


def leave_in_order(spec: Document, seconds: int) -> None:
    """Give Ray's node so long when its pod is told to end, as before a spot node is taken.

    Ray then tells its cluster: no new tasks come, training saves a state, Serve finishes requests.
    """
    environment = spec["containers"][0]["env"]
    environment[:] = [e for e in environment if e["name"] != _DRAIN]
    environment.append({"name": _DRAIN, "value": str(seconds)})
    spec["terminationGracePeriodSeconds"] = seconds + _GRACE


def _plain_environment(is_shared: bool) -> list[Document]:
    """Models of a hub are fetched once for all nodes where they share a folder."""
    plain = {
        "PIXART_CACHE": f"{_CACHE}/copies", "HF_HOME": f"{SHARED if is_shared else _CACHE}/hub",
        "RAY_USAGE_STATS_ENABLED": "0",
    }  # fmt: skip
    return [{"name": name, "value": value} for name, value in plain.items()]


def _probe(path: str, port: int, failures: int) -> Document:
    """Ray asks for no token at these paths; no shell or wget is needed in the image."""
    return {
        "httpGet": {"path": path, "port": port},
        "initialDelaySeconds": 20, "periodSeconds": 5, "timeoutSeconds": 5,
        "failureThreshold": failures,
    }  # fmt: skip


def _toleration(key: str) -> Document:
    return {"key": key, "operator": "Exists", "effect": "NoSchedule"}
