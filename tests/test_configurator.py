"""Settings from the command line and config files, their errors, and --help."""

import ast
import math
from pathlib import Path

import pytest
import torch

from helpers import HERE, SCRIPTS, TINY, one_line_error, run
from lib.configurator import at_least, coerce, from_text, one_of, settings_of
from lib.corpus import load_meta
from lib.dataset import TokenStream


@pytest.mark.parametrize(
    "default, text, value",
    [
        (1, "7", 7),
        (1, "1e4", 10000),
        (1, "-3", -3),
        (1, "1_000", 1000),
        (1, "12345678901234567891", 12345678901234567891),
        (0.5, "1", 1.0),
        (0.5, "6e-4", 6e-4),
        (0.5, "-0.1", -0.1),
        (True, "False", False),
        (False, "true", True),
        ("a", "x=y=z", "x=y=z"),
        ("a", "", ""),
        ("a", "1", "1"),
        ("a", " two words ", " two words "),
        ("a", "True", "True"),
    ],
)
def test_values_from_the_command_line(default, text, value):
    got = from_text("key", text, default)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    "default, text",
    [
        (1, "1.5"),
        (1, "True"),
        (1, "one"),
        (1, ""),
        (1, "inf"),
        (1, "nan"),
        (0.5, "x"),
        (0.5, "nan"),
        (0.5, "inf"),
        (0.5, "False"),
        (0.5, "9007199254740993"),
        (True, "1"),
        (True, "yes"),
        (True, ""),
        (True, "None"),
    ],
)
def test_values_that_would_lose_something_are_refused(default, text):
    with pytest.raises(ValueError, match="key takes " + type(default).__name__):
        from_text("key", text, default)


@pytest.mark.parametrize(
    "default, value",
    [(1, True), (0.5, True), (True, 1), ("a", 1), (1, "1"), (1, None), (0.5, [1.0]), (1, 1.5)],
)
def test_wrong_types_in_config_files_are_refused(default, value):
    with pytest.raises(ValueError, match="key takes"):
        coerce("key", value, default)


def test_later_settings_win_and_nanogpt_configs_work(tmp_path, fables_data):
    config = tmp_path / "like_nanogpt.py"
    config.write_text(
        "import time\nwandb_log = False\nwandb_run_name = 'x' + str(time.time())\n_private = 3\n"
        "batch_size = 2 * 2\nmax_iters = 1e1 # a comment\nlearning_rate = 1\n"
    )
    done = run(
        "train.py",
        *TINY,
        f"--dataset={fables_data}",
        f"--out_dir={tmp_path}/out",
        str(config),
        "--max_iters=1",
    )
    assert done.returncode == 0, done.stderr
    settings = torch.load(tmp_path / "out/last.pt", weights_only=True)["config"]
    assert (settings["batch_size"], settings["max_iters"], settings["learning_rate"]) == (4, 1, 1.0)
    assert settings["n_embd"] == 16 and type(settings["learning_rate"]) is float


@pytest.mark.parametrize(
    "args, says",
    [
        (["--learning_rat=1"], "did you mean learning_rate?"),
        (["--xyzzy=1"], "--help lists them"),
        (["--n_layer=two"], "n_layer takes int (default 6), not 'two'"),
        (["--compile=1"], "compile takes bool"),
        (["--compile"], "write --compile=VALUE"),
        (["config/nothing.py"], "no such config file"),
        (["n_layer=2"], "no such config file"),
        (["--"], "has no value"),
        (["config"], "no such config file"),
        (["--device=toaster"], "toaster"),
        (["--dtype=float64"], "dtype must be"),
        (["--optimizer=sgd"], "optimizer must be"),
        (["--softmax_tokens=7"], "softmax_tokens (7) must not be less"),
        (["--init_from=nowhere"], "init_from must be"),
        (["--batch_size=0"], "batch_size must be at least 1"),
        (["--learning_rate=-1"], "learning_rate must be at least 0"),
        (["--beta2=1"], "beta2 must be"),
        (["--dataset=nothing"], "there is no dataset nothing"),
        (["--n_head=5"], "must be a multiple of n_head"),
        (["--dropout=1.5"], "dropout must be"),
        (["--batching=random"], "batching must be"),
        (["--block_size=100000"], "fewer than a window"),
        (["--arch=bert"], "arch must be"),
    ],
)
def test_bad_settings_are_one_line(args, says, fables_data, tmp_path):
    data = [] if "dataset" in args[0] else [f"--dataset={fables_data}"]
    assert says in one_line_error(run("train.py", f"--out_dir={tmp_path}/out", *data, *args))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text, says",
    [
        ("n_layers = 2", "did you mean n_layer?"),
        ("n_layer = '2'", "n_layer takes int"),
        ("n_layer = = 2", "line 1: SyntaxError"),
        ("x_ = 1\n\n1 / 0", "line 3: ZeroDivisionError"),
        ("import sys\nsys.exit(0)", "line 2: SystemExit"),
        ("open('nowhere')", "line 1: FileNotFound"),
        ("n_layer = None", "n_layer takes int"),
        ("from math import pi", "there is no setting 'pi'"),
    ],
)
def test_bad_config_files_are_one_line(tmp_path, text, says):
    path = tmp_path / "bad.py"
    path.write_text(text)
    error = one_line_error(run("train.py", str(path)))
    assert says in error and str(path) in error


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_lists_every_setting_with_its_reason(script):
    done = run(script, "--help")
    assert done.returncode == 0 and not done.stderr
    for name, comment in settings_of(HERE / script).items():
        assert f"--{name}=" in done.stdout and comment in done.stdout
    assert f"usage: python {Path(script).name}" in done.stdout
    assert len(settings_of(HERE / script)) >= 2


def test_configs_fit_every_script():
    trainers = settings_of(HERE / "train.py")
    for path in (HERE / "config").glob("*.py"):
        namespace = {}
        exec(path.read_text(), namespace)
        assert {name for name in namespace if not name.startswith("_")} <= set(trainers), path


def test_defaults_have_the_size_of_train_small():
    def assignments(path):
        nodes = [
            node
            for node in ast.parse((HERE / path).read_text()).body
            if isinstance(node, ast.Assign)
        ]
        return {
            node.targets[0].id: node.value.value
            for node in nodes
            if isinstance(node.value, ast.Constant)
        }

    config, defaults, bench = (
        assignments(path) for path in ("config/train_small.py", "train.py", "bench.py")
    )
    for name in (
        "dataset",
        "n_layer",
        "n_head",
        "n_embd",
        "block_size",
        "batch_size",
        "dropout",
        "bias",
    ):
        assert config[name] == defaults[name] == bench[name]


# -----------------------------------------------------------------------------
# What was given


def test_what_differs_from_the_defaults_is_printed_once(tmp_path, fables_data):
    args = [f"--dataset={fables_data}", f"--out_dir={tmp_path}/out", *TINY, "--max_iters=0"]
    lines = [
        line for line in run("train.py", *args).stdout.splitlines() if line.startswith("settings: ")
    ]
    assert len(lines) == 1 and "n_embd=16" in lines[0] and "max_iters=0" in lines[0]
    assert "batching" not in lines[0] and "n_kv_head" not in lines[0]


def test_a_renamed_setting_still_works_and_says_so_once(tmp_path, fables_data):
    config = tmp_path / "old.py"
    config.write_text("softmax_words = 200\n")
    done = run(
        "train.py",
        f"--dataset={fables_data}",
        f"--out_dir={tmp_path}/out",
        *TINY,
        "--max_iters=1",
        str(config),
        "--softmax_words=256",
    )
    assert done.returncode == 0 and done.stderr.count("softmax_words is now called") == 1
    settings = torch.load(tmp_path / "out/last.pt", weights_only=True)["config"]
    assert settings["softmax_tokens"] == 256 and "softmax_words" not in settings
    assert (
        run("eval.py", str(config), f"--out_dir={tmp_path}/out", "--valid_samples=0").returncode
        == 0
    )


@pytest.mark.parametrize(
    "args, steps",
    [
        (["--max_epochs=1", "--max_iters=3"], 3),  # both given: the first one reached
        (["--max_epochs=0.1", "--max_iters=9999"], None),
        (["--max_epochs=0.1"], None),
        (["--max_minutes=0.001"], 1),  # its first step is the last
    ],
)
def test_limits_that_are_given_end_a_run(tmp_path, fables_data, args, steps):
    tiny = [arg for arg in TINY if not arg.startswith(("--max_iters", "--lr_decay_iters"))]
    done = run(
        "train.py",
        f"--dataset={fables_data}",
        f"--out_dir={tmp_path}/out",
        *tiny,
        "--eval_interval=9999",
        *args,
    )
    assert done.returncode == 0, done.stderr
    stream = TokenStream(fables_data, "train", load_meta(fables_data))
    epoch = (len(stream) - 32) // 32 / (4 * 2)  # steps of 2 x 4 windows of 32 tokens
    last = torch.load(tmp_path / "out/last.pt", weights_only=True)["step"]
    assert last == (steps or math.ceil(0.1 * epoch))


@pytest.mark.parametrize(
    "rule, good, bad, says",
    [
        (at_least(1), [1, 9], [0, -1], "x must be at least 1, got"),
        (at_least(0, below=1), [0, 0.5], [1, 1.5, -0.1], "x must be at least 0 and below 1, got"),
        (at_least(0, at_most=3), [0, 3], [4], "x must be at least 0 and at most 3, got 4"),
        (one_of("", "int8"), ["", "int8"], ["int4"], "x must be empty or int8, got 'int4'"),
        (one_of("a", "b", "c"), ["a", "c"], [""], "x must be a, b or c, got ''"),
    ],
)
def test_rules(rule, good, bad, says):
    for value in good:
        rule("x", value)
    for value in bad:
        with pytest.raises(ValueError, match=says):
            rule("x", value)
