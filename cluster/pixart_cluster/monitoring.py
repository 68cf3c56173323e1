"""What Prometheus is told: where to scrape, and what to wake somebody for.

Each alert names the runbook's chapter (``cluster/README.md``), and no metric is used that Ray's
agents, its autoscaler, the service (``METERS``) or Prometheus' own prober do not export.
"""

from pixart_cluster.groups import ROLE
from pixart_cluster.kuberay import MONITORING_NAMESPACE, NAMESPACE
from pixart_cluster.pods import METRICS_PORTS, Document
from pixart_cluster.recipe import FullRecipe
from pixart_cluster.team import NAME as MLFLOW
from pixart_cluster.team import PORT as MLFLOW_PORT

ALERTS_FILE = "alerts.yml"
RUNBOOK = "cluster/README.md"
PROBES = "registry"  # a scrape job's name
ROLES = ("head", "training", "encoding", "reading", "drawing")
ROLE_LABEL = ROLE.replace("-", "_")
_IDLE_MILLIWATTS = 150_000  # an A100 that waits draws 60 to 120 W, also in a collective that hangs


def scrape_config() -> Document:
    """Ray's nodes by the names of ``metrics_services``, or from the file that Ray's head writes;
    and MLflow, by its answer. Prometheus needs no rights in Kubernetes for it."""
    probed = f"http://{MLFLOW}.{NAMESPACE}:{MLFLOW_PORT}/health"
    return {
        "global": {"scrape_interval": "15s", "evaluation_interval": "15s"},
        "rule_files": [ALERTS_FILE],
        "scrape_configs": [
            *(_scrape_role(role) for role in ROLES),
            {
                "job_name": "ray-hosts",  # ray up and SLURM: Prometheus beside the head
                "file_sd_configs": [
                    {"files": ["/tmp/ray/prom_metrics_service_discovery.json"]}
                ],
            },
            {
                "job_name": PROBES,  # by blackbox_exporter, with its module http_2xx
                "metrics_path": "/probe",
                "params": {"module": ["http_2xx"]},
                "static_configs": [{"targets": [probed]}],
                "relabel_configs": [
                    {"source_labels": ["__address__"], "target_label": "__param_target"},
                    {"source_labels": ["__param_target"], "target_label": "instance"},
                    {"target_label": "__address__",
                     "replacement": f"blackbox-exporter.{MONITORING_NAMESPACE}:9115"},
                ],
            },
        ],
    }  # fmt: skip


def metrics_services() -> list[Document]:
    """A name for each role's pods, of all clusters in the namespace, ready or not."""
    return [
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": f"pixart-metrics-{role}"},
            "spec": {
                "clusterIP": "None",
                "publishNotReadyAddresses": True,
                "selector": {"ray.io/is-ray-node": "yes", ROLE: role},
                "ports": [{"name": "metrics", "port": METRICS_PORTS["metrics"]}],
            },
        }
        for role in ROLES
    ]


def _scrape_role(role: str) -> Document:
    name = f"pixart-metrics-{role}.{NAMESPACE}.svc"
    ports = METRICS_PORTS.values() if role == "head" else [METRICS_PORTS["metrics"]]
    return {
        "job_name": f"ray-{role}",
        "dns_sd_configs": [{"names": [name], "type": "A", "port": port} for port in ports],
        "relabel_configs": [{"target_label": ROLE_LABEL, "replacement": role}],
    }


def alert_rules(recipe: FullRecipe) -> Document:
    """Rules for Prometheus; waits that count as long are the recipe's."""
    return {
        "groups": [
            {"name": "cluster", "rules": _cluster_rules()},
            {"name": "training", "rules": _training_rules()},
            {"name": "serving", "rules": _serving_rules(recipe.serve.target_wait_seconds)},
        ]
    }


def _cluster_rules() -> list[Document]:
    disk = "ray_node_disk_free / (ray_node_disk_free + ray_node_disk_usage)"
    return [
        _rule("HeadNodeLost", f'absent(up{{{ROLE_LABEL}="head"}} == 1)', "2m", "page",
              "No head of Ray answers.", "A lost head node"),
        _rule("DiskFull", f"{disk} < 0.1", "5m", "page",
              "{{ $labels.instance }} has {{ $value | humanizePercentage }} of its disk left.",
              "A full disk"),
        _rule("ObjectStoreSpills",
              'sum by (SessionName) (rate(ray_data_spilled_bytes[15m])) > 100e6', "15m", "ticket",
              "Ray writes {{ $value | humanize }}B/s of objects to disks.", "A full disk"),
        _rule("WorkersDie",
              "sum by (instance) (increase(ray_node_manager_unexpected_worker_failure_total[30m]))"
              " > 10", "0m", "ticket",
              "More than ten workers died on {{ $labels.instance }} within half an hour.",
              "A node that keeps dying"),
        _rule("NodesFail", "sum(autoscaler_recently_failed_nodes) > 2", "5m", "ticket",
              "{{ $value }} nodes failed, and new ones are started for them.",
              "A node that keeps dying"),
        _rule("RegistryAway", f'probe_success{{job="{PROBES}"}} == 0', "3m", "page",
              "MLflow does not answer: training goes on, promotion and new replicas cannot.",
              "A registry that is away"),
    ]  # fmt: skip


def _training_rules() -> list[Document]:
    running = 'max by (SessionName) (ray_train_controller_state{ray_train_controller_state="%s"})'
    power = f'avg by (SessionName) (ray_node_gpu_power_milliwatts{{{ROLE_LABEL}="training"}})'
    return [
        _rule("TrainingStandsStill",
              f"{power} < {_IDLE_MILLIWATTS} and on (SessionName) {running % 'RUNNING'} == 1",
              "15m", "page", "Training runs, and its GPUs draw no power: they wait for one of "
              "them, for data, or for storage.", "A hung collective"),
        _rule("TrainingRestarts",
              f"changes(({running % 'RESTARTING'})[1h:1m]) >= 8", "0m", "page",
              "Training began again and again within an hour, from the same state perhaps.",
              "A poisoned checkpoint"),
    ]  # fmt: skip


def _serving_rules(target_wait_seconds: float) -> list[Document]:
    requests = "sum(rate(ray_pixart_request_seconds_count[5m]))"
    ours = "queue_full|too_late|not_ready|timed_out|drawing_failed|unhealthy"
    refused = f'sum(rate(ray_pixart_refusals_total{{reason=~"{ours}"}}[5m]))'
    failed = "sum(increase(ray_pixart_pictures_failed_total[10m]))"
    drawn = "sum(increase(ray_pixart_pictures_total[10m]))"
    return [
        _rule("ServiceRefuses", f"{refused} / {requests} > 0.05", "5m", "page",
              "{{ $value | humanizePercentage }} of requests are refused or given up.",
              "A service that refuses"),
        _rule("ServiceGone",
              "absent(ray_pixart_active_version) and on () sum(ray_serve_deployment_replica_healthy"
              ') == 0', "2m", "page", "No replica draws.", "A service that refuses"),
        _rule("QueueGrows", f"avg(ray_pixart_backlog_seconds) > {3 * target_wait_seconds:g}",
              "10m", "ticket", "{{ $value | humanizeDuration }} of work waits at each replica, "
              "three times what the recipe wants.", "A queue that grows"),
        _rule("NewVersionFails",
              f"{failed} > 0.02 * {drawn} and on () sum(increase(ray_pixart_swaps_total[1h])) > 0",
              "0m", "page", "Pictures fail since another version went live: pixart rollback.",
              "A poisoned checkpoint"),
    ]  # fmt: skip


def _rule(name: str, expr: str, wait: str, severity: str, told: str, chapter: str) -> Document:
    anchor = chapter.lower().replace(" ", "-")
    return {
        "alert": name,
        "expr": expr,
        "for": wait,
        "labels": {"severity": severity},
        "annotations": {"summary": told, "runbook_url": f"{RUNBOOK}#{anchor}"},
    }
