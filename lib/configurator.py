"""
Settings as plain globals. A script lists them at its top, each with its reason in a comment, and then calls

    config = configure(globals())

which applies `python X.py [config/file.py ...] [--key=value ...]` from left to right, later wins. A config file is
Python: it runs in a namespace of its own, and every public name that it leaves there must be a setting of the script.
`--help` prints the settings with the defaults and comments of the script's own source.
"""
import ast
import contextlib
import difflib
import math
import os
import sys
import traceback
import types
from pathlib import Path

NANOGPT_ONLY = {"wandb_log", "wandb_project", "wandb_run_name"}  # its config files name these; here they do nothing


def fail(message: object) -> None:
    """Print one line and leave with status 2. Of many ranks only the first one speaks."""
    if os.environ.get("RANK", "0") == "0":
        print("error: " + " ".join(str(message).split()), file=sys.stderr, flush=True)
    sys.exit(2)


@contextlib.contextmanager
def user_errors():
    """Around code that reads what a user gave: a ValueError or OSError in it is theirs to mend, so one line says it."""
    try:
        yield
    except (ValueError, OSError) as error:
        fail(error)


def settings_of(script: str | Path) -> dict[str, str]:
    """Names and comments of a script's settings: its lower-case globals, down to the call of configure()."""
    source = Path(script).read_text(encoding="utf-8")
    lines = source.splitlines()
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.Assign, ast.Expr)) and ast.unparse(node.value).startswith("configure("):
            break
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id.islower():
            comment = lines[node.end_lineno - 1].encode()[node.end_col_offset:].decode()
            found[node.targets[0].id] = comment.strip().lstrip("# ")
    return found


def coerce(name: str, value: object, default: object) -> object:
    """`value` in the type of `default`, where that loses nothing: 1 becomes 1.0 and 1e4 10000; a bool is no number."""
    kind = type(default)
    if type(value) is kind and not (kind is float and not math.isfinite(value)):
        return value
    if kind in (int, float) and type(value) in (int, float) and math.isfinite(value) and kind(value) == value:
        return kind(value)
    raise ValueError(f"{name} takes {kind.__name__} (default {default!r}), not {value!r}")


def from_text(name: str, text: str, default: object) -> object:
    """The text behind `--name=` as a value: as it stands for a string, as Python writes it for the other types."""
    if isinstance(default, str):
        return text
    value: object = {"True": True, "true": True, "False": False, "false": False}.get(text, text)
    for number in (int, float):  # int first: it is exact beyond 2**53, where a float is not
        with contextlib.suppress(ValueError):
            value = number(value) if isinstance(value, str) else value
    return coerce(name, value, default)


def read_config_file(path: str) -> dict[str, object]:
    """Run a config file and return its public names, imported modules aside."""
    if not Path(path).is_file():
        raise ValueError("there is no such config file, and settings are written --key=value, see --help")
    namespace: dict[str, object] = {"__file__": path, "__name__": "config"}
    try:
        exec(compile(Path(path).read_text(encoding="utf-8"), path, "exec"), namespace)
    except (Exception, SystemExit) as error:  # whatever it is, it is the file's
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        line = lines[-1] if lines else getattr(error, "lineno", "?")
        raise ValueError(f"line {line}: {type(error).__name__}: {error}") from None
    return {k: v for k, v in namespace.items() if not k.startswith("_") and not isinstance(v, types.ModuleType)}


def print_help(script: str, doc: str, comments: dict[str, str], settings: dict[str, object]) -> None:
    print(doc.strip() + f"\n\nusage: python {Path(script).name} [config/file.py ...] [--key=value ...]\n")
    width = max(len(f"--{k}={v}") for k, v in settings.items())
    for name, value in settings.items():
        print(f"  {f'--{name}={value}':<{width}}  {comments[name]}".rstrip())


def configure(namespace: dict[str, object], skip_settings_of: str = "") -> dict[str, object]:
    """
    Apply the command line to the settings in `namespace` and return all of them. Bad input: one line, status 2.

    skip_settings_of names a sibling script: its settings may stand in config files and are passed over, so that a
    training config also serves to evaluate and to measure.
    """
    script = str(namespace["__file__"])
    comments = settings_of(script)
    settings = {name: namespace[name] for name in comments}
    skip = set(NANOGPT_ONLY)
    if skip_settings_of:
        skip |= set(settings_of(Path(script).with_name(skip_settings_of)))
    if "--help" in sys.argv[1:] or "-h" in sys.argv[1:]:
        with contextlib.suppress(BrokenPipeError):  # a reader such as head may have enough
            print_help(script, str(namespace.get("__doc__") or ""), comments, settings)
            sys.stdout.flush()
        os._exit(0)

    def assign(name: str, value: object, convert) -> None:
        if name not in settings:
            near = difflib.get_close_matches(name, settings, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"python {Path(script).name} --help lists them"
            raise ValueError(f"there is no setting {name!r}; {hint}")
        settings[name] = convert(name, value, settings[name])

    for arg in sys.argv[1:]:
        try:
            if not arg.startswith("--"):
                for name, value in read_config_file(arg).items():
                    if name in settings or name not in skip:
                        assign(name, value, coerce)
            elif "=" in arg:
                name, _, text = arg[2:].partition("=")
                assign(name, text, from_text)
            else:
                raise ValueError(f"it lacks a value: write {arg}=VALUE")
        except (ValueError, OSError) as error:
            fail(f"{arg}: {error}")
    namespace.update(settings)
    return settings
