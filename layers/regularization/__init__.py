"""Dropout that remembers its key."""

from layers.regularization.dropout import Dropout as Dropout
from layers.regularization.dropout import dropout as dropout
