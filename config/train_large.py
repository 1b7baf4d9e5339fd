# 124M parameters, GPT-2's size with half its context, on TinyStories: 32 x 32 x 512 = 524,288 tokens a step, so that 20,000
# steps see 10 billion, the text 22 times: for many GPUs. The recipe is that of the tutorials that made this size known;
# config/tuned.py after it learns faster.
out_dir = "out-large"
dataset = "tinystories"
gradient_accumulation_steps = 32
batch_size = 32
block_size = 512

n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.1
bias = True

learning_rate = 1e-4
min_lr = 1e-5
max_iters = 20000
warmup_iters = 1000
beta2 = 0.95
eval_interval = 250
