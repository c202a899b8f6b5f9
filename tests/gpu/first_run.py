"""Runs the checks of `checks/` one by one or side by side, each a process with a time limit, and writes one JSON file.

Needs the standard library alone. What the checks need and the machine lacks is taken from a folder of wheels and
installed into an environment that is deleted afterwards. The file is rewritten whenever a check starts or ends, so that
a run that is cut off leaves what it has found.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import site
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Mapping, Optional, Sequence

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
TOTAL_SECONDS = 270.0
# A check that has less than this left would only import torch.
LEAST_SECONDS = 8.0
LOG_LINES = 40
# What torch and megatron-core themselves, and every check, cannot do without; by the names in requirements.txt.
ALWAYS = (
    *("torch", "megatron-core", "numpy", "einops", "psutil", "pyyaml", "jsonargparse"),
    *("sentencepiece", "pillow", "tqdm", "safetensors", "jinja2"),
)


@dataclass(frozen=True)
class Check:
    """One check, a function of the same name.

    Args:
        name: what `--only` and the results call it.
        module: file of `checks/` that has the function.
        limit: seconds on an H100; it is killed after them.
        about: what it shows.
        alone: it measures time, so that nothing may run beside it.
        needs: packages beside those of `ALWAYS`, without which it is not run.
    """

    name: str
    module: str
    limit: float
    about: str
    alone: bool = False
    needs: tuple[str, ...] = ()


CHECKS = (
    Check("versions", "machine", 40, "torch, cuDNN, NCCL, driver and device fit and compute"),
    Check("pretrain", "runs", 90, "train, save, resume with the same bits, async save, SIGTERM"),
    Check(
        "tasks",
        "tasks",
        90,
        "a step of every task, the exported model",
        needs=("pyarrow", "matplotlib"),
    ),
    Check("gpu_tests", "runs", 90, "tests/gpu by pytest", needs=("pytest",)),
    Check(
        "dispatchers",
        "layers",
        45,
        "three dispatchers equal a loop over experts: odd counts, an empty expert",
    ),
    Check("deterministic", "steps", 60, "the same bits twice and across a resume"),
    Check("recompute", "steps", 60, "recomputed blocks equal kept ones; loss scale of fp16"),
    Check(
        "syncs", "steps", 45, "forward and backward never wait for the GPU; waits of the optimizer"
    ),
    Check("step_graph", "steps", 60, "steps as a CUDA graph have the bits of ordinary ones"),
    Check(
        "transformer_engine",
        "transformer_engine",
        60,
        "steps with TransformerEngine's layers beside local ones, in bf16 and FP8",
        needs=("transformer-engine",),
    ),
    Check(
        "sdpa",
        "attention",
        35,
        "attention kernels by length, width and mask: gradients, times",
        alone=True,
    ),
    Check("bench", "speed", 75, "steps of dense and sparse presets, a profile, memory", alone=True),
    Check(
        "moe_layer", "layers", 40, "one layer of experts beside other implementations", alone=True
    ),
    Check(
        "compile",
        "layers",
        50,
        "torch.compile of small functions, the MoE layer in a CUDA graph, times of a step in one",
        alone=True,
    ),
    Check(
        "image_tokenizer",
        "speed",
        25,
        "image tokenizer in fp32, TF32 and bf16: time and codes",
        alone=True,
    ),
    Check(
        "loader",
        "loader",
        45,
        "images per second of 8 loader workers, and how long steps wait",
        alone=True,
    ),
)


class CannotRun(Exception):
    """Nothing can be run here; its text, one line, says why."""


def requirements() -> dict[str, str]:
    """Lines of requirements.txt by package: `numpy` to `numpy>=1.26`; where it has several, with "or" between them."""
    lines = (REPOSITORY / "requirements.txt").read_text().splitlines()
    found: dict[str, str] = {}
    for line in (line.strip() for line in lines):
        if line and line[0] != "#":
            name = re.split(r"[\[<>=!~ ]", line)[0]
            found[name] = f"{found[name]} or {line}" if name in found else line
    return found


def lacking(python: str, packages: Sequence[str]) -> list[str]:
    """Those of the packages that an interpreter does not have."""
    code = (
        "import sys\nfrom importlib.metadata import PackageNotFoundError, version\n"
        "for name in sys.argv[1:]:\n"
        "    try: version(name)\n"
        "    except PackageNotFoundError: print(name)\n"
    )
    command = [python, "-c", code, *packages]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


def make_environment(folder: Path, wheels: Path) -> str:
    """A virtual environment with all wheels of a folder that fit, on top of what this interpreter has.

    Returns:
        Its interpreter.

    Raises:
        CannotRun: without wheels or pip, or where a wheel does not fit.
    """
    names = sorted({path.name.split("-")[0] for path in wheels.glob("*.whl")})
    if not names:
        raise CannotRun(f"{wheels} has no wheels")
    make = [sys.executable, "-m", "venv", "--system-site-packages", "--without-pip", str(folder)]
    subprocess.run(make, check=True)
    python = str(folder / "bin" / "python")
    # Of an interpreter that is itself in a virtual environment, --system-site-packages gives those below it.
    own = [
        *site.getsitepackages(),
        *([site.getusersitepackages()] if site.ENABLE_USER_SITE else []),
    ]
    lines = "".join(f"import site; site.addsitedir({path!r})\n" for path in own)
    ask = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    target = subprocess.run(ask, check=True, capture_output=True, text=True).stdout.strip()
    (Path(target) / "below.pth").write_text(lines)
    # What the folder has is meant, also where the machine has another version.
    install = [
        *(
            sys.executable,
            "-m",
            "pip",
            "--python",
            python,
            "install",
            "--quiet",
            "--no-index",
            "--no-deps",
        ),
        *("--disable-pip-version-check", "--ignore-installed", "--find-links", str(wheels), *names),
    ]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode:
        line = next(
            (x for x in done.stderr.splitlines() if x.startswith("ERROR")), done.stderr[-300:]
        )
        raise CannotRun(f"pip cannot install the wheels of {wheels}: {line}")
    return python


def interpreter(folder: Path, wheels: Optional[Path]) -> str:
    """An interpreter that has what every check needs.

    Raises:
        CannotRun: naming what is missing.
    """
    python = make_environment(folder, wheels) if wheels else sys.executable
    missing = lacking(python, ALWAYS)
    if missing:
        wanted = " ".join(requirements()[name] for name in missing)
        raise CannotRun(
            f"missing: {wanted}; put their wheels for Python {sys.version_info[0]}.{sys.version_info[1]} into a folder "
            f"and name it with --wheels or WHEELS"
        )
    return python


class Runner:
    """Runs checks and keeps the results file up to date.

    Args:
        checks: in the order of the file.
        command: the process of a check, from its name, module and the file for its report.
        output: the results file.
        about: written at its top.
        total: seconds for all checks together.
        factor: all limits of checks are multiplied by it.
        jobs: checks that may run side by side, if they do not measure time.
        lacks: packages that are not there.
    """

    def __init__(
        self,
        checks: Sequence[Check],
        command: Callable[[Check, Path], Sequence[str]],
        output: Path,
        *,
        about: Mapping[str, Any] = {},
        total: float = TOTAL_SECONDS,
        factor: float = 1.0,
        jobs: int = 1,
        lacks: Sequence[str] = (),
    ) -> None:
        self.checks = checks
        self.command = command
        self.output = output
        self.about = about
        self.total = total
        self.factor = factor
        self.jobs = jobs
        self.lacks = lacks
        self.started = time.monotonic()
        self.finished = False
        self.is_stopped = False
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.lock = threading.RLock()
        # Stands in the file until the check has ended, so that a run that is killed has said it.
        cut = {"status": "not run", "reason": "the run was cut off before it", "seconds": 0.0}
        self.results: dict[str, dict[str, Any]] = {check.name: dict(cut) for check in checks}

    def run(self) -> bool:
        """Runs all of them; whether none failed or took too long."""
        numbers = (signal.SIGTERM, signal.SIGINT)
        previous = {number: signal.signal(number, self._stop) for number in numbers}
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self._write()
        try:
            with ThreadPoolExecutor(self.jobs) as pool:
                beside = [pool.submit(self._run, own) for own in self.checks if not own.alone]
                # Looks up now and then: a signal that comes just before a thread blocks would wait with it.
                while wait(beside, timeout=0.5).not_done:
                    pass
            for future in beside:
                future.result()
            for check in self.checks:
                if check.alone:
                    self._run(check)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        self.finished = not self.is_stopped
        self._write()
        bad = ("failed", "timed out")
        return self.finished and all(own["status"] not in bad for own in self.results.values())

    def _run(self, check: Check) -> None:
        if self.is_stopped:
            return
        missing = [name for name in check.needs if name in self.lacks]
        left = self.total - (time.monotonic() - self.started)
        if missing:
            self._set(check, "not run", f"{', '.join(missing)} not installed")
        elif left < LEAST_SECONDS * min(self.factor, 1.0):
            self._set(check, "not run", f"{left:.0f} s left of {self.total:.0f} s")
        else:
            self._run_process(check, min(check.limit * self.factor, left))

    def _run_process(self, check: Check, limit: float) -> None:
        folder = self.output.parent / "logs"
        folder.mkdir(exist_ok=True)
        report, log = folder / f"{check.name}.json", folder / f"{check.name}.txt"
        report.unlink(missing_ok=True)
        print(f"{check.name} ...", file=sys.stderr, flush=True)
        self._set(check, "not run", "the run was cut off while it ran", limit=round(limit, 1))
        start = time.monotonic()
        with log.open("wb") as stream, self.lock:
            # Its own process group: a check that hangs is killed with all that it has started.
            process = subprocess.Popen(
                self.command(check, report),
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self.running[check.name] = process
        if self.is_stopped:
            # The signal came before the process was known.
            _kill_group(process)
        try:
            process.wait(limit)
            status, reason = "", ""
        except subprocess.TimeoutExpired:
            status, reason = "timed out", f"after {limit:.0f} s"
        _kill_group(process)
        process.wait()
        with self.lock:
            del self.running[check.name]
        seconds = round(time.monotonic() - start, 1)
        found = _read(report)
        if not status:
            status, reason = _judge(process.returncode, found)
        kept = {name: found[name] for name in ("measured", "left_out") if found.get(name)}
        if status in ("failed", "timed out"):
            kept["log"] = log.read_text(errors="replace").splitlines()[-LOG_LINES:]
        if self.is_stopped:
            status, reason = "not run", "the run was cut off while it ran"
        self._set(check, status, reason, seconds=seconds, limit=round(limit, 1), **kept)
        print(f"{check.name}: {status} {reason} ({seconds:.0f} s)", file=sys.stderr, flush=True)

    def _set(self, check: Check, status: str, reason: str, **more: Any) -> None:
        with self.lock:
            self.results[check.name] = {"status": status, "reason": reason, "seconds": 0.0, **more}
            self._write()

    def _write(self) -> None:
        with self.lock:
            checks = [{"name": name, **own} for name, own in self.results.items()]
            seconds = round(time.monotonic() - self.started, 1)
            content = {
                **self.about,
                "finished": self.finished,
                "seconds": seconds,
                "checks": checks,
            }
            part = self.output.with_name(f"{self.output.name}.part")
            part.write_text(json.dumps(content, indent=1) + "\n")
            os.replace(part, self.output)

    def _stop(self, *unused: Any) -> None:
        self.is_stopped = True
        # Not waited for here: this may be the thread that is waiting.
        for process in list(self.running.values()):
            _kill_group(process)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kills the process with all of its group, also what it has left behind."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _read(report: Path) -> dict[str, Any]:
    """What a check has written; one that was killed while writing leaves nothing to read."""
    try:
        return json.loads(report.read_text())
    except (OSError, ValueError):
        return {}


def _judge(code: int, found: Mapping[str, Any]) -> tuple[str, str]:
    """Status and reason of a check that has ended by itself."""
    if code == 0 and found.get("not_run"):
        return "not run", found["not_run"]
    if found.get("failures"):
        return "failed", "; ".join(found["failures"])
    # A report that says it is done: a process that ends early with status 0 has not passed.
    if code == 0 and found.get("done"):
        return "passed", ""
    return "failed", f"exit status {code}" + ("" if code else " without a report")


def main(words: Optional[Sequence[str]] = None) -> int:
    """Exit status: 0 if nothing failed or took too long, 1 otherwise, 2 if nothing could be run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    add = parser.add_argument
    add("--only", nargs="+", metavar="CHECK", help="run these alone")
    add("--list", action="store_true", help="print names and limits, and run nothing")
    add(
        "--wheels",
        default=os.environ.get("WHEELS"),
        metavar="DIR",
        help="wheels of what is missing here (variable WHEELS)",
    )
    add(
        "--device",
        choices=["cuda", "cpu"],
        default="cuda",
        help="cpu: rehearse at small sizes (%(default)s)",
    )
    add(
        "--output",
        type=Path,
        default=Path("runs/first_run"),
        metavar="DIR",
        help="folder of results.json and logs/ (%(default)s)",
    )
    add(
        "--total",
        type=float,
        default=TOTAL_SECONDS,
        metavar="S",
        help="seconds for all (%(default)s)",
    )
    add(
        "--limit-factor",
        type=float,
        default=1.0,
        metavar="F",
        help="for slow machines: multiplies the limits of checks",
    )
    add(
        "--jobs",
        type=int,
        default=0,
        metavar="N",
        help="checks side by side, unless they measure time (one for 3 cores, at most 5)",
    )
    options = parser.parse_args(words)
    for name in ("total", "limit_factor"):
        if not 0.0 < getattr(options, name) < float("inf"):
            option, value = name.replace("_", "-"), getattr(options, name)
            print(f"error: --{option} {value}: expected a number above 0", file=sys.stderr)
            return 2
    if options.jobs < 0:
        print(f"error: --jobs {options.jobs}: expected at least 1, or 0", file=sys.stderr)
        return 2
    known = {check.name: check for check in CHECKS}
    unknown = [name for name in options.only or () if name not in known]
    if unknown:
        print(
            f"error: no check {', '.join(unknown)}; there are {', '.join(known)}", file=sys.stderr
        )
        return 2
    checks = [check for check in CHECKS if not options.only or check.name in options.only]
    if options.list:
        for check in checks:
            how = "alone" if check.alone else "beside others"
            print(f"{check.name:<16}{check.limit:>4.0f} s  {how:<14} {check.about}")
        return 0
    drivers = [*Path("/dev").glob("nvidia*"), *Path("/dev").glob("dxg")]
    if options.device == "cuda" and not drivers and not shutil.which("nvidia-smi"):
        print("error: no NVIDIA GPU here; --device cpu rehearses without one", file=sys.stderr)
        return 2
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"error: --output {options.output}: {error.strerror}", file=sys.stderr)
        return 2
    started = time.monotonic()
    temporary = Path(tempfile.mkdtemp(prefix="first_run_"))
    try:
        wheels = Path(options.wheels).resolve() if options.wheels else None
        python = interpreter(temporary / "environment", wheels)
        os.environ.update(_variables(options.device, temporary))
        about = {
            "device": options.device,
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "total": options.total,
            "setup_seconds": round(time.monotonic() - started, 1),
        }

        def command(check: Check, report: Path) -> list[str]:
            words = [check.module, check.name, str(report.resolve()), options.device]
            return [python, "-m", "checks", *words, str(temporary / check.name)]

        runner = Runner(
            checks,
            command,
            options.output / "results.json",
            about=about,
            total=options.total - (time.monotonic() - started),
            factor=options.limit_factor,
            jobs=options.jobs or max(1, min(5, (os.cpu_count() or 1) // 3)),
            lacks=lacking(python, sorted({name for check in checks for name in check.needs})),
        )
        good = runner.run()
        print(f"wrote {runner.output}")
        return 0 if good else 1
    except CannotRun as reason:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _variables(device: str, temporary: Path) -> dict[str, str]:
    """The environment of the checks: this repository first on the path, no network, no caches of the user."""
    paths = [str(REPOSITORY), str(HERE.parent), str(HERE)]
    variables = {
        "PYTHONPATH": os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(temporary / "huggingface"),
        "TORCHINDUCTOR_CACHE_DIR": str(temporary / "inductor"),
        "TRITON_CACHE_DIR": str(temporary / "triton"),
        # Compiler workers beside the process would outlive it.
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    if device == "cpu":
        variables["CUDA_VISIBLE_DEVICES"] = ""
    return variables


if __name__ == "__main__":
    sys.exit(main())
