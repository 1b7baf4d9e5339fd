# 0.77M parameters on Shakespeare's characters: nanoGPT's loss in a ninth of its time.
#     python data/shakespeare_char/prepare.py
#     python train.py config/train_shakespeare_char_qwen3.py
# Reaches 1.876 nats per token in 9.8 s on two cores of an AMD EPYC (mean of three seeds).
# nanoGPT's model and recipe (train_shakespeare_char_cpu.py) reach 1.878 in 90.8 s.
#
# The depth, the width and the batches are the same, but with Qwen3's blocks, an untied output
# layer, Muon, and few steps at a high learning rate that falls to zero.
out_dir = "out-shakespeare-char-qwen3"
dataset = "shakespeare_char"
gradient_accumulation_steps = 1
batch_size = 12
block_size = 64

arch = "qwen3"
n_layer = 4
n_head = 4
n_kv_head = 1  # shared by the heads: an eighth less time at the same loss
n_embd = 128
dropout = 0.0
tied = False

optimizer = "muon"
learning_rate = 1.4e-2
schedule = "linear"
min_lr = 0.0
max_iters = 165
warmup_iters = 0  # projections that start at zero are warm-up enough
weight_decay = 0.0
beta1 = 0.8  # of Muon and AdamW: a short average for a short run
beta2 = 0.99
eval_interval = 165
eval_iters = 0  # the whole split: 111,540 characters
log_interval = 15
dtype = "float32"  # dtype='auto' would first measure, which takes as long as fifteen steps
compile = False  # takes longer than it saves at this size
