"""bench.py: each mode beside a peer, and its errors."""

import json
import math
import statistics

import pytest

from helpers import HERE, one_line_error, run
from lib.checkpoint import load_model
from lib.corpus import load_meta

PLAN = [  # what plan.py knows too
    "--n_layer=1",
    "--n_head=2",
    "--n_embd=16",
    "--block_size=16",
    "--batch_size=2",
    "--vocab_size=50",
    "--device=cpu",
    "--dtype=float32",
]
BENCH = [*PLAN, "--rounds=3", "--steps=2", "--compile=False"]


def test_bench_beside_another_model(tmp_path):
    (tmp_path / "model.py").write_text((HERE / "model.py").read_text())
    done = run("bench.py", *BENCH, f"--against={tmp_path}/model.py")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert result["ratio"] == pytest.approx(
        result["tokens_per_second"] / result["their_tokens_per_second"]
    )
    assert result["tokens_per_second"] > 0 and result["mfu"] > 0 and not result["compiled"]
    table = done.stdout.split("\n\n")[2].splitlines()
    assert table[0].split() == ["tokens/s", "spread"]
    assert table[1].startswith("this model (eager, float32) ")
    assert table[1].split()[-2] == f"{result['tokens_per_second']:,.0f}"
    assert table[2].split()[-2] == f"{result['their_tokens_per_second']:,.0f}"
    assert result["parameters"] == 16 * (50 + 16) + 12 * 16 * 16 + 13 * 16 + 2 * 16
    assert "ratio" not in json.loads(run("bench.py", *BENCH).stdout.strip().splitlines()[-1])


def test_bench_beside_transformers():
    done = run("bench.py", *BENCH, "--against=hf")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.strip().splitlines()[-1])["their_tokens_per_second"] > 0


def test_bench_of_batches(fables_data):
    for batching, some in (("windows", False), ("by_length", True)):
        done = run(
            "bench.py",
            *BENCH,
            "--block_size=192",
            "--mode=data",
            f"--dataset={fables_data}",
            f"--batching={batching}",
        )
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout.strip().splitlines()[-1])
        assert result["tokens_per_second"] > 0 and (0 < result["padding"] < 0.5) == some


def test_bench_of_the_way_to_a_loss(tmp_path, fables_data):
    """The peer is our own model with a rate of zero, so we reach its loss at once."""
    (tmp_path / "model.py").write_text((HERE / "model.py").read_text())
    (tmp_path / "theirs.py").write_text("learning_rate = min_lr = 0.0\nmax_iters = 6\n")
    done = run(
        "bench.py",
        *BENCH,
        "--mode=loss",
        f"--dataset={fables_data}",
        f"--against={tmp_path}/model.py",
        "--seeds=2",
        f"--their_config={tmp_path}/theirs.py",
        "--max_iters=4",
        "--eval_interval=2",
        "--arch=qwen3",
        "--tied=False",
        "--optimizer=muon",
        "--learning_rate=0.01",
        "--warmup_iters=0",
        "--gradient_accumulation_steps=1",
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.strip().splitlines()[-1])
    ours, theirs = result["ours"], result["theirs"]
    table, by_seed = (part.splitlines() for part in done.stdout.split("\n\n")[2:4])
    assert [line.split()[-1] for line in table] == ["seeds", "2", "2", "2", "2"]
    assert "{:.4f} +- {:.4f}".format(*theirs["final_loss"]) in table[3]
    assert table[2].split()[:2] == ["to", f"{result['target_loss']:.4f}"]
    assert (
        theirs["final_loss"][0]
        == result["target_loss"]
        == pytest.approx(math.log(load_meta(fables_data)["vocab_size"]), abs=0.1)
    )
    assert (
        ours["reached"] == theirs["reached"] == 2
        and ours["final_loss"][0] < theirs["final_loss"][0]
    )
    assert by_seed[0].split()[-2:] == ["1337", "1338"]
    for line, row in zip(by_seed[1:], (ours, theirs), strict=True):
        assert line.split()[-2:] == [f"{loss:.4f}" for loss in row["losses"]]
        mean, deviation = statistics.mean(row["losses"]), statistics.stdev(row["losses"])
        assert row["final_loss"] == pytest.approx([mean, deviation])
    assert ours["tokens"][0] == 2 * 2 * 16 and theirs["tokens"] == [6 * 2 * 16, 0]
    assert result["ratio"] == pytest.approx(ours["seconds"][0] / theirs["seconds"][0])


def test_bench_of_generation(tmp_path):
    (tmp_path / "model.py").write_text((HERE / "model.py").read_text())
    for against in (f"{tmp_path}/model.py", "hf"):
        done = run(
            "bench.py",
            *BENCH,
            "--mode=generate",
            f"--against={against}",
            "--rounds=1",
            "--max_new_tokens=11",
            "--texts=1,3",
        )
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout.strip().splitlines()[-1])
        assert done.stdout.count("x\n") == 4  # our four speed-ups
        assert f"; memory bandwidth {result['bandwidth'] / 1e9:.1f} GB/s\n" in done.stdout
        for texts in (1, 3):
            row = result[f"batch_{texts}"]
            assert row["ratio"] == pytest.approx(
                row["tokens_per_second"] / row["their_tokens_per_second"]
            )
            assert row["int8_ratio"] == pytest.approx(
                row["int8_tokens_per_second"] / row["their_tokens_per_second"]
            )
            assert row["weights_read_per_second"] == pytest.approx(
                4 * result["parameters"] * row["tokens_per_second"] / texts
            )


def test_bench_of_a_trained_models_generation(trained):
    """Its shape decides about everything: the peer's, the prompt, the parameters."""
    done = run(
        "bench.py",
        *BENCH,
        "--mode=generate",
        f"--run={trained}",
        "--against=hf",
        "--rounds=1",
        "--max_new_tokens=11",
        "--texts=1",
    )
    assert done.returncode == 0 and "11 tokens after a prompt of 8" in done.stdout, done.stderr
    assert (
        json.loads(done.stdout.splitlines()[-1])["parameters"]
        == load_model(trained, "cpu")[0].num_params()
    )


def test_bench_takes_training_configs(tmp_path):
    config = tmp_path / "config.py"
    config.write_text("dataset = 'fables'\nlearning_rate = 1e-3\nn_embd = 8\nmax_iters = 5\n")
    done = run("bench.py", *BENCH, str(config))
    assert done.returncode == 0, done.stderr
    assert (
        json.loads(done.stdout.strip().splitlines()[-1])["parameters"]
        == 8 * (50 + 16) + 12 * 8 * 8 + 13 * 8 + 2 * 8
    )


REPORT = [*BENCH, "--mode=report", "--rounds=1", "--max_new_tokens=11", "--texts=1,3"]


def table_of(done) -> dict[str, str]:
    """Return the rows of the Markdown table before the last line, which must be well-formed."""
    assert done.returncode == 0, done.stderr
    lines = done.stdout.split("\n\n")[-2].splitlines()
    assert len({len(line) for line in lines}) == 1  # also reads in a terminal
    rows = [[cell.strip() for cell in line.split("|")] for line in lines]
    assert all(len(row) == 4 and row[0] == row[3] == "" for row in rows)
    assert [cell.strip("-") for cell in rows.pop(1)] == ["", "", ":", ""]
    return {name: value for _, name, value, _ in rows}


def planned(*args: str) -> dict:
    done = run("plan.py", *PLAN, "--gradient_accumulation_steps=1", *args)
    return json.loads(done.stdout.splitlines()[-1])


HEAVY = """
class GPT(GPT):
    def __init__(self, config):
        super().__init__(config)
        self.ballast = torch.ones(10**8)
"""
# bench.py takes its device for a GPU; the tensors stay on the CPU
SIMULATED_GPU = """
import sys
import torch
from lib import machine

def resolve_dtype(dtype, device):
    sys.modules["__main__"].device_type = "cuda"
    return "bfloat16" if dtype == "auto" else dtype

machine.resolve_dtype = resolve_dtype
torch.cuda.get_device_name = lambda: "NVIDIA GeForce RTX 4090"
"""


def test_bench_report(tmp_path):
    (tmp_path / "model.py").write_text((HERE / "model.py").read_text() + HEAVY)
    done = run("bench.py", *REPORT, f"--against={tmp_path}/model.py")
    table, result = table_of(done), json.loads(done.stdout.splitlines()[-1])
    training, generation = result["training"], result["generation"]
    theirs = f"{tmp_path.name}/model.py"
    assert [*table] == [
        "device", "torch", "model", "training", "speed", "MFU", f"speed of {theirs}",
        "ratio of the speeds", "peak memory", "predicted by plan.py, eager",
        "generation, float32, 1 text", "generation, float32, 3 texts",
        "generation, int8, 1 text", "generation, int8, 3 texts"]
    assert table["device"] == result["chip"] and "cpu (" in result["chip"]
    assert table["training"] == "eager, float32, 2 x 16 tokens"
    assert table["model"] == "gpt2, 1 layer, width 16, 4,368 parameters"
    assert table["speed"] == f"{training['tokens_per_second']:,.0f} tokens/s"
    assert table["MFU"].startswith(f"{training['mfu']:.1%} of ")
    assert table[f"speed of {theirs}"] == f"{training['their_tokens_per_second']:,.0f} tokens/s"
    assert table["ratio of the speeds"] == f"{training['ratio']:.2f}"
    assert table["peak memory"] == f"{training['peak_memory_bytes'] / 1e9:.2f} GB of the process"
    for B, texts in ((1, "1 text"), (3, "3 texts")):
        for prefix, dtype in (("", "float32"), ("int8_", "int8")):
            speed = generation[f"batch_{B}"][f"{prefix}tokens_per_second"]
            assert table[f"generation, {dtype}, {texts}"] == f"{speed:,.1f} tokens/s"
    assert result["predicted_memory_bytes"] == planned()["with_runtime_bytes"]

    # the other program is not in our peak
    alone = run("bench.py", *BENCH, "--rounds=1")
    alone = json.loads(alone.stdout.splitlines()[-1])["peak_memory_bytes"]
    assert training["peak_memory_bytes"] == pytest.approx(alone, abs=2e8)


def test_bench_report_on_a_simulated_gpu(tmp_path):
    """It has a name, weights in bfloat16 for generation, and the memory of tensors."""
    (tmp_path / "sitecustomize.py").write_text(SIMULATED_GPU)
    done = run("bench.py", *REPORT, "--arch=qwen3", PYTHONPATH=str(tmp_path))
    table, result = table_of(done), json.loads(done.stdout.splitlines()[-1])
    assert table["device"] == "NVIDIA GeForce RTX 4090" and table["peak memory"].endswith("tensors")
    predicted = planned("--arch=qwen3")["memory_bytes"]
    assert result["predicted_memory_bytes"] == predicted
    assert table["predicted by plan.py, eager"] == f"{predicted / 1e9:.2f} GB of tensors"
    assert [name for name in table if name.startswith("generation")] == [
        f"generation, {dtype}, {texts}" for dtype in ("float32", "bfloat16", "int8")
        for texts in ("1 text", "3 texts")]
    row = result["generation"]["batch_3"]
    for dtype in ("bfloat16", "int8"):
        speed = row[f"{dtype}_tokens_per_second"]
        assert table[f"generation, {dtype}, 3 texts"] == f"{speed:,.1f} tokens/s"
        # the table before has the same speed beside the same name
        lines = [line.split() for line in done.stdout.splitlines()
                 if line.startswith(f"this model, {dtype} ")]
        assert lines[1][3] == "3" and lines[1][6] == f"{speed:,.1f}"


def test_out_of_memory_is_one_line(tmp_path):
    """While this model is compiled, which is not tried in eager mode, and in another's step."""
    out = 'raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")'
    (tmp_path / "sitecustomize.py").write_text(
        f"import torch\ndef out(*args):\n    {out}\ntorch.compile = lambda model: out\n")
    (tmp_path / "model.py").write_text((HERE / "model.py").read_text() +
        f"class GPT(GPT):\n    def forward(self, *args):\n        {out}\n")
    for done in (run("bench.py", *REPORT, "--compile=True", PYTHONPATH=str(tmp_path)),
                 run("bench.py", *REPORT, f"--against={tmp_path}/model.py")):
        error = one_line_error(done)
        assert "out of memory" in error and "--batch_size" in error and "eager" not in done.stdout


@pytest.mark.parametrize(
    "args, says",
    [
        (["--against=nowhere.py"], "no file nowhere.py"),
        (["--against=lib/tokenizer.py"], "not a model.py with GPT"),
        (["--against=nowhere.gguf"], "needs --mode=generate and --texts=1"),
        (["--against=nowhere.gguf", "--mode=generate"], "needs --mode=generate and --texts=1"),
        (["--against=nowhere.gguf", "--mode=generate", "--texts=1"], "no file nowhere.gguf"),
        (["--steps=0"], "steps must"),
        (["--mode=speed"], "mode must"),
        (["--optimizer=sgd"], "optimizer must"),
        (["--schedule=step"], "schedule must"),
        (["--dtype=int8"], "dtype must"),
        (["--mode=data", "--dataset=none"], "none"),
        (["--n_head=3"], "multiple of n_head"),
        (["--patience=1"], "no setting 'patience'"),
        (["--their_config=none.py"], "no such config file"),
        (["--mode=generate", "--max_new_tokens=12"], "must fit after"),
        (["--mode=report", "--max_new_tokens=12"], "must fit after"),
        (["--run=out"], "run is for --mode=generate"),
        (["--mode=generate", "--run=none"], "no checkpoint in none"),
        (["--texts=1;8"], "texts takes numbers"),
        (["--texts=0"], "texts takes numbers"),
        (["--mode=generate", "--beta2=1e9"], "beta2 must be at least 0 and below 1"),
        (["--mode=loss", "--device=meta"], "device must be auto, cpu, cuda"),
        (["--mode=plan"], "python plan.py"),
        (["--mode=plan", "--gpu=T4"], "python plan.py"),
    ],
)
def test_bench_errors_are_one_line(args, says):
    assert says in one_line_error(run("bench.py", *BENCH, *args))
