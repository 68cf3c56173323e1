"""Files of states: any ranks read what any others wrote, and what is none of ours is refused."""

import json
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import repeatable
from hypothesis import given, settings
from hypothesis import strategies as st
from small_states import KINDS, Cut, blank, cut_out, is_whole, open_store, save, values_of

from pixart_platform import checkpoint
from pixart_platform.checkpoint import State
from pixart_platform.engine import Fragment
from pixart_platform.errors import StorageError
from pixart_platform.manifest import FileRecord, Manifest
from pixart_platform.storage import LocalFolder


@st.composite
def cuttings(draw: st.DrawFn, lengths: dict[str, int]) -> list[Cut]:
    """Who of some ranks holds what: each parameter in pieces, on any ranks, on some none."""
    num_ranks = draw(st.integers(1, 5))
    cuts: list[Cut] = [[] for _ in range(num_ranks)]
    for name, length in lengths.items():
        inner = draw(st.lists(st.integers(0, length), max_size=4))
        ends = sorted([0, *inner, length])
        for begin, end in pairwise(ends):
            cuts[draw(st.integers(0, num_ranks - 1))].append((name, begin, end))
    return cuts


@settings(repeatable, max_examples=30)
@given(st.data())
def test_any_ranks_read_what_any_others_wrote(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, data: st.DataObject
) -> None:
    monkeypatch.setattr(checkpoint, "_POLL_SECONDS", 0.001)
    lengths = data.draw(
        st.dictionaries(st.sampled_from("abcd"), st.integers(1, 30), min_size=1, max_size=4)
    )
    values = values_of(lengths)
    writers, readers = data.draw(cuttings(lengths)), data.draw(cuttings(lengths))
    store = open_store(LocalFolder(tmp_path_factory.mktemp("states")))
    save(store, 8, writers, values)
    state = store.open(8)
    assert is_whole(state, values)
    for cut in readers:
        fragments = blank(cut)
        state.restore(fragments)
        for found, expected in zip(fragments, cut_out(values, cut), strict=True):
            for kind in KINDS:
                assert torch.equal(found.views[kind], expected.views[kind])


def entry_of(**changes: Any) -> dict[str, Any]:
    return {"weight|a|0": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


def pack(header: Any, data: bytes = bytes(8)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def state_of(folder: Path, data: bytes) -> State:
    """A state of one file, whatever is in it."""
    (folder / "7").mkdir(parents=True, exist_ok=True)
    (folder / "7" / "token-00000.safetensors").write_bytes(data)
    store = open_store(LocalFolder(folder))
    record = FileRecord("token-00000.safetensors", len(data), "")
    extra = {"images_seen": 7, "history": [], "recent": []}
    return State(store.folder / "7", Manifest("state/2", {}, {}, (record,), extra))


def test_a_file_written_by_hand_is_read(tmp_path: Path) -> None:
    data = struct.pack("<2f", 1.5, -2)
    found = state_of(tmp_path, pack(entry_of() | {"__metadata__": {"by": "hand"}}, data))
    assert found.read("weight")["a"].tolist() == [1.5, -2]


HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "no header": bytes(7),
    "header beyond the file": struct.pack("<Q", 1000) + b"{}",
    "endless header": struct.pack("<Q", 2**63) + b"{}",
    "no json": pack(b"not json"),
    "no text": pack(b"\xff\xfe{}"),
    "a list": pack([entry_of()]),
    "a number": pack(5),
    "nothing": pack(None),
    "deep": pack(b"[" * 200_000),
    "entry of another kind": pack({"weight|a|0": [0, 8]}),
    "no offsets": pack({"weight|a|0": {"dtype": "F32", "shape": [2]}}),
    "half precision": pack(entry_of(dtype="F16", shape=[4])),
    "wrong size": pack(entry_of(shape=[3])),
    "offsets in words": pack(entry_of(data_offsets=["0", "8"])),
    "broken offsets": pack(entry_of(data_offsets=[0.0, 8.0])),
    "three offsets": pack(entry_of(data_offsets=[0, 4, 8])),
    "before the data": pack(entry_of(data_offsets=[-8, 0])),
    "backwards": pack(entry_of(shape=[-2], data_offsets=[8, 0])),
    "beyond the end": pack(entry_of(data_offsets=[4, 12])),
    "cut off": pack(entry_of(), bytes(4)),
    "terabytes": pack(entry_of(shape=[10**12], data_offsets=[0, 4 * 10**12])),
    "no place": pack({"weight|a": entry_of()["weight|a|0"]}),
    "no kind": pack({"a": entry_of()["weight|a|0"]}),
    "place in words": pack({"weight|a|x": entry_of()["weight|a|0"]}),
    "place before the first": pack({"weight|a|-2": entry_of()["weight|a|0"]}),
    "far away": pack({"weight|a|9999999999999": entry_of()["weight|a|0"]}),
    "a gap": pack({"weight|a|3": entry_of()["weight|a|0"]} | entry_of()),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_is_none_of_ours_is_refused(tmp_path: Path, name: str) -> None:
    state = state_of(tmp_path, HOSTILE[name])
    with pytest.raises(StorageError, match=str(tmp_path / "7")):
        state.read("weight")
    with pytest.raises(StorageError, match=str(tmp_path / "7")):
        state.restore([Fragment("a", 0, {"weight": torch.zeros(5)})])


@settings(repeatable, max_examples=200)
@given(st.integers(0, 10**6), st.integers(0, 255), st.integers(0, 40))
def test_a_file_with_any_byte_changed_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, place: int, byte: int, missing: int
) -> None:
    """A manifest would tell; but whatever is there, nothing else is raised, and no memory taken."""
    data = bytearray(pack(entry_of() | {"average|b|0": entry_of()["weight|a|0"]}))
    data[place % len(data)] = byte
    state = state_of(tmp_path_factory.getbasetemp() / "fuzz", bytes(data[: len(data) - missing]))
    try:
        found = [values for kind in KINDS for values in state.read(kind).values()]
    except StorageError:
        return
    assert all(len(values) <= 4 for values in found)


def test_a_parameter_that_no_rank_saved_is_named_by_its_place(tmp_path: Path) -> None:
    state = state_of(tmp_path, pack(entry_of()))
    with pytest.raises(StorageError, match=r"7: .*other.* from 0 to 2"):
        state.restore([Fragment("other", 0, {"weight": torch.zeros(2)})])
