"""`python -m examples.families.distributions`: a VAE on torch.distributions, with its Normal (--before) or ours."""

from torch import Tensor, nn
from torch.distributions import Normal as TorchNormal
from torch.distributions import kl_divergence
from torch.nn.functional import softplus

from reparam_kernels.distributions import Normal  # the one line that changes

from .common import Terms, main, mlp, nll


class VAE(nn.Module):
    def __init__(self, normal: type[TorchNormal], pixels: int = 64, hidden: int = 128, dims: int = 8):
        super().__init__()
        self.normal = normal
        self.encoder = nn.Sequential(nn.Linear(pixels, hidden), nn.ReLU())
        self.loc, self.scale = nn.Linear(hidden, dims), nn.Linear(hidden, dims)
        self.decoder = mlp(dims, pixels)

    def forward(self, x: Tensor) -> Terms:
        h = self.encoder(x)
        q = self.normal(self.loc(h), softplus(self.scale(h)) + 1e-4)
        prior = self.normal(0.0, 1.0)
        z = q.rsample()
        elbo = -(nll(self.decoder(z), x) + kl_divergence(q, prior).sum(-1)).mean()
        return Terms(-elbo, elbo)


if __name__ == "__main__":
    main(VAE, before=TorchNormal, after=Normal)
