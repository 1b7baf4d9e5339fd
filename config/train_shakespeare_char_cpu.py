# 0.80M parameters on Shakespeare's characters, nanoGPT's recipe for a laptop's CPU: two minutes.
#     python data/shakespeare_char/prepare.py
#     python train.py config/train_shakespeare_char_cpu.py
# With nanoGPT's own model.py it reaches 1.886 nats per token in 97.6 s on two cores of an AMD EPYC
# (mean of three seeds). Tokens per step: 12 x 64 = 768.
out_dir = "out-shakespeare-char"
dataset = "shakespeare_char"
gradient_accumulation_steps = 1
batch_size = 12
block_size = 64

n_layer = 4
n_head = 4
n_embd = 128
dropout = 0.0
bias = False

learning_rate = 1e-3
min_lr = 1e-4
max_iters = 2000
warmup_iters = 100
beta2 = 0.99  # few tokens per step
eval_interval = 500
eval_iters = 100  # leading batches; eval.py scores the whole split
compile = False  # takes longer than it saves at this size
