"""
Checkpoints in out_dir.

    last.pt, prev.pt    saved by the last two evaluations, to resume or to return to
    stop.pt             saved when a signal stops a run between two evaluations, to resume
    best.pt             the lowest validation loss
    step_001000.pt      every keep_every steps; the model only, as in best.pt

A file holds tensors and plain types only and is loaded with weights_only=True. It is renamed
into place once complete. Keys:

    model, model_args   state dict of the uncompiled model, fields of its GPTConfig; with lora_rank
                        the files to resume also hold the adapters, which best.pt has merged
    config, meta        the settings; meta.json of the dataset, so that sampling needs no data
    step, best_val_loss, version
    optimizer, scaler   to resume; not in best.pt and step_001000.pt, like the rest of RunState
"""
import json
import math
import pickletools
import re
import sys
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch

from lib import machine
from lib.configurator import one_line
from lib.convert import (
    OPENAI,
    SkipNormal,
    check_layers,
    download,
    from_nanogpt,
    is_hub_name,
    read_hf_tokenizer,
    read_hugging_face,
)
from lib.files import check_regular, is_number, open_synced, replace_file
from lib.lora import merge_adapters, rank_of
from lib.quantize import prepare_for_inference, quantize_int8, use_int8_layers
from lib.read_gguf import read_gguf, read_gguf_tokenizer
from lib.tokenizer import KINDS, check_spec, get_tokenizer, is_extension, meta_of, train_tokenizer
from model import GPT, GPTConfig

VERSION = 1
RESUMABLE = ("last.pt", "stop.pt", "prev.pt")
# the keys of every checkpoint and their types
REQUIRED = dict(model=dict, model_args=dict, step=int, config=dict, meta=dict, version=int)

# what torch.save asks for in a pickle of tensors and plain types
PICKLED = (r"collections OrderedDict|torch \w+Storage|torch\.storage UntypedStorage"
           r"|torch\._utils _rebuild_(tensor_v2|parameter)")


@dataclass
class RunState:
    """What the training loop changes. The tensors stay on the device, so that no step waits."""
    bad_in_a_row: torch.Tensor
    bad_steps: torch.Tensor
    grad_norm_max: torch.Tensor  # since the last log line
    step: int = 0  # steps made
    best_val_loss: float = math.inf
    stale: int = 0  # evaluations since the best one
    seconds: float = 0.0  # of the run, evaluations included
    lr_scale: float = 1.0  # halved after many bad steps in a row
    evaluated_at: int = -1  # step of the last evaluation

    @classmethod
    def start(cls, device: str) -> "RunState":
        return cls(*torch.zeros(3, device=device))

    def count_step(self, grad_norm: torch.Tensor, bad: torch.Tensor) -> None:
        """Count a step that optim.step() made."""
        self.step += 1
        self.bad_in_a_row = (self.bad_in_a_row + 1) * bad
        self.bad_steps = self.bad_steps + bad
        self.grad_norm_max = torch.fmax(self.grad_norm_max, grad_norm)

    def count_evaluation(self, val_loss: float) -> bool:
        """Count an evaluation. Return whether its validation loss is the lowest so far."""
        improved = val_loss < self.best_val_loss
        self.best_val_loss = val_loss if improved else self.best_val_loss
        self.stale = 0 if improved else self.stale + 1
        self.evaluated_at = self.step
        return improved

    def to_dict(self) -> dict[str, float]:
        return {name: value.item() if isinstance(value, torch.Tensor) else value
                for name, value in vars(self).items()}

    @classmethod
    def from_checkpoint(cls, checkpoint: dict, device: str) -> "RunState":
        """Read the state of a last.pt or stop.pt. In older ones `watch` holds the tensors."""
        names = [field.name for field in fields(cls)]
        checkpoint = {"evaluated_at": checkpoint["step"]} | checkpoint  # not in older ones
        if "watch" in checkpoint:
            checkpoint = checkpoint | dict(zip(names, checkpoint["watch"].tolist()))
        for name in names:
            value = checkpoint[name]
            if not is_number(value) or name in ("seconds", "lr_scale") and math.isinf(value):
                raise TypeError(f"{name} is {str(value)[:20]}")
        counters = [torch.tensor(float(checkpoint[name]), device=device) for name in names[:3]]
        return cls(*counters, *(checkpoint[name] for name in names[3:]))


# -----------------------------------------------------------------------------
# Files

def save_checkpoint(out_dir: str | Path, name: str, checkpoint: dict) -> None:
    """Write out_dir/name. Before a new last.pt, the old one becomes prev.pt; stop.pt is removed."""
    path = Path(out_dir) / name
    temporary = path.with_name(name + ".tmp")
    try:
        with open_synced(temporary, "wb") as file:
            torch.save(checkpoint | {"version": VERSION}, file)
    except Exception as error:
        # torch hides a full disk in a RuntimeError
        reason = error if isinstance(error, OSError) else error.__context__
        if isinstance(reason, OSError):
            raise OSError(f"{path} could not be written ({reason.strerror}); the checkpoints saved "
                          "before are unchanged") from None
        raise
    if name == "last.pt" and path.exists():
        replace_file(path, path.with_name("prev.pt"))
    replace_file(temporary, path)
    if name == "last.pt":
        path.with_name("stop.pt").unlink(missing_ok=True)


def step_file(step: int) -> str:
    """Return the name of the checkpoint that keep_every saves at a step."""
    return f"step_{step:06}.pt"


def remove_after(out_dir: str | Path, step: int) -> None:
    """Remove stop.pt and the checkpoints of keep_every that are later than a step."""
    (Path(out_dir) / "stop.pt").unlink(missing_ok=True)
    for path in Path(out_dir).glob("step_*.pt"):
        if path.stem[5:].isdigit() and int(path.stem[5:]) > step:
            path.unlink()


def remove_run(out_dir: str | Path) -> None:
    """Remove the checkpoints of the run in out_dir: first those that could be resumed."""
    for name in (*RESUMABLE, "best.pt"):
        (Path(out_dir) / name).unlink(missing_ok=True)
    remove_after(out_dir, 0)


def check_archive(path: Path, checksums: bool = True) -> None:
    """
    Raise ValueError unless a regular file is intact and could be one of torch.save.

    Then reading it takes about as much memory as the file has bytes: the entries of the zip file
    are not compressed, and its pickle calls no function that could make more of them. checksums:
    compare them too, which reads the whole file.
    """
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if (any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
                or sum(entry.file_size for entry in entries) > path.stat().st_size):
            raise ValueError("its parts are compressed or overlap")
        if checksums and (damaged := archive.testzip()):
            raise ValueError(f"checksum of {damaged} is wrong")
        for name in (name for name in archive.namelist() if name.endswith(".pkl")):
            for code, value, _ in pickletools.genops(archive.read(name)):
                if code.name == "GLOBAL" and not re.fullmatch(PICKLED, value):
                    raise ValueError(f"it asks for {value}")


def read_checkpoint(path: Path) -> dict:
    """Read a checkpoint to the CPU. Raise ValueError if it is damaged."""
    check_regular(path, machine.system_memory())
    try:
        check_archive(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged file can make the reader fail in any way
        reason = one_line(error, 100)
        raise ValueError(f"{path} is damaged or not a checkpoint ({reason})") from None
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} is not a checkpoint: it holds a {type(checkpoint).__name__}")
    if "iter_num" in checkpoint:
        try:
            checkpoint = from_nanogpt(checkpoint, path) | {"version": VERSION}
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"{path} is not a checkpoint that nanoGPT wrote "
                             f"({type(error).__name__}: {error})") from None
    check_checkpoint(checkpoint, path)
    # weights that share their bytes would need more memory than the file has
    if sum(w.nbytes for name, w in checkpoint["model"].items()
           if not is_tied(checkpoint["model"], name)) > path.stat().st_size:
        raise ValueError(f"{path} is damaged: its weights are larger than the file")
    return checkpoint


def is_tied(weights: dict[str, torch.Tensor], name: str) -> bool:
    """Return whether a weight of the head is the same tensor as that of the token embedding."""
    w, embedding = weights[name], weights.get(name.replace("lm_head.", "transformer.wte."))
    return (name.startswith("lm_head.") and embedding is not None
            and w.data_ptr() == embedding.data_ptr() and w.shape == embedding.shape)


def check_checkpoint(checkpoint: dict, path: Path) -> None:
    """Raise ValueError unless a checkpoint has what every checkpoint has, in the right types."""
    wrong = [name for name, kind in REQUIRED.items()
             if not isinstance(value := checkpoint.get(name), kind) or isinstance(value, bool)]
    if (wrong or checkpoint["step"] < 0 or not is_number(checkpoint["step"])
            or not is_number(checkpoint.get("best_val_loss", 0.0))
            or not isinstance(checkpoint["config"].get("dataset"), str)
            or not isinstance(checkpoint["meta"].get("tokenizer"), dict)
            or not isinstance(splits := checkpoint["meta"].get("splits", {}), dict)
            or not all(isinstance(counts, dict) for counts in splits.values())
            or not all(isinstance(checkpoint["meta"].get(name, ""), str)
                       for name in ("base_model", "chat_template"))):
        raise ValueError(f"{path} is not a checkpoint of this program, or it is damaged: cannot "
                         f"read its {', '.join(wrong) or 'contents'}")
    try:
        json.dumps([checkpoint[name] for name in ("model_args", "config", "meta")])
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: not all of its settings are plain values "
                         f"({error})") from None
    for name, w in checkpoint["model"].items():
        if not (isinstance(name, str) and isinstance(w, torch.Tensor)
                and w.dim() > 0 and (w.is_floating_point() or w.dtype == torch.int8)):
            raise ValueError(f"{path} is damaged: its weight {name!r} is not a tensor of floats")
    if checkpoint["version"] > VERSION:
        raise ValueError(f"{path} was written by a newer version of this program")


def find_resumable(out_dir: str | Path, names: Sequence[str] = RESUMABLE) -> dict | None:
    """
    Return the readable checkpoint with the most steps, or None if there are no checkpoints.

    A damaged file is skipped with a warning. Raises ValueError if all are damaged.
    """
    newest, errors = None, []
    for name in names:
        if newest and name == "prev.pt":  # always older
            break
        try:
            if (path := Path(out_dir) / name).exists():
                checkpoint = read_checkpoint(path)
                if newest is None or checkpoint["step"] > newest["step"]:
                    newest = checkpoint
        except ValueError as error:
            errors.append(error)
    if errors and newest is None:
        raise errors[0]
    for error in errors:
        print(f"warning: {one_line(error)}; continuing from step {newest['step']}",
              file=sys.stderr)
    return newest


def load_checkpoint(name: str | Path) -> dict:
    """
    Return the best checkpoint of a model, without what only training needs, and its `path`.

    name: the folder of a run (best.pt, else last.pt, stop.pt or nanoGPT's ckpt.pt), one of its .pt
    files, a Hugging Face folder, a .gguf file, or a model of the Hugging Face hub, whose name and
    commit are in meta["base_model"].
    """
    if is_hub_name(name):
        return read_published(*download_model(name))
    is_file = Path(name).suffix == ".pt" and not Path(name).is_dir()
    names = ("best.pt", "last.pt", "stop.pt", "ckpt.pt")
    for path in [Path(name)] if is_file else [Path(name) / file for file in names]:
        if path.exists():
            checkpoint = read_checkpoint(path)
            try:
                weights = merge_adapters(checkpoint["model"])
            except (ValueError, RuntimeError) as error:  # a shape or a type
                raise ValueError(f"{path} is damaged: {one_line(error, 300)}") from None
            kept = (*REQUIRED, "best_val_loss")
            return {key: checkpoint[key] for key in kept if key in checkpoint} | {
                "model": weights, "path": str(path)}
    if is_file:
        others = ", ".join(sorted(path.name for path in Path(name).parent.glob("*.pt")))
        raise ValueError(f"there is no file {name}: {Path(name).parent} has "
                         f"{others or 'no checkpoints'}")
    if is_gguf_file(name) or (Path(name) / "config.json").exists():
        return read_published(Path(name))
    runs = sorted({str(path.parent) for folder in (Path(), Path(name).parent)
                   for path in folder.glob("*/*.pt")})
    raise ValueError(f"there is no checkpoint in {name}: " + (
        f"there are runs in {', '.join(runs)}" if runs else
        f"train a model with `python train.py --out_dir={name}`"))


def is_gguf_file(name: str | Path) -> bool:
    """Return whether name is the path of a GGUF file, which need not exist."""
    return Path(name).suffix == ".gguf" and not Path(name).is_dir()


def load_tokenizer(name: str) -> tuple[object, str]:
    """
    Return a model's tokenizer and its chat template ('' if it has none).

    name: as in load_checkpoint().
    """
    if not Path(name).exists() and not is_hub_name(name):
        raise ValueError(f"tokenizer must be {', '.join(KINDS)}, or a model: a run, a Hugging Face "
                         f"folder, a GGUF file or USER/NAME; got {name!r}")
    folder = download_model(name)[0] if is_hub_name(name) else Path(name)
    if (folder / "tokenizer.json").exists() and not (folder / "meta.json").exists():
        try:
            meta = read_hf_tokenizer(folder)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"the tokenizer of {name} cannot be read: {error}") from None
    elif is_gguf_file(name):
        meta = read_gguf_tokenizer(Path(name))
    else:
        meta = load_checkpoint(folder)["meta"]
    return get_tokenizer(meta), meta.get("chat_template", "")


def make_tokenizer(name: str, texts: Iterable[str], vocab_size: int = 0,
                   specials: tuple[str, ...] | None = None):
    """Return a tokenizer of a kind, see train_tokenizer(), or the tokenizer of a model."""
    if name in KINDS:
        return train_tokenizer(name, texts, vocab_size, specials)
    if vocab_size:
        raise ValueError(f"vocab_size is for tokenizers that are learned; {name} has its own")
    return load_tokenizer(name)[0]


def download_model(name: str) -> tuple[Path, str]:
    """Download a model from the hub. If that fails, the error also lists local runs nearby."""
    try:
        return download(name)
    except ValueError as error:
        runs = sorted({str(path.parent) for path in Path(name).parent.glob("*/*.pt")})
        hint = f"; there are runs in {', '.join(runs)}" if "/" in name and runs else ""
        raise ValueError(f"{error}{hint}") from None


def read_published(path: Path, base_model: str = "") -> dict:
    """Read a GGUF file or a Hugging Face folder as a checkpoint with its `path`."""
    read = read_gguf if is_gguf_file(path) else read_hugging_face
    checkpoint = read(path) | {"version": VERSION, "path": str(path)}
    check_checkpoint(checkpoint, path / "meta.json" if path.is_dir() else path)
    if base_model:
        checkpoint["meta"]["base_model"] = base_model
    return checkpoint


# -----------------------------------------------------------------------------
# Resuming

def should_resume(out_dir: str, init_from: str, overwrite: bool) -> bool:
    """
    Return whether to resume the run in out_dir.

    Raises ValueError if 'resume' finds no checkpoint, or if an existing run would be overwritten.
    """
    if (init_from not in ("scratch", "resume", "auto") and not Path(init_from).is_dir()
            and Path(init_from).suffix not in (".pt", ".gguf") and not is_hub_name(init_from)):
        raise ValueError(f"init_from must be scratch, resume, auto, the folder, .pt or .gguf file "
                         f"of a model, {', '.join(OPENAI)}, or USER/NAME of a model on the Hugging "
                         f"Face hub; got {init_from!r}")
    exists = any(Path(out_dir).glob("*.pt"))
    resumable = any((Path(out_dir) / name).exists() for name in RESUMABLE)
    if init_from == "resume" and not exists:
        raise ValueError(f"there is nothing to resume in {out_dir}: start with --init_from=scratch")
    resume = resumable and init_from in ("resume", "auto")
    if exists and not resume and not overwrite:
        way = "--init_from=resume" if resumable else f"--init_from={out_dir} and a new --out_dir"
        raise ValueError(f"{out_dir} already holds a run: continue it with {way}, "
                         "choose another --out_dir, or replace it with --overwrite=True")
    return resume


def config_to_resume(checkpoint: dict, new: GPTConfig, settings: dict, given: set[str],
                     meta: dict) -> GPTConfig:
    """
    Return the model config of the run to resume.

    Dropout comes from `new` if it was given, everything else from the checkpoint.
    new: the config made from the settings. given: the names of the settings that were set.
    Raises ValueError if a given setting or the dataset contradicts the run.
    """
    out_dir, dataset = settings["out_dir"], settings["dataset"]
    where = f"the checkpoint in {out_dir}"
    plain = {name: w for name, w in checkpoint["model"].items()
             if not name.endswith((".lora_a", ".lora_b"))}
    old = build_model(checkpoint | {"model": plain}, where).config  # compares all shapes
    wrong = [f"{name}={value}" for name, value in asdict(old).items()
             if name in given and name != "dropout" and value != getattr(new, name)]
    if "lora_rank" in given and settings["lora_rank"] != rank_of(checkpoint["model"]):
        wrong.append(f"lora_rank={rank_of(checkpoint['model'])}")
    if "pad_vocab" in given and old.vocab_size != new.vocab_size:
        wrong.append(f"vocab_size={old.vocab_size}")
    if wrong:
        raise ValueError(f"the run in {out_dir} has {', '.join(wrong)}: to resume it, leave out "
                         "these settings or give the same values")
    if checkpoint["meta"].get("tokenizer") != meta["tokenizer"]:
        raise ValueError(f"{dataset} has another tokenizer than the run in {out_dir}: resume with "
                         "the dataset that it was trained on, choose another --out_dir, or replace "
                         "it with --init_from=scratch --overwrite=True")
    for split in ("train", "val"):
        old_sha, new_sha = (m.get("splits", {}).get(split, {}).get("sha256")
                            for m in (checkpoint["meta"], meta))
        if old_sha and new_sha and old_sha != new_sha:
            raise ValueError(f"the {split} split of {dataset} is not the one that the run in "
                             f"{out_dir} was started with: resume with the original --dataset, or "
                             f"fine-tune with --init_from={out_dir} and another --out_dir")
    return replace(old, dropout=new.dropout) if "dropout" in given else old


def describe_resume(checkpoint: dict, settings: dict, lr: float) -> str:
    """Return a message with the step, learning rate and changed settings of a resumed run."""
    old, ignored = checkpoint["config"], ("init_from", "overwrite", "eval_only")
    changed = [f"{name} {old[name]!r} -> {value!r}" for name, value in settings.items()
               if name in old and old[name] != value and name not in ignored]
    text = f"resuming {settings['out_dir']} at step {checkpoint['step']}, learning rate {lr:.2e}"
    text += f", with changed settings: {', '.join(changed)}" if changed else ""
    if ("evaluated_at" not in checkpoint and settings["batching"] == "by_length"
            and settings["gradient_accumulation_steps"] > 1):  # saved by an older version
        text += "\nnote: the batch order by length has changed since this run was started"
    return text


def restore(checkpoint: dict, model: GPT, optimizers: list[torch.optim.Optimizer],
            scaler: torch.amp.GradScaler, device: str) -> RunState:
    """Load a last.pt into model, optimizers and scaler. Return the state of the run."""
    try:
        model.load_state_dict(checkpoint["model"])
        states = [state for saved in checkpoint["optimizer"] for state in saved["state"].values()]
        n_bytes = sum(x.nbytes for state in states for x in state.values() if torch.is_tensor(x))
        if n_bytes > 2 * sum(p.nbytes for p in model.parameters()) + 1_000_000:  # AdamW has two
            raise ValueError("the state of the optimizer is larger than that of its weights")
        for optimizer, saved in zip(optimizers, checkpoint["optimizer"], strict=True):
            groups = [dict(group) for group in optimizer.param_groups]
            optimizer.load_state_dict(upgrade_groups(optimizer, saved))
            check_optimizer(optimizer, groups)
        if checkpoint["scaler"]:  # empty unless the run was in float16
            scaler.load_state_dict(checkpoint["scaler"])
        return RunState.from_checkpoint(checkpoint, device)
    except Exception as error:  # a damaged checkpoint can make torch fail in any way
        if machine.is_out_of_memory(error):
            raise
        raise ValueError(f"the checkpoint of step {checkpoint['step']} cannot be resumed "
                         f"({type(error).__name__}: {one_line(error, 300)})") from None


def check_optimizer(optimizer: torch.optim.Optimizer, groups: list[dict]) -> None:
    """Raise TypeError unless what was loaded has the types of `groups` and of a state."""
    def is_like(new: object, old: object) -> bool:
        if isinstance(old, tuple):
            return isinstance(new, tuple) and all(map(is_like, new, old))
        return old is None or isinstance(new, int | float if isinstance(old, float) else type(old))

    for new, old in zip(optimizer.param_groups, groups):
        for name in old:
            if name in new and not is_like(new[name], old[name]):
                raise TypeError(f"{name} of the optimizer is {new[name]!r}")
    for param, state in optimizer.state.items():
        for name, value in state.items():
            if not isinstance(value, torch.Tensor) or value.shape not in ((), param.shape):
                raise TypeError(f"{name} of the optimizer is no tensor of the right shape")


def upgrade_groups(optimizer: torch.optim.Optimizer, saved: dict) -> dict:
    """
    Return a saved optimizer state with the current parameter groups.

    Before embedding_lr_scale, the token embedding was the first parameter of AdamW's first group.
    It gets a group of its own and keeps its rate.
    """
    groups = saved["param_groups"]
    if len(groups) == len(optimizer.param_groups) - 1:
        embedding, *others = groups[0]["params"]
        groups = [groups[0] | {"params": [embedding]}, groups[0] | {"params": others}, *groups[1:]]
    return saved | {"param_groups": groups}


def return_to_last(out_dir: str, model: GPT, optimizers: list[torch.optim.Optimizer],
                   scaler: torch.amp.GradScaler, device: str) -> RunState:
    """Load the checkpoint of the last evaluation. Raise ValueError if it is missing."""
    checkpoint = find_resumable(out_dir, ("last.pt", "prev.pt"))
    if checkpoint is None:
        raise ValueError(f"there is no checkpoint in {out_dir} to return to")
    return restore(checkpoint, model, optimizers, scaler, device)


# -----------------------------------------------------------------------------
# Models

def load_model(name: str | Path, device: str, quantize: str = "") -> tuple[GPT, dict]:
    """Return a model in eval mode, prepared for fast inference, and the rest of its checkpoint."""
    if quantize not in ("", "int8"):
        raise ValueError(f"quantize must be int8 or empty, got {quantize!r}")
    checkpoint = load_checkpoint(name)
    weights = checkpoint.pop("model")  # so that they are freed once the model has its own
    weights = quantize_int8(weights) if quantize else weights
    model = build_model(checkpoint | {"model": weights}, checkpoint["path"], device)
    prepare_for_inference(model)
    return model.eval(), checkpoint


def config_of(checkpoint: dict, where: object, **changes) -> GPTConfig:
    """Return the config of a checkpoint's model. Raise ValueError if it is damaged."""
    try:
        return GPTConfig(**checkpoint["model_args"] | changes)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where} does not fit the model: {error}") from None


def build_model(checkpoint: dict, where: object, device: str = "cpu", **changes) -> GPT:
    """Return a checkpoint's model. Raise ValueError that names missing and misshapen weights."""
    config = config_of(checkpoint, where, **changes)
    try:
        check_layers(config, checkpoint["model"])
        return model_from_weights(config, checkpoint["model"], device)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        reason = one_line(error, 300)
        raise ValueError(f"{where} does not fit the model: {reason}") from None


def model_from_weights(config: GPTConfig, weights: dict[str, torch.Tensor],
                       device: str = "cpu") -> GPT:
    """
    Return a model with the weights of a state dict, possibly from quantize_int8().

    No other weights are allocated. Raises RuntimeError where they do not fit.
    """
    with torch.device("meta"), SkipNormal():
        model = GPT(config)
        use_int8_layers(model, weights)
    weights = {name: w.float() if w.is_floating_point() else w for name, w in weights.items()}
    model.load_state_dict(weights, assign=True)
    if config.tied:
        model.lm_head.weight = model.transformer.wte.weight
    return model.to(device)


def add_embeddings(weights: dict[str, torch.Tensor], old: int,
                   tokenizer: dict) -> dict[str, torch.Tensor]:
    """
    Return the weights with embeddings for the ids of a tokenizer from `old` on.

    Control tokens start as copies of the end-of-text token, which also comes before and after
    texts. Other tokens start as the mean of all, so that they are about as probable.
    """
    new, eot = (meta_of(tokenizer)[key] for key in ("vocab_size", "eot"))
    if new <= old:
        return weights
    controls = [i for i in tokenizer.get("specials", {}).values() if i >= old]
    tables = {}
    for name in ("transformer.wte.weight", "lm_head.weight"):
        w = weights[name].float()  # (V, C), possibly with unused rows from `old` on
        tables[name] = torch.cat((w[:old], w[:old].mean(dim=0).expand(new - old, -1), w[new:]))
        if eot in range(old):
            tables[name][controls] = w[eot]
    return weights | tables


def model_to_finetune(checkpoint: dict, name: str, tokenizer: dict, block_size: int = 0,
                      **changes) -> GPT:
    """
    Build a model from a checkpoint for fine-tuning.

    tokenizer: the dataset's, which must equal the model's, or have more tokens at the end, such as
    the control tokens of conversations: the model gets embeddings for them. block_size: crop the
    context to this many tokens (0: keep the model's). changes: other config fields to replace, such
    as dropout.
    """
    check_spec(checkpoint["meta"]["tokenizer"])
    for weight in ("transformer.wte.weight", "lm_head.weight"):
        if weight not in checkpoint["model"] or checkpoint["model"][weight].dim() != 2:
            raise ValueError(f"{name} does not fit the model: it has no matrix {weight}")
    if not is_extension(tokenizer, checkpoint["meta"]["tokenizer"]):
        raise ValueError(f"{name} has another tokenizer than the dataset: prepare the dataset with "
                         f"its tokenizer, --tokenizer={name}")
    if any(w.dtype == torch.int8 for w in checkpoint["model"].values()):
        raise ValueError(f"{name} is in int8, which cannot be trained: start from the run that it "
                         "was made of")
    old = meta_of(checkpoint["meta"]["tokenizer"])["vocab_size"]
    weights = add_embeddings(checkpoint["model"], old, tokenizer)
    changes["vocab_size"] = len(weights["transformer.wte.weight"])
    model = build_model(checkpoint | {"model": weights}, name, **changes)
    if block_size > model.config.block_size:
        raise ValueError(f"block_size ({block_size}) is more than the {model.config.block_size} of "
                         f"{name}")
    model.crop_block_size(block_size or model.config.block_size)
    return model
