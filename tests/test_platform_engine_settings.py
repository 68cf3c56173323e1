"""The learning rate over a stage, and finding the newest state that can be trusted."""

from pathlib import Path

import pytest
from builders import repeatable
from hypothesis import given
from hypothesis import strategies as st

from pixart_platform.checkpoint import StateStore
from pixart_platform.engine import OptimizerSettings
from pixart_platform.manifest import MANIFEST_FILE, FileRecord, Manifest

PEAK = 0.01


def make(warmup_images: int = 0, decay_share: float = 0.0) -> OptimizerSettings:
    return OptimizerSettings(
        learning_rate=PEAK, warmup_images=warmup_images, decay_share=decay_share
    )


def test_without_warm_up_and_decay_the_rate_is_constant() -> None:
    assert {make().rate_at(n, 100) for n in range(101)} == {PEAK}


def test_warm_up_is_a_line_that_ends_at_the_peak() -> None:
    rates = [make(warmup_images=100).rate_at(n, 1000) for n in range(1000)]
    assert rates[0] == pytest.approx(PEAK / 100)
    assert rates[49] == pytest.approx(PEAK / 2)
    assert rates[98] < PEAK
    assert set(rates[99:]) == {PEAK}


def test_decay_is_a_line_from_the_peak_to_zero_at_the_end() -> None:
    rates = [make(decay_share=0.25).rate_at(n, 1000) for n in range(1001)]
    assert set(rates[:751]) == {PEAK}
    assert rates[751] < PEAK
    assert rates[875] == pytest.approx(PEAK / 2)
    assert rates[999] > 0
    assert rates[1000] == 0


@repeatable
@given(st.integers(0, 5000), st.floats(0, 1), st.integers(1, 5000), st.data())
def test_the_rate_rises_then_falls_and_stays_between_zero_and_the_peak(
    warmup: int, decay: float, total: int, data: st.DataObject
) -> None:
    settings = make(warmup, decay)
    places = sorted(data.draw(st.lists(st.integers(0, total - 1), min_size=2, max_size=20)))
    rates = [settings.rate_at(n, total) for n in places]
    assert all(0 < rate <= PEAK for rate in rates)
    before = [r for n, r in zip(places, rates, strict=True) if n <= (1 - decay) * total]
    after = [r for n, r in zip(places, rates, strict=True) if n >= warmup]
    assert before == sorted(before)
    assert after == sorted(after, reverse=True)


def save(folder: Path, images_seen: int, digest: str = "run") -> Path:
    """A complete state, as the store writes it."""
    path = folder / str(images_seen)
    (path / "shards").mkdir(parents=True)
    (path / "shards" / "rank0.pt").write_bytes(b"optimizer" * 100)
    record = FileRecord.of(path / "shards" / "rank0.pt")
    record = FileRecord("shards/rank0.pt", record.num_bytes, record.sha256)
    settings = {"digest": digest, "images_seen": images_seen}
    Manifest("state/1", settings, {}, (record,)).commit_to(path)
    return path


def test_the_newest_state_is_found_by_number_not_by_name(tmp_path: Path) -> None:
    for images_seen in (900, 1000, 64):
        save(tmp_path, images_seen)
    assert StateStore(tmp_path, "run").find_newest() == 1000


def test_without_states_there_is_none(tmp_path: Path) -> None:
    assert StateStore(tmp_path, "run").find_newest() is None
    assert StateStore(tmp_path / "nowhere", "run").find_newest() is None


def damage_manifest_missing(path: Path) -> None:
    (path / MANIFEST_FILE).unlink()


def damage_bit(path: Path) -> None:
    shard = path / "shards" / "rank0.pt"
    data = bytearray(shard.read_bytes())
    data[450] ^= 1
    shard.write_bytes(data)


def damage_shard_missing(path: Path) -> None:
    (path / "shards" / "rank0.pt").unlink()


def damage_manifest_cut(path: Path) -> None:
    (path / MANIFEST_FILE).write_text((path / MANIFEST_FILE).read_text()[:50])


def damage_emptied(path: Path) -> None:
    damage_shard_missing(path)
    damage_manifest_missing(path)


@pytest.mark.parametrize(
    "damage",
    [
        damage_manifest_missing, damage_bit, damage_shard_missing, damage_manifest_cut,
        damage_emptied,
    ],
)  # fmt: skip
def test_an_incomplete_or_damaged_state_is_passed_over_and_named(
    tmp_path: Path, damage: object, caplog: pytest.LogCaptureFixture
) -> None:
    assert callable(damage)
    save(tmp_path, 100)
    damage(save(tmp_path, 200))
    damage(save(tmp_path, 300))
    assert StateStore(tmp_path, "run").find_newest() == 100
    assert f"state {tmp_path / '300'} is passed over" in caplog.text


def test_a_state_of_other_settings_is_passed_over(tmp_path: Path) -> None:
    save(tmp_path, 100)
    save(tmp_path, 200, digest="another run")
    assert StateStore(tmp_path, "run").find_newest() == 100
    assert StateStore(tmp_path, "third run").find_newest() is None


def test_stray_files_beside_the_states_do_no_harm(tmp_path: Path) -> None:
    save(tmp_path, 100)
    (tmp_path / "200.tmp").mkdir()
    (tmp_path / "300 (copy)").mkdir()
    (tmp_path / "400").touch()
    assert StateStore(tmp_path, "run").find_newest() == 100


def test_the_newest_complete_states_are_kept_and_unfinished_ones_left_alone(tmp_path: Path) -> None:
    for images_seen in (100, 900, 1000, 1100):
        save(tmp_path, images_seen)
    (tmp_path / "1100" / MANIFEST_FILE).unlink()
    save(tmp_path, 50).rename(tmp_path / "50 (copy)")
    StateStore(tmp_path, "run", keep=2)._prune()
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["1000", "1100", "50 (copy)", "900"]
