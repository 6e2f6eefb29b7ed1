"""The random numbers, tested hard: `python -m tests.quality`. Minutes long, so not a part of the suite."""
