"""Kills, signals and stops at random instants of training, saving, preprocessing and exporting."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import psutil
from commands import environment

from drills.desk import (
    EVERY,
    HASTY,
    LIMIT,
    STEPS,
    VARIANTS,
    Desk,
    Processes,
    Result,
    Verdict,
    error_verdict,
    last_line,
    logged,
    tracked,
    until,
    within,
)

PLACES = ("start", "step", "save", "rotation", "background save")


def kill_training(desk: Desk, place: str) -> Result:
    """SIGKILL to a rank, or to all at once as when the power fails; then the same command again.

    Args:
        desk: the desk.
        place: one of `PLACES`.
    """
    rng = desk.rng
    variant = "background saves" if place == "background save" else rng.choice(list(VARIANTS))
    desk.reference(variant)
    save = desk.own / "run"
    started = desk.train(save, variant)
    checkpoints = save / "checkpoints"
    # Once old ones go, from the third on.
    number = EVERY * rng.randint(1 if place != "rotation" else 3, STEPS // EVERY - 1)
    if place == "start":
        reached = True
        time.sleep(rng.uniform(0.0, 2.0))
    elif place == "step":
        reached = until(lambda: logged(save) >= number - 1, started)
        time.sleep(rng.uniform(0.0, 0.3))
    elif place == "rotation":
        reached = until(lambda: tracked(save) >= number, started)
    else:
        temporary = checkpoints / f"iter_{number:07d}.tmp"
        reached = until(lambda: temporary.exists() or tracked(save) >= number, started)
        time.sleep(rng.uniform(0.0, 0.08))
    whom = rng.choice([[0], [1], [0, 1]])
    before = tracked(save)
    detail = f"{variant}: kill -9 of rank {' and '.join(map(str, whom))} at {place} {number}, step {logged(save)}"
    if not reached or not started.alive:
        started.wait()
        return Result(Verdict.NOT_RUN, f"{detail}: it had ended already")
    started.kill(whom)
    if not started.wait():
        return Result(Verdict.HANG, f"{detail}; the other rank goes on for {LIMIT:.0f} s", 0, 1)
    if len(whom) == 1:
        verdict, said = error_verdict(started.outcome())
        if verdict is not Verdict.CLEAR:
            return Result(verdict, f"{detail}; the other one: {said}", 0, 1)
    found = desk.finished(save, variant, before, detail)
    return Result(found.verdict, found.detail, found.lost_steps, 1)


def kill_writer(desk: Desk) -> Result:
    """SIGKILL to a process that writes a checkpoint in the background: the run says so, and the next one goes on."""
    variant = "background saves"
    desk.reference(variant)
    save = desk.own / "run"
    started = desk.train(save, variant)
    number = EVERY * desk.rng.randint(1, STEPS // EVERY - 1)
    temporary = save / "checkpoints" / f"iter_{number:07d}.tmp"
    until(lambda: temporary.exists() or tracked(save) >= number, started)
    until(started.helpers, started)
    helpers = started.helpers()
    if not helpers:
        started.wait()
        return Result(Verdict.NOT_RUN, "it had ended already")
    before = tracked(save)
    victims = desk.rng.choice([helpers, [desk.rng.choice(helpers)]])
    detail = f"kill -9 of {len(victims)} of {len(helpers)} helpers at save {number}"
    for victim in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()
    if not started.wait():
        return Result(Verdict.HANG, detail, 0, 1)
    outcome = started.outcome()
    if outcome.code:
        verdict, said = error_verdict(outcome)
        if verdict is not Verdict.CLEAR:
            return Result(verdict, f"{detail}; {said}", 0, 1)
        detail += f"; {said}"
    found = desk.finished(save, variant, before, detail)
    return Result(found.verdict, found.detail, found.lost_steps, 1)


def signal_training(desk: Desk) -> Result:
    """SIGTERM or SIGUSR1 to a rank, to its group or to torchrun, at any step."""
    rng, variant = desk.rng, "plain"
    desk.reference(variant)
    save = desk.own / "run"
    words = desk.words(save, variant)
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    desk.own.mkdir(parents=True, exist_ok=True)
    with open(desk.own / "output", "wb") as output:
        launcher = subprocess.Popen(
            [sys.executable, *torchrun, *words],
            cwd=desk.corpus.folder,
            env=environment(CUDA_VISIBLE_DEVICES=""),
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        number = rng.choice([signal.SIGTERM, signal.SIGUSR1])
        after = rng.randint(0, STEPS - 3)
        within(LIMIT, lambda: logged(save) >= after or launcher.poll() is not None, [], 0.005)
        ranks = [
            process
            for process in psutil.Process(launcher.pid).children(recursive=True)
            if process.cmdline()[2:4] == ["-m", "megatron_vlmoe"]
            and process.parent().pid == launcher.pid
        ]
        whom = rng.choice(["rank", "group", "launcher"]) if ranks else "launcher"
        before = tracked(save)
        if whom == "rank":
            rng.choice(ranks).send_signal(number)
        elif whom == "group":
            os.killpg(launcher.pid, number)
        else:
            launcher.send_signal(number)
        detail = f"{number.name} to {whom} after step {logged(save)}"
        numbers = [launcher.pid, *(process.pid for process in ranks)]
        within(LIMIT, lambda: launcher.poll() is not None, numbers, 0.05)
        _gone, left = psutil.wait_procs(ranks, 60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        launcher.wait()
    if left:
        return Result(Verdict.HANG, detail)
    return desk.finished(save, variant, before, detail)


def stop_for_a_while(desk: Desk) -> Result:
    """SIGSTOP to a rank for some seconds, as when a machine swaps or is suspended."""
    rng = desk.rng
    variant = rng.choice(list(VARIANTS))
    desk.reference(variant)
    save = desk.own / "run"
    started = desk.train(save, variant)
    after = rng.randint(0, STEPS - 2)
    until(lambda: logged(save) >= after, started)
    rank, seconds = rng.randrange(2), rng.uniform(1.0, 4.0)
    detail = f"{variant}: rank {rank} stopped for {seconds:.1f} s after step {logged(save)}"
    with contextlib.suppress(ProcessLookupError):
        os.kill(started.ranks[rank].pid, signal.SIGSTOP)
        time.sleep(seconds)
        os.kill(started.ranks[rank].pid, signal.SIGCONT)
    if not started.wait():
        return Result(Verdict.HANG, detail)
    if started.outcome().code:
        return Result(Verdict.UNCLEAR, f"{detail}; {last_line(started.outcome())}")
    return desk.compared(save, variant, detail)


def stop_for_good(desk: Desk) -> Result:
    """SIGSTOP to a rank that never goes on: the other one names it and ends, and the next run goes on."""
    rng, variant = desk.rng, "plain"
    desk.reference(variant)
    save = desk.own / "run"
    started = desk.train(save, variant, *HASTY)
    after, rank = rng.randint(3, STEPS - 3), rng.randrange(2)
    detail = f"rank {rank} stopped for good after step {after}"
    if not until(lambda: logged(save) >= after, started):
        started.wait()
        return Result(Verdict.NOT_RUN, f"{detail}: it had ended already")
    os.kill(started.ranks[rank].pid, signal.SIGSTOP)
    before = tracked(save)
    other = started.ranks[1 - rank]
    ended = within(LIMIT, lambda: not other.is_alive(), [other.pid], 0.05)
    started.kill([0, 1])
    if not ended:
        return Result(Verdict.HANG, detail)
    verdict, said = error_verdict(started.outcome(), f"rank {rank}")
    if verdict is not Verdict.CLEAR:
        return Result(verdict, f"{detail}; {said}")
    found = desk.finished(save, variant, before, f"{detail}; {said}")
    is_clear = found.verdict is Verdict.RECOVERED
    return Result(Verdict.CLEAR if is_clear else found.verdict, found.detail, found.lost_steps)


TOOLS: Mapping[str, str] = {
    "text": "index-text --input raw/text/train.jsonl --output-prefix out/made"
    " --tokenizer-model text.model --workers 2",
    "images": "index-images --input raw/images/train --output-prefix out/made --workers 2",
    "pairs": "index-pairs --format coco --annotations raw/coco/annotations/captions_train2014.json"
    " --images raw/coco/train2014 --output-prefix out/made --tokenizer-model text.model --workers 2",
    "export": "export --load run --output out/made",
}


def kill_tool(desk: Desk, what: str) -> Result:
    """SIGKILL to a command that makes files; the same command again must leave the files of an undisturbed one.

    All its processes are killed, as when the power fails, or the first one, with which the others must end, or one of
    the others, of which the first one must tell.

    Args:
        desk: the desk.
        what: one of `TOOLS`.
    """
    words = ["-m", "megatron_vlmoe", *TOOLS[what].split()]
    whole, took = _undisturbed(desk, what, words)
    own = _with_inputs(desk, desk.own / "broken")
    broken = Processes(words, own, desk.own / "second")
    delay = desk.rng.uniform(0.0, took)
    time.sleep(delay)
    whom = desk.rng.choice(["all", "first", "other"])
    helpers = broken.helpers()
    detail = f"{what}: kill -9 after {delay:.2f} of {took:.2f} s"
    if whom == "all" or not helpers:
        broken.kill([0])
    elif whom == "first":
        detail += " of the first process"
        os.kill(broken.ranks[0].pid, signal.SIGKILL)
        broken.ranks[0].join()
        _, left = psutil.wait_procs(helpers, 20)
        broken.kill([0])
        if left:
            return Result(Verdict.HANG, f"{detail}; {len(left)} of {len(helpers)} others go on")
    else:
        detail += f" of one of {len(helpers)} others"
        with contextlib.suppress(psutil.NoSuchProcess):
            desk.rng.choice(helpers).kill()
        if not broken.wait():
            return Result(Verdict.HANG, detail)
        if broken.outcome().code:
            verdict, said = error_verdict(broken.outcome())
            if verdict is not Verdict.CLEAR:
                return Result(verdict, f"{detail}; {said}")
            detail += f"; {said}"
    again = words + (["--overwrite"] if what == "export" else [])
    repeated = Processes(again, own, desk.own / "third")
    if not repeated.wait():
        return Result(Verdict.HANG, f"{detail}; again")
    outcome = repeated.outcome()
    if outcome.code:
        # What was complete already may be said to be there.
        verdict, said = error_verdict(outcome, "exists")
        if verdict is not Verdict.CLEAR:
            return Result(Verdict.UNCLEAR, f"{detail}; again: {said}")
        detail += "; it was complete"
    found = _files(own)
    if found != whole:
        others = sorted(
            name for name in found.keys() | whole.keys() if found.get(name) != whole.get(name)
        )
        return Result(Verdict.SILENT, f"{detail}; other files: {', '.join(others)}")
    return Result(Verdict.RECOVERED, detail)


def _undisturbed(desk: Desk, what: str, words: list[str]) -> tuple[dict[str, bytes], float]:
    """The files of the command that nothing disturbed, and the seconds that it took; made once."""
    folder = desk.folder / "references" / what
    seconds = folder / "seconds"
    if not seconds.exists():
        own = _with_inputs(desk, folder)
        start = time.monotonic()
        undisturbed = Processes(words, own, folder / "output")
        assert undisturbed.wait(), f"{what}: hangs, undisturbed"
        undisturbed.outcome().succeeded()
        seconds.write_text(str(time.monotonic() - start))
    return _files(folder), float(seconds.read_text())


def _with_inputs(desk: Desk, folder: Path) -> Path:
    """A folder in which a command finds what it reads."""
    (folder / "out").mkdir(parents=True)
    for path in ("raw", "text.model"):
        (folder / path).symlink_to(desk.corpus.folder / path)
    (folder / "run").symlink_to(desk.reference("plain"))
    return folder


def _files(folder: Path) -> dict[str, bytes]:
    found = (path for path in sorted((folder / "out").rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}
