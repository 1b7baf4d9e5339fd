"""
Accidents: whatever happens to a run, it resumes to the same weights, log and best checkpoint.

    python tests/test_crash.py --kills=100 --rank_kills=10 --inputs=800

kills and stops runs and ranks at random instants, gives ranks different settings, feeds damaged
files and settings, planted links, bombs and crafted sizes to the scripts, and prints a table. The
suite does the same with fewer.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent.parent))  # for `python tests/test_crash.py`

from helpers import (
    HERE,
    SCRIPTS,
    TINY,
    Forked,
    assert_same,
    damage_by,
    read_log,
    run,
    run_ranks,
    start,
    step_of,
    train,
    train_on_ranks,
)
from lib.checkpoint import find_resumable, read_checkpoint, step_file
from lib.configurator import read_settings
from lib.runlog import RunLog, draw_losses

LONGER = ["--max_iters=40", "--lr_decay_iters=40", "--eval_interval=4", "--init_from=auto",
          "--keep_every=6"]

# runs a script, kills it at the n-th call of a file operation, in torch.save after half the bytes
KILL_AT = """
import io, os, runpy, signal, sys, torch
operation, n = sys.argv[1], int(sys.argv[2])
sys.argv = sys.argv[3:]
sys.path.insert(0, os.getcwd())
module = torch if operation == "save" else os
real, calls = getattr(module, operation), 0
def counted(*args, **kwargs):
    global calls
    calls += 1
    if calls == n:
        if operation == "save":
            whole = io.BytesIO()
            real(args[0], whole)
            args[1].write(whole.getvalue()[:whole.tell() // 2])
            args[1].flush()
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
setattr(module, operation, counted)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


# bad steps lead this run back to its last evaluation several times before it recovers
EXPLODING = ["--learning_rate=1e3", "--grad_clip=0", "--max_bad_steps=2", "--warmup_iters=12",
             "--eval_interval=10", "--decay_lr=False"]

# runs a script that sends itself SIGTERM at the n-th batch of its evaluations
STOP_AT_BATCH = """
import atexit, os, runpy, signal, sys, torch
n = int(sys.argv[1])
sys.argv = sys.argv[2:]
sys.path.insert(0, os.getcwd())
real, calls = torch.nn.functional.cross_entropy, 0
def counted(*args, **kwargs):
    global calls
    if not torch.is_grad_enabled():
        calls += 1
        if calls == n:
            os.kill(os.getpid(), signal.SIGTERM)
    return real(*args, **kwargs)
torch.nn.functional.cross_entropy = counted
atexit.register(lambda: print("evaluated batches:", calls))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def command(data: Path, out_dir: Path, *args: str, ranks: int = 0) -> list[str]:
    launcher = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={ranks}",
        "--max-restarts=3",
    ]
    return [
        *(launcher if ranks else []),
        "train.py",
        f"--dataset={data}",
        f"--out_dir={out_dir}",
        *TINY,
        *LONGER,
        *args,
    ]


def start_program(command: list[str], **how) -> subprocess.Popen:
    return subprocess.Popen(
        command, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **how
    )


def outcome(out_dir: Path) -> tuple:
    """All that a run leaves behind, but for what depends on the clock and on its parts."""
    kept = []
    for name in ("last.pt", "best.pt", *(step_file(step) for step in range(6, 41, 6))):
        checkpoint = read_checkpoint(out_dir / name)
        checkpoint.pop("seconds", None)
        kept.append(
            checkpoint
            | {"config": {k: v for k, v in checkpoint["config"].items()
                          if k not in ("out_dir", "max_iters")}}
        )
    return kept, read_log(out_dir)


def assert_same_outcome(a: Path, b: Path) -> None:
    assert_same(outcome(a), outcome(b))


def train_through_kills(data: Path, out_dir: Path, kills: int, rng: random.Random) -> list[str]:
    """Kill and resume a run `kills` times at random instants. Return what each kill hit."""
    hit = []
    while True:
        process = start(*command(data, out_dir))
        for line in process.stdout:  # imports are not worth killing: wait until it trains
            if line.startswith(("resuming", "eval  0/")):
                break
        if len(hit) < kills:
            time.sleep(rng.uniform(0, 1.0))
            process.kill()
        rest = process.stdout.read()
        if process.wait() == 0:
            if len(hit) >= kills:
                return hit
            shutil.rmtree(out_dir)  # it was over before the kill: begin again
        elif process.returncode == -signal.SIGKILL:
            hit.append(
                "inside a write"
                if any(out_dir.glob("*.tmp"))
                else "between two steps"
                if rest
                else "while starting"
            )
        else:
            raise AssertionError(rest)


def train_through_stops(data: Path, out_dir: Path, stops: int, rng: random.Random,
                        *args: str) -> int:
    """Stop a run with SIGTERM at `stops` random steps and resume it. Return the stops that hit."""
    hit = 0
    while True:
        process = start(*command(data, out_dir, *args))
        until = rng.randint(1, 12) if hit < stops else -1
        for line in process.stdout:
            until -= step_of(line) >= 0
            if until == 0:
                process.send_signal(signal.SIGTERM)
                break
        rest = process.stdout.read()
        assert process.wait() == 0, rest
        if "stopped at step" not in rest:
            return hit
        hit += 1


def train_through_stop_in_evaluation(data: Path, out_dir: Path, batch: int) -> str:
    """Stop a run at a batch of its evaluations, then finish it. Return what it says."""
    stopped = run("-c", STOP_AT_BATCH, str(batch), *command(data, out_dir))
    assert stopped.returncode == 0 and "stopped at step" in stopped.stdout, stopped.stdout
    assert f"evaluated batches: {batch}\n" in stopped.stdout  # it skips the rest
    train(data, out_dir, *LONGER)
    return stopped.stdout


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, fables_data) -> Path:
    out_dir = tmp_path_factory.mktemp("undisturbed") / "out"
    train(fables_data, out_dir, *LONGER)
    return out_dir


def test_kills_at_random_instants_change_nothing(tmp_path, fables_data, undisturbed):
    train_through_kills(fables_data, tmp_path / "out", 5, random.Random(1))
    assert_same_outcome(undisturbed, tmp_path / "out")


@pytest.mark.parametrize(
    "operation, n, files",
    [  # all in the saving of step 4, the second one
        ("save", 4, {"last.pt", "last.pt.tmp"}),
        ("fsync", 6, {"last.pt", "last.pt.tmp"}),
        ("replace", 5, {"last.pt", "best.pt.tmp"}),
        ("replace", 6, {"last.pt", "last.pt.tmp"}),
        ("replace", 7, {"prev.pt", "last.pt.tmp"}),  # for this instant there is no last.pt
    ],
)
def test_a_kill_inside_a_write_changes_nothing(
    tmp_path, fables_data, undisturbed, operation, n, files
):
    killed = start("-c", KILL_AT, operation, str(n), *command(fables_data, tmp_path / "out"))
    output = killed.communicate()[0]
    assert killed.returncode == -signal.SIGKILL, output
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == files | {"best.pt", "loss.png", "log.jsonl", "lock"}
    train(fables_data, tmp_path / "out", *LONGER)
    assert_same_outcome(undisturbed, tmp_path / "out")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_polite_signal_finishes_the_step_and_saves(tmp_path, fables_data, undisturbed, number):
    process = start(*command(fables_data, tmp_path / "out"))
    for line in process.stdout:
        if step_of(line) == 7:
            process.send_signal(number)
            break
    output = process.stdout.read()
    assert process.wait() == 0 and "--init_from=resume" in output and "Traceback" not in output
    assert 7 <= read_checkpoint(tmp_path / "out/stop.pt")["step"] < 40
    train(fables_data, tmp_path / "out", *LONGER)
    assert_same_outcome(undisturbed, tmp_path / "out")
    assert not (tmp_path / "out/stop.pt").exists()


def test_a_stop_is_no_checkpoint_to_return_to(tmp_path, fables_data):
    """Bad steps lead back to the last evaluation, wherever the run was stopped in between."""
    train(fables_data, tmp_path / "whole", *LONGER, *EXPLODING)
    hit = train_through_stops(fables_data, tmp_path / "out", 4, random.Random(1), *EXPLODING)
    assert hit == 4
    assert_same_outcome(tmp_path / "whole", tmp_path / "out")


@pytest.mark.parametrize("batch", [1, 4, 5, 7])
def test_a_stop_during_an_evaluation_skips_the_rest(tmp_path, fables_data, undisturbed, batch):
    """In the first evaluation, at its last batch, in the second one. A resume repeats it."""
    output = train_through_stop_in_evaluation(fables_data, tmp_path / "out", batch)
    assert f"stopped at step {0 if batch <= 4 else 4}, saved in" in output
    assert_same_outcome(undisturbed, tmp_path / "out")


def test_a_stopped_run_has_a_model_to_sample(tmp_path, fables_data):
    run("-c", STOP_AT_BATCH, "1", *command(fables_data, tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out").glob("*.pt")] == ["stop.pt"]
    done = run("sample.py", f"--out_dir={tmp_path}/out", "--num_samples=1", "--max_new_tokens=3")
    assert done.returncode == 0, done.stderr


def test_a_second_interrupt_leaves_at_once(tmp_path, fables_data):
    process = start(
        *command(
            fables_data,
            tmp_path / "out",
            "--max_iters=100000",
            "--eval_interval=100000",
            "--n_layer=8",
        )
    )
    for line in process.stdout:
        if step_of(line) == 2:
            process.send_signal(
                signal.SIGSTOP
            )  # so that both signals are there before the step is over
            process.send_signal(signal.SIGINT)
            process.send_signal(signal.SIGCONT)
            process.send_signal(signal.SIGINT)
            break
    process.stdout.read()
    assert process.wait() in (0, 130)


def test_no_space_left_keeps_the_newest_good_checkpoint(tmp_path, fables_data, undisturbed):
    train(fables_data, tmp_path / "out", *LONGER, "--max_iters=8")
    size = (tmp_path / "out/last.pt").stat().st_size
    process = start(*command(fables_data, tmp_path / "out"))
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size // 2, size // 2))
    output = process.communicate()[0]
    assert process.returncode == 2 and "Traceback" not in output, output
    assert "last.pt could not be written (File too large)" in output and not any(
        (tmp_path / "out").glob("*.tmp")
    )
    assert find_resumable(tmp_path / "out")["step"] == 8
    train(fables_data, tmp_path / "out", *LONGER)
    assert_same_outcome(undisturbed, tmp_path / "out")


def test_no_space_left_for_a_numbered_checkpoint_keeps_the_others(tmp_path, fables_data):
    out, how = tmp_path / "out", ["--eval_interval=40", "--keep_every=2", "--log_interval=10"]
    train(fables_data, out, *LONGER, *how, "--max_iters=4")
    before = {path.name: path.read_bytes() for path in out.glob("*.pt")}
    process = start(*command(fables_data, out, *how))
    size = len(before["step_000004.pt"]) // 2
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, size))
    output = process.communicate()[0]
    assert process.returncode == 2 and "Traceback" not in output, output
    assert "step_000004.pt could not be written (File too large)" in output
    assert {path.name: path.read_bytes() for path in out.glob("*.pt*")} == before


@pytest.mark.parametrize("kind", ["truncated", "zeroed", "flipped", "missing"])
def test_a_damaged_checkpoint_costs_one_interval_and_nothing_else(
    tmp_path, fables_data, undisturbed, kind
):
    train(fables_data, tmp_path / "out", *LONGER, "--max_iters=12")
    last = tmp_path / "out/last.pt"
    if kind == "missing":
        last.unlink()
    else:
        last.write_bytes(damage_by(kind, last.read_bytes()))
    with open(tmp_path / "out/log.jsonl", "a") as file:
        file.write('{"step": 13, "lo')  # what a kill may leave
    done = train(fables_data, tmp_path / "out", *LONGER)
    assert "resuming" in done.stdout and "at step 8" in done.stdout
    assert_same_outcome(undisturbed, tmp_path / "out")


def test_two_processes_never_share_a_run(tmp_path, fables_data):
    first = start(*command(fables_data, tmp_path / "out", "--max_iters=100000"))
    for line in first.stdout:
        if step_of(line) == 3:
            break
    second = run(*command(fables_data, tmp_path / "out"))
    first.kill()
    first.communicate()
    assert second.returncode == 2 and f"process {first.pid} is training in" in second.stderr
    assert len(second.stderr.strip().splitlines()) == 1
    train(fables_data, tmp_path / "out", *LONGER, "--max_iters=4")  # the lock died with its holder


def test_a_log_that_cannot_be_written_is_one_line(tmp_path, fables_data):
    """The disk is full, or someone removed the folder."""
    process = start(*command(fables_data, tmp_path / "out"))
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (10, 10))
    errors = [line for line in process.communicate()[0].splitlines() if "error: " in line]
    assert process.returncode == 2 and len(errors) == 1 and "log.jsonl could not" in errors[0]
    for function in (lambda log: log.add(1, loss=2.0), lambda log: draw_losses(log, "title")):
        with pytest.raises(SystemExit):
            function(RunLog(tmp_path / "nowhere", write=True))


def test_a_folder_that_is_renamed_while_training_is_one_line(tmp_path, fables_data):
    process = start(*command(fables_data, tmp_path / "out", "--max_iters=100000"))
    for line in process.stdout:
        if step_of(line) == 6:
            (tmp_path / "out").rename(tmp_path / "renamed")
            break
    errors = [line for line in process.stdout.read().splitlines() if not step_of(line) >= 0]
    assert process.wait() == 2 and len(errors) == 1 and errors[0].startswith("error: "), errors
    train(fables_data, tmp_path / "renamed", *LONGER)


def test_out_of_memory_on_one_rank_is_a_line_of_each(tmp_path, fables_data):
    own = """
import os, runpy, sys, torch
sys.path.insert(0, os.getcwd())
sys.argv = sys.argv[1:]
real, calls = torch.nn.utils.clip_grad_norm_, 0
def clip(*args):
    global calls
    calls += 1
    if calls == 3 and os.environ["RANK"] == "1":
        raise torch.OutOfMemoryError("out of memory")
    return real(*args)
torch.nn.utils.clip_grad_norm_ = clip
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    outputs = run_ranks(["-c", own, *command(fables_data, tmp_path / "out")], status=2)
    for output, says in zip(outputs, ("rank 0: another rank has ended", "rank 1: out of memory")):
        errors = [line for line in output.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and says in errors[0] and "Traceback" not in output, outputs


@pytest.mark.parametrize("out_dir", ["/proc/run", "README.md/run"])
def test_a_folder_that_cannot_be_written(fables_data, out_dir):
    done = run(*command(fables_data, Path(out_dir)))
    assert (
        done.returncode == 2
        and out_dir in done.stderr
        and len(done.stderr.strip().splitlines()) == 1
    )


# -----------------------------------------------------------------------------
# Ranks


def workers_of(process: Forked) -> list[int]:
    done = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True
    )
    return [int(pid) for pid in done.stdout.split()]


def train_through_rank_kills(data: Path, out_dir: Path, kills: int, rng: random.Random) -> int:
    """Kill one of two workers at random; torchrun restarts both. Return the kills that hit."""
    process = start(*command(data, out_dir, ranks=2))
    hit = 0
    for line in process.stdout:
        if line.startswith(("resuming", "eval  0/")) and hit < kills:
            time.sleep(rng.uniform(0, 0.5))
            pids = workers_of(process)
            if len(pids) == 2:
                os.kill(rng.choice(pids), signal.SIGKILL)
                hit += 1
    assert process.wait() == 0
    return hit


def test_a_killed_rank_changes_nothing(tmp_path, fables_data):
    train_on_ranks(2, fables_data, tmp_path / "whole", *LONGER)
    assert train_through_rank_kills(fables_data, tmp_path / "out", 1, random.Random(1)) == 1
    assert_same_outcome(tmp_path / "whole", tmp_path / "out")


def test_one_rank_that_is_stopped_in_an_evaluation_stops_all(tmp_path, fables_data):
    whole, out = tmp_path / "whole", tmp_path / "out"
    train_on_ranks(2, fables_data, whole, *LONGER)
    (tmp_path / "stop_one.py").write_text(
        "import os, sys\n"
        f"exec({STOP_AT_BATCH!r} if os.environ['RANK'] == '1' else\n"
        "     'import runpy; sys.path.insert(0, os.getcwd()); sys.argv = sys.argv[2:]\\n'\n"
        "     'runpy.run_path(sys.argv[0], run_name=\"__main__\")')\n")
    outputs = run_ranks([str(tmp_path / "stop_one.py"), "3", *command(fables_data, out)])
    assert "stopped at step 4," in outputs[0], outputs
    train_on_ranks(2, fables_data, out, *LONGER)
    assert_same_outcome(whole, out)


DIFFERENT = ["--learning_rate=2e-3", "--seed=2", "--batch_size=2", "--eval_interval=5",
             "--max_iters=41", "--n_embd=32", "--gradient_accumulation_steps=4", "--eval_iters=1",
             "--compile=True", "--weight_decay=0", "--dropout=0", "--patience=3"]


def refuse_different_settings(data: Path, out_dir: Path, different: str) -> None:
    """Give one of two ranks another setting: all leave with one line that names it."""
    own = (f"import os, runpy, sys; sys.path.insert(0, os.getcwd()); sys.argv = sys.argv[1:]\n"
           f"if os.environ['RANK'] == '1': sys.argv.append({different!r})\n"
           "runpy.run_path(sys.argv[0], run_name='__main__')")
    outputs = run_ranks(["-c", own, *command(data, out_dir)], status=2)
    errors = [line for line in outputs[0].splitlines() if line.startswith("error: ")]
    name = different[2:].split("=")[0]
    assert len(errors) == 1 and f"{name} differs" in errors[0], outputs
    assert not out_dir.exists() and "Traceback" not in "".join(outputs)


@pytest.mark.parametrize("different", DIFFERENT[:6])
def test_ranks_with_different_settings_do_not_train(tmp_path, fables_data, different):
    refuse_different_settings(fables_data, tmp_path / "out", different)


@pytest.fixture
def two_machines():
    """Two network namespaces with a cable between them; prefixes of commands to run in each."""
    names = [f"fable{os.getpid()}{end}" for end in "ab"]
    cables = [f"fab{os.getpid()}{end}" for end in "ab"]
    setup = [f"ip netns add {name}" for name in names] + [
        f"ip link add {cables[0]} type veth peer name {cables[1]}"
    ]
    for number, (name, cable) in enumerate(zip(names, cables), 1):
        setup += [
            f"ip link set {cable} netns {name}",
            f"ip -n {name} addr add 10.99.0.{number}/24 dev {cable}",
            f"ip -n {name} link set {cable} up",
            f"ip -n {name} link set lo up",
        ]
    try:
        for line in setup:
            try:
                done = subprocess.run(line.split(), capture_output=True, text=True)
            except FileNotFoundError:
                pytest.skip("there is no `ip` to make network namespaces with")
            if done.returncode:
                pytest.skip(f"network namespaces cannot be made here: {done.stderr.strip()}")
        prefixes = [["ip", "netns", "exec", name] for name in names]
        listen = (
            "import socket; s = socket.create_server(('10.99.0.1', 29501)); print(flush=True); "
            "s.settimeout(9); s.accept()"
        )
        listener = start_program([*prefixes[0], sys.executable, "-c", listen])
        listener.stdout.readline()
        knock = "import socket; socket.create_connection(('10.99.0.1', 29501), timeout=5)"
        if (
            subprocess.run(
                [*prefixes[1], sys.executable, "-c", knock], capture_output=True
            ).returncode
            or listener.wait()
        ):
            pytest.skip("network namespaces can be made here, but not talk to each other")
        yield list(zip(prefixes, cables))
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def test_two_machines_train_like_one(tmp_path, fables_data, two_machines):
    """The command for two nodes, in two network namespaces that share only the disk."""
    train_on_ranks(2, fables_data, tmp_path / "one", "--max_iters=12", "--lr_decay_iters=12")
    nodes = []
    for number, (prefix, cable) in enumerate(
        two_machines, 1
    ):  # both think they have this machine's name: tell them apart
        launcher = [
            f"--rdzv_conf=is_host={number == 1}",
            f"--local_addr=10.99.0.{number}",
            "--nnodes=2",
            "--nproc_per_node=1",
            "--rdzv_backend=c10d",
            "--rdzv_endpoint=10.99.0.1:29500",
            "--max-restarts=3",
        ]
        nodes.append(
            start_program(
                [
                    *prefix,
                    sys.executable,
                    "-m",
                    "torch.distributed.run",
                    *launcher,
                    "train.py",
                    f"--dataset={fables_data}",
                    f"--out_dir={tmp_path}/two",
                    *TINY,
                    "--max_iters=12",
                    "--lr_decay_iters=12",
                    "--init_from=auto",
                ],
                env=os.environ
                | {"GLOO_SOCKET_IFNAME": cable, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
            )
        )
    for node in nodes:
        output = node.communicate(timeout=120)[0]
        assert node.returncode == 0, output
    one, two = (read_checkpoint(tmp_path / name / "last.pt")["model"] for name in ("one", "two"))
    assert_same(one, two)


def test_the_slurm_example_is_one_that_a_shell_can_parse():
    script = (HERE / "docs/distributed.md").read_text().split("#!/bin/bash\n")[1].split("```")[0]
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr and "srun torchrun" in script


# -----------------------------------------------------------------------------
# Bad input by the thousand: one line, status 2, and nothing in out_dir changes

NUMBERS = {
    "n_layer",
    "n_head",
    "n_embd",
    "batch_size",
    "block_size",
    "max_iters",
    "learning_rate",
    "dropout",
    "patience",
    "num_samples",
    "max_new_tokens",
    "temperature",
    "top_k",
    "seed",
    "steps",
    "rounds",
    "eval_iters",
    "valid_samples",
    "train_stories",
    "val_stories",
    "max_epochs",
    "stride",
    "last_words",
    "continuations",
    "prompt_tokens",
    "vocab_size",
}


class Victims:
    """A dataset and a run to damage, and the scripts to try on them."""

    def __init__(self, root: Path, data: Path, trained: Path):
        self.root, self.good_data, self.good_run = root, data, trained
        self.data, self.out_dir = root / "data", root / "out"
        self.count = 0

    def fresh(self) -> None:
        for folder, good in ((self.data, self.good_data), (self.out_dir, self.good_run)):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(good, folder)
        (self.out_dir / "prev.pt").unlink()  # nothing to fall back to

    def contents(self) -> dict[str, bytes]:
        return {
            path.name: path.read_bytes()
            for path in self.out_dir.iterdir()
            if path.name != "lock" and path.is_file() and path.stat().st_size < 10**8
        }

    def refuse(self, *args: str) -> None:
        """The script says one line, leaves with status 2, and leaves out_dir as it was."""
        before = self.contents()
        process = start(*args)
        # a bomb that is not refused ends in an error, not in a machine without memory
        resource.prlimit(process.pid, resource.RLIMIT_AS, (LIMIT, LIMIT))
        output, _ = process.communicate()
        status = process.returncode
        errors = [line for line in output.splitlines() if line.startswith("error: ")]
        assert status == 2 and len(errors) == 1 and "Traceback" not in output, (
            f"{args}: status {status}\n{output}"
        )
        assert self.contents() == before, f"{args} changed {self.out_dir}"
        self.count += 1


LIMIT = 16 << 30  # bytes of memory for a script that gets bad input


def damaged(draw, raw: bytes) -> bytes:
    at = draw(st.integers(0, len(raw) - 1))
    return draw(
        st.sampled_from(
            [
                raw[:at],
                raw[:at] + bytes([raw[at] ^ 1 << at % 8]) + raw[at + 1 :],
                raw[:at] + b"\xff" + raw[at:],
                b"",
                b"hello",
                raw[:at] + bytes(len(raw[at : at + 64])) + raw[at + 64 :],
                bytes(len(raw)),
                raw[at:],
            ]
        )
    )


def same_archive(a: Path, b: Path) -> bool:
    """Return whether two zip files hold the same files, whatever their dates and padding."""
    try:
        with zipfile.ZipFile(a) as one, zipfile.ZipFile(b) as two:
            return [(name, one.read(name)) for name in one.namelist()] == [
                (name, two.read(name)) for name in two.namelist()
            ]
    except Exception:
        return False


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
WRONG = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, -2),
    st.floats(allow_nan=False),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


def bad_settings(victims: Victims, draw) -> None:
    script = draw(st.sampled_from(SCRIPTS))
    known = {setting.name for setting in read_settings(HERE / script)}
    unknown = TEXT.filter(
        lambda name: name not in known and name not in ("help",) and "=" not in name
    )
    bad = draw(
        st.one_of(
            st.builds("--{}={}".format, unknown, TEXT),
            st.builds("--{}".format, unknown),
            st.builds("{}.py".format, unknown.filter(lambda name: not Path(name + ".py").exists())),
            st.builds(
                "--{}={}".format,
                st.sampled_from(sorted(NUMBERS & known) or ["none"]),
                st.sampled_from(
                    ["", "x", "-1", "nan", "inf", "1e400", "0x10", "None", "[1]", "1,000", "True"]
                ),
            ),
        )
    )
    victims.refuse(script, *([f"--out_dir={victims.out_dir}"] if "out_dir" in known else []), bad)


def bad_config_file(victims: Victims, draw) -> None:
    path = victims.root / "config.py"
    path.write_bytes(
        draw(
            st.one_of(
                st.builds(
                    "seed = {!r}".format,
                    WRONG.filter(lambda value: type(value) not in (int, float)),
                ).map(str.encode),
                st.builds("{} = 1".format, st.from_regex(r"[a-z]{3,9}_zz", fullmatch=True)).map(
                    str.encode
                ),
                TEXT.map(
                    lambda text: f"seed = 1\nraise ValueError({text!r})".encode(errors="replace")
                ),
                st.binary(min_size=1, max_size=30).map(lambda raw: b"\xff" + raw),
                st.sampled_from(
                    [
                        b"seed = (",
                        b"import nowhere_zz",
                        b"exit()",
                        b"1 / 0",
                        b"nowhere_zz",
                        b"\x00",
                        b"seed = [",
                        b"'",
                    ]
                ),
            )
        )
    )
    victims.refuse(
        draw(st.sampled_from(["train.py", "eval.py", "sample.py", "bench.py"])), str(path)
    )


def bad_meta(victims: Victims, draw) -> None:
    path = victims.data / "meta.json"
    if draw(st.booleans()):
        path.write_bytes(path.read_bytes()[: draw(st.integers(0, path.stat().st_size - 4))])
    else:
        meta = json.loads(path.read_text())
        where = meta
        *folders, key = draw(
            st.sampled_from(
                [
                    "format_version",
                    "tokenizer",
                    "vocab_size",
                    "eot",
                    "splits",
                    "tokenizer/kind",
                    "tokenizer/vocab",
                    "splits/train",
                    "splits/val",
                    "splits/train/tokens",
                    "splits/val/tokens",
                    "splits/val/sha256",
                ]
            )
        ).split("/")
        for folder in folders:
            where = where[folder]
        where[key] = draw(WRONG)
        path.write_text(json.dumps(meta))
    victims.refuse(
        draw(st.sampled_from(["train.py", "eval.py"])),
        f"--out_dir={victims.out_dir}",
        f"--dataset={victims.data}",
    )


def bad_bin(victims: Victims, draw) -> None:
    path = victims.data / draw(st.sampled_from(["train.bin", "val.bin"]))
    good = path.read_bytes()
    path.write_bytes(damaged(draw, good))
    assume(path.read_bytes() != good)
    script = draw(
        st.sampled_from(["train.py", "eval.py"]) if path.name == "val.bin" else st.just("train.py")
    )
    victims.refuse(
        script,
        f"--dataset={victims.data}",
        f"--out_dir={victims.out_dir}",
        *(TINY + ["--overwrite=True"] if script == "train.py" else []),
    )


def bad_checkpoint(victims: Victims, draw) -> None:
    good = victims.good_run / "last.pt"
    for path in victims.out_dir.glob("*.pt"):
        path.unlink()
    path = victims.out_dir / "last.pt"
    if draw(st.booleans()):
        path.write_bytes(damaged(draw, good.read_bytes()))
        assume(not same_archive(path, good))
    else:
        checkpoint = read_checkpoint(good)
        key = draw(
            st.sampled_from(
                [
                    "model",
                    "model_args",
                    "step",
                    "config",
                    "meta",
                    "model_args/n_layer",
                    "model_args/n_embd",
                    "model_args/vocab_size",
                    "model_args/arch",
                    "meta/tokenizer",
                    "model/lm_head.weight",
                ]
            )
        )
        *folders, key = key.split("/")
        where = checkpoint
        for folder in folders:
            where = where[folder]
        where[key] = draw(WRONG.filter(lambda value: value is not True))
        torch.save(checkpoint, path)
    script = draw(st.sampled_from(["train.py", "sample.py", "eval.py"]))
    how = {
        "train.py": [f"--dataset={victims.data}", *TINY, "--max_iters=6", "--init_from=resume"],
        "eval.py": [f"--dataset={victims.data}", "--valid_samples=0"],
        "sample.py": ["--num_samples=1", "--max_new_tokens=2"],
    }[script]
    victims.refuse(script, f"--out_dir={victims.out_dir}", *how)


def planted_link(victims: Victims, draw) -> None:
    """A name that a script writes is a link to a file elsewhere, which keeps its content."""
    names = ["best.pt", "last.pt", "log.jsonl", "loss.png", "metrics_summary.json",
             "step_000003.pt", "continuations.jsonl", "model.gguf", "config.json",
             "model.safetensors"]
    name = draw(st.sampled_from([*names, *(f"{name}.tmp" for name in names), "lock"]))
    target = victims.root / "elsewhere"
    target.write_text("mine")
    path = victims.out_dir / name
    script = draw(st.sampled_from(["train.py", "eval.py", "export.py"]))
    assume(script == "train.py" or name not in ("best.pt", "last.pt"))
    path.unlink(missing_ok=True)
    path.symlink_to(target)
    how = {
        "train.py": [f"--dataset={victims.data}", *TINY, "--keep_every=3", "--overwrite=True"],
        "eval.py": [f"--dataset={victims.data}", "--continuations=2", "--prompt_tokens=4",
                    "--max_new_tokens=4", "--valid_samples=0"],
        "export.py": draw(st.sampled_from([
            ["--format=gguf", f"--to={victims.out_dir}/model.gguf", "--overwrite=True"],
            ["--format=hf", f"--to={victims.out_dir}", "--overwrite=True"]])),
    }[script]
    done = run(script, f"--out_dir={victims.out_dir}", *how)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert target.read_text() == "mine", (script, how, name)
    assert len(errors) == (done.returncode == 2) and done.returncode in (0, 2), done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    victims.count += 1


def bomb(victims: Victims, draw) -> None:
    """A small or endless file that would take all memory."""
    name = draw(st.sampled_from(["last.pt", "meta.json"]))
    path = (victims.out_dir if name == "last.pt" else victims.data) / name
    for other in victims.out_dir.glob("*.pt"):
        if other != path and name == "last.pt":
            other.unlink()
    kind = draw(st.sampled_from(["zero", "fifo", "huge", "deep", "deflated", "grown", "shared"]))
    size = draw(st.integers(20, 40))
    if kind in ("zero", "fifo", "huge"):
        assume(kind == "huge" or name == "last.pt")  # without meta.json there is no dataset
        path.unlink()
        if kind == "zero":
            path.symlink_to("/dev/zero")
        elif kind == "fifo":
            os.mkfifo(path)
        else:
            with open(path, "wb") as file:
                file.truncate(2 ** (size // 2 + 23))
    elif name == "meta.json":
        assume(kind == "deep")
        path.write_text("[" * 2 ** (size // 2) + "]" * 2 ** (size // 2))
    elif kind == "shared":
        checkpoint = read_checkpoint(path)
        name = draw(st.sampled_from(sorted(checkpoint["model"])))
        w = torch.zeros(1).expand(2**size)
        checkpoint["model"][name] = w.view(2, -1) if checkpoint["model"][name].dim() == 2 else w
        torch.save(checkpoint, path)
    else:
        with zipfile.ZipFile(path) as old:
            entries = {name: old.read(name) for name in old.namelist()}
        how = zipfile.ZIP_DEFLATED if kind == "deflated" else zipfile.ZIP_STORED
        with zipfile.ZipFile(path, "w", how) as new:
            for name, data in entries.items():
                if kind == "deep" and name.endswith("data.pkl"):
                    n = 2 ** (size // 2)
                    data = b"\x80\x02" + b"]" * n + b"a" * (n - 1) + b"."
                elif kind == "grown" and name.endswith("data.pkl"):
                    data = (b"\x80\x02" + b"c_codecs\nencode\n(" * size + b"X\x00\x00\x00\x00"
                            b"X\x06\x00\x00\x00latin1tR"
                            + b"X\x03\x00\x00\x00hextR" * (size - 1) + b".")
                elif kind == "deflated" and name.endswith("data/0"):
                    data = bytes(2 ** (size // 2 + 4))
                new.writestr(name, data)
    victims.refuse(
        "train.py", f"--out_dir={victims.out_dir}", f"--dataset={victims.data}", *TINY,
        "--max_iters=7", "--init_from=resume")


def crafted_size(victims: Victims, draw) -> None:
    """A model that would take all memory or hours to build, in a checkpoint or in settings."""
    size = 10 ** draw(st.integers(7, 30))
    name = draw(st.sampled_from(["n_layer", "n_embd", "vocab_size", "block_size"]))
    if draw(st.booleans()):
        script = draw(st.sampled_from(["train.py", "bench.py", "plan.py"]))
        assume(name != "vocab_size" or script != "train.py")
        assume(name in ("n_layer", "n_embd") or size >= 10**12)  # less may fit into a plan
        assume(name != "n_embd" or size >= 10**8)
        victims.refuse(script, f"--dataset={victims.data}", f"--{name}={size}", "--n_head=1",
                       *([f"--out_dir={victims.out_dir}", "--overwrite=True"]
                         if script == "train.py" else []))
        return
    checkpoint = read_checkpoint(victims.good_run / "last.pt")
    checkpoint["model_args"][name] = size
    for path in victims.out_dir.glob("*.pt"):
        path.unlink()
    torch.save(checkpoint, victims.out_dir / "last.pt")
    script = draw(st.sampled_from(["train.py", "sample.py", "eval.py"]))
    how = {
        "train.py": [f"--dataset={victims.data}", *TINY[:2], "--max_iters=7", "--init_from=resume"],
        "eval.py": [f"--dataset={victims.data}"],
        "sample.py": [],
    }[script]
    victims.refuse(script, f"--out_dir={victims.out_dir}", *how)


KINDS = [bad_settings, bad_config_file, bad_meta, bad_bin, bad_checkpoint, planted_link, bomb,
         crafted_size]


def try_bad_inputs(victims: Victims, kind, n: int, derandomize: bool) -> None:
    @settings(
        max_examples=n,
        deadline=None,
        database=None,
        derandomize=derandomize,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def attempt(data) -> None:
        victims.fresh()
        kind(victims, data.draw)

    attempt()


@pytest.mark.parametrize("kind", KINDS)
def test_bad_input_is_refused_with_one_line(tmp_path, fables_data, trained, kind):
    victims = Victims(tmp_path, fables_data, trained)
    n = 100 if kind.__name__.startswith("bad") else 12  # these run whole scripts
    try_bad_inputs(victims, kind, n, derandomize=True)
    assert victims.count >= 0.9 * n


# -----------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100, help="of a single process, 10 a run")
    parser.add_argument(
        "--rank_kills", type=int, default=10, help="of one of two ranks, up to 3 a run"
    )
    parser.add_argument("--stops", type=int, default=40, help="with SIGTERM, 4 a run that recovers")
    parser.add_argument("--evaluation_stops", type=int, default=30, help="during an evaluation")
    parser.add_argument(
        "--inputs",
        type=int,
        default=0,
        help="damaged settings and files, links, bombs and crafted sizes",
    )
    parser.add_argument("--seed", type=int, default=1337)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        data = root / "fables"
        done = run(
            "data/fables/prepare.py", f"--out_dir={data}", "--train_stories=60", "--val_stories=8"
        )
        assert done.returncode == 0, done.stderr
        train(data, root / "whole", *LONGER)
        train_on_ranks(2, data, root / "whole2", *LONGER)
        train(data, root / "whole_exploding", *LONGER, *EXPLODING)
        hits, exact, runs, rank_hits, rank_exact, rank_runs = [], 0, 0, 0, 0, 0
        stops, stop_runs = 0, 0
        while stops < args.stops:
            out_dir = root / f"stops{stop_runs}"
            stops += train_through_stops(data, out_dir, min(4, args.stops - stops), rng, *EXPLODING)
            assert_same_outcome(root / "whole_exploding", out_dir)
            stop_runs += 1
            print(f"{stops} stops, {stops} exact resumes", flush=True)
        for i in range(args.evaluation_stops):
            train_through_stop_in_evaluation(data, root / f"evaluation{i}", rng.randint(1, 44))
            assert_same_outcome(root / "whole", root / f"evaluation{i}")
            print(f"{i + 1} stops during an evaluation, {i + 1} exact resumes", flush=True)
        for different in DIFFERENT:
            refuse_different_settings(data, root / "different", different)
        while len(hits) < args.kills:
            kills = min(10, args.kills - len(hits))
            hits += train_through_kills(data, root / f"run{runs}", kills, rng)
            assert_same_outcome(root / "whole", root / f"run{runs}")
            runs, exact = runs + 1, exact + kills
            print(f"{len(hits)} kills, {exact} exact resumes", flush=True)
        while rank_hits < args.rank_kills:
            hit = train_through_rank_kills(
                data, root / f"ranks{rank_runs}", min(3, args.rank_kills - rank_hits), rng
            )
            assert_same_outcome(root / "whole2", root / f"ranks{rank_runs}")
            rank_runs, rank_hits, rank_exact = rank_runs + 1, rank_hits + hit, rank_exact + hit
            print(f"{rank_hits} rank kills, {rank_exact} exact resumes", flush=True)
        refused = {}
        (root / "inputs").mkdir()
        for kind in KINDS if args.inputs else ():
            victims = Victims(root / "inputs", data, root / "whole")
            try_bad_inputs(victims, kind, args.inputs // len(KINDS), derandomize=False)
            refused[kind.__name__] = victims.count
            print(f"{kind.__name__}: {victims.count} refused", flush=True)
    print("\n| accident | times | runs | ended in the same bits |\n|---|---|---|---|")
    for what in sorted(set(hits)):
        print(f"| SIGKILL {what} | {hits.count(what)} | | {hits.count(what)} |")
    print(f"| SIGKILL, all | {len(hits)} | {runs} | {exact} |")
    print(f"| SIGKILL of one of two ranks | {rank_hits} | {rank_runs} | {rank_exact} |")
    print(f"| SIGTERM, before bad steps lead back | {stops} | {stop_runs} | {stops} |")
    n = args.evaluation_stops
    print(f"| SIGTERM during an evaluation | {n} | {n} | {n} |")
    print(f"| one of two ranks with another setting | {len(DIFFERENT)} | | refused |")
    print("\n| damaged input | refused with one line |\n|---|---|")
    for kind, count in refused.items():
        print(f"| {kind} | {count} |")


if __name__ == "__main__":
    main()
