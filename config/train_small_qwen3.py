# The loss of train_small.py in a fraction of its time: the same depth and width, but Qwen3's blocks, Muon, a sampled
# softmax, and few steps at a high rate that falls to zero. Measured on a laptop's two cores, where it takes ten minutes.
# For the whole text, on a GPU: --max_iters=20000 --batch_size=64 --softmax_words=0 --compile=True, not yet measured.
out_dir = "out-small-qwen3"
dataset = "tinystories"
gradient_accumulation_steps = 1
batch_size = 24
block_size = 128

arch = "qwen3"
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.0

optimizer = "muon"
learning_rate = 8e-3
schedule = "linear"
min_lr = 0.0
max_iters = 200
warmup_iters = 0  # the projections that begin at zero are warm-up enough
weight_decay = 0.0
beta1 = 0.85  # of Muon and AdamW: short memory for a short run
beta2 = 0.99
eval_interval = 200
log_interval = 10
softmax_words = 3072  # of 50,257: the head would cost more than all the rest
compile = False  # would cost more time than it saves in so few steps
