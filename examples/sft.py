"""The script `plain_sft.py`, which fits a curve of adapters instead of one adapter.

python examples/sft.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data train.jsonl --out runs/sft

Each line of the data has `prompt` and `completion`, or `messages`, or `text`: whatever SFTTrainer takes.
"""

from __future__ import annotations

import argparse

import peft
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig

import loracurve as lc
from loracurve.training.sft import CurveSFTTrainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="base model: a folder or a name on the hub")
    parser.add_argument("--data", required=True, help="JSONL file")
    parser.add_argument("--out", required=True, help="folder for checkpoints; what was trained goes into OUT/trained")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--length", type=int, default=256, help="longest example in tokens")
    options = parser.parse_args()

    base = AutoModelForCausalLM.from_pretrained(options.model)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = lc.CurveModel.from_config(base, config)
    rows = load_dataset("json", data_files=options.data, split="train").train_test_split(test_size=0.1, seed=0)

    arguments = SFTConfig(
        options.out,
        max_steps=options.steps,
        max_length=options.length,
        per_device_train_batch_size=8,
        learning_rate=5e-4,
        bf16=False,
        gradient_checkpointing=False,
        save_steps=50,
        report_to="none",
        seed=0,
    )
    trainer = CurveSFTTrainer(
        model=model,
        args=arguments,
        train_dataset=rows["train"],
        eval_dataset=rows["test"],
        processing_class=tokenizer,
    )
    trainer.train()
    print(trainer.evaluate())
    trainer.save_model(f"{options.out}/trained")


if __name__ == "__main__":
    main()
