# GPT-2's smallest size, 124M parameters, on ten billion tokens of FineWeb, for eight GPUs.
#     python data/fineweb/prepare.py
#     torchrun --nproc_per_node=8 train.py config/train_gpt2_124m.py
# Tokens per step: 40 x 12 x 1,024 = 491,520. For OpenWebText: --dataset=openwebtext
# 12 rows fit into 24 GB. The largest micro-batches that plan.py --gpu=A100 predicts, batch_size x
# gradient_accumulation_steps: 16 GB: 10 x 48; 24 GB: 16 x 30; 40 GB: 30 x 16; 80 GB: 60 x 8. Eight
# GPUs need a multiple of 8 micro-batches.
out_dir = "out-gpt2-124m"
dataset = "fineweb"
gradient_accumulation_steps = 40  # five for each of eight GPUs
batch_size = 12
block_size = 1024

n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.0  # no token is seen twice
bias = True

learning_rate = 6e-4
min_lr = 6e-5
max_iters = 20000  # 9.8 billion tokens
warmup_iters = 700
weight_decay = 0.1
beta2 = 0.95
eval_interval = 500
eval_iters = 100
