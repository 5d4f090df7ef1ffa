"""Model cards: rendered from the results of a run, checked, published."""
