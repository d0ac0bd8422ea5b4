"""A disk that is full, or a file system that is gone: told apart from other errors."""

import errno
import re
from pathlib import Path

from safetensors import SafetensorError

from lora_one.errors import StorageError

_OF_STORAGE = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EIO", "EROFS", "ESTALE", "ENOTCONN", "ESHUTDOWN")
}
_CODE = re.compile(r"os error (\d+)")


def as_storage_error(error: BaseException, folder: Path) -> StorageError | None:
    """Return what to raise instead if the error means that ``folder`` cannot be written.

    A file of the folder that is not there any more is one too: the run made it.
    """
    if isinstance(error, OSError):
        inside = str(error.filename or "").startswith(str(folder))
        gone = isinstance(error, FileNotFoundError | PermissionError | NotADirectoryError)
        if error.errno not in _OF_STORAGE and not (gone and inside):
            return None
    elif isinstance(error, SafetensorError):
        # safetensors says it in words only.
        code = _CODE.search(str(error))
        if code is None or int(code[1]) not in _OF_STORAGE | {errno.ENOENT}:
            return None
    else:
        return None
    return StorageError(
        f"{folder} cannot be written: {error}. Checkpoints that were complete are untouched; make "
        "room, and the same command goes on from the newest."
    )
