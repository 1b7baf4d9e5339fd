# The loss of train_shakespeare_char_cpu.py in a fraction of its time: the same width, depth and batches, but Qwen3's
# blocks, a head of its own, and Muon, all at a high rate that falls to zero in few steps.
out_dir = "out-shakespeare-char-qwen3"
dataset = "shakespeare_char"
gradient_accumulation_steps = 1
batch_size = 12
block_size = 64

arch = "qwen3"
n_layer = 4
n_head = 4
n_embd = 128
dropout = 0.0
tied = False

optimizer = "muon"
learning_rate = 1.2e-2
schedule = "linear"
min_lr = 0.0
max_iters = 190
warmup_iters = 0  # the projections that begin at zero are warm-up enough
weight_decay = 0.0
beta1 = 0.85  # of Muon and AdamW: short memory for a short run
beta2 = 0.99
eval_interval = 190
eval_iters = 0  # whole split: 111,540 characters
log_interval = 19
dtype = "float32"  # known: to measure it would take as long as fifteen steps
compile = False  # at this size it costs more time than it saves
