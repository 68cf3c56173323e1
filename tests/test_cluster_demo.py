"""The demo's baseline: the paper's objective on the very same data and images."""

from pixart_cluster.demo import baseline_of
from pixart_cluster.recipe import read_recipe


def test_the_baseline_differs_in_objective_rate_and_name_only() -> None:
    ours = read_recipe("digits")
    theirs = baseline_of(ours)
    assert theirs.name == "digits-baseline"
    assert theirs.train.objective == "iddpm"
    restored = theirs.model_copy(
        update={
            "name": ours.name,
            "train": theirs.train.model_copy(update={"objective": ours.train.objective}),
            "stages": ours.stages,
        }
    )
    assert restored == ours
    for name, stage in ours.stages.items():
        rate = stage.optimizer.learning_rate
        assert theirs.stages[name].optimizer.learning_rate == rate / 2
        assert theirs.stages[name].images == stage.images


def test_the_baseline_network_learns_its_variance() -> None:
    recipe = baseline_of(read_recipe("digits"))
    network = recipe.network_of(recipe.stages["align"], factor=4, channels=8, text_width=64)
    assert network.out_channels == 16
