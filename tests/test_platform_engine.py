"""The real engine, DeepSpeed over gloo: what is learned hangs on no ZeRO stage, worker or stop."""

from pathlib import Path

import pytest
from small_training import BATCH, are_same, difference, read_state
from training_group import (
    GIVEN_BACK,
    STOP,
    TAKEN_OVER,
    TOTAL,
    ZERO_STAGES,
    read_result,
    run_group,
    store_of,
)

pytestmark = pytest.mark.slow
for_each_stage = pytest.mark.parametrize("zero_stage", ZERO_STAGES)


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("group")
    run_group(folder)
    return folder


def states_of(folder: Path, name: str, zero_stage: int) -> list[int]:
    return store_of(folder, name, zero_stage).complete()


def compare(folder: Path, name: str, zero_stage: int, with_stage: int | None = None) -> float:
    """The largest difference of a run's last state from the straight run's."""
    straight = store_of(folder, "straight", zero_stage if with_stage is None else with_stage)
    ours = store_of(folder, name, zero_stage)
    losses = [store.open(TOTAL).progress.recent for store in (straight, ours)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    return difference(read_state(straight, TOTAL), read_state(ours, TOTAL))


@for_each_stage
def test_a_run_that_was_stopped_is_the_straight_run_to_the_bit(
    group: Path, zero_stage: int
) -> None:
    """Weights, moments, average and every logged loss; each batch has 3 and 4 images a worker."""
    straight, resumed = (store_of(group, n, zero_stage) for n in ("straight", "resumed"))
    assert (straight.complete(), resumed.complete()) == ([TOTAL], [STOP, TOTAL])
    assert are_same(read_state(straight, TOTAL), read_state(resumed, TOTAL))
    assert straight.open(TOTAL).progress.recent == resumed.open(TOTAL).progress.recent


@for_each_stage
def test_two_workers_then_one_then_two_learn_what_two_do(group: Path, zero_stage: int) -> None:
    assert states_of(group, "elastic", zero_stage) == [TAKEN_OVER, GIVEN_BACK, TOTAL]
    assert compare(group, "elastic", zero_stage) < 1e-6
    workers = [m["workers"] for _, m in store_of(group, "elastic", zero_stage).open(TOTAL)
               .progress.history]  # fmt: skip
    assert workers == [2] * 4 + [1] * 4 + [2] * 4


@for_each_stage
def test_a_state_goes_on_under_another_zero_stage(group: Path, zero_stage: int) -> None:
    assert states_of(group, "switched", zero_stage) == [STOP, TOTAL]
    assert compare(group, "switched", zero_stage) < 1e-6


@for_each_stage
def test_all_zero_stages_learn_the_same(group: Path, zero_stage: int) -> None:
    assert compare(group, "straight", zero_stage, with_stage=0) < 1e-6


@for_each_stage
def test_a_batch_in_parts_moves_the_weights_as_a_whole_one(group: Path, zero_stage: int) -> None:
    assert compare(group, "parts", zero_stage) < 1e-6


@for_each_stage
@pytest.mark.parametrize("rank", [0, 1])
def test_a_gradient_that_is_not_finite_on_one_rank_moves_nothing_on_any(
    group: Path, zero_stage: int, rank: int
) -> None:
    found = read_result(group, f"bad-gradient-{zero_stage}", rank)
    assert found["moved_was"]
    assert found["norm_was"] not in ("inf", "nan")
    assert not found["moved"]
    assert found["norm"] in ("inf", "nan")


@for_each_stage
def test_the_average_is_that_of_a_plain_loop_over_the_fp32_weights(
    group: Path, zero_stage: int
) -> None:
    found = read_result(group, f"average-{zero_stage}", 0)
    assert found["from_plain"] < 1e-6
    assert found["from_weights"] > 1e-3, "or the average would be the weights themselves"


def test_all_ranks_stop_alike_on_a_loss_that_one_has(group: Path) -> None:
    told = [read_result(group, "bad-loss", rank) for rank in (0, 1)]
    assert told[0] == told[1]
    assert told[0]["images_seen"] == 3 * BATCH
    assert states_of(group, "bad-loss", 2) == []
