"""
Prepare tinyshakespeare, 1.1 MB of Shakespeare's plays, in GPT-2 tokens.

    python data/shakespeare/prepare.py
    python data/shakespeare/prepare.py --tokenizer=word --out_dir=data/shakespeare_word
    python data/shakespeare/prepare.py --source=input.txt

Writes train.bin (301,967 GPT-2 tokens) and val.bin (36,060 tokens) to this folder. As in nanoGPT,
the first 90% of the text are for training and the rest for validation.
"""
import hashlib
import sys
import urllib.request
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
from lib.checkpoint import make_tokenizer
from lib.configurator import at_least, configure, user_errors
from lib.corpus import open_text, write_dataset

# -----------------------------------------------------------------------------
source = ""  # a local copy, or any other text file (empty: download it)
tokenizer = "gpt2"  # or bpe, char, word, pieces (learned from the text), or that of a model
vocab_size = 0  # at most this many tokens (0: 4,096 of bpe, 10,000 words, all characters)
out_dir = ""  # where to write (empty: this folder)
# -----------------------------------------------------------------------------

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def download() -> str:
    try:
        with urllib.request.urlopen(URL, timeout=30) as response:
            raw = response.read()
    except OSError as error:
        raise ValueError(f"{URL} cannot be reached ({type(error).__name__}): give a local copy "
                         "with --source=FILE") from None
    if hashlib.sha256(raw).hexdigest() != SHA256:
        raise ValueError(f"{URL} has another text than expected (its SHA-256 differs): give a "
                         "local copy with --source=FILE")
    return raw.decode("utf-8")


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file. Raise ValueError if it is empty."""
    with open_text(path) as file:
        text = file.read()
    if not text.strip():
        raise ValueError(f"{path} is empty")
    return text


def prepare(folder: Path, source: str, kind: str, vocab_size: int) -> None:
    text = read_text(Path(source)) if source else download()
    border = int(len(text) * 0.9)
    parts = {"train": text[:border], "val": text[border:]}
    if kind == "char":  # nanoGPT's ids: the characters of the whole text, and no other tokens
        trained = make_tokenizer(kind, [text], vocab_size, specials=())
    else:
        trained = make_tokenizer(kind, [parts["train"]], vocab_size)
    write_dataset(folder, lambda split: [parts[split]] if parts[split] else [], trained)


if __name__ == "__main__":
    configure(globals(), vocab_size=at_least(0, at_most=65536))
    with user_errors():
        prepare(Path(out_dir) if out_dir else HERE, source, tokenizer, vocab_size)
