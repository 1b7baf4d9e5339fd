# 124M parameters, GPT-2's size with half its context, on WikiText-2 and a GPU with 4 GB.
#     python data/wikitext2/prepare.py
#     python train.py config/train_wikitext2_4gb.py
# Each step has 4 x 4 rows: one article per row, of up to 512 tokens, with others of similar length.
# The model overfits 2.4M tokens: dropout is high, and the result is best.pt, not last.pt.
out_dir = "out-wikitext2"
dataset = "wikitext2"
batching = "by_length"
gradient_accumulation_steps = 4
batch_size = 4
block_size = 512

n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.2
bias = True

learning_rate = 3e-4
schedule = "cosine"
min_lr = 3e-5
max_epochs = 10.0
warmup_iters = 100
beta2 = 0.95
eval_interval = 100
eval_iters = 0  # the whole split
patience = 5
always_save_checkpoint = False
loss_chunk = 256  # the logits of 256 tokens at a time: saves memory
remat = True  # activations are computed again in the backward pass: saves memory
