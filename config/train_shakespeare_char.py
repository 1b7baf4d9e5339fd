# 10M parameters on the works of Shakespeare, character by character: minutes on a GPU.
# 1,000,000 characters are soon known by heart, so dropout is high and best.pt is what counts.
out_dir = "out-shakespeare-char"
dataset = "shakespeare_char"
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2
bias = False

learning_rate = 1e-3
min_lr = 1e-4
max_iters = 5000
warmup_iters = 100
beta2 = 0.99  # few tokens a step
eval_interval = 250
eval_iters = 0  # whole split: 111,540 characters
always_save_checkpoint = False
