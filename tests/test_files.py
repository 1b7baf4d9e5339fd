"""Folders that a stranger made: links are not followed, and no file takes all memory."""

import copy
import json
import os
import resource
import shutil
import struct
import zipfile
from pathlib import Path

import pytest
import torch

from helpers import SHAPES, one_line_error, run, tiny, train
from lib import machine
from lib.checkpoint import build_model, config_to_resume, load_checkpoint, read_checkpoint
from lib.corpus import load_meta
from lib.files import lock_run, open_synced
from lib.runlog import RunLog
from model import GPT, Block, GPTConfig

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


def test_a_link_that_is_planted_after_the_old_one_was_removed(tmp_path, monkeypatch):
    victim = plant(tmp_path / "out", "a.tmp")
    monkeypatch.setattr("lib.files.Path.unlink", lambda path, missing_ok: None)
    with pytest.raises(FileExistsError):
        with open_synced(tmp_path / "out/a.tmp") as file:
            file.write("new")
    assert victim.read_text() == "mine"


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


# -----------------------------------------------------------------------------
# Bombs: small or endless files that would take all memory


@pytest.fixture
def little_memory():
    """Let this process allocate at most 1 GB more, so that a bomb that works is a MemoryError."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 30), limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


def rezip(path: Path, compression: int = zipfile.ZIP_STORED, **replaced: bytes) -> None:
    """Write a zip file again; replaced: new contents by the end of an entry's name."""
    with zipfile.ZipFile(path) as old:
        entries = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", compression) as new:
        for name, data in entries.items():
            found = [raw for end, raw in replaced.items() if name.endswith(end)]
            new.writestr(name, *found or [data])


def test_a_compressed_checkpoint_is_refused(tmp_path, trained):
    path = Path(shutil.copy(trained / "best.pt", tmp_path))
    rezip(path)
    assert read_checkpoint(path)["step"] == 6  # the same parts, stored
    rezip(path, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="its parts are compressed"):
        read_checkpoint(path)
    path.write_bytes(bytes(1 << 20) + path.read_bytes())  # larger than all of its parts
    with pytest.raises(ValueError, match="its parts are compressed"):
        read_checkpoint(path)


def test_a_checkpoint_with_overlapping_parts_is_refused(tmp_path, trained):
    """Ten thousand entries that are the same bytes of the file."""
    path = Path(shutil.copy(trained / "best.pt", tmp_path))
    with zipfile.ZipFile(path, "a") as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        for i in range(50):
            entry = copy.copy(largest)
            entry.filename = f"again{i}"
            archive.filelist.append(entry)
        archive._didModify = True
    with pytest.raises(ValueError, match="its parts are compressed or overlap"):
        read_checkpoint(path)


HEX = b"X\x03\x00\x00\x00hextR"  # the end of a call of _codecs.encode


@pytest.mark.parametrize("pickled", [
    b"\x80\x02c__builtin__\nbytearray\n(J\xff\xff\xff\x7ftR.",
    # each of 34 calls doubles a text
    b"\x80\x02" + b"c_codecs\nencode\n(" * 35 + b"X\x01\x00\x00\x00a"
    b"X\x06\x00\x00\x00latin1tR" + HEX * 34 + b"."])
def test_a_pickle_that_grows_is_refused(tmp_path, trained, pickled, little_memory):
    path = Path(shutil.copy(trained / "best.pt", tmp_path))
    rezip(path, **{"data.pkl": pickled})
    with pytest.raises(ValueError, match="it asks for (__builtin__ bytearray|_codecs encode)"):
        read_checkpoint(path)


SHARED = torch.zeros(20_000)


@pytest.mark.parametrize("more, says", [
    ({"a": torch.zeros(1).expand(1 << 40)}, "larger than the file"),
    ({f"a{i}": SHARED for i in range(1000)}, "larger than the file"),
    ({"lm_head.weight": torch.zeros(1, 1).expand(1 << 14, 1 << 14)}, "larger than the file"),
    ({"a": torch.zeros(2, dtype=torch.complex64)}, "its weight 'a' is not a tensor of floats"),
    ({7: torch.zeros(2)}, "its weight 7 is not a tensor of floats"),
    ({"a": "text"}, "its weight 'a' is not a tensor of floats")])
def test_weights_that_cannot_be_weights_are_refused(tmp_path, trained, more, says):
    checkpoint = read_checkpoint(trained / "best.pt")
    checkpoint["model"].update(more)
    torch.save(checkpoint, tmp_path / "best.pt")
    with pytest.raises(ValueError, match=says):
        read_checkpoint(tmp_path / "best.pt")


def endless(folder: Path, name: str, kind: str) -> Path:
    """Put a file that never ends, or one of 10 TB, into a folder."""
    folder.mkdir(exist_ok=True, parents=True)
    path = folder / name
    path.unlink(missing_ok=True)
    if kind == "zero":
        path.symlink_to("/dev/zero")
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        with open(path, "wb") as file:
            file.truncate(10**13)
    return path


ENDLESS = "is not a regular file|has [0-9,]+ bytes; at most|there is no file"


@pytest.mark.parametrize("kind", ["zero", "fifo", "huge"])
@pytest.mark.parametrize("name", ["best.pt", "config.json", "tokenizer.json", "meta.json",
                                  "model.safetensors", "model.gguf"])
def test_models_that_never_end_are_refused(tmp_path, openai_folder, name, kind):
    folder = tmp_path / "model"
    if name != "best.pt":
        shutil.copytree(openai_folder, folder)
    path = endless(folder, name, kind)
    with pytest.raises(ValueError, match=ENDLESS):
        load_checkpoint(path if name == "model.gguf" else folder)


def test_logs_and_metas_that_never_end_are_refused(tmp_path):
    for kind in ("zero", "fifo", "huge"):
        endless(tmp_path, "log.jsonl", kind)
        with pytest.raises(ValueError, match=ENDLESS):
            RunLog(tmp_path, write=True).records()
    endless(tmp_path, "meta.pkl", "huge")
    with pytest.raises(ValueError, match=ENDLESS):
        load_meta(prepared(tmp_path))
    endless(tmp_path, "meta.json", "huge")
    with pytest.raises(ValueError, match=ENDLESS):
        load_meta(tmp_path)


def prepared(folder: Path) -> Path:
    (folder / "train.bin").touch()
    return folder


def test_prompts_that_never_end_are_refused(tmp_path, trained):
    os.mkfifo(tmp_path / "fifo")
    for path in ("/dev/zero", tmp_path / "fifo", endless(tmp_path, "huge", "huge")):
        error = one_line_error(run("sample.py", f"--out_dir={trained}", f"--start=FILE:{path}"))
        assert "is not a regular file" in error or "can be read" in error


def test_a_safetensors_header_of_any_length_is_refused(tmp_path, openai_folder, little_memory):
    shutil.copytree(openai_folder, tmp_path / "model")
    for size in (1 << 62, 1 << 33, 90_000_000):
        (tmp_path / "model/model.safetensors").write_bytes(struct.pack("<Q", size) + b"{}")
        with pytest.raises(ValueError, match="is not a Hugging Face model that can be read here"):
            load_checkpoint(tmp_path / "model")


def test_a_pickle_of_characters_cannot_allocate(tmp_path, little_memory):
    """Ten bytes let Python's faster unpickler allocate 64 GB for its memo."""
    (tmp_path / "meta.pkl").write_bytes(b"\x80\x02Nr\xff\xff\xff\x0f.")
    with pytest.raises(ValueError, match=r"not what nanoGPT's prepare.py writes \(TypeError"):
        load_meta(prepared(tmp_path))


def test_nesting_is_one_line(tmp_path, trained, fables_data):
    """Lists in lists, a hundred thousand deep, wherever JSON is read."""
    deep = "[" * 100_000 + "]" * 100_000
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(fables_data, data)
    shutil.copytree(trained, out)
    (data / "meta.json").write_text(deep)
    for name in ("metrics_summary.json", "log.jsonl"):
        (out / name).write_text(deep + "\n")
    with pytest.raises(ValueError, match="is nested too deeply"):
        load_meta(data)
    assert RunLog(out, write=False).records() == []
    done = run("eval.py", f"--compare={out}", f"--dataset={fables_data}", "--valid_samples=0")
    assert done.returncode == 0, done.stderr
    (out / "metrics_summary.json").write_text(deep)
    done = run("export.py", f"--out_dir={out}", f"--to={tmp_path}/hf", "--format=hf")
    assert done.returncode == 0, done.stderr


# -----------------------------------------------------------------------------
# Crafted sizes: a model is not built before it is known that its weights exist


@pytest.fixture
def built(monkeypatch) -> list[int]:
    """The number of layers of each model that is built; none may have more than 10,000."""
    found, real = [], Block.__init__

    def count(block, config, layer):
        found.append(layer)
        assert layer < 20, "the model is built"
        real(block, config, layer)

    monkeypatch.setattr(Block, "__init__", count)
    return found


CRAFTED = [("n_layer", 10**7), ("n_layer", 9_999), ("n_embd", 10**12), ("vocab_size", 10**30),
           ("block_size", 10**12)]


@pytest.mark.parametrize("name, value", CRAFTED)
def test_a_checkpoint_of_a_crafted_size_is_refused(tmp_path, trained, fables_data, built, name,
                                                   value, little_memory):
    checkpoint = read_checkpoint(trained / "last.pt")
    checkpoint["model_args"][name] = value
    with pytest.raises(ValueError, match="here does not fit the model: "):
        build_model(checkpoint, "here")
    settings = {"out_dir": "out", "dataset": "data"}
    with pytest.raises(ValueError, match="checkpoint in out does not fit the model: "):
        config_to_resume(checkpoint, GPTConfig(), settings, set(), load_meta(fables_data))


@pytest.mark.parametrize("arch", ["qwen3", "llama"])
def test_positions_without_end_are_refused(arch, little_memory):
    """They are computed, so no weights of a checkpoint limit them."""
    model = tiny(arch=arch)
    args = vars(model.config) | {"block_size": 10**8}
    with pytest.raises(ValueError, match="its block_size of 100,000,000 is too large"):
        build_model({"model": model.state_dict(), "model_args": args}, "here")


@pytest.mark.parametrize("name, value", [("n_layer", 10**7), ("n_layer", 9_999),
                                         ("n_embd", 10**12), ("n_positions", 10**12)])
def test_a_folder_of_a_crafted_size_is_refused(tmp_path, openai_folder, built, name, value,
                                               little_memory):
    shutil.copytree(openai_folder, tmp_path / "model")
    path = tmp_path / "model/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(ValueError, match="is not a Hugging Face model that can be read here"):
        load_checkpoint(tmp_path / "model")
    assert max(built, default=0) < 20


@pytest.mark.parametrize("command, says", [
    (["train.py", "--n_layer=1000000000"], "n_layer must be at most 10,000"),
    (["train.py", "--n_embd=1000000000000", "--n_head=1"], "the model needs at least "),
    (["train.py", "--block_size=1000000000000"], "fewer than a window"),
    (["bench.py", "--n_layer=1000000000"], "n_layer must be at most 10,000"),
    (["bench.py", "--n_embd=1000000000000", "--n_head=1"], "the model needs at least "),
    (["bench.py", "--vocab_size=1" + "0" * 400], "the model needs at least "),
    (["plan.py", "--n_layer=1000000000"], "n_layer must be at most 10,000"),
    (["plan.py", "--n_embd=1000000000000", "--n_head=1"], "more than 100 TB"),
    (["plan.py", "--block_size=1000000000", "--arch=qwen3"], "the model needs at least "),
    (["sample.py", "--num_samples=1000000000000"], "out of memory: use fewer --num_samples"),
    (["sample.py", "--max_new_tokens=1000000000000"], "out of memory: use fewer --num_samples")])
def test_sizes_that_do_not_fit_are_one_line(tmp_path, trained, fables_data, command, says):
    out_dir = {"train.py": [f"--out_dir={tmp_path}/out", f"--dataset={fables_data}"],
               "sample.py": [f"--out_dir={trained}"]}.get(command[0], ["--dataset=none"])
    done = run(*command, *out_dir, "--device=cpu")
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert says in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out/best.pt").exists()


@pytest.mark.parametrize("shape", SHAPES)
def test_weight_bytes_are_those_of_the_model(shape):
    config = GPTConfig(vocab_size=1000, **SHAPES[shape])
    model = GPT(config)
    size = sum(4 * w.numel() for w in {*model.parameters(), *model.buffers()} if w.dim() > 1)
    assert machine.weight_bytes(config) == size
