"""The digits VAE with each estimator in its encoder: its training, and the variance of its gradient."""

from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import reparam_kernels as rk
from examples.vae.data import Images
from examples.vae.model import VAE, Terms
from examples.vae.training import Options, start, train_epoch

ESTIMATORS = ("score function", "score function, baseline", "pathwise")
NOISES = 16  # draws for each measured variance
Row = dict[str, Any]


class Estimated(nn.Module):
    """The VAE's terms. Their value is the same for each estimator, which decides only the gradient of nll.

    The gradients to the decoder and of the KL need no estimator. With z as a constant, nll gives mu and logvar
        score function:  (nll - baseline) grad log q(z | x),  baseline: 0, or the mean nll of the batch's other images.
    """

    def __init__(self, vae: VAE, estimator: str):
        super().__init__()
        self.vae, self.estimator = vae, estimator

    def forward(self, x: Tensor, seed: int, samples: tuple[int, ...] = ()) -> Terms:
        if self.estimator == "pathwise":
            return self.vae(x, seed, samples)
        h = self.vae.encoder(x)
        mu, logvar = self.vae.head.mu(h), self.vae.head.logvar(h)
        z, kl = rk.reparameterize_kl(mu, logvar, seed=seed, sample_shape=samples)
        nll = self.vae.nll(z.detach(), x)
        reward = nll.detach()
        if self.estimator == "score function, baseline":
            reward = reward - (reward.sum(-1, keepdim=True) - reward) / (reward.shape[-1] - 1)
        score = reward * rk.DiagonalGaussian(mu, logvar).log_prob(z.detach())
        return Terms(nll + score - score.detach(), kl)


def gradient(model: Estimated, x: Tensor, seed: int) -> Tensor:
    """Return the gradient of a batch's mean negative ELBO in all encoder weights, as one vector."""
    terms = model(x, seed)
    weights = [*model.vae.encoder.parameters(), *model.vae.head.parameters()]
    return torch.cat([g.flatten() for g in torch.autograd.grad((terms.nll + terms.kl).mean(), weights)])


def gradient_variance(model: Estimated, x: Tensor, noises: int = NOISES) -> float:
    """Sum the variances of all weights' gradients over the noise, for fixed weights and batch."""
    return torch.stack([gradient(model, x, seed) for seed in range(noises)]).var(0).sum().item()


def train(images: Images, options: Options, estimator: str) -> list[Row]:
    """Return for each epoch the ELBO and the gradient variance at its initial weights; for a pathwise run all three."""
    vae, optimizer = start(images, options)
    model, batch = Estimated(vae, estimator), images.train[: options.batch]
    measured = ESTIMATORS if estimator == "pathwise" else (estimator,)
    steps = -(-len(images.train) // options.batch)
    rows = []
    for epoch in range(options.epochs):
        variances = {name: gradient_variance(Estimated(vae, name), batch) for name in measured}
        row = train_epoch(model, optimizer, images, options, epoch)  # type: ignore[arg-type]
        rows.append({**row, "estimator": estimator, "seed": options.seed, "step": epoch * steps, "variance": variances})
    return rows


def compare(images: Images, epochs: int, seeds: int, hidden: int = Options.hidden) -> list[Row]:
    """Run the same training with each estimator, over several seeds."""
    runs = [(name, seed) for seed in range(seeds) for name in ESTIMATORS]
    return [
        row
        for name, seed in tqdm(runs, desc="digits", unit="run")
        for row in train(images, Options(epochs=epochs, seed=seed, hidden=hidden), name)
    ]
