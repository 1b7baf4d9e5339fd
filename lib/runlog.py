"""
The record of a run: the lines that it prints, log.jsonl, loss.png, and logging services.
"""
import atexit
import contextlib
import json
import math
import statistics
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from lib import machine
from lib.configurator import one_line, user_errors
from lib.console import duration
from lib.files import (
    LARGEST,
    check_regular,
    is_number,
    open_to_append,
    replace_atomically,
    write_atomically,
)
from lib.tokenizer import get_tokenizer

# -----------------------------------------------------------------------------
# Printed lines

WIDTH = 100  # columns of a sample; the other lines are shorter


def first_column(name: str, step: int, last_step: float) -> str:
    """Return the start of a line: `step  250/2000`, or without a limit `step    250`."""
    if last_step == math.inf:
        return f"{name} {step:>6}"
    return f"{name} {step:>{len(str(last_step))}}/{last_step}"


def step_line(step: int, last_step: float, loss: float, lr: float, grad_norm: float, speed: float,
              mfu: float, seconds_left: float, spike: bool) -> str:
    """Return the log line of a step. speed: tokens per second. A spike replaces the time left."""
    left = f"{duration(seconds_left):>7} left" if seconds_left < math.inf else ""
    columns = [first_column("step", step, last_step), f"loss {loss:.4f}", f"lr {lr:.1e}",
               f"norm {grad_norm:.2f}", f"{speed:>7,.0f} tok/s", f"mfu {mfu:5.1%}",
               "spike" if spike else left]
    return " | ".join(column for column in columns if column)


def eval_line(step: int, last_step: float, losses: dict[str, float], note: str = "") -> str:
    """Return the line of an evaluation. losses: by split."""
    columns = [first_column("eval", step, last_step), f"train {losses['train']:.4f}",
               f"val {losses['val']:.4f}", note]
    return " | ".join(column for column in columns if column)


def sample_lines(step: int, last_step: float, text: str) -> str:
    """Return one or two lines with the start of a sample, aligned with the line of a step."""
    indent = len(first_column("step", step, last_step))
    text = one_line("".join(c if c.isprintable() else " " for c in text)) or "(empty)"
    lines = textwrap.wrap(text, WIDTH - indent - 3, max_lines=2, placeholder=" ...")
    return "\n".join(f"{name:<{indent}} | {line}" for name, line in zip(("sample", ""), lines))


def why_stopped(step: int, last_step: float, out_of_time: bool, patience: int) -> str:
    """Return why a run ended before last_step, or ''."""
    if step >= last_step:
        return ""
    return ", time limit reached" if out_of_time else (
        f", no lower validation loss in {patience} evaluations")


def tokenizer_or_none(meta: dict, report: Callable[[str], None]):
    """Return the tokenizer of a dataset. If it does not work here, report why and return None."""
    try:
        tokenizer = get_tokenizer(meta)
        tokenizer.decode([0])  # may need a package
        return tokenizer
    except (ValueError, OSError, LookupError) as error:  # training works without it
        report(f"no samples of the model: {one_line(error, 200)}")
        return None


# -----------------------------------------------------------------------------
# Time

class StepTimer:
    """
    Measure the speed of training and predict the time left.

    step: where the run starts or resumes. seconds: the time that it took until then.
    """

    def __init__(self, step: int, seconds: float, device: str):
        self.device = device
        self.began = time.perf_counter() - seconds
        # since the start or the resume
        self.steps, self.step_seconds = 0, 0.0
        self.evaluations, self.eval_seconds = 0, 0.0
        self.start_lap(step)

    @property
    def seconds(self) -> float:
        """The time of the whole run."""
        return time.perf_counter() - self.began

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """Exclude an evaluation from the speed."""
        machine.synchronize(self.device)  # the steps before it
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        self.lap_start += seconds
        self.evaluations, self.eval_seconds = self.evaluations + 1, self.eval_seconds + seconds

    def start_lap(self, step: int) -> None:
        """Measure the speed from this step on."""
        self.lap_start, self.first_step = time.perf_counter(), step
        self.tokens, self.flops = 0, 0

    def count(self, tokens: int, flops: int) -> None:
        self.tokens, self.flops = self.tokens + tokens, self.flops + flops

    def end_lap(self, step: int) -> tuple[float, float, float]:
        """Return the milliseconds per step and the tokens and FLOPs per second of a lap."""
        seconds, steps = time.perf_counter() - self.lap_start, step - self.first_step
        self.step_seconds, self.steps = self.step_seconds + seconds, self.steps + steps
        return 1000 * seconds / steps, self.tokens / seconds, self.flops / seconds

    def seconds_left(self, step: int, last_step: float, eval_interval: int,
                     limit: float) -> float:
        """
        Return the time until last_step or until the run took `limit` seconds (0: no limit).

        Call it after end_lap(). The evaluation at `step` is still to come.
        """
        left = math.inf
        if last_step < math.inf:
            evaluations = 1 + math.ceil(last_step / eval_interval) - math.ceil(step / eval_interval)
            left = (last_step - step) * self.step_seconds / self.steps
            left += evaluations * self.eval_seconds / max(1, self.evaluations)
        return max(0.0, min(left, limit - self.seconds)) if limit else left


# -----------------------------------------------------------------------------
# Files and services

class RunLog:
    """
    The log of the run in out_dir, a JSON object per line with `step` and the metrics of that step.

    write=False: read only, as on all ranks but the first.
    """

    def __init__(self, out_dir: str | Path, write: bool):
        self.path = Path(out_dir) / "log.jsonl"
        self.write = write
        self.send: Callable[[int, dict], object] = lambda step, metrics: None  # to a service

    def add(self, step: int, **metrics: float) -> None:
        """Append the metrics of a step. A metric that is not finite becomes null."""
        if not self.write:
            return
        metrics = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        with user_errors():
            try:
                with open_to_append(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"step": step, **metrics}) + "\n")
            except OSError as error:
                raise OSError(f"{self.path} could not be written ({error.strerror}); the "
                              "checkpoints saved before are unchanged") from None
        self.send(step, metrics)

    def records(self) -> list[dict]:
        """Return all records; lines truncated by a kill are skipped."""
        found = []
        if not self.path.exists():
            return found
        check_regular(self.path, 10 * LARGEST)
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                record = json.loads(line)
                if (isinstance(record, dict) and type(record.get("step")) is int
                        and all(x is None or is_number(x) for x in record.values())):
                    found.append(record)
        return found

    def keep_until(self, step: int) -> None:
        """Remove the records of later steps, which a resumed run makes again."""
        if self.write:
            kept = [record for record in self.records() if record["step"] <= step]
            write_atomically(self.path, "".join(json.dumps(record) + "\n" for record in kept))

    def recent_losses(self, n: int = 20) -> list[float]:
        """Return the last n training losses, so that is_spike() decides the same after a resume."""
        return [r["loss"] for r in self.records() if r.get("loss") is not None][-n:]


def is_spike(loss: float, recent: list[float]) -> bool:
    """Return whether a loss is NaN or over four standard deviations above the recent mean."""
    if len(recent) < 10:
        return False
    return not loss <= statistics.mean(recent) + 4 * statistics.stdev(recent)


def open_logger(logger: str, out_dir: str, config: dict,
                first_step: int) -> Callable[[int, dict], object]:
    """
    Return a function of a step and its metrics that sends them to a service.

    logger: 'wandb', 'tensorboard', 'trackio', or '' for none. first_step: where the run continues.
    """
    name = Path(out_dir).name
    try:
        if logger == "wandb":
            import wandb
            run = wandb.init(project="fablegpt", name=name, dir=out_dir, config=config)
            return lambda step, metrics: run.log(metrics, step=step)
        if logger == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
            writer = SummaryWriter(out_dir, purge_step=first_step)
            atexit.register(writer.close)
            return lambda step, metrics: [writer.add_scalar(key, value, step)
                                          for key, value in metrics.items() if value is not None]
        if logger == "trackio":
            import trackio
            trackio.init(project="fablegpt", name=name, config=config, resume="allow")
            atexit.register(trackio.finish)
            return lambda step, metrics: trackio.log(metrics, step=step)
    except ImportError as error:
        raise ValueError(f"--logger={logger} needs a package: pip install "
                         f"{error.name or logger}") from None
    return lambda step, metrics: None


def draw_losses(log: RunLog, title: str, floor: float | None = None, log_x: bool = False) -> None:
    """
    Write loss.png beside the log: training and validation loss by step.

    floor: the entropy of the text, where it is known. log_x: a logarithmic axis of steps.
    """
    from matplotlib import ticker
    from matplotlib.figure import Figure  # not pyplot, which is slow to load and needs a display

    fig = Figure(figsize=(7, 4), layout="constrained")
    ax = fig.subplots()
    records = log.records()
    for key, label, style in (("loss", "training batch", dict(color="0.7", lw=1)),
                              ("val_loss", "validation", dict(color="C0", marker="o", ms=4))):
        points = [(r["step"], r[key]) for r in records if r.get(key) is not None]
        ax.plot(*zip(*points or [(math.nan, math.nan)]), label=label, **style)
    if floor is not None:
        ax.axhline(floor, color="C3", ls="--", label=f"floor: {floor:.3f}, the entropy of the text")
    ax.set(xlabel="step", ylabel="loss (nats per token)", title=title,
           yscale="log", xscale="symlog" if log_x else "linear")
    ax.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 1.5, 2, 3, 4, 6)))
    ax.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    ax.yaxis.set_minor_locator(ticker.NullLocator())
    ax.legend()
    ax.grid(alpha=0.3)
    # PermissionError: on Windows, while a viewer has the file open
    with user_errors(), contextlib.suppress(PermissionError):
        with replace_atomically(log.path.with_name("loss.png"), "wb", retries=1) as file:
            fig.savefig(file, format="png", dpi=120)
