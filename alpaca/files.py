"""Files that are whole or not there: atomic writes, and JSON in and out."""

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from typing import IO, Any

from alpaca.cli import UserError


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "w") -> Iterator[IO]:
    """Opens a file that appears under `path` whole, when the block ends without an error, or not at all.

    The bytes go to a temporary file in the same folder, are fsynced and then renamed over `path`, so that neither a
    crash nor a full disk leaves half a file or destroys the one that was there.

    Args:
        path: the target; its folder is made where it is missing. A symbolic link is followed, not replaced, and a
            file that stands there keeps its mode; what is no file, like /dev/stdout, is written to directly.
        mode: "w" for UTF-8 text or "wb" for bytes.

    Yields:
        The open temporary file.

    Raises:
        UserError: the folder or file can't be written, or the disk is full.
    """
    direct = os.path.exists(path) and not os.path.isfile(path)  # /dev/stdout can't be renamed over
    path = os.fspath(path) if direct else os.path.realpath(path)
    temporary = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.{secrets.token_hex(4)}.tmp")
    with _refusing(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        name, mode = (path, mode) if direct else (temporary, mode.replace("w", "x"))
        file = open(name, mode, encoding=None if "b" in mode else "utf-8")  # noqa: SIM115
    try:
        with _refusing(path, only_full_disk=True), file:
            yield file
            file.flush()
            if not direct:
                os.fsync(file.fileno())
        if os.path.isfile(path):
            shutil.copymode(path, temporary)
        if not direct:
            os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def _refusing(path: str, only_full_disk: bool = False) -> Iterator[None]:
    """Says in one line that a file can't be written; a caller's own OSErrors inside the block pass."""
    try:
        yield
    except OSError as error:
        if only_full_disk and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise UserError(f"cannot write {path}: {error.strerror}; what stood there before is unchanged") from error


def lock(descriptor: int, path: str, flag: str) -> None:
    """Keeps other runs out of a file or folder until its descriptor is closed, which a killed process does too.

    Args:
        descriptor: Of the open file or folder.
        path: Its name, for the message.
        flag: The flag that names another place.

    Raises:
        UserError: Another run holds it.
    """
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another run is writing {path}; wait for it, or name another {flag}") from None
    except OSError:
        pass  # a file system without locks


def size_text(size: float) -> str:
    """Writes a number of bytes for people, such as 1.5 GiB or 12.0 MiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"


def nearest_existing(path: str) -> str:
    """Gets the deepest part of a path that is there: itself, or the nearest folder above it."""
    path = os.path.abspath(path)
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return path


def jdump(obj: Any, f: str | os.PathLike | IO, mode: str = "w", indent: int = 4, default: Callable = str) -> None:
    """Writes a dict or list as JSON, or a string as it is.

    Args:
        obj: a dict, a list or a str.
        f: a path (written atomically; with mode "a" appended to) or an open text file, which is closed afterwards.
        mode: "w" or "a".
        indent: spaces per level.
        default: what JSON does with a value that it doesn't know.

    Raises:
        ValueError: `obj` is of another type; nothing is written.
    """
    if not isinstance(obj, (dict, list, str)):
        raise ValueError(f"jdump writes a dict, list or str; got {type(obj).__name__}")
    text = obj
    if not isinstance(obj, str):
        text = json.dumps(obj, indent=indent, default=default, ensure_ascii=False)
        # Half a surrogate pair, which JSON can hold and UTF-8 can't, stays the escape as which it came.
        text = re.sub("[\ud800-\udfff]", lambda match: f"\\u{ord(match.group()):04x}", text)
    if hasattr(f, "write"):
        with f:
            f.write(text)
    elif mode == "w":
        with atomic_write(f) as file:
            file.write(text)
    else:
        with open(f, mode, encoding="utf-8") as file:
            file.write(text)


def jload(f: str | os.PathLike | IO, mode: str = "r") -> Any:
    """Reads one JSON value from a path or an open file, which is closed afterwards.

    Raises:
        UserError: the file is missing, is no UTF-8 text or no JSON; the message has file, line and column.
    """
    is_file = hasattr(f, "read")
    name = getattr(f, "name", "the open file") if is_file else f
    try:
        with f if is_file else open(f, mode, encoding="utf-8-sig") as file:
            return json.load(file)
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 text (byte {error.start}); expected JSON") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{name}, line {error.lineno}, column {error.colno}: not JSON ({error.msg})") from error
