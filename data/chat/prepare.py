"""
Prepare conversations for chat tuning. Only the assistant's answers are trained.

    python data/chat/prepare.py --source=FILE.jsonl --tokenizer=MODEL

Each row of a .jsonl, .json or .parquet file, or of a dataset on the Hugging Face hub, is

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}

with roles system, user and assistant. MODEL is the model to tune: a run, a Hugging Face folder or a
GGUF file. Conversations are written with its chat template; a model without one gets a plain
template and the control tokens <|system|>, <|user|>, <|assistant|> and <|end|>.

In a folder, files named train and val are the splits. Otherwise every 20th conversation is held out
for validation.
"""
import os
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
from lib.chat import ChatTokenizer, meta_of_chat, render, with_template
from lib.checkpoint import load_tokenizer
from lib.configurator import configure, user_errors
from lib.corpus import TABLES, hub_documents, local_documents, write_dataset

# -----------------------------------------------------------------------------
source = ""  # a file, a folder or the name of a dataset on the hub
column = "messages"  # the column with the conversations
tokenizer = "models/tinystories"  # the model to tune, for its tokenizer and chat template
out_dir = ""  # where to write (empty: this folder)
configure(globals())
# -----------------------------------------------------------------------------


def conversations(rows: Iterator[object], where: object, column: str) -> Iterator[str]:
    """Yield conversations as text. Raise ValueError that names a bad one."""
    for number, messages in enumerate(rows, 1):
        try:
            yield render(template, messages, chat_tokenizer.tokenizer)
        except ValueError as error:
            raise ValueError(f"{where}, conversation {number}: {error}") from None


def documents(split: str) -> Iterator[str]:
    if source.lower().endswith(TABLES) or os.path.exists(source):
        return local_documents(source, split, column, read_table=conversations)
    return hub_documents(source, split, column, read_table=conversations)


with user_errors():
    if not source:
        raise ValueError("set --source to a file, a folder or the name of a Hugging Face dataset")
    tuned, template = with_template(*load_tokenizer(tokenizer))
    chat_tokenizer = ChatTokenizer(tuned)
    folder = Path(out_dir) if out_dir else HERE
    write_dataset(folder, documents, chat_tokenizer, **meta_of_chat(template, tuned))
    print(f"next: python train.py config/finetune_chat.py --init_from={tokenizer} "
          f"--dataset={folder.name}")
