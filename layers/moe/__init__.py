"""Layers of experts: products of rows with the kernel of their group."""

from layers.moe.grouped_matmul import grouped_matmul as grouped_matmul
from layers.moe.modules import GatedMoE as GatedMoE
from layers.moe.modules import MoE as MoE
from layers.moe.moe import moe as moe
from layers.moe.top_k_routing import Routing as Routing
from layers.moe.top_k_routing import top_k_routing as top_k_routing
