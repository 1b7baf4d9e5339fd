"""
The works of Shakespeare, character by character, as in nanoGPT: 65 characters, the first 90% to train on.

    python data/shakespeare_char/prepare.py
    python data/shakespeare_char/prepare.py --source=input.txt

Writes train.bin (1,003,854 tokens) and val.bin (111,540 tokens) into this folder.
"""
import hashlib
import sys
import urllib.request
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
from configurator import configure, user_errors
from dataset import finish_dataset, write_split
from tokenizer import train_tokenizer

# -----------------------------------------------------------------------------
source = ""  # a local copy of the text, or any other text file; '': download it
out_dir = ""  # where to write; '': this folder
configure(globals())
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


with user_errors():
    text = Path(source).read_text(encoding="utf-8") if source else download()
    folder = Path(out_dir) if out_dir else HERE
    tokenizer = train_tokenizer("char", [text], with_eot=False)
    border = int(len(text) * 0.9)
    parts = {"train": text[:border], "val": text[border:]}
    splits = {split: write_split(folder, split, [part] if part else [], tokenizer) for split, part in parts.items()}
    finish_dataset(folder, tokenizer, splits)
