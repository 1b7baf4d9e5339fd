# 51M parameters on TinyStories.
#     python data/tinystories/prepare.py
#     python train.py config/train_medium.py
# Tokens per step: 32 x 32 x 256 = 262,144; 20,000 steps see 5.2 billion tokens, eleven epochs.
# Faster: python train.py config/train_medium.py config/tuned.py
exec(open("config/train_small.py").read())

out_dir = "out-medium"
block_size = 256
n_layer = 8
n_head = 8
n_embd = 512
