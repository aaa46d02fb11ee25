"""Names that TRL, ms-swift and transformers give to settings, and the keys that have them here.

docs/migrating-from-trl.md has all fields of TRL's GOLDConfig with their answers.
"""

KEY_OF = {
    "adam_beta1": "optimizer.betas",
    "adam_beta2": "optimizer.betas",
    "batch_size": "train.prompts_per_step",
    "beta": "objectives.0.beta",
    "bf16": "train.precision",
    "dataset": "data.prompts",
    "dataset_name": "data.prompts",
    "eval_steps": "evaluate.every",
    "fsdp": "train.sharding",
    "gradient_accumulation_steps": "train.micro_batch_size",
    "lambda": "rollout.on_policy",
    "learning_rate": "optimizer.lr",
    "lmbda": "rollout.on_policy",
    "lora_alpha": "student.lora.alpha",
    "lora_r": "student.lora.rank",
    "lora_rank": "student.lora.rank",
    "lora_target_modules": "student.lora.targets",
    "lr_scheduler_type": "optimizer.schedule",
    "max_completion_length": "rollout.max_new_tokens",
    "max_steps": "train.steps",
    "model": "student.path",
    "model_name_or_path": "student.path",
    "num_train_epochs": "train.steps",
    "output_dir": "output",
    "per_device_eval_batch_size": "evaluate.micro_batch_size",
    "per_device_train_batch_size": "train.micro_batch_size",
    "report_to": "train.trackers",
    "save_steps": "train.checkpoint_every",
    "save_total_limit": "train.keep_last",
    "target_modules": "student.lora.targets",
    "teacher_model": "teacher.path",
    "teacher_model_name_or_path": "teacher.path",
    "train_batch_size": "train.prompts_per_step",
    "use_vllm": "rollout.engine",
    "vllm_server_base_url": "rollout.engine.vllm.url",
    "warmup_ratio": "optimizer.warmup_steps",
}
"""Dotted keys of a configuration by the last part of a name."""
