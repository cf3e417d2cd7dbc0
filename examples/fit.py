"""Train with ``model.fit`` and CLPLoss on rows that you have: a query, its answer, a text that only looks like one.

The fourth text of a row is a query that the negative *does* answer; the penalty keeps the two together.
"""

from sentence_transformers import InputExample, SentenceTransformer
from torch.utils.data import DataLoader

from st_clp import CLPLoss

ROWS = [
    (
        "which river is the longest?",
        "The Nile, 6,650 km long, is held to be the longest river of the world.",
        "The Rhine rises in the Alps and flows into the North Sea.",
        "where does the Rhine end?",
    ),
    (
        "where does the Rhine end?",
        "The Rhine rises in the Alps and flows into the North Sea.",
        "The Danube rises in the Black Forest and flows into the Black Sea.",
        "which rivers flow into the Black Sea?",
    ),
    (
        "who wrote Faust?",
        "Faust is a tragedy in two parts by Johann Wolfgang von Goethe.",
        "Doctor Faustus is a play by Christopher Marlowe about the same legend.",
        "which plays did Marlowe write?",
    ),
]


def main(model: str = "intfloat/multilingual-e5-small", output: str = "fitted") -> SentenceTransformer:
    trained = SentenceTransformer(model)
    examples = [InputExample(texts=list(row)) for row in ROWS]
    # fit counts whole batches: with fewer rows than one holds, its learning rate would be 0 from the start.
    loader = DataLoader(examples, batch_size=min(16, len(examples)), shuffle=True)
    trained.fit(
        train_objectives=[(loader, CLPLoss(trained))],
        epochs=1,
        warmup_steps=0,  # by default 10,000: more than most sets have steps
        optimizer_params={"lr": 2e-5},
        output_path=output,
    )
    return trained


if __name__ == "__main__":
    main()
