# The model that `python train.py config/train_small.py` left in out/, taught a text of yours: 2 x 16 x 128 = 4,096 tokens a
# step, three times through the text at a low rate. The data: python data/text/prepare.py --source=book.txt
out_dir = "out-finetune-tinystories"
init_from = "out"  # the folder of any run whose tokenizer is that of the data
dataset = "text"
gradient_accumulation_steps = 2
batch_size = 16
block_size = 128

n_layer = 6  # those of the model, so that --init_from=resume finds the settings that it needs
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
