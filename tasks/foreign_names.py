"""Names that other programs give to the fields of a task, for people who bring their files along.

From PEFT, the trainers of Hugging Face (transformers, TRL), axolotl, LLaMA-Factory and LitGPT, as
their documentation spells them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_SAME: Mapping[str, str] = {
    "rank": "r lora_r lora_rank lora_dim lora_attention_dim adapter_rank",
    "lora_alpha": "alpha",
    "target_modules": "lora_target_modules lora_target lora_modules target_module modules",
    "dataset_name": (
        "dataset datasets dataset_path dataset_id data data_path data_file data_files train_file "
        "train_data train_dataset training_data"
    ),
    "context_length": (
        "cutoff_len max_length max_len max_seq_length max_seq_len max_sequence_length sequence_len "
        "sequence_length seq_length seq_len model_max_length block_size"
    ),
    "json_key": "text_column text_field text_key dataset_text_field",
    "max_samples": "max_train_samples num_samples num_train_samples max_rows",
    "learning_rate": "lr",
    "optimizer": "optim optimizer_name optimizer_type",
    "weight_decay": "wd",
    "adam_beta1": "beta1",
    "adam_beta2": "beta2",
    "adam_epsilon": "eps epsilon adam_eps",
    "loraplus_ratio": "loraplus_lr_ratio lora_plus_ratio",
    "lr_scheduler": "scheduler lr_scheduler_type scheduler_type lr_schedule",
    "warmup_steps": "num_warmup_steps lr_warmup_steps warmup",
    "max_grad_norm": "gradient_clipping gradient_clip_val grad_clip clip_grad max_norm",
    "lora_dropout": "dropout",
    "seed": "random_seed data_seed",
    "prompt": "template prompt_template prompt_style chat_template",
    "early_stopping_min_delta": "early_stopping_threshold",
    "resume_from": (
        "adapter_name_or_path adapter_path lora_model_dir lora_weights lora_path peft_model_path"
    ),
    "name": "task_name adapter_name run_name",
}

_RUN = "it belongs to the run, not to a task: give lobra train"
_OPPOSITE = "it is train_on_inputs, with the opposite value"
#: (our field, what to say, their names) where it is not the same under another name.
_ALMOST: Sequence[tuple[str | None, str, str]] = (
    (
        "global_batch_size",
        "here it is global_batch_size, the task's sequences in a step, over all devices and "
        "micro-batches together",
        "batch_size train_batch_size total_batch_size micro_batch_size per_device_train_batch_size "
        "per_device_batch_size gradient_accumulation_steps",
    ),
    (
        "steps",
        "it is called steps, and counts where epochs is given too",
        "max_steps num_steps train_steps num_train_steps max_train_steps total_steps",
    ),
    (
        "epochs",
        "it is called epochs, and counts where steps is not given",
        "num_epochs num_train_epochs n_epochs train_epochs max_epochs epoch",
    ),
    ("adapter", "give adapter: rslora", "use_rslora rslora"),
    ("adapter", "give adapter: dora", "use_dora"),
    ("adapter", "give adapter: pissa to start from principal parts", "init_lora_weights"),
    (
        None,
        "embed_tokens may have an adapter; trained rows of it are not supported",
        "trainable_token_indices",
    ),
    (
        "warmup_steps",
        "give warmup_steps, the number of steps instead of their share",
        "warmup_ratio",
    ),
    (
        "validation_split",
        "it is called validation_split, a share from 0 to below 1 and not a number of rows",
        "val_set_size val_size test_size eval_split val_split val_split_fraction",
    ),
    ("train_on_inputs", "it is called train_on_inputs", "train_on_prompt train_on_input"),
    (
        "train_on_inputs",
        _OPPOSITE,
        "completion_only_loss assistant_only_loss train_on_responses_only mask_prompt",
    ),
    (
        None,
        "a run goes on with lobra train --resume; resume_from is an adapter to start from",
        "resume_from_checkpoint",
    ),
    (
        None,
        f"{_RUN} --model",
        "model base_model model_name model_name_or_path base_model_name_or_path",
    ),
    (None, f"{_RUN} --output-dir", "output_dir"),
    (None, f"{_RUN} --precision", "bf16 fp16 precision"),
    (None, f"{_RUN} --gradient-checkpointing", "gradient_checkpointing"),
    (None, f"{_RUN} --save-every", "save_steps"),
    (None, f"{_RUN} --keep-checkpoints", "save_total_limit"),
    (None, f"{_RUN} --report-to", "report_to"),
    (None, f"{_RUN} --validate-every", "eval_steps"),
)

_HINTS: Mapping[str, tuple[str | None, str]] = {
    **{
        name: (ours, f"it is called {ours}")
        for ours, names in _SAME.items()
        for name in names.split()
    },
    **{name: (ours, hint) for ours, hint, names in _ALMOST for name in names.split()},
}


def foreign_field(name: str) -> tuple[str | None, str] | None:
    """Return (our field or None, what to say) for a field of another program; None if unknown."""
    return _HINTS.get(name.casefold().replace("-", "_"))
