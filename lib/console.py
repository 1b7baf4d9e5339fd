"""
What the scripts print: progress, tables, aligned lines and times.
"""
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import zip_longest

from tqdm import tqdm


def visible(text: object) -> str:
    """
    Return a text with control characters escaped as in Python, such as \\x1b.

    A quoted file or argument could otherwise rename the terminal's window or hide a part of the
    message. Line breaks, tabs and the joiners in words and emojis are kept.
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(c.encode("unicode_escape").decode()
                   if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")
                   and c not in "\n\t\u200c\u200d" else c for c in text)


def for_output(text: str) -> str:
    """Return a generated text to print, escaped by visible() if stdout is a terminal."""
    return visible(text) if sys.stdout.isatty() else text


def progress(items: Iterable | None, task: str, **options) -> tqdm:
    """Show a progress bar. Where stderr is not a terminal, print one line instead."""
    task = visible(task)
    if not sys.stderr.isatty():
        print(f"{task} ...", flush=True)
    # disable=None: no bar where stderr is not a terminal
    return tqdm(items, desc=task, disable=None, dynamic_ncols=True, **options)


def hide_hub_progress() -> None:
    """Hide what huggingface_hub prints about retries and, outside of a terminal, its progress."""
    from huggingface_hub.utils import disable_progress_bars, logging

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        disable_progress_bars()


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows in columns, the first left-aligned, the others right-aligned."""
    rows = [[visible(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip_longest(*rows, fillvalue="")]
    for row in rows:
        cells = [f"{cell:>{width}}" if i else f"{cell:<{width}}"
                 for i, (cell, width) in enumerate(zip(row, widths))]
        print("  ".join(cells).rstrip())


def named_lines(**texts: str) -> str:
    """Return aligned lines `name  text`, without those whose text is empty."""
    return "\n".join(f"{name:<8} " + visible(text).replace("\n", "\n" + " " * 9)
                     for name, text in texts.items() if text)


def duration(seconds: float) -> str:
    """Return a time in its two largest units, such as `1h 05m`."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02}h"
    if hours:
        return f"{hours}h {minutes:02}m"
    return f"{minutes}m {seconds:02}s" if minutes else f"{seconds}s"
