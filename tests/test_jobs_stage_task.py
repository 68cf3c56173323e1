"""What a stage learns: the loss written out, whoever computes which part of it, and its finish."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from builders import repeatable, write_table
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from pixart_cluster.recipe import read_recipe
from pixart_jobs.encode import pack_features
from pixart_jobs.stage import StageInputs, StagePlan, plan
from pixart_jobs.stage_task import LatentBatch, LatentTask, choose_captions
from pixart_models.autoencoder import sample_moments
from pixart_models.config import ModelInputError, get_preset
from pixart_models.diffusion import ObjectiveName, get_objective
from pixart_models.dit import DiT
from pixart_models.pixart import PixArt
from pixart_models.snapshot import SnapshotConfig, build_network, save_snapshot
from pixart_models.token_drop import TokenDrop, take_patches
from pixart_platform.manifest import Manifest
from pixart_platform.recipe import digest_of
from pixart_platform.seeds import SampleDraws

CPU = torch.device("cpu")
SEED, SIZE, TOKENS, TEXT_WIDTH, DEPTH = 7, 8, 16, 6, 3
MASK, ROUTE = (TokenDrop(mode, 0.75, 1, 1, DEPTH) for mode in ("mask", "route"))
Kind = Literal["class", "text"]


def make_task(kind: Kind, objective: ObjectiveName = "flow", **switches: Any) -> LatentTask:
    network = get_preset(
        "digits-mini", architecture="dit" if kind == "class" else "pixart", depth=DEPTH, width=24,
        heads=2, text_width=TEXT_WIDTH, predict_variance=objective == "iddpm",
    )  # fmt: skip
    return LatentTask(
        snapshot=SnapshotConfig(network, objective, 32, "builtin:digits", "", "x", ""),
        latent_scale=0.5, null_features=torch.full((2, TEXT_WIDTH), 0.3), condition_drop=0.4,
        flow_location=0.6, device=CPU, **switches,
    )  # fmt: skip


def make_network(task: LatentTask) -> PixArt | DiT:
    """One in which every parameter, the zero-initialised ones too, matters."""
    network = build_network(task.snapshot.network)
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 5
    return network


def columns_of(kind: Kind, count: int) -> dict[str, list[Any]]:
    """Rows as the index reads them; captions are of 1, 2, 3 ... tokens, a label is missing."""
    numbers = torch.Generator().manual_seed(3)
    moments = torch.randn(count, 16, SIZE, SIZE, generator=numbers).half().numpy()
    columns = {
        "latents.moments": [row.tobytes() for row in moments],
        "latents.bucket_h": [SIZE] * count,
        "latents.bucket_w": [SIZE] * count,
    }
    if kind == "class":
        return columns | {"images.label": [None, *range(1, count)]}
    captions = [torch.randn(i + 1, TEXT_WIDTH, generator=numbers) for i in range(count)]
    return columns | {
        "text.features": [pack_features(caption) for caption in captions],
        "text.num_tokens": [[i + 1] for i in range(count)],
    }


def decode(
    task: LatentTask, columns: dict[str, list[Any]], positions: range
) -> tuple[LatentBatch, SampleDraws]:
    draws = SampleDraws(SEED, list(positions))
    return task.decode(columns, draws), draws


def loss_of(task: LatentTask, network: nn.Module, kind: Kind, positions: range) -> Tensor:
    first = positions.start % 8
    rows = {n: c[first : first + len(positions)] for n, c in columns_of(kind, 8).items()}
    return task.loss(network, *decode(task, rows, positions)).values.mean()


def loss_by_hand(task: LatentTask, network: Any, batch: LatentBatch, position: int) -> Tensor:
    """The loss of row ``position`` of a batch, with padded text and no regard for speed."""
    draws = SampleDraws(SEED, [position])
    objective = get_objective(task.snapshot.objective, 0.6, task.min_snr_gamma)
    shape = (8, SIZE, SIZE)
    x0 = sample_moments(batch.moments[position, None], draws.normal(shape), 0.5)
    noise, timesteps = draws.normal(shape), objective.sample_timesteps(draws.uniform())
    is_dropped = bool(draws.uniform() < 0.4)
    x_t = objective.add_noise(x0, noise, timesteps)
    if batch.labels is not None:
        label = 10 if is_dropped else int(batch.labels[position])
        condition: tuple[Tensor, ...] = (torch.tensor([label]),)
    else:
        assert batch.features is not None
        assert batch.num_tokens is not None
        end = sum(batch.num_tokens[: position + 1])
        text = batch.features[end - batch.num_tokens[position] : end].float()
        text = task.null_features if is_dropped else text
        padded = torch.cat([text, torch.ones(3, TEXT_WIDTH)])[None]
        condition = (padded, torch.arange(len(text) + 3)[None] < len(text))
    if task.token_drop is None:
        return objective.loss(network(x_t, timesteps, *condition), x0, noise, x_t, timesteps)
    route = task.token_drop.choose(draws.normal((TOKENS,)))
    output = network(x_t, timesteps, *condition, route=route)
    if task.token_drop.mode == "mask":
        x0, noise, x_t = (take_patches(t, route.kept, 2) for t in (x0, noise, x_t))
    return objective.loss(output, x0, noise, x_t, timesteps)


@pytest.mark.parametrize("kind", ["class", "text"])
@pytest.mark.parametrize("drop", [None, MASK, ROUTE])
@pytest.mark.parametrize(("objective", "gamma"), [("flow", None), ("iddpm", None), ("iddpm", 0.1)])
def test_the_loss_is_the_formula_of_each_sample_and_so_of_any_share_of_a_batch(
    kind: Kind, drop: TokenDrop | None, objective: ObjectiveName, gamma: float | None
) -> None:
    task = make_task(kind, objective, min_snr_gamma=gamma, token_drop=drop, finish_at=99)
    network = make_network(task)
    with torch.inference_mode():
        together = loss_of(task, network, kind, range(8))
        halves = [loss_of(task, network, kind, half) for half in (range(4), range(4, 8))]
        batch, _ = decode(task, columns_of(kind, 8), range(8))
        by_hand = [loss_by_hand(task, network, batch, i) for i in range(8)]
    torch.testing.assert_close(together, torch.cat(by_hand).mean(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.stack(halves).mean(), together, rtol=1e-4, atol=1e-5)


def test_min_snr_and_a_token_drop_change_the_loss() -> None:
    network = make_network(make_task("text", "iddpm"))
    switches: list[dict[str, Any]] = [
        {}, {"min_snr_gamma": 0.1}, {"token_drop": MASK, "finish_at": 8},
        {"token_drop": ROUTE, "finish_at": 8},
    ]  # fmt: skip
    with torch.inference_mode():
        tasks = (make_task("text", "iddpm", **switch) for switch in switches)
        losses = {float(loss_of(task, network, "text", range(8))) for task in tasks}
    assert len(losses) == len(switches)


@pytest.mark.parametrize("drop", [MASK, ROUTE])
def test_the_finish_begins_exactly_where_it_is_set(drop: TokenDrop) -> None:
    """Two batches of four on a quarter of the tokens, then all, as if nothing had been dropped."""
    task, plain = make_task("text", token_drop=drop, finish_at=8), make_task("text")
    network = make_network(task)
    seen: list[int] = []
    network.blocks[1].register_forward_hook(lambda *args: seen.append(args[-1].shape[1]))
    batches = [range(4), range(4, 8), range(8, 12), range(12, 16)]
    with torch.inference_mode():
        losses = [loss_of(task, network, "text", batch) for batch in batches]
        assert seen == [TOKENS // 4, TOKENS // 4, TOKENS, TOKENS]
        whole = [loss_of(plain, network, "text", batch) for batch in batches]
    assert [a == b for a, b in zip(losses, whole, strict=True)] == [False, False, True, True]


@pytest.mark.parametrize("kind", ["class", "text"])
def test_a_network_in_half_precision_is_given_what_it_can_multiply(kind: Kind) -> None:
    task = make_task(kind, token_drop=MASK, finish_at=4)
    loss = loss_of(task, make_network(task).to(torch.bfloat16), kind, range(4))
    torch.autograd.backward(loss)
    assert loss.dtype == torch.float32
    exact = make_task(kind, token_drop=MASK, finish_at=4)
    torch.testing.assert_close(
        loss, loss_of(exact, make_network(exact), kind, range(4)), rtol=0.05, atol=0
    )


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> StageInputs:
    """Tables with what a plan reads of them: the manifests."""
    root = tmp_path_factory.mktemp("tables")
    extra = {"width": 64, "digest": "t", "factor": 4, "channels": 8, "scale": 1.0}
    images, text, latents = (
        write_table(root / schema, schema, [[]], extra)
        for schema in ("images/2", "text/2", "latents/1")
    )
    return StageInputs(images, text, latents, None)


def make_plan(inputs: StageInputs, *overrides: str, stage: str = "pixels") -> StagePlan:
    return plan(read_recipe("digits", overrides), stage, inputs, Path("stages"))


FIRST_RELEASE = (
    "train.network=digits", "train.flow_location=0.6", "train.qk_norm=false",
    "stages.pixels.images=12800", "stages.pixels.batch_images=64",
    "stages.pixels.ema_half_life_images=2000", "stages.pixels.optimizer.learning_rate=0.004",
    "stages.pixels.optimizer.warmup_images=2560", "stages.pixels.optimizer.decay_share=0.3",
)  # fmt: skip


def test_a_stage_trained_before_the_switches_existed_is_still_found(inputs: StageInputs) -> None:
    """The first release's document, and the folder it gave a stage of the demo."""
    document = make_plan(inputs, *FIRST_RELEASE).document
    tables = {"images": "bbbdbbe3088de6be", "latents": "532b03513fcc8966",
              "text": "6727e73a2efba364"}  # fmt: skip
    assert digest_of({"stage": document, "inputs": tables}).startswith("4ac87a18")


@pytest.mark.parametrize(
    ("override", "changes"),
    [
        ("stages.pixels.token_drop={mode: mask, share: 0.5}", True),
        ("train.qk_norm=false", True),
        ("train={objective: iddpm, min_snr_gamma: 5}", True),
        ("train.recompute_blocks=true", False),
        ("train.adaln=block", False),  # a DiT's blocks have maps of their own anyway
        ("stages.align.token_drop={mode: mask, share: 0.25}", False),
    ],
)
def test_a_stage_is_another_one_exactly_when_its_weights_are(
    inputs: StageInputs, override: str, changes: bool
) -> None:
    base, other = make_plan(inputs), make_plan(inputs, override)
    assert (other.digest != base.digest) == changes
    assert (other.folder != base.folder) == changes
    assert other.folder.name == f"pixels-{other.digest[:8]}"


def test_weighing_alone_makes_another_stage(inputs: StageInputs) -> None:
    plans = [
        make_plan(inputs, f"train={{objective: iddpm, min_snr_gamma: {gamma}}}")
        for gamma in ("null", 5, 3)
    ]
    assert len({stage.digest for stage in plans}) == 3


@repeatable
@given(
    batch=st.integers(1, 16).map(lambda n: 2 * n),
    num_batches=st.integers(1, 40),
    rest=st.integers(0, 1),
    share=st.floats(0, 0.99),
)
def test_the_finish_is_the_last_share_of_the_images_in_whole_batches(
    inputs: StageInputs, batch: int, num_batches: int, rest: int, share: float
) -> None:
    stage = make_plan(
        inputs, f"stages.pixels.images={batch * num_batches + rest}",
        f"stages.pixels.batch_images={batch}",
        f"stages.pixels.token_drop={{mode: mask, share: 0.5, finish_share: {share}}}",
    )  # fmt: skip
    starts = range(0, batch * num_batches, batch)
    boundary = round(batch * num_batches * (1 - share))
    assert [start < stage.finish_at for start in starts] == [start < boundary for start in starts]
    assert stage.finish_at % batch == 0  # so that all ranks of a batch agree


def test_without_a_token_drop_nothing_is_dropped(inputs: StageInputs) -> None:
    assert make_plan(inputs).finish_at == 0


def test_a_share_that_keeps_no_token_of_the_stages_pictures_is_refused(inputs: StageInputs) -> None:
    with pytest.raises(ModelInputError, match=r"share = 0.98: keeps 0 of the 16 tokens"):
        make_plan(inputs, "stages.pixels.token_drop={mode: mask, share: 0.98}")


def test_query_key_norms_cannot_be_taken_from_a_parent(inputs: StageInputs, tmp_path: Path) -> None:
    parent = make_plan(inputs).snapshot
    save_snapshot(tmp_path, parent, {})
    Manifest("snapshot/1", {}, {}, ()).commit_to(tmp_path)
    child = replace(inputs, parent=tmp_path)
    make_plan(child, stage="align")
    with pytest.raises(
        ModelInputError, match=r"network.qk_norm: the parent has True, the stage asks for False"
    ):
        make_plan(child, "train.qk_norm=false", stage="align")


def test_every_sample_keeps_tokens_of_its_own() -> None:
    kept = MASK.choose(SampleDraws(SEED, list(range(64))).normal((TOKENS,))).kept
    counts = np.bincount(kept.flatten(), minlength=TOKENS)
    assert counts.sum() == 64 * TOKENS // 4
    assert counts.min() > 4, "every place is kept now and then"
    assert len(set(map(tuple, kept.tolist()))) > 50, "of 1820 choices"


def test_a_size_conditioned_network_is_told_original_sizes_and_the_buckets_aspect() -> None:
    plain = make_task("text")
    config = replace(plain.snapshot.network, size_condition=True)
    task = replace(plain, snapshot=replace(plain.snapshot, network=config))
    columns = columns_of("text", 2) | {"latents.height": [500, 40], "latents.width": [700, 20]}
    batch, _ = decode(task, columns, range(2))
    assert batch.sizes is not None
    assert batch.sizes.tolist() == [[500, 700, 1], [40, 20, 1]]
    network = make_network(task)
    with torch.inference_mode():
        told = task.loss(network, batch, SampleDraws(SEED, [0, 1])).values
        swapped = replace(batch, sizes=batch.sizes.flip(0))
        other = task.loss(network, swapped, SampleDraws(SEED, [0, 1])).values
    assert not torch.equal(told, other)


def draw(*positions: int) -> SampleDraws:
    return SampleDraws(SEED, list(positions))


def test_rows_are_decoded_as_they_were_written() -> None:
    batch, _ = decode(make_task("text"), columns_of("text", 3), range(3))
    numbers = torch.Generator().manual_seed(3)
    moments = torch.randn(3, 16, SIZE, SIZE, generator=numbers)
    torch.testing.assert_close(batch.moments, moments.half().float(), rtol=0, atol=0)
    captions = torch.cat([torch.randn(i + 1, TEXT_WIDTH, generator=numbers) for i in range(3)])
    assert batch.features is not None
    assert torch.equal(batch.features, captions.bfloat16())
    assert batch.num_tokens == [1, 2, 3]


def test_of_several_captions_the_chosen_ones_features_are_decoded() -> None:
    tokens = [[2, 3, 1], [0, 1, 4], [0, 0, 2]]
    columns = columns_of("text", 3) | {
        "text.num_tokens": tokens,
        "text.features": [
            b"".join(pack_features(torch.full((n, TEXT_WIDTH), 1.0 + k)) for k, n in enumerate(row))
            for row in tokens
        ],
    }
    chosen = choose_captions(np.array(tokens), (1, 2, 1), draw(5, 6, 7))
    task = make_task("text", caption_weights=(1, 2, 1))
    batch, _ = decode(task, columns, range(5, 8))
    assert batch.num_tokens == [row[k] for row, k in zip(tokens, chosen, strict=True)]
    assert batch.features is not None
    expected = np.repeat(chosen + 1, batch.num_tokens)
    assert batch.features.tolist() == np.tile(expected[:, None], TEXT_WIDTH).tolist()


@repeatable
@given(st.data(), st.integers(2, 5), st.integers(1, 6))
def test_a_row_learns_a_caption_it_has_that_weighs_something_if_one_does(
    data: st.DataObject, num_captions: int, num_rows: int
) -> None:
    row = st.lists(st.integers(0, 2), min_size=num_captions, max_size=num_captions).filter(any)
    tokens = np.array(data.draw(st.lists(row, min_size=num_rows, max_size=num_rows)))
    weight = st.sampled_from([0.0, 0.25, 3.0])
    weights = tuple(data.draw(st.lists(weight, min_size=num_captions, max_size=num_captions)))
    together = choose_captions(tokens, weights, draw(*range(num_rows)))
    for position, (counts, chosen) in enumerate(zip(tokens, together, strict=True)):
        assert counts[chosen] > 0
        assert weights[chosen] or not any(w for w, n in zip(weights, counts, strict=True) if n)
        alone = choose_captions(counts[None], weights, draw(position))
        assert alone[0] == chosen, "whoever else is in the batch"


def test_captions_are_learned_as_often_as_they_weigh_among_those_a_row_has() -> None:
    draws = draw(*range(1500))
    tokens = np.tile([[4, 4, 4], [0, 4, 4], [4, 4, 0]], (500, 1))
    chosen = choose_captions(tokens, (2, 1, 1), draws).reshape(500, 3)
    counts = [np.bincount(column, minlength=3) / 500 for column in chosen.T]
    np.testing.assert_allclose(
        counts, [[0.5, 0.25, 0.25], [0, 0.5, 0.5], [2 / 3, 1 / 3, 0]], atol=0.06
    )
    alike = choose_captions(tokens[::3], (), draw(*range(500)))
    np.testing.assert_allclose(np.bincount(alike) / 500, [1 / 3] * 3, atol=0.06)


def test_with_one_caption_a_row_nothing_is_drawn() -> None:
    draws = draw(1, 2)
    assert choose_captions(np.array([[3], [5]]), (0.5,), draws).tolist() == [0, 0]
    assert torch.equal(draws.uniform(), draw(1, 2).uniform())


def test_weights_for_another_number_of_captions_are_refused() -> None:
    with pytest.raises(ModelInputError, match=r"caption.weights = .*has 3 captions a row"):
        choose_captions(np.array([[1, 1, 1]]), (0.5, 0.5), draw(0))
