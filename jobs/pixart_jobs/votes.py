"""Votes: kept where killing whoever counts loses none, counted exactly, followed by MLflow.

The votes of a poll are lines of a file that only grows: each is on disk before it is answered, an
undo is a line of its own, and any number of processes may append. MLflow gets what the file says,
one step a line, when it can be reached.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from scipy import stats

from pixart_jobs.certainty import CONFIDENCE, Figure
from pixart_jobs.preference import Poll, PreferenceError, label, locked
from pixart_platform.errors import StorageError, TrackingError
from pixart_platform.tracking import Tracker

VOTES_FILE = "votes.jsonl"
SIDES = ("left", "right")
CHOICES = (*SIDES, "alike")
_UNDO = "undo"
_MAX_VOTER, _MAX_REASON = 64, 500  # characters
_PATIENCE_SECONDS = 30.0
_log = logging.getLogger(__name__)


class UnknownPair(PreferenceError):
    """A pair that is not of this poll, or a voter's undo of nothing."""

    status = 404


class VotedAlready(PreferenceError):
    """A second vote of one voter on one pair."""

    status = 409


@dataclass(frozen=True)
class Vote:
    """A line of the file: what a voter chose of a pair, or that the voter's last vote is undone."""

    at: str
    voter: str
    pair: str
    choice: str
    preferred: str = ""
    """The version, as MODEL@NUMBER; nothing when both are alike."""
    prompt: str = ""
    reason: str = ""


Standing = dict[tuple[str, str], Vote]
"""The votes that count, by (voter, pair); each voter's in the order they were given."""


def settle(lines: Iterable[Vote]) -> Standing:
    """What stands after all ``lines``."""
    standing: Standing = {}
    for vote in lines:
        standing.pop((vote.voter, vote.pair), None)
        if vote.choice != _UNDO:
            standing[vote.voter, vote.pair] = vote
    return standing


class VoteFile:
    """The lines of a poll's votes. Every method raises StorageError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with locked(path):
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)  # that the file is there lasts, too
            finally:
                os.close(folder)

    def read(self) -> list[Vote]:
        with locked(self.path) as file:
            return self._parse(self._read(file))

    def add(self, make: Callable[[list[Vote]], Vote | None]) -> None:
        """Append the line that ``make`` makes of those there are, if any, while nobody else does.

        It is on disk when this returns.
        """
        with locked(self.path) as file:
            whole = self._read(file)
            vote = make(self._parse(whole))
            if vote is None:
                return
            try:
                file.truncate(len(whole))  # of a line that was cut off nobody was told it counts
                file.write(json.dumps(asdict(vote)).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            except OSError as error:
                raise StorageError(
                    f"{self.path}: the vote cannot be kept ({error.strerror})"
                ) from error

    @staticmethod
    def _read(file: BinaryIO) -> bytes:
        file.seek(0)
        raw = file.read()
        return raw[: raw.rfind(b"\n") + 1]

    def _parse(self, raw: bytes) -> list[Vote]:
        found = []
        for number, line in enumerate(raw.splitlines(), start=1):
            try:
                found.append(Vote(**json.loads(line)))
            except (ValueError, TypeError) as error:
                raise StorageError(
                    f"{self.path}:{number}: no vote ({error}); the file was changed by hand, "
                    f"restore it or delete that line"
                ) from error
        return found


class Booth:
    """A poll as voters meet it: the next pair, its pictures, a vote, an undo.

    Nothing that it hands out names a version. Raises PreferenceError for what a voter may not do.
    """

    def __init__(
        self, poll: Poll, pictures: tuple[Sequence[bytes], Sequence[bytes]], file: VoteFile,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """``pictures`` are of a and of b; ``on_change`` is called after every new line."""
        self._poll, self._pictures, self._file = poll, pictures, file
        self._on_change = on_change
        self._busy: set[str] = set()

    @property
    def is_through(self) -> bool:
        """Whether all who voted or undid here have voted on every pair."""
        busy = self._busy.copy()
        return bool(busy) and all(self.ballot(voter)["pair"] is None for voter in busy)

    def ballot(self, voter: str) -> dict[str, Any]:
        """What a page shows: progress, and the next pair or None."""
        order = self._order(voter)
        standing = settle(self._file.read())
        done = {pair for who, pair in standing if who == voter}
        pair = next((pair for pair in order if pair not in done), None)
        prompt = self._poll.prompts[self._poll.pairs[pair]] if pair else ""
        shown = {"id": pair, "prompt": prompt} if pair else None
        return {"voter": voter, "done": len(done), "total": len(order), "pair": shown}

    def picture(self, voter: str, pair: str, side: str) -> bytes:
        """The PNG that a voter sees on a side."""
        a_is_left = self._find(voter, pair)
        if side not in SIDES:
            raise UnknownPair(f"side {side[:20]!r}: must be {' or '.join(SIDES)}")
        is_a = a_is_left == (side == "left")
        return self._pictures[0 if is_a else 1][self._poll.pairs[pair]]

    def vote(self, voter: str, pair: str, choice: str, reason: str = "") -> None:
        """Count a vote; the same once more, as after an answer that was lost, changes nothing."""
        a_is_left, poll = self._find(voter, pair), self._poll
        if choice not in CHOICES:
            raise PreferenceError(f"choice = {choice[:20]!r}: must be one of {', '.join(CHOICES)}")
        if len(reason) > _MAX_REASON:
            raise PreferenceError(
                f"reason: has {len(reason)} characters; write at most {_MAX_REASON}"
            )
        preferred = "" if choice == "alike" else label(
            poll.a if a_is_left == (choice == "left") else poll.b
        )  # fmt: skip

        def make(lines: list[Vote]) -> Vote | None:
            before = settle(lines).get((voter, pair))
            if before is None:
                prompt = poll.prompts[poll.pairs[pair]]
                return Vote(_now(), voter, pair, choice, preferred, prompt, reason)
            if before.choice == choice:
                return None
            raise VotedAlready(f"pair {pair}: {voter} has voted on it; undo that vote first")

        self._file.add(make)
        self._busy.add(voter)
        self._on_change()

    def undo(self, voter: str) -> None:
        """Take a voter's last vote back."""
        self._order(voter)

        def make(lines: list[Vote]) -> Vote:
            mine = [pair for who, pair in settle(lines) if who == voter]
            if not mine:
                raise UnknownPair(f"voter {voter}: has no vote to undo")
            return Vote(_now(), voter, mine[-1], _UNDO)

        self._file.add(make)
        self._busy.add(voter)
        self._on_change()

    def _order(self, voter: str) -> dict[str, bool]:
        check_voter(voter)
        return self._poll.order_for(voter)

    def _find(self, voter: str, pair: str) -> bool:
        order = self._order(voter)
        if pair not in order:
            raise UnknownPair(f"pair {pair[:40]!r}: is not of this poll; load the page again")
        return order[pair]


def check_voter(name: str) -> None:
    """Raise PreferenceError for what is no name."""
    if not (0 < len(name) <= _MAX_VOTER and name.isprintable() and name.strip() == name):
        raise PreferenceError(
            f"voter = {name[:_MAX_VOTER]!r}: must be a name of 1 to {_MAX_VOTER} characters"
        )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Result:
    """How often each version was preferred, over all votes that stand."""

    a: int
    b: int
    alike: int
    voters: int
    by_pair: dict[str, tuple[int, int, int]]
    """The same three of each pair, in the order in which pairs were first voted on."""

    @property
    def win_rate(self) -> Figure:
        """Of a among those who decided, with Clopper and Pearson's interval; 0.5 (0 to 1) of none.

        Votes for neither are left out, as in the sign test: half a win for each would be counted
        as evidence, and narrow the interval, where a voter saw none.
        """
        if not self.a + self.b:
            return Figure(0.5, 0.0, 1.0)
        test = stats.binomtest(self.a, self.a + self.b)
        interval = test.proportion_ci(CONFIDENCE, "exact")
        return Figure(float(test.statistic), float(interval.low), float(interval.high))

    @property
    def p(self) -> float:
        """Of the exact two-sided sign test on votes."""
        return _sign_test(self.a, self.b)

    @property
    def metrics(self) -> dict[str, float]:
        """For MLflow."""
        rate, votes = self.win_rate, self.a + self.b + self.alike
        return {
            "win_rate": rate.value, "win_rate_low": rate.low, "win_rate_high": rate.high,
            "votes": votes,
        }  # fmt: skip


def _sign_test(a: int, b: int) -> float:
    return float(stats.binomtest(a, a + b).pvalue) if a + b else 1.0


def count(poll: Poll, standing: Standing) -> Result:
    """The result of the votes that stand."""
    by_pair: dict[str, list[int]] = {}
    columns = {label(poll.a): 0, label(poll.b): 1, "": 2}
    for (_, pair), vote in standing.items():
        by_pair.setdefault(pair, [0, 0, 0])[columns[vote.preferred]] += 1
    a, b, alike = (sum(votes[k] for votes in by_pair.values()) for k in range(3))
    told = {pair: (votes[0], votes[1], votes[2]) for pair, votes in by_pair.items()}
    return Result(a, b, alike, len({voter for voter, _ in standing}), told)


def tell(poll: Poll, result: Result) -> Iterator[str]:
    """A result as lines for people."""
    a, b = label(poll.a), label(poll.b)
    total = result.a + result.b + result.alike
    voters = f"{result.voters} voter{'' if result.voters == 1 else 's'}"
    yield f"{a} won {result.a}, {b} won {result.b}, alike {result.alike}: {total} votes, {voters}"
    yield (
        f"win rate of {a}: {result.win_rate}, p = {result.p:.4f} (exact binomial, two-sided; "
        f"95 % interval; alike left out: they speak for neither)"
    )
    ahead = [(x > y) - (x < y) for x, y, _ in result.by_pair.values()]
    if result.voters > 1:
        x, y = ahead.count(1), ahead.count(-1)
        yield (
            f"by prompt, as votes on one pair are not independent: {a} ahead on {x}, {b} on {y}, "
            f"p = {_sign_test(x, y):.4f}"
        )
    for pair, (x, y, _) in result.by_pair.items():
        if x and y:
            yield f"  voters disagree, {x} to {y}: {poll.prompts[poll.pairs[pair]]}"


class Recorder:
    """Follows a poll's votes in MLflow, on a thread of its own, however long MLflow is away."""

    def __init__(self, uri: str, poll: Poll, file: VoteFile) -> None:
        """Opens the poll's run. Raises TrackingError."""
        self._poll, self._file = poll, file
        names = f"{label(poll.a)} {label(poll.b)}"
        with locked(poll.folder / ".lock"):  # or two who start at once make two runs
            self._tracker = Tracker.start(
                uri, poll.a.name, f"vote:{poll.digest}", f"vote {names}", artifacts=poll.root,
                params={"prompts": len(poll.prompts), "seed": poll.seed}
                | poll.draw.model_dump(mode="json"),
            )  # fmt: skip
        tags = {"poll": poll.digest}
        for side, version in (("a", poll.a), ("b", poll.b)):
            tags |= {f"vote_{side}": label(version), f"vote_{side}_digest": version.tags["digest"]}
        self._tracker.set_tags(tags)
        self.run_id = self._tracker.run_id
        self._sent = False
        self._ended, self._news = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._follow, name="record-votes", daemon=True)
        self._thread.start()

    def notice(self) -> None:
        """There may be a new line."""
        self._news.set()

    def close(self, patience_seconds: float = _PATIENCE_SECONDS) -> bool:
        """Send the rest and finish the run, unless that takes too long; whether all was sent."""
        self._ended.set()
        self._news.set()
        self._thread.join(patience_seconds)
        return self._sent

    def _follow(self) -> None:
        pause = 1.0
        while True:
            ended = self._ended.is_set()
            self._news.clear()
            try:
                self._send()
                if ended:
                    self._tracker.finish()
                    self._sent = True
                    return
                pause = 1.0
                self._news.wait()
            except TrackingError as error:
                _log.warning("%s; votes are kept, next try in %.0f s", error, pause)
                self._ended.wait(pause) if not ended else time.sleep(pause)
                pause = min(2 * pause, 60.0)

    def _send(self) -> None:
        """The file, then a point for each line that MLflow does not know; lines are steps, as an
        undo makes votes fewer and MLflow's last value is that of the highest step."""
        lines = self._file.read()
        known = max((step for step, _ in self._tracker.history("votes")), default=0)
        if len(lines) <= known:
            return
        self._tracker.log_file(self._file.path)
        for step in range(known + 1, len(lines) + 1):
            result = count(self._poll, settle(lines[:step]))
            self._tracker.log_metrics(result.metrics, step)
