"""Training in which a seed and a step determine every random choice, so that a resumed run gives the same numbers."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .data import Images
from .model import VAE
from .processes import Processes


@dataclass
class Options:
    impl: str = "kernels"
    likelihood: str = "bernoulli"
    latent: int = 2
    hidden: int = 256
    epochs: int = 60
    batch: int = 64
    lr: float = 2e-3
    seed: int = 0


HELD_OUT_SAMPLES = 16
STREAM = 1 << 32  # seeds of one run: options.seed * STREAM + step


def batches(x: Tensor, options: Options, epoch: int) -> Iterator[tuple[int, Tensor]]:
    """Yield (step, rows) in an order that depends only on seed and epoch."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(options.seed * STREAM + epoch)).to(x.device)
    per_epoch = -(-len(x) // options.batch)
    for i, rows in enumerate(order.split(options.batch)):
        yield epoch * per_epoch + i, x[rows]


@torch.no_grad()
def held_out_elbo(model: nn.Module, x: Tensor, seed: int = STREAM - 1) -> float:
    """Return the mean ELBO in nats per image, over 16 samples of z each."""
    terms = model(x, seed, (HELD_OUT_SAMPLES,))
    return -(terms.nll.mean(0) + terms.kl).mean().item()


def start(images: Images, options: Options) -> tuple[VAE, torch.optim.Optimizer]:
    torch.manual_seed(options.seed)
    model = VAE(images.train.shape[1], options.latent, options.hidden, options.likelihood, options.impl)
    model.to(images.train.device)
    return model, torch.optim.Adam(model.parameters(), lr=options.lr)


def train(
    images: Images,
    options: Options,
    checkpoint: Path | None = None,
    resume: bool = False,
    quiet: bool = False,
    processes: Processes = Processes(),  # noqa: B008  immutable
) -> tuple[VAE, list[dict[str, float]]]:
    """Return the trained model and each epoch's mean ELBO, reconstruction, KL and held-out ELBO, in nats per image."""
    model, optimizer = start(images, options)
    history: list[dict[str, float]] = []
    if resume and checkpoint is not None:
        history = restore(checkpoint, model, optimizer, options)
    parallel = processes.parallel(model)
    epochs = range(len(history), options.epochs)
    with tqdm(
        epochs,
        desc=options.impl,
        unit="epoch",
        disable=quiet or processes.rank > 0,
        initial=len(history),
        total=options.epochs,
    ) as bar:
        for epoch in bar:
            history.append(train_epoch(parallel, optimizer, images, options, epoch, processes))
            bar.set_postfix(elbo=f"{history[-1]['elbo']:.2f}", held_out=f"{history[-1]['held_out']:.2f}")
            if checkpoint is not None and processes.rank == 0:
                save(checkpoint, model, optimizer, options, history)
    return model, history


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Images,
    options: Options,
    epoch: int,
    processes: Processes = Processes(),  # noqa: B008  immutable
) -> dict[str, float]:
    nll = kl = 0.0
    for step, x in batches(images.train, options, epoch):
        own = processes.rows(len(x))
        place = {"window": ((len(x), options.latent), (own.start, 0))} if processes.count > 1 else {}
        terms = model(x[own], options.seed * STREAM + step, **place)
        optimizer.zero_grad()
        # The mean over the batch: the average over the processes of the gradients of this.
        ((terms.nll + terms.kl).sum() * processes.count / len(x)).backward()
        optimizer.step()
        nll += terms.nll.sum().item()
        kl += terms.kl.sum().item()
    n = len(images.train)
    sums = torch.tensor([nll, kl], dtype=torch.float64, device=images.train.device)
    nll, kl = processes.total(sums).tolist()
    held_out = held_out_elbo(model, images.test)
    return {"epoch": epoch + 1, "elbo": -(nll + kl) / n, "reconstruction": nll / n, "kl": kl / n, "held_out": held_out}


def save(
    path: Path, model: VAE, optimizer: torch.optim.Optimizer, options: Options, history: list[dict[str, float]]
) -> None:
    state: dict[str, Any] = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "options": asdict(options),
        "history": history,
        "random": torch.get_rng_state(),  # for impl "plain", which draws from torch's generator
    }
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def restore(path: Path, model: VAE, optimizer: torch.optim.Optimizer, options: Options) -> list[dict[str, float]]:
    state = torch.load(path, weights_only=True)
    asked, kept = asdict(options), state["options"]
    differ = [key for key in asked if key != "epochs" and asked[key] != kept[key]]
    if differ:
        raise ValueError(
            f"{path}: must have been trained with the same options; got another {', '.join(differ)}. "
            "Resume with the options of the first run, or train anew."
        )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random"])
    history: list[dict[str, float]] = state["history"]
    return history
