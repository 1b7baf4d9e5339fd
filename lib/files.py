"""
Files that are never half written, the paths of results, and the lock on a run.

A folder may come from a stranger: nothing is written through a symbolic link, and only
regular files of a sensible size are read.
"""
import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

LARGEST = 100_000_000  # bytes of a file that is read as a whole


def check_regular(path: Path, largest: float = math.inf) -> None:
    """Raise ValueError for a device or a pipe, which may never end, and for a larger file."""
    size = path.stat().st_size
    if not path.is_file():
        raise ValueError(f"{path} is not a regular file")
    if size > largest:
        raise ValueError(f"{path} has {size:,} bytes; at most {largest:,} can be read")


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """Return the text of a regular file of at most LARGEST bytes."""
    check_regular(path, LARGEST)
    return path.read_text(encoding=encoding)


def load_json(path: Path) -> object:
    """Return the value in a JSON file. Raise ValueError if it is damaged."""
    try:
        return json.loads(read_text(path))
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None


def is_number(value: object) -> bool:
    """Return whether a value of a file is a float, or an integer that a float holds exactly."""
    return isinstance(value, float) or isinstance(value, int) and abs(value) <= 2**53


def open_new(path: Path, mode: str = "w") -> IO:
    """Create a file to write, never through a symbolic link: an old file or link is removed."""
    path.unlink(missing_ok=True)
    # O_CREAT and O_EXCL, which also fail on a link
    return open(path, mode.replace("w", "x"), encoding=None if "b" in mode else "utf-8")


def open_to_append(path: Path, mode: str, **options) -> IO:
    """Open a file to append to or to lock. Raise ValueError if it is a symbolic link."""
    if path.is_symlink():
        raise ValueError(f"{path} is a symbolic link, which is not followed: remove it")
    no_follow = getattr(os, "O_NOFOLLOW", 0)  # not on Windows
    return open(path, mode, opener=lambda name, flags: os.open(name, flags | no_follow, 0o666),
                **options)


@contextlib.contextmanager
def open_synced(path: Path, mode: str = "w") -> Iterator[IO]:
    """Open a file to write, and sync it to the disk at the end. Remove it after an error."""
    try:
        with open_new(path, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def replace_atomically(path: Path, mode: str = "w", retries: int = 100) -> Iterator[IO]:
    """Open a temporary file to write; when it is complete and synced, rename it to path."""
    temporary = path.with_name(path.name + ".tmp")
    with open_synced(temporary, mode) as file:
        yield file
    replace_file(temporary, path, retries)


def replace_file(source: Path, target: Path, retries: int = 100) -> None:
    """
    Rename a file, replacing an existing one.

    On Windows this fails while another program has either file open. A virus scanner or sample.py
    closes it soon, so this tries again every 0.2 seconds.
    """
    if sys.platform != "win32":
        return os.replace(source, target)
    for _ in range(retries):
        with contextlib.suppress(PermissionError):
            return os.replace(source, target)
        time.sleep(0.2)
    raise PermissionError(f"{target} cannot be replaced: close the programs that use it, then try "
                          "again")


def write_atomically(path: Path, text: str) -> None:
    with replace_atomically(path) as file:
        file.write(text)


def results_file(model: str | Path, checkpoint: Path, name: str) -> Path:
    """
    Return where eval.py writes `name` for a model: in the folder of its run.

    checkpoint: what was loaded, a file or a Hugging Face folder. Results of a single checkpoint
    file get its name as a prefix, so that they do not replace those of the run:
    step_001000_metrics_summary.json.
    """
    if Path(model).is_file():
        return checkpoint.with_name(f"{checkpoint.stem}_{name}")
    return (checkpoint if checkpoint.is_dir() else checkpoint.parent) / name


def sync_file(path: Path) -> None:
    """Wait until the content of a file that a library wrote is on the disk."""
    with open(path, "r+b") as file:  # Windows syncs only files that are open for writing
        os.fsync(file.fileno())


def lock_run(out_dir: str | Path) -> IO[bytes]:
    """
    Create out_dir and hold the lock on it until this process ends. Return the open lock file.

    The system releases the lock however the process ends, so no lock is ever stale. The file holds
    the process id for the message to other processes. Raises ValueError where one holds the lock.
    """
    os.makedirs(out_dir, exist_ok=True)
    file = open_to_append(Path(out_dir) / "lock", "ab+", buffering=0)
    try:
        lock_file(file)
    except (BlockingIOError, PermissionError):  # Linux and macOS; Windows
        file.seek(0)
        raise ValueError(f"process {file.read().decode() or '?'} is training in {out_dir}: wait "
                         "for it or stop it, or choose another --out_dir") from None
    file.truncate(0)
    file.write(str(os.getpid()).encode())
    return file


def lock_file(file: IO[bytes]) -> None:
    """Lock an open file without waiting. Raise OSError if another process has locked it."""
    if sys.platform != "win32":
        import fcntl
        return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    import msvcrt
    file.seek(1 << 30)  # no other process can read a locked byte, so lock one far beyond the end
    msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
