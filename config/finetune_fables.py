# Fine-tune the demo to follow requests: the user names facts, and the assistant tells a fable that
# has them.
#     python data/fables/prepare.py
#     python train.py config/train_fables.py
#     python data/fables/prepare.py --instruct=True
#     python train.py config/finetune_fables.py
#     python eval.py --out_dir=out-fables-instruct --valid_samples=1000
# After 10,000 steps, 5.4 minutes on two cores of an AMD EPYC, it obeys 94.5% of 1,000 validation
# requests: the fable is valid and has everything that was named.
out_dir = "out-fables-instruct"
init_from = "out-fables"  # the folder of the run to tune
dataset = "fables_instruct"
batching = "by_length"  # one conversation per row
gradient_accumulation_steps = 1
batch_size = 6
block_size = 192  # longer than any request with its fable

n_layer = 2  # the model's own sizes, which --init_from=resume compares with the checkpoint
n_head = 2
n_embd = 64
dropout = 0.0
bias = True

optimizer = "muon"
learning_rate = 8e-3
embedding_lr_scale = 3
min_lr = 0.0
max_iters = 10000
warmup_iters = 200
weight_decay = 0.0
beta2 = 0.995
eval_interval = 2000
eval_iters = 16  # 96 conversations; eval.py scores all 2,000
log_interval = 100
compile = False
