"""``pixart render``: the whole of what a cluster is told of a recipe, as files in one folder.

Kubernetes: ``raycluster.yaml``, ``rayjob.yaml``, ``rayservice.yaml``, ``mlflow.yaml`` and
``metrics.yaml``. Without it: ``aws.yaml``, ``slurm.sh``, ``serve.yaml`` for a Ray that is there.
Who watches: ``prometheus.yml``, ``alerts.yml`` and ``dashboards/``. The recipe with nothing left
out: ``recipe.yaml``. The same recipe gives the same bytes.
"""

import json
from pathlib import Path
from typing import Any

import yaml

from pixart_cluster import kuberay
from pixart_cluster.dashboards import dashboards
from pixart_cluster.groups import by_role
from pixart_cluster.hosts import aws_cluster, slurm_script
from pixart_cluster.monitoring import ALERTS_FILE, alert_rules, metrics_services, scrape_config
from pixart_cluster.pods import Document
from pixart_cluster.recipe import FullRecipe
from pixart_cluster.team import mlflow
from pixart_platform.errors import RecipeError
from pixart_platform.storage import write_atomic
from pixart_serve.app import APPLICATION, BUILDER, Deployed
from pixart_serve.settings import ServeSettings


def write(recipe: FullRecipe, dest: Path, image: str) -> list[Path]:
    """Make the files in ``dest``; their paths. ``image`` is the Dockerfile's.

    Raises RecipeError for a recipe that cannot run on other machines.
    """
    recipe = by_role(recipe)
    serve = serve_config(recipe)
    documents: dict[str, list[Document]] = {
        "raycluster.yaml": kuberay.ray_cluster(recipe, image),
        "rayjob.yaml": kuberay.ray_job(recipe, image),
        "rayservice.yaml": kuberay.ray_service(recipe, image, serve),
        "mlflow.yaml": mlflow(recipe, image),
        "metrics.yaml": metrics_services(),
        "serve.yaml": [serve],
        "aws.yaml": [aws_cluster(recipe, image)],
        "prometheus.yml": [scrape_config()],
        ALERTS_FILE: [alert_rules(recipe)],
    }
    head = f"# Made by: pixart render, from the recipe {recipe.name}. Change that instead.\n"
    texts = {
        "recipe.yaml": head + kuberay.resolved(recipe),
        **{name: head + _dump(parts) for name, parts in documents.items()},
        "slurm.sh": slurm_script(recipe),
        **{
            f"dashboards/{name}.json": json.dumps(board, indent=1) + "\n"
            for name, board in dashboards(recipe).items()
        },
    }
    for name, text in texts.items():
        write_atomic(dest / name, text.encode())
    return [dest / name for name in texts]


def serve_config(recipe: FullRecipe) -> dict[str, Any]:
    """For ``serve deploy``: Ray Serve's ServeDeploySchema."""
    try:  # pods are asked by other machines
        settings = ServeSettings.model_validate(recipe.serve.model_dump() | {"host": "0.0.0.0"})
    except ValueError as error:
        raise RecipeError(
            "serve: other machines will ask, and no key is wanted of them; set "
            "serve.api_keys_file, or serve.allow_anonymous = true if they all may"
        ) from error
    arguments = Deployed(
        settings=settings, model_name=recipe.name, default_steps=recipe.draw.num_steps,
        default_guidance=recipe.draw.guidance,
        default_guidance_rescale=recipe.draw.guidance_rescale,
    )  # fmt: skip
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": settings.host, "port": settings.port},
        "logging_config": {"log_level": "WARNING", "enable_access_log": False},
        "applications": [
            {
                "name": APPLICATION, "route_prefix": "/", "import_path": BUILDER,
                "args": arguments.model_dump(mode="json", exclude_defaults=True),
            }
        ],
    }  # fmt: skip


def _dump(documents: list[Document]) -> str:
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=100)


class _Dumper(yaml.SafeDumper):
    """Text of several lines as a block, lists below their key with an indent, no anchors."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, "|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)
