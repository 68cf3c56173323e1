"""What a recipe says about training: each stage, and what all of them share."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from pixart_models.config import PRESETS
from pixart_models.diffusion import ObjectiveName, get_objective
from pixart_platform.batches import Condition
from pixart_platform.engine import ZeroStage
from pixart_platform.optimizer import OptimizerSettings
from pixart_platform.recipe import Count, NodeLabels, Section


def check_condition(text: str) -> str:
    """``text``, if it is a condition on columns. Raises RecipeError."""
    Condition.parse(text)
    return text


class TokenDropSettings(Section):
    """Training on a part of the image tokens, to see more pictures in the same time.

    ``mask`` leaves dropped tokens out of the loss too (MicroDiT, arXiv 2407.15811: share 0.75);
    ``route`` lets them skip blocks (TREAD, arXiv 2501.04765: share 0.5, start 2, end 1), and is
    worth it from about 1000 tokens a picture on.
    """

    mode: Literal["mask", "route"]
    share: float = Field(gt=0, lt=1)
    """Share of a picture's tokens that is dropped."""
    start: int = Field(2, ge=1)
    """First blocks that see all tokens."""
    end: int = Field(1, ge=1)
    """Last blocks that see all tokens again; ``route`` only."""
    finish_share: float = Field(0.1, ge=0, lt=1)
    """Last share of the stage's images that is trained on all tokens, as pictures are drawn;
    MicroDiT used about 0.1."""


class StageSettings(Section):
    """One training stage."""

    condition_on: Literal["class", "text"]
    """``class`` trains a DiT on labels, ``text`` a PixArt on captions."""
    start_from: str = "previous"
    """``scratch``; ``previous`` stage; or ``registry:ALIAS_OR_VERSION``."""
    resolution: int = Field(ge=8, le=4096)
    images: Count = Field(ge=1)
    """Length of the stage."""
    batch_images: Count = Field(64, ge=1)
    """Global batch, whatever the number of workers."""
    optimizer: OptimizerSettings
    ema_half_life_images: Count = Field(5000, ge=1)
    condition_drop: float = Field(0.1, ge=0, lt=1)
    """Share of samples whose caption or class is dropped, for guidance."""
    position_scale: float = Field(1.0, gt=0, le=1000)
    """Squeezes positions, to start a finer grid from a coarser one."""
    size_condition: bool | None = None
    """Tell the network each picture's original size and the crop's aspect, as PixArt-alpha does at
    1024 px; left out, as the preset has it."""
    where: Annotated[str, AfterValidator(check_condition)] = ""
    """Curated subset, on columns of the image table: ``quality >= 0.6 and label >= 0``."""
    token_drop: TokenDropSettings | None = None
    """Trains on a part of the tokens; left out, on all."""


class TrainSettings(Section):
    """What all stages share."""

    network: str = "digits"
    """A preset of ``pixart_models.config``."""
    objective: ObjectiveName = "flow"
    """``flow`` (rectified flow) or ``iddpm`` (the paper's)."""
    flow_location: float = Field(0.0, ge=-3, le=3)
    """Centre of flow's logit-normal timesteps: above 0 trains more on noisy latents, where what is
    drawn is decided; 0.6 took digits from 70 % to 86 % right after 300 steps of the demo."""
    min_snr_gamma: float | None = None
    """``iddpm`` only: weighs the error at each timestep by min(SNR, gamma) / SNR, 5 in the source
    (Hang et al. 2023, arXiv 2303.09556); left out, all alike."""
    qk_norm: bool = False
    """Normalise queries and keys in every attention head, so that long bf16 runs stay stable (Esser
    et al. 2024, section 5.3.2). Published PixArt and DiT weights have no such norms."""
    adaln: Literal["single", "block"] = "single"
    """How blocks learn of the timestep: by one shared map and a table each, the paper's
    adaLN-single, or by a map each as DiT's, its baseline."""
    text_in: Literal["cross", "context"] = "cross"
    """Where blocks meet the text: by cross-attention, as in the paper, or as further tokens of
    self-attention, its baseline; that is drawn and served as well, but not exported, and not
    trained on a part of the tokens."""
    num_workers: int = Field(2, ge=1, le=1024)
    min_workers: int | None = Field(None, ge=1)
    """Go on with as few when nodes are lost, and grow again when they are back, with the same
    batches; left out, wait until there are ``num_workers``."""
    resize_every_seconds: float = Field(60, ge=1)
    """How often a run below ``num_workers`` looks for room to grow."""
    zero_stage: ZeroStage = 2
    """What is sharded: 1 the optimizer, 2 gradients too, 3 weights too; 0 nothing, on CPUs only."""
    micro_batch_images: Count | None = Field(None, ge=1)
    """Most images a worker takes at a time; a larger share of a batch is accumulated, exactly."""
    use_gpu: bool = False
    nodes: NodeLabels = Field(default_factory=dict)
    compile: bool = False
    """Compile the network by torch's inductor, at start for every shape of picture; needs a C++
    compiler on CPUs, and not ZeRO 3."""
    recompute_blocks: bool = False
    """Keep each block's input alone and run it again in backward: about a third more time for a
    fraction of the memory, the same weights (Chen et al. 2016, arXiv 1604.06174)."""
    max_failures: int = Field(3, ge=0)
    """Worker deaths survived before a stage gives up; nodes that gave notice do not count."""
    spike_sigmas: float | None = Field(None, ge=3)
    """A batch whose loss is so many standard deviations above the last 128's is not learned."""
    max_rewinds: int = Field(0, ge=0, le=100)
    """After a spike, or a loss or gradient that is not finite, go back to the newest state and
    leave out the batches from there to the bad one, so often at most; then the stage stops."""
    states: str = ""
    """Where resume states are kept: a folder or s3://bucket/prefix that all nodes reach; left out,
    the run's own folder."""
    snapshots: str = ""
    """Where finished snapshots are kept and registered: a folder or s3://bucket/prefix that all who
    draw can read; left out, the run's own folder. An MLflow server registers only s3://."""
    keep_states: int = Field(2, ge=1)
    """Newest states of a stage that are kept; besides them the best."""
    keep_every_images: Count | None = Field(None, ge=1)
    """Keep a state of every so many images too."""
    save_every_images: Count = Field(12_800, ge=1)
    preview_every_images: Count = Field(12_800, ge=1)
    log_every_images: Count = Field(640, ge=1)
    preview_prompts: tuple[str, ...] = ()
    """Drawn with the same seeds at every preview."""
    preview_gpus: float = Field(0, ge=0, le=1)
    """Share of a GPU, not one of the workers', that previews and evaluation losses take."""
    evaluate_images: int = Field(64, ge=0, le=100_000)
    """Samples whose loss is measured at every preview, at fixed timesteps with fixed noise."""

    @model_validator(mode="after")
    def _can_be_built(self) -> "TrainSettings":
        if self.network not in PRESETS:
            raise ValueError(f"network {self.network!r} is unknown; one of {', '.join(PRESETS)}")
        get_objective(self.objective, self.flow_location, self.min_snr_gamma)
        if self.min_workers and self.min_workers > self.num_workers:
            raise ValueError(
                f"min_workers = {self.min_workers}: must not be above num_workers = "
                f"{self.num_workers}"
            )
        if self.compile and self.zero_stage == 3:
            raise ValueError(
                "compile = true with zero_stage = 3: its gathering of weights breaks the graph at "
                "every layer; write 2, or leave compile off"
            )
        if self.use_gpu and self.zero_stage == 0:
            raise ValueError(
                "zero_stage = 0 with use_gpu: training in bf16 needs fp32 masters, which 1 shares "
                "out among the workers; write 1"
            )
        return self

    def accumulate_of(self, batch_images: int, num_workers: int) -> int:
        """Backward passes a step, so that none takes more than ``micro_batch_images``.

        Where shares differ by an image, every worker has one for each pass all the same.
        """
        share = -(-batch_images // num_workers)
        return min(-(-share // (self.micro_batch_images or share)), batch_images // num_workers)
