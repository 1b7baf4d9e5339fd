# 3.7M parameters on Shakespeare's words. Tokens per step: 16 x 128 = 2,048.
# Data: python data/shakespeare/prepare.py --tokenizer=word --out_dir=data/shakespeare_word
exec(open("config/train_char_tiny.py").read())

out_dir = "out-word-tiny"
dataset = "shakespeare_word"
