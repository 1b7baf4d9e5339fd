# 3.7M parameters on the works of Shakespeare, word by word: 16 x 128 = 2,048 words a step.
# The data: python data/shakespeare/prepare.py --tokenizer=word --out_dir=data/shakespeare_word
out_dir = "out-word-tiny"
dataset = "shakespeare_word"
gradient_accumulation_steps = 1
batch_size = 16
block_size = 128

n_layer = 4
n_head = 4
n_embd = 192
dropout = 0.2  # the text is soon known by heart
bias = False

learning_rate = 1e-3
min_lr = 1e-4
max_iters = 3000
warmup_iters = 100
beta2 = 0.99  # few tokens a step
eval_interval = 250
eval_iters = 0  # whole split
always_save_checkpoint = False
