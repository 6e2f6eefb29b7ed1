"""python -m examples.tc_vae: a beta-TCVAE on the digits beside the plain VAE.

The mean KL is mutual information + total correlation + what each dim is off its prior. The plain VAE weights the three
alike, the beta-TCVAE penalises the total correlation (Chen, Li, Grosse, Duvenaud, "Isolating Sources of Disentanglement
in Variational Autoencoders", 2018).
"""

import math
from pathlib import Path

import torch
from torch import Tensor

import reparam_kernels as rk
from examples.common import History, Networks, arguments, train
from examples.vae.data import Images, load


class TCVAE(Networks):
    def __init__(self, pixels: int, beta: float, n_data: int, latent: int = 6) -> None:
        super().__init__(pixels, latent)
        self.beta, self.n_data = beta, n_data

    def parts(self, x: Tensor, log_weights: Tensor | None) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Return z, and the three parts of log q(z|x) - log p(z). The posteriors of x stand for the aggregate one."""
        mu, logvar = self.encode(x)
        z, log_qzx = rk.reparameterize_log_prob(mu, logvar)
        log_qz, log_qz_dims = rk.mixture_log_prob(z, mu, logvar, log_weights=log_weights, of="both")
        log_pz = (-(z**2) / 2 - math.log(2 * math.pi) / 2).sum(-1)
        return z, rk.losses.total_correlation(log_qzx, log_qz, log_qz_dims, log_pz)

    def loss(self, x: Tensor) -> Tensor:
        weights = rk.losses.stratified_log_weights(len(x), self.n_data)
        z, (mi, tc, dwkl) = self.parts(x, weights)
        return (self.nll(z, x) + mi + self.beta * tc + dwkl).mean()

    def measure(self, images: Images) -> dict[str, float]:
        """Measure the parts over the whole training set, whose mixture of posteriors is q(z) itself."""
        _, parts = self.parts(images.train, None)
        mi, tc, dwkl = (part.mean().item() for part in parts)
        mu, logvar = self.encode(images.test)
        z, kl = rk.reparameterize_kl(mu, logvar, sample_shape=(8,))
        nll = self.nll(z, images.test).mean(0)
        return {"tc": tc, "mi": mi, "dwkl": dwkl, "nll": nll.mean().item(), "elbo": -(nll + kl).mean().item()}


def fit(images: Images, beta: float, epochs: int) -> tuple[TCVAE, History]:
    torch.manual_seed(0)
    model = TCVAE(images.train.shape[1], beta, len(images.train))
    return model, train(model, model.loss, images, epochs, lambda: model.measure(images), f"beta = {beta:g}", batch=128)


def draw_curves(histories: dict[str, History], path: Path) -> Path:
    from examples.vae.pictures import plt, save

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), constrained_layout=True)
    panels = (
        ("tc", "total correlation of q(z)"),
        ("mi", "mutual information of x and z"),
        ("nll", "held-out reconstruction"),
    )
    for ax, (key, title) in zip(axes, panels, strict=True):
        for name, history in histories.items():
            ax.plot(range(1, len(history) + 1), [row[key] for row in history], label=name)
        ax.set(xlabel="epoch", ylabel="nats an image", title=title)
    axes[0].set_ylim(0, None)
    axes[2].legend()
    return save(figure, path)


@torch.no_grad()
def draw_traversals(models: dict[str, TCVAE], images: Images, path: Path, columns: int = 11) -> Path:
    """Draw what each latent dim does: a row moves one dim of one image's z through the prior, the other dims stay."""
    from examples.vae.pictures import mosaic, plt, save, show

    figure, axes = plt.subplots(1, len(models), figsize=(11, 3.5), constrained_layout=True)
    steps = torch.linspace(-2.5, 2.5, columns)
    for ax, (name, model) in zip(axes, models.items(), strict=True):
        mu, logvar = model.encode(images.train)
        used = rk.kl_divergence(mu, logvar, event_ndim=0).mean(0)
        order = used.argsort(descending=True)
        base, _ = model.encode(images.test[:1])
        z = base.repeat(len(order), columns, 1)
        for row, dim in enumerate(order):
            z[row, :, dim] = steps
        show(ax, mosaic(model.decode(z).flatten(0, 1), images, columns), name)
        for row, dim in enumerate(order):
            height = (row + 0.5) * (images.height + 1) - 1
            ax.text(-2, height, f"$z_{dim + 1}$: {used[dim]:.1f} nats", ha="right", va="center", fontsize=8)
    figure.suptitle(
        "One dim at a time from -2.5 to 2.5, the others as of one image; left: the dim's mean KL", fontsize=10
    )
    return save(figure, path)


def main() -> None:
    numbers = {"beta": (6, "weight of the total correlation")}
    args = arguments("Trains a beta-TCVAE and a VAE on handwritten digits.", "out/tc_vae", 60, **numbers)
    images = load()
    models, histories = {}, {}
    for name, beta in (("VAE", 1.0), (f"beta-TCVAE, beta = {args.beta}", args.beta)):
        models[name], histories[name] = fit(images, beta, args.epochs)
        last = histories[name][-1]
        print(
            f"{name}: TC {last['tc']:.2f}, mutual information {last['mi']:.2f}, dim-wise KL {last['dwkl']:.2f}; "
            f"held-out reconstruction {last['nll']:.2f}, ELBO {last['elbo']:.2f}, nats an image"
        )
    print(draw_curves(histories, args.out / "total_correlation.png"))
    print(draw_traversals(models, images, args.out / "traversals.png"))


if __name__ == "__main__":
    main()
