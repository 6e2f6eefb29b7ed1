"""The benchmark: ours against what a user would write otherwise, interleaved in one process, losses shown like wins."""
