"""Which file may import which: each only from those below it."""

import ast
from pathlib import Path

import pytest

from helpers import HERE

FLOORS = [  # from top to bottom, as in CONTRIBUTING.md
    ["train", "sample", "eval", "bench", "plan", "export", "app", "data/*/prepare"],
    ["lib/checkpoint"],
    ["lib/peers"],
    ["lib/read_gguf"],
    ["lib/convert"],
    ["lib/runlog"],
    ["lib/corpus"],
    ["lib/dataset"],
    ["lib/decoding"],
    ["lib/scaling"],
    ["lib/loss"],
    ["lib/optim"],
    ["lib/lora"],
    ["lib/quantize"],
    ["model"],
    ["lib/distributed"],
    ["lib/machine"],
    ["lib/chat"],
    ["lib/tokenizer"],
    ["lib/files"],
    ["lib/configurator"],
    ["lib/console"],
]
EXCEPTIONS = {("app", "sample"), ("eval", "data/fables/prepare")}  # and one prepare may use another
FILES = sorted(
    path.relative_to(HERE).with_suffix("").as_posix()
    for path in [*HERE.glob("*.py"), *HERE.glob("lib/*.py"), *HERE.glob("data/*/*.py")]
    if path.stem not in ("__init__", "test_model")
)


def floor_of(name: str) -> int:
    found = [i for i, floor in enumerate(FLOORS) for pattern in floor if Path(name).match(pattern)]
    assert found, f"{name} has no place in the house"
    return found[0]


def imports_of(name: str) -> set[str]:
    """Return our own files that a file imports, anywhere in it."""
    modules = set()
    for node in ast.walk(ast.parse((HERE / f"{name}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {module.replace(".", "/") for module in modules if module} & set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_files_import_only_what_stands_below_them(name):
    for other in imports_of(name):
        allowed = floor_of(other) > floor_of(name) or (name, other) in EXCEPTIONS
        assert allowed or {Path(name).name, Path(other).name} == {"prepare"}, f"{name}: {other}"


def test_the_model_imports_torch_and_the_standard_library_only():
    assert imports_of("model") == set() and "lib/checkpoint" in imports_of("train")


def test_nothing_is_called_common_or_utils():
    assert not {"common", "utils"} & {Path(name).name for name in FILES}
