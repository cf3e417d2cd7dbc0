"""Train on several GPUs, or processes of one machine, with every process's documents as negatives:

torchrun --nproc_per_node 2 several_processes.py MODEL rows.jsonl OUTPUT

The rows are those of mine.py: mine once, before, in one process.
"""

import sys

from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)

from st_clp import CachedCLPLoss, plan_on_host
from st_clp.mining import read_rows, to_dataset


def main(model: str = "intfloat/multilingual-e5-small", rows: str = "mined/rows.jsonl", output: str = "e5-ko") -> None:
    encoder = SentenceTransformer(model)
    mined = read_rows(rows)
    dataset: Dataset = to_dataset(mined, num_negatives=4)
    # The batch is as large as the loss wants it; mini_batch_size is what fits into memory.
    loss = CachedCLPLoss(encoder, mini_batch_size=32, gather_across_devices=True)
    arguments = SentenceTransformerTrainingArguments(
        output + "-training", per_device_train_batch_size=256, learning_rate=2e-5, report_to="none"
    )
    trainer = SentenceTransformerTrainer(model=encoder, args=arguments, train_dataset=dataset, loss=loss)
    plan_on_host(trainer)  # on a GPU no step waits for the one before it
    trainer.train()
    if trainer.is_world_process_zero():
        encoder.save(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
