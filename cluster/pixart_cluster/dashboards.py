"""Four dashboards for Grafana: data, training, serving, cost.

They say in one screen whether work moves, what holds it up, and what it costs; Ray's own
dashboards, which its head writes, go deeper. Prices are those of ``pixart plan``. A data source is
chosen at the top; import the files, or provision the folder.
"""

from dataclasses import dataclass

from pixart_cluster.monitoring import ROLE_LABEL
from pixart_cluster.pods import Document
from pixart_cluster.recipe import FullRecipe

_WIDTH, _HEIGHT, _COLUMNS = 12, 8, 2
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_GRAFANA_SCHEMA = 39


@dataclass(frozen=True)
class Panel:
    """One chart: queries by legend; ``unit`` in Grafana's words."""

    title: str
    unit: str
    queries: dict[str, str]
    meaning: str = ""


def dashboards(recipe: FullRecipe) -> dict[str, Document]:
    """By file name without its ending."""
    return {
        name: _dashboard(name, panels)
        for name, panels in {
            "data": _data(), "training": _training(), "serving": _serving(recipe),
            "cost": _cost(recipe),
        }.items()
    }  # fmt: skip


def _quantiles(metric: str) -> dict[str, str]:
    return {
        f"p{share}": f"histogram_quantile(0.{share}, sum by (le) "
        f"(rate({metric}_bucket[$__rate_interval])))"
        for share in (50, 95)
    }


def _rate(metric: str, by: str) -> dict[str, str]:
    return {f"{{{{{by}}}}}": f"sum by ({by}) (rate({metric}[$__rate_interval]))"}


def _data() -> list[Panel]:
    role = ROLE_LABEL
    return [
        Panel("Rows done", "rowsps", _rate("ray_data_output_rows", "operator"),
              "Partitions count as one row until they are written; see the legend's operator."),
        Panel("Bytes done", "Bps", _rate("ray_data_output_bytes", "operator")),
        Panel("Tasks running", "short",
              {"{{operator}}": "sum by (operator) (ray_data_num_tasks_running)"}),
        Panel("Tasks failed", "short",
              {"{{operator}}": "sum by (operator) (increase(ray_data_num_tasks_failed[15m]))"},
              "A task that fails is tried again; a partition that fails for good ends the job."),
        Panel("Waiting before an operator", "short",
              {"{{operator}}":
               "sum by (operator) (ray_data_obj_store_mem_internal_inqueue_blocks)"},
              "What piles up before encoders means too few encoders; nothing there, too few "
              "readers."),
        Panel("GPUs and CPUs of data jobs", "short",
              {"GPUs of {{operator}}": "sum by (operator) (ray_data_gpu_usage_cores)",
               "CPUs of {{operator}}": "sum by (operator) (ray_data_cpu_usage_cores)"}),
        Panel("Object store", "bytes",
              {"{{Location}}": "sum by (Location) (ray_object_store_memory)",
               "of": 'sum(ray_resources{Name="object_store_memory"})'}),
        Panel("Spilled to disks", "Bps", _rate("ray_data_spilled_bytes", "operator")),
        Panel("GPU use of encoding", "percent",
              {"{{instance}}": f'avg by (instance) (ray_node_gpus_utilization{{{role}="encoding"}})'
               }),
        Panel("Network in", "Bps",
              {f"{{{{{role}}}}}": f"sum by ({role}) (ray_node_network_receive_speed)"},
              "From S3, and between nodes."),
    ]  # fmt: skip


def _training() -> list[Panel]:
    on = f'{{{ROLE_LABEL}="training"}}'
    return [
        Panel("State", "short",
              {"{{ray_train_run_name}} {{ray_train_controller_state}}":
               "sum by (ray_train_run_name, ray_train_controller_state) "
               "(ray_train_controller_state)"},
              "Losses and images seen are in MLflow, by run."),
        Panel("GPU use", "percent",
              {"{{instance}}": f"avg by (instance) (ray_node_gpus_utilization{on})"},
              "A collective that hangs shows full use: look at power."),
        Panel("GPU power", "mwatt",
              {"{{instance}}": f"sum by (instance) (ray_node_gpu_power_milliwatts{on})"}),
        Panel("GPU memory", "mbytes",
              {"most": f"max(ray_node_gram_used{on})", "mean": f"avg(ray_node_gram_used{on})"}),
        Panel("GPU temperature", "celsius",
              {"{{instance}}": f"max by (instance) (ray_node_gpu_temperature_celsius{on})"}),
        Panel("Network between nodes", "Bps",
              {"sent": f"sum(ray_node_network_send_speed{on})",
               "received": f"sum(ray_node_network_receive_speed{on})"},
              "Of the kernel's interfaces; what goes by EFA is not among it."),
        Panel("Disks read and written", "Bps",
              {"read": f"sum(ray_node_disk_io_read_speed{on})",
               "written": f"sum(ray_node_disk_io_write_speed{on})"},
              "Tables are read from copies on each node."),
        Panel("Disk left", "percentunit",
              {"{{instance}}": f"ray_node_disk_free{on} / (ray_node_disk_free{on} + "
               f"ray_node_disk_usage{on})"}),
        Panel("Starting and ending workers", "s",
              {"start of {{ray_train_run_name}}": "sum by (ray_train_run_name) "
               "(ray_train_worker_group_start_total_time_s)",
               "end of {{ray_train_run_name}}": "sum by (ray_train_run_name) "
               "(ray_train_worker_group_shutdown_total_time_s)"}),
        Panel("Host memory", "percentunit",
              {"{{instance}}": f"ray_node_mem_used{on} / ray_node_mem_total{on}"}),
    ]  # fmt: skip


def _serving(recipe: FullRecipe) -> list[Panel]:
    wanted = f"vector({recipe.serve.target_wait_seconds:g})"
    return [
        Panel("Requests", "reqps", _rate("ray_pixart_request_seconds_count", "status")),
        Panel("Refused, by reason", "reqps", _rate("ray_pixart_refusals_total", "reason")),
        Panel("From a picture's acceptance to its pixels", "s",
              _quantiles("ray_pixart_picture_seconds")),
        Panel("From a picture's acceptance to its first turn", "s",
              _quantiles("ray_pixart_queue_wait_seconds")),
        Panel("Work that waits at a replica", "s",
              {"{{replica}}": "sum by (replica) (ray_pixart_backlog_seconds)", "wanted": wanted}),
        Panel("One step", "s", _quantiles("ray_pixart_step_seconds")),
        Panel("Rows in a step", "short", _quantiles("ray_pixart_step_rows")),
        Panel("Text, pixels and files", "s",
              {f"{what} p95": _quantiles(f"ray_pixart_{what}_seconds")["p95"]
               for what in ("text_encode", "decode", "picture_encode")}),
        Panel("Pictures by version", "cps", _rate("ray_pixart_pictures_total", "version")),
        Panel("Pictures failed or cancelled", "cps",
              {what: f"sum(rate(ray_pixart_pictures_{what}_total[$__rate_interval]))"
               for what in ("failed", "cancelled")}),
        Panel("Replicas", "short",
              {"healthy": "sum(ray_serve_deployment_replica_healthy)",
               "draw version {{version}}": 'count_values("version", ray_pixart_active_version)'}),
        Panel("Work accepted, by API key", "short",
              {"{{key}}": "topk(10, sum by (key) (rate(ray_pixart_key_units_total[5m])))"},
              "Rows x steps x image tokens a second."),
    ]  # fmt: skip


def _cost(recipe: FullRecipe) -> list[Panel]:
    """Of GPUs that are held, whether they work or not; on demand, as ``pixart plan`` reckons."""
    name = recipe.accounting.accelerator
    price = recipe.accounting.find_accelerator(name).usd_per_hour
    held = "ray_node_gpus_available"
    trained = f'{{{ROLE_LABEL}="training"}}'
    working = f"sum(ray_node_gpus_utilization{trained}) / 100 / sum({held}{trained})"
    watts = "sum(ray_node_gpu_power_milliwatts) / 1000"
    return [
        Panel("GPUs held", "short", {f"{{{{{ROLE_LABEL}}}}}": f"sum by ({ROLE_LABEL}) ({held})"}),
        Panel("CPUs held", "short",
              {f"{{{{{ROLE_LABEL}}}}}": f"sum by ({ROLE_LABEL}) (ray_node_cpu_count)"}),
        Panel(f"Dollars an hour for training, as {name}", "currencyUSD",
              {"training": f"sum({held}{trained}) * {price:g}"},
              f"{price:g} USD an hour, the recipe's accounting."),
        Panel("Dollars for training in the last day", "currencyUSD",
              {"training": f"avg_over_time(sum({held}{trained})[1d:5m]) * 24 * {price:g}"}),
        Panel("Share of training's GPU time that is used", "percentunit", {"used": working}),
        Panel("GPU power", "watt", {"all": watts}, "Boards alone, without hosts and cooling."),
        Panel("Energy of GPUs in the last day", "kwatth",
              {"all": f"avg_over_time(({watts})[1d:5m]) * 24 / 1000"}),
        Panel("GPUs a drawn picture a second", "short",
              {"GPUs": f'sum({held}{{{ROLE_LABEL}="drawing"}}) / '
               "sum(rate(ray_pixart_pictures_total[5m]))"}),
        Panel("Nodes wanted and not there", "short",
              {"pending": "sum(autoscaler_pending_nodes)",
               "failed": "sum(autoscaler_recently_failed_nodes)"}),
        Panel("Nodes that answer", "short",
              {f"{{{{{ROLE_LABEL}}}}}": f'sum by ({ROLE_LABEL}) (up{{{ROLE_LABEL}!=""}})'}),
    ]  # fmt: skip


def _dashboard(name: str, panels: list[Panel]) -> Document:
    return {
        "uid": f"pixart-{name}",
        "title": f"pixart: {name}",
        "tags": ["pixart"],
        "schemaVersion": _GRAFANA_SCHEMA,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {
            "list": [{"name": "datasource", "type": "datasource", "query": "prometheus"}]
        },
        "panels": [_chart(number, panel) for number, panel in enumerate(panels)],
    }


def _chart(number: int, panel: Panel) -> Document:
    row, column = divmod(number, _COLUMNS)
    place = {"h": _HEIGHT, "w": _WIDTH, "x": column * _WIDTH, "y": row * _HEIGHT}
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.meaning,
        "datasource": _SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": panel.unit}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + i), "expr": expr, "legendFormat": legend}
            for i, (legend, expr) in enumerate(panel.queries.items())
        ],
    }
