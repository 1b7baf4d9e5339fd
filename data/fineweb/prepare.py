"""
Prepare FineWeb's sample of ten billion tokens: 15M web pages (https://arxiv.org/abs/2406.17557).

    python data/fineweb/prepare.py
    python data/fineweb/prepare.py --shards=10

Writes val.bin (the first 5,000 pages) and train_000.bin, train_001.bin, ... of 100M tokens each to
this folder, 20 GB in all. The text is streamed and not stored. After an interruption, the same
command resumes after the last complete shard.
"""
import gc
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
from lib.checkpoint import make_tokenizer
from lib.configurator import at_least, configure, user_errors
from lib.console import progress
from lib.corpus import (
    ask_hub,
    finish_dataset,
    import_datasets,
    stripped,
    tokenized,
    write_split,
    write_tokens,
)
from lib.files import load_json, write_atomically
from lib.tokenizer import get_tokenizer

# -----------------------------------------------------------------------------
source = ""  # a local copy: a folder of .parquet or .jsonl files, column text (empty: the hub)
shards = 0  # stop after this many (0: the whole text)
tokenizer = "gpt2"  # or bpe, char, word, pieces (learned from the first pages), or that of a model
vocab_size = 0  # at most this many tokens (0: 4,096 of bpe, 10,000 words, all characters)
out_dir = ""  # where to write (empty: this folder)
# -----------------------------------------------------------------------------

SHARD = 100_000_000  # tokens
VALIDATION = 5000  # documents


def open_stream(name: str, subset: str, source: str):
    """
    Return the rows of the hub or of local files as a stream whose position can be saved.

    Also return NAME@COMMIT of the hub's, '' for local files.
    """
    if not source:
        return ask_hub(name, subset, stream=True)
    datasets = import_datasets()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # our error names the bad file
    paths = [path for path in Path(source).rglob("*") if path.suffix in (".parquet", ".jsonl")]
    kinds = {path.suffix for path in paths}
    if len(kinds) != 1:
        raise ValueError(f"{source} must have either .parquet or .jsonl files")
    rows = datasets.load_dataset("parquet" if kinds == {".parquet"} else "json", split="train",
                                 data_files=sorted(map(str, paths)), streaming=True)
    return rows, ""


def documents_of(rows, where: str) -> Iterator[str]:
    return stripped((row.get("text") for row in rows), where, "text")


def prepare(folder: Path, name: str, subset: str, source: str, kind: str, vocab_size: int,
            shards: int, shard_tokens: int = SHARD, validation: int = VALIDATION) -> None:
    """
    Write the first documents of a stream to val.bin and the others to shards.

    After each shard, progress.json.tmp records the arguments, what is written and the position in
    the stream. A later call with the same arguments and files resumes there, in the same revision
    of the hub's dataset.
    """
    progress_file = folder / "progress.json.tmp"
    saved = {}
    if progress_file.exists():
        saved = load_json(progress_file)
    where = source or name
    paths = sorted(Path(source).rglob("*")) if source else []
    files = [[path.name, path.stat().st_size] for path in paths]
    asked = [name, subset, source, files, kind, vocab_size, shard_tokens, validation]
    digest, written = hashlib.sha256(), []
    resuming = saved.get("asked") == asked
    begun = saved.get("version") if resuming else ""  # '' or missing: of local files, an old file
    rows, version = open_stream(begun or name, subset, source)
    if resuming:
        trained, train, val = get_tokenizer(saved), Counter(saved["train"]), saved["val"]
        written = [folder / f"train_{i:03}.bin.tmp" for i in range(saved["shards"])]
        for path in written:
            digest.update(path.read_bytes())
        rows.load_state_dict(saved["stream"])
        documents = documents_of(rows, where)
        print(f"resuming after {len(written)} shards, {train['tokens']:,} tokens", file=sys.stderr)
    else:
        trained, train = make_tokenizer(kind, documents_of(rows, where), vocab_size), Counter()
        documents = documents_of(rows, where)
        val = write_split(folder, "val", islice(documents, validation), trained)
    bar = progress(documents, "tokenizing train", unit=" documents", smoothing=0)
    parts = tokenized(bar, trained)
    while not shards or len(written) < shards:
        path = folder / f"train_{len(written):03}.bin.tmp"
        counts = write_tokens(path, parts, digest, shard_tokens)
        if not counts["tokens"]:
            path.unlink()
            break
        train.update(counts)
        written.append(path)
        saved = dict(asked=asked, tokenizer=trained.spec, train=train, val=val,
                     shards=len(written), stream=rows.state_dict(), version=version)
        write_atomically(progress_file, json.dumps(saved))
    if not written:
        raise ValueError(f"{where} has no more than the {val['documents']:,} documents for "
                         "validation")
    train = {**train, "sha256": digest.hexdigest(), "shards": len(written)}
    finish_dataset(folder, trained, {"train": train, "val": val}, source=version)
    progress_file.unlink()
    del documents, parts, rows
    gc.collect()  # a reader that is still running when Python exits would abort it


if __name__ == "__main__":
    configure(globals(), shards=at_least(0), vocab_size=at_least(0, at_most=65536))
    with user_errors():
        folder = Path(out_dir) if out_dir else HERE
        prepare(folder, "HuggingFaceFW/fineweb", "sample-10BT", source, tokenizer, vocab_size,
                shards)
