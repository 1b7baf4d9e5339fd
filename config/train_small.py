# 30M parameters on TinyStories: some hours on a good GPU.
#     python data/tinystories/prepare.py
#     python train.py config/train_small.py
# Tokens per step: 32 x 32 x 128 = 131,072; 20,000 steps see 2.6 billion tokens, six epochs.
#
# This recipe, that of the tutorials that made this size popular, learns slowly. Faster: add
# config/tuned.py after this file, or use train_small_qwen3.py on a laptop.
dataset = "tinystories"
gradient_accumulation_steps = 32
batch_size = 32
block_size = 128

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.1
bias = True

learning_rate = 1e-4
min_lr = 1e-5
max_iters = 20000
warmup_iters = 1000
beta2 = 0.95
eval_interval = 250
