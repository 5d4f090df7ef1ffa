"""Data: from a name to documents, from documents to a tokenizer and to training examples."""

from .chat import chat_examples
from .documents import corpus_fingerprint, document_digest, is_held_out
from .functions import instruction_dataset, python_functions
from .language_sampling import sample_languages, smoothed_shares
from .libreoffice import LIBREOFFICE_LANGUAGES
from .loading import load_chat_dataset, load_text_dataset
from .packing import pack_documents
from .retrieval_pairs import RetrievalPairs, RetrievalSet, load_retrieval_pairs
from .tokenizer import load_tokenizer, train_encoder_tokenizer, train_tokenizer


__all__ = [
    "LIBREOFFICE_LANGUAGES",
    "RetrievalPairs",
    "RetrievalSet",
    "chat_examples",
    "corpus_fingerprint",
    "document_digest",
    "instruction_dataset",
    "is_held_out",
    "load_chat_dataset",
    "load_retrieval_pairs",
    "load_text_dataset",
    "load_tokenizer",
    "pack_documents",
    "python_functions",
    "sample_languages",
    "smoothed_shares",
    "train_encoder_tokenizer",
    "train_tokenizer",
]
