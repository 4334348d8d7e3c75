"""Quantisers, whose forward is a staircase and whose backward is a slope chosen by hand."""

from layers.quantization.binarize import binarize as binarize
from layers.quantization.fake_quantize import fake_quantize as fake_quantize
from layers.quantization.finite_scalar_codes import finite_scalar_codes as finite_scalar_codes
from layers.quantization.finite_scalar_codes import finite_scalar_indices as finite_scalar_indices
from layers.quantization.finite_scalar_quantize import finite_scalar_quantize as finite_scalar_quantize
from layers.quantization.fp8_linear import Fp8Linear as Fp8Linear
from layers.quantization.fp8_linear import fp8_linear as fp8_linear
from layers.quantization.int8_linear import Int8Linear as Int8Linear
from layers.quantization.int8_linear import int8_linear as int8_linear
from layers.quantization.residual_vector_quantize import residual_vector_quantize as residual_vector_quantize
from layers.quantization.round_ste import round_ste as round_ste
from layers.quantization.ternarize import ternarize as ternarize
from layers.quantization.vector_quantize import QuantizationLosses as QuantizationLosses
from layers.quantization.vector_quantize import VectorQuantizer as VectorQuantizer
from layers.quantization.vector_quantize import vector_quantize as vector_quantize
