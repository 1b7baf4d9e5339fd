"""What the test files share: running the scripts, tiny models, texts and comparisons."""

import contextlib
import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from lib.checkpoint import model_from_weights, save_checkpoint
from lib.quantize import prepare_for_inference, quantize_int8
from lib.tokenizer import gpt2_tokenizer, train_tokenizer
from model import GPT, GPTConfig

# the tests run side by side: one thread each, also in the scripts that they start
torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))
HERE = Path(__file__).parent.parent
TINY = [
    "--n_layer=2",
    "--n_head=2",
    "--n_embd=16",
    "--block_size=32",
    "--batch_size=4",
    "--gradient_accumulation_steps=2",
    "--max_iters=6",
    "--lr_decay_iters=6",
    "--warmup_iters=2",
    "--eval_interval=3",
    "--eval_iters=2",
    "--log_interval=1",
    "--compile=False",
    "--device=cpu",
    "--dtype=float32",
    "--dropout=0.1",
]

SCRIPTS = [
    "train.py",
    "sample.py",
    "eval.py",
    "bench.py",
    "plan.py",
    "export.py",
    "app.py",
    *sorted(f"data/{path.parent.name}/prepare.py" for path in HERE.glob("data/*/prepare.py")),
]


@functools.lru_cache
def fork_server() -> socket.socket:
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    subprocess.Popen(
        [sys.executable, "tests/fork_server.py", str(its.fileno())],
        cwd=HERE,
        pass_fds=[its.fileno()],
    )
    its.close()
    return ours


class Forked:
    """A child of the fork server that runs `python *command`, used like a subprocess.Popen."""

    def __init__(self, command: list[str], stdin, stdout, stderr, env: dict[str, str]):
        self.args, self.returncode = command, None
        self.pid = self.ask({"command": command, "env": env}, stdin, stdout, stderr)

    def ask(self, request: dict, *streams) -> int | None:
        socket.send_fds(
            fork_server(), [json.dumps(request).encode()], [stream.fileno() for stream in streams]
        )
        return json.loads(fork_server().recv(100))

    def wait(self, options: int = 0) -> int | None:
        if self.returncode is None:
            self.returncode = self.ask({"wait": self.pid, "options": options})
        return self.returncode

    def poll(self) -> int | None:
        return self.wait(os.WNOHANG)

    def communicate(self) -> tuple[str, None]:
        output = self.stdout.read()
        self.wait()
        return output, None

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(*command: str, **env: str) -> Forked:
    """Start `python *command` in the root; `stdout` has its output and errors as it runs."""
    reading, writing = (open(end, mode, errors="replace") for end, mode in zip(os.pipe(), "rw"))
    with open(os.devnull) as nothing, writing:
        process = Forked([*command], nothing, writing, writing, env)
    process.stdout = reading
    return process


def run(
    script: str, *args: str, ranks: int = 0, stdin: str = "", **env: str
) -> subprocess.CompletedProcess:
    """Run a script in the repository's folder, under torchrun if ranks is given."""
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        if ranks
        else []
    )
    command = [*launcher, script, *args]
    if "CXX" in env:  # is read when PyTorch is imported
        return subprocess.run(
            [sys.executable, *command],
            cwd=HERE,
            capture_output=True,
            text=True,
            timeout=300,
            input=stdin,
            env=os.environ | env,
        )
    with contextlib.ExitStack() as stack:
        files = [
            stack.enter_context(tempfile.TemporaryFile("w+", errors="replace")) for _ in range(3)
        ]
        files[0].write(stdin)
        files[0].seek(0)
        status = Forked(command, *files, env).wait()
        for file in files:
            file.seek(0)
        return subprocess.CompletedProcess(command, status, files[1].read(), files[2].read())


def train(data: Path, out_dir: Path, *args: str, **env: str) -> subprocess.CompletedProcess:
    """A tiny run of train.py that must succeed."""
    done = run("train.py", f"--dataset={data}", f"--out_dir={out_dir}", *TINY, *args, **env)
    assert done.returncode == 0, done.stderr
    return done


def run_ranks(command: list[str], n: int = 2, status: int = 0) -> list[str]:
    """Run n ranks and return their outputs, without torchrun, which would import PyTorch again."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    env = {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [start(*command, **env, RANK=str(i), LOCAL_RANK=str(i)) for i in range(n)]
    outputs = [rank.communicate()[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [status] * n, outputs
    return outputs


def train_on_ranks(n: int, data: Path, out_dir: Path, *args: str) -> None:
    """The same on n ranks."""
    run_ranks(["train.py", f"--dataset={data}", f"--out_dir={out_dir}", *TINY, *args], n)


def read_log(out_dir: Path) -> list[dict]:
    """log.jsonl without the timings, which no two runs share."""
    timings = {"ms", "tokens_per_second", "mfu"}
    return [
        {k: v for k, v in json.loads(line).items() if k not in timings}
        for line in open(out_dir / "log.jsonl")
    ]


def step_of(line: str) -> int:
    """The step of a line such as `step  250/2000 | loss ...`, or -1 for another line."""
    match = re.match(r"step +(\d+)[/ ]", line)
    return int(match[1]) if match else -1


def prepare(name: str, *args: str, **env: str) -> subprocess.CompletedProcess:
    return run(f"data/{name}/prepare.py", *args, **env)


def one_line_error(done) -> str:
    """The error line of a run that failed as runs must fail."""
    assert done.returncode == 2, (done.returncode, done.stderr)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    return lines[0]


def assert_same(a, b, where="checkpoint"):
    """Equality to the last bit, through dicts, lists and tensors."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a.equal(b) if isinstance(a, torch.Tensor) else a == b, where


def damage_by(kind: str, raw: bytes) -> bytes:
    middle = len(raw) // 2
    return {
        "truncated": raw[:middle],
        "empty": b"",
        "zeroed": bytes(len(raw)),
        "text": b"hello",
        "flipped": raw[:middle] + bytes([raw[middle] ^ 1]) + raw[middle + 1 :],
    }[kind]


# -----------------------------------------------------------------------------
# Models


def tiny(**changes) -> GPT:
    torch.manual_seed(0)
    return GPT(
        GPTConfig(**dict(block_size=32, vocab_size=61, n_layer=2, n_head=4, n_embd=32) | changes)
    ).eval()


def randomize(model: GPT) -> None:
    """Weights far from their initial values, biases and gains included."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)


def in_int8(model: GPT) -> GPT:
    int8 = model_from_weights(model.config, quantize_int8(model.state_dict())).eval()
    prepare_for_inference(int8)
    return int8


SHAPES = {
    "gpt2": dict(arch="gpt2", n_layer=2, n_head=2, n_embd=32, block_size=64),
    "nanogpt": dict(arch="gpt2", n_layer=2, n_head=2, n_embd=32, block_size=64, gelu="none",
                    bias=False),
    "qwen3": dict(arch="qwen3", n_layer=2, n_head=4, n_kv_head=2, head_dim=12, n_embd=32,
                  n_inner=64, block_size=64),
    "untied": dict(arch="qwen3", n_layer=1, n_head=2, n_embd=32, block_size=64, tied=False,
                   rope_theta=500.0),
    "llama": dict(arch="llama", n_layer=2, n_head=6, n_kv_head=2, head_dim=10, n_embd=36,
                  n_inner=50, block_size=64, tied=False, rope_theta=700.0, norm_eps=1e-4),
}


def tokenizer_of(kind: str):
    if kind == "gpt2":
        return gpt2_tokenizer()
    return train_tokenizer(kind, [TEXT] * 50, 300 if kind == "bpe" else 0)


def make_run(folder: Path, shape: str, kind: str, padding: int = 0) -> GPT:
    """
    Write a run with random weights, so large that a next token depends on those before it.

    Of such runs it is the first whose 40 greedy tokens after PROMPT are clear: where two tokens are
    about as probable, rounding to float16 would decide.
    """
    tokenizer = tokenizer_of(kind)
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size + padding, **SHAPES[shape])).eval()
    idx = torch.tensor([[tokenizer.eot] + tokenizer.encode(PROMPT)])
    for seed in range(100):
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.normal_(1.0 if p.dim() == 1 and name.endswith("weight") else 0.0, 0.3)
            # never the most probable: unused ids, as in a trained model, and here end-of-text
            model.lm_head.weight[tokenizer.vocab_size:] = 0
            model.lm_head.weight[tokenizer.eot] = 0
            logits = model(model.generate(idx, 40, temperature=0))[0][0, idx.size(1) - 1:-1]
        top = logits.topk(2).values
        is_clear = (top[:, 0] - top[:, 1]).min() > 0.01 * logits.std()
        if is_clear and len(logits.argmax(dim=1).unique()) > 4:
            break
    meta = {"dataset": "tales", "tokenizer": tokenizer.spec, "eot": tokenizer.eot,
            "vocab_size": tokenizer.vocab_size, "splits": {}}
    config = {"dataset": "tales", "batching": "by_length", "seed": 1}
    folder.mkdir(parents=True, exist_ok=True)
    save_checkpoint(folder, "best.pt", {
        "model": model.state_dict(), "model_args": vars(model.config), "step": 7,
        "best_val_loss": 1.0, "meta": meta, "config": config})
    return model


def export(out_dir: Path, to: Path, *args: str) -> None:
    done = run("export.py", f"--out_dir={out_dir}", f"--to={to}", "--format=hf", *args)
    assert done.returncode == 0 and done.stderr == "" and str(to) in done.stdout, done.stderr


def transformers_of(folder: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return (
        AutoModelForCausalLM.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(
            folder, trust_remote_code=(folder / "tokenization_word.py").exists()
        ),
    )


def gguf_tensors(path: Path) -> tuple[dict, dict]:
    """Return the tensors of a GGUF file in float32, and its fields, read by llama.cpp's library."""
    import gguf

    reader = gguf.GGUFReader(path)
    tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type)
               .reshape(t.shape[::-1].tolist()) for t in reader.tensors}
    return tensors, {name: field.contents() for name, field in reader.fields.items()}


def expected_gguf_tensors(model: GPT) -> dict[str, torch.Tensor]:
    """Return the weights of a model by their names in a GGUF file."""
    c, state = model.config, model.state_dict()
    names = {"attn.c_proj": "attn_output", "ln_1": "attn_norm", "ln_2": "ffn_norm",
             "mlp.c_proj": "ffn_down"}
    if c.arch == "gpt2":
        names |= {"attn.c_attn": "attn_qkv", "mlp.c_fc": "ffn_up"}
    elif c.arch == "qwen3":
        names |= {"attn.q_norm": "attn_q_norm", "attn.k_norm": "attn_k_norm"}
    pairs = {"transformer.wte": "token_embd", "transformer.ln_f": "output_norm"}
    pairs |= {"transformer.wpe": "position_embd"} if c.arch == "gpt2" else {}
    pairs |= {} if c.tied else {"lm_head": "output"}
    tensors = {}
    for i in range(c.n_layer):
        pairs |= {f"transformer.h.{i}.{ours}": f"blk.{i}.{name}" for ours, name in names.items()}
        if c.arch != "gpt2":
            sizes = model.transformer.h[i].attn.qkv_sizes
            q, k, v = state[f"transformer.h.{i}.attn.c_attn.weight"].split(sizes)
            if c.arch == "llama":  # rows j and j + hs / 2 of a head are neighbors
                half = c.head_dim // 2
                order = [head * c.head_dim + j + side * half for head in range(c.n_head)
                         for j in range(half) for side in (0, 1)]
                q, k = q[order], k[order[:len(k)]]
            gate, up = state[f"transformer.h.{i}.mlp.c_fc.weight"].chunk(2)
            tensors |= {f"blk.{i}.{name}.weight": w for name, w in (
                ("attn_q", q), ("attn_k", k), ("attn_v", v), ("ffn_gate", gate), ("ffn_up", up))}
    for ours, name in pairs.items():
        tensors[f"{name}.weight"] = w = state[f"{ours}.weight"]
        if c.arch == "gpt2" and not ours.endswith(("wte", "wpe")):
            tensors[f"{name}.bias"] = state.get(f"{ours}.bias", torch.zeros(len(w)))
    return tensors


# -----------------------------------------------------------------------------
# Texts

SPLITS = ("train", "val")
ODD = "Zoë's café — 3.5%?!\n\n  \"hide-and-seek\"\tnaïve\u200b 🦊 l'été\r\n"
PROMPT = "Once upon a time"
TEXT = (
    "Once upon a time, the cat's owner said: \"Don't!\"\n\n"
    "Then 12 dogs -- well-fed -- ran\taway.  Fin\u00e9 \u4e2d\U0001f600 ...\n"
)
