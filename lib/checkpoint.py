"""
Checkpoints: out_dir/last.pt to resume from, out_dir/best.pt with the lowest validation loss, tensors and plain types
only. A file appears under its name whole or not at all, and the last.pt before it stays as prev.pt.

Keys: model (state dict of the uncompiled model), model_args, step, best_val_loss, config (the settings), meta (the data
set's meta.json, so that sampling needs no data folder), version; in last.pt also optimizer, scaler, and the loop's stale,
seconds, lr_scale and watch.
"""
import contextlib
import json
import os
import sys
import zipfile
from dataclasses import asdict
from pathlib import Path

import torch

from lib.convert import from_hf
from lib.tokenizer import meta_of, read_nanogpt_characters, read_tokenizer_json
from model import GPT, GPTConfig, quantize_int8

VERSION = 1
OPENAI = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # what they call their weights on the Hugging Face hub


def write_atomically(path: Path, text: str) -> None:
    """Under its name a file is the old one or the new one, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def lock_run(out_dir: str | Path):
    """
    Make out_dir and hold the lock on it until this process ends, however it ends: the kernel lets go of it, so that no
    lock is ever stale. The file `lock` holds the process id, for the message to whom it keeps out.
    """
    os.makedirs(out_dir, exist_ok=True)
    file = open(Path(out_dir) / "lock", "a+")
    with contextlib.suppress(ImportError):  # Windows has no flock: no lock there
        import fcntl
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(f"process {file.read().strip() or '?'} is training in {out_dir}: wait for it or stop it, or "
                             "choose another --out_dir") from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def save_checkpoint(out_dir: str | Path, name: str, checkpoint: dict) -> None:
    """Write out_dir/name: temporary file, fsync, rename. An older last.pt becomes prev.pt."""
    path = Path(out_dir) / name
    temporary = path.with_name(name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint | {"version": VERSION}, file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        reason = error if isinstance(error, OSError) else error.__context__  # torch hides a full disk in a RuntimeError
        if isinstance(reason, OSError):
            raise OSError(f"{path} could not be written ({reason.strerror}); what was saved before is still there") from None
        raise
    if name == "last.pt" and path.exists():
        os.replace(path, path.with_name("prev.pt"))
    os.replace(temporary, path)


def read_checkpoint(path: Path) -> dict:
    """One checkpoint file on the CPU. ValueError when it is damaged: zip checksums, then torch's safe unpickler."""
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"checksum of {damaged} is wrong")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged file can make the reader fail in any way
        reason = " ".join(str(error).split())[:100]
        raise ValueError(f"{path} is damaged or not a checkpoint ({reason})") from None
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} is not a checkpoint: it holds a {type(checkpoint).__name__}")
    if "iter_num" in checkpoint:
        checkpoint = from_nanogpt(checkpoint, path)
    return checked(checkpoint, path)


def checked(checkpoint: dict, path: Path) -> dict:
    """The checkpoint, if it has what every one has; else ValueError."""
    kinds = dict(model=dict, model_args=dict, step=int, config=dict, meta=dict, version=int)
    wrong = [name for name, kind in kinds.items() if not isinstance(checkpoint.get(name), kind) or checkpoint[name] is False]
    if (wrong or checkpoint["step"] < 0 or not isinstance(checkpoint["config"].get("dataset"), str)
            or not isinstance(checkpoint["meta"].get("tokenizer"), dict)):
        raise ValueError(f"{path} is not a checkpoint of this program, or damaged: its {', '.join(wrong) or 'parts'} "
                         "cannot be read")
    if not all(isinstance(weight, torch.Tensor) for weight in checkpoint["model"].values()):
        raise ValueError(f"{path} is damaged: some of its weights are none")
    if checkpoint["version"] > VERSION:
        raise ValueError(f"{path} was written by a newer version of this program")
    return checkpoint


def from_nanogpt(checkpoint: dict, path: Path) -> dict:
    """
    A nanoGPT ckpt.pt under our names: the same weights, with the exact GELU that they were trained with. The characters of
    one that knows characters are in the meta.pkl beside it or in data/.
    """
    if lacking := {"model", "model_args", "config"} - set(checkpoint):
        raise ValueError(f"the nanoGPT checkpoint lacks {', '.join(sorted(lacking))}")
    dataset, vocab_size = str(checkpoint["config"].get("dataset", "")), checkpoint["model_args"]["vocab_size"]
    spec = {"kind": "gpt2"}
    if vocab_size < 50257:
        pickles = [file for file in (path.with_name("meta.pkl"), Path("data", dataset, "meta.pkl")) if file.is_file()]
        if not pickles:
            raise ValueError(f"{path} knows {vocab_size} characters, but not which: put the meta.pkl of its data beside it")
        spec = read_nanogpt_characters(pickles[0])
    return {
        "model": {name.removeprefix("_orig_mod."): weight for name, weight in checkpoint["model"].items()},
        "model_args": checkpoint["model_args"] | {"gelu": "none"},
        "optimizer": checkpoint.get("optimizer"),
        "step": checkpoint["iter_num"],
        "best_val_loss": float(checkpoint.get("best_val_loss", "inf")),
        "config": checkpoint["config"],
        "meta": meta_of(spec, dataset) | {"vocab_size": vocab_size},
        "version": VERSION,
    }


def find_resumable(out_dir: str | Path) -> dict | None:
    """The newest good checkpoint that training can continue from: last.pt, or prev.pt when that is damaged or missing."""
    paths = [path for name in ("last.pt", "prev.pt") if (path := Path(out_dir) / name).exists()]
    for path in paths:
        try:
            return read_checkpoint(path)
        except ValueError as error:
            if path == paths[-1]:
                raise
            print(f"warning: {error}; continuing from {paths[-1]}", file=sys.stderr)
    return None


def hugging_face_folder(name: str) -> Path:
    """Where a model of the hub lies once it is downloaded."""
    from huggingface_hub import snapshot_download

    print(f"asking the Hugging Face hub for {name} ...", file=sys.stderr)
    try:
        return Path(snapshot_download(f"openai-community/{name}", allow_patterns=["config.json", "*.safetensors"]))
    except Exception as error:  # any way in which a download fails
        raise ValueError(f"the Hugging Face hub cannot be reached ({type(error).__name__}): give a folder that has the "
                         f"config.json and model.safetensors of {name} instead of its name") from None


def read_hugging_face(folder: Path) -> dict:
    """
    A folder of GPT2LMHeadModel or Qwen3ForCausalLM as a checkpoint of ours. export.py writes what else belongs to one into
    meta.json; without it, the tokenizer is the BPE of its tokenizer.json, else GPT-2's.
    """
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise ValueError(f"to read {folder} a package is needed: pip install safetensors") from None
    try:
        config = config_from_hf(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        trained = {"step": 0, "config": {"dataset": ""}, "meta": meta_of({"kind": "gpt2"})}
        if (folder / "meta.json").exists():
            trained |= json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        elif (folder / "tokenizer.json").exists():
            trained["meta"] = meta_of(read_tokenizer_json((folder / "tokenizer.json").read_text(encoding="utf-8")))
        meta = trained["meta"]
        if not meta["vocab_size"] <= config.vocab_size <= meta["vocab_size"] + 4096:  # some pad it
            raise ValueError(f"its vocabulary of {config.vocab_size:,} is not that of its tokenizer, {meta['vocab_size']:,}; "
                             "without a tokenizer.json it would be GPT-2's")
        weights = {}
        for path in sorted(folder.glob("*.safetensors")):
            weights |= load_file(path)
        if "wte.weight" in weights:  # as OpenAI's own are named
            weights = {f"transformer.{name}": w for name, w in weights.items()}
        weights = from_hf(weights, config)
    except OSError:
        raise
    except Exception as error:  # whatever a damaged file makes of the reader
        raise ValueError(f"{folder} is not a Hugging Face model that can be read here ({type(error).__name__}: "
                         f"{' '.join(str(error).split())[:150]})") from None
    return checked(trained | {"model": weights, "model_args": asdict(config), "version": VERSION}, folder / "meta.json")


def config_from_hf(theirs: dict) -> GPTConfig:
    """Of the config.json of GPT2LMHeadModel or Qwen3ForCausalLM; ValueError where it asks for what our blocks cannot do."""
    if theirs["model_type"] == "gpt2":
        only = {"activation_function": ["gelu_new", "gelu_pytorch_tanh", "gelu"], "layer_norm_epsilon": [1e-5],
                "scale_attn_weights": [True], "scale_attn_by_inverse_layer_idx": [False], "tie_word_embeddings": [True]}
        args = dict(block_size=theirs["n_positions"], n_layer=theirs["n_layer"], n_head=theirs["n_head"],
                    n_embd=theirs["n_embd"], gelu="none" if theirs.get("activation_function") == "gelu" else "tanh")
    elif theirs["model_type"] == "qwen3":
        only = {"hidden_act": ["silu"], "rms_norm_eps": [1e-6], "attention_bias": [False], "use_sliding_window": [False],
                "rope_scaling": [None]}
        rope = theirs.get("rope_parameters") or {"rope_theta": theirs["rope_theta"]}  # of transformers 5, of 4
        if rope.get("rope_type", "default") != "default":
            raise ValueError(f"its rope_type is {rope['rope_type']!r}; known here is 'default'")
        args = dict(block_size=theirs["max_position_embeddings"], n_layer=theirs["num_hidden_layers"],
                    n_head=theirs["num_attention_heads"], n_kv_head=theirs["num_key_value_heads"], head_dim=theirs["head_dim"],
                    n_inner=theirs["intermediate_size"], n_embd=theirs["hidden_size"], rope_theta=float(rope["rope_theta"]),
                    tied=theirs["tie_word_embeddings"], bias=False)
    else:
        raise ValueError(f"its model_type is {theirs['model_type']!r}, not 'gpt2' or 'qwen3'")
    for name, known in only.items():
        if theirs.get(name, known[0]) not in known:
            raise ValueError(f"its {name} is {theirs[name]!r}; known here is {' or '.join(map(repr, known))}")
    return GPTConfig(**args, arch=theirs["model_type"], vocab_size=theirs["vocab_size"])


def load_checkpoint(out_dir: str | Path) -> dict:
    """
    What a run knows best (best.pt, else last.pt, else nanoGPT's ckpt.pt), without what only training needs, and its path; or
    a Hugging Face folder; or one of OpenAI's models by its name.
    """
    if out_dir in OPENAI and not Path(out_dir).exists():
        out_dir = hugging_face_folder(out_dir)
    for name in ("best.pt", "last.pt", "ckpt.pt"):
        if (path := Path(out_dir) / name).exists():
            checkpoint = read_checkpoint(path)
            kept = ("model", "model_args", "step", "best_val_loss", "config", "meta", "version")
            return {key: checkpoint[key] for key in kept if key in checkpoint} | {"path": str(path)}
    if (Path(out_dir) / "config.json").exists():
        return read_hugging_face(Path(out_dir)) | {"path": str(out_dir)}
    raise ValueError(f"there is no checkpoint in {out_dir}: train one with `python train.py --out_dir={out_dir}`")


def load_model(out_dir: str | Path, device: str, quantize: str = "") -> tuple[GPT, dict]:
    """The best model of a run in eval mode, in int8 where `quantize` says so, and the rest of its checkpoint."""
    if quantize not in ("", "int8"):
        raise ValueError(f"quantize must be int8 or empty, got {quantize!r}")
    checkpoint = load_checkpoint(out_dir)
    weights = checkpoint.pop("model")  # not to stay in memory beside what the model makes of it
    weights = quantize_int8(weights) if quantize else weights
    return build_model(checkpoint | {"model": weights}, checkpoint["path"], device).eval(), checkpoint


def build_model(checkpoint: dict, where: str, device: str = "cpu") -> GPT:
    """The checkpoint's model; ValueError names the weights that are missing, left over or misshapen."""
    try:
        return GPT.from_weights(GPTConfig(**checkpoint["model_args"]), checkpoint["model"], device)
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"{where} does not fit the model: {' '.join(str(error).split())[:300]}") from None
