# nanoGPT's recipe for Shakespeare's characters with a tuned AdamW: a baseline, see docs/results.md.
#     python data/shakespeare_char/prepare.py
#     python train.py config/train_shakespeare_char_cpu_tuned.py
exec(open("config/train_shakespeare_char_cpu.py").read())

out_dir = "out-shakespeare-char-tuned"
learning_rate = 8e-3  # the best of 3e-3, 5e-3, 8e-3 and 1.2e-2; nanoGPT's is 1e-3
min_lr = 8e-4
max_iters = 1080  # just enough for nanoGPT's loss
eval_interval = 1080
