# 0.57M parameters on the works of Shakespeare, word by word: 12 x 64 = 768 words a step.
# The data: python data/shakespeare/prepare.py --tokenizer=word --out_dir=data/shakespeare_word
out_dir = "out-word-nano"
dataset = "shakespeare_word"
gradient_accumulation_steps = 1
batch_size = 12
block_size = 64

n_layer = 3
n_head = 3
n_embd = 48
dropout = 0.2  # the text is soon known by heart
bias = False

learning_rate = 1e-3
min_lr = 1e-4
max_iters = 2000
warmup_iters = 100
beta2 = 0.99  # few tokens a step
eval_interval = 250
eval_iters = 0  # whole split
always_save_checkpoint = False
