"""An ordinary Trainer script on a text file that fits a curve of adapters: lines marked with (*) are what changed.

python examples/trainer.py --model HuggingFaceTB/SmolLM2-135M-Instruct --text train.txt --out runs/trainer
"""

from __future__ import annotations

import argparse

import peft
from datasets import load_dataset
from transformers import DataCollatorForLanguageModeling, TrainingArguments

import loracurve as lc  # (*)
from loracurve.training.trainer import CurveTrainer  # (*)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="base model: a folder or a name on the hub")
    parser.add_argument("--text", required=True, help="text file, one example a line")
    parser.add_argument("--out", required=True, help="folder for checkpoints; the curve goes into OUT/curve")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--length", type=int, default=128, help="longest example in tokens")
    options = parser.parse_args()

    base, tokenizer = lc.load_base(options.model)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = lc.CurveModel.from_config(base, config, segments=2, degree=2)  # (*) was: peft.get_peft_model(base, config)

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
    trainer = CurveTrainer(  # (*) was: Trainer
        model=model,
        args=arguments,
        points=2,  # (*) points of the curve at which each batch is run
        train_dataset=split["train"],
        eval_dataset=split["test"],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    trainer.train()
    print(trainer.evaluate())
    trainer.save_model(f"{options.out}/curve")
    (text,) = lc.generate(model, tokenizer, "The", lc.GenerateConfig(max_new_tokens=20))  # (*)
    print(text.text, text.mutual_information)


if __name__ == "__main__":
    main()
