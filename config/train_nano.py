# 7.2M parameters, 6.4M of them the table of GPT-2's words, on TinyStories: 32 x 32 x 64 = 65,536 tokens a step, so that
# 20,000 steps see 1.3 billion, the text three times. The recipe is that of the tutorials that made this size known; it is
# slow to learn, and `python train.py config/train_nano.py config/tuned.py` is not.
out_dir = "out-nano"
dataset = "tinystories"
gradient_accumulation_steps = 32
batch_size = 32
block_size = 64

n_layer = 4
n_head = 4
n_embd = 128
dropout = 0.1
bias = True

learning_rate = 1e-4
min_lr = 1e-5
max_iters = 20000
warmup_iters = 1000
beta2 = 0.95
eval_interval = 250
