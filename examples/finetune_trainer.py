"""Fine-tunes a model with PaddleNLP's Trainer: the same model object and data as in finetune_loop.py.

PaddleNLP wants older versions of some packages, so give it an environment of its own:
`pip install "ernie45[paddlenlp]"`.

python examples/finetune_trainer.py --output build/capitals
python examples/generate.py --model build/capitals "Which city is the capital of France?"
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import paddle
from finetune_loop import write_data
from paddlenlp.trainer import Trainer, TrainerCallback, TrainingArguments

from ernie45 import ErnieForCausalLM, ErnieTokenizer
from ernie45.training.data import Batch, DataStream, Encoder


class Batches(paddle.io.IterableDataset):
    """Batches of a stream, which the Trainer's loader hands on one at a time."""

    def __init__(self, stream: DataStream):
        self.stream = stream

    def __iter__(self) -> Iterator[Batch]:
        return self.stream


def inputs_of(batches: list[Batch]) -> dict[str, paddle.Tensor]:
    """What the model takes, of the one batch that the loader has drawn."""
    (batch,) = batches
    return batch.inputs()


class PrintLoss(TrainerCallback):
    """A line for each step, on standard output; PaddleNLP's own log goes to standard error."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        """Called by the Trainer after a step, and once more at the end with means over the run."""
        if "loss" in logs:
            print(f"step {logs['global_step']}: loss {logs['loss']}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="ernie45-tiny", help="folder or hub name")
    parser.add_argument("--data", type=Path, help="conversations, a .jsonl file; by default about five capitals")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="where to write the fine-tuned model")
    options = parser.parse_args()

    tokenizer = ErnieTokenizer.from_pretrained(options.model)
    model = ErnieForCausalLM.from_pretrained(options.model, dtype="float32")
    with tempfile.TemporaryDirectory() as folder:
        if options.data is None:
            write_data(Path(folder) / "capitals.jsonl")
        source = options.data or Path(folder) / "capitals.jsonl"
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=options.steps,
            per_device_train_batch_size=1,  # batches, of as many rows as the stream gives them
            learning_rate=options.rate,
            lr_scheduler_type="linear",
            weight_decay=0.01,
            adam_beta2=0.95,
            max_grad_norm=1.0,
            seed=options.seed,
            logging_steps=1,
            save_strategy="no",  # its checkpoints are pickled; ours are written below
            report_to="none",
            disable_tqdm=True,
        )
        batches = DataStream([source], Encoder(tokenizer, max_length=128), seed=options.seed)
        Trainer(
            model,
            args=arguments,
            data_collator=inputs_of,
            train_dataset=Batches(batches),
            callbacks=[PrintLoss()],
        ).train()
    if options.output:
        model.save_pretrained(options.output)
        tokenizer.save_pretrained(options.output)


if __name__ == "__main__":
    main()
