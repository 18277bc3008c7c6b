"""Fine-tune a converted transformer with Hugging Face's Trainer (pip install transformers accelerate).

    python examples/hf_trainer.py --steps 40

The model is a small BERT with random weights, the task made up: which of two words a sentence begins with.
"""

import argparse
import tempfile

import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, EvalPrediction, Trainer, TrainingArguments

import reparam
from reparam.training.groups import make_groups
from reparam.training.recipe import Recipe

WORDS, LENGTH = 16, 8


def sentences(count: int, seed: int) -> list[dict[str, Tensor]]:
    """Random ones that begin with word 0 or 1, which is their label."""
    words = torch.randint(WORDS, (count, LENGTH), generator=torch.Generator().manual_seed(seed))
    words[:, 0] %= 2
    return [{"input_ids": sentence, "labels": sentence[0]} for sentence in words]


def accuracy(found: EvalPrediction) -> dict[str, float]:
    logits, labels = torch.as_tensor(found.predictions), torch.as_tensor(found.label_ids)
    return {"accuracy": float((logits.argmax(-1) == labels).double().mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune a converted transformer with the Trainer.")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps")
    steps = parser.parse_args().steps

    torch.manual_seed(0)
    held_out = sentences(200, seed=2)
    config = BertConfig(
        vocab_size=WORDS, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    model = reparam.convert(BertForSequenceClassification(config), to="gmp")

    # The Trainer takes an optimizer, and with it the parameter groups: one a kind, no weight decay on angles.
    optimizer = torch.optim.AdamW(make_groups(model, Recipe(optimizer="adamw", lr=1e-2, weight_decay=0.01)))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=32,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(
            model,
            arguments,
            train_dataset=sentences(1000, seed=1),
            eval_dataset=held_out,
            optimizers=(optimizer, None),
            compute_metrics=accuracy,
        )
        print(f"accuracy before {trainer.evaluate()['eval_accuracy']:.1%}")
        trainer.train()
        print(f"accuracy after {trainer.evaluate()['eval_accuracy']:.1%}")

    folded = reparam.fold(model.eval())
    words = torch.stack([sentence["input_ids"] for sentence in held_out])
    with torch.no_grad():
        difference = float((folded(words).logits - model(words).logits).abs().max())
    BertForSequenceClassification(config).load_state_dict(folded.state_dict(), strict=True)
    print(f"folded into {type(folded).__name__}: largest difference of an output {difference:.1e}")


if __name__ == "__main__":
    main()
