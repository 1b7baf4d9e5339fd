"""lib/files.py: links that someone planted in a folder are never followed."""

from pathlib import Path

import pytest

from helpers import run, train
from lib.files import lock_run, open_synced
from lib.runlog import RunLog

# what the scripts write in a folder, and the names under which they write it
NAMES = ("best.pt", "last.pt", "log.jsonl", "loss.png", "metrics_summary.json",
         "continuations.jsonl", "step_000003.pt", "meta.json", "train.bin", "val.bin",
         "m.gguf", "m.html")


def plant(folder: Path, *names: str) -> Path:
    """Link names in a folder to a file that is not in it. Return that file."""
    folder.mkdir(parents=True, exist_ok=True)
    victim = folder.parent / "victim"
    victim.write_text("mine")
    for name in names:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(victim)
    return victim


def test_temporary_files_do_not_follow_links(tmp_path):
    victim = plant(tmp_path / "out", "a.tmp")
    with open_synced(tmp_path / "out/a.tmp") as file:
        file.write("new")
    assert victim.read_text() == "mine" and (tmp_path / "out/a.tmp").read_text() == "new"
    assert not (tmp_path / "out/a.tmp").is_symlink()


def test_a_log_that_is_a_link_is_refused(tmp_path, capsys):
    victim = plant(tmp_path / "out", "log.jsonl")
    with pytest.raises(SystemExit):
        RunLog(tmp_path / "out", write=True).add(1, loss=2.0)
    assert "log.jsonl is a symbolic link" in capsys.readouterr().err
    assert victim.read_text() == "mine"


def test_a_lock_that_is_a_link_is_refused(tmp_path, monkeypatch):
    victim = plant(tmp_path / "out", "lock")
    with pytest.raises(ValueError, match="out/lock is a symbolic link"):
        lock_run(tmp_path / "out")
    monkeypatch.setattr(Path, "is_symlink", lambda path: False)  # planted just after the check
    with pytest.raises(OSError, match="symbolic links"):
        lock_run(tmp_path / "out")
    assert victim.read_text() == "mine"


def test_scripts_do_not_write_through_links(tmp_path, fables_data):
    """Every file that a script writes, and its temporary name, is a link to a file elsewhere."""
    out, data = tmp_path / "out", tmp_path / "data"
    links = [name for file in NAMES for name in (file, f"{file}.tmp")]
    victim = plant(out, *links)
    plant(data, *links)
    train(fables_data, out, "--overwrite=True", "--keep_every=3")
    for args in (["eval.py", f"--out_dir={out}", "--continuations=2", "--prompt_tokens=4",
                  "--max_new_tokens=4", "--device=cpu"],
                 ["data/text/prepare.py", "--source=README.md", "--tokenizer=char",
                  f"--out_dir={data}"],
                 *(["export.py", f"--out_dir={out}", f"--to={to}", f"--format={kind}",
                    "--overwrite=True"]
                   for kind, to in (("gguf", out / "m.gguf"), ("html", out / "m.html"),
                                    ("int8", data), ("hf", data)))):
        done = run(*args)
        assert done.returncode == 0, done.stderr
    assert victim.read_text() == "mine"
