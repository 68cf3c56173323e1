"""A recipe as KubeRay's resources, as of v1.6, with what guards them.

``raycluster.yaml`` stands and is submitted to: its groups start at nothing and grow as jobs ask.
``rayjob.yaml`` waits in a queue of Kueue until all of its nodes can be had at once, runs the recipe
on them and lets them go; Kueue wants such a cluster at one size, so GPUs for training wait while
captions are written: take it where a quota counts more than that (without Kueue, set ``suspend``
to false). ``rayservice.yaml`` draws; a new
image starts a new cluster and then moves over, a change of the recipe's ``serve`` part alone is
applied in place.
"""

import math
from pathlib import PurePosixPath

import yaml

from pixart_cluster.groups import ROLE, SHARED, Group, find_groups
from pixart_cluster.pods import (
    METRICS_PORTS,
    PORTS,
    SECURITY,
    Document,
    head,
    labels_of,
    leave_in_order,
    pod,
    ready_when_serving,
)
from pixart_cluster.recipe import FullRecipe
from pixart_serve.scaling import shutdown_seconds

NAMESPACE = "pixart"  # where a team applies all of it
QUEUE = "pixart"  # a LocalQueue of the team's own
OPERATOR_NAMESPACE, MONITORING_NAMESPACE, INGRESS_NAMESPACE = (
    "kuberay-system", "monitoring", "ingress",
)  # fmt: skip
_RECIPE_PATH = PurePosixPath("/etc/pixart/recipe/recipe.yaml")
_IDLE_SECONDS = 300
_REPLICA_CPUS, _REPLICA_GIB = 4, 24  # decoding and HTTP beside the drawing thread


def ray_cluster(recipe: FullRecipe, image: str) -> list[Document]:
    """A cluster that grows and shrinks, for ``pixart submit``."""
    name, groups = f"{recipe.name}-ray", find_groups(recipe)
    spec = _cluster(name, groups, image) | _autoscaler()
    return [_resource("RayCluster", name, recipe.name, spec), *_guards(name, groups)]


def ray_job(recipe: FullRecipe, image: str) -> list[Document]:
    """The recipe on a cluster of its own, queued; tried again it continues what is there."""
    name, groups = f"{recipe.name}-run", find_groups(recipe)
    cluster = _cluster(name, groups, image)
    for group in cluster["workerGroupSpecs"]:
        group["replicas"] = group["minReplicas"] = group["maxReplicas"]
    _mount_recipe(cluster["headGroupSpec"]["template"]["spec"], recipe)
    spec = {
        "entrypoint": f"pixart run {_RECIPE_PATH} --root {SHARED}/{recipe.name}",
        "submissionMode": "K8sJobMode",
        "backoffLimit": 3,
        "suspend": True,  # until Kueue admits it
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": 300,
        "rayClusterSpec": cluster,
    }
    job = _resource("RayJob", name, recipe.name, spec)
    job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = QUEUE
    return [_recipe_map(recipe), job, *_guards(name, groups)]


def ray_service(recipe: FullRecipe, image: str, serve_config: Document) -> list[Document]:
    """What draws; ``serve_config`` is Ray Serve's."""
    settings, name = recipe.serve, f"{recipe.name}-drawing"
    most = max(settings.max_replicas, settings.num_replicas)
    gpus = math.ceil(settings.num_gpus)
    group = Group("drawing", most, _REPLICA_CPUS, _REPLICA_GIB, gpus)
    is_shared = settings.jobs.startswith(f"{SHARED}/")
    cluster = _cluster(name, [group], image, is_shared=is_shared)
    [workers] = cluster["workerGroupSpecs"]
    workers |= {"replicas": settings.num_replicas, "minReplicas": settings.num_replicas}
    workers["rayStartParams"] = {"num-cpus": "1"}  # one replica a pod
    ready_when_serving(workers["template"], settings.port)
    leave_in_order(workers["template"]["spec"], math.ceil(shutdown_seconds(settings)))
    if settings.api_keys_file:
        for template in (workers["template"], cluster["headGroupSpec"]["template"]):
            _mount_keys(template["spec"], PurePosixPath(settings.api_keys_file))
    spec = {
        "upgradeStrategy": {"type": "NewCluster"},
        "excludeHeadPodFromServeSvc": True,
        "serveConfigV2": yaml.safe_dump(serve_config, sort_keys=False),
        "rayClusterConfig": cluster | (_autoscaler() if most > settings.num_replicas else {}),
    }
    service = _resource("RayService", name, recipe.name, spec)
    kept = Group("drawing", max(1, settings.num_replicas - 1), 0, 0)
    return [service, *_guards(name, [kept], settings.port)]


def resolved(recipe: FullRecipe) -> str:
    """The whole recipe as YAML, defaults and overrides in."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def _resource(kind: str, name: str, part_of: str, spec: Document) -> Document:
    return {
        "apiVersion": "ray.io/v1",
        "kind": kind,
        "metadata": {"name": name, "labels": {"app.kubernetes.io/part-of": part_of}},
        "spec": spec,
    }


def _cluster(name: str, groups: list[Group], image: str, *, is_shared: bool = True) -> Document:
    import ray

    return {
        "rayVersion": ray.__version__,
        "authOptions": {"mode": "token"},
        "headGroupSpec": {
            "rayStartParams": {"num-cpus": "0"},
            "template": head(name, image, is_shared=is_shared),
        },
        "workerGroupSpecs": [
            {
                "groupName": group.role,
                "replicas": 0, "minReplicas": 0, "maxReplicas": group.num_nodes,
                "rayStartParams": {},
                "labels": {ROLE: group.role},
                "template": pod(name, group, image, is_shared=is_shared),
            }
            for group in groups
        ],
    }  # fmt: skip


def _autoscaler() -> Document:
    options = {"version": "v2", "idleTimeoutSeconds": _IDLE_SECONDS, "securityContext": SECURITY}
    return {"enableInTreeAutoscaling": True, "autoscalerOptions": options}


def _recipe_map(recipe: FullRecipe) -> Document:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{recipe.name}-recipe"},
        "data": {_RECIPE_PATH.name: resolved(recipe)},
    }


def _mount(spec: Document, name: str, path: PurePosixPath, volume: Document) -> None:
    mount = {"name": name, "mountPath": str(path.parent), "readOnly": True}
    spec["containers"][0]["volumeMounts"].append(mount)
    spec["volumes"].append({"name": name, **volume})


def _mount_recipe(spec: Document, recipe: FullRecipe) -> None:
    _mount(spec, "recipe", _RECIPE_PATH, {"configMap": {"name": f"{recipe.name}-recipe"}})


def _mount_keys(spec: Document, path: PurePosixPath) -> None:
    items = [{"key": "keys", "path": path.name}]
    secret = {"secretName": "pixart-api-keys", "items": items}
    _mount(spec, "api-keys", path, {"secret": secret})


def _guards(name: str, groups: list[Group], serve_port: int | None = None) -> list[Document]:
    """Who may reach the pods, and how many of them stay while nodes are drained.

    KubeRay's resources have no scale, so a budget must be a number of pods that stay: of training
    all, of serving all but one (a single one stays). Encoding and reading may go at any time.
    """
    kept = [Group("head", 1, 0, 0), *(g for g in groups if g.role in ("training", "drawing"))]
    return [*(_budget(name, group) for group in kept), *_policies(name, serve_port)]


def _budget(name: str, group: Group) -> Document:
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": {"name": f"{name}-{group.role}"},
        "spec": {
            "minAvailable": group.num_nodes,
            "selector": {"matchLabels": labels_of(name, group.role)},
        },
    }


def _policies(name: str, serve_port: int | None) -> list[Document]:
    """Pods of a cluster talk to each other; beside them each port has those who need it.

    The head's dashboard and job port: the namespace's own, and KubeRay's operator. Metrics:
    Prometheus. The service: the ingress, where TLS ends. What pods may ask is not limited.
    """
    members = {"podSelector": {"matchLabels": {"app.kubernetes.io/instance": name}}}
    operator = in_namespace(OPERATOR_NAMESPACE)
    ingress: list[Document] = [
        {"from": [members]},
        {"from": [in_namespace(MONITORING_NAMESPACE)], "ports": tcp(*METRICS_PORTS.values())},
    ]
    if serve_port:
        visitors = [in_namespace(INGRESS_NAMESPACE), operator]
        ingress.append({"from": visitors, "ports": tcp(serve_port)})
    dashboard: Document = {
        "from": [{"podSelector": {}}, operator], "ports": tcp(PORTS["dashboard"]),
    }  # fmt: skip
    return [
        network_policy(name, {"app.kubernetes.io/instance": name}, ingress),
        network_policy(f"{name}-head", labels_of(name, "head"), [dashboard]),
    ]


def network_policy(name: str, selected: dict[str, str], ingress: list[Document]) -> Document:
    """Who may reach the pods with these labels."""
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name},
        "spec": {
            "podSelector": {"matchLabels": selected},
            "policyTypes": ["Ingress"],
            "ingress": ingress,
        },
    }


def in_namespace(name: str) -> Document:
    """Every pod of a namespace."""
    return {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": name}}}


def tcp(*numbers: int) -> list[Document]:
    """Ports of a policy."""
    return [{"protocol": "TCP", "port": number} for number in numbers]
