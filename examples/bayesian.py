"""python -m examples.bayesian: a Bayesian MLP on digits. Its weights are drawn by one op, or by plain torch (--before).

Every weight has a Gaussian posterior N(mu, softplus(rho)^2), trained with the reparameterisation trick (Blundell et
al., "Weight Uncertainty in Neural Networks", 2015). --time compares the training steps of the two ways.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import reparam_kernels as rk
from examples.vae.data import Images, load
from reparam_kernels.profiling import measure

PRIOR_STD = 0.5
Draw = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def before(mu: Tensor, rho: Tensor, prior_rho: Tensor) -> tuple[Tensor, Tensor]:
    sigma, prior = F.softplus(rho), F.softplus(prior_rho)
    w = mu + sigma * torch.randn_like(mu)
    kl = torch.log(prior / sigma) + (sigma**2 + mu**2) / (2 * prior**2) - 0.5
    return w, kl.sum()


def after(mu: Tensor, rho: Tensor, prior_rho: Tensor) -> tuple[Tensor, Tensor]:
    return rk.reparameterize_kl(mu, rho, param="softplus", prior=(torch.zeros(()), prior_rho), event_ndim=mu.dim())


class BayesianLinear(nn.Module):
    """y = x W^T + b with W and b drawn from their posterior in training, and at its mean in evaluation."""

    def __init__(self, draw: Draw, inputs: int, outputs: int) -> None:
        super().__init__()
        self.draw = draw
        self.mu = nn.Parameter(torch.randn(outputs, inputs + 1) / math.sqrt(inputs))  # the last column is b
        self.rho = nn.Parameter(torch.full((outputs, inputs + 1), -2.5))
        self.register_buffer("prior_rho", torch.tensor(math.log(math.expm1(PRIOR_STD))))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        w, kl = self.draw(self.mu, self.rho, self.prior_rho) if self.training else (self.mu, self.mu.new_zeros(()))
        return F.linear(x, w[:, :-1], w[:, -1]), kl


class BayesianMLP(nn.Module):
    def __init__(self, draw: Draw, hidden: int = 100, pixels: int = 64, classes: int = 10) -> None:
        super().__init__()
        sizes = (pixels, hidden, hidden, classes)
        self.layers = nn.ModuleList(BayesianLinear(draw, *pair) for pair in pairwise(sizes))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits, and the KL of all weights in nats."""
        x, total = self.layers[0](x)
        for layer in self.layers[1:]:
            x, kl = layer(F.relu(x))
            total = total + kl
        return x, total


class Prediction(NamedTuple):
    """Class probabilities of each image, and what is right."""

    probability: Tensor  # (N, 10)
    label: Tensor

    @property
    def accuracy(self) -> float:
        return (self.probability.argmax(1) == self.label).double().mean().item()

    @property
    def nll(self) -> float:
        """Mean -log p(label) in nats."""
        return F.nll_loss(self.probability.clamp(min=1e-12).log(), self.label).item()

    @property
    def entropy(self) -> Tensor:
        """The entropy of each prediction in nats."""
        return torch.special.entr(self.probability).sum(1)

    def bins(self, count: int = 10) -> Iterator[tuple[float, float, float]]:
        """Yield the mean confidence, the accuracy and the share of the images, for each bin of confidence."""
        confidence, chosen = self.probability.max(1)
        right = (chosen == self.label).to(confidence.dtype)
        index = (confidence * count).long().clamp(max=count - 1)
        for i in range(count):
            own = index == i
            if own.any():
                yield confidence[own].mean().item(), right[own].mean().item(), own.double().mean().item()

    @property
    def calibration_error(self) -> float:
        return sum(share * abs(confidence - accuracy) for confidence, accuracy, share in self.bins())


@torch.no_grad()
def predict(model: BayesianMLP, x: Tensor, label: Tensor, draws: int) -> Prediction:
    """Average the probabilities over draws of the weights, or use the posterior's mean if draws is 0."""
    model.train(draws > 0)
    logits = torch.stack([model(x)[0] for _ in range(max(draws, 1))])
    return Prediction(logits.softmax(-1).mean(0), label)


def step(model: BayesianMLP, optimizer: torch.optim.Optimizer, x: Tensor, label: Tensor, total: int) -> Tensor:
    """Do one step on the negative ELBO of an image: cross-entropy + KL / total."""
    model.train()
    optimizer.zero_grad()
    logits, kl = model(x)
    loss = F.cross_entropy(logits, label) + kl / total
    loss.backward()
    optimizer.step()
    return loss.detach()


def train(model: BayesianMLP, images: Images, epochs: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    total = len(images.train)
    with tqdm(range(epochs), unit="epoch", disable=None) as bar:  # quiet without a terminal
        for _ in bar:
            for rows in torch.randperm(total).split(64):
                loss = step(model, optimizer, images.train[rows], images.train_label[rows], total)
            bar.set_postfix(loss=f"{loss.item():.2f}")


def time_steps(images: Images, hidden: int, rounds: int = 30) -> dict[str, measure.Timing]:
    calls = {}
    for name, draw in (("before", before), ("after", after), ("after again", after)):
        model = BayesianMLP(draw, hidden)
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        calls[name] = lambda model=model, optimizer=optimizer: step(
            model, optimizer, images.train[:64], images.train_label[:64], len(images.train)
        )
    *_, timings = measure.interleave(calls, rounds, "cpu")
    return timings


def noisy(x: Tensor) -> Tensor:
    return (x + 0.5 * rk.randn(x.shape, seed=1)).clamp(0, 1)


def draw_picture(cases: dict[str, dict[str, Prediction]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4), constrained_layout=True)
    for ax, (name, predictions) in zip(axes, cases.items(), strict=False):
        ax.plot([0, 1], [0, 1], "k:", lw=1, label="calibrated")
        for label, prediction in predictions.items():
            confidence, accuracy, share = zip(*prediction.bins(), strict=True)
            ax.plot(confidence, accuracy, "-", lw=1)
            ax.scatter(confidence, accuracy, [20 + 200 * s for s in share], label=label, alpha=0.7)
        ax.set(xlabel="confidence", ylabel="accuracy", title=f"{name}; area: share of the images", xlim=(0, 1.05))
        ax.legend(loc="lower right")
    for name, predictions in cases.items():
        entropy = predictions["32 draws of the weights"].entropy
        axes[2].hist(entropy.tolist(), bins=30, range=(0, math.log(10)), alpha=0.6, label=name)
    axes[2].set(xlabel="entropy of the prediction, nats", ylabel="images", title="32 draws of the weights")
    axes[2].legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains a Bayesian MLP on handwritten digits.")
    parser.add_argument("--before", action="store_true", help="draw the weights by plain torch")
    parser.add_argument("--hidden", type=int, default=100, help="width of the two hidden layers (%(default)s)")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("out/bayesian"), help="folder of the picture (%(default)s)")
    parser.add_argument("--time", action="store_true", help="compare the time of a training step, and do no training")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the digits are small
    torch.manual_seed(0)
    images = load()
    if args.time:
        for name, timing in time_steps(images, args.hidden).items():
            print(f"{name:12} {timing.cpu.q50 * 1e3:.2f} ms ({timing.cpu.q10 * 1e3:.2f} to {timing.cpu.q90 * 1e3:.2f})")
        return
    model = BayesianMLP(before if args.before else after, args.hidden)
    train(model, images, args.epochs)
    cases: dict[str, Any] = {}
    for name, x in (("digits", images.test), ("digits with noise", noisy(images.test))):
        ways = {"mean of the weights": 0, "32 draws of the weights": 32}
        cases[name] = {way: predict(model, x, images.test_label, draws) for way, draws in ways.items()}
        for way, p in cases[name].items():
            print(f"{name}, {way}: accuracy {p.accuracy:.3f}, {p.nll:.3f} nats, calibration {p.calibration_error:.3f}")
    args.out.mkdir(parents=True, exist_ok=True)
    draw_picture(cases, args.out / "calibration.png")
    print(args.out / "calibration.png")


if __name__ == "__main__":
    main()
