# 51M parameters on TinyStories: 32 x 32 x 256 = 262,144 tokens a step, so that 20,000 steps see 5.2 billion, the text
# eleven times. The recipe is that of the tutorials that made this size known; config/tuned.py after it learns faster.
out_dir = "out-medium"
dataset = "tinystories"
gradient_accumulation_steps = 32
batch_size = 32
block_size = 256

n_layer = 8
n_head = 8
n_embd = 512
dropout = 0.1
bias = True

learning_rate = 1e-4
min_lr = 1e-5
max_iters = 20000
warmup_iters = 1000
beta2 = 0.95
eval_interval = 250
