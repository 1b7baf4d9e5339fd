# 10.7M parameters on Shakespeare's characters, nanoGPT's configuration: minutes on a GPU.
#     python data/shakespeare_char/prepare.py
#     python train.py config/train_shakespeare_char.py
# Tokens per step: 64 x 256 = 16,384. The model overfits: the result is best.pt, not last.pt.
exec(open("config/train_char_small.py").read())

out_dir = "out-shakespeare-char"
batch_size = 64
