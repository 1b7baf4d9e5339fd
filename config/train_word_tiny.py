# 3.7M parameters on Shakespeare's words.
#     python data/shakespeare/prepare.py --tokenizer=word --out_dir=data/shakespeare_word
#     python train.py config/train_word_tiny.py
# Tokens per step: 16 x 128 = 2,048.
exec(open("config/train_char_tiny.py").read())

out_dir = "out-word-tiny"
dataset = "shakespeare_word"
