"""Files at addresses that fsspec knows: s3://, gs://, hf://, file:// and others.

Readers, workers and memory maps need local files. So what is remote is copied: inputs into a temporary folder when they
are read, outputs from one when they are complete.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.data.manifest import load_manifest
from megatron_vlmoe.prepare.readers.records import is_side_file
from megatron_vlmoe.runtime.files import is_remote

_PACKAGES = {
    **dict.fromkeys(("s3", "s3a"), "s3fs"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("az", "abfs", "abfss"), "adlfs"),
    "hf": "huggingface_hub",
    "http": "aiohttp",
    "https": "aiohttp",
}
"""What pip installs, by the beginning of an address."""


class NotThere(DataError):
    """Nothing is at an address."""


def check_local(option: str, path: str) -> None:
    """Raises DataError if a path that must be local is an address."""
    if is_remote(path):
        raise DataError(f"{path}: {option} must be a local path; fetch it first")


def file_system(address: str) -> tuple[Any, str]:
    """The file system of an address, and the path in it. Raises DataError, which names the address, or a package."""
    import fsspec

    scheme = address.partition("://")[0].lower()
    try:
        # Some file systems connect, or open an archive, when they are made.
        with naming(address):
            return fsspec.core.url_to_fs(address)
    except ImportError as error:
        package = _PACKAGES.get(scheme)
        hint = f": pip install {package}" if package else f" ({error})"
        raise DataError(
            f"{address}: addresses of {scheme}:// need another package{hint}"
        ) from error


@contextlib.contextmanager
def naming(address: str) -> Iterator[None]:
    """Errors of a file system in the block become a DataError that names an address."""
    try:
        yield
    except (DataError, ImportError):
        raise
    except FileNotFoundError as error:
        raise NotThere(f"{address}: not found") from error
    except Exception as error:  # each library of each store has errors of its own
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{address}: {first}") from error


def is_remote_folder(address: str) -> bool:
    """Whether there is a folder at an address. Raises DataError if there is nothing."""
    system, path = file_system(address)
    with naming(address):
        return bool(system.info(path)["type"] == "directory")


def names_in(folder: str) -> list[str]:
    """Names of the files in a folder, local or remote; none if it is not there. Raises DataError."""
    if not is_remote(folder):
        return os.listdir(folder) if os.path.isdir(folder) else []
    system, path = file_system(folder)
    with naming(folder):
        found = system.ls(path, detail=False) if system.exists(path) else []
        return [posixpath.basename(name) for name in found]


def remote_files(address: str) -> Iterator[tuple[str, int]]:
    """Address and size of each file below a folder, sorted as `walk_files` sorts, without side files."""
    system, path = file_system(address)
    with naming(address):
        found = system.find(path, detail=True)
    root = path.rstrip("/") + "/"
    names = {name.removeprefix(root): int(info["size"] or 0) for name, info in found.items()}
    for name in sorted(names, key=lambda one: one.split("/")):
        if name and not is_side_file(name):
            yield f"{address.rstrip('/')}/{name}", names[name]


class Mirror:
    """Local copies of remote files, made when they are asked for and deleted by `close`."""

    def __init__(self) -> None:
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._copies: dict[str, str] = {}
        self._addresses: dict[str, str] = {}

    def local(self, path: str) -> str:
        """A path as it is, or that of a copy of what is at an address: a file, or a folder. Raises DataError."""
        if not is_remote(path):
            return path
        if path not in self._copies:
            name = posixpath.basename(path.rstrip("/")) or "root"
            copy = os.path.join(self._new_folder(), name)
            self._addresses[copy] = path
            if is_remote_folder(path):
                os.makedirs(copy)
                for file, _ in remote_files(path):
                    _get(file, copy + file.removeprefix(path.rstrip("/")))
            else:
                _get(path, copy)
            self._copies[path] = copy
        return self._copies[path]

    def dataset(self, prefix: str) -> str:
        """A dataset's prefix as it is, or that of copies of the files of one at an address. Raises DataError."""
        if not is_remote(prefix):
            return prefix
        folder = self._new_folder()
        copy = os.path.join(folder, posixpath.basename(prefix))
        self._addresses[copy] = prefix
        _get(f"{prefix}.json", f"{copy}.json")
        for suffix in load_manifest(copy).files:
            _get(f"{prefix}{suffix}", f"{copy}{suffix}")
        with contextlib.suppress(NotThere):
            _get(f"{prefix}.rejects.jsonl", f"{copy}.rejects.jsonl")
        return copy

    def _new_folder(self) -> str:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="vlmoe-")
        return tempfile.mkdtemp(dir=self._folder.name)

    def weight_of(self, path: str) -> int:
        """Bytes of a file, at least 1. Raises DataError if it is no regular one, or not there."""
        if is_remote(path):
            system, place = file_system(path)
            with naming(path):
                return max(int(system.info(place)["size"] or 0), 1)
        try:
            found = os.stat(path)
        except FileNotFoundError as error:
            raise DataError(f"{path}: not found") from error
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from error
        if not stat.S_ISREG(found.st_mode):
            raise DataError(f"{path}: no regular file, which cannot be read in shards")
        return max(found.st_size, 1)

    def named(self, text: str) -> str:
        """A message with addresses in the place of their copies."""
        if self._folder is None or self._folder.name not in text:
            return text
        for copy, address in self._addresses.items():
            text = text.replace(copy, address)
        return text

    @contextlib.contextmanager
    def naming(self) -> Iterator[None]:
        """DataErrors of the block name addresses in the place of their copies."""
        try:
            yield
        except DataError as error:
            message = self.named(str(error))
            if message == str(error):
                raise
            raise DataError(message) from error

    def close(self) -> None:
        """Deletes all copies."""
        if self._folder is not None:
            self._folder.cleanup()


def _get(address: str, copy: str) -> None:
    system, path = file_system(address)
    os.makedirs(os.path.dirname(copy), exist_ok=True)
    with naming(address):
        system.get_file(path, copy)


def put_file(local: str | Path, address: str) -> None:
    """Uploads one file, in the place of what stands there. Raises DataError."""
    system, path = file_system(address)
    with naming(address):
        if parent := posixpath.dirname(path.rstrip("/")):
            system.makedirs(parent, exist_ok=True)
        system.put_file(str(local), path)


def read_remote(address: str) -> bytes | None:
    """The content of a small file; None: it is not there. Raises DataError."""
    system, path = file_system(address)
    with naming(address):
        return bytes(system.cat_file(path)) if system.exists(path) else None


def remove_remote(address: str) -> None:
    """Deletes a file, if it is there. Raises DataError."""
    system, path = file_system(address)
    with naming(address):
        if system.exists(path):
            system.rm_file(path)
