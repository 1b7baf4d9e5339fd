# 0.57M parameters on Shakespeare's words. Tokens per step: 12 x 64 = 768.
# Data: python data/shakespeare/prepare.py --tokenizer=word --out_dir=data/shakespeare_word
exec(open("config/train_char_nano.py").read())

out_dir = "out-word-nano"
dataset = "shakespeare_word"
dropout = 0.2  # the text is small: the model would overfit
