"""Search with a finished run: its model and the embeddings of the collections that it was evaluated on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from st_clp.data import Collection
from st_clp.encoding import EmbeddingStore, encode_queries
from st_clp.moe import load
from st_clp.options import Encoding
from st_clp.run.folder import RunDirectory
from st_clp.run.splits import load_collections
from st_clp.search import search
from st_clp.settings import RunSettings, SettingsError


@dataclass(frozen=True)
class Answer:
    """A retrieved document: its score, collection, id and text."""

    score: float
    corpus_name: str
    doc_id: str
    text: str


class RunSearcher:
    """Searches the corpora that a run was evaluated on with its model.

    Args:
        path: The run's output folder.
        corpora: Only these corpora (``miracl/ko``) or languages (``ko``); None or empty searches all.

    Raises:
        SettingsError: The folder does not hold a finished run, or there is no corpus of that name.
    """

    def __init__(self, path: str | Path, corpora: list[str] | None = None) -> None:
        directory = RunDirectory(path)
        if directory.finished("evaluate-after") is None:
            begun = directory.settings_file.is_file()
            advice = f"finish it with: st-clp run --output {path} --resume" if begun else "make one with: st-clp run"
            raise SettingsError(f"{path} holds no finished run; {advice}")
        settings = RunSettings.from_dict(RunSettings.read_yaml(directory.settings_file))
        found: dict[str, Collection] = {}
        for collection in load_collections(replace(settings, sentence_queries=0)).evaluate:  # none are needed here
            if not corpora or {collection.corpus_name, collection.language} & set(corpora):
                found.setdefault(collection.corpus_name, collection)
        if not found:
            raise SettingsError(f"{path} has no corpus {' or '.join(corpora or [])}")
        self.model = load(str(path))
        self._encoding = Encoding.of(settings)
        # Embeddings that are missing, or not of this model, are made again.
        self._corpora = [
            (
                collection,
                EmbeddingStore.build(
                    self.model,
                    collection,
                    directory.store("after", name),
                    encoding=self._encoding,
                ),
            )
            for name, collection in found.items()
        ]

    def search(self, query: str, k: int = 5) -> list[Answer]:
        """Find the k best documents of all corpora, best first."""
        embedding = encode_queries(self.model, [query], encoding=self._encoding)
        answers = []
        for collection, store in self._corpora:
            scores, doc_ids = search(self.model, embedding, store, k)
            documents = collection.get_documents(doc_ids[0])
            answers += [
                Answer(float(score), collection.corpus_name, doc_id, documents[doc_id].text)
                for score, doc_id in zip(scores[0], doc_ids[0], strict=True)
            ]
        return sorted(answers, key=lambda answer: -answer.score)[:k]
