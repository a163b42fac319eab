"""Measures: right numbers on small cases worked by hand, and the kept-aside data by default."""

import json
import math

import pytest
import torch

from pyfast import models
from pyfast.data.text import read_corpus
from pyfast.data.tokens import read_tokenizer
from pyfast.train import DataConfig, ModelConfig, RunConfig, TrainConfig, evaluate
from pyfast.train.classify import Classification
from pyfast.train.loop import fit
from tests import tiny_run


def test_classification_measures_match_a_case_worked_by_hand():
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    answers = torch.tensor([0, 0, 1, 1, 0, 0])
    found = evaluate.classification_measures(labels, answers, ["a", "b", "c", "d"])
    assert found["confusion"] == [[2, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert found["accuracy"] == pytest.approx(3 / 6)
    assert found["always_commonest"] == pytest.approx(3 / 6)
    a = {"precision": 2 / 4, "recall": 2 / 3, "f1": 4 / 7, "support": 3}
    b = {"precision": 1 / 2, "recall": 1 / 2, "f1": 1 / 2, "support": 2}
    assert found["per_class"]["a"] == pytest.approx(a)
    assert found["per_class"]["b"] == pytest.approx(b)
    assert found["per_class"]["d"] == {"precision": 0, "recall": 0, "f1": 0, "support": 0}
    assert found["macro"]["f1"] == pytest.approx((4 / 7 + 1 / 2) / 4)
    json.dumps(found)  # plain numbers, ready for evaluation.json


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    config = TrainConfig(
        data=DataConfig(path=str(tiny_run.labelled_csv()), val_fraction=0.1),
        model=ModelConfig(init_from=str(tiny_run.run())),
        run=RunConfig(
            dir=str(tmp_path_factory.mktemp("runs") / "topics"), steps=20, progress="none"
        ),
    )
    return fit(config, Classification(config)).run_dir


def test_evaluate_measures_a_classifier_on_the_part_kept_aside(classifier):
    found = evaluate.evaluate(classifier)
    assert found["macro"]["support"] == sum(map(sum, found["confusion"])) == 32
    assert found["accuracy"] > found["always_commonest"]
    assert json.loads((classifier / "evaluation.json").read_text()) == found
    assert "Confusion matrix" in (classifier / "report.html").read_text()
    text = evaluate.as_text(found)
    for words in ("precision", "recall", "f1", "macro average", "accuracy", "confusion", "fire"):
        assert words in text


def test_evaluate_measures_a_classifier_on_other_data(classifier, tmp_path):
    before = (classifier / "report.html").read_bytes()
    rows = [
        f"{' '.join(tiny_run.words()[t][i : i + 6])},{t}" for t in ("sea", "sky") for i in (0, 9)
    ]
    (tmp_path / "other.csv").write_text("\n".join(rows))
    found = evaluate.evaluate(classifier, str(tmp_path / "other.csv"))
    assert [found["per_class"][t]["support"] for t in tiny_run.TOPICS] == [0, 2, 2, 0]
    assert (classifier / "report.html").read_bytes() == before


def test_evaluate_refuses_labels_the_classifier_does_not_know(classifier, tmp_path):
    (tmp_path / "other.csv").write_text("wave,sea\nlawn,garden\n")
    with pytest.raises(ValueError, match="labels must be among fire, sea, sky, soil; got garden"):
        evaluate.evaluate(classifier, str(tmp_path / "other.csv"))


def test_language_measures_match_the_plain_formula(tmp_path):
    """Window by window in float64, with torch alone."""
    text = "\n".join(" ".join(tiny_run.words()["sky"][i : i + 20]) for i in range(5)) + "\né"
    (tmp_path / "a.txt").write_text(text)
    run = tiny_run.run()
    found = evaluate.evaluate(run, str(tmp_path / "a.txt"))
    tokenizer = read_tokenizer(run)
    ids = [*tokenizer.encode(text).ids, tokenizer.token_to_id("<|endoftext|>")]
    model, total = models.load(run).double().eval(), 0.0
    for start in range(0, len(ids) - 1, 32):
        window = torch.tensor([ids[start : start + 33]])
        with torch.no_grad():
            logits = model(window[:, :-1])[0]
        total += torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum").item()
    assert found["tokens"] == len(ids) - 1
    assert found["loss"] == pytest.approx(total / (len(ids) - 1), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert found["bytes"] == len(text.encode()) == len(text) + 1
    assert found["bits_per_byte"] == pytest.approx(total / math.log(2) / found["bytes"], rel=1e-5)


def test_evaluate_measures_a_language_model_on_its_validation_text():
    run = tiny_run.run()
    found = evaluate.evaluate(run)
    whole = sum(d.stop - d.start for d in read_corpus(str(tiny_run.text())).documents)
    assert found["bytes"] == pytest.approx(0.05 * whole, rel=0.05)
    assert found["loss"] < math.log(256) - 1  # four topics of 64 words: it has learnt the topics
    assert "bits per byte" in evaluate.as_text(found)
    assert "bits per byte" in (run / "report.html").read_text()


def test_evaluate_refuses_what_is_not_a_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"got no config\.json"):
        evaluate.evaluate(tmp_path)


def test_evaluate_asks_for_data_where_the_run_does_not_tell(tmp_path):
    model = models.load(tiny_run.run())
    models.save(model, tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((tiny_run.run() / "tokenizer.json").read_bytes())
    with pytest.raises(ValueError, match="name a text with --data"):
        evaluate.evaluate(tmp_path)
    models.save(models.SequenceClassifier(model, 2, ["a", "b"], 0), tmp_path)
    with pytest.raises(ValueError, match="name labelled data with --data"):
        evaluate.evaluate(tmp_path)
    (tmp_path / "test.jsonl").write_text('{"text": 1')
    with pytest.raises(ValueError, match=r"test\.jsonl must hold labelled texts"):
        evaluate.evaluate(tmp_path)
