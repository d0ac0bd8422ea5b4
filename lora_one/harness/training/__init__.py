"""From a loaded model to a trained adapter: the start, the optimiser, the loop, what is watched."""
