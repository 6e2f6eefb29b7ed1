"""One short script for each family of codebases, with its original code and ours."""
