"""An ordinary TRL script for supervised fine-tuning that fits a curve of adapters: lines marked with (*) changed.

python examples/sft.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data train.jsonl --out runs/sft

Each line of the data has `prompt` and `completion`, or `messages`, or `text`: whatever SFTTrainer takes.
"""

from __future__ import annotations

import argparse

import peft
from datasets import load_dataset
from trl import SFTConfig

import loracurve as lc  # (*)
from loracurve.training.sft import CurveSFTTrainer  # (*)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="base model: a folder or a name on the hub")
    parser.add_argument("--data", required=True, help="JSONL file")
    parser.add_argument("--out", required=True, help="folder for checkpoints; the curve goes into OUT/curve")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--length", type=int, default=256, help="longest example in tokens")
    options = parser.parse_args()

    base, tokenizer = lc.load_base(options.model)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = lc.CurveModel.from_config(base, config, segments=2, degree=2)  # (*) was: peft_config=config in SFTTrainer
    rows = load_dataset("json", data_files=options.data, split="train").train_test_split(test_size=0.1, seed=0)

    arguments = SFTConfig(
        options.out,
        max_steps=options.steps,
        max_length=options.length,
        per_device_train_batch_size=8,
        learning_rate=5e-4,
        bf16=False,  # (*) load the base in bfloat16 instead
        gradient_checkpointing=False,  # (*)
        save_steps=50,
        report_to="none",
        seed=0,
    )
    trainer = CurveSFTTrainer(  # (*) was: SFTTrainer
        model=model,
        args=arguments,
        points=2,  # (*) points of the curve at which each batch is run
        train_dataset=rows["train"],
        eval_dataset=rows["test"],
        processing_class=tokenizer,
    )
    trainer.train()
    print(trainer.evaluate())
    trainer.save_model(f"{options.out}/curve")


if __name__ == "__main__":
    main()
