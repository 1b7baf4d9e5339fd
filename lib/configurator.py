"""
Settings as plain globals, and one-line errors.

A script lists its settings at its top, each with its reason in a comment, and then calls

    config, given = configure(globals(), batch_size=at_least(1), optimizer=one_of("adamw", "muon"))

which applies `python X.py [config/file.py ...] [--key=value ...]` from left to right; the last
value wins, and --key alone sets a bool to True. A config file is Python. It runs in a namespace of
its own, and every public name that it leaves there must be a setting of the script.

`--help` prints the docstring and the settings with their defaults and comments, which are read from
the script's source. A comment line such as `# data` above a setting starts a group, unless it ends
in a period.
"""
import ast
import contextlib
import difflib
import errno
import math
import os
import shutil
import sys
import textwrap
import time
import traceback
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, NoReturn

RENAMED = {"softmax_words": "softmax_tokens"}  # old names of settings
# options of nanoGPT's scripts that do not exist here, with a hint; ignored in config files
NANOGPT_ONLY = {
    "wandb_log": "use --logger=wandb",
    "wandb_project": "use --logger=wandb, with the project fablegpt",
    "wandb_run_name": "use --logger=wandb, with the name of --out_dir",
    "init_from": "use --out_dir=FOLDER or --out_dir=gpt2",
    "dtype": "weights are float32; use --quantize=int8 for 8 bits",
    "compile": "generation is not compiled",
    "real_data": "training is measured on random tokens; --mode=data measures batches",
    "profile": "use torch.profiler",
}
# what a config file of nanoGPT leaves out: its defaults for model, data and optimizer
NANOGPT_DEFAULTS = dict(
    dataset="openwebtext", gradient_accumulation_steps=40, batch_size=12, block_size=1024,
    n_layer=12, n_head=12, n_embd=768, dropout=0.0, bias=False, pad_vocab=True, learning_rate=6e-4,
    max_iters=600000, weight_decay=0.1, beta1=0.9, beta2=0.95, grad_clip=1.0, decay_lr=True,
    warmup_iters=2000, lr_decay_iters=600000, min_lr=6e-5)


# -----------------------------------------------------------------------------
# Messages

def one_line(message: object, length: int | None = None) -> str:
    """
    Return a message, such as an exception, on one line of at most `length` characters.

    Unprintable characters are escaped: names of files and arguments could control the terminal.
    """
    line = " ".join(str(message).split())[:length]
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in line)


def fail(message: object) -> NoReturn:
    """Print one error line and exit with status 2. Of many ranks only rank 0 prints."""
    if os.environ.get("RANK", "0") == "0":
        print("error: " + one_line(message), file=sys.stderr, flush=True)
    else:
        time.sleep(2)  # torchrun ends all ranks when the first one exits: rank 0 prints before
    sys.exit(2)


@contextlib.contextmanager
def user_errors():
    """Report a ValueError or OSError as one line: use it around code that reads user input."""
    try:
        yield
    except (ValueError, OSError) as error:
        fail(error)


# -----------------------------------------------------------------------------
# Settings

def at_least(low: float, below: float = math.inf, at_most: float = math.inf) -> Callable:
    """Return a rule for configure(): low <= value, value < below and value <= at_most."""
    text = f"at least {low}"
    text += f" and below {below}" if below < math.inf else ""
    text += f" and at most {at_most}" if at_most < math.inf else ""

    def check(name: str, value: float) -> None:
        if not (low <= value <= at_most and value < below):
            raise ValueError(f"{name} must be {text}, got {value}")

    return check


def one_of(*choices: str) -> Callable:
    """Return a rule for configure(): the value is one of the choices."""
    def check(name: str, value: str) -> None:
        if value not in choices:
            *most, last = (choice or "empty" for choice in choices)
            raise ValueError(f"{name} must be {', '.join(most)} or {last}, got {value!r}")

    return check


class Setting(NamedTuple):
    name: str
    group: str
    comment: str
    default: str  # as in the script; an expression is not evaluated


def read_settings(script: str | Path) -> list[Setting]:
    """Return the settings of a script, its lower-case globals above configure(), in order."""
    source = Path(script).read_text(encoding="utf-8")
    lines, settings, group = source.splitlines(), [], "settings"
    for node in ast.parse(source).body:
        if isinstance(node, (ast.Assign, ast.Expr, ast.If)) and "configure(" in ast.unparse(node):
            break
        name = getattr(node.targets[0], "id", "") if isinstance(node, ast.Assign) else ""
        if not name.islower():
            continue
        above = lines[node.lineno - 2]
        if above.startswith("# ") and not above.startswith("# --") and above[-1] != ".":
            group = above[2:]
        comment = lines[node.end_lineno - 1].encode()[node.end_col_offset:].decode()
        settings.append(Setting(name, group, comment.strip().lstrip("# "),
                                ast.unparse(node.value)))
    return settings


def coerce(name: str, value: object, default: object) -> object:
    """
    Return value in the type of default where that loses nothing, else raise ValueError.

    1 becomes 1.0 and 1e4 becomes 10000, but a bool is not a number.
    """
    kind = type(default)
    if type(value) is kind and not (kind is float and not math.isfinite(value)):
        return value
    if kind in (int, float) and type(value) in (int, float) and math.isfinite(value):
        if kind(value) == value:
            return kind(value)
    raise ValueError(f"{name} takes {kind.__name__} (default {default!r}), not {value!r}")


def from_text(name: str, text: str, default: object) -> object:
    """Return the value of `--name=text`: a string as it is, other types as Python writes them."""
    if isinstance(default, str):
        return text
    value = {"True": True, "true": True, "False": False, "false": False}.get(text, text)
    for number in (int, float):  # int first: it is exact beyond 2**53, where a float is not
        with contextlib.suppress(ValueError):
            value = number(value) if isinstance(value, str) else value
    return coerce(name, value, default)


def read_config_file(path: str) -> dict[str, object]:
    """Run a config file and return its public names, except imported modules."""
    if not path.endswith(".py"):
        raise ValueError("config files end in .py, settings are written --key=value; see --help")
    if not Path(path).is_file():
        configs = [file.as_posix() for file in sorted(Path("config").glob("*.py"))]
        raise ValueError(f"there is no such config file{did_you_mean(path, configs)}")
    namespace: dict[str, object] = {"__file__": path, "__name__": "config"}
    try:
        exec(compile(Path(path).read_text(encoding="utf-8"), path, "exec"), namespace)
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == path]
        line = lines[-1] if lines else getattr(error, "lineno", "?")
        raise ValueError(f"line {line}: {type(error).__name__}: {error}") from None
    return {name: value for name, value in namespace.items()
            if not name.startswith("_") and not isinstance(value, types.ModuleType)}


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return '; did you mean X?' for the most similar name, or '' if none is similar."""
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def nanogpt_defaults(values: dict, settings: dict, given: set[str]) -> dict[str, object]:
    """Return nanoGPT's defaults for what one of its config files (values) leaves out, else {}."""
    if "n_layer" not in settings or not {"wandb_log", "wandb_project"} & set(values):
        return {}
    missing = {name: value for name, value in NANOGPT_DEFAULTS.items()
               if name not in given and value != settings.get(name, value)}
    if values.get("decay_lr") is False:
        missing["warmup_iters"] = 0  # without decay nanoGPT has no warmup
    return missing


def print_help(script: str, doc: str, settings: dict) -> None:
    """Print the docstring of a script and its settings in groups, 100 columns wide or less."""
    print(f"{doc.strip()}\n\nusage: python {sys.argv[0]} [config/file.py ...] [--key=value ...]")
    columns = min(100, shutil.get_terminal_size((100, 24)).columns)
    indent = 6 + max(len(f"{name}={value}") for name, value in settings.items())
    group = ""
    for setting in read_settings(script):
        if setting.group != group:
            group = setting.group
            print(f"\n{group}")
        option = f"  --{setting.name}={settings[setting.name]}".ljust(indent)
        lines = textwrap.wrap(setting.comment, max(30, columns - indent), break_on_hyphens=False)
        print((option + f"\n{' ' * indent}".join(lines)).rstrip())


def configure(namespace: dict[str, object], skip_settings_of: str = "", announce: bool = False,
              **rules: Callable) -> tuple[dict[str, object], set[str]]:
    """
    Apply the command line to the settings in namespace, which is globals() of the script.

    Return all settings and the names that a config file or the command line set. Bad input ends the
    script with one error line and status 2.

    skip_settings_of: a script in the same folder. Its settings are ignored in config files, so that
    a training config also serves to evaluate and to measure. announce: print what differs from the
    defaults. rules: for some settings, at_least() or one_of().
    """
    script = str(namespace["__file__"])
    defaults = {setting.name: namespace[setting.name] for setting in read_settings(script)}
    settings, given, old_names = dict(defaults), set(), set()
    rank0 = os.environ.get("RANK", "0") == "0"
    ignored = set(NANOGPT_ONLY)
    if skip_settings_of:
        with user_errors():  # the other script may be missing beside a copy of this one
            others = {s.name for s in read_settings(Path(script).with_name(skip_settings_of))}
        ignored |= others | {old for old, new in RENAMED.items() if new in others}
    if hasattr(sys.stdout, "reconfigure"):  # print ? for what its encoding cannot represent
        sys.stdout.reconfigure(errors="replace")
    if "--help" in sys.argv[1:] or "-h" in sys.argv[1:]:
        try:
            print_help(script, str(namespace.get("__doc__") or ""), settings)
            sys.stdout.flush()
        except OSError as error:  # a reader such as head has seen enough: EPIPE, on Windows EINVAL
            if error.errno not in (errno.EPIPE, errno.EINVAL):
                raise
        os._exit(0)

    def assign(name: str, value: object, convert: Callable) -> None:
        if RENAMED.get(name) in settings:
            if name not in old_names and rank0:
                print(f"note: {name} is now called {RENAMED[name]}", file=sys.stderr)
            old_names.add(name)
            name = RENAMED[name]
        if name not in settings:
            if name in NANOGPT_ONLY:
                hint = f"; {NANOGPT_ONLY[name]}"
            else:
                hint = (did_you_mean(name, settings)
                        or f"; python {Path(script).name} --help lists them")
            raise ValueError(f"there is no setting {name!r}{hint}")
        settings[name] = convert(name, value, defaults[name])
        given.add(name)

    args = sys.argv[1:]
    for i, arg in enumerate(args):
        following = args[i + 1] if args[i + 1:] and not args[i + 1].startswith("-") else "VALUE"
        try:
            name, equals, text = arg.lstrip("-").partition("=")
            if arg.startswith("--") and equals:
                assign(name, text, from_text)
            elif (arg.startswith("--") and isinstance(defaults.get(name, True), bool)
                  and following.lower() not in ("true", "false")):
                assign(name, True, coerce)
            elif arg.startswith("--"):
                raise ValueError(f"a value is missing: write {arg}={following}")
            elif equals and name in settings:
                raise ValueError(f"did you mean --{name}={text}?")
            elif "source" in settings and not arg.endswith(".py"):
                raise ValueError(f"config files end in .py; did you mean --source={arg}?")
            else:
                values = read_config_file(arg)
                for name, value in values.items():
                    if name in settings or RENAMED.get(name) in settings or name not in ignored:
                        assign(name, value, coerce)
                more = nanogpt_defaults(values, settings, given)
                settings.update(more)
                if more and rank0:
                    hint = "; add --logger=wandb to log to wandb" if values.get("wandb_log") else ""
                    print(f"{arg} is a config file of nanoGPT: using nanoGPT's defaults for "
                          f"{', '.join(more)}{hint}")
        except (ValueError, OSError) as error:
            fail(f"{arg}: {error}")
    with user_errors():
        for name, rule in rules.items():
            rule(name, settings[name])
    changed = [f"{name}={value}" for name, value in settings.items() if value != defaults[name]]
    if announce and changed and rank0:
        print(textwrap.fill(", ".join(changed), 100, initial_indent="settings: ",
                            subsequent_indent=" " * 10, break_long_words=False,
                            break_on_hyphens=False))
    namespace.update(settings)
    return settings, given
