r"""Reviews by users who mean different things by the same words: a generator with a planted bias for each user.

    q ~ N(0, 1)                        how much a user liked it, which the words tell, not without noise
    rating = [q + b_u > -t] + [q + b_u > t],  b_u ~ N(0, bias)     0, 1 or 2: three classes
    text = words of q, words of no meaning, words that user u is fond of

Without knowing the user, nobody can tell a strict user's praise from a generous one's. With `own_word_share` above 0
the text betrays its author by itself, whatever an embedding hides.
"""

import numpy as np
from datasets import Dataset, DatasetDict


GRADES = (
    ("dreadful", "awful", "useless"),
    ("poor", "bad", "weak"),
    ("meagre", "dull", "tired"),
    ("plain", "usual", "passable"),
    ("decent", "fair", "sound"),
    ("good", "nice", "solid"),
    ("great", "lovely", "strong"),
    ("superb", "brilliant", "perfect"),
)
FILLERS = tuple("the a this it was really quite rather and but thing one for me my here there with very".split())
OWN_WORDS = tuple(f"{first}{second}" for first in ("kit", "pan", "lor", "mez", "tav", "ruk") for second in
                  ("tle", "da", "mo", "sin", "bel", "gar", "nip", "vor"))  # fmt: skip
NUM_CLASSES = 3


def biased_reviews(
    num_users: int = 40,
    *,
    samples: tuple[int, int, int] = (60, 20, 60),
    bias: float = 1.2,
    threshold: float = 0.55,
    word_noise: float = 0.5,
    num_words: int = 8,
    own_word_share: float = 0.0,
    seed: int = 0,
) -> DatasetDict:
    """
    Reviews of `num_users` users for training, validation and test.

    Args:
        samples: reviews of each user in each split.
        bias: standard deviation of the users' generosity, in that of the liking.
        threshold: the two borders between the classes lie at minus and plus this.
        word_noise: of a word's grade around the liking.
        num_words: of a review; about three of five carry a grade.
        own_word_share: share of the other words that are the user's own.

    Returns:
        Splits `train`, `validation`, `test`, columns `text`, `label`, `user`, and `bias`, the truth about the user.

    Raises:
        ValueError: a share out of [0, 1], or no users, words or samples.
    """
    if num_users < 1 or num_words < 1 or min(samples) < 1 or not 0 <= own_word_share <= 1:
        raise ValueError(
            f"num_users={num_users}, num_words={num_words} and samples={samples} must be positive, "
            f"own_word_share={own_word_share} between 0 and 1."
        )
    random = np.random.default_rng(seed)
    generosity = random.normal(scale=bias, size=num_users)
    favourites = random.integers(len(OWN_WORDS), size=(num_users, 3))
    splits = {}
    for name, count in zip(("train", "validation", "test"), samples):
        users = np.repeat(np.arange(num_users), count)
        liking = random.normal(size=len(users))
        felt = liking + generosity[users]
        labels = (felt > -threshold).astype(int) + (felt > threshold)
        texts = [
            _review(q, favourites[u], num_words, word_noise, own_word_share, random) for q, u in zip(liking, users)
        ]
        columns = {"text": texts, "label": labels.tolist(), "user": users.tolist()}
        splits[name] = Dataset.from_dict(columns | {"bias": generosity[users].tolist()})
    return DatasetDict(splits)


def _review(
    liking: float, favourites: np.ndarray, count: int, noise: float, own_share: float, random: np.random.Generator
) -> str:
    words = []
    for _ in range(count):
        if random.random() < 0.6:
            place = (liking + noise * random.normal() + 2) / 4 * len(GRADES)  # liking -2 .. 2 over all grades
            words.append(random.choice(GRADES[int(np.clip(place, 0, len(GRADES) - 1))]))
        elif random.random() < own_share:
            words.append(OWN_WORDS[random.choice(favourites)])
        else:
            words.append(random.choice(FILLERS))
    return " ".join(words)


__all__ = ["NUM_CLASSES", "biased_reviews"]
