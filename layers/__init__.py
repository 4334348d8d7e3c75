"""Layers for JAX whose gradient is written by hand."""

from layers.core.function import Function as Function
from layers.core.function import forward_mode as forward_mode
from layers.core.function import once_differentiable as once_differentiable
from layers.check.residuals import Residuals as Residuals
from layers.check.residuals import residuals as residuals
from layers.surgery.add_gradient_noise import add_gradient_noise as add_gradient_noise
from layers.surgery.clip_gradient import clip_gradient as clip_gradient
from layers.surgery.replace_gradient import replace_gradient as replace_gradient
from layers.surgery.reverse_gradient import reverse_gradient as reverse_gradient
from layers.surgery.scale_gradient import scale_gradient as scale_gradient
from layers.surgery.straight_through import straight_through as straight_through
from layers.quantization.binarize import binarize as binarize
from layers.quantization.fake_quantize import fake_quantize as fake_quantize
from layers.quantization.finite_scalar_quantize import finite_scalar_quantize as finite_scalar_quantize
from layers.quantization.round_ste import round_ste as round_ste
from layers.quantization.ternarize import ternarize as ternarize
