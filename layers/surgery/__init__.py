"""Layers that leave values alone and change what comes back: they act on the gradient only."""

from layers.surgery.add_gradient_noise import add_gradient_noise as add_gradient_noise
from layers.surgery.clip_gradient import clip_gradient as clip_gradient
from layers.surgery.replace_gradient import replace_gradient as replace_gradient
from layers.surgery.reverse_gradient import reverse_gradient as reverse_gradient
from layers.surgery.scale_gradient import scale_gradient as scale_gradient
from layers.surgery.straight_through import straight_through as straight_through
