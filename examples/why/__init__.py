"""Why z = mu + sigma * eps: the parts of examples/why_reparameterize.py, each an experiment of its own."""
