"""Files of ``torch.save``: looked through for what could unpack to any size, then read without code."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Sequence
from typing import IO, Any

from kd_cache.errors import listed, shown


class NotFromTorchError(ValueError):
    """``torch.save`` wrote no such file; says why."""


class UnreadablePickleError(NotFromTorchError):
    """It is whole, and torch cannot read it without running code."""

    hint = "Load it where it was made, and save it again with torch.save(…), without pickle_protocol."


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


def read_without_code(file: IO[bytes], protocol: int, stand_ins: Sequence[Any] = ()) -> Any:
    """What is in a file of ``torch.save``, by torch's weights-only reader.

    ``stand_ins`` are pairs of what stands in a pickle for a name, and the name. Raises any error at all for damaged
    bytes, and `UnreadablePickleError` for a pickle ``protocol`` that torch cannot read.
    """
    import torch

    trusted = torch.serialization.get_safe_globals()
    taken = {name for _, name in stand_ins}
    torch.serialization.clear_safe_globals()  # of two things under one name torch would take any
    torch.serialization.add_safe_globals([*(item for item in trusted if global_name(item) not in taken), *stand_ins])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
        try:
            return torch.load(file, map_location="cpu", weights_only=True, mmap=False)
        except pickle.UnpicklingError as error:
            if protocol > 2 and "Unsupported operand" in str(error):
                raise UnreadablePickleError(
                    f"this file was saved with pickle protocol {protocol}; torch reads only protocol 2 safely"
                ) from error
            raise
        finally:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(trusted)


def global_name(item: Any) -> str:
    """What a pickle calls an item of torch's safe globals."""
    return str(item[1]) if isinstance(item, tuple) else f"{item.__module__}.{item.__qualname__}"


def brief(error: BaseException) -> str:
    """The first line of ``error``; without torch's own advice, which is to let the file run code."""
    text = str(error).rpartition("WeightsUnpickler error:")[2].strip()
    line = "" if not text or "weights_only" in text.splitlines()[0] else f": {shown(text.splitlines()[0])[:200]}"
    return f"{type(error).__name__}{line}"
