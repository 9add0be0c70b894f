"""The zip files of ``torch.save``, looked through before torch reads them for what could unpack to any size."""

from __future__ import annotations

import zipfile
from typing import IO

from kd_cache.errors import listed


class NotFromTorchError(ValueError):
    """``torch.save`` wrote no such file; says why."""


class _Sparing:
    """A file that gives at most ``most`` bytes at once: nothing else bounds the directory of a zip file."""

    def __init__(self, file: IO[bytes], most: int) -> None:
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable
        self._file, self._most = file, most

    def read(self, size: int = -1) -> bytes:
        content = self._file.read(self._most + 1 if size < 0 else min(size, self._most + 1))
        if len(content) > self._most:
            raise _too_large(self._most)
        return content


def _too_large(most: int) -> NotFromTorchError:
    return NotFromTorchError(f"the file's structure is larger than {most} bytes")


def pickle_in(file: IO[bytes], size: int, most: int) -> bytes:
    """The one pickle of a file of ``size`` bytes. Raises `NotFromTorchError`; the pickle may have ``most`` bytes."""
    with zipfile.ZipFile(_Sparing(file, most)) as archive:
        members = archive.infolist()
        names = {member.filename.rpartition("/")[2] for member in members}
        if "data.pkl" not in names or "constants.pkl" in names:
            kind = "a TorchScript archive" if "constants.pkl" in names else "another zip file"
            raise NotFromTorchError(f"expected a file of torch.save, found {kind}")
        packed = [member.filename for member in members if member.compress_type != zipfile.ZIP_STORED]
        if packed or sum(member.file_size for member in members) > size:
            raise NotFromTorchError(
                "the zip members are compressed or overlap; torch.save writes neither, and they could"
                f" unpack to any size\n{listed(packed)}".rstrip()
            )
        # torch's reader takes a name in any case for the same, and one of several as it likes.
        pickles = [member for member in members if member.filename.lower().endswith("data.pkl")]
        if len(pickles) > 1:
            raise NotFromTorchError(f"expected one pickle, found {len(pickles)}")
        if pickles[0].file_size > most:
            raise _too_large(most)
        return archive.read(pickles[0])
