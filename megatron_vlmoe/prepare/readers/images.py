"""Raw images: folders (recursive, so ImageNet's one folder per class too) and tars of them, also tars of tars.

Also where the image lies that a list names: the one look-up of all readers of lists (`ImageFinder`).
"""

from __future__ import annotations

import contextlib
import io
import itertools
import lzma
import os
import posixpath
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import IO, Self, cast

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.data.image_files import HEADER_BYTES, begins_like_image, is_image_data
from megatron_vlmoe.prepare.readers.records import (
    LARGEST_FILE,
    ImageFile,
    PassedOver,
    Reject,
    check_inputs,
    files_by_name,
    is_image,
    is_side_file,
    is_tar,
    walk_files,
)
from megatron_vlmoe.prepare.remote import Mirror, is_remote_folder, remote_files
from megatron_vlmoe.prepare.shards import Part
from megatron_vlmoe.runtime.files import is_remote

_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00")
"""How gzip, bzip2 and xz files begin."""
_OTHERWISE_COMPRESSED = (b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18")
"""How zstd and lz4 files begin, which tarfile does not read."""
_MAX_LINKS = 16
_TAR_BUFFER = 1 << 20
_DAMAGED_TAR = (
    *(tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError, RecursionError),
    TypeError,  # tarfile asks for the number of a byte of a gzip header that has ended
    *(ValueError, OverflowError),  # and for a place beyond all that a file can have
)


class BrokenTar(Reject):
    """A tar breaks off here; what follows in it is lost."""

    __slots__ = ()


class _StrictTarInfo(tarfile.TarInfo):
    """Makes a damaged header an error; tarfile takes one past the first for the end."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(archive)
        except tarfile.HeaderError as error:
            if type(error).__name__ in ("InvalidHeaderError", "TruncatedHeaderError"):
                raise tarfile.ReadError(str(error)) from error
            raise
        # A header of pax whose number is none, or endless.
        except (ValueError, OverflowError) as error:
            raise tarfile.ReadError(str(error)) from error


def read_images(inputs: tuple[str, ...]) -> Iterator[ImageFile | Reject | PassedOver]:
    """Yields every image of folders, tars (WebDataset shards too) and single files, in order.

    Folders are walked in sorted order; tars found in them are read in their place. An image is what has the suffix or
    the contents of one. Other files are `PassedOver`; hidden files and what operating systems put beside them
    (`is_side_file`) are no data. Raises DataError if an input is missing, or is neither a folder, a tar nor an image.
    """
    check_inputs(inputs)
    for path in inputs:
        if os.path.isdir(path):
            for file in walk_files(path):
                yield from _file_images(file, path, file)
        else:
            yield from _file_images(path, path, path)


def _file_images(file: str, given: str, name: str) -> Iterator[ImageFile | Reject | PassedOver]:
    """The images of a tar, or the file itself.

    ``name`` is what the user calls it, and ``given`` the input: the same, or a folder above.
    """
    if is_tar(file):
        for member in tar_members(file):
            yield member if isinstance(member, Reject) else as_image(member, member.record)
    elif name != given:
        below = os.path.relpath(name, given)
        yield as_image(ImageFile(given, below, file), file)
    elif is_image_file(ImageFile(file, "", file), file):
        yield ImageFile(file, "", file)
    else:
        raise DataError(
            f"{file}: neither a folder, a tar nor an image (unpack other archives; write the "
            "images of tables as files)"
        )


_LOOSE_IMAGE_BYTES = 1 << 17
"""Weight of a file in a folder that is no tar, whose size would take a look at each."""


def image_parts(
    inputs: tuple[str, ...], mirror: Mirror
) -> Iterator[Part[ImageFile | Reject | PassedOver]]:
    """What `read_images` reads, as parts: each tar and each other file. Raises DataError if an input is not there."""
    for given in inputs:
        files: Iterator[str] = iter((given,))
        if is_remote(given):
            if is_remote_folder(given):
                files = (file for file, _ in remote_files(given))
        else:
            check_inputs((given,))
            if os.path.isdir(given):
                files = walk_files(given)
        for file in files:

            def read(
                span: tuple[int, int] | None, file: str = file, given: str = given
            ) -> Iterator[ImageFile | Reject | PassedOver]:
                return _file_images(mirror.local(file), given, file)

            whole = is_tar(file) or file == given
            yield Part(file, mirror.weight_of(file) if whole else _LOOSE_IMAGE_BYTES, read)


def as_image(file: ImageFile, name: str) -> ImageFile | PassedOver | Reject:
    """The file, if it has the suffix or the contents of an image; else it is passed over by its suffix."""
    suffix = posixpath.splitext(name)[1].lower() or "no suffix"
    try:
        return file if is_image_file(file, name) else PassedOver(file.source, suffix)
    except DataError as error:
        return Reject(file.source, file.record, str(error))


def is_image_file(file: ImageFile, name: str) -> bool:
    """Whether a file has the suffix of an image, or its contents. Raises DataError (a reason) if it is unreadable."""
    if is_image(name):
        return True
    return begins_like_image(file.read(HEADER_BYTES)) and is_image_data(file.read())


def tar_members(path: str) -> Iterator[ImageFile | Reject]:
    """Yields the regular files of a tar and of tars in it, in order, whether they are images or not.

    Of an uncompressed tar they are places in it, else contents. The name of a file in a tar in the tar begins with
    that of the inner tar. Links are followed within an uncompressed tar. A `Reject` with its name stands for each that
    cannot be followed, a `BrokenTar` where an archive breaks off. Side files (`is_side_file`) are left out.

    Raises DataError if the file cannot be opened.
    """
    try:
        with open(path, "rb") as file:
            yield from _members(path, "", file)
    except FileNotFoundError as error:
        raise DataError(f"{path}: not found") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error


def _members(
    path: str, inside: str, file: IO[bytes], place: int | None = 0, size: int | None = None
) -> Iterator[ImageFile | Reject]:
    """The members of a tar, in the outermost one at ``path``.

    ``inside`` is its name there with a slash, empty for the outermost; ``place`` where it begins, None within something
    compressed; ``size`` how many bytes an inner one has.
    """
    head = file.read(8)
    file.seek(0)
    if head.startswith(_OTHERWISE_COMPRESSED):
        reason = "a tar compressed by zstd or lz4, which is not read: decompress it"
        yield BrokenTar(path, inside.rstrip("/"), reason)
        return
    compressed = head.startswith(_COMPRESSED)
    place = None if compressed else place
    links = _Links(file)
    last = "start"
    try:
        # "r|" reads a compressed archive once, front to back; "r:" may skip the contents.
        with tarfile.open(
            fileobj=file,
            mode="r|*" if compressed else "r:",
            tarinfo=_StrictTarInfo,
            bufsize=_TAR_BUFFER,
        ) as archive:
            while (member := archive.next()) is not None:
                if compressed and member.size > _TAR_BUFFER << 20:
                    # tarfile would go through all of its blocks, also behind the end of the file.
                    raise tarfile.ReadError(f"{member.name} of {member.size} bytes")
                # TarFile keeps every header it has met; a shard may have a million.
                archive.members.clear()  # type: ignore[attr-defined]
                name = inside + member.name
                if member.isdir() or is_side_file(member.name):
                    continue
                last = member.name
                found: tarfile.TarInfo | str = member
                if member.islnk() or member.issym():
                    where = "a link in a compressed tar: unpack it" if compressed else ""
                    found = where or links.target(member)
                elif not member.isfile():
                    found = "neither a file nor a link"
                elif None not in (place, size) and member.offset_data + member.size > (size or 0):
                    # In the outer tar other bytes follow.
                    found = f"damaged tar: {inside.rstrip('/')} ends inside it"
                if isinstance(found, str):
                    yield Reject(path, name, found)
                    continue
                data = None
                if place is None or found.issparse():
                    if found.size > LARGEST_FILE:
                        reason = f"longer than {LARGEST_FILE} bytes: unpack the tar"
                        yield Reject(path, name, reason)
                        continue
                    data = cast(IO[bytes], archive.extractfile(found)).read()
                begin = (place or 0) + found.offset_data
                if not is_tar(name):
                    yield ImageFile(path, name, path, begin, found.size, data)
                elif data is not None:
                    yield from _members(path, f"{name}/", io.BytesIO(data), place=None)
                else:
                    inner = cast(IO[bytes], archive.extractfile(found))
                    yield from _members(path, f"{name}/", inner, begin, found.size)
    except _DAMAGED_TAR as error:
        yield BrokenTar(path, f"{inside}after {last}", f"damaged tar: {error}")


@dataclass
class _Links:
    """Finds what the links of an uncompressed tar point at; lists the tar once, at the first link."""

    file: IO[bytes]

    @cached_property
    def _members(self) -> dict[str, tarfile.TarInfo]:
        found: dict[str, tarfile.TarInfo] = {}
        self.file.seek(0)
        # What comes before damage is known; the reader of the tar reports it.
        with contextlib.suppress(*_DAMAGED_TAR):
            with tarfile.open(fileobj=self.file, mode="r:") as archive:
                for member in archive:
                    found[posixpath.normpath(member.name)] = member
        return found

    def target(self, link: tarfile.TarInfo) -> tarfile.TarInfo | str:
        """The regular file at the end of a link, or why there is none."""
        member = link
        for _ in range(_MAX_LINKS):
            # A hard link names its target from the root of the archive, a symbolic one from its own folder.
            folder = posixpath.dirname(member.name) if member.issym() else ""
            found = self._members.get(posixpath.normpath(posixpath.join(folder, member.linkname)))
            if found is None or found.isdir():
                return f"a link to {link.linkname}, which is no file of the tar"
            if found.isfile():
                return found
            member = found
        return f"a link to {link.linkname}, which leads to no file"


Parts = tuple[str, ...]


class NoImageError(DataError):
    """A listed image that is not there, or may be one of several; the reason alone."""


class ImageFinder:
    """Finds listed images below a folder, which is walked only once a path is not there as it stands.

    Folders are looked up, not files: a picture that is missing in the folder that its list names is
    missing, whatever lies in other folders. The letters' case counts.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._root = _parts(os.path.abspath(folder))
        self._candidates: dict[Parts, list[str]] = {}
        # By folder on disk: a folder of the list that led there, and whether part of it is not in the path.
        self._owners: dict[str, tuple[Parts, bool]] = {}

    def find(self, path: str) -> str:
        """The file that a list names ``path``.

        Raises NoImageError if no file, or several, may be meant; DataError if two folders of the list are looked for in
        one folder, so that one of them would get the other's pictures, or a folder cannot be listed.
        """
        if is_remote(path) and not path.startswith("file://"):
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
        return files_by_name(self._folder)

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
        pairs = zip(reversed(self._root + relative), reversed(listed))
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))

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
