"""Which candidates count as negatives, and how: same texts, guards, hardness, directions."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    GISTEmbedLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, StaticEmbedding, Transformer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertModel, BertTokenizerFast

from st_clp.losses import CachedCLPLoss, CLPLoss

LOSSES = [CLPLoss, CachedCLPLoss]
ALL_DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
# Two rows; the positive of the first is also a document of the second.
TABLE = torch.tensor([[1.0, 0.2, 0.1], [0.1, 1.0, 0.3], [0.7, 0.1, 0.5], [0.3, 0.3, 1.0], [0.2, 0.9, 0.1]]).double()


def cross_entropy(query: int, target: int, others: list[int], scale: float = 50.0) -> float:
    unit = torch.nn.functional.normalize(TABLE, dim=1)
    score = {i: math.exp(scale * float(unit[query] @ unit[i])) for i in {target, *others}}
    return math.log(score[target] + sum(score[i] for i in others)) - math.log(score[target])


@pytest.mark.parametrize("form", ["padded", "packed", "no tokens"])
@pytest.mark.parametrize("loss_class", LOSSES)
def test_the_positives_text_is_never_its_own_negative(
    loss_class: type[CLPLoss], form: str, lookup_model: Any, run_loss: Any
) -> None:
    model = lookup_model(TABLE, form)
    # Anchors 0 and 1; positives 2 and 3; negatives 4 and 2: the second row's negative is the first row's positive.
    value, _ = run_loss(loss_class(model, queries_per_negative=0), [[0, 1], [2, 3], [4, 2]])
    expected = cross_entropy(0, 2, [3, 4]) + cross_entropy(1, 3, [2, 2, 4])
    assert value.item() == pytest.approx(expected / 2)


def test_a_negative_that_is_the_positives_text_is_left_out(lookup_model: Any, run_loss: Any) -> None:
    value, _ = run_loss(
        CLPLoss(lookup_model(TABLE), queries_per_negative=0, in_batch_negatives=False), [[0], [2], [2], [3]]
    )
    assert value.item() == pytest.approx(cross_entropy(0, 2, [3]))


@pytest.mark.parametrize("side", ["left", "right"])
def test_same_text_is_seen_through_padding(side: str, tiny_model: SentenceTransformer, run_loss: Any) -> None:
    tiny_model.tokenizer.padding_side = side
    # The text "river" stands in columns of different width, so its padding differs.
    rows = [["which river", "which lake"], ["river", "lake"], ["one two three four", "river"]]
    with torch.no_grad():
        queries, positives, negatives = (tiny_model(tiny_model.preprocess(column)) for column in rows)
        documents = torch.cat([positives["sentence_embedding"], negatives["sentence_embedding"]])
        scores = 50 * queries["sentence_embedding"] @ documents.T
    first = torch.logsumexp(scores[0, :3], 0) - scores[0, 0]  # the last document is the first one's text
    second = torch.logsumexp(scores[1], 0) - scores[1, 1]
    value, _ = run_loss(CLPLoss(tiny_model, queries_per_negative=0), rows)
    assert value.item() == pytest.approx(float(first + second) / 2, rel=1e-4)


def test_the_same_words_in_another_order_are_another_text(tiny_model: SentenceTransformer, run_loss: Any) -> None:
    rows = [["which river"], ["the king of war"], ["the war of king"]]
    value, _ = run_loss(CLPLoss(tiny_model, queries_per_negative=0), rows)
    assert value.item() > 0  # with no negative left it would be 0


def test_same_text_in_a_bag_of_tokens(run_loss: Any) -> None:
    tokenizer = Tokenizer(WordLevel({str(i): i for i in range(5)}, unk_token="0"))
    tokenizer.pre_tokenizer = Whitespace()
    model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, TABLE.clone())], device="cpu")
    value, _ = run_loss(CLPLoss(model, queries_per_negative=0), [["0", "1"], ["2", "3"], ["4", "2"]])
    expected = cross_entropy(0, 2, [3, 4]) + cross_entropy(1, 3, [2, 2, 4])
    assert value.item() == pytest.approx(expected / 2)
    # The order of tokens tells texts apart, though their embeddings are equal.
    swapped = run_loss(CLPLoss(model, queries_per_negative=0), [["0"], ["2 3"], ["3 2"]])[0].item()
    same = run_loss(CLPLoss(model, queries_per_negative=0), [["0"], ["2 3"], ["2 3"]])[0].item()
    assert swapped == pytest.approx(math.log(2))
    assert same == pytest.approx(0)
    with pytest.raises(ValueError, match="StaticEmbedding"):
        CachedCLPLoss(model)


@pytest.mark.parametrize("strategy", ["absolute", "relative"])
def test_margin_leaves_out_what_comes_too_near(strategy: Any, lookup_model: Any, run_loss: Any) -> None:
    unit = torch.nn.functional.normalize(TABLE, dim=1)
    positive, near, far = (float(unit[0] @ unit[i]) for i in (2, 3, 4))
    assert positive > near > far
    for limit, left in (((positive + near) / 2, [3, 4]), ((near + far) / 2, [4]), (far - 0.01, [])):
        margin = positive - limit if strategy == "absolute" else (positive - limit) / positive
        loss = CLPLoss(lookup_model(TABLE), queries_per_negative=0, margin=margin, margin_strategy=strategy)
        value, _ = run_loss(loss, [[0], [2], [3], [4]])
        assert value.item() == pytest.approx(cross_entropy(0, 2, left), abs=1e-12)


def test_margin_in_the_contrastive_penalty(lookup_model: Any, run_loss: Any) -> None:
    # Query 4 has to find negative 3; document 2 is farther from it than 3, document 1 nearer.
    unit = torch.nn.functional.normalize(TABLE, dim=1)
    assert float(unit[4] @ unit[1]) > float(unit[4] @ unit[3]) > float(unit[4] @ unit[2])
    model = lookup_model(TABLE)
    only_penalty = {"penalty": "contrastive", "penalty_weight": 1.0}
    value, _ = run_loss(CLPLoss(model, **only_penalty), [[0], [1], [3], [4]])
    assert value.item() == pytest.approx(cross_entropy(4, 3, [1]))
    value, _ = run_loss(CLPLoss(model, margin=0.0, **only_penalty), [[0], [1], [3], [4]])
    assert value.item() == pytest.approx(0)
    value, _ = run_loss(CLPLoss(model, margin=0.0, **only_penalty), [[0], [2], [3], [4]])
    assert value.item() == pytest.approx(cross_entropy(4, 3, [2]), rel=1e-6)


def foreign_model(folder: Path) -> SentenceTransformer:
    """A tiny model whose vocabulary is another: single letters."""
    folder.mkdir()
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    torch.manual_seed(5)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertModel(config).save_pretrained(folder)
    BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=128).save_pretrained(folder)
    modules = [Transformer(str(folder), max_seq_length=128), Pooling(16, "mean"), Normalize()]
    return SentenceTransformer(modules=modules, device="cpu")


@pytest.mark.parametrize("loss_class", LOSSES)
@pytest.mark.parametrize("vocabulary", ["same", "another"])
@pytest.mark.parametrize(("strategy", "margin"), [("absolute", 0.0), ("relative", 0.05)])
def test_a_guide_leaves_out_what_gist_leaves_out(
    strategy: Any,
    margin: float,
    vocabulary: str,
    loss_class: type[CLPLoss],
    tiny_model: SentenceTransformer,
    make_tiny_model: Callable[..., SentenceTransformer],
    columns: list[list[str]],
    tmp_path: Path,
    run_loss: Any,
    assert_close: Any,
) -> None:
    guide = make_tiny_model(seed=3, dropout=0.5) if vocabulary == "same" else foreign_model(tmp_path / "foreign")
    guide.double().eval()
    tiny_model.double().train()
    gist = GISTEmbedLoss(
        tiny_model,
        guide,
        temperature=0.02,
        margin_strategy=strategy,
        margin=margin,
        contrast_anchors=False,
        contrast_positives=False,
    )
    expected = run_loss(gist, columns[:3])
    guide.train()  # model.old_fit switches a loss's models to training; the guide's dropout must stay off
    loss = loss_class(
        tiny_model, guide=guide, margin=margin, margin_strategy=strategy, queries_per_negative=0, penalty_weight=0.0
    )
    loss.train()
    assert_close(run_loss(loss, columns[:3]), expected, rtol=1e-9, atol=1e-11)
    unguided = run_loss(loss_class(tiny_model, queries_per_negative=0), columns[:3])
    assert abs(float(unguided[0] - expected[0])) > 1e-3


def test_a_guide_judges_the_contrastive_penalty_too(
    tiny_model: SentenceTransformer,
    make_tiny_model: Callable[..., SentenceTransformer],
    columns: list[list[str]],
    run_loss: Any,
) -> None:
    settings: dict[str, Any] = {"penalty": "contrastive", "penalty_weight": 1.0}
    guide = make_tiny_model(seed=3)
    used = [*columns[:3], columns[4]]
    guided, _ = run_loss(CLPLoss(tiny_model, guide=guide, **settings), used)
    queries, documents = (
        guide.encode(texts, convert_to_tensor=True) for texts in (columns[4], columns[1] + columns[2])
    )
    model_queries, model_documents = (
        tiny_model.encode(texts, convert_to_tensor=True) for texts in (columns[4], columns[1] + columns[2])
    )
    judged, scores = queries @ documents.T, 50 * model_queries @ model_documents.T
    terms = []
    for row in range(5):
        kept = judged[row] <= judged[row, 5 + row]
        kept[5 + row] = True
        terms.append(torch.logsumexp(scores[row][kept], 0) - scores[row, 5 + row])
    assert guided.item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-4)


@pytest.mark.parametrize("loss_class", LOSSES)
@pytest.mark.parametrize("mode", [None, "in_batch_negatives", "hard_negatives", "all_negatives"])
@pytest.mark.parametrize(
    ("directions", "partition_mode"),
    [
        (("query_to_doc",), "joint"),
        (("query_to_doc", "doc_to_query"), "per_direction"),
        (("query_to_doc", "query_to_query"), "joint"),
        (ALL_DIRECTIONS, "joint"),
    ],
)
def test_directions_and_hardness_are_multiple_negatives_ranking_losses(
    directions: Any,
    partition_mode: Any,
    mode: Any,
    loss_class: type[CLPLoss],
    tiny_model: SentenceTransformer,
    columns: list[list[str]],
    run_loss: Any,
) -> None:
    tiny_model.double().train()
    settings: dict[str, Any] = {
        "scale": 30.0,
        "directions": directions,
        "partition_mode": partition_mode,
        "hardness_mode": mode,
        "hardness_strength": 4.0,
    }
    peer = MultipleNegativesRankingLoss if loss_class is CLPLoss else CachedMultipleNegativesRankingLoss
    expected = run_loss(peer(tiny_model, **settings), columns[:4])
    settings |= {"mini_batch_size": 2} if loss_class is CachedCLPLoss else {}
    loss = loss_class(tiny_model, queries_per_negative=0, **settings)
    torch.testing.assert_close(run_loss(loss, columns[:4]), expected, rtol=1e-10, atol=1e-12)


def test_hardness_where_rows_are_kept_apart(lookup_model: Any, run_loss: Any) -> None:
    model = lookup_model(TABLE)
    unit = torch.nn.functional.normalize(TABLE, dim=1)
    sim = [float(unit[0] @ unit[i]) for i in range(5)]
    expected = math.log(1 + sum(math.exp(50 * sim[i] + 5 * sim[i] - 50 * sim[2]) for i in (3, 4)))
    for mode in ("hard_negatives", "all_negatives"):
        loss = CLPLoss(
            model, queries_per_negative=0, in_batch_negatives=False, hardness_mode=mode, hardness_strength=5.0
        )
        assert run_loss(loss, [[0], [2], [3], [4]])[0].item() == pytest.approx(expected)


@pytest.mark.parametrize("direction", ["query_to_query", "doc_to_query", "doc_to_doc"])
def test_rows_with_one_answer_are_not_contrasted(direction: str, lookup_model: Any, run_loss: Any) -> None:
    # Both rows have the positive 2: whatever the direction, nothing is left to push away.
    loss = CLPLoss(lookup_model(TABLE), directions=("query_to_doc", direction), partition_mode="joint")  # type: ignore[arg-type]
    value, _ = run_loss(loss, [[0, 1], [2, 2]])
    if direction == "doc_to_query":  # the row's own query is in the softmax twice, as in every row
        assert value.item() == pytest.approx(math.log(2))
    else:
        assert value.item() == pytest.approx(0, abs=1e-12)
