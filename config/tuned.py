# A faster recipe for train_nano.py, train_small.py, train_medium.py and train_large.py: Qwen3's
# blocks and Muon, fewer tokens per step, and a high learning rate that falls to zero.
#     python train.py config/train_small.py config/tuned.py --max_minutes=60
# Measured in runs of ten minutes with train_nano.py and train_small.py on two CPU cores. There,
# --softmax_tokens=4096 --compile=False is faster still.
gradient_accumulation_steps = 1

arch = "qwen3"
dropout = 0.0  # little of the text is seen twice

optimizer = "muon"
learning_rate = 8e-3
schedule = "linear"
min_lr = 0.0
warmup_iters = 0  # projections that start at zero are warm-up enough
weight_decay = 0.0
beta1 = 0.85  # of Muon and AdamW: a short average for a short run
beta2 = 0.99
