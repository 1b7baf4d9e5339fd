"""
Accidents of every kind: whatever happens to a run, going on with it ends in the same weights, log and best checkpoint.

    python test_crash.py --kills=100

kills a run at random instants, 100 times in all, and prints a table; the suite does the same with a few.
"""
import argparse
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from checkpoint import find_resumable, read_checkpoint
from conftest import HERE, TINY, read_log, run, train

LONGER = ["--max_iters=40", "--lr_decay_iters=40", "--eval_interval=4", "--init_from=auto"]

# runs a script, and SIGKILLs it at the n-th call of a file operation, `torch.save` after half of its bytes
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


def command(data: Path, out_dir: Path, *args: str, ranks: int = 0) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "--max-restarts=3"]
    return [sys.executable, *(launcher if ranks else []), "train.py", f"--dataset={data}", f"--out_dir={out_dir}", *TINY,
            *LONGER, *args]


def start(command: list[str], **how) -> subprocess.Popen:
    return subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **how)


def outcome(out_dir: Path) -> tuple:
    """All that a run leaves behind, but for what depends on the clock."""
    kept = []
    for name in ("last.pt", "best.pt"):
        checkpoint = read_checkpoint(out_dir / name)
        checkpoint.pop("seconds", None)
        kept.append(checkpoint | {"config": {k: v for k, v in checkpoint["config"].items() if k != "out_dir"}})
    return kept, read_log(out_dir)


def assert_same_outcome(a: Path, b: Path) -> None:
    from test_train import assert_same
    assert_same(outcome(a), outcome(b))


def train_through_kills(data: Path, out_dir: Path, kills: int, rng: random.Random) -> list[str]:
    """Kill a run `kills` times at random instants, each time going on with it, and let it end; what each kill hit."""
    hit = []
    while True:
        process = start(command(data, out_dir))
        for line in process.stdout:  # imports are not worth killing: wait until it trains
            if line.startswith(("resuming", "step 0")):
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
            hit.append("inside a write" if any(out_dir.glob("*.tmp")) else "between two steps" if rest else "while starting")
        else:
            raise AssertionError(rest)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, fables_data) -> Path:
    out_dir = tmp_path_factory.mktemp("undisturbed") / "out"
    train(fables_data, out_dir, *LONGER)
    return out_dir


def test_kills_at_random_instants_change_nothing(tmp_path, fables_data, undisturbed):
    train_through_kills(fables_data, tmp_path / "out", 5, random.Random(1))
    assert_same_outcome(undisturbed, tmp_path / "out")


@pytest.mark.parametrize("operation, n, files", [  # all in the saving of step 4, the second one
    ("save", 4, {"last.pt", "last.pt.tmp"}), ("fsync", 5, {"last.pt", "last.pt.tmp"}),
    ("replace", 5, {"last.pt", "best.pt.tmp"}), ("replace", 6, {"last.pt", "last.pt.tmp"}),
    ("replace", 7, {"prev.pt", "last.pt.tmp"}),  # for this instant there is no last.pt
])
def test_a_kill_inside_a_write_changes_nothing(tmp_path, fables_data, undisturbed, operation, n, files):
    script = command(fables_data, tmp_path / "out")[1:]
    killed = start([sys.executable, "-c", KILL_AT, operation, str(n), *script])
    output = killed.communicate()[0]
    assert killed.returncode == -signal.SIGKILL, output
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == files | {"best.pt", "loss.png", "log.jsonl", "lock"}
    train(fables_data, tmp_path / "out", *LONGER)
    assert_same_outcome(undisturbed, tmp_path / "out")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_polite_signal_finishes_the_step_and_saves(tmp_path, fables_data, undisturbed, number):
    process = start(command(fables_data, tmp_path / "out"))
    for line in process.stdout:
        if line.startswith("step 7:"):
            process.send_signal(number)
            break
    output = process.stdout.read()
    assert process.wait() == 0 and "--init_from=resume" in output and "Traceback" not in output
    assert 7 <= read_checkpoint(tmp_path / "out/last.pt")["step"] < 40
    train(fables_data, tmp_path / "out", *LONGER)
    assert_same_outcome(undisturbed, tmp_path / "out")


def test_a_second_interrupt_leaves_at_once(tmp_path, fables_data):
    process = start(command(fables_data, tmp_path / "out", "--max_iters=100000", "--eval_interval=100000", "--n_layer=8"))
    for line in process.stdout:
        if line.startswith("step 2:"):
            process.send_signal(signal.SIGSTOP)  # so that both signals are there before the step is over
            process.send_signal(signal.SIGINT)
            process.send_signal(signal.SIGCONT)
            process.send_signal(signal.SIGINT)
            break
    process.stdout.read()
    assert process.wait() in (0, 130)


def test_no_space_left_keeps_the_newest_good_checkpoint(tmp_path, fables_data, undisturbed):
    train(fables_data, tmp_path / "out", *LONGER, "--max_iters=8")
    size = (tmp_path / "out/last.pt").stat().st_size

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))

    process = start(command(fables_data, tmp_path / "out"), preexec_fn=limit)
    output = process.communicate()[0]
    assert process.returncode == 2 and "Traceback" not in output, output
    assert "last.pt could not be written (File too large)" in output and not any((tmp_path / "out").glob("*.tmp"))
    assert find_resumable(tmp_path / "out")["step"] == 8
    train(fables_data, tmp_path / "out", *LONGER)
    assert_same_outcome(undisturbed, tmp_path / "out")


@pytest.mark.parametrize("kind", ["truncated", "zeroed", "flipped", "missing"])
def test_a_damaged_checkpoint_costs_one_interval_and_nothing_else(tmp_path, fables_data, undisturbed, kind):
    from test_train import damage_by
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
    first = start(command(fables_data, tmp_path / "out", "--max_iters=100000"))
    for line in first.stdout:
        if line.startswith("step 3:"):
            break
    second = run(*command(fables_data, tmp_path / "out")[1:])
    first.kill()
    first.communicate()
    assert second.returncode == 2 and f"process {first.pid} is training in" in second.stderr
    assert len(second.stderr.strip().splitlines()) == 1
    train(fables_data, tmp_path / "out", *LONGER, "--max_iters=4")  # the lock died with its holder


@pytest.mark.parametrize("out_dir", ["/proc/run", "README.md/run"])
def test_a_folder_that_cannot_be_written(fables_data, out_dir):
    done = run(*command(fables_data, Path(out_dir))[1:])
    assert done.returncode == 2 and out_dir in done.stderr and len(done.stderr.strip().splitlines()) == 1


# -----------------------------------------------------------------------------
# Ranks

def workers_of(process: subprocess.Popen) -> list[int]:
    done = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
    return [int(pid) for pid in done.stdout.split()]


def train_through_rank_kills(data: Path, out_dir: Path, kills: int, rng: random.Random) -> int:
    """Kill one of two workers at random instants; torchrun starts both again. The number of kills that hit."""
    process = start(command(data, out_dir, ranks=2))
    hit = 0
    for line in process.stdout:
        if line.startswith(("resuming", "step 0")) and hit < kills:
            time.sleep(rng.uniform(0, 0.5))
            pids = workers_of(process)
            if len(pids) == 2:
                os.kill(rng.choice(pids), signal.SIGKILL)
                hit += 1
    assert process.wait() == 0
    return hit


def test_a_killed_rank_changes_nothing(tmp_path, fables_data):
    train(fables_data, tmp_path / "whole", *LONGER, ranks=2)
    assert train_through_rank_kills(fables_data, tmp_path / "out", 1, random.Random(1)) == 1
    assert_same_outcome(tmp_path / "whole", tmp_path / "out")


# -----------------------------------------------------------------------------

def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="of a single process, 10 a run")
    parser.add_argument("--rank_kills", type=int, default=10, help="of one of two ranks, up to 3 a run")
    parser.add_argument("--seed", type=int, default=1337)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        data = root / "fables"
        done = run("data/fables/prepare.py", f"--out_dir={data}", "--train_stories=60", "--val_stories=8")
        assert done.returncode == 0, done.stderr
        train(data, root / "whole", *LONGER)
        train(data, root / "whole2", *LONGER, ranks=2)
        hits, exact, runs, rank_hits, rank_exact, rank_runs = [], 0, 0, 0, 0, 0
        while len(hits) < args.kills:
            kills = min(10, args.kills - len(hits))
            hits += train_through_kills(data, root / f"run{runs}", kills, rng)
            assert_same_outcome(root / "whole", root / f"run{runs}")
            runs, exact = runs + 1, exact + kills
            print(f"{len(hits)} kills, {exact} exact resumes", flush=True)
        while rank_hits < args.rank_kills:
            hit = train_through_rank_kills(data, root / f"ranks{rank_runs}", min(3, args.rank_kills - rank_hits), rng)
            assert_same_outcome(root / "whole2", root / f"ranks{rank_runs}")
            rank_runs, rank_hits, rank_exact = rank_runs + 1, rank_hits + hit, rank_exact + hit
            print(f"{rank_hits} rank kills, {rank_exact} exact resumes", flush=True)
    print("\n| accident | times | runs | ended in the same bits |\n|---|---|---|---|")
    for what in sorted(set(hits)):
        print(f"| SIGKILL {what} | {hits.count(what)} | | {hits.count(what)} |")
    print(f"| SIGKILL, all | {len(hits)} | {runs} | {exact} |")
    print(f"| SIGKILL of one of two ranks | {rank_hits} | {rank_runs} | {rank_exact} |")


if __name__ == "__main__":
    main()
