# Fine-tune the model of config/train_small.py, saved in out/, on your own text: three epochs at a
# low learning rate.
#     python data/text/prepare.py --source=book.txt
#     python train.py config/finetune_tinystories.py
# Tokens per step: 2 x 16 x 128 = 4,096. The result is best.pt.
out_dir = "out-finetune-tinystories"
init_from = "out"  # the folder of a run with the same tokenizer as the data
dataset = "text"
gradient_accumulation_steps = 2
batch_size = 16
block_size = 128

n_layer = 6  # the model's own sizes, which --init_from=resume compares with the checkpoint
n_head = 6
n_embd = 384
dropout = 0.1
bias = True

learning_rate = 1e-4
min_lr = 1e-5
max_epochs = 3.0
warmup_iters = 20
eval_interval = 50
patience = 3
always_save_checkpoint = False
