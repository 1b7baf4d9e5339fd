"""
Run scripts of this project, one after another in one process, on a Windows that only pretends.

    python -X warn_default_encoding tests/pretend_windows.py COMMANDS.json

COMMANDS.json lists commands such as ["train.py", "--max_iters=2"] or ["-c", "import os"]. Prints
the exit status, standard output and errors of each as JSON.

For the files of this project: modules and functions that Windows does not have are missing,
sys.platform is win32, and open() must be told an encoding. For all files: output is in code page
1252, a file that is open or mapped can neither be replaced nor removed, and a file must be open for
writing to be synced. It does not see drive letters, a real console, compilers, the real file
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
import struct
import sys
import traceback
import types
import warnings
from pathlib import Path

import torch._dynamo  # noqa: F401  so that it sees the real modules

HERE = Path(__file__).parent.parent
REFUSED = {"crypt", "curses", "fcntl", "grp", "posix", "pty", "pwd", "readline", "resource",
           "syslog", "termios", "tty"}
MISSING = {
    "os": """O_CLOEXEC O_DIRECTORY O_NOFOLLOW O_NONBLOCK WNOHANG chown confstr fchmod fchown
    fdatasync fork forkpty getegid geteuid getgid getgroups getloadavg getpgid getuid killpg mkfifo
    nice openpty posix_fadvise posix_fallocate pread preadv pwrite sched_getaffinity
    sched_setaffinity sendfile setsid statvfs sync sysconf uname wait waitid""",
    "signal": """SIGALRM SIGCHLD SIGCONT SIGHUP SIGKILL SIGPIPE SIGQUIT SIGSTOP SIGTSTP SIGUSR1
    SIGUSR2 alarm pause pthread_kill pthread_sigmask setitimer siginterrupt sigwait""",
    "socket": "AF_UNIX recv_fds send_fds",
}


class StandIn(types.ModuleType):
    """A module with some names missing or replaced."""

    def __init__(self, name: str, missing: str = "", **replaced: object):
        super().__init__(name)
        self.real, self.missing = sys.modules.get(name), missing.split()
        vars(self).update(replaced)

    def __getattr__(self, name: str) -> object:
        if name in self.missing:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r} on Windows")
        return getattr(self.real, name)


def get_context(method: str = "spawn"):
    if method != "spawn":
        raise ValueError(f"cannot find context for {method!r}")


def locking(file: int, mode: int, size: int) -> None:
    """Lock the next bytes for this open file, or raise PermissionError, as msvcrt does."""
    start = os.lseek(file, 0, os.SEEK_CUR)
    try:
        fcntl.fcntl(file, fcntl.F_OFD_SETLK,
                    struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, start, size, 0))
    except OSError:
        raise PermissionError(errno.EACCES, "Permission denied") from None


STAND_INS = {name: StandIn(name, missing) for name, missing in MISSING.items()} | {
    "sys": StandIn("sys", platform="win32"),
    "time": StandIn("time", sleep=lambda seconds: None),
    "multiprocessing": StandIn("multiprocessing", get_context=get_context,
                               get_all_start_methods=lambda: ["spawn"]),
    "msvcrt": StandIn("msvcrt", LK_NBLCK=2, locking=locking),
}


def pretend_import(name: str, globals: dict | None = None, *args: object,
                   **options: object) -> types.ModuleType:
    """Import a module as Windows would for a file of this project."""
    file = Path((globals or {}).get("__file__") or "/")
    if file.is_relative_to(HERE) and not file.is_relative_to(sys.prefix):
        if name in REFUSED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        if name in STAND_INS:
            return STAND_INS[name]
    return real_import(name, globals, *args, **options)


def is_in_use(path: str | os.PathLike) -> bool:
    """Return whether this process has a file open or mapped."""
    path = os.path.realpath(path)
    links = [f"/proc/self/fd/{n}" for n in os.listdir("/proc/self/fd")]
    mapped = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    return (path in [os.readlink(link) for link in links if os.path.islink(link)]
            or f" {path}\n" in mapped)


def refuse_files_in_use(function):
    def on_windows(*paths, **options):
        names = [path for path in paths if isinstance(path, (str, os.PathLike))]
        if not options and any(map(is_in_use, names)):
            raise PermissionError(errno.EACCES, "Access is denied", str(names[0]))
        return function(*paths, **options)

    return on_windows


def fsync(file: int) -> None:
    if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, "Bad file descriptor")
    real_fsync(file)


def run(command: list[str]) -> dict[str, object]:
    """Run a command as `python *command`; return its status and what it printed."""
    script, *sys.argv[1:] = command
    sys.argv[0], status = script, 0
    signal.signal(signal.SIGINT, signal.default_int_handler)
    output = [io.TextIOWrapper(io.BytesIO(), "cp1252", errors)
              for errors in ("strict", "backslashreplace")]
    sys.stdout, sys.stderr = output
    try:
        if script == "-c":
            exec(command[1], {"__name__": "__main__", "__file__": str(HERE / "code.py")})
        else:
            runpy.run_path(str(HERE / script), run_name="__main__")
    except SystemExit as error:
        status = error.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    finally:
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    gc.collect()  # closes what the script had open, as the end of a process does
    texts = []
    for stream in output:
        stream.flush()
        texts.append(stream.buffer.getvalue().decode("cp1252"))
    return {"command": command, "status": status, "stdout": texts[0], "stderr": texts[1]}


real_import, real_fsync = builtins.__import__, os.fsync
if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    builtins.__import__, os.fsync = pretend_import, fsync
    for name in ("remove", "rename", "replace", "unlink"):
        setattr(os, name, refuse_files_in_use(getattr(os, name)))
    warnings.filterwarnings("ignore", category=EncodingWarning)
    warnings.filterwarnings("error", category=EncodingWarning, module=r"__main__|lib\.|data\.|app|"
                                                                      "sample|model")
    commands = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    print(json.dumps([run(command) for command in commands]))
