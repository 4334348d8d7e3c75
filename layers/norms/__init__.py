"""Normalisation: by the row, by groups of features, by the batch, and joined with a residual sum."""

from layers.norms.add_layer_norm import add_layer_norm as add_layer_norm
from layers.norms.add_rms_norm import add_rms_norm as add_rms_norm
from layers.norms.batch_norm import BatchNorm as BatchNorm
from layers.norms.batch_norm import batch_norm as batch_norm
from layers.norms.group_norm import GroupNorm as GroupNorm
from layers.norms.group_norm import group_norm as group_norm
from layers.norms.layer_norm import LayerNorm as LayerNorm
from layers.norms.layer_norm import layer_norm as layer_norm
from layers.norms.rms_norm import RMSNorm as RMSNorm
from layers.norms.rms_norm import rms_norm as rms_norm
