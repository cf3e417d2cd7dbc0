"""Mine hard negatives over any ir_datasets collection and keep the rows as a file that any trainer reads.

The embeddings are kept in a folder: a mining that was stopped goes on, and one with other options encodes nothing.
"""

from pathlib import Path

from sentence_transformers import SentenceTransformer

from st_clp import Collection
from st_clp.mining import MinedNegatives, MiningOptions, mine, write_rows


def main(
    model: str = "intfloat/multilingual-e5-small", collection: str = "miracl/ko", output: str = "mined"
) -> MinedNegatives:
    folder = Path(output)
    mined = mine(
        SentenceTransformer(model),
        Collection.load(collection, split="train"),
        MiningOptions(
            num_negatives=4,
            range_min=1,  # pass over the best-ranked candidate, which is often an answer that nobody judged
            range_max=31,
            relative_margin=0.05,  # a negative scores at least 5 % below the positive
            duplicate_threshold=0.95,  # and is no near-copy of it
        ),
        store_dir=folder / "embeddings",
    )
    print(mined.account)  # what became of every query and candidate
    write_rows(folder / "rows.jsonl", mined.rows)  # {"query": …, "pos": […], "neg": […], "neg_q": […]}
    return mined


if __name__ == "__main__":
    main()
