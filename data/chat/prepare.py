"""
Prepare conversations for chat tuning. The loss covers only the assistant's answers.

    python data/chat/prepare.py --source=FILE.jsonl --tokenizer=MODEL

Each row of a .jsonl, .json or .parquet file, or of a dataset on the Hugging Face hub, is

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}

with roles system, user and assistant. MODEL is the model to tune: a run, a Hugging Face folder or a
GGUF file. Conversations are written with its chat template; a model without one gets a plain
template and the control tokens <|system|>, <|user|>, <|assistant|> and <|end|>.

In a folder, files named train and val are the splits. Otherwise every 20th conversation is held out
for validation.
"""
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
from lib.chat import ChatTokenizer, chat_meta, check_messages, ensure_template, render
from lib.checkpoint import load_tokenizer
from lib.configurator import configure, one_line, user_errors
from lib.corpus import hub_documents, hub_source, is_local, local_documents, write_dataset
from lib.tokenizer import KINDS

# -----------------------------------------------------------------------------
source = ""  # a file, a folder or a dataset on the hub: NAME or NAME@REVISION
column = "messages"  # the column with the conversations
tokenizer = ""  # the model to tune, for its tokenizer and chat template
out_dir = ""  # where to write (empty: this folder)
configure(globals())
# -----------------------------------------------------------------------------


def prepare(folder: Path, source: str, column: str, model: str) -> None:
    """Write the dataset with the tokenizer and chat template of a model."""
    chat_tokenizer, template = ensure_template(*load_tokenizer(model))

    def conversations(rows: Iterator[object], where: object, column: str) -> Iterator[str]:
        """Yield conversations as text. Raise ValueError with the number of an invalid one."""
        for number, messages in enumerate(rows, 1):
            try:
                yield render(template, stripped_messages(messages), chat_tokenizer)
            except ValueError as error:
                raise ValueError(f"{where}, conversation {number}: {error}") from None

    def documents(split: str) -> Iterator[str]:
        read = local_documents if is_local(source) else hub_documents
        return read(source, split, column, to_documents=conversations)

    meta = chat_meta(template, chat_tokenizer)
    write_dataset(folder, documents, ChatTokenizer(chat_tokenizer), **meta,
                  source="" if is_local(source) else hub_source(source))


def stripped_messages(messages: object) -> list[dict[str, str]]:
    """
    Strip the white space around messages. Raise ValueError unless they are a conversation.

    White space could merge with the template's text before an answer, which then was not found.
    """
    check_messages(messages)
    return [message | {"content": message["content"].strip()} for message in messages]


with user_errors():
    if not source:
        raise ValueError("set --source to a file, a folder or the name of a Hugging Face dataset")
    if not tokenizer or tokenizer in KINDS:
        raise ValueError("set --tokenizer to the model to tune: a run, a Hugging Face folder, a "
                         "GGUF file or USER/NAME")
    folder = Path(out_dir) if out_dir else HERE
    prepare(folder, source, column, tokenizer)
    is_in_data = folder.resolve().parent == HERE.resolve().parent
    print(one_line("next: " + shlex.join([
        "python", "train.py", "config/finetune.py", f"--init_from={tokenizer}",
        f"--dataset={folder.resolve().name if is_in_data else folder.resolve()}",
        "--batching=by_length", "--block_size=512", "--out_dir=out-chat"])))
