# After train_nano.py, train_small.py, train_medium.py or train_large.py: the same size with Qwen3's blocks and Muon, few
# tokens a step and a high rate that falls to zero. Give it the time that you have:
#     python train.py config/train_small.py config/tuned.py --max_minutes=60
# Measured for ten minutes of nano and small on two CPU cores, where --softmax_words=4096 --compile=False is faster still.
gradient_accumulation_steps = 1

arch = "qwen3"
dropout = 0.0  # little text is seen twice

optimizer = "muon"
learning_rate = 8e-3
schedule = "linear"
min_lr = 0.0
warmup_iters = 0  # the projections that begin at zero are warm-up enough
weight_decay = 0.0
beta1 = 0.85  # of Muon and AdamW: short memory for a short run
beta2 = 0.99
