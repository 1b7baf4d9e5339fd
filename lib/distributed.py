"""
Ranks: starting them, agreement between them, and a signal to stop.

torchrun starts one process per rank. Without it there is one rank, and nothing here communicates.
"""
import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from lib.configurator import fail


@dataclass(frozen=True)
class Ranks:
    """The rank of this process, its rank on its machine, and the number of ranks."""
    rank: int
    local_rank: int
    world_size: int
    distributed: bool  # whether torchrun started the processes, even if only one

    @classmethod
    def from_environment(cls) -> "Ranks":
        """Read the variables that torchrun sets."""
        env = os.environ
        return cls(int(env.get("RANK", 0)), int(env.get("LOCAL_RANK", 0)),
                   int(env.get("WORLD_SIZE", 1)), "RANK" in env)

    @property
    def master(self) -> bool:
        """Whether this process prints, logs and saves."""
        return self.rank == 0

    def start(self, device: str, backend: str = "auto") -> None:
        """
        Connect the ranks.

        backend 'auto': nccl on CUDA, gloo elsewhere. A failure ends the process with one line.
        """
        if not self.distributed:
            return
        if backend == "auto":
            backend = "nccl" if device.startswith("cuda") else "gloo"
        try:
            store, _, _ = next(dist.rendezvous("env://"))
            if os.environ.get("GROUP_WORLD_SIZE") == "1":
                # torchrun keeps the store when it restarts the ranks of one machine, and a rank
                # that reads the address of a dead one hangs: each attempt has names of its own
                attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
                store = dist.PrefixStore(f"attempt {attempt}", store)
            dist.init_process_group(backend, store=store, rank=self.rank,
                                    world_size=self.world_size, timeout=timedelta(minutes=10))
        except (RuntimeError, ValueError, AssertionError) as error:
            fail(f"backend {backend!r} does not work here: {error}")

    def wrap(self, model: torch.nn.Module) -> torch.nn.Module:
        """Return the model in DDP, which averages gradients over the ranks, if there are ranks."""
        if not self.distributed:
            return model
        wrapped = DistributedDataParallel(model)
        wrapped.broadcast_buffers = False  # all ranks have the same ones, which never change
        return wrapped

    def stop(self) -> None:
        """Disconnect the ranks."""
        if self.distributed:
            dist.destroy_process_group()

    def gather(self, value: object) -> list:
        """Return the values of all ranks, in their order."""
        if not self.distributed:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def sum(self, values: list[float], device: str) -> list[float]:
        """Return the sums over all ranks of a list of numbers."""
        if not self.distributed:
            return values
        dtype = torch.float32 if device.startswith("mps") else torch.float64  # MPS has no float64
        sums = torch.tensor(values, dtype=dtype, device=device)
        dist.all_reduce(sums)
        return sums.tolist()

    def check_same(self, values: dict[str, object]) -> None:
        """End all ranks with one error line if a value differs between ranks. Keys name them."""
        first, *others = self.gather(values)
        for number, other in enumerate(others, 1):
            for name, value in first.items():
                if other[name] != value:
                    fail(f"{name} differs: {value!r} on rank 0, {other[name]!r} on rank {number}; "
                         "give all ranks the same")

    @contextlib.contextmanager
    def user_errors(self) -> Iterator[None]:
        """Like configurator.user_errors, but an error on any rank ends all ranks."""
        error = ""
        try:
            yield
        except (ValueError, OSError) as exception:
            error = str(exception) or type(exception).__name__
        for number, message in enumerate(self.gather(error)):
            if message:
                fail(f"rank {number}: {message}" if number else message)


class StopSignal:
    """
    SIGINT and SIGTERM as a request to finish the step or stop the evaluation, save and exit.

    `requested` tells whether one has arrived. A second SIGINT exits at once, except under torchrun,
    which repeats the terminal's signal to its ranks.
    """

    def __init__(self, ranks: Ranks):
        self.ranks, self.requested = ranks, False
        signal.signal(signal.SIGINT, self.receive)
        signal.signal(signal.SIGTERM, self.receive)

    def receive(self, signum: int, frame: object) -> None:
        if self.requested and signum == signal.SIGINT and not self.ranks.distributed:
            os._exit(130)
        message = b"\nstopping and saving; Ctrl-C again exits at once, without saving\n"
        if self.ranks.distributed:
            message = b"\nstopping at the next log line, then saving\n"
        if not self.requested and self.ranks.master:
            os.write(2, message)  # not print, which the signal may have interrupted
        self.requested = True
