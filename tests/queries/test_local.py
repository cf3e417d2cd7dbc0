"""Queries by a model of one's own: of both kinds, the same in any batch, and looked at before they are used."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from st_clp.data import Document
from st_clp.queries import LocalQueries, Prompts, QueryStore, make_chain
from st_clp.queries.local import SeededSampling
from st_clp.queries.query_store import CachedSource
from st_clp.queries.wording import clean, comparable, fault, same_script

from .conftest import make_documents


@pytest.fixture(params=["t5", "causal", "chat"])
def model_path(request: pytest.FixtureRequest, tiny_t5_path: Path, tiny_causal_path: Path, tmp_path: Path) -> Path:
    if request.param == "t5":
        return tiny_t5_path
    if request.param == "causal":
        return tiny_causal_path
    for file in tiny_causal_path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = "{% for m in messages %}people {{ m['content'] }} city{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def queries(model: Path, documents: list[Document], **options: object) -> dict[str, tuple[str, ...]]:
    source = LocalQueries(str(model), max_new_tokens=8, dtype="model", **options)  # type: ignore[arg-type]
    return {answer.doc_id: tuple(q.text for q in answer.queries) for answer in source.generate(documents)}


def test_samples_are_the_same_in_any_batch_and_order_and_others_by_another_seed(model_path: Path) -> None:
    # Of several lengths, so that there is padding.
    documents = [d._replace(text=d.text + " old river" * (n % 5)) for n, d in enumerate(make_documents(24))]
    options = {"samples": 3, "temperature": 2.0, "top_k": 20}
    found = queries(model_path, documents, **options)
    assert set(found) == {document.doc_id for document in documents}
    assert all(found.values())
    assert len({text for texts in found.values() for text in texts}) > 24  # not one answer for all
    shuffled = random.Random(0).sample(documents, len(documents))
    assert queries(model_path, shuffled, **options, batch_tokens=1) == found
    assert queries(model_path, documents[5:6], **options) == {"d5": found["d5"]}
    assert queries(model_path, documents, **options, seed=1) != found


def test_without_temperature_the_likeliest_is_written_once(model_path: Path) -> None:
    found = queries(model_path, make_documents(4), samples=3, temperature=0.0)
    assert all(len(texts) <= 1 for texts in found.values())
    assert found == queries(model_path, make_documents(4), samples=3, temperature=0.0, seed=9)


def test_a_causal_model_reads_prompt_and_document_and_t5_the_document_alone(
    tiny_causal_path: Path, tiny_t5_path: Path
) -> None:
    causal, seq2seq = LocalQueries(str(tiny_causal_path)), LocalQueries(str(tiny_t5_path))
    assert seq2seq.prompt("ko") == ""
    assert "한국어로" in causal.prompt("ko")
    assert causal.prompt("ko") != causal.prompt("hi")
    with_prompt = LocalQueries(str(tiny_t5_path), prompts=Prompts({"default": "write a query for {document}"}))
    assert with_prompt.prompt("ko") == "write a query for {document}"
    assert (
        len({causal.fingerprint(), seq2seq.fingerprint(), LocalQueries(str(tiny_t5_path), seed=1).fingerprint()}) == 3
    )
    # A document longer than the model reads is cut, and one of no words is no error.
    documents = [Document("long", "the river of the city " * 200), Document("none", "…")]
    found = {answer.doc_id: answer for answer in causal.generate(documents)}
    assert set(found) == {"long", "none"}
    assert found["long"].usage.prompt_tokens <= 128
    with pytest.raises(ValueError, match="too few for its prompt, a document and 120 tokens"):
        list(LocalQueries(str(tiny_causal_path), max_new_tokens=120).generate(documents))


def test_changed_weights_are_another_generator(tiny_causal_path: Path, tmp_path: Path) -> None:
    before = LocalQueries(str(tiny_causal_path)).fingerprint()
    assert before == LocalQueries(str(tiny_causal_path)).fingerprint()
    source = LocalQueries(str(tiny_causal_path))
    model, tokenizer = source._load()
    with torch.no_grad():
        model.lm_head.weight[5] += 1
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert LocalQueries(str(tmp_path)).fingerprint() != before


def test_what_is_written_is_kept_and_not_written_again(
    tiny_t5_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = [*make_documents(10), Document("copy of d3", make_documents(4)[3].text)]
    written: list[str] = []
    original = LocalQueries._write

    def counted(self: LocalQueries, some: list[Document], inputs: list[str]):  # type: ignore[no-untyped-def]
        written.extend(document.text for document in some)
        return original(self, some, inputs)

    monkeypatch.setattr(LocalQueries, "_write", counted)
    found = []
    for _ in range(2):
        with QueryStore(tmp_path / "q.sqlite") as store:
            source = CachedSource(LocalQueries(str(tiny_t5_path), max_new_tokens=8), store)
            found.append({answer.doc_id: answer.queries for answer in source.generate(documents)})
        assert len(written) == len(set(written)) == 10  # a text that comes twice is written for once
    assert found[0] == found[1]
    assert found[0]["d3"] == found[0]["copy of d3"]


def test_a_model_that_is_not_there_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"that is to write queries, .*nowhere.*there is no folder"):
        make_chain(f"judgments,local:{tmp_path / 'nowhere'}")


def test_seeded_sampling_draws_as_the_softmax_says() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5])
    rows = 4000
    sampling = SeededSampling(range(rows), temperature=1.5, top_k=4, top_p=1.0)
    drawn = sampling(torch.zeros(rows, 1, dtype=torch.long), logits.expand(rows, -1)).argmax(-1)  # type: ignore[arg-type]
    expected = torch.softmax(logits / 1.5, -1)
    expected[3] = 0  # beyond the four likeliest
    shares = torch.bincount(drawn, minlength=5) / rows
    assert (shares - expected / expected.sum()).abs().max() < 0.03
    cold = SeededSampling(range(3), temperature=0.0, top_k=4, top_p=1.0)
    assert cold(torch.zeros(3, 1, dtype=torch.long), logits.expand(3, -1)).argmax(-1).tolist() == [2, 2, 2]  # type: ignore[arg-type]
    likely = SeededSampling(range(rows), temperature=1.5, top_k=5, top_p=0.5)
    drawn = likely(torch.zeros(rows, 1, dtype=torch.long), logits.expand(rows, -1)).argmax(-1)  # type: ignore[arg-type]
    assert set(drawn.tolist()) == {1, 2}


@pytest.mark.parametrize(
    ("written", "cleaned"),
    [("\n 1. which river?\n2. no", "which river?"), ("“어느 강?”", "어느 강?"), ("- a  b\tc", "a b c"), ("   \n", ""),
     ("'tis so", "'tis so"), ("3.14 is what", "3.14 is what")],
)  # fmt: skip
def test_cleaning(written: str, cleaned: str) -> None:
    assert clean(written) == cleaned


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(text=st.text(max_size=60), document=st.text(max_size=60))
def test_looking_at_texts_of_any_script(text: str, document: str) -> None:
    assert clean(clean(text)) == clean(clean(clean(text)))
    assert fault(clean(text), document) in (None, "empty", "far too long", "the wrong language")
    assert same_script(text, text)
    assert comparable(comparable(text)) == comparable(text)


def test_the_wrong_script_is_the_wrong_language() -> None:
    korean = "나일강은 아프리카에서 가장 긴 강이다. BBC 방송"
    assert fault("아프리카에서 가장 긴 강은?", korean) is None
    assert fault("which river is the longest?", korean) == "the wrong language"
    assert fault("नील नदी कहाँ है", korean) == "the wrong language"
    assert fault("BBC가 무엇입니까", korean) is None
    assert fault("最長の川はどれですか", "ナイル川はアフリカで最も長い川である") is None
    assert fault("x" * 301, "abc") == "far too long"
    assert comparable("Which  river?") == comparable("which river")
