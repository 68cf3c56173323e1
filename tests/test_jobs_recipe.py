"""The pipeline's recipe: what ships can be read, and what cannot work is refused before it runs."""

import numpy as np
import pytest
from builders import repeatable
from hypothesis import assume, given
from hypothesis import strategies as st

from pixart_cluster.recipe import FullRecipe, read_recipe
from pixart_jobs.recipe import RECIPES
from pixart_jobs.train_settings import TrainSettings
from pixart_models.config import ModelInputError
from pixart_models.token_drop import TokenDrop
from pixart_platform.errors import RecipeError
from pixart_platform.order import slice_of_rank


def refuse(*overrides: str) -> str:
    """The message of the error that the digits recipe with ``overrides`` must cause."""
    with pytest.raises(RecipeError) as caught:
        read_recipe("digits", overrides)
    message = str(caught.value)
    for line in message.splitlines():
        assert len(line) < 400, "a readable line, not a dump of the recipe"
        assert line.startswith(f"recipe {RECIPES / 'digits.yaml'}: ")
    return message


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_a_built_in_recipe_can_be_read_and_built(name: str) -> None:
    recipe = read_recipe(name)
    for stage in recipe.stages.values():
        network = recipe.network_of(stage, factor=4, channels=8, text_width=64)
        assert network.sample_size * 4 == stage.resolution
    again = FullRecipe.model_validate(recipe.model_dump(mode="json"))
    assert again == recipe, "the resolved recipe is a recipe"


def test_an_unknown_name_says_what_is_built_in() -> None:
    with pytest.raises(RecipeError, match=r"'digitz' is not built in .there is: .*digits"):
        read_recipe("digitz")


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["stages.align.resolution=64"],
         "stages.align.resolution = 64 is not among encode.resolutions [32]; add it there"),
        (["stages.align.batch_images=1"],
         "stages.align.batch_images = 1: is less than an image for each of train.num_workers = 2"),
        (["train.min_workers=3"],
         "train: min_workers = 3: must not be above num_workers = 2"),
        (["train.min_workers=0"], "train.min_workers = 0: "),
        (["train={use_gpu: true, zero_stage: 0}"],
         "train: zero_stage = 0 with use_gpu: training in bf16 needs fp32 masters"),
        (["train.micro_batch_images=0"], "train.micro_batch_images = 0: "),
        (["train.spike_sigmas=1"], "train.spike_sigmas = 1: "),
        (["train.keep_states=0"], "train.keep_states = 0: "),
        (["stages.pixels.start_from=previous"],
         "stages.pixels.start_from = 'previous': the first stage has no previous one"),
        (["stages.align.images=31"],
         "stages.align.images = 31 is less than one batch (32); no step would be taken"),
        (["train.network=gigantic"], "train: network 'gigantic' is unknown; one of "),
        (["data.source=coco"], "data.source = 'coco': write 'digits' or 'crowds' for sample"),
        (["stages.align.where=quality => 1"],
         "stages.align.where = 'quality => 1': 'quality => 1' is not 'column op number'"),
        (["stages.align.condition_on=tags"], "stages.align.condition_on = 'tags': "),
        (["stages={}"], "stages = {}: "),
        (["stages.Big Stage.images=5"], "stages.Big Stage"),
        (["name=My Model"], "name = 'My Model': "),
        (["train.zero_stage=4"], "train.zero_stage = 4: "),
        (["seed=-1"], "seed = -1: "),
        (["draw.guidance=0.5"], "draw.guidance = 0.5: "),
        (["stages.align.condition_drop=1"], "stages.align.condition_drop = 1: "),
        (["stages.align.token_drop={mode: mask, share: 1}"],
         "stages.align.token_drop.share = 1: Input should be less than 1"),
        (["train.text_in=context", "stages.align.token_drop={mode: mask, share: 0.5, start: 1}"],
         "stages.align.token_drop with train.text_in = context: "),
        (["stages.align.token_drop={mode: skip, share: 0.5}"],
         "stages.align.token_drop.mode = 'skip': Input should be 'mask' or 'route'"),
        (["stages.align.token_drop={mode: mask, share: 0.5, start: 3}"],
         "stages.align.token_drop.start = 3: each must be at least 1 and leave one of the "
         "network's 3 blocks"),
        (["stages.align.token_drop={mode: route, share: 0.5, start: 4, end: 2}"],
         "stages.align.token_drop.start = 4, end = 2: each must be at least 1 and leave one"),
        (["stages.align.token_drop={mode: mask, share: 0.5, finish_share: 1}"],
         "stages.align.token_drop.finish_share = 1: "),
        (["train.network=digits-mini", "stages.pixels.token_drop={mode: mask, share: 0.5}"],
         "stages.pixels.token_drop.start = 2: "),
        (["train.min_snr_gamma=5"],
         "train: min_snr_gamma = 5.0 with objective 'flow': must be a positive number with iddpm"),
        (["train={objective: iddpm, min_snr_gamma: -1}"],
         "train: min_snr_gamma = -1.0 with objective 'iddpm': must be a positive number"),
        (["serve.prot=80"], "serve.prot: unknown key; did you mean 'port'?"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_at_its_place(overrides: list[str], says: str) -> None:
    assert says in refuse(*overrides)


def test_a_resolution_the_network_cannot_tile_says_of_what_it_must_be_a_multiple() -> None:
    recipe = read_recipe("digits", ["encode.resolutions=[36, 32, 40]"])
    stage = recipe.stages["align"].model_copy(update={"resolution": 36})
    with pytest.raises(ModelInputError, match="resolution = 36: must be a multiple of 8"):
        recipe.network_of(stage, factor=4, channels=8, text_width=64)


def test_every_training_switch_is_off_until_asked_for() -> None:
    settings = TrainSettings()
    assert settings.min_snr_gamma is None
    assert not any((settings.qk_norm, settings.recompute_blocks, settings.compile))
    recipe = read_recipe("pixart-alpha")  # the paper's
    for stage in recipe.stages.values():
        assert recipe.token_drop_of(stage) is None
        assert not recipe.network_of(stage, factor=8, channels=4, text_width=4096).qk_norm


def test_switches_reach_the_network_and_the_token_drop() -> None:
    recipe = read_recipe(
        "digits",
        [
            "train.qk_norm=true",
            "train.network=digits",
            "stages.align.token_drop={mode: route, share: 0.5, end: 3}",
        ],
    )
    for name, stage in recipe.stages.items():
        assert recipe.network_of(stage, factor=4, channels=8, text_width=64).qk_norm
        expected = TokenDrop("route", 0.5, 2, 3, 6) if name == "align" else None
        assert recipe.token_drop_of(stage) == expected
    assert FullRecipe.model_validate(recipe.model_dump(mode="json")) == recipe


@pytest.mark.parametrize(
    ("batch_images", "num_workers", "micro_batch", "expected"),
    [
        (64, 2, None, 1), (64, 2, 32, 1), (64, 2, 33, 1), (64, 2, 31, 2), (64, 2, 8, 4),
        (10, 4, 2, 2), (64, 1, 8, 8), (7, 7, 1, 1),
    ],
)  # fmt: skip
def test_a_share_of_a_batch_is_cut_into_as_few_parts_as_fit(
    batch_images: int, num_workers: int, micro_batch: int | None, expected: int
) -> None:
    train = TrainSettings(micro_batch_images=micro_batch)
    assert train.accumulate_of(batch_images, num_workers) == expected


@repeatable
@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 64))
def test_no_part_of_a_share_is_larger_than_a_micro_batch_or_empty(
    batch_images: int, num_workers: int, micro_batch: int
) -> None:
    assume(batch_images >= num_workers)
    parts = TrainSettings(micro_batch_images=micro_batch).accumulate_of(batch_images, num_workers)
    batch = np.arange(batch_images)
    shares = [batch[slice_of_rank(batch, rank, num_workers)] for rank in range(num_workers)]
    sizes = {
        len(share[slice_of_rank(share, part, parts)]) for share in shares for part in range(parts)
    }
    assert max(sizes) <= micro_batch or min(sizes) == 1  # a worker cannot take less than an image
    assert min(sizes) > 0


@pytest.mark.parametrize("least", [1, 2, None])
def test_fewer_workers_may_be_allowed_and_weights_may_be_sharded_on_cpus(least: int | None) -> None:
    train = TrainSettings(num_workers=2, min_workers=least, zero_stage=3)
    assert train.min_workers == least
    for zero_stage in (1, 2, 3):
        assert TrainSettings(zero_stage=zero_stage, use_gpu=True).zero_stage == zero_stage


def test_the_captioner_follows_the_source_unless_named() -> None:
    assert read_recipe("digits").captioner == "builtin:digits"
    assert read_recipe("digits", ["data.source=folder:/x"]).captioner == "builtin:raw"
    named = read_recipe("digits", ["data.source=folder:/x", "caption.captioner=some/vlm"])
    assert named.captioner == "some/vlm"


def test_an_override_of_one_stages_optimizer_leaves_the_others() -> None:
    stages = read_recipe("digits", ["stages.align.optimizer.learning_rate=0.5"]).stages
    rates = {name: stage.optimizer.learning_rate for name, stage in stages.items()}
    assert rates.pop("align") == 0.5
    assert 0.5 not in rates.values()
