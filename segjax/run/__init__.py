"""What a run leaves and shares: its folder, checkpoints, scores, processes and command line."""
