"""The whole product on one machine: pipeline, service, one picture over HTTP, report.

Nothing here is special to the demo but the last steps: the pipeline is the code a cluster runs.
"""

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pixart_cluster.console import ConsoleMonitor
from pixart_cluster.local import some_ray
from pixart_cluster.recipe import FullRecipe
from pixart_jobs import report
from pixart_jobs.pipeline import Pipeline, Result, StageResult
from pixart_jobs.workspace import Workspace
from pixart_platform.registry import Registry, check_source
from pixart_platform.storage import open_folder, write_atomic
from pixart_platform.tracking import hide_password

_FALLBACK_PROMPT = "a picture"


def run(recipe: FullRecipe, root: Path, monitor: ConsoleMonitor, registry: str = "") -> Result:
    """``pixart run``: the pipeline alone, on a local Ray. ``registry`` is MLflow's address."""
    _check_registry(recipe, root, registry)
    with some_ray(root) as scratch:
        result = Pipeline(recipe, Workspace.under(root, scratch, registry), monitor).run()
    told = next_steps(root, recipe, registry)
    report.write(root, result, image=None, baseline=None, next_steps=told)
    return result


def train(
    recipe: FullRecipe, stage: str, root: Path, monitor: ConsoleMonitor, registry: str = ""
) -> StageResult:
    """``pixart train``: the tables, and one stage on top of the registry."""
    _check_registry(recipe, root, registry)
    with some_ray(root) as scratch:
        return Pipeline(recipe, Workspace.under(root, scratch, registry), monitor).train(stage)


def _check_registry(recipe: FullRecipe, root: Path, registry: str) -> None:
    """Raise RegistryError at once if a server does not know us, or cannot know our snapshots."""
    if registry:
        check_source(registry, open_folder(recipe.train.snapshots or root))
        Registry(registry, recipe.name).aliases()


def demo(
    recipe: FullRecipe,
    root: Path,
    monitor: ConsoleMonitor,
    *,
    with_baseline: bool = False,
    wait: Callable[[str], None] | None = None,
) -> dict[str, object]:
    """``pixart demo``: everything; returns the summary. ``wait`` keeps the service up until done.

    Raises PixartError or ModelInputError, at once where the port is taken.
    """
    from pixart_serve import app

    app.check_port(recipe.serve)
    with some_ray(root) as scratch:
        space = Workspace.under(root, scratch)
        result = Pipeline(recipe, space, monitor).run()
        baseline = None
        if with_baseline:
            monitor.note("baseline: the paper's objective for the same number of images")
            baseline = Pipeline(baseline_of(recipe), space, monitor).run(promote_result=False)
        url = app.start(
            recipe.serve, registry_uri=space.tracking_uri, model_name=recipe.name,
            default_steps=recipe.draw.num_steps, default_guidance=recipe.draw.guidance,
            default_guidance_rescale=recipe.draw.guidance_rescale, jobs=root / "jobs",
        )  # fmt: skip
        try:
            prompt = next(iter(recipe.train.preview_prompts), _FALLBACK_PROMPT)
            image = root / "picture.png"
            write_atomic(image, request_picture(url, recipe.name, prompt))
            summary = report.write(
                root, result, image=image, baseline=baseline, next_steps=next_steps(root, recipe)
            )
            if wait:
                wait(url)
        finally:
            app.stop()
    return summary


def baseline_of(recipe: FullRecipe) -> FullRecipe:
    """The same run with the paper's objective at the rate that suits it best here."""
    stages = {
        name: stage.model_copy(
            update={"optimizer": stage.optimizer.model_copy(
                update={"learning_rate": stage.optimizer.learning_rate / 2}
            )}
        )
        for name, stage in recipe.stages.items()
    }  # fmt: skip
    train = recipe.train.model_copy(update={"objective": "iddpm"})
    name = f"{recipe.name}-baseline"
    return recipe.model_copy(update={"name": name, "train": train, "stages": stages})


def request_picture(url: str, model: str, prompt: str) -> bytes:
    """Ask the service as any client would: the official openai package."""
    from openai import OpenAI

    client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=120)
    extras: dict[str, Any] = {"seed": 7}
    response = client.images.generate(model=model, prompt=prompt, extra_body=extras)
    assert response.data is not None
    return base64.b64decode(response.data[0].b64_json or "")


def next_steps(root: Path, recipe: FullRecipe, registry: str = "") -> str:
    """Three commands to try."""
    here = Path.cwd()
    where = root.relative_to(here) if root.is_relative_to(here) else root
    asked = f" --registry {hide_password(registry)}" if registry else ""
    return "\n".join(
        [
            f'pixart serve --root {where}{asked}      # then POST {{"prompt": ...}} to '
            f"http://{recipe.serve.host}:{recipe.serve.port}/v1/images/generations",
            f"open {hide_password(registry)}" if registry else f"pixart up --no-ray --root {where}",
            "pixart run --root runs/mine --set data.source=folder:PATH --set name=mine",
        ]
    )
