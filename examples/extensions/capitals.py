"""Problems of one's own: records with `question` and `answer`, made by a function.

roentgen eval --problems examples/extensions/capitals.py:capitals --samples 12 --collect-activations --output results/capitals
roentgen probe train results/capitals --label population

The answers are texts. `continent`, `population` and `large` mean nothing to the evaluation: they are labels of
every stored rollout.
"""

from collections.abc import Iterator
from typing import Any

CAPITALS = [
    ("France", "Paris", "Europe", 68.5),
    ("Japan", "Tokyo", "Asia", 123.9),
    ("Kenya", "Nairobi", "Africa", 55.1),
    ("Italy", "Rome", "Europe", 58.8),
    ("India", "New Delhi", "Asia", 1450.9),
    ("Egypt", "Cairo", "Africa", 112.7),
    ("Norway", "Oslo", "Europe", 5.6),
    ("Thailand", "Bangkok", "Asia", 71.8),
    ("Ghana", "Accra", "Africa", 34.4),
    ("Spain", "Madrid", "Europe", 48.8),
    ("Vietnam", "Hanoi", "Asia", 101.0),
    ("Morocco", "Rabat", "Africa", 38.1),
]


def capitals() -> Iterator[dict[str, Any]]:
    """Yield a record per country, always in the same order."""
    for country, capital, continent, population in CAPITALS:
        yield {
            "problem_id": f"capital-of-{country.lower()}",  # left out, an id is made up
            "question": f"What is the capital of {country}?",
            "answer": capital,
            "continent": continent,
            "population": population,
            "large": population > 60,
        }
