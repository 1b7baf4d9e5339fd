# 30M parameters on TinyStories: 32 x 32 x 128 = 131,072 tokens a step, so that 20,000 steps see 2.6 billion, the text six
# times: half a day on a good GPU. The recipe is that of the tutorials that made this size known; it is slow to learn.
# `python train.py config/train_small.py config/tuned.py` is not, and train_small_qwen3.py is for a laptop.
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
