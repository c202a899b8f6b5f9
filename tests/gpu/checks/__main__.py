"""Runs one check and writes its report: python -m checks MODULE NAME REPORT DEVICE FOLDER."""

import importlib
import sys
from pathlib import Path

from checks.report import NotRun, Report


def main(module: str, name: str, path: str, device: str, folder: str) -> int:
    """Exit status: 1 if something was not as expected; what was found until then is in the report."""
    report = Report(Path(path), device, Path(folder))
    report.folder.mkdir(parents=True, exist_ok=True)
    try:
        report.check_device()
        getattr(importlib.import_module(f"checks.{module}"), name)(report)
    except NotRun as reason:
        report.not_run(str(reason))
        return 0
    except BaseException as error:
        lines = str(error).strip().splitlines()
        report.expect(False, f"{type(error).__name__}: {' '.join(lines)[:600]}")
        raise
    report.done()
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
