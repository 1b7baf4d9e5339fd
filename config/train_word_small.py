# 14.6M parameters on Shakespeare's words.
#     python data/shakespeare/prepare.py --tokenizer=word --out_dir=data/shakespeare_word
#     python train.py config/train_word_small.py
# Tokens per step: 32 x 256 = 8,192.
exec(open("config/train_char_small.py").read())

out_dir = "out-word-small"
dataset = "shakespeare_word"
