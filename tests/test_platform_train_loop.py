"""Intervals of the training loop, counted in images."""

from builders import repeatable
from hypothesis import given
from hypothesis import strategies as st

from pixart_platform.train_loop import LoopSettings


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
