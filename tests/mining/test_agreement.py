"""Mining agrees with brute force to the last tie, and with sentence-transformers' own miner where both can answer."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer.modules import BoW
from sentence_transformers.util import mine_hard_negatives as mine_by_peer

from st_clp import Collection
from st_clp.mining import MiningOptions, mine

VOCABULARY = ["river", "lake", "city", "king", "red", "blue"]
WORDS = st.lists(st.sampled_from(VOCABULARY), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def counting_model() -> SentenceTransformer:
    """Embeds a text as the counts of its words, so that scores are whole numbers, exact and often equal."""
    model = SentenceTransformer(modules=[BoW(VOCABULARY)], device="cpu")
    model.similarity_fn_name = "dot"
    return model


@st.composite
def collections(draw: st.DrawFn) -> Collection:
    """From one document on; copies, several positives, judged negatives, and documents that share all their words."""
    texts = draw(st.lists(WORDS.map(" ".join), min_size=1, max_size=25))
    queries = draw(st.lists(WORDS.map(" ".join), min_size=1, max_size=6))
    judgments = {}
    for number in range(len(queries)):
        judged = draw(st.dictionaries(st.integers(0, len(texts) - 1), st.integers(0, 2), max_size=4))
        judged[draw(st.integers(0, len(texts) - 1))] = 1
        judgments[f"q{number}"] = {f"d{place}": grade for place, grade in judged.items()}
    documents = {f"d{place}": text for place, text in enumerate(texts)}
    return Collection.from_dict(documents, {f"q{i}": text for i, text in enumerate(queries)}, judgments)


def brute_force(model: SentenceTransformer, collection: Collection, options: MiningOptions) -> dict[str, list[str]]:
    """Every query's negatives by a full sort in plain Python, for ``on_shortage="fewer"``."""
    texts = {document.doc_id: document.text for document in collection.documents()}
    documents = model.encode_document(list(texts.values()))
    found = {}
    for query_id, relevant in collection.positives().items():
        scores = documents @ model.encode_query([collection.queries[query_id]])[0]
        score = dict(zip(texts, scores.tolist(), strict=True))
        ranked = sorted(texts, key=lambda doc_id: -score[doc_id])  # stable: equal scores in corpus order
        candidates = [doc_id for doc_id in ranked if doc_id not in relevant][: options.range_max]
        lowest = min(score[doc_id] for doc_id in relevant)
        passed = [
            doc_id
            for doc_id in candidates
            if (options.absolute_margin is None or score[doc_id] <= lowest - options.absolute_margin)
            and (options.relative_margin is None or score[doc_id] <= lowest - options.relative_margin * abs(lowest))
            and (options.max_score is None or score[doc_id] <= options.max_score)
            and (options.min_score is None or score[doc_id] >= options.min_score)
        ]
        found[query_id] = passed[options.range_min :]
    return found


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    collection=collections(),
    number=st.integers(0, 4),
    range_min=st.integers(0, 3),
    absolute=st.sampled_from([None, 0.0, 1.0, 2.0]),
    relative=st.sampled_from([None, 0.0, 0.5]),
    highest=st.sampled_from([None, 2.0, 4.0]),
    lowest=st.sampled_from([None, 1.0]),
)
def test_negatives_are_those_of_brute_force_to_the_last_tie(
    counting_model: SentenceTransformer,
    collection: Collection,
    number: int,
    range_min: int,
    absolute: float | None,
    relative: float | None,
    highest: float | None,
    lowest: float | None,
) -> None:
    options = MiningOptions(
        num_negatives=number,
        range_min=range_min,
        range_max=20,
        absolute_margin=absolute,
        relative_margin=relative,
        max_score=highest,
        min_score=lowest,
        judged_negatives="ignore",
        prefer_known_queries=False,
        on_shortage="fewer",
    )
    mined = mine(counting_model, collection, options, show_progress_bar=False)
    texts = {document.doc_id: document.text for document in collection.documents()}
    every = brute_force(counting_model, collection, options)
    relevant = collection.positives()
    assert [(row.query_id, row.positive_id) for row in mined.rows] == [(q, d) for q in relevant for d in relevant[q]]
    for row in mined.rows:
        found = [negative.doc_id for negative in row.negatives]
        no_negatives = {row.query} | {texts[doc_id] for doc_id in relevant[row.query_id]}
        assert not {texts[doc_id] for doc_id in found} & no_negatives
        if any(texts[doc_id] in no_negatives and doc_id not in relevant[row.query_id] for doc_id in texts):
            continue  # copies of the query or an answer give up their ranks, which brute force does not know of
        assert found == every[row.query_id][:number]


def peer_rows(model: SentenceTransformer, collection: Collection, **options: object) -> dict[str, list[str]]:
    texts = {document.doc_id: document.text for document in collection.documents()}
    pairs = [
        {"anchor": collection.queries[query_id], "positive": texts[doc_id]}
        for query_id, doc_ids in collection.positives().items()
        for doc_id in doc_ids
    ]
    found = mine_by_peer(
        Dataset.from_list(pairs), model, corpus=list(texts.values()), output_format="n-tuple", verbose=False, **options
    )
    columns = [name for name in found.column_names if name.startswith("negative")]
    return {f"{row['anchor']} {row['positive']}": [row[name] for name in columns] for row in found}


@pytest.mark.parametrize("kind", ["limits", "range and margin", "depth", "cross-encoder"])
def test_options_mean_what_they_mean_to_sentence_transformers(
    tiny_model: SentenceTransformer, cross_encoder: CrossEncoder, kind: str
) -> None:
    words = "river lake mountain city country money bank language people capital red blue green old new big".split()
    documents = {f"d{i}": f"the {words[i % 16]} of {words[(i * 5 + 1) % 16]} {i}" for i in range(30)}
    queries = {f"q{i}": f"which {words[i]} is {words[i * 3 % 16]}?" for i in range(12)}
    # Two positives for each: to which of them does a margin refer?
    judgments = {f"q{i}": {f"d{i}": 1, f"d{i + 15}": 1} for i in range(12)}
    collection = Collection.from_dict(documents, queries, judgments)
    scores = tiny_model.encode_query(list(queries.values())) @ tiny_model.encode_document(list(documents.values())).T
    options: dict[str, float | int] = {
        "limits": {"max_score": float(np.quantile(scores, 0.6)), "min_score": float(np.quantile(scores, 0.1))},
        "range and margin": {"range_min": 2, "relative_margin": 0.02},
        "depth": {"range_min": 3, "range_max": 9},
        "cross-encoder": {"range_min": 1, "absolute_margin": 0.0},
    }[kind]  # type: ignore[assignment]
    # All documents are within reach: how much further one looks for the sake of positives differs.
    options = {"range_max": 28, "num_negatives": 3, **options}
    scorer = cross_encoder if kind == "cross-encoder" else None
    mined = mine(
        tiny_model,
        collection,
        MiningOptions(**options, prefer_known_queries=False, on_shortage="drop"),  # type: ignore[arg-type]
        cross_encoder=scorer,
        dtype="model",
        show_progress_bar=False,
    )
    ours = {f"{row.query} {row.positive}": [negative.text for negative in row.negatives] for row in mined.rows}
    peers = peer_rows(tiny_model, collection, cross_encoder=scorer, **options)
    assert ours == peers
    assert len(ours) > 4
