"""Encoding: exact bytes, crops to squares and buckets, and rows that stay aligned whatever was
rejected."""

import io
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from builders import repeatable, write_table
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from pixart_jobs.encode import (
    _Encode,
    choose_shapes,
    fit,
    pack_features,
    plan,
    prepare_rows,
    unpack_features,
)
from pixart_jobs.recipe import EncodeSettings, Recipe
from pixart_jobs.scenes import compose_scene
from pixart_jobs.stage_task import LatentTask
from pixart_models.autoencoder import load_autoencoder
from pixart_models.buckets import Size, cover
from pixart_models.config import ModelInputError, get_preset
from pixart_models.snapshot import SnapshotConfig, build_network
from pixart_models.text import load_text_encoder
from pixart_platform.batches import Condition, RowIndex
from pixart_platform.order import Order
from pixart_platform.partitions import Sink
from pixart_platform.seeds import SampleDraws
from pixart_platform.storage import FileAbsent, open_folder
from pixart_platform.tables import Table, TableWriter


@repeatable
@given(st.integers(1, 6), st.integers(1, 5), st.randoms(use_true_random=False))
def test_features_come_back_bit_for_bit(length: int, width: int, random: Any) -> None:
    bits = [random.randrange(2**16) for _ in range(length * width)]
    patterns = torch.tensor(bits, dtype=torch.int32).to(torch.uint16).view(length, width)
    features = patterns.view(torch.bfloat16)
    packed = pack_features(features)
    assert len(packed) == 2 * length * width
    again = unpack_features(packed, width)
    assert again.shape == (length, width)
    assert torch.equal(again.view(torch.uint16), patterns), "nan and infinity included"


def test_packing_takes_any_float_and_layout() -> None:
    features = torch.arange(12, dtype=torch.float32).view(3, 4).T
    assert torch.equal(unpack_features(pack_features(features), 3).float(), features)


def test_bytes_are_little_endian_bfloat16() -> None:
    assert pack_features(torch.tensor([[1.0, -2.0]])) == bytes.fromhex("803f00c0")


def frame(height: int, width: int) -> NDArray[np.uint8]:
    """Green, with the largest centred square red."""
    side = min(height, width)
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 1] = 255
    top, left = (height - side) // 2, (width - side) // 2
    pixels[top : top + side, left : left + side] = (255, 0, 0)
    return pixels


@pytest.mark.parametrize(
    ("height", "width"),
    [(32, 32), (64, 64), (7, 7), (33, 32), (100, 31), (31, 100), (1, 1), (12, 200), (500, 16)],
)
def test_a_picture_is_scaled_to_cover_and_cropped_to_its_middle(height: int, width: int) -> None:
    pixels = fit(frame(height, width), Size(32, 32))
    assert pixels.shape == (32, 32, 3)
    assert pixels.dtype == np.uint8
    assert (pixels[8:24, 8:24, 0] == 255).all(), "the middle is the middle's red"
    assert (pixels[8:24, 8:24, 1] == 0).all()


def test_a_picture_of_the_right_size_is_not_touched() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    np.testing.assert_array_equal(fit(picture, Size(32, 32)), picture)


def test_cropping_takes_both_ends_alike() -> None:
    ramp = np.broadcast_to(np.arange(0, 120, dtype=np.uint8)[None, :, None], (40, 120, 3))
    shown = fit(np.ascontiguousarray(ramp), Size(40, 40))[0, :, 0]
    assert (shown[0], shown[-1]) == (40, 79)


SETTINGS = EncodeSettings(resolutions=(32, 40), batch_images=2)
REJECTED, UNCAPTIONED = 1, 4


def encode(settings: EncodeSettings, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the job makes of these rows, with patches of 2."""
    shapes = choose_shapes(settings, 2)
    prepared = prepare_rows(rows, shapes, refuse_extreme=bool(settings.bucketed))
    found: list[dict[str, Any]] = _Encode(settings, tuple(shapes), text=True)(prepared).to_pylist()
    return found


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """Five scenes of which one picture is rejected, and another's caption."""
    scenes = [compose_scene(i, seed=9) for i in range(5)]
    items = [
        {"id": sha256(scene.png()).hexdigest(), "status": "ok", "bytes": scene.png(), "uri": "",
         "captions": ["a red " + "three " * i], "text_status": "ok", "width": 48, "height": 48}
        for i, scene in enumerate(scenes)
    ]  # fmt: skip
    broken = {"status": "rejected: broken", "text_status": "rejected: broken"}
    items[REJECTED] |= broken | {"bytes": b"", "captions": [], "width": 0, "height": 0}
    items[UNCAPTIONED] |= {"text_status": "rejected: no caption (blank)", "captions": []}
    return items


@pytest.fixture(scope="module")
def encoded(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return encode(SETTINGS, rows)


def test_every_row_comes_back_in_its_place(
    rows: list[dict[str, Any]], encoded: list[dict[str, Any]]
) -> None:
    for column in ("id", "status", "text_status"):
        assert [row[column] for row in encoded] == [row[column] for row in rows]


def test_a_rejected_picture_has_an_empty_payload(encoded: list[dict[str, Any]]) -> None:
    row = encoded[REJECTED]
    assert (row["features"], row["moments_32"], row["moments_40"]) == (b"", b"", b"")
    assert row["num_tokens"] == []
    numbers = ("width", "height", "bucket_h_32", "bucket_w_32", "bucket_h_40")
    assert {row[name] for name in numbers} == {0}


def test_a_rejected_caption_keeps_its_picture(encoded: list[dict[str, Any]]) -> None:
    row = encoded[UNCAPTIONED]
    assert (row["features"], row["num_tokens"]) == (b"", [])
    assert row["moments_32"]
    assert row["moments_40"]


def test_payloads_have_the_size_their_numbers_say(encoded: list[dict[str, Any]]) -> None:
    width = load_text_encoder(SETTINGS.text_encoder, SETTINGS.max_tokens).width
    channels = 2 * load_autoencoder(SETTINGS.autoencoder).channels
    for i, row in enumerate(encoded):
        assert len(row["features"]) == 2 * sum(row["num_tokens"]) * width
        for resolution in SETTINGS.resolutions:
            height, across = row[f"bucket_h_{resolution}"], row[f"bucket_w_{resolution}"]
            assert len(row[f"moments_{resolution}"]) == 2 * channels * height * across
            if i != REJECTED:
                assert height == across == resolution // 4
    lengths = [encoded[i]["num_tokens"][0] for i in (0, 2, 3)]
    assert lengths == sorted(set(lengths)), "features are trimmed to the caption's own length"


def test_a_row_is_encoded_the_same_alone_as_among_others(
    rows: list[dict[str, Any]], encoded: list[dict[str, Any]]
) -> None:
    (alone,) = encode(SETTINGS, rows[3:4])
    for name, dtype in (("moments_40", np.float16), ("moments_32", np.float16)):
        ours, theirs = (np.frombuffer(row[name], dtype) for row in (alone, encoded[3]))
        np.testing.assert_allclose(ours, theirs, atol=0.01)
    features = [unpack_features(row["features"], 64).float() for row in (alone, encoded[3])]
    torch.testing.assert_close(features[0], features[1], atol=0.02, rtol=0.02)


def test_the_moments_decode_to_the_picture(encoded: list[dict[str, Any]]) -> None:
    autoencoder = load_autoencoder(SETTINGS.autoencoder)
    row = encoded[2]
    moments = torch.frombuffer(bytearray(row["moments_40"]), dtype=torch.float16)
    mean = moments.view(-1, row["bucket_h_40"], row["bucket_w_40"])[: autoencoder.channels].float()
    decoded = autoencoder.decode(mean[None] * autoencoder.scale)[0]
    scene = Image.open(io.BytesIO(compose_scene(2, seed=9).png())).resize((40, 40))
    error = np.abs(decoded.astype(int) - np.asarray(scene)).mean()
    assert error < 12, "the picture of another scene differs by far more"
    other = np.asarray(Image.fromarray(compose_scene(3, seed=9).image).resize((40, 40)))
    assert np.abs(decoded.astype(int) - other).mean() > 2 * error


BUCKETED = EncodeSettings(resolutions=(32, 40), batch_images=2, aspect_buckets=True)
SHAPES = [(60, 60), (40, 80), (80, 40), (30, 119), (120, 30), (61, 60), (40, 66), (25, 101)]
EXTREME = 7  # the last is longer than 4:1
EXPECTED_32 = [(8, 8), (6, 10), (10, 6), (4, 16), (16, 4), (8, 8), (6, 10), (0, 0)]  # latents


def gradient(height: int, width: int) -> NDArray[np.uint8]:
    """Red grows downwards and green to the right, so that a crop shows where it was cut."""
    down, across = np.linspace(0, 255, height), np.linspace(0, 255, width)
    red, green = np.broadcast_arrays(down[:, None], across[None, :])
    return np.stack([red, green, np.zeros_like(red)], axis=2).astype(np.uint8)


def png(picture: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def shaped_rows() -> list[dict[str, Any]]:
    return [
        {"id": sha256(png(gradient(height, width))).hexdigest(), "status": "ok", "uri": "",
         "bytes": png(gradient(height, width)), "captions": ["red " * (i % 3 + 1)],
         "text_status": "ok", "width": width, "height": height}
        for i, (height, width) in enumerate(SHAPES)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def bucketed(shaped_rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return encode(BUCKETED, shaped_rows)


def test_each_picture_goes_to_its_nearest_bucket(
    shaped_rows: list[dict[str, Any]], bucketed: list[dict[str, Any]]
) -> None:
    assert [row["id"] for row in bucketed] == [row["id"] for row in shaped_rows]
    found = [(row["bucket_h_32"], row["bucket_w_32"]) for row in bucketed]
    assert found == EXPECTED_32
    for row, (height, width) in zip(bucketed, SHAPES, strict=True):
        assert (row["height"], row["width"]) == (height, width), "the picture's own size is kept"
        for side in BUCKETED.resolutions:
            area = row[f"bucket_h_{side}"] * row[f"bucket_w_{side}"]
            assert len(row[f"moments_{side}"]) == 2 * 16 * area
            assert row["status"] != "ok" or 0.9 * side**2 <= 16 * area <= side**2


def test_pictures_beyond_4_to_1_are_rejected_and_their_captions_kept(
    bucketed: list[dict[str, Any]],
) -> None:
    row = bucketed[EXTREME]
    assert row["status"] == "rejected: longer than 4:1 (101x25)"
    assert (row["moments_32"], row["bucket_h_32"]) == (b"", 0)
    assert row["text_status"] == "ok"
    assert row["num_tokens"][0] > 0
    assert {row["status"] for row in bucketed[:EXTREME]} == {"ok"}


def test_a_picture_in_a_bucket_is_encoded_as_alone(
    shaped_rows: list[dict[str, Any]], bucketed: list[dict[str, Any]]
) -> None:
    for i in (1, 6):  # one bucket, one batch; their captions are not
        (alone,) = encode(BUCKETED, shaped_rows[i : i + 1])
        for name in ("moments_32", "moments_40"):
            ours, theirs = (np.frombuffer(row[name], np.float16) for row in (alone, bucketed[i]))
            np.testing.assert_allclose(ours, theirs, atol=0.01)
        features = [unpack_features(row["features"], 64).float() for row in (alone, bucketed[i])]
        torch.testing.assert_close(features[0], features[1], atol=0.02, rtol=0.02)


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_the_crop_follows_from_the_sizes_a_table_keeps(height: int, width: int) -> None:
    """What the encoder saw can be said later, from the row alone."""
    bucket = Size(24, 40)
    crop = cover(height, width, bucket)
    seen = torch.tensor(fit(gradient(height, width), bucket)) / 255
    corner = torch.tensor([crop.top / crop.height, crop.left / crop.width])
    other = corner + torch.tensor([24 / crop.height, 40 / crop.width])
    torch.testing.assert_close(seen[0, 0, :2], corner, atol=0.06, rtol=0)
    torch.testing.assert_close(seen[-1, -1, :2], other, atol=0.06, rtol=0)


def test_a_resolution_off_the_grid_is_refused_before_anything_is_encoded() -> None:
    settings = EncodeSettings(resolutions=(36,), aspect_buckets=True)
    with pytest.raises(ModelInputError, match=r"36 px.*multiple of 8 "):
        choose_shapes(settings, patch=2)


def test_buckets_at_some_resolutions_leave_the_others_square() -> None:
    shapes = choose_shapes(EncodeSettings(resolutions=(32, 40), aspect_buckets=(40,)), patch=2)
    assert shapes[32] == (Size(32, 32),)
    assert len(shapes[40]) > 1
    with pytest.raises(ValueError, match=r"aspect_buckets = \[64\]: must be among resolutions"):
        EncodeSettings(resolutions=(32, 40), aspect_buckets=(64,))


def recipe_with(settings: EncodeSettings) -> Recipe:
    stage = {
        "condition_on": "text", "start_from": "scratch", "resolution": 32, "images": 64,
        "optimizer": {"learning_rate": 1e-3},
    }  # fmt: skip
    return Recipe.model_validate(
        {"name": "test", "encode": settings.model_dump(), "stages": {"align": stage}}
    )


def test_options_that_are_off_leave_old_tables_valid(tmp_path: Path) -> None:
    """A table's folder is named by the digest of its settings: one more key orphans it."""
    root = open_folder(tmp_path)
    schemas = {"images": "images/2", "selection": "selection/1", "captions": "captions/2"}
    tables = {name: write_table(root / name, schema, [[]]) for name, schema in schemas.items()}
    text, latents = plan(recipe_with(EncodeSettings(resolutions=(32,))), root, tables)
    assert text.settings == {
        "text_encoder": "builtin:t5-tiny", "max_tokens": 48, "revision": "1",
    }  # fmt: skip
    assert latents[32].settings == {
        "autoencoder": "builtin:digits", "resolution": 32, "revision": "1",
    }  # fmt: skip
    wide = EncodeSettings(resolutions=(32,), aspect_buckets=True)
    same_text, wide_latents = plan(recipe_with(wide), root, tables)
    assert same_text.folder == text.folder
    assert wide_latents[32].folder != latents[32].folder


def test_a_row_has_features_for_each_caption_it_has(rows: list[dict[str, Any]]) -> None:
    both = rows[2] | {"captions": ["a red three", "", "three"]}
    (row,) = encode(SETTINGS, [both])
    alone = [encode(SETTINGS, [rows[2] | {"captions": [c]}])[0] for c in ("a red three", "three")]
    assert row["num_tokens"] == [alone[0]["num_tokens"][0], 0, alone[1]["num_tokens"][0]]
    ours = unpack_features(row["features"], 64).float()
    theirs = unpack_features(alone[0]["features"] + alone[1]["features"], 64).float()
    torch.testing.assert_close(ours, theirs, atol=0.02, rtol=0.02)


def test_a_picture_that_changed_at_its_source_is_rejected_but_not_one_out_of_reach(
    rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    place = tmp_path / "a.png"
    place.write_bytes(rows[0]["bytes"])
    away = rows[0] | {"bytes": b"", "uri": str(place)}
    assert encode(SETTINGS, [away])[0]["status"] == "ok"
    place.write_bytes(rows[2]["bytes"])
    assert encode(SETTINGS, [away])[0]["status"].startswith("rejected: changed at its source")
    place.unlink()
    with pytest.raises(FileAbsent):
        encode(SETTINGS, [away])


def test_8_bit_without_a_t5_is_refused() -> None:
    with pytest.raises(ValueError, match="text_encoder_8bit = true has no effect on builtin"):
        EncodeSettings(text_encoder_8bit=True)


def write_tables(
    root: Path, shaped_rows: list[dict[str, Any]], bucketed: list[dict[str, Any]]
) -> dict[str, tuple[Table, list[str]]]:
    """The three tables a stage reads, as the job's sinks write them."""
    place = open_folder(root)
    images = write_table(place / "images", "images/2", [[{"id": row["id"]} for row in shaped_rows]])
    encoded = pa.Table.from_pylist(bucketed)
    same = {name: name for name in ("id", "status", "width", "height")}
    columns = same | {name: f"{name}_32" for name in ("moments", "bucket_h", "bucket_w")}
    latents = TableWriter.under(place, "latents", "latents/1", {}, {"images": images})
    Sink(latents, columns).write(0, encoded)
    text = TableWriter.under(place, "text", "text/2", {}, {"images": images})
    names = {name: name for name in ("id", "features", "num_tokens")}
    Sink(text, names | {"status": "text_status"}).write(0, encoded)
    return {
        "images": (images, ["label"]),
        "text": (text.commit(), ["features", "num_tokens"]),
        "latents": (latents.commit(), ["moments", "bucket_h", "bucket_w"]),
    }


def test_a_stage_learns_from_batches_of_one_bucket(
    tmp_path: Path, shaped_rows: list[dict[str, Any]], bucketed: list[dict[str, Any]]
) -> None:
    """Every bucket comes up, stacks to one shape, and gives the network a loss and gradients."""
    index = RowIndex(write_tables(tmp_path, shaped_rows, bucketed), Condition(()))
    expected = {shape: EXPECTED_32.count(shape) for shape in EXPECTED_32 if shape != (0, 0)}
    assert {bucket: sum(counts) for bucket, counts in index.counts.items()} == expected
    order = Order.over(index.counts, batch_images=2, seed=0)
    config = SnapshotConfig(
        network=get_preset("digits-mini"), objective="flow", resolution=32,
        autoencoder="builtin:digits", autoencoder_digest="", text_encoder="builtin:t5-tiny",
        text_encoder_digest="",
    )  # fmt: skip
    task = LatentTask(
        snapshot=config, latent_scale=1.0, null_features=torch.zeros(1, 64), condition_drop=0.1,
        flow_location=0.0, device=torch.device("cpu"),
    )  # fmt: skip
    torch.manual_seed(0)
    network = build_network(config.network)
    seen = set()
    for n in range(len(expected)):
        bucket, samples = order.batch(n)
        draws = SampleDraws(0, [2 * n, 2 * n + 1])
        batch = task.decode(index.fetch(bucket, samples), draws)
        assert batch.moments.shape == (2, 16, *bucket)
        losses = task.loss(network, batch, draws)
        torch.autograd.backward(losses.values.mean())
        seen.add(bucket)
    assert seen == set(expected)
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)
