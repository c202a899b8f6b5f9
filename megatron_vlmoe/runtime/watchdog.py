"""A thread in every rank that ends the run where a rank fails, dies or hangs, and says which.

Its means is torch's store of keys, over a connection of its own, so that it works while the main thread waits in a
collective. Every rank leaves a sign of life there every second; the first failure of any rank is written under one key,
which all others look at.
"""

from __future__ import annotations

import collections
import contextlib
import faulthandler
import json
import os
import socket
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Callable, Optional, Protocol, TypeVar

T = TypeVar("T")

BEAT_SECONDS = 1.0
HANG_STATUS = 75
"""Exit status of a run that hangs: `EX_TEMPFAIL`, for it may do well when it is started again."""
FAILED_STATUS = 1
_KEPT_STEPS = 50
_STORE = "the store of all ranks, which rank 0 or its torchrun keeps,"
_SILENT_BEATS = 10
"""So long a rank that ends waits for the store."""
_GRACE_BEATS = 3
"""So long all ranks may take to write down their stacks, and a failed rank lets the others read why."""
# Where a thread that waits in a collective, or for a device, stands itself says nothing.
_LIBRARIES = ("/torch/", "/megatron/core/", "/threading.py", "/selectors.py", "/contextlib.py")


class Store(Protocol):
    """What is needed of torch's store."""

    def set(self, key: str, value: str) -> None:
        """Writes a value."""
        ...

    def get(self, key: str) -> bytes:
        """Waits for a value."""
        ...

    def check(self, keys: list[str]) -> bool:
        """Whether all of these have a value."""
        ...

    def compare_set(self, key: str, expected_value: str, desired_value: str) -> bytes:
        """Writes a value in place of the expected one, empty for none; returns what is there then."""
        ...

    def delete_key(self, key: str) -> bool:
        """Forgets a value; whether there was one."""
        ...


@dataclass(frozen=True)
class Sign:
    """A sign of life.

    Args:
        count: of all signs of this rank so far.
        step: finished steps.
        doing: what the rank does at the moment.
        where: line of the program in which its main thread is; only while a hang is looked into.
    """

    rank: int
    host: str
    pid: int
    count: int
    step: int
    doing: str
    where: str = ""

    @property
    def name(self) -> str:
        """For messages."""
        return f"rank {self.rank} on {self.host}"


@dataclass(frozen=True)
class Limits:
    """When a step takes too long.

    Args:
        factor: more than this multiple of the median step; 0: never.
        seconds: never before so many.
    """

    factor: float
    seconds: float

    def of(self, steps: Sequence[float]) -> Optional[float]:
        """Seconds that a step may take after steps that took so long; None: any number."""
        if self.factor == 0.0 or not steps:
            return None
        return max(self.seconds, self.factor * statistics.median(steps))


def suspects(signs: Mapping[int, Optional[Sign]], hosts: Mapping[int, str]) -> str:
    """Which ranks the others wait for, in words, from what all of them wrote down when a step took too long.

    Args:
        signs: by rank; None where nothing was written in time.
        hosts: by rank, as far as known.
    """
    silent = [rank for rank, sign in signs.items() if sign is None]
    if silent:
        named = ", ".join(f"{rank} on {hosts.get(rank, 'an unknown host')}" for rank in silent[:8])
        more = f" and {len(silent) - 8} more" if len(silent) > 8 else ""
        return f"no sign of life from rank {named}{more}"
    known = [sign for sign in signs.values() if sign is not None]
    last = max(sign.step for sign in known)
    behind = [sign for sign in known if sign.step < last]
    if behind:
        said = "; ".join(f"{s.name} after step {s.step} in {s.where}" for s in behind[:4])
        return f"others have finished step {last}, but not {said}"
    places = collections.Counter(sign.where for sign in known)
    common, number = places.most_common(1)[0]
    apart = [sign for sign in known if sign.where != common]
    if not apart or 2 * number == len(known):
        listed = "; ".join(f"{sign.name} in {sign.where}" for sign in known[:4])
        return f"all ranks are alive: {listed}"
    said = "; ".join(f"{sign.name} in {sign.where}" for sign in apart[:4])
    return f"{said}, while all others are in {common}"


class Watchdog:
    """The watch of one rank over itself and the others.

    Args:
        store: of all ranks; None: this one is alone.
        rank: of this process.
        world_size: number of ranks.
        limits: when a step takes too long.
        folder: for the stacks of all threads; None: they go to stderr.
        tell: takes the line with which rank 0 leaves.
        beat: seconds between two looks.
    """

    def __init__(
        self,
        store: Optional[Store],
        rank: int,
        world_size: int,
        limits: Limits,
        folder: Optional[Path],
        tell: Callable[[str], None],
        beat: float = BEAT_SECONDS,
    ) -> None:
        self.store, self.rank, self.world_size = store, rank, world_size
        self.limits, self.folder, self.tell, self.beat = limits, folder, tell, beat
        self.step, self.doing, self.count = 0, "starting", 0
        self.durations: collections.deque[float] = collections.deque(maxlen=_KEPT_STEPS)
        self.since = time.monotonic()
        self.is_leaving = False
        self._paused = 1
        self._stopped = threading.Event()
        self._main = threading.main_thread().ident
        self._thread = threading.Thread(target=self._run, name="vlmoe-watchdog", daemon=True)
        self._looks = 0

    def start(self) -> None:
        """Starts the thread, and one more that looks whether the store answers it."""
        self._thread.start()
        if self.store is not None:
            name = "vlmoe-watchdog-store"
            threading.Thread(target=self._watch_store, name=name, daemon=True).start()

    def begin_steps(self) -> None:
        """From here on steps follow each other; the first one takes as long as it likes."""
        self._paused, self.doing, self.since = 0, "training", time.monotonic()
        self.durations.clear()

    def end_steps(self) -> None:
        """From here on nothing is expected of this rank within a time."""
        self._paused, self.doing = 1, "ending"

    def finished(self, step: int) -> None:
        """Called after every step."""
        now = time.monotonic()
        self.durations.append(now - self.since)
        self.step, self.since = step, now

    @contextlib.contextmanager
    def pause(self, doing: str) -> Iterator[None]:
        """Around what takes as long as it takes: evaluation, checkpoints."""
        before, self.doing = self.doing, doing
        self._paused += 1
        try:
            yield
        finally:
            self.doing, self.since = before, time.monotonic()
            self._paused -= 1

    def fail(self, line: str) -> str:
        """Tells the other ranks that this one ends with an error.

        Returns:
            What another rank has failed with before; empty if this one is the first.
        """
        self.is_leaving = True
        first = ""
        if self.store is not None:
            text = json.dumps({"line": line, "rank": self.rank, "status": FAILED_STATUS})
            answer = self._soon(self.store.compare_set, self._key("error"), "", text)
            found = json.loads(answer) if answer else {"rank": self.rank}
            if found["rank"] != self.rank:
                first = _failed(found)
        return first

    def linger(self) -> None:
        """Waits until the others have read why: this rank may keep the store, and its end breaks their collectives."""
        if self.store is not None:
            time.sleep(_GRACE_BEATS * self.beat)
        self._stopped.set()

    def close(self) -> None:
        """Ends the watch of a rank that is done."""
        self.is_leaving, self.doing = True, "done"
        self._stopped.set()
        if self.store is not None and self._thread.ident is not None:
            self._thread.join(timeout=_GRACE_BEATS * self.beat)
            if not self._thread.is_alive():
                self._soon(self._sign)

    def missing(self) -> str:
        """Which ranks are behind, as far as known, for the error of a collective that has timed out."""
        if self.store is None:
            return ""
        signs = self._soon(lambda: [self._read("sign", rank) for rank in range(self.world_size)])
        known = [sign for sign in signs or () if sign is not None]
        last = max((sign.step for sign in known), default=0)
        behind = [sign for sign in known if sign.step < last]
        return "; ".join(f"{s.name} has not come beyond step {s.step}" for s in behind[:4])

    def _soon(self, ask: Callable[..., T], *arguments: Any) -> Optional[T]:
        """What the store answers to a rank that ends; None where it is gone, and so are the others, or is silent.

        torch waits without a limit for the store's answer: where a network is down, until the system gives up.
        """
        answers: list[T] = []

        def run() -> None:
            with contextlib.suppress(Exception):
                answers.append(ask(*arguments))

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(_SILENT_BEATS * self.beat)
        return answers[0] if answers else None

    def _key(self, *parts: object) -> str:
        return "/".join(map(str, ("vlmoe", *parts)))

    def _run(self) -> None:
        while not self._stopped.wait(self.beat):
            try:
                self._look()
                self._looks += 1
            except Exception:
                # torch's errors of a store that is gone have several types. Where rank 0 keeps it, that is its end;
                # its error or the end of a collective tells more, and is waited for.
                if self._stopped.wait(_SILENT_BEATS * self.beat) or self.is_leaving:
                    return
                self._leave(f"{_STORE} is gone", 1, without_first=True)

    def _watch_store(self) -> None:
        """Ends this process if one look at the others takes too long: the network to the store is down."""
        looks, beats = self._looks, 0
        # Beats are counted, not seconds: of a machine that was suspended, nothing else has gone on either.
        while not self._stopped.wait(self.beat):
            looks, beats = self._looks, beats + 1 if self._looks == looks else 0
            if self.limits.factor and beats * self.beat > self.limits.seconds:
                silent = f"has not answered for {beats * self.beat:.0f} s (health.hang_seconds)"
                self._leave(f"{_STORE} {silent}; is the network down?", HANG_STATUS, True)
                return

    def _look(self) -> None:
        """One look at the others and at this rank."""
        if self.store is not None:
            self._sign()
            if self.store.check([self._key("error")]):
                found = json.loads(self.store.get(self._key("error")))
                self._leave(_failed(found), found["status"])
            if self._neighbour_is_dead():
                return
            if self.store.check([self._key("hang")]):
                self._write_stacks()
                return
        limit = self.limits.of(self.durations)
        if self._paused or limit is None or time.monotonic() - self.since <= limit:
            return
        if any("bdb.py" in frame.f_code.co_filename for frame in self._frames()):
            return  # somebody debugs it
        self._look_into_hang(limit)

    def _sign(self, kind: str = "sign", where: str = "") -> None:
        self.count += 1
        sign = Sign(
            self.rank, socket.gethostname(), os.getpid(), self.count, self.step, self.doing, where
        )
        assert self.store is not None
        self.store.set(self._key(kind, self.rank), json.dumps(asdict(sign)))

    def _read(self, kind: str, rank: int) -> Optional[Sign]:
        assert self.store is not None
        key = self._key(kind, rank)
        return Sign(**json.loads(self.store.get(key))) if self.store.check([key]) else None

    def _hosts(self) -> dict[int, str]:
        signs = (self._read("sign", rank) for rank in range(self.world_size))
        return {sign.rank: sign.host for sign in signs if sign is not None}

    def _neighbour_is_dead(self) -> bool:
        """Whether the next rank of the same torchrun was killed, which can tell nobody."""
        local, size = os.environ.get("LOCAL_RANK"), os.environ.get("LOCAL_WORLD_SIZE")
        if "TORCHELASTIC_RUN_ID" not in os.environ or not local or not size or size == "1":
            return False
        neighbour = self.rank - int(local) + (int(local) + 1) % int(size)
        sign = self._read("sign", neighbour)
        if sign is None or sign.doing == "done" or _runs(sign.pid):
            return False
        # It may have said why, or that it is done, between the two looks.
        if (last := self._read("sign", neighbour)) and last.doing == "done":
            return False
        line = f"its process {sign.pid} was killed (out of memory? dmesg tells)"
        text = json.dumps({"line": line, "rank": neighbour, "status": FAILED_STATUS})
        assert self.store is not None
        found = json.loads(self.store.compare_set(self._key("error"), "", text))
        self._leave(_failed(found), found["status"])
        return True

    def _look_into_hang(self, limit: float) -> None:
        """Writes down where all ranks are, and ends the run unless this rank has gone on meanwhile."""
        since = self.since
        signs: dict[int, Optional[Sign]] = {}
        if self.store is not None:
            mine = str(self.rank)
            if self.store.compare_set(self._key("hang"), "", mine).decode() != mine:
                return  # another rank was first, and all write their stacks
        self._write_stacks()
        if self.store is not None:
            time.sleep(_GRACE_BEATS * self.beat)
            signs = {rank: self._read("hang", rank) for rank in range(self.world_size)}
            if self.since != since:
                for rank in signs:
                    self.store.delete_key(self._key("hang", rank))
                self.store.delete_key(self._key("hang"))
                return
        waited = time.monotonic() - since
        who = suspects(signs, self._hosts()) if signs else f"in {self._where()}"
        stacks = f"; stacks: {self.folder}/stacks_rank_*.txt" if self.folder else ""
        line = (
            f"no step for {waited:.0f} s after step {self.step}, the limit is {limit:.0f} s (health.hang_factor, "
            f"health.hang_seconds): {who}{stacks}"
        )
        if self.store is not None:
            text = json.dumps({"line": line, "rank": -1, "status": HANG_STATUS})
            self.store.compare_set(self._key("error"), "", text)
        self._leave(line, HANG_STATUS)

    def _write_stacks(self) -> None:
        """The stacks of all threads, and a sign of where the main one is; once."""
        if self.store is not None:
            if self.store.check([self._key("hang", self.rank)]):
                return
            self._sign("hang", self._where())
        if self.folder is None:
            faulthandler.dump_traceback(all_threads=True)
            return
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / f"stacks_rank_{self.rank}.txt").open("w") as file:
                file.write(f"after step {self.step}, {self.doing}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)

    def _frames(self) -> Iterator[FrameType]:
        frame = sys._current_frames().get(self._main or 0)
        while frame is not None:
            yield frame
            frame = frame.f_back

    def _where(self) -> str:
        """The innermost line of the main thread that is not of a library, and what it calls there."""
        called = ""
        for frame in self._frames():
            name = frame.f_code.co_filename
            if not any(part in name for part in _LIBRARIES):
                inside = f" ({called})" if called else ""
                return f"{'/'.join(Path(name).parts[-2:])}:{frame.f_lineno}{inside}"
            if frame.f_code.co_name != "wrapper":
                called = frame.f_code.co_name
        return called

    def _leave(self, line: str, status: int, without_first: bool = False) -> None:
        """Ends this process, whatever its main thread waits for; the first rank of every node says why.

        Args:
            without_first: rank 0 cannot, and rank 1 does in its place.
        """
        if self.is_leaving:
            return
        with contextlib.suppress(Exception):
            if self.rank == 0:
                self.tell(line)
            is_first = os.environ.get("LOCAL_RANK", "0") == "0"
            if is_first or (without_first and self.rank == 1):
                sys.stderr.write(f"error: {' '.join(line.split())}\n")
                sys.stderr.flush()
        os._exit(status)


def _failed(found: Mapping[str, Any]) -> str:
    rank = found["rank"]
    return str(found["line"]) if rank < 0 else f"rank {rank} has failed: {found['line']}"


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


_current: list[Watchdog] = []


def watch(watchdog: Watchdog) -> Watchdog:
    """Starts a watchdog, which is that of this process until `unwatch`."""
    unwatch()
    _current.append(watchdog)
    watchdog.start()
    return watchdog


def watchdog() -> Watchdog:
    """That of this process; one that does nothing if there is none."""
    return _current[-1] if _current else Watchdog(None, 0, 1, Limits(0.0, 0.0), None, print)


def unwatch() -> None:
    """Ends the watch, as a run that is done does."""
    while _current:
        _current.pop().close()


def tell_other_ranks(line: str) -> str:
    """Ends all other ranks with an error of this one; returns what another one failed with before, if it did."""
    return _current[-1].fail(line) if _current else ""


def linger() -> None:
    """The last thing that a rank with an error does, once it has said it: see `Watchdog.linger`."""
    if _current:
        _current[-1].linger()


def has_other_ranks() -> bool:
    """Whether somebody waits for this rank."""
    return bool(_current) and _current[-1].store is not None
