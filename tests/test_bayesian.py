"""examples/bayesian.py: the two ways to draw the weights train alike, and the posterior and its measures are right."""

import math

import pytest
import torch
import torch.nn.functional as F

import reparam_kernels as rk
from examples import bayesian
from examples.bayesian import BayesianMLP, Prediction
from examples.vae.data import load


def loss(model, batch):
    logits, kl = model(batch[0])
    return F.cross_entropy(logits, batch[1]) + kl / 1000


def test_both_ways_train_alike_and_their_gradients_are_right():
    images = load()
    torch.manual_seed(0)
    before, after = (BayesianMLP(draw, hidden=12) for draw in (bayesian.before, bayesian.after))
    batches = list(zip(images.train[:320].split(64), images.train_label[:320].split(64), strict=True))
    rk.testing.assert_same_training(before, after, batches, loss)
    rk.testing.gradcheck(BayesianMLP(bayesian.after, hidden=5), images.train[:8], entries=4)


def test_the_kl_is_that_of_torch_and_evaluation_takes_the_mean():
    model = BayesianMLP(bayesian.after, hidden=7)
    x = load().train[:4]
    _, kl = model(x)
    want = 0.0
    for layer in model.layers:
        posterior = torch.distributions.Normal(layer.mu.double(), F.softplus(layer.rho.double()))
        prior = torch.distributions.Normal(0.0, torch.tensor(bayesian.PRIOR_STD, dtype=torch.float64))
        want += torch.distributions.kl_divergence(posterior, prior).sum().item()
    assert kl.item() == pytest.approx(want, rel=1e-5)
    model.eval()
    assert torch.equal(model(x)[0], model(x)[0])
    assert not torch.equal(model.train()(x)[0], model(x)[0])


def test_training_learns_the_digits():
    images = load()
    torch.manual_seed(0)
    model = BayesianMLP(bayesian.after, hidden=50)
    bayesian.train(model, images, epochs=25)
    assert bayesian.predict(model, images.test, images.test_label, draws=8).accuracy > 0.9


def test_the_measures_of_a_prediction_are_the_closed_forms():
    probability = torch.tensor([[0.75, 0.25], [0.75, 0.25], [0.05, 0.95], [0.5, 0.5]], dtype=torch.float64)
    p = Prediction(probability, torch.tensor([0, 1, 1, 0]))
    assert p.accuracy == 0.75
    assert p.nll == pytest.approx(-(math.log(0.75) + math.log(0.25) + math.log(0.95) + math.log(0.5)) / 4)
    assert p.entropy[3].item() == pytest.approx(math.log(2))
    # bins: confidence 0.5 (right), 0.75 twice (half right), 0.95 (right)
    assert p.calibration_error == pytest.approx(0.25 * 0.5 + 0.5 * 0.25 + 0.25 * 0.05)
