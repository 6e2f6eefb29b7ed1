"""python -m examples.iwae: importance-weighted autoencoders on the digits, by one op and by plain torch.

The bound of an image is E log (1 / K sum_k p(x, z_k) / q(z_k | x)) over K draws. It rises with K towards log p(x)
(Burda, Grosse, Salakhutdinov, "Importance Weighted Autoencoders", 2016).
"""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.distributions import Normal

import reparam_kernels as rk
from examples.common import History, Networks, arguments, train
from examples.vae.data import Images, load

Draw = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
HELD_OUT = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # draws of the held-out bounds


def by_op(mu: Tensor, logvar: Tensor, draws: int) -> tuple[Tensor, Tensor]:
    """Draw z and compute log q(z)."""
    return rk.reparameterize_log_prob(mu, logvar, sample_shape=(draws,))


def by_torch(mu: Tensor, logvar: Tensor, draws: int) -> tuple[Tensor, Tensor]:
    """The same in plain torch, with the noise of by_op."""
    q = Normal(mu, torch.exp(0.5 * logvar))
    z = q.loc + q.scale * rk.randn(draws, *mu.shape, dtype=mu.dtype)
    return z, q.log_prob(z).sum(-1)


class IWAE(Networks):
    def __init__(self, pixels: int, draw: Draw = by_op, latent: int = 4) -> None:
        super().__init__(pixels, latent)
        self.draw = draw

    def log_weights(self, x: Tensor, draws: int) -> Tensor:
        """Compute log p(x, z) - log q(z | x) of each draw and image, (draws, B)."""
        z, log_q = self.draw(*self.encode(x), draws)
        log_p = (-(z**2) / 2 - math.log(2 * math.pi) / 2).sum(-1)
        return log_p - self.nll(z, x) - log_q

    def bounds(self, x: Tensor, draws: tuple[int, ...] = HELD_OUT) -> list[float]:
        """Return the mean bound in nats for each number of draws. All take the same draws, in groups."""
        log_w = self.log_weights(x, max(draws))
        return [-rk.losses.iwae(log_w.unflatten(0, (-1, k)).transpose(0, 1)).item() for k in draws]


def fit(images: Images, draws: int, epochs: int, draw: Draw = by_op, seed: int = 0) -> tuple[IWAE, History]:
    """Train with the bound of so many draws. One seed gives one order of the images and one noise."""
    torch.manual_seed(seed)
    model = IWAE(images.train.shape[1], draw)
    losses: list[Tensor] = []

    def loss(x: Tensor) -> Tensor:
        value = rk.losses.iwae(model.log_weights(x, draws))
        losses.append(value.detach())
        return value

    def measure() -> dict[str, float]:
        mean = torch.stack(losses).mean().item()
        losses.clear()
        return {"bound": -mean}

    name = f"K = {draws}, {'plain torch' if draw is by_torch else 'one op'}"
    return model, train(model, loss, images, epochs, measure, name)


def draw_picture(bounds: dict[int, list[float]], histories: dict[str, History], draws: int, path: Path) -> None:
    from examples.vae.pictures import plt, save

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    for k, values in bounds.items():
        left.plot(HELD_OUT, values, "o-", label=f"trained with K = {k}")
    left.set_xscale("log", base=2)
    left.set(xlabel="K of the held-out bound", ylabel="nats an image", title="The bound tightens with the draws")
    left.set_xticks(HELD_OUT, [str(k) for k in HELD_OUT])
    left.legend()
    for (name, history), style in zip(histories.items(), ("-", "--"), strict=True):
        right.plot(range(1, len(history) + 1), [row["bound"] for row in history], style, lw=2, label=name)
    right.set(
        xlabel="epoch", ylabel="bound, nats an image", title=f"One training with K = {draws}, two implementations"
    )
    right.legend()
    save(figure, path)


def main() -> None:
    args = arguments("Trains importance-weighted autoencoders on handwritten digits.", "out/iwae", 60)
    images = load()
    models, histories = {}, {}
    for draws in (1, 5, 50):
        models[draws], histories[draws] = fit(images, draws, args.epochs)
    _, twin = fit(images, 5, args.epochs, by_torch)
    gap = max(abs(a["bound"] / b["bound"] - 1) for a, b in zip(histories[5], twin, strict=True))
    with torch.no_grad():
        torch.manual_seed(1)
        bounds = {draws: model.bounds(images.test) for draws, model in models.items()}
    print("held-out bound, nats an image, for K =", *(f"{k:7d}" for k in HELD_OUT))
    for draws, values in bounds.items():
        print(f"  trained with K = {draws:<20d}", *(f"{v:7.2f}" for v in values))
    print(f"plain torch with the same noise: the bounds of the epochs differ by at most {gap:.0e} of themselves")
    path = args.out / "bounds.png"
    draw_picture(bounds, {"one op": histories[5], "plain torch": twin}, 5, path)
    print(path)


if __name__ == "__main__":
    main()
