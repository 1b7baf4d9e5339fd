# 10.7M parameters on Shakespeare's characters.
#     python data/shakespeare_char/prepare.py
#     python train.py config/train_char_small.py
# Tokens per step: 32 x 256 = 8,192.
exec(open("config/train_char_nano.py").read())

out_dir = "out-char-small"
batch_size = 32
block_size = 256

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2  # the text is small: the model would overfit

max_iters = 5000
