"""
TinyStories (https://arxiv.org/abs/2305.07759): 2.1M short stories in the words of a four-year-old, as GPT-2 tokens.

    python data/tinystories/prepare.py
    python data/tinystories/prepare.py --source=FOLDER

Writes train.bin (about 470M tokens, 1 GB) and val.bin (4.7M tokens) into this folder.
"""
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
from configurator import configure, user_errors
from dataset import finish_dataset, hub_documents, local_documents, write_split
from tokenizer import GPT2Tokenizer

# -----------------------------------------------------------------------------
source = ""  # a local copy: .txt with <|endoftext|> between stories, .jsonl or .parquet; a file, or a folder of train and val
out_dir = ""  # where to write; '': this folder
configure(globals())
# -----------------------------------------------------------------------------

with user_errors():
    tokenizer = GPT2Tokenizer()
    folder = Path(out_dir) if out_dir else HERE
    splits = {split: write_split(folder, split, local_documents(source, split) if source else
                                 hub_documents("roneneldan/TinyStories", split), tokenizer) for split in ("train", "val")}
    finish_dataset(folder, tokenizer, splits)
