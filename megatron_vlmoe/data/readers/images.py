"""Raw images: folders (recursive, so ImageNet's one folder per class too) and tars of them."""

from __future__ import annotations

import lzma
import os
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from megatron_vlmoe.data.errors import DataError
from megatron_vlmoe.data.readers.records import (
    ImageFile,
    Reject,
    check_inputs,
    is_image,
    is_tar,
    walk_files,
)


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


@dataclass(frozen=True, slots=True)
class TarMember:
    """A regular file in a tar: of an uncompressed one its place, else its contents."""

    name: str
    offset: int
    size: int
    data: bytes | None

    def image(self, tar: str) -> ImageFile:
        """The member as an image."""
        return ImageFile(tar, self.name, tar, self.offset, self.size, self.data)

    def contents(self, tar: str) -> bytes:
        """The bytes of the member. Raises DataError."""
        return self.image(tar).read()


def read_images(inputs: tuple[str, ...]) -> Iterator[ImageFile | Reject]:
    """Yields every image of folders, tars (WebDataset shards too) and single files, in order.

    Folders are walked in sorted order; tars found in them are read in their place. Files that are
    neither images nor tars by their suffix are passed over.

    Raises:
        DataError: an input is missing, or is neither a folder, a tar nor an image.
    """
    check_inputs(inputs)
    for path in inputs:
        if os.path.isdir(path):
            yield from _folder_images(path)
        elif is_tar(path):
            yield from tar_images(path)
        elif is_image(path):
            yield ImageFile(path, "", path)
        else:
            raise DataError(f"{path}: neither a folder, a tar nor an image")


def _folder_images(folder: str) -> Iterator[ImageFile | Reject]:
    for path in walk_files(folder):
        if is_tar(path):
            yield from tar_images(path)
        elif is_image(path):
            yield ImageFile(folder, os.path.relpath(path, folder), path)


def tar_images(path: str) -> Iterator[ImageFile | Reject]:
    """Yields the images of one tar in its order."""
    for member in tar_members(path):
        if isinstance(member, Reject):
            yield member
        elif is_image(member.name):
            yield member.image(path)


def tar_members(path: str) -> Iterator[TarMember | Reject]:
    """Yields the regular files of a tar; a `Reject` where the archive breaks off.

    Raises:
        DataError: the file cannot be opened.
    """
    compressed = not path.lower().endswith(".tar")
    last = "start"
    try:
        # "r|" reads a compressed archive once, front to back; "r:" may skip the contents.
        with tarfile.open(path, "r|*" if compressed else "r:", tarinfo=_StrictTarInfo) as archive:
            while (member := archive.next()) is not None:
                # TarFile keeps every header it has met; a shard may have a million.
                archive.members.clear()  # type: ignore[attr-defined]
                if not member.isfile():
                    continue
                last = member.name
                data = None
                if compressed or member.issparse():
                    stream = archive.extractfile(member)
                    data = stream.read() if stream is not None else b""
                yield TarMember(member.name, member.offset_data, member.size, data)
    except FileNotFoundError as error:
        raise DataError(f"{path}: not found") from error
    except (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        yield Reject(path, f"after {last}", f"damaged tar: {error}")
