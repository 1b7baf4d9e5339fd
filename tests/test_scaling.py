"""The scaling law, its fit, and the choice of a model by plan.py."""

import importlib.util
import json

import numpy as np
import pytest

from helpers import HERE, one_line_error, run
from lib import scaling
from lib.checkpoint import load_checkpoint
from lib.scaling import Law, effective_tokens, flops_per_token, interpolate_speed, meta_model


def docs_scaling():
    spec = importlib.util.spec_from_file_location("docs_scaling", HERE / "docs/scaling.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_repeated_tokens_teach_less_and_in_the_limit_nothing():
    assert effective_tokens(500.0, 1000.0, repeat_scale=5) == 500
    assert effective_tokens(1000.0, 1000.0, repeat_scale=5) == 1000
    # the first repetition is worth 1 - 1 / (2 * repeat_scale) of new tokens, to first order
    assert effective_tokens(2000.0, 1000.0, repeat_scale=100) == pytest.approx(1995, abs=1)
    assert effective_tokens(1e9, 1000.0, repeat_scale=5) == pytest.approx(6000)


def test_the_fit_finds_the_law_that_made_the_losses():
    law = Law(floor=0.4, A=5.0, a=0.25, B=100.0, b=0.4, repeat_scale=8.0)
    rng = np.random.default_rng(0)
    runs = []
    for _ in range(60):
        N, D = 10 ** rng.uniform(5, 7), 10 ** rng.uniform(5.5, 7.5)
        runs.append(dict(parameters_non_embedding=N, tokens=D, distinct_tokens=2e6,
                         bits_per_byte=law.bits_per_byte(N, D, 2e6)))
    fitted = docs_scaling().fit(runs)
    for N, D in ((3e5, 2e6), (5e6, 2e7)):
        found = fitted.bits_per_byte(N, D, 2e6)
        assert found == pytest.approx(law.bits_per_byte(N, D, 2e6), rel=2e-3)


def test_the_fit_predicts_a_budget_that_it_has_not_seen():
    """Fit to runs of one and three minutes: the chosen size is within 1% of the best after ten."""
    docs = docs_scaling()
    runs = docs.comparable_runs()["tinystories", 50257]
    law = docs.fit([run for run in runs if run["flops"] < docs.LARGE])
    unseen = [run for run in runs if run["flops"] == docs.LARGE]
    assert len(unseen) == 4
    predicted = [law.bits_per_byte(run["parameters_non_embedding"], run["tokens"],
                                   run["distinct_tokens"]) for run in unseen]
    measured = [run["bits_per_byte"] for run in unseen]
    assert predicted == pytest.approx(measured, rel=0.02)
    assert measured[int(np.argmin(predicted))] < 1.01 * min(measured)
    # lib/scaling.py has the constants of the fit to all runs
    assert docs.fit(runs) == pytest.approx(scaling.LAW, rel=0.01)


def test_a_run_of_a_minute_tells_how_hard_another_text_is():
    """As with --pilot=True: an offset from one run predicts the other sizes and times within 4%."""
    for name, runs in docs_scaling().comparable_runs().items():
        if name == ("tinystories", 50257):
            continue
        predicted = [scaling.LAW.bits_per_byte(run["parameters_non_embedding"], run["tokens"],
                                               run["distinct_tokens"]) for run in runs]
        measured = [run["bits_per_byte"] for run in runs]
        offset = measured[0] - predicted[0]
        assert [p + offset for p in predicted] == pytest.approx(measured, rel=0.04)


def test_speed_is_exact_where_it_was_measured():
    measured = [(1e6, 9000.0), (1e7, 2000.0), (1e8, 300.0)]
    for flops, speed in measured:
        assert interpolate_speed(flops, measured) == pytest.approx(speed)
    # between them the FLOP/s are between those of the neighbors, beyond them they stay
    assert 9e9 < interpolate_speed(3e6, measured) * 3e6 < 2e10
    assert interpolate_speed(2e8, measured) * 2e8 == pytest.approx(3e10)


def test_the_ladder_is_ordered_by_size():
    costs = [flops_per_token(meta_model(L, C, 128, 50257)) for L, C in scaling.LADDER]
    assert costs == sorted(costs) and set(scaling.MEASURED) <= set(scaling.LADDER)


def plan(*args: str) -> dict:
    done = run("plan.py", *args)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_more_minutes_choose_a_larger_model_and_predict_a_lower_loss(fables_data):
    plans = [plan(f"--minutes={minutes}", "--gpu=T4", f"--dataset={fables_data}")
             for minutes in (0.0003, 0.003, 0.03)]
    assert sorted(plans, key=lambda p: p["parameters"]) == plans
    assert plans[0]["bits_per_byte"] > plans[1]["bits_per_byte"] > plans[2]["bits_per_byte"]
    for p in plans:
        assert p["bits_per_byte"] == min(row["bits_per_byte"] for row in p["ladder"])
        assert {"n_layer", "n_embd", "block_size", "minutes", "memory_bytes"} <= p.keys()


def test_the_written_config_trains_for_the_minutes(tmp_path, fables_data):
    """Measures this machine. The run ends by the time, not by a number of steps."""
    to = tmp_path / "mine.py"
    chosen = plan("--minutes=0.05", "--device=cpu", f"--dataset={fables_data}", f"--to={to}")
    out = tmp_path / "out"
    done = run("train.py", str(to), f"--out_dir={out}")
    assert done.returncode == 0, done.stderr
    assert "time" in done.stdout.split("done ")[1].splitlines()[0]
    model_args = load_checkpoint(out)["model_args"]
    for key in ("n_layer", "n_head", "n_embd", "block_size"):
        assert model_args[key] == chosen[key]
    # an own config file is never replaced, one of plan.py is
    assert plan("--minutes=0.05", "--gpu=T4", f"--dataset={fables_data}", f"--to={to}")
    assert 'dtype = "auto"' in to.read_text()  # that GPU is not here
    to.write_text("n_layer = 2\n")
    error = one_line_error(run("plan.py", "--minutes=1", "--gpu=T4", f"--dataset={fables_data}",
                               f"--to={to}"))
    assert "is not from plan.py" in error and to.read_text() == "n_layer = 2\n"


@pytest.mark.parametrize("args, message", [
    (("--to=x.py",), "--to and --pilot also need --minutes"),
    (("--minutes=1", "--gpu=T4", "--pilot=True"), "leave out --gpu"),
    (("--minutes=1", "--gpu=T4", "--device_memory=100MB"), "no model of the ladder fits"),
    (("--minutes=1", "--gpu=T4", "--block_size=4096"), "block_size must be at most 3,072"),
])
def test_errors_are_one_line(fables_data, args, message):
    assert message in one_line_error(run("plan.py", *args, f"--dataset={fables_data}"))
