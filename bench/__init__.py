"""The benchmark: ours and the alternatives, interleaved in one process; cases in which ours is slower are shown too."""
