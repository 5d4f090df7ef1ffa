"""Data: from a name to documents, from documents to a tokenizer and to training examples."""

from .chat import chat_examples
from .documents import corpus_fingerprint, document_digest, is_held_out
from .functions import instruction_dataset, python_functions
from .libreoffice import LIBREOFFICE_LANGUAGES
from .loading import load_chat_dataset, load_text_dataset
from .packing import pack_documents
from .tokenizer import load_tokenizer, train_tokenizer


__all__ = [
    "LIBREOFFICE_LANGUAGES",
    "chat_examples",
    "corpus_fingerprint",
    "document_digest",
    "instruction_dataset",
    "is_held_out",
    "load_chat_dataset",
    "load_text_dataset",
    "load_tokenizer",
    "pack_documents",
    "python_functions",
    "train_tokenizer",
]
