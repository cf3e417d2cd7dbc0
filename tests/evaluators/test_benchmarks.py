"""Several collections and their mean: MIRACL and BEIR, from files laid out as ir_datasets and BEIR have them."""

from __future__ import annotations

import csv
import gzip
import json
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from evaluators import BEIREvaluator, BenchmarkEvaluator, CollectionEvaluator, MIRACLEvaluator
from evaluators.beir import BEIR_DATASETS, CQADUPSTACK_PARTS, NANO_BEIR_DATASETS
from evaluators.benchmark import MIRACL_LANGUAGES
from st_clp import Collection
from st_clp.data import CollectionError
from tests.fresh import run_fresh
from tests.toy import write_beir

TEXTS = ["the red river", "a blue lake of the north", "old bank of the city", "big green tree", "gold and silver"]


def make_collection(shift: int, name: str) -> Collection:
    """Query n is text n; its relevant document is the one ``shift`` places on, so that shift 0 is found at once."""
    documents = {f"d{n}": text for n, text in enumerate(TEXTS)}
    queries = {f"q{n}": text for n, text in enumerate(TEXTS)}
    judgments = {f"q{n}": {f"d{(n + shift) % len(TEXTS)}": 1} for n in range(len(TEXTS) - shift)}
    return Collection.from_dict(documents, queries, judgments, name=name, corpus_name=f"corpus {shift}")


def write_beir_folder(folder: Path, shift: int, splits: tuple[str, ...] = ("test",)) -> Path:
    return write_beir(make_collection(shift, "folder"), folder, splits)


def test_the_mean_counts_every_dataset_once_and_a_dataset_of_parts_once(tiny_model, tmp_path) -> None:
    collections = {name: make_collection(shift, name) for name, shift in (("easy", 0), ("x", 1), ("y", 2))}
    evaluator = BenchmarkEvaluator(
        {"easy": collections["easy"], "hard": {"x": collections["x"], "y": collections["y"]}},
        name="both",
        metrics=["ndcg@3", "p@1"],
        store_dir=tmp_path / "stores",
    )
    assert evaluator.primary_metric == "both_mean_ndcg@3"
    found = evaluator(tiny_model, output_path=str(tmp_path))
    rows = ["mean", "easy", "hard", "hard_x", "hard_y"]
    assert list(found) == [f"both_{row}_{metric}" for row in rows for metric in ("ndcg@3", "precision@1")]
    alone = {
        name: CollectionEvaluator(collection, name="", metrics=["ndcg@3"])(tiny_model)["ndcg@3"]
        for name, collection in collections.items()
    }
    assert found["both_easy_ndcg@3"] == alone["easy"] == 1
    assert found["both_hard_x_ndcg@3"] == alone["x"]
    assert 0 < alone["x"] + alone["y"] < 2
    assert found["both_hard_ndcg@3"] == pytest.approx((alone["x"] + alone["y"]) / 2)
    assert found["both_mean_ndcg@3"] == pytest.approx((1 + found["both_hard_ndcg@3"]) / 2)

    assert list(evaluator.runs) == list(evaluator.query_scores) == ["easy", "hard_x", "hard_y"]
    assert evaluator.query_scores["easy"]["q0"] == {"ndcg@3": 1.0, "precision@1": 1.0}
    assert evaluator.counts["hard_y"]["queries"] == 3
    assert [path.name for path in evaluator.write_runs(tmp_path)] == ["easy.trec", "hard_x.trec", "hard_y.trec"]
    assert sorted(path.name for path in (tmp_path / "stores").glob("corpus_?")) == ["corpus_0", "corpus_1", "corpus_2"]
    with open(tmp_path / evaluator.csv_file, newline="") as file:
        (row,) = csv.DictReader(file)
    assert {f"both_{key}": float(value) for key, value in list(row.items())[2:]} == found
    assert json.loads((tmp_path / evaluator.json_file).read_text())["metrics"] == found
    # One line and one file for the benchmark, none for its parts.
    assert len(list(tmp_path.glob("*_results.*"))) == 2


@pytest.mark.parametrize(
    ("datasets", "message"),
    [
        ({}, "at least one dataset"),
        ({"mean": make_collection(0, "a")}, "cannot be called 'mean'"),
        ({"a": {"b": make_collection(0, "a")}, "a_b": make_collection(1, "b")}, "would both be called a_b"),
        ({"a": {}}, "the dataset a has no parts"),
        ({"../a": make_collection(0, "a")}, "cannot be a dataset's name"),
    ],
)
def test_a_wrong_set_of_datasets_is_refused(datasets, message) -> None:
    with pytest.raises(ValueError, match=message):
        BenchmarkEvaluator(datasets, name="b")


def test_an_unknown_language_or_split_of_miracl_names_those_there_are() -> None:
    with pytest.raises(
        CollectionError, match=r"MIRACL has no language 'kor'; did you mean ko\? its languages are ar, bn"
    ):
        MIRACLEvaluator(languages=("ko", "kor"))
    with pytest.raises(CollectionError) as error:
        MIRACLEvaluator(languages=("ko", "de", "yo"), split="train")
    assert "no judgments of a split 'train' for de, yo (de, yo: only dev)" in str(error.value)
    assert "Languages with train: ar, bn, en, es, fa, fi, fr, hi, id, ja, ko, ru, sw, te, th, zh" in str(error.value)
    with pytest.raises(CollectionError, match=r"split 'test-a' for ko \(ko: only dev and train\)$"):
        MIRACLEvaluator(languages="ko", split="test-a")
    with pytest.raises(CollectionError, match="split 'test' for ar, bn, de"):
        MIRACLEvaluator(languages="all", split="test")
    with pytest.raises(ValueError, match="a language is named twice: ko, fa, ko"):
        MIRACLEvaluator(languages=("ko", "fa", "ko"))


def test_all_languages_of_miracl_that_have_the_split(monkeypatch) -> None:
    loaded = []

    def load(source: str, *, split: str) -> Collection:
        loaded.append(f"{source}/{split}")
        return make_collection(0, source)

    monkeypatch.setattr(Collection, "load", load)
    evaluator = MIRACLEvaluator(languages="all")
    assert evaluator.languages == tuple(evaluator.evaluators) == MIRACL_LANGUAGES
    assert len(loaded) == 18
    assert loaded[0] == "miracl/ar/dev"
    assert evaluator.primary_metric == "miracl_mean_ndcg@10"
    train = MIRACLEvaluator(languages="all", split="train")
    assert set(MIRACL_LANGUAGES) - set(train.languages) == {"de", "yo"}
    assert train.primary_metric == "miracl_train_mean_ndcg@10"


def test_every_language_and_dataset_is_in_ir_datasets_with_judgments() -> None:
    import ir_datasets

    known = {name.split("/")[1] for name in ir_datasets.registry._registered if name.startswith("miracl/")}
    assert known == set(MIRACL_LANGUAGES)
    ids = [f"miracl/{language}/dev" for language in MIRACL_LANGUAGES]
    ids += [f"beir/cqadupstack/{part}" for part in CQADUPSTACK_PARTS]
    ids += [dataset for dataset in BEIR_DATASETS.values() if dataset != "beir/cqadupstack"]
    assert all(ir_datasets.load(dataset).has_qrels() for dataset in [*ids, *NANO_BEIR_DATASETS])
    for prefix, ours in (("beir/", {d.split("/")[1] for d in BEIR_DATASETS.values()}), ("nano-beir/", None)):
        theirs = {name.split("/")[1] for name in ir_datasets.registry._registered if name.startswith(prefix)}
        assert theirs == (ours or {name.split("/")[1] for name in NANO_BEIR_DATASETS})


def write_irds_home(home: Path) -> None:
    """A tiny MIRACL in three languages, CQADupStack and one NanoBEIR dataset, where ir_datasets looks for them."""
    collection = make_collection(1, "home")
    files = {"ko": 3, "fa": 5, "te": 2}
    for language in files:
        root = home / "miracl" / "v1.0" / language
        (root / "docs").mkdir(parents=True)
        for number in range(files[language]):
            with gzip.open(root / "docs" / f"docs-{number}.jsonl.gz", "wt") as file:
                for document in list(collection.documents())[number :: files[language]]:
                    file.write(json.dumps({"docid": document.doc_id, "title": "", "text": document.text}) + "\n")
        for split in ("dev", "train"):
            (root / split).mkdir()
            (root / split / "topics.tsv").write_text("".join(f"{q}\t{t}\n" for q, t in collection.queries.items()))
            (root / split / "qrels.tsv").write_text(
                "".join(f"{q}\tQ0\t{d}\t{g}\n" for q, docs in collection.judgments.items() for d, g in docs.items())
            )
    (home / "beir" / "cqadupstack").mkdir(parents=True)
    with zipfile.ZipFile(home / "beir" / "cqadupstack" / "source.zip", "w") as archive:
        for number, part in enumerate(CQADUPSTACK_PARTS):
            folder = write_beir_folder(home / "unzipped" / part, shift=number % 3)
            for name in ("corpus.jsonl", "queries.jsonl"):
                rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
                rows = [row | {"metadata": {"tags": []}} for row in rows]
                text = "".join(json.dumps(row) + "\n" for row in rows)
                archive.writestr(f"cqadupstack/{part}/{name}", text)
            archive.write(folder / "qrels" / "test.tsv", f"cqadupstack/{part}/qrels/test.tsv")
    nano = home / "nano-beir" / "scifact"
    nano.mkdir(parents=True)
    documents = [{"_id": document.doc_id, "text": document.text} for document in collection.documents()]
    queries = [{"_id": query_id, "text": text} for query_id, text in collection.queries.items()]
    judgments = [{"query-id": q, "corpus-id": d} for q, docs in collection.judgments.items() for d in docs]
    for name, rows in (("corpus", documents), ("queries", queries), ("qrels", judgments)):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), nano / f"{name}.parquet")


CODE = """
import json, sys
from sentence_transformers import SentenceTransformer
from evaluators import BEIREvaluator, MIRACLEvaluator
model = SentenceTransformer(sys.argv[1], device="cpu")
miracl = MIRACLEvaluator(languages=("ko", "fa", "te"), metrics=["ndcg@10"])
beir = BEIREvaluator(["cqadupstack", "nano-beir/scifact"], metrics=["ndcg@10"])
print(json.dumps({
    "dev": miracl(model),
    "primary": [miracl.primary_metric, beir.primary_metric],
    "train": MIRACLEvaluator(languages="ko", split="train", metrics=["ndcg@10"])(model),
    "beir": beir(model),
}))
"""


def test_miracl_and_beir_through_ir_datasets(tiny_model, tiny_model_path, tmp_path) -> None:
    write_irds_home(tmp_path)
    # ir_datasets reads where its files are when it is imported, so another process has to.
    result = run_fresh(CODE, tiny_model_path, env={"IR_DATASETS_HOME": str(tmp_path)})
    found = json.loads(result.stdout.splitlines()[-1])
    alone = [
        CollectionEvaluator(make_collection(shift, "c"), metrics=["ndcg@10"])(tiny_model)["c_ndcg@10"]
        for shift in range(3)
    ]
    assert len(set(alone)) == 3
    assert found["primary"] == ["miracl_mean_ndcg@10", "beir_mean_ndcg@10"]
    assert list(found["dev"]) == [f"miracl_{row}_ndcg@10" for row in ("mean", "ko", "fa", "te")]
    assert list(found["dev"].values()) == pytest.approx([alone[1]] * 4)
    assert list(found["train"]) == ["miracl_train_mean_ndcg@10", "miracl_train_ko_ndcg@10"]
    beir = found["beir"]
    assert [beir[f"beir_cqadupstack_{part}_ndcg@10"] for part in CQADUPSTACK_PARTS] == pytest.approx(alone * 4)
    assert beir["beir_cqadupstack_ndcg@10"] == pytest.approx(sum(alone) / 3)
    assert beir["beir_nano_scifact_ndcg@10"] == pytest.approx(alone[1])
    assert beir["beir_mean_ndcg@10"] == pytest.approx((sum(alone) / 3 + alone[1]) / 2)


def test_beir_folders_and_folders_of_them(tiny_model, tmp_path) -> None:
    write_beir_folder(tmp_path / "my laws", 0, splits=("dev", "test"))
    write_beir_folder(tmp_path / "forum" / "cooking", 1)
    write_beir_folder(tmp_path / "forum" / "travel", 2)
    evaluator = BEIREvaluator([str(tmp_path / "my laws"), str(tmp_path / "forum")], metrics=["ndcg@10"])
    found = evaluator(tiny_model)
    rows = ["mean", "my_laws", "forum", "forum_cooking", "forum_travel"]
    assert list(found) == [f"beir_{row}_ndcg@10" for row in rows]
    assert found["beir_my_laws_ndcg@10"] == 1
    assert found["beir_forum_cooking_ndcg@10"] != found["beir_forum_travel_ndcg@10"]
    assert evaluator.evaluators["my_laws"].collection.split == "test"
    dev = BEIREvaluator([str(tmp_path / "my laws")], split="dev")
    assert dev.evaluators["my_laws"].collection.split == "dev"
    assert dev.primary_metric == "beir_dev_mean_ndcg@10"


def test_what_beir_does_not_have_is_refused(tmp_path) -> None:
    write_beir_folder(tmp_path / "laws", 0, splits=("dev", "train"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CollectionError, match=r"unknown BEIR dataset 'scifcat', and no folder .* did you mean scifact"):
        BEIREvaluator(["scifcat"])
    with pytest.raises(CollectionError, match=r"beir/scifact has no split 'dev'; it has test, train"):
        BEIREvaluator(["scifact"], split="dev")
    with pytest.raises(CollectionError, match=r"beir/webis-touche2020/v2 has no split 'train'; it has test"):
        BEIREvaluator(["webis-touche2020"], split="train")
    with pytest.raises(CollectionError, match="name the split to read; it has dev, train"):
        BEIREvaluator([str(tmp_path / "laws")])
    with pytest.raises(CollectionError, match=r"has no corpus\.jsonl"):
        BEIREvaluator([str(tmp_path / "empty")])
    write_beir_folder(tmp_path / "other" / "laws", 0)
    with pytest.raises(ValueError, match="two datasets would both be called laws"):
        BEIREvaluator([str(tmp_path / "other" / "laws"), str(tmp_path / "other" / "laws")])


def test_languages_are_one_progress_bar_with_a_rate(tiny_model, capfd, tmp_path) -> None:
    collections = {name: make_collection(shift, name) for name, shift in (("ko", 0), ("fa", 1), ("hi", 2))}
    evaluator = BenchmarkEvaluator(collections, "m", show_progress_bar=True, store_dir=tmp_path)
    for _ in range(2):  # the second time nothing is encoded, and the bar is full all the same
        evaluator(tiny_model)
        shown = capfd.readouterr().err
        bars = [state for state in shown.split("\r") if "Evaluating" in state]
        assert shown.count("\n") == 1  # a bar that ends leaves a line
        assert "15/15" in bars[-1]
        assert "documents/s" in bars[-1]
        assert {part for state in bars for part in ("m_ko", "m_fa", "m_hi") if part in state} == {
            "m_ko",
            "m_fa",
            "m_hi",
        }
    evaluator = BenchmarkEvaluator(collections, "m")
    evaluator(tiny_model)
    assert "Evaluating" not in capfd.readouterr().err
