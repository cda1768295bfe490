"""The script `plain_trainer.py`, which fits a curve of adapters instead of one adapter.

python examples/trainer.py --model HuggingFaceTB/SmolLM2-135M-Instruct --text train.txt --out runs/trainer
"""

from __future__ import annotations

import argparse

import peft
from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    TrainingArguments,
)

import loracurve as lc
from loracurve.training.trainer import CurveTrainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="base model: a folder or a name on the hub")
    parser.add_argument("--text", required=True, help="text file, one example a line")
    parser.add_argument("--out", required=True, help="folder for checkpoints; what was trained goes into OUT/trained")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--length", type=int, default=128, help="longest example in tokens")
    options = parser.parse_args()

    base = AutoModelForCausalLM.from_pretrained(options.model)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = lc.CurveModel.from_config(base, config)

    rows = load_dataset("text", data_files=options.text, split="train")
    rows = rows.filter(lambda row: bool(row["text"].strip()))
    rows = rows.map(
        lambda row: tokenizer(row["text"], truncation=True, max_length=options.length), remove_columns=["text"]
    )
    split = rows.train_test_split(test_size=0.1, seed=0)

    arguments = TrainingArguments(
        options.out,
        max_steps=options.steps,
        per_device_train_batch_size=8,
        learning_rate=5e-4,
        logging_steps=10,
        save_steps=50,
        report_to="none",
        seed=0,
    )
    trainer = CurveTrainer(
        model=model,
        args=arguments,
        train_dataset=split["train"],
        eval_dataset=split["test"],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    trainer.train()
    print(trainer.evaluate())
    trainer.save_model(f"{options.out}/trained")


if __name__ == "__main__":
    main()
