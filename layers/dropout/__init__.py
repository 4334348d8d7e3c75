"""Dropout that remembers its key."""

from layers.dropout.dropout import Dropout as Dropout
from layers.dropout.dropout import dropout as dropout
