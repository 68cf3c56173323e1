"""The drawing engine: a picture is the same whatever it shares its steps with."""

import copy
import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, wait
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_serve_snapshots import Gate, build_drawer
from torch import Tensor

from pixart_models.config import ModelInputError
from pixart_models.drawing import EVERYWHERE, Drawer, DrawingError
from pixart_models.pixart import PixArt
from pixart_models.solvers import SOLVERS, SolverName, build_schedule
from pixart_serve.engine import (
    Drawing,
    DrawingEngine,
    DrawingFailed,
    DrawRequest,
    LoadedVersion,
    NonFiniteDrawing,
    NotReady,
    Preview,
    QueueFull,
    TooLate,
)

LONG_PROMPT = "a purple seven to the left of a green eight above a yellow nine on a dark picture"
Start = Callable[..., DrawingEngine]


def ask(prompt: str = "a red three", **changes: Any) -> DrawRequest:
    fields = {"seed": 1, "steps": 3, "guidance": 2.5, "width": 32, "height": 32} | changes
    return DrawRequest(prompt=prompt, **fields)


def alone(drawer: Drawer, request: DrawRequest) -> Any:
    return drawer.draw(
        [request.prompt], [request.seed], steps=request.steps, guidance=request.guidance,
        negative_prompt=request.negative_prompt, size=(request.width, request.height),
        guidance_interval=request.guidance_interval, guidance_rescale=request.guidance_rescale,
    )[0]  # fmt: skip


def assert_drawn_as_alone(drawing: Drawing, drawer: Drawer, request: DrawRequest) -> None:
    difference = np.abs(drawing.picture.astype(int) - alone(drawer, request))
    assert difference.max() <= 1, request
    assert drawing.seed == request.seed


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.005)


@pytest.fixture
def start() -> Iterator[Start]:
    engines: list[DrawingEngine] = []

    def make(drawer: Drawer | None = None, **limits: Any) -> DrawingEngine:
        engine = DrawingEngine(**({"max_rows": 8, "max_queued": 16} | limits))
        engines.append(engine)
        if drawer:
            engine.activate(LoadedVersion(1, drawer))
        return engine

    yield make
    for engine in engines:
        engine.close()


_REQUESTS = st.builds(
    DrawRequest,
    prompt=st.sampled_from(["a red three", LONG_PROMPT, "", "zwei Kekse \U0001f36a"]),
    negative_prompt=st.sampled_from(["", "a blue two"]),
    seed=st.integers(0, 2**63 - 1),
    steps=st.integers(1, 6),
    guidance=st.sampled_from([0.0, 1.0, 2.5, 7.0]),
    width=st.sampled_from([16, 32, 48]),
    height=st.sampled_from([32, 48]),
    guidance_interval=st.sampled_from([EVERYWHERE, (0, 400), (300, 900)]),
    guidance_rescale=st.sampled_from([0.0, 0.7]),
)


def with_solver(drawer: Drawer, solver: SolverName) -> Drawer:
    return replace(drawer, config=replace(drawer.config, solver=solver))


@settings(max_examples=15, deadline=None)
@given(
    requests=st.lists(_REQUESTS, min_size=1, max_size=9),
    max_rows=st.integers(2, 9),
    solver=st.sampled_from(SOLVERS["flow"]),
)
def test_any_mix_is_drawn_as_if_alone(
    requests: list[DrawRequest], max_rows: int, solver: SolverName
) -> None:
    drawer = with_solver(build_drawer(), solver)
    engine = DrawingEngine(max_rows=max_rows, max_queued=16)
    engine.activate(LoadedVersion(1, drawer))
    try:
        futures = engine.submit_all(requests)
        for request, future in zip(requests, futures, strict=True):
            assert_drawn_as_alone(future.result(timeout=30), drawer, request)
    finally:
        engine.close()


def test_rows_join_and_leave_between_steps(start: Start) -> None:
    drawer = build_drawer()
    gate = Gate(drawer.network)
    engine = start(drawer)
    long = engine.submit(ask(steps=6))
    gate.allow(2)
    eventually(lambda: gate.num_arrived == 3)
    short = engine.submit(ask("a blue two", steps=2, guidance=1.0))
    gate.allow(3)
    short.result(timeout=10)
    assert not long.done()
    gate.allow()
    drawing = long.result(timeout=10)
    assert gate.batches == [2, 2, 2, 3, 3, 2], "the third step was at the gate already"
    assert_drawn_as_alone(drawing, drawer, ask(steps=6))


def test_outside_its_guidance_interval_a_picture_costs_one_row(start: Start) -> None:
    """Flow's four steps begin at timesteps 999, 749, 500 and 250; the other's four likewise."""
    drawer = build_drawer()
    gate = Gate(drawer.network)
    engine = start(drawer)
    requests = [ask(steps=4, guidance_interval=(300, 800)), ask("a blue two", steps=4)]
    futures = engine.submit_all(requests)
    gate.allow()
    for request, future in zip(requests, futures, strict=True):
        assert_drawn_as_alone(future.result(timeout=10), drawer, request)
    assert gate.batches[:4] == [3, 4, 4, 3]


def test_a_size_conditioned_network_is_told_each_pictures_size(start: Start) -> None:
    plain = build_drawer()
    config = replace(plain.config, network=replace(plain.config.network, size_condition=True))
    network = PixArt(config.network).eval().requires_grad_(False)
    network.final_layer.linear.weight.normal_(std=0.1)
    drawer = replace(plain, config=config, network=network)
    told: list[Any] = []
    network.t_block.register_forward_pre_hook(lambda _, args: told.append(args[0].tolist()))
    request = ask(steps=1, width=48, height=24)
    drawing = start(drawer).submit(request).result(timeout=10)
    assert drawing.picture.shape == (24, 48, 3)
    assert_drawn_as_alone(drawing, drawer, request)
    alone(drawer, ask(steps=1, width=24, height=48))
    assert told[0] == told[1] != told[2]


def test_a_batch_never_exceeds_max_rows_and_keeps_its_order(start: Start) -> None:
    drawer = build_drawer()
    gate = Gate(drawer.network)
    engine = start(drawer, max_rows=4)
    finished: list[int] = []
    futures = engine.submit_all([ask(seed=i, steps=2) for i in range(5)])
    for i, future in enumerate(futures):
        future.add_done_callback(lambda _, i=i: finished.append(i))  # type: ignore[misc]
    gate.allow()
    wait(futures, timeout=10)
    assert max(gate.batches) == 4
    assert finished == sorted(finished)


def test_sizes_take_turns(start: Start) -> None:
    drawer = build_drawer()
    gate = Gate(drawer.network)
    engine = start(drawer, max_rows=2)
    endless = engine.submit_all([ask(steps=50, seed=i) for i in range(4)])
    other = engine.submit(ask(steps=2, width=48))
    gate.allow(6)
    other.result(timeout=10)
    assert not any(future.done() for future in endless)
    for future in endless:
        future.cancel()
    gate.allow()


def test_a_cancelled_picture_leaves_at_the_next_step(start: Start) -> None:
    drawer = build_drawer()
    gate = Gate(drawer.network)
    engine = start(drawer, max_rows=4)
    kept, dropped, waiting = engine.submit_all([ask(seed=i, steps=6) for i in range(3)])
    gate.allow(2)
    eventually(lambda: gate.num_arrived == 3)
    assert dropped.cancel()
    assert waiting.cancel()
    gate.allow()
    drawing = kept.result(timeout=10)
    assert gate.batches == [4, 4, 4, 2, 2, 2], "the third step was at the gate already"
    assert_drawn_as_alone(drawing, drawer, ask(seed=0, steps=6))
    assert len(wait([dropped, waiting], timeout=10).done) == 2
    with pytest.raises(CancelledError):
        dropped.result()


def test_a_swap_leaves_rows_in_flight_on_their_weights(start: Start) -> None:
    old, new = build_drawer(seed=1), build_drawer(seed=2)
    gate = Gate(old.network)
    engine = start(old)
    first = engine.submit(ask(steps=4))
    gate.allow(2)
    eventually(lambda: gate.num_arrived == 3)
    engine.activate(LoadedVersion(2, new))
    second = engine.submit(ask(steps=4))
    gate.allow()
    before, after = first.result(timeout=10), second.result(timeout=10)
    assert (before.version, after.version) == (1, 2)
    gate.allow()
    assert_drawn_as_alone(before, old, ask(steps=4))
    assert_drawn_as_alone(after, new, ask(steps=4))


def test_a_retired_version_leaves_memory(start: Start) -> None:
    engine = start(build_drawer(seed=1))
    request = ask(steps=1, num_previews=1)
    assert engine.live
    old = weakref.ref(engine.live.drawer.network)
    engine.submit_all([request, request], on_preview=lambda _: None)[1].result(timeout=10)
    engine.activate(LoadedVersion(2, build_drawer(seed=2)))
    eventually(lambda: gc.collect() >= 0 and old() is None)


def test_a_trial_draws_beside_the_live_version_even_when_the_queue_is_full(start: Start) -> None:
    live, candidate = build_drawer(seed=1), build_drawer(seed=2)
    gate = Gate(live.network)
    engine = start(live, max_rows=2, max_queued=1)
    waiting = fill(engine, gate)
    trial = engine.try_out(LoadedVersion(2, candidate), ask())
    gate.allow()
    assert_drawn_as_alone(trial.result(timeout=10), candidate, ask())
    assert {future.result(timeout=10).version for future in waiting} == {1}


def fill(engine: DrawingEngine, gate: Gate) -> "list[Future[Drawing]]":
    """One picture at the gate and one in the queue of an engine that has room for no more."""
    drawing = engine.submit(ask())
    eventually(lambda: gate.num_arrived == 1)
    return [drawing, engine.submit(ask())]


def test_a_full_queue_refuses_and_says_when(start: Start) -> None:
    drawer = build_drawer()
    gate = Gate(drawer.network)
    engine = start(drawer, max_rows=2, max_queued=1)
    accepted = fill(engine, gate)
    with pytest.raises(QueueFull, match="1 pictures already wait") as refused:
        engine.submit(ask())
    assert refused.value.retry_after_seconds >= 1
    accepted[1].cancel()
    gate.allow()
    accepted[0].result(timeout=10)
    assert engine.submit(ask()).result(timeout=10).version == 1


def test_a_picture_that_would_be_late_is_refused_with_a_time_to_come_back(start: Start) -> None:
    drawer = build_drawer()
    engine = start(drawer, max_rows=2)
    engine.submit(ask(steps=10)).result(timeout=10)  # from which the pace is known
    gate = Gate(drawer.network)
    ahead = engine.submit(ask(steps=1000))
    eventually(lambda: gate.num_arrived == 1)
    backlog = engine.backlog_seconds()
    with pytest.raises(TooLate, match="try again in") as later:
        engine.submit_all([ask(steps=2)], max_seconds=backlog / 2)
    assert later.value.retry_after_seconds is not None
    assert backlog / 2 <= later.value.retry_after_seconds <= backlog + 1
    with pytest.raises(TooLate, match="ask for fewer steps") as never:
        engine.submit_all([ask(steps=1000)], max_seconds=backlog / 50)
    assert never.value.retry_after_seconds is None
    accepted = engine.submit_all([ask(steps=2)], max_seconds=6 * backlog)
    ahead.cancel()
    gate.allow()
    accepted[0].result(timeout=10)
    assert engine.backlog_seconds() == 0


def test_what_can_no_longer_be_ready_in_time_is_refused_before_it_is_drawn(start: Start) -> None:
    """It was accepted; then the work before it took longer than anybody thought."""
    drawer = build_drawer()
    engine = start(drawer, max_rows=2)
    engine.submit(ask(steps=10)).result(timeout=10)
    gate = Gate(drawer.network)
    ahead = engine.submit(ask(steps=20))
    eventually(lambda: gate.num_arrived == 1)
    [accepted] = engine.submit_all([ask(steps=2)], max_seconds=6 * engine.backlog_seconds() + 0.5)
    [patient] = engine.submit_all([ask(steps=2)], max_seconds=60)
    time.sleep(6 * engine.backlog_seconds() + 0.6)
    gate.allow()
    with pytest.raises(TooLate, match=r"try again in \d+ s") as late:
        accepted.result(timeout=10)
    assert late.value.retry_after_seconds
    assert ahead.result(timeout=10).version == patient.result(timeout=10).version == 1


def test_before_anything_is_measured_nobody_is_late(start: Start) -> None:
    engine = start(build_drawer())
    assert engine.submit_all([ask()], max_seconds=1e-9)[0].result(timeout=10).version == 1


def test_many_sizes_cannot_pass_the_bound(start: Start) -> None:
    drawer = build_drawer()
    gate = Gate(drawer.network)
    engine = start(drawer, max_rows=2, max_queued=2)
    accepted = []
    for side in range(1, 5):  # max_rows + max_queued
        accepted.append(engine.submit(ask(width=8 * side, steps=20)))
        gate.allow(1)
        eventually(lambda side=side: gate.num_arrived == side + 1)  # type: ignore[misc]
    with pytest.raises(QueueFull):
        engine.submit(ask(width=64))
    gate.allow()
    assert len(wait(accepted, timeout=20).done) == len(accepted)


@pytest.mark.parametrize(
    ("steps", "num_previews", "after"),
    [(8, 0, []), (8, 1, [4]), (8, 2, [2, 5]), (8, 3, [2, 4, 6]), (3, 3, [1, 2]), (1, 3, [])],
)
def test_previews_are_spread_evenly(steps: int, num_previews: int, after: list[int]) -> None:
    assert ask(steps=steps, num_previews=num_previews).preview_steps == after


def test_previews_show_what_the_network_expects_and_change_nothing(start: Start) -> None:
    drawer = build_drawer()
    expected: list[Any] = []

    def note(_: Any, args: tuple[Any, ...], output: Tensor) -> None:
        """Flow's idea of the clean latents: x0 = x - sigma (noise - x0)."""
        sigma = build_schedule("flow", 6).table[len(expected), 1]
        expected.append(drawer.autoencoder.decode(args[0][:1] + sigma * output[:1])[0])

    shown: list[Preview] = []
    others = [ask("a blue two", seed=2, steps=6), ask(LONG_PROMPT, seed=3, steps=3, guidance=1.0)]
    drawn = []
    for num_previews in (0, 2):
        request = ask(steps=6, guidance=1.0, num_previews=num_previews)
        hook = drawer.network.register_forward_hook(note) if num_previews else None
        futures = start(drawer).submit_all([request, *others], on_preview=shown.append)
        drawn.append([future.result(timeout=10).picture for future in futures])
        if hook:
            hook.remove()
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert [(preview.index, preview.seed, preview.version) for preview in shown] == [
        (0, 1, 1), (1, 1, 1),
    ]  # fmt: skip
    for preview, step in zip(shown, [2, 4], strict=True):
        difference = np.abs(preview.picture.astype(int) - expected[step - 1])
        assert difference.max() <= 1
    assert np.abs(shown[0].picture.astype(int) - drawn[1][0]).max() > 1


def test_a_preview_that_fails_is_left_out(start: Start) -> None:
    drawer = build_drawer()

    def refuse(preview: Preview) -> None:
        raise RuntimeError(f"nobody wants {preview.index}")

    [future] = start(drawer).submit_all([ask(num_previews=2)], on_preview=refuse)
    assert_drawn_as_alone(future.result(timeout=10), drawer, ask())


def test_a_slow_decoding_does_not_hold_up_steps_but_is_noticed(start: Start) -> None:
    drawer = build_drawer()
    decoder = copy.deepcopy(drawer.autoencoder.model)
    drawer = replace(drawer, autoencoder=replace(drawer.autoencoder, model=decoder))
    opened, gate = threading.Event(), Gate(drawer.network, permits=10_000)
    decoder.decoder.register_forward_pre_hook(lambda *_: opened.wait(20) and None)
    engine = start(drawer, stall_seconds=0.2, max_rows=2, max_queued=2)
    futures = [engine.submit(ask(steps=2))]
    eventually(lambda: len(gate.batches) == 2)
    futures.append(engine.submit(ask(steps=3)))
    eventually(lambda: len(gate.batches) == 5)
    eventually(lambda: not engine.is_healthy())
    opened.set()
    assert len(wait(futures, timeout=10).done) == 2
    eventually(engine.is_healthy)


def test_only_the_bad_row_of_a_batch_fails(start: Start) -> None:
    drawer = build_drawer()

    def refuse_long_prompts(_: Any, args: tuple[Any, ...]) -> None:
        if args[2].longest > 12:
            raise RuntimeError("out of memory")

    drawer.network.register_forward_pre_hook(refuse_long_prompts)
    engine = start(drawer)
    good = [ask(seed=1), ask(seed=2, guidance=1.0)]
    futures = engine.submit_all([good[0], ask(LONG_PROMPT), good[1]])
    with pytest.raises(DrawingFailed, match="RuntimeError: out of memory"):
        futures[1].result(timeout=10)
    assert_drawn_as_alone(futures[0].result(timeout=10), drawer, good[0])
    assert_drawn_as_alone(futures[2].result(timeout=10), drawer, good[1])
    assert engine.is_healthy()


def test_non_finite_latents_fail_their_row_alone(start: Start) -> None:
    drawer = build_drawer()

    def poison_long_prompts(_: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        output[args[2].offsets.diff() > 12] = torch.nan
        return output

    drawer.network.register_forward_hook(poison_long_prompts)
    engine = start(drawer)
    good, bad = engine.submit_all([ask(), ask(LONG_PROMPT)])
    with pytest.raises(NonFiniteDrawing, match="version 1"):
        bad.result(timeout=10)
    assert_drawn_as_alone(good.result(timeout=10), drawer, ask())


def test_a_picture_off_the_grid_fails_alone(start: Start) -> None:
    drawer = build_drawer()
    good, bad = start(drawer).submit_all([ask(), ask(width=33)])
    with pytest.raises(DrawingError, match="width = 33 px"):
        bad.result(timeout=10)
    assert good.result(timeout=10).picture.shape == (32, 32, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guidance_interval": (800, 300)}, "guidance_interval = .*: must be timesteps"),
        ({"guidance": float("nan")}, "guidance = nan: must be a finite number"),
        ({"steps": 51}, "num_inference_steps = 51: must be 1 to 50 with lcm"),
    ],
)
def test_what_a_version_cannot_draw_fails_alone(
    start: Start, changes: dict[str, Any], message: str
) -> None:
    drawer = with_solver(build_drawer(), "lcm")
    good, bad = start(drawer).submit_all([ask(), ask(**changes)])
    with pytest.raises(ModelInputError, match=message):
        bad.result(timeout=10)
    assert_drawn_as_alone(good.result(timeout=10), drawer, ask())


def test_without_a_version_nothing_is_accepted(start: Start) -> None:
    engine = start()
    with pytest.raises(NotReady, match="no version is live"):
        engine.submit(ask())
    with pytest.raises(NotReady):
        engine.count_tokens("a red three")


def test_closing_fails_what_is_left(start: Start) -> None:
    engine = start(build_drawer(), max_rows=2)
    futures = engine.submit_all([ask(steps=1000), ask()])
    engine.close()
    for future in futures:
        with pytest.raises(NotReady, match="closed"):
            future.result(timeout=10)
    with pytest.raises(NotReady, match="closed"):
        engine.submit(ask())
    assert not engine.is_healthy()


def test_who_waits_for_a_stuck_engine_is_told_when_it_is_given_up(start: Start) -> None:
    drawer = build_drawer()
    gate = Gate(drawer.network)
    engine = start(drawer, max_rows=2)
    drawing, waiting, dropped = engine.submit_all([ask(seed=i) for i in range(3)])
    eventually(lambda: gate.num_arrived == 1)
    dropped.cancel()
    engine.give_up()
    for future in (drawing, waiting):
        with pytest.raises(NotReady, match="stuck"):
            future.result(timeout=10)
    with pytest.raises(NotReady, match="closed"):
        engine.submit(ask())
    gate.allow()  # if it moves after all, it ends in peace, and is of no more use
    eventually(lambda: not engine.is_healthy())
    assert len(wait([dropped], timeout=10).done) == 1
    assert len(gate.batches) == 1


def test_a_stuck_step_is_unhealthy_until_it_moves(start: Start) -> None:
    drawer = build_drawer()
    gate = Gate(drawer.network)
    engine = start(drawer, stall_seconds=0.05)
    assert engine.is_healthy()
    future = engine.submit(ask())
    eventually(lambda: not engine.is_healthy())
    gate.allow()
    future.result(timeout=10)
    eventually(engine.is_healthy)


def test_tokens_may_be_counted_while_prompts_are_encoded(start: Start) -> None:
    drawer = build_drawer()
    engine = start(drawer, max_queued=100)
    expected = drawer.text_encoder.count_tokens(LONG_PROMPT)
    futures = engine.submit_all([ask(f"{LONG_PROMPT} {i}", steps=1) for i in range(40)])
    assert {engine.count_tokens(LONG_PROMPT) for _ in range(200)} == {expected}
    for future in futures:
        future.result(timeout=20)
