"""From documents in a JSON-lines file and a few known questions to a better model: the whole method in one call.

A line of the documents is ``{"id": …, "title": …, "text": …}``; one of the questions ``{"question": …, "answer": id}``.
"""

import json
from pathlib import Path
from typing import Any

from st_clp import load
from st_clp.recipe import run
from st_clp.settings import RunSettings


def to_beir(documents: Path, questions: Path, folder: Path) -> Path:
    """Write the two files as a BEIR folder, the form that every command reads."""
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    with open(folder / "corpus.jsonl", "w", encoding="utf-8") as corpus:
        for line in documents.read_text(encoding="utf-8").splitlines():
            document = json.loads(line)
            line = {"_id": str(document["id"]), "title": document.get("title", ""), "text": document["text"]}
            corpus.write(json.dumps(line, ensure_ascii=False) + "\n")
    asked = [json.loads(line) for line in questions.read_text(encoding="utf-8").splitlines()]
    with open(folder / "queries.jsonl", "w", encoding="utf-8") as queries:
        for number, line in enumerate(asked):
            queries.write(json.dumps({"_id": f"q{number}", "text": line["question"]}, ensure_ascii=False) + "\n")
    judgments = [f"q{number}\t{line['answer']}\t1\n" for number, line in enumerate(asked)]
    header = "query-id\tcorpus-id\tscore\n"
    (folder / "qrels" / "train.tsv").write_text(header + "".join(judgments), encoding="utf-8")
    return folder


def main(
    model: str = "intfloat/multilingual-e5-small",
    documents: str = "documents.jsonl",
    questions: str = "questions.jsonl",
    output: str = "our-model",
    **settings: Any,
) -> dict[str, Any]:
    collection = to_beir(Path(documents), Path(questions), Path(output + "-collection"))
    report = run(
        RunSettings(
            model=model,
            collection=(str(collection),),  # without a dev.tsv, a tenth of the questions is held out
            output=output,
            **settings,
        )
    )
    question = json.loads(Path(questions).read_text(encoding="utf-8").splitlines()[0])["question"]
    print(load(output).encode_query(question)[:4])
    return report


if __name__ == "__main__":
    main()
