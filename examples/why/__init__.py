"""Why z = mu + sigma * eps: the experiments of examples/why_reparameterize.py."""
