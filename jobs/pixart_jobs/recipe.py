"""The recipe of a whole pipeline: one section a job, each validated before anything runs."""

import difflib
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from pixart_jobs.train_settings import StageSettings, TrainSettings, check_condition
from pixart_models.config import PRESETS, ModelInputError, NetworkConfig, get_preset
from pixart_models.diffusion import get_objective
from pixart_models.token_drop import TokenDrop
from pixart_platform.accounting import AccountingSettings
from pixart_platform.recipe import Count, NodeLabels, Section

_BLOCK_BYTES = 2 << 30  # decoded pixels of one partition
RECIPES = Path(__file__).parent / "recipes"
SAMPLES = ("digits", "crowds")
"""Scenes that are composed, and the suites that ask for more of them."""


def _check_source(source: str) -> str:
    kind, _, uri = source.partition(":")
    if source in SAMPLES or (kind in ("folder", "classes", "tar", "parquet") and uri):
        return source
    raise ValueError(
        "write 'digits' or 'crowds' for sample scenes or, for your own images, 'KIND:URI': kind "
        "folder, classes, tar or parquet, and a local path or s3://bucket/prefix"
    )


class DataSettings(Section):
    """Where images come from, and which are refused."""

    source: Annotated[str, AfterValidator(_check_source)] = "digits"
    """``digits`` or, harder, ``crowds``; or ``KIND:URI`` with a local path or ``s3://bucket/prefix``.

    ``folder``: images at any depth; the raw caption is in ``NAME.txt`` or ``NAME.json`` beside one,
    in ``metadata.jsonl`` (its ``file_name`` and ``text``), or else the words of its name.
    ``classes``: a folder a class, as ImageNet; labels count the sorted folders, and classes that
    come later follow. ``tar``: WebDataset or SAM tars, uncompressed, with ``.txt``, ``.json`` and
    ``.cls`` beside the images. ``parquet``: files with a column ``image`` (of bytes or as Hugging
    Face's), and ``caption`` and ``label`` if there. When a source has grown, what is new is added
    in partitions of its own."""
    store: str = ""
    """Where tables are kept: a path, or s3://bucket/prefix (endpoint and credentials as boto3 finds
    them, AWS_ENDPOINT_URL among them); left out, the run's folder."""
    num_scenes: Count = Field(8192, ge=1, le=10**8)
    """Scenes to compose; ``digits`` and ``crowds`` only."""
    partition_rows: Count = Field(512, ge=1, le=10**6)
    """Rows of a partition, the unit of work and retry."""
    min_side: int = Field(16, ge=1)
    """Images narrower or lower than this many pixels are rejected."""
    max_pixels: Count = Field(64_000_000, ge=1, le=178_000_000)
    """Images with more pixels are rejected before they are decoded; Pillow refuses above 178 M."""
    max_aspect: float = Field(20.0, ge=1)
    """Images longer than this many times their shorter side are rejected."""
    copy_bytes: bool = True
    """Keep the pictures' bytes in the image table; otherwise later jobs fetch them from the source
    again: a picture that has changed since is rejected, one that is not there stops the job."""
    num_workers: int = Field(2, ge=1, le=1024)
    nodes: NodeLabels = Field(default_factory=dict)
    """Where files are read, decoded and written, for every table."""


class SelectSettings(Section):
    """Which images go on: each filter is a reason, and its count is told. Off by default but for
    exact duplicates, of which the first is kept."""

    near_duplicate_bits: int | None = Field(None, ge=0, le=7)
    """Rejects an image whose 64-bit perceptual hash differs from an earlier one's in at most this
    many bits; 4 is usual."""
    where: Annotated[str, AfterValidator(check_condition)] = ""
    """Keeps images for which this holds on the image table's numbers, as
    ``width >= 256 and quality >= 0.4``."""
    min_caption_words: int = Field(0, ge=0)
    """Rejects raw captions with fewer words."""
    max_caption_words: int | None = Field(None, ge=1)
    """Rejects raw captions with more words."""
    blocked_words: tuple[Annotated[str, Field(pattern=r"\S")], ...] = ()
    """Rejects raw captions with one of these words, in any case."""


class CaptionSettings(Section):
    """Who writes the dense captions, and how often a stage reads each."""

    captioner: str = "auto"
    """``builtin:digits``, ``builtin:crowds``; ``builtin:raw`` (keep the raw captions); a
    transformers image-text model by local folder or hub id; ``vllm:ID`` for the same through
    ray.data.llm; or ``auto``: that of the sample scenes, else raw."""
    prompts: tuple[str, ...] = Field(
        ("Describe this image and its style in a very detailed manner",), min_length=1
    )
    """What a vision-language captioner is asked, a caption each; the default is the paper's."""
    show_raw: bool = True
    """Whether it is told the raw caption too, as in the paper."""
    keep_raw: bool = False
    """Keep the raw caption, where there is one, as one more to train on."""
    weights: tuple[Annotated[float, Field(ge=0)], ...] = ()
    """How often training takes each caption of a row: those of ``prompts`` in order, then the raw
    one if kept; left out, all alike. A row that lacks one shares its weight among the others."""
    max_new_tokens: int = Field(256, ge=1, le=4096)
    max_side: int = Field(672, ge=16, le=8192)
    """Pictures are shrunk to this longest side before the captioner sees them."""
    batch_images: int = Field(32, ge=1, le=1024)
    num_readers: int = Field(2, ge=1, le=4096)
    """CPU tasks that read and decode pictures for the captioners."""
    num_workers: int = Field(2, ge=1, le=1024)
    num_gpus: float = Field(0, ge=0, le=8)
    """GPUs of each worker."""
    nodes: NodeLabels = Field(default_factory=dict)
    """Where captioners run; not those of ``vllm:``, whose engines take any GPU."""

    @model_validator(mode="after")
    def _one_weight_a_caption(self) -> "CaptionSettings":
        if len(self.prompts) > 1 and self.captioner.startswith(("auto", "builtin:")):
            raise ValueError(
                f"prompts: {self.captioner} is asked nothing and writes one caption; leave one "
                f"prompt, or name a vision-language captioner"
            )
        count = len(self.prompts) + self.keep_raw
        if self.weights and (len(self.weights) != count or not any(self.weights)):
            raise ValueError(
                f"weights = {list(self.weights)}: there are {count} captions a row (prompts, and "
                f"the raw one if kept); give as many, one above 0"
            )
        return self


class EncodeSettings(Section):
    """Latents and text features."""

    autoencoder: str = "builtin:digits"
    """``builtin:digits``, or a diffusers AutoencoderKL or a pipeline that holds one: local folder
    or hub id. Set HF_HUB_OFFLINE=1 where workers must not download."""
    text_encoder: str = "builtin:t5-tiny"
    """``builtin:t5-tiny``, or a transformers T5 or a pipeline that holds one: local folder or hub
    id."""
    text_encoder_8bit: bool = False
    """Hold T5's weights as int8 while encoding: T5-XXL in 6 GB instead of 10; needs CUDA and the
    packages bitsandbytes and accelerate."""
    max_tokens: int = Field(48, ge=1, le=1024)
    resolutions: tuple[int, ...] = Field((32, 48), min_length=1)
    """Picture sides in pixels; one latent table each."""
    aspect_buckets: bool | tuple[int, ...] = False
    """Crop each picture to the nearest of ~40 shapes from 1:4 to 4:1 with about the area of the
    resolution's square, and reject longer ones; otherwise to the square. A list of resolutions has
    buckets at these alone."""
    batch_images: int = Field(128, ge=1, le=4096)
    num_readers: int = Field(2, ge=1, le=4096)
    """CPU tasks that read, decode and crop pictures for the encoders."""
    num_workers: int = Field(2, ge=1, le=1024)
    num_gpus: float = Field(0, ge=0, le=8)
    """GPUs of each worker."""
    nodes: NodeLabels = Field(default_factory=dict)

    @property
    def bucketed(self) -> tuple[int, ...]:
        """Resolutions with aspect buckets."""
        if isinstance(self.aspect_buckets, bool):
            return self.resolutions if self.aspect_buckets else ()
        return self.aspect_buckets

    @model_validator(mode="after")
    def _no_idle_option(self) -> "EncodeSettings":
        if not set(self.bucketed) <= set(self.resolutions):
            raise ValueError(
                f"aspect_buckets = {list(self.bucketed)}: must be among resolutions = "
                f"{list(self.resolutions)}"
            )
        if self.text_encoder_8bit and self.text_encoder.startswith("builtin:"):
            raise ValueError(
                f"text_encoder_8bit = true has no effect on {self.text_encoder}; leave it off"
            )
        return self


class DrawSettings(Section):
    """How evaluation and services draw unless told otherwise."""

    num_steps: int = Field(12, ge=1, le=1000)
    guidance: float = Field(2.5, ge=1, le=20)
    guidance_rescale: float = Field(0.0, ge=0, le=1)
    """Share of the contrast that guidance adds which is taken back, so that colours stay."""


_SHARED_METRICS = (
    "digit_accuracy", "color_accuracy", "relation_accuracy", "count_accuracy",
    "seen_pair_accuracy", "unseen_pair_accuracy",
)  # fmt: skip
SUITE_METRICS = {
    "digits": _SHARED_METRICS,
    "crowds": (*_SHARED_METRICS, "place_accuracy", "attribute_accuracy"),
    "fidelity": ("fid", "kid", "precision", "recall", "clip_score"),
}
"""What suites measure; those of prompts:FILE are named by the file."""
_METRICS = (*SUITE_METRICS["crowds"], "reader_accuracy", *SUITE_METRICS["fidelity"])
_FILE_METRIC = re.compile(r"[a-z0-9-]+_[A-Za-z0-9_-]+")


def _check_metric(name: str) -> str:
    near = difflib.get_close_matches(name, _METRICS, n=1)
    if name in _METRICS or (_FILE_METRIC.fullmatch(name) and not near):
        return name
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"no suite measures {name!r}; {hint}there are {', '.join(_METRICS)}, and "
                     f"FILE_TAG and FILE_overall of a suite prompts:FILE")  # fmt: skip


Metric = Annotated[str, AfterValidator(_check_metric)]
"""A figure of a suite."""


def check_suite(name: str) -> str:
    """``name``, if there is such a suite. Raises ValueError, listing them."""
    kind, _, path = name.partition(":")
    if name in (*SAMPLES, "fidelity") or (kind == "prompts" and path):
        return name
    raise ValueError(
        f"suite {name!r} is not known; there are digits, crowds, fidelity and prompts:FILE (a file "
        f"of GenEval's form)"
    )


class EvaluateSettings(Section):
    """What a version is measured with, and the gates of promotion."""

    suites: tuple[Annotated[str, AfterValidator(check_suite)], ...] | None = None
    """Suites at the end of a pipeline: ``digits``, ``crowds``, ``prompts:FILE``, ``fidelity``; left
    out, that of the sample scenes and none for others."""
    seed: int = 0
    """Of prompts and their noise; apart from the pipeline's, so that its runs are asked the same.
    """
    num_prompts: int = Field(160, ge=2, le=100_000)
    """Of the suites digits and crowds."""
    prompt_images: int = Field(4, ge=1, le=64)
    """Pictures of each prompt of a file; GenEval's are 4."""
    detector: str = "builtin:digits"
    """Who finds objects for ``prompts:FILE``: the digit reader, which knows ``zero`` to ``nine``,
    or ``module:name`` of a function, or of a class made once a worker, that is called with a
    picture (H, W, 3) and answers ``{class, box, score, color}`` for each object."""
    reference: str = ""
    """The caption table, path or s3://, whose captions fidelity draws and whose pictures it
    compares with; left out, the recipe's own."""
    num_references: Count = Field(2000, ge=8, le=100_000)
    """Pictures that fidelity draws, and as many it compares them with. FID falls as it grows:
    compare equal numbers only; 30,000 of COCO are usual."""
    extractor: str = "builtin:pca"
    """Whose features fidelity compares: principal components of the references; a folder with the
    official Inception's file; or a transformers image model by folder or hub id."""
    clip: str = ""
    """A CLIP by folder or hub id for the CLIP score; left out, there is none."""
    batch_images: int = Field(40, ge=1, le=4096)
    """Pictures drawn and judged at a time, and lost at most when a worker dies."""
    num_workers: int | None = Field(None, ge=1, le=1024)
    """Left out, as many as train; figures are the same with any."""
    nodes: NodeLabels = Field(default_factory=dict)
    minimum: dict[Metric, float] = Field(default_factory=dict)
    """Lowest value of each metric that may be promoted."""
    maximum: dict[Metric, float] = Field(default_factory=dict)
    """Highest value of each metric that may be promoted, as of ``fid``."""
    not_worse: tuple[Metric, ...] = ()
    """Metrics that may not be worse than the champion's beyond the champion's own interval."""


class PlanSettings(Section):
    """What ``pixart plan`` and a study's compute are told where there is no data yet to count."""

    num_images: Count | None = Field(None, ge=1)
    """Pictures of the source; the sample scenes are counted."""
    image_bytes: Count | None = Field(None, ge=1)
    """Mean size of a picture's file; left out, 300 kB, the sample scenes' 4."""
    text_tokens: float | None = Field(None, gt=0)
    """Mean tokens of a caption; left out, as many as ``encode.max_tokens``, the sample scenes' 12.
    """
    published_gpu_days: dict[str, float] = Field(default_factory=dict)
    """What stages took elsewhere, to show beside the forecast."""


class Recipe(Section):
    """A pipeline from images to an evaluated model; the cluster room adds how it is served."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")
    """Names the registered model and the MLflow experiment."""
    seed: int = Field(0, ge=0, lt=2**31)
    data: DataSettings = DataSettings()
    select: SelectSettings = SelectSettings()
    caption: CaptionSettings = CaptionSettings()
    encode: EncodeSettings = EncodeSettings()
    train: TrainSettings = TrainSettings()
    stages: dict[Annotated[str, Field(pattern=r"^[a-z0-9_]+$")], StageSettings] = Field(
        min_length=1
    )
    draw: DrawSettings = DrawSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    accounting: AccountingSettings = AccountingSettings()
    plan: PlanSettings = PlanSettings()

    @property
    def captioner(self) -> str:
        """The captioner, with ``auto`` resolved."""
        if self.caption.captioner != "auto":
            return self.caption.captioner
        return f"builtin:{self.data.source}" if self.data.source in SAMPLES else "builtin:raw"

    @property
    def suites(self) -> tuple[str, ...]:
        """What a pipeline evaluates with, the default resolved."""
        if self.evaluate.suites is not None:
            return self.evaluate.suites
        return (self.data.source,) if self.data.source in SAMPLES else ()

    @model_validator(mode="after")
    def _fits_together(self) -> "Recipe":
        shown = () if self.captioner == "builtin:raw" else (self.caption.max_side,)
        sides = (*self.encode.resolutions, *shown)
        largest = _BLOCK_BYTES // (3 * max(side * side for side in sides))
        if self.data.partition_rows > largest:
            raise ValueError(
                f"data.partition_rows = {self.data.partition_rows}: as many pictures of "
                f"{max(sides)} x {max(sides)} pixels are more than {_BLOCK_BYTES >> 30} GiB, a "
                f"partition's share of a worker's memory; write at most {largest}"
            )
        if self.caption.keep_raw and self.captioner == "builtin:raw":
            raise ValueError(
                "caption.keep_raw = true: the captioner is builtin:raw, so every caption is the "
                "raw one already; leave it off, or name a captioner"
            )
        for name, stage in self.stages.items():
            place = f"stages.{name}"
            if stage.resolution not in self.encode.resolutions:
                raise ValueError(
                    f"{place}.resolution = {stage.resolution} is not among encode.resolutions "
                    f"{list(self.encode.resolutions)}; add it there"
                )
            if stage.batch_images < self.train.num_workers:
                raise ValueError(
                    f"{place}.batch_images = {stage.batch_images}: is less than an image for each "
                    f"of train.num_workers = {self.train.num_workers}"
                )
            if stage.images < stage.batch_images:
                raise ValueError(
                    f"{place}.images = {stage.images} is less than one batch "
                    f"({stage.batch_images}); no step would be taken"
                )
            if stage.size_condition and stage.condition_on == "class":
                raise ValueError(f"{place}.size_condition: only stages on text are told sizes")
            if stage.token_drop and self.train.text_in == "context":
                raise ValueError(
                    f"{place}.token_drop with train.text_in = context: the text is among the "
                    f"tokens; write cross, or train on all tokens"
                )
            try:
                self.token_drop_of(stage)
            except ModelInputError as error:
                raise ValueError(f"{place}.{error}") from error
        if next(iter(self.stages.values())).start_from == "previous":
            raise ValueError(
                f"stages.{next(iter(self.stages))}.start_from = 'previous': the first stage has no "
                f"previous one; write 'scratch' or 'registry:ALIAS'"
            )
        return self

    def token_drop_of(self, stage: StageSettings) -> TokenDrop | None:
        """How a stage drops tokens, if it does. Raises ModelInputError."""
        if stage.token_drop is None:
            return None
        settings = stage.token_drop.model_dump(exclude={"finish_share"})
        return TokenDrop(**settings, depth=PRESETS[self.train.network].depth)

    def network_of(
        self, stage: StageSettings, *, factor: int, channels: int, text_width: int
    ) -> NetworkConfig:
        """The network of a stage, given its encoders. Raises ModelInputError."""
        patch = PRESETS[self.train.network].patch
        if stage.resolution % (factor * patch):
            raise ModelInputError(
                f"resolution = {stage.resolution}: must be a multiple of {factor * patch} "
                f"(autoencoder factor {factor} x patch {patch})"
            )
        if drop := self.token_drop_of(stage):
            drop.check_tokens((stage.resolution // (factor * patch)) ** 2)
        return get_preset(
            self.train.network,
            architecture="dit" if stage.condition_on == "class" else "pixart",
            latent_channels=channels,
            predict_variance=get_objective(self.train.objective).predicts_variance,
            sample_size=stage.resolution // factor,
            position_scale=stage.position_scale,
            size_condition=PRESETS[self.train.network].size_condition or bool(stage.size_condition),
            text_width=text_width,
            max_tokens=self.encode.max_tokens,
            qk_norm=self.train.qk_norm,
            **(
                {"adaln": self.train.adaln, "text_in": self.train.text_in}
                if stage.condition_on == "text"
                else {}
            ),
        )
