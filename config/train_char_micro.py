# 0.80M parameters on Shakespeare's characters.
#     python data/shakespeare_char/prepare.py
#     python train.py config/train_char_micro.py
# Tokens per step: 12 x 64 = 768.
exec(open("config/train_char_nano.py").read())

out_dir = "out-char-micro"
n_layer = 4
n_head = 4
n_embd = 128
