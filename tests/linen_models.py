"""Linen models as people write them, of whichever `nn` is given: a language model with partitioned parameters, a residual network, a
sequence-to-sequence model of recurrent cells, and a vision transformer. Each with a batch and a loss."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax


def language_model(nn, tied=False):
    """A causal decoder of tokens, padded, with logically partitioned parameters."""

    def parted(init, *names):
        return nn.with_logical_partitioning(init, names)

    kernel, zeros, ones = nn.initializers.xavier_uniform(), nn.initializers.zeros, nn.initializers.ones
    dense = lambda features, *names: nn.Dense(features, kernel_init=parted(kernel, *names), bias_init=parted(zeros, names[1]))
    norm = partial(nn.LayerNorm, bias_init=parted(zeros, "embed"), scale_init=parted(ones, "embed"))

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, mask, deterministic):
            y = norm()(x)
            y = nn.MultiHeadDotProductAttention(num_heads=2, use_bias=False, kernel_init=parted(kernel, "embed", "kv"), dropout_rate=0.1)(
                y, mask=mask, deterministic=deterministic
            )
            x = x + nn.Dropout(rate=0.1)(y, deterministic=deterministic)
            y = nn.relu(dense(64, "embed", "mlp")(norm()(x)))
            y = nn.Dropout(rate=0.1)(y, deterministic=deterministic)
            return x + dense(32, "mlp", "embed")(y)

    class Decoder(nn.Module):
        @nn.compact
        def __call__(self, tokens, deterministic=True):
            mask = nn.combine_masks(nn.make_attention_mask(tokens > 0, tokens > 0), nn.make_causal_mask(tokens))
            embed = nn.Embed(num_embeddings=50, features=32, embedding_init=parted(nn.initializers.normal(stddev=1.0), "vocab", "embed"))
            x = embed(jnp.pad(tokens, ((0, 0), (1, 0)))[:, :-1])
            x = x + self.param("positions", nn.initializers.normal(0.02), (1, 24, 32))
            for i in range(2):
                x = Block(name=f"block_{i}")(x, mask, deterministic)
            x = norm(name="norm")(x)
            return embed.attend(x) / 32**0.5 if tied else dense(50, "embed", "vocab")(x)

    tokens = jax.random.randint(jax.random.key(1), (4, 24), 1, 50).at[1, 18:].set(0)

    def loss(logits):
        each = optax.softmax_cross_entropy_with_integer_labels(logits, tokens)
        return (each * (tokens > 0)).sum() / (tokens > 0).sum()

    return Decoder(), (tokens,), loss


def residual_network(nn):
    """Convolutions with batch norm, the last norm of a block starting at zero."""

    class Block(nn.Module):
        filters: int
        conv: Any
        norm: Any
        act: Any
        strides: tuple = (1, 1)

        @nn.compact
        def __call__(self, x):
            y = self.act(self.norm()(self.conv(self.filters, (3, 3), self.strides)(x)))
            y = self.norm(scale_init=nn.initializers.zeros_init())(self.conv(self.filters, (3, 3))(y))
            if x.shape != y.shape:
                x = self.norm(name="norm_proj")(self.conv(self.filters, (1, 1), self.strides, name="conv_proj")(x))
            return self.act(x + y)

    class ResNet(nn.Module):
        @nn.compact
        def __call__(self, x, train=True):
            conv = partial(nn.Conv, use_bias=False)
            norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-5)
            x = nn.relu(norm(name="bn_init")(conv(8, (3, 3), name="conv_init")(x)))
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
            for i in range(2):
                x = Block(8 * 2**i, conv, norm, nn.relu, (2, 2) if i else (1, 1))(x)
            return nn.Dense(5)(jnp.mean(x, axis=(1, 2)))

    images, labels = jax.random.normal(jax.random.key(2), (8, 8, 8, 3)), jnp.arange(8) % 5
    return ResNet(), (images,), lambda logits: optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def sequence_to_sequence(nn):
    """An encoder whose last carry a decoder with a cell of its own starts from."""

    class Cell(nn.RNNCellBase):
        features: int

        @nn.compact
        def __call__(self, carry, x):
            carry, y = nn.LSTMCell(self.features)(carry, x)
            return carry, nn.Dense(features=7)(y)

        @property
        def num_feature_axes(self):
            return 1

    class Model(nn.Module):
        @nn.compact
        def __call__(self, source, target):
            lengths = jnp.argmax(jnp.argmax(source, -1) == 1, -1)
            carry, _ = nn.RNN(nn.LSTMCell(32), return_carry=True, name="encoder")(source, seq_lengths=lengths)
            return nn.RNN(Cell(32), name="decoder")(target[:, :-1], initial_carry=carry)

    symbols = jax.random.randint(jax.random.key(3), (2, 8, 16), 2, 7).at[0, :, 12].set(1)
    source, target = jax.nn.one_hot(symbols, 7)
    return Model(), (source, target), lambda logits: optax.softmax_cross_entropy(logits, target[:, 1:]).mean()


def vision_transformer(nn):
    """Patches, a class token, blocks that are checkpointed in a loop, and a head; written with `setup` on the outside."""

    class Mlp(nn.Module):
        @nn.compact
        def __call__(self, x, deterministic=True):
            d = x.shape[-1]
            x = nn.Dropout(rate=0.1)(nn.gelu(nn.Dense(2 * d)(x)), deterministic)
            return nn.Dense(d, bias_init=nn.initializers.normal(stddev=1e-6))(x)

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, deterministic=True):
            y = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(num_heads=2, kernel_init=nn.initializers.xavier_uniform())(y, y)
            return x + Mlp()(nn.RMSNorm()(x), deterministic), None

    class Model(nn.Module):
        def setup(self):
            self.patches = nn.Conv(16, (4, 4), strides=(4, 4), padding="VALID")
            self.cls = self.param("cls", nn.initializers.zeros, (1, 1, 16))
            blocks = nn.scan(
                nn.remat(Block, prevent_cse=False, static_argnums=(2,)),
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=nn.broadcast,
                length=3,
            )
            self.blocks = blocks()
            self.norm, self.group, self.head = nn.LayerNorm(), nn.GroupNorm(4), nn.Dense(5)

        def __call__(self, images, train=False):
            x = self.patches(images)
            x = self.group(x).reshape(x.shape[0], -1, x.shape[-1])
            x = jnp.concatenate([jnp.tile(self.cls, (x.shape[0], 1, 1)), x], axis=1)
            x, _ = self.blocks(x, not train)
            return self.head(self.norm(x)[:, 0])

    images, labels = jax.random.normal(jax.random.key(4), (4, 16, 16, 3)), jnp.arange(4)
    return Model(), (images,), lambda logits: optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


MODELS = {
    "language model": language_model,
    "tied language model": partial(language_model, tied=True),
    "residual network": residual_network,
    "sequence to sequence": sequence_to_sequence,
    "vision transformer": vision_transformer,
}
