"""The ops, a folder each: arguments and their checks, formula, CPU launch, GPU launch, public functions."""
