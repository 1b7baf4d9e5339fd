# train_small.py with the blocks of Qwen3 and Muon, which need far fewer tokens (measured on Shakespeare, see RESULTS.md).
out_dir = "out-small-qwen3"
dataset = "tinystories"
gradient_accumulation_steps = 2
batch_size = 32
block_size = 128

arch = "qwen3"
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.0

optimizer = "muon"
learning_rate = 4e-3
schedule = "linear"
min_lr = 0.0
max_iters = 20000
warmup_iters = 100
eval_interval = 250
