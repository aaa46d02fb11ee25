"""A student trained by TRL's GOLD trainer, to be run in the environment that `make bench-peers` makes.

Its argument is a JSON object; it prints one. Both sides read the beginning-of-sequence token as the trainer can be
told to: the prompts hold it, and the teacher's tokenizer adds none of its own.
"""

from __future__ import annotations

import copy
import json
import os
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from tokenizers import processors
from transformers.utils import logging as hf_logging

from benchmarks.claims.pair_models import Sizes, heldout, kept, loaded, measures, train_prompts
from gold.demo.run import SAMPLING

LONGEST = 96
"""Tokens of prompt and completion at most."""


def main(told: str) -> int:
    """Exit status; the last line printed is the student's measures, as JSON."""
    job: dict[str, Any] = json.loads(told)
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    hf_logging.set_verbosity_error()
    torch.set_num_threads(1)
    sizes = Sizes(**job["sizes"])
    student, teacher = (loaded(side, Path(job["made"])) for side in job["sides"])
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = trainer_of(student, teacher, job, Path(folder))
        begun = time.process_time()
        trainer.train()
        cpu_s = time.process_time() - begun
    student.lm.eval()
    found = measures(student, teacher, heldout(sizes)[: job["watched"]])
    print(json.dumps({**found, "cpu_s": round(cpu_s, 2)}))
    return 0


def trainer_of(student: Any, teacher: Any, job: Mapping[str, Any], folder: Path) -> Any:
    """TRL's trainer on the job's prompts, with its defaults but for sizes, rate, on-policy samples alone, the hybrid
    loss, and the job's ``options``; with fewer on-policy samples, texts of the teacher are the others."""
    import_module("datasets").utils.logging.disable_progress_bar()
    gold = import_module("trl.experimental.gold")
    random.seed(job["seed"])
    bare = copy.deepcopy(teacher.tokenizer)
    bare.backend_tokenizer.post_processor = processors.Sequence([])
    bare.save_pretrained(folder / "teacher")
    options = {"lmbda": 1.0, "temperature": 1.0, "top_p": 1.0, **job["options"]}
    own = options["lmbda"] == 1.0
    prompts = train_prompts(Sizes(**job["sizes"])) if own else kept(Path(job["texts"]))
    dataset = import_module("datasets").Dataset.from_list(
        [
            {"prompt": f"{student.tokenizer.bos_token}{p.text}", "completion": p.completion or " 1"}
            for p in prompts
        ]
    )
    config = gold.GOLDConfig(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=job["batch"],
        max_steps=job["steps"],
        learning_rate=job["lr"],
        seed=job["seed"],
        max_completion_length=SAMPLING.max_new_tokens,
        max_length=LONGEST,
        use_uld_loss=True,
        uld_use_hybrid_loss=True,
        teacher_tokenizer_name_or_path=str(folder / "teacher"),
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )
    trainer = gold.GOLDTrainer(
        model=student.lm,
        teacher_model=teacher.lm,
        args=config,
        train_dataset=dataset,
        processing_class=student.tokenizer,
    )
    trainer.remove_callback(import_module("transformers").PrinterCallback)
    return trainer


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
