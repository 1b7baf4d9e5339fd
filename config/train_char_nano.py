# 0.09M parameters on Shakespeare's characters.
#     python data/shakespeare_char/prepare.py
#     python train.py config/train_char_nano.py
# Tokens per step: 12 x 64 = 768.
out_dir = "out-char-nano"
dataset = "shakespeare_char"
gradient_accumulation_steps = 1
batch_size = 12
block_size = 64

n_layer = 3
n_head = 3
n_embd = 48
dropout = 0.0
bias = False

learning_rate = 1e-3
min_lr = 1e-4
max_iters = 2000
warmup_iters = 100
beta2 = 0.99  # few tokens per step
eval_interval = 250
eval_iters = 0  # the whole split
always_save_checkpoint = False
