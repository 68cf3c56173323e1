"""Votes: blind, in balance, counted as scipy counts, none lost and none twice."""

import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from processes import wait_for
from scipy import stats
from serving_load import Models, register_models
from test_serve_snapshots import build_drawer, write_snapshot

from pixart_jobs.preference import Poll, PreferenceError, choose_prompts, draw
from pixart_jobs.recipe import DrawSettings
from pixart_jobs.votes import (
    Booth,
    Recorder,
    Result,
    UnknownPair,
    Vote,
    VotedAlready,
    VoteFile,
    count,
    settle,
    tell,
)
from pixart_platform.errors import StorageError
from pixart_platform.seeds import derive_seed
from pixart_platform.tracking import read_file, read_run
from pixart_serve.ballot import build_ballot

if TYPE_CHECKING:
    from mlflow_server import MlflowServer

PROMPTS = tuple(f"a red {n} on a dark picture" for n in range(30))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return register_models(tmp_path_factory.mktemp("votes"), 2)


@pytest.fixture(scope="module")
def poll(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Poll:
    a, b = models.registry.versions()
    return Poll(a, b, PROMPTS, DrawSettings(num_steps=2), 0, tmp_path_factory.mktemp("run"))


Pictures = tuple[list[bytes], list[bytes]]


@pytest.fixture(scope="module")
def pictures(poll: Poll) -> Pictures:
    return draw(poll, 16, lambda _: None)


@pytest.fixture
def file(tmp_path: Path) -> VoteFile:
    return VoteFile(tmp_path / "votes.jsonl")


@pytest.fixture
def booth(poll: Poll, pictures: Pictures, file: VoteFile) -> Booth:
    return Booth(poll, pictures, file)


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def vote_on_next(booth: Booth, voter: str, choice: str) -> None:
    booth.vote(voter, booth.ballot(voter)["pair"]["id"], choice)


def test_each_side_shows_what_its_version_draws_with_the_same_seed(
    models: Models, poll: Poll, booth: Booth
) -> None:
    seeds = [derive_seed(0, "vote", i) for i, _ in enumerate(PROMPTS)]
    drawn = [d.draw(PROMPTS, seeds, steps=2) for d in models.drawers.values()]
    order = poll.order_for("ann")
    for pair, a_is_left in list(order.items())[:6]:
        i = poll.pairs[pair]
        left, right = (pixels(booth.picture("ann", pair, side)) for side in ("left", "right"))
        expected = drawn if a_is_left else drawn[::-1]
        assert np.abs(left.astype(int) - expected[0][i]).max() <= 1
        assert np.abs(right.astype(int) - expected[1][i]).max() <= 1


def test_sides_are_in_balance_for_each_voter_and_differ_between_voters(poll: Poll) -> None:
    orders = [poll.order_for(f"voter {k}") for k in range(200)]
    assert all(sum(order.values()) == 15 for order in orders)
    assert poll.order_for("voter 7") == orders[7]
    by_pair = [sum(order[pair] for order in orders) for pair in poll.pairs]
    assert 60 < min(by_pair) < max(by_pair) < 140  # 100 of 200, 5.6 standard deviations
    assert len({tuple(order) for order in orders}) == 200
    odd = replace(poll, prompts=PROMPTS[:7])
    assert {sum(odd.order_for(f"voter {k}").values()) for k in range(20)} == {3, 4}


def test_nothing_that_the_browser_gets_tells_versions_apart(
    poll: Poll, file: VoteFile, tmp_path: Path, models: Models
) -> None:
    """Also where one of them draws larger pictures."""
    drawer = build_drawer(2)
    large = replace(drawer, config=replace(drawer.config, resolution=64))
    folder = write_snapshot(tmp_path / "large", large)
    larger = models.registry.register(folder, poll.a.run_id, {})
    unlike = replace(poll, b=larger, root=tmp_path)
    client = TestClient(
        build_ballot(Booth(unlike, draw(unlike, 16, lambda _: None), file), "ann"),
        base_url="http://127.0.0.1",
    )
    secrets = [v.tags["digest"] for v in (unlike.a, unlike.b)] + [unlike.digest, str(tmp_path)]
    secrets += ["digits@", str(larger.number)] if larger.number > 9 else ["digits@"]
    for _ in PROMPTS:
        told = client.get("/ballot")
        pair = told.json()["pair"]["id"]
        sides = [client.get(f"/pictures/{pair}/{side}") for side in ("left", "right")]
        for response in (told, *sides, client.get("/")):
            assert response.status_code == 200
            everything = response.text + str(response.headers) + str(response.url)
            assert [secret for secret in secrets if secret in everything] == []
        left, right = ({**side.headers, "content-length": ""} for side in sides)
        assert left == right
        assert {pixels(side.content).shape for side in sides} == {(64, 64, 3)}
        assert {tuple(chunks(side.content)) for side in sides} == {(b"IHDR", b"IDAT", b"IEND")}
        body = {"voter": "ann", "pair": pair, "choice": "left"}
        assert client.post("/votes", json=body).status_code == 200
    assert client.get("/ballot").json() == {"voter": "ann", "done": 30, "total": 30, "pair": None}
    found = count(unlike, settle(file.read()))
    assert (found.a, found.b) == (15, 15), "who always says left prefers nobody"


def chunks(png: bytes) -> Iterator[bytes]:
    """The kinds of a PNG's chunks, each run of one kind once."""
    at, before = 8, b""
    while at < len(png):
        kind = png[at + 4 : at + 8]
        if kind != before:
            yield kind
        at, before = at + 12 + int.from_bytes(png[at : at + 4], "big"), kind


def test_drawn_once_and_again_where_damaged(poll: Poll, pictures: Pictures) -> None:
    reached: list[int] = []
    assert draw(poll, 16, reached.append) == pictures
    assert reached == [30, 60], "nothing was drawn"
    [first, *_] = sorted((poll.root / "votes").glob("pictures-*/00003.png"))
    first.write_bytes(b"no picture")
    assert draw(poll, 16, reached.append) == pictures
    assert len(reached) == 6


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 9))
def test_the_win_rate_is_scipys_and_alike_votes_do_not_move_it(a: int, b: int, alike: int) -> None:
    found = Result(a, b, alike, 1, {})
    assert found.metrics["votes"] == a + b + alike
    if a + b == 0:
        assert (found.win_rate.low, found.win_rate.high, found.p) == (0, 1, 1)
        return
    tails = stats.beta.ppf([0.025, 0.975], [a, a + 1], [b + 1, b])
    assert found.win_rate.value == a / (a + b)
    assert found.win_rate.low == pytest.approx(tails[0] if a else 0, abs=1e-6)
    assert found.win_rate.high == pytest.approx(tails[1] if b else 1, abs=1e-6)
    more = stats.binom.sf(max(a, b) - 1, a + b, 0.5)
    assert found.p == pytest.approx(min(1, 2 * more), rel=1e-9)


def test_what_people_chose_is_counted_and_told(poll: Poll, booth: Booth, file: VoteFile) -> None:
    """Ann always prefers a, Bob b but for the last of his, Cy sees no difference."""
    for voter in ("ann", "bob", "cy"):
        for pair, a_is_left in poll.order_for(voter).items():
            wants_a = voter == "ann"
            choice = "left" if a_is_left == wants_a else "right"
            booth.vote(voter, pair, "alike" if voter == "cy" else choice, "because")
    booth.undo("bob")
    vote_on_next(booth, "bob", "alike")
    result = count(poll, settle(file.read()))
    assert (result.a, result.b, result.alike, result.voters) == (30, 29, 31, 3)
    lines = list(tell(poll, result))
    assert lines[0] == "digits@1 won 30, digits@2 won 29, alike 31: 90 votes, 3 voters"
    assert "win rate of digits@1: 0.508 (0.375 to 0.641), p = 1.0000" in lines[1]
    assert "digits@1 ahead on 1, digits@2 on 0, p = 1.0000" in lines[2]
    assert len(lines) == 3 + 29
    assert "voters disagree, 1 to 1: a red " in lines[3]
    assert json.loads(file.path.read_text().splitlines()[0])["preferred"] == "digits@1"


def test_what_a_voter_may_not_do_is_refused_by_name(booth: Booth, file: VoteFile) -> None:
    pair = booth.ballot("ann")["pair"]["id"]
    with pytest.raises(UnknownPair, match="'nope': is not of this poll"):
        booth.vote("ann", "nope", "left")
    with pytest.raises(PreferenceError, match="has 501 characters; write at most 500"):
        booth.vote("ann", pair, "left", "x" * 501)
    with pytest.raises(PreferenceError, match="choice = 'up': must be one of left, right, alike"):
        booth.vote("ann", pair, "up")
    with pytest.raises(UnknownPair, match="voter ann: has no vote to undo"):
        booth.undo("ann")
    for name in ("", " ann", "x" * 65, "a\nb"):
        with pytest.raises(PreferenceError, match="must be a name of 1 to 64 characters"):
            booth.ballot(name)
    booth.vote("ann", pair, "left")
    booth.vote("ann", pair, "left")  # the answer was lost, the page asks again
    with pytest.raises(VotedAlready, match="ann has voted on it; undo that vote first"):
        booth.vote("ann", pair, "right")
    assert len(file.read()) == 1


def test_only_the_page_itself_may_vote(booth: Booth) -> None:
    client = TestClient(build_ballot(booth, "ann"), base_url="http://127.0.0.1:8010")
    body = {"voter": "ann", "pair": booth.ballot("ann")["pair"]["id"], "choice": "left"}
    for headers, status in (
        ({"origin": "http://127.0.0.1:8010"}, 200),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "http://127.0.0.1:9999"}, 403),
        ({"origin": "null"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"host": "evil.example:8010"}, 403),
        ({"content-type": "text/plain"}, 415),
    ):
        response = client.post("/votes", json=body, headers=headers)
        assert response.status_code == status, headers
        assert "default-src 'none'" in response.headers["content-security-policy"]
        assert "unsafe" not in response.headers["content-security-policy"]
    large = client.post("/votes", json=body | {"reason": "x" * 20_000})
    assert (large.status_code, large.json()["error"]["message"]) == (
        413, "the body is larger than 16384 bytes",
    )  # fmt: skip
    for wrong, status in (
        (body | {"reason": "x" * 501}, 400), (body | {"version": "2"}, 400), ({}, 400), ([], 400),
        (body | {"pair": "p"}, 404), (body | {"choice": "right"}, 409),
    ):  # fmt: skip
        assert client.post("/votes", json=wrong).status_code == status, wrong
    assert client.get(f"/pictures/{body['pair']}/middle").status_code == 404
    assert client.get("/ballot", headers={"host": "evil.example"}).status_code == 403


def test_many_voters_at_once_lose_nothing_and_count_nothing_twice(
    poll: Poll, pictures: Pictures, file: VoteFile
) -> None:
    """Eight voters, each at two servers at a time, vote on all pairs; the second says otherwise."""
    booths = [Booth(poll, pictures, VoteFile(file.path)) for _ in range(2)]
    refused: list[str] = []

    def work(job: tuple[int, str]) -> None:
        at, voter = job
        for pair in poll.order_for(voter):
            try:
                booths[at].vote(voter, pair, ("left", "right")[at])
            except VotedAlready:
                refused.append(voter)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(work, [(at, f"v{k}") for k in range(8) for at in range(2)]))
    lines = file.read()
    assert len(lines) == len(settle(lines)) == 8 * 30
    assert len(refused) == 8 * 30


def test_a_line_that_was_cut_off_was_no_vote_and_harms_none(booth: Booth, file: VoteFile) -> None:
    vote_on_next(booth, "ann", "left")
    whole = file.path.read_bytes()
    for length in (1, len(whole) // 2, len(whole) - 1):
        file.path.write_bytes(whole + whole[:length])
        assert len(file.read()) == 1
        vote_on_next(booth, f"after {length}", "alike")
        assert [vote.voter for vote in file.read()] == ["ann", f"after {length}"]
    file.path.write_bytes(whole + b"by hand\n" + whole)
    with pytest.raises(StorageError, match=r"votes\.jsonl:2: no vote .* restore it or delete"):
        booth.ballot("ann")


def test_prompts_are_those_held_out_or_a_files(tmp_path: Path) -> None:
    from pixart_cluster.recipe import read_recipe

    recipe = read_recipe("digits")
    held_out = choose_prompts(recipe, None, 50)
    assert len(set(held_out)) == 50
    assert held_out[:10] == choose_prompts(recipe, None, 10)
    listed = tmp_path / "prompts.txt"
    listed.write_text("a one\n\n  a two \r\na one\na three\n")
    assert choose_prompts(recipe, listed, 50) == ("a one", "a two", "a three")
    assert choose_prompts(recipe, listed, 2) == ("a one", "a two")
    for content, fault in ((b"\n \n", "holds no prompt; write one"), (b"\xff\xff", "not UTF-8")):
        listed.write_bytes(content)
        with pytest.raises(PreferenceError, match=fault):
            choose_prompts(recipe, listed, 2)
    with pytest.raises(PreferenceError, match=r"nowhere\.txt: cannot be read \(No such file"):
        choose_prompts(recipe, tmp_path / "nowhere.txt", 2)
    other = read_recipe("digits", [f"data.source=folder:{tmp_path}"])
    with pytest.raises(PreferenceError, match="holds no prompts out; name a file"):
        choose_prompts(other, None, 2)


def test_mlflow_follows_and_its_absence_loses_no_vote(
    poll: Poll, pictures: Pictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow_server import MlflowServer  # takes seconds to import

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    here = replace(poll, root=tmp_path)
    file = VoteFile(here.folder / "votes.jsonl")
    with MlflowServer(tmp_path / "server") as server:
        recorder = Recorder(server.uri, here, file)
        booth = Booth(here, pictures, file, recorder.notice)
        vote_on_next(booth, "ann", "left")
        wait_for(lambda: points(server, recorder.run_id) == [1], "the first point", 20)
        server.mood = "away"
        for choice in ("right", "alike", "left"):
            vote_on_next(booth, "ann", choice)
        booth.undo("ann")
        assert not recorder.close(patience_seconds=1.5)
        assert len(file.read()) == 5
        server.mood = "up"
        again = Recorder(server.uri, here, file)
        assert again.run_id == recorder.run_id
        assert again.close()
        assert points(server, again.run_id) == [1, 2, 3, 4, 3]
        assert read_file(server.uri, again.run_id, "votes.jsonl") == file.path.read_bytes()
        run = read_run(server.uri, again.run_id)
    expected = count(here, settle(file.read())).metrics
    assert {key: run.metrics[key] for key in expected} == pytest.approx(expected)
    assert (run.tags["vote_a"], run.tags["vote_b"]) == ("digits@1", "digits@2")
    assert run.tags["vote_b_digest"] == poll.b.tags["digest"]


def points(server: "MlflowServer", run_id: str) -> list[float]:
    """``votes`` by step: a step a line, so that an undo makes them fewer."""
    from pixart_platform.tracking import Tracker

    return [value for _, value in Tracker(server.uri, run_id).history("votes")]


def test_a_vote_is_what_its_line_says(file: VoteFile) -> None:
    vote = Vote("now", "Zo\u00eb", "p", "left", "digits@1", 'a "red" \u2028 one', "why\nnot")
    file.add(lambda _: vote)
    assert file.read() == [vote]
    assert file.path.read_bytes().count(b"\n") == 1
