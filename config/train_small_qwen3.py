# 29.9M parameters on TinyStories in seven minutes on a laptop.
#     python data/tinystories/prepare.py
#     python train.py config/train_small_qwen3.py
# Reaches 2.829 nats per token (1.012 bits per byte) in 443 s on two cores of an AMD EPYC, on a
# sample of 8,593 stories (mean of three seeds). nanoGPT's model and recipe take 3,643 s to 2.857.
#
# The depth and the width are those of train_small.py, but with Qwen3's blocks, Muon, a sampled
# softmax, and few steps at a high learning rate that falls to zero. For all of TinyStories on a
# GPU, not measured yet: --max_iters=20000 --batch_size=64 --softmax_tokens=0 --compile=True
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
max_iters = 180
warmup_iters = 0  # projections that start at zero are warm-up enough
weight_decay = 0.0
beta1 = 0.85  # of Muon and AdamW: a short average for a short run
beta2 = 0.99
eval_interval = 180
log_interval = 10
softmax_tokens = 3072  # of 50,257: the whole softmax would cost more than the rest of the model
compile = False  # takes longer than it saves in so few steps
