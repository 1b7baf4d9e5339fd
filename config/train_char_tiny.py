# 1.8M parameters on Shakespeare's characters.
#     python data/shakespeare_char/prepare.py
#     python train.py config/train_char_tiny.py
# Tokens per step: 16 x 128 = 2,048.
exec(open("config/train_char_nano.py").read())

out_dir = "out-char-tiny"
batch_size = 16
block_size = 128

n_layer = 4
n_head = 4
n_embd = 192
dropout = 0.2  # the text is small: the model would overfit

max_iters = 3000
