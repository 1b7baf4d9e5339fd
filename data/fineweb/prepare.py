"""
FineWeb (https://arxiv.org/abs/2406.17557), its sample of ten billion tokens: 15M web pages.

    python data/fineweb/prepare.py
    python data/fineweb/prepare.py --shards=10

Writes val.bin (the first 5,000 pages) and train_000.bin, train_001.bin, ... of a hundred million tokens each (20 GB in all)
into this folder, streaming: nothing else is kept. What is interrupted goes on with the same command from its last shard.
"""
import gc
import hashlib
import json
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

from tqdm import tqdm

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
from lib.checkpoint import write_atomically
from lib.configurator import configure, user_errors
from lib.corpus import ask_hub, finish_dataset, stripped, tokenized, write_split, write_tokens
from lib.tokenizer import get_tokenizer, train_tokenizer

# -----------------------------------------------------------------------------
source = ""  # a local copy, a folder of .parquet or .jsonl files with a column `text`; '': the hub
shards = 0  # stop after so many; 0: all of the text
tokenizer = "gpt2"  # or 'bpe', 'char', 'word': those of the first pages
vocab_size = 0  # tokens of bpe, char or word at most; 0: 4,096 of bpe, 10,000 words, all characters
out_dir = ""  # where to write; '': this folder
# -----------------------------------------------------------------------------

SHARD = 100_000_000  # tokens
VALIDATION = 5000  # documents


def open_stream(name: str, subset: str, source: str):
    """The rows one after the other, from the hub or from local files, as a `datasets` stream, whose place can be saved."""
    if source:
        from datasets import load_dataset

        files = sorted(str(path) for path in Path(source).rglob("*") if path.suffix in (".parquet", ".jsonl"))
        kinds = {Path(file).suffix for file in files}
        if len(kinds) != 1:
            raise ValueError(f"{source} must have .parquet or .jsonl files, and not both")
        return load_dataset("parquet" if kinds == {".parquet"} else "json", data_files=files, split="train", streaming=True)
    return ask_hub(name, subset, split="train", streaming=True)


def prepare(folder: Path, name: str, subset: str, source: str, kind: str, vocab_size: int, shards: int,
            shard_tokens: int = SHARD, validation: int = VALIDATION) -> None:
    """
    The first documents of a stream for validation, the others in shards. `progress.json.tmp` says after each shard what was
    asked for, what is written and where the stream stands.
    """
    if shards < 0:
        raise ValueError(f"shards must be at least 0, got {shards}")
    place = folder / "progress.json.tmp"
    rows = open_stream(name, subset, source)
    files = [[path.name, path.stat().st_size] for path in sorted(Path(source).rglob("*"))] if source else []
    asked = [name, subset, source, files, kind, vocab_size, shard_tokens, validation]  # a place in other files is another one
    documents = stripped((row.get("text") for row in rows), source or name, "text")
    progress = json.loads(place.read_text(encoding="utf-8")) if place.exists() else {}
    digest, written = hashlib.sha256(), []
    if progress.get("asked") == asked:
        made, train, val = get_tokenizer(progress), Counter(progress["train"]), progress["val"]
        rows.load_state_dict(progress["stream"])
        written = [folder / f"train_{i:03}.bin.tmp" for i in range(progress["shards"])]
        for path in written:
            digest.update(path.read_bytes())
        print(f"going on after {len(written)} shards, {train['tokens']:,} tokens", file=sys.stderr)
    else:
        made, train = train_tokenizer(kind, documents, vocab_size), Counter()
        documents = stripped((row.get("text") for row in rows), source or name, "text")  # from the first one on
        val = write_split(folder, "val", islice(documents, validation), made)
    parts = tokenized(tqdm(documents, desc="train", unit=" documents", smoothing=0), made)
    while not shards or len(written) < shards:
        path = folder / f"train_{len(written):03}.bin.tmp"
        if not write_tokens(path, parts, train, digest, shard_tokens):
            path.unlink()
            break
        written.append(path)
        write_atomically(place, json.dumps(dict(asked=asked, tokenizer=made.spec, train=train, val=val, shards=len(written),
                                                stream=rows.state_dict())))
    if not written:
        raise ValueError(f"{source or name} has no more than the {val['documents']:,} documents for validation")
    finish_dataset(folder, made, {"train": {**train, "sha256": digest.hexdigest(), "shards": len(written)}, "val": val})
    place.unlink()
    del documents, parts, rows
    gc.collect()  # a reader that is still at work when Python ends would abort it


if __name__ == "__main__":
    configure(globals())
    with user_errors():
        folder = Path(out_dir) if out_dir else HERE
        prepare(folder, "HuggingFaceFW/fineweb", "sample-10BT", source, tokenizer, vocab_size, shards)
