# 14.6M parameters on Shakespeare's words. Tokens per step: 32 x 256 = 8,192.
# Data: python data/shakespeare/prepare.py --tokenizer=word --out_dir=data/shakespeare_word
exec(open("config/train_char_small.py").read())

out_dir = "out-word-small"
dataset = "shakespeare_word"
