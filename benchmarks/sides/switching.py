"""PEFT: one task after the other, its adapter switched on, its rows padded to the longest."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.profiler import record_function

from benchmarks.sides.job import MAX_GRAD_NORM, MODULES, fresh_adapter, task_name
from benchmarks.sides.side import (
    COMPUTE,
    Batch,
    Clock,
    Setting,
    Step,
    Trained,
    by_task,
    num_labels,
    sent,
)

IGNORED = -100  # the label of what is not learned

Batching = Callable[[Batch, int], list[Batch]]


def rows_in_turn(num_rows: int, batch: Batch, max_tokens: int) -> list[Batch]:
    """Return micro-batches of `num_rows` sequences as they come, whatever their lengths."""
    return [batch[start : start + num_rows] for start in range(0, len(batch), num_rows)]


def rows_by_length(batch: Batch, max_tokens: int) -> list[Batch]:
    """Return micro-batches of sequences of like length, at most `max_tokens` with padding."""
    batches: list[Batch] = []
    for sequence in sorted(batch, key=lambda sequence: len(sequence.tokens)):
        if not batches or len(sequence.tokens) * (len(batches[-1]) + 1) > max_tokens:
            batches.append([])
        batches[-1].append(sequence)
    return batches


class Switching:
    """All tasks' adapters in one PEFT model, trained in turn, each with its own AdamW.

    Padding is on the right, where causal attention never sees it. So `with_mask` changes nothing
    but the time: a Trainer gives the mask, without it torch has faster kernels.
    """

    def __init__(self, batching: Batching, with_mask: bool, setting: Setting) -> None:
        from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
        from transformers import AutoModelForCausalLM

        # of names that PEFT and transformers will change
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        self.batching = batching
        self.with_mask = with_mask
        self.setting = setting
        self.device = torch.device(setting.device)
        base = AutoModelForCausalLM.from_pretrained(setting.folder, dtype=setting.dtype)
        names = [task_name(task) for task in range(setting.num_tasks)]
        config = LoraConfig(
            r=setting.rank,
            lora_alpha=setting.rank,
            target_modules=list(MODULES),
            task_type="CAUSAL_LM",
        )
        self.model = get_peft_model(base.to(self.device), config, adapter_name=names[0])
        for name in names[1:]:
            self.model.add_adapter(name, config)
        self.parameters: list[list[torch.nn.Parameter]] = []
        self.optimizers = []
        for task, name in enumerate(names):
            tensors = fresh_adapter(setting.job.model, task, setting.rank)
            set_peft_model_state_dict(self.model, tensors, adapter_name=name)
            own = [p for key, p in self.model.named_parameters() if f".{name}." in key]
            self.parameters.append([p.requires_grad_() for p in own])
            fused = setting.device == "cuda"
            self.optimizers.append(
                torch.optim.AdamW(own, lr=setting.job.learning_rate, weight_decay=0.0, fused=fused)
            )
        self.model.train()

    def train(self, step: Step) -> Trained:
        """Train one task's sequences after the other's, each with an update at its end."""
        clock = Clock(self.setting.device)
        losses = []
        micro_batches = padded_tokens = 0
        for task, own in enumerate(by_task(step, self.setting.num_tasks)):
            self.model.set_adapter(task_name(task))
            mean = torch.zeros((), device=self.device)
            for batch in self.batching(own, self.setting.job.max_tokens):
                ids, labels, mask = self._padded(batch)
                with record_function(COMPUTE):
                    with torch.autocast("cuda", torch.bfloat16, self.setting.device == "cuda"):
                        loss = self.model(
                            input_ids=ids,
                            attention_mask=mask if self.with_mask else None,
                            labels=labels,
                            use_cache=False,
                        ).loss
                    share = loss * (num_labels(batch) / num_labels(own))
                    share.backward()
                    mean += share.detach()
                micro_batches += 1
                padded_tokens += ids.numel()
            torch.nn.utils.clip_grad_norm_(self.parameters[task], MAX_GRAD_NORM)
            self.optimizers[task].step()
            self.optimizers[task].zero_grad(set_to_none=True)
            losses.append(mean)
        time_s = clock.seconds()
        means = tuple(torch.stack(losses).tolist())
        return Trained(time_s, time_s, means, micro_batches, padded_tokens)

    def _padded(self, batch: Batch) -> list[Tensor]:
        """Return ids, labels and mask, int64 [rows, longest]."""
        shape = len(batch), max(len(sequence.tokens) for sequence in batch)
        ids, mask = torch.zeros(2, *shape, dtype=torch.int64)
        labels = torch.full(shape, IGNORED)
        for row, sequence in enumerate(batch):
            tokens = torch.from_numpy(sequence.tokens).long()
            targets = torch.from_numpy(sequence.targets).long()
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
            labels[row, targets] = tokens[targets]
        return sent(self.device, ids, labels, mask)


def switching(num_rows: int) -> Callable[[Setting], Switching]:
    """Return what builds a side that takes `num_rows` sequences as they come, as a Trainer does."""
    return partial(Switching, partial(rows_in_turn, num_rows), True)


def sorted_switching(setting: Setting) -> Switching:
    """Return a side that does what it can: rows of like length, attention without a mask."""
    return Switching(rows_by_length, False, setting)
