"""The training loop: intervals in images, whose samples are whose, and what stops it.

On an engine without DeepSpeed (``small_training``), so that a run takes a few milliseconds.
"""

import logging
import math
import re
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import repeatable
from hypothesis import given
from hypothesis import strategies as st
from small_training import (
    BATCH,
    OPTIMIZER,
    SEED,
    Alone,
    Guess,
    are_same,
    difference,
    read_state,
    run,
    settings_of,
    write_index,
)

from pixart_platform import checkpoint, train_loop
from pixart_platform.batches import RowIndex
from pixart_platform.checkpoint import StateStore
from pixart_platform.errors import TrainingError
from pixart_platform.order import Order
from pixart_platform.storage import LocalFolder
from pixart_platform.train_loop import Derailed, LoopSettings, Losses, Skip, find_spike

WINDOW = 128


def make(total_images: int, batch_images: int) -> LoopSettings:
    return LoopSettings(
        total_images, batch_images, save_every_images=1, preview_every_images=1,
        log_every_images=1, seed=0,
    )  # fmt: skip


@repeatable
@given(st.integers(1, 10**6), st.integers(1, 10**4))
def test_a_stage_takes_whole_batches_and_never_more_images_than_asked(
    total: int, batch: int
) -> None:
    num_batches = make(total, batch).num_batches
    assert num_batches * batch <= total < (num_batches + 1) * batch


@repeatable
@given(st.integers(1, 100), st.integers(1, 300), st.integers(1, 60))
def test_a_step_is_due_exactly_when_it_reaches_or_passes_a_multiple(
    batch: int, every: int, num_batches: int
) -> None:
    settings = make(batch * num_batches, batch)
    steps = [batch * (n + 1) for n in range(num_batches)]
    due = {n for n in steps if settings.is_due(every, n)}
    first_steps = {next(n for n in steps if n >= m) for m in range(every, steps[-1] + 1, every)}
    assert due == first_steps
    if every >= batch:
        assert len(due) == steps[-1] // every


@repeatable
@given(st.integers(1, 50), st.integers(1, 300), st.integers(1, 40), st.integers(0, 40))
def test_a_resumed_run_is_due_at_the_same_steps(
    batch: int, every: int, num_batches: int, resumed: int
) -> None:
    settings = make(batch * num_batches, batch)
    whole = [n for n in range(num_batches) if settings.is_due(every, batch * (n + 1))]
    late = [n for n in range(resumed, num_batches) if settings.is_due(every, batch * (n + 1))]
    assert late == [n for n in whole if n >= resumed]


@repeatable
@given(
    st.integers(1, 20), st.integers(0, 40),
    st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9)), max_size=4),
)  # fmt: skip
def test_skips_leave_out_their_batches_and_nothing_else(
    batch: int, steps: int, pairs: list[tuple[int, int]]
) -> None:
    skips = [Skip(step * batch, count) for step, count in pairs]
    settings = LoopSettings(
        10**6, batch, save_every_images=1, preview_every_images=1, log_every_images=1, seed=0,
        skips=skips,
    )  # fmt: skip
    taken, n = [], 0
    for step in range(steps):
        n += sum(count for at, count in pairs if at == step)
        taken.append(n)
        n += 1
    assert [settings.batch_at(step * batch) for step in range(steps)] == taken


@repeatable
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 100)), max_size=30))
def test_losses_are_summed_by_band_of_noise(pairs: list[tuple[float, float]]) -> None:
    levels, values = (torch.tensor([pair[k] for pair in pairs]) for k in (0, 1))
    split = train_loop._split(Losses(values, levels)).tolist()
    for band in range(4):
        inside = [v for level, v in pairs if min(int(np.float32(level) * 4), 3) == band]
        assert split[band] == pytest.approx(sum(inside), rel=1e-5)
        assert split[4 + band] == len(inside)


def test_a_spike_stands_out_of_a_full_window_by_its_spread() -> None:
    recent = [1.0, 3.0] * (WINDOW // 2)  # mean 2, deviation 1
    assert not find_spike(7.0, recent, 5)
    assert find_spike(7.01, recent, 5)
    assert not find_spike(7.01, recent, 6)
    assert not find_spike(-100, recent, 3), "a fall is good news"
    assert not find_spike(1e9, recent[1:], 3), "too few to know what is usual"
    assert not find_spike(1e9, recent, math.inf), "switched off"
    assert find_spike(2.1, [2.0] * WINDOW, 3)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> RowIndex:
    return write_index(tmp_path_factory.mktemp("tables"))


@pytest.fixture
def store(tmp_path: Path) -> StateStore:
    return StateStore(LocalFolder(tmp_path / "states"), "small", keep=99)


def other(store: StateStore, name: str = "other") -> StateStore:
    """An empty store beside ``store``."""
    return StateStore(store.folder.parent / name, "small", keep=99)


def batches_of(index: RowIndex) -> Order:
    return Order.over(index.counts, batch_images=BATCH, seed=SEED)


@pytest.mark.parametrize(("num_workers", "parts"), [(1, 1), (1, 7), (2, 1), (2, 3), (3, 2), (7, 1)])
def test_ranks_and_parts_share_out_every_batch_of_the_order(
    index: RowIndex, store: StateStore, num_workers: int, parts: int
) -> None:
    """Also where it does not divide; whoever draws a sample draws with its own generator."""
    read: dict[int, int] = {}
    for rank in reversed(range(num_workers)):  # rank 0 completes the state, when all have saved
        task = Guess()
        run(
            settings_of(5 * BATCH, accumulate=parts), store, index,
            partial(Alone, accumulate=parts, rank=rank, world_size=num_workers), task=task,
        )  # fmt: skip
        assert len(task.read) == 5 * parts
        for places, labels in task.read.items():
            assert not read.keys() & set(places), "two ranks or parts have taken it"
            read |= dict(zip(places, labels, strict=True))
    order = batches_of(index)
    expected = np.concatenate([order.batch(n)[1] for n in range(5)])
    assert [read[place] for place in range(5 * BATCH)] == expected.tolist()


@pytest.mark.parametrize("parts", [2, 3, 7])
def test_a_batch_in_parts_moves_the_weights_as_a_whole_one(
    index: RowIndex, store: StateStore, parts: int
) -> None:
    whole = run(settings_of(6 * BATCH), store, index, Alone)
    cut = run(
        settings_of(6 * BATCH, accumulate=parts), other(store), index,
        partial(Alone, accumulate=parts),
    )  # fmt: skip
    assert cut.recent == pytest.approx(whole.recent, rel=1e-6)
    states = [read_state(s, 6 * BATCH) for s in (store, other(store))]
    assert difference(*states) < 1e-6


@pytest.mark.parametrize("stop", [1, 4, 5])
def test_a_run_that_is_stopped_and_started_again_is_the_straight_run(
    index: RowIndex, store: StateStore, stop: int
) -> None:
    settings = settings_of(6 * BATCH, log_every_images=2 * BATCH)
    straight = run(settings, store, index, Alone)
    run(settings_of(stop * BATCH, log_every_images=2 * BATCH), other(store), index, Alone)
    resumed = run(settings, other(store), index, Alone, token="next")
    assert resumed.recent == straight.recent
    assert [n for n, _ in resumed.history] == [2 * BATCH, 4 * BATCH, 6 * BATCH]
    assert are_same(*(read_state(s, 6 * BATCH) for s in (store, other(store))))


def test_a_finished_run_that_is_started_again_changes_nothing(
    index: RowIndex, store: StateStore
) -> None:
    run(settings_of(3 * BATCH), store, index, Alone)
    (before,) = store.folder.children()
    files = list((store.folder / before).walk())
    run(settings_of(3 * BATCH), store, index, Alone, token="again")
    assert store.folder.children() == [before]
    assert list((store.folder / before).walk()) == files


def test_every_interval_is_logged_with_its_means(index: RowIndex, store: StateStore) -> None:
    logged: list[tuple[dict[str, float], int]] = []
    progress = run(
        settings_of(6 * BATCH, log_every_images=20), store, index, Alone,
        log_metrics=lambda metrics, images_seen: logged.append((metrics, images_seen)),
    )  # fmt: skip
    assert progress.history == [(images_seen, metrics) for metrics, images_seen in logged]
    assert [images_seen for _, images_seen in logged] == [21, 42]
    for k, (metrics, images_seen) in enumerate(logged):
        losses = progress.recent[3 * k : 3 * k + 3]
        assert metrics["loss"] == pytest.approx(sum(losses) / 3)
        assert metrics["learning_rate"] == OPTIMIZER.rate_at(images_seen - BATCH, 6 * BATCH)
        assert metrics["gradient_norm"] > 0
        assert metrics["images_per_second"] > 0
        bands = [value for name, value in metrics.items() if name.startswith("loss_noise_")]
        assert min(bands) <= metrics["loss"] <= max(bands)


def test_skipped_batches_are_not_read_and_the_run_is_as_long(
    index: RowIndex, store: StateStore
) -> None:
    task = Guess()
    run(settings_of(5 * BATCH, skips=[Skip(2 * BATCH, 3)]), store, index, Alone, task=task)
    assert sorted(places[0] // BATCH for places in task.read) == [0, 1, 5, 6, 7]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_before_its_step(
    index: RowIndex, store: StateStore, bad: float
) -> None:
    engines: list[Alone] = []

    def make(network: torch.nn.Module) -> Alone:
        engines.append(Alone(network))
        return engines[-1]

    told = (
        r"loss is (nan|inf) after 14 images; no step was taken; resume with a lower learning_rate"
    )
    with pytest.raises(Derailed, match=told) as caught:
        run(settings_of(6 * BATCH), store, index, make, task=Guess({16: bad}))
    assert caught.value.images_seen == 2 * BATCH
    assert store.complete() == [], "nothing is saved that may be spoilt"
    run(settings_of(2 * BATCH), store, index, Alone)
    good, left = read_state(store, 2 * BATCH), dict(engines[0].module.named_parameters())
    for name, weights in left.items():
        assert torch.equal(weights.view(-1), good[f"weight|{name}"])


def test_a_gradient_that_is_not_finite_stops_the_run(index: RowIndex, store: StateStore) -> None:
    """A finite loss of 1e38 whose gradient overflows."""
    with pytest.raises(Derailed, match=r"the gradient is (inf|nan) after 7 images") as caught:
        run(settings_of(6 * BATCH), store, index, Alone, task=Guess({8: 1e38}))
    assert caught.value.images_seen == BATCH


def test_a_spike_stops_the_run_once_it_knows_what_is_usual(
    index: RowIndex, store: StateStore
) -> None:
    early, late = 100 * BATCH, 140 * BATCH
    with pytest.raises(
        Derailed, match=r"loss jumped from [\d.]+ to [\d.e+]+ after 980 images"
    ) as e:
        run(
            settings_of(150 * BATCH, spike_sigmas=20.0, save_every_images=135 * BATCH), store,
            index, Alone, task=Guess({early: 1000.0, late: 1e6}),
        )  # fmt: skip
    assert e.value.images_seen == late
    # What is usual is part of a state: who resumes from there sees the same spike.
    with pytest.raises(Derailed, match="after 980 images"):
        run(
            settings_of(150 * BATCH, spike_sigmas=20.0), store, index, Alone, token="next",
            task=Guess({late: 1e6}),
        )  # fmt: skip
    done = run(
        settings_of(150 * BATCH, spike_sigmas=20.0, skips=[Skip(135 * BATCH, 6)]), store, index,
        Alone, token="last", task=Guess({late: 1e6}),
    )  # fmt: skip
    assert done.images_seen == 150 * BATCH


def test_states_are_saved_at_both_intervals_and_at_the_end(
    index: RowIndex, store: StateStore
) -> None:
    settings = settings_of(9 * BATCH, save_every_images=4 * BATCH, preview_every_images=20)
    run(settings, store, index, Patient)
    assert store.complete() == [n * BATCH for n in (3, 4, 6, 8, 9)]


class Patient(Alone):
    """Before a step it waits until the last state is saved, as if steps took long."""

    def set_rates(self, learning_rate: float, average_share: float) -> None:
        for thread in threading.enumerate():
            if thread.name == "save-state":
                thread.join()
        super().set_rates(learning_rate, average_share)


def test_a_notice_saves_a_state_once(
    index: RowIndex, store: StateStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_loop, "_NOTICE_SECONDS", -1.0)  # looked for after every batch
    answers = iter([False, False, True, True, True, True])
    run(settings_of(6 * BATCH), store, index, Alone, has_notice=lambda: next(answers))
    assert store.complete() == [3 * BATCH, 6 * BATCH]


def test_training_goes_on_while_states_cannot_be_saved_and_the_end_says_so(
    index: RowIndex,
    store: StateStore,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checkpoint, "_RETRY_SECONDS", (0.01, 0.01))
    (tmp_path / "states").write_text("in the way of the folder")
    settings = settings_of(6 * BATCH, save_every_images=2 * BATCH, patience_seconds=0.1)
    seen: list[int] = []
    told = rf"could not be saved within 0 s \({re.escape(str(tmp_path / 'states'))}/14/.*make room"
    with pytest.raises(TrainingError, match=told), caplog.at_level(logging.WARNING):
        run(settings, store, index, Alone, log_metrics=lambda _, n: seen.append(n))
    assert seen == [n * BATCH for n in range(1, 7)]
    assert "state at 14 images is not saved yet" in caplog.text
    assert "no state is saved at 28 images: the last is still being saved" in caplog.text
    (tmp_path / "states").unlink()  # so that its thread ends


def test_states_are_saved_again_when_the_storage_is_back(
    index: RowIndex, store: StateStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "_RETRY_SECONDS", (0.001, 0.01))
    (tmp_path / "states").write_text("in the way of the folder")

    def mend(_: dict[str, float], images_seen: int) -> None:
        if images_seen == 4 * BATCH:
            (tmp_path / "states").unlink()

    settings = settings_of(6 * BATCH, save_every_images=2 * BATCH)
    straight = run(settings, other(store), index, Alone)
    run(settings, store, index, Alone, log_metrics=mend)
    assert {2 * BATCH, 6 * BATCH} <= set(store.complete())
    assert are_same(*(read_state(s, 6 * BATCH) for s in (store, other(store))))
    early = store.open(2 * BATCH).progress
    assert early.recent == straight.recent[:2], "what it was when it came due"
