"""`python -m reparam_kernels profile`: what the ops cost on the user's shapes and in the user's module."""
