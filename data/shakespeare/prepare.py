"""
The works of Shakespeare (tinyshakespeare, 1.1 MB), the first 90% of the characters to train on, as in nanoGPT.

    python data/shakespeare/prepare.py
    python data/shakespeare/prepare.py --tokenizer=word --out_dir=data/shakespeare_word
    python data/shakespeare/prepare.py --source=input.txt

Writes train.bin (301,967 GPT-2 tokens) and val.bin (36,060 tokens) into this folder.
"""
import hashlib
import sys
import urllib.request
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
from lib.configurator import configure, user_errors
from lib.corpus import write_dataset
from lib.tokenizer import train_tokenizer

# -----------------------------------------------------------------------------
source = ""  # a local copy of the text, or any other text file; '': download it
tokenizer = "gpt2"  # or 'bpe', 'char', 'word': those of the text
vocab_size = 0  # tokens of bpe, char or word at most; 0: 4,096 of bpe, 10,000 words, all characters
out_dir = ""  # where to write; '': this folder
# -----------------------------------------------------------------------------

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def download() -> str:
    try:
        with urllib.request.urlopen(URL, timeout=30) as response:
            raw = response.read()
    except OSError as error:
        raise ValueError(f"{URL} cannot be reached ({type(error).__name__}): give a local copy with --source=FILE") from None
    if hashlib.sha256(raw).hexdigest() != SHA256:
        raise ValueError(f"what {URL} sent is not the expected text (its SHA-256 differs): "
                         "give a local copy with --source=FILE")
    return raw.decode("utf-8")


def prepare(folder: Path, source: str, kind: str, vocab_size: int) -> None:
    text = Path(source).read_text(encoding="utf-8") if source else download()
    border = int(len(text) * 0.9)
    parts = {"train": text[:border], "val": text[border:]}
    if kind == "char":  # as nanoGPT's, whose 65 ids many know: the characters of the whole text and nothing else
        made = train_tokenizer(kind, [text], vocab_size, specials=())
    else:
        made = train_tokenizer(kind, [parts["train"]], vocab_size)
    write_dataset(folder, lambda split: [parts[split]] if parts[split] else [], made)


if __name__ == "__main__":
    configure(globals())
    with user_errors():
        prepare(Path(out_dir) if out_dir else HERE, source, tokenizer, vocab_size)
