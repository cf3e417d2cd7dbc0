"""Have an OpenAI-compatible server (vLLM, Ollama, llama.cpp) write the queries that hard negatives answer, and train.

What it wrote is kept in a file: nothing is asked for, or paid for, twice. Start a server first, such as
``vllm serve Qwen/Qwen3-4B-Instruct-2507``; its key, where it wants one, is read from OPENAI_API_KEY.
"""

from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)

from st_clp import CLPLoss, Collection, mine_hard_negatives, plan_on_host
from st_clp.queries import QueryOptions


def main(
    model: str = "intfloat/multilingual-e5-small",
    collection: str = "miracl/ko",
    output: str = "e5-ko-queries",
    *,
    writer: str = "Qwen/Qwen3-4B-Instruct-2507",
    base_url: str = "http://localhost:8000/v1",
    batch_size: int = 32,
) -> SentenceTransformer:
    encoder = SentenceTransformer(model)
    rows = mine_hard_negatives(
        encoder,
        Collection.load(collection, split="train"),
        num_negatives=4,
        # A training query that the negative is judged to answer is best; else the server writes one.
        negative_queries=f"judgments,openai:{writer}",
        query_options=QueryOptions(query_base_url=base_url, query_round_trip="drop"),
        query_store=output + ".queries.sqlite",
    )
    arguments = SentenceTransformerTrainingArguments(
        output + "-training", per_device_train_batch_size=batch_size, learning_rate=2e-5, report_to="none"
    )
    trainer = SentenceTransformerTrainer(model=encoder, args=arguments, train_dataset=rows, loss=CLPLoss(encoder))
    plan_on_host(trainer)  # on a GPU no step waits for the one before it
    trainer.train()
    encoder.save(output)
    return encoder


if __name__ == "__main__":
    main()
