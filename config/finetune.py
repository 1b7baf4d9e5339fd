# Fine-tune any model: a run, a Hugging Face folder, a GGUF file or a model of the hub. For example
# SmolLM2 (135M parameters, a download of 0.3 GB) on a book:
#     python data/text/prepare.py --source=book.txt --tokenizer=HuggingFaceTB/SmolLM2-135M
#     python train.py config/finetune.py
# Tokens per step: 4 x 1 x 256 = 1,024. The result is best.pt; block_size is also its context.
out_dir = "out-finetune"
init_from = "HuggingFaceTB/SmolLM2-135M"
dataset = "text"
gradient_accumulation_steps = 4
batch_size = 1
block_size = 256

dropout = 0.0
learning_rate = 1e-4
min_lr = 1e-5
max_minutes = 10.0
warmup_iters = 5
weight_decay = 0.0
beta2 = 0.95
eval_interval = 20
eval_iters = 8
log_interval = 5
patience = 3  # stop when the model begins to overfit
always_save_checkpoint = False  # a resumable checkpoint has three times the size of the weights
loss_chunk = 256  # the logits of a large vocabulary would take most of the memory
compile = False  # compiling takes longer than it saves in ten minutes
