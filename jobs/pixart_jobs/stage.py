"""A training stage as a plan: what decides its weights, what it reads, what comes of it.

A stage is named by the digest of everything that decides its weights (settings, tables, parent),
so running it again finds the finished snapshot, or the newest state, or starts. How it runs, how
often it saves and on how many workers is not part of that.
"""

import base64
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pixart_jobs.encode import unpack_features
from pixart_jobs.recipe import Recipe
from pixart_jobs.stage_task import LatentTask
from pixart_jobs.train_settings import StageSettings
from pixart_models.config import ModelInputError, NetworkConfig
from pixart_models.dit import DiT
from pixart_models.pixart import PixArt
from pixart_models.reparameterize import adapt, check_compatible, reparameterize
from pixart_models.snapshot import (
    SnapshotConfig,
    build_network,
    load_config,
    load_network,
    save_snapshot,
)
from pixart_platform.batches import Condition, RowIndex
from pixart_platform.checkpoint import State, StateStore
from pixart_platform.manifest import MANIFEST_FILE, FileRecord, Manifest, load_manifest
from pixart_platform.optimizer import AVERAGE
from pixart_platform.recipe import digest_of
from pixart_platform.storage import open_folder, publish_folder
from pixart_platform.tables import Table

SNAPSHOT_SCHEMA = "snapshot/1"
# Switches of a network that came later.
_OFF = (("qk_norm", False), ("adaln", "single"), ("text_in", "cross"))


@dataclass(frozen=True)
class StageInputs:
    """The tables a stage reads and the snapshot it starts from."""

    images: Table
    text: Table
    latents: Table
    parent: Path | None
    """On the driver's disk; workers need its digest only."""
    parent_digest: str = field(init=False)

    def __post_init__(self) -> None:
        digest = load_manifest(self.parent).digest if self.parent else ""
        object.__setattr__(self, "parent_digest", digest)

    def digests(self) -> dict[str, str]:
        found = {
            "images": self.images.digest,
            "latents": self.latents.digest,
            "text": self.text.digest,
        }
        if self.parent:
            found["parent"] = self.parent_digest
        return found


@dataclass(frozen=True)
class StagePlan:
    """One stage, ready to run anywhere."""

    name: str
    recipe: Recipe
    settings: StageSettings
    inputs: StageInputs
    snapshot: SnapshotConfig
    folder: Path
    document: dict[str, Any]

    @property
    def digest(self) -> str:
        return digest_of({"stage": self.document, "inputs": self.inputs.digests()})

    @property
    def snapshot_folder(self) -> Path:
        return self.folder / "snapshot"

    @property
    def preview_folder(self) -> Path:
        return self.folder / "previews"

    @property
    def states(self) -> StateStore:
        train = self.recipe.train
        place = f"{train.states}/{self.folder.name}" if train.states else self.folder / "state"
        return StateStore(
            open_folder(place), self.digest, train.keep_states, train.keep_every_images
        )

    @property
    def is_finished(self) -> bool:
        return (self.snapshot_folder / MANIFEST_FILE).is_file()

    @property
    def num_images(self) -> int:
        """Images the stage really sees: whole batches."""
        return self.settings.images // self.settings.batch_images * self.settings.batch_images

    @property
    def finish_at(self) -> int:
        """Images after which no tokens are dropped any more: the end of a batch."""
        drop, batch = self.settings.token_drop, self.settings.batch_images
        images = round(self.num_images * (1 - drop.finish_share)) if drop else 0
        return -(-images // batch) * batch


def plan(recipe: Recipe, name: str, inputs: StageInputs, root: Path) -> StagePlan:
    """Everything that decides stage ``name``. Raises ModelInputError if it cannot be built."""
    settings = recipe.stages[name]
    text, latent = inputs.text.manifest.extra, inputs.latents.manifest.extra
    network = recipe.network_of(
        settings, factor=latent["factor"], channels=latent["channels"], text_width=text["width"]
    )
    snapshot = SnapshotConfig(
        network=network,
        objective=recipe.train.objective,
        resolution=settings.resolution,
        autoencoder=recipe.encode.autoencoder,
        autoencoder_digest=latent["digest"],
        text_encoder=recipe.encode.text_encoder,
        text_encoder_digest=text["digest"],
    )
    if inputs.parent:
        _check_parent(inputs.parent, snapshot)
    # A switch that is off leaves no trace, so stages trained before it existed are still found.
    gamma = recipe.train.min_snr_gamma
    weighing: dict[str, Any] = {} if gamma is None else {"min_snr_gamma": gamma}
    if recipe.caption.weights and settings.condition_on == "text":
        weighing["caption_weights"] = recipe.caption.weights
    document = weighing | {
        "settings": settings.model_dump(mode="json", exclude={"start_from"}, exclude_none=True),
        "network": {n: v for n, v in network.to_dict().items() if (n, v) not in _OFF},
        "objective": recipe.train.objective,
        "flow_location": recipe.train.flow_location,
        "seed": recipe.seed,
        "name": name,
    }
    stage = StagePlan(name, recipe, settings, inputs, snapshot, root, document)
    return replace(stage, folder=root / f"{name}-{stage.digest[:8]}")


def _check_parent(parent: Path, wanted: SnapshotConfig) -> None:
    """Raise ModelInputError unless ``parent`` can become a network of ``wanted``."""
    config = load_config(parent)
    if config.network.architecture == "pixart" and wanted.network.architecture == "dit":
        raise ModelInputError(
            f"{parent} is a PixArt; a class-conditional stage cannot start from it"
        )
    check_compatible(config.network, wanted.network)
    if config.objective != wanted.objective:
        raise ModelInputError(
            f"{parent} was trained with objective {config.objective}, this stage uses "
            f"{wanted.objective}; train its parent with the same one"
        )
    if config.autoencoder_digest != wanted.autoencoder_digest:
        raise ModelInputError(f"{parent} was trained on latents of another autoencoder")


def make_task(stage: StagePlan, device: torch.device) -> LatentTask:
    """What the stage learns."""
    recipe, settings = stage.recipe, stage.settings
    text = stage.inputs.text.manifest.extra
    null = unpack_features(base64.b64decode(text["null_features"]), text["width"])
    return LatentTask(
        snapshot=stage.snapshot,
        latent_scale=stage.inputs.latents.manifest.extra["scale"],
        null_features=null.float(),
        condition_drop=settings.condition_drop,
        flow_location=recipe.train.flow_location,
        device=device,
        min_snr_gamma=recipe.train.min_snr_gamma,
        token_drop=recipe.token_drop_of(settings),
        finish_at=stage.finish_at,
        caption_weights=recipe.caption.weights if settings.condition_on == "text" else (),
    )


def build_index(stage: StagePlan) -> RowIndex:
    """The rows this stage may use, with the columns its task decodes."""
    inputs = stage.inputs
    told = ["width", "height"] if stage.snapshot.network.size_condition else []
    latents = (inputs.latents, ["moments", "bucket_h", "bucket_w", *told])
    if stage.settings.condition_on == "class":
        tables = {"images": (inputs.images, ["label"]), "latents": latents}
    else:
        tables = {
            "images": (inputs.images, []),
            "latents": latents,
            "text": (inputs.text, ["features", "num_tokens"]),
        }
    return RowIndex(tables, Condition.parse(stage.settings.where))


def start_network(config: NetworkConfig, parent: Path | None) -> PixArt | DiT:
    """The network a stage begins with: fresh, its parent's weights, or re-parameterised."""
    if parent is None:
        return build_network(config)
    _, network = load_network(parent)
    if isinstance(network, DiT) and config.architecture == "pixart":
        return reparameterize(network, config)[0]
    if isinstance(network, PixArt):
        return adapt(network, config)[0]
    started = build_network(config)
    started.load_state_dict(network.state_dict())
    return started


def load_flat(network: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy values, of any shape as long, into the parameters of their names."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(weights[name].view_as(parameter))


def average_of(stage: StagePlan, state: State) -> PixArt | DiT:
    """The network with a state's averaged weights, which is what is drawn with and registered."""
    network = build_network(stage.snapshot.network)
    load_flat(network, state.read(AVERAGE))
    return network.eval()


def publish_snapshot(stage: StagePlan, network: PixArt | DiT) -> None:
    """Write the snapshot beside its place, manifest last, then move it in."""
    staging = stage.folder / ".snapshot"
    staging.mkdir(parents=True, exist_ok=True)
    save_snapshot(staging, stage.snapshot, dict(network.named_parameters()))
    records = tuple(FileRecord.of(p) for p in sorted(staging.iterdir()) if p.name != MANIFEST_FILE)
    (staging / MANIFEST_FILE).unlink(missing_ok=True)
    Manifest(SNAPSHOT_SCHEMA, stage.document, stage.inputs.digests(), records).commit_to(staging)
    publish_folder(staging, stage.snapshot_folder)
