# 10.7M parameters on the works of Shakespeare, character by character: 32 x 256 = 8,192 characters a step.
out_dir = "out-char-small"
dataset = "shakespeare_char"
gradient_accumulation_steps = 1
batch_size = 32
block_size = 256

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2  # the text is soon known by heart
bias = False

learning_rate = 1e-3
min_lr = 1e-4
max_iters = 5000
warmup_iters = 100
beta2 = 0.99  # few tokens a step
eval_interval = 250
eval_iters = 0  # whole split
always_save_checkpoint = False
