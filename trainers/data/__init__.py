"""Data: from a name to documents, from documents to a tokenizer and to training examples."""

from .avatar_parts import read_avatar_parts
from .biased_reviews import biased_reviews
from .chat import chat_examples
from .concept_data import ConceptData, part_masks
from .ctr import CtrCollator, CtrColumns, CtrData, CtrRows, CtrVocabulary, encode_ctr
from .cub import read_cub, read_traveling_birds
from .documents import corpus_fingerprint, document_digest, is_held_out
from .drifted_clicks import DriftedClicks, draw_drifted_clicks
from .fashion_scenes import read_fashion_scenes
from .functions import instruction_dataset, python_functions
from .language_sampling import sample_languages, smoothed_shares
from .libreoffice import LIBREOFFICE_LANGUAGES
from .loading import load_chat_dataset, load_text_dataset
from .movielens import MOVIELENS_COLUMNS, read_movielens_100k
from .packing import pack_documents
from .retrieval_pairs import RetrievalPairs, RetrievalSet, load_retrieval_pairs
from .shakespeare_characters import read_shakespeare_characters
from .stamp_birds import read_stamp_birds
from .tokenizer import load_tokenizer, train_encoder_tokenizer, train_tokenizer
from .user_split import user_split


__all__ = [
    "ConceptData",
    "CtrCollator",
    "CtrColumns",
    "CtrData",
    "CtrRows",
    "CtrVocabulary",
    "DriftedClicks",
    "LIBREOFFICE_LANGUAGES",
    "MOVIELENS_COLUMNS",
    "RetrievalPairs",
    "RetrievalSet",
    "biased_reviews",
    "chat_examples",
    "corpus_fingerprint",
    "document_digest",
    "draw_drifted_clicks",
    "encode_ctr",
    "instruction_dataset",
    "is_held_out",
    "load_chat_dataset",
    "load_retrieval_pairs",
    "load_text_dataset",
    "load_tokenizer",
    "pack_documents",
    "part_masks",
    "python_functions",
    "read_avatar_parts",
    "read_cub",
    "read_fashion_scenes",
    "read_movielens_100k",
    "read_shakespeare_characters",
    "read_stamp_birds",
    "read_traveling_birds",
    "sample_languages",
    "smoothed_shares",
    "train_encoder_tokenizer",
    "train_tokenizer",
    "user_split",
]
