# The demo: 0.20M parameters on the fables.
#     python data/fables/prepare.py
#     python train.py config/train_fables.py
# Reaches 0.5555 nats per token, 0.3% above the floor of 0.5541, with 96% of 200 sampled fables
# valid, in 3.6 minutes on two cores of an AMD EPYC.
out_dir = "out-fables"
init_from = "auto"  # an interrupted demo resumes
dataset = "fables"
batching = "by_length"  # one fable per row, from its first token: as it is sampled
gradient_accumulation_steps = 1
batch_size = 6  # about 750 tokens per step: in three minutes, many small steps beat few large ones
block_size = 192  # longer than any fable

n_layer = 2
n_head = 2  # a single head did not always learn to copy a name
n_embd = 64  # wider models see fewer fables in the same time
dropout = 0.0  # 1.1 epochs: there is nothing to overfit
bias = True

optimizer = "muon"
learning_rate = 8e-3
embedding_lr_scale = 3  # as the head, it learns faster to exclude impossible tokens
min_lr = 0.0
max_iters = 9000
warmup_iters = 200
weight_decay = 0.0
beta2 = 0.995  # a long average, since each step has few tokens
eval_interval = 1500
eval_iters = 16  # 96 fables; eval.py scores all 2,000
log_interval = 100
compile = False  # compiling takes 30 s and saves a sixth of each step: pays from 10,000 steps
