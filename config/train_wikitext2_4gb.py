# GPT-2's size with half its context, 124M parameters, on WikiText-2 and a GPU of 4 GB: articles one a row, those of like
# length together; 4 x 4 rows of up to 512 tokens a step. The logits of 256 tokens at a time and activations that are
# computed twice make it fit: `python bench.py --mode=plan config/train_wikitext2_4gb.py --device_memory=4GB --gpu=T4`.
# 2.4M tokens are soon known by heart, so dropout is high and best.pt is what counts.
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
eval_iters = 0  # whole split
patience = 5
always_save_checkpoint = False
loss_chunk = 256
remat = True
compile = False  # rows of many lengths
