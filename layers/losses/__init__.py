"""Losses."""

from layers.losses.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from layers.losses.linear_dpo import linear_dpo as linear_dpo
from layers.losses.linear_grpo import linear_grpo as linear_grpo
from layers.losses.linear_jsd import linear_jsd as linear_jsd
from layers.losses.linear_kl_divergence import linear_kl_divergence as linear_kl_divergence
from layers.losses.linear_kto import linear_kto as linear_kto
from layers.losses.linear_log_prob import linear_log_prob as linear_log_prob
from layers.losses.linear_orpo import linear_orpo as linear_orpo
from layers.losses.linear_ppo import linear_ppo as linear_ppo
from layers.losses.policy import PolicyMetrics as PolicyMetrics
from layers.losses.softmax_cross_entropy import softmax_cross_entropy as softmax_cross_entropy
