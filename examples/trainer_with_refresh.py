"""Mine, train with the Trainer, and mine again while the model gets better (ANCE), evaluating in between."""

from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)

from evaluators import CollectionEvaluator
from st_clp import AnceCallback, CLPLoss, Collection, mine_hard_negatives, plan_on_host


def main(
    model: str = "intfloat/multilingual-e5-small",
    collection: str = "miracl/ko",
    output: str = "e5-ko",
    *,
    refresh_every: int = 500,
    batch_size: int = 32,
    learning_rate: float = 2e-5,
) -> dict[str, float]:
    encoder = SentenceTransformer(model)
    train, dev = (Collection.load(collection, split=split) for split in ("train", "dev"))
    evaluator = CollectionEvaluator(dev)

    # Ids and scores of the rows (output_details) are what the refresh goes on from.
    rows = mine_hard_negatives(encoder, train, num_negatives=4, relative_margin=0.05, output_details=True)
    ance = AnceCallback(train, rows, every=refresh_every)

    arguments = SentenceTransformerTrainingArguments(
        output,
        num_train_epochs=1,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        warmup_steps=0.1,  # a share of all steps
        eval_strategy="epoch",
        save_strategy="epoch",
        report_to="none",
    )
    trainer = SentenceTransformerTrainer(
        model=encoder,
        args=arguments,
        train_dataset=ance.train_dataset,
        loss=CLPLoss(encoder),
        evaluator=evaluator,
        callbacks=[ance],
    )
    ance.log = trainer.log
    plan_on_host(trainer)  # on a GPU no step waits for the one before it
    trainer.train()

    for refresh in ance.refreshes[1:]:  # the first are the rows that training began with
        print(f"step {refresh['step']}: {refresh['status']}, {refresh['changed']:.0%} of the negatives changed")
    scores: dict[str, float] = evaluator(encoder)
    encoder.save(output)
    return scores


if __name__ == "__main__":
    main()
