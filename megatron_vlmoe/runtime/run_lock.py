"""The lock of a run folder: two runs that write into one folder would take each other's checkpoints apart.

RUN/run.lock says which process holds it: host, process, start. It is made by O_EXCL, which is atomic on NFS too, and
removed when the run ends, in whatever way but by SIGKILL or a signal that comes before training. Whether the holder of
a lock that is left still lives:

- a process of this boot of this host, in this space of process numbers, is looked up;
- that of another host is known by its heartbeat: it renews the lock every `BEAT_SECONDS`. Clocks are not compared: a
  lock that does not change for `SILENT_SECONDS` is left behind, and one that has not for ten minutes by this clock
  needs no waiting.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from megatron_vlmoe.config.errors import ConfigError

LOCK_FILE = "run.lock"
BEAT_SECONDS = 10.0
SILENT_SECONDS = 60.0
_LONG_SILENT_SECONDS = 600.0
_POLL_SECONDS = 1.0
# The start of a process is told in hundredths of a second after the boot, whose time may be corrected.
_SAME_START_SECONDS = 5.0

log = logging.getLogger("megatron_vlmoe")


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder, which is made where it is missing; one process of a run calls it for all.

    Raises:
        ConfigError: another run holds it; or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = _HeldLock(folder / LOCK_FILE)
    except OSError as error:
        raise ConfigError(f"--save {folder}: {LOCK_FILE}: {error.strerror}") from None
    try:
        yield
    finally:
        held.release()


def holder_text(folder: Path) -> str:
    """Who the lock of a folder names, living or not; empty where there is none. Raises OSError: it cannot be read."""
    holder = _read(folder / LOCK_FILE)
    return "" if holder is None else _text(holder).rstrip(",")


class _HeldLock:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.id = uuid.uuid4().hex
        while not self._make():
            self._take_over()
        self._released = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="run lock", daemon=True)
        self._heart.start()

    def _make(self) -> bool:
        """Makes the lock; False where there is one."""
        try:
            handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        with open(handle, "w", encoding="utf-8") as file:
            json.dump({"id": self.id, **_this_process()}, file)
            file.flush()
            os.fsync(file.fileno())
        return True

    def _take_over(self) -> None:
        """Deletes a lock that nobody holds any more.

        Raises:
            ConfigError: somebody holds it.
        """
        holder = _read(self.path)
        if holder is None:
            if self.path.is_symlink():
                raise ConfigError(
                    f"--save {self.path.parent}: {LOCK_FILE} is a link to a file that is not there; delete it"
                )
            return
        if _is_held(self.path, holder):
            raise ConfigError(
                f"--save {self.path.parent}: {_text(holder)} trains in this folder ({LOCK_FILE}); end it, or choose "
                "another folder"
            )
        # Of several that find it at once, one at a time may delete it, and only if it is still the one that was found:
        # what another has made meanwhile is held.
        guard = self.path.with_name(f"{self.path.name}.takeover")
        deadline = time.monotonic() + SILENT_SECONDS
        while True:
            try:
                os.close(os.open(guard, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
                break
            except FileExistsError:
                if time.monotonic() > deadline:
                    raise ConfigError(
                        f"--save {self.path.parent}: {guard.name} is left behind; delete it if no run trains here"
                    ) from None
                time.sleep(0.01)
        try:
            found = _read(self.path)
            if found is not None and found.get("id") == holder.get("id"):
                self.path.unlink()
                log.warning("took over %s, left behind by %s", self.path, _text(holder))
        finally:
            guard.unlink(missing_ok=True)

    def _is_own(self) -> bool:
        return (_read(self.path) or {}).get("id") == self.id

    def _beat(self) -> None:
        while not self._released.wait(BEAT_SECONDS):
            # A file system that is away for a while does not end the run.
            with contextlib.suppress(OSError):
                if not self._is_own():
                    log.warning("%s is gone, or another run's: two runs may write here", self.path)
                    return
                os.utime(self.path)

    def release(self) -> None:
        self._released.set()
        self._heart.join()
        with contextlib.suppress(OSError):
            if self._is_own():
                self.path.unlink()


def _this_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "process_started": psutil.Process().create_time(),
        "space": _space(),
    }


def _space() -> str:
    """What a process number is one of: a boot of a machine, and in it the space of a container."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _read(path: Path) -> dict[str, Any] | None:
    """Who holds a lock: nothing of what is expected where the file is damaged, None where there is none."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _is_held(path: Path, holder: dict[str, Any]) -> bool:
    if holder.get("space") == _space():
        return _lives(holder)
    try:
        before = path.stat().st_mtime_ns
        if time.time() - before / 1e9 > _LONG_SILENT_SECONDS:
            return False
        log.info(
            "%s: of %s; waiting up to %.0f s for a sign of life",
            path,
            _text(holder),
            SILENT_SECONDS,
        )
        deadline = time.monotonic() + SILENT_SECONDS
        while time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
            # Opening it asks an NFS server anew.
            with path.open("rb") as file:
                if os.fstat(file.fileno()).st_mtime_ns != before:
                    return True
    except FileNotFoundError:
        pass
    return False


def _lives(holder: dict[str, Any]) -> bool:
    try:
        process = psutil.Process(int(holder["pid"]))
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        started = process.create_time()
        return abs(started - float(holder["process_started"])) < _SAME_START_SECONDS
    except (psutil.NoSuchProcess, KeyError, TypeError, ValueError, OverflowError):
        return False
    except psutil.AccessDenied:
        return True


def _text(holder: dict[str, Any]) -> str:
    if not {"host", "pid", "started"} <= holder.keys():
        return "an unknown run"
    return f"the run of process {holder['pid']} on {holder['host']}, started {holder['started']},"
