"""A mixture of experts of a pre-trained model: made, trained alone, saved, loaded, looked at, and exported as dense."""

from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)

from st_clp import CLPLoss, Collection, load, mine_hard_negatives, plan_on_host, to_dense, train_only, upcycle
from st_clp.moe import expert_usage


def main(
    model: str = "intfloat/multilingual-e5-small",
    collection: str = "miracl/ko",
    output: str = "e5-ko-moe",
    *,
    batch_size: int = 32,
) -> SentenceTransformer:
    # Copies of every intermediate projection, and a router before them: the embeddings are the dense model's as yet.
    encoder = upcycle(SentenceTransformer(model), num_experts=2)
    print(train_only(encoder, "moe"))  # what trains, and how much that is

    rows = mine_hard_negatives(encoder, Collection.load(collection, split="train"), num_negatives=4)
    arguments = SentenceTransformerTrainingArguments(
        output + "-training", per_device_train_batch_size=batch_size, learning_rate=1e-4, report_to="none"
    )
    trainer = SentenceTransformerTrainer(model=encoder, args=arguments, train_dataset=rows, loss=CLPLoss(encoder))
    plan_on_host(trainer)  # on a GPU no step waits for the one before it
    trainer.train()
    encoder.save(output)

    # Either opens the folder; the first runs no code but st_clp's.
    loaded = load(output)
    SentenceTransformer(output, trust_remote_code=True)

    usage = expert_usage(loaded, rows["anchor"][:100])
    print(usage)  # which expert takes how many tokens, layer by layer

    # For whatever cannot run a mixture (ONNX, a server of dense models): one projection in the experts' place again.
    to_dense(load(output), how="average").save(output + "-dense")
    return loaded


if __name__ == "__main__":
    main()
