"""The reference: PEFT trains a task alone, on one process, in fp64 from end to end.

PEFT's own initialisation, its LoRA layers, transformers' model, torch's AdamW, clipping and
schedule: nothing of ours but the order of the sequences.

In fp64 transformers still computes some things in fp32, whatever its weights are. Each is computed
in fp64 here, by a formula written out anew: `_double_norm`, `_double_rotary`,
`_double_capped_attention`, `_double_loss`, and Gemma's scale of the embedding. PEFT needs nothing:
beside a base model in fp64 its adapters are fp64. `NoSinglePrecision` finds no tensor of fp32 in
any forward or backward pass, so nothing else is hidden.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftConfig, PeftModel, VeraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AutoModelForCausalLM, get_scheduler
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from lobra.layout.shapes import ModelShape, read_shape
from lobra.model.dropout import TokenNoise, feature_keys, token_keys
from lobra.tasks.config import TaskConfig
from lobra.tasks.dataset import TokenizedDataset
from lobra.tasks.sampling import sample_indices, task_seed
from lobra.tasks.target_modules import resolve_target_modules
from lobra.trainer.batches import draw_sequences
from tests.trainer.double import NoSinglePrecision
from tests.trainer.support import random_dataset

STEPS = 5
VOCAB = 256
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

TASKS = (
    dict(
        name="attention",
        rank=4,
        lora_alpha=8,
        target_modules=("q_proj", "k_proj", "v_proj", "o_proj"),
        global_batch_size=5,
        learning_rate=3e-3,
        max_grad_norm=0.05,
        lr_scheduler="cosine",
        warmup_steps=2,
    ),
    dict(
        name="everything",
        rank=8,
        lora_alpha=8,
        target_modules=ALL_LINEAR,
        global_batch_size=8,
        learning_rate=2e-3,
        weight_decay=0.1,
        max_grad_norm=1.0,
    ),
    dict(
        name="few",  # one long sequence a step: absent on most replicas; ends before the others
        rank=2,
        lora_alpha=16,
        target_modules=("down_proj", "up_proj"),
        global_batch_size=1,
        learning_rate=3e-3,
        max_grad_norm=0.5,
        lr_scheduler="linear",
        steps=4,
    ),
)
LENGTHS = ((8, 40), (6, 60), (70, 90))


def task_config(task: dict, **fields: Any) -> TaskConfig:
    return TaskConfig(dataset_name="random", context_length=128, **task, **fields)


def tasks_from(
    starts: list[Path], tasks: Sequence[dict] = TASKS, **fields: Any
) -> tuple[TaskConfig, ...]:
    """Return the tasks, each with the adapter it starts from and that one's targets."""
    found = []
    for task, start in zip(tasks, starts, strict=True):
        config = json.loads((start / "adapter_config.json").read_text())
        targets = resolve_target_modules(config["target_modules"])
        own = {**task, "target_modules": targets}
        found.append(task_config(own, resume_from=str(start), **fields))
    return tuple(found)


def make_datasets(num_tasks: int = len(TASKS)) -> list[TokenizedDataset]:
    """Return each task's data."""
    lengths = [LENGTHS[number % len(LENGTHS)] for number in range(num_tasks)]
    return [
        random_dataset(20, shortest, longest, VOCAB, seed)
        for seed, (shortest, longest) in enumerate(lengths)
    ]


def own_targets(task: dict, shape: ModelShape) -> tuple[str, ...]:
    """Return a task's linears in a model; where gate and up are one, one of them means both."""
    targets = set(task["target_modules"])
    if "gate_up_proj" in shape.fused and "up_proj" in targets:
        targets.add("gate_proj")
    return shape.own_modules(targets)


def peft_config(task: dict, shape: ModelShape) -> PeftConfig:
    """Return what PEFT calls a task's adapter."""
    if task.get("adapter") == "vera":
        return VeraConfig(
            r=task["rank"],
            target_modules=list(own_targets(task, shape)),
            projection_prng_key=task.get("projection_prng_key", 0),
            modules_to_save=task.get("modules_to_save"),
            task_type="CAUSAL_LM",
        )
    more: dict[str, Any] = {
        key: task[key]
        for key in ("rank_pattern", "alpha_pattern", "modules_to_save", "bias")
        if key in task
    }
    return LoraConfig(
        r=task["rank"],
        lora_alpha=task["lora_alpha"],
        target_modules=list(own_targets(task, shape)),
        use_rslora=task.get("adapter") == "rslora",
        use_dora=task.get("adapter") == "dora",
        task_type="CAUSAL_LM",
        **more,
    )


def make_optimizer(model: Any, task: dict) -> torch.optim.Optimizer:
    """Return a task's optimiser: torch's own, arranged by PEFT for LoRA+."""
    settings: dict[str, Any] = {"weight_decay": task.get("weight_decay", 0.0)}
    kind: type[torch.optim.Optimizer] = torch.optim.AdamW
    if task.get("optimizer") == "sgd":
        kind, settings["momentum"] = torch.optim.SGD, task.get("momentum", 0.0)
    else:
        settings["betas"] = task.get("adam_beta1", 0.9), task.get("adam_beta2", 0.999)
        settings["eps"] = task.get("adam_epsilon", 1e-8)
    if "loraplus_ratio" in task:
        settings["loraplus_weight_decay"] = settings.pop("weight_decay")
        ratio = task["loraplus_ratio"]
        return create_loraplus_optimizer(
            model, kind, lr=task["learning_rate"], loraplus_lr_ratio=ratio, **settings
        )
    trainable = [p for p in model.parameters() if p.requires_grad]
    return kind(trainable, lr=task["learning_rate"], **settings)  # type: ignore[call-arg]


def make_starts(base: Path, root: Path, tasks: Sequence[dict] = TASKS) -> list[Path]:
    """PEFT's own fresh adapters, B made non-zero so that A has a gradient from the first step.

    What is trained of the base is not as the base has it.
    """
    shape = read_shape(base)
    folders = []
    for number, task in enumerate(tasks):
        torch.manual_seed(100 + number)
        plain = AutoModelForCausalLM.from_pretrained(base)
        model = get_peft_model(plain, peft_config(task, shape))
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("lora_B", "lora_embedding_A", "vera_lambda")):
                torch.nn.init.normal_(parameter, std=0.02)
            elif parameter.requires_grad and ("modules_to_save" in name or name.endswith(".bias")):
                parameter.data += 0.05 * torch.randn_like(parameter)
        folders.append(root / task["name"])
        model.save_pretrained(folders[-1])
    return folders


def train_alone(
    base: Path,
    datasets: list[TokenizedDataset],
    starts: Sequence[Path] | Mapping[int, Path],
    dtype: torch.dtype,
    order: int = 0,
    dropout: float = 0.0,
    tasks: Sequence[dict] = TASKS,
    numbers: Iterable[int] | None = None,
) -> list[dict]:
    """What PEFT gets on one process, each task on its own: final tensors and losses per step.

    Another `order` shuffles each batch's rows: in exact arithmetic it would change nothing. With
    `dropout` PEFT is given our masks; so of a task with its own. `numbers`: only of these tasks.
    """
    results = []
    for number in range(len(tasks)) if numbers is None else numbers:
        task = tasks[number]
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        model = PeftModel.from_pretrained(plain, starts[number], is_trainable=True)
        odds = task.get("lora_dropout", dropout)
        masks = _Masks(model, odds) if odds else None
        watched: contextlib.AbstractContextManager = contextlib.nullcontext()
        if dtype == torch.float64:
            lift_to_double(plain)
            watched = NoSinglePrecision()
        model.train()
        trainable = [p for p in model.parameters() if p.requires_grad]
        assert dtype != torch.float64 or {p.dtype for p in trainable} == {dtype}
        optimizer = make_optimizer(model, task)
        steps = task.get("steps", STEPS)
        scheduler = get_scheduler(
            task.get("lr_scheduler", "constant_with_warmup"),
            optimizer,
            num_warmup_steps=task.get("warmup_steps", 0),
            num_training_steps=steps,
        )
        seed = task_seed(task_config(task))
        losses = []
        for step in range(steps):
            indices = sample_indices(20, task["global_batch_size"], seed, step)
            if order:
                indices = np.random.default_rng((order, step)).permutation(indices)
            tokens, labels, mask = padded(datasets[number], indices)
            if masks is not None:
                drawn = draw_sequences(number, task_config(task), datasets[number], 0, step)
                masks.draw([sequence.noise_seed for sequence in drawn], tokens.shape[1])
            optimizer.zero_grad()
            with watched:
                loss = model(input_ids=tokens, attention_mask=mask, labels=labels).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(trainable, task["max_grad_norm"])
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
        folder = starts[number].with_name(f"alone-{task['name']}-{dtype}-{order}-{dropout}")
        model.save_pretrained(folder, save_embedding_layers=False)
        tensors = load_file(folder / "adapter_model.safetensors")
        results.append({"tensors": tensors, "losses": losses, "folder": folder})
    return results


class _Masks:
    """Has every LoRA layer of a PEFT model drop out what we would."""

    def __init__(self, model: Any, dropout: float) -> None:
        self.dropout = dropout
        self.noise: TokenNoise | None = None
        for name, module in model.named_modules():
            for kind in ("lora_dropout", "vera_dropout"):
                if hasattr(module, kind):
                    layer = model.config.num_hidden_layers  # of the head
                    if match := re.search(r"layers\.(\d+)\.", name):
                        layer = int(match[1])
                    keys = feature_keys(layer, name.rpartition(".")[2], module.in_features)
                    getattr(module, kind)["default"] = _Mask(self, keys)

    def draw(self, noise_seeds: list[int], length: int) -> None:
        """Draw for the next batch, of rows of this length."""
        keys = torch.from_numpy(token_keys(noise_seeds, [length] * len(noise_seeds)))
        odds = torch.full(keys.shape, self.dropout, dtype=torch.float64)
        self.noise = TokenNoise.of_tokens(keys, odds, torch.float64)


class _Mask(nn.Module):
    """What stands in the place of PEFT's dropout."""

    def __init__(self, masks: _Masks, keys: Tensor) -> None:
        super().__init__()
        self.masks, self.keys = masks, keys

    def forward(self, x: Tensor) -> Tensor:
        assert self.masks.noise is not None
        return x * self.masks.noise.factors(self.keys, range(x.shape[-1])).view(x.shape)


def padded(dataset: TokenizedDataset, indices: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    longest = int(dataset.lengths[indices].max())
    tokens = torch.zeros(len(indices), longest, dtype=torch.int64)
    labels = torch.full((len(indices), longest), -100)
    mask = torch.zeros(len(indices), longest, dtype=torch.int64)
    for row, index in enumerate(indices):
        ids, targets = dataset.sequence(int(index))
        tokens[row, : len(ids)] = torch.from_numpy(np.array(ids))
        labels[row, : len(ids)] = torch.from_numpy(np.array(targets))
        mask[row, : len(ids)] = 1
    return tokens, labels, mask


# -- what transformers computes in fp32, in fp64 --------------------------------------------------


def lift_to_double(model: Any) -> None:
    """Have a transformers model compute in fp64 what it computes in fp32 by name."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = _double_norm(module)
        elif type(module).__name__.endswith("RotaryEmbedding"):
            module.forward = _double_rotary(module)
        elif hasattr(module, "scalar_embed_scale"):  # Gemma's, a buffer of fp32
            module.embed_scale = torch.tensor(module.scalar_embed_scale, dtype=torch.float64)
    if getattr(model.config, "attn_logit_softcapping", None):
        AttentionInterface.register("capped", _double_capped_attention)
        AttentionMaskInterface.register("capped", eager_mask)
        model.config._attn_implementation = "capped"
    model.loss_function = _double_loss


def _double_norm(module: Any) -> Callable[[Tensor], Tensor]:
    """RMS norm (arXiv 1910.07467). transformers squares and averages in fp32; Gemma scales so too.

    Gemma's weight counts from one.
    """
    is_gemma = type(module).__name__.startswith("Gemma")
    epsilon = module.eps if is_gemma else module.variance_epsilon

    def forward(x: Tensor) -> Tensor:
        scale = 1.0 + module.weight if is_gemma else module.weight
        return scale * (x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt())

    return forward


def _double_rotary(module: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    """Cosines and sines of RoPE (arXiv 2104.09864). transformers' angles and tables are fp32."""
    config = module.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def forward(
        x: Tensor, position_ids: Tensor, layer_type: str | None = None
    ) -> tuple[Tensor, Tensor]:
        rope = config.rope_parameters if layer_type is None else config.rope_parameters[layer_type]
        assert rope["rope_type"] == "default", "the formula below is that one's"
        base = rope["rope_theta"]
        turned = int(size * rope.get("partial_rotary_factor", 1.0))
        powers = torch.arange(0, turned, 2, dtype=torch.float64) / turned
        angles = position_ids[..., None].double() * torch.pow(base, -powers)
        both = torch.cat((angles, angles), dim=-1)
        return both.cos(), both.sin()

    return forward


def _double_capped_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, *,
    scaling: float, softcap: float, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention with capped scores (arXiv 2408.00118, section 2). transformers' softmax is fp32."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    scores = softcap * (scaling / softcap * query @ key.mT).tanh()
    return ((scores + attention_mask).softmax(dim=-1) @ value).transpose(1, 2), None


def _double_loss(logits: Tensor, labels: Tensor, vocab_size: int, **_: Any) -> Tensor:
    """Mean cross-entropy of the next tokens. transformers casts the logits to fp32 for it."""
    return functional.cross_entropy(
        logits[:, :-1].reshape(-1, vocab_size), labels[:, 1:].flatten(), ignore_index=-100
    )
