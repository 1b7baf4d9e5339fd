"""
Continue a text with a trained model.

    python sample.py --start="Once upon a time"
    python sample.py --out_dir=out-fables --num_samples=5
"""
from pathlib import Path

import torch

from checkpoint import load_model
from configurator import configure, user_errors
from model import resolve_device
from tokenizer import get_tokenizer

# -----------------------------------------------------------------------------
out_dir = "out"  # the run to sample from: its best.pt, else last.pt
start = ""  # the prompt, or FILE:path of a text file that holds it; '' starts a new document
num_samples = 3
max_new_tokens = 300  # of each sample, which ends before at the end of its document
temperature = 0.8  # 1: the model's own distribution; below: safer; 0: always the most probable token
top_k = 0  # draw from the k most probable tokens only; 0: from all
seed = 1337
device = "auto"  # cuda, else mps, else cpu; or 'cpu', 'cuda:1', ...
configure(globals(), skip_settings_of="train.py")
# -----------------------------------------------------------------------------

with user_errors():
    for name, least in (("num_samples", 1), ("max_new_tokens", 1), ("temperature", 0), ("top_k", 0), ("seed", 0)):
        if globals()[name] < least:
            raise ValueError(f"{name} must be at least {least}, got {globals()[name]}")
    device = resolve_device(device)
    prompt = Path(start[5:]).read_text(encoding="utf-8") if start.startswith("FILE:") else start
    model, checkpoint = load_model(out_dir, device)
    tokenizer = get_tokenizer(checkpoint["meta"])
    ids = tokenizer.encode(prompt)
    if tokenizer.eot >= 0:
        ids = [tokenizer.eot] + ids  # as in training, where every document follows the end of another
    if not ids:
        raise ValueError("this model has no end-of-text token to begin from: give it a prompt with --start=TEXT")

torch.manual_seed(seed)
idx = torch.tensor([ids] * num_samples, device=device)  # (B, T)
for row in model.generate(idx, max_new_tokens, temperature, top_k, stop_token=tokenizer.eot).tolist():
    row = row[tokenizer.eot >= 0:]
    text = tokenizer.decode(row[:row.index(tokenizer.eot)] if tokenizer.eot in row else row)
    print(text, "-" * 80, sep="\n")
