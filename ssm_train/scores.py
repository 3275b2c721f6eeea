"""Task metrics by name: shares are in 0..1; BLEU is sacrebleu's, in 0..100."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ssm_train.errors import InputError, near

OUT_OF_CLASS = -1  # the prediction of a token that is no label: never right


def compute_metrics(
    names: Sequence[str],
    predictions: Sequence[Any],
    references: Sequence[Any],
    num_classes: int = 2,
) -> dict[str, float]:
    """Metrics of `names`, in that order.

    Classification: class indices below `num_classes`, or OUT_OF_CLASS, which is wrong. Generation:
    texts, and a list of reference texts for each. Raises InputError for an unknown name.
    """
    assert len(predictions) == len(references) > 0, (len(predictions), len(references))
    values: dict[str, float] = {}
    for name in names:
        if name not in METRICS:
            raise InputError(
                f"metric: unknown {name!r}{near(name, METRICS)} (known: {', '.join(METRICS)})"
            )
        of_classes = {"num_classes": num_classes} if name == "f1" else {}
        values[name] = METRICS[name](predictions, references, **of_classes)
    return values


# ---------------------------------------------------------------- classification


def accuracy(predictions: Sequence[int], references: Sequence[int]) -> float:
    return sum(p == r for p, r in zip(predictions, references, strict=True)) / len(references)


def f1_of(positive: int, predictions: Sequence[int], references: Sequence[int]) -> float:
    """2 TP / (2 TP + FP + FN) of one class; 0 when nothing is positive."""
    pairs = list(zip(predictions, references, strict=True))
    hits = sum(p == r == positive for p, r in pairs)
    claims = sum(p == positive for p, _ in pairs) + sum(r == positive for _, r in pairs)
    return 2 * hits / claims if claims else 0.0


def f1(predictions: Sequence[int], references: Sequence[int], num_classes: int) -> float:
    """Two classes: F1 of class 1. More: mean F1 of those in predictions or references."""
    if num_classes == 2:
        return f1_of(1, predictions, references)
    classes = {*predictions, *references} - {OUT_OF_CLASS}
    return sum(f1_of(c, predictions, references) for c in classes) / len(classes)


def matthews_correlation(predictions: Sequence[int], references: Sequence[int]) -> float:
    """R_K of Gorodkin (2004); with two classes the phi coefficient of Matthews (1975).

    OUT_OF_CLASS is one more class, which no reference has. 0 where it is undefined.
    """
    total = len(references)
    right = sum(p == r for p, r in zip(predictions, references, strict=True))
    predicted, actual = Counter(predictions), Counter(references)
    covariance = right * total - sum(predicted[c] * n for c, n in actual.items())
    spread_predicted = total**2 - sum(n * n for n in predicted.values())
    spread_actual = total**2 - sum(n * n for n in actual.values())
    if spread_predicted == 0 or spread_actual == 0:
        return 0.0
    return covariance / math.sqrt(spread_predicted * spread_actual)


# ---------------------------------------------------------------- generation


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Share of predictions equal to one of their references, runs of white space aside."""

    def plain(text: str) -> str:
        return " ".join(text.split())

    return sum(
        plain(p) in {plain(r) for r in rs} for p, rs in zip(predictions, references, strict=True)
    ) / len(predictions)


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU (Papineni et al. 2002, Post 2018), 0..100; the number of references may vary."""
    from sacrebleu.metrics import BLEU

    most = max(len(rs) for rs in references)
    # Streams of references: stream k has the k-th one of every example, None where there is none.
    streams: Any = [[rs[k] if k < len(rs) else None for rs in references] for k in range(most)]
    # force: no warning about texts whose full stops stand apart, as word vocabularies make them.
    return BLEU(force=True).corpus_score(list(predictions), streams).score


SPACELESS = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
ROUGE_WORD = rf"(?V1)[{SPACELESS}]|[\p{{L}}\p{{M}}\p{{N}}--[{SPACELESS}]]+"
"""A character of a script without spaces between words; else a run of letters, their marks and
digits."""


class WordsOfAnyScript:
    """Words of any script; of ASCII text those of rouge_score's own tokenizer, which drops all
    but a to z and digits."""

    def tokenize(self, text: str) -> list[str]:
        import regex  # knows scripts and marks, which re does not

        return regex.findall(ROUGE_WORD, text.lower())


def rouge(kind: str, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """ROUGE-1, 2 or L (Lin 2004): mean F-measure, the best reference of each example."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer([kind], tokenizer=WordsOfAnyScript())
    scores = [
        scorer.score_multi(list(rs), p)[kind].fmeasure
        for p, rs in zip(predictions, references, strict=True)
    ]
    return sum(map(float, scores)) / len(scores)


class NoSynonyms:
    """Stands in for WordNet, which would be a download."""

    def synsets(self, word: str) -> list[Any]:
        return []


def meteor(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """METEOR (Banerjee and Lavie 2005) by nltk, 0..1: mean over the best reference of each example.

    Lower-cased words, and punctuation marks by themselves, match exactly or by Porter's stem. With
    m matches in c runs of neighbours, precision P and recall R: 10 P R / (R + 9 P) times
    1 - (c / m)^3 / 2. Of equal words the last ones are matched first; the paper takes the matches
    with fewest crossings. Unlike METEOR 1.5 there are no synonyms and no paraphrases, function
    words count in full, and the parameters are those of 2005.
    """
    from nltk.stem.porter import PorterStemmer
    from nltk.translate.meteor_score import meteor_score

    def words(text: str) -> list[str]:
        return re.findall(r"\w+|[^\w\s]", text.lower())

    parts = {"preprocess": str, "stemmer": PorterStemmer(), "wordnet": NoSynonyms()}
    scores = [
        meteor_score([words(r) for r in rs], words(p), **parts)
        for p, rs in zip(predictions, references, strict=True)
    ]
    return sum(scores) / len(scores)


METRICS: dict[str, Callable[..., float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "mcc": matthews_correlation,
    "exact_match": exact_match,
    "bleu": bleu,
    "meteor": meteor,
    **{kind: partial(rouge, kind) for kind in ("rouge1", "rouge2", "rougeL")},
}
