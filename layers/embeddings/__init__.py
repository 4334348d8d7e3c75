"""Embedding tables."""

from layers.embeddings.embed import Embed as Embed
from layers.embeddings.embed import embed as embed
