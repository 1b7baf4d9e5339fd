# The best model for 10 minutes on 2 CPU threads, chosen by
#     python plan.py --minutes=10 --dataset=tinystories --to=config/train_best10.py
# 7.29M parameters, 0.85M of them in the blocks; 1.1 GB of memory.
# Predicted: 0.809 bits per byte after 5.3M tokens (3.0 epochs). Train it with
#     python train.py config/train_best10.py
# Measured: 0.808 after 6.3M tokens on two cores of an AMD EPYC (Zen 4).
exec(open("config/tuned.py").read())

out_dir = "out-best10"
dataset = "tinystories"
batch_size = 24
block_size = 128
n_layer = 4
n_head = 4
n_embd = 128
max_minutes = 10.0
eval_interval = 431
eval_iters = 2
softmax_tokens = 4096
dtype = "float32"
compile = False
