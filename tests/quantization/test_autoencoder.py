"""A VQ autoencoder trained on handwritten digits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from layers.quantization.vector_quantize import VectorQuantizer

CODES, STEPS = 32, 300


class Autoencoder(nnx.Module):
    """16 patches of 2 x 2 pixels, each a code."""

    def __init__(self, rngs, **options):
        self.encoder = nnx.List([nnx.Linear(4, 32, rngs=rngs), nnx.Linear(32, 8, rngs=rngs)])
        self.decoder = nnx.List([nnx.Linear(8, 32, rngs=rngs), nnx.Linear(32, 4, rngs=rngs)])
        self.quantizer = VectorQuantizer(CODES, 8, rngs=rngs, **options)

    def __call__(self, patches):
        z = self.encoder[1](jax.nn.relu(self.encoder[0](patches)))
        q, indices, loss = self.quantizer(z)
        return self.decoder[1](jax.nn.relu(self.decoder[0](q))), indices, loss


@pytest.fixture(scope="module")
def patches():
    digits = pytest.importorskip("sklearn.datasets").load_digits().images / 16
    return jnp.asarray(digits.reshape(-1, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 16, 4), jnp.float32)


def train(patches, **options):
    """The share of the variance of held-out digits that is lost, and of the codes that they use."""
    model = Autoencoder(nnx.Rngs(0), **options)
    optimizer = nnx.Optimizer(model, optax.adam(5e-3), wrt=nnx.Param)
    train_set, test_set = patches[:1400], patches[1400:]
    batches = jnp.asarray(np.random.default_rng(0).integers(0, 1400, (STEPS, 64)))

    @nnx.jit
    def run(model, optimizer, train_set, batches):
        def step(carry, batch):
            model, optimizer = carry

            def loss_of(model):
                y, _, loss = model(train_set[batch])
                return jnp.mean((y - train_set[batch]) ** 2) + loss

            optimizer.update(model, nnx.grad(loss_of)(model))
            return model, optimizer

        nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)((model, optimizer), batches)

    run(model, optimizer, train_set, batches)
    model.eval()
    y, indices, _ = model(test_set)
    return float(jnp.mean((y - test_set) ** 2) / jnp.var(test_set)), len(np.unique(indices)) / CODES


@pytest.mark.parametrize(
    ("options", "most_lost", "least_used"),
    [({"gradient": "rotation"}, 0.2, 0.25), ({"ema": True, "decay": 0.9, "threshold_ema_dead_code": 0.5}, 0.1, 0.9)],
    ids=["learned by gradient", "moving average"],
)
def test_digits_come_back_through_a_codebook(patches, options, most_lost, least_used):
    """Codes that nothing chooses get no gradient and stay unused; the moving average restarts them."""
    lost, used = train(patches, **options)
    assert lost < most_lost
    assert used > least_used
