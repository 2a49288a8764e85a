"""Reading and writing files: atomic writes, locks, and JSON in and out."""

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any

from alpaca.cli import UserError

# Half of a surrogate pair, such as "\ud83d" without the "\ude00" that would make it an emoji. JSON and a command line
# can hold one, UTF-8 cannot.
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
# JSON may be nested no deeper. Python gives up near 1,000 levels, but sooner where the stack is full already, and some
# of what reads well can't be printed or written again.
MAX_JSON_DEPTH = 100


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "w") -> Iterator[IO]:
    """Opens a file for writing that replaces `path` only if the block ends without an error.

    The bytes go to a temporary file in the same folder, are fsynced, and are then renamed over `path`. A crash or a
    full disk therefore leaves the old file, or none, but never half a file.

    Args:
        path: The file to write. A missing folder is created. A symbolic link is followed rather than replaced, and an
            existing file keeps its mode. Anything but a regular file, such as /dev/stdout, is written directly.
        mode: "w" for UTF-8 text or "wb" for bytes.

    Yields:
        The open temporary file.

    Raises:
        UserError: The folder or the file can't be written, or the disk is full.
    """
    direct = os.path.exists(path) and not os.path.isfile(path)  # renaming over /dev/stdout would replace it
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
    """Turns a failed write into a one-line error; `only_full_disk` lets the caller's other OSErrors pass."""
    try:
        yield
    except OSError as error:
        if only_full_disk and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise UserError(f"cannot write {path}: {error.strerror}; any file already there is unchanged") from error


def lock(descriptor: int, path: str, flag: str) -> None:
    """Keeps other runs out of a file or folder until its descriptor is closed, as it also is when a process is killed.

    Args:
        descriptor: The open file or folder.
        path: Its path, for the message.
        flag: The flag with which the user can name another path, for the message.

    Raises:
        UserError: Another run holds the lock.
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
        pass  # this file system has no locks


def size_text(size: float) -> str:
    """Formats a number of bytes for people: 1.5 GiB, 12.0 MiB, 3.2 KiB, 7 bytes."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit / 10:
            return f"{size / unit:.1f} {name}"
    return f"{size:.0f} bytes"


def nearest_existing(path: str) -> str:
    """Returns the deepest part of a path that exists: the path itself or its nearest existing parent."""
    path = os.path.abspath(path)
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return path


class OwnFiles:
    """The files of a folder that a script may replace, because it can prove that it wrote them.

    The proof is `.written.json`: file name -> the sha256 of every content that is the script's own. It is written
    before the files are, with what is there and what will be there, so it holds whenever a crash comes. A file that
    somebody else made or edited is in no proof.
    """

    def __init__(self, folder: str) -> None:
        """Reads the proof, if there is one.

        Raises:
            UserError: It is damaged.
        """
        self.folder, self._path = folder, os.path.join(folder, ".written.json")
        self._proof = jload(self._path) if os.path.exists(self._path) else {}
        if not isinstance(self._proof, dict) or not all(isinstance(own, list) for own in self._proof.values()):
            raise UserError(f"{self._path} is not a list of hashes by file name; remove it")

    def foreign(self, names: Iterable[str]) -> list[str]:
        """Returns those of the files that exist and can't be proven to be the script's own."""
        return [name for name in names if (found := self._hash(name)) and found not in self._proof.get(name, [])]

    def adopt(self, name: str) -> None:
        """Makes a file the script's own that was proven in another way, or whose content is safe elsewhere."""
        self._note({name: [self._hash(name)]})

    def replace(self, texts: dict[str, str]) -> None:
        """Writes files, each atomically.

        Args:
            texts: File name -> the new content.

        Raises:
            UserError: A file there is somebody else's. Nothing is written.
        """
        self.refuse(self.foreign(texts))
        new = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
        self._note({name: [*filter(None, [self._hash(name)]), new[name]] for name in texts})
        for name, text in texts.items():
            with atomic_write(os.path.join(self.folder, name), "wb") as file:
                file.write(text.encode())

    def refuse(self, foreign: list[str]) -> None:
        """Raises UserError if there are any such files."""
        if foreign:
            path = os.path.join(self.folder, foreign[0])
            raise UserError(f"{path} is not as this script wrote it; move it away, or name another --output_dir")

    def _note(self, hashes: dict[str, list[str]]) -> None:
        self._proof.update(hashes)
        jdump(self._proof, self._path)

    def _hash(self, name: str) -> str | None:
        try:
            with open(os.path.join(self.folder, name), "rb") as file:
                return hashlib.sha256(file.read()).hexdigest()
        except FileNotFoundError:
            return None


def jdump(obj: Any, f: str | os.PathLike | IO, mode: str = "w", indent: int = 4, default: Callable = str) -> None:
    """Writes a dict or list as JSON, or a string as it is.

    Args:
        obj: A dict, a list or a str.
        f: A path or an open text file, which is closed afterwards. A path is written atomically, or appended to with
            mode "a".
        mode: "w" or "a".
        indent: Spaces per level.
        default: Converts values that JSON has no type for.

    Raises:
        ValueError: `obj` has another type. Nothing is written.
    """
    if not isinstance(obj, (dict, list, str)):
        raise ValueError(f"jdump writes a dict, list or str; got {type(obj).__name__}")
    text = obj if isinstance(obj, str) else json_text(obj, indent, default)
    if hasattr(f, "write"):
        with f:
            f.write(text)
    elif mode == "w":
        with atomic_write(f) as file:
            file.write(text)
    else:
        with open(f, mode, encoding="utf-8") as file:
            file.write(text)


def json_text(obj: Any, indent: int | None = 4, default: Callable = str) -> str:
    """Returns an object as JSON that can be written as UTF-8; see `jdump` for the arguments."""
    text = json.dumps(obj, indent=indent, default=default, ensure_ascii=False)
    # A lone surrogate can't be encoded as UTF-8, so it stays an escape, as it was in the JSON it came from.
    return LONE_SURROGATE.sub(lambda match: f"\\u{ord(match.group()):04x}", text)


def jload(f: str | os.PathLike | IO, mode: str = "r") -> Any:
    """Reads one JSON value from a path or an open file, which is closed afterwards.

    Raises:
        UserError: The file is missing, or `parse_json` refuses its text. The message names file, line and column.
    """
    name = getattr(f, "name", "the open file") if hasattr(f, "read") else f
    return parse_json(read_text(f, mode), name)


def read_text(f: str | os.PathLike | IO, mode: str = "r") -> str:
    """Reads the whole text of a path or an open file, without the byte order mark that Windows editors put first.

    Raises:
        UserError: The file can't be read or is not UTF-8.
    """
    is_file = hasattr(f, "read")
    name = getattr(f, "name", "the open file") if is_file else f
    try:
        with f if is_file else open(f, mode, encoding="utf-8-sig") as file:
            text = file.read()
            return text if isinstance(text, str) else text.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error


def parse_json(text: str | bytes, name: str | os.PathLike, first_line: int = 1, *, unique_keys: bool = False) -> Any:
    """Parses one JSON value. Everything that reads JSON from outside calls this.

    Like Python's reader and writer it takes NaN and Infinity, which a trainer's state may hold.

    Args:
        text: The value. Bytes are UTF-8.
        name: The file it comes from, for the message.
        first_line: The line of the file that the text starts on.
        unique_keys: Whether to refuse an object that has a key twice; otherwise the last one counts.

    Raises:
        UserError: The text is not UTF-8 or not JSON, is nested too deeply, or has an integer of more digits than Python
            reads. The message names file, line and, where it is known, column.
    """
    try:
        text = text.decode() if isinstance(text, bytes) else text
        value = json.loads(text, object_pairs_hook=_unique if unique_keys else None)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise UserError(f"{name}, line {line}, column {error.colno}: not JSON ({error.msg})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{name}, line {first_line}: not UTF-8 text (byte {error.start})") from error
    except _DuplicateKey as error:
        raise UserError(f"{name}, {_lines(text, first_line)}: the key {error} is there twice") from error
    except ValueError as error:  # from int()
        limit = sys.get_int_max_str_digits()
        raise UserError(f"{name}, {_lines(text, first_line)}: an integer of more than {limit:,} digits") from error
    except RecursionError as error:
        raise _too_deep(text, name, first_line) from error
    if _is_deeper(value, MAX_JSON_DEPTH):
        raise _too_deep(text, name, first_line)
    return value


class _DuplicateKey(Exception):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _DuplicateKey(f"{next(key for key in keys if keys.count(key) > 1)!r:.60}")
    return found


def _too_deep(text: str, name: str | os.PathLike, first_line: int) -> UserError:
    return UserError(f"{name}, {_lines(text, first_line)}: JSON nested more than {MAX_JSON_DEPTH} levels deep")


def _lines(text: str, first: int) -> str:
    last = first + text.strip().count("\n")
    return f"line {first}" if first == last else f"lines {first} to {last}"


def _is_deeper(value: Any, depth: int) -> bool:
    """True if lists and objects are nested more than `depth` deep. `[[1], {"a": 2}]` has depth 2."""
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(depth):
        children = (item.values() if isinstance(item, dict) else item for item in level)
        level = [child for items in children for child in items if isinstance(child, (dict, list))]
    return bool(level)
