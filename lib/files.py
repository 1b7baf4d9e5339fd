"""
Files that are never half written, the place of results, and the lock on a run.
"""
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def open_synced(path: Path, mode: str = "w") -> Iterator[IO]:
    """Open a file to write; at the end its content is on the disk. Remove it after an error."""
    try:
        with open(path, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def replace_atomically(path: Path, mode: str = "w") -> Iterator[IO]:
    """Open a file to write that gets its name only when it is complete and on the disk."""
    temporary = path.with_name(path.name + ".tmp")
    with open_synced(temporary, mode) as file:
        yield file
    os.replace(temporary, path)


def write_atomically(path: Path, text: str) -> None:
    with replace_atomically(path) as file:
        file.write(text)


def results_file(model: str, checkpoint: Path, name: str) -> Path:
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
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def lock_run(out_dir: str | Path) -> IO:
    """
    Create out_dir and hold the lock on it until this process ends. Return the open lock file.

    The kernel releases the lock however the process ends, so no lock is ever stale. The file holds
    the process id for the message to other processes. Raises ValueError where one holds the lock.
    """
    os.makedirs(out_dir, exist_ok=True)
    file = open(Path(out_dir) / "lock", "a+")
    with contextlib.suppress(ImportError):  # Windows has no flock, so there is no lock
        import fcntl
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(f"process {file.read().strip() or '?'} is training in {out_dir}: wait "
                             "for it or stop it, or choose another --out_dir") from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file
