"""Device, dtype and the measured peak of the machine."""
import pytest

from helpers import tiny
from lib import machine
from lib.machine import measure_dtype, median_seconds, peak_flops, resolve_device, resolve_dtype


def test_device_and_dtype():
    assert resolve_dtype("float32", "cpu") == "float32"
    assert resolve_dtype("auto", "cpu") == "auto"
    assert measure_dtype(tiny()) in ("float32", "bfloat16")
    assert resolve_device("cpu") == "cpu"
    with pytest.raises(ValueError, match="float64"):
        resolve_dtype("float64", "cpu")
    with pytest.raises(ValueError, match="toaster"):
        resolve_device("toaster")
    flops, source = peak_flops("cpu", "float32")
    assert flops > 1e8 and "measured" in source
    assert median_seconds(lambda: None) < 1


def test_the_measured_peak_is_the_best_of_many(monkeypatch):
    """A clock on which single products take between 1 and 9 seconds."""
    clock, times = [0.0], iter([50.0, 9.0, 3.0, 1.0, 5.0, 9.0])
    monkeypatch.setattr(machine.time, "perf_counter", lambda: clock[0])

    def product():
        clock[0] += next(times)

    assert machine.best_seconds(product, at_least=15) == 1.0
    assert list(times) == [9.0]  # the first call, which also loads and allocates, does not count
    monkeypatch.setattr(machine, "best_seconds", lambda f, device: 2.0)
    assert peak_flops("cpu", "float32")[0] == 1024**3  # of the 2 * 1024**3 in a product
