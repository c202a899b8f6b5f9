"""What a machine or its user does: a full disk, two runs in one folder, a network that is cut."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from commands import Outcome, as_ranks, environment
from helpers import free_port

from drills.desk import (
    HASTY,
    LIMIT,
    STEPS,
    Desk,
    Processes,
    Result,
    Verdict,
    error_verdict,
    last_line,
    logged,
    tracked,
    within,
)


def fill_disk(desk: Desk, in_background: bool) -> Result:
    """A disk that is full after some checkpoints: one line, and the run goes on when there is room again."""
    if os.geteuid():
        return Result(Verdict.NOT_RUN, "mounting needs root")
    variant = "background saves" if in_background else "plain"
    whole = sum(
        path.stat().st_size for path in desk.reference(variant).rglob("*") if path.is_file()
    )
    disk = desk.own / "disk"
    disk.mkdir(parents=True)
    room = int(whole * desk.rng.uniform(0.2, 1.4))
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", disk], check=True)
    try:
        save = disk / "run"
        words = desk.words(save, variant)
        started = Processes(words, desk.corpus.folder, desk.own / "output", 2)
        if not started.wait():
            return Result(Verdict.HANG, f"{room} of {whole} bytes")
        outcome, before = started.outcome(), tracked(save)
        detail = f"{variant}: {room} bytes, where two checkpoints take {whole}, step {logged(save)}"
        if not outcome.code:
            return desk.compared(save, variant, f"{detail}: enough")
        verdict, said = error_verdict(outcome, "No space left", "are free")
        if verdict is not Verdict.CLEAR:
            return Result(verdict, f"{detail}; {said}")
        subprocess.run(["mount", "-o", f"remount,size={3 * whole}", disk], check=True)
        again = Processes(words, desk.corpus.folder, desk.own / "again", 2)
        if not again.wait():
            return Result(Verdict.HANG, f"{detail}; {said}; with room again")
        if again.outcome().code:
            return Result(
                Verdict.UNCLEAR, f"{detail}; {said}; with room again: {last_line(again.outcome())}"
            )
        found = desk.compared(save, variant, f"{detail}; {said}")
        lost = max(before - tracked(save), 0)
        clear = found.verdict is Verdict.RECOVERED
        return Result(Verdict.CLEAR if clear else found.verdict, found.detail, lost)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def start_twice(desk: Desk) -> Result:
    """Two runs in one folder: one goes on as undisturbed, the other ends with a line."""
    variant = "plain"
    desk.reference(variant)
    save = desk.own / "run"
    first = desk.train(save, variant)
    delay = desk.rng.choice([0.0, desk.rng.uniform(0.0, 3.0)])
    time.sleep(delay)
    second = desk.train(save, variant)
    detail = f"started {delay:.2f} s apart"
    if not all([first.wait(), second.wait()]):
        return Result(Verdict.HANG, detail)
    failed = [one for one in (first, second) if one.outcome().code]
    if len(failed) == 2:
        said = " and ".join(last_line(one.outcome()) for one in failed)
        return Result(Verdict.UNCLEAR, f"{detail}; both ended: {said}")
    for one in failed:
        verdict, said = error_verdict(one.outcome(), "run")
        if verdict is not Verdict.CLEAR:
            return Result(verdict, f"{detail}; {said}")
        detail += f"; {said}"
    found = desk.compared(save, variant, detail)
    return (
        found
        if found.verdict is not Verdict.RECOVERED or not failed
        else Result(Verdict.CLEAR, detail)
    )


@contextlib.contextmanager
def two_hosts(name: str) -> Iterator[tuple[str, str]]:
    """Two network namespaces with a cable between them: 10.87.0.1 and 10.87.0.2."""
    hosts = (f"{name}a", f"{name}b")
    try:
        for host in hosts:
            subprocess.run(["ip", "netns", "add", host], check=True)
        subprocess.run(
            ["ip", "link", "add", "port", "netns", hosts[0], "type", "veth"]
            + ["peer", "name", "port", "netns", hosts[1]],
            check=True,
        )
        for number, host in enumerate(hosts, 1):
            address = ["ip", "-n", host, "addr", "add", f"10.87.0.{number}/24", "dev", "port"]
            subprocess.run(address, check=True)
            for link in ("port", "lo"):
                subprocess.run(["ip", "-n", host, "link", "set", link, "up"], check=True)
        yield hosts
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "del", host], check=False, stderr=subprocess.DEVNULL)


def cut_network(desk: Desk) -> Result:
    """Two hosts whose cable is pulled: both end by themselves, with a line, and the run goes on elsewhere."""
    if os.geteuid():
        return Result(Verdict.NOT_RUN, "network namespaces need root")
    variant = "plain"
    desk.reference(variant)
    save = desk.own / "run"
    words = [sys.executable, *desk.words(save, variant, *HASTY)]
    desk.own.mkdir(parents=True)
    with two_hosts(f"drill{os.getpid() % 10000}") as hosts:
        started = []
        port = str(free_port())
        for rank, host in enumerate(hosts):
            own = as_ranks(environment(), 2)[rank]
            own.update(
                MASTER_ADDR="10.87.0.1",
                MASTER_PORT=port,
                LOCAL_RANK="0",
                LOCAL_WORLD_SIZE="1",
                GLOO_SOCKET_IFNAME="port",
            )
            with open(desk.own / f"rank{rank}", "wb") as output:
                started.append(
                    subprocess.Popen(
                        ["ip", "netns", "exec", host, *words],
                        cwd=desk.corpus.folder,
                        env=own,
                        stdout=output,
                        stderr=output,
                        start_new_session=True,
                    )
                )
        after = desk.rng.randint(0, STEPS - 3)
        numbers = [one.pid for one in started]
        within(
            LIMIT,
            lambda: logged(save) >= after or any(one.poll() is not None for one in started),
            numbers,
            0.002,
        )
        ran = all(one.poll() is None for one in started)
        before = tracked(save)
        subprocess.run(["ip", "-n", hosts[0], "link", "set", "port", "down"], check=True)
        start = time.monotonic()
        detail = f"cable pulled after step {logged(save)}"
        ended = within(LIMIT, lambda: all(one.poll() is not None for one in started), numbers, 0.05)
        for one in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(one.pid, signal.SIGKILL)
            one.wait()
    if not ended:
        return Result(Verdict.HANG, detail)
    detail += f", both ended after {time.monotonic() - start:.0f} s"
    if not ran:
        return Result(Verdict.NOT_RUN, f"{detail}: it had ended already")
    for rank, one in enumerate(started):
        text = Path(desk.own / f"rank{rank}").read_text()
        verdict, said = error_verdict(Outcome((), one.returncode, "", text))
        if verdict is not Verdict.CLEAR:
            return Result(verdict, f"{detail}; rank {rank}: {said}")
        detail += f"; rank {rank}: {said}"
    return desk.finished(save, variant, before, detail)
