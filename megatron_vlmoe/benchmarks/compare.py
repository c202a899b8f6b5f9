"""Contenders take turns on the same work, round after round, so that a machine that is busy for a while slows all of
them alike; every ratio is taken within a round."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import platform
import re
import statistics
import sys
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Mapping, Optional, Sequence

import torch
from torch import Tensor

from megatron_vlmoe.config.errors import ConfigError
from megatron_vlmoe.runtime.files import write_text_atomic
from megatron_vlmoe.runtime.machine import processor_name

_MOST_THREADS = 4096

Work = Callable[[], Mapping[str, float]]
"""One repetition: does the work and returns the seconds of its phases, whose sum is the time that is compared."""

Build = Callable[[], AbstractContextManager[Work]]
"""Makes work ready for a turn."""


def ready(work: Work) -> Build:
    """The `build` of work that holds nothing which must be given back after a turn."""
    return lambda: contextlib.nullcontext(work)


class NotRun(Exception):
    """A contender cannot be measured here; its text says why, and is a result."""


@dataclass(frozen=True)
class Contender:
    """Something to measure.

    Args:
        name: what tables call it.
        build: makes the work ready for a turn, after which the context ends and its memory is given back. Raises
            `NotRun`.
    """

    name: str
    build: Build


@dataclass
class Row:
    """What was measured of one contender in one case.

    Args:
        case: what the work is, such as tokens and width.
        contender: its name.
        rounds_ms: milliseconds of a repetition, one entry per round (median over the repetitions of a turn).
        phases_ms: the same by phase.
        ratio_to_dense: median over rounds of its time over the reference's in the same round; None for a single
            contender or where one of the two was not run.
        peak_mb: how much memory rises in one more repetition, in 10^6 bytes: the allocator's peak on a GPU, else the
            resident set; None where the system does not tell.
        note: why it was not run, or what else must be known.
        items: images, records or the like of a repetition, for a rate; 0 where that says nothing.
        state_mb: what a contender holds between repetitions, such as parameters, gradients and optimizer state; None
            where it was not counted.
        parameters: their number on a rank; None likewise.
    """

    case: Mapping[str, Any]
    contender: str
    rounds_ms: list[float] = field(default_factory=list)
    phases_ms: dict[str, list[float]] = field(default_factory=dict)
    ratio_to_dense: Optional[float] = None
    peak_mb: Optional[float] = None
    note: str = ""
    items: int = 0
    state_mb: Optional[float] = None
    parameters: Optional[int] = None

    def per_second(self) -> Optional[float]:
        """Items per second in the median round; None without."""
        if not self.items or not self.rounds_ms:
            return None
        return round(1e3 * self.items / statistics.median(self.rounds_ms), 2)

    def record(self) -> dict[str, Any]:
        """The row as JSON types; without times where it was not run."""
        times: dict[str, Any] = {"median_ms": None, "min_ms": None, "max_ms": None}
        if self.rounds_ms:
            times = {
                "median_ms": round(statistics.median(self.rounds_ms), 4),
                "min_ms": round(min(self.rounds_ms), 4),
                "max_ms": round(max(self.rounds_ms), 4),
            }
        ratio, peak = self.ratio_to_dense, self.peak_mb
        return {
            "case": dict(self.case),
            "contender": self.contender,
            **times,
            "ratio_to_dense": None if ratio is None else round(ratio, 4),
            "peak_mb": None if peak is None else round(peak, 1),
            "state_mb": None if self.state_mb is None else round(self.state_mb, 1),
            "parameters": self.parameters,
            "per_second": self.per_second(),
            "phases_ms": {
                name: round(statistics.median(values), 4) for name, values in self.phases_ms.items()
            },
            "rounds_ms": [round(value, 4) for value in self.rounds_ms],
            "note": self.note,
        }

    @classmethod
    def read(cls, record: Mapping[str, Any], items: int) -> Row:
        """The row of a `record`, in which phases have their median alone."""
        names = ("case", "contender", "rounds_ms", "ratio_to_dense", "peak_mb", "note", "state_mb")
        phases = {name: [value] for name, value in record["phases_ms"].items()}
        own = {name: record[name] for name in (*names, "parameters")}
        return cls(**own, phases_ms=phases, items=items)


def compare(
    case: Mapping[str, Any],
    contenders: Sequence[Contender],
    *,
    reference: str,
    rounds: int,
    turn_seconds: float = 0.5,
    repetitions: int = 1,
    warmup: int = 1,
    items: int = 0,
) -> list[Row]:
    """Gives every contender its turn in every round.

    A contender is built for its turn and given up after it, so that memory holds one at a time. The order moves on by
    one from round to round, so that nobody always follows the same neighbour.

    Args:
        case: what the work is; goes into the rows.
        reference: contender that ratios refer to.
        rounds: turns of each.
        turn_seconds: a turn's repetitions go on for at least so long; 0 where ranks must agree on their number.
        repetitions: and are at least so many.
        warmup: repetitions before them, which are not counted.
        items: of a repetition, as in `Row`.
    """
    rows = {own.name: Row(case, own.name, items=items) for own in contenders}
    for number in range(rounds):
        shift = number % len(contenders)
        for own in [*contenders[shift:], *contenders[:shift]]:
            row = rows[own.name]
            if row.note:
                continue
            try:
                _take_turn(own, row, turn_seconds, repetitions, warmup)
            except NotRun as reason:
                row.note = f"not run: {reason}"
            give_memory_back()
    first = rows.get(reference)
    for row in rows.values():
        if first and row.rounds_ms and len(row.rounds_ms) == len(first.rounds_ms):
            row.ratio_to_dense = statistics.median(
                own / base for own, base in zip(row.rounds_ms, first.rounds_ms)
            )
    return list(rows.values())


def _take_turn(
    own: Contender, row: Row, turn_seconds: float, repetitions: int, warmup: int
) -> None:
    with own.build() as work:
        for _ in range(warmup):
            work()
        taken: list[Mapping[str, float]] = []
        start = time.perf_counter()
        while len(taken) < repetitions or time.perf_counter() - start < turn_seconds:
            taken.append(work())
        row.rounds_ms.append(1e3 * statistics.median(sum(phases.values()) for phases in taken))
        for name in taken[0]:
            value = 1e3 * statistics.median(phases[name] for phases in taken)
            row.phases_ms.setdefault(name, []).append(value)
        # In the first round alone, also where the system does not tell: ranks repeat together.
        if len(row.rounds_ms) == 1:
            rise = memory_rise(work)
            row.peak_mb = rise / 1e6 if rise else None


def require_close(what: str, found: Tensor, expected: Tensor) -> None:
    """Raises RuntimeError unless a contender's output or gradient is the expected one but for rounding in its type.

    The largest difference may be 1e-4 of the largest value in fp32, 3e-2 in 16 bits. `what` begins the message.
    """
    error = float((found - expected).abs().max() / expected.abs().max())
    if not error < (1e-4 if found.dtype == torch.float32 else 3e-2):
        raise RuntimeError(f"{what} off by {error:.1e}")


def use_threads(number: int) -> None:
    """CPU threads of what is measured; 0 leaves torch's number. Raises ConfigError for more than any machine has."""
    if number > _MOST_THREADS:
        raise ConfigError(f"--threads {number}: must be at most {_MOST_THREADS}")
    if number:
        torch.set_num_threads(number)


def now() -> float:
    """Seconds on a clock, after all that a GPU was given is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


CLOCKS: Mapping[str, Callable[[], float]] = {"wall": now, "cpu": time.process_time}
"""Seconds by the name of a clock; `cpu` are those of this process, and mean something on a busy machine too."""


def memory_rise(work: Callable[[], object]) -> int:
    """Peak memory in bytes during some work above the level before it; 0 where the system does not tell."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - start
    # Else the resident set would hide what the work allocates.
    give_memory_back()
    try:
        # Linux: sets the peak of the resident set back to its present size.
        Path("/proc/self/clear_refs").write_text("5")
        start = _peak_resident()
    except OSError:
        work()
        return 0
    work()
    return _peak_resident() - start


def give_memory_back() -> None:
    """Returns what is no longer in use to the system: allocators keep freed memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        return
    # Another C library than glibc has no malloc_trim, and needs none.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _peak_resident() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM")


def memory_needed(gigabytes: float) -> None:
    """Raises `NotRun` if a contender needs more memory than is free."""
    if torch.cuda.is_available():
        free = torch.cuda.mem_get_info()[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        with contextlib.suppress(OSError):
            found = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
            free = int(found[1]) * 1024 if found else free
    if gigabytes * 1e9 > free:
        raise NotRun(f"needs {gigabytes:.1f} GB, {free / 1e9:.1f} GB are free")


def environment() -> dict[str, Any]:
    """Device and versions, to be kept with every figure."""
    packages = {}
    for name in ("torch", "megatron-core", "transformers", "deepspeed", "transformer-engine"):
        with contextlib.suppress(PackageNotFoundError):
            packages[name] = version(name)
    return {
        "device": device_name(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        **packages,
    }


def device_name() -> str:
    """The GPU's name, or that of the processor."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return processor_name()


def results_path(name: str) -> Path:
    """Where a benchmark leaves its rows: benchmarks/results/NAME-DEVICE.json in the working folder."""
    device = re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-")
    if not torch.cuda.is_available():
        device += f"-{torch.get_num_threads()}-threads"
    return Path("benchmarks") / "results" / f"{name}-{device}.json"


def write_rows(path: Path, title: str, rows: Iterable[Row]) -> None:
    """Rewrites the JSON list of all rows, and the table of them beside it."""
    rows = list(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(row.record()) for row in rows)
    write_text_atomic(path, f"[\n{lines}\n]\n")
    about = ", ".join(f"{name} {value}" for name, value in environment().items())
    text = "\n".join([f"# {title}", "", about, "", *table(rows), ""])
    write_text_atomic(path.with_suffix(".md"), text)


def table(rows: Iterable[Row]) -> Iterator[str]:
    """A Markdown table of rows, one line each; a phase of any row is a column."""
    rows = list(rows)
    cases = list(dict.fromkeys(name for row in rows for name in row.case))
    phases = list(dict.fromkeys(name for row in rows for name in row.phases_ms))
    if len(phases) == 1:
        phases = []
    columns = [*cases, "contender", "median ms", "min", "max", *phases, "ratio", "peak MB"]
    with_state = any(row.state_mb is not None for row in rows)
    if with_state:
        columns += ["state MB", "parameters"]
    with_rates = any(row.items for row in rows)
    if with_rates:
        columns.append("per second")
    yield "| " + " | ".join(columns) + " |"
    numbers = len(columns) - len(cases) - 1
    yield "|" + "---|" * (len(cases) + 1) + "---:|" * numbers
    for row in rows:
        own = row.record()
        cells = [str(row.case.get(name, "")) for name in cases] + [row.contender]
        if not row.rounds_ms:
            yield "| " + " | ".join([*cells, row.note, *[""] * (numbers - 1)]) + " |"
            continue
        if row.note:
            cells[-1] += f" ({row.note})"
        times = [own["median_ms"], own["min_ms"], own["max_ms"]]
        times += [own["phases_ms"].get(name) for name in phases]
        cells += ["" if value is None else f"{value:.4g}" for value in times]
        cells.append("" if row.ratio_to_dense is None else f"{row.ratio_to_dense:.3f}")
        cells.append("" if row.peak_mb is None else f"{row.peak_mb:.0f}")
        if with_state:
            cells.append("" if row.state_mb is None else f"{row.state_mb:.0f}")
            cells.append("" if row.parameters is None else f"{row.parameters:,}")
        if with_rates:
            rate = row.per_second()
            cells.append("" if rate is None else f"{rate:.4g}")
        yield "| " + " | ".join(cells) + " |"


def say(text: str) -> None:
    """One line of progress."""
    print(text, file=sys.stderr, flush=True)
