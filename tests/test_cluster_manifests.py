"""All that ``pixart render`` writes, held against what will read it: Kubernetes' and KubeRay's
schemas, Ray's cluster launcher, Prometheus, Grafana's models, bash; and the image's one step."""

import copy
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from kubernetes_schemas import validate
from ray._private import ray_constants
from ray.autoscaler._private import util as launcher
from ray.autoscaler._private.prom_metrics import AutoscalerPrometheusMetrics
from ray.dashboard.modules.metrics import dashboards as panels_of_ray
from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

from pixart_cluster.groups import ROLE, by_role, find_groups
from pixart_cluster.kuberay import ray_cluster, ray_job
from pixart_cluster.recipe import FullRecipe, read_recipe
from pixart_cluster.render import serve_config, write
from pixart_platform.errors import RecipeError
from pixart_serve.metrics import METERS

REPOSITORY = Path(__file__).parents[1]
EXAMPLES = REPOSITORY / "cluster" / "examples"
IMAGE = "registry.example/pixart-ray:0.1.0"
TEAM = ["serve.api_keys_file=/etc/pixart/keys/keys", "train.snapshots=s3://your-bucket/snapshots"]
HEADINGS = {
    "A lost head node", "A hung collective", "A full disk", "A poisoned checkpoint",
    "A node that keeps dying", "A service that refuses", "A queue that grows",
    "A registry that is away",
}  # fmt: skip
PLAIN = {  # variables that are no secrets
    "RAY_USAGE_STATS_ENABLED", "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "PIXART_CACHE",
    "HF_HOME", "HOME", "DO_NOT_TRACK", "MLFLOW_AUTH_CONFIG_PATH",
    "MLFLOW_DISABLE_TELEMETRY", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION",
}  # fmt: skip
Document = dict[str, Any]


def documents(name: str) -> list[Document]:
    return list(yaml.safe_load_all((EXAMPLES / name).read_text()))


def manifests() -> list[Document]:
    names = ("raycluster", "rayjob", "rayservice", "mlflow", "metrics")
    return [document for name in names for document in documents(f"{name}.yaml")]


def of_kind(parts: list[Document], kind: str) -> list[Document]:
    return [part for part in parts if part["kind"] == kind]


def pod_specs(value: Any) -> Iterator[Document]:
    """Every pod's spec in a manifest, however deep."""
    if isinstance(value, dict):
        if "containers" in value:
            yield value
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from pod_specs(part)


def small(*settings: str) -> FullRecipe:
    return read_recipe("digits", [*TEAM, *settings])


def test_the_examples_are_what_the_recipe_gives(tmp_path: Path) -> None:
    paths = write(read_recipe("pixart-alpha", TEAM), tmp_path, IMAGE)
    kept = {p.relative_to(EXAMPLES) for p in EXAMPLES.rglob("*") if p.is_file()}
    assert {p.relative_to(tmp_path) for p in paths} == kept
    [serve] = documents("serve.yaml")
    assert serve == serve_config(read_recipe("pixart-alpha", TEAM))
    for name in kept:
        assert (tmp_path / name).read_bytes() == (EXAMPLES / name).read_bytes(), (
            f"{name} differs: pixart render pixart-alpha cluster/examples --image {IMAGE} "
            f"--set {' --set '.join(TEAM)}"
        )


def test_a_recipe_without_gpus_is_rendered_without_any(tmp_path: Path) -> None:
    texts = [path.read_text() for path in write(small(), tmp_path, IMAGE)]
    assert not [text for text in texts if "nvidia.com/gpu" in text or "p4d" in text]
    for name in ("raycluster.yaml", "rayjob.yaml", "rayservice.yaml"):
        for document in yaml.safe_load_all((tmp_path / name).read_text()):
            validate(document)


def test_a_rendered_recipe_is_the_recipe() -> None:
    assert read_recipe(str(EXAMPLES / "recipe.yaml")) == by_role(read_recipe("pixart-alpha", TEAM))
    [told] = of_kind(documents("rayjob.yaml"), "ConfigMap")
    assert yaml.safe_load(told["data"]["recipe.yaml"]) == documents("recipe.yaml")[0]


@pytest.mark.parametrize(
    "manifest", manifests(), ids=lambda m: f"{m['kind']}-{m['metadata']['name']}"
)
def test_kubernetes_takes_each_manifest_and_no_unknown_field(manifest: Document) -> None:
    validate(manifest)
    field = "data" if manifest["kind"] == "ConfigMap" else "spec"
    wrong = copy.deepcopy(manifest)
    wrong[field] = wrong[field] | {"replica": [{}]}
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        validate(wrong)


@pytest.mark.parametrize(
    "spec", [*pod_specs(manifests())], ids=lambda s: s["containers"][0]["name"]
)
def test_pods_run_as_nobody_in_particular_and_know_secrets_by_name(spec: Document) -> None:
    for container in spec["containers"]:
        security = container["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["allowPrivilegeEscalation"] is False
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert {"livenessProbe", "readinessProbe"} <= container.keys()
        limits = container["resources"]
        assert limits["limits"] == limits["requests"], "so that no pod is put out for another"
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in spec["volumes"]}
        for variable in container["env"]:
            assert ("value" in variable) == (variable["name"] in PLAIN), variable["name"]


def test_secrets_policies_and_budgets_meet_the_pods_they_are_for() -> None:
    for name in ("raycluster", "rayjob", "rayservice"):
        parts = documents(f"{name}.yaml")
        [ray] = [part for part in parts if part["apiVersion"] == "ray.io/v1"]
        spec = ray["spec"]
        cluster = spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec
        templates = [group["template"] for group in cluster["workerGroupSpecs"]]
        templates.append(cluster["headGroupSpec"]["template"])
        labels = [template["metadata"]["labels"] for template in templates]
        for guard in parts:
            if guard["kind"] == "NetworkPolicy":
                wanted = guard["spec"]["podSelector"]["matchLabels"]
            elif guard["kind"] == "PodDisruptionBudget":
                wanted = guard["spec"]["selector"]["matchLabels"]
                assert isinstance(guard["spec"]["minAvailable"], int), "a resource without scale"
            else:
                continue
            assert any(wanted.items() <= some.items() for some in labels), guard["metadata"]
        assert cluster["authOptions"] == {"mode": "token"}


def test_mlflow_is_started_as_the_readme_starts_it() -> None:
    [pod] = pod_specs(documents("mlflow.yaml"))
    [container] = pod["containers"]
    blocks = re.findall(r"```sh\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.S)
    [told] = [block for block in blocks if "mlflow server" in block]
    options = [word for word in container["command"] if word.startswith("--")]
    assert options == re.findall(r"--[a-z-]+", told)
    given = {variable["name"]: variable.get("value") for variable in container["env"]}
    for name, value in re.findall(r"(\w+)=(\S+)", told.partition("mlflow server")[0]):
        assert given[name] == value
    hosts = container["command"][-1].split(",")
    [service] = of_kind(documents("mlflow.yaml"), "Service")
    assert f"{service['metadata']['name']}:{service['spec']['ports'][0]['port']}" in hosts
    assert container["securityContext"]["readOnlyRootFilesystem"] is True


def test_only_those_who_need_a_port_reach_it() -> None:
    """By port: where from, as namespaces; None is the same namespace, a name its own cluster."""
    reached: dict[tuple[str, Any], set[Any]] = {}
    for policy in of_kind(documents("rayservice.yaml"), "NetworkPolicy"):
        for rule in policy["spec"]["ingress"]:
            sources: set[Any] = set()
            for source in rule["from"]:
                [(key, selector)] = source.items()
                chosen = selector.get("matchLabels", {None: None})
                sources |= set(chosen.values())
                assert key == "podSelector" or chosen != {None: None}, "not everybody"
            for port in rule.get("ports", [{"port": "all"}]):
                reached.setdefault((policy["metadata"]["name"], port["port"]), set()).update(
                    sources
                )
    own = "pixart-alpha-drawing"
    assert reached == {
        (own, "all"): {own},
        (own, 8080): {"monitoring"},
        (own, 44217): {"monitoring"},
        (own, 8000): {"ingress", "kuberay-system"},
        (f"{own}-head", 8265): {None, "kuberay-system"},
    }


def test_groups_are_as_large_as_the_recipe_asks() -> None:
    groups = {group.role: group for group in find_groups(read_recipe("pixart-alpha", TEAM))}
    train, encode, read = (groups[role] for role in ("training", "encoding", "reading"))
    assert (train.num_nodes, train.gpus, train.is_spot) == (8, 8, False)
    assert (encode.num_nodes, encode.gpus, encode.is_spot) == (64, 1, True)
    assert read.num_nodes * read.cpus >= 512
    for settings, wanted in (
        (["encode.num_gpus=0.5", "encode.num_workers=5"], (3, 1)),
        (["caption.num_gpus=4", "caption.num_workers=2", "encode.num_gpus=1",
          "encode.num_workers=4"], (2, 4)),
        (["encode.num_workers=15"], (3, 0)),
    ):  # fmt: skip
        group = find_groups(small(*settings))[1]
        assert (group.num_nodes, group.gpus) == wanted, settings
    elastic = find_groups(small("train.num_workers=12", "train.min_workers=2"))[0]
    assert (elastic.num_nodes, elastic.gpus, elastic.is_spot) == (2, 0, True)


def test_a_cluster_grows_from_nothing_and_a_queued_job_has_all_at_once() -> None:
    """KubeRay's and Kueue's own rules, which their webhooks hold and their schemas cannot."""
    recipe = read_recipe("pixart-alpha", TEAM)
    standing = ray_cluster(recipe, IMAGE)[0]["spec"]
    assert standing["enableInTreeAutoscaling"] is True
    assert standing["autoscalerOptions"]["version"] == "v2"
    job = of_kind(ray_job(recipe, IMAGE), "RayJob")[0]
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    spec = job["spec"]
    assert spec["suspend"]
    assert spec["shutdownAfterJobFinishes"]
    assert "enableInTreeAutoscaling" not in spec["rayClusterSpec"]
    assert len(spec["rayClusterSpec"]["workerGroupSpecs"]) <= 7
    for cluster, is_fixed in ((standing, False), (spec["rayClusterSpec"], True)):
        for group in cluster["workerGroupSpecs"]:
            sizes = [group[f"{key}eplicas"] for key in ("r", "minR", "maxR")]
            assert sizes == [sizes[2] * is_fixed] * 2 + sizes[2:]
            assert group["labels"] == {"pixart-role": group["groupName"]}
            pod = group["template"]["spec"]
            assert "restartPolicy" not in pod, "autoscaler v2 wants Never, KubeRay sets it"
            taints = {taint["key"] for taint in pod.get("tolerations", [])}
            assert ("pixart-spot" in taints) == (group["groupName"] != "training")
            assert ("nvidia.com/gpu" in taints) == ("nodeSelector" in pod)


def test_ray_knows_the_variable_that_gives_its_nodes_time_to_leave() -> None:
    """Where Ray has none of that name it would end at once, or after its own 30 seconds."""
    name = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
    assert hasattr(ray_constants, name)
    for spec in pod_specs([m for m in manifests() if m["apiVersion"] == "ray.io/v1"]):
        [given] = [v["value"] for v in spec["containers"][0]["env"] if v["name"] == name]
        assert int(given) < spec["terminationGracePeriodSeconds"]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"train.snapshots": ""}, r"train\.snapshots = '': .* s3://bucket/prefix"),
        ({"data.source": "folder:/home/ada"}, "data.source = folder:/home/ada: .* /shared"),
        ({"train.states": "states"}, "train.states = states: other machines"),
        ({"serve.jobs": "/var/jobs"}, "serve.jobs = /var/jobs: other machines"),
        ({"name": "2nd"}, "name = '2nd': .* letter first"),
        ({"name": "a" * 40}, "at most 39"),
        ({"serve.api_keys_file": ""}, r"serve\.api_keys_file.*serve\.allow_anonymous"),
    ],
)  # fmt: skip
def test_what_other_machines_could_not_run_is_refused_before_any_file(
    settings: dict[str, str], told: str, tmp_path: Path
) -> None:
    given = dict(text.split("=", 1) for text in TEAM) | settings
    recipe = read_recipe("digits", [f"{key}={value!r}" for key, value in given.items()])
    with pytest.raises(RecipeError, match=told):
        write(recipe, tmp_path / "new", IMAGE)
    assert not (tmp_path / "new").exists()


def test_rays_launcher_takes_the_aws_cluster_and_its_groups() -> None:
    [config] = documents("aws.yaml")
    prepared = launcher.prepare_config(copy.deepcopy(config))
    launcher.validate_config(prepared)
    types = prepared["available_node_types"]
    assert types.keys() == {"head", "training", "encoding", "reading"}
    assert types["training"]["resources"]["GPU"] == 8
    assert types["training"]["node_config"]["InstanceType"].startswith("p4d")
    spot = {name for name, kind in types.items() if "InstanceMarketOptions" in kind["node_config"]}
    assert spot == {"encoding", "reading"}
    assert config["provider"]["use_internal_ips"], "Ray opens SSH to everybody otherwise"
    config["available_node_types"]["training"]["label"] = {}
    with pytest.raises(jsonschema.ValidationError, match="label"):
        launcher.validate_config(launcher.prepare_config(config))


def test_aws_nodes_are_those_the_plan_says_the_recipe_fits() -> None:
    from pixart_cluster.hosts import aws_cluster

    def kind_of(*settings: str) -> str:
        recipe = read_recipe("pixart-alpha", [*TEAM, *settings])
        types = aws_cluster(recipe, IMAGE)["available_node_types"]
        return str(types["training"]["node_config"]["InstanceType"])

    assert kind_of() == "p4d.24xlarge"
    assert kind_of("train.recompute_blocks=false") == "p4de.24xlarge"


def program(name: str) -> str:
    return shutil.which(name) or pytest.skip(
        f"no {name} here: apt-get install prometheus shellcheck (make setup, as root on Debian)"
    )


def run(*command: str | Path, cwd: Path = EXAMPLES) -> None:
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_bash_and_shellcheck_have_nothing_to_say_of_the_slurm_script() -> None:
    run("bash", "-n", "slurm.sh")
    run(program("shellcheck"), "slurm.sh")


def test_the_slurm_script_asks_for_every_group_and_ray_takes_its_options() -> None:
    from ray.scripts.scripts import start

    text = (EXAMPLES / "slurm.sh").read_text()
    asked = [int(n) for n in re.findall(r"^#SBATCH --nodes=(\d+)", text, re.M)]
    started = [int(n) for n in re.findall(r"^srun .*--nodes=(\d+)", text, re.M)]
    assert asked == [35, 64, 8]
    assert started == [34, 64, 8], "and the batch host, which is the head"
    options = {option for parameter in start.params for option in parameter.opts}
    lines = re.findall(r"ray start .*", text)
    assert len(lines) == 4
    assert {o for line in lines for o in re.findall(r"--[a-z-]+", line)} <= options
    assert "RAY_AUTH_MODE=token" in text


def test_prometheus_takes_the_config_and_the_rules() -> None:
    run(program("promtool"), "check", "config", "prometheus.yml")
    run(program("promtool"), "check", "rules", "alerts.yml")


def alerts() -> list[Document]:
    [rules] = documents("alerts.yml")
    return [rule for group in rules["groups"] for rule in group["rules"]]


def test_each_alert_leads_to_a_chapter_of_the_runbook() -> None:
    anchors = {heading.lower().replace(" ", "-") for heading in HEADINGS}
    links = [rule["annotations"]["runbook_url"] for rule in alerts()]
    assert {link.removeprefix("cluster/README.md#") for link in links} == anchors
    runbook = REPOSITORY / "cluster" / "README.md"
    if runbook.exists():
        found = re.findall(r"^#+ (.*)$", runbook.read_text(), re.M)
        assert set(found) >= HEADINGS


SESSION = 'SessionName="s"'
ALERT_CASES: dict[str, tuple[dict[str, str], str, str, dict[str, str], str]] = {
    # alert: series with values a minute, the minute it is silent and the one it fires, then its
    # labels beside the severity, and how what it says ends
    "TrainingStandsStill": (
        {f'ray_node_gpu_power_milliwatts{{{SESSION},pixart_role="training"}}': "390000x30 90000x60",
         f'ray_train_controller_state{{{SESSION},ray_train_controller_state="RUNNING"}}': "1x90"},
        "40m", "50m", {"SessionName": "s"}, "for data, or for storage.",
    ),
    "HeadNodeLost": (
        {'up{pixart_role="head",instance="h:8080"}': "1x10 0x30"}, "11m", "15m", {},
        "No head of Ray answers.",
    ),
    "DiskFull": (
        {'ray_node_disk_free{instance="a"}': "50x10 5x30",
         'ray_node_disk_usage{instance="a"}': "50x10 95x30"},
        "12m", "20m", {"instance": "a"}, "a has 5% of its disk left.",
    ),
    "ServiceRefuses": (
        {'ray_pixart_request_seconds_count{replica="r"}': "0+60x40",
         'ray_pixart_refusals_total{reason="queue_full"}': "0x15 0+6x30",
         'ray_pixart_refusals_total{reason="bad_size"}': "0+30x40"},
        "14m", "30m", {}, "10% of requests are refused or given up.",
    ),
    "QueueGrows": (
        {'ray_pixart_backlog_seconds{replica="r"}': "9x10 60x30"}, "15m", "25m", {},
        "1m 0s of work waits at each replica, three times what the recipe wants.",
    ),
    "WorkersDie": (
        {'ray_node_manager_unexpected_worker_failure_total{instance="a"}': "0x40 0+1x40"},
        "40m", "55m", {"instance": "a"}, "More than ten workers died on a within half an hour.",
    ),
    "TrainingRestarts": (
        {f'ray_train_controller_state{{{SESSION},ray_train_controller_state="RESTARTING"}}':
         "0x60 0 1 0 0 1 0 0 1 0 0 1 0 0 1 0 0 1"},
        "60m", "77m", {"SessionName": "s"}, "from the same state perhaps.",
    ),
    "NewVersionFails": (
        {"ray_pixart_swaps_total": "0x20 1x30", "ray_pixart_pictures_total": "0+60x50",
         "ray_pixart_pictures_failed_total": "0x20 0+6x30"},
        "19m", "32m", {}, "another version went live: pixart rollback.",
    ),
    "RegistryAway": (
        {'probe_success{job="registry",instance="i"}': "1x10 0x20"}, "12m", "16m",
        {"job": "registry", "instance": "i"}, "promotion and new replicas cannot.",
    ),
}  # fmt: skip


def spelled(values: str) -> str:
    """``3x5`` is a value held (Prometheus: ``3+0x5``); ``0+2x5`` grows."""
    return re.sub(r"(?<!\S)(\d+)x(\d+)", r"\1+0x\2", values)


def test_alerts_fire_when_they_should_and_not_before(tmp_path: Path) -> None:
    shutil.copy(EXAMPLES / "alerts.yml", tmp_path)
    rules = {rule["alert"]: rule for rule in alerts()}
    tests = []
    for name, (series, silent, firing, labels, told) in ALERT_CASES.items():
        rule = rules[name]
        summary = rule["annotations"]["summary"]
        assert told in summary or "{{" in summary
        written = rule["annotations"] | {"summary": told if "{{" in summary else summary}
        fired = {"exp_labels": rule["labels"] | labels, "exp_annotations": written}
        tests.append({
            "name": name, "interval": "1m",
            "alert_rule_test": [
                {"eval_time": silent, "alertname": name, "exp_alerts": []},
                {"eval_time": firing, "alertname": name, "exp_alerts": [fired]},
            ],
            "input_series": [{"series": s, "values": spelled(v)} for s, v in series.items()],
        })  # fmt: skip
    cases = {"rule_files": ["alerts.yml"], "evaluation_interval": "1m", "tests": tests}
    (tmp_path / "cases.yml").write_text(yaml.safe_dump(cases))
    run(program("promtool"), "test", "rules", "cases.yml", cwd=tmp_path)


def boards() -> dict[str, Document]:
    return {p.stem: json.loads(p.read_text()) for p in (EXAMPLES / "dashboards").glob("*.json")}


def survives(given: Any, read: Any) -> bool:
    """Whether all that was given is there after Grafana's models have read and written it."""
    if isinstance(given, dict):
        return isinstance(read, dict) and all(
            key in read and survives(value, read[key]) for key, value in given.items()
        )
    if isinstance(given, list):
        same = isinstance(read, list) and len(given) == len(read)
        return same and all(map(survives, given, read))
    return bool(given == read)


@pytest.mark.parametrize("name", ["data", "training", "serving", "cost"])
def test_grafanas_models_know_every_field_of_the_dashboards(name: str) -> None:
    register_default_plugins()

    def reread(board: Document) -> Any:
        return json.loads(JSONEncoder().encode(Dashboard.from_json(board)))

    board = boards()[name]
    assert survives(board, reread(board))
    for place in (board, board["panels"][0], board["panels"][0]["targets"][0]):
        place["refesh"] = "x"
        assert not survives(board, reread(board))
        del place["refesh"]
    corners = {(p["gridPos"]["x"], p["gridPos"]["y"]) for p in board["panels"]}
    assert len(corners) == len(board["panels"]) == len({p["title"] for p in board["panels"]})


def queries() -> dict[str, str]:
    """All PromQL there is, by where it stands."""
    found = {rule["alert"]: rule["expr"] for rule in alerts()}
    for name, board in boards().items():
        for panel in board["panels"]:
            for target in panel["targets"]:
                where = f"{name}: {panel['title']} {target['refId']}"
                found[where] = target["expr"].replace("$__rate_interval", "5m")
    return found


def test_prometheus_understands_every_query(tmp_path: Path) -> None:
    rules = [
        {"record": f"query:{i}", "expr": expr, "labels": {"at": where}}
        for i, (where, expr) in enumerate(queries().items())
    ]
    rules_file = tmp_path / "queries.yml"
    rules_file.write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": rules}]}))
    run(program("promtool"), "check", "rules", rules_file)


def metrics_in(expr: str) -> set[str]:
    """Names of series in a query: what is no function, label, keyword, number or text."""
    text = re.sub(r"\{[^}]*\}|\[[^]]*\]|\"[^\"]*\"", " ", expr)
    text = re.sub(r"\b(by|on|ignoring|without)\s*\([^)]*\)", " ", text)
    words = re.findall(r"(?<![\w.])[a-zA-Z_:][\w:]*(?!\w*\s*\()", text)
    return set(words) - {"and", "or", "unless", "by", "on", "offset"}


def exported() -> set[str]:
    """All series that there are: ours, Ray's by its own lists and dashboards, and two of others."""
    ours = set()
    for meter in METERS:
        endings = ("_bucket", "_sum", "_count") if meter.kind == "histogram" else ("",)
        ours |= {f"ray_{meter.name}{ending}" for ending in endings}
    [folder] = panels_of_ray.__path__
    texts = "".join(path.read_text() for path in Path(folder).glob("*_panels.py"))
    rays = {f"ray_{name}" for name in METRICS_GAUGES} | set(re.findall(r"\b(ray_\w+)\{", texts))
    scaling = AutoscalerPrometheusMetrics(session_name="s").registry.collect()
    return ours | rays | {m.name for m in scaling} | {"up", "probe_success"}


def test_every_metric_that_is_watched_exists() -> None:
    known = exported()
    used = {where: metrics_in(expr) for where, expr in queries().items()}
    assert [where for where, names in used.items() if not names] == [
        "serving: Work that waits at a replica B"  # the recipe's own number
    ]
    wrong = {where: names - known for where, names in used.items() if names - known}
    assert not wrong
    ours = {name for names in used.values() for name in names if name.startswith("ray_pixart_")}
    assert len(ours) >= 12
    assert metrics_in('sum by (a) (rate(ray_nope{b="c"}[5m])) > 3e2') == {"ray_nope"}


def test_the_image_is_built_by_the_step_that_setup_takes() -> None:
    lines = (REPOSITORY / "cluster" / "Dockerfile").read_text().splitlines()
    words = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    steps = [text for word, text in words if word == "RUN"]
    makefile = (REPOSITORY / "Makefile").read_text()
    for step in steps:
        made = re.fullmatch(r"make (\w+)( TORCH=)?", step)
        assert made, f"{step}: no make target"
        assert re.search(rf"^\t\$\(MAKE\) {made[1]}\b", makefile, re.M), "setup takes it too"
    assert len(steps) == 1
    [base] = [text for word, text in words if word == "FROM"]
    assert re.fullmatch(r"\S+:\d[\w.-]+", base), "pinned by its tag"
    assert words[-1] == ["USER", "1000:1000"], "not root, and the pods' user"
    assert "check: setup" in makefile
    assert "make check" in (REPOSITORY / ".ci" / "run").read_text()


def test_jobs_keep_to_their_groups_unless_the_recipe_says_where() -> None:
    told = by_role(read_recipe("pixart-alpha", [*TEAM, "encode.nodes.zone=b"]))
    assert told.train.nodes == told.evaluate.nodes == {ROLE: "training"}
    assert told.caption.nodes == {ROLE: "encoding"}
    assert told.data.nodes == {ROLE: "reading"}
    assert told.encode.nodes == {"zone": "b"}
