"""The journal of alias moves: one order, no move half done for long, nobody's move lost unseen."""

import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving_load import Models, register_models

from pixart_jobs import moves
from pixart_jobs.moves import CHAMPION, PREVIOUS, Move, MoveLost, effective, history, move
from pixart_platform.errors import RegistryError
from pixart_platform.registry import Registry, Version


def entry(before: int, after: int, alias: str = CHAMPION, who: str = "me") -> Move:
    return Move(0.0, alias, before, after, who, "", f"{time.perf_counter_ns()}")


@given(
    st.lists(
        st.tuples(
            st.sampled_from([CHAMPION, "challenger"]), st.integers(0, 4), st.integers(0, 4),
            st.sampled_from(["me", "unknown"]),
        )
    )
)  # fmt: skip
def test_moves_that_took_effect_are_a_chain(given_moves: list[tuple[str, int, int, str]]) -> None:
    done, standing = effective(entry(b, a, alias, who) for alias, b, a, who in given_moves)
    for alias in (CHAMPION, "challenger"):
        chain = [m for m in done if m.alias == alias]
        assert [m.before for m in chain] == [0, *(m.after for m in chain)][: len(chain)]
        assert standing.get(alias, 0) == (chain[-1].after if chain else 0)


def test_of_two_that_race_the_first_written_wins() -> None:
    done, standing = effective([entry(0, 1), entry(1, 2), entry(1, 3)])
    assert [m.after for m in done] == [1, 2]
    assert (standing[CHAMPION], standing[PREVIOUS]) == (2, 1)


def test_a_move_that_was_undone_does_not_become_previous() -> None:
    _, standing = effective([entry(0, 1), entry(1, 2), entry(2, 3), entry(3, 2, who="unknown")])
    assert (standing[CHAMPION], standing[PREVIOUS]) == (2, 1)


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Models:
    """Three versions; the first is champion, set without a journal."""
    monkeypatch.setattr(moves, "_SETTLE_SECONDS", 0.3)
    return register_models(tmp_path, 3)


def go(registry: Registry, number: int, **options: Any) -> Move | None:
    return move(registry, CHAMPION, lambda _: number, "", **options)


def test_where_an_alias_was_set_by_hand_is_written_down_and_stays_to_go_back_to(
    models: Models,
) -> None:
    registry = models.registry
    go(registry, 2)
    registry.set_alias(CHAMPION, registry.get("3"))  # as in MLflow's own page
    go(registry, 1)
    assert [(m.before, m.after) for m in history(registry)] == [(0, 1), (1, 2), (2, 3), (3, 1)]
    assert registry.aliases() == {CHAMPION: 1, PREVIOUS: 3}
    assert go(registry, 1) is None


class Dies(Exception):
    pass


def test_a_move_that_died_halfway_is_told_and_the_next_goes_on_from_what_drew(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = models.registry

    def die(*_: Any) -> None:
        raise Dies

    with monkeypatch.context() as broken:
        broken.setattr(Registry, "set_alias", die)
        with pytest.raises(Dies):
            go(registry, 2)
    assert registry.aliases() == {CHAMPION: 1}
    go(registry, 3)
    assert [(m.before, m.after) for m in history(registry)] == [(0, 1), (1, 2), (2, 1), (1, 3)]
    assert registry.aliases() == {CHAMPION: 3, PREVIOUS: 1}


def test_a_registry_lost_halfway_says_that_the_move_is_written_down(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise RegistryError("the registry does not answer")

    with monkeypatch.context() as broken:
        broken.setattr(Registry, "set_alias", refuse)
        with pytest.raises(
            RegistryError, match=r"to version 2 is written down, but .* run it again"
        ):
            go(models.registry, 2)
    go(models.registry, 2)
    assert models.registry.aliases() == {CHAMPION: 2, PREVIOUS: 1}


def overtake(monkeypatch: pytest.MonkeyPatch, registry: Registry, winner: int) -> None:
    """Somebody else writes first, just before the next entry is written."""
    write = Registry.append

    def overtaken(self: Registry, version: Version, text: str) -> None:
        monkeypatch.setattr(Registry, "append", write)
        move(registry, CHAMPION, lambda _: winner, "faster")
        write(self, version, text)

    monkeypatch.setattr(Registry, "append", overtaken)


def test_whoever_was_slower_is_asked_again_with_what_stands_now(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, seen = models.registry, []
    go(registry, 2)
    overtake(monkeypatch, registry, 3)

    def choose(standing: dict[str, int]) -> int:
        seen.append(standing[CHAMPION])
        return 1

    move(registry, CHAMPION, choose, "")
    assert seen == [2, 3]
    assert registry.aliases() == {CHAMPION: 1, PREVIOUS: 3}


def test_who_does_not_insist_is_told_who_was_faster(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    go(models.registry, 2)
    overtake(monkeypatch, models.registry, 3)
    with pytest.raises(MoveLost, match=r"moved to version 3 by .* \(faster\); nothing was done"):
        go(models.registry, 1, insist=False)
    assert models.registry.aliases() == {CHAMPION: 3, PREVIOUS: 2}


def test_a_journal_changed_by_hand_is_named(models: Models) -> None:
    models.registry.append(models.registry.get("1"), '{"alias": "champion"}')
    with pytest.raises(RegistryError, match="journal of digits was changed by hand"):
        go(models.registry, 2)
