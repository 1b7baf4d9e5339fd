# 0.57M parameters on Shakespeare's words.
#     python data/shakespeare/prepare.py --tokenizer=word --out_dir=data/shakespeare_word
#     python train.py config/train_word_nano.py
# Tokens per step: 12 x 64 = 768.
exec(open("config/train_char_nano.py").read())

out_dir = "out-word-nano"
dataset = "shakespeare_word"
dropout = 0.2  # the text is small: the model would overfit
