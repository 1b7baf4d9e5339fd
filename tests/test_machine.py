"""Device, dtype and the measured peak of the machine."""
import pytest

from helpers import tiny
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
