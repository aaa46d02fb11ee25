"""`gold train` from Python, in one call.

python examples/distill_api.py STUDENT TEACHER PROMPTS.jsonl OUTPUT    # two model folders or Hub ids
"""

import sys
from pathlib import Path

import gold
from gold.models.load import load_model
from gold.train.loop import Saving
from gold.train.recipe import Recipe

if __name__ == "__main__":
    student, teacher, prompts, output = sys.argv[1:]
    run = gold.distill(
        load_model(student),
        load_model(teacher),
        gold.load_prompts(prompts),
        Recipe(steps=5, prompts_per_step=4, num_generations=2, lr=3e-5, max_new_tokens=16),
        saving=Saving(Path(output)),
    )
    print(
        f"loss {run.steps[0]['loss']:.3f} → {run.steps[-1]['loss']:.3f}; the student is in {output}/student"
    )
