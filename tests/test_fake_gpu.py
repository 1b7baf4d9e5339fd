"""
Nothing is left on the CPU, and the host waits for the GPU only where it must.

fake_gpu.py runs in a process of its own, as a process can have only one simulated device.
"""
import json
import os
import subprocess
import sys

import pytest

from helpers import HERE


@pytest.fixture(scope="module")
def waits() -> dict[str, int]:
    done = subprocess.run([sys.executable, HERE / "tests/fake_gpu.py"], capture_output=True,
                          text=True, env=os.environ | {"PYTHONPATH": str(HERE)})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_training_step_never_waits(waits):
    of_training = {name: n for name, n in waits.items() if name.startswith("train")}
    assert len(of_training) == 36 and not any(of_training.values())


def test_decoding_waits_only_for_the_end(waits):
    """Once per token to know whether all rows have ended, or can continue; once per cache."""
    of_decoding = {name: n for name, n in waits.items() if name.startswith("decode")}
    assert len(of_decoding) == 48
    for name, n in of_decoding.items():
        per_token = 6 if "stop" in name else 5 if "penalties" in name else 0
        assert n == per_token + ("pad" in name), name


def test_planted_mistakes_are_found(waits):
    assert waits["mistakes found"] == 4
