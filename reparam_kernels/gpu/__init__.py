"""What every op on a GPU shares: the Triton device functions and the planning of launches."""
