"""One short script for each family of codebases: the lines it had, and ours."""
