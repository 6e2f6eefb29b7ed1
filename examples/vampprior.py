"""python -m examples.vampprior: a VAE whose prior is the mixture of the posteriors of learned inputs, on the digits.

p(z) = 1 / N sum_n q(z | u_n) with pseudo-inputs u_n that are trained with the rest (Tomczak and Welling, "VAE with a
VampPrior", 2018). The same VAE with the prior N(0, I) is trained beside it.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

import reparam_kernels as rk
from examples.common import History, Networks, arguments, train
from examples.vae.data import Images, load

LATENT = 8


class StandardPrior(nn.Module):
    """N(0, I)."""

    def kl(self, networks: Networks, mu: Tensor, logvar: Tensor, draws: int) -> tuple[Tensor, Tensor]:
        """Return z and the KL of each draw and image, which is exact here."""
        z, kl = rk.reparameterize_kl(mu, logvar, sample_shape=(draws,))
        return z, kl.expand(draws, -1)

    def draw(self, networks: Networks, count: int) -> Tensor:
        return rk.randn(count, LATENT)


class VampPrior(nn.Module):
    """The mixture of the posteriors of pseudo-inputs, which start as training images."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.logit(start.clamp(0.05, 0.95)))

    @property
    def inputs(self) -> Tensor:
        return torch.sigmoid(self.logits)

    def kl(self, networks: Networks, mu: Tensor, logvar: Tensor, draws: int) -> tuple[Tensor, Tensor]:
        """Return z and log q(z) - log p(z) of each draw and image. Its mean is the KL."""
        z, log_q = rk.reparameterize_log_prob(mu, logvar, sample_shape=(draws,))
        log_p = rk.mixture_log_prob(z, *networks.encode(self.inputs))
        assert isinstance(log_p, Tensor)
        return z, log_q - log_p

    def draw(self, networks: Networks, count: int) -> Tensor:
        mu, logvar = networks.encode(self.inputs)
        chosen = torch.randint(len(mu), (count,))
        return rk.reparameterize(mu[chosen], logvar[chosen])


class VAE(Networks):
    def __init__(self, pixels: int, prior: StandardPrior | VampPrior) -> None:
        super().__init__(pixels, LATENT)
        self.prior = prior

    def bound(self, x: Tensor, draws: int = 1) -> Tensor:
        """Compute the evidence lower bound of each image in nats."""
        z, kl = self.prior.kl(self, *self.encode(x), draws)
        return -(self.nll(z, x) + kl).mean(0)


def fit(images: Images, components: int, epochs: int) -> tuple[VAE, History]:
    """Train with a VampPrior of so many components, or with N(0, I) if there is none."""
    torch.manual_seed(0)
    prior = VampPrior(images.train[:components]) if components else StandardPrior()
    model = VAE(images.train.shape[1], prior)

    def measure() -> dict[str, float]:
        return {
            "train": model.bound(images.train).mean().item(),
            "held_out": model.bound(images.test, 16).mean().item(),
        }

    name = f"VampPrior, N = {components}" if components else "N(0, I)"
    return model, train(model, lambda x: -model.bound(x).mean(), images, epochs, measure, name)


def draw_curves(histories: dict[str, History], path: Path) -> Path:
    from examples.vae.pictures import plt, save

    figure, ax = plt.subplots(figsize=(6, 4), constrained_layout=True)
    for (name, history), colour in zip(histories.items(), ("C0", "C1"), strict=True):
        epochs = range(1, len(history) + 1)
        ax.plot(epochs, [row["held_out"] for row in history], colour, label=f"{name}, held out")
        ax.plot(epochs, [row["train"] for row in history], colour, ls=":", label=f"{name}, training")
    final = [row["held_out"] for history in histories.values() for row in history]
    ax.set_ylim(sorted(final)[len(final) // 10], None)
    ax.set(xlabel="epoch", ylabel="evidence lower bound, nats an image", title="Two priors for one VAE")
    ax.legend()
    return save(figure, path)


@torch.no_grad()
def draw_components(models: dict[str, VAE], images: Images, path: Path, columns: int = 10) -> Path:
    """Draw the pseudo-inputs, the components' decoded means, and samples from both priors."""
    from examples.vae.pictures import mosaic, plt, save, show

    torch.manual_seed(2)
    standard, vamp = models.values()
    assert isinstance(vamp.prior, VampPrior)
    inputs = vamp.prior.inputs[: 4 * columns]
    mu, _ = vamp.encode(inputs)
    panels = {
        "VampPrior: pseudo-inputs": inputs,
        "VampPrior: means of its components, decoded": vamp.decode(mu),
        "VampPrior: samples, decoded": vamp.decode(vamp.prior.draw(vamp, 4 * columns)),
        "N(0, I): samples, decoded": standard.decode(standard.prior.draw(standard, 4 * columns)),
    }
    figure, axes = plt.subplots(2, 2, figsize=(10, 5), constrained_layout=True)
    for ax, (title, rows) in zip(axes.flat, panels.items(), strict=True):
        show(ax, mosaic(rows, images, columns), title)
    return save(figure, path)


def main() -> None:
    numbers = {"components": (100, "components of the VampPrior, at least 40")}
    args = arguments("Trains a VAE with a VampPrior on handwritten digits.", "out/vampprior", 80, **numbers)
    images = load()
    models, histories = {}, {}
    for name, components in (("N(0, I)", 0), ("VampPrior", args.components)):
        models[name], histories[name] = fit(images, components, args.epochs)
        end, best = histories[name][-1]["held_out"], max(row["held_out"] for row in histories[name])
        print(f"{name}: held-out bound {end:.2f} at the end, {best:.2f} at best, nats an image")
    print(draw_curves(histories, args.out / "bounds.png"))
    print(draw_components(models, images, args.out / "components.png"))


if __name__ == "__main__":
    main()
