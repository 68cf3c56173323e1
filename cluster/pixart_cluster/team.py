"""MLflow for a team, on Kubernetes: the server as the README starts it, twice, behind one name.

PostgreSQL is a managed one, or any that the team keeps: its address is in a secret, and backing it
up is the team's; of two servers that start on an empty one, one may fail, and is started again.
Artifacts lie in the bucket of ``train.snapshots``. Secrets, by name, in ``pixart-mlflow-server``:
``backend_store_uri`` (``postgresql+psycopg2://...``), ``admin_password``, ``flask_secret_key``, and
``basic_auth.ini`` as a file. TLS ends at the ingress.
"""

from pixart_cluster.kuberay import (
    INGRESS_NAMESPACE,
    MONITORING_NAMESPACE,
    in_namespace,
    network_policy,
    tcp,
)
from pixart_cluster.pods import SECURITY, USER, Document, secret_environment
from pixart_cluster.recipe import FullRecipe

NAME, PORT = "pixart-mlflow", 5000
_SECRET = "pixart-mlflow-server"
_AUTH_FILE = "/etc/pixart/mlflow/basic_auth.ini"
_ENVIRONMENT = {  # variable: secret, key, whether pods start without it
    "MLFLOW_BACKEND_STORE_URI": (_SECRET, "backend_store_uri", False),
    "MLFLOW_AUTH_ADMIN_PASSWORD": (_SECRET, "admin_password", False),
    "MLFLOW_FLASK_SERVER_SECRET_KEY": (_SECRET, "flask_secret_key", False),
    "AWS_ACCESS_KEY_ID": ("pixart-s3", "access_key", True),
    "AWS_SECRET_ACCESS_KEY": ("pixart-s3", "secret_key", True),
}
_PLAIN = {
    "MLFLOW_AUTH_CONFIG_PATH": _AUTH_FILE,
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "HOME": "/tmp",
}
_LABELS = {"app.kubernetes.io/name": NAME}


def mlflow(recipe: FullRecipe, image: str) -> list[Document]:
    """The server, its name, who may reach it, and how many of it stay. The image is ours."""
    bucket = recipe.train.snapshots.removeprefix("s3://").partition("/")[0]
    replicas = 2
    return [
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": NAME, "labels": _LABELS},
            "spec": {
                "replicas": replicas,
                "selector": {"matchLabels": _LABELS},
                "template": {"metadata": {"labels": _LABELS}, "spec": _pod(bucket, image)},
            },
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": NAME},
            "spec": {"selector": _LABELS, "ports": [{"port": PORT, "targetPort": PORT}]},
        },
        {
            "apiVersion": "policy/v1",
            "kind": "PodDisruptionBudget",
            "metadata": {"name": NAME},
            "spec": {"maxUnavailable": 1, "selector": {"matchLabels": _LABELS}},
        },
        _policy(),
    ]


def server_command(bucket: str) -> list[str]:
    """As the README starts it; every name that clients use must be among the allowed hosts."""
    return [
        "mlflow", "server", "--app-name", "basic-auth",
        "--artifacts-destination", f"s3://{bucket}/mlflow",
        "--host", "0.0.0.0", "--port", str(PORT), "--workers", "4",
        "--allowed-hosts", f"{NAME},{NAME}:{PORT},mlflow.example.com",
    ]  # fmt: skip


def _pod(bucket: str, image: str) -> Document:
    limits = {"cpu": "2", "memory": "4Gi"}
    health = {"httpGet": {"path": "/health", "port": PORT}, "timeoutSeconds": 5}
    plain = [{"name": name, "value": value} for name, value in _PLAIN.items()]
    return {
        "automountServiceAccountToken": False,
        "securityContext": {"fsGroup": USER},
        "containers": [
            {
                "name": "mlflow",
                "image": image,
                "command": server_command(bucket),
                "ports": [{"name": "http", "containerPort": PORT}],
                "env": [*secret_environment(_ENVIRONMENT), *plain],
                "resources": {"limits": limits, "requests": limits},
                "securityContext": SECURITY | {"readOnlyRootFilesystem": True},
                "startupProbe": health | {"periodSeconds": 5, "failureThreshold": 36},
                "livenessProbe": health | {"periodSeconds": 20, "failureThreshold": 6},
                "readinessProbe": health | {"periodSeconds": 5, "failureThreshold": 2},
                "volumeMounts": [
                    {"name": "tmp", "mountPath": "/tmp"},
                    {"name": "auth", "mountPath": _AUTH_FILE.rpartition("/")[0], "readOnly": True},
                ],
            }
        ],
        "volumes": [
            {"name": "tmp", "emptyDir": {}},
            {
                "name": "auth",
                "secret": {
                    "secretName": _SECRET,
                    "items": [{"key": "basic_auth.ini", "path": "basic_auth.ini"}],
                },
            },
        ],
    }


def _policy() -> Document:
    """The namespace's own pods, the ingress, and Prometheus' prober."""
    others = [in_namespace(name) for name in (INGRESS_NAMESPACE, MONITORING_NAMESPACE)]
    return network_policy(
        NAME, _LABELS, [{"from": [{"podSelector": {}}, *others], "ports": tcp(PORT)}]
    )
