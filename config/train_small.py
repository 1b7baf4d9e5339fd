# 30M parameters on TinyStories: 32 x 2 x 128 = 8,192 tokens a step, so 20,000 steps see 164M tokens, a third of the
# text once. An hour on a good GPU. On a laptop take --max_iters=1000 --gradient_accumulation_steps=1 --batch_size=16.
# These are train.py's own defaults.
dataset = "tinystories"
gradient_accumulation_steps = 2
batch_size = 32
block_size = 128

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.1
bias = True

learning_rate = 1e-3
min_lr = 1e-4
max_iters = 20000
warmup_iters = 200
eval_interval = 250
