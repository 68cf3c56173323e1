"""What a cluster is told: files that Serve and KubeRay take, and Serve draws with when given them.

The curl lines of the README are asked of that very service.
"""

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from kubernetes_schemas import validate
from processes import wait_for
from ray.serve.schema import ServeDeploySchema
from serving_load import register_models

from pixart_cluster.kuberay import ray_service
from pixart_cluster.local import local_ray
from pixart_cluster.recipe import FullRecipe, read_recipe
from pixart_cluster.render import serve_config
from pixart_cluster.server import free_port
from pixart_platform.errors import RecipeError
from pixart_serve.app import Deployed, ServiceError, deploy

REPOSITORY = Path(__file__).parents[1]
IMAGE = "registry.example/pixart-ray:1"


def recipe_with(**serve: Any) -> FullRecipe:
    given = [f"serve.{key}={value}" for key, value in serve.items()]
    return read_recipe("digits", given or ["serve.allow_anonymous=true"])


def test_serve_takes_the_config_and_its_builder_the_arguments() -> None:
    recipe = recipe_with(api_keys_file="/etc/pixart/keys", max_rows=16, port=9000)
    config = ServeDeploySchema.model_validate(serve_config(recipe))
    assert config.http_options.port == 9000
    [application] = config.applications
    told = Deployed.model_validate(application.args)
    assert told.settings == recipe.serve.model_copy(update={"host": "0.0.0.0"})
    assert (told.model_name, told.default_steps) == ("digits", recipe.draw.num_steps)


def test_a_service_that_asks_nobody_for_a_key_is_not_rendered_unawares() -> None:
    with pytest.raises(RecipeError, match=r"serve\.api_keys_file.*serve\.allow_anonymous"):
        serve_config(read_recipe("digits"))


def test_without_a_registry_the_builder_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ServiceError, match="MLFLOW_TRACKING_URI"):
        deploy(Deployed.model_validate(serve_config(recipe_with())["applications"][0]["args"]))


@pytest.mark.parametrize(
    "serve",
    [
        {"allow_anonymous": True},
        {"api_keys_file": "/etc/pixart/keys", "num_gpus": 0.5, "max_replicas": 8},
        {"allow_anonymous": True, "jobs": "/shared/jobs"},
    ],
)
def test_kuberay_takes_the_manifest(serve: dict[str, Any]) -> None:
    for document in documents_of(recipe_with(**serve)):
        validate(document)


def documents_of(recipe: FullRecipe) -> list[dict[str, Any]]:
    return ray_service(recipe, IMAGE, serve_config(recipe))


def test_the_manifest_asks_for_what_the_recipe_wants_and_keeps_secrets_out() -> None:
    recipe = recipe_with(
        api_keys_file="/etc/pixart/keys", num_gpus=1, num_replicas=2, max_replicas=8
    )
    service, *guards = documents_of(recipe)
    cluster = service["spec"]["rayClusterConfig"]
    [group] = cluster["workerGroupSpecs"]
    assert (group["minReplicas"], group["maxReplicas"]) == (2, 8)
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["authOptions"] == {"mode": "token"}
    pod = group["template"]["spec"]
    [container] = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert pod["terminationGracePeriodSeconds"] > recipe.serve.max_wait_seconds
    assert container["readinessProbe"]["httpGet"]["port"] == recipe.serve.port
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {"shm": "/dev/shm", "cache": "/cache", "api-keys": "/etc/pixart"}
    assert pod["volumes"][-1]["secret"]["items"] == [{"key": "keys", "path": "keys"}]
    budgets = {g["metadata"]["name"]: g["spec"] for g in guards if "Disruption" in g["kind"]}
    assert budgets["digits-drawing-drawing"]["minAvailable"] == 1


def curl_lines() -> list[tuple[str, int]]:
    """The README's commands, with the status each is to be answered with."""
    [block] = re.findall(
        r"```sh\nexport API=(.*?)```", (REPOSITORY / "README.md").read_text(), re.S
    )
    commands = re.findall(r"^(curl .*?)\s+# (\d{3})$", block, re.M | re.S)
    assert {int(status) for _, status in commands} == {200, 202, 400, 404, 429}
    return [(command, int(status)) for command, status in commands]


@pytest.mark.slow
def test_a_rendered_config_draws_and_answers_the_readmes_curl_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, port = register_models(tmp_path, 2), free_port()
    recipe = read_recipe(
        "digits",
        ["serve.allow_anonymous=true", f"serve.port={port}", f"serve.jobs={tmp_path / 'jobs'}"],
    )
    config = tmp_path / "serve.yaml"
    config.write_text(yaml.safe_dump(serve_config(recipe)))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", models.uri)  # of the cluster's nodes
    environment = os.environ | {"RAY_AUTH_MODE": "token"}  # of who comes from outside
    with local_ray(tmp_path / "logs"), (tmp_path / "log").open("w") as log:
        address = ray.get_runtime_context().gcs_address
        serving = subprocess.Popen(
            [Path(sys.executable).parent / "serve", "run", "--address", address, config],
            env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=tmp_path,
        )  # fmt: skip
        try:
            health = f"http://127.0.0.1:{port}/healthz"
            wait_for(lambda: is_up(health) or serving.poll() is not None, "the service")
            assert serving.poll() is None, (tmp_path / "log").read_text()[-2000:]
            wrong = [found for found in (ask(line, port) for line in curl_lines()) if found]
        finally:
            serving.kill()  # its Ray ends with this block
            serving.wait()
    assert not wrong, (tmp_path / "log").read_text()[-2000:]


def is_up(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        time.sleep(0.2)
        return False


def ask(line: tuple[str, int], port: int) -> str:
    """What is wrong with the answer to a line of the README, or nothing."""
    command, wanted = line
    variables = {
        "API": f"http://127.0.0.1:{port}/v1", "JSON": "content-type: application/json",
    }  # fmt: skip
    counted = command.replace("curl ", r"curl -w '\n%{http_code}' ", 1)
    done = subprocess.run(
        ["bash", "-c", counted], env=os.environ | variables, capture_output=True, text=True,
        timeout=60, check=True,
    )  # fmt: skip
    body, status = done.stdout.rsplit("\n", 1)
    if int(status) != wanted:
        return f"{command}: {status}, not {wanted}: {body[:300]}"
    if '"stream"' in command:
        kinds = [line.split()[1] for line in body.splitlines() if line.startswith("event:")]
        return "" if kinds[-1] == "image_generation.completed" and len(kinds) == 3 else f"{kinds}"
    if '"n": 2' in command and "jobs" not in command:
        return "" if len(json.loads(body)["data"]) == 2 else body[:300]
    return "" if wanted < 300 or json.loads(body)["error"]["message"] else body[:300]
