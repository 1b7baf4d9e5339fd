"""
Run scripts of this project, one after another in one process, on a simulated Windows.

    python -X warn_default_encoding tests/fake_windows.py COMMANDS.json

COMMANDS.json lists commands such as ["train.py", "--max_iters=2"] or ["-c", "import os"]. Prints
the exit status, standard output and errors of each as JSON.

For the files of this project: modules and functions that Windows does not have are missing,
sys.platform is win32, and open() must be told an encoding. For all files: output is in code page
1252, a file that is open or mapped can neither be replaced nor removed, and a file must be open for
writing to be synced. It does not simulate drive letters, a real console, compilers, the real file
system, other processes or CUDA on Windows.
"""
import builtins
import errno
import fcntl
import gc
import io
import json
import os
import runpy
import signal
import sys
import traceback
import types
import warnings
from pathlib import Path

import torch._dynamo  # noqa: F401  before the imports are patched

HERE = Path(__file__).parent.parent
REFUSED = {"fcntl", "grp", "posix", "pty", "pwd", "readline", "resource", "termios", "tty"}


class StandIn(types.ModuleType):
    """A module of which some names are missing or replaced."""

    def __init__(self, name: str, missing: str = "", **replaced: object):
        super().__init__(name)
        self.real, self.missing = sys.modules.get(name), missing.split()
        vars(self).update(replaced)

    def __getattr__(self, name: str) -> object:
        if name in self.missing:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r} on Windows")
        return getattr(self.real, name)


def get_context(method: str = "spawn") -> None:
    raise ValueError(f"cannot find context for {method!r}")


def locking(file: int, mode: int, size: int) -> None:
    """Lock the bytes from the position of a file on, or raise PermissionError, as msvcrt does."""
    assert os.lseek(file, 0, os.SEEK_CUR) > 10**6, "other processes could not read the file"
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise PermissionError(errno.EACCES, "Permission denied") from None


STAND_INS = {module.__name__: module for module in (
    StandIn("os", """O_DIRECTORY O_NOFOLLOW WNOHANG chown fork geteuid getloadavg getuid killpg
            mkfifo nice posix_fadvise pread pwrite sched_getaffinity sendfile setsid statvfs sysconf
            uname wait"""),
    StandIn("signal", """SIGALRM SIGCHLD SIGHUP SIGKILL SIGPIPE SIGQUIT SIGSTOP SIGUSR1 SIGUSR2
            alarm pause pthread_kill setitimer sigwait"""),
    StandIn("sys", platform="win32"),
    StandIn("time", sleep=lambda seconds: None),  # nothing here waits for another process
    StandIn("multiprocessing", get_context=get_context, get_all_start_methods=lambda: ["spawn"]),
    StandIn("msvcrt", LK_NBLCK=2, locking=locking))}


def fake_import(name: str, globals: dict | None = None, *args: object,
                   **options: object) -> types.ModuleType:
    """Import a module as Windows does for a file of this project."""
    file = Path((globals or {}).get("__file__") or "/")
    if file.is_relative_to(HERE) and not file.is_relative_to(sys.prefix):
        if name in REFUSED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        if name in STAND_INS:
            return STAND_INS[name]
    return real_import(name, globals, *args, **options)


def is_in_use(path: str) -> bool:
    """Return whether this process has a file open or mapped."""
    opened = {os.path.realpath(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")}
    mapped = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    return os.path.realpath(path) in opened or f" {os.path.realpath(path)}\n" in mapped


def refuse_files_in_use(function):
    def checked(*paths: str | os.PathLike, **options: object) -> None:
        if not options and any(map(is_in_use, paths)):  # options: paths relative to a folder
            raise PermissionError(errno.EACCES, "Access is denied", os.fspath(paths[0]))
        function(*paths, **options)

    return checked


def fsync(file: int) -> None:
    if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, "Bad file descriptor")
    real_fsync(file)


def run(command: list[str]) -> dict[str, object]:
    """Do what `python *command` does; return the exit status and what it printed."""
    gc.freeze()  # so that only what the script makes is collected below
    sys.argv[:], status = command, 0
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout = stdout = io.TextIOWrapper(io.BytesIO(), "cp1252", "strict")
    sys.stderr = stderr = io.TextIOWrapper(io.BytesIO(), "cp1252", "backslashreplace")
    try:
        if command[0] == "-c":
            exec(command[1], {"__name__": "__main__", "__file__": str(HERE / "code.py")})
        else:
            runpy.run_path(command[0], run_name="__main__")
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    stdout.flush(), stderr.flush()
    gc.collect()  # closes what the script has left open, as the end of a process does
    return dict(status=status, stdout=stdout.buffer.getvalue().decode("cp1252"),
                stderr=stderr.buffer.getvalue().decode("cp1252"))


real_import, real_fsync = builtins.__import__, os.fsync
if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    commands = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    builtins.__import__, os.fsync = fake_import, fsync
    for name in ("remove", "rename", "replace", "unlink"):
        setattr(os, name, refuse_files_in_use(getattr(os, name)))
    warnings.filterwarnings("ignore", category=EncodingWarning)
    ours = r"__main__$|lib\.|data\.|model$|sample$"
    warnings.filterwarnings("error", category=EncodingWarning, module=ours)
    print(json.dumps([run(command) for command in commands]))
