"""What every op shares: registration with torch, the choice of an execution path and of a backend, seeds, checks."""
