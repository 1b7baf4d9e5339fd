"""
Links, commands, options, paths and figures in the documents belong to this repository.

Checked are the pages, the docstrings of the scripts, the comments of the configs and the commands
of the workflow. The script's own configure() judges a command, so config files, names, types and
ranges must be right. A word in capitals (FOLDER, N, PATH/model.py), ../path, <name>, `...` and
$variable stand for anything. A line of a code block that starts with "error: " is not checked.
"""

import ast
import collections
import contextlib
import functools
import io
import itertools
import json
import re
import shlex
import sys
from pathlib import Path
from unittest import mock
from urllib.parse import unquote

import pytest

from helpers import HERE, SCRIPTS
from lib import configurator, optim
from lib.tokenizer import KINDS

PAGES = sorted(path.relative_to(HERE).as_posix() for folder in (HERE, HERE / "docs")
               for path in folder.glob("*.md"))
CONFIGURED = [*SCRIPTS, *(path.relative_to(HERE).as_posix() for path in HERE.glob("docs/*.py"))]
FOLDERS = ("assets", "config", "data", "docs", "lib", "models", "tests")
FILES = {path.name for pattern in ("*", "*/*", "data/*/*") for path in HERE.glob(pattern)}
# of pip, uv, torchrun, sbatch, git, jupyter, lm_eval and mlx_lm; --key=value: any setting
OTHER_OPTIONS = set("""
    key help upgrade editable constraint requirement quiet index-url extra-index-url extra with
    nproc_per_node nnodes max-restarts standalone rdzv_id rdzv_backend rdzv_endpoint
    nodes ntasks-per-node gpus-per-node signal depth output
    model model_args tasks prompt max-tokens""".split())
LAUNCHER = r"(?<![\w.-])(?:\S*[/\\])?(?:python[\d.]*(?:\.exe)?|torchrun|uv run)\s"
BEFORE = r"\s*(?:\$ )?(?:\w+=\S* )*(?:srun )?"  # of a command at the start of its line
PLACEHOLDER = re.compile(
    r"(?:.*/)?[A-Z][A-Z_]*(?:/.*|\.py)?|.*(?:<.*>|\.\.\.|…|[$*[\]]).*|\.\./.*|")
WORKFLOW = ".github/workflows/test.yml"
SPAN = r"(`+)(.+?)\1"
FENCE = re.compile(r"^ *```[^\n]*\n(.*?)^ *```", re.M | re.S)


def comments_of(path: Path) -> str:
    """Return the docstring of a script, or the comments of a config file."""
    source = path.read_text(encoding="utf-8")
    if path.parent.name != "config":
        return ast.get_docstring(ast.parse(source)) or ""
    return "\n".join(re.findall(r"#(?: |$)(.*)", source, re.M))


def all_texts() -> dict[str, str]:
    """Return pages, docstrings and comments by the name of their file."""
    scripts = itertools.chain.from_iterable(
        HERE.glob(pattern) for pattern in ("*.py", "docs/*.py", "data/*/prepare.py", "config/*.py"))
    pages = {name: (HERE / name).read_text(encoding="utf-8") for name in PAGES}
    workflow = (HERE / WORKFLOW).read_text(encoding="utf-8")
    pages[WORKFLOW] = "\n".join(re.findall(r"- run: (.*)", workflow))
    return pages | {path.relative_to(HERE).as_posix(): comments_of(path) for path in scripts}


TEXTS = all_texts()


def spans_of(text: str) -> list[str]:
    """Return the code spans of a text."""
    spans = re.findall(SPAN, FENCE.sub("", text), re.S)
    return [" ".join(span.split()) for _, span in spans]


def code_of(name: str, text: str) -> list[str]:
    """Return code spans and the lines of a page's code blocks, or all lines of a comment."""
    text = text.replace("\\\n", " ")
    if not name.endswith(".md"):
        return spans_of(text) + re.sub(SPAN, "", text, flags=re.S).splitlines()
    lines = spans_of(text)
    for block in FENCE.findall(text):
        for variable, value in re.findall(r'^(\w+)="([^"]*)"$', block, re.M):
            block = block.replace(f"${variable}", value)
        lines += [line for line in block.splitlines() if not line.startswith("error: ")]
    return lines


# -----------------------------------------------------------------------------
# Links

def anchors_of(text: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    counts: collections.Counter[str] = collections.Counter()
    anchors = set(re.findall(r"<a (?:id|name)=\"(.+?)\"", text))
    for heading in re.findall(r"^#{1,6} +(.+?)(?: +#+)? *$", FENCE.sub("", text), re.M):
        heading = re.sub(r"<!--.*?-->|\]\(.*?\)", "", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", heading).replace(" ", "-")
        anchors.add(f"{slug}-{counts[slug]}" if counts[slug] else slug)
        counts[slug] += 1
    return anchors


def check_links(name: str, text: str) -> list[str]:
    """Relative links, images and anchors exist."""
    prose = re.sub(SPAN, "", FENCE.sub("", text), flags=re.S)
    targets = re.findall(r"\]\(\s*([^)\s]+)|^\[[^\]]+\]: *(\S+)", prose, re.M)
    targets += re.findall(r"<(?:img|a|source)\b[^>]*?\b(?:src|srcset|href)=(\")([^\"]+)", prose)
    problems = []
    for target in (unquote(pair[1] or pair[0]) for pair in targets):
        if re.match(r"[a-z][a-z+.-]*:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (HERE / name).parent / file if file else HERE / name
        if file and not (path.exists() and path.resolve().is_relative_to(HERE.resolve())):
            problems.append(f"no file {target}")
        elif anchor and anchor not in anchors_of(path.read_text("utf-8") if file else text):
            problems.append(f"no heading {target}")
    return problems


# -----------------------------------------------------------------------------
# Commands

@functools.cache
def defaults_and_rules(script: str) -> tuple[dict, dict]:
    """Return a script's settings with their defaults, and the arguments of its configure()."""
    tree = ast.parse((HERE / script).read_text(encoding="utf-8"))
    missing, values = {s.name for s in configurator.read_settings(HERE / script)}, {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in missing:
            values[node.targets[0].id] = ast.literal_eval(node.value)
            missing.remove(node.targets[0].id)
    call = next(node for node in ast.walk(tree)
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "configure")
    known = vars(configurator) | {"optim": optim, "KINDS": KINDS}
    rules = {word.arg: eval(ast.unparse(word.value), known) for word in call.keywords}
    return values, rules | {"announce": False}


@functools.cache
def error_of(script: str, *args: str) -> str:
    """Return what the script's configure() says against these arguments, or ''."""
    said, (defaults, rules) = io.StringIO(), defaults_and_rules(script)
    with (contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()),
          contextlib.suppress(SystemExit), mock.patch.object(sys, "argv", [script, *args])):
        configurator.configure({"__file__": str(HERE / script), **defaults}, **rules)
    return said.getvalue().strip()


def options_of(script: str) -> set[str]:
    """Return the names of a script's options, also where argparse reads them."""
    if script in CONFIGURED:
        return set(defaults_and_rules(script)[0])
    return set(re.findall(r'"--(\w+)"', (HERE / script).read_text(encoding="utf-8")))


def words_of(command: str) -> list[str]:
    """Return the words of a command, without a comment and what is piped or runs next."""
    try:
        words = shlex.split(command, comments=True)
    except ValueError:  # an apostrophe in a sentence
        words = command.split()
    return list(itertools.takewhile(lambda word: not re.fullmatch(r"[|&;]+|\d?>.*", word), words))


def commands_in(line: str) -> list[tuple[str, list[str]]]:
    """Return the scripts that a line runs, with their arguments."""
    bare = re.match(r"[\w/]+\.py (?:--|config/)", line)  # `train.py --option`
    starts = [found.end() for found in re.finditer(LAUNCHER, line)] or ([0] if bare else [])
    commands = []
    for start, end in itertools.pairwise([*starts, len(line)]):
        words = words_of(line[start:end])
        at = next((i for i, word in enumerate(words) if re.fullmatch(r"[^-].*\.py\W?", word)), None)
        if at is None or {"-c", "pytest"} & set(words[:at]):
            continue
        script, args = words[at].rstrip(".,;:)"), words[at + 1:]
        if bare:
            args = [arg for arg in args if "=" in arg or arg.endswith(".py")]
        elif not re.match(BEFORE + LAUNCHER, line):  # in a sentence, which continues
            args = [word.rstrip(".,;:)") for word in itertools.takewhile(
                lambda word: word.startswith("--") or re.search(r"\.py\W*$", word), args)]
        commands.append((script, args))
    return commands


def check_commands(name: str, text: str) -> list[str]:
    """Scripts exist and accept their arguments, which name existing and valid config files."""
    problems = []
    for script, args in itertools.chain.from_iterable(map(commands_in, code_of(name, text))):
        if PLACEHOLDER.fullmatch(script):
            continue
        if not (HERE / script).is_file():
            problems.append(f"no script {script}")
            continue
        names = {re.match(r"--([^=]*)", arg)[1] for arg in args if arg.startswith("--")}
        problems += [f"{script} has no option --{option}"
                     for option in names - options_of(script) - {"help", "key"}]
        if script in CONFIGURED:
            args = [arg for arg in args if arg not in ("--help", "-h", "--key=value")
                    and not PLACEHOLDER.fullmatch(re.sub(r"^--\w+=", "", arg))]
            problems += filter(None, [error_of(script, *args)])
    return problems


def check_options(name: str, text: str) -> list[str]:
    """Each option, wherever it is named, belongs to a script that accepts its value."""
    problems = []
    for option, value in re.findall(r"(?<![\w!<-])--([A-Za-z][\w-]*)(?:=([^\s`]+))?",
                                    "\n".join(code_of(name, text))):
        value = value.strip(".,;:)\"'")
        scripts = [script for script in CONFIGURED if option in options_of(script)]
        if not scripts and option not in OTHER_OPTIONS | options_of("tests/test_crash.py"):
            problems.append(f"no script has --{option}")
        elif scripts and not PLACEHOLDER.fullmatch(value):
            if all(error_of(script, f"--{option}={value}") for script in scripts):
                problems.append(f"no script takes --{option}={value}")
    return problems


def check_targets(name: str, text: str) -> list[str]:
    """Targets of make and extras of pip and uv exist."""
    code = "\n".join(line for line in code_of(name, text)
                     if name.endswith(".md") or line.startswith("    "))
    targets = re.findall(r"^([\w-]+):", (HERE / "Makefile").read_text(), re.M)
    wanted = " ".join(re.findall(r"^ *(?:\$ )?make((?: [\w-]+)+)", code, re.M)).split()
    problems = [f"make has no target {target}" for target in wanted
                if target not in targets and not target.startswith("-")]
    extras = re.findall(r"^(\w+) = \[", (HERE / "pyproject.toml").read_text(), re.M)
    wanted = re.findall(r"(?:\.\[|--extra[ =])([\w,]+)", code)
    return problems + [f"there is no extra {extra}" for extra in ",".join(wanted).split(",")
                       if wanted and extra not in extras]


def check_paths(name: str, text: str) -> list[str]:
    """Files of the repository that are named in code exist; `*` and <name> match any."""
    folders = "|".join(FOLDERS)
    code = "\n".join(code_of(name, text))
    paths = re.findall(rf"(?<![\w/.[])(?:{folders})/[\w./<>*-]+\.(?:py|md)\b", code)
    paths += spans_of(text) if name.endswith(".md") else []
    problems = []
    for path in paths:
        pattern = re.sub(r"<\w+>|\b[A-Z][A-Z_]+(?=/|\.py)", "*", path).rstrip("/")
        if re.fullmatch(r"[\w.-]+\.(py|md|toml|ipynb|cff|svg)", pattern):
            exists = pattern in FILES
        elif re.fullmatch(rf"({folders})(/[\w.*-]+)*", pattern):
            made = pattern.startswith("data/") and not pattern.endswith(".py")  # by a prepare.py
            exists = made or any(HERE.glob(pattern))
        else:
            continue
        problems += [] if exists else [f"no file {path}"]
    return problems


# -----------------------------------------------------------------------------
# Figures: <!--name-->0.5565, where docs/figures.json has {"name": "0.5565"}. Alone on a line, a
# marker starts or ends a block.

MARKER = re.compile(r"(?!^<!--[\w.-]+-->$)<!--([\w.-]+)-->", re.M)


def check_figures(figures: dict[str, str], pages: dict[str, str]) -> list[str]:
    """Marked figures are those of figures.json; those of README.md are also in the results."""
    marked = {name: MARKER.findall(text) for name, text in pages.items()}
    problems = []
    for name, text in pages.items():
        for found in MARKER.finditer(text):
            key = found[1]
            if key not in figures:
                problems.append(f"{name}: no figure {key}")
            elif not re.match(re.escape(figures[key]) + r"(?!\d|[.,]\d)", text[found.end():]):
                problems.append(f"{name}: {key} is {figures[key]}")
            if not text[text.rfind("\n", 0, found.start()) + 1:found.start()].strip():
                problems.append(f"{name}: {key} starts a line, which would end the paragraph")
    problems += [f"{key} is used nowhere" for key in figures.keys() - set(sum(marked.values(), []))]
    results = marked.get("docs/results.md", [])
    return problems + [f"{key} is not in docs/results.md" for key in marked.get("README.md", [])
                       if key not in results]


# -----------------------------------------------------------------------------

@pytest.fixture(autouse=True)
def in_the_root(monkeypatch):
    monkeypatch.chdir(HERE)


@pytest.mark.parametrize("check", [check_links, check_commands, check_options, check_targets,
                                   check_paths])
@pytest.mark.parametrize("name", TEXTS)
def test_words(name, check):
    if name != "CHANGELOG.md" or check is check_links:  # a changelog also names what is gone
        assert check(name, TEXTS[name]) == []


def test_figures():
    pages = {name: TEXTS[name] for name in PAGES if name == "README.md" or "/" in name}
    figures = HERE / "docs/figures.json"
    problems = check_figures(json.loads(figures.read_text()) if figures.exists() else {}, pages)
    assert problems == []
    assert not (HERE / "docs").exists() or MARKER.search(TEXTS["README.md"])


@pytest.mark.parametrize("check, wrong", [
    (check_links, "[a](missing.md)"),
    (check_links, "[two\nlines](missing.md)"),
    (check_links, "![a](assets/missing.png)"),
    (check_links, '<img src="assets/missing.png">'),
    (check_links, "[![a](assets/demo.svg)](missing.md)"),
    (check_links, "[a]: missing.md"),
    (check_links, "[a](../outside.md)"),
    (check_links, "# A heading\n[a](#heading)"),
    (check_links, "```\n# A comment\n```\n[a](#a-comment)"),
    (check_links, "[a](CONTRIBUTING.md#no-such-heading)"),
    (check_commands, "`python missing.py`"),
    (check_commands, "`.venv/bin/python missing.py`"),
    (check_commands, "`uv run train.py config/missing.py`"),
    (check_commands, "```\ntrain.py config/missing.py\n```"),
    (check_commands, "`train.py --learning_rat=1`"),
    (check_commands, "```\npython train.py --out_dir=a \\\n    --stride=4\n```"),
    (check_commands, "```\ntorchrun --nproc_per_node=2 train.py --nproc_per_node=2\n```"),
    (check_commands, "`python train.py --max_iters=ten`"),
    (check_commands, "`python train.py --max_iters`"),
    (check_commands, "`python train.py --optimizer=moun`"),
    (check_commands, "`python train.py --softmax_words=4096`"),
    (check_commands, "`python sample.py prompt`"),
    (check_commands, "`python train.py && python eval.py --strid=4`"),
    (check_commands, '```\ncommon="--max_minute=1"\npython train.py $common\n```'),
    (check_commands, "`python tests/test_crash.py --kill=1`"),
    (check_commands, "`CUDA_VISIBLE_DEVICES=0 python train.py --missing=1  # a comment`"),
    (check_options, "`--missing`"),
    (check_options, "`--softmax_words`"),
    (check_options, "`--max_iters=ten`"),
    (check_options, "`pip install --missing numpy`"),
    (check_targets, "`make missing`"),
    (check_targets, "```\nmake test missing\n```"),
    (check_targets, "`pip install -e '.[dev,missing]'`"),
    (check_targets, "`uv run --extra missing app.py`"),
    (check_paths, "`python bench.py --against=hf --their_config=config/missing.py`"),
    (check_paths, "`lib/missing.py`"),
    (check_paths, "`missing.py`"),
    (check_paths, "`config/missing/`"),
    (check_paths, "`lib/missing_*.py`"),
])
def test_an_error_on_a_page_is_found(check, wrong):
    assert len(check("README.md", wrong)) >= 1


@pytest.mark.parametrize("check, wrong", [
    (check_commands, "Faster: python train.py config/missing.py"),
    (check_commands, "Data: python data/text/prepare.py --sourc=book.txt. Then train."),
    (check_commands, "    torchrun --nproc_per_node=8 missing.py"),
    (check_options, "Then add --missing=1."),
    (check_targets, "    make missing"),
    (check_paths, "The model of config/missing.py."),
])
def test_an_error_in_a_comment_is_found(check, wrong):
    assert len(check("config/train_small.py", wrong)) >= 1


@pytest.mark.parametrize("check, right", [
    (check_links, "# A `b` (c), d!\n[a](#a-b-c-d) [b](https://x.org/missing.md) `[c](missing.md)`"),
    (check_links, "# A\n# A\n[a](#a) [b](#a-1) [c](CONTRIBUTING.md#layout) [d](data/)"),
    (check_commands, "`python train.py config/train_small.py --learning_rate=6e-4 --eval_only`"),
    (check_commands, "`data/<name>/prepare.py --source=FOLDER`, `python data/NAME/prepare.py`"),
    (check_commands, "`python train.py config/NAME.py --batch_size=N ... > log.txt 2>&1`"),
    (check_commands, "`python train.py --help`, `python train.py [config/file.py] [--key=value]`"),
    (check_commands, "`.venv\\Scripts\\python train.py`, `uv run --extra app app.py --port=1`"),
    (check_commands, '```\ncommon="config/tuned.py"\npython train.py $common --seed=$i\n```'),
    (check_commands, "```\ntorchrun --rdzv_endpoint=HOST:1 train.py \\\n  --init_from=auto\n```"),
    (check_commands, '`python sample.py --start="a # b" --stop="x||y"  # nanoGPT\'s`'),
    (check_commands, "```\nerror: no dataset: python data/text/prepare.py makes it\n```"),
    (check_options, "```\nerror: --learning_rat=1: there is no setting 'learning_rat'\n```"),
    (check_options, "`--stride`, `--tokenizer=`, `git clone --depth=1`, `--key` <!--name-->1"),
    (check_commands, "`eval.py --compare`, `python -m pytest tests/test_eval.py -k compare`"),
    (check_targets, "`make test`, `make -j test`, make missing, `pip install -e '.[dev,app]'`"),
    (check_paths, "`python train.py [config/file.py ...]`, `config/NAME.py`, `PATH/lib/a.py`"),
    (check_paths, "`config/*.py`, `data/<name>/train.bin`, `out/best.pt`, `book.txt`, `tests/`"),
])
def test_what_is_right_passes(check, right):
    assert check("README.md", right) == []


def test_wrong_figures_are_found():
    def problems(readme: str, results: str) -> list[str]:
        pages = {"README.md": readme, "docs/results.md": results}
        return check_figures({"loss": "0.55", "speed": "1,000"}, pages)

    both = "A loss of <!--loss-->0.55, **<!--speed-->1,000** tokens"
    assert problems(both, both) == problems("<!--story-->\n", f"{both}.") == []
    assert problems("| <!--loss-->0.55 <!--loss-->\n", both) == ["README.md: loss is 0.55"]
    assert problems("| <!--loss-->0.56", both) == ["README.md: loss is 0.55"]
    assert problems("| <!--loss-->0.556", both) == ["README.md: loss is 0.55"]
    assert problems("| <!--loss--> 0.55", both) == ["README.md: loss is 0.55"]
    assert problems("", both.replace("1,000", "1,000,000")) == ["docs/results.md: speed is 1,000"]
    assert "README.md: no figure missing" in problems("<!--missing-->1", both)
    assert problems("", "| <!--loss-->0.55") == ["speed is used nowhere"]
    assert problems(both, "| <!--speed-->1,000") == ["loss is not in docs/results.md"]
    assert problems("a\n  <!--loss-->0.55", both) == [
        "README.md: loss starts a line, which would end the paragraph"]
