"""
Import everything once, then fork for every Python command: a short run mostly imports.

A child has its own arguments, environment variables, standard streams and exit status.
"""

import atexit
import gc
import json
import os
import runpy
import signal
import site
import socket
import sys
import threading
import types
import weakref

sys.path[0] = os.getcwd()
import matplotlib.figure  # noqa: E402, F401
import torch._dynamo  # noqa: E402
import torch.distributed.launcher.api  # noqa: E402, F401
import tqdm  # noqa: E402, F401

import lib.checkpoint  # noqa: E402, F401
import lib.corpus  # noqa: E402, F401
import lib.dataset  # noqa: E402, F401
import lib.decoding  # noqa: E402, F401
import lib.distributed  # noqa: E402, F401
import lib.machine  # noqa: E402, F401
import lib.optim  # noqa: E402, F401
import lib.runlog  # noqa: E402, F401


def execute(command: list[str]) -> None:
    """Do what `python *command` does with -c CODE, -m MODULE or a script."""
    if command[0] == "-c":
        sys.argv, sys.path[0] = ["-c", *command[2:]], os.getcwd()
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(command[1], vars(sys.modules["__main__"]))
    elif command[0] == "-m":
        sys.argv, sys.path[0] = command[1:], os.getcwd()
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = command, os.path.dirname(os.path.abspath(command[0]))
        runpy.run_path(command[0], run_name="__main__")


def child(command: list[str], env: dict[str, str], streams: list[int]) -> int:
    """Run a command in this process and return its exit status."""
    signal.alarm(300)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin = open(0)
    # a new one: the old one remembers whether its file was seekable
    sys.stdout = open(1, "w", encoding=sys.stdout.encoding, closefd=False)
    os.environ.update(env)
    if "PYTHONPATH" in env:
        sys.path[1:1] = env["PYTHONPATH"].split(os.pathsep)
        sys.modules.pop("sitecustomize", None)
        site.execsitecustomize()
    status = 0
    try:
        execute(command)
    except SystemExit as error:
        status = error.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    threading._shutdown()  # what an interpreter does at its end, before the others
    atexit._run_exitfuncs()
    sys.stdout.flush(), sys.stderr.flush()
    return status


def main() -> None:
    """
    Answer requests until the socket is closed.

    {command, env} with three streams: the id of the process that was started. {wait, options}: the
    exit status of that process.
    """
    requests = socket.socket(fileno=int(sys.argv[1]))
    atexit.unregister(torch._dynamo.utils.dump_compile_times)
    for finalizer in weakref.finalize._registry:
        finalizer.atexit = (
            False  # PyTorch has hundreds; only what the script makes is to be finalized
        )
    gc.collect()
    gc.freeze()  # children do not copy what they share
    while True:
        message, streams, *_ = socket.recv_fds(requests, 1 << 20, 3)
        if not message:
            return
        request = json.loads(message)
        if "wait" in request:
            ended, status = os.waitpid(request["wait"], request["options"])
            answer = os.waitstatus_to_exitcode(status) if ended else None
        else:
            answer = os.fork()
            if answer == 0:
                requests.close()
                os._exit(child(request["command"], request["env"], streams))
            for stream in streams:
                os.close(stream)
        requests.send(json.dumps(answer).encode())


if __name__ == "__main__":
    main()
