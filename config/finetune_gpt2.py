# Fine-tune OpenAI's smallest GPT-2 (124M parameters, a download of 0.5 GB) on your own text.
#     python data/text/prepare.py --source=book.txt
#     python train.py config/finetune_gpt2.py
# Tokens per step: 32 x 1 x 1,024 = 32,768. The result is best.pt.
out_dir = "out-finetune-gpt2"
init_from = "gpt2"  # or gpt2-medium, gpt2-large, gpt2-xl, or a Hugging Face folder
dataset = "text"
gradient_accumulation_steps = 32
batch_size = 1
block_size = 1024

n_layer = 12  # the model's own sizes, which --init_from=resume compares with the checkpoint
n_head = 12
n_embd = 768
dropout = 0.1
bias = True

learning_rate = 3e-5
decay_lr = False
max_iters = 100
warmup_iters = 0
eval_interval = 5
eval_iters = 40
patience = 3  # a model of this size soon overfits a single book
always_save_checkpoint = False
