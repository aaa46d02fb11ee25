"""On-policy distillation across tokenizers as one loop, without command line, configuration or run folder.

python examples/minimal_loop.py                    # two tiny random models
python examples/minimal_loop.py STUDENT TEACHER    # two model folders or Hub ids
"""

import sys

import torch

from gold.align.batch import AlignedBatch
from gold.align.model_inputs import aligned_text, student_states, teacher_logits
from gold.align.vocabularies import VocabularyPair
from gold.data import Prompt
from gold.demo.models import character_tokenizer, tiny_model, word_tokenizer
from gold.demo.running_sums import RunningSums
from gold.kernels.logits import LazyLogits
from gold.losses import OBJECTIVES, LossInputs
from gold.models.hidden_states import lazy_logits
from gold.models.language_model import LanguageModel
from gold.models.load import load_model
from gold.rollout.engine import sample
from gold.rollout.hf import HuggingFaceEngine
from gold.rollout.types import Sampling
from gold.teachers import LocalTeacher


def train(student: LanguageModel, teacher: LocalTeacher, prompts: list[Prompt], *, steps: int, lr: float):
    """Trains the student in place; yields the loss of each step in nats per byte."""
    pair = VocabularyPair(student.vocabulary, teacher.vocabulary)
    objective = OBJECTIVES["reverse_kl"](support="bytes")
    optimizer = torch.optim.AdamW(student.lm.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    sampling = Sampling(max_new_tokens=24)
    engine = HuggingFaceEngine(student)
    for step in range(steps):
        # The student samples completions; the teacher scores its own tokens of the same bytes.
        seeds = [(0, step, n) for n in range(len(prompts))]
        rollouts = sample(engine, student, prompts, sampling, seeds=seeds)
        texts = [aligned_text(rollout, pair) for rollout in rollouts]
        batch = AlignedBatch(texts, pair, student.device, teacher.device)
        teacher_states = LazyLogits.joined(teacher_logits(teacher, rollouts, texts))
        student_rows = lazy_logits(student.lm, student_states(student, rollouts))
        # The loss is the divergence between both models' next-byte distributions along the text.
        loss = objective(LossInputs(batch, student_rows, teacher_states)).total / objective.count(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.lm.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield loss.item()


if __name__ == "__main__":
    task = RunningSums().prompts("train", 16, seed=0)
    if len(sys.argv) == 3:
        student, teacher = (load_model(path) for path in sys.argv[1:])
        lr = 3e-5
    else:
        words = word_tokenizer([f"{p.text}{p.completion}" for p in task])
        student = tiny_model(words, "words", layers=1, width=32, seed=0)
        teacher = tiny_model(character_tokenizer(), "characters", layers=1, width=32, seed=1)
        lr = 3e-3
    for step, loss in enumerate(train(student, LocalTeacher(teacher), task, steps=30, lr=lr), start=1):
        print(f"step {step:2}  reverse KL {loss:.4f} nats per byte")
