"""Where the image lies that a list names: the one look-up of all readers of lists.

Lists are made on other machines and name their images in many ways. A path is taken as it stands,
absolute or below the image folder. Else the longest path suffix decides: one of the two paths, the
listed one or that of the file below the image folder, must end in the whole of the other. The name
of a file alone decides only where the list gives no folder and one file has that name.
"""

from __future__ import annotations

import os
import posixpath
import re
from functools import cached_property

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.prepare.readers.records import walk_files

Parts = tuple[str, ...]


class NoImageError(DataError):
    """A listed image that is not there, or may be one of several; the reason alone."""


class ImageFinder:
    """Finds listed images below a folder, which is walked only once a path is not there as it stands.

    Folders are looked up, not files: a picture that is missing in the folder that its list names is
    missing, whatever lies in other folders. The letters' case counts.

    Args:
        folder: the image folder.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._root = _parts(os.path.abspath(folder))
        self._candidates: dict[Parts, list[str]] = {}
        # By folder on disk: a folder of the list that led there, and whether part of it is not in the path.
        self._owners: dict[str, tuple[Parts, bool]] = {}

    def find(self, path: str) -> str:
        """The file that a list names ``path``.

        Raises:
            NoImageError: no file, or several, may be meant.
            DataError: two folders of the list are looked for in one folder, so that one of them
                would get the other's pictures; or a folder cannot be listed.
        """
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", path) and not path.startswith("file://"):
            raise NoImageError(f"{path} is a URL, not a file")
        path = path.removeprefix("file://")
        *folders, name = _parts(path) or ("",)
        if not name:
            raise NoImageError("the path of the image is empty")
        listed = tuple(folders)
        as_it_stands = (os.path.join(self._folder, path), os.path.join(self._folder, *listed, name))
        for direct in dict.fromkeys(as_it_stands):
            if os.path.isfile(direct):
                return self._owned(direct, listed)
        if not listed:
            found = self._files_by_name.get(name, [])
            return _only(found, path if found else f"{path} (nowhere below {self._folder})")
        if os.path.isdir(os.path.dirname(as_it_stands[1])):
            raise NoImageError(f"no such image file: {as_it_stands[1]}")
        found = [os.path.join(folder, name) for folder in self._folders_of(listed)]
        file = _only(
            [file for file in found if os.path.isfile(file)],
            path if found else f"{path} (no folder below {self._folder} is its folder)",
        )
        relative = _parts(os.path.relpath(os.path.dirname(file), self._folder))
        return self._owned(file, listed, self._shared(relative, listed) < len(listed))

    @cached_property
    def _files_by_name(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for file in walk_files(self._folder):
            found.setdefault(os.path.basename(file), []).append(file)
        return found

    @cached_property
    def _folders_by_name(self) -> dict[str, list[tuple[str, Parts]]]:
        """The folders that hold a file, with their parts below the image folder."""
        found: dict[str, list[tuple[str, Parts]]] = {}
        for folder in dict.fromkeys(os.path.dirname(file) for file in walk_files(self._folder)):
            relative = _parts(os.path.relpath(folder, self._folder))
            name = (self._root + relative or ("",))[-1]
            found.setdefault(name, []).append((folder, relative))
        return found

    def _shared(self, relative: Parts, listed: Parts) -> int:
        """How many parts a folder and a listed one have in common, counted from their ends."""
        shared = 0
        for one, other in zip(reversed(self._root + relative), reversed(listed)):
            if one != other:
                break
            shared += 1
        return shared

    def _folders_of(self, listed: Parts) -> list[str]:
        """The folders that a listed one may mean: those with the longest common end."""
        if listed not in self._candidates:
            lengths = {
                folder: shared
                for folder, relative in self._folders_by_name.get(listed[-1], [])
                if (shared := self._shared(relative, listed)) >= min(len(relative), len(listed))
            }
            longest = max(lengths.values(), default=0)
            self._candidates[listed] = [f for f, shared in lengths.items() if shared == longest]
        return self._candidates[listed]

    def _owned(self, file: str, listed: Parts, by_its_end: bool = False) -> str:
        """``file``, unless another folder of the list led to its folder.

        Two folders of the list may, where one of them is the end of the other.
        """
        folder = os.path.dirname(file)
        owner, earlier = self._owners.setdefault(folder, (listed, by_its_end))
        shorter = min(len(owner), len(listed))
        alike = owner[len(owner) - shorter :] == listed[len(listed) - shorter :]
        if not alike and (earlier or by_its_end):
            raise DataError(
                f"{folder}: {'/'.join(owner)} and {'/'.join(listed)} of the list may both mean this "
                "folder: give --images a folder that holds the two, or a list of one of them"
            )
        return file


def _parts(path: str) -> Parts:
    """The names that a path of this or another system goes through."""
    path = re.sub(r"^[A-Za-z]:(?=/)", "", path.replace("\\", "/"))
    return tuple(p for p in posixpath.normpath(path).split("/") if p not in ("", ".", ".."))


def _only(files: list[str], path: str) -> str:
    if not files:
        raise NoImageError(f"no such image file: {path}")
    if len(files) > 1:
        raise NoImageError(f"several image files may be {path}: {' and '.join(files)}")
    return files[0]
