"""The ops. Each folder holds an op's arguments and their checks, formula, launches and public functions."""
