"""Which nodes a recipe needs, by what they do: the same groups on Kubernetes, AWS and SLURM.

``training`` holds the workers of a stage, ``encoding`` captioners and encoders, ``reading`` the
tasks that fetch and decode pictures. Nodes carry the Ray label ``pixart-role`` with these values,
and a recipe's jobs choose by it. What a node of each kind costs is told by ``pixart plan``.
"""

import math
from dataclasses import dataclass
from pathlib import PurePosixPath

from pixart_cluster.recipe import FullRecipe
from pixart_jobs.planner import PlanError, make_plan
from pixart_platform.errors import RecipeError

ROLE = "pixart-role"
SHARED = PurePosixPath("/shared")
"""A folder that all nodes see: the run's own, for what the recipe does not put on S3."""
GPUS_PER_NODE = 8
_ROLES = {
    "data": "reading", "caption": "encoding", "encode": "encoding", "train": "training",
    "evaluate": "training",
}  # fmt: skip
_CPUS_PER_TRAINER = {True: 11, False: 1}  # by use_gpu, as on AWS's p4d
_GIB_PER_TRAINER = {True: 120, False: 6}
_ENCODER_CPUS, _ENCODER_GIB = 7, 28  # for each GPU, as on AWS's g5.2xlarge
_READER_CPUS, _READER_GIB = 15, 28  # of c7i.4xlarge, less what the node itself takes
_MAX_NAME = 39  # KubeRay allows 47, and "-drawing" is ours


@dataclass(frozen=True)
class Group:
    """Nodes alike; each is one Ray node."""

    role: str
    num_nodes: int
    cpus: int
    memory_gib: int
    gpus: int = 0
    is_spot: bool = False
    """Whether it may be taken away with two minutes' notice. Captioning, encoding and reading redo
    what was under way; training goes on with fewer only where ``train.min_workers`` says so."""


def find_groups(recipe: FullRecipe) -> list[Group]:
    """The groups at their largest. Raises RecipeError for what other machines could not run."""
    _check_name(recipe.name)
    _check_places(recipe)
    train, data = recipe.train, recipe.data
    on_node = min(GPUS_PER_NODE, train.num_workers)
    readers = max(data.num_workers, recipe.caption.num_readers, recipe.encode.num_readers)
    return [
        Group(
            "training", math.ceil(train.num_workers / on_node),
            on_node * _CPUS_PER_TRAINER[train.use_gpu] + 1,
            on_node * _GIB_PER_TRAINER[train.use_gpu] + 2,
            gpus=on_node * train.use_gpu, is_spot=train.min_workers is not None,
        ),
        _encoding(recipe),
        Group("reading", math.ceil(readers / _READER_CPUS), _READER_CPUS, _READER_GIB,
              is_spot=True),
    ]  # fmt: skip


def by_role(recipe: FullRecipe) -> FullRecipe:
    """The recipe with each job kept to its group's nodes, unless it says where itself."""
    return recipe.model_copy(update={
        section: getattr(recipe, section).model_copy(update={"nodes": {ROLE: role}})
        for section, role in _ROLES.items() if not getattr(recipe, section).nodes
    })  # fmt: skip


def _encoding(recipe: FullRecipe) -> Group:
    """Captioners and encoders come one after the other, so the larger of both counts."""
    jobs = [(job.num_workers, job.num_gpus) for job in (recipe.caption, recipe.encode)]
    gpus = math.ceil(max(share for _, share in jobs))
    cpus = _ENCODER_CPUS * max(1, gpus)
    on_node = [int(gpus / share) if share else cpus for _, share in jobs]
    nodes = max(math.ceil(count / most) for (count, _), most in zip(jobs, on_node, strict=True))
    return Group("encoding", nodes, cpus, _ENCODER_GIB * max(1, gpus), gpus, is_spot=True)


def fits_small_gpus(recipe: FullRecipe) -> bool:
    """Whether training fits the 40 GB A100 too, by ``pixart plan``."""
    try:
        make_plan(recipe, "a100-40g")
    except PlanError:
        return False
    return True


def _check_name(name: str) -> None:
    if not name[0].isalpha() or len(name) > _MAX_NAME:
        raise RecipeError(
            f"name = {name!r}: Kubernetes wants a letter first, and at most {_MAX_NAME} "
            f"characters; choose another"
        )


def _check_places(recipe: FullRecipe) -> None:
    """Pods and nodes see S3 and the shared folder, and nothing else of what a recipe names."""
    kind, _, source = recipe.data.source.partition(":")
    places = {
        "data.source": source, "data.store": recipe.data.store,
        "train.states": recipe.train.states, "serve.jobs": recipe.serve.jobs,
        "evaluate.reference": recipe.evaluate.reference,
    }  # fmt: skip
    for key, place in places.items():
        if place and not place.startswith(("s3://", f"{SHARED}/")):
            told = f"{kind}:{place}" if key == "data.source" else place
            raise RecipeError(
                f"{key} = {told}: other machines do not see it; write s3://bucket/prefix, or a "
                f"path under {SHARED}, which all of them mount"
            )
    if not recipe.train.snapshots.startswith("s3://"):
        raise RecipeError(
            f"train.snapshots = {recipe.train.snapshots!r}: a team's registry knows snapshots on "
            f"S3 alone; set train.snapshots = s3://bucket/prefix"
        )
