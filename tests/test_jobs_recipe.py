"""The pipeline's recipe: what ships can be read, and what cannot work is refused before it runs."""

import pytest

from pixart_cluster.recipe import FullRecipe, read_recipe
from pixart_jobs.recipe import RECIPES
from pixart_models.config import ModelInputError
from pixart_models.token_drop import TokenDrop
from pixart_platform.errors import RecipeError


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
         "stages.align.resolution = 64 is not among encode.resolutions [32, 40]; add it there"),
        (["train.num_workers=3"],
         "batch_images = 64 does not divide among train.num_workers = 3"),
        (["stages.pixels.start_from=previous"],
         "stages.pixels.start_from = 'previous': the first stage has no previous one"),
        (["stages.align.images=63"],
         "stages.align.images = 63 is less than one batch (64); no step would be taken"),
        (["train.network=gigantic"], "train: network 'gigantic' is unknown; one of "),
        (["data.source=coco"], "data.source = 'coco': write 'digits' for the sample scenes or"),
        (["stages.align.where=quality => 1"],
         "stages.align.where = 'quality => 1': 'quality => 1' is not 'column op number'"),
        (["stages.align.condition_on=tags"], "stages.align.condition_on = 'tags': "),
        (["stages={}"], "stages = {}: "),
        (["stages.Big Stage.images=5"], "stages.Big Stage"),
        (["name=My Model"], "name = 'My Model': "),
        (["train.zero_stage=3"], "train.zero_stage = 3: "),
        (["seed=-1"], "seed = -1: "),
        (["draw.guidance=0.5"], "draw.guidance = 0.5: "),
        (["stages.align.condition_drop=1"], "stages.align.condition_drop = 1: "),
        (["stages.align.token_drop={mode: mask, share: 1}"],
         "stages.align.token_drop.share = 1: Input should be less than 1"),
        (["stages.align.token_drop={mode: skip, share: 0.5}"],
         "stages.align.token_drop.mode = 'skip': Input should be 'mask' or 'route'"),
        (["stages.align.token_drop={mode: mask, share: 0.5, start: 6}"],
         "stages.align.token_drop.start = 6: each must be at least 1 and leave one of the "
         "network's 6 blocks"),
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
    recipe = read_recipe("digits")
    assert recipe.train.min_snr_gamma is None
    assert not any((recipe.train.qk_norm, recipe.train.recompute_blocks))
    for stage in recipe.stages.values():
        assert recipe.token_drop_of(stage) is None
        assert not recipe.network_of(stage, factor=4, channels=8, text_width=64).qk_norm


def test_switches_reach_the_network_and_the_token_drop() -> None:
    recipe = read_recipe(
        "digits",
        ["train.qk_norm=true", "stages.align.token_drop={mode: route, share: 0.5, end: 3}"],
    )
    for name, stage in recipe.stages.items():
        assert recipe.network_of(stage, factor=4, channels=8, text_width=64).qk_norm
        expected = TokenDrop("route", 0.5, 2, 3, 6) if name == "align" else None
        assert recipe.token_drop_of(stage) == expected
    assert FullRecipe.model_validate(recipe.model_dump(mode="json")) == recipe


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
