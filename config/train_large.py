# 124M parameters, GPT-2's size with half its context, on TinyStories, for many GPUs.
#     python data/tinystories/prepare.py
#     torchrun --nproc_per_node=8 train.py config/train_large.py
# Tokens per step: 32 x 32 x 512 = 524,288; 20,000 steps see 10 billion tokens, 22 epochs.
# Faster: add config/tuned.py after this file.
exec(open("config/train_small.py").read())

out_dir = "out-large"
block_size = 512
n_layer = 12
n_head = 12
n_embd = 768
