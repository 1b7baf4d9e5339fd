# The best model for 10 minutes on cpu, chosen by
#     python plan.py --minutes=10 --dataset=tinystories --to=config/train_best10.py
# 7,072,960 parameters, 640,064 of them in the blocks. At 3,399 tokens/s it sees
# 2,039,342 tokens, 1.2 epochs, in 1.0 GB of memory.
# Predicted: 0.885 bits per byte. Train it with
#     python train.py config/train_best10.py
exec(open("config/tuned.py").read())

out_dir = 'out-best10'
dataset = 'tinystories'
batch_size = 24
block_size = 128
n_layer = 3
n_head = 4
n_embd = 128
max_minutes = 10.0
eval_interval = 165
eval_iters = 2
softmax_tokens = 4096
dtype = 'float32'
compile = False
