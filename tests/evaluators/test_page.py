"""The report page as HTML: what it shows, and that everything in it is text and has a name."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lxml.html
import pytest

from evaluators.evaluation import EvaluationError
from evaluators.page import write_page
from st_clp import Collection

from .conftest import make_random_run


@pytest.fixture
def page(tmp_path: Path) -> Callable[..., lxml.html.HtmlElement]:
    def make(*evaluations: Any, **options: Any) -> lxml.html.HtmlElement:
        path = write_page(tmp_path / "page.html", evaluations, **options)
        return lxml.html.fromstring(path.read_text(encoding="utf-8"))

    return make


def cells(table: lxml.html.HtmlElement) -> list[list[str]]:
    rows = table.xpath(".//tbody/tr")
    return [[" ".join(cell.text_content().split()) for cell in row.xpath("./th|./td")] for row in rows]


def table_of(page: lxml.html.HtmlElement, label: str) -> list[list[str]]:
    (region,) = page.xpath(f'//div[@role="region"][@aria-label="{label}"]')
    return cells(region)


def test_scores_intervals_and_differences_are_those_of_the_evaluations(page, collection, make_evaluation) -> None:
    two = {"ko": collection, "fa": collection}
    before, after = make_evaluation("base", two), make_evaluation("tuned", two, seed=1, skill=0.8)
    found = page(before, after)
    rows = table_of(found, "Table of scores")
    assert [row[0] for row in rows] == ["ko", "fa", "mean"]
    for row in rows[:2]:
        for cell, evaluation in zip(row[1:3], (before, after), strict=True):
            value, low, high = map(float, re.findall(r"\d\.\d+", cell))
            assert value == pytest.approx(evaluation.results[row[0]].scores["ndcg@10"], abs=5e-5)
            assert low < value < high
    differences = table_of(found, "Table of differences")
    assert [row[0] for row in differences] == ["ko", "fa", "mean"]
    expected = after.results["ko"].scores["ndcg@10"] - before.results["ko"].scores["ndcg@10"]
    difference, low, _, high = differences[0][3].split()
    assert float(difference) == pytest.approx(expected, abs=5e-5)
    assert float(low) < float(difference) < float(high)
    assert sum(map(int, differences[0][6:])) == 40
    (drawn,) = found.xpath('//svg[@aria-label="ndcg@10 with 95 % intervals"]')
    assert len(drawn.xpath(".//g")) == 6  # three rows, two models
    assert found.xpath("//h2/text()") == ["ndcg@10, language by language", "base → tuned", "What was evaluated"]
    assert len(found.xpath('//section[@id="comparison-1"]//h3')) == 2


def test_biggest_changes_show_query_judged_document_and_what_each_ranked_first(page, make_evaluation) -> None:
    collection = Collection.load("embedded/fa", split="dev")
    before = make_evaluation("base", {"fa": collection})
    after = make_evaluation("tuned", {"fa": collection}, seed=1, skill=0.9)
    found = page(before, after)
    assert found.xpath("//h4/text()") == ["Gained most", "Lost most"]
    item = found.xpath("//h4/following-sibling::details")[0]
    old, new = before.query_scores["fa"], after.query_scores["fa"]
    change = min(old, key=lambda query_id: (old[query_id]["ndcg@10"] - new[query_id]["ndcg@10"], query_id))
    shown = next(d for d in found.xpath("//details") if collection.queries[change] in d.text_content())
    query = shown.xpath('.//span[@class="query"]')[0]
    assert (query.get("lang"), query.get("dir")) == ("fa", "auto")
    ids = shown.xpath('.//span[@class="id"]/bdi/text()')
    firsts = [max(e.run("fa")[change].items(), key=lambda pair: pair[1])[0] for e in (before, after)]
    assert ids[-2:] == firsts
    relevant = [doc_id for doc_id, grade in collection.judgments[change].items() if grade > 0]
    assert set(ids[:-2]) <= set(relevant)
    assert ids[:-2]
    texts = {d.doc_id: " ".join(d.text.split()) for d in collection.get_documents(ids).values()}
    for doc_id, paragraph in zip(ids, shown.xpath(".//dd/p"), strict=True):
        assert paragraph.text == (texts[doc_id] if len(texts[doc_id]) <= 600 else texts[doc_id][:600] + "…")
        assert (paragraph.get("lang"), paragraph.get("dir")) == ("fa", "auto")
    assert item.xpath(".//dt/text()")[0] == "Judged relevant"
    # Without texts, and where the collection is not there, ids stand in their place.
    bare = page(before, after, texts=False)
    assert "text not at hand" in bare.text_content()
    assert collection.queries[change] not in bare.text_content()


def test_a_collection_that_cannot_be_read_is_said(page, collection, make_evaluation) -> None:
    before, after = (make_evaluation(name, {"c": collection}, seed=n) for n, name in enumerate("ab"))
    found = page(before, after)
    assert "The texts of miracl/xx/dev could not be read, so ids stand in their place" in found.text_content()


def test_training_is_shown(page, collection, make_evaluation, report) -> None:
    found = page(make_evaluation("a", {"c": collection}), runs={"my run": report, "an old one": {}})
    account = dict(table_of(found, "Mining account of miracl/ko/train"))
    assert account["queries"] == "1,234"
    assert account["candidates passed over: too near the positive"] == "77"
    assert account["negatives with a query of their own"] == "900"
    labels = found.xpath("//svg/@aria-label")
    assert labels[1:] == [
        "similarity of positives and negatives to their queries, miracl/ko/train",
        "loss over training",
        "learning rate over training",
        "similarity of positives and negatives, at each refresh of the negatives",
        "share of negatives that changed, at each refresh of the negatives",
        "share of negatives that score above their positive, at each refresh of the negatives",
        "age of the negatives when they came into use, in steps, at each refresh of the negatives",
        "seconds of mining, at each refresh of the negatives",
    ]
    assert table_of(found, "The numbers: loss over training")[1] == ["2", "1.5"]
    changed = table_of(found, "The numbers: share of negatives that changed, at each refresh of the negatives")
    assert changed == [["20", "0.4", "0.3"], ["30", "0.2", "–"]]
    assert "refresh of step 40 failed, and training went on with the negatives it had: the disk is full" in (
        found.text_content()
    )
    assert table_of(found, "Experts on ko") == [["0", "25 %", "75 %"], ["1", "100 %", "0 %"]]
    assert "Hardly used: expert 1 of layer 1." in found.text_content()
    assert found.xpath("//h2/text()")[1:3] == ["Training: my run", "Training: an old one"]


def test_pooled_figures_are_marked_and_stand_apart(page, collection, make_evaluation, random_run) -> None:
    references = {"ko": random_run(collection, seed=9)}
    full = make_evaluation("full", {"ko": collection})
    pooled = make_evaluation("pool", {"ko": collection}, corpus="pooled", reference_runs=references)
    found = page(full, pooled)
    rows = table_of(found, "Table of scores")
    assert [row[0] for row in rows] == ["English ko", "ko (pooled)"]  # the one language of an evaluation is its name
    assert rows[0][2] == rows[1][1] == "not evaluated"
    text = found.text_content()
    assert "pool was searched over a pool, not over the whole corpus" in text
    assert "Not compared: ko cannot be compared" in text
    assert found.xpath("//head/title/text()") == ["ndcg@10 (pooled): full, pool"]
    again = make_evaluation("again", {"ko": collection}, corpus="pooled", reference_runs=references, seed=1)
    both = page(pooled, again)
    assert table_of(both, "Table of differences")[0][0] == "ko (pooled)"
    assert both.xpath("//h3/text()")[0] == "ko (pooled)"


def test_markup_in_texts_ids_and_names_stays_text(page, hostile, hostile_texts, hostile_report) -> None:
    found = page(*hostile, runs={hostile_texts[2]: hostile_report}, title=hostile_texts[3])
    assert found.xpath("//script|//img|//b|//i|//iframe|//@onload|//@onerror") == []
    assert found.xpath("//head/title/text()") == [hostile_texts[3]]
    text = found.text_content()
    for hostile_text in hostile_texts:
        assert f"query {' '.join(hostile_text.split())}" in text
        assert f"document {' '.join(hostile_text.split())}" in text
    assert hostile_texts[1] in found.xpath('//section[@id="comparison-1"]/h2/text()')[0]


def test_the_page_can_be_heard_and_needs_nothing_else(page, make_evaluation, report) -> None:
    embedded = Collection.load("embedded/hi", split="dev")
    evaluations = [make_evaluation(name, {"hi": embedded}, seed=n) for n, name in enumerate("ab")]
    found = page(*evaluations, runs={"my run": report})
    assert found.get("lang") == "en"
    assert [len(found.xpath(f"//{name}")) for name in ("h1", "main", "header", "footer", "nav")] == [1] * 5
    levels = [int(heading.tag[1]) for heading in found.xpath("//h1|//h2|//h3|//h4|//h5|//h6")]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    ids = found.xpath("//@id")
    assert len(ids) == len(set(ids))
    assert {link.lstrip("#") for link in found.xpath("//a/@href")} <= set(ids)
    assert set(found.xpath("//@aria-labelledby")) <= set(ids)
    for table in found.xpath("//table"):
        assert table.xpath("./thead/tr/th[@scope='col']")
        assert all(row.xpath("./th[@scope='row']") for row in table.xpath("./tbody/tr"))
    for chart in found.xpath("//svg[@class='chart']"):
        assert chart.get("role") == "img"
        assert chart.get("aria-label")
    # What scrolls can be reached by keyboard and has a name.
    for region in found.xpath("//div[contains(@class, 'wide')]"):
        assert (region.get("tabindex"), region.get("role")) == ("0", "region")
        assert region.get("aria-label")
    addresses = [*found.xpath("//@src"), *found.xpath("//link/@href")]
    assert addresses == ["data:,"]
    assert "@import" not in (styles := " ".join(found.xpath("//style/text()")))
    assert "url(" not in styles
    policy = found.xpath("//meta[@http-equiv='Content-Security-Policy']/@content")[0]
    assert policy.startswith("default-src 'none'")


def test_what_cannot_be_shown_is_refused(page, collection, make_evaluation) -> None:
    with pytest.raises(EvaluationError, match="name at least one evaluation"):
        page()
    with pytest.raises(EvaluationError, match=r"has no recall@5; it has ndcg@10, mrr@10"):
        page(make_evaluation("a", {"c": collection}), metric="recall@5")
    with pytest.raises(ValueError, match="unknown metric"):
        page(make_evaluation("a", {"c": collection}), metric="accuracy@5")


@pytest.mark.parametrize(
    "spoilt",
    [
        {"mining": [1]},
        {"mining": {"c": 7}},
        {"training": 7},
        {"training": {"history": [7]}},
        {"training": {"refreshes": {"a": 1}}},
        {"seconds": {"mine": "long"}},
        {"expert_usage": [1]},
    ],
)
def test_a_report_of_another_kind_is_refused(page, collection, make_evaluation, spoilt) -> None:
    with pytest.raises(EvaluationError, match=r"the report\.json of my run is not as a run writes it.*--resume"):
        page(make_evaluation("a", {"c": collection}), runs={"my run": spoilt})


def test_models_of_one_name_are_told_apart_by_their_folders(page, collection, evaluations_in, tmp_path) -> None:
    saved = [evaluations_in(tmp_path / folder)("base", {"c": collection}) for folder in ("one", "two")]
    names = [f"base ({evaluation.path})" for evaluation in saved]
    found = page(*saved)
    assert found.xpath("//h2/text()")[1] == " → ".join(names)
    assert found.xpath("//thead[1]/tr[1]/th/text()")[1:3] == names


def test_the_first_sentence_can_be_quoted(page, make_evaluation, evaluations_in, tmp_path) -> None:
    collections = {f"embedded_{code}_dev": Collection.load(f"embedded/{code}/dev") for code in ("ko", "fa", "hi")}
    before = make_evaluation("base", collections, skill=0.4)
    runs = {
        key: make_random_run(collection, seed=1, skill=0.2 if key == "embedded_hi_dev" else 0.7)
        for key, collection in collections.items()
    }
    after = make_evaluation("tuned", collections, runs=runs)
    report = {"training": {"steps": 120, "trainable_parameters": 7_100_000}, "seconds": {"train": 200.0, "mine": 100.0}}
    found = page(before, after, runs={"a run": report})
    (summary,) = found.xpath('//p[@class="summary"]')
    text = " ".join(summary.text_content().split())
    scores = [
        sum(result.scores["ndcg@10"] for result in evaluation.results.values()) / 3 for evaluation in (before, after)
    ]
    assert text.startswith(
        f"tuned reaches nDCG@10 {scores[1]:.3f} in the mean of Korean, Persian and Hindi, where base reaches "
        f"{scores[0]:.3f}: {scores[1] - scores[0]:+.3f} (95 % interval "
    )
    assert "Hindi (-0." in text
    assert " lost; " in text
    assert text.endswith("It took 5 minutes, 3 minutes of which are 120 steps of training of 7.1 million weights.")
    alone = " ".join(page(before).xpath('//p[@class="summary"]')[0].text_content().split())
    assert alone == f"base reaches nDCG@10 {scores[0]:.3f} in the mean of Korean, Persian and Hindi."
    chance = page(before, make_evaluation("again", collections, skill=0.4, seed=3)).text_content()
    assert "So large a difference may be chance." in chance


def test_one_search_that_was_wrong_and_is_right_now_stands_near_the_top(page, make_evaluation) -> None:
    collection = Collection.load("embedded/ko/dev")
    before = make_evaluation("base", {"ko": collection}, skill=0.2)
    after = make_evaluation("tuned", {"ko": collection}, skill=0.9)
    found = page(before, after)
    (query,) = found.xpath('//section[@id="summary"]//p[@class="asked"]')
    assert query.get("lang") == "ko"
    (query_id,) = [key for key, text in collection.queries.items() if text == query.text_content()]
    wrong, right = found.xpath('//section[@id="summary"]//span[@class="id"]/bdi/text()')
    assert collection.judgments[query_id].get(right, 0) > 0
    assert collection.judgments[query_id].get(wrong, 0) <= 0
    assert before.query_scores["ko"][query_id]["ndcg@10"] < after.query_scores["ko"][query_id]["ndcg@10"]
    # Where nothing is known of the texts, there is none to show.
    assert not page(before, after, texts=False).xpath('//p[@class="asked"]')
