"""
Other programs in the interface of a nanoGPT-style model.py.
"""
import importlib.util
from itertools import islice
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from torch.nn import functional as F


def load_peer(against: str) -> ModuleType | SimpleNamespace | None:
    """
    Return the program that --against names: an object with GPT and GPTConfig, or None for ''.

    against: 'hf' (transformers), FILE.gguf (llama.cpp) or the path of a model.py.
    """
    if not against:
        return None
    if against == "hf":
        return hugging_face()
    if not Path(against).is_file():
        raise ValueError(f"--against: there is no file {against}")
    return llama_cpp(against) if against.endswith(".gguf") else import_model(against)


def import_model(path: str) -> ModuleType:
    """Import a nanoGPT-style model.py."""
    spec = importlib.util.spec_from_file_location("peer_model", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        _ = module.GPT, module.GPTConfig
    except Exception as error:
        raise ValueError(f"{path} is not a model.py with GPT and GPTConfig: "
                         f"{type(error).__name__}: {error}") from None
    return module


def hugging_face() -> SimpleNamespace:
    """Wrap transformers' GPT-2, which always has biases, in the interface of a model.py."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        raise ValueError("--against=hf needs a package: pip install transformers") from None

    class PeerGPT(torch.nn.Module):
        def __init__(self, c: SimpleNamespace):
            super().__init__()
            self.hf = GPT2LMHeadModel(GPT2Config(
                vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd,
                n_layer=c.n_layer, n_head=c.n_head, resid_pdrop=c.dropout, embd_pdrop=c.dropout,
                attn_pdrop=c.dropout, bos_token_id=None, eos_token_id=None))

        def forward(self, idx, targets):
            logits = self.hf(idx, use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
            return logits, loss

        def generate(self, idx, n, temperature, top_k):
            return self.hf.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=n,
                                    do_sample=True, temperature=temperature, top_k=top_k,
                                    pad_token_id=0)

        def configure_optimizers(self, decay, lr, betas, kind):
            return torch.optim.AdamW(self.parameters(), lr, betas, weight_decay=decay, fused=True)

    return SimpleNamespace(GPT=PeerGPT, GPTConfig=SimpleNamespace)


def llama_cpp(path: str) -> SimpleNamespace:
    """Wrap a GGUF file in llama.cpp in the interface of a model.py that generates one text."""
    try:
        from llama_cpp import Llama
    except ImportError:
        raise ValueError("--against=FILE.gguf needs: pip install llama-cpp-python") from None

    class PeerGPT(torch.nn.Module):
        def __init__(self, c: SimpleNamespace):
            super().__init__()
            threads = torch.get_num_threads()
            self.llama = Llama(path, n_ctx=c.block_size, n_threads=threads,
                               n_threads_batch=threads, verbose=False)

        def generate(self, idx, n, temperature, top_k):
            self.llama.reset()  # or it would reuse the prompt
            stream = self.llama.generate(idx[0].tolist(), temp=temperature, top_k=top_k, top_p=1.0,
                                         min_p=0.0)
            return list(islice(stream, n))

        def configure_optimizers(self, *args):
            return []

    return SimpleNamespace(GPT=PeerGPT, GPTConfig=SimpleNamespace)
