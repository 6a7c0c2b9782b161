"""The reference of all objectives but supervised: TRL's losses of PEFT's model, in fp64.

What TRL's trainers do with log-probabilities is TRL's own code, called on a stand-in for the
trainer; the log-probabilities are those of transformers' model with PEFT's layers. TRL computes
ORPO's odds in fp32 by name; here they are lifted to fp64.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from trl import DPOTrainer, GRPOTrainer, KTOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

from lobra.tasks.config import TaskConfig
from lobra.tasks.dataset import TokenizedDataset
from lobra.tasks.sampling import sample_indices, task_seed
from tests.trainer.alone import lift_to_double, padded


def train_alone(
    base: Path, task: TaskConfig, data: TokenizedDataset, start: Path, steps: int
) -> dict[str, Any]:
    """Return final tensors, and of each step the loss and TRL's metrics."""
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    model = PeftModel.from_pretrained(plain, start, is_trainable=True)
    lift_to_double(plain)
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=task.learning_rate, weight_decay=0.0)
    losses, metrics = [], []
    for step in range(steps):
        drawn = sample_indices(data.num_examples, task.global_batch_size, task_seed(task), step)
        optimizer.zero_grad()
        loss, found = LOSSES[task.objective](task, model, data, drawn)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, task.max_grad_norm)
        optimizer.step()
        losses.append(loss.item())
        metrics.append(found)
    folder = start.with_name(f"alone-{task.name}")
    model.save_pretrained(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    return {"tensors": tensors, "losses": losses, "metrics": metrics}


class _Trainer(SimpleNamespace):
    """What the losses of TRL's trainers ask of a trainer."""

    def __init__(self, model: Any, **fields: Any) -> None:
        same = SimpleNamespace(
            device=torch.device("cpu"),
            gather_for_metrics=lambda x: x,
            gather=lambda x: x,
            reduce=lambda x, reduction: x,
            num_processes=1,
        )
        super().__init__(
            model=model, accelerator=same, aux_loss_enabled=False, is_encoder_decoder=False,
            _metrics={"train": defaultdict(list)}, _tp_size=1, _total_train_tokens=0, **fields,
        )  # fmt: skip


def _answers(
    data: TokenizedDataset, drawn: np.ndarray, which: int
) -> tuple[Tensor, Tensor, Tensor]:
    return padded(data, drawn * 2 + which)


def _together(parts: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    longest = max(part[0].shape[1] for part in parts)
    fills = (0, -100, 0)
    wide = [
        [
            torch.nn.functional.pad(x, (0, longest - x.shape[1]), value=fill)
            for x, fill in zip(part, fills, strict=True)
        ]
        for part in parts
    ]
    tokens, labels, mask = (torch.cat(column) for column in zip(*wide, strict=True))
    return tokens, labels, mask


def _with_log_probs(model: Any) -> Any:
    """Return the model as TRL calls it: with the targets' log-probabilities, 0 where masked."""

    def forward(labels: Tensor, fused_lm_head: bool, **inputs: Any) -> SimpleNamespace:
        logits = model(**inputs).logits[:, :-1]
        targets = labels[:, 1:]
        log_probs = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        zeros = torch.zeros_like(log_probs)
        return SimpleNamespace(
            log_probs=torch.where(targets == -100, zeros, log_probs),
            entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(), label_mask=targets != -100,
            loss=zeros.sum(), aux_loss=None,
        )  # fmt: skip

    return forward


def _reference(model: Any, tokens: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Return the log-probabilities of answers by the model without its adapter."""
    with torch.no_grad(), model.disable_adapter():
        forward = _with_log_probs(model)
        found = forward(labels, True, input_ids=tokens, attention_mask=mask)
    total: Tensor = found.log_probs.sum(-1)
    return total


def _dpo(task: TaskConfig, model: Any, data: TokenizedDataset, drawn: np.ndarray) -> tuple:
    both = _together([_answers(data, drawn, 0), _answers(data, drawn, 1)])
    tokens, labels, mask = both
    chosen, rejected = _reference(model, *both).chunk(2)
    trainer = _Trainer(
        model, ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl",
        loss_types=["sigmoid"], loss_weights=[1.0], beta=task.beta, label_smoothing=0.0,
        use_weighting=False, f_alpha_divergence_coef=0.5, use_liger_kernel=False,
    )  # fmt: skip
    inputs = dict(
        input_ids=tokens, attention_mask=mask, completion_mask=(labels != -100).long(),
        ref_chosen_logps=chosen, ref_rejected_logps=rejected,
    )  # fmt: skip
    loss = DPOTrainer._compute_loss(trainer, _with_log_probs(model), inputs, False)
    return loss, _means(trainer)


def _kto(task: TaskConfig, model: Any, data: TokenizedDataset, drawn: np.ndarray) -> tuple:
    own, other = _answers(data, drawn, 0), _answers(data, drawn, 1)
    trainer = _Trainer(
        model, calculate_KL=True, precompute_ref_logps=True, loss_type="kto", beta=task.beta,
        desirable_weight=task.desirable_weight, undesirable_weight=task.undesirable_weight,
    )  # fmt: skip
    trainer._compute_kl_logps = lambda *args: KTOTrainer._compute_kl_logps(trainer, *args)
    inputs = dict(
        input_ids=own[0], attention_mask=own[2], completion_mask=(own[1] != -100).long(),
        KL_input_ids=other[0], KL_attention_mask=other[2],
        KL_completion_mask=(other[1] != -100).long(),
        label=torch.from_numpy(data.signs[drawn * 2] > 0),
        ref_logps=_reference(model, *own), ref_KL_logps=_reference(model, *other),
    )  # fmt: skip
    loss = KTOTrainer._compute_loss(trainer, _with_log_probs(model), inputs, False)
    return loss, _means(trainer)


def _ppo(task: TaskConfig, model: Any, data: TokenizedDataset, drawn: np.ndarray) -> tuple:
    tokens, labels, mask = padded(data, drawn)
    given = torch.zeros(2, *tokens.shape, dtype=torch.float64)
    for row, index in enumerate(drawn):
        sampled = data.sampled(int(index))
        assert sampled is not None
        given[:, row, : len(sampled[0])] = torch.from_numpy(np.stack(sampled))

    def log_probs(*_: Any, **__: Any) -> tuple[Tensor, Tensor, None]:
        inputs = dict(input_ids=tokens, attention_mask=mask)
        found = _with_log_probs(model)(labels=tokens, fused_lm_head=True, **inputs)
        return found.log_probs, torch.zeros_like(found.log_probs), None

    trainer = _Trainer(
        model, beta=0.0, loss_type="bnpo", importance_sampling_level="token", use_vllm=False,
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, _entropy_bonus_enabled=False,
        epsilon_low=1 - task.clip_low, epsilon_high=task.clip_high - 1,
        current_gradient_accumulation_steps=1, args=SimpleNamespace(delta=None),
        _get_per_token_logps_and_entropies=log_probs,
    )  # fmt: skip
    logprobs, advantages = given[:, :, 1:]
    inputs = dict(
        prompt_ids=tokens[:, :1], prompt_mask=mask[:, :1], completion_ids=tokens[:, 1:],
        completion_mask=(labels[:, 1:] != -100).long(), advantages=advantages,
        old_per_token_logps=logprobs,
    )  # fmt: skip
    return GRPOTrainer._compute_loss(trainer, model, inputs), {}


def _cit(task: TaskConfig, model: Any, data: TokenizedDataset, drawn: np.ndarray) -> tuple:
    """TRL has none: the formulas of arXiv 2402.11138, the weight as mLoRA has it."""
    tokens, labels, mask = _together([_answers(data, drawn, 0), _answers(data, drawn, 1)])
    inputs = dict(input_ids=tokens, attention_mask=mask)
    loss = model(**inputs, labels=labels).loss
    states = model.get_base_model().model(**inputs).last_hidden_state
    ends = torch.nn.functional.normalize(states[torch.arange(len(states)), mask.sum(1) - 1], dim=-1)
    one, other = ends.chunk(2)
    likeness = torch.exp(one @ other.T / task.temperature)
    own = likeness.diagonal()
    contrast = -(own / likeness.sum(1)).log().mean() - (own / likeness.sum(0)).log().mean()
    contrast = contrast / 2
    weight = min(task.contrast_weight, (loss / contrast).item())
    metrics = {"contrast": contrast.item(), "contrast_weight": weight}
    return loss + weight * contrast, metrics


def _without_reference(trainer_class: Any, **fields: Any) -> Any:
    def loss_of(task: TaskConfig, model: Any, data: TokenizedDataset, drawn: np.ndarray) -> tuple:
        own = {name: getattr(task, name) for name in ("beta", "cpo_alpha")}
        trainer = _Trainer(
            model, loss_type="sigmoid", label_smoothing=0.0, alpha=0.0, simpo_gamma=0.0,
            pad_token_id=0, padding_value=0, **own, **fields,
        )  # fmt: skip
        for name in ("cpo_loss", "odds_ratio_loss", "concatenated_forward"):
            if method := getattr(trainer_class, name, None):
                setattr(trainer, name, method.__get__(trainer))
        trainer.get_batch_logps = trainer_class.get_batch_logps
        trainer.concatenated_inputs = trainer_class.concatenated_inputs
        batch = {}
        for which, side in enumerate(("chosen", "rejected")):
            tokens, labels, mask = _answers(data, drawn, which)
            batch[f"{side}_input_ids"] = tokens
            batch[f"{side}_labels"] = labels
            batch[f"{side}_attention_mask"] = mask
        with patch.object(Tensor, "float", Tensor.double):
            loss, found = trainer_class.get_batch_loss_metrics(trainer, model, batch)
        return loss, {name: float(value) for name, value in found.items()}

    return loss_of


def _means(trainer: _Trainer) -> dict[str, float]:
    return {name: values[-1] for name, values in trainer._metrics["train"].items() if values}


LOSSES = {
    "dpo": _dpo,
    "kto": _kto,
    "cpo": _without_reference(CPOTrainer),
    "orpo": _without_reference(ORPOTrainer),
    "cit": _cit,
    "ppo": _ppo,
}
