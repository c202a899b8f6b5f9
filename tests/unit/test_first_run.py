"""The runner of the first checks on a GPU: limits, results of a run that is cut off, what it says is missing."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "gpu"
sys.path.insert(0, str(FOLDER))

import first_run  # noqa: E402
from first_run import CHECKS, Check, Runner  # noqa: E402

PASSED = {"measured": {"value": 3}, "failures": [], "left_out": [], "done": True}
FAILED = {**PASSED, "failures": ["off by 0.5"]}
# What checks do, with the file for their report as the first argument.
HANGS = "import time; time.sleep(60)"
DIES = "import os; print('on the way'); os.abort()"
QUIET = "pass"


def writes(report: dict[str, Any], status: int = 0) -> str:
    text = json.dumps(report)
    return f"import sys; open(sys.argv[1], 'w').write({text!r}); sys.exit({status})"


def runner(tmp_path: Path, codes: dict[str, str], **options: Any) -> Runner:
    limits = options.pop("limits", {})
    checks = [Check(name, "", limits.get(name, 20.0), "") for name in codes]

    def command(check: Check, report: Path) -> list[str]:
        return [sys.executable, "-S", "-c", codes[check.name], str(report)]

    return Runner(checks, command, tmp_path / "results.json", **options)


def results(tmp_path: Path) -> dict[str, dict[str, Any]]:
    content = json.loads((tmp_path / "results.json").read_text())
    return {"": content} | {check["name"]: check for check in content["checks"]}


@pytest.mark.process
def test_every_outcome_is_told_apart(tmp_path: Path) -> None:
    codes = {
        "good": writes(PASSED),
        "bad": writes(FAILED, 1),
        "hidden": writes(FAILED),
        "skipped": writes({**PASSED, "done": False, "not_run": "needs a GPU"}),
        "dead": DIES,
        "quiet": QUIET,
        "half": writes({**PASSED, "done": False}),
        "hanging": HANGS,
    }
    assert not runner(tmp_path, codes, limits={"hanging": 1.0}, jobs=2).run()
    found = results(tmp_path)
    assert found[""]["finished"]
    assert found["good"]["status"] == "passed" and found["good"]["measured"] == {"value": 3}
    assert found["bad"]["status"] == "failed" and found["bad"]["reason"] == "off by 0.5"
    assert found["bad"]["measured"] == {"value": 3}
    assert found["hidden"]["status"] == "failed"
    assert (found["skipped"]["status"], found["skipped"]["reason"]) == ("not run", "needs a GPU")
    assert found["dead"]["status"] == "failed" and found["dead"]["log"] == ["on the way"]
    assert found["dead"]["reason"] == f"exit status {-signal.SIGABRT}"
    # A check that ends early has not passed.
    assert found["quiet"]["status"] == "failed" and "without a report" in found["quiet"]["reason"]
    assert found["half"]["status"] == "failed"
    assert found["hanging"]["status"] == "timed out" and found["hanging"]["seconds"] < 10


@pytest.mark.process
def test_what_a_hanging_check_has_started_ends_with_it(tmp_path: Path) -> None:
    child = tmp_path / "child"
    code = (
        "import subprocess, sys\n"
        f"process = subprocess.Popen([sys.executable, '-S', '-c', {HANGS!r}])\n"
        f"open({str(child)!r}, 'w').write(str(process.pid))\n"
        "process.wait()"
    )
    runner(tmp_path, {"parent": code}, limits={"parent": 2.0}).run()

    def is_running() -> bool:
        status = Path(f"/proc/{child.read_text()}/stat")
        return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"

    wait_until(lambda: not is_running())


@pytest.mark.process
def test_all_of_them_pass(tmp_path: Path) -> None:
    assert runner(tmp_path, {"a": writes(PASSED), "b": writes(PASSED)}).run()


@pytest.mark.process
def test_the_time_of_all_is_limited(tmp_path: Path) -> None:
    codes = {"hanging": HANGS, "late": writes(PASSED)}
    checked = runner(tmp_path, codes, total=first_run.LEAST_SECONDS + 1.0, limits={"hanging": 3.0})
    start = time.monotonic()
    assert not checked.run()
    assert time.monotonic() - start < first_run.LEAST_SECONDS + 3.0
    found = results(tmp_path)
    assert found["hanging"]["status"] == "timed out"
    assert found["late"]["status"] == "not run" and "s left of" in found["late"]["reason"]


@pytest.mark.process
def test_a_package_that_is_not_there(tmp_path: Path) -> None:
    checked = runner(tmp_path, {"a": writes(PASSED)}, lacks=["pytest"])
    checked.checks = [Check("a", "", 20.0, "", needs=("pytest",))]
    assert checked.run()
    assert results(tmp_path)["a"]["reason"] == "pytest not installed"


CUT_OFF = """
import sys
from pathlib import Path
from first_run import Check, Runner

checks = [Check("first", "", 20, ""), Check("second", "", 60, ""), Check("third", "", 20, "")]
codes = {"first": sys.argv[2], "second": sys.argv[3], "third": sys.argv[2]}
command = lambda check, report: [sys.executable, "-S", "-c", codes[check.name], str(report)]
sys.exit(0 if Runner(checks, command, Path(sys.argv[1])).run() else 1)
"""


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_cut_off_leaves_its_results(tmp_path: Path, number: int) -> None:
    output = tmp_path / "results.json"
    words = [str(output), writes(PASSED), HANGS]
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", CUT_OFF, *words],
        env={**os.environ, "PYTHONPATH": str(FOLDER)},
        start_new_session=True,
    )
    log = tmp_path / "logs" / "second.txt"
    wait_until(log.exists)
    process.send_signal(number)
    assert process.wait(timeout=20) != 0
    found = results(tmp_path)
    assert not found[""]["finished"]
    assert found["first"]["status"] == "passed"
    assert found["second"]["reason"] == "the run was cut off while it ran"
    assert found["third"]["reason"] == "the run was cut off before it"
    assert {found[name]["status"] for name in ("second", "third")} == {"not run"}


def test_a_name_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert first_run.main(["--only", "sdpa", "spda"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: no check spda; there are versions, ")


@pytest.mark.parametrize("words", ["--jobs -3", "--total -5", "--total nan", "--limit-factor 0"])
def test_numbers_that_are_none(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert first_run.main(words.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {words.split()[0]} ") and "expected" in line


@pytest.mark.skipif(any(Path("/dev").glob("nvidia*")), reason="there is a GPU")
def test_no_gpu_is_said_before_any_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert first_run.main(["--output", str(tmp_path / "found")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "error: no NVIDIA GPU here; --device cpu rehearses without one"
    assert not (tmp_path / "found").exists()


def test_the_list_has_all_names_and_limits(capsys: pytest.CaptureFixture[str]) -> None:
    assert first_run.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [[c.name, f"{c.limit:.0f}"] for c in CHECKS]


def test_every_check_is_a_function_of_its_module() -> None:
    for check in CHECKS:
        tree = ast.parse((FOLDER / "checks" / f"{check.module}.py").read_text())
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert check.name in functions


def test_no_check_can_take_all_the_time() -> None:
    """Those that measure time run one after another; the others beside each other, in a few turns."""
    alone = sum(check.limit for check in CHECKS if check.alone)
    assert alone <= first_run.TOTAL_SECONDS
    assert max(check.limit for check in CHECKS) <= first_run.TOTAL_SECONDS / 3


@pytest.mark.process
def test_what_is_missing_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(first_run, "ALWAYS", ("pytest", "megatron-gore"))
    monkeypatch.setattr(first_run, "requirements", lambda: {"megatron-gore": "megatron-gore==1.2"})
    monkeypatch.delenv("WHEELS", raising=False)
    assert first_run.main(["--device", "cpu", "--output", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: missing: megatron-gore==1.2; put their wheels for Python 3.")


def test_requirements_are_those_of_the_file() -> None:
    found = first_run.requirements()
    older, newer = found["megatron-core"].split(" or ")
    assert older == 'megatron-core==0.16.1; python_version < "3.12"'
    assert newer.startswith("megatron-core>=0.19.2,") and newer.endswith('python_version >= "3.12"')
    assert found["jsonargparse"].startswith("jsonargparse[signatures]>=")
    assert set(first_run.ALWAYS) <= found.keys()


def write_wheel(folder: Path, name: str, tag: str = "py3-none-any", text: str = "") -> None:
    """A wheel of one module."""
    info = f"{name}-1.0.dist-info"
    files = {
        f"{name}.py": text,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-1.0-{tag}.whl", "w") as wheel:
        for path, content in files.items():
            wheel.writestr(path, content)


@pytest.mark.process
def test_wheels_lie_over_what_the_interpreter_has(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    write_wheel(wheels, "first_run_example", text="VALUE = 7")
    python = first_run.make_environment(tmp_path / "environment", wheels)
    # pytest lies in a virtual environment, which an environment on top of another one does not have by itself.
    code = "import pytest, first_run_example; print(first_run_example.VALUE)"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    assert done.stdout == "7\n", done.stderr
    assert first_run.lacking(python, ["first-run-example", "pytest"]) == []
    assert first_run.lacking(sys.executable, ["first-run-example"]) == ["first-run-example"]


@pytest.mark.process
def test_a_wheel_for_another_python_is_named(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    write_wheel(wheels, "first_run_example", "cp27-none-any")
    with pytest.raises(first_run.CannotRun, match="pip cannot install .*first_run_example"):
        first_run.make_environment(tmp_path / "environment", wheels)


def test_a_folder_without_wheels(tmp_path: Path) -> None:
    with pytest.raises(first_run.CannotRun, match="has no wheels"):
        first_run.make_environment(tmp_path / "environment", tmp_path)
