"""How long work will take, in turns that last one second: no clock decides anything here."""

import random
from concurrent.futures import wait

import pytest
from test_serve_engine import ask, eventually
from test_serve_snapshots import Gate, build_drawer

from pixart_serve.engine import DrawingEngine, DrawRequest, LoadedVersion
from pixart_serve.forecast import Load, Pace, Promise, predict_seconds

MAX_ROWS = 4


def one_second_a_turn() -> Pace:
    pace = Pace()
    for row_pixels in (1, 1, 10**9):
        pace.observe(row_pixels, 1.0)
    return pace


def load_of(requests: list[DrawRequest]) -> Load:
    load = Load(requests[0].width * requests[0].height)
    for request in requests:
        load.add(request.num_rows, request.steps)
    return load


def test_pace_interpolates_and_grows_in_proportion_beyond_what_it_saw() -> None:
    pace = Pace()
    assert pace.seconds(100) == 0, "nothing is known"
    pace.observe(100, 99.0)
    assert pace.seconds(100) == 0, "the first batch loads kernels"
    pace.observe(100, 1.0)
    pace.observe(400, 2.0)
    assert pace.seconds(100) == pytest.approx(1.0)
    assert pace.seconds(10) == pytest.approx(1.0), "a small batch is no faster than the smallest"
    assert pace.seconds(250) == pytest.approx(1.5)
    assert pace.seconds(800) == pytest.approx(4.0)


def test_pace_follows_what_changes_and_stays_small() -> None:
    pace = Pace()
    for seconds in [1.0] * 10 + [3.0] * 60:
        pace.observe(1000, seconds)
    assert pace.seconds(1000, at_best=True) == pytest.approx(1.0)
    assert pace.seconds(1000) == pytest.approx(3.0, rel=1e-3)
    for row_pixels in range(1, 20_000):
        pace.observe(row_pixels, 1.0)
    assert len(pace._cells) < 100


def test_a_load_takes_its_rows_or_the_longest_batch() -> None:
    assert load_of([ask(steps=5)]).turns(MAX_ROWS) == 5
    assert load_of([ask(steps=5)] * 2).turns(MAX_ROWS) == 5
    assert load_of([ask(steps=5)] * 3).turns(MAX_ROWS) == 8
    assert Load(1024).turns(MAX_ROWS) == 0


def test_promises_are_kept_nearly_always_whatever_the_predictions_are_worth() -> None:
    rng, promise = random.Random(1), Promise()
    margin = promise.multiple
    broken = list[bool]()
    for _ in range(2000):
        took = 10 * rng.lognormvariate(0.6, 0.2)  # of 10 seconds predicted
        broken.append(took > promise.multiple * 10)
        promise.observe(10, took)
    assert sum(broken[50:]) / 1950 < 0.05
    assert promise.multiple == pytest.approx(3, abs=1), "and no more is promised than is needed"
    for _ in range(50):
        promise.observe(10, 5)
    assert promise.multiple == margin, "and pessimism is unlearnt"


def test_who_gives_up_early_teaches_nothing_and_late_that_it_was_late() -> None:
    promise = Promise()
    margin = promise.multiple
    promise.observe(10, 9, is_over=False)
    assert promise.multiple == margin
    promise.observe(10, 25, is_over=False)
    learnt = promise.multiple
    assert learnt > margin
    promise.observe(0.01, 1)
    assert promise.multiple == learnt, "a jitter is no lesson"


@pytest.mark.parametrize(
    ("ahead", "last"),
    [
        ([], ask(steps=3)),
        ([ask(steps=6)], ask(steps=3)),
        ([ask(steps=3)] * 4, ask(steps=3)),
        ([ask(steps=6)] * 2, ask(steps=2, guidance=1.0)),
        ([ask(steps=6)] * 2, ask(steps=2, width=48)),
        ([ask(steps=2)] * 2, ask(steps=6, width=48)),
        ([ask(steps=4)] * 4 + [ask(steps=4, width=48)] * 3, ask(steps=4, width=48)),
    ],
)
def test_the_forecast_is_what_the_engine_does(ahead: list[DrawRequest], last: DrawRequest) -> None:
    drawer = build_drawer()
    gate = Gate(drawer.network)
    engine = DrawingEngine(max_rows=MAX_ROWS, max_queued=16)
    engine.activate(LoadedVersion(1, drawer))
    first = engine.submit(ask(steps=1, width=16))  # so that what follows begins together
    eventually(lambda: gate.num_arrived == 1)
    *others, wanted = engine.submit_all([*ahead, last])

    def at_rest() -> bool:
        return wanted.done() or (gate.num_arrived > len(gate.batches) and not engine._num_decoding)

    while not wanted.done():
        num_turns = len(gate.batches)
        gate.allow(1)
        eventually(lambda: len(gate.batches) > num_turns and at_rest())  # noqa: B023  # run at once
    num_turns = len(gate.batches) - 1  # the first picture's
    gate.allow()
    wait([first, *others], timeout=10)
    engine.close()
    groups = {r.width: load_of([a for a in ahead if a.width == r.width]) for r in ahead}
    predicted = predict_seconds(one_second_a_turn(), MAX_ROWS, groups, last.width, load_of([last]))
    assert num_turns <= predicted < num_turns + last.steps
