"""Layers of experts: products of rows with the kernel of their group."""

from layers.experts.grouped_matmul import grouped_matmul as grouped_matmul
from layers.experts.modules import GatedMoE as GatedMoE
from layers.experts.modules import MoE as MoE
from layers.experts.moe import moe as moe
from layers.experts.top_k_routing import Routing as Routing
from layers.experts.top_k_routing import top_k_routing as top_k_routing
