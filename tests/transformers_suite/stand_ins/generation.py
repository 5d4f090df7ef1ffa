"""Stands in for a file that transformers' source archive lacks.

A model with `generate` must be tested by a class of this name; the generation tests themselves are not in the archive,
and our own cover generation.
"""


class GenerationTesterMixin:
    pass
