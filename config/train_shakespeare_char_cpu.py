# 0.8M parameters on Shakespeare's characters: 12 x 64 = 768 of them a step, two minutes on a laptop's CPU.
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
beta2 = 0.99  # few tokens a step
eval_interval = 500
eval_iters = 100  # leading batches; eval.py scores the whole split
compile = False  # at this size it costs more time than it saves
