# 19.3M parameters on WikiText-103, 12.9M of them the embeddings of GPT-2's tokens.
#     python data/wikitext103/prepare.py
#     python train.py config/train_wikitext103_20m.py
# Tokens per step: 4 x 16 x 512 = 32,768; three epochs of 119M tokens are 10,900 steps.
out_dir = "out-wikitext103"
dataset = "wikitext103"
gradient_accumulation_steps = 4
batch_size = 16
block_size = 512

n_layer = 8
n_head = 8
n_embd = 256
dropout = 0.1
bias = True

learning_rate = 5e-4
schedule = "linear"
min_lr = 0.0
max_epochs = 3.0
warmup_iters = 500
beta2 = 0.95
eval_interval = 500
