# The demo: 0.28M parameters on fables, under three minutes on two CPU cores.
out_dir = "out-fables"
init_from = "auto"  # an interrupted demo goes on where it was
dataset = "fables"
batching = "by_length"  # a fable a row, from its first word on: as it will be sampled
gradient_accumulation_steps = 1
batch_size = 6  # about 750 tokens a step: many small steps teach more in three minutes than few large ones
block_size = 192  # longer than any fable

n_layer = 2
n_head = 2  # heads of 40: narrower ones are slow to learn to copy a name
n_embd = 80  # narrow and long beats wide and short here: 96 and 128 came less far in the same time
dropout = 0.0  # no fable is seen twice
bias = True

learning_rate = 4e-3  # not higher: with 5e-3 some seeds never learn to call the friend by name
min_lr = 0.0
max_iters = 6600
warmup_iters = 200
weight_decay = 0.0  # no fable is seen twice, so there is nothing to overfit
beta2 = 0.995  # longer memory, since the steps are small
eval_interval = 660
eval_iters = 16  # 96 fables; eval.py scores all 2,000
log_interval = 100
compile = False  # rows of many lengths: compiling would take longer than the training
