"""Settings from the command line and config files, their errors, and --help."""

import ast
import io
import math
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from helpers import HERE, SCRIPTS, TINY, one_line_error, run
from lib.checkpoint import read_checkpoint, save_checkpoint
from lib.configurator import at_least, coerce, from_text, one_line, one_of, read_settings
from lib.console import for_output, print_table, progress, visible
from lib.corpus import load_meta
from lib.dataset import TokenStream
from test_bench import BENCH


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
        (["--seed"], "write --seed=VALUE"),
        (["--max_iters", "3"], "write --max_iters=3"),
        (["--max_iters", "--seed=3"], "write --max_iters=VALUE"),
        (["--compile", "False"], "write --compile=False"),
        (["config/nothing.py"], "no such config file"),
        (["config/nano.py"], "did you mean config/train_nano.py?"),
        (["n_layer=2"], "did you mean --n_layer=2?"),
        (["-n_layer=2"], "did you mean --n_layer=2?"),
        (["--"], "there is no setting ''"),
        (["config"], "config files end in .py"),
        (["--wandb_log=True"], "use --logger=wandb"),
        (["--wandb_run_name=x"], "use --logger=wandb"),
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


def test_a_bool_alone_is_true(tmp_path, fables_data):
    args = [f"--dataset={fables_data}", f"--out_dir={tmp_path}/out", *TINY, "--max_iters=0"]
    done = run("train.py", *args, "--log_x")
    assert done.returncode == 0 and "log_x=True" in done.stdout, done.stderr


def test_a_text_file_is_no_config_file_of_a_prepare_script(tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("It was a dark night.")
    error = one_line_error(run("data/text/prepare.py", str(book), f"--out_dir={tmp_path}"))
    assert error.endswith(f"did you mean --source={book}?")


def test_options_of_nanogpts_sample_py_name_ours(tmp_path):
    assert "use --out_dir=" in one_line_error(run("sample.py", "--init_from=gpt2"))
    assert "quantize=int8" in one_line_error(run("sample.py", "--dtype=float16"))


@pytest.mark.parametrize(
    "text, says",
    [
        ("n_layers = 2", "did you mean n_layer?"),
        ("n_layer = '2'", "n_layer takes int"),
        ("n_layer = = 2", "line 1: SyntaxError"),
        ("x_ = 1\n\n1 / 0", "line 3: ZeroDivisionError"),
        ("import sys\nsys.exit(0)", "line 2: SystemExit"),
        ("open('nowhere')", "line 1: FileNotFound"),
        ("raise KeyboardInterrupt", "line 1: KeyboardInterrupt"),
        ("n_layer = None", "n_layer takes int"),
        ("from math import pi", "there is no setting 'pi'"),
    ],
)
def test_bad_config_files_are_one_line(tmp_path, text, says):
    path = tmp_path / "bad.py"
    path.write_text(text)
    error = one_line_error(run("train.py", str(path)))
    assert says in error and str(path) in error


def settings_by_group(script: str) -> dict[str, dict[str, str]]:
    """Read the settings from the lines of a script: their comments by group and name."""
    groups, group = {}, "settings"
    for line in (HERE / script).read_text().splitlines():
        if re.fullmatch("# [a-z][a-z ]*", line):
            group = line[2:]
        elif setting := re.fullmatch(r"([a-z]\w*) = ([^#]*)(?:  # (.*))?", line):
            groups.setdefault(group, {})[setting[1]] = setting[3] or ""
        elif "configure(" in line:
            return groups
    raise AssertionError(f"{script} does not call configure()")


def test_a_default_may_be_an_expression(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("a = 20 * 1000  # steps\nb = 1e-4\nconfigure(globals())\n")
    assert read_settings(script) == [("a", "settings", "steps", "20 * 1000"),
                                     ("b", "settings", "", "0.0001")]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_lists_every_setting_with_its_reason_under_its_group(script):
    done = run(script, "--help", COLUMNS="100")
    assert done.returncode == 0 and not done.stderr
    doc, *sections = re.split(r"\n\n(?=[a-z][a-z ]*\n  --)", done.stdout)
    source = (HERE / script).read_text()
    expected = f"{ast.get_docstring(ast.parse(source)).strip()}\n\nusage: python {script} "
    assert doc.startswith(expected)
    groups = settings_by_group(script)
    assert [section.split("\n")[0] for section in sections] == list(groups)
    for section, settings in zip(sections, groups.values()):
        for name, comment in settings.items():
            assert re.search(rf"^  --{name}=\S* *{re.escape(comment[:20])}", section, re.MULTILINE)
            assert comment in " ".join(section.split())
        assert section.count("\n  --") == len(settings)
    assert all(len(line) <= 100 for line in done.stdout.splitlines())
    names = [name for settings in groups.values() for name in settings]
    read = [tuple(setting[:3]) for setting in read_settings(HERE / script)]
    assert read == [(name, group, comment) for group, settings in groups.items()
                    for name, comment in settings.items()]
    assert len(names) >= 2
    assert len(names) <= 8 or len(groups) > 1
    narrow = run(script, "--help", COLUMNS="70").stdout
    assert max(map(len, narrow[len(doc):].splitlines())) <= 70


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script != "train.py"])
def test_every_setting_has_a_comment(script):
    assert all(setting.comment for setting in read_settings(HERE / script))


def test_configs_fit_every_script():
    trainers = {setting.name for setting in read_settings(HERE / "train.py")}
    for path in (HERE / "config").glob("*.py"):
        namespace = {}
        exec(path.read_text(), namespace)
        assert {name for name in namespace if not name.startswith("_")} <= trainers, path


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
# What the scripts print


def test_progress_is_shown_in_terminals_and_fits_into_them(monkeypatch, capsys):
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    assert list(progress(range(3), "counting")) == [0, 1, 2]
    assert log.getvalue() == "" and capsys.readouterr().out == "counting ...\n"
    log.isatty, log.fileno = lambda: True, lambda: 1
    with progress(None, "counting", total=9) as bar:
        for columns in (60, 40, 80):
            size = os.terminal_size((columns, 20))
            monkeypatch.setattr(os, "get_terminal_size", lambda fd, size=size: size)
            bar.refresh()
            assert len(log.getvalue().split("\r")[-1].rstrip()) == columns - 1
    assert "counting: " in log.getvalue() and capsys.readouterr().out == ""


def test_a_redirected_log_has_lines_and_no_progress_bars(trained, fables_data, tmp_path):
    bench = ["bench.py", "--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16"]
    bench += ["--batch_size=2", "--rounds=2", "--steps=1", "--compile=False", "--device=cpu"]
    bench += ["--dtype=float32", f"--dataset={fables_data}", "--seeds=1"]
    loss = ["--mode=loss", "--max_iters=2"]
    generate = ["--mode=generate", "--max_new_tokens=4", "--texts=1,2"]
    story = tmp_path / "story.txt"
    story.write_text("the fox saw a hare.\n<|endoftext|>\n" * 40)
    text = ["data/text/prepare.py", f"--source={story}", "--tokenizer=char"]
    fables = ["data/fables/prepare.py", "--train_stories=20", "--val_stories=5"]
    for command, says in (
        (["eval.py", f"--out_dir={trained}", "--valid_samples=2"], ["measuring", "sampling 2"]),
        (bench, ["measuring 2 rounds"]),
        ([*bench, "--mode=data"], []),
        ([*bench, *loss], ["training this model, seed 1337"]),
        ([*bench, *generate], ["generating 1 text", "generating 2 texts"]),
        (["plan.py", "--device=cpu"], []),
        (["export.py", f"--out_dir={trained}", f"--to={tmp_path}/int8"], []),
        (text, ["training the tokenizer", "tokenizing train", "tokenizing val"]),
        (fables, ["writing 25", "training the tokenizer", "tokenizing train", "tokenizing val"]),
    ):
        to = [f"--out_dir={tmp_path}/{command[1][2:8]}"] if "prepare" in command[0] else []
        done = run(*command, *to)
        assert done.returncode == 0 and done.stderr == "", done.stderr
        assert "\r" not in done.stdout and "it/s" not in done.stdout
        lines = [line for line in done.stdout.splitlines() if line.endswith(" ...")]
        assert len(lines) == len(says), (lines, says)
        assert all(line.startswith(start) for line, start in zip(lines, says)), (lines, says)


def test_tables_are_aligned(capsys):
    print_table([["", "a", "second"], ["group"], ["  name", "1,000"], ["x", "", "7"]])
    assert capsys.readouterr().out == (
        "            a  second\ngroup\n  name  1,000\nx                   7\n"
    )


# -----------------------------------------------------------------------------
# What was given


ESCAPE = "\x1b]0;renamed\x07\u202e"  # a terminal would take it as the title of its window


def test_control_characters_are_visible():
    assert visible("a b\tc\nd \u00e9 \u3000 \U0001f469\u200d\U0001f4bb") == (
        "a b\tc\nd \u00e9 \u3000 \U0001f469\u200d\U0001f4bb")
    assert visible(ESCAPE) == "\\x1b]0;renamed\\x07\\u202e" and visible("\x85\x9b") == "\\x85\\x9b"
    assert one_line(f"a{ESCAPE}\nb", 6) == "a\\x1b]"


def test_what_messages_quote_is_visible(tmp_path, trained, fables_data):
    """Arguments, names of files and what is in them reach a terminal without control characters."""
    odd = tmp_path / ESCAPE
    shutil.copytree(trained, odd)
    shutil.copytree(fables_data, tmp_path / f"data{ESCAPE}")
    checkpoint = read_checkpoint(trained / "best.pt")
    checkpoint["config"]["dataset"] = ESCAPE
    save_checkpoint(odd, "best.pt", checkpoint)
    (odd / "prev.pt").write_text("damaged")
    config = tmp_path / "config.py"
    config.write_text(f"raise ValueError({ESCAPE!r})")
    against = tmp_path / f"peer{ESCAPE}"
    against.mkdir()
    shutil.copy(HERE / "model.py", against)
    for command in (
            ["sample.py", f"--out_dir={odd}", "--num_samples=1", "--max_new_tokens=2"],
            ["sample.py", f"--out_dir={ESCAPE}"], ["sample.py", f"--{ESCAPE}=1"],
            ["sample.py", f"--out_dir={odd}", f"--start={ESCAPE}zz", "--next_token=1"],
            ["eval.py", f"--out_dir={odd}", f"--dataset={tmp_path}/data{ESCAPE}"],
            ["export.py", f"--out_dir={odd}", f"--to={tmp_path}/to{ESCAPE}"],
            ["sample.py", f"--out_dir=gpt2@{ESCAPE}"],
            ["bench.py", *BENCH, f"--against={against}/model.py"],
            ["data/text/prepare.py", f"--source={against}/model.py", "--tokenizer=char",
             f"--out_dir={tmp_path}/text{ESCAPE}"],
            ["train.py", str(config)], ["plan.py", f"--dataset={ESCAPE}", "--max_epochs=1"],
            ["train.py", f"--dataset={tmp_path}/data{ESCAPE}", f"--out_dir={odd}",
             "--init_from=resume", *TINY]):
        done = run(*command)
        shown = done.stdout + done.stderr
        assert not set(shown) & set(ESCAPE) - set("]0;renamed"), (command, shown)
        assert "\\x1b" in shown and "Traceback" not in shown, (command, shown)


def test_samples_are_exact_unless_a_terminal_shows_them(monkeypatch):
    assert for_output(ESCAPE) == ESCAPE
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert for_output(ESCAPE) == visible(ESCAPE)


def test_what_differs_from_the_defaults_is_printed_once(tmp_path, fables_data):
    args = [f"--dataset={fables_data}", f"--out_dir={tmp_path}/out", *TINY, "--max_iters=0"]
    stdout = run("train.py", *args).stdout
    said = re.match(r"settings: (.*(?:\n {10}.*)*)\n", stdout)
    assert stdout.count("settings: ") == 1 and max(map(len, said[0].splitlines())) <= 100
    settings = dict(setting.split("=") for setting in re.split(r",\s+", said[1]))
    assert settings["n_embd"] == "16" and settings["max_iters"] == "0"
    assert "batching" not in settings and "n_kv_head" not in settings


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


# -----------------------------------------------------------------------------
# Config files in nanoGPT's style, which rely on its defaults

GPT2_SMALL = """# a GPT-2 of 124M parameters on OpenWebText
wandb_log = True
wandb_project = 'owt'
batch_size = 12
gradient_accumulation_steps = 5 * 8
max_iters = 600000
"""
CHARACTERS = """# a small model of characters
out_dir = 'out-chars'
wandb_log = False
wandb_project = 'chars'
dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2
learning_rate = 1e-3
beta2 = 0.99
"""
CONSTANT = """
wandb_log = False
batch_size = 1
learning_rate = 3e-5
decay_lr = False
"""


def nanogpt_settings(tmp_path: Path, text: str, data: Path, *args: str) -> tuple[dict, int, str]:
    """Train for no step with a config file. Return the settings, the parameters, the output."""
    (tmp_path / "theirs.py").write_text(text)
    done = run("train.py", str(tmp_path / "theirs.py"), f"--dataset={data}", *args, "--max_iters=0",
               f"--out_dir={tmp_path}/out", "--eval_iters=1", "--device=cpu", "--compile=False",
               "--dtype=float32")
    assert done.returncode == 0, done.stderr
    checkpoint = torch.load(tmp_path / "out/best.pt", weights_only=True)
    config = checkpoint["model_args"] | checkpoint["config"]
    n_params = sum(weight.numel() for name, weight in checkpoint["model"].items()
                   if name not in ("lm_head.weight", "transformer.wpe.weight"))
    return config | {"vocab_size": checkpoint["model_args"]["vocab_size"]}, n_params, done.stdout


def test_a_nanogpt_config_gives_nanogpts_shape(tmp_path, gpt2_data):
    """Counted as nanoGPT does, without positions: 123.6M, with its vocabulary of 50,304."""
    small = ["--batch_size=1", "--gradient_accumulation_steps=1"]
    config, n_params, said = nanogpt_settings(tmp_path, GPT2_SMALL, gpt2_data, *small)
    assert n_params == 50304 * 768 + 12 * (12 * 768 * 768 + 2 * 768) + 768 == 123_587_328
    expected = dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50304,
                    bias=False, dropout=0.0, learning_rate=6e-4, min_lr=6e-5, beta2=0.95,
                    weight_decay=0.1, warmup_iters=2000, lr_decay_iters=600000, batch_size=1)
    assert {name: config[name] for name in expected} == expected
    notes = [line for line in said.splitlines() if "is a config file of nanoGPT" in line]
    assert len(notes) == 1 and "n_layer" in notes[0] and "--logger=wandb" in notes[0]
    assert "device" not in notes[0] and "dtype" not in notes[0]


def test_a_nanogpt_config_of_characters_gives_nanogpts_shape(tmp_path, fables_data):
    """What the file says stays, and only GPT-2's vocabulary is padded."""
    config, n_params, _ = nanogpt_settings(tmp_path, CHARACTERS, fables_data, "--batch_size=1")
    vocab_size = load_meta(fables_data)["vocab_size"]
    assert config["vocab_size"] == vocab_size and config["bias"] is False
    assert n_params == vocab_size * 384 + 6 * (12 * 384 * 384 + 2 * 384) + 384
    assert (config["dropout"], config["beta2"], config["warmup_iters"]) == (0.2, 0.99, 2000)


def test_a_nanogpt_config_with_a_constant_rate_has_no_warmup(tmp_path, fables_data):
    tiny = ["--n_layer=1", "--n_head=1", "--n_embd=8", "--block_size=16"]
    config, _, _ = nanogpt_settings(tmp_path, CONSTANT, fables_data, *tiny)
    assert (config["warmup_iters"], config["n_layer"], config["learning_rate"]) == (0, 1, 3e-5)
    ours = "learning_rate = 3e-5\n"  # without its marks a file keeps our defaults
    config, _, said = nanogpt_settings(tmp_path, ours, fables_data, *tiny, "--overwrite")
    assert config["warmup_iters"] == 200 and "nanoGPT" not in said
