"""
Write a trained model in another form.

    python export.py --out_dir=out --format=int8    # makes out-int8, which sample.py and eval.py take as --out_dir

int8: a run whose best.pt has matrices and tables of one byte a weight and one scale a row, a quarter of the size.
"""
import os
from pathlib import Path

from checkpoint import load_checkpoint, save_checkpoint
from configurator import configure, user_errors
from model import quantize_int8

# -----------------------------------------------------------------------------
out_dir = "out"  # the run to export: its best.pt, else last.pt
format = "int8"
to = ""  # folder to write; '': out_dir, a dash and the format
overwrite = False  # True: replace what the folder holds
configure(globals(), skip_settings_of="train.py")
# -----------------------------------------------------------------------------

with user_errors():
    if format != "int8":
        raise ValueError(f"format must be int8, got {format!r}")
    folder = Path(to or f"{out_dir.rstrip('/')}-{format}")
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise ValueError(f"{folder} is not empty: --overwrite=True replaces it, --to=FOLDER writes elsewhere")
    checkpoint = load_checkpoint(out_dir)
    source = Path(checkpoint.pop("path"))
    checkpoint["model"] = quantize_int8(checkpoint["model"])
    os.makedirs(folder, exist_ok=True)
    save_checkpoint(folder, "best.pt", checkpoint)
    before, after = (path.stat().st_size for path in (source, folder / "best.pt"))
    print(f"{folder / 'best.pt'}: {after / 1e6:,.1f} MB, {after / before:.1%} of {source}")
