# 7.2M parameters on TinyStories, 6.4M of them the embeddings of GPT-2's tokens.
#     python data/tinystories/prepare.py
#     python train.py config/train_nano.py
# Tokens per step: 32 x 32 x 64 = 65,536; 20,000 steps see 1.3 billion tokens, three epochs.
# Faster: python train.py config/train_nano.py config/tuned.py
exec(open("config/train_small.py").read())

out_dir = "out-nano"
block_size = 64
n_layer = 4
n_head = 4
n_embd = 128
