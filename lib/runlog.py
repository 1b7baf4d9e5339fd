"""
The record of a run: log.jsonl, the curve in loss.png, and logging services.
"""
import atexit
import contextlib
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path

from lib.files import replace_atomically, write_atomically


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
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        self.send(step, metrics)

    def records(self) -> list[dict]:
        """Return all records; lines truncated by a kill are skipped."""
        found = []
        for line in open(self.path, errors="replace") if self.path.exists() else ():
            with contextlib.suppress(ValueError, TypeError):
                record = json.loads(line)
                if "step" in record:
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
    with replace_atomically(log.path.with_name("loss.png"), "wb") as file:
        fig.savefig(file, format="png", dpi=120)
