"""Images, ratings and speeches that are made on the spot, for the federated recipes. Not for numbers."""

import numpy as np
import torch
from datasets import Dataset

from trainers.recipes.federated_digits_data import Images, ImageTask


def bright_quarters(count: int = 240) -> ImageTask:
    """Images of 4 x 4 pixels of ten classes, told by which pixels are bright."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 10
    pixels = 0.2 * torch.rand(count, 1, 4, 4, generator=generator)
    pixels.view(count, 16)[torch.arange(count), labels] += 0.8
    parts = [Images(pixels[begin::3].clone(), labels[begin::3].clone()) for begin in range(3)]
    return ImageTask(*parts, name="quarters", license="CC0-1.0")


def made_ratings(users: int = 12, films: int = 20) -> Dataset:
    """As `read_movielens_100k` gives them, of few users; the first film is everybody's."""
    draws, rows = np.random.default_rng(0), []
    for user in range(users):
        own = np.concatenate([[0], draws.choice(np.arange(1, films), size=9, replace=False)])
        for time, film in enumerate(own):
            rows.append(
                {
                    "user_id": str(user + 1),
                    "item_id": str(film),
                    "timestamp": int(draws.integers(100)) + 100 * time,
                    "label": float((film + user) % 2),
                    "occupation": f"job {user % 3}",
                    "genres": [f"genre {film % 4}"],
                }
            )
    return Dataset.from_list(rows)


def made_speeches(*, min_characters: int = 0, max_users: int | None = None) -> Dataset:
    """As `read_shakespeare_characters` gives them: each part repeats words of its own."""
    draws, rows = np.random.default_rng(0), []
    for user in range(max_users or 8):
        for time in range(10):
            words = draws.choice([f"word{user}", "and", "the", "king"], size=30)
            rows.append({"text": " ".join(words), "character": f"part {user}", "user": user, "time": time})
    return Dataset.from_list(rows)


__all__ = ["bright_quarters", "made_ratings", "made_speeches"]
